//! Guest buffers as I/O vectors: what a descriptor chain points to, read into and written from without a copy of our own.
//!
//! **Dirty pages.** The kernel writes guest memory behind `vm_memory`'s back in [`read_into`], so the pages are marked here,
//! *after* the data is there. That order matters: who collects the bitmap clears a bit and then reads the page. Marked first, a
//! page could be collected, cleared and read before the data arrives, and the write would be lost for the copy.
//!
//! No Rust reference to guest memory is ever formed: `VolatileSlice` and raw `iovec`s only, because the guest writes at any time.
#![allow(unsafe_code)] // readv(2) and writev(2) on guest memory: std's and rustix's versions want references to it.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use virtio_queue::DescriptorChain;
use vm_memory::bitmap::{AtomicBitmap, BS, Bitmap};
use vm_memory::{Bytes, GuestMemory, Permissions, VolatileSlice};

use crate::memory::GuestMemoryMmap;

/// A contiguous piece of a guest buffer.
pub type Slice<'m> = VolatileSlice<'m, BS<'m, AtomicBitmap>>;

/// More descriptors in one chain than this are refused: with a spill buffer, `IOV_MAX` (1024) must hold them.
pub const MAX_SLICES: usize = 1000;

/// A descriptor chain that breaks the rules of virtio 1.2, 2.7.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ChainError {
    /// The chain loops, leaves its table, is longer than 4 GiB or has a bad indirect table.
    #[error("the descriptor chain does not end properly")]
    Broken,
    /// A descriptor points outside guest memory.
    #[error("a descriptor points outside guest memory")]
    BadAddress,
    /// A buffer to be read is write-only, or the other way around.
    #[error("a descriptor has the wrong direction")]
    WrongDirection,
    /// More pieces than an I/O vector holds.
    #[error("the descriptor chain has more than {MAX_SLICES} pieces")]
    TooLong,
}

/// Appends the buffers of `chain` to `slices` and returns their length in bytes together. All must be device-writable, or none,
/// as `writable` says. On an error `slices` is left as it was.
pub fn collect<'m>(
    memory: &'m GuestMemoryMmap,
    chain: DescriptorChain<&'m GuestMemoryMmap>,
    writable: bool,
    slices: &mut Vec<Slice<'m>>,
) -> Result<usize, ChainError> {
    let before = slices.len();
    let result = collect_untidily(memory, chain, writable, slices);
    if result.is_err() {
        slices.truncate(before);
    }
    result
}

fn collect_untidily<'m>(
    memory: &'m GuestMemoryMmap,
    chain: DescriptorChain<&'m GuestMemoryMmap>,
    writable: bool,
    slices: &mut Vec<Slice<'m>>,
) -> Result<usize, ChainError> {
    let first = slices.len();
    let mut bytes = 0;
    // The iterator ends a broken chain silently; that its last descriptor promises another one gives it away.
    let mut unfinished = true;
    for (index, descriptor) in chain.enumerate() {
        if descriptor.is_write_only() != writable {
            return Err(ChainError::WrongDirection);
        }
        let len = descriptor.len() as usize;
        let pieces =
            memory.get_slices(descriptor.addr(), len, Permissions::ReadWrite).map_err(|_| ChainError::BadAddress)?;
        for piece in pieces {
            slices.push(piece.map_err(|_| ChainError::BadAddress)?);
        }
        if slices.len() - first > MAX_SLICES || index >= MAX_SLICES {
            return Err(ChainError::TooLong);
        }
        bytes += len;
        unfinished = descriptor.has_next();
    }
    if unfinished { Err(ChainError::Broken) } else { Ok(bytes) }
}

fn iovec(slice: &Slice<'_>) -> libc::iovec {
    libc::iovec { iov_base: slice.ptr_guard_mut().as_ptr().cast(), iov_len: slice.len() }
}

fn check(returned: isize) -> io::Result<usize> {
    usize::try_from(returned).map_err(|_| io::Error::last_os_error())
}

/// One `readv` from `fd` into `slices` and, when they are full, into `spill`. Returns how many bytes were read altogether.
/// At most [`MAX_SLICES`] slices.
pub fn read_into(fd: BorrowedFd<'_>, slices: &[Slice<'_>], spill: &mut [u8]) -> io::Result<usize> {
    let mut vectors: Vec<libc::iovec> = Vec::with_capacity(slices.len() + 1);
    vectors.extend(slices.iter().map(iovec));
    vectors.push(libc::iovec { iov_base: spill.as_mut_ptr().cast(), iov_len: spill.len() });
    // SAFETY: the vectors of `slices` lie in mapped guest memory that lives as long as the slices and that nobody has a
    // reference to; the last one is `spill`, borrowed mutably. The vector array has the length that is given.
    let result = check(unsafe { libc::readv(fd.as_raw_fd(), vectors.as_ptr(), vectors.len() as libc::c_int) });
    // After the data (see the head of this file).
    let mut left = match &result {
        Ok(bytes) => *bytes,
        Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => 0,
        // Some of it may have been written before the failure.
        Err(_) => usize::MAX,
    };
    for slice in slices {
        let written = left.min(slice.len());
        slice.bitmap().mark_dirty(0, written);
        left -= written;
    }
    result
}

/// One `writev` of `slices` to `fd`. At most `IOV_MAX` of them.
pub fn write_from(fd: BorrowedFd<'_>, slices: &[Slice<'_>]) -> io::Result<usize> {
    let vectors: Vec<libc::iovec> = slices.iter().map(iovec).collect();
    // SAFETY: the vectors lie in mapped guest memory that lives as long as the slices; the kernel only reads it, and copes with
    // its being changed meanwhile. The vector array has the length that is given.
    check(unsafe { libc::writev(fd.as_raw_fd(), vectors.as_ptr(), vectors.len() as libc::c_int) })
}

/// Copies from `slices`, `skip` bytes after their beginning, into `to`; returns how many bytes there were.
pub fn copy_out(slices: &[Slice<'_>], skip: usize, to: &mut [u8]) -> usize {
    let mut copied = 0;
    walk(slices, skip, to.len(), |slice, offset, len| {
        // The range is inside the slice by construction; a failure would leave zeros.
        let _ = slice.read_slice(&mut to[copied..copied + len], offset);
        copied += len;
    });
    copied
}

/// Copies `from` into `slices`, `skip` bytes after their beginning (and marks the pages); returns how many bytes had room.
pub fn copy_in(slices: &[Slice<'_>], skip: usize, from: &[u8]) -> usize {
    let mut copied = 0;
    walk(slices, skip, from.len(), |slice, offset, len| {
        // As above.
        let _ = slice.write_slice(&from[copied..copied + len], offset);
        copied += len;
    });
    copied
}

/// Calls `f` with the pieces of `slices` that make up `len` bytes from `skip` on.
fn walk<'m>(slices: &[Slice<'m>], mut skip: usize, mut len: usize, mut f: impl FnMut(&Slice<'m>, usize, usize)) {
    for slice in slices {
        if skip >= slice.len() {
            skip -= slice.len();
            continue;
        }
        let here = len.min(slice.len() - skip);
        if here == 0 {
            return;
        }
        f(slice, skip, here);
        skip = 0;
        len -= here;
    }
}
