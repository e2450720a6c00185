//! The serial port: a 16550A at COM1 (`vm-superio`), with an input queue behind its small FIFO.

use std::collections::VecDeque;
use std::io::Write;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use vm_superio::serial::NoEvents;
use vm_superio::{SerialState as Registers, Trigger};
use vmm_sys_util::eventfd::EventFd;

use super::bus::BusDevice;

/// Ports of a 16550A.
pub const SERIAL_PORTS: u64 = 8;
/// Input that waits for the guest; more is dropped, as on a real line.
const MAX_PENDING_BYTES: usize = 64 << 10;
/// FIFO of a 16550A as `vm-superio` has it.
const FIFO_BYTES: usize = 64;

/// Where the guest's output goes. Called on a vCPU thread: it must not block for long.
pub type ConsoleOutput = Box<dyn Write + Send>;

/// An edge-triggered interrupt line: an eventfd that KVM listens to (KVM_IRQFD).
#[derive(Clone)]
pub struct InterruptLine(pub Arc<EventFd>);

impl Trigger for InterruptLine {
    type E = std::io::Error;
    fn trigger(&self) -> std::io::Result<()> {
        self.0.write(1)
    }
}

type Uart = vm_superio::Serial<InterruptLine, NoEvents, ConsoleOutput>;

/// COM1.
pub struct SerialPort {
    uart: Uart,
    interrupt: InterruptLine,
    pending: VecDeque<u8>,
}

/// What is saved of the port: its registers, the FIFO, and the input that waits behind it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SerialState {
    /// Registers in the order of [`Registers`]: divisor latch low and high, IER, IIR, LCR, LSR, MCR, MSR, scratch.
    registers: [u8; 9],
    fifo: Vec<u8>,
    pending: Vec<u8>,
}

/// A saved port that no port can have been.
#[derive(Debug, thiserror::Error)]
pub enum SerialStateError {
    /// More in the FIFO than it holds.
    #[error("saved serial port: {0} bytes in a FIFO of {FIFO_BYTES}")]
    Fifo(usize),
    /// More waiting input than we keep.
    #[error("saved serial port: {0} bytes of waiting input, at most {MAX_PENDING_BYTES} are kept")]
    Pending(usize),
    /// The device model refused the registers.
    #[error("saved serial port: {0}")]
    Registers(String),
}

impl SerialPort {
    /// A port just reset.
    pub fn new(interrupt: EventFd, output: ConsoleOutput) -> Self {
        let interrupt = InterruptLine(Arc::new(interrupt));
        SerialPort { uart: Uart::new(interrupt.clone(), output), interrupt, pending: VecDeque::new() }
    }

    /// Types `bytes` into the port; returns how many were taken.
    pub fn input(&mut self, bytes: &[u8]) -> usize {
        let taken = bytes.len().min(MAX_PENDING_BYTES - self.pending.len());
        self.pending.extend(&bytes[..taken]);
        self.refill();
        taken
    }

    fn refill(&mut self) {
        let now = self.uart.fifo_capacity().min(self.pending.len());
        if now > 0 {
            let bytes: Vec<u8> = self.pending.drain(..now).collect();
            if let Err(error) = self.uart.enqueue_raw_bytes(&bytes) {
                tracing::debug!(?error, "serial input refused");
            }
        }
    }

    /// The port's state.
    pub fn save(&self) -> SerialState {
        let SerialPort { uart, interrupt: _, pending } = self;
        let Registers {
            baud_divisor_low,
            baud_divisor_high,
            interrupt_enable,
            interrupt_identification,
            line_control,
            line_status,
            modem_control,
            modem_status,
            scratch,
            in_buffer,
        } = uart.state();
        SerialState {
            registers: [
                baud_divisor_low,
                baud_divisor_high,
                interrupt_enable,
                interrupt_identification,
                line_control,
                line_status,
                modem_control,
                modem_status,
                scratch,
            ],
            fifo: in_buffer,
            pending: pending.iter().copied().collect(),
        }
    }

