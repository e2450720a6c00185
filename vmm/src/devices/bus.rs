//! Address ranges and the devices behind them: one bus for port I/O, one for MMIO.
//!
//! vCPU threads call in; a device is behind its own mutex, so that two vCPUs in two devices do not wait for each other.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

/// A device that answers reads and writes of its address range.
///
/// `offset` is relative to the start of the range that the device was registered with; `data` is 1 to 8 bytes for MMIO and
/// 1, 2 or 4 bytes for port I/O. A device answers every access somehow: what the guest should not have done reads as zeros and
/// writes nothing.
pub trait BusDevice: Send {
    /// The guest reads `data.len()` bytes at `offset`.
    fn read(&mut self, offset: u64, data: &mut [u8]);
    /// The guest writes `data` at `offset`.
    fn write(&mut self, offset: u64, data: &[u8]);
}

/// Two ranges of a bus overlap, or one is empty.
#[derive(Debug, thiserror::Error)]
#[error("bus range {base:#x}+{len:#x} is empty or overlaps another device")]
pub struct OverlapError {
    /// First address of the refused range.
    pub base: u64,
    /// Its length in bytes.
    pub len: u64,
}

/// Maps addresses to devices. Built once, then shared read-only by the vCPU threads.
#[derive(Default, Clone)]
pub struct Bus {
    ranges: BTreeMap<u64, (u64, Arc<Mutex<dyn BusDevice>>)>,
}

impl Bus {
    /// Puts `device` at `base`, `len` bytes long.
    pub fn insert(&mut self, base: u64, len: u64, device: Arc<Mutex<dyn BusDevice>>) -> Result<(), OverlapError> {
        let overlap = OverlapError { base, len };
        let end = base.checked_add(len).filter(|_| len > 0).ok_or(OverlapError { base, len })?;
        if let Some((&start, (other_len, _))) = self.ranges.range(..end).next_back()
            && start + other_len > base
        {
            return Err(overlap);
        }
        self.ranges.insert(base, (len, device));
        Ok(())
    }

    fn find(&self, address: u64, len: usize) -> Option<(u64, &Arc<Mutex<dyn BusDevice>>)> {
        let (&base, (range_len, device)) = self.ranges.range(..=address).next_back()?;
        let offset = address - base;
        (offset.checked_add(len as u64)? <= *range_len).then_some((offset, device))
    }

    /// Reads `data.len()` bytes at `address`; false, and `data` all ones as on a real bus, when nothing is there.
    pub fn read(&self, address: u64, data: &mut [u8]) -> bool {
        let Some((offset, device)) = self.find(address, data.len()) else {
            data.fill(0xff);
            return false;
        };
        device.lock().expect("a device panicked").read(offset, data);
        true
    }

    /// Writes `data` at `address`; false when nothing is there.
    pub fn write(&self, address: u64, data: &[u8]) -> bool {
        let Some((offset, device)) = self.find(address, data.len()) else { return false };
        device.lock().expect("a device panicked").write(offset, data);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Echo(Vec<(u64, Vec<u8>)>);
    impl BusDevice for Echo {
        fn read(&mut self, offset: u64, data: &mut [u8]) {
            data.fill(offset as u8);
        }
        fn write(&mut self, offset: u64, data: &[u8]) {
            self.0.push((offset, data.to_vec()));
        }
    }

    #[test]
    fn accesses_reach_their_device_and_nothing_else() {
        let mut bus = Bus::default();
        let echo = Arc::new(Mutex::new(Echo(Vec::new())));
        bus.insert(0x100, 0x10, echo.clone()).unwrap();
        let mut data = [0; 4];
        assert!(bus.read(0x104, &mut data));
        assert_eq!(data, [4; 4]);
        assert!(!bus.read(0x10e, &mut data), "an access across the end belongs to nobody");
        assert_eq!(data, [0xff; 4]);
        assert!(!bus.write(0xff, &[1]));
        assert!(bus.write(0x10f, &[1]));
        assert_eq!(echo.lock().unwrap().0, vec![(0xf, vec![1])]);
    }

    #[test]
    fn overlapping_and_empty_ranges_are_refused() {
        let mut bus = Bus::default();
        let echo = || Arc::new(Mutex::new(Echo(Vec::new())));
        bus.insert(0x100, 0x10, echo()).unwrap();
        for (base, len) in [(0x100, 0x10), (0xf1, 0x10), (0x10f, 1), (0x90, 0x200), (0x200, 0), (u64::MAX, 2)] {
            assert!(bus.insert(base, len, echo()).is_err(), "{base:#x}+{len:#x}");
        }
        bus.insert(0x110, 1, echo()).unwrap();
        bus.insert(0xff, 1, echo()).unwrap();
    }
}
