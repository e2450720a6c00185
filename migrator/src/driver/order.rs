//! In which order the chunks of a round go; and hot pages last.
//!
//! What the guest writes again and again would go in the first round only to go again in the second. So, where the first round takes long:
//! all of memory is armed at its beginning, not piece by piece, the log is looked at meanwhile, and chunks with pages in it are put
//! off to the end of the round. By then most of their hot pages are in the log. Those are left out: they stay in the log, and so go in the
//! next round. A page that is left costs nothing: it is sent once less. Where a round is short, the guest's writes would fault on
//! armed pages for nothing.

use std::collections::VecDeque;
use std::io;
use std::time::{Duration, Instant};

use super::send::Wanted;
use crate::bitmap::{Bitmap, ChunkBits};
use crate::layout::{CHUNK_PAGES, PAGE_BYTES};
use crate::traits::GuestPages;

/// The rest of a first round is long if it took this long, were all of it sent at the pace so far, ...
const LONG: Duration = Duration::from_millis(500);
/// ... which so many bytes of pages tell.
const TELLING_BYTES: u64 = 2 << 20;
/// So many chunks are armed at once, while the streams wait: 256 MiB.
const ARMED_AT_ONCE: u64 = 128;
/// The log is looked at so often, ...
const LOOK_EVERY: Duration = Duration::from_millis(10);
/// ... but for no more than one part in so many of the time.
const LOOK_PART: u32 = 20;

/// The chunks of one round, and how far it is.
pub(super) struct Order {
    pages: Bitmap,
    /// Chunks before this have gone, or are put off.
    next: u64,
    /// Those, the first one first.
    put_off: VecDeque<u64>,
    hot: Hot,
    /// Pages that were left for the next round, since it was last asked.
    pub left: u64,
}

/// What is done about hot pages.
enum Hot {
    /// Nothing: it is not the first round, or the last as well.
    Ignored,
    /// Nothing as long as the round does not seem to be long.
    Unknown {
        /// When the round began.
        began: Option<Instant>,
    },
    /// Chunks before this one are armed.
    Arming(u64),
    /// All are armed, and watched.
    Watched {
        /// What was in the log at the last look.
        written: Bitmap,
        next_look: Instant,
    },
}

impl Order {
    /// For a round of these pages. With `first`, they are all, and nothing is armed yet.
    pub fn new(pages: Bitmap, first: bool) -> Self {
        let hot = if first { Hot::Unknown { began: None } } else { Hot::Ignored };
        Self { pages, next: 0, put_off: VecDeque::new(), hot, left: 0 }
    }

    /// What to send next. So many bytes of pages were sent by now.
    pub fn next(&mut self, memory: &dyn GuestPages, sent: u64, now: Instant) -> io::Result<Option<Wanted>> {
        self.watch(memory, sent, now)?;
        let chunks = memory.layout().chunks();
        while self.next < chunks {
            let chunk = self.next;
            self.next += 1;
            let pages = self.pages.chunk(chunk);
            if pages.is_empty() {
                continue;
            }
            if !self.written(chunk).is_empty() {
                self.put_off.push_back(chunk);
                continue;
            }
            return Ok(Some(Wanted { chunk, pages, armed: self.is_armed() }));
        }
        while let Some(chunk) = self.put_off.pop_front() {
            let pages = self.pages.chunk(chunk);
            let left = pages.and(&self.written(chunk));
            self.left += left.count();
            let pages = pages.minus(&left);
            if !pages.is_empty() {
                return Ok(Some(Wanted { chunk, pages, armed: true }));
            }
        }
        Ok(None)
    }

    /// Arms what is to be watched, and looks at the log.
    fn watch(&mut self, memory: &dyn GuestPages, sent: u64, now: Instant) -> io::Result<()> {
        let chunks = memory.layout().chunks();
        if let Hot::Unknown { began } = &mut self.hot {
            let took = now.saturating_duration_since(*began.get_or_insert(now));
            // The most that there is: how much of it has content is not known.
            let left = (chunks - self.next) * CHUNK_PAGES * PAGE_BYTES;
            if sent >= TELLING_BYTES && took.mul_f64(left as f64 / sent as f64) >= LONG {
                self.hot = Hot::Arming(self.next);
            }
        }
        match &mut self.hot {
            Hot::Ignored | Hot::Unknown { .. } => {}
            Hot::Arming(armed) => {
                let until = chunks.min(*armed + ARMED_AT_ONCE);
                while *armed < until {
                    memory.rearm(*armed, &ChunkBits::full(memory.layout().chunk_pages(*armed)))?;
                    *armed += 1;
                }
                if *armed == chunks {
                    let written = Bitmap::new(self.pages.pages());
                    self.hot = Hot::Watched { written, next_look: now + LOOK_EVERY };
                }
            }
            Hot::Watched { written, next_look } if now >= *next_look => {
                let began = Instant::now();
                written.clear();
                memory.peek_dirty(written)?;
                *next_look = now + LOOK_EVERY.max(began.elapsed() * LOOK_PART);
            }
            Hot::Watched { .. } => {}
        }
        Ok(())
    }

    /// What is known to be in the log of a chunk.
    fn written(&self, chunk: u64) -> ChunkBits {
        match &self.hot {
            Hot::Watched { written, .. } => written.chunk(chunk),
            _ => ChunkBits::default(),
        }
    }

