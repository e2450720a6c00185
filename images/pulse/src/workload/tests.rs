//! The workload against simulated memory that loses writes.

use super::*;
use crate::load::Rate;
use crate::page::{Body, Fault, PAGE_WORDS};
use std::cell::RefCell;
use std::rc::Rc;

/// Memory that a test can reach behind the workload's back.
type Memory = Rc<RefCell<Vec<Box<Page>>>>;

/// The workload's sight of it: a page is lent to the workload, and back in memory by the next one at the latest.
struct View {
    memory: Memory,
    lent: Option<(u64, Box<Page>)>,
}

impl View {
    fn give_back(&mut self) {
        if let Some((number, page)) = self.lent.take() {
            self.memory.borrow_mut()[number as usize] = page;
        }
    }
}

impl Pages for View {
    fn count(&self) -> u64 {
        self.memory.borrow().len() as u64
    }

    fn page(&mut self, number: u64) -> &mut Page {
        self.give_back();
        let page = self.memory.borrow()[number as usize].clone();
        &mut self.lent.insert((number, page)).1
    }
}

struct Guest<'t> {
    memory: Memory,
    workload: Workload<'t, View>,
    now_ns: u64,
    wrong: Vec<WrongPage>,
}

impl<'t> Guest<'t> {
    fn new(pages: usize, table: &'t mut [u32], load: Load) -> Self {
        Self::of(Body::Random, pages, table, load)
    }

    fn of(body: Body, pages: usize, table: &'t mut [u32], load: Load) -> Self {
        let memory = Rc::new(RefCell::new(vec![Box::new([0; PAGE_WORDS]); pages]));
        let view = View { memory: Rc::clone(&memory), lent: None };
        Self {
            workload: Workload::new(view, table, Recipe { seed: 7, body }, load),
            memory,
            now_ns: 0,
            wrong: Vec::new(),
        }
    }

    /// Runs for a while; afterwards memory is as the guest left it.
    fn run_ms(&mut self, ms: u64) {
        for _ in 0..ms * 10 {
            self.now_ns += 100_000;
            while self.workload.step(self.now_ns, |wrong, _| self.wrong.push(wrong)) {
                self.now_ns += 1_000;
            }
        }
        self.workload.pages.give_back();
    }

    fn page(&self, number: usize) -> Page {
        *self.memory.borrow()[number]
    }

    fn set_page(&self, number: usize, page: Page) {
        *self.memory.borrow_mut()[number] = page;
    }
}

fn load(pages: u64, rate_pages: u64, verify_pages: u64) -> Load {
    Load {
        ws_bytes: pages * PAGE_BYTES,
        rate: Rate::BytesPerSecond(rate_pages * PAGE_BYTES),
        pattern: Pattern::Sequential,
        verify: Rate::BytesPerSecond(verify_pages * PAGE_BYTES),
        ..Load::default()
    }
}

#[test]
fn sound_memory_has_no_errors_and_is_swept() {
    for pattern in [Pattern::Sequential, Pattern::Random, Pattern::Sparse] {
        let mut table = vec![0xdead_beef; 64];
        let mut guest = Guest::new(64, &mut table, Load { pattern, ..load(64, 1000, 640) });
        guest.run_ms(2000);
        let counters = guest.workload.counters();
        assert_eq!(counters.errors, 0);
        assert!((19..=20).contains(&counters.sweeps), "{counters:?}");
        assert!((2050..=2070).contains(&counters.pages_written), "{counters:?}");
        assert!((3260..=3290).contains(&counters.pages_verified), "{counters:?}");
    }
}

#[test]
fn a_page_that_went_back_is_seen_before_it_is_rewritten() {
    let mut table = vec![0; 16];
    let mut guest = Guest::new(16, &mut table, load(16, 1000, 0));
    guest.run_ms(40);
    let before = guest.page(5);
    guest.run_ms(40);
    assert_ne!(before, guest.page(5));
    guest.set_page(5, before);
    guest.run_ms(40);
    let [wrong] = guest.wrong[..] else { panic!("{:?}", guest.wrong) };
    assert_eq!((wrong.expected.number, wrong.found.fault), (5, Fault::Stale));
    assert_eq!(wrong.found.stamp.generation, before[1] as u32);
    assert!(wrong.expected.generation > wrong.found.stamp.generation);
    assert_eq!(guest.workload.counters().errors, 1);
}

#[test]
fn every_lost_page_of_an_idle_guest_is_found_once_within_a_sweep() {
    for lost in 0..32 {
        let mut table = vec![0; 32];
        let mut guest = Guest::new(32, &mut table, load(32, 0, 3200));
        guest.run_ms(20);
        guest.set_page(lost, [0; PAGE_WORDS]);
        guest.run_ms(30);
        let [wrong] = guest.wrong[..] else { panic!("page {lost}: {:?}", guest.wrong) };
        assert_eq!((wrong.expected.number, wrong.found.fault), (lost as u64, Fault::Zero));
    }
}

#[test]
fn a_lost_cache_line_is_found() {
    for line in 0..64 {
        let mut table = vec![0; 8];
        let mut guest = Guest::new(8, &mut table, load(8, 1000, 0));
        guest.run_ms(10);
        let before = guest.page(3);
        guest.run_ms(8);
        let mut page = guest.page(3);
        assert_ne!(before, page);
        page[line * 8..line * 8 + 8].copy_from_slice(&before[line * 8..line * 8 + 8]);
        guest.set_page(3, page);
        guest.run_ms(16);
        let [wrong] = guest.wrong[..] else { panic!("line {line}: {:?}", guest.wrong) };
        assert_eq!((wrong.expected.number, wrong.found.fault), (3, Fault::Torn));
        assert_eq!(wrong.found.first_bad_byte / 64, line as u64);
    }
}

