//! Guests that break the rules: the device answers something, comes to rest, and never panics.

use proptest::prelude::*;
use virtio_bindings::virtio_mmio::*;
use virtio_bindings::virtio_net::VIRTIO_NET_F_MRG_RXBUF;
use vm_memory::{Bytes, GuestAddress};

use super::driver::*;
use super::net::{CONTROL, RX, TX, send_to_guest};
use crate::devices::bus::BusDevice;
use crate::devices::io_thread::Turn;
use crate::devices::virtio::balloon::Balloon;
use crate::devices::virtio::cell::lock;
use crate::devices::virtio::device::Work;
use crate::devices::virtio::mmio::{RING_EVENT_IDX, VERSION_1};
use crate::devices::virtio::net::Net;
use crate::devices::virtio::rng::Rng;
use crate::memory::GuestMemoryMmap;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
const END: u64 = MEMORY_BYTES as u64;
const TABLE: u64 = BUFFERS + 0x1_0000;

/// Descriptors (index, address, length, flags, next) and, from `TABLE` on, an indirect table of the same.
#[derive(Default)]
struct Chain {
    name: &'static str,
    descriptors: Vec<(u16, u64, u32, u16, u16)>,
    table: Vec<(u64, u32, u16, u16)>,
}

/// Chains that no device can use, whose buffers have direction `flag`.
fn broken_chains(flag: u16) -> Vec<Chain> {
    let one = |name, address, len, flags| Chain { name, descriptors: vec![(0, address, len, flags, 0)], table: vec![] };
    let indirect = |name, table: Vec<_>| Chain {
        name,
        descriptors: vec![(0, TABLE, 16 * table.len() as u32, INDIRECT, 0)],
        table,
    };
    vec![
        one("nothing", BUFFERS, 0, flag),
        one("shorter than a header", BUFFERS, 11, flag),
        one("the other direction", BUFFERS, 100, flag ^ WRITE),
        one("past the end", END - 50, 100, flag),
        one("behind the end", END, 100, flag),
        one("at the end of all addresses", u64::MAX - 5, 100, flag),
        one("4 GiB", BUFFERS, u32::MAX, flag),
        one("a next that does not exist", BUFFERS, 100, flag | NEXT),
        Chain { name: "itself next", descriptors: vec![(0, BUFFERS, 100, flag | NEXT, 0)], ..Chain::default() },
        Chain {
            name: "a loop of two",
            descriptors: vec![(0, BUFFERS, 100, flag | NEXT, 1), (1, BUFFERS, 100, flag | NEXT, 0)],
            ..Chain::default()
        },
        Chain { name: "an index outside", descriptors: vec![(0, BUFFERS, 100, flag | NEXT, 256)], ..Chain::default() },
        Chain {
            name: "both directions",
            descriptors: vec![(0, BUFFERS, 100, flag | NEXT, 1), (1, BUFFERS, 100, flag ^ WRITE, 0)],
            ..Chain::default()
        },
        Chain {
            name: "more than 4 GiB together",
            descriptors: vec![(0, BUFFERS, 100, flag | NEXT, 1), (1, BUFFERS, u32::MAX, flag, 0)],
            ..Chain::default()
        },
        one("an empty table", TABLE, 0, INDIRECT),
        one("a table of one and a half", TABLE, 24, INDIRECT),
        one("a table behind the end", END, 16, INDIRECT),
        one("a huge table", TABLE, 16 * 65_536, INDIRECT),
        indirect("a table in a table", vec![(TABLE, 16, INDIRECT, 0)]),
        indirect("a loop in a table", vec![(BUFFERS, 1, flag | NEXT, 1), (BUFFERS, 1, flag | NEXT, 0)]),
        indirect("a table that ends too late", vec![(BUFFERS, 100, flag | NEXT, 1)]),
        indirect("too many pieces", (1..2000).map(|next| (BUFFERS, 100, flag | NEXT, next)).collect()),
        indirect("too many empty pieces", (1..2000).map(|next| (BUFFERS, 0, flag | NEXT, next)).collect()),
    ]
}

