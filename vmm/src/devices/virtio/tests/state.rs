//! Saving, taking over elsewhere, and states that nobody saved.

use proptest::prelude::*;
use virtio_bindings::virtio_mmio::*;
use virtio_bindings::virtio_net::VIRTIO_NET_F_MRG_RXBUF;

use super::driver::*;
use super::net::{CONTROL, RX, TX, send_to_guest};
use crate::devices::io_thread::{EventHandler, Wake};
use crate::devices::virtio::cell::{CellHandler, lock};
use crate::devices::virtio::device::{SavedDevice, Work};
use crate::devices::virtio::mmio::{RING_EVENT_IDX, VERSION_1};
use crate::devices::virtio::net::{MacAddress, Net, NetConfig, NetState};
use crate::devices::virtio::rng::{Rng, RngState};
use crate::devices::virtio::{MmioTransportState, RestoreError};
use std::os::fd::OwnedFd;

/// What the I/O thread does when it is resumed.
fn resume(driver: &Driver<Net>) {
    let cell = driver.device.clone();
    let mut handler = CellHandler { cell, queues: 3 };
    let mut turn = handler.handle(Wake::Resumed);
    while turn != crate::devices::io_thread::Turn::Idle {
        turn = handler.handle(Wake::Continue);
    }
}

/// The same guest on another host: the same memory and rings, another device, another wire. The state goes through its encoding.
fn moved(driver: &Driver<Net>) -> (Driver<Net>, OwnedFd) {
    let encoded = postcard::to_stdvec(&driver.transport.save()).unwrap();
    let state: MmioTransportState = postcard::from_bytes(&encoded).unwrap();
    let (wire, backend) = wire();
    let mut other = Driver::with_memory(Net::new(net_config(), backend), driver.memory.clone(), driver.guest.clone());
    other.rings = driver.rings.clone();
    other.transport.restore(&state).unwrap();
    assert_eq!(other.transport.save(), state);
    (other, wire)
}

#[test]
fn traffic_goes_on_where_it_stopped() {
    for features in [0, RING_EVENT_IDX | 1 << VIRTIO_NET_F_MRG_RXBUF] {
        let (mut driver, mut wire) = net(features);
        let mut expected = Vec::new();
        let mut sent = Vec::new();
        for round in 0..10_u8 {
            for n in 0..50 {
                let address = BUFFERS + u64::from(n) * 0x800;
                driver.put(address, &frame(500, round ^ n));
                driver.add(TX, &[(address, 512, false)]);
                expected.push(frame(500, round ^ n));
            }
            // Some are served, some are in flight when the machine moves.
            if round % 2 == 0 {
                driver.work_off(Work::Queue(TX));
            }
            let buffer = BUFFERS + 0x4_0000;
            driver.add(RX, &[(buffer, 2000, true)]);
            send_to_guest(&wire, &frame(100, round));
            driver.work_off(Work::Queue(RX));
            driver.work_off(Work::Source { index: 0, readable: true, writable: true });
            assert_eq!(driver.used(RX), [(u32::from(round), 112)]);
            assert_eq!(driver.get(buffer + 12, 100), frame(100, round)[12..]);
            sent.extend(received(&wire));
            (driver, wire) = moved(&driver);
            resume(&driver);
            sent.extend(received(&wire));
            assert_eq!(driver.used(TX).len(), 50);
        }
        assert!(sent == expected, "{} frames of {}", sent.len(), expected.len());
    }
}

#[test]
fn an_interrupt_that_was_lost_on_the_way_is_raised_again() {
    let (mut driver, _wire) = net(0);
    driver.add(TX, &[(BUFFERS, 100, false)]);
    driver.work_off(Work::Queue(TX));
    let (mut other, _wire) = moved(&driver);
    assert_eq!(other.irq_edges(), 0, "not before the interrupt controller is in place");
    assert_eq!(other.read(VIRTIO_MMIO_INTERRUPT_STATUS), 1);
    resume(&other);
    assert_eq!(other.irq_edges(), 1);
    other.take_interrupt();
    resume(&other);
    assert_eq!(other.irq_edges(), 0, "once is enough");
}

#[test]
fn an_announcement_under_way_and_learned_addresses_move_along() {
    let (mut driver, _wire) = full_net();
    let mut arp = vec![0; 12];
    arp.extend([0xff; 6]);
    arp.extend(MAC.0);
    arp.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
    arp.extend(MAC.0);
    arp.extend([10, 0, 0, 7]);
    arp.extend([0; 10]);
    driver.put(BUFFERS, &arp);
    driver.add(TX, &[(BUFFERS, arp.len() as u32, false)]);
    driver.work_off(Work::Queue(TX));
    assert!(lock(&driver.device).guest_announce());
    let (mut other, _wire) = moved(&driver);
    assert_eq!(other.read(VIRTIO_MMIO_CONFIG + 4) >> 16, 3);
    assert_eq!(lock(&other.device).addresses().ipv4, ["10.0.0.7".parse::<std::net::Ipv4Addr>().unwrap()]);
    assert_eq!(other.read(VIRTIO_MMIO_CONFIG_GENERATION), driver.read(VIRTIO_MMIO_CONFIG_GENERATION));
    resume(&other);
    assert_eq!(other.take_interrupt(), 3);
    assert!(lock(&other.device).guest_announce());
}

