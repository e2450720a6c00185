//! The saved state of a virtio-net device.

use std::net::{Ipv4Addr, Ipv6Addr};

use serde::{Deserialize, Serialize};

use super::addresses::{Learned, MAX_LEARNED, MacAddress, is_host_ipv4, is_host_ipv6};
use crate::devices::virtio::device::DeviceStateError;

/// Version of [`NetState`].
pub(super) const NET_STATE_VERSION: u16 = 1;

/// What a virtio-net device has besides its queues and features.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetState {
    /// As the guest reads it from the configuration space.
    pub mac: MacAddress,
    /// `VIRTIO_NET_S_ANNOUNCE` is set: the guest was asked to announce itself and has not said that it did.
    pub announce: bool,
    /// Learned IPv4 addresses, most recently seen first.
    pub ipv4: Vec<Ipv4Addr>,
    /// Learned IPv6 addresses, most recently seen first.
    pub ipv6: Vec<Ipv6Addr>,
}

impl NetState {
    /// Checks every field for a device with address `mac`.
    pub(super) fn check(self, mac: MacAddress) -> Result<(bool, Learned), DeviceStateError> {
        let Self { mac: found, announce, ipv4, ipv6 } = self;
        if found != mac {
            let reason = format!("it is {found}, the device here has {mac}");
            return Err(DeviceStateError::Field { field: "mac", reason });
        }
        check_learned("ipv4", &ipv4, |address| is_host_ipv4(*address))?;
        check_learned("ipv6", &ipv6, |address| is_host_ipv6(*address))?;
        Ok((announce, Learned { ipv4, ipv6 }))
    }
}

fn check_learned<A: PartialEq + std::fmt::Display>(
    field: &'static str,
    addresses: &[A],
    is_host: impl Fn(&A) -> bool,
) -> Result<(), DeviceStateError> {
    if addresses.len() > MAX_LEARNED {
        let reason = format!("{} addresses are more than {MAX_LEARNED}", addresses.len());
        return Err(DeviceStateError::Field { field, reason });
    }
    for (index, address) in addresses.iter().enumerate() {
        if !is_host(address) {
            return Err(DeviceStateError::Field { field, reason: format!("{address} is not a host's address") });
        }
        if addresses[..index].contains(address) {
            return Err(DeviceStateError::Field { field, reason: format!("{address} is there twice") });
        }
    }
    Ok(())
}
