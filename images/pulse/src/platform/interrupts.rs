//! Interrupts and exceptions: the tables that point into `boot.s`, sleeping, and dying.

use super::serial::Emergency;
use core::arch::asm;
use core::fmt::{self, Write};
use core::sync::atomic::{AtomicU32, Ordering};

/// The local APIC's timer.
pub const TIMER_VECTOR: u8 = 0x20;
/// The network card.
pub const DEVICE_VECTOR: u8 = 0x21;
/// Interrupts that went away before they were taken.
pub const SPURIOUS_VECTOR: u8 = 0xff;

const GENERAL_PROTECTION: u8 = 13;
const STUB_BYTES: usize = 16;

unsafe extern "C" {
    static wake_pending: AtomicU32;
    static device_pending: AtomicU32;
    static crash_requested: AtomicU32;
    static mut idt: [[u32; 4]; 256];
    fn fault_stubs();
    fn stub_general_protection();
    fn stub_timer();
    fn stub_device();
    fn stub_spurious();
}

/// Fills in the interrupt table that the CPU already points to. Until then nothing can interrupt: the local APIC is off.
pub fn init() {
    for vector in 0..32u8 {
        set_gate(vector, fault_stubs as *const () as usize + usize::from(vector) * STUB_BYTES);
    }
    set_gate(GENERAL_PROTECTION, stub_general_protection as *const () as usize);
    set_gate(TIMER_VECTOR, stub_timer as *const () as usize);
    set_gate(DEVICE_VECTOR, stub_device as *const () as usize);
    set_gate(SPURIOUS_VECTOR, stub_spurious as *const () as usize);
}

fn set_gate(vector: u8, handler: usize) {
    const RING0_CODE: u32 = 0x10;
    const PRESENT_INTERRUPT_GATE: u32 = 0x8e00;
    let low = handler as u32;
    let gate = [low & 0xffff | RING0_CODE << 16, low & 0xffff_0000 | PRESENT_INTERRUPT_GATE, (handler >> 32) as u32, 0];
    // SAFETY: `idt` has 256 entries and only this function writes it; the CPU reads it when an interrupt comes.
    unsafe { (&raw mut idt[usize::from(vector)]).write_volatile(gate) }
}

/// Sleeps until an interrupt comes, or returns at once if one came since the last sleep.
pub fn sleep() {
    // SAFETY: HLT faults in ring 3, and `stub_general_protection` turns that into a sleep and returns behind it. It keeps
    // all registers; the stubs that run meanwhile write the flags below, hence no `nomem`.
    unsafe { asm!("hlt", options(nostack)) }
    // SAFETY: defined in `boot.s`, aligned, and only ever used as an atomic here.
    unsafe { wake_pending.store(0, Ordering::Release) }
}

/// Whether the device's interrupt came since the last call.
pub fn take_device_interrupt() -> bool {
    // SAFETY: as in `sleep`.
    let pending = unsafe { &device_pending };
    pending.load(Ordering::Acquire) != 0 && pending.swap(0, Ordering::AcqRel) != 0
}

/// Ends the machine by a triple fault, which a VMM sees as a crash.
pub fn crash() -> ! {
    // SAFETY: as in `sleep`.
    unsafe { crash_requested.store(1, Ordering::Release) }
    loop {
        // SAFETY: with the request set, the stub of this HLT's fault makes a triple fault and does not return.
        unsafe { asm!("hlt", options(nomem, nostack)) }
    }
}

/// Says why, then crashes. `fields` are those of the JSON object behind its name.
pub fn die(event: &str, fields: fmt::Arguments<'_>) -> ! {
    // `Emergency` never fails. The newline first ends a line that may have been cut in the middle.
    let _ = writeln!(Emergency, "\n{{\"event\":\"{event}\",{fields}}}");
    crash()
}

/// An exception that is not a sleep: `boot.s` comes here in ring 3, on a fresh stack.
#[unsafe(no_mangle)]
extern "C" fn ring3_fault(vector: u64, error_code: u64, rip: u64, cr2: u64, rsp: u64) -> ! {
    die(
        "fault",
        format_args!("\"vector\":{vector},\"error_code\":{error_code},\"rip\":{rip},\"cr2\":{cr2},\"rsp\":{rsp}"),
    )
}
