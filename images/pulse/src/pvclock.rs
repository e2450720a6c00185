//! kvm-clock: turning the time-stamp counter into nanoseconds with what the hypervisor says.
//!
//! Why it is preferred: a migration may end on a host whose counter runs at another frequency. The hypervisor then
//! publishes new factors, and time goes on at the right speed (KVM API, `MSR_KVM_SYSTEM_TIME_NEW`).

/// How counter ticks become nanoseconds: `(ticks << shift) * multiplier >> 32`, a negative shift going right.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Scale {
    /// Fixed point, 32 fractional bits.
    pub multiplier: u32,
    /// Applied before the multiplication.
    pub shift: i8,
}

impl Scale {
    /// The scale of a counter of `hz` ticks a second; `None` for a frequency that no machine has.
    pub fn from_hz(hz: u64) -> Option<Self> {
        if !(1_000_000..=100_000_000_000).contains(&hz) {
            return None;
        }
        // Shift right until the multiplier, below 1 << 32, is as large and so as exact as it can be.
        (-8..=10).find_map(|shift: i8| {
            let full = (1_000_000_000u128 << 32) / u128::from(hz);
            let multiplier = if shift < 0 { full << -shift } else { full >> shift };
            u32::try_from(multiplier).ok().map(|multiplier| Self { multiplier, shift })
        })
    }

    /// Nanoseconds of `ticks`. Sound for more than a century.
    pub fn ns(self, ticks: u64) -> u64 {
        let ticks = u128::from(ticks);
        let shifted =
            if self.shift < 0 { ticks >> self.shift.unsigned_abs().min(127) } else { ticks << self.shift.min(31) };
        ((shifted * u128::from(self.multiplier)) >> 32) as u64
    }

    /// Whether the scale is of a counter between 10 MHz and 100 GHz: what lies outside is no clock.
    pub fn is_plausible(self) -> bool {
        const TICKS: u64 = 1_000_000_000_000;
        (10_000_000_000..=100_000_000_000_000).contains(&self.ns(TICKS))
    }
}

/// One consistent reading of the page that the hypervisor keeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sample {
    /// The counter when the page was written.
    pub tsc_at_update: u64,
    /// Nanoseconds then.
    pub system_time_ns: u64,
    /// The counter's scale from then on.
    pub scale: Scale,
}

/// How far the counter may be behind the page without the page being nonsense: counters of two CPUs differ a little.
const SLACK_TICKS: u64 = 10_000_000;

impl Sample {
    /// Nanoseconds when the counter stands at `tsc`; `None` when counter and page cannot belong together.
    pub fn at(&self, tsc: u64) -> Option<u64> {
        if tsc.saturating_add(SLACK_TICKS) < self.tsc_at_update {
            return None;
        }
        Some(self.system_time_ns.wrapping_add(self.scale.ns(tsc.saturating_sub(self.tsc_at_update))))
    }
}

/// Makes one time out of raw readings: it starts at zero, and never goes back.
///
/// A raw reading that falls behind by little (another CPU's counter) holds time still. One that falls behind by much is
/// another clock (a machine restored with a lower counter): time goes on from where it was.
#[derive(Clone, Debug)]
pub struct Timeline {
    base_ns: u64,
    last_ns: u64,
}

/// Up to here time stands still; beyond, it is rebased.
const STILL_NS: u64 = 1_000_000;

impl Timeline {
    /// A timeline that begins at the reading `raw_ns`.
    pub fn new(raw_ns: u64) -> Self {
        Self { base_ns: raw_ns, last_ns: 0 }
    }

    /// The time of a raw reading.
    pub fn now(&mut self, raw_ns: u64) -> u64 {
        let ns = raw_ns.wrapping_sub(self.base_ns);
        let behind = self.last_ns.wrapping_sub(ns);
        // Ahead or equal, as a signed difference: also right when the raw reading lies before the base.
        if behind as i64 <= 0 {
            self.last_ns = ns;
        } else if behind > STILL_NS {
            self.rebase(raw_ns);
        }
        self.last_ns
    }

    /// Lets time go on from where it is, with `raw_ns` as the reading now.
    pub fn rebase(&mut self, raw_ns: u64) {
        self.base_ns = raw_ns.wrapping_sub(self.last_ns);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scale_is_exact_to_a_millionth() {
        for hz in [10_000_000, 1_000_000_000, 2_445_000_000, 5_300_000_000] {
            let scale = Scale::from_hz(hz).unwrap();
            let ns = scale.ns(hz * 3600);
            assert!(ns.abs_diff(3_600_000_000_000) < 3_600_000, "{hz}: {ns}");
            assert!(scale.is_plausible());
        }
        assert_eq!(Scale::from_hz(0), None);
        assert!(!Scale { multiplier: 0, shift: 0 }.is_plausible());
        assert!(!Scale { multiplier: 1, shift: -30 }.is_plausible());
    }

    #[test]
    fn the_factors_of_a_real_page() {
        // Read from a guest on a host of 2.445 GHz.
        let sample = Sample {
            tsc_at_update: 0x033d_19d2_16a0,
            system_time_ns: 0xf8c020,
            scale: Scale { multiplier: 0xc537_a69a, shift: -1 },
        };
        assert!(sample.scale.is_plausible());
        let passed = sample.at(0x033d_19d2_16a0 + 2_596_000_000).unwrap() - 0xf8c020;
        assert!(passed.abs_diff(1_000_000_000) < 1_000_000, "{passed}");
        assert_eq!(sample.at(0x033d_19d2_16a0 - 5), Some(0xf8c020));
        assert_eq!(sample.at(5), None);
    }

    #[test]
    fn time_never_goes_back_and_never_stands_still_for_long() {
        let mut line = Timeline::new(5_000_000_000);
        assert_eq!(line.now(5_000_000_000), 0);
        assert_eq!(line.now(6_000_000_000), 1_000_000_000);
        assert_eq!(line.now(5_999_999_000), 1_000_000_000, "a little behind: held");
        assert_eq!(line.now(6_000_000_001), 1_000_000_001);
        assert_eq!(line.now(77), 1_000_000_001, "another clock: goes on from here");
        assert_eq!(line.now(1_077), 1_000_001_001);
        assert_eq!(line.now(u64::MAX / 4), 1_000_000_001 - 77 + u64::MAX / 4);
    }
}
