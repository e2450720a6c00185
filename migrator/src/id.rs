//! The name of one attempt at a migration.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// 128 random bits that name one attempt. A retry has another one, so what is said of a failed attempt (a late COMMIT,
/// a tombstone) can never be taken for the next. Written as 32 hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct MigrationId(pub [u8; 16]);

/// The text is no migration id.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("a migration id is 32 hexadecimal digits, not {0:?}")]
pub struct BadId(String);

impl MigrationId {
    /// A new one, from the kernel's random numbers.
    pub fn random() -> std::io::Result<Self> {
        let mut bytes = [0; 16];
        let filled = rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())?;
        // Requests of up to 256 bytes are never cut short (getrandom(2)); an id of zeros must still never be used.
        if filled < bytes.len() {
            return Err(std::io::Error::other("the kernel gave too few random bytes"));
        }
        Ok(Self(bytes))
    }
}

impl fmt::Display for MigrationId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for MigrationId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for MigrationId {
    type Err = BadId;
    fn from_str(text: &str) -> Result<Self, BadId> {
        let bad = || BadId(text.chars().take(40).collect());
        if text.len() != 32 || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return Err(bad());
        }
        u128::from_str_radix(text, 16).map(|number| Self(number.to_be_bytes())).map_err(|_| bad())
    }
}

impl TryFrom<String> for MigrationId {
    type Error = BadId;
    fn try_from(text: String) -> Result<Self, BadId> {
        text.parse()
    }
}

impl From<MigrationId> for String {
    fn from(id: MigrationId) -> Self {
        id.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_round_trip_and_hostile_texts() {
        let id = MigrationId::random().unwrap();
        assert_eq!(id.to_string().parse::<MigrationId>().unwrap(), id);
        assert_ne!(id, MigrationId::random().unwrap());
        for bad in [
            "",
            "00",
            &"0".repeat(31),
            &"0".repeat(33),
            &"g".repeat(32),
            &format!("+{}", "0".repeat(31)),
            &"é".repeat(16),
        ] {
            assert!(bad.parse::<MigrationId>().is_err(), "{bad}");
        }
    }
}
