//! Putting a kernel where it can start: ELF by its PVH note, Linux bzImage and ELF by the 64-bit boot protocol.
#![allow(unsafe_code)] // plain C structures of the boot protocols are written as bytes

use std::io::Cursor;

use linux_loader::elf::{Elf64_Ehdr, Elf64_Phdr, PT_LOAD};
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use linux_loader::loader::elf::PvhBootCapability;
use linux_loader::loader::start_info::{
    XEN_HVM_MEMMAP_TYPE_RAM, XEN_HVM_MEMMAP_TYPE_RESERVED, XEN_HVM_START_MAGIC_VALUE, hvm_memmap_table_entry,
    hvm_modlist_entry, hvm_start_info,
};
use linux_loader::loader::{BzImage, Elf, KernelLoader};
use vm_memory::{ByteValued, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryRegion};

use super::layout::{
    ACPI_TABLES, CMDLINE, CMDLINE_BYTES, EBDA_START, HIGH_RAM, HOLE_START, PVH_START_INFO, RESET_VECTOR, ZERO_PAGE,
};
use super::regs::Entry;

/// What does not boot, and why.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// Neither ELF nor bzImage.
    #[error("it is not a kernel: neither an ELF file nor a Linux bzImage")]
    NotAKernel,
    /// An ELF file or bzImage that is damaged or of another machine.
    #[error("its {format} headers are damaged or not for x86-64: {why}")]
    Damaged {
        /// `ELF` or `bzImage`.
        format: &'static str,
        /// What is wrong.
        why: String,
    },
    /// The bzImage has no 64-bit entry.
    #[error(
        "it is a bzImage without a 64-bit entry point (boot protocol {version:#x}); a 64-bit kernel of 3.8 or later is needed"
    )]
    No64BitEntry {
        /// Boot protocol version from the setup header.
        version: u16,
    },
    /// Kernel, initrd and their work space do not fit.
    #[error(
        "{what} needs memory up to {needed_mib} MiB and the guest has {have_mib} MiB there: give it more with --memory"
    )]
    DoesNotFit {
        /// The kernel or the initrd.
        what: &'static str,
        /// Memory needed, in MiB, rounded up.
        needed_mib: u64,
        /// Low memory of the guest, in MiB.
        have_mib: u64,
    },
    /// The command line is too long or has a NUL.
    #[error("the kernel command line is {bytes} bytes long; at most {} fit, none of them NUL", CMDLINE_BYTES - 1)]
    Cmdline {
        /// Its length.
        bytes: usize,
    },
    /// Writing boot structures failed: they lie outside guest memory.
    #[error("the boot structures do not fit in guest memory")]
    Memory(#[from] GuestMemoryError),
}

/// `boot_params.acpi_rsdp_addr` (Documentation/arch/x86/zero-page.rst).
const ZERO_PAGE_ACPI_RSDP: u64 = 0x70;
const XLF_KERNEL_64: u16 = 1;
const BOOT_FLAG: u16 = 0xaa55;
const HDRS: u32 = 0x5372_6448;
/// "Unregistered" loader.
const LOADER_UNDEFINED: u8 = 0xff;
const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;
/// The 64-bit entry of a bzImage is this far into its protected-mode part.
const BZIMAGE_ENTRY64: u64 = 0x200;
const PAGE: u64 = 0x1000;

/// All the firmware that there is: asks the keyboard controller for a reset, then halts.
///
/// On hardware-reduced ACPI without EFI, Linux leaves the reset register alone, finds no EFI to ask, and jumps to the reset vector in
/// real mode (arch/x86/kernel/reboot.c, BOOT_EFI falling through to BOOT_BIOS).
const RESET_STUB: [u8; 7] = [
    0xb0, 0xfe, // mov al, 0xfe
    0xe6, 0x64, // out 0x64, al
    0xf4, // hlt
    0xeb, 0xfd, // jmp back to hlt
];

/// Wraps a C structure of the boot protocols so that it can be written to guest memory.
#[derive(Clone, Copy)]
#[repr(transparent)]
struct Plain<T: Copy>(T);
// SAFETY: used below only with boot-protocol structures: integers in C layout, without padding that matters and without pointers.
unsafe impl<T: Copy + Send + Sync> ByteValued for Plain<T> {}

