//! The guest's memory: its layout, its mapping, the dirty log.

use std::sync::Arc;

use vm_memory::bitmap::AtomicBitmap;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use crate::arch::layout;

pub mod dirty;
pub mod discard;
pub mod pages;

/// Guest memory with a bitmap that every write of the VMM's own through `vm_memory` marks (the guest's writes are in KVM's log).
pub type GuestMemoryMmap = vm_memory::GuestMemoryMmap<AtomicBitmap>;

/// The one mapping of a VM's memory, shared by vCPUs, devices and whoever moves it.
pub type SharedMemory = Arc<GuestMemoryMmap>;

/// Bytes of a guest page. Dirty logs, bitmaps and the wire all count in these.
pub const PAGE_BYTES: u64 = 4096;

/// Guest memory could not be had.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The size is out of range or not whole pages.
    #[error(
        "{bytes} bytes is not a usable memory size: it must be a multiple of 1 MiB from {min_mib} MiB to {max_mib} MiB"
    )]
    Size {
        /// What was asked for.
        bytes: u64,
        /// Smallest size, MiB.
        min_mib: u64,
        /// Largest size, MiB.
        max_mib: u64,
    },
    /// The host would not map that much.
    #[error("the host cannot map {bytes} bytes for the guest")]
    Map {
        /// What was asked for.
        bytes: u64,
        /// What `mmap` said.
        #[source]
        source: vm_memory::mmap::FromRangesError,
    },
    /// KVM refused an operation on a memory slot.
    #[error("KVM refused {operation} for memory slot {slot}")]
    Slot {
        /// The operation, by its KVM name.
        operation: &'static str,
        /// Index of the slot.
        slot: u32,
        /// KVM's answer.
        #[source]
        source: vmm_sys_util::errno::Error,
    },
}

/// Maps `bytes` of guest memory at the addresses of [`layout::ram_regions`]; all zero, and only touched pages cost memory.
pub fn map(bytes: u64) -> Result<SharedMemory, MemoryError> {
    if !bytes.is_multiple_of(1 << 20) || !(layout::MIN_MEMORY_BYTES..=layout::MAX_MEMORY_BYTES).contains(&bytes) {
        let (min_mib, max_mib) = (layout::MIN_MEMORY_BYTES >> 20, layout::MAX_MEMORY_BYTES >> 20);
        return Err(MemoryError::Size { bytes, min_mib, max_mib });
    }
    let ranges: Vec<(GuestAddress, usize)> =
        layout::ram_regions(bytes).into_iter().map(|r| (GuestAddress(r.gpa), r.bytes as usize)).collect();
    GuestMemoryMmap::from_ranges(&ranges).map(Arc::new).map_err(|source| MemoryError::Map { bytes, source })
}

/// The regions of a mapping, in address order.
pub fn regions(memory: &GuestMemoryMmap) -> Vec<layout::RamRegion> {
    memory.iter().map(|r| layout::RamRegion { gpa: r.start_addr().0, bytes: r.len() }).collect()
}
