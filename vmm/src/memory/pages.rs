//! Bulk access to guest memory by page number, for whoever moves or hashes it.
//!
//! Pages are counted densely over the RAM regions in address order: page 0 is the first of the first region, and the numbers go
//! on without a gap over the device hole. The guest may run meanwhile: two reads of a page may differ, so nothing here reads a
//! page twice and relies on the same bytes, and no reference to guest memory is ever formed.
#![allow(unsafe_code)] // writev, recvmsg and madvise take addresses of guest memory

use std::arch::x86_64::{
    __m128i, _MM_HINT_T0, _mm_cmpeq_epi8, _mm_movemask_epi8, _mm_or_si128, _mm_prefetch, _mm_setzero_si128,
};
use std::io::{self, ErrorKind};
use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd};

use vm_memory::bitmap::{Bitmap, MS};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress, VolatileSlice};

use super::{GuestMemoryMmap, PAGE_BYTES, SharedMemory};
use crate::host::touched::Touched;

/// The most vectors of one system call (IOV_MAX on Linux).
const MAX_VECTORS: usize = 1024;
/// Runs shorter than this are looked at page by page: asking the page table would cost more.
const WORTH_ASKING: u64 = 16;
/// What one entry of a middle page table maps on x86-64.
const HUGE_PAGE_BYTES: usize = 2 << 20;

/// How far ahead of the page that is looked at another one is fetched: caches do so by themselves only within a page.
const PREFETCH_BYTES: usize = 16 * PAGE_BYTES as usize;

/// What is in a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Content {
    /// It was never touched, and so reads as zeros.
    Untouched,
    /// It was touched, and reads as zeros.
    Zeros,
    /// Something else.
    Other,
}

/// A piece of what is written to a stream.
#[derive(Debug, Clone)]
pub enum Part<'a> {
    /// Bytes of the caller's.
    Bytes(&'a [u8]),
    /// Guest pages, by number.
    Pages(Range<u64>),
}

/// Guest memory as an array of pages.
#[derive(Clone)]
pub struct Pages {
    memory: SharedMemory,
    touched: Touched,
    count: u64,
}

type Slice<'a> = VolatileSlice<'a, MS<'a, GuestMemoryMmap>>;

impl Pages {
    /// All pages of `memory`.
    pub fn new(memory: SharedMemory, touched: Touched) -> Self {
        let count = memory.iter().map(|region| region.len()).sum::<u64>() / PAGE_BYTES;
        Pages { memory, touched, count }
    }

    /// How many there are.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// The pieces of memory that hold `run`: one, or two where it crosses the device hole.
    fn slices(&self, run: &Range<u64>) -> io::Result<impl Iterator<Item = Slice<'_>> + use<'_>> {
        if run.start > run.end || run.end > self.count {
            let message = format!("pages {}..{} are not in a guest of {} pages", run.start, run.end, self.count);
            return Err(io::Error::new(ErrorKind::InvalidInput, message));
        }
        let (wanted_start, wanted_end) = (run.start * PAGE_BYTES, run.end * PAGE_BYTES);
        let mut region_start = 0;
        Ok(self.memory.iter().filter_map(move |region| {
            let start = wanted_start.max(region_start);
            let end = wanted_end.min(region_start + region.len());
            let offset = start - region_start.min(start);
            region_start += region.len();
            (start < end).then(|| {
                region
                    .get_slice(MemoryRegionAddress(offset), (end - start) as usize)
                    .expect("the piece was clipped to the region")
            })
        }))
    }

    /// Writes all of `parts` to `to` (blocking), in order, with as few system calls as the kernel allows.
    pub fn write_to(&self, parts: &[Part<'_>], to: BorrowedFd<'_>) -> io::Result<()> {
        let mut vectors = Vec::with_capacity(parts.len());
        for part in parts {
            match part {
                Part::Bytes(bytes) => {
                    vectors.push(libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() });
                }
                Part::Pages(run) => vectors.extend(self.slices(run)?.map(|slice| libc::iovec {
                    iov_base: slice.ptr_guard().as_ptr().cast_mut().cast(),
                    iov_len: slice.len(),
                })),
            }
        }
        // SAFETY: the vectors are borrowed bytes, and guest memory, which `self` keeps mapped; the kernel only reads them.
        transfer(&mut vectors, |part| unsafe { libc::writev(to.as_raw_fd(), part.as_ptr(), part.len() as i32) })
    }