fn lay_out(driver: &mut Driver<Net>, queue: usize, chain: &Chain) {
    for index in 0..driver.rings[queue].size {
        driver.descriptor(queue, index, 0, 0, 0, 0);
    }
    if chain.name == "a next that does not exist" {
        driver.descriptor(queue, 0, BUFFERS, 100, chain.descriptors[0].3, u16::MAX);
    } else {
        for (index, address, len, flags, next) in &chain.descriptors {
            driver.descriptor(queue, *index, *address, *len, *flags, *next);
        }
    }
    for ((address, len, flags, next), at) in chain.table.iter().zip(0..) {
        driver.raw_descriptor(TABLE + 16 * at, *address, *len, *flags, *next);
    }
    driver.rings[queue].next_desc = 8;
    driver.make_available(queue, 0);
}

#[test]
fn a_broken_chain_to_send_is_given_back_and_the_next_frame_goes() {
    for chain in broken_chains(0) {
        let (mut driver, wire) = net(0);
        lay_out(&mut driver, TX, &chain);
        driver.work_off(Work::Queue(TX));
        assert_eq!(driver.used(TX), [(0, 0)], "{}", chain.name);
        assert_eq!(received(&wire).len(), 0, "{}", chain.name);
        assert_eq!(lock(&driver.device).statistics().tx_dropped, 1, "{}", chain.name);
        driver.add(TX, &[(BUFFERS, 100, false)]);
        driver.work_off(Work::Queue(TX));
        assert_eq!(received(&wire).len(), 1, "after {}", chain.name);
        assert!(!driver.needs_reset());
    }
}

#[test]
fn a_broken_chain_to_receive_into_is_given_back_and_the_frame_goes_elsewhere() {
    for chain in broken_chains(WRITE) {
        for features in [0, 1 << VIRTIO_NET_F_MRG_RXBUF] {
            let (mut driver, wire) = net(features);
            // With a short one before it, which mergeable buffers would begin with.
            lay_out(&mut driver, RX, &chain);
            let good = driver.add(RX, &[(BUFFERS, 200, true)]);
            send_to_guest(&wire, &frame(100, 1));
            driver.work_off(Work::All);
            assert_eq!(driver.used(RX), [(0, 0), (good.into(), 112)], "{}", chain.name);
            assert_eq!(driver.get(BUFFERS + 12, 100), frame(100, 1)[12..]);
            assert!(!driver.needs_reset());
        }
    }
}

#[test]
fn a_broken_chain_amid_mergeable_ones_costs_a_frame_at_most() {
    for chain in broken_chains(WRITE) {
        let (mut driver, wire) = net(1 << VIRTIO_NET_F_MRG_RXBUF);
        lay_out(&mut driver, RX, &chain);
        // Put a good chain before it.
        driver.descriptor(RX, 7, BUFFERS, 50, WRITE, 0);
        let avail = driver.rings[RX].avail;
        driver.put(avail + 2, &[2, 0, 7, 0, 0, 0]);
        driver.rings[RX].next_avail = 2;
        driver.add(RX, &[(BUFFERS, 200, true)]);
        driver.add(RX, &[(BUFFERS, 200, true)]);
        for seed in 1..3 {
            send_to_guest(&wire, &frame(100, seed));
        }
        driver.work_off(Work::All);
        let heads: Vec<_> = driver.used(RX).iter().map(|(head, _)| *head).collect();
        let statistics = lock(&driver.device).statistics();
        assert!(!driver.needs_reset(), "{}", chain.name);
        assert!(heads.is_empty(), "{}: nothing fits into the first chain alone", chain.name);
        assert_eq!((statistics.rx_packets, statistics.rx_dropped), (0, 2), "{}", chain.name);
        // What fits goes through, and then the broken one is given back.
        for seed in 1..3 {
            send_to_guest(&wire, &frame(30, seed));
        }
        driver.work_off(Work::All);
        let used = driver.used(RX);
        assert_eq!(used.iter().map(|(_, len)| *len).collect::<Vec<_>>(), [42, 0, 42], "{}", chain.name);
    }
}

