//! What a guest is made from: the built-in guest, kernels, container images.

/// The built-in guest: *pulse*, an ELF64 executable that a VMM starts through its PVH note.
///
/// It writes memory and checks every page of it, reports on the serial port, and answers the network; `docs/pulse.md`
/// says what it understands and what it says. The bytes are those of a whole ELF file, without debug information.
pub fn pulse_elf() -> &'static [u8] {
    include_bytes!(env!("PULSE_ELF"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_built_in_guest_is_an_elf_with_a_pvh_note() {
        let elf = pulse_elf();
        assert!(elf.starts_with(b"\x7fELF\x02\x01\x01"), "ELF, 64-bit, little-endian");
        // XEN_ELFNOTE_PHYS32_ENTRY: a name of 4 bytes, a descriptor of 4 bytes, type 18.
        let note = [4, 0, 0, 0, 4, 0, 0, 0, 18, 0, 0, 0, b'X', b'e', b'n', 0];
        assert!(elf.windows(note.len()).any(|window| window == note));
        assert!(elf.len() < 512 << 10, "it has {} bytes", elf.len());
    }
}
