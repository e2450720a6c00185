//! The ACPI tables: what a stock kernel needs to find CPUs, interrupts, virtio-mmio devices, the power button and the way off.
//!
//! Hardware-reduced ACPI (ACPI 6.4, 3.11): no SMI, no PM timer, no fixed events; a generic event device (5.6.9) carries the power
//! button, sleep and reset are registers of ours (see [`crate::devices::power`]).

use acpi_tables::aml::{
    self, Device, EISAName, Field, FieldAccessType, FieldEntry, FieldLockRule, FieldUpdateRule, IO, If, Interrupt,
    Memory32Fixed, Method, Name, Notify, OpRegion, OpRegionSpace, Package, Path, ResourceTemplate, Scope,
};
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, AmlSink};

use super::layout::{
    ACPI_TABLES, COM1_GSI, COM1_PORT, GED_GSI, HIGH_RAM, IOAPIC, LAPIC, POWER_PORT, PVPANIC_PORT, VIRTIO_GSI_BASE,
    VIRTIO_MMIO_BASE, VIRTIO_MMIO_BYTES,
};

const OEM_ID: [u8; 6] = *b"MICROV";
const OEM_TABLE_ID: [u8; 8] = *b"MICROVM ";
const OEM_REVISION: u32 = 1;

/// `SLP_TYP` of S5 (soft off) as `\_S5` gives it to the guest.
pub const SLEEP_TYPE_S5: u8 = 5;
/// Offset from [`POWER_PORT`]: sleep control register (ACPI 6.4, 4.8.3.7).
pub const POWER_SLEEP_CONTROL: u64 = 0;
/// Offset: sleep status register.
pub const POWER_SLEEP_STATUS: u64 = 1;
/// Offset: pending events, bit 0 the power button; reading clears.
pub const POWER_EVENTS: u64 = 2;
/// Offset: writing [`POWER_RESET_VALUE`] resets.
pub const POWER_RESET: u64 = 3;
/// What the reset register takes.
pub const POWER_RESET_VALUE: u8 = 1;
/// Length of the power registers.
pub const POWER_PORT_BYTES: u64 = 4;

/// `_STA`: present, enabled, shown, working.
const STA_ALL: u8 = 0xf;
/// `IA-PC Boot Architecture`: no VGA (bit 2), no CMOS clock (bit 5).
const BOOT_ARCH: u16 = 1 << 2 | 1 << 5;

fn io_register(offset: u64) -> GAS {
    GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, POWER_PORT + offset)
}

fn gsi(number: u32) -> Interrupt {
    Interrupt::new(true, true, false, false, number)
}

fn hid(id: &'static str) -> Name {
    Name::new(Path::new("_HID"), &id)
}

fn dsdt(virtio_devices: usize) -> Vec<u8> {
    let mut body = Vec::new();
    let s5 = Package::new(vec![&SLEEP_TYPE_S5, &aml::ZERO, &aml::ZERO, &aml::ZERO]);
    Name::new(Path::new("_S5_"), &s5).to_aml_bytes(&mut body);

    let com1 = [
        Name::new(Path::new("_HID"), &EISAName::new("PNP0501")),
        Name::new(Path::new("_UID"), &aml::ZERO),
        Name::new(
            Path::new("_CRS"),
            &ResourceTemplate::new(vec![&IO::new(COM1_PORT as u16, COM1_PORT as u16, 1, 8), &gsi(COM1_GSI)]),
        ),
    ];
    let button = Name::new(Path::new("_HID"), &EISAName::new("PNP0C0C"));
    let panic = [
        hid("QEMU0001"),
        Name::new(Path::new("_STA"), &STA_ALL),
        Name::new(
            Path::new("_CRS"),
            &ResourceTemplate::new(vec![&IO::new(PVPANIC_PORT as u16, PVPANIC_PORT as u16, 1, 1)]),
        ),
    ];
    let event_register =
        OpRegion::new(Path::new("EREG"), OpRegionSpace::SystemIO, &(POWER_PORT + POWER_EVENTS), &aml::ONE);
    let event_field = Field::new(
        Path::new("EREG"),
        FieldAccessType::Byte,
        FieldLockRule::NoLock,
        FieldUpdateRule::WriteAsZeroes,
        vec![FieldEntry::Named(*b"EVNT", 8)],
    );
    let pending = Path::new("EVNT");
    let button_path = Path::new("\\_SB_.PWRB");
    let notify = Notify::new(&button_path, &0x80u8);
    let if_pressed = If::new(&pending, vec![&notify]);
    let event_method = Method::new(Path::new("_EVT"), 1, true, vec![&if_pressed]);
    let ged_hid = hid("ACPI0013");
    let ged_crs = Name::new(Path::new("_CRS"), &ResourceTemplate::new(vec![&gsi(GED_GSI)]));

    let virtio: Vec<Vec<u8>> = (0..virtio_devices).map(virtio_device).collect();
    let virtio: Vec<Raw> = virtio.into_iter().map(Raw).collect();
    let com1 = Device::new(Path::new("COM1"), com1.iter().map(|n| n as &dyn Aml).collect());
    let button = Device::new(Path::new("PWRB"), vec![&button]);
    let panic = Device::new(Path::new("PEVT"), panic.iter().map(|n| n as &dyn Aml).collect());
    let ged = Device::new(Path::new("GED_"), vec![&ged_hid, &ged_crs, &event_register, &event_field, &event_method]);
    let mut devices: Vec<&dyn Aml> = vec![&com1, &button, &ged, &panic];
    devices.extend(virtio.iter().map(|d| d as &dyn Aml));
    Scope::new(Path::new("\\_SB_"), devices).to_aml_bytes(&mut body);

    let mut table = Sdt::new(*b"DSDT", 36, 2, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    table.append_slice(&body);
    bytes_of(&table)
}

/// AML that is finished.
struct Raw(Vec<u8>);
impl Aml for Raw {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(&self.0);
    }
}

