//! Sections of saved state from a peer, decoded and restored as far as that goes without KVM: refused, or devices that work, and
//! whose state can go on elsewhere.

use vm_memory::{Bytes, GuestAddress};
use vmm::devices::power::PowerDevice;
use vmm::devices::serial::SerialPort;
use vmm::snapshot::{Section, decode_devices, kind};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::virtio::{Device, Guest, Kind, guest_memory};

/// Of a VM with one vCPU, an entropy device, a network device and a balloon.
const GOLDEN: [(u16, u16, &[u8]); 7] = [
    (kind::MACHINE, 0, include_bytes!("../../tests/golden/state-v1/1-0")),
    (kind::VCPU, 0, include_bytes!("../../tests/golden/state-v1/2-0")),
    (kind::SERIAL, 0, include_bytes!("../../tests/golden/state-v1/3-0")),
    (kind::POWER, 0, include_bytes!("../../tests/golden/state-v1/4-0")),
    (kind::VIRTIO, 0, include_bytes!("../../tests/golden/state-v1/5-0")),
    (kind::VIRTIO, 1, include_bytes!("../../tests/golden/state-v1/5-1")),
    (kind::VIRTIO, 2, include_bytes!("../../tests/golden/state-v1/5-2")),
];

pub fn run(data: &[u8]) {
    let Some((mode, data)) = data.split_first() else { return };
    let (mut sections, rest) = sections(data);
    if mode & 1 == 0 {
        // So that one section is enough to get somewhere.
        for (kind, instance, bytes) in GOLDEN {
            if !sections.iter().any(|section| (section.kind, section.instance) == (kind, instance)) {
                sections.push(Section { kind, instance, version: 1, bytes: bytes.to_vec() });
            }
        }
    }
    let Ok((serial, power, virtio)) = decode_devices(sections, 1, 3) else { return };

    let line = || EventFd::new(EFD_NONBLOCK).unwrap();
    let mut port = SerialPort::new(line(), Box::new(std::io::sink()));
    if port.restore(serial).is_ok() {
        port.input(b"x");
        let mut other = SerialPort::new(line(), Box::new(std::io::sink()));
        other.restore(port.save()).expect("what was saved can be taken over");
    }
    let mut registers = PowerDevice::new(std::sync::Arc::new(|_| {}), line());
    if registers.restore(power).is_ok() {
        registers.restore(registers.save()).expect("what was saved can be taken over");
    }
    let memory = guest_memory();
    memory.write_slice(&rest[..rest.len().min(0x6000)], GuestAddress(0x1000)).unwrap();
    for (state, kind) in virtio.iter().zip([Kind::Rng, Kind::Net, Kind::Balloon]) {
        let mut device = Device::new(kind, &memory);
        if device.transport.restore(state).is_ok() {
            Guest::new(device, memory.clone()).use_all();
        }
    }
}

/// Sections, each with a head of 5 bytes (kind, instance, version, length), and what follows after a kind of 255.
fn sections(mut data: &[u8]) -> (Vec<Section>, &[u8]) {
    let mut sections = Vec::new();
    while let Some(([kind, instance, version, low, high], rest)) = data.split_first_chunk() {
        if *kind == 255 {
            break;
        }
        let length = usize::from(u16::from_le_bytes([*low, *high])).min(rest.len());
        let (bytes, rest) = rest.split_at(length);
        let [kind, instance, version] = [*kind, *instance, *version].map(u16::from);
        sections.push(Section { kind, instance, version, bytes: bytes.to_vec() });
        data = rest;
    }
    (sections, data)
}
