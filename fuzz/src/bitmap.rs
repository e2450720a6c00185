//! Layouts of RAM, bitmaps of its pages and runs of them: all agree with sets of page numbers.

use std::collections::BTreeSet;

use arbitrary::Unstructured;
use migrator::bitmap::{Bitmap, CHUNK_WORDS, ChunkBits};
use migrator::layout::{CHUNK_PAGES, MAX_RAM_BYTES, PAGE_BYTES, PageRun, RamLayout, RamRegion};

pub fn run(data: &[u8]) {
    let mut u = Unstructured::new(data);
    let _ = match u.arbitrary::<u8>().map(|mode| mode % 3) {
        Ok(0) => layout(&mut u),
        Ok(1) => bitmap(&mut u),
        Ok(_) => chunk(&mut u),
        Err(error) => Err(error),
    };
}

/// Regions as a peer offers them.
fn layout(u: &mut Unstructured<'_>) -> arbitrary::Result<()> {
    let mut regions = Vec::new();
    let mut end = 0u64;
    for _ in 0..u.int_in_range(0..=70)? {
        let gpa: u64 = match u.arbitrary::<u8>()? % 4 {
            0 => u.arbitrary()?,
            1 => end,
            _ => end.wrapping_add(PAGE_BYTES * u64::from(u.arbitrary::<u16>()?)),
        };
        let bytes: u64 = match u.arbitrary::<u8>()? % 4 {
            0 => u.arbitrary()?,
            1 => MAX_RAM_BYTES.wrapping_sub(end),
            _ => PAGE_BYTES * u64::from(u.arbitrary::<u16>()?),
        };
        end = gpa.wrapping_add(bytes);
        regions.push(RamRegion { gpa, bytes });
    }
    let Ok(layout) = RamLayout::new(regions.clone()) else { return Ok(()) };
    assert!((1..=64).contains(&regions.len()) && layout.bytes() <= MAX_RAM_BYTES);
    assert_eq!(layout.bytes(), regions.iter().map(|region| region.bytes).sum::<u64>());
    let json = serde_json::to_vec(&layout).unwrap();
    assert_eq!(serde_json::from_slice::<RamLayout>(&json).unwrap(), layout);
    let run = PageRun { first: u.arbitrary()?, pages: u.arbitrary()? };
    let pieces: Vec<_> = layout.pieces(run).collect();
    let expected = run.first.saturating_add(run.pages).min(layout.pages()).saturating_sub(run.first);
    assert_eq!(pieces.iter().map(|piece| piece.pages).sum::<u64>(), expected);
    let mut next = run.first;
    for piece in pieces {
        assert_eq!(layout.region_start(piece.region).unwrap() + piece.first, next);
        assert!((piece.first + piece.pages) * PAGE_BYTES <= layout.regions()[piece.region].bytes);
        next += piece.pages;
    }
    let chunk = u.arbitrary()?;
    let pages = (0..CHUNK_PAGES)
        .filter(|page| u128::from(chunk) * u128::from(CHUNK_PAGES) + u128::from(*page) < u128::from(layout.pages()));
    assert_eq!(layout.chunk_pages(chunk), pages.count() as u64);
    Ok(())
}

/// What is set in any order and by any way is set, and nothing else.
fn bitmap(u: &mut Unstructured<'_>) -> arbitrary::Result<()> {
    let pages = u64::from(u.int_in_range(0..=2000u16)?);
    let mut bitmap = Bitmap::new(pages);
    let mut model = BTreeSet::new();
    while !u.is_empty() {
        let page: u64 = if u.ratio(1, 16)? { u.arbitrary()? } else { u.int_in_range(0..=2100u16)?.into() };
        match u.arbitrary::<u8>()? % 8 {
            0..=3 => {
                bitmap.set(page);
                model.insert(page);
            }
            4 => {
                bitmap.clear();
                model.clear();
            }
            5 => {
                bitmap.or(&Bitmap::full(pages));
                model.extend(0..pages);
            }
            _ => {
                let words: Vec<u64> = (0..u.int_in_range(0..=4)?).map(|_| u.arbitrary()).collect::<Result<_, _>>()?;
                let span = u.arbitrary::<u16>()?.into();
                bitmap.or_words(page, span, &words);
                let set = (0..span.min(words.len() as u64 * 64))
                    .filter(|bit| words[(bit / 64) as usize] >> (bit % 64) & 1 == 1)
                    .filter_map(|bit| page.checked_add(bit));
                model.extend(set);
            }
        }
        model.retain(|page| *page < pages);
    }
    assert_eq!(bitmap.count(), model.len() as u64);
    assert!(model.iter().all(|page| bitmap.get(*page)));
    let chunks = pages.div_ceil(CHUNK_PAGES);
    let runs = (0..chunks + 2).flat_map(|chunk| bitmap.chunk(chunk).runs(chunk * CHUNK_PAGES));
    assert!(runs.flat_map(|run| run.first..run.first + run.pages).eq(model.iter().copied()));
    assert!(bitmap.chunk(u64::MAX).is_empty());
    Ok(())
}

/// Sets of the pages of one chunk.
fn chunk(u: &mut Unstructured<'_>) -> arbitrary::Result<()> {
    let words = |u: &mut Unstructured<'_>| u.arbitrary::<[u64; CHUNK_WORDS]>().map(ChunkBits);
    let set = |bits: &ChunkBits| (0..CHUNK_PAGES).filter(|page| bits.get(*page)).collect::<BTreeSet<_>>();
    let (a, b) = (words(u)?, words(u)?);
    let (in_a, in_b) = (set(&a), set(&b));
    assert_eq!(set(&a.and(&b)), &in_a & &in_b);
    assert_eq!(set(&a.minus(&b)), &in_a - &in_b);
    assert_eq!((a.count(), a.is_empty()), (in_a.len() as u64, in_a.is_empty()));
    let runs: Vec<_> = a.runs(0).collect();
    assert!(runs.windows(2).all(|two| two[0].first + two[0].pages < two[1].first), "runs that touch are one");
    assert!(runs.iter().flat_map(|run| run.first..run.first + run.pages).eq(in_a));
    let pages = u.arbitrary()?;
    assert_eq!(ChunkBits::full(pages).count(), pages.min(CHUNK_PAGES));
    Ok(())
}
