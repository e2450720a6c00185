//! The registers and the state machine of the device status.

use virtio_bindings::virtio_mmio::*;

use super::driver::*;
use crate::devices::bus::BusDevice;
use crate::devices::virtio::cell::lock;
use crate::devices::virtio::device::Work;
use crate::devices::virtio::mmio::{RING_EVENT_IDX, VERSION_1};
use crate::devices::virtio::rng::Rng;

#[test]
fn a_driver_finds_the_device() {
    let mut driver = Driver::new(Rng::new());
    assert_eq!(driver.read(VIRTIO_MMIO_MAGIC_VALUE).to_le_bytes(), *b"virt");
    assert_eq!(driver.read(VIRTIO_MMIO_VERSION), 2);
    assert_eq!(driver.read(VIRTIO_MMIO_DEVICE_ID), 4);
    assert_eq!(driver.read(VIRTIO_MMIO_QUEUE_NUM_MAX), 64);
    driver.write(VIRTIO_MMIO_QUEUE_SEL, 1);
    assert_eq!(driver.read(VIRTIO_MMIO_QUEUE_NUM_MAX), 0, "no such queue");
    for (select, features) in [(0, 3 << 28), (1, 1), (2, 0), (u32::MAX, 0)] {
        driver.write(VIRTIO_MMIO_DEVICE_FEATURES_SEL, select);
        assert_eq!(driver.read(VIRTIO_MMIO_DEVICE_FEATURES), features);
    }
    driver.write(VIRTIO_MMIO_SHM_SEL, 0);
    assert_eq!(driver.read(VIRTIO_MMIO_SHM_LEN_LOW), u32::MAX);
    assert_eq!(driver.read(VIRTIO_MMIO_SHM_LEN_HIGH), u32::MAX);
}

#[test]
fn features_are_refused_that_were_not_offered_or_without_version_1() {
    let mut driver = Driver::new(Rng::new());
    for features in [0, RING_EVENT_IDX, VERSION_1 | 1, VERSION_1 | 1 << 33, VERSION_1 | 1 << 63] {
        driver.acknowledge(features);
        assert_eq!(driver.read(VIRTIO_MMIO_STATUS), 3, "{features:#x}");
        driver.write(VIRTIO_MMIO_STATUS, 0xf);
        assert_eq!(driver.read(VIRTIO_MMIO_STATUS), 3, "{features:#x}");
        assert_eq!(lock(&driver.device).negotiated(), None);
    }
    driver.acknowledge(VERSION_1);
    assert_eq!(driver.read(VIRTIO_MMIO_STATUS), 0xb);
    driver.write(VIRTIO_MMIO_DRIVER_FEATURES_SEL, 0);
    driver.write(VIRTIO_MMIO_DRIVER_FEATURES, RING_EVENT_IDX as u32);
    driver.set_up_queues();
    driver.write(VIRTIO_MMIO_STATUS, 0xf);
    assert_eq!(lock(&driver.device).negotiated(), Some(VERSION_1), "features are fixed once they are accepted");
}

#[test]
fn the_status_moves_forward_step_by_step_or_to_zero() {
    let mut driver = Driver::new(Rng::new());
    for (written, status) in [(2, 0), (8, 0), (4, 0), (1, 1), (4, 1), (9, 1), (3, 3), (1, 3), (2, 3), (0x83, 0x83)] {
        driver.write(VIRTIO_MMIO_STATUS, written);
        assert_eq!(driver.read(VIRTIO_MMIO_STATUS), status, "after {written:#x}");
    }
    driver.write(VIRTIO_MMIO_STATUS, 0);
    assert_eq!(driver.read(VIRTIO_MMIO_STATUS), 0);
    driver.write(VIRTIO_MMIO_STATUS, 0xffff_ffff);
    assert_eq!(driver.read(VIRTIO_MMIO_STATUS), 0x83, "no features yet");
}

#[test]
fn a_reset_forgets_everything() {
    let mut driver = Driver::new(Rng::new());
    driver.start_with_all();
    driver.add(0, &[(BUFFERS, 16, true)]);
    driver.work_off(Work::Queue(0));
    driver.write(VIRTIO_MMIO_STATUS, 0);
    assert_eq!(driver.read(VIRTIO_MMIO_STATUS), 0);
    assert_eq!(driver.read(VIRTIO_MMIO_INTERRUPT_STATUS), 0);
    assert_eq!(driver.read(VIRTIO_MMIO_QUEUE_READY), 0);
    assert_eq!(lock(&driver.device).negotiated(), None);
    driver.write(VIRTIO_MMIO_STATUS, 0xb);
    assert_eq!(driver.read(VIRTIO_MMIO_STATUS), 3, "the features are gone too");
    // Nothing happens to the rings of a device that was reset.
    driver.add(0, &[(BUFFERS, 16, true)]);
    driver.work_off(Work::All);
    assert_eq!(driver.used(0).len(), 1);
}

