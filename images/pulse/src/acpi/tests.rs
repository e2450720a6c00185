//! Tables made by hand, whole and damaged.

use super::*;

const BASE: u64 = 0xe_0000;

/// Memory from [`BASE`] on.
struct Memory(Vec<u8>);

impl Physical for Memory {
    fn slice(&self, address: u64, bytes: usize) -> Option<&[u8]> {
        let start = usize::try_from(address.checked_sub(BASE)?).ok()?;
        self.0.get(start..start.checked_add(bytes)?)
    }
}

impl Memory {
    /// Appends a table with the length and checksum that it should have, and returns its address.
    fn add(&mut self, signature: &[u8; 4], body: &[u8]) -> u64 {
        let mut table = signature.to_vec();
        table.extend(u32::try_from(36 + body.len()).unwrap().to_le_bytes());
        table.resize(36, 0);
        table.extend(body);
        table[9] = table.iter().fold(0u8, |sum, byte| sum.wrapping_sub(*byte));
        let at = BASE + self.0.len() as u64;
        self.0.extend(table);
        at
    }
}

fn put(bytes: &mut [u8], table_offset: usize, value: &[u8]) {
    bytes[table_offset - 36..table_offset - 36 + value.len()].copy_from_slice(value);
}

fn gas(space: u8, address: u64) -> Vec<u8> {
    let mut gas = vec![space, 8, 0, 1];
    gas.extend(address.to_le_bytes());
    gas
}

fn virtio(base: u32, irq: u32) -> Vec<u8> {
    let mut aml = b"\x5b\x82VR00\x08_HID\x0dLNRO0005\0\x08_CRS\x11".to_vec();
    aml.extend([0x86, 9, 0, 1]);
    aml.extend(base.to_le_bytes());
    aml.extend(0x1000u32.to_le_bytes());
    aml.extend([0x89, 6, 0, 3, 1]);
    aml.extend(irq.to_le_bytes());
    aml.extend([0x79, 0]);
    aml
}

/// A machine with two devices; `fadt` may change its FADT. Returns the memory and the address of the root pointer.
fn machine(fadt: impl Fn(&mut [u8])) -> (Memory, u64) {
    let mut memory = Memory(Vec::new());
    let mut aml = b"\x08_S5_\x12\x06\x04\x0a\x05\x00\x00\x00".to_vec();
    aml.extend(virtio(0xd000_0000, 5));
    aml.extend(virtio(0xd000_1000, 6));
    let dsdt = memory.add(b"DSDT", &aml);
    let mut body = vec![0; 268 - 36];
    put(&mut body, 140, &dsdt.to_le_bytes());
    fadt(&mut body);
    let fadt = memory.add(b"FACP", &body);
    let mut madt = vec![0; 8];
    madt.extend([0, 8, 0, 0, 1, 0, 0, 0]);
    madt.extend([1, 12, 0, 0, 0, 0, 0xc0, 0xfe, 24, 0, 0, 0]);
    let madt = memory.add(b"APIC", &madt);
    let xsdt = memory.add(b"XSDT", &[fadt.to_le_bytes(), madt.to_le_bytes()].concat());
    let rsdp = BASE + memory.0.len() as u64;
    let mut root = b"RSD PTR ".to_vec();
    root.resize(36, 0);
    root[15] = 2;
    root[24..32].copy_from_slice(&xsdt.to_le_bytes());
    memory.0.extend(root);
    (memory, rsdp)
}

fn fixed_hardware(fadt: &mut [u8]) {
    put(fadt, 48, &0xb2u32.to_le_bytes());
    put(fadt, 52, &[2]);
    put(fadt, 56, &0x600u32.to_le_bytes());
    put(fadt, 64, &0x604u32.to_le_bytes());
    put(fadt, 88, &[4]);
    put(fadt, 112, &(1u32 << 10).to_le_bytes());
    put(fadt, 116, &gas(1, 0xcf9));
    put(fadt, 128, &[6]);
}