#[test]
fn offloads_are_set_on_the_new_host_and_stale_frames_are_not_delivered() {
    let (driver, _wire) = full_net();
    let (wire, backend) = wire();
    let offloads = backend.offloads.clone();
    let mut other = Driver::with_memory(Net::new(net_config(), backend), driver.memory.clone(), driver.guest.clone());
    send_to_guest(&wire, &frame(100, 1));
    other.transport.restore(&driver.transport.save()).unwrap();
    assert_eq!(offloads.load(std::sync::atomic::Ordering::SeqCst), 7);
    other.rings = driver.rings.clone();
    other.add(RX, &[(BUFFERS, 2000, true)]);
    resume(&other);
    assert_eq!(other.used(RX), []);
}

#[test]
fn every_stage_of_the_initialization_can_be_moved() {
    let (_wire, backend) = wire();
    let mut driver = Driver::new(Net::new(net_config(), backend));
    let check = |driver: &Driver<Net>| drop(moved(driver));
    check(&driver);
    driver.acknowledge(VERSION_1 | 1 << 60);
    check(&driver); // Features refused.
    driver.acknowledge(VERSION_1);
    check(&driver);
    driver.rings[TX].used = MEMORY_BYTES as u64;
    driver.set_up_queues();
    check(&driver); // A queue that cannot be.
    driver.write(VIRTIO_MMIO_STATUS, 0xf);
    assert!(driver.needs_reset());
    let (mut other, _wire) = moved(&driver);
    assert!(other.needs_reset());
    resume(&other);
    assert_eq!(other.irq_edges(), 1);
}

