//! ACPI, without an interpreter: just enough to find devices, the way to switch off, and the power button.
//!
//! The tables come from the VMM and are read once, before the workload owns any memory. Nothing in them is trusted to be
//! in bounds: every read goes through [`Physical`] and may fail, and what cannot be read is as if it were not there.
//! (ACPI 6.5: 5.2.5 RSDP, 5.2.8 XSDT, 5.2.9 FADT, 5.2.12 MADT, 6.4 resource descriptors, 7.4.2 `_S5_`.)

use crate::discovery::{Devices, MmioDevice};

/// Physical memory, as far as it may be read.
pub trait Physical {
    /// `bytes` bytes from `address`; `None` when they are not all readable.
    fn slice(&self, address: u64, bytes: usize) -> Option<&[u8]>;
}

/// The largest table that is read: a DSDT of a small machine has a few kilobytes.
const MOST_TABLE_BYTES: usize = 1 << 20;
/// Interrupt controllers that are kept at most.
pub const MOST_IO_APICS: usize = 4;

/// What the tables say.
#[derive(Clone, Debug, Default)]
pub struct Acpi {
    /// The virtio-mmio devices of the DSDT.
    pub devices: Devices,
    /// The I/O APICs of the MADT.
    pub io_apics: [Option<IoApic>; MOST_IO_APICS],
    /// How to switch off.
    pub sleep: Option<Sleep>,
    /// Where the power button is seen.
    pub power_button: Option<PowerButton>,
    /// How to reset.
    pub reset: Option<(Register, u8)>,
}

/// An I/O APIC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IoApic {
    /// Address of its registers.
    pub address: u64,
    /// Its first global system interrupt.
    pub gsi_base: u32,
}

/// A register, in one of the two spaces that such a machine has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Register {
    /// An I/O port.
    Port(u16),
    /// Memory, mapped.
    Memory(u64),
}

/// How the machine is switched off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sleep {
    /// Fixed hardware: write this to the PM1a control port (16 bits).
    Pm1a {
        /// The port.
        port: u16,
        /// SLP_TYP of S5, and SLP_EN.
        value: u16,
    },
    /// Reduced hardware: write this to the sleep control register (8 bits).
    Control {
        /// The register.
        register: Register,
        /// SLP_TYP of S5, and SLP_EN.
        value: u8,
    },
}

/// Where the power button is seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PowerButton {
    /// Fixed hardware: bit 8 of two 16-bit ports.
    Fixed {
        /// PM1a status; writing the bit clears it.
        status_port: u16,
        /// PM1a enable; without its bit the status may stay clear.
        enable_port: u16,
        /// SMI command port and the value that switches ACPI on, where that is needed.
        acpi_enable: Option<(u16, u8)>,
    },
    /// Reduced hardware: bit 0 of the port that microvm's generic event device reads, which clears it. Its AML is not run; the
    /// operation region is known by its name.
    Events {
        /// The port, 8 bits.
        port: u16,
    },
}

impl Acpi {
    /// Reads the tables from the root pointer at `rsdp`; 0 or nonsense gives nothing.
    pub fn read(memory: &dyn Physical, rsdp: u64) -> Self {
        let mut acpi = Self::default();
        for_each_table(memory, rsdp, |signature, table| match signature {
            b"FACP" => acpi.read_fadt(memory, table),
            b"APIC" => acpi.read_madt(table),
            _ => {}
        });
        acpi
    }

    fn read_fadt(&mut self, memory: &dyn Physical, fadt: &[u8]) {
        let flags = u32_at(fadt, 112).unwrap_or(0);
        let reduced = flags & (1 << 20) != 0;
        let dsdt = u64_at(fadt, 140).filter(|&at| at != 0).or(u32_at(fadt, 40).map(u64::from));
        let dsdt = dsdt.and_then(|at| table(memory, at)).filter(|t| t.starts_with(b"DSDT")).unwrap_or(&[]);
        find_virtio(dsdt, &mut self.devices);

        if let Some(slp_typ) = find_s5(dsdt) {
            let pm1a = port_at(fadt, 64).filter(|_| !reduced);
            self.sleep = match (pm1a, register_at(fadt, 244)) {
                (Some(port), _) => Some(Sleep::Pm1a { port, value: u16::from(slp_typ) << 10 | 1 << 13 }),
                (None, Some(register)) => Some(Sleep::Control { register, value: slp_typ << 2 | 1 << 5 }),
                (None, None) => None,
            };
        }
        if flags & (1 << 10) != 0 {
            self.reset = register_at(fadt, 116).zip(fadt.get(128).copied());
        }
        let event_bytes = fadt.get(88).copied().unwrap_or(0);
        // Bit 4 says that the button is not of the fixed hardware.
        if !reduced && flags & (1 << 4) == 0 && event_bytes >= 4 {
            self.power_button = port_at(fadt, 56).map(|status_port| PowerButton::Fixed {
                status_port,
                enable_port: status_port.wrapping_add(u16::from(event_bytes / 2)),
                acpi_enable: port_at(fadt, 48).zip(fadt.get(52).copied().filter(|&value| value != 0)),
            });
        } else if reduced {
            self.power_button = find_event_port(dsdt).map(|port| PowerButton::Events { port });
        }
    }

