//! The workload: writes pages at a set rate, and checks all of them, those it writes and those it does not.
//!
//! **Why a lost write is seen.** The generation that a page should have is kept outside of it, in a table. Before a page
//! is rewritten, and again and again in the background, it is compared in full with what its table entry says. A page
//! that went back to an older state disagrees with the table; a part of the table that went back disagrees with its
//! pages. Only when both go back together, and everything else with them, is nothing seen: then the whole machine was
//! set back, which no guest can tell from inside.
//!
//! **Pages come into being in order.** A page without content cannot be checked, so a fresh working set is first filled
//! from its start, at full speed; only pages below `filled` are written and checked, and only their table entries mean
//! anything. After the working set come pages that are written once, then pages that get zeros once (generation 0). A
//! working set that shrinks keeps what is filled, and finds it again when it grows.
//!
//! One call of [`Workload::step`] touches a few pages, microseconds of work, so that the main loop reads its clock often
//! enough to see a short hole.

use crate::load::{Load, Pattern};
use crate::pacer::Pacer;
use crate::page::{self, Body, Found, LAST_GENERATION, PAGE_BYTES, Page, Recipe, SPARSE, Stamp};

/// Pages of one kind (filled, written, checked) that a step touches at most.
pub const PAGES_A_STEP: usize = 4;

/// The memory that the workload owns.
pub trait Pages {
    /// How many pages there are.
    fn count(&self) -> u64;
    /// Page `number`, below [`Pages::count`].
    fn page(&mut self, number: u64) -> &mut Page;
}

/// Running totals.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Background checks of the whole working set that were completed.
    pub sweeps: u64,
    /// Pages written, the first fill included.
    pub pages_written: u64,
    /// Pages checked, before a rewrite or in the background.
    pub pages_verified: u64,
    /// Pages found wrong.
    pub errors: u64,
}

/// A page that was found wrong. It has been rewritten since, so that one loss counts once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WrongPage {
    /// What should have been there.
    pub expected: Stamp,
    /// What was.
    pub found: Found,
}

/// The order of a random pattern: SplitMix64, small and the same everywhere.
#[derive(Clone, Debug)]
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        ((u128::from(page::mix(self.0)) * u128::from(bound)) >> 64) as u64
    }
}

/// The workload over pages `P`.
pub struct Workload<'t, P> {
    pages: P,
    generations: &'t mut [u32],
    recipe: Recipe,
    load: Load,
    /// Pages in the working set.
    set: u64,
    /// Pages that get content, the working set included.
    content: u64,
    /// Pages that get content or zeros.
    all: u64,
    /// Pages that have theirs.
    filled: u64,
    next_write: u64,
    next_check: u64,
    random: Random,
    writes: Pacer,
    checks: Pacer,
    counters: Counters,
}

impl<'t, P: Pages> Workload<'t, P> {
    /// A workload that has written nothing yet. `generations` is the table, one entry a page, of any content.
    pub fn new(pages: P, generations: &'t mut [u32], recipe: Recipe, load: Load) -> Self {
        let mut workload = Self {
            pages,
            generations,
            recipe,
            load,
            set: 0,
            content: 0,
            all: 0,
            filled: 0,
            next_write: 0,
            next_check: 0,
            random: Random(recipe.seed),
            writes: Pacer::new(load.rate),
            checks: Pacer::new(load.verify),
            counters: Counters::default(),
        };
        workload.set_load(load);
        workload
    }

    /// Totals since the start.
    pub fn counters(&self) -> Counters {
        self.counters
    }

    /// The load in force.
    pub fn load(&self) -> Load {
        self.load
    }

    /// The largest working set, bytes.
    pub fn capacity_bytes(&self) -> u64 {
        self.pages.count().min(self.generations.len() as u64) * PAGE_BYTES
    }

    /// Whether every page has the content that it is to begin with.
    pub fn is_filled(&self) -> bool {
        self.filled >= self.all
    }