type Change = (&'static str, fn(&mut MmioTransportState));

#[test]
fn states_that_nobody_saved_are_refused() {
    let (driver, _wire) = full_net();
    let good = driver.transport.save();
    let restore = |state: &MmioTransportState| {
        let (_wire, backend) = wire();
        let mut other =
            Driver::with_memory(Net::new(net_config(), backend), driver.memory.clone(), driver.guest.clone());
        other.transport.restore(state)
    };
    restore(&good).unwrap();

    let hostile: &[Change] = &[
        ("another device", |state| state.device_type = 4),
        ("DRIVER_OK alone", |state| state.status = 4),
        ("no FEATURES_OK", |state| state.status = 7),
        ("unknown status bits", |state| state.status = 0x1f),
        ("DEVICE_NEEDS_RESET in the status", |state| state.status = 0x4f),
        ("a status of all ones", |state| state.status = u32::MAX),
        ("features that are not offered", |state| state.driver_features |= 1 << 40),
        ("features without VERSION_1", |state| state.driver_features &= !VERSION_1),
        ("another event index than negotiated", |state| state.driver_features &= !RING_EVENT_IDX),
        ("interrupt bits that do not exist", |state| state.interrupt_status = 4),
        ("no queues", |state| state.queues.clear()),
        ("a queue too few", |state| state.queues.truncate(2)),
        ("a queue too many", |state| state.queues.push(state.queues[0])),
        ("a queue size of 0", |state| state.queues[RX].size = 0),
        ("a queue size of 3", |state| state.queues[RX].size = 3),
        ("a queue size too large", |state| state.queues[CONTROL].size = 32),
        ("a descriptor table that is not aligned", |state| state.queues[TX].desc_table += 1),
        ("a descriptor table outside memory", |state| state.queues[TX].desc_table = 1 << 40),
        ("a descriptor table past the end", |state| state.queues[TX].desc_table = MEMORY_BYTES as u64 - 16),
        ("an available ring that is not aligned", |state| state.queues[TX].avail_ring += 1),
        ("an available ring outside memory", |state| state.queues[TX].avail_ring = u64::MAX - 1),
        ("an available ring at 0", |state| state.queues[TX].avail_ring = 0),
        ("a used ring that is not aligned", |state| state.queues[TX].used_ring += 2),
        ("a used ring outside memory", |state| state.queues[TX].used_ring = u64::MAX - 3),
        ("an event index that is off", |state| state.queues[TX].event_idx = false),
        ("an unknown version of the device's state", |state| state.device.version = 2),
        ("version 0 of the device's state", |state| state.device.version = 0),
        ("no device state", |state| state.device.data.clear()),
        ("a device state that goes on", |state| state.device.data.push(0)),
        ("a device state that ends early", |state| state.device.data.truncate(8)),
    ];
    for (name, change) in hostile {
        let mut state = good.clone();
        change(&mut state);
        assert!(restore(&state).is_err(), "{name}");
    }

    // What a driver can write at any time is harmless, and is taken over.
    let harmless: &[Change] = &[
        ("selectors", |state| {
            state.queue_sel = u32::MAX;
            state.device_features_sel = u32::MAX;
            state.driver_features_sel = u32::MAX;
        }),
        ("FAILED", |state| state.status |= 0x80),
        ("interrupts", |state| state.interrupt_status = 3),
        ("a generation", |state| state.config_generation = u32::MAX),
        ("a place in the used ring", |state| state.queues[TX].next_used = u16::MAX),
        ("a queue that was taken back", |state| state.queues[TX] = Default::default()),
        ("rings that do not matter any more", |state| {
            state.needs_reset = true;
            state.queues[TX].avail_ring = u64::MAX;
        }),
    ];
    for (name, change) in harmless {
        let mut state = good.clone();
        change(&mut state);
        restore(&state).unwrap_or_else(|error| panic!("{name}: {error}"));
    }

    // What a driver can write into its rings at any time ends as it would have ended before.
    let mut broken = good.clone();
    broken.queues[TX].next_avail = 1;
    let (_wire, backend) = wire();
    let mut other = Driver::with_memory(Net::new(net_config(), backend), driver.memory.clone(), driver.guest.clone());
    other.transport.restore(&broken).unwrap();
    assert!(!other.needs_reset());
    resume(&other);
    assert!(other.needs_reset(), "more requests in flight than there is room for");

    let mut busy = Driver::with_memory(Rng::new(), driver.memory.clone(), driver.guest.clone());
    busy.acknowledge(VERSION_1);
    let state = busy.transport.save();
    assert!(matches!(busy.transport.restore(&state), Err(RestoreError::InUse)));
}

type NetChange = (&'static str, fn(&mut NetState));

#[test]
fn every_field_of_a_network_devices_own_state_is_checked() {
    let good = NetState {
        mac: MAC,
        announce: true,
        ipv4: vec!["10.0.0.1".parse().unwrap()],
        ipv6: vec!["fe80::1".parse().unwrap(), "fd00::1".parse().unwrap()],
    };
    let restore = |state: &NetState| {
        use crate::devices::virtio::device::VirtioDevice;
        let (_wire, backend) = wire();
        Net::new(NetConfig { mac: MAC, addresses: vec![] }, backend).restore(&SavedDevice::encode(1, state))
    };
    restore(&good).unwrap();
    let hostile: &[NetChange] = &[
        ("mac", |state| state.mac = MacAddress([2; 6])),
        ("ipv4", |state| state.ipv4 = (1..10).map(|last| [10, 0, 0, last].into()).collect()),
        ("ipv4", |state| state.ipv4 = vec![[0; 4].into()]),
        ("ipv4", |state| state.ipv4 = vec![[255; 4].into()]),
        ("ipv4", |state| state.ipv4 = vec![[10, 0, 0, 1].into(); 2]),
        ("ipv6", |state| state.ipv6 = (1..10).map(|last| [last; 16].into()).collect()),
        ("ipv6", |state| state.ipv6 = vec![[0; 16].into()]),
        ("ipv6", |state| state.ipv6 = vec![[0xff; 16].into()]),
        ("ipv6", |state| state.ipv6 = vec!["fd00::1".parse().unwrap(); 2]),
    ];
    for (field, change) in hostile {
        let mut state = good.clone();
        change(&mut state);
        let error = restore(&state).unwrap_err().to_string();
        assert!(error.starts_with(&format!("{field} is not valid")), "{error}");
    }
    // A length that claims more than there is does not allocate it.
    let mut saved = SavedDevice::encode(1, &good);
    saved.data[7..].fill(0xff);
    use crate::devices::virtio::device::VirtioDevice;
    let (_wire, backend) = wire();
    assert!(Net::new(net_config(), backend).restore(&saved).is_err());
}

#[test]
fn an_entropy_device_has_no_state_and_wants_none() {
    use crate::devices::virtio::device::VirtioDevice;
    assert_eq!(Rng::new().save(), SavedDevice::encode(1, &RngState {}));
    assert!(Rng::new().restore(&SavedDevice { version: 1, data: vec![0] }).is_err());
    assert!(Rng::new().restore(&SavedDevice { version: 2, data: vec![] }).is_err());
}

proptest! {
    #[test]
    fn no_bytes_harm(bytes in proptest::collection::vec(any::<u8>(), 0..300), at in 0_usize..300, by in any::<u8>()) {
        let (driver, _wire) = full_net();
        let mut good = postcard::to_stdvec(&driver.transport.save()).unwrap();
        let at = at % good.len();
        good[at] = by;
        for bytes in [bytes, good] {
            if let Ok(state) = postcard::from_bytes::<MmioTransportState>(&bytes) {
                let (_wire, backend) = wire();
                let mut other = Driver::with_memory(Net::new(net_config(), backend), driver.memory.clone(), driver.guest.clone());
                if other.transport.restore(&state).is_ok() {
                    resume(&other);
                    other.start(0);
                }
            }
        }
    }
}
