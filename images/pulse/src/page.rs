//! What a page holds, and how it is checked.
//!
//! A page is filled from end to end with words that follow from (seed, page number, generation), so that a check can
//! work out every byte that should be there: a lost page, a lost cache line and a lost word are all seen. The head
//! repeats page number and generation in clear with a checksum over the whole page, which a check does not need to find
//! a wrong page but does need to say what is wrong with it: an older page, another page, or a mixture.
//!
//! | word | meaning |
//! | --- | --- |
//! | 0 | page number |
//! | 1 | [`MAGIC`] in the upper half, generation in the lower |
//! | 2 | key, mixed from seed, page number and generation |
//! | 3 | checksum of all the other words |
//! | 4… | the body: key + index × [`STEP`], or a piece of a corpus chosen by the key ([`Body`]) |
//!
//! Two exceptions. A page of generation 0 is all zeros. A [`SPARSE`] page is rewritten in its head alone, one cache line,
//! and its body follows from (seed, page number) only.

/// Bytes in a page.
pub const PAGE_BYTES: u64 = 4096;
/// 64-bit words in a page.
pub const PAGE_WORDS: usize = 512;
/// A page as words.
pub type Page = [u64; PAGE_WORDS];

/// Marks a page that the guest wrote.
const MAGIC: u64 = 0x7075_6c73;
/// Words before the body.
const HEAD_WORDS: usize = 4;
/// Odd, so that no two words of a body are equal, and all of a body differs from another key's.
const STEP: u64 = 0x9e37_79b9_7f4a_7c15;
/// In a generation: only the head of the page was rewritten.
pub const SPARSE: u32 = 1 << 31;
/// The highest generation, [`SPARSE`] left out.
pub const LAST_GENERATION: u32 = SPARSE - 1;

/// What the bodies of pages are made of.
#[derive(Clone, Copy, Debug)]
pub enum Body {
    /// Words without a pattern that a general compressor would find.
    Random,
    /// Nothing: all written pages are all zeros. No lost write can be seen, only a damaged page.
    Zero,
    /// Pieces of these bytes, which are more than a page. What compresses, compresses.
    Corpus(&'static [u8]),
}

/// What all pages follow from; it never changes while the guest runs.
#[derive(Clone, Copy, Debug)]
pub struct Recipe {
    /// Told apart from other guests' pages by it.
    pub seed: u64,
    /// What bodies are made of.
    pub body: Body,
}

impl Recipe {
    fn is_zero(&self, stamp: Stamp) -> bool {
        stamp.generation == 0 || matches!(self.body, Body::Zero)
    }

    /// Calls `each` for every word of a body, in order.
    #[inline]
    fn body_words(&self, key: u64, mut each: impl FnMut(usize, u64)) {
        match self.body {
            Body::Random | Body::Zero => {
                let mut value = key;
                for index in HEAD_WORDS..PAGE_WORDS {
                    value = value.wrapping_add(STEP);
                    each(index, value);
                }
            }
            Body::Corpus(bytes) => {
                let start = (key % (bytes.len() - PAGE_BYTES as usize) as u64) as usize;
                let piece = &bytes[start + HEAD_WORDS * 8..start + PAGE_BYTES as usize];
                for (index, word) in piece.as_chunks::<8>().0.iter().enumerate() {
                    each(HEAD_WORDS + index, u64::from_le_bytes(*word));
                }
            }
        }
    }
}

/// Mixes 64 bits so that each bit of the result hangs on each bit of `x` (the finalizer of SplitMix64).
pub fn mix(x: u64) -> u64 {
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// Which state of which page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stamp {
    /// Page number in the working set.
    pub number: u64,
    /// How often the page was written, and whether [`SPARSE`].
    pub generation: u32,
}

impl Stamp {
    fn head(self) -> [u64; 2] {
        [self.number, MAGIC << 32 | u64::from(self.generation)]
    }

    fn key(self, seed: u64) -> u64 {
        let [number, mark] = self.head();
        mix(mix(mix(seed ^ STEP).wrapping_add(number)) ^ mark)
    }

