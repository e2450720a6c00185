//! Switching off, resetting, and the power button.

use super::{interrupts, port};
use pulse_core::acpi::{Acpi, PowerButton, Register, Sleep};

const POWER_BUTTON: u16 = 1 << 8;
const EVENT_POWER_BUTTON: u8 = 1;
/// The keyboard controller's reset line, which every VMM for PCs knows.
const KEYBOARD_RESET: (Register, u8) = (Register::Port(0x64), 0xfe);

/// The ways out that the tables gave.
pub struct Power {
    button: Option<PowerButton>,
    sleep: Option<Sleep>,
    reset: Option<(Register, u8)>,
}

impl Power {
    /// Takes the ways out from the tables, and makes the button tell.
    pub fn new(acpi: &Acpi) -> Self {
        if let Some(PowerButton::Fixed { enable_port, acpi_enable, .. }) = acpi.power_button {
            if let Some((smi_port, value)) = acpi_enable {
                port::write_u8(smi_port, value);
            }
            port::write_u16(enable_port, port::read_u16(enable_port) | POWER_BUTTON);
        }
        Self { button: acpi.power_button, sleep: acpi.sleep, reset: acpi.reset }
    }

    /// Whether the button was pressed since the last call. It costs an exit.
    pub fn take_button(&self) -> bool {
        match self.button {
            None => false,
            Some(PowerButton::Events { port }) => port::read_u8(port) & EVENT_POWER_BUTTON != 0,
            Some(PowerButton::Fixed { status_port, .. }) => {
                let pressed = port::read_u16(status_port) & POWER_BUTTON != 0;
                if pressed {
                    port::write_u16(status_port, POWER_BUTTON);
                }
                pressed
            }
        }
    }

    /// Switches off. Where nothing switches off, the reset does, and then the crash: the machine ends in any case.
    pub fn off(&self) -> ! {
        match self.sleep {
            Some(Sleep::Pm1a { port, value }) => port::write_u16(port, value),
            Some(Sleep::Control { register, value }) => write(register, value),
            None => {}
        }
        settle();
        self.reset()
    }

    /// Resets.
    pub fn reset(&self) -> ! {
        for (register, value) in [self.reset, Some(KEYBOARD_RESET)].into_iter().flatten() {
            write(register, value);
            settle();
        }
        interrupts::crash()
    }
}

/// A VMM may let the guest run on for a moment after it was told to stop.
fn settle() {
    for _ in 0..50_000_000u32 {
        core::hint::spin_loop();
    }
}

fn write(register: Register, value: u8) {
    match register {
        Register::Port(port) => port::write_u8(port, value),
        // SAFETY: a register that the FADT names, below 4 GiB and so mapped. A table that names memory instead would
        // damage it, on the way out.
        Register::Memory(address) => unsafe { (address as *mut u8).write_volatile(value) },
    }
}