#[test]
fn queues_are_set_up_only_between_features_and_driver_ok() {
    let mut driver = Driver::new(Rng::new());
    driver.set_up_queues();
    assert_eq!(driver.read(VIRTIO_MMIO_QUEUE_READY), 0);
    driver.start(0);
    assert_eq!(driver.read(VIRTIO_MMIO_QUEUE_READY), 1);
    driver.rings[0].used = 0;
    driver.set_up_queues();
    let used = driver.transport.save().queues[0].used_ring;
    assert_ne!(used, 0, "the device is running");
    driver.write(VIRTIO_MMIO_QUEUE_READY, 0);
    assert_eq!(driver.read(VIRTIO_MMIO_QUEUE_READY), 0);
    driver.add(0, &[(BUFFERS, 16, true)]);
    driver.work_off(Work::All);
    assert_eq!(driver.get(used + 2, 2), [0, 0], "the queue was taken back");
}

#[test]
fn queues_that_cannot_be_are_found_out_at_driver_ok() {
    let good = Driver::new(Rng::new()).rings[0];
    let end = MEMORY_BYTES as u64;
    let mut bad = vec![];
    for size in [0, 3, 128, 0x8000] {
        bad.push(Ring { size, ..good });
    }
    for address in [0, 1, good.avail + 1, end - 2, end, u64::MAX, u64::MAX - 1] {
        bad.push(Ring { avail: address, ..good });
    }
    for address in [good.desc + 8, end - 64, end, !15] {
        bad.push(Ring { desc: address, ..good });
    }
    for address in [good.used + 2, end - 64, end, !3] {
        bad.push(Ring { used: address, ..good });
    }
    for ring in bad {
        let mut driver = Driver::new(Rng::new());
        driver.acknowledge(VERSION_1);
        driver.rings[0] = ring;
        driver.set_up_queues();
        driver.write(VIRTIO_MMIO_STATUS, 0xf);
        assert_eq!(driver.read(VIRTIO_MMIO_STATUS), 0x4f, "{ring:?}");
        assert_eq!(driver.take_interrupt(), 2, "a configuration change");
        driver.work_off(Work::All);
        driver.start_again(good);
        assert_eq!(driver.read(VIRTIO_MMIO_STATUS), 0xf, "a reset cures it");
    }
}

impl Driver<Rng> {
    fn start_again(&mut self, ring: Ring) {
        self.rings[0] = ring;
        self.start(0);
    }
}

#[test]
fn a_notification_without_ioeventfd_arrives_at_the_same_place() {
    let mut driver = Driver::new(Rng::new());
    driver.start(0);
    let queues: Vec<_> = driver.transport.notifications().map(|n| (n.offset, n.queue)).collect();
    assert_eq!(queues, [(0x50, 0)]);
    let read = |driver: &Driver<Rng>| driver.transport.notifications().next().unwrap().eventfd.read().unwrap_or(0);
    assert_eq!(read(&driver), 1, "starting is a notification");
    driver.write(VIRTIO_MMIO_QUEUE_NOTIFY, 0);
    assert_eq!(read(&driver), 1);
    driver.write(VIRTIO_MMIO_QUEUE_NOTIFY, 1);
    driver.write(VIRTIO_MMIO_QUEUE_NOTIFY, u32::MAX);
    assert_eq!(read(&driver), 0);
}

#[test]
fn registers_are_32_bits_wide() {
    let mut driver = Driver::new(Rng::new());
    for width in [1, 2, 8] {
        let mut data = vec![0xee; width];
        driver.transport.read(0, &mut data);
        assert_eq!(data, vec![0; width]);
        driver.transport.write(VIRTIO_MMIO_STATUS.into(), &vec![1; width]);
    }
    let mut data = [0xee; 4];
    driver.transport.read(2, &mut data);
    assert_eq!(data, [0; 4], "not aligned");
    assert_eq!(driver.read(VIRTIO_MMIO_STATUS), 0);
}
