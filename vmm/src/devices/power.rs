//! The way off: sleep, reset, the power button, and the panic notifier.
//!
//! - Four registers of ours at [`POWER_PORT`](crate::arch::layout::POWER_PORT), which the ACPI tables describe: sleep control and
//!   status (ACPI 6.4, 4.8.3.7), pending events of the generic event device, reset.
//! - pvpanic (QEMU's docs/specs/pvpanic): a guest kernel says that it panicked.
//! - The keyboard controller's and the chipset's reset (ports 0x64 and 0xcf9), which guests without ACPI use.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::EventFd;

use super::bus::BusDevice;
use crate::arch::acpi::{POWER_EVENTS, POWER_RESET, POWER_RESET_VALUE, POWER_SLEEP_CONTROL, SLEEP_TYPE_S5};

/// What the guest did that ends its run, or should be known.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum GuestEvent {
    /// It switched itself off.
    PowerOff,
    /// It asked for a reset.
    Reset,
    /// Its kernel panicked; it may still reset or power off by itself.
    Panicked,
    /// It cannot go on: triple fault, or KVM cannot run it. The sentence says what happened.
    Crashed(String),
}

/// Whoever wants to know. Called on a vCPU's thread, at once: whoever has paused a VM has been told all that its guest did before.
/// It must not block, nor call into the VM.
pub type GuestEvents = Arc<dyn Fn(GuestEvent) + Send + Sync>;

/// Sleep enable bit of the sleep control register.
const SLP_EN: u8 = 1 << 5;
const EVENT_POWER_BUTTON: u8 = 1;

/// The power registers.
pub struct PowerDevice {
    events: GuestEvents,
    interrupt: EventFd,
    pending: u8,
}

/// What is saved of the power registers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PowerState {
    pending: u8,
}

/// Saved power registers with events that do not exist.
#[derive(Debug, thiserror::Error)]
#[error("saved power registers: pending events {0:#x} are not known")]
pub struct PowerStateError(u8);

impl PowerDevice {
    /// Reports to `events`; `interrupt` is the generic event device's.
    pub fn new(events: GuestEvents, interrupt: EventFd) -> Self {
        PowerDevice { events, interrupt, pending: 0 }
    }

    /// Presses the power button: a guest with ACPI shuts down, in its own time.
    pub fn press_button(&mut self) -> std::io::Result<()> {
        self.pending |= EVENT_POWER_BUTTON;
        self.interrupt.write(1)
    }

    /// The registers' state.
    pub fn save(&self) -> PowerState {
        let PowerDevice { events: _, interrupt: _, pending } = self;
        PowerState { pending: *pending }
    }

    /// Makes the registers what they were; a pending event interrupts again.
    pub fn restore(&mut self, state: PowerState) -> Result<(), PowerStateError> {
        let PowerState { pending } = state;
        if pending & !EVENT_POWER_BUTTON != 0 {
            return Err(PowerStateError(pending));
        }
        self.pending = pending;
        if pending != 0 && self.interrupt.write(1).is_err() {
            tracing::warn!("a pending power event could not interrupt the guest");
        }
        Ok(())
    }
}

impl BusDevice for PowerDevice {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if offset == POWER_EVENTS {
            data[0] = std::mem::take(&mut self.pending);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        match (offset, data) {
            (POWER_SLEEP_CONTROL, [value]) if value & SLP_EN != 0 && value >> 2 & 7 == SLEEP_TYPE_S5 => {
                (self.events)(GuestEvent::PowerOff);
            }
            (POWER_RESET, [POWER_RESET_VALUE]) => (self.events)(GuestEvent::Reset),
            _ => {}
        }
    }
}

/// pvpanic's one port: bit 0 "panicked"; reading tells which bits are understood.
pub struct PanicDevice(pub GuestEvents);

const PANICKED: u8 = 1;

impl BusDevice for PanicDevice {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(PANICKED);
    }

    fn write(&mut self, _offset: u64, data: &[u8]) {
        if data[0] & PANICKED != 0 {
            (self.0)(GuestEvent::Panicked);
        }
    }
}

/// A port where one value means reset: 0xfe at the keyboard controller's 0x64, 6 or 14 at the chipset's 0xcf9.
pub struct ResetPort {
    /// Where to report.
    pub events: GuestEvents,
    /// The values that reset.
    pub values: &'static [u8],
}

impl BusDevice for ResetPort {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&mut self, _offset: u64, data: &[u8]) {
        if self.values.contains(&data[0]) {
            (self.events)(GuestEvent::Reset);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, channel};

    use super::*;

    fn device() -> (PowerDevice, Receiver<GuestEvent>) {
        let (sender, receiver) = channel();
        let events = Arc::new(move |event| sender.send(event).unwrap());
        (PowerDevice::new(events, EventFd::new(libc::EFD_NONBLOCK).unwrap()), receiver)
    }

    #[test]
    fn only_s5_switches_off() {
        let (mut power, events) = device();
        for (offset, value) in [(0, SLP_EN), (0, 5 << 2), (1, SLP_EN | 5 << 2), (0, SLP_EN | 3 << 2), (3, 2)] {
            power.write(offset, &[value]);
            assert!(events.try_recv().is_err(), "{offset} {value:#x}");
        }
        power.write(0, &[SLP_EN | 5 << 2]);
        assert_eq!(events.try_recv(), Ok(GuestEvent::PowerOff));
        power.write(3, &[1]);
        assert_eq!(events.try_recv(), Ok(GuestEvent::Reset));
    }

    #[test]
    fn the_button_stays_pressed_until_the_guest_looks_also_across_saving() {
        let (mut power, _events) = device();
        power.press_button().unwrap();
        let (mut restored, _events) = device();
        restored.restore(power.save()).unwrap();
        assert_eq!(restored.interrupt.read().unwrap(), 1);
        let mut seen = [0; 2];
        restored.read(POWER_EVENTS, &mut seen[..1]);
        restored.read(POWER_EVENTS, &mut seen[1..]);
        assert_eq!(seen, [1, 0]);
        assert!(restored.restore(PowerState { pending: 2 }).is_err());
    }
}