#[test]
fn proper_indirect_tables_work() {
    let (mut driver, wire) = net(0);
    let chain = Chain {
        name: "good",
        descriptors: vec![(0, TABLE, 32, INDIRECT, 0)],
        table: vec![(BUFFERS, 12, NEXT, 1), (BUFFERS + 0x100, 100, 0, 0)],
    };
    let sent = frame(100, 5);
    driver.put(BUFFERS, &sent[..12]);
    driver.put(BUFFERS + 0x100, &sent[12..]);
    lay_out(&mut driver, TX, &chain);
    driver.work_off(Work::All);
    assert_eq!(received(&wire), [sent]);
}

#[test]
fn a_broken_ring_ends_in_needs_reset_and_a_reset_cures_it() {
    for queue in [RX, TX, CONTROL] {
        let size = if queue == CONTROL { 16 } else { 256 };
        let breakages: [(&str, u64, u16); 3] =
            [("too many available", 2, size + 1), ("an index that moves back", 2, u16::MAX), ("no such head", 4, size)];
        for (name, offset, value) in breakages {
            let (mut driver, wire) = net(0);
            send_to_guest(&wire, &frame(100, 1));
            let avail = driver.rings[queue].avail;
            driver.put(avail + 2, &1_u16.to_le_bytes());
            driver.put(avail + offset, &value.to_le_bytes());
            assert_eq!(driver.work(Work::All), Turn::Idle);
            assert!(driver.needs_reset(), "{name} in queue {queue}");
            assert_eq!(driver.take_interrupt() & 2, 2);
            assert_eq!(driver.work(Work::All), Turn::Idle);
            assert!(!lock(&driver.device).guest_announce());
            driver.put(avail, &[0; 16]);
            driver.start(0);
            assert!(!driver.needs_reset());
            driver.put(BUFFERS, &frame(100, 2));
            driver.put(driver.rings[TX].used, &[0; 16]);
            driver.add(TX, &[(BUFFERS, 112, false)]);
            driver.work_off(Work::Queue(TX));
            assert_eq!(received(&wire).len(), 1);
        }
    }
}

/// A register access; most are of real registers.
fn access() -> impl Strategy<Value = (u64, usize, u64, bool)> {
    let offset = prop_oneof![
        8 => (0_u64..0x40).prop_map(|word| word * 4),
        2 => 0_u64..0x140,
        1 => any::<u64>(),
    ];
    let value = prop_oneof![
        4 => 0_u64..16,
        2 => Just(1_u64 << 32 | 0x7fff_ffff),
        2 => (0_u64..MEMORY_BYTES as u64).prop_map(|address| address & !15),
        1 => any::<u64>(),
    ];
    (offset, prop_oneof![8 => Just(4_usize), 1 => 1_usize..=8], value, any::<bool>())
}

