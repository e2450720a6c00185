//! Guest memory as the migration sees it: regions of RAM, their pages numbered densely, and chunks of pages.
//!
//! A page's index is its place in the sequence of all RAM pages in order of guest address, holes left out. So an
//! index is meaningful only together with the [`RamLayout`] that both sides agreed on in the offer, and a peer's
//! index can be checked with one comparison.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Size of a page in bytes. The guest's own page size does not matter: this is the grain of the dirty log.
pub const PAGE_BYTES: u64 = 4096;
/// The same, where a length of a buffer is meant.
pub const PAGE_SIZE: usize = 4096;
/// Pages in one chunk: 2 MiB of guest memory, and one bit of two bitmaps each in a chunk's header.
pub const CHUNK_PAGES: u64 = 512;
/// The most regions of RAM that a VM may have.
pub const MAX_REGIONS: usize = 64;
/// The most RAM that a VM may have, in bytes (16 TiB). Keeps every page count and byte count far from overflow.
pub const MAX_RAM_BYTES: u64 = 1 << 44;

/// One region of guest RAM, contiguous in guest-physical addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RamRegion {
    /// Guest-physical address of the first byte; a multiple of [`PAGE_BYTES`].
    pub gpa: u64,
    /// Length in bytes; a multiple of [`PAGE_BYTES`], not zero.
    pub bytes: u64,
}

/// All RAM of a VM: validated regions, in order of guest-physical address, without overlap.
///
/// Both sides build it from the same description, so it is part of the protocol: see `docs/migration-protocol.md`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "Vec<RamRegion>", into = "Vec<RamRegion>")]
pub struct RamLayout {
    regions: Vec<RamRegion>,
    /// Index of the first page of each region.
    starts: Vec<u64>,
    pages: u64,
}

/// Why a list of regions is no [`RamLayout`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LayoutError {
    /// No region, or more than [`MAX_REGIONS`].
    #[error("{0} regions of RAM; 1 to {MAX_REGIONS} are possible")]
    Count(usize),
    /// A region that is empty or not made of whole pages.
    #[error("RAM region {0} is empty or not made of whole pages: {1}")]
    Unaligned(usize, RamRegion),
    /// A region that starts below the end of the one before it.
    #[error("RAM region {0} overlaps the one before it or is out of order: {1}")]
    Order(usize, RamRegion),
    /// More RAM than [`MAX_RAM_BYTES`], or an address beyond 64 bits.
    #[error("RAM region {0} goes beyond what is possible: {1}")]
    TooBig(usize, RamRegion),
}

impl fmt::Display for RamRegion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x} bytes at {:#x}", self.bytes, self.gpa)
    }
}

impl RamLayout {
    /// Checks and takes the regions.
    pub fn new(regions: Vec<RamRegion>) -> Result<Self, LayoutError> {
        if regions.is_empty() || regions.len() > MAX_REGIONS {
            return Err(LayoutError::Count(regions.len()));
        }
        let mut starts = Vec::with_capacity(regions.len());
        let (mut pages, mut end) = (0u64, 0u64);
        for (index, region) in regions.iter().enumerate() {
            if region.bytes == 0 || region.bytes % PAGE_BYTES != 0 || region.gpa % PAGE_BYTES != 0 {
                return Err(LayoutError::Unaligned(index, *region));
            }
            if region.gpa < end {
                return Err(LayoutError::Order(index, *region));
            }
            end = region.gpa.checked_add(region.bytes).ok_or(LayoutError::TooBig(index, *region))?;
            if region.bytes > MAX_RAM_BYTES - pages * PAGE_BYTES {
                return Err(LayoutError::TooBig(index, *region));
            }
            starts.push(pages);
            pages += region.bytes / PAGE_BYTES;
        }
        Ok(Self { regions, starts, pages })
    }

    /// The regions, in order.
    pub fn regions(&self) -> &[RamRegion] {
        &self.regions
    }

    /// How many pages there are.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// How many bytes of RAM there are.
    pub fn bytes(&self) -> u64 {
        self.pages * PAGE_BYTES
    }

    /// How many chunks cover all pages; the last one may be shorter.
    pub fn chunks(&self) -> u64 {
        self.pages.div_ceil(CHUNK_PAGES)
    }

    /// How many pages the chunk has: [`CHUNK_PAGES`] for all but perhaps the last one, 0 beyond the end.
    pub fn chunk_pages(&self, chunk: u64) -> u64 {
        self.pages.saturating_sub(chunk.saturating_mul(CHUNK_PAGES)).min(CHUNK_PAGES)
    }