    /// Fills the pages of `runs`, then `tail`, from the socket `from` (blocking).
    pub fn read_from(&self, runs: &[Range<u64>], tail: &mut [u8], from: BorrowedFd<'_>) -> io::Result<()> {
        let mut vectors = Vec::with_capacity(runs.len() + 1);
        for run in runs {
            self.expect(run)?;
            vectors.extend(
                self.slices(run)?
                    .map(|slice| libc::iovec { iov_base: slice.ptr_guard_mut().as_ptr().cast(), iov_len: slice.len() }),
            );
        }
        vectors.push(libc::iovec { iov_base: tail.as_mut_ptr().cast(), iov_len: tail.len() });
        transfer(&mut vectors, |part| {
            // SAFETY: all zeros is a message header without anything.
            let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
            (message.msg_iov, message.msg_iovlen) = (part.as_ptr().cast_mut(), part.len());
            // Waiting for all of it saves a wake-up and a system call for every few segments.
            // SAFETY: the vectors are `tail`, borrowed, and guest memory, which `self` keeps mapped and nobody holds references to.
            unsafe { libc::recvmsg(from.as_raw_fd(), &raw mut message, libc::MSG_WAITALL) }
        })?;
        for run in runs {
            self.slices(run)?.for_each(|slice| slice.bitmap().mark_dirty(0, slice.len()));
        }
        Ok(())
    }

    /// Copies the pages from `first` on into `buffer` (whole pages).
    pub fn copy_out(&self, first: u64, buffer: &mut [u8]) -> io::Result<()> {
        let mut rest = buffer;
        for slice in self.slices(&(first..first + rest.len() as u64 / PAGE_BYTES))? {
            let (now, later) = rest.split_at_mut(slice.len());
            slice.copy_to(now);
            rest = later;
        }
        Ok(())
    }

    /// Overwrites the pages from `first` on with `bytes` (whole pages).
    pub fn copy_in(&self, first: u64, bytes: &[u8]) -> io::Result<()> {
        let (run, mut rest) = (first..first + bytes.len() as u64 / PAGE_BYTES, bytes);
        for slice in self.slices(&run)? {
            let (now, later) = rest.split_at(slice.len());
            slice.copy_from(now);
            rest = later;
        }
        Ok(())
    }

    /// Whether page `page` reads as zeros now.
    pub fn is_zero(&self, page: u64) -> io::Result<bool> {
        let mut slices = self.slices(&(page..page + 1))?;
        // SAFETY: the slice is a page of guest memory, which `self` keeps mapped.
        Ok(slices.all(|slice| unsafe { reads_as_zeros(slice.ptr_guard().as_ptr()) }))
    }

    /// Calls `found` for each page of `run` that reads as zeros now, in order.
    pub fn find_zero(&self, run: Range<u64>, mut found: impl FnMut(u64)) -> io::Result<()> {
        self.look(&run, |page, content| {
            if content != Content::Other {
                found(page);
            }
            Ok(())
        })
    }

    /// Makes the pages of `run` zero; those that are zero already stay untouched and so cost no memory.
    pub fn clear(&self, run: Range<u64>) -> io::Result<()> {
        const ZEROS: [u8; PAGE_BYTES as usize] = [0; PAGE_BYTES as usize];
        self.look(&run, |page, content| match content {
            Content::Other => self.copy_in(page, &ZEROS),
            Content::Untouched | Content::Zeros => Ok(()),
        })
    }