    /// Changes the load; the working set is clipped to the memory that is there. Returns the load now in force.
    pub fn set_load(&mut self, load: Load) -> Load {
        let capacity_bytes = self.capacity_bytes();
        let pages = |bytes: u64| bytes.min(capacity_bytes) / PAGE_BYTES;
        self.set = pages(load.ws_bytes);
        self.content = pages(load.fill_bytes).max(self.set);
        self.all = pages((self.content * PAGE_BYTES).saturating_add(load.zero_bytes));
        self.load = Load { ws_bytes: self.set * PAGE_BYTES, ..load };
        self.writes.set_rate(load.rate);
        self.checks.set_rate(load.verify);
        if self.next_write >= self.set {
            self.next_write = 0;
        }
        if self.next_check >= self.all {
            self.next_check = 0;
        }
        self.load
    }

    /// Does a little of what is due at `now_ns`; `wrong` hears of each wrong page. Returns false when nothing was due.
    pub fn step(&mut self, now_ns: u64, mut wrong: impl FnMut(WrongPage, &P)) -> bool {
        self.writes.advance(now_ns);
        self.checks.advance(now_ns);
        if self.set == 0 {
            return false;
        }
        if !self.is_filled() {
            self.fill();
            return true;
        }
        let mut worked = false;
        for _ in 0..PAGES_A_STEP {
            if !self.writes.take_page() {
                break;
            }
            let number = self.choose();
            self.check(number, &mut wrong);
            self.write(number);
            worked = true;
        }
        for _ in 0..PAGES_A_STEP {
            if !self.checks.take_page() {
                break;
            }
            self.check(self.next_check, &mut wrong);
            self.next_check += 1;
            if self.next_check == self.all {
                self.next_check = 0;
                self.counters.sweeps += 1;
            }
            worked = true;
        }
        worked
    }

    fn fill(&mut self) {
        for number in self.filled..self.all.min(self.filled + PAGES_A_STEP as u64) {
            self.generations[number as usize] = 0;
            if number < self.content {
                self.write(number);
            } else {
                self.rewrite(number);
            }
            self.filled = number + 1;
        }
    }

    fn choose(&mut self) -> u64 {
        match self.load.pattern {
            Pattern::Random | Pattern::Sparse => self.random.below(self.set),
            Pattern::Sequential => {
                let number = self.next_write;
                self.next_write = if number + 1 == self.set { 0 } else { number + 1 };
                number
            }
        }
    }

    fn write(&mut self, number: u64) {
        let generation = &mut self.generations[number as usize];
        let before = *generation;
        let next = before & LAST_GENERATION;
        // Generation 0 is a page of zeros.
        *generation = if next == LAST_GENERATION { 1 } else { next + 1 };
        self.counters.pages_written += 1;
        if self.load.pattern == Pattern::Sparse {
            *generation |= SPARSE;
            // A page of zeros stays one whatever its generation.
            if before & SPARSE != 0 && !matches!(self.recipe.body, Body::Zero) {
                let stamp = Stamp { number, generation: *generation };
                return page::write_head(self.pages.page(number), &self.recipe, stamp);
            }
        }
        self.rewrite(number);
    }

    /// Writes the whole page as its table entry says.
    fn rewrite(&mut self, number: u64) {
        let stamp = Stamp { number, generation: self.generations[number as usize] };
        page::write(self.pages.page(number), &self.recipe, stamp);
    }

    fn check(&mut self, number: u64, wrong: &mut impl FnMut(WrongPage, &P)) {
        let expected = Stamp { number, generation: self.generations[number as usize] };
        let page = self.pages.page(number);
        self.counters.pages_verified += 1;
        if !page::is_right(page, &self.recipe, expected) {
            let found = page::diagnose(page, &self.recipe, expected);
            self.counters.errors += 1;
            wrong(WrongPage { expected, found }, &self.pages);
            self.rewrite(number);
        }
    }
}

#[cfg(test)]
mod tests;