fn word() -> impl Strategy<Value = u64> {
    // A descriptor's second half, a plausible address, a small number, anything.
    let second = (0_u64..0x2000, 0_u64..8, 0_u64..260).prop_map(|(len, flags, next)| len | flags << 32 | next << 48);
    prop_oneof![4 => second, 4 => 0..MEMORY_BYTES as u64, 2 => 0_u64..0x400, 1 => any::<u64>()]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn no_sequence_of_register_accesses_harms(
        start in any::<bool>(),
        accesses in proptest::collection::vec(access(), 1..60),
    ) {
        let (wire, backend) = wire();
        let mut driver = Driver::new(Net::new(net_config(), backend));
        if start {
            driver.acknowledge(VERSION_1 | RING_EVENT_IDX);
            driver.set_up_queues();
        }
        for (offset, width, value, is_write) in accesses {
            if is_write {
                driver.transport.write(offset, &value.to_le_bytes()[..width]);
            } else {
                let mut data = vec![0; width];
                driver.transport.read(offset, &mut data);
            }
            let _ = rustix::io::write(&wire, &frame(100, 1));
            driver.work_off(Work::All);
        }
        // Whatever it did, the state can be saved and taken over elsewhere.
        let state = driver.transport.save();
        let (_wire, backend) = super::driver::wire();
        let mut other = Driver::with_memory(Net::new(net_config(), backend), driver.memory.clone(), driver.guest.clone());
        other.transport.restore(&state).unwrap();
        prop_assert_eq!(other.transport.save(), state);
        driver.start(0);
    }

    #[test]
    fn no_content_of_the_rings_harms(
        features in prop_oneof![Just(0), Just(RING_EVENT_IDX), Just(1 << VIRTIO_NET_F_MRG_RXBUF)],
        words in proptest::collection::vec((0_u64..0xc000 / 8, word()), 1..300),
        heads in proptest::collection::vec((0_usize..3, 0_u16..20), 1..40),
        index in proptest::option::of((0_usize..3, any::<u16>())),
    ) {
        let (mut driver, wire) = net(features);
        for (at, word) in words {
            driver.guest.write_obj(word, GuestAddress(0x1_0000 + at * 8)).unwrap();
        }
        for (queue, head) in heads {
            driver.make_available(queue, head);
        }
        if let Some((queue, index)) = index {
            driver.guest.write_obj(index, GuestAddress(driver.rings[queue].avail + 2)).unwrap();
        }
        for bytes in [20, 1500, 60_000] {
            let _ = rustix::io::write(&wire, &frame(bytes, 1));
        }
        // The rings do not change while the device works, so it comes to rest, whatever they hold.
        for work in [Work::Queue(TX), Work::Queue(RX), Work::Queue(CONTROL), Work::All] {
            driver.work_off(work);
        }
        driver.start(0);
    }

    #[test]
    fn no_content_of_the_entropy_ring_harms(
        words in proptest::collection::vec((0_u64..0x4000 / 8, word()), 1..200),
        heads in proptest::collection::vec(0_u16..20, 1..40),
    ) {
        let mut driver = Driver::new(Rng::new());
        driver.start_with_all();
        for (at, word) in words {
            driver.guest.write_obj(word, GuestAddress(0x1_0000 + at * 8)).unwrap();
        }
        for head in heads {
            driver.make_available(0, head);
        }
        driver.work_off(Work::All);
        driver.write(VIRTIO_MMIO_STATUS, 0);
    }

    #[test]
    fn no_content_of_the_balloons_rings_harms(
        words in proptest::collection::vec((0_u64..0x1_4000 / 8, word()), 1..300),
        heads in proptest::collection::vec((0_usize..5, 0_u16..20), 1..40),
        index in proptest::option::of((0_usize..5, any::<u16>())),
    ) {
        // Private memory, in which what is given back is lost at once: rings, too, while the device is at work in them.
        let ranges = [0, BORDER].map(|at| (GuestAddress(at as u64), BORDER));
        let memory = GuestMemoryMmap::from_ranges(&ranges).unwrap();
        let mut driver = Driver::with_memory(Balloon::new(), memory.clone().into(), memory);
        driver.start_with_all();
        for (at, word) in words {
            driver.guest.write_obj(word, GuestAddress(0x1_0000 + at * 8)).unwrap();
        }
        for (queue, head) in heads {
            driver.make_available(queue, head);
        }
        if let Some((queue, index)) = index {
            driver.guest.write_obj(index, GuestAddress(driver.rings[queue].avail + 2)).unwrap();
        }
        // Up to 4 GiB a chain, 2 MiB a turn. A guest that has its rings given back may have it go on for ever, turn by turn.
        let mut turn = driver.work(Work::All);
        for _ in 0..10_000 {
            turn = if turn == Turn::More { driver.work(Work::Continue) } else { turn };
        }
        let state = driver.transport.save();
        let mut other = Driver::with_memory(Balloon::new(), driver.memory.clone(), driver.guest.clone());
        other.transport.restore(&state).unwrap();
        prop_assert_eq!(other.transport.save(), state);
        driver.write(VIRTIO_MMIO_STATUS, 0);
    }
}
