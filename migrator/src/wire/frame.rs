//! The frame around each message of a request or control connection: type, length, checksum.

use xxhash_rust::xxh3::Xxh3;

use super::message::{Kind, Message};
use super::{Fields, WireError};

/// Bytes of a frame's header.
pub const HEADER_BYTES: usize = 16;

/// A header that was checked: the type exists, and the length is allowed for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    kind: Kind,
    length: u32,
    checksum: u64,
}

impl Header {
    /// Reads and checks a header.
    pub fn decode(bytes: &[u8; HEADER_BYTES]) -> Result<Self, WireError> {
        let mut fields = Fields::new("frame header", bytes);
        let kind = Kind::try_from(fields.u16()?)?;
        let flags = fields.u16()?;
        if flags != 0 {
            return Err(WireError::Flags(flags));
        }
        let length = fields.u32()?;
        if length > kind.cap() {
            return Err(WireError::TooLong { kind: kind.name(), length: length.into(), cap: kind.cap().into() });
        }
        Ok(Self { kind, length, checksum: fields.u64()? })
    }

    /// How many bytes of payload follow.
    pub fn length(&self) -> usize {
        self.length as usize
    }
}

/// The bytes of a message, header included.
pub fn encode(message: &Message) -> Vec<u8> {
    let mut bytes = vec![0; HEADER_BYTES];
    message.write(&mut bytes);
    let length = (bytes.len() - HEADER_BYTES) as u32;
    bytes[0..2].copy_from_slice(&(message.kind() as u16).to_le_bytes());
    bytes[4..8].copy_from_slice(&length.to_le_bytes());
    let sum = checksum(&bytes[..8], &bytes[HEADER_BYTES..]);
    bytes[8..16].copy_from_slice(&sum.to_le_bytes());
    bytes
}

/// The message of a header and its payload.
pub fn decode(header: &Header, payload: &[u8]) -> Result<Message, WireError> {
    let mut start = [0; 8];
    start[0..2].copy_from_slice(&(header.kind as u16).to_le_bytes());
    start[4..8].copy_from_slice(&header.length.to_le_bytes());
    if payload.len() != header.length() || checksum(&start, payload) != header.checksum {
        return Err(WireError::Checksum(header.kind.name()));
    }
    Message::read(header.kind, payload)
}

/// xxh3 over the first eight bytes of the header and the payload.
fn checksum(start: &[u8], payload: &[u8]) -> u64 {
    let mut hasher = Xxh3::new();
    hasher.update(start);
    hasher.update(payload);
    hasher.digest()
}

#[cfg(test)]
mod tests;