    /// Calls `each` for each page of `run`, in order, with what is in it now.
    fn look(&self, run: &Range<u64>, mut each: impl FnMut(u64, Content) -> io::Result<()>) -> io::Result<()> {
        let mut page = run.start;
        let short = run.end - run.start.min(run.end) < WORTH_ASKING;
        for slice in self.slices(run)? {
            let count = slice.len() as u64 / PAGE_BYTES;
            let guard = slice.ptr_guard();
            let mut at = guard.as_ptr();
            let mut result = Ok(());
            let one = |touched| {
                // SAFETY: every x86-64 has it; where nothing is mapped it does nothing.
                unsafe { _mm_prefetch::<_MM_HINT_T0>(at.wrapping_add(PREFETCH_BYTES).cast()) };
                if result.is_ok() {
                    let content = match touched {
                        false => Content::Untouched,
                        // SAFETY: `at` goes through the pages of the slice, guest memory that `self` keeps mapped.
                        true if unsafe { reads_as_zeros(at) } => Content::Zeros,
                        true => Content::Other,
                    };
                    result = each(page, content);
                }
                page += 1;
                at = at.wrapping_add(PAGE_BYTES as usize);
            };
            match short {
                true => std::iter::repeat_n(true, count as usize).for_each(one),
                false => self.touched.look(guard.as_ptr(), count, one)?,
            }
            result?;
        }
        Ok(())
    }

    /// All pages of `run` are about to be overwritten. Where that is the whole of a huge page of which nothing was touched, it
    /// may be had in one piece: one fault instead of 512, and memory that the guest's page walks get through faster.
    pub fn expect(&self, run: &Range<u64>) -> io::Result<()> {
        for slice in self.slices(run)? {
            let (start, guard) = (slice.ptr_guard().as_ptr() as usize, slice.ptr_guard_mut());
            let first = start.next_multiple_of(HUGE_PAGE_BYTES) - start;
            let whole = slice.len().saturating_sub(first) / HUGE_PAGE_BYTES;
            for offset in (0..whole).map(|n| first + n * HUGE_PAGE_BYTES) {
                let piece = guard.as_ptr().wrapping_byte_add(offset);
                let mut any = false;
                self.touched.look(piece, HUGE_PAGE_BYTES as u64 / PAGE_BYTES, |touched| any |= touched)?;
                if !any {
                    // A hint: without transparent huge pages it fails, and nothing is lost.
                    // SAFETY: `piece` lies in guest memory; MADV_HUGEPAGE changes nothing that can be read there.
                    unsafe { libc::madvise(piece.cast(), HUGE_PAGE_BYTES, libc::MADV_HUGEPAGE) };
                }
            }
        }
        Ok(())
    }
}

/// Whether a page reads as zeros now. Ends at the first piece that does not. Nearly as fast as one core reads, which words of eight bytes
/// are not.
///
/// # Safety
///
/// A page of mapped memory begins at `page`. Others may write to it meanwhile.
unsafe fn reads_as_zeros(page: *const u8) -> bool {
    /// Vectors that are looked at together: two cache lines.
    const PIECE: usize = 8;
    const VECTORS: usize = PAGE_BYTES as usize / size_of::<__m128i>();
    let vectors = page.cast::<__m128i>();
    (0..VECTORS).step_by(PIECE).all(|piece| {
        // SAFETY: within the page, which is aligned. Volatile, because the guest may write it.
        let vector = |n| unsafe { vectors.add(piece + n).read_volatile() };
        // SAFETY: every x86-64 has SSE2.
        unsafe {
            let all = (1..PIECE).fold(vector(0), |all, n| _mm_or_si128(all, vector(n)));
            _mm_movemask_epi8(_mm_cmpeq_epi8(all, _mm_setzero_si128())) == 0xffff
        }
    })
}