    /// Makes the port what it was, with its interrupt raised again: one too many is harmless, one too few hangs the console.
    pub fn restore(&mut self, state: SerialState) -> Result<(), SerialStateError> {
        let SerialState { registers, fifo, pending } = state;
        if fifo.len() > FIFO_BYTES {
            return Err(SerialStateError::Fifo(fifo.len()));
        }
        if pending.len() > MAX_PENDING_BYTES {
            return Err(SerialStateError::Pending(pending.len()));
        }
        let [
            baud_divisor_low,
            baud_divisor_high,
            interrupt_enable,
            interrupt_identification,
            line_control,
            line_status,
            modem_control,
            modem_status,
            scratch,
        ] = registers;
        let registers = Registers {
            baud_divisor_low,
            baud_divisor_high,
            interrupt_enable,
            interrupt_identification,
            line_control,
            line_status,
            modem_control,
            modem_status,
            scratch,
            in_buffer: fifo,
        };
        let fresh = Uart::new(self.interrupt.clone(), Box::new(std::io::sink()));
        let output = std::mem::replace(&mut self.uart, fresh).into_writer();
        self.uart = Uart::from_state(&registers, self.interrupt.clone(), NoEvents, output)
            .map_err(|e| SerialStateError::Registers(format!("{e:?}")))?;
        self.pending = pending.into();
        self.refill();
        Ok(())
    }
}

impl BusDevice for SerialPort {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let (Ok(offset), [byte]) = (u8::try_from(offset), data) {
            *byte = self.uart.read(offset);
            self.refill();
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let (Ok(offset), [byte]) = (u8::try_from(offset), data)
            && let Err(error) = self.uart.write(offset, *byte)
        {
            tracing::debug!(?error, "serial output lost");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line() -> EventFd {
        EventFd::new(libc::EFD_NONBLOCK).unwrap()
    }
    fn port() -> SerialPort {
        SerialPort::new(line(), Box::new(std::io::sink()))
    }
    fn read_all(port: &mut SerialPort) -> Vec<u8> {
        let mut all = Vec::new();
        loop {
            let mut byte = [0];
            port.read(5, &mut byte);
            if byte[0] & 1 == 0 {
                return all;
            }
            port.read(0, &mut byte);
            all.push(byte[0]);
        }
    }

    #[test]
    fn input_beyond_the_fifo_waits_and_survives_saving() {
        let mut port = port();
        let input: Vec<u8> = (0..=255).collect();
        assert_eq!(port.input(&input), 256);
        let state = port.save();
        assert_eq!(state.fifo.len() + state.pending.len(), 256);
        let mut restored = SerialPort::new(line(), Box::new(std::io::sink()));
        restored.restore(state).unwrap();
        assert_eq!(read_all(&mut restored), input);
        assert_eq!(read_all(&mut port), input);
    }

    #[test]
    fn input_without_a_reader_is_bounded() {
        assert_eq!(port().input(&vec![0; 1 << 20]), MAX_PENDING_BYTES);
    }

    #[test]
    fn accesses_that_no_16550_knows_do_nothing() {
        let mut port = port();
        let mut data = [0xee; 4];
        port.read(0, &mut data);
        assert_eq!(data, [0; 4]);
        port.write(700, &[1]);
        port.write(1, &[1, 2]);
    }

    #[test]
    fn hostile_state_is_refused() {
        let good = port().save();
        let mut port = port();
        let mut restore = |state| port.restore(state);
        assert!(restore(SerialState { fifo: vec![0; 65], ..good.clone() }).is_err());
        assert!(restore(SerialState { pending: vec![0; MAX_PENDING_BYTES + 1], ..good.clone() }).is_err());
        for i in 0..9 {
            let mut state = good.clone();
            state.registers[i] = 0xff;
            let _ = restore(state); // any register value is one that a guest could have written
        }
        restore(good).unwrap();
    }
}
