//! Where things are in the guest's physical address space. The migration peers must agree on all of it.
//!
//! ```text
//! 0          RAM (boot structures in the first 640 KiB, ACPI tables at 0xe0000)
//! 3 GiB      end of low RAM at most; above it, up to 4 GiB, devices:
//!            0xd000_0000 virtio-mmio, 4 KiB each; 0xfec0_0000 I/O APIC; 0xfee0_0000 local APICs
//! 4 GiB      the rest of RAM
//! ```

/// Smallest guest memory: a PVH guest of our own is content with little.
pub const MIN_MEMORY_BYTES: u64 = 4 << 20;
/// Largest guest memory. 512 GiB keeps every bitmap and index of a migration small.
pub const MAX_MEMORY_BYTES: u64 = 512 << 30;

/// End of low RAM, start of the device hole.
pub const HOLE_START: u64 = 3 << 30;
/// End of the device hole: 4 GiB.
pub const HOLE_END: u64 = 4 << 30;

/// GDT of the boot protocols.
pub const BOOT_GDT: u64 = 0x500;
/// PVH `hvm_start_info`, its memory map and module list.
pub const PVH_START_INFO: u64 = 0x6000;
/// Linux zero page (`boot_params`).
pub const ZERO_PAGE: u64 = 0x7000;
/// Initial stack of the 64-bit boot protocol.
pub const BOOT_STACK: u64 = 0x8ff0;
/// Page tables of the 64-bit boot protocol: PML4, PDPT, four PDs.
pub const BOOT_PAGE_TABLES: u64 = 0x9000;
/// Kernel command line.
pub const CMDLINE: u64 = 0x2_0000;
/// Longest command line, with its NUL (Linux: COMMAND_LINE_SIZE is 2048 on x86).
pub const CMDLINE_BYTES: usize = 2048;
/// End of conventional memory: the EBDA would begin here.
pub const EBDA_START: u64 = 0x9_fc00;
/// RSDP and the tables behind it, inside the BIOS read-only area that Linux also scans.
pub const ACPI_TABLES: u64 = 0xe_0000;
/// Where a processor starts after a reset, as far as real mode reaches: `F000:FFF0`.
pub const RESET_VECTOR: u64 = 0xf_fff0;
/// Start of high memory, where kernels load.
pub const HIGH_RAM: u64 = 0x10_0000;

/// First virtio-mmio device; one page each.
pub const VIRTIO_MMIO_BASE: u64 = 0xd000_0000;
/// Bytes of one virtio-mmio device's window.
pub const VIRTIO_MMIO_BYTES: u64 = 0x1000;
/// First GSI of virtio devices; device n has `VIRTIO_GSI_BASE + n`, up to the I/O APIC's last pin.
pub const VIRTIO_GSI_BASE: u32 = 16;
/// How many virtio devices have a pin of their own.
pub const MAX_VIRTIO_DEVICES: usize = 8;
/// I/O APIC, where KVM puts it.
pub const IOAPIC: u32 = 0xfec0_0000;
/// Local APICs.
pub const LAPIC: u32 = 0xfee0_0000;
/// Three pages for KVM on Intel hosts without unrestricted guest (KVM_SET_TSS_ADDR).
pub const KVM_TSS: u64 = 0xfffb_d000;
/// One page for KVM's identity map (KVM_SET_IDENTITY_MAP_ADDR).
pub const KVM_IDENTITY_MAP: u64 = 0xfffb_c000;

/// First serial port and its GSI.
pub const COM1_PORT: u64 = 0x3f8;
/// GSI of COM1.
pub const COM1_GSI: u32 = 4;
/// Our power registers (see `devices::power`).
pub const POWER_PORT: u64 = 0x600;
/// GSI of the ACPI generic event device.
pub const GED_GSI: u32 = 9;
/// pvpanic's port, as QEMU has it.
pub const PVPANIC_PORT: u64 = 0x505;

/// A run of RAM in the guest's physical address space.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RamRegion {
    /// First address.
    pub gpa: u64,
    /// Length in bytes.
    pub bytes: u64,
}

/// Where `bytes` of RAM are: below the hole, and what is more above 4 GiB.
pub fn ram_regions(bytes: u64) -> Vec<RamRegion> {
    let low = RamRegion { gpa: 0, bytes: bytes.min(HOLE_START) };
    let high = RamRegion { gpa: HOLE_END, bytes: bytes - low.bytes };
    if high.bytes == 0 { vec![low] } else { vec![low, high] }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ram_leaves_the_hole_free() {
        assert_eq!(ram_regions(1 << 30), [RamRegion { gpa: 0, bytes: 1 << 30 }]);
        assert_eq!(ram_regions(3 << 30), [RamRegion { gpa: 0, bytes: 3 << 30 }]);
        assert_eq!(
            ram_regions(8 << 30),
            [RamRegion { gpa: 0, bytes: 3 << 30 }, RamRegion { gpa: 4 << 30, bytes: 5 << 30 }]
        );
    }
}
