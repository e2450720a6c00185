//! Free pages go back to the host: all that are reported, no others, and none that is not the guest's.

use proptest::prelude::*;
use virtio_bindings::virtio_mmio::*;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion, MmapRegion};

use super::driver::*;
use crate::devices::io_thread::Turn;
use crate::devices::virtio::MmioTransportState;
use crate::devices::virtio::balloon::{Balloon, BalloonState};
use crate::devices::virtio::device::{SavedDevice, VirtioDevice, Work};
use crate::devices::virtio::mmio::{RING_EVENT_IDX, VERSION_1};
use crate::host::touched::Touched;
use crate::memory::GuestMemoryMmap;

const INFLATE: usize = 0;
const DEFLATE: usize = 1;
/// Where Linux has it, and where the specification does.
const REPORTS: [usize; 2] = [2, 4];
const REPORTING: u64 = 1 << 5;

const PAGE: u64 = 4096;
/// Two regions, and a hole between them.
const LOW_END: u64 = 1 << 20;
const HIGH: u64 = 2 << 20;
const HIGH_END: u64 = HIGH + (7 << 20);
const CONTENT: u8 = 0xa5;

/// A driver whose memory is private and anonymous, as a VM's is: the guest sees it through the same mapping. Everything but the rings
/// has content.
type Guest = Driver<Balloon, GuestMemoryMmap>;

fn guest() -> Guest {
    let ranges = [(GuestAddress(0), LOW_END as usize), (GuestAddress(HIGH), (HIGH_END - HIGH) as usize)];
    let memory = GuestMemoryMmap::from_ranges(&ranges).unwrap();
    let guest = Driver::with_memory(Balloon::new(), memory.clone().into(), memory);
    for (start, end) in [(BUFFERS, LOW_END), (HIGH, HIGH_END)] {
        guest.put(start, &vec![CONTENT; (end - start) as usize]);
    }
    guest
}

fn started() -> Guest {
    let mut guest = guest();
    guest.start(REPORTING);
    guest.clear_bitmap();
    guest
}

/// Pages by number: of those above the rings, which are zero, which are untouched, and which are marked as the VMM's own writes.
#[derive(Default, PartialEq)]
struct Pages {
    zero: Vec<u64>,
    untouched: Vec<u64>,
    marked: Vec<u64>,
}

impl Pages {
    fn given_back(pages: impl IntoIterator<Item = u64>) -> Self {
        let zero: Vec<u64> = pages.into_iter().collect();
        Self { untouched: zero.clone(), marked: zero.clone(), zero }
    }
}

/// As runs: there may be thousands.
impl std::fmt::Debug for Pages {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let runs = |pages: &[u64]| -> Vec<_> {
            pages.chunk_by(|a, b| a + 1 == *b).map(|run| run[0]..run[0] + run.len() as u64).collect()
        };
        let Self { zero, untouched, marked } = self;
        let [zero, untouched, marked] = [zero, untouched, marked].map(|pages| runs(pages));
        write!(f, "zero {zero:?}, untouched {untouched:?}, marked {marked:?}")
    }
}

impl Guest {
    fn clear_bitmap(&self) {
        self.memory.iter().for_each(|region| MmapRegion::bitmap(region).reset());
    }

    /// Touches them.
    fn pages(&self) -> Pages {
        let mut pages = Pages::default();
        for region in self.memory.iter() {
            let first = region.start_addr().0 / PAGE;
            let mut number = first;
            let note = |touched: bool| {
                pages.untouched.extend((!touched && number >= BUFFERS / PAGE).then_some(number));
                number += 1;
            };
            Touched::open().look(region.as_ptr(), region.len() / PAGE, note).unwrap();
            for number in (first..number).filter(|number| *number >= BUFFERS / PAGE) {
                let marked = MmapRegion::bitmap(region).is_addr_set(((number - first) * PAGE) as usize);
                pages.marked.extend(marked.then_some(number));
            }
        }
        for number in (BUFFERS / PAGE..LOW_END / PAGE).chain(HIGH / PAGE..HIGH_END / PAGE) {
            let content = self.get(number * PAGE, PAGE as usize);
            if content.iter().all(|byte| *byte == 0) {
                pages.zero.push(number);
            } else {
                assert!(content.iter().all(|byte| *byte == CONTENT), "page {number} is neither");
            }
        }
        pages
    }

    /// These went back to the host and are known to have changed; no others.
    fn gave_back(&self, wanted: impl IntoIterator<Item = u64>) {
        assert_eq!(self.pages(), Pages::given_back(wanted));
    }
}

#[test]
fn reported_ranges_go_back_to_the_host_whichever_queue_they_come_by() {
    for queue in REPORTS {
        let mut guest = started();
        let head = guest.add(queue, &[(HIGH, 3 << 20, true), (0x5_0000, 0x2000, true), (HIGH_END - PAGE, 4096, true)]);
        guest.work_off(Work::Queue(queue));
        assert_eq!(guest.used(queue), [(head.into(), 0)]);
        assert_eq!(guest.take_interrupt(), 1);
        let high = HIGH / PAGE..HIGH / PAGE + 768;
        guest.gave_back([0x50, 0x51].into_iter().chain(high).chain([HIGH_END / PAGE - 1]));
        // What the guest writes there is kept as anything else.
        guest.put(HIGH, &[1; 4096]);
        guest.work_off(Work::All);
        assert_eq!(guest.get(HIGH, 4096), [1; 4096]);
    }
}

