//! *pulse*, the built-in guest: it writes memory and checks every page of it, answers the network, and measures the
//! holes in its own time, so that a migration that loses anything is found out. `docs/pulse.md` is its manual.
//!
//! One loop does everything, a little at a time, in ring 3 (`boot.s` says why). Nothing blocks and nothing is
//! allocated after the start, so that it runs for months as it runs for a second.

#![no_std]
#![no_main]

mod machine;
mod net;
mod platform;

use core::panic::PanicInfo;
use machine::Machine;
use platform::interrupts;
use smoltcp::iface::SocketStorage;

/// The guest, from ring 3 on.
fn run(start_info: u64, has_kvm_clock: bool) -> ! {
    let mut sockets = [SocketStorage::EMPTY; net::SOCKETS];
    let mut machine = Machine::start(start_info, has_kvm_clock, &mut sockets);
    loop {
        machine.step();
    }
}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    let place = info.location();
    interrupts::die(
        "panic",
        format_args!(
            "\"message\":\"{}\",\"file\":\"{}\",\"line\":{}",
            info.message(),
            place.map_or("", |place| place.file()),
            place.map_or(0, |place| place.line())
        ),
    )
}