/// Puts `kernel`, `initrd` and `cmdline` into memory and describes them; the ACPI tables are at [`ACPI_TABLES`] already.
/// The entry says how to start.
pub fn load<M: GuestMemoryBackend>(
    memory: &M,
    kernel: &[u8],
    initrd: Option<&[u8]>,
    cmdline: &str,
) -> Result<Entry, BootError> {
    if cmdline.len() >= CMDLINE_BYTES || cmdline.contains('\0') {
        return Err(BootError::Cmdline { bytes: cmdline.len() });
    }
    memory.write_slice(&RESET_STUB, GuestAddress(RESET_VECTOR))?;
    let mut bytes = cmdline.as_bytes().to_vec();
    bytes.push(0);
    let is_elf = kernel.starts_with(b"\x7fELF");
    let is_bzimage = kernel.get(0x202..0x206) == Some(b"HdrS");
    let low_end = memory.iter().next().map_or(0, |r| r.len()).min(HOLE_START);
    if is_elf {
        let end = check_elf_fits(kernel, low_end)?;
        let loaded = Elf::load(memory, None, &mut Cursor::new(kernel), Some(GuestAddress(0)))
            .map_err(|e| BootError::Damaged { format: "ELF", why: e.to_string() })?;
        let initrd = place_initrd(memory, initrd, end, low_end, u64::from(u32::MAX))?;
        memory.write_slice(&bytes, GuestAddress(CMDLINE))?;
        match loaded.pvh_boot_cap {
            PvhBootCapability::PvhEntryPresent(entry) => {
                write_pvh_info(memory, initrd)?;
                Ok(Entry::Pvh(entry.0))
            }
            _ => {
                let header = setup_header {
                    boot_flag: BOOT_FLAG,
                    header: HDRS,
                    kernel_alignment: 0x0100_0000,
                    ..Default::default()
                };
                write_zero_page(memory, header, cmdline.len(), initrd)?;
                Ok(Entry::Linux64(loaded.kernel_load.0))
            }
        }
    } else if is_bzimage {
        let header = bzimage_header(kernel)?;
        // The decompressor works in place: from its preferred address, `init_size` bytes are its own.
        let work_space = u64::from(header.init_size).max(kernel.len() as u64);
        let end = header.pref_address.max(HIGH_RAM).saturating_add(work_space);
        fits("the kernel", end, low_end)?;
        let loaded = BzImage::load(memory, None, &mut Cursor::new(kernel), Some(GuestAddress(HIGH_RAM)))
            .map_err(|e| BootError::Damaged { format: "bzImage", why: e.to_string() })?;
        let initrd = place_initrd(memory, initrd, end, low_end, u64::from(header.initrd_addr_max))?;
        memory.write_slice(&bytes, GuestAddress(CMDLINE))?;
        write_zero_page(memory, loaded.setup_header.unwrap_or(header), cmdline.len(), initrd)?;
        Ok(Entry::Linux64(loaded.kernel_load.0 + BZIMAGE_ENTRY64))
    } else {
        Err(BootError::NotAKernel)
    }
}

fn fits(what: &'static str, end: u64, low_end: u64) -> Result<(), BootError> {
    let (needed_mib, have_mib) = (end.div_ceil(1 << 20), low_end >> 20);
    if end > low_end { Err(BootError::DoesNotFit { what, needed_mib, have_mib }) } else { Ok(()) }
}

/// The loader copies segments; whether they, and their bss, fit is checked here so that the user hears the size. Gives their end.
fn check_elf_fits(kernel: &[u8], low_end: u64) -> Result<u64, BootError> {
    let damaged = |why: &str| BootError::Damaged { format: "ELF", why: why.into() };
    let header = read::<Elf64_Ehdr>(kernel, 0).ok_or(damaged("truncated header"))?;
    const EM_X86_64: u16 = 62;
    let mut last_end = 0;
    if header.e_machine != EM_X86_64 {
        return Err(damaged("its machine is not x86-64"));
    }
    for n in 0..u64::from(header.e_phnum) {
        let at = n.checked_mul(size_of::<Elf64_Phdr>() as u64).and_then(|o| o.checked_add(header.e_phoff));
        let phdr = at.and_then(|at| read::<Elf64_Phdr>(kernel, at)).ok_or(damaged("truncated program headers"))?;
        if phdr.p_type == PT_LOAD {
            let bytes = phdr.p_memsz.max(phdr.p_filesz);
            let end = phdr.p_paddr.checked_add(bytes).ok_or(damaged("a segment wraps around"))?;
            fits("the kernel", end, low_end)?;
            last_end = end.max(last_end);
        }
    }
    Ok(last_end)
}

