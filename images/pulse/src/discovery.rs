//! Where the virtio-mmio devices are.
//!
//! Two ways are in use. A VMM without ACPI adds a word for each device to the command line (the syntax of Linux'
//! `virtio_mmio.device=`); one with ACPI describes them in its DSDT, see [`crate::acpi`].

/// Devices that are kept at most. QEMU's microvm machine describes 24 places, most of them empty.
pub const MOST_DEVICES: usize = 32;

/// A virtio-mmio register window and its interrupt.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MmioDevice {
    /// Physical address of the registers.
    pub base: u64,
    /// Length of the window, bytes.
    pub bytes: u64,
    /// Global system interrupt.
    pub irq: u32,
}

/// A list of devices in the order in which they were found.
#[derive(Clone, Debug, Default)]
pub struct Devices {
    found: [MmioDevice; MOST_DEVICES],
    len: usize,
}

impl Devices {
    /// The devices.
    pub fn as_slice(&self) -> &[MmioDevice] {
        &self.found[..self.len]
    }

    /// Adds a device whose window can be one; others, and those past the last place, are ignored.
    pub fn add(&mut self, device: MmioDevice) {
        // The window must hold the registers (0x100 bytes) and be mapped (below 4 GiB), clear of low memory.
        let end = device.base.saturating_add(device.bytes);
        let sound = device.bytes > 0x100 && device.base.is_multiple_of(4) && device.base >= 0x10_0000 && end <= 1 << 32;
        if sound && self.len < MOST_DEVICES {
            self.found[self.len] = device;
            self.len += 1;
        }
    }

    /// The devices that a command line names.
    pub fn from_cmdline(line: &str) -> Self {
        let mut devices = Self::default();
        for word in line.split_ascii_whitespace() {
            if let Some(device) = word.strip_prefix("virtio_mmio.device=").and_then(parse_device) {
                devices.add(device);
            }
        }
        devices
    }
}

/// `SIZE@BASE:IRQ[:ID]`.
fn parse_device(text: &str) -> Option<MmioDevice> {
    let (bytes, rest) = text.split_once('@')?;
    let mut parts = rest.split(':');
    Some(MmioDevice {
        bytes: crate::load::parse_size(bytes).or_else(|| parse_number(bytes))?,
        base: parse_number(parts.next()?)?,
        irq: u32::try_from(parse_number(parts.next()?)?).ok()?,
    })
}

fn parse_number(text: &str) -> Option<u64> {
    match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16).ok(),
        None => crate::load::parse_decimal(text),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_words_of_qemu_and_others() {
        let devices = Devices::from_cmdline(
            "ws=1M virtio_mmio.device=512@0xfeb02e00:12 virtio_mmio.device=4K@0xd0000000:5 \
             virtio_mmio.device=0x200@3489660928:6:1",
        );
        let expected = [
            MmioDevice { base: 0xfeb0_2e00, bytes: 512, irq: 12 },
            MmioDevice { base: 0xd000_0000, bytes: 4096, irq: 5 },
            MmioDevice { base: 0xd000_0000, bytes: 512, irq: 6 },
        ];
        assert_eq!(devices.as_slice(), expected);
    }

    #[test]
    fn windows_that_cannot_be_are_ignored() {
        for word in [
            "512@0x1000:5",
            "16@0xd0000000:5",
            "512@0x100000000:5",
            "512@0xffffffffffffffff:5",
            "512@0xd0000001:5",
            "@:",
            "512@0xd0000000",
            "512",
        ] {
            let line = format!("virtio_mmio.device={word}");
            assert!(Devices::from_cmdline(&line).as_slice().is_empty(), "{word}");
        }
    }
}
