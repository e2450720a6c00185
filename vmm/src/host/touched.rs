//! Which pages of guest memory were ever touched. Guest memory is private and anonymous, so a page that has no frame and no place
//! in swap reads as zeros; and whoever asks the page table first need not read such a page, which would map it.
//!
//! The answer may be old when it arrives: a page may be touched in between. Pre-copy is safe against that, because it watches a page
//! before it asks (see [`crate::memory::dirty`]), and a touch after that is in the log.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

/// Bits of an entry of `/proc/PID/pagemap` (kernel documentation, "pagemap"): in swap (or on its way through a migration of pages), present.
const SWAPPED_OR_PRESENT: u64 = 3 << 62;
/// Bytes of an entry.
const ENTRY_BYTES: usize = 8;
/// Bytes of a page on x86-64.
const PAGE_BYTES: u64 = 4096;
/// Entries that are read at once: those of 2 MiB.
const BATCH: usize = 512;

/// This process's page table.
#[derive(Debug, Clone)]
pub struct Touched(Option<Arc<File>>);

impl Touched {
    /// Opens `/proc/self/pagemap`. Where that is not to be had, every page counts as touched.
    pub fn open() -> Self {
        let file = File::open("/proc/self/pagemap");
        Touched(file.inspect_err(|error| tracing::debug!(%error, "no /proc/self/pagemap")).ok().map(Arc::new))
    }

    /// Knows nothing: every page counts as touched.
    #[cfg(test)]
    pub fn none() -> Self {
        Touched(None)
    }

    /// Calls `each` for the `count` pages from `address` (a page boundary) on, in order: whether the page was touched.
    pub fn look(&self, address: *const u8, count: u64, mut each: impl FnMut(bool)) -> io::Result<()> {
        let Some(file) = &self.0 else {
            (0..count).for_each(|_| each(true));
            return Ok(());
        };
        let mut entries = [0; BATCH * ENTRY_BYTES];
        let mut at = address as u64 / PAGE_BYTES * ENTRY_BYTES as u64;
        let mut left = count as usize;
        while left > 0 {
            let now = &mut entries[..left.min(BATCH) * ENTRY_BYTES];
            file.read_exact_at(now, at)?;
            for entry in now.chunks_exact(ENTRY_BYTES) {
                each(u64::from_ne_bytes(entry.try_into().expect("chunks are entries")) & SWAPPED_OR_PRESENT != 0);
            }
            at += now.len() as u64;
            left -= now.len() / ENTRY_BYTES;
        }
        Ok(())
    }
}
