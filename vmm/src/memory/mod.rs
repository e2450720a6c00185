//! The guest's memory: its layout, its mapping, the dirty log.

use std::sync::Arc;

use vm_memory::bitmap::AtomicBitmap;

/// Guest memory with a bitmap that every write of the VMM's own through `vm_memory` marks (the guest's writes are in KVM's log).
pub type GuestMemoryMmap = vm_memory::GuestMemoryMmap<AtomicBitmap>;

/// The one mapping of a VM's memory, shared by vCPUs, devices and whoever moves it.
pub type SharedMemory = Arc<GuestMemoryMmap>;