    /// What the body follows from: of a sparse page, not from its generation.
    fn body_key(self, seed: u64) -> u64 {
        let body = if self.generation & SPARSE == 0 { self } else { Self { generation: SPARSE, ..self } };
        body.key(seed)
    }
}

fn checksum(head: [u64; 2], key: u64, body_sum: u64) -> u64 {
    mix(mix(mix(head[0]) ^ head[1]).wrapping_add(key) ^ body_sum)
}

/// Fills `page` from end to end.
pub fn write(page: &mut Page, recipe: &Recipe, stamp: Stamp) {
    if recipe.is_zero(stamp) {
        page.fill(0);
        return;
    }
    recipe.body_words(stamp.body_key(recipe.seed), |index, word| page[index] = word);
    write_head(page, recipe, stamp);
}

/// Writes the head only, of a page whose body is that of `stamp` already.
pub fn write_head(page: &mut Page, recipe: &Recipe, stamp: Stamp) {
    let mut sum = 0u64;
    recipe.body_words(stamp.body_key(recipe.seed), |_, word| sum = sum.wrapping_add(word));
    let (key, head) = (stamp.key(recipe.seed), stamp.head());
    page[..HEAD_WORDS].copy_from_slice(&[head[0], head[1], key, checksum(head, key, sum)]);
}

/// Whether `page` holds, in every bit, what [`write`] put there.
pub fn is_right(page: &Page, recipe: &Recipe, stamp: Stamp) -> bool {
    // No early exit: pages are right nearly always, and a loop without branches becomes vector code.
    if recipe.is_zero(stamp) {
        return page.iter().fold(0, |bits, word| bits | word) == 0;
    }
    let (mut sum, mut difference) = (0u64, 0u64);
    recipe.body_words(stamp.body_key(recipe.seed), |index, word| {
        difference |= page[index] ^ word;
        sum = sum.wrapping_add(word);
    });
    let (key, head) = (stamp.key(recipe.seed), stamp.head());
    difference == 0 && page[..HEAD_WORDS] == [head[0], head[1], key, checksum(head, key, sum)]
}

/// What is wrong with a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// A whole page, but an older or newer generation of it: its last write was lost, or one came back.
    Stale,
    /// A whole page of another number: pages were mixed up.
    Misplaced,
    /// Nothing but zeros.
    Zero,
    /// Neither: part of a write was lost, or the page was damaged.
    Torn,
}

impl Fault {
    /// The fault's name in a report.
    pub fn name(self) -> &'static str {
        match self {
            Self::Stale => "stale",
            Self::Misplaced => "misplaced",
            Self::Zero => "zero",
            Self::Torn => "torn",
        }
    }
}

/// What was found in the place of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Found {
    /// What is wrong.
    pub fault: Fault,
    /// What the page's head says; meaningful as far as `fault` is [`Fault::Stale`] or [`Fault::Misplaced`].
    pub stamp: Stamp,
    /// The first byte that is wrong, rounded down to a word.
    pub first_bad_byte: u64,
    /// How many words are wrong.
    pub bad_words: u64,
}

