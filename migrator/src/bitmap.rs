//! Sets of pages: one bit a page for all of RAM ([`Bitmap`]) and for one chunk ([`ChunkBits`]).
//!
//! Named bitmap and not dirty log: the log is the hypervisor's, and reading it may clear it. What was read is in a
//! bitmap of ours, and from then on it is ours to send.

use crate::layout::{CHUNK_PAGES, PageRun};

const WORD_BITS: u64 = 64;
/// Words of 64 bits in the bits of one chunk.
pub const CHUNK_WORDS: usize = (CHUNK_PAGES / WORD_BITS) as usize;

/// One bit for each page of RAM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bitmap {
    words: Vec<u64>,
    pages: u64,
}

impl Bitmap {
    /// A bitmap for so many pages, all clear.
    pub fn new(pages: u64) -> Self {
        let words = pages.div_ceil(CHUNK_PAGES) as usize * CHUNK_WORDS;
        Self { words: vec![0; words], pages }
    }

    /// A bitmap for so many pages, all set.
    pub fn full(pages: u64) -> Self {
        let mut bitmap = Self::new(pages);
        for (index, word) in bitmap.words.iter_mut().enumerate() {
            *word = low_bits(pages.saturating_sub(index as u64 * WORD_BITS));
        }
        bitmap
    }

    /// How many pages it is for.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// Sets the bit of a page; a page beyond the end is left out.
    pub fn set(&mut self, page: u64) {
        if page < self.pages {
            self.words[(page / WORD_BITS) as usize] |= 1 << (page % WORD_BITS);
        }
    }

    /// Whether the bit of the page is set.
    pub fn get(&self, page: u64) -> bool {
        page < self.pages && self.words[(page / WORD_BITS) as usize] >> (page % WORD_BITS) & 1 == 1
    }

    /// Sets the bits of `pages` pages from `first_page` on for which `words` has a bit, least significant bit first:
    /// the shape in which `KVM_GET_DIRTY_LOG` gives a memory slot. Bits beyond either end are left out.
    pub fn or_words(&mut self, first_page: u64, pages: u64, words: &[u64]) {
        let pages = pages.min(self.pages.saturating_sub(first_page));
        for (index, word) in words.iter().enumerate() {
            let offset = index as u64 * WORD_BITS;
            if offset >= pages {
                break;
            }
            let word = word & low_bits(pages - offset);
            if word == 0 {
                continue;
            }
            let at = first_page + offset;
            let (slot, shift) = ((at / WORD_BITS) as usize, at % WORD_BITS);
            self.words[slot] |= word << shift;
            if shift != 0 && word >> (WORD_BITS - shift) != 0 {
                self.words[slot + 1] |= word >> (WORD_BITS - shift);
            }
        }
    }

    /// Sets every bit that is set in `other`, which is for as many pages.
    pub fn or(&mut self, other: &Self) {
        for (ours, theirs) in self.words.iter_mut().zip(&other.words) {
            *ours |= theirs;
        }
    }

    /// Clears all bits.
    pub fn clear(&mut self) {
        self.words.fill(0);
    }

    /// How many bits are set.
    pub fn count(&self) -> u64 {
        self.words.iter().map(|word| u64::from(word.count_ones())).sum()
    }

    /// The bits of a chunk; all clear beyond the end.
    pub fn chunk(&self, chunk: u64) -> ChunkBits {
        let mut bits = ChunkBits::default();
        let start = usize::try_from(chunk).unwrap_or(usize::MAX).saturating_mul(CHUNK_WORDS);
        if let Some(words) = self.words.get(start..).and_then(|rest| rest.get(..CHUNK_WORDS)) {
            bits.0.copy_from_slice(words);
        }
        bits
    }
}

/// One bit for each page of one chunk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct ChunkBits(pub [u64; CHUNK_WORDS]);

impl ChunkBits {
    /// The bits of the first `pages` pages of a chunk, all set.
    pub fn full(pages: u64) -> Self {
        Self(std::array::from_fn(|index| low_bits(pages.saturating_sub(index as u64 * WORD_BITS))))
    }

    /// Sets the bit of a page of the chunk (0 to 511; others are left out).
    pub fn set(&mut self, page: u64) {
        if let Some(word) = self.0.get_mut((page / WORD_BITS) as usize) {
            *word |= 1 << (page % WORD_BITS);
        }
    }

    /// Whether the bit of a page of the chunk is set.
    pub fn get(&self, page: u64) -> bool {
        self.0.get((page / WORD_BITS) as usize).is_some_and(|word| word >> (page % WORD_BITS) & 1 == 1)
    }

    /// How many bits are set.
    pub fn count(&self) -> u64 {
        self.0.iter().map(|word| u64::from(word.count_ones())).sum()
    }

