//! Register values at a guest's first instruction, for the two boot protocols.
//!
//! - PVH (xen/docs/misc/pvh.pandoc): 32-bit protected mode, no paging, EBX = `hvm_start_info`.
//! - Linux 64-bit boot protocol (Documentation/arch/x86/boot.rst): long mode, memory identity-mapped, RSI = `boot_params`.

use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError};

use super::layout::{BOOT_GDT, BOOT_PAGE_TABLES, BOOT_STACK, PVH_START_INFO, ZERO_PAGE};

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
const RFLAGS_RESERVED: u64 = 1 << 1;
const PTE_PRESENT_WRITABLE: u64 = 0b11;
const PTE_LARGE: u64 = 1 << 7;

/// How the first instruction is reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Entry {
    /// 32-bit entry of the PVH note.
    Pvh(u64),
    /// 64-bit entry of the Linux boot protocol.
    Linux64(u64),
}

/// A flat code (`type_` 0xb) or data (0x3) segment of ring 0.
fn flat(selector: u16, type_: u8, long: bool) -> kvm_segment {
    let db = u8::from(!long);
    let l = u8::from(long);
    kvm_segment { limit: 0xffff_ffff, selector, type_, present: 1, db, s: 1, l, g: 1, ..Default::default() }
}

/// A busy 32-bit TSS: KVM wants one in TR.
fn task_state(selector: u16) -> kvm_segment {
    kvm_segment { limit: 0x67, selector, type_: 0xb, present: 1, ..Default::default() }
}

const CODE: u8 = 0xb;
const DATA: u8 = 0x3;

/// The descriptor of the GDT that matches a flat segment (Intel SDM vol. 3, 3.4.5).
fn descriptor(s: &kvm_segment) -> u64 {
    let limit = u64::from(if s.g == 1 { s.limit >> 12 } else { s.limit });
    let access = u64::from(s.type_) | u64::from(s.s) << 4 | u64::from(s.dpl) << 5 | u64::from(s.present) << 7;
    let flags = u64::from(s.avl) | u64::from(s.l) << 1 | u64::from(s.db) << 2 | u64::from(s.g) << 3;
    (limit & 0xffff) | (limit >> 16 & 0xf) << 48 | access << 40 | flags << 52
}

/// Sets `sregs` and gives the registers for `entry`; writes the GDT and, for long mode, the page tables to memory.
pub fn set_up<M: GuestMemoryBackend>(
    memory: &M,
    entry: Entry,
    sregs: &mut kvm_sregs,
) -> Result<kvm_regs, GuestMemoryError> {
    let long = matches!(entry, Entry::Linux64(_));
    let code = flat(0x10, CODE, long);
    let data = flat(0x18, DATA, false);
    let tss = task_state(0x20);
    let gdt = [0, 0, descriptor(&code), descriptor(&data), descriptor(&tss)];
    for (i, entry) in gdt.iter().enumerate() {
        memory.write_obj(*entry, GuestAddress(BOOT_GDT + 8 * i as u64))?;
    }
    sregs.gdt.base = BOOT_GDT;
    sregs.gdt.limit = (gdt.len() * 8 - 1) as u16;
    sregs.idt.base = 0;
    sregs.idt.limit = 0;
    sregs.cs = code;
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = tss;
    sregs.cr0 = CR0_PE | CR0_ET;
    sregs.cr4 = 0;
    let mut regs = kvm_regs { rflags: RFLAGS_RESERVED, ..Default::default() };
    match entry {
        Entry::Pvh(rip) => {
            regs.rip = rip;
            regs.rbx = PVH_START_INFO;
        }
        Entry::Linux64(rip) => {
            identity_map(memory)?;
            sregs.cr3 = BOOT_PAGE_TABLES;
            sregs.cr4 = CR4_PAE;
            sregs.cr0 |= CR0_PG;
            sregs.efer |= EFER_LME | EFER_LMA;
            regs.rip = rip;
            regs.rsp = BOOT_STACK;
            regs.rbp = BOOT_STACK;
            regs.rsi = ZERO_PAGE;
        }
    }
    Ok(regs)
}

/// Identity-maps the first 4 GiB with 2 MiB pages: PML4, PDPT, four page directories.
fn identity_map<M: GuestMemoryBackend>(memory: &M) -> Result<(), GuestMemoryError> {
    let table = |n: u64| BOOT_PAGE_TABLES + n * 0x1000;
    memory.write_obj(table(1) | PTE_PRESENT_WRITABLE, GuestAddress(table(0)))?;
    for gib in 0..4 {
        memory.write_obj(table(2 + gib) | PTE_PRESENT_WRITABLE, GuestAddress(table(1) + gib * 8))?;
        for i in 0..512 {
            let address = (gib * 512 + i) << 21;
            memory.write_obj(address | PTE_PRESENT_WRITABLE | PTE_LARGE, GuestAddress(table(2 + gib) + i * 8))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_are_those_of_the_manual() {
        assert_eq!(descriptor(&flat(0x10, CODE, true)), 0x00af_9b00_0000_ffff);
        assert_eq!(descriptor(&flat(0x10, CODE, false)), 0x00cf_9b00_0000_ffff);
        assert_eq!(descriptor(&flat(0x18, DATA, false)), 0x00cf_9300_0000_ffff);
        assert_eq!(descriptor(&task_state(0x20)), 0x0000_8b00_0000_0067);
    }

    #[test]
    fn long_mode_sees_all_low_addresses_as_they_are() {
        let memory = vm_memory::GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        let mut sregs = kvm_sregs::default();
        let regs = set_up(&memory, Entry::Linux64(0x1000200), &mut sregs).unwrap();
        assert_eq!((regs.rip, regs.rsi), (0x1000200, ZERO_PAGE));
        for gpa in [0u64, 0x1234_5678, 0xfee0_0000, 0xffff_ffff] {
            let entry = |table: u64, shift: u32| -> u64 {
                memory.read_obj(GuestAddress((table & !0xfff) + (gpa >> shift & 511) * 8)).unwrap()
            };
            let pde = entry(entry(entry(sregs.cr3, 39), 30), 21);
            assert_eq!((pde & !0x1f_ffff) | (gpa & 0x1f_ffff), gpa);
        }
    }
}