fn read<T: Copy + Default + Send + Sync>(bytes: &[u8], at: u64) -> Option<T> {
    let mut value = Plain(T::default());
    let at = usize::try_from(at).ok()?;
    value.as_mut_slice().copy_from_slice(bytes.get(at..at.checked_add(size_of::<T>())?)?);
    Some(value.0)
}

fn bzimage_header(kernel: &[u8]) -> Result<setup_header, BootError> {
    let header: setup_header =
        read(kernel, 0x1f1).ok_or(BootError::Damaged { format: "bzImage", why: "truncated header".into() })?;
    if header.version < 0x20c || header.xloadflags & XLF_KERNEL_64 == 0 {
        return Err(BootError::No64BitEntry { version: header.version });
    }
    Ok(header)
}

/// An initrd in memory: address and length.
type Placed = Option<(u64, u64)>;

/// As high as the kernel's protocol lets it be, on a page boundary, above the kernel and what else lies below [`HIGH_RAM`].
fn place_initrd<M: GuestMemoryBackend>(
    memory: &M,
    initrd: Option<&[u8]>,
    kernel_end: u64,
    low_end: u64,
    max_address: u64,
) -> Result<Placed, BootError> {
    let Some(initrd) = initrd.filter(|i| !i.is_empty()) else { return Ok(None) };
    let len = initrd.len() as u64;
    let lowest = kernel_end.max(HIGH_RAM).next_multiple_of(PAGE);
    fits("the initrd above the kernel", lowest + len, low_end)?;
    let top = low_end.min(max_address.saturating_add(1));
    let start = (top.saturating_sub(len) & !(PAGE - 1)).max(lowest);
    memory.write_slice(initrd, GuestAddress(start))?;
    Ok(Some((start, len)))
}

/// RAM and what is reserved, as `(start, bytes, is_ram)`.
fn memory_map<M: GuestMemoryBackend>(memory: &M) -> Vec<(u64, u64, bool)> {
    let mut map = vec![(0, EBDA_START, true), (ACPI_TABLES, HIGH_RAM - ACPI_TABLES, false)];
    for region in memory.iter() {
        let start = region.start_addr().0.max(HIGH_RAM);
        map.push((start, region.start_addr().0 + region.len() - start, true));
    }
    map
}

fn write_pvh_info<M: GuestMemoryBackend>(memory: &M, initrd: Placed) -> Result<(), BootError> {
    let map = memory_map(memory);
    let map_address = PVH_START_INFO + size_of::<hvm_start_info>().next_multiple_of(16) as u64;
    let modules = map_address + (map.len() * size_of::<hvm_memmap_table_entry>()) as u64;
    let info = hvm_start_info {
        magic: XEN_HVM_START_MAGIC_VALUE,
        version: 1,
        nr_modules: u32::from(initrd.is_some()),
        modlist_paddr: if initrd.is_some() { modules } else { 0 },
        cmdline_paddr: CMDLINE,
        rsdp_paddr: ACPI_TABLES,
        memmap_paddr: map_address,
        memmap_entries: map.len() as u32,
        ..Default::default()
    };
    memory.write_obj(Plain(info), GuestAddress(PVH_START_INFO))?;
    for (i, (addr, size, ram)) in map.into_iter().enumerate() {
        let type_ = if ram { XEN_HVM_MEMMAP_TYPE_RAM } else { XEN_HVM_MEMMAP_TYPE_RESERVED };
        let entry = hvm_memmap_table_entry { addr, size, type_, reserved: 0 };
        let at = map_address + (i * size_of::<hvm_memmap_table_entry>()) as u64;
        memory.write_obj(Plain(entry), GuestAddress(at))?;
    }
    if let Some((paddr, size)) = initrd {
        memory.write_obj(Plain(hvm_modlist_entry { paddr, size, ..Default::default() }), GuestAddress(modules))?;
    }
    Ok(())
}