#[test]
fn fixed_hardware_is_found() {
    let (memory, rsdp) = machine(fixed_hardware);
    let acpi = Acpi::read(&memory, rsdp);
    let irqs: Vec<_> = acpi.devices.as_slice().iter().map(|d| (d.base, d.bytes, d.irq)).collect();
    assert_eq!(irqs, [(0xd000_0000, 0x1000, 5), (0xd000_1000, 0x1000, 6)]);
    assert_eq!(acpi.io_apics[0], Some(IoApic { address: 0xfec0_0000, gsi_base: 24 }));
    assert_eq!(acpi.io_apics[1], None);
    assert_eq!(acpi.sleep, Some(Sleep::Pm1a { port: 0x604, value: 0x3400 }));
    let button = PowerButton::Fixed { status_port: 0x600, enable_port: 0x602, acpi_enable: Some((0xb2, 2)) };
    assert_eq!(acpi.power_button, Some(button));
    assert_eq!(acpi.reset, Some((Register::Port(0xcf9), 6)));
}

#[test]
fn reduced_hardware_is_found() {
    let (memory, rsdp) = machine(|fadt| {
        fixed_hardware(fadt);
        put(fadt, 112, &(1u32 << 20 | 1 << 10).to_le_bytes());
        put(fadt, 244, &gas(0, 0xfea0_0000));
    });
    let acpi = Acpi::read(&memory, rsdp);
    assert_eq!(acpi.sleep, Some(Sleep::Control { register: Register::Memory(0xfea0_0000), value: 0x34 }));
    assert_eq!(acpi.power_button, None);
}

#[test]
fn the_event_port_is_found_by_its_region() {
    assert_eq!(find_event_port(b"..\x5b\x80EREG\x01\x0b\x02\x06\x01"), Some(0x602));
    for other in
        [&b"\x5b\x80EREG\x01\x0b\x02"[..], b"\x5b\x80EREG\x00\x0b\x02\x06", b"\x5b\x80EREX\x01\x0b\x02\x06", b""]
    {
        assert_eq!(find_event_port(other), None);
    }
}

#[test]
fn nothing_is_found_where_nothing_is() {
    let (memory, rsdp) = machine(fixed_hardware);
    for wrong in [0, 1, rsdp - 1, rsdp + 1, u64::MAX, u64::MAX - 20] {
        let acpi = Acpi::read(&memory, wrong);
        assert!(acpi.devices.as_slice().is_empty() && acpi.sleep.is_none());
    }
}

#[test]
fn a_table_with_a_wrong_checksum_is_not_there() {
    let (mut memory, rsdp) = machine(fixed_hardware);
    memory.0[40] ^= 1;
    let acpi = Acpi::read(&memory, rsdp);
    assert!(acpi.devices.as_slice().is_empty() && acpi.sleep.is_none());
    assert!(acpi.power_button.is_some(), "the FADT itself is whole");
}

#[test]
fn no_damage_makes_it_panic() {
    let (memory, rsdp) = machine(fixed_hardware);
    for at in 0..memory.0.len() {
        for value in [0, 1, 0x7f, 0xff] {
            let mut bytes = memory.0.clone();
            bytes[at] = value;
            Acpi::read(&Memory(bytes), rsdp);
        }
        Acpi::read(&Memory(memory.0[..at].to_vec()), rsdp);
    }
    // Damage behind a checksum, which only a wrong or hostile table has.
    let (whole, _) = machine(fixed_hardware);
    let aml = &whole.0[36..whole.0.len().min(200)];
    for at in 0..aml.len() {
        for value in [0, 1, 0x0a, 0x12, 0x3f, 0x89, 0xff] {
            let mut aml = aml.to_vec();
            aml[at] = value;
            find_s5(&aml);
            find_s5(&aml[..at]);
            find_virtio(&aml, &mut Devices::default());
            find_virtio(&aml[at..], &mut Devices::default());
            Acpi::default().read_madt(&aml);
        }
    }
}
