//! Telling the network where the guest is now: the frames, and when to send them.
//!
//! RARP tells switches, and works for a guest whose addresses nobody knows. Neighbours, bridges and overlay networks that
//! keep tables of addresses listen to gratuitous ARP (both forms are in use, RFC 5227 section 3) and to unsolicited neighbour
//! advertisements (RFC 4861 section 7.2.6). Frames get lost, so all are repeated.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::sync::Arc;
use std::time::Duration;

use etherparse::{
    ArpEthIpv4Packet, ArpHardwareId, ArpOperation, ArpPacket, EtherType, Ethernet2Header, Icmpv6Header, Icmpv6Type,
    IpNumber, Ipv6FlowLabel, Ipv6Header,
};

use crate::report::AnnounceReport;
use crate::traits::{Announcer, NicAddresses};

/// The shortest Ethernet frame, without its checksum; shorter ones are padded with zeros.
pub const MIN_FRAME_BYTES: usize = 60;

/// The most addresses that a report lists.
const MAX_REPORTED_ADDRESSES: usize = 256;

const BROADCAST: [u8; 6] = [0xff; 6];
const RARP: EtherType = EtherType(0x8035);
const RARP_REQUEST: ArpOperation = ArpOperation(3);
/// All nodes on the link, and the hardware address that it maps to (RFC 2464 section 7).
const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
const ALL_NODES_MAC: [u8; 6] = [0x33, 0x33, 0, 0, 0, 1];

/// When announcements are sent, counted from the start of the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Schedule(pub Vec<Duration>);

impl Default for Schedule {
    fn default() -> Self {
        Self([0, 50, 150, 350, 750, 1550].map(Duration::from_millis).to_vec())
    }
}

/// One frame and where it goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// Number of the network interface.
    pub nic: usize,
    /// Ethernet frame, padded, without checksum.
    pub bytes: Vec<u8>,
}

/// Everything that is going to be announced.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// The frames of one burst.
    pub frames: Vec<Frame>,
    /// What the report says of it.
    pub report: AnnounceReport,
}

/// Plans the announcement of all interfaces.
pub fn plan(nics: &[NicAddresses], schedule: &Schedule) -> Plan {
    let mut plan = Plan::default();
    plan.report.bursts = schedule.0.len() as u32;
    for (nic, NicAddresses { mac, ipv4, ipv6 }) in nics.iter().enumerate() {
        let mut add = |count: fn(&mut AnnounceReport) -> &mut u32, bytes: Vec<u8>| {
            *count(&mut plan.report) += 1;
            plan.frames.push(Frame { nic, bytes });
        };
        // Those that neighbours act upon come first.
        for address in ipv4 {
            add(|report| &mut report.arp, gratuitous_arp(*mac, *address, ArpOperation::REQUEST));
            add(|report| &mut report.arp, gratuitous_arp(*mac, *address, ArpOperation::REPLY));
        }
        for address in ipv6 {
            add(|report| &mut report.na, unsolicited_na(*mac, *address));
        }
        add(|report| &mut report.rarp, rarp(*mac));
        let text = mac.map(|byte| format!("{byte:02x}")).join(":");
        plan.report.addresses.push(text);
        plan.report.addresses.extend(ipv4.iter().map(ToString::to_string));
        plan.report.addresses.extend(ipv6.iter().map(ToString::to_string));
    }
    // It goes into a message, whose length has a limit.
    plan.report.addresses.truncate(MAX_REPORTED_ADDRESSES);
    plan
}

/// Sends one burst. What cannot be sent is logged and left out: the next burst comes.
pub fn burst(plan: &Plan, announcer: &Arc<dyn Announcer>) {
    for Frame { nic, bytes } in &plan.frames {
        if let Err(error) = announcer.inject_frame(*nic, bytes) {
            tracing::warn!(nic, %error, "could not announce");
        }
    }
}

/// An ARP packet for an address that asks for, or tells, itself: to everyone.
fn gratuitous_arp(mac: [u8; 6], address: Ipv4Addr, operation: ArpOperation) -> Vec<u8> {
    // In the reply form the target's hardware address is our own (RFC 5227 leaves it open; this is what arping and
    // Linux send); in the request form it is not known, so zero.
    let target_mac = if operation == ArpOperation::REPLY { mac } else { [0; 6] };
    let packet = ArpEthIpv4Packet {
        operation,
        sender_mac: mac,
        sender_ipv4: address.octets(),
        target_mac,
        target_ipv4: address.octets(),
    };
    ethernet(mac, BROADCAST, EtherType::ARP, &ArpPacket::from(packet).to_bytes())
}

/// A reverse ARP request for our own hardware address, as QEMU sends it: it says nothing but where the address is.
fn rarp(mac: [u8; 6]) -> Vec<u8> {
    let packet = ArpPacket::new(ArpHardwareId::ETHERNET, EtherType::IPV4, RARP_REQUEST, &mac, &[0; 4], &mac, &[0; 4])
        .expect("sender and target have the same lengths");
    ethernet(mac, BROADCAST, RARP, &packet.to_bytes())
}

/// A neighbour advertisement that nobody asked for: override what you know, with our hardware address.
fn unsolicited_na(mac: [u8; 6], address: Ipv6Addr) -> Vec<u8> {
    let header = etherparse::icmpv6::NeighborAdvertisementHeader { router: false, solicited: false, r#override: true };
    // The target, then the option "target link-layer address" (type 2, one unit of 8 bytes; RFC 4861 section 4.6.1).
    let body = [&address.octets()[..], &[2, 1], &mac].concat();
    let (source, destination) = (address.octets(), ALL_NODES.octets());
    let icmp = Icmpv6Header::with_checksum(Icmpv6Type::NeighborAdvertisement(header), source, destination, &body)
        .expect("the body is 24 bytes long");
    let ip = Ipv6Header {
        traffic_class: 0,
        flow_label: Ipv6FlowLabel::ZERO,
        payload_length: (icmp.header_len() + body.len()) as u16,
        next_header: IpNumber::IPV6_ICMP,
        // Anything else is dropped, because it came through a router (RFC 4861 section 7.1.2).
        hop_limit: 255,
        source,
        destination,
    };
    ethernet(mac, ALL_NODES_MAC, EtherType::IPV6, &[&ip.to_bytes()[..], &icmp.to_bytes(), &body].concat())
}

fn ethernet(source: [u8; 6], destination: [u8; 6], ether_type: EtherType, payload: &[u8]) -> Vec<u8> {
    let mut bytes = Ethernet2Header { source, destination, ether_type }.to_bytes().to_vec();
    bytes.extend(payload);
    bytes.resize(bytes.len().max(MIN_FRAME_BYTES), 0);
    bytes
}

#[cfg(test)]
mod tests;
