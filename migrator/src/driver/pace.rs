//! The cap on bandwidth: a token bucket, without a clock.

use std::time::Duration;

use crate::layout::{CHUNK_PAGES, PAGE_BYTES};

/// Unused time up to this may be made up for. Longer would let a burst through after each pause between rounds.
const BURST: Duration = Duration::from_millis(20);

/// Says when the next bytes may be sent. Its times count from any one moment.
#[derive(Clone, Debug)]
pub(super) struct Pacer {
    bytes_per_second: f64,
    /// When all bytes so far have been paid for.
    free_at: Duration,
}

impl Pacer {
    pub fn new(bytes_per_second: u64) -> Self {
        Self { bytes_per_second: bytes_per_second.max(1) as f64, free_at: Duration::ZERO }
    }

    /// Takes so many bytes' worth of time; they may be sent at the time that this gives.
    pub fn reserve(&mut self, now: Duration, bytes: u64) -> Duration {
        let start = self.free_at.max(now.saturating_sub(BURST));
        let seconds = bytes as f64 / self.bytes_per_second;
        self.free_at = start + Duration::from_secs_f64(seconds.min(1e6));
        start
    }

    /// How many bytes may be sent in one go, so that the flow is even: some 20 ms worth, in whole pages.
    pub fn most_bytes(&self) -> u64 {
        let pages = self.bytes_per_second * BURST.as_secs_f64() / PAGE_BYTES as f64;
        (pages as u64).clamp(1, CHUNK_PAGES) * PAGE_BYTES
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holds_the_rate_within_five_percent() {
        for rate in [100_000u64, 10_000_000, 5_000_000_000] {
            let mut pacer = Pacer::new(rate);
            let bytes = pacer.most_bytes();
            let (mut now, mut sent) = (Duration::ZERO, 0u64);
            while now < Duration::from_secs(10) {
                now = now.max(pacer.reserve(now, bytes)) + Duration::from_micros(50);
                sent += bytes;
            }
            let real = sent as f64 / now.as_secs_f64();
            assert!((real / rate as f64 - 1.0).abs() < 0.05, "{rate}: {real}");
        }
    }

    #[test]
    fn a_pause_is_not_made_up_for() {
        let mut pacer = Pacer::new(1_000_000);
        pacer.reserve(Duration::ZERO, 1_000_000);
        let late = Duration::from_secs(60);
        let first = pacer.reserve(late, 500_000);
        assert_eq!(first, late - BURST);
        assert_eq!(pacer.reserve(late, 1), first + Duration::from_millis(500));
    }
}
