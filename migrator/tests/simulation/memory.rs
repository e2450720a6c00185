//! Memory whose pages are a word each, so that a run costs little. On the wire a page is that word 512 times.

use migrator::bitmap::{Bitmap, ChunkBits};
use migrator::layout::{CHUNK_PAGES, PAGE_SIZE, RamLayout, RamRegion};
use xxhash_rust::xxh3::xxh3_64;

use crate::common::Random;

#[derive(Clone, Debug)]
pub struct Memory {
    pub layout: RamLayout,
    pub words: Vec<u64>,
    /// Pages that the log names, a word of bits for 64 pages.
    log: Option<Vec<u64>>,
    /// Reading the log leaves it; arming a page again clears it.
    manual: bool,
    pub paused: bool,
    /// Thousandths of its time that the guest does not get.
    pub throttle: u16,
}

impl Memory {
    /// Two to four chunks, the last one shorter, with a hole, and a few pages that are not zero.
    pub fn new(random: &mut Random) -> Self {
        let pages = CHUNK_PAGES * (1 + random.below(3)) + 1 + random.below(CHUNK_PAGES);
        let low = 1 + random.below(pages - 1);
        let region = |gpa, pages| RamRegion { gpa, bytes: pages * PAGE_SIZE as u64 };
        let layout = RamLayout::new(vec![region(0, low), region(1 << 32, pages - low)]).unwrap();
        let mut memory = Self::empty(layout, random.chance(50));
        for _ in 0..8 + random.below(16) {
            memory.guest_writes(random);
        }
        memory
    }

    pub fn empty(layout: RamLayout, manual: bool) -> Self {
        let words = vec![0; layout.pages() as usize];
        Self { layout, words, log: None, manual, paused: false, throttle: 0 }
    }

    /// The guest writes a page, if it runs; sometimes zeros.
    pub fn guest_writes(&mut self, random: &mut Random) {
        let (page, word) = (random.below(self.layout.pages()) as usize, random.next());
        if self.paused {
            return;
        }
        self.words[page] = if word.is_multiple_of(5) { 0 } else { word };
        if let Some(log) = &mut self.log {
            log[page / 64] |= 1 << (page % 64);
        }
    }

    pub fn start_log(&mut self) {
        // As KVM does: with manual clearing everything counts as dirty at first.
        let first = if self.manual { u64::MAX } else { 0 };
        self.log = Some(vec![first; (self.layout.chunks() * CHUNK_PAGES / 64) as usize]);
    }

    pub fn stop_log(&mut self) {
        self.log = None;
    }

    pub fn is_logging(&self) -> bool {
        self.log.is_some()
    }

    pub fn collect(&mut self, into: &mut Bitmap) {
        let (pages, manual) = (self.layout.pages(), self.manual);
        let log = self.log.as_mut().expect("the log is on");
        for (at, word) in log.iter_mut().enumerate() {
            let mut left = *word;
            while left != 0 {
                let page = at as u64 * 64 + u64::from(left.trailing_zeros());
                left &= left - 1;
                if page < pages {
                    into.set(page);
                }
            }
            if !manual {
                *word = 0;
            }
        }
    }

    /// From now on writes to these pages are logged again.
    pub fn rearm(&mut self, chunk: u64, bits: &ChunkBits) {
        if let Some(log) = self.log.as_mut().filter(|_| self.manual) {
            let first = (chunk * CHUNK_PAGES / 64) as usize;
            for (word, bits) in log[first..].iter_mut().zip(bits.0) {
                *word &= !bits;
            }
        }
    }

    /// What was written since it was armed, in a log that reading does not clear.
    pub fn written(&self, chunk: u64) -> ChunkBits {
        let first = (chunk * CHUNK_PAGES / 64) as usize;
        let mut bits = ChunkBits::default();
        if let Some(log) = self.log.as_ref().filter(|_| self.manual) {
            bits.0.iter_mut().zip(&log[first..]).for_each(|(bits, word)| *bits = *word);
        }
        bits
    }

    pub fn find_zero(&self, chunk: u64, wanted: &ChunkBits) -> ChunkBits {
        let mut zero = ChunkBits::default();
        for run in wanted.runs(0) {
            for page in run.first..run.first + run.pages {
                if self.words[(chunk * CHUNK_PAGES + page) as usize] == 0 {
                    zero.set(page);
                }
            }
        }
        zero
    }

    pub fn hash(&self) -> u64 {
        self.words.iter().fold(0, |hash, word| (hash ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29))
    }
}

/// Adds a page to what is sent.
pub fn write_page(word: u64, to: &mut Vec<u8>) {
    let start = to.len();
    to.resize(start + PAGE_SIZE, 0);
    let word = word.to_ne_bytes();
    to[start..].chunks_exact_mut(8).for_each(|bytes| bytes.copy_from_slice(&word));
}

/// The word of a page that came. One whose words differ was changed on the way.
pub fn read_page(bytes: &[u8]) -> u64 {
    let first: [u8; 8] = bytes[..8].try_into().expect("a page");
    let same = bytes.chunks_exact(8).all(|word| word == first);
    if same { u64::from_ne_bytes(first) } else { xxh3_64(bytes) }
}
