use std::sync::Mutex;

use etherparse::{LaxPacketHeaders, NetHeaders, SlicedPacket, TransportHeader};
use proptest::prelude::*;

use super::*;

const MAC: [u8; 6] = [0x52, 0x54, 0, 0x12, 0x34, 0x56];

fn nic() -> NicAddresses {
    NicAddresses {
        mac: MAC,
        ipv4: vec![Ipv4Addr::new(10, 0, 0, 2)],
        ipv6: vec!["2001:db8::2".parse().unwrap(), "fe80::5054:ff:fe12:3456".parse().unwrap()],
    }
}

#[test]
fn golden() {
    let plan = plan(&[nic()], &Schedule::default());
    for (name, frame) in ["arp-request", "arp-reply", "na", "na-link-local", "rarp"].iter().zip(&plan.frames) {
        crate::golden::check(&format!("announce-{name}"), &frame.bytes);
    }
}

#[test]
fn arp_as_in_rfc_826_and_5227() {
    for (operation, target_mac) in [(1u8, [0; 6]), (2, MAC)] {
        let kind = ArpOperation(operation.into());
        let frame = gratuitous_arp(MAC, Ipv4Addr::new(10, 0, 0, 2), kind);
        assert_eq!(frame.len(), MIN_FRAME_BYTES);
        assert_eq!(frame[0..6], BROADCAST);
        assert_eq!(frame[6..12], MAC);
        assert_eq!(frame[12..14], [0x08, 0x06]);
        assert_eq!(frame[14..20], [0, 1, 0x08, 0, 6, 4], "Ethernet, IPv4, lengths");
        assert_eq!(frame[20..22], [0, operation]);
        assert_eq!(frame[22..28], MAC);
        assert_eq!(frame[28..32], [10, 0, 0, 2]);
        assert_eq!(frame[32..38], target_mac);
        assert_eq!(frame[38..42], [10, 0, 0, 2]);
        assert!(frame[42..].iter().all(|byte| *byte == 0));
        let parsed = SlicedPacket::from_ethernet(&frame).unwrap();
        let Some(etherparse::NetSlice::Arp(arp)) = parsed.net else { panic!("{parsed:?}") };
        assert_eq!(arp.operation(), kind);
    }
}

#[test]
fn rarp_as_in_rfc_903_and_qemu() {
    let frame = rarp(MAC);
    assert_eq!(frame.len(), MIN_FRAME_BYTES);
    assert_eq!(frame[0..6], BROADCAST);
    assert_eq!(frame[6..12], MAC);
    assert_eq!(frame[12..14], [0x80, 0x35]);
    assert_eq!(frame[14..22], [0, 1, 0x08, 0, 6, 4, 0, 3]);
    assert_eq!((&frame[22..28], &frame[28..32]), (&MAC[..], &[0; 4][..]));
    assert_eq!((&frame[32..38], &frame[38..42]), (&MAC[..], &[0; 4][..]));
    assert!(frame[42..].iter().all(|byte| *byte == 0));
}

/// The checksum of RFC 4443 section 2.3 from its definition, without etherparse.
fn checksum_of(frame: &[u8]) -> u16 {
    let (ip, icmp) = (&frame[14..54], &frame[54..]);
    let mut words: Vec<u8> = ip[8..40].to_vec();
    words.extend((icmp.len() as u32).to_be_bytes());
    words.extend([0, 0, 0, 58]);
    words.extend(icmp);
    let mut sum: u32 = words.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

proptest! {
    #[test]
    fn na_as_in_rfc_4861(mac in any::<[u8; 6]>(), address in any::<[u8; 16]>()) {
        let address = Ipv6Addr::from(address);
        let frame = unsolicited_na(mac, address);
        prop_assert_eq!(frame.len(), 14 + 40 + 32);
        prop_assert_eq!(&frame[0..6], &[0x33, 0x33, 0, 0, 0, 1]);
        prop_assert_eq!(&frame[6..12], &mac);
        prop_assert_eq!(&frame[12..14], &[0x86, 0xdd]);
        prop_assert_eq!(frame[14] >> 4, 6);
        prop_assert_eq!(&frame[18..22], &[0, 32, 58, 255], "payload length, ICMPv6, hop limit");
        prop_assert_eq!(&frame[22..38], &address.octets());
        prop_assert_eq!(&frame[38..54], &ALL_NODES.octets());
        prop_assert_eq!(&frame[54..56], &[136, 0], "type, code");
        prop_assert_eq!(&frame[58..62], &[0x20, 0, 0, 0], "override, neither router nor solicited");
        prop_assert_eq!(&frame[62..78], &address.octets());
        prop_assert_eq!(&frame[78..80], &[2, 1], "target link-layer address");
        prop_assert_eq!(&frame[80..86], &mac);
        prop_assert_eq!(checksum_of(&frame), 0, "the sum over a packet with its checksum is zero");
        let parsed = LaxPacketHeaders::from_ethernet(&frame).unwrap();
        prop_assert!(parsed.stop_err.is_none());
        prop_assert!(matches!(parsed.net, Some(NetHeaders::Ipv6(..))));
        let Some(TransportHeader::Icmpv6(icmp)) = parsed.transport else { panic!() };
        prop_assert!(matches!(icmp.icmp_type, Icmpv6Type::NeighborAdvertisement(_)));
    }
}

#[test]
fn the_report_counts_what_is_planned() {
    let bare = NicAddresses { mac: [2; 6], ipv4: vec![], ipv6: vec![] };
    let plan = plan(&[nic(), bare], &Schedule::default());
    let report = &plan.report;
    assert_eq!((report.arp, report.na, report.rarp, report.bursts), (2, 2, 2, 6));
    assert_eq!(report.arp + report.na + report.rarp, plan.frames.len() as u32);
    assert_eq!(report.addresses[..2], ["52:54:00:12:34:56", "10.0.0.2"]);
    assert_eq!(plan.frames.last().unwrap().nic, 1);
}

#[test]
fn a_frame_that_cannot_be_sent_does_not_stop_the_others() {
    struct Half(Mutex<Vec<usize>>);
    impl Announcer for Half {
        fn addresses(&self) -> Vec<NicAddresses> {
            vec![]
        }
        fn inject_frame(&self, nic: usize, _: &[u8]) -> std::io::Result<()> {
            if nic == 0 {
                return Err(std::io::Error::other("down"));
            }
            self.0.lock().unwrap().push(nic);
            Ok(())
        }
    }
    let half = Arc::new(Half(Mutex::new(vec![])));
    let plan = plan(&[nic(), nic()], &Schedule::default());
    burst(&plan, &(half.clone() as Arc<dyn Announcer>));
    assert_eq!(half.0.lock().unwrap().len(), 5);
}
