//! Pacing: turns a rate in bytes a second into permission to touch pages.
//!
//! Credit grows with time and a page spends some. It is counted in byte-nanoseconds, so that no rate drifts by
//! rounding, and it is capped: after a pause of a second (a migration's blackout, a busy host) the guest must not burst
//! for as long as it was away, which would look like a load that nobody asked for.

use crate::load::{FASTEST_RATE, Rate};
use crate::page::PAGE_BYTES;

const NS_PER_S: u64 = 1_000_000_000;
/// What a page costs.
const PAGE_COST: u64 = PAGE_BYTES * NS_PER_S;
/// At most this much time counts towards credit: more than the longest usual sleep, less than anyone calls a burst.
const LONGEST_CREDIT_NS: u64 = 20_000_000;

const _: () = assert!(FASTEST_RATE < (u64::MAX - PAGE_COST) / LONGEST_CREDIT_NS, "credit must fit 64 bits");

/// Paces one kind of work.
#[derive(Clone, Debug)]
pub struct Pacer {
    rate: Rate,
    credit: u64,
    last_ns: u64,
}

impl Pacer {
    /// A pacer without credit.
    pub fn new(rate: Rate) -> Self {
        Self { rate, credit: 0, last_ns: 0 }
    }

    /// Changes the rate; credit earned at the old one is forgotten.
    pub fn set_rate(&mut self, rate: Rate) {
        self.rate = rate;
        self.credit = 0;
    }

    /// Earns credit for the time since the last call. A clock that went back earns nothing.
    pub fn advance(&mut self, now_ns: u64) {
        let elapsed = now_ns.saturating_sub(self.last_ns).min(LONGEST_CREDIT_NS);
        self.last_ns = now_ns;
        if let Rate::BytesPerSecond(rate) = self.rate {
            // A page more than the time is worth, so that what was left over is not lost at the cap.
            let most = rate * LONGEST_CREDIT_NS + PAGE_COST;
            self.credit = self.credit.saturating_add(rate * elapsed).min(most);
        }
    }

    /// Spends a page's worth of credit, if there is that much.
    pub fn take_page(&mut self) -> bool {
        if self.rate == Rate::Max {
            return true;
        }
        match self.credit.checked_sub(PAGE_COST) {
            Some(rest) => {
                self.credit = rest;
                true
            }
            None => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drain(pacer: &mut Pacer) -> u64 {
        (0..).take_while(|_| pacer.take_page()).count() as u64
    }

    #[test]
    fn a_rate_is_kept_exactly_however_time_is_cut() {
        for step_ns in [1_000, 333_333, 1_000_000, 19_999_999] {
            let mut pacer = Pacer::new(Rate::BytesPerSecond(200 << 20));
            pacer.advance(0);
            let mut pages = 0;
            let mut now = 0;
            while now < 2_000_000_000 {
                now += step_ns;
                pacer.advance(now);
                pages += drain(&mut pacer);
            }
            let expected = u128::from(now) * (200 << 20) / 4096 / 1_000_000_000;
            assert!(u128::from(pages).abs_diff(expected) <= 1, "step {step_ns}: {pages} pages, not {expected}");
        }
    }

    #[test]
    fn a_pause_does_not_end_in_a_burst() {
        let mut pacer = Pacer::new(Rate::BytesPerSecond(200 << 20));
        pacer.advance(1_000_000_000);
        drain(&mut pacer);
        pacer.advance(61_000_000_000);
        assert_eq!(drain(&mut pacer), (200 << 20) / 4096 / 50);
    }

    #[test]
    fn a_slow_rate_still_moves_and_a_clock_that_goes_back_is_harmless() {
        let mut pacer = Pacer::new(Rate::BytesPerSecond(100));
        let mut pages = 0;
        for ms in 0..100_000 {
            pacer.advance(ms * 1_000_000);
            pages += drain(&mut pacer);
        }
        assert_eq!(pages, 2);
        pacer.advance(0);
        assert_eq!(drain(&mut pacer), 0);
    }

    #[test]
    fn zero_never_and_max_always() {
        let mut pacer = Pacer::new(Rate::BytesPerSecond(0));
        pacer.advance(u64::MAX);
        assert!(!pacer.take_page());
        pacer.set_rate(Rate::Max);
        assert!(pacer.take_page());
    }

    #[test]
    fn the_fastest_rate_does_not_overflow() {
        let mut pacer = Pacer::new(Rate::BytesPerSecond(FASTEST_RATE));
        for s in 0..100 {
            pacer.advance(s * NS_PER_S);
        }
        assert!(drain(&mut pacer) > 400_000);
    }
}