#[test]
fn pages_that_were_exchanged_are_found_and_told_apart() {
    let mut table = vec![0; 8];
    let mut guest = Guest::new(8, &mut table, load(8, 0, 1000));
    guest.run_ms(20);
    let (one, two) = (guest.page(1), guest.page(2));
    guest.set_page(1, two);
    guest.set_page(2, one);
    guest.run_ms(20);
    let faults: Vec<_> = guest.wrong.iter().map(|w| (w.expected.number, w.found.stamp.number)).collect();
    assert_eq!(guest.wrong.len(), 2);
    assert!(faults.contains(&(1, 2)) && faults.contains(&(2, 1)), "{faults:?}");
}

#[test]
fn a_table_that_went_back_is_found() {
    let mut table = vec![0; 8];
    let mut guest = Guest::new(8, &mut table, load(8, 0, 1000));
    guest.run_ms(20);
    guest.workload.generations[4] -= 1;
    guest.run_ms(20);
    assert_eq!(guest.wrong.len(), 1);
    assert_eq!(guest.wrong[0].expected.number, 4);
}

#[test]
fn a_load_that_grows_and_shrinks_stays_right() {
    let mut table = vec![7; 64];
    let mut guest = Guest::new(64, &mut table, load(16, 1000, 1000));
    guest.run_ms(50);
    for pages in [64, 3, 64, 1, 20, 1000] {
        let applied = guest.workload.set_load(load(pages, 1000, 1000));
        assert_eq!(applied.ws_bytes, pages.min(64) * PAGE_BYTES);
        guest.run_ms(200);
    }
    assert!(guest.workload.is_filled());
    assert_eq!(guest.workload.counters().errors, 0);
}

#[test]
fn a_working_set_without_memory_does_nothing() {
    let mut guest = Guest::new(0, &mut [], load(16, 1000, 1000));
    guest.run_ms(10);
    assert_eq!(guest.workload.counters(), Counters::default());
    assert_eq!(guest.workload.load().ws_bytes, 0);
}

#[test]
fn generations_may_wrap() {
    let mut table = vec![0; 2];
    let mut guest = Guest::new(2, &mut table, load(2, 1000, 1000));
    guest.run_ms(1);
    for number in 0..2 {
        guest.workload.generations[number] = LAST_GENERATION - 1;
        guest.workload.write(number as u64);
    }
    guest.run_ms(100);
    assert_eq!(guest.workload.counters().errors, 0);
    assert!((1..1000).contains(&guest.workload.generations[0]));
}

#[test]
fn a_lost_line_of_a_sparse_write_is_found_under_every_content() {
    for body in [Body::Random, Body::Corpus(include_bytes!("../http.rs"))] {
        let mut table = vec![0; 8];
        let mut guest = Guest::of(body, 8, &mut table, Load { pattern: Pattern::Sparse, ..load(8, 1000, 1000) });
        guest.run_ms(200);
        let before = guest.page(3);
        guest.run_ms(100);
        let after = guest.page(3);
        assert!(before[..8] != after[..8] && before[8..] == after[8..]);
        guest.set_page(3, before);
        guest.run_ms(50);
        let [wrong] = guest.wrong[..] else { panic!("{:?}", guest.wrong) };
        assert_eq!((wrong.expected.number, wrong.found.fault), (3, Fault::Stale));
    }
}

#[test]
fn a_pattern_that_changes_stays_right() {
    let mut table = vec![0; 16];
    let mut guest = Guest::new(16, &mut table, load(16, 1000, 1000));
    for pattern in [Pattern::Sparse, Pattern::Random, Pattern::Sparse, Pattern::Sequential] {
        guest.workload.set_load(Load { pattern, ..load(16, 1000, 1000) });
        guest.run_ms(100);
    }
    assert_eq!(guest.workload.counters().errors, 0);
}

#[test]
fn what_is_not_written_again_is_filled_and_checked_too() {
    let mut table = vec![9; 64];
    let layout = |ws| Load { fill_bytes: 24 * PAGE_BYTES, zero_bytes: 16 * PAGE_BYTES, ..load(ws, 1000, 6400) };
    let mut guest = Guest::new(64, &mut table, layout(8));
    for number in 0..64 {
        guest.set_page(number, [1; PAGE_WORDS]);
    }
    guest.run_ms(100);
    assert!(guest.workload.is_filled() && guest.wrong.is_empty());
    let is = |number: usize, word| guest.page(number) == [word; PAGE_WORDS];
    assert!((0..24).all(|n| !is(n, 0) && !is(n, 1)) && (24..40).all(|n| is(n, 0)) && (40..64).all(|n| is(n, 1)));
    for (number, word) in [(20, 0), (30, 1)] {
        guest.set_page(number, [word; PAGE_WORDS]);
    }
    guest.run_ms(100);
    let numbers: Vec<_> = guest.wrong.iter().map(|wrong| wrong.expected.number).collect();
    assert!(numbers.len() == 2 && numbers.contains(&20) && numbers.contains(&30), "{numbers:?}");
    // A working set that grows over them finds them as they are.
    guest.workload.set_load(layout(40));
    guest.run_ms(200);
    assert_eq!(guest.workload.counters().errors, 2);
}

#[test]
fn an_idle_load_is_idle() {
    let mut table = vec![0; 8];
    let mut guest = Guest::new(8, &mut table, load(8, 0, 0));
    guest.run_ms(1);
    assert!(!guest.workload.step(guest.now_ns + 1_000_000_000, |_, _| ()));
}
