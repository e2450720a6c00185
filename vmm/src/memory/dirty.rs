//! Which pages changed: KVM's log of the guest's writes, joined with the bitmap of the VMM's own writes.
//!
//! With KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_GET_DIRTY_LOG only reads; a page is write-protected again, and so watched again,
//! when its bit is cleared by KVM_CLEAR_DIRTY_LOG. The reader clears a chunk just before it reads the chunk, so that a write
//! after the clear is logged anew, and so that the guest never waits for one long protection of all memory. With
//! KVM_DIRTY_LOG_INITIALLY_SET the first log says "everything" for nothing. Without the capability, reading the log clears it.
//!
//! Whoever reads the log owns the pages that it named: a migration that fails throws the log away ([`DirtyLog::stop`]), and
//! the next one begins with all pages.
#![allow(unsafe_code)] // KVM_CLEAR_DIRTY_LOG and KVM_SET_USER_MEMORY_REGION take addresses of ours.

use std::sync::Arc;

use kvm_bindings::{
    KVM_DIRTY_LOG_INITIALLY_SET, KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE, KVM_MEM_LOG_DIRTY_PAGES, KVMIO,
    kvm_clear_dirty_log, kvm_enable_cap, kvm_userspace_memory_region,
};
use kvm_ioctls::VmFd;
use vm_memory::bitmap::AtomicBitmap;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap};
use vmm_sys_util::ioctl::ioctl_with_ref;

use super::{MemoryError, PAGE_BYTES, SharedMemory};

mod ioctl {
    #![allow(missing_docs)] // the macro writes a public function
    use super::{KVMIO, kvm_clear_dirty_log};
    vmm_sys_util::ioctl_iowr_nr!(KVM_CLEAR_DIRTY_LOG, KVMIO, 0xc0, kvm_clear_dirty_log);
}

/// The memory slots of a VM and their dirty log. Slot n is region n of the mapping.
pub struct DirtyLog {
    vm: Arc<VmFd>,
    memory: SharedMemory,
    /// KVM_GET_DIRTY_LOG does not clear; we do, chunk by chunk.
    manual_protect: bool,
    logging: bool,
}

impl DirtyLog {
    /// Gives `memory` to the VM, one slot a region, and chooses the log's mode by what the host can.
    pub fn new(vm: Arc<VmFd>, memory: SharedMemory) -> Result<Self, MemoryError> {
        let cap = kvm_bindings::KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2;
        let offered = vm.check_extension_raw(cap.into()).cast_unsigned();
        let wanted = offered & (KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET);
        let mut enable = kvm_enable_cap { cap, ..Default::default() };
        enable.args[0] = wanted.into();
        let manual_protect = wanted & KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE != 0 && vm.enable_cap(&enable).is_ok();
        let log = DirtyLog { vm, memory, manual_protect, logging: false };
        log.set_slots(0)?;
        Ok(log)
    }

    fn set_slots(&self, flags: u32) -> Result<(), MemoryError> {
        for (slot, region) in (0u32..).zip(self.memory.iter()) {
            let slot_region = kvm_userspace_memory_region {
                slot,
                flags,
                guest_phys_addr: region.start_addr().0,
                memory_size: region.len(),
                userspace_addr: region.as_ptr() as u64,
            };
            // SAFETY: the range is a mapping that `self.memory` keeps alive at least as long as we keep the VM.
            unsafe { self.vm.set_user_memory_region(slot_region) }.map_err(|source| MemoryError::Slot {
                operation: "KVM_SET_USER_MEMORY_REGION",
                slot,
                source,
            })?;
        }
        Ok(())
    }

    /// Starts logging. What was dirty before is forgotten: the caller takes every page as dirty now.
    pub fn start(&mut self) -> Result<(), MemoryError> {
        self.set_slots(KVM_MEM_LOG_DIRTY_PAGES)?;
        self.memory.iter().for_each(|region| own_writes(region).reset());
        self.logging = true;
        Ok(())
    }

    /// Stops logging; what was logged is lost.
    pub fn stop(&mut self) -> Result<(), MemoryError> {
        if self.logging {
            self.logging = false;
            self.set_slots(0)?;
        }
        Ok(())
    }

    /// The pages written since each was last re-armed (or since the last call, where reading the log clears it): for each
    /// region one bit a page, 64 to a word, bit 0 of word 0 the first page.
    pub fn collect(&mut self) -> Result<Vec<Vec<u64>>, MemoryError> {
        let own: Vec<_> = self.memory.iter().map(|region| own_writes(region).get_and_reset()).collect();
        let mut all = read(&self.vm, &self.memory)?;
        for (word, own) in all.iter_mut().flatten().zip(own.iter().flatten()) {
            *word |= own;
        }
        Ok(all)
    }

    /// What watches pages again, to be called from the thread that reads them.
    pub fn rearmer(&self) -> Rearmer {
        Rearmer { vm: self.vm.clone(), memory: self.memory.clone(), manual_protect: self.manual_protect }
    }
}

/// KVM's log, region by region.
fn read(vm: &VmFd, memory: &SharedMemory) -> Result<Vec<Vec<u64>>, MemoryError> {
    let slots = (0u32..).zip(memory.iter());
    let read = slots.map(|(slot, region)| {
        vm.get_dirty_log(slot, region.len() as usize).map_err(|source| MemoryError::Slot {
            operation: "KVM_GET_DIRTY_LOG",
            slot,
            source,
        })
    });
    read.collect()
}

/// Watches pages again, before they are read, and looks at the log meanwhile.
#[derive(Clone)]
pub struct Rearmer {
    vm: Arc<VmFd>,
    memory: SharedMemory,
    manual_protect: bool,
}

impl Rearmer {
    /// The pages that the guest has written since each was last re-armed, in the shape of [`DirtyLog::collect`], which will give them
    /// again. Those that never were re-armed count as written. None where reading the log clears it.
    pub fn peek(&self) -> Result<Option<Vec<Vec<u64>>>, MemoryError> {
        self.manual_protect.then(|| read(&self.vm, &self.memory)).transpose()
    }

    /// Clears the log of the pages whose bit is set in `bits`, of region `slot` from `first_page` on (a multiple of
    /// 64, as KVM wants it): writes from now on are logged anew. Nothing to do where reading the log has done it.
    pub fn rearm(&self, slot: u32, first_page: u64, bits: &[u64]) -> Result<(), MemoryError> {
        if !self.manual_protect || bits.iter().all(|word| *word == 0) {
            return Ok(());
        }
        let slot_pages = self.memory.iter().nth(slot as usize).map_or(0, |region| region.len() / PAGE_BYTES);
        let num_pages = (bits.len() as u64 * 64).min(slot_pages.saturating_sub(first_page)) as u32;
        let mut clear = kvm_clear_dirty_log { slot, num_pages, first_page, ..Default::default() };
        clear.__bindgen_anon_1.dirty_bitmap = bits.as_ptr().cast_mut().cast();
        // SAFETY: KVM reads `num_pages` bits of the bitmap, and `bits` has at least as many; it does not write to it.
        if unsafe { ioctl_with_ref(&*self.vm, ioctl::KVM_CLEAR_DIRTY_LOG(), &clear) } < 0 {
            let source = vmm_sys_util::errno::Error::last();
            return Err(MemoryError::Slot { operation: "KVM_CLEAR_DIRTY_LOG", slot, source });
        }
        Ok(())
    }
}

fn own_writes(region: &GuestRegionMmap<AtomicBitmap>) -> &AtomicBitmap {
    vm_memory::MmapRegion::bitmap(region)
}
