//! The local APIC, whose timer ends a sleep, and the I/O APIC, through which the network card does.

use super::clock::Clock;
use super::interrupts::{self, DEVICE_VECTOR, SPURIOUS_VECTOR, TIMER_VECTOR};
use super::port;
use pulse_core::acpi::IoApic;

const LOCAL_APIC: usize = 0xfee0_0000;
const SPURIOUS: usize = 0xf0;
const TIMER: usize = 0x320;
const TIMER_INITIAL: usize = 0x380;
const TIMER_CURRENT: usize = 0x390;
const TIMER_DIVIDE: usize = 0x3e0;
const MASKED: u32 = 1 << 16;
const DIVIDE_BY_1: u32 = 0b1011;

/// Where an I/O APIC is when no table says so.
pub const USUAL_IO_APIC: IoApic = IoApic { address: 0xfec0_0000, gsi_base: 0 };

/// The local APIC's timer, one shot at a time: a busy guest is never interrupted, an idle one only as often as it asked.
pub struct SleepTimer {
    ticks_per_ms: u64,
}

impl SleepTimer {
    /// Switches the local APIC on and measures its timer, which takes a millisecond.
    pub fn new(clock: &mut Clock) -> Self {
        const MEASURE_NS: u64 = 1_000_000;
        // The PICs would deliver their interrupts past the I/O APIC.
        port::write_u8(0x21, 0xff);
        port::write_u8(0xa1, 0xff);
        write(SPURIOUS, 0x100 | u32::from(SPURIOUS_VECTOR));
        write(TIMER_DIVIDE, DIVIDE_BY_1);
        write(TIMER, MASKED | u32::from(TIMER_VECTOR));
        write(TIMER_INITIAL, u32::MAX);
        let (start_ns, start) = (clock.now(), read(TIMER_CURRENT));
        let mut passed_ns = 0;
        while passed_ns < MEASURE_NS {
            passed_ns = clock.now() - start_ns;
        }
        let ticks = u64::from(start.wrapping_sub(read(TIMER_CURRENT)));
        write(TIMER, u32::from(TIMER_VECTOR));
        Self { ticks_per_ms: (ticks * 1_000_000 / passed_ns).max(1) }
    }

    /// Sleeps for `ns`, or until the device interrupts.
    pub fn sleep(&self, ns: u64) {
        let ticks = (ns.min(1_000_000_000) * self.ticks_per_ms / 1_000_000).clamp(1, u64::from(u32::MAX));
        write(TIMER_INITIAL, ticks as u32);
        interrupts::sleep();
    }
}

/// Lets global system interrupt `gsi` wake this CPU: edge-triggered, as virtio-mmio devices are wired. Returns false when
/// no I/O APIC has it.
pub fn route_device(io_apics: &[Option<IoApic>], gsi: u32) -> bool {
    const VERSION: u32 = 1;
    const REDIRECTION: u32 = 0x10;
    let known = io_apics.iter().flatten().any(|_| true);
    for io_apic in io_apics.iter().flatten().chain((!known).then_some(&USUAL_IO_APIC)) {
        let version = io_apic_read(io_apic, VERSION);
        let Some(pin) = gsi.checked_sub(io_apic.gsi_base) else { continue };
        if version == u32::MAX || pin > version >> 16 & 0xff {
            continue;
        }
        let entry = REDIRECTION + pin * 2;
        io_apic_write(io_apic, entry + 1, 0); // to the CPU with APIC ID 0
        io_apic_write(io_apic, entry, u32::from(DEVICE_VECTOR));
        return true;
    }
    false
}

fn io_apic_read(io_apic: &IoApic, register: u32) -> u32 {
    let base = io_apic.address as *mut u32;
    // SAFETY: an I/O APIC's select and window registers, mapped one to one. `Acpi` took the address from a 32-bit field,
    // so it is below 4 GiB; if nothing is there, the write goes nowhere and the read gives all ones.
    unsafe {
        base.write_volatile(register);
        base.byte_add(0x10).read_volatile()
    }
}

fn io_apic_write(io_apic: &IoApic, register: u32, value: u32) {
    let base = io_apic.address as *mut u32;
    // SAFETY: as in `io_apic_read`.
    unsafe {
        base.write_volatile(register);
        base.byte_add(0x10).write_volatile(value);
    }
}

fn write(register: usize, value: u32) {
    // SAFETY: a register of the local APIC, mapped one to one, at the address that it has after reset.
    unsafe { ((LOCAL_APIC + register) as *mut u32).write_volatile(value) }
}

fn read(register: usize) -> u32 {
    // SAFETY: as in `write`.
    unsafe { ((LOCAL_APIC + register) as *const u32).read_volatile() }
}