#[test]
fn a_large_report_takes_several_turns_and_is_complete_at_its_end_only() {
    let mut guest = started();
    // 6 MiB, beginning within a page.
    guest.add(2, &[(HIGH + 100, 6 << 20, true), (0x5_0000, 0x1000, true)]);
    for _ in 0..3 {
        assert_eq!(guest.get(HIGH + (6 << 20) - PAGE, 1), [CONTENT]);
        assert_eq!(guest.used(2).len(), 0, "not yet");
        assert_eq!(guest.work(Work::Continue), Turn::More);
    }
    guest.work_off(Work::Continue);
    assert_eq!(guest.used(2).len(), 1);
    // Not a page was left out where one turn ended and the next began.
    guest.gave_back([0x50].into_iter().chain(HIGH / PAGE + 1..HIGH / PAGE + 1536));
    // The next report is not taken for the rest of this one.
    guest.add(2, &[(0x6_0000, 0x1000, true)]);
    guest.work_off(Work::Queue(2));
    assert!(guest.pages().zero.contains(&0x60));
}

#[test]
fn only_whole_pages_of_guest_memory_go_back() {
    let end = u64::from(u32::MAX);
    // What is reported, and which pages go back.
    let reports: [(&str, u64, u32, Vec<u64>); 10] = [
        ("less than a page", 0x5_0000, 0xfff, vec![]),
        ("a page, but not one", 0x5_0001, 0x1000, vec![]),
        ("a page with something around it", 0x5_0fff, 0x1002, vec![0x51]),
        ("nothing", 0x5_0000, 0, vec![]),
        ("the hole", LOW_END, (HIGH - LOW_END) as u32, vec![]),
        ("across the hole", LOW_END - PAGE, (HIGH - LOW_END + 2 * PAGE) as u32, vec![255, 512]),
        ("past the end", HIGH_END - PAGE, u32::MAX, vec![HIGH_END / PAGE - 1]),
        ("behind the end", HIGH_END, u32::MAX, vec![]),
        ("at the end of all addresses", u64::MAX - 5000, u32::MAX, vec![]),
        ("4 GiB of nothing", end, u32::MAX, vec![]),
    ];
    for (name, address, len, wanted) in reports {
        let mut guest = started();
        guest.add(4, &[(address, len, true)]);
        let mut turn = guest.work(Work::Queue(4));
        for _ in 0..4096 {
            turn = if turn == Turn::More { guest.work(Work::Continue) } else { turn };
        }
        assert_eq!((turn, guest.used(4).len()), (Turn::Idle, 1), "{name}");
        assert_eq!(guest.pages(), Pages::given_back(wanted), "{name}");
        assert!(!guest.needs_reset());
    }
}

#[test]
fn reports_may_overlap_and_what_is_not_a_report_is_none() {
    let mut guest = started();
    guest.add(2, &[(0x5_0000, 0x2000, true), (0x5_1000, 0x2000, true), (0x5_0000, 0x1000, true)]);
    // Device-readable: statistics, for example.
    guest.add(2, &[(0x6_0000, 0x1000, false), (0x6_1000, 0x1000, true)]);
    guest.work_off(Work::Queue(2));
    assert_eq!(guest.used(2).len(), 2);
    guest.gave_back([0x50, 0x51, 0x52, 0x61]);

    // A driver that has not asked for reporting.
    let mut guest = self::guest();
    guest.start(0);
    guest.clear_bitmap();
    guest.add(2, &[(0x5_0000, 0x1000, true)]);
    guest.work_off(Work::Queue(2));
    assert_eq!(guest.used(2).len(), 1);
    guest.gave_back([]);
}

#[test]
fn a_chain_longer_than_its_queue_ends_there() {
    const INDIRECT: u16 = 4;
    let mut guest = started();
    let table = 0x4_0000;
    for n in 0..100 {
        guest.raw_descriptor(table + 16 * n, HIGH + 2 * PAGE * n, 4096, if n < 99 { 3 } else { 2 }, n as u16 + 1);
    }
    guest.descriptor(2, 0, table, 1600, INDIRECT, 0);
    guest.make_available(2, 0);
    guest.clear_bitmap();
    guest.work_off(Work::Queue(2));
    assert_eq!(guest.used(2), [(0, 0)]);
    for n in 0..100 {
        let wanted = if n < 64 { 0 } else { CONTENT };
        assert_eq!(guest.get(HIGH + 2 * PAGE * n, 1), [wanted], "range {n}");
    }
}

