//! The guest's own addresses: given by the user, or learned from what the guest itself says in ARP and neighbour discovery.
//!
//! Only these two protocols are believed. In them a machine states what it answers for; the source address of an ordinary
//! packet says nothing, because a guest that routes sends packets of others, and announcing those after a migration would take
//! others' addresses away.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Addresses kept of each family, the most recently seen ones.
pub(super) const MAX_LEARNED: usize = 8;

/// How much of a frame [`Learned::see`] wants: Ethernet, IPv6 and the first words of a neighbour solicitation.
pub(super) const LOOK_BYTES: usize = 14 + 40 + 24;

/// An Ethernet address.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct MacAddress(pub [u8; 6]);

impl MacAddress {
    /// Whether it may be a station's own: neither a group's nor zero.
    pub fn is_unicast(&self) -> bool {
        self.0[0] & 1 == 0 && self.0 != [0; 6]
    }
}

impl fmt::Display for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Not six hexadecimal bytes with colons between them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not an Ethernet address like 52:54:00:12:34:56")]
pub struct MacAddressError;

impl FromStr for MacAddress {
    type Err = MacAddressError;

    fn from_str(text: &str) -> Result<Self, MacAddressError> {
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts.next().filter(|part| part.len() == 2 && part.bytes().all(|c| c.is_ascii_hexdigit()));
            *byte = part.and_then(|part| u8::from_str_radix(part, 16).ok()).ok_or(MacAddressError)?;
        }
        if parts.next().is_some() { Err(MacAddressError) } else { Ok(Self(bytes)) }
    }
}

/// What the guest answers for on its network.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetAddresses {
    /// Its Ethernet address.
    pub mac: MacAddress,
    /// Configured ones first, then learned ones, most recently seen first.
    pub ipv4: Vec<Ipv4Addr>,
    /// Likewise.
    pub ipv6: Vec<Ipv6Addr>,
}

/// Addresses learned, most recently seen first.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Learned {
    pub(super) ipv4: Vec<Ipv4Addr>,
    pub(super) ipv6: Vec<Ipv6Addr>,
}

impl Learned {
    /// Looks at the beginning of a frame that the guest sent, without a virtio header.
    pub(super) fn see(&mut self, mac: MacAddress, frame: &[u8]) {
        match frame.get(12..14) {
            Some([0x08, 0x06]) => {
                if let Some(address) = arp_sender(mac, frame) {
                    remember(&mut self.ipv4, address);
                }
            }
            Some([0x86, 0xdd]) => {
                if let Some(address) = neighbour_discovery_source(mac, frame) {
                    remember(&mut self.ipv6, address);
                }
            }
            _ => {}
        }
    }

    /// With the configured addresses before them.
    pub(super) fn after(&self, configured: &[IpAddr], mac: MacAddress) -> NetAddresses {
        let mut addresses = NetAddresses { mac, ipv4: Vec::new(), ipv6: Vec::new() };
        for address in configured {
            match address {
                IpAddr::V4(address) => addresses.ipv4.push(*address),
                IpAddr::V6(address) => addresses.ipv6.push(*address),
            }
        }
        let new = |known: &[Ipv4Addr]| self.ipv4.iter().filter(|a| !known.contains(a)).copied().collect::<Vec<_>>();
        addresses.ipv4.extend(new(&addresses.ipv4));
        let new = |known: &[Ipv6Addr]| self.ipv6.iter().filter(|a| !known.contains(a)).copied().collect::<Vec<_>>();
        addresses.ipv6.extend(new(&addresses.ipv6));
        addresses
    }
}

fn remember<A: PartialEq>(addresses: &mut Vec<A>, address: A) {
    match addresses.iter().position(|known| *known == address) {
        Some(0) => {}
        Some(position) => addresses[..=position].rotate_right(1),
        None => {
            addresses.truncate(MAX_LEARNED - 1);
            addresses.insert(0, address);
        }
    }
}

/// An address that a host can have on its network.
pub(super) fn is_host_ipv4(address: Ipv4Addr) -> bool {
    let first = address.octets()[0];
    (1..224).contains(&first) && first != 127
}

/// As above.
pub(super) fn is_host_ipv6(address: Ipv6Addr) -> bool {
    !address.is_unspecified() && !address.is_multicast() && !address.is_loopback()
}

fn array<const N: usize>(frame: &[u8], offset: usize) -> Option<[u8; N]> {
    frame.get(offset..offset + N)?.try_into().ok()
}

/// The sender of an ARP request or reply for IPv4 over Ethernet (RFC 826). A probe (RFC 5227) has the sender 0.0.0.0.
fn arp_sender(mac: MacAddress, frame: &[u8]) -> Option<Ipv4Addr> {
    // Hardware type, protocol type, and the lengths of their addresses.
    const ETHERNET_IPV4: [u8; 6] = [0, 1, 8, 0, 6, 4];
    if array(frame, 14)? != ETHERNET_IPV4 || array(frame, 22)? != mac.0 {
        return None;
    }
    Some(Ipv4Addr::from(array::<4>(frame, 28)?)).filter(|address| is_host_ipv4(*address))
}

/// The source of a router solicitation, neighbour solicitation or neighbour advertisement (RFC 4861) of the guest's own. The
/// hop limit of 255 shows that no router passed it on. (The source is `::` while an address is only being tried out.)
fn neighbour_discovery_source(mac: MacAddress, frame: &[u8]) -> Option<Ipv6Addr> {
    const ICMPV6: u8 = 58;
    const ROUTER_SOLICITATION: u8 = 133;
    const NEIGHBOUR_SOLICITATION: u8 = 135;
    const NEIGHBOUR_ADVERTISEMENT: u8 = 136;
    if array(frame, 6)? != mac.0 {
        return None;
    }
    let [next_header, hop_limit] = array(frame, 20)?;
    let [kind] = array(frame, 54)?;
    if next_header != ICMPV6
        || hop_limit != 255
        || ![ROUTER_SOLICITATION, NEIGHBOUR_SOLICITATION, NEIGHBOUR_ADVERTISEMENT].contains(&kind)
    {
        return None;
    }
    Some(Ipv6Addr::from(array::<16>(frame, 22)?)).filter(|address| is_host_ipv6(*address))
}
