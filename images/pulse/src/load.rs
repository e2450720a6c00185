//! What the guest does to its memory: how much of it, how fast, in which order.

use crate::page::PAGE_BYTES;
use core::fmt;

/// The fastest rate that is told apart from [`Rate::Max`], bytes a second: it keeps the pacer's arithmetic in 64 bits.
pub const FASTEST_RATE: u64 = 100_000_000_000;

/// How fast something goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rate {
    /// Bytes a second; 0 is "not at all".
    BytesPerSecond(u64),
    /// As fast as the CPU can.
    Max,
}

impl fmt::Display for Rate {
    /// As a JSON value: a number, or `"max"`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::BytesPerSecond(rate) => write!(f, "{rate}"),
            Self::Max => f.write_str("\"max\""),
        }
    }
}

/// The order in which pages are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pattern {
    /// One after the other, over and over.
    Sequential,
    /// Drawn from a generator seeded by `seed=`.
    Random,
    /// As random, but only one cache line of a page changes.
    Sparse,
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Sequential => "seq",
            Self::Random => "random",
            Self::Sparse => "sparse",
        })
    }
}

/// The load that can be changed while the guest runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Load {
    /// Working set, bytes: what is written again and again.
    pub ws_bytes: u64,
    /// How much has content, the working set included, bytes.
    pub fill_bytes: u64,
    /// How much after that is written once, with zeros, bytes.
    pub zero_bytes: u64,
    /// How fast pages are written.
    pub rate: Rate,
    /// In which order.
    pub pattern: Pattern,
    /// How fast the background check walks the working set.
    pub verify: Rate,
}

impl Default for Load {
    fn default() -> Self {
        Self {
            ws_bytes: 64 << 20,
            fill_bytes: 0,
            zero_bytes: 0,
            rate: Rate::BytesPerSecond(16 << 20),
            pattern: Pattern::Sequential,
            verify: Rate::BytesPerSecond(64 << 20),
        }
    }
}

/// Why a value was not taken: what was expected in its place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Expected(pub &'static str);

impl Load {
    /// Sets the field called `key`. `None` means that there is no such field.
    pub fn set(&mut self, key: &str, value: &str) -> Option<Result<(), Expected>> {
        Some(match key {
            "ws" => parse_size(value)
                .filter(|&bytes| bytes >= PAGE_BYTES)
                .map(|bytes| self.ws_bytes = bytes)
                .ok_or(Expected("a size of at least 4K, such as 64M or 1G")),
            "fill" => parse_size(value).map(|bytes| self.fill_bytes = bytes).ok_or(EXPECTED_SIZE),
            "zero" => parse_size(value).map(|bytes| self.zero_bytes = bytes).ok_or(EXPECTED_SIZE),
            "rate" => parse_rate(value).map(|rate| self.rate = rate).ok_or(EXPECTED_RATE),
            "verify" => parse_rate(value).map(|rate| self.verify = rate).ok_or(EXPECTED_RATE),
            "pattern" => match value {
                "seq" => Ok(Pattern::Sequential),
                "random" => Ok(Pattern::Random),
                "sparse" => Ok(Pattern::Sparse),
                _ => Err(Expected("seq, random or sparse")),
            }
            .map(|pattern| self.pattern = pattern),
            _ => return None,
        })
    }
}

const EXPECTED_SIZE: Expected = Expected("a size, such as 512M");
const EXPECTED_RATE: Expected = Expected("bytes a second, such as 200M, or 0 or max");

/// A size in bytes: digits and one of K, M, G, T (powers of 1024), or none.
pub fn parse_size(text: &str) -> Option<u64> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let shift = match &text[digits.len()..] {
        "" => 0,
        "K" | "k" => 10,
        "M" | "m" => 20,
        "G" | "g" => 30,
        "T" | "t" => 40,
        _ => return None,
    };
    parse_decimal(digits)?.checked_mul(1 << shift)
}

/// A rate in bytes a second: a size, or `max`.
pub fn parse_rate(text: &str) -> Option<Rate> {
    match text {
        "max" => Some(Rate::Max),
        _ => Some(Rate::BytesPerSecond(parse_size(text.strip_suffix("/s").unwrap_or(text))?.min(FASTEST_RATE))),
    }
}

/// A duration in nanoseconds: digits and one of us, ms, s.
pub fn parse_duration_ns(text: &str) -> Option<u64> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = match &text[digits.len()..] {
        "us" => 1_000,
        "ms" => 1_000_000,
        "s" => 1_000_000_000,
        _ => return None,
    };
    parse_decimal(digits)?.checked_mul(unit)
}

/// Digits only: `u64::from_str` would take a sign.
pub fn parse_decimal(text: &str) -> Option<u64> {
    if text.bytes().all(|b| b.is_ascii_digit()) { text.parse().ok() } else { None }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_take_powers_of_1024() {
        assert_eq!(parse_size("64M"), Some(64 << 20));
        assert_eq!(parse_size("4096"), Some(4096));
        assert_eq!(parse_size("2g"), Some(2 << 30));
        for bad in ["", "M", "-1", "+1", "1.5M", "64MB", "99999999999T", "0x10"] {
            assert_eq!(parse_size(bad), None, "{bad}");
        }
    }

    #[test]
    fn rates_take_zero_and_max() {
        assert_eq!(parse_rate("0"), Some(Rate::BytesPerSecond(0)));
        assert_eq!(parse_rate("200M/s"), Some(Rate::BytesPerSecond(200 << 20)));
        assert_eq!(parse_rate("max"), Some(Rate::Max));
        assert_eq!(parse_rate("9000T"), Some(Rate::BytesPerSecond(FASTEST_RATE)));
        assert_eq!(parse_rate("fast"), None);
    }

    #[test]
    fn durations_need_a_unit() {
        assert_eq!(parse_duration_ns("100ms"), Some(100_000_000));
        assert_eq!(parse_duration_ns("500us"), Some(500_000));
        assert_eq!(parse_duration_ns("100"), None);
    }

    #[test]
    fn a_load_keeps_its_value_when_the_new_one_is_bad() {
        let mut load = Load::default();
        assert_eq!(load.set("ws", "1G"), Some(Ok(())));
        assert!(matches!(load.set("ws", "1"), Some(Err(_))));
        assert!(matches!(load.set("pattern", "zigzag"), Some(Err(_))));
        assert_eq!(load.set("colour", "red"), None);
        assert_eq!(load.ws_bytes, 1 << 30);
        assert_eq!(load.pattern, Pattern::Sequential);
    }
}
