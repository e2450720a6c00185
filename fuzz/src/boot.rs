//! Kernels and initrds from files: refused, or loaded with the initrd and the command line where the guest is told they are.

use arbitrary::Unstructured;
use vm_memory::{Bytes, GuestAddress};
use vmm::arch::boot::load;
use vmm::arch::layout::{CMDLINE, HIGH_RAM, PVH_START_INFO, ZERO_PAGE};
use vmm::arch::regs::Entry;
use vmm::memory::{self, GuestMemoryMmap, SharedMemory};

const MEMORY_BYTES: u64 = 8 << 20;
const SETUP_HEADER: usize = 0x1f1;

pub fn run(data: &[u8]) {
    thread_local! {
        // What an earlier kernel has left in it makes no difference.
        static MEMORY: SharedMemory = memory::map(MEMORY_BYTES).unwrap();
    }
    let Some(([mode, initrd_bytes, cmdline_bytes], data)) = data.split_first_chunk() else { return };
    let kernel = match mode % 3 {
        0 => data.to_vec(),
        1 => elf(data).unwrap_or_default(),
        _ => bzimage(data).unwrap_or_default(),
    };
    // Up to more than there is memory for.
    let initrd: Vec<u8> =
        (0..u32::from(*initrd_bytes) * if mode & 0x80 == 0 { 37 } else { 40_000 }).map(|n| n as u8 | 1).collect();
    let cmdline = "x".repeat(usize::from(*cmdline_bytes) * 9);
    MEMORY.with(|memory| {
        if let Ok(entry) = load(&**memory, &kernel, Some(&initrd), &cmdline) {
            check(memory, entry, &initrd, &cmdline);
        }
    });
}

fn check(memory: &GuestMemoryMmap, entry: Entry, initrd: &[u8], cmdline: &str) {
    let mut line = vec![0; cmdline.len() + 1];
    memory.read_slice(&mut line, GuestAddress(CMDLINE)).unwrap();
    assert!(line.strip_suffix(b"\0") == Some(cmdline.as_bytes()));
    let word = |at: u64| u64::from(memory.read_obj::<u32>(GuestAddress(at)).unwrap());
    let (start, bytes) = match entry {
        // boot_params.hdr.ramdisk_image and ramdisk_size.
        Entry::Linux64(_) => (word(ZERO_PAGE + 0x218), word(ZERO_PAGE + 0x21c)),
        // hvm_start_info: nr_modules, modlist_paddr; hvm_modlist_entry: paddr, size.
        Entry::Pvh(_) if word(PVH_START_INFO + 12) == 0 => (0, 0),
        Entry::Pvh(_) => {
            let modules = word(PVH_START_INFO + 16);
            (word(modules), word(modules + 8))
        }
    };
    assert_eq!(bytes, initrd.len() as u64);
    let mut found = vec![0; initrd.len()];
    memory.read_slice(&mut found, GuestAddress(start)).unwrap();
    assert!(found == initrd && (initrd.is_empty() || start >= HIGH_RAM || matches!(entry, Entry::Pvh(_))));
}

/// An ELF file with a valid header: what its program headers say, and where they are, comes from `data`.
fn elf(data: &[u8]) -> arbitrary::Result<Vec<u8>> {
    let mut u = Unstructured::new(data);
    let mut file = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    file.extend([2, 0, 62, 0, 1, 0, 0, 0]); // executable, x86-64, version 1
    file.extend(address(&mut u)?.to_le_bytes()); // entry
    let segments = u.int_in_range(0..=5u16)?;
    let headers = if u.ratio(7, 8)? { 64 } else { u.arbitrary()? };
    file.extend(u64::to_le_bytes(headers));
    file.extend([0; 12]); // section headers, flags
    for field in [64, 56, segments, 0, 0, 0] {
        file.extend(u16::to_le_bytes(field));
    }
    for _ in 0..segments {
        let kind: u32 = if u.ratio(1, 16)? { u.arbitrary()? } else { [1, 4][usize::from(u.arbitrary::<bool>()?)] };
        file.extend(kind.to_le_bytes());
        file.extend([5, 0, 0, 0]);
        let offset = if u.ratio(1, 16)? { u.arbitrary()? } else { u64::from(u.arbitrary::<u16>()?) % 1024 };
        let at = address(&mut u)?;
        for field in [offset, at, at, address(&mut u)? & 0xffff, address(&mut u)?, 4096] {
            file.extend(field.to_le_bytes());
        }
    }
    file.extend(u.take_rest());
    Ok(file)
}

/// Mostly in memory or just beyond it.
fn address(u: &mut Unstructured<'_>) -> arbitrary::Result<u64> {
    if u.ratio(1, 8)? { u.arbitrary() } else { u.int_in_range(0..=MEMORY_BYTES + 4096) }
}

/// A bzImage whose setup header is from `data`, but for what marks it as one.
fn bzimage(data: &[u8]) -> arbitrary::Result<Vec<u8>> {
    let mut u = Unstructured::new(data);
    let mut file = vec![0; SETUP_HEADER];
    let mut header: [u8; 0x7b] = u.arbitrary()?;
    header[0x11..0x15].copy_from_slice(b"HdrS");
    if u.ratio(15, 16)? {
        header[0] = 1; // setup_sects
        header[0x15..0x17].copy_from_slice(&0x20fu16.to_le_bytes());
        header[0x20] |= 1; // loadflags: LOADED_HIGH
        header[0x45] |= 1; // xloadflags: XLF_KERNEL_64
    }
    if u.ratio(3, 4)? {
        header[0x23..0x27].copy_from_slice(&(HIGH_RAM as u32).to_le_bytes()); // code32_start
        header[0x67..0x6f].copy_from_slice(&address(&mut u)?.to_le_bytes()); // pref_address
        header[0x6f..0x73].copy_from_slice(&(address(&mut u)? as u32).to_le_bytes()); // init_size
    }
    file.extend(header);
    file.resize(1024, 0);
    file.extend(u.take_rest());
    Ok(file)
}
