//! The first bytes of every connection, in clear text also where TLS follows: nothing in them is secret. Inside TLS they are
//! said once more, so that nobody between the hosts can make one connection into another.
//!
//! Both directions have the same frame (magic, length, version, then what that version says), so that any version can
//! be told apart from any other and from what is no microvm at all, before it is understood.

use std::fmt;

use super::{Fields, MAX_STREAMS, VERSION, WireError, cut};
use crate::id::MigrationId;

/// What a preamble and its answer begin with.
pub const MAGIC: [u8; 8] = *b"MICROVM\n";
/// Magic and length: what must be read to know how much more to read.
pub const HEAD_BYTES: usize = 10;
/// The most bytes after the head.
pub const MAX_BODY_BYTES: usize = 1024;

/// Flag of a preamble: TLS follows.
const TLS: u8 = 1;
const PREAMBLE: &str = "preamble";
const WELCOME: &str = "preamble answer";

/// What a connection is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Role {
    /// Questions to the host's agent.
    Request = 1,
    /// Messages of one migration.
    Control = 2,
    /// Pages of one migration.
    Pages = 3,
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Request => "request",
            Self::Control => "control",
            Self::Pages => "pages",
        })
    }
}

/// What the connecting side says first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Preamble {
    /// What the connection is for.
    pub role: Role,
    /// Number of the page stream, from 0; 0 for the other roles.
    pub stream: u16,
    /// The attempt.
    pub id: MigrationId,
}

/// What the accepting side answers.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Welcome {
    /// Go on.
    Accepted,
    /// No, for this reason. The connection ends.
    Refused(String),
}

/// Reads the head of a preamble or of its answer: how many bytes follow.
pub fn body_length(head: &[u8; HEAD_BYTES]) -> Result<usize, WireError> {
    let mut fields = Fields::new(PREAMBLE, head);
    if fields.array()? != MAGIC {
        return Err(WireError::Magic);
    }
    let length = fields.u16()? as usize;
    if length > MAX_BODY_BYTES {
        return Err(WireError::TooLong { kind: PREAMBLE, length: length as u64, cap: MAX_BODY_BYTES as u64 });
    }
    Ok(length)
}

fn frame(body: &[u8]) -> Vec<u8> {
    let mut bytes = MAGIC.to_vec();
    bytes.extend((body.len() as u16).to_le_bytes());
    bytes.extend(body);
    bytes
}

fn version(fields: &mut Fields<'_>) -> Result<(), WireError> {
    match fields.u16()? {
        VERSION => Ok(()),
        theirs => Err(WireError::Version { theirs }),
    }
}

impl Preamble {
    /// The bytes, head included. `tls`: whether TLS follows them.
    pub fn encode(&self, tls: bool) -> Vec<u8> {
        let mut body = VERSION.to_le_bytes().to_vec();
        body.extend([self.role as u8, if tls { TLS } else { 0 }]);
        body.extend(self.stream.to_le_bytes());
        body.extend(self.id.0);
        frame(&body)
    }

    /// From the bytes after the head; and whether TLS follows.
    pub fn decode(body: &[u8]) -> Result<(Self, bool), WireError> {
        let mut fields = Fields::new(PREAMBLE, body);
        version(&mut fields)?;
        let role = match fields.u8()? {
            1 => Role::Request,
            2 => Role::Control,
            3 => Role::Pages,
            other => return Err(fields.value("role", other.into())),
        };
        let flags = fields.u8()?;
        if flags & !TLS != 0 {
            return Err(fields.value("flags", flags.into()));
        }
        let stream = fields.u16()?;
        if stream >= MAX_STREAMS || role != Role::Pages && stream != 0 {
            return Err(fields.value("stream", stream.into()));
        }
        let id = MigrationId(fields.array()?);
        fields.end()?;
        Ok((Self { role, stream, id }, flags == TLS))
    }
}

impl Welcome {
    /// The bytes, head included. A long reason is cut.
    pub fn encode(&self) -> Vec<u8> {
        let mut body = VERSION.to_le_bytes().to_vec();
        match self {
            Self::Accepted => body.extend(0u16.to_le_bytes()),
            Self::Refused(reason) => {
                body.extend(1u16.to_le_bytes());
                body.extend(cut(reason, MAX_BODY_BYTES - body.len()).as_bytes());
            }
        }
        frame(&body)
    }