    /// Whether no bit is set.
    pub fn is_empty(&self) -> bool {
        self.0.iter().all(|word| *word == 0)
    }

    /// The bits that are set here and not there.
    #[must_use]
    pub fn minus(&self, other: &Self) -> Self {
        Self(std::array::from_fn(|index| self.0[index] & !other.0[index]))
    }

    /// The bits that are set in both.
    #[must_use]
    pub fn and(&self, other: &Self) -> Self {
        Self(std::array::from_fn(|index| self.0[index] & other.0[index]))
    }

    /// The set bits as runs of pages that follow one another, in order; page 0 of the chunk is page `first_page` of RAM.
    pub fn runs(self, first_page: u64) -> impl Iterator<Item = PageRun> {
        let mut at = 0;
        std::iter::from_fn(move || {
            let first = self.next(at, true)?;
            let end = self.next(first, false).unwrap_or(CHUNK_PAGES);
            at = end;
            Some(PageRun { first: first_page + first, pages: end - first })
        })
    }

    /// The first page from `at` on whose bit is `value`.
    fn next(&self, at: u64, value: bool) -> Option<u64> {
        let mut at = at;
        while at < CHUNK_PAGES {
            let word = self.0[(at / WORD_BITS) as usize];
            let word = (if value { word } else { !word }) >> (at % WORD_BITS);
            if word != 0 {
                return Some(at + u64::from(word.trailing_zeros()));
            }
            at = (at / WORD_BITS + 1) * WORD_BITS;
        }
        None
    }
}

/// A word whose lowest `count` bits are set (all of them from 64 on).
fn low_bits(count: u64) -> u64 {
    if count >= WORD_BITS { u64::MAX } else { (1 << count) - 1 }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Against the naive model: a set of page numbers.
        #[test]
        fn agrees_with_a_set(pages in 1u64..3000, marks in prop::collection::vec(0u64..4000, 0..200),
                             first in 0u64..3500, words in prop::collection::vec(any::<u64>(), 0..60), span in 0u64..4000) {
            let mut bitmap = Bitmap::new(pages);
            let mut model = BTreeSet::new();
            for page in marks {
                bitmap.set(page);
                if page < pages { model.insert(page); }
            }
            bitmap.or_words(first, span, &words);
            for bit in 0..(words.len() as u64 * 64).min(span) {
                if words[(bit / 64) as usize] >> (bit % 64) & 1 == 1 && first + bit < pages {
                    model.insert(first + bit);
                }
            }
            prop_assert_eq!(bitmap.count(), model.len() as u64);
            for page in 0..pages + 600 {
                prop_assert_eq!(bitmap.get(page), model.contains(&page));
            }
            let mut seen = BTreeSet::new();
            for chunk in 0..pages.div_ceil(CHUNK_PAGES) + 1 {
                let bits = bitmap.chunk(chunk);
                let mut last_end = None;
                for run in bits.runs(chunk * CHUNK_PAGES) {
                    prop_assert!(run.pages > 0);
                    prop_assert!(last_end.is_none_or(|end| run.first > end), "runs are maximal");
                    last_end = Some(run.first + run.pages);
                    seen.extend(run.first..run.first + run.pages);
                }
                prop_assert_eq!(bits.count() == 0, bits.is_empty());
            }
            prop_assert_eq!(seen, model);
        }

        #[test]
        fn full_is_every_page_and_no_more(pages in 0u64..2000) {
            let bitmap = Bitmap::full(pages);
            prop_assert_eq!(bitmap.count(), pages);
            let mut one_by_one = Bitmap::new(pages);
            for page in 0..pages { one_by_one.set(page); }
            prop_assert_eq!(&bitmap, &one_by_one);
            one_by_one.clear();
            prop_assert_eq!(one_by_one.count(), 0);
            one_by_one.or(&bitmap);
            prop_assert_eq!(&bitmap, &one_by_one);
            prop_assert_eq!(ChunkBits::full(pages).count(), pages.min(512));
        }

        #[test]
        fn chunk_arithmetic(a in any::<[u64; 8]>(), b in any::<[u64; 8]>()) {
            let (a, b) = (ChunkBits(a), ChunkBits(b));
            prop_assert_eq!(a.and(&b).count() + a.minus(&b).count(), a.count());
            prop_assert!(a.minus(&b).and(&b).is_empty());
        }
    }

    #[test]
    fn chunk_bits_at_the_edges() {
        let mut bits = ChunkBits::default();
        for page in [0, 63, 64, 511, 512, u64::MAX] {
            bits.set(page);
        }
        assert_eq!(bits.count(), 4);
        assert!(bits.get(511) && !bits.get(512) && !bits.get(u64::MAX));
        let runs: Vec<_> = bits.runs(1000).map(|run| (run.first, run.pages)).collect();
        assert_eq!(runs, [(1000, 1), (1063, 2), (1511, 1)]);
    }
}
