//! The command line: `ws=64M rate=200M pattern=seq seed=7 report=100ms ip=10.0.0.2/24 …`.
//!
//! A VMM adds words of its own, so an unknown word means nothing. A bad value of a known word does: the guest says so
//! on the serial port and goes on with the default, since a test that waits for a guest that refuses to start learns
//! less than one that reads a warning.

use crate::load::{Expected, Load, parse_decimal, parse_duration_ns};
use core::net::{Ipv4Addr, Ipv6Addr};

/// The shortest report interval: below it the serial port would be all that the guest does.
pub const SHORTEST_REPORT_NS: u64 = 10_000_000;

/// What pages are filled with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// Nothing that compresses.
    Random,
    /// Source code.
    Text,
    /// Machine code.
    Binary,
    /// Zeros.
    Zero,
}

/// What the command line says.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Settings {
    /// The load to start with.
    pub load: Load,
    /// Seeds the page contents and the random pattern.
    pub seed: u64,
    /// What pages are filled with.
    pub content: Content,
    /// Time between two reports, nanoseconds.
    pub report_ns: u64,
    /// The longest that the guest sleeps, nanoseconds; `None` lets the guest choose.
    pub tick_ns: Option<u64>,
    /// Never sleep, so that `max_gap_us` resolves microseconds.
    pub spin: bool,
    /// IPv4 address and prefix length. Without any address the guest leaves the network alone.
    pub ip: Option<(Ipv4Addr, u8)>,
    /// IPv4 default gateway.
    pub gateway: Option<Ipv4Addr>,
    /// IPv6 address and prefix length.
    pub ip6: Option<(Ipv6Addr, u8)>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            load: Load::default(),
            seed: 1,
            content: Content::Random,
            report_ns: 100_000_000,
            tick_ns: None,
            spin: false,
            ip: None,
            gateway: None,
            ip6: None,
        }
    }
}

impl Settings {
    /// Reads a command line; `warn` hears of each word whose value was not taken. Of a word said twice the last counts.
    pub fn parse(line: &str, mut warn: impl FnMut(&str, Expected)) -> Self {
        let mut settings = Self::default();
        for word in line.split_ascii_whitespace() {
            if let Some((key, value)) = word.split_once('=')
                && let Err(expected) = settings.set(key, value)
            {
                warn(word, expected);
            }
        }
        settings
    }

    fn set(&mut self, key: &str, value: &str) -> Result<(), Expected> {
        if let Some(result) = self.load.set(key, value) {
            return result;
        }
        match key {
            "seed" => self.seed = parse_decimal(value).ok_or(Expected("a number"))?,
            "content" => {
                self.content = match value {
                    "random" => Content::Random,
                    "text" => Content::Text,
                    "binary" => Content::Binary,
                    "zero" => Content::Zero,
                    _ => return Err(Expected("random, text, binary or zero")),
                }
            }
            "report" => {
                self.report_ns = parse_duration_ns(value)
                    .filter(|&ns| ns >= SHORTEST_REPORT_NS)
                    .ok_or(Expected("a time of at least 10ms, such as 100ms or 1s"))?;
            }
            "tick" => {
                self.tick_ns = Some(
                    parse_duration_ns(value)
                        .filter(|ns| (100_000..=100_000_000).contains(ns))
                        .ok_or(Expected("a time from 100us to 100ms"))?,
                );
            }
            "idle" => {
                self.spin = match value {
                    "hlt" => false,
                    "spin" => true,
                    _ => return Err(Expected("hlt or spin")),
                }
            }
            "ip" => {
                self.ip =
                    Some(parse_cidr(value, 32).ok_or(Expected("an IPv4 address and prefix, such as 10.0.0.2/24"))?);
            }
            "gw" => self.gateway = Some(value.parse().map_err(|_| Expected("an IPv4 address"))?),
            "ip6" => {
                self.ip6 =
                    Some(parse_cidr(value, 128).ok_or(Expected("an IPv6 address and prefix, such as fd00::2/64"))?);
            }
            _ => {}
        }
        Ok(())
    }
}

fn parse_cidr<A: core::str::FromStr>(text: &str, longest_prefix: u8) -> Option<(A, u8)> {
    let (address, prefix) = text.split_once('/')?;
    let prefix = u8::try_from(parse_decimal(prefix)?).ok().filter(|&p| (1..=longest_prefix).contains(&p))?;
    Some((address.parse().ok()?, prefix))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::load::{Pattern, Rate};

    fn parse(line: &str) -> (Settings, Vec<String>) {
        let mut warnings = Vec::new();
        let settings = Settings::parse(line, |word, expected| warnings.push(format!("{word}: {}", expected.0)));
        (settings, warnings)
    }

    #[test]
    fn every_word_is_taken() {
        let (settings, warnings) = parse(
            "ws=128M rate=max pattern=random seed=7 report=1s tick=2ms idle=spin verify=0 ip=10.0.0.2/24 gw=10.0.0.1 \
             ip6=fd00::2/64 content=text fill=1G zero=2M",
        );
        assert!(warnings.is_empty(), "{warnings:?}");
        assert_eq!(settings.load.ws_bytes, 128 << 20);
        assert_eq!(settings.load.rate, Rate::Max);
        assert_eq!(settings.load.verify, Rate::BytesPerSecond(0));
        assert_eq!(settings.load.pattern, Pattern::Random);
        assert_eq!((settings.seed, settings.report_ns, settings.tick_ns), (7, 1_000_000_000, Some(2_000_000)));
        assert!(settings.spin);
        assert_eq!(settings.content, Content::Text);
        assert_eq!((settings.load.fill_bytes, settings.load.zero_bytes), (1 << 30, 2 << 20));
        assert_eq!(settings.ip, Some((Ipv4Addr::new(10, 0, 0, 2), 24)));
        assert_eq!(settings.gateway, Some(Ipv4Addr::new(10, 0, 0, 1)));
        assert_eq!(settings.ip6, Some(("fd00::2".parse().unwrap(), 64)));
    }

    #[test]
    fn unknown_words_mean_nothing() {
        let (settings, warnings) = parse("console=ttyS0 quiet virtio_mmio.device=512@0xfeb00000:5 colour=red =");
        assert_eq!(settings, Settings::default());
        assert!(warnings.is_empty());
    }

    #[test]
    fn a_bad_value_warns_and_leaves_the_default() {
        let line = "ws=lots rate=-1 pattern=x seed=y report=1ms tick=1s idle=maybe ip=10.0.0.2 gw=z ip6=fd00::2/129 \
                    content=prose fill=all zero=-1";
        let (settings, warnings) = parse(line);
        assert_eq!(settings, Settings::default());
        assert_eq!(warnings.len(), 13, "{warnings:?}");
        assert!(warnings[0].starts_with("ws=lots: a size"));
    }
}
