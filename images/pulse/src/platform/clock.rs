//! The guest's clock: kvm-clock where there is one, else the time-stamp counter, measured against the PIT.
//!
//! Nanoseconds since the guest started, never going back. Reading it takes some tens of nanoseconds and no exit.

use super::port;
use core::arch::x86_64::_rdtsc;
use core::sync::atomic::{Ordering, fence};
use pulse_core::pvclock::{Sample, Scale, Timeline};

/// `struct pvclock_vcpu_time_info`.
#[repr(C)]
#[derive(Clone, Copy)]
struct PvclockPage {
    version: u32,
    _pad: u32,
    tsc_timestamp: u64,
    system_time: u64,
    tsc_to_system_mul: u32,
    tsc_shift: i8,
    flags: u8,
    _pad2: [u8; 2],
}

unsafe extern "C" {
    /// The hypervisor writes it; see `boot.s`.
    static pvclock_page: PvclockPage;
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Source {
    KvmClock,
    /// The bare counter.
    Tsc(Scale),
}

/// The clock.
pub struct Clock {
    source: Source,
    /// The last scale that kvm-clock gave, should it become nonsense.
    scale: Scale,
    timeline: Timeline,
}

/// What is assumed of a counter that nothing can measure: wrong, but time passes.
const GUESS: Scale = Scale { multiplier: 1 << 31, shift: 0 };
/// How long the counter is measured against the PIT.
const PIT_HZ: u64 = 1_193_182;
const PIT_TICKS: u16 = 23_864; // 20 ms
/// kvm-clock just written cannot be this far behind the counter.
const FRESH_NS: u64 = 10_000_000_000;

impl Clock {
    /// Chooses the source.
    pub fn new(has_kvm_clock: bool) -> Self {
        if has_kvm_clock
            && let Some(sample) = sample_kvm_clock()
            && sample.scale.is_plausible()
            && let Some(now_ns) = sample.at(tsc())
            && now_ns.wrapping_sub(sample.system_time_ns) < FRESH_NS
        {
            return Self { source: Source::KvmClock, scale: sample.scale, timeline: Timeline::new(now_ns) };
        }
        let scale = measure_tsc().and_then(Scale::from_hz).unwrap_or(GUESS);
        Self { source: Source::Tsc(scale), scale, timeline: Timeline::new(scale.ns(tsc())) }
    }

    /// The source's name, for people.
    pub fn name(&self) -> &'static str {
        match self.source {
            Source::KvmClock => "kvm-clock",
            Source::Tsc(GUESS) => "tsc-unmeasured",
            Source::Tsc(_) => "tsc",
        }
    }

    /// Nanoseconds since the start.
    #[inline]
    pub fn now(&mut self) -> u64 {
        let raw = match self.source {
            Source::Tsc(scale) => scale.ns(tsc()),
            Source::KvmClock => match sample_kvm_clock().and_then(|sample| Some((sample, sample.at(tsc())?))) {
                Some((sample, raw)) => {
                    self.scale = sample.scale;
                    raw
                }
                None => return self.abandon_kvm_clock(),
            },
        };
        self.timeline.now(raw)
    }

    /// Goes on with the bare counter: the hypervisor's page and the counter do not belong together.
    #[cold]
    fn abandon_kvm_clock(&mut self) -> u64 {
        let raw = self.scale.ns(tsc());
        self.source = Source::Tsc(self.scale);
        self.timeline.rebase(raw);
        self.timeline.now(raw)
    }
}

#[inline]
fn tsc() -> u64 {
    // SAFETY: reads a counter; CR4.TSD is clear, so ring 3 may.
    unsafe { _rdtsc() }
}

/// A consistent copy of the page. The hypervisor makes the version odd while it writes, and only writes while this CPU
/// is out of the guest, so that a second try always succeeds; `None` means that the page is not what it should be.
#[inline]
fn sample_kvm_clock() -> Option<Sample> {
    let page = &raw const pvclock_page;
    for _ in 0..100 {
        // SAFETY: the page is in our image, aligned, and any bytes in it are valid values. It changes behind our back,
        // hence the volatile reads, ordered by the fences.
        let (before, copy, after) = unsafe {
            let before = (&raw const (*page).version).read_volatile();
            fence(Ordering::Acquire);
            let copy = page.read_volatile();
            fence(Ordering::Acquire);
            (before, copy, (&raw const (*page).version).read_volatile())
        };
        if before == after && before & 1 == 0 {
            return (before != 0).then_some(Sample {
                tsc_at_update: copy.tsc_timestamp,
                system_time_ns: copy.system_time,
                scale: Scale { multiplier: copy.tsc_to_system_mul, shift: copy.tsc_shift },
            });
        }
    }
    None
}

/// Counts the counter over some ticks of PIT channel 0: it is in every PIT, and masked it interrupts nobody.
fn measure_tsc() -> Option<u64> {
    const COMMAND: u16 = 0x43;
    const CHANNEL_0: u16 = 0x40;
    let read_down_counter = || {
        port::write_u8(COMMAND, 0); // latch channel 0
        u16::from_le_bytes([port::read_u8(CHANNEL_0), port::read_u8(CHANNEL_0)])
    };
    port::write_u8(COMMAND, 0x34); // channel 0, both bytes, mode 2: counts down from 65536, over and over
    port::write_u8(CHANNEL_0, 0);
    port::write_u8(CHANNEL_0, 0);
    let (first, start) = (read_down_counter(), tsc());
    // Bounded by reads: a machine without a PIT always answers the same.
    for _ in 0..200_000u32 {
        let pit_ticks = first.wrapping_sub(read_down_counter());
        if (PIT_TICKS..u16::MAX / 2).contains(&pit_ticks) {
            let ticks = u128::from(tsc().wrapping_sub(start));
            return Some((ticks * u128::from(PIT_HZ) / u128::from(pit_ticks)) as u64);
        }
    }
    None
}
