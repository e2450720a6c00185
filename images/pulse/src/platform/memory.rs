//! Memory: mapping what lies above 4 GiB, and handing out pieces of what the memory map offers.
//!
//! Everything is mapped one to one in 2 MiB pages. `boot.s` maps the first 4 GiB; the rest is mapped here, in ring 3,
//! where writing a page table is as fast as writing memory. An entry that was absent is not cached by the CPU, so nothing
//! needs flushing.

use core::ptr::NonNull;
use pulse_core::page::{PAGE_BYTES, Page};
use pulse_core::ram::Ram;
use pulse_core::workload::Pages;

unsafe extern "C" {
    static image_start: u8;
    static image_end: u8;
    static program_end: u8;
    static mut boot_pdpt: [u64; 512];
}

const GIB: u64 = 1 << 30;
/// What `boot.s` maps.
const MAPPED_AT_BOOT: u64 = 4 * GIB;
/// What one top-level entry can map; memory above it is left alone.
const MAPPABLE: u64 = 512 * GIB;

/// The guest's code, which never changes.
pub fn program() -> &'static [u8] {
    let start = &raw const image_start;
    let bytes = &raw const program_end as usize - start as usize;
    // SAFETY: the linker script puts both around the code, which is mapped and which nobody writes.
    unsafe { core::slice::from_raw_parts(start, bytes) }
}

/// Takes memory out of the map for good.
pub struct Memory {
    ram: Ram,
}

impl Memory {
    /// Takes the image out of `ram` and maps the rest.
    pub fn new(mut ram: Ram) -> Self {
        ram.remove(&raw const image_start as u64, &raw const image_end as u64);
        ram.remove(MAPPABLE, u64::MAX);
        let mut memory = Self { ram };
        for gib in MAPPED_AT_BOOT / GIB..MAPPABLE / GIB {
            let overlaps = |e: &pulse_core::ram::Extent| e.start < (gib + 1) * GIB && gib * GIB < e.end;
            if memory.ram.extents().iter().any(overlaps) && !memory.map(gib) {
                memory.ram.remove(gib * GIB, u64::MAX);
                break;
            }
        }
        memory
    }

    /// Maps one GiB; false when there is no memory for its table.
    fn map(&mut self, gib: u64) -> bool {
        const PRESENT_WRITABLE_USER: u64 = 7;
        const LARGE: u64 = 1 << 7;
        let Some(table) = self.take(PAGE_BYTES) else { return false };
        for index in 0..512u64 {
            let entry = (gib * GIB + (index << 21)) | LARGE | PRESENT_WRITABLE_USER;
            // SAFETY: `take` gave a page to us alone, and 512 entries of 8 bytes fill it.
            unsafe { table.cast::<u64>().add(index as usize).write(entry) };
        }
        // SAFETY: the live page directory pointer table, of 512 entries, of which `gib` is one. It was absent, so that
        // nothing that is mapped changes; the table that it now points to is complete.
        unsafe {
            (&raw mut boot_pdpt[gib as usize]).write_volatile(table.as_ptr() as u64 | PRESENT_WRITABLE_USER);
        }
        true
    }

    /// Takes `bytes` below 4 GiB, page-aligned, of any content.
    fn take(&mut self, bytes: u64) -> Option<NonNull<u8>> {
        NonNull::new(self.ram.take(bytes, MAPPED_AT_BOOT)? as *mut u8)
    }

    /// Takes a buffer of zeros.
    pub fn take_buffer(&mut self, bytes: usize) -> Option<&'static mut [u8]> {
        self.take_array(0u8, bytes)
    }

    /// Takes an array.
    pub fn take_array<T: Copy>(&mut self, value: T, len: usize) -> Option<&'static mut [T]> {
        let start = self.take((len * size_of::<T>()) as u64)?.cast::<T>();
        for index in 0..len {
            // SAFETY: the memory is mapped and, taken out of the map, ours alone for good; page-aligned, it suits any `T`.
            unsafe { start.add(index).write(value) };
        }
        // SAFETY: as above, and all of it has just been written.
        Some(unsafe { core::slice::from_raw_parts_mut(start.as_ptr(), len) })
    }

    /// All that is left, and the table of generations for it.
    pub fn into_pages(mut self) -> (WorkingMemory, &'static mut [u32]) {
        let entries = self.ram.pages();
        let table = match self.take(entries * 4) {
            // SAFETY: as in `take_array`, except that the memory keeps whatever the machine put there, which any `u32`
            // may be: a big table would take long to clear, and the workload sets each entry before it reads it.
            Some(table) => unsafe { core::slice::from_raw_parts_mut(table.cast().as_ptr(), entries as usize) },
            None => &mut [],
        };
        (WorkingMemory { ram: self.ram }, table)
    }
}

/// The memory of the workload.
pub struct WorkingMemory {
    ram: Ram,
}

impl WorkingMemory {
    /// Where page `number` is; 0 past the last.
    pub fn address(&self, number: u64) -> u64 {
        self.ram.address(number).unwrap_or(0)
    }
}

impl Pages for WorkingMemory {
    fn count(&self) -> u64 {
        self.ram.pages()
    }

    fn page(&mut self, number: u64) -> &mut Page {
        let address = self.ram.address(number).expect("the workload stays below count()");
        // SAFETY: a whole page of mapped memory that is ours alone for good; `&mut self` makes the reference unique. A
        // migration may change it behind our back, which is just what the workload is there to see: `black_box` keeps
        // the compiler from knowing that it is the page that it wrote before.
        unsafe { &mut *core::hint::black_box(address as *mut Page) }
    }
}
