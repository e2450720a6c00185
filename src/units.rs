//! Sizes, rates and durations as people write them: `256M`, `100M` a second, `50ms`.

use std::time::Duration;

/// Why a word is no size or duration.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum UnitError {
    /// Not a size.
    #[error("{0:?} is not a size: write a number and K, M, G or T (powers of 1024), like 256M")]
    Size(String),
    /// Not a rate.
    #[error("{0:?} is not a rate: write bytes a second like 100M, or bits a second like 1gbit")]
    Rate(String),
    /// Not a duration.
    #[error("{0:?} is not a duration: write a number and us, ms, s or m, like 50ms")]
    Duration(String),
    /// Too short or too long a silence.
    #[error("use 100ms to 60m")]
    Silence,
}

/// How long silence may be before it means death: long enough that a busy host is not dead.
pub fn parse_dead_after(word: &str) -> Result<Duration, UnitError> {
    parse_duration(word).and_then(check_dead_after)
}

/// A silence that may mean death: 100 ms to an hour.
pub fn check_dead_after(time: Duration) -> Result<Duration, UnitError> {
    let sensible = Duration::from_millis(100)..=Duration::from_secs(3600);
    if sensible.contains(&time) { Ok(time) } else { Err(UnitError::Silence) }
}

fn split(word: &str) -> Option<(f64, String)> {
    let word = word.trim();
    let digits = word.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(word.len());
    let number: f64 = word[..digits].parse().ok()?;
    Some((number, word[digits..].trim().to_ascii_lowercase()))
}

fn power_of_1024(unit: &str) -> Option<f64> {
    let unit = unit.strip_suffix('b').unwrap_or(unit);
    let unit = unit.strip_suffix('i').unwrap_or(unit);
    let exponent = ["", "k", "m", "g", "t"].iter().position(|u| *u == unit)?;
    Some(1024f64.powi(exponent as i32))
}

/// `256M`, `1.5G`, `4096`: bytes.
pub fn parse_size(word: &str) -> Result<u64, UnitError> {
    let bytes = split(word).and_then(|(n, unit)| Some(n * power_of_1024(&unit)?));
    let bytes = bytes.filter(|b| *b < 2f64.powi(53) && b.fract() == 0.0);
    bytes.map(|b| b as u64).ok_or_else(|| UnitError::Size(word.into()))
}

/// `100M` (bytes a second, powers of 1024), `1gbit` (bits a second, powers of 1000): bytes a second, at least 1.
pub fn parse_rate(word: &str) -> Result<u64, UnitError> {
    let value = split(word).and_then(|(n, unit)| {
        let unit = unit.strip_suffix("/s").unwrap_or(&unit);
        let bytes = match unit.strip_suffix("bit") {
            Some(prefix) => {
                let exponent = ["", "k", "m", "g", "t"].iter().position(|u| *u == prefix)?;
                n * 1000f64.powi(exponent as i32) / 8.0
            }
            None => n * power_of_1024(unit)?,
        };
        (1.0..2f64.powi(53)).contains(&bytes).then_some(bytes as u64)
    });
    value.ok_or_else(|| UnitError::Rate(word.into()))
}

/// `50ms`, `5s`, `2m`, `800us`; a bare number is seconds.
pub fn parse_duration(word: &str) -> Result<Duration, UnitError> {
    let seconds = split(word).and_then(|(n, unit)| {
        let scale = match unit.as_str() {
            "us" => 1e-6,
            "ms" => 1e-3,
            "" | "s" => 1.0,
            "m" | "min" => 60.0,
            "h" => 3600.0,
            _ => return None,
        };
        Some(n * scale)
    });
    let seconds = seconds.filter(|s| *s < 1e9);
    seconds.map(Duration::from_secs_f64).ok_or_else(|| UnitError::Duration(word.into()))
}

/// `256 MiB`: three significant digits.
pub fn format_bytes(bytes: u64) -> String {
    let mut value = bytes as f64;
    for unit in ["B", "KiB", "MiB", "GiB"] {
        if value < 1024.0 {
            return if value.fract() == 0.0 || value >= 100.0 {
                format!("{value:.0} {unit}")
            } else {
                format!("{value:.1} {unit}")
            };
        }
        value /= 1024.0;
    }
    format!("{value:.1} TiB")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        for (word, bytes) in
            [("0", 0), ("4096", 4096), ("256M", 256 << 20), ("1.5G", 3 << 29), ("64 MiB", 64 << 20), ("1kb", 1024)]
        {
            assert_eq!(parse_size(word), Ok(bytes), "{word}");
        }
        for word in ["", "M", "-1", "1X", "abc", "1.5", "1e99", "999999999T", "1 2"] {
            assert_eq!(parse_size(word), Err(UnitError::Size(word.into())), "{word}");
        }
    }

    #[test]
    fn rates() {
        assert_eq!(parse_rate("100M"), Ok(100 << 20));
        assert_eq!(parse_rate("1gbit"), Ok(125_000_000));
        assert_eq!(parse_rate("10M/s"), Ok(10 << 20));
        assert!(parse_rate("0").is_err() && parse_rate("fast").is_err());
    }

    #[test]
    fn durations() {
        assert_eq!(parse_duration("50ms"), Ok(Duration::from_millis(50)));
        assert_eq!(parse_duration("2"), Ok(Duration::from_secs(2)));
        assert_eq!(parse_duration("1.5s"), Ok(Duration::from_millis(1500)));
        for word in ["", "ms", "5 parsecs", "-1s", "1e300"] {
            assert!(parse_duration(word).is_err(), "{word}");
        }
    }

    #[test]
    fn bytes_for_people() {
        assert_eq!(format_bytes(256 << 20), "256 MiB");
        assert_eq!(format_bytes(1536), "1.5 KiB");
        assert_eq!(format_bytes(123_456_789), "118 MiB");
    }
}