    /// Index of the first page of the region with this number.
    pub fn region_start(&self, region: usize) -> Option<u64> {
        self.starts.get(region).copied()
    }

    /// The pieces of a run of pages that each lie in one region, in order. A chunk, and so a run, may span regions.
    ///
    /// Pages beyond the end of RAM are left out.
    pub fn pieces(&self, run: PageRun) -> impl Iterator<Item = Piece> + '_ {
        let mut at = run.first.min(self.pages);
        let end = run.first.saturating_add(run.pages).min(self.pages);
        let mut region = self.starts.partition_point(|start| *start <= at).saturating_sub(1);
        std::iter::from_fn(move || {
            if at >= end {
                return None;
            }
            let region_end = self.starts[region] + self.regions[region].bytes / PAGE_BYTES;
            let pages = end.min(region_end) - at;
            let piece = Piece { region, first: at - self.starts[region], pages };
            at += pages;
            region += 1;
            Some(piece)
        })
    }
}

impl TryFrom<Vec<RamRegion>> for RamLayout {
    type Error = LayoutError;
    fn try_from(regions: Vec<RamRegion>) -> Result<Self, LayoutError> {
        Self::new(regions)
    }
}

impl From<RamLayout> for Vec<RamRegion> {
    fn from(layout: RamLayout) -> Self {
        layout.regions
    }
}

/// Pages that follow one another, by index.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PageRun {
    /// Index of the first page.
    pub first: u64,
    /// How many; at least 1.
    pub pages: u64,
}

impl PageRun {
    /// Length in bytes.
    pub fn bytes(&self) -> u64 {
        self.pages * PAGE_BYTES
    }
}

/// The part of a [`PageRun`] in one region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Number of the region in [`RamLayout::regions`].
    pub region: usize,
    /// First page, counted from the region's own start.
    pub first: u64,
    /// How many pages.
    pub pages: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn region(gpa: u64, bytes: u64) -> RamRegion {
        RamRegion { gpa, bytes }
    }

    #[test]
    fn numbers_pages_across_the_hole() {
        let layout = RamLayout::new(vec![region(0, 3 * 4096), region(0x10_0000, 2 * 4096)]).unwrap();
        assert_eq!((layout.pages(), layout.bytes(), layout.chunks()), (5, 5 * 4096, 1));
        assert_eq!(layout.region_start(1), Some(3));
        let pieces: Vec<_> = layout.pieces(PageRun { first: 1, pages: 100 }).collect();
        assert_eq!(pieces, [Piece { region: 0, first: 1, pages: 2 }, Piece { region: 1, first: 0, pages: 2 }]);
        assert_eq!(layout.pieces(PageRun { first: 3, pages: 1 }).count(), 1);
        assert_eq!(layout.pieces(PageRun { first: 5, pages: 1 }).count(), 0);
        assert_eq!(layout.pieces(PageRun { first: u64::MAX, pages: u64::MAX }).count(), 0);
        assert_eq!((layout.chunk_pages(0), layout.chunk_pages(1), layout.chunk_pages(u64::MAX)), (5, 0, 0));
    }

    #[test]
    fn refuses_every_hostile_layout() {
        assert!(matches!(RamLayout::new(vec![]), Err(LayoutError::Count(0))));
        let many = (0..65).map(|n| region(n * 8192, 4096)).collect();
        assert!(matches!(RamLayout::new(many), Err(LayoutError::Count(65))));
        for bad in [region(0, 0), region(0, 4095), region(1, 4096)] {
            assert!(matches!(RamLayout::new(vec![bad]), Err(LayoutError::Unaligned(0, _))), "{bad}");
        }
        let overlap = vec![region(0, 8192), region(4096, 4096)];
        assert!(matches!(RamLayout::new(overlap), Err(LayoutError::Order(1, _))));
        let beyond = vec![region(u64::MAX - 4095, 4096)];
        assert!(matches!(RamLayout::new(beyond), Err(LayoutError::TooBig(0, _))));
        assert!(matches!(RamLayout::new(vec![region(0, MAX_RAM_BYTES + 4096)]), Err(LayoutError::TooBig(0, _))));
        assert!(serde_json::from_str::<RamLayout>(r#"[{"gpa":1,"bytes":4096}]"#).is_err());
        let layout: RamLayout = serde_json::from_str(r#"[{"gpa":0,"bytes":4096}]"#).unwrap();
        assert_eq!(serde_json::to_string(&layout).unwrap(), r#"[{"gpa":0,"bytes":4096}]"#);
    }
}
