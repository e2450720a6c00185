//! A hostile guest at the port devices (serial port, power registers, panic notifier, resets): no access panics, what was typed
//! and what was printed arrives, and whatever state it has got them into goes on in others.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::{Arc, Mutex};

use arbitrary::Unstructured;
use vmm::arch::acpi::POWER_PORT_BYTES;
use vmm::arch::layout::{COM1_PORT, POWER_PORT, PVPANIC_PORT};
use vmm::devices::bus::Bus;
use vmm::devices::power::{GuestEvents, PanicDevice, PowerDevice, ResetPort};
use vmm::devices::serial::{SERIAL_PORTS, SerialPort};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

const DATA: u64 = COM1_PORT;
const LINE_CONTROL: u64 = COM1_PORT + 3;
const MODEM_CONTROL: u64 = COM1_PORT + 4;
const LINE_STATUS: u64 = COM1_PORT + 5;
const DLAB: u8 = 0x80;
const LOOPBACK: u8 = 0x10;

pub fn run(data: &[u8]) {
    let mut u = Unstructured::new(data);
    let mut machine = Machine::new();
    while !u.is_empty() && machine.step(&mut u).is_ok() {}
    machine.check_output();
}

#[derive(Clone, Default)]
struct Output(Arc<Mutex<Vec<u8>>>);

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

struct Machine {
    bus: Bus,
    serial: Arc<Mutex<SerialPort>>,
    power: Arc<Mutex<PowerDevice>>,
    output: Output,
    printed: Vec<u8>,
    typed: VecDeque<u8>,
    /// In loopback mode the guest talks to itself, and what it reads then nobody typed.
    looped: bool,
}

fn line() -> EventFd {
    EventFd::new(EFD_NONBLOCK).unwrap()
}

impl Machine {
    fn new() -> Self {
        let events: GuestEvents = Arc::new(|_| {});
        let output = Output::default();
        let serial = Arc::new(Mutex::new(SerialPort::new(line(), Box::new(output.clone()))));
        let power = Arc::new(Mutex::new(PowerDevice::new(events.clone(), line())));
        let mut bus = Bus::default();
        bus.insert(COM1_PORT, SERIAL_PORTS, serial.clone()).unwrap();
        bus.insert(POWER_PORT, POWER_PORT_BYTES, power.clone()).unwrap();
        bus.insert(PVPANIC_PORT, 1, Arc::new(Mutex::new(PanicDevice(events.clone())))).unwrap();
        bus.insert(0x64, 1, Arc::new(Mutex::new(ResetPort { events, values: &[0xfe] }))).unwrap();
        Self { bus, serial, power, output, printed: vec![], typed: VecDeque::new(), looped: false }
    }

    fn step(&mut self, u: &mut Unstructured<'_>) -> arbitrary::Result<()> {
        match u.arbitrary::<u8>()? % 8 {
            0..=3 => {
                let base = [COM1_PORT, COM1_PORT, POWER_PORT, PVPANIC_PORT][usize::from(u.arbitrary::<u8>()? & 3)];
                let port = if u.ratio(1, 16)? { u.arbitrary()? } else { base + u64::from(u.arbitrary::<u8>()? & 15) };
                let width = [1, 1, 1, 2, 4, 8][u.int_in_range(0..=5usize)?];
                if u.arbitrary()? {
                    self.read(port, width);
                } else {
                    self.write(port, &u.arbitrary::<[u8; 8]>()?[..width]);
                }
            }
            4 => {
                let bytes = u.int_in_range(0..=100usize)?;
                let bytes = u.bytes(bytes)?;
                let taken = self.serial.lock().unwrap().input(bytes);
                self.typed.extend(&bytes[..taken]);
            }
            5 if u.ratio(1, 16)? => {
                self.input_a_lot();
                self.migrate();
                // The end: from here on each step would take as long as a thousand.
                return Err(arbitrary::Error::EmptyChoose);
            }
            5 | 6 => self.power.lock().unwrap().press_button().unwrap(),
            _ => self.migrate(),
        }
        Ok(())
    }

    fn input_a_lot(&mut self) {
        let taken = self.serial.lock().unwrap().input(&[0x55; 100_000]);
        self.typed.extend(&[0x55; 100_000][..taken]);
        assert!(self.looped || self.typed.len() <= 65_536 + 64, "input is bounded");
    }

    fn peek(&self, port: u64) -> u8 {
        let mut byte = [0];
        self.bus.read(port, &mut byte);
        byte[0]
    }

    fn read(&mut self, port: u64, width: usize) {
        let is_data = port == DATA && width == 1 && self.peek(LINE_CONTROL) & DLAB == 0;
        let ready = self.peek(LINE_STATUS) & 1 == 1;
        let mut data = [0xee; 8];
        self.bus.read(port, &mut data[..width]);
        if is_data && !self.looped {
            assert_eq!(ready, !self.typed.is_empty(), "line status");
            assert_eq!(data[0], self.typed.pop_front().unwrap_or(0), "input");
        }
    }

    fn write(&mut self, port: u64, data: &[u8]) {
        let looping = self.peek(MODEM_CONTROL) & LOOPBACK != 0;
        if port == DATA && data.len() == 1 && self.peek(LINE_CONTROL) & DLAB == 0 && !looping {
            self.printed.push(data[0]);
        }
        self.bus.write(port, data);
        self.looped |= self.peek(MODEM_CONTROL) & LOOPBACK != 0;
    }

    fn check_output(&self) {
        assert!(*self.output.0.lock().unwrap() == self.printed, "output");
    }

    /// The state goes on in other devices.
    fn migrate(&mut self) {
        self.check_output();
        let mut other = Self::new();
        let serial = self.serial.lock().unwrap().save();
        let serial = postcard::from_bytes(&postcard::to_stdvec(&serial).unwrap()).unwrap();
        other.serial.lock().unwrap().restore(serial).expect("what was saved can be taken over");
        let power = self.power.lock().unwrap().save();
        let power = postcard::from_bytes(&postcard::to_stdvec(&power).unwrap()).unwrap();
        other.power.lock().unwrap().restore(power).expect("what was saved can be taken over");
        assert_eq!(other.power.lock().unwrap().save(), self.power.lock().unwrap().save());
        other.typed = std::mem::take(&mut self.typed);
        other.looped = self.looped;
        *self = other;
    }
}