/// Finds out what is wrong with a page that [`is_right`] refused.
pub fn diagnose(page: &Page, recipe: &Recipe, expected: Stamp) -> Found {
    let stamp = Stamp { number: page[0], generation: page[1] as u32 };
    let fault = if page.iter().all(|&word| word == 0) {
        Fault::Zero
    } else if !is_right(page, recipe, stamp) {
        Fault::Torn
    } else if stamp.number == expected.number {
        Fault::Stale
    } else {
        Fault::Misplaced
    };
    let mut right = [0; PAGE_WORDS];
    write(&mut right, recipe, expected);
    let wrong = || page.iter().zip(&right).enumerate().filter(|(_, (found, right))| found != right);
    Found {
        fault,
        stamp,
        first_bad_byte: wrong().next().map_or(0, |(index, _)| index as u64 * 8),
        bad_words: wrong().count() as u64,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RECIPE: Recipe = Recipe { seed: 7, body: Body::Random };
    const STAMP: Stamp = Stamp { number: 12, generation: 3 };

    fn fresh(stamp: Stamp) -> Page {
        let mut page = [0; PAGE_WORDS];
        write(&mut page, &RECIPE, stamp);
        page
    }

    #[test]
    fn what_was_written_is_right() {
        assert!(is_right(&fresh(STAMP), &RECIPE, STAMP));
        let last = Stamp { number: u64::MAX, generation: u32::MAX };
        assert!(is_right(&fresh(last), &RECIPE, last));
        let untouched = Stamp { generation: 0, ..STAMP };
        assert_eq!(fresh(untouched), [0; PAGE_WORDS]);
        assert!(is_right(&[0; PAGE_WORDS], &RECIPE, untouched) && !is_right(&fresh(STAMP), &RECIPE, untouched));
    }

    #[test]
    fn every_single_flipped_bit_is_seen() {
        let mut page = fresh(STAMP);
        for bit in 0..PAGE_BYTES * 8 {
            let (word, mask) = ((bit / 64) as usize, 1 << (bit % 64));
            page[word] ^= mask;
            assert!(!is_right(&page, &RECIPE, STAMP), "bit {bit}");
            assert_eq!(diagnose(&page, &RECIPE, STAMP).first_bad_byte, word as u64 * 8);
            page[word] ^= mask;
        }
    }

    #[test]
    fn every_single_lost_word_is_seen() {
        // One word of the page still holds the generation before, or another page's content: a write lost in part.
        for old in [Stamp { generation: 2, ..STAMP }, Stamp { number: 13, ..STAMP }] {
            let before = fresh(old);
            let after = fresh(STAMP);
            for (index, word) in before.iter().enumerate() {
                // The number alone, or the generation alone, may be the same in both: then nothing was lost.
                if *word == after[index] {
                    assert!(index < 2);
                    continue;
                }
                let mut page = after;
                page[index] = *word;
                assert!(!is_right(&page, &RECIPE, STAMP), "word {index}");
                assert_eq!(diagnose(&page, &RECIPE, STAMP).fault, Fault::Torn);
                assert_eq!(diagnose(&page, &RECIPE, STAMP).bad_words, 1);
            }
        }
    }

    #[test]
    fn whole_wrong_pages_are_told_apart() {
        let stale = diagnose(&fresh(Stamp { generation: 2, ..STAMP }), &RECIPE, STAMP);
        assert_eq!((stale.fault, stale.stamp.generation), (Fault::Stale, 2));
        let misplaced = diagnose(&fresh(Stamp { number: 99, generation: 3 }), &RECIPE, STAMP);
        assert_eq!((misplaced.fault, misplaced.stamp.number), (Fault::Misplaced, 99));
        let zero = diagnose(&[0; PAGE_WORDS], &RECIPE, STAMP);
        assert_eq!((zero.fault, zero.bad_words), (Fault::Zero, 512));
    }

    #[test]
    fn another_seed_is_not_right() {
        assert!(!is_right(&fresh(STAMP), &Recipe { seed: 8, ..RECIPE }, STAMP));
    }

    #[test]
    fn a_sparse_page_changes_in_its_first_line_and_is_checked_whole() {
        let stamp = |n| Stamp { generation: n | SPARSE, ..STAMP };
        let (old, mut page) = (fresh(stamp(3)), fresh(stamp(3)));
        write_head(&mut page, &RECIPE, stamp(4));
        assert_eq!(page, fresh(stamp(4)));
        assert!(page != old && page[HEAD_WORDS..] == old[HEAD_WORDS..]);
        assert_eq!(diagnose(&old, &RECIPE, stamp(4)).fault, Fault::Stale);
        page[500] ^= 1;
        assert!(!is_right(&page, &RECIPE, stamp(4)));
    }

    #[test]
    fn pages_of_a_corpus_are_pieces_of_it_and_differ() {
        let bytes: &'static [u8] = include_bytes!("workload.rs");
        let recipe = Recipe { seed: 7, body: Body::Corpus(bytes) };
        let mut page = [0; PAGE_WORDS];
        write(&mut page, &recipe, STAMP);
        let body: Vec<u8> = page[HEAD_WORDS..].iter().flat_map(|word| word.to_le_bytes()).collect();
        assert!(bytes.windows(body.len()).any(|piece| piece == body));
        assert!(is_right(&page, &recipe, STAMP));
        assert!(!is_right(&page, &recipe, Stamp { generation: 4, ..STAMP }));
        page[17] ^= 1 << 40;
        assert_eq!(diagnose(&page, &recipe, STAMP).fault, Fault::Torn);
    }

    #[test]
    fn zero_content_is_zero_and_damage_to_it_is_seen() {
        let recipe = Recipe { seed: 7, body: Body::Zero };
        let mut page = fresh(STAMP);
        write(&mut page, &recipe, STAMP);
        assert_eq!(page, [0; PAGE_WORDS]);
        page[511] = 1;
        assert!(!is_right(&page, &recipe, STAMP));
    }
}