    /// Whether the chunk before the next one was armed, with all others.
    fn is_armed(&self) -> bool {
        match &self.hot {
            Hot::Ignored | Hot::Unknown { .. } => false,
            Hot::Arming(armed) => self.next <= *armed,
            Hot::Watched { .. } => true,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::BorrowedFd;
    use std::sync::Mutex;

    use proptest::prelude::*;

    use super::*;
    use crate::layout::{PageRun, RamLayout, RamRegion};
    use crate::traits::Part;

    const CHUNKS: u64 = 300;

    /// A log as KVM keeps it: at first everything counts as written, and only arming clears.
    struct Logged {
        layout: RamLayout,
        log: Mutex<Vec<bool>>,
        ever_armed: Mutex<Vec<bool>>,
    }

    impl Logged {
        fn new() -> Self {
            // The last chunk is a short one.
            let pages = CHUNKS * CHUNK_PAGES - 100;
            let layout = RamLayout::new(vec![RamRegion { gpa: 0, bytes: pages * PAGE_BYTES }]).unwrap();
            let (log, ever_armed) = (Mutex::new(vec![true; pages as usize]), Mutex::new(vec![false; pages as usize]));
            Self { layout, log, ever_armed }
        }

        fn write(&self, page: u64) {
            self.log.lock().unwrap()[page as usize] = true;
        }
    }

    impl GuestPages for Logged {
        fn layout(&self) -> &RamLayout {
            &self.layout
        }

        fn rearm(&self, chunk: u64, bits: &ChunkBits) -> io::Result<()> {
            for run in bits.runs(chunk * CHUNK_PAGES) {
                let pages = run.first as usize..(run.first + run.pages) as usize;
                self.log.lock().unwrap()[pages.clone()].fill(false);
                self.ever_armed.lock().unwrap()[pages].fill(true);
            }
            Ok(())
        }

        fn peek_dirty(&self, into: &mut Bitmap) -> io::Result<()> {
            let log = self.log.lock().unwrap();
            (0..log.len()).filter(|page| log[*page]).for_each(|page| into.set(page as u64));
            Ok(())
        }

        fn send(&self, _: &[Part<'_>], _: BorrowedFd<'_>) -> io::Result<()> {
            unreachable!()
        }

        fn receive(&self, _: &[PageRun], _: &mut [u8], _: BorrowedFd<'_>) -> io::Result<()> {
            unreachable!()
        }

        fn read(&self, _: PageRun, _: &mut [u8]) -> io::Result<()> {
            unreachable!()
        }

        fn write(&self, _: PageRun, _: &[u8]) -> io::Result<()> {
            unreachable!()
        }

        fn clear(&self, _: PageRun) -> io::Result<()> {
            unreachable!()
        }
    }

    /// Takes all chunks of a first round, at so many milliseconds a chunk, with the guest's writes before each. Which went, and how
    /// many were left.
    fn round(memory: &Logged, mut writes: impl FnMut(usize), ms: impl Fn(usize) -> u64) -> (Vec<Wanted>, u64) {
        let mut order = Order::new(Bitmap::full(memory.layout.pages()), true);
        let (mut now, mut sent, mut went) = (Instant::now(), 0, Vec::new());
        loop {
            writes(went.len());
            let Some(wanted) = order.next(memory, sent, now).unwrap() else { return (went, order.left) };
            if !wanted.armed {
                memory.rearm(wanted.chunk, &wanted.pages).unwrap();
            }
            now += Duration::from_millis(ms(went.len()));
            sent += wanted.pages.count() * PAGE_BYTES;
            went.push(wanted);
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        /// Each page goes once, armed, or is left and in the log: else it would never be sent.
        #[test]
        fn every_page_goes_or_is_in_the_log(
            writes in prop::collection::vec(prop::collection::vec(0..CHUNKS * CHUNK_PAGES - 100, 0..40), 1..400),
            ms in prop::collection::vec(prop_oneof![Just(0u64), 1u64..50], 1..400),
        ) {
            let memory = Logged::new();
            let write = |n: usize| writes[n % writes.len()].iter().for_each(|page| memory.write(*page));
            let (went, left) = round(&memory, write, |n| ms[n % ms.len()]);
            let mut times = vec![0; memory.layout.pages() as usize];
            for wanted in &went {
                for run in wanted.pages.runs(wanted.chunk * CHUNK_PAGES) {
                    times[run.first as usize..(run.first + run.pages) as usize].iter_mut().for_each(|times| *times += 1);
                }
            }
            let log = memory.log.lock().unwrap();
            for (page, times) in times.iter().enumerate() {
                prop_assert!(*times == 1 || *times == 0 && log[page], "page {} went {} times", page, times);
            }
            prop_assert!(memory.ever_armed.lock().unwrap().iter().all(|armed| *armed));
            prop_assert_eq!(left, times.iter().filter(|times| **times == 0).count() as u64);
        }
    }

    #[test]
    fn hot_pages_are_left_where_the_round_is_long() {
        let hot = 100 * CHUNK_PAGES..100 * CHUNK_PAGES + 40;
        for (ms, left) in [(10, 40), (0, 0)] {
            let memory = Logged::new();
            let (went, found) = round(&memory, |_| hot.clone().for_each(|page| memory.write(page)), |_| ms);
            assert_eq!(found, left);
            assert_eq!(went.len(), CHUNKS as usize, "the rest of the chunk goes");
            let at = went.iter().position(|wanted| wanted.chunk == 100).unwrap();
            assert_eq!(at, if left > 0 { CHUNKS as usize - 1 } else { 100 });
        }
    }
}
