//! The VMM's half of the dirty log against an oracle: after any traffic, each page whose bytes have changed is marked.

use std::os::fd::OwnedFd;

use proptest::prelude::*;
use virtio_bindings::virtio_net::VIRTIO_NET_F_MRG_RXBUF;
use vm_memory::bitmap::Bitmap;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion, MmapRegion};

use super::driver::*;
use super::net::{CONTROL, RX, TX};
use crate::devices::virtio::device::{VirtioDevice, Work};
use crate::devices::virtio::mmio::RING_EVENT_IDX;
use crate::devices::virtio::net::Net;
use crate::devices::virtio::rng::Rng;

const PAGE: usize = 4096;

/// Runs `work` and returns (pages changed but not marked, pages changed, pages marked).
fn around<D: VirtioDevice + 'static>(driver: &Driver<D>, work: impl FnOnce(&Driver<D>)) -> (Vec<usize>, usize, usize) {
    for region in driver.memory.iter() {
        // The region's own `bitmap` is a slice, which cannot be cleared.
        MmapRegion::bitmap(region).reset();
    }
    let before = driver.get(0, MEMORY_BYTES);
    work(driver);
    let after = driver.get(0, MEMORY_BYTES);
    let marked = |page: usize| {
        let region = driver.memory.iter().nth(page * PAGE / BORDER).unwrap();
        region.bitmap().dirty_at(page * PAGE % BORDER)
    };
    let pages = 0..MEMORY_BYTES / PAGE;
    let changed: Vec<_> = pages.clone().filter(|n| before[n * PAGE..][..PAGE] != after[n * PAGE..][..PAGE]).collect();
    let missed = changed.iter().copied().filter(|page| !marked(*page)).collect();
    (missed, changed.len(), pages.filter(|page| marked(*page)).count())
}

fn busy(features: u64) -> (Driver<Net>, OwnedFd) {
    let (mut driver, wire) = net(features);
    // Nothing in memory is what a device would write.
    for address in (BUFFERS..MEMORY_BYTES as u64).step_by(0x1000) {
        driver.put(address, &[0xa5; 0x1000]);
    }
    driver.add(CONTROL, &[(BUFFERS, 2, false), (BUFFERS + 0x1fff, 1, true)]);
    (driver, wire)
}

#[test]
fn pages_that_a_device_changes_are_marked_and_others_are_not() {
    let (mut driver, wire) = busy(1 << VIRTIO_NET_F_MRG_RXBUF);
    for n in 0..40 {
        // Across pages, and one across the regions' border.
        driver.add(
            RX,
            &[
                (BUFFERS + 0x8000 + n * 0x1000 + 0xf00, 12 + 4 * n as u32, true),
                (BORDER as u64 + n * 8192 - 50, 3000, true),
            ],
        );
    }
    let bytes = [60, 1500, 9000, 65_000];
    for bytes in bytes {
        super::net::send_to_guest(&wire, &frame(bytes, 1));
    }
    let (missed, changed, marked) = around(&driver, |driver| driver.work_off(Work::All));
    assert!(missed.is_empty(), "changed, not marked: {missed:?}");
    assert_eq!(driver.used(CONTROL).len(), 1);
    let chains = driver.used(RX).len();
    assert!((25..40).contains(&chains), "{chains} chains");
    assert!(changed > 50, "{changed} pages changed");
    // Bits that the kernel or we wrote as they were before, and the spare room of chains offered for a dropped frame.
    assert!(marked < changed + 10, "{marked} pages marked for {changed} changed");
}

#[test]
fn an_idle_device_marks_nothing() {
    let (mut driver, _wire) = busy(RING_EVENT_IDX);
    driver.work_off(Work::All);
    driver.used(CONTROL);
    driver.add(RX, &[(BUFFERS, 2000, true)]);
    let (missed, changed, marked) = around(&driver, |driver| driver.work_off(Work::Queue(RX)));
    assert_eq!((missed.len(), changed, marked), (0, 0, 0));
}

#[test]
fn pages_filled_with_random_numbers_are_marked() {
    let mut driver = Driver::new(Rng::new());
    driver.start_with_all();
    driver.add(0, &[(BUFFERS + 0xff0, 0x20, true), (BORDER as u64 - 0x1800, 0x3000, true)]);
    let (missed, changed, marked) = around(&driver, |driver| driver.work_off(Work::All));
    assert!(missed.is_empty(), "changed, not marked: {missed:?}");
    assert_eq!(changed, marked);
    assert!(changed >= 7, "{changed}");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, ..ProptestConfig::default() })]

    #[test]
    fn no_changed_page_is_missed(
        features in prop_oneof![Just(0), Just(RING_EVENT_IDX), Just(1 << VIRTIO_NET_F_MRG_RXBUF), Just(RING_EVENT_IDX | 1 << VIRTIO_NET_F_MRG_RXBUF)],
        rounds in proptest::collection::vec(
            (
                proptest::collection::vec((BUFFERS..MEMORY_BYTES as u64 - 0x8000, 0_u32..0x4000), 0..30),
                proptest::collection::vec(14_usize..20_000, 0..6),
            ),
            1..8,
        ),
    ) {
        let (mut driver, wire) = busy(features);
        for (buffers, frames) in rounds {
            for (address, len) in buffers {
                driver.add(RX, &[(address, len, true)]);
                driver.add(TX, &[(address, len, false)]);
            }
            for (bytes, seed) in frames.into_iter().zip(0..) {
                let _ = rustix::io::write(&wire, &frame(bytes, seed));
            }
            let (missed, _, _) = around(&driver, |driver| driver.work_off(Work::All));
            prop_assert_eq!(missed, Vec::<usize>::new());
            received(&wire);
            // Rings are smaller than all rounds together may need.
            if driver.needs_reset() {
                break;
            }
        }
    }
}
