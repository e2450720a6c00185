//! Giving guest memory back to the host.
//!
//! Guest memory is private and anonymous, so a page that is given back reads as zeros, and whoever asks the page table finds it
//! untouched (see [`crate::host::touched`]).
#![allow(unsafe_code)] // madvise takes addresses of guest memory

use std::io;

use vm_memory::bitmap::Bitmap;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress};

use super::{GuestMemoryMmap, PAGE_BYTES};

/// Gives back the whole pages that lie in the `bytes` from `start` on and in guest memory; what else is in the range stays as it is.
///
/// The pages count as the VMM's own writes, and are marked *after* they have become zeros: whoever collects the bitmap clears a bit
/// and then reads the page, so it reads zeros or finds the page in the bitmap once more. While no dirty log runs nobody looks at
/// the bits, and [`DirtyLog::start`](super::dirty::DirtyLog::start) forgets them: then they cost an atomic operation a page, and no more.
pub fn pages(memory: &GuestMemoryMmap, start: GuestAddress, bytes: u64) -> io::Result<()> {
    let end = start.0.saturating_add(bytes) / PAGE_BYTES * PAGE_BYTES;
    let Some(start) = start.0.checked_next_multiple_of(PAGE_BYTES) else { return Ok(()) };
    for region in memory.iter() {
        let first = region.start_addr().0;
        let (from, to) = (start.max(first), end.min(first + region.len()));
        if from >= to {
            continue;
        }
        let piece = region
            .get_slice(MemoryRegionAddress(from - first), (to - from) as usize)
            .expect("the piece was clipped to the region");
        // SAFETY: the piece is whole pages of guest memory, which is mapped as long as `memory` is and which nobody holds
        // references to. The advice changes what they hold, as any write of the guest's may at any time, and not the mapping.
        let result = unsafe { libc::madvise(piece.ptr_guard_mut().as_ptr().cast(), piece.len(), libc::MADV_DONTNEED) };
        let error = (result != 0).then(io::Error::last_os_error);
        // Also after a failure, before which some pages may have become zeros.
        piece.bitmap().mark_dirty(0, piece.len());
        if let Some(error) = error {
            return Err(error);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};

    use vm_memory::Bytes;

    use super::*;
    use crate::host::touched::Touched;

    const PAGES: u64 = 8;
    /// Of the second region. Between the two is a hole.
    const SECOND: u64 = 1 << 20;

    /// Two regions of eight pages with content everywhere.
    fn memory() -> Arc<GuestMemoryMmap> {
        let bytes = (PAGES * PAGE_BYTES) as usize;
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), bytes), (GuestAddress(SECOND), bytes)]).unwrap();
        for at in [0, SECOND] {
            memory.write_slice(&vec![0xa5; bytes], GuestAddress(at)).unwrap();
        }
        bitmaps(&memory);
        Arc::new(memory)
    }

    /// One bit a page; the bitmaps are clear afterwards.
    fn bitmaps(memory: &GuestMemoryMmap) -> [u64; 2] {
        let all: Vec<u64> = memory.iter().map(|r| vm_memory::MmapRegion::bitmap(r).get_and_reset()[0]).collect();
        all.try_into().unwrap()
    }

    /// The pages that were touched, one bit each, without touching any.
    fn touched(memory: &GuestMemoryMmap) -> [u64; 2] {
        let look = |region: &vm_memory::GuestRegionMmap<_>| {
            let (mut bits, mut page) = (0, 0);
            let note = |touched| {
                bits |= u64::from(touched) << page;
                page += 1;
            };
            Touched::open().look(region.as_ptr(), PAGES, note).unwrap();
            bits
        };
        memory.iter().map(look).collect::<Vec<u64>>().try_into().unwrap()
    }

    #[test]
    fn whole_pages_become_untouched_and_zero_and_are_marked_and_their_neighbours_stay() {
        let memory = memory();
        // From within page 1 to within page 5.
        pages(&memory, GuestAddress(PAGE_BYTES + 1), 4 * PAGE_BYTES).unwrap();
        assert_eq!(touched(&memory), [0b1110_0011, 0xff]);
        assert_eq!(bitmaps(&memory), [0b0001_1100, 0]);
        let mut content = vec![0; (PAGES * PAGE_BYTES) as usize];
        memory.read_slice(&mut content, GuestAddress(0)).unwrap();
        for (page, bytes) in content.chunks(PAGE_BYTES as usize).enumerate() {
            let wanted = if (2..5).contains(&page) { 0 } else { 0xa5 };
            assert!(bytes.iter().all(|byte| *byte == wanted), "page {page}");
        }
    }

    /// As a migration does, while pages are given back: whoever copies what the bitmap names ends with what is there.
    #[test]
    fn a_copy_that_follows_the_bitmap_is_right_in_the_end() {
        let bytes = (PAGES * PAGE_BYTES) as usize;
        for round in 1..=1000_u32 {
            let memory = memory();
            let (mut copied, over) = (vec![0xa5; bytes], AtomicBool::new(false));
            std::thread::scope(|scope| {
                let follower = scope.spawn(|| {
                    while !over.load(Ordering::Acquire) {
                        follow(&memory, &mut copied);
                    }
                });
                for page in 0..PAGES {
                    pages(&memory, GuestAddress(page * PAGE_BYTES), PAGE_BYTES).unwrap();
                }
                over.store(true, Ordering::Release);
                follower.join().unwrap();
            });
            follow(&memory, &mut copied);
            assert!(copied.iter().all(|byte| *byte == 0), "round {round}");
        }
    }

    /// Copies the pages of the first region that are marked, and clears their marks before.
    fn follow(memory: &GuestMemoryMmap, copied: &mut [u8]) {
        let marked = bitmaps(memory)[0];
        for (page, copy) in
            copied.chunks_mut(PAGE_BYTES as usize).enumerate().filter(|(page, _)| marked >> page & 1 == 1)
        {
            memory.read_slice(copy, GuestAddress(page as u64 * PAGE_BYTES)).unwrap();
        }
    }

    #[test]
    fn only_guest_memory_is_given_back() {
        let last = PAGES - 1;
        // (start, bytes), and which pages of the regions are touched afterwards.
        for (start, bytes, wanted) in [
            (last * PAGE_BYTES, SECOND, [0x7f, 0b1000_0000]),
            (last * PAGE_BYTES, u64::MAX, [0x7f, 0]),
            (PAGES * PAGE_BYTES, SECOND - PAGES * PAGE_BYTES, [0xff, 0xff]),
            (SECOND - 1, PAGE_BYTES + 1, [0xff, 0b1111_1110]),
            (SECOND - 1, PAGE_BYTES, [0xff, 0xff]),
            (SECOND + PAGES * PAGE_BYTES, u64::MAX, [0xff, 0xff]),
            (u64::MAX, 1, [0xff, 0xff]),
            (u64::MAX - 5, u64::MAX, [0xff, 0xff]),
            (0, 0, [0xff, 0xff]),
            (0, PAGE_BYTES - 1, [0xff, 0xff]),
            (1, PAGE_BYTES, [0xff, 0xff]),
            (0, u64::MAX, [0, 0]),
        ] {
            let memory = memory();
            pages(&memory, GuestAddress(start), bytes).unwrap();
            assert_eq!(touched(&memory), wanted, "{bytes} bytes from {start:#x} on");
            assert_eq!(bitmaps(&memory), wanted.map(|bits| !bits & 0xff), "{bytes} bytes from {start:#x} on");
        }
    }
}