fn write_zero_page<M: GuestMemoryBackend>(
    memory: &M,
    header: setup_header,
    cmdline_len: usize,
    initrd: Placed,
) -> Result<(), BootError> {
    let mut params = boot_params { hdr: header, ..Default::default() };
    params.hdr.type_of_loader = LOADER_UNDEFINED;
    params.hdr.cmd_line_ptr = CMDLINE as u32;
    params.hdr.cmdline_size = cmdline_len as u32;
    // What the file says there is not of this guest's memory.
    let (start, len) = initrd.unwrap_or_default();
    params.hdr.ramdisk_image = start as u32;
    params.hdr.ramdisk_size = len as u32;
    for (addr, size, ram) in memory_map(memory) {
        let type_ = if ram { E820_RAM } else { E820_RESERVED };
        params.e820_table[usize::from(params.e820_entries)] = boot_e820_entry { addr, size, r#type: type_ };
        params.e820_entries += 1;
    }
    memory.write_obj(Plain(params), GuestAddress(ZERO_PAGE))?;
    memory.write_obj(ACPI_TABLES, GuestAddress(ZERO_PAGE + ZERO_PAGE_ACPI_RSDP))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn memory(mib: usize) -> vm_memory::GuestMemoryMmap<()> {
        vm_memory::GuestMemoryMmap::from_ranges(&[(GuestAddress(0), mib << 20)]).unwrap()
    }

    /// The smallest bzImage that the protocol allows: one setup sector, a protected-mode part of one page.
    fn bzimage() -> Vec<u8> {
        let mut image = vec![0u8; 512 * 2 + 4096];
        let header = setup_header {
            setup_sects: 1,
            boot_flag: BOOT_FLAG,
            header: HDRS,
            version: 0x20f,
            loadflags: 1,
            code32_start: HIGH_RAM as u32,
            initrd_addr_max: 0x7fff_ffff,
            xloadflags: XLF_KERNEL_64,
            pref_address: 16 << 20,
            init_size: 8 << 20,
            ..Default::default()
        };
        image[0x1f1..0x1f1 + size_of::<setup_header>()].copy_from_slice(Plain(header).as_slice());
        image[1024..].fill(0xab);
        image
    }

    #[test]
    fn a_bzimage_gets_its_zero_page() {
        let memory = memory(64);
        let entry = load(&memory, &bzimage(), Some(&[7; 5000]), "console=ttyS0").unwrap();
        assert_eq!(entry, Entry::Linux64(HIGH_RAM + 0x200));
        let params: Plain<boot_params> = memory.read_obj(GuestAddress(ZERO_PAGE)).unwrap();
        let (start, len) = (params.0.hdr.ramdisk_image, params.0.hdr.ramdisk_size);
        assert_eq!((start % 4096, len), (0, 5000));
        assert_eq!(memory.read_obj::<u8>(GuestAddress(u64::from(start) + 4999)).unwrap(), 7);
        assert_eq!(memory.read_obj::<u64>(GuestAddress(ZERO_PAGE + 0x70)).unwrap(), ACPI_TABLES);
        assert_eq!(params.0.e820_entries, 3);
        let mut line = [0; 14];
        memory.read_slice(&mut line, GuestAddress(CMDLINE)).unwrap();
        assert_eq!(&line, b"console=ttyS0\0");
    }

    #[test]
    fn what_does_not_fit_says_how_much_is_needed() {
        let error = load(&memory(16), &bzimage(), None, "").unwrap_err();
        assert!(matches!(error, BootError::DoesNotFit { needed_mib: 24, have_mib: 16, .. }), "{error}");
        let error = load(&memory(25), &bzimage(), Some(&vec![0; 4 << 20]), "").unwrap_err();
        assert!(matches!(error, BootError::DoesNotFit { needed_mib: 28, .. }), "{error}");
    }

    #[test]
    fn without_an_initrd_the_kernel_is_told_of_none() {
        let (memory, mut image) = (memory(64), bzimage());
        image[0x218..0x220].fill(0xff); // ramdisk_image, ramdisk_size
        load(&memory, &image, None, "").unwrap();
        let params: Plain<boot_params> = memory.read_obj(GuestAddress(ZERO_PAGE)).unwrap();
        assert_eq!((params.0.hdr.ramdisk_image, params.0.hdr.ramdisk_size), (0, 0));
    }

    #[test]
    fn a_bzimage_that_wants_the_end_of_all_addresses_does_not_fit() {
        let mut image = bzimage();
        image[0x258..0x260].fill(0xff); // pref_address
        assert!(matches!(load(&memory(64), &image, None, ""), Err(BootError::DoesNotFit { .. })));
    }

    /// An ELF file of one segment without bytes of its own: `bss_bytes` of zeros at `gpa`.
    fn bss_elf(gpa: u64, bss_bytes: u64) -> Vec<u8> {
        let header = Elf64_Ehdr {
            e_ident: *b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0",
            e_machine: 62,
            e_phoff: size_of::<Elf64_Ehdr>() as u64,
            e_phentsize: size_of::<Elf64_Phdr>() as u16,
            e_phnum: 1,
            ..Default::default()
        };
        let segment = Elf64_Phdr { p_type: PT_LOAD, p_paddr: gpa, p_memsz: bss_bytes, ..Default::default() };
        [Plain(header).as_slice(), Plain(segment).as_slice()].concat()
    }

    #[test]
    fn an_initrd_lies_neither_in_the_kernels_bss_nor_below_high_memory() {
        let start = |elf: &[u8], initrd_bytes| {
            let memory = memory(8);
            load(&memory, elf, Some(&vec![7; initrd_bytes]), "")?;
            Ok::<_, BootError>(
                memory.read_obj::<Plain<boot_params>>(GuestAddress(ZERO_PAGE)).unwrap().0.hdr.ramdisk_image,
            )
        };
        assert_eq!(start(&bss_elf(0x1000, 0x1000), 7 << 20).unwrap(), HIGH_RAM as u32);
        assert!(matches!(start(&bss_elf(0x1000, 0x1000), (7 << 20) + 1), Err(BootError::DoesNotFit { .. })));
        assert_eq!(start(&bss_elf(HIGH_RAM, 6 << 20), 1 << 20).unwrap(), 7 << 20);
        assert!(matches!(start(&bss_elf(HIGH_RAM, 6 << 20), (1 << 20) + 1), Err(BootError::DoesNotFit { .. })));
    }

    #[test]
    fn what_is_not_a_kernel_is_called_so() {
        for bytes in [&b""[..], b"#!/bin/sh\n", &[0x1f, 0x8b, 8, 0], &[0; 4096]] {
            assert!(matches!(load(&memory(16), bytes, None, ""), Err(BootError::NotAKernel)));
        }
        let mut old = bzimage();
        old[0x236..0x238].fill(0); // xloadflags
        assert!(matches!(load(&memory(64), &old, None, ""), Err(BootError::No64BitEntry { .. })));
        assert!(matches!(load(&memory(64), b"\x7fELF", None, ""), Err(BootError::Damaged { .. })));
        assert!(matches!(load(&memory(64), &bzimage(), None, &"x".repeat(2048)), Err(BootError::Cmdline { .. })));
    }

    proptest! {
        #[test]
        fn hostile_images_are_refused_or_loaded_and_never_panic(
            mut image in proptest::collection::vec(any::<u8>(), 0..2048), elf in any::<bool>(),
        ) {
            if elf && image.len() > 64 {
                image[..16].copy_from_slice(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
                image[18..20].copy_from_slice(&62u16.to_le_bytes());
                image[32..40].copy_from_slice(&64u64.to_le_bytes());
                image[54..56].copy_from_slice(&56u16.to_le_bytes());
            } else if image.len() > 0x260 {
                image[0x202..0x206].copy_from_slice(b"HdrS");
                image[0x206..0x208].copy_from_slice(&0x20fu16.to_le_bytes());
                image[0x211] |= 1;
                image[0x236] |= 1;
            }
            let _ = load(&memory(8), &image, Some(&[1, 2, 3]), "");
        }
    }
}