    /// From the bytes after the head. An acceptor of another version is told by its version, whatever else it says.
    pub fn decode(body: &[u8]) -> Result<Self, WireError> {
        let mut fields = Fields::new(WELCOME, body);
        version(&mut fields)?;
        match fields.u16()? {
            0 => fields.end().map(|()| Self::Accepted),
            1 => fields.text().map(Self::Refused),
            other => Err(fields.value("status", other.into())),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn split(bytes: &[u8]) -> (usize, &[u8]) {
        let (head, body) = bytes.split_first_chunk().unwrap();
        (body_length(head).unwrap(), body)
    }

    #[test]
    fn golden() {
        let preamble = Preamble { role: Role::Pages, stream: 3, id: MigrationId(std::array::from_fn(|n| n as u8)) };
        crate::golden::check("preamble", &preamble.encode(false));
        crate::golden::check("preamble-tls", &preamble.encode(true));
        crate::golden::check("preamble-answer-accepted", &Welcome::Accepted.encode());
        crate::golden::check("preamble-answer-refused", &Welcome::Refused("unknown migration".into()).encode());
    }

    proptest! {
        #[test]
        fn round_trip(role in prop::sample::select(vec![Role::Request, Role::Control, Role::Pages]), stream in 0..MAX_STREAMS,
                      tls: bool, id in any::<[u8; 16]>(), reason in ".{0,2000}") {
            let stream = if role == Role::Pages { stream } else { 0 };
            let preamble = Preamble { role, stream, id: MigrationId(id) };
            let bytes = preamble.encode(tls);
            let (length, body) = split(&bytes);
            prop_assert_eq!(length, body.len());
            prop_assert_eq!(Preamble::decode(body), Ok((preamble, tls)));
            for cut in 0..body.len() { prop_assert!(Preamble::decode(&body[..cut]).is_err()); }
            let bytes = Welcome::Refused(reason.clone()).encode();
            let (length, body) = split(&bytes);
            prop_assert!(length <= MAX_BODY_BYTES);
            let Ok(Welcome::Refused(read)) = Welcome::decode(body) else { panic!() };
            prop_assert!(reason.starts_with(&read));
        }

        #[test]
        fn no_bytes_panic(head in any::<[u8; HEAD_BYTES]>(), body in prop::collection::vec(any::<u8>(), 0..64)) {
            let _ = body_length(&head);
            let _ = (Preamble::decode(&body), Welcome::decode(&body));
        }
    }

    /// What version 1 said, as its golden file had it, and how it is told that this is another version.
    #[test]
    fn version_1_is_told_apart() {
        let sent = b"MICROVM\n\x16\0\x01\0\x03\0\x03\0\0\x01\x02\x03\x04\x05\x06\x07\x08\x09\x0a\x0b\x0c\x0d\x0e\x0f";
        let golden = include_str!("../../tests/golden/v1/preamble.hex");
        let bytes: Vec<u8> = golden.split_whitespace().map(|byte| u8::from_str_radix(byte, 16).unwrap()).collect();
        assert_eq!(bytes, sent);
        let error = Preamble::decode(&bytes[HEAD_BYTES..]).unwrap_err();
        assert_eq!(error, WireError::Version { theirs: 1 });
        assert!(error.to_string().contains("version 1") && error.to_string().contains("version 2"), "{error}");
        // Its answer to us has the frame that all versions have.
        assert_eq!(Welcome::decode(&[1, 0, 1, 0, b'n', b'o']), Err(WireError::Version { theirs: 1 }));
    }

    #[test]
    fn hostile_fields() {
        let good = Preamble { role: Role::Control, stream: 0, id: MigrationId([1; 16]) }.encode(false);
        let body = &good[HEAD_BYTES..];
        let with = |at: usize, value: u8| {
            let mut bytes = body.to_vec();
            bytes[at] = value;
            Preamble::decode(&bytes)
        };
        assert_eq!(with(0, 3), Err(WireError::Version { theirs: 3 }));
        assert_eq!(with(1, 1), Err(WireError::Version { theirs: 258 }));
        for role in [0, 4, 255] {
            assert!(matches!(with(2, role), Err(WireError::Value { field: "role", .. })));
        }
        for flags in [2, 3, 0x80, 255] {
            assert!(matches!(with(3, flags), Err(WireError::Value { field: "flags", .. })));
        }
        assert!(matches!(with(4, 1), Err(WireError::Value { field: "stream", .. })));
        assert!(matches!(with(5, 255), Err(WireError::Value { field: "stream", .. })));
        assert!(matches!(Preamble::decode(&[body, &[0]].concat()), Err(WireError::Trailing(..))));
        let mut head: [u8; HEAD_BYTES] = good[..HEAD_BYTES].try_into().unwrap();
        head[8..].copy_from_slice(&1025u16.to_le_bytes());
        assert!(matches!(body_length(&head), Err(WireError::TooLong { .. })));
        assert_eq!(body_length(b"HTTP/1.1 4"), Err(WireError::Magic));
        assert_eq!(Welcome::decode(&[9, 0, 0, 0]), Err(WireError::Version { theirs: 9 }));
        assert!(Welcome::decode(&[2, 0, 2, 0]).is_err() && Welcome::decode(&[2, 0, 0, 0, 0]).is_err());
        assert!(Welcome::decode(&[2, 0, 1, 0, 0xff]).is_err(), "not UTF-8");
    }
}
