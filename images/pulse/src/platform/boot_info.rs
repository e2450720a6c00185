//! What the VMM left for us: PVH's `hvm_start_info`, the command line and the memory map.
//!
//! All of it is copied before the workload owns memory, since it may lie in memory that is then ours.

use pulse_core::acpi::Physical;
use pulse_core::ram::{MOST_EXTENTS, Ram};
use pulse_core::text::Text;

const MAGIC: u32 = 0x336e_c578;
const RAM: u32 = 1;
const MOST_CMDLINE_BYTES: usize = 4096;

/// `struct hvm_start_info`.
#[repr(C)]
#[derive(Clone, Copy)]
struct StartInfo {
    magic: u32,
    version: u32,
    flags: u32,
    nr_modules: u32,
    modlist_paddr: u64,
    cmdline_paddr: u64,
    rsdp_paddr: u64,
    memmap_paddr: u64,
    memmap_entries: u32,
    reserved: u32,
}

/// `struct hvm_memmap_table_entry`.
#[repr(C)]
#[derive(Clone, Copy)]
struct MemmapEntry {
    addr: u64,
    size: u64,
    kind: u32,
    reserved: u32,
}

/// Copies of what was left.
pub struct BootInfo {
    /// The command line, empty when there is none.
    pub cmdline: Text<MOST_CMDLINE_BYTES>,
    /// The memory of the map.
    pub ram: Ram,
    /// ACPI's root pointer, or 0.
    pub rsdp: u64,
}

impl BootInfo {
    /// Reads what lies at `start_info`. What is damaged is as if it were not there.
    pub fn read(start_info: u64) -> Self {
        let mut info = Self { cmdline: Text::new(), ram: Ram::default(), rsdp: 0 };
        let Some(start) = copy::<StartInfo>(start_info).filter(|start| start.magic == MAGIC) else { return info };
        info.rsdp = start.rsdp_paddr;
        read_cmdline(start.cmdline_paddr, &mut info.cmdline);
        if start.version >= 1 {
            for index in 0..u64::from(start.memmap_entries).min(4 * MOST_EXTENTS as u64) {
                let at = start.memmap_paddr.wrapping_add(index * size_of::<MemmapEntry>() as u64);
                if let Some(entry) = copy::<MemmapEntry>(at).filter(|entry| entry.kind == RAM) {
                    info.ram.add(entry.addr, entry.size);
                }
            }
        }
        info
    }
}

fn read_cmdline(at: u64, out: &mut Text<MOST_CMDLINE_BYTES>) {
    use core::fmt::Write;
    let Some(bytes) = (at != 0).then(|| LowMemory.slice(at, MOST_CMDLINE_BYTES)).flatten() else { return };
    let bytes = bytes.split(|&byte| byte == 0).next().unwrap_or(bytes);
    for chunk in bytes.utf8_chunks() {
        // A `Text` never fails: it cuts.
        let _ = out.write_str(chunk.valid());
    }
}

/// The first 4 GiB, which `boot.s` maps whether memory is there or not (where none is, a read gives all ones).
pub struct LowMemory;

impl Physical for LowMemory {
    fn slice(&self, address: u64, bytes: usize) -> Option<&[u8]> {
        let end = address.checked_add(bytes as u64)?;
        if address == 0 || end > 1 << 32 {
            return None;
        }
        // SAFETY: mapped, and any byte is a valid value. Nothing writes there while the slice lives: it is used before
        // the workload and the network card start, and our own image is not where a VMM puts its tables.
        Some(unsafe { core::slice::from_raw_parts(address as *const u8, bytes) })
    }
}

/// Copies a structure made of integers.
fn copy<T: Copy>(address: u64) -> Option<T> {
    let bytes = LowMemory.slice(address, size_of::<T>())?;
    // SAFETY: the slice is as long as `T`, which both callers make of integers only, so that any bytes are one; the read
    // asks for no alignment.
    Some(unsafe { bytes.as_ptr().cast::<T>().read_unaligned() })
}
