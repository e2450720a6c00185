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
//! | 4… | key + index × [`STEP`] |

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
    /// How often the page was written.
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
}

fn checksum(head: [u64; 2], key: u64, body_sum: u64) -> u64 {
    mix(mix(mix(head[0]) ^ head[1]).wrapping_add(key) ^ body_sum)
}

/// Fills `page` from end to end.
pub fn write(page: &mut Page, seed: u64, stamp: Stamp) {
    let key = stamp.key(seed);
    let head = stamp.head();
    let (words, body) = page.split_at_mut(HEAD_WORDS);
    let mut value = key;
    let mut sum = 0u64;
    for word in body {
        value = value.wrapping_add(STEP);
        *word = value;
        sum = sum.wrapping_add(value);
    }
    words.copy_from_slice(&[head[0], head[1], key, checksum(head, key, sum)]);
}

/// Whether `page` holds, in every bit, what [`write`] put there.
pub fn is_right(page: &Page, seed: u64, stamp: Stamp) -> bool {
    let key = stamp.key(seed);
    let head = stamp.head();
    let (words, body) = page.split_at(HEAD_WORDS);
    let mut value = key;
    let mut sum = 0u64;
    let mut difference = 0u64;
    // No early exit: pages are right nearly always, and a loop without branches becomes vector code.
    for word in body {
        value = value.wrapping_add(STEP);
        difference |= word ^ value;
        sum = sum.wrapping_add(*word);
    }
    difference == 0 && words == [head[0], head[1], key, checksum(head, key, sum)]
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
pub fn diagnose(page: &Page, seed: u64, expected: Stamp) -> Found {
    let stamp = Stamp { number: page[0], generation: page[1] as u32 };
    let fault = if page.iter().all(|&word| word == 0) {
        Fault::Zero
    } else if !is_right(page, seed, stamp) {
        Fault::Torn
    } else if stamp.number == expected.number {
        Fault::Stale
    } else {
        Fault::Misplaced
    };
    let mut right = [0; PAGE_WORDS];
    write(&mut right, seed, expected);
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

    const SEED: u64 = 7;
    const STAMP: Stamp = Stamp { number: 12, generation: 3 };

    fn fresh(stamp: Stamp) -> Page {
        let mut page = [0; PAGE_WORDS];
        write(&mut page, SEED, stamp);
        page
    }

    #[test]
    fn what_was_written_is_right() {
        assert!(is_right(&fresh(STAMP), SEED, STAMP));
        let last = Stamp { number: u64::MAX, generation: u32::MAX };
        assert!(is_right(&fresh(last), SEED, last));
    }

    #[test]
    fn every_single_flipped_bit_is_seen() {
        let mut page = fresh(STAMP);
        for bit in 0..PAGE_BYTES * 8 {
            let (word, mask) = ((bit / 64) as usize, 1 << (bit % 64));
            page[word] ^= mask;
            assert!(!is_right(&page, SEED, STAMP), "bit {bit}");
            assert_eq!(diagnose(&page, SEED, STAMP).first_bad_byte, word as u64 * 8);
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
                assert!(!is_right(&page, SEED, STAMP), "word {index}");
                assert_eq!(diagnose(&page, SEED, STAMP).fault, Fault::Torn);
                assert_eq!(diagnose(&page, SEED, STAMP).bad_words, 1);
            }
        }
    }

    #[test]
    fn whole_wrong_pages_are_told_apart() {
        let stale = diagnose(&fresh(Stamp { generation: 2, ..STAMP }), SEED, STAMP);
        assert_eq!((stale.fault, stale.stamp.generation), (Fault::Stale, 2));
        let misplaced = diagnose(&fresh(Stamp { number: 99, generation: 3 }), SEED, STAMP);
        assert_eq!((misplaced.fault, misplaced.stamp.number), (Fault::Misplaced, 99));
        let zero = diagnose(&[0; PAGE_WORDS], SEED, STAMP);
        assert_eq!((zero.fault, zero.bad_words), (Fault::Zero, 512));
    }

    #[test]
    fn another_seed_is_not_right() {
        assert!(!is_right(&fresh(STAMP), SEED + 1, STAMP));
    }
}
