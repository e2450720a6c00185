//! The wire protocol: bytes in, values out, and back. No socket here. `docs/migration-protocol.md` has the tables.
//!
//! All integers are little-endian. Every length is checked against a cap before anything is allocated for it, every
//! count against the bytes that are there, and every enumeration against its values.

use crate::layout::LayoutError;

pub mod frame;
pub mod message;
pub mod preamble;

pub use frame::{Header, decode, encode};
pub use message::Message;

/// The protocol that this crate speaks.
pub const VERSION: u16 = 2;
/// The port that an agent listens on.
pub const DEFAULT_PORT: u16 = 7437;
/// The most page streams of one migration.
pub const MAX_STREAMS: u16 = 16;

/// Why bytes from a peer are no message.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// A message type that does not exist in this version.
    #[error("unknown message type {0}")]
    Type(u16),
    /// Flags that do not exist in this version.
    #[error("unknown flags {0:#x}")]
    Flags(u16),
    /// More bytes than this type of message may have.
    #[error("a {kind} message of {length} bytes; at most {cap} are allowed")]
    TooLong {
        /// Name of the type.
        kind: &'static str,
        /// Claimed length.
        length: u64,
        /// Allowed length.
        cap: u64,
    },
    /// The bytes were changed on the way.
    #[error("wrong checksum of a {0}")]
    Checksum(&'static str),
    /// The bytes end too early.
    #[error("a {0} message ends too early")]
    Short(&'static str),
    /// There are bytes left over.
    #[error("a {0} message has {1} bytes too many")]
    Trailing(&'static str, usize),
    /// A field has a value that it must not have.
    #[error("{field} of a {kind} message must not be {value}")]
    Value {
        /// Name of the type.
        kind: &'static str,
        /// Name of the field.
        field: &'static str,
        /// Its value.
        value: u64,
    },
    /// Text or JSON that is none.
    #[error("a {kind} message has a body that cannot be read: {reason}")]
    Body {
        /// Name of the type.
        kind: &'static str,
        /// What is wrong.
        reason: String,
    },
    /// A layout that cannot be.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// Not the first bytes of the protocol.
    #[error("not the microvm protocol")]
    Magic,
    /// Another version of the protocol.
    #[error("the peer speaks version {theirs} of the migration protocol, this host version {VERSION}")]
    Version {
        /// The peer's version.
        theirs: u16,
    },
}

/// The start of a text that has at most so many bytes.
pub(crate) fn cut(text: &str, most: usize) -> &str {
    let end = (0..=most.min(text.len())).rev().find(|end| text.is_char_boundary(*end));
    &text[..end.unwrap_or(0)]
}

/// Reads fields off the front of a message.
pub(crate) struct Fields<'a> {
    kind: &'static str,
    rest: &'a [u8],
}

impl<'a> Fields<'a> {
    pub(crate) fn new(kind: &'static str, rest: &'a [u8]) -> Self {
        Self { kind, rest }
    }

    pub(crate) fn bytes(&mut self, length: usize) -> Result<&'a [u8], WireError> {
        let (bytes, rest) = self.rest.split_at_checked(length).ok_or(WireError::Short(self.kind))?;
        self.rest = rest;
        Ok(bytes)
    }

    pub(crate) fn array<const N: usize>(&mut self) -> Result<[u8; N], WireError> {
        let (bytes, rest) = self.rest.split_first_chunk().ok_or(WireError::Short(self.kind))?;
        self.rest = rest;
        Ok(*bytes)
    }

    pub(crate) fn u8(&mut self) -> Result<u8, WireError> {
        self.array().map(u8::from_le_bytes)
    }

    pub(crate) fn u16(&mut self) -> Result<u16, WireError> {
        self.array().map(u16::from_le_bytes)
    }

    pub(crate) fn u32(&mut self) -> Result<u32, WireError> {
        self.array().map(u32::from_le_bytes)
    }

    pub(crate) fn u64(&mut self) -> Result<u64, WireError> {
        self.array().map(u64::from_le_bytes)
    }

    pub(crate) fn flag(&mut self, field: &'static str) -> Result<bool, WireError> {
        match self.u8()? {
            0 => Ok(false),
            1 => Ok(true),
            value => Err(self.value(field, value.into())),
        }
    }

    /// Everything that is left, as text.
    pub(crate) fn text(&mut self) -> Result<String, WireError> {
        let bytes = std::mem::take(&mut self.rest);
        String::from_utf8(bytes.to_vec()).map_err(|error| self.body(&error))
    }

    /// Everything that is left, as JSON.
    pub(crate) fn json<T: serde::de::DeserializeOwned>(&mut self) -> Result<T, WireError> {
        serde_json::from_slice(std::mem::take(&mut self.rest)).map_err(|error| self.body(&error))
    }

    pub(crate) fn value(&self, field: &'static str, value: u64) -> WireError {
        WireError::Value { kind: self.kind, field, value }
    }

    fn body(&self, error: &dyn std::error::Error) -> WireError {
        WireError::Body { kind: self.kind, reason: error.to_string() }
    }

    pub(crate) fn end(self) -> Result<(), WireError> {
        if self.rest.is_empty() { Ok(()) } else { Err(WireError::Trailing(self.kind, self.rest.len())) }
    }
}