#[test]
fn a_balloon_that_is_inflated_all_the_same_stays_empty() {
    let mut guest = started();
    let mut size = [0xff; 4];
    crate::devices::bus::BusDevice::read(&mut guest.transport, VIRTIO_MMIO_CONFIG.into(), &mut size);
    assert_eq!(size, [0; 4], "the size that it should have");
    for queue in [INFLATE, DEFLATE] {
        // Page numbers, as the driver gives them.
        for _ in 0..10 {
            guest.add(queue, &[(HIGH, 1024, false)]);
        }
        guest.add(queue, &[(HIGH, 0x1000, true)]);
        guest.work_off(Work::Queue(queue));
        assert_eq!(guest.used(queue).len(), 11);
        assert_eq!(guest.take_interrupt(), 1);
    }
    guest.gave_back([]);
}

#[test]
fn a_report_that_is_half_done_goes_on_elsewhere() {
    let mut guest = started();
    guest.add(2, &[(HIGH, 5 << 20, true)]);
    assert_eq!(guest.work(Work::Queue(2)), Turn::More);
    let state = guest.transport.save();
    let encoded = postcard::to_stdvec(&state).unwrap();
    let state: MmioTransportState = postcard::from_bytes(&encoded).unwrap();
    // The same memory, in which all of it has content again: how far it was done is not counted on.
    guest.put(HIGH, &vec![CONTENT; 5 << 20]);
    guest.clear_bitmap();
    let mut other = Guest::with_memory(Balloon::new(), guest.memory.clone(), guest.guest.clone());
    other.rings = guest.rings.clone();
    other.transport.restore(&state).unwrap();
    assert_eq!(other.transport.save(), state);
    other.work_off(Work::All);
    assert_eq!(other.used(2).len(), 1);
    other.gave_back(HIGH / PAGE..HIGH / PAGE + 1280);
}

#[test]
fn a_reset_amid_a_report_forgets_it() {
    let mut guest = started();
    guest.add(2, &[(HIGH, 5 << 20, true)]);
    assert_eq!(guest.work(Work::Queue(2)), Turn::More);
    guest.put(HIGH, &vec![CONTENT; 5 << 20]);
    let avail = guest.rings[2].avail;
    guest.put(avail, &[0; 4]);
    guest.rings[2].next_avail = 0;
    guest.start(REPORTING | RING_EVENT_IDX);
    guest.clear_bitmap();
    guest.add(2, &[(HIGH, 0x2000, true)]);
    guest.work_off(Work::Queue(2));
    guest.gave_back([HIGH / PAGE, HIGH / PAGE + 1]);
}

#[test]
fn it_has_no_state_and_wants_none() {
    assert_eq!(Balloon::new().save(), SavedDevice::encode(1, &BalloonState {}));
    assert!(Balloon::new().restore(&SavedDevice { version: 1, data: vec![0] }).is_err());
    assert!(Balloon::new().restore(&SavedDevice { version: 2, data: vec![] }).is_err());
}

#[test]
fn it_offers_reporting_and_nothing_else_of_its_own() {
    let mut guest = guest();
    assert_eq!(guest.read(VIRTIO_MMIO_DEVICE_ID), 5);
    guest.write(VIRTIO_MMIO_DEVICE_FEATURES_SEL, 0);
    let own = u64::from(guest.read(VIRTIO_MMIO_DEVICE_FEATURES)) & 0xff_ffff;
    assert_eq!(own, REPORTING);
    for bit in [0, 1, 2, 3, 4] {
        guest.acknowledge(VERSION_1 | 1 << bit);
        assert_eq!(guest.read(VIRTIO_MMIO_STATUS), 3, "feature {bit} is refused");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, ..ProptestConfig::default() })]

    /// Against a model: a page has gone back if all of it lay in one range, and only then.
    #[test]
    fn what_goes_back_is_what_was_reported(
        reports in proptest::collection::vec(
            (
                prop_oneof![Just(2_usize), Just(3), Just(4)],
                proptest::collection::vec(
                    (
                        prop_oneof![
                            3 => (BUFFERS..HIGH_END).prop_map(|address| address & !0xfff),
                            2 => BUFFERS..HIGH_END + 0x4000,
                            1 => (0_u64..0x4000).prop_map(|offset| LOW_END - 0x2000 + offset),
                        ],
                        prop_oneof![4 => 0_u32..0x8000, 1 => 0_u32..1 << 20],
                        prop_oneof![9 => Just(true), 1 => Just(false)],
                    ),
                    1..12,
                ),
            ),
            1..6,
        ),
    ) {
        let mut guest = started();
        let mut wanted = std::collections::BTreeSet::new();
        for (queue, ranges) in &reports {
            guest.add(*queue, ranges);
            for (address, len, _) in ranges.iter().filter(|range| range.2) {
                let pages = address.div_ceil(PAGE)..(address + u64::from(*len)) / PAGE;
                wanted.extend(pages.filter(|n| (0..LOW_END).contains(&(n * PAGE)) || (HIGH..HIGH_END).contains(&(n * PAGE))));
            }
        }
        guest.work_off(Work::All);
        prop_assert_eq!((2..5).map(|queue| guest.used(queue).len()).sum::<usize>(), reports.len());
        prop_assert_eq!(guest.pages(), Pages::given_back(wanted));
    }
}