/// Repeats `call` until all of `vectors` went through, stepping over what each call has done.
fn transfer(vectors: &mut [libc::iovec], mut call: impl FnMut(&[libc::iovec]) -> isize) -> io::Result<()> {
    let mut rest = vectors;
    while !rest.is_empty() {
        let done = call(&rest[..rest.len().min(MAX_VECTORS)]);
        let mut done = match done {
            0 if rest.iter().any(|v| v.iov_len > 0) => return Err(ErrorKind::UnexpectedEof.into()),
            0.. => done as usize,
            _ => match io::Error::last_os_error() {
                e if e.kind() == ErrorKind::Interrupted => continue,
                e => return Err(e),
            },
        };
        let whole = rest
            .iter()
            .take_while(|v| {
                let fits = v.iov_len <= done;
                done -= if fits { v.iov_len } else { 0 };
                fits
            })
            .count();
        rest = &mut rest[whole..];
        if let Some(part) = rest.first_mut().filter(|_| done > 0) {
            part.iov_base = part.iov_base.wrapping_byte_add(done);
            part.iov_len -= done;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    use vm_memory::GuestAddress;

    use super::*;

    /// Three pages, a hole, five pages.
    fn pages() -> Pages {
        let ranges = [(GuestAddress(0), 3 * 4096), (GuestAddress(1 << 20), 5 * 4096)];
        Pages::new(GuestMemoryMmap::from_ranges(&ranges).unwrap().into(), Touched::open())
    }

    #[test]
    fn runs_cross_the_hole_and_arrive_as_sent() {
        let (source, destination) = (pages(), pages());
        for page in 0..8u8 {
            source.copy_in(page.into(), &[page + 1; 4096]).unwrap();
        }
        let (mut a, b) = UnixStream::pair().unwrap();
        let parts = [Part::Bytes(b"head"), Part::Pages(1..5), Part::Pages(7..8), Part::Bytes(b"!")];
        let (runs, mut tail) = ([1..5, 7..8], [0]);
        std::thread::scope(|scope| {
            scope.spawn(|| source.write_to(&parts, b.as_fd()).unwrap());
            let mut head = [0; 4];
            io::Read::read_exact(&mut a, &mut head).unwrap();
            assert_eq!(&head, b"head");
            destination.read_from(&runs, &mut tail, a.as_fd()).unwrap();
            assert_eq!(&tail, b"!");
        });
        let mut all = vec![0; 8 * 4096];
        destination.copy_out(0, &mut all).unwrap();
        let firsts: Vec<u8> = all.chunks(4096).map(|p| p[0]).collect();
        assert_eq!(firsts, [0, 2, 3, 4, 5, 0, 0, 8]);
        let marked: Vec<u64> =
            destination.memory.iter().map(|r| vm_memory::MmapRegion::bitmap(r).get_and_reset()[0]).collect();
        assert_eq!(marked, [0b110, 0b10011], "pages that were read in count as the VMM's own writes");
    }

    #[test]
    fn zero_pages_are_told_from_others() {
        let pages = pages();
        assert!(pages.is_zero(7).unwrap());
        for offset in [0, 1, 2047, 4095] {
            let mut page = [0; 4096];
            page[offset] = 1;
            pages.copy_in(7, &page).unwrap();
            assert!(!pages.is_zero(7).unwrap(), "a byte at {offset}");
        }
        pages.clear(0..8).unwrap();
        assert!(pages.is_zero(7).unwrap());
    }

    #[test]
    fn looking_for_zero_pages_does_not_touch_them() {
        let ranges = [(GuestAddress(0), 64 * 4096), (GuestAddress(1 << 20), 64 * 4096)];
        let memory: SharedMemory = GuestMemoryMmap::from_ranges(&ranges).unwrap().into();
        let pages = Pages::new(memory, Touched::open());
        pages.copy_in(3, &[1; 4096]).unwrap();
        pages.copy_in(70, &[0; 4096]).unwrap();
        let touched = || {
            let mut all = Vec::new();
            let note = |page, content| {
                all.extend((content != Content::Untouched).then_some(page));
                Ok(())
            };
            pages.look(&(0..128), note).unwrap();
            all
        };
        let mut zero = Vec::new();
        pages.find_zero(0..128, |page| zero.push(page)).unwrap();
        assert_eq!(zero, (0..128).filter(|page| *page != 3).collect::<Vec<_>>(), "page 70 was touched, and is zero");
        pages.clear(0..128).unwrap();
        assert_eq!(touched(), [3, 70]);
        // Without a page table to ask, all pages are read.
        let mut zero = 0;
        Pages { touched: Touched::none(), ..pages.clone() }.find_zero(0..128, |_| zero += 1).unwrap();
        assert_eq!(zero, 128);
    }

    #[test]
    fn a_huge_page_is_taken_whole_only_where_nothing_is_lost() {
        const HUGE: u64 = HUGE_PAGE_BYTES as u64 / PAGE_BYTES;
        let memory: SharedMemory =
            GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 6 * HUGE_PAGE_BYTES)]).unwrap().into();
        let pages = Pages::new(memory, Touched::open());
        pages.copy_in(0, &[7; 4096]).unwrap();
        let (mut a, b) = UnixStream::pair().unwrap();
        let content: Vec<u8> = (0..5 * HUGE_PAGE_BYTES).map(|i| (i / 4096 % 251) as u8 + 1).collect();
        std::thread::scope(|scope| {
            scope.spawn(|| io::Write::write_all(&mut a, &[&content[..], &[9]].concat()).unwrap());
            let mut tail = [0];
            pages.read_from(&[1..1 + 5 * HUGE], &mut tail, b.as_fd()).unwrap();
            assert_eq!(tail, [9]);
        });
        let mut all = vec![0; 6 * HUGE_PAGE_BYTES];
        pages.copy_out(0, &mut all).unwrap();
        assert_eq!(all[..4096], [7; 4096]);
        assert!(all[4096..][..content.len()] == content);
        assert!(all[4096 + content.len()..].iter().all(|byte| *byte == 0));
    }

    #[test]
    fn less_than_a_huge_page_asks_for_none() {
        const HUGE: u64 = HUGE_PAGE_BYTES as u64 / PAGE_BYTES;
        let ranges = [(GuestAddress(0), 3 * HUGE_PAGE_BYTES + HUGE_PAGE_BYTES / 2)];
        let pages = Pages::new(GuestMemoryMmap::from_ranges(&ranges).unwrap().into(), Touched::open());
        let slice = pages.slices(&(0..1)).unwrap().next().unwrap();
        let (start, len) = (slice.ptr_guard().as_ptr() as usize, 4 * HUGE_PAGE_BYTES);
        // Whether the kernel was asked for huge pages is in the flags of the mappings.
        let asked = || {
            let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
            let (mut within, mut bytes) = (0, 0);
            for line in maps.lines() {
                let range = line.split(' ').next().unwrap().split_once('-');
                let ends =
                    range.and_then(|(a, b)| usize::from_str_radix(a, 16).ok().zip(usize::from_str_radix(b, 16).ok()));
                if let Some((from, to)) = ends {
                    within = to.min(start + len).saturating_sub(from.max(start));
                } else if line.starts_with("VmFlags:") && line.split_whitespace().any(|flag| flag == "hg") {
                    bytes += within;
                }
            }
            bytes
        };
        // Huge pages lie where the host's addresses are multiples of them.
        let first = (start.next_multiple_of(HUGE_PAGE_BYTES) - start) as u64 / PAGE_BYTES;
        for run in [first..first + 1, first..first + HUGE - 1, pages.count() - HUGE / 2 - 1..pages.count()] {
            pages.expect(&run).unwrap();
            assert_eq!(asked(), 0, "{run:?}");
        }
        pages.expect(&(first..first + HUGE)).unwrap();
        // A kernel without transparent huge pages refuses the hint.
        let most =
            if std::path::Path::new("/sys/kernel/mm/transparent_hugepage").exists() { HUGE_PAGE_BYTES } else { 0 };
        assert_eq!(asked(), most);
    }

    #[test]
    fn pages_outside_memory_are_refused() {
        let pages = pages();
        let (a, _b) = UnixStream::pair().unwrap();
        assert!(pages.is_zero(8).is_err());
        assert!(pages.copy_in(7, &[0; 8192]).is_err());
        assert!(pages.write_to(&[Part::Pages(0..9)], a.as_fd()).is_err());
        assert!(pages.read_from(&[8..9, 0..1], &mut [], a.as_fd()).is_err());
    }

    #[test]
    fn a_peer_that_goes_away_is_an_error() {
        let pages = pages();
        let (a, b) = UnixStream::pair().unwrap();
        drop(b);
        assert_eq!(pages.read_from(&[0..1, 2..3], &mut [], a.as_fd()).unwrap_err().kind(), ErrorKind::UnexpectedEof);
    }
}
