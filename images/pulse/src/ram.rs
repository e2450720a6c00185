//! Which memory is there, and which of it is whose.
//!
//! The VMM hands over a memory map (PVH, `hvm_memmap_table_entry`). The guest's image, its tables and its buffers are
//! taken from it; what is left is the working set, numbered from page 0 whatever holes lie in between.

use crate::page::PAGE_BYTES;

/// Pieces of memory that are kept at most. VMMs give two or three; more are ignored.
pub const MOST_EXTENTS: usize = 16;

/// Below this lie the firmware's, the VMM's and the boot protocol's own things.
const LOWEST: u64 = 0x10_0000;

/// Memory from `start` to before `end`, whole pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Extent {
    /// First byte.
    pub start: u64,
    /// First byte after it.
    pub end: u64,
}

/// Free memory.
#[derive(Clone, Debug, Default)]
pub struct Ram {
    extents: [Extent; MOST_EXTENTS],
    len: usize,
}

impl Ram {
    /// The free pieces, lowest first.
    pub fn extents(&self) -> &[Extent] {
        &self.extents[..self.len]
    }

    /// Adds a piece of the memory map, cut to whole pages and to what lies above 1 MiB. Nonsense is ignored.
    pub fn add(&mut self, start: u64, bytes: u64) {
        let Some(end) = start.checked_add(bytes) else { return };
        let start = start.max(LOWEST).next_multiple_of(PAGE_BYTES);
        let end = end / PAGE_BYTES * PAGE_BYTES;
        if start >= end || self.len == MOST_EXTENTS || self.extents().iter().any(|e| start < e.end && e.start < end) {
            return;
        }
        let at = self.extents().iter().position(|e| e.start > start).unwrap_or(self.len);
        self.extents.copy_within(at..self.len, at + 1);
        self.extents[at] = Extent { start, end };
        self.len += 1;
    }

    /// Takes `start` to before `end` out, whoever it belongs to.
    pub fn remove(&mut self, start: u64, end: u64) {
        let mut left = Self::default();
        for e in self.extents() {
            left.add(e.start, start.clamp(e.start, e.end) - e.start);
            let rest = end.clamp(e.start, e.end).next_multiple_of(PAGE_BYTES);
            left.add(rest, e.end.saturating_sub(rest));
        }
        *self = left;
    }

    /// Takes `bytes`, page-aligned, from the lowest piece that has them below `limit`.
    pub fn take(&mut self, bytes: u64, limit: u64) -> Option<u64> {
        let bytes = bytes.checked_next_multiple_of(PAGE_BYTES)?;
        let extent = self.extents[..self.len]
            .iter_mut()
            .find(|e| e.end.min(limit).checked_sub(e.start).is_some_and(|room| room >= bytes))?;
        let taken = extent.start;
        extent.start += bytes;
        Some(taken)
    }

    /// How many free pages there are.
    pub fn pages(&self) -> u64 {
        self.extents().iter().map(|e| (e.end - e.start) / PAGE_BYTES).sum()
    }

    /// The address of free page `number`, or `None` past the last.
    #[inline]
    pub fn address(&self, number: u64) -> Option<u64> {
        let mut offset = number * PAGE_BYTES;
        for e in self.extents() {
            if offset < e.end - e.start {
                return Some(e.start + offset);
            }
            offset -= e.end - e.start;
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn typical() -> Ram {
        let mut ram = Ram::default();
        ram.add(4096 * MIB, 1024 * MIB);
        ram.add(0, 0x9fc00);
        ram.add(MIB, 3071 * MIB);
        ram
    }

    #[test]
    fn pages_are_numbered_across_holes() {
        let ram = typical();
        assert_eq!(ram.extents().len(), 2);
        assert_eq!(ram.pages(), 4095 * 256);
        assert_eq!(ram.address(0), Some(MIB));
        assert_eq!(ram.address(3071 * 256 - 1), Some(3072 * MIB - 4096));
        assert_eq!(ram.address(3071 * 256), Some(4096 * MIB));
        assert_eq!(ram.address(4095 * 256), None);
    }

    #[test]
    fn what_is_taken_is_not_free() {
        let mut ram = typical();
        ram.remove(MIB, 2 * MIB + 5);
        assert_eq!(ram.extents()[0].start, 2 * MIB + 4096);
        ram.remove(16 * MIB, 17 * MIB);
        assert_eq!(ram.extents().len(), 3);
        assert_eq!(ram.pages(), 4093 * 256 - 1);
        assert_eq!(ram.take(20 * MIB, 4096 * MIB), Some(17 * MIB), "the first piece is too small");
        assert_eq!(ram.take(1, 4096 * MIB), Some(2 * MIB + 4096));
        assert_eq!(ram.take(4000 * MIB, 4096 * MIB), None);
        ram.remove(0, u64::MAX);
        assert_eq!(ram.pages(), 0);
    }

    #[test]
    fn nonsense_in_the_map_is_ignored() {
        let mut ram = typical();
        let before = ram.pages();
        ram.add(u64::MAX - 10, 100);
        ram.add(2 * MIB, 8 * MIB);
        ram.add(8192 * MIB, 0);
        ram.add(8192 * MIB + 1, 4096);
        assert_eq!(ram.pages(), before);
        for i in 0..100 {
            ram.add((10_000 + i) * 1024 * MIB, MIB);
        }
        assert_eq!(ram.extents().len(), MOST_EXTENTS);
    }
}