    fn read_madt(&mut self, madt: &[u8]) {
        let mut rest = madt.get(44..).unwrap_or(&[]);
        while let [kind, bytes, ..] = *rest {
            let Some(entry) = rest.get(..usize::from(bytes)).filter(|entry| entry.len() >= 2) else { return };
            if let (1, Some(address), Some(gsi_base)) = (kind, u32_at(entry, 4), u32_at(entry, 8))
                && let Some(place) = self.io_apics.iter_mut().find(|place| place.is_none())
            {
                *place = Some(IoApic { address: address.into(), gsi_base });
            }
            rest = &rest[entry.len()..];
        }
    }
}

/// Calls `visit` for each table that the root table points to and whose checksum is right.
fn for_each_table(memory: &dyn Physical, rsdp: u64, mut visit: impl FnMut(&[u8], &[u8])) {
    let Some(head) = memory.slice(rsdp, 20).filter(|head| rsdp != 0 && head.starts_with(b"RSD PTR ")) else { return };
    let extended = (head[15] >= 2).then(|| memory.slice(rsdp, 36)).flatten();
    let xsdt = extended.and_then(|rsdp| u64_at(rsdp, 24)).and_then(|at| table(memory, at));
    if let Some(xsdt) = xsdt.filter(|t| t.starts_with(b"XSDT")) {
        for at in xsdt[36..].chunks_exact(8).filter_map(|entry| u64_at(entry, 0)) {
            if let Some(found) = table(memory, at) {
                visit(&found[..4], found);
            }
        }
    } else if let Some(rsdt) = u32_at(head, 16).and_then(|at| table(memory, at.into())) {
        for at in rsdt[36..].chunks_exact(4).filter_map(|entry| u32_at(entry, 0)) {
            if let Some(found) = table(memory, at.into()) {
                visit(&found[..4], found);
            }
        }
    }
}

/// The table at `address`, header included, when its length is possible and its checksum right.
fn table(memory: &dyn Physical, address: u64) -> Option<&[u8]> {
    let bytes = u32_at(memory.slice(address, 36)?, 4)? as usize;
    let table = memory.slice(address, bytes).filter(|_| (36..=MOST_TABLE_BYTES).contains(&bytes))?;
    (table.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte)) == 0).then_some(table)
}

/// The port of the operation region `EREG` in the I/O space: DefOpRegion, name, space, offset as a word (ACPI 6.5, 20.2.5.2).
fn find_event_port(aml: &[u8]) -> Option<u16> {
    const REGION: &[u8] = b"\x5b\x80EREG\x01\x0b";
    let offset = aml.get(find(aml, REGION)? + REGION.len()..)?;
    Some(u16::from_le_bytes([*offset.first()?, *offset.get(1)?]))
}

/// The virtio-mmio devices of a DSDT: each `LNRO0005` with the first memory and interrupt descriptor after it.
fn find_virtio(aml: &[u8], devices: &mut Devices) {
    const ID: &[u8] = b"LNRO0005\0";
    let mut rest = aml;
    while let Some(at) = find(rest, ID) {
        rest = &rest[at + ID.len()..];
        let device = &rest[..find(rest, ID).unwrap_or(rest.len())];
        // Memory32Fixed: tag, length 9, access, base, size. Extended interrupt: tag, length, flags, count, number.
        let memory = find(device, &[0x86, 9, 0]).map(|at| &device[at..]);
        let interrupt = device.windows(9).find(|d| d[0] == 0x89 && d[1] >= 6 && d[2] == 0 && d[4] >= 1);
        if let Some(memory) = memory
            && let (Some(base), Some(bytes)) = (u32_at(memory, 4), u32_at(memory, 8))
            && let Some(irq) = interrupt.and_then(|d| u32_at(d, 5))
        {
            devices.add(MmioDevice { base: base.into(), bytes: bytes.into(), irq });
        }
    }
}

/// SLP_TYP of S5: the first element of the package called `_S5_`.
fn find_s5(aml: &[u8]) -> Option<u8> {
    let package = aml.get(find(aml, b"_S5_\x12")? + 5..)?;
    // PkgLength: the two upper bits of its first byte count the bytes that follow. Then the number of elements.
    let element = package.get(2 + usize::from(package.first()? >> 6)..)?;
    let slp_typ = match *element.first()? {
        0x0a => *element.get(1)?,
        constant @ (0 | 1) => constant,
        _ => return None,
    };
    (slp_typ < 8).then_some(slp_typ)
}

fn find(haystack: &[u8], needle: &[u8]) -> Option<usize> {
    haystack.windows(needle.len()).position(|window| window == needle)
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}

/// A 32-bit field that holds a port; 0 is none.
fn port_at(bytes: &[u8], at: usize) -> Option<u16> {
    u16::try_from(u32_at(bytes, at)?).ok().filter(|&port| port != 0)
}

/// A generic address structure.
fn register_at(bytes: &[u8], at: usize) -> Option<Register> {
    let address = u64_at(bytes, at + 4).filter(|&address| address != 0)?;
    match bytes.get(at)? {
        0 => (address < 1 << 32).then_some(Register::Memory(address)),
        1 => u16::try_from(address).ok().map(Register::Port),
        _ => None,
    }
}

#[cfg(test)]
mod tests;
