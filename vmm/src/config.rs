//! What a VM is made of, checked.

use crate::arch::layout::{MAX_MEMORY_BYTES, MAX_VIRTIO_DEVICES, MIN_MEMORY_BYTES};
use crate::devices::virtio::{MacAddress, NetConfig};

/// The most vCPUs of a VM: local APIC ids without x2APIC end at 254; far fewer are "small".
pub const MAX_CPUS: u8 = 64;
/// The most network interfaces: one virtio slot is the random-number generator's, one the balloon's.
pub const MAX_NICS: usize = MAX_VIRTIO_DEVICES - 2;

/// The most addresses that are told of one network interface. All of them are announced after a migration, several times.
pub const MAX_ADDRESSES: usize = 64;

/// The machine that a guest sees. Both sides of a migration build it from the same description.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VmConfig {
    /// vCPUs.
    pub cpus: u8,
    /// RAM in bytes.
    pub memory_bytes: u64,
    /// Network interfaces, in the order in which the guest finds them.
    pub nics: Vec<NetConfig>,
}

/// A machine that cannot be.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// No vCPU, or too many.
    #[error("{0} vCPUs: a VM has 1 to {MAX_CPUS}")]
    Cpus(u8),
    /// Memory out of range.
    #[error("{0} bytes of memory: a VM has a multiple of 1 MiB from {min} MiB to {max} GiB", min = MIN_MEMORY_BYTES >> 20, max = MAX_MEMORY_BYTES >> 30)]
    Memory(u64),
    /// Too many interfaces.
    #[error("{0} network interfaces: a VM has at most {MAX_NICS}")]
    Nics(usize),
    /// Too many addresses.
    #[error("{0} addresses of network interface {1}: at most {MAX_ADDRESSES} can be given")]
    Addresses(usize, usize),
    /// A multicast or zero MAC address.
    #[error("{0} cannot be an interface's MAC address: it must be unicast (first byte even) and not zero")]
    Mac(MacAddress),
    /// Two interfaces with one address.
    #[error("two network interfaces have the MAC address {0}")]
    DuplicateMac(MacAddress),
}

impl VmConfig {
    /// Checks all of it.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let VmConfig { cpus, memory_bytes, nics } = self;
        if !(1..=MAX_CPUS).contains(cpus) {
            return Err(ConfigError::Cpus(*cpus));
        }
        if !(MIN_MEMORY_BYTES..=MAX_MEMORY_BYTES).contains(memory_bytes) || !memory_bytes.is_multiple_of(1 << 20) {
            return Err(ConfigError::Memory(*memory_bytes));
        }
        if nics.len() > MAX_NICS {
            return Err(ConfigError::Nics(nics.len()));
        }
        for (i, nic) in nics.iter().enumerate() {
            if nic.addresses.len() > MAX_ADDRESSES {
                return Err(ConfigError::Addresses(nic.addresses.len(), i));
            }
            if !nic.mac.is_unicast() {
                return Err(ConfigError::Mac(nic.mac));
            }
            if nics[..i].iter().any(|other| other.mac == nic.mac) {
                return Err(ConfigError::DuplicateMac(nic.mac));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn impossible_machines_are_named() {
        let nic = |last| NetConfig { mac: MacAddress([0x52, 0x54, 0, 0, 0, last]), addresses: vec![] };
        let good = VmConfig { cpus: 2, memory_bytes: 256 << 20, nics: vec![nic(1), nic(2)] };
        assert_eq!(good.validate(), Ok(()));
        let with = |change: fn(&mut VmConfig)| {
            let mut config = good.clone();
            change(&mut config);
            config.validate().unwrap_err()
        };
        assert_eq!(with(|c| c.cpus = 0), ConfigError::Cpus(0));
        assert_eq!(with(|c| c.cpus = 65), ConfigError::Cpus(65));
        assert_eq!(with(|c| c.memory_bytes = 0), ConfigError::Memory(0));
        assert_eq!(with(|c| c.memory_bytes += 4096), ConfigError::Memory((256 << 20) + 4096));
        assert_eq!(with(|c| c.memory_bytes = 1 << 40), ConfigError::Memory(1 << 40));
        assert_eq!(with(|c| c.nics = vec![c.nics[0].clone(); 7]), ConfigError::Nics(7));
        assert_eq!(
            with(|c| c.nics[1].addresses = vec![[10, 0, 0, 1].into(); MAX_ADDRESSES + 1]),
            ConfigError::Addresses(65, 1)
        );
        assert!(matches!(with(|c| c.nics[1] = c.nics[0].clone()), ConfigError::DuplicateMac(_)));
        assert!(matches!(with(|c| c.nics[0].mac.0[0] = 1), ConfigError::Mac(_)));
        assert!(matches!(with(|c| c.nics[0].mac = MacAddress([0; 6])), ConfigError::Mac(_)));
    }
}