/// `LNRO0005` is how Linux finds virtio-mmio without a kernel parameter; `_CCA`: DMA is coherent.
fn virtio_device(n: usize) -> Vec<u8> {
    let base = VIRTIO_MMIO_BASE + n as u64 * VIRTIO_MMIO_BYTES;
    let crs = ResourceTemplate::new(vec![
        &Memory32Fixed::new(true, base as u32, VIRTIO_MMIO_BYTES as u32),
        &gsi(VIRTIO_GSI_BASE + n as u32),
    ])
    .to_vec();
    let crs = Raw(crs);
    let names = [
        hid("LNRO0005"),
        Name::new(Path::new("_UID"), &(n as u8)),
        Name::new(Path::new("_CCA"), &aml::ONE),
        Name::new(Path::new("_CRS"), &crs),
    ];
    Device::new(Path::new(&format!("V{n:03}")), names.iter().map(|n| n as &dyn Aml).collect()).to_vec()
}

trait ToVec {
    fn to_vec(&self) -> Vec<u8>;
}
impl<T: Aml> ToVec for T {
    fn to_vec(&self) -> Vec<u8> {
        bytes_of(self)
    }
}
fn bytes_of(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

fn fadt(dsdt: u64) -> Vec<u8> {
    let mut builder = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton);
    builder.iapc_boot_arch = BOOT_ARCH.into();
    builder.sleep_control_reg = io_register(POWER_SLEEP_CONTROL);
    builder.sleep_status_reg = io_register(POWER_SLEEP_STATUS);
    builder.reset_reg = io_register(POWER_RESET);
    builder.reset_value = POWER_RESET_VALUE;
    bytes_of(&builder.finalize())
}

fn madt(cpus: u8) -> Vec<u8> {
    let mut madt = MADT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION, LocalInterruptController::Address(LAPIC));
    for cpu in 0..cpus {
        madt.add_structure(ProcessorLocalApic::new(cpu, cpu, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(0, IOAPIC, 0));
    bytes_of(&madt)
}

/// All tables as one block of memory for [`ACPI_TABLES`]; the RSDP is at its start.
pub fn tables(cpus: u8, virtio_devices: usize) -> Vec<u8> {
    let mut block = vec![0; Rsdp::len().next_multiple_of(16)];
    let mut place = |table: Vec<u8>| {
        let address = ACPI_TABLES + block.len() as u64;
        block.extend(table);
        block.resize(block.len().next_multiple_of(16), 0);
        address
    };
    let dsdt = place(dsdt(virtio_devices));
    let fadt = place(fadt(dsdt));
    let madt = place(madt(cpus));
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = place(bytes_of(&xsdt));
    let rsdp = bytes_of(&Rsdp::new(OEM_ID, xsdt));
    block[..rsdp.len()].copy_from_slice(&rsdp);
    debug_assert!(ACPI_TABLES + (block.len() as u64) < HIGH_RAM);
    block
}

#[cfg(test)]
mod tests {
    use super::super::layout::MAX_VIRTIO_DEVICES;
    use super::*;

    fn word(block: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(block[at..at + 8].try_into().unwrap())
    }
    fn sums_to_zero(bytes: &[u8]) -> bool {
        bytes.iter().fold(0u8, |sum, b| sum.wrapping_add(*b)) == 0
    }
    fn table(block: &[u8], address: u64) -> &[u8] {
        let at = (address - ACPI_TABLES) as usize;
        let len = u32::from_le_bytes(block[at + 4..at + 8].try_into().unwrap()) as usize;
        &block[at..at + len]
    }

    #[test]
    fn every_table_is_reachable_and_sums_to_zero() {
        let block = tables(4, MAX_VIRTIO_DEVICES);
        assert_eq!(&block[..8], b"RSD PTR ");
        assert!(sums_to_zero(&block[..20]) && sums_to_zero(&block[..36]));
        let xsdt = table(&block, word(&block, 24));
        assert!(xsdt.starts_with(b"XSDT") && sums_to_zero(xsdt));
        let (fadt, madt) = (table(&block, word(xsdt, 36)), table(&block, word(xsdt, 44)));
        assert!(fadt.starts_with(b"FACP") && sums_to_zero(fadt));
        assert!(madt.starts_with(b"APIC") && sums_to_zero(madt));
        let dsdt = table(&block, word(fadt, 140));
        assert!(dsdt.starts_with(b"DSDT") && sums_to_zero(dsdt));
        let found = dsdt.windows(8).filter(|w| w == b"LNRO0005").count();
        assert_eq!(found, MAX_VIRTIO_DEVICES);
    }
}
