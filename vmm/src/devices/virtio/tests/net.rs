//! Frames through the rings, the control queue, announcing and learning.

use std::os::fd::OwnedFd;
use std::sync::atomic::Ordering;

use virtio_bindings::virtio_mmio::*;
use virtio_bindings::virtio_net::*;

use super::driver::*;
use crate::devices::io_thread::Turn;
use crate::devices::virtio::cell::lock;
use crate::devices::virtio::device::Work;
use crate::devices::virtio::mmio::RING_EVENT_IDX;
use crate::devices::virtio::net::{MacAddress, Net, NetConfig};

pub const RX: usize = 0;
pub const TX: usize = 1;
pub const CONTROL: usize = 2;
const MERGEABLE: u64 = 1 << VIRTIO_NET_F_MRG_RXBUF;
const SOURCE: Work = Work::Source { index: 0, readable: true, writable: true };

pub fn send_to_guest(wire: &OwnedFd, frame: &[u8]) {
    assert_eq!(rustix::io::write(wire, frame).unwrap(), frame.len());
}

/// What the guest finds in buffers of `bytes` bytes at `address`, by what was used.
fn gathered(driver: &mut Driver<Net>, address: u64, bytes: u64) -> Vec<u8> {
    let used = driver.used(RX);
    used.iter().zip(0..).flat_map(|((_, len), n)| driver.get(address + n * bytes, *len as usize)).collect()
}

#[test]
fn a_frame_of_the_guest_reaches_the_network_as_it_is() {
    let (mut driver, wire) = net(0);
    let sent = frame(1000, 7);
    // The header apart from the rest, and the rest in pieces, one of them across the border of two regions.
    let second = BORDER as u64 - 100;
    driver.put(BUFFERS, &sent[..12]);
    driver.put(BUFFERS + 0x100, &sent[12..200]);
    driver.put(second, &sent[200..]);
    let buffers = [(BUFFERS, 12, false), (BUFFERS + 0x100, 188, false), (second, 812, false)];
    let head = driver.add(TX, &buffers);
    driver.work_off(Work::Queue(TX));
    assert_eq!(received(&wire), [sent]);
    assert_eq!(driver.used(TX), [(head.into(), 0)]);
    assert_eq!(driver.take_interrupt(), 1);
    assert_eq!(driver.irq_edges(), 1);
    let statistics = lock(&driver.device).statistics();
    assert_eq!((statistics.tx_packets, statistics.tx_bytes, statistics.tx_dropped), (1, 1000, 0));
}

#[test]
fn a_frame_of_the_network_reaches_the_guest_as_it_is() {
    for features in [0, MERGEABLE, RING_EVENT_IDX] {
        let (mut driver, wire) = net(features);
        let head = driver.add(RX, &[(BUFFERS, 12, true), (BUFFERS + 0x100, 1600, true)]);
        let sent = frame(1500, 3);
        send_to_guest(&wire, &sent);
        driver.work_off(SOURCE);
        assert_eq!(driver.used(RX), [(head.into(), 1512)]);
        assert_eq!(driver.get(BUFFERS, 10), [0; 10]);
        assert_eq!(driver.get(BUFFERS + 10, 2), [1, 0], "num_buffers is 1 with and without mergeable buffers");
        assert_eq!(driver.get(BUFFERS + 0x100, 1500), sent[12..]);
        assert_eq!(driver.take_interrupt(), 1);
        let statistics = lock(&driver.device).statistics();
        assert_eq!((statistics.rx_packets, statistics.rx_bytes, statistics.rx_dropped), (1, 1500, 0));
    }
}

#[test]
fn a_long_frame_is_spread_over_mergeable_buffers() {
    let (mut driver, wire) = net(MERGEABLE);
    // The second one is expected to be long and is read into the buffers directly.
    for (round, bytes) in [60_000_usize, 65_000, 65_536 + 18].into_iter().enumerate() {
        let address = 0x6_0000 + 0x2_0000 * round as u64;
        for n in 0..45 {
            driver.add(RX, &[(address + n * 1536, 1536, true)]);
        }
        let mut sent = frame(bytes, round as u8);
        send_to_guest(&wire, &sent);
        driver.work_off(SOURCE);
        let count = (bytes + 12).div_ceil(1536) as u16;
        sent[10..12].copy_from_slice(&count.to_le_bytes());
        assert!(gathered(&mut driver, address, 1536) == sent, "frame {round}");
        // The buffers that were not used are so for the next round; take them up.
        let left = 45 - u64::from(count);
        for n in 0..left {
            send_to_guest(&wire, &frame(100, 1));
            driver.work_off(SOURCE);
            assert_eq!(driver.used(RX).len(), 1, "buffer {n} of {left} is left over after frame {round}");
        }
    }
    assert_eq!(lock(&driver.device).statistics().rx_dropped, 0);
}

#[test]
fn a_frame_that_fits_nowhere_is_dropped_and_the_next_one_is_not() {
    for features in [0, MERGEABLE] {
        let (mut driver, wire) = net(features);
        driver.add(RX, &[(BUFFERS, 200, true)]);
        driver.add(RX, &[(BUFFERS + 200, 200, true)]);
        let mut sent = frame(150, 2);
        send_to_guest(&wire, &frame(1000, 1));
        send_to_guest(&wire, &sent);
        driver.work_off(SOURCE);
        assert_eq!(driver.used(RX), [(0, 162)], "features {features:#x}");
        sent[10] = 1;
        assert_eq!(driver.get(BUFFERS, 162), sent);
        assert_eq!(lock(&driver.device).statistics().rx_dropped, 1);
        assert!(!driver.needs_reset());
    }
}

#[test]
fn without_buffers_frames_wait_and_the_device_rests() {
    for features in [0, RING_EVENT_IDX | MERGEABLE] {
        let (mut driver, wire) = net(features);
        send_to_guest(&wire, &frame(100, 1));
        send_to_guest(&wire, &frame(100, 2));
        assert_eq!(driver.work(SOURCE), Turn::Idle);
        driver.add(RX, &[(BUFFERS, 2000, true)]);
        assert_eq!(driver.work(Work::Queue(RX)), Turn::Idle);
        assert_eq!(driver.used(RX), [(0, 112)]);
        driver.add(RX, &[(BUFFERS, 2000, true)]);
        assert_eq!(driver.avail_event(RX) == 1, features != 0, "the next buffer's notification is asked for");
        driver.work_off(Work::Queue(RX));
        assert_eq!(driver.used(RX), [(1, 112)]);
        assert_eq!(driver.get(BUFFERS + 12, 100), frame(100, 2)[12..]);
    }
}

#[test]
fn a_full_network_delays_frames_and_loses_none() {
    let (mut driver, wire) = net(RING_EVENT_IDX);
    for n in 0..100 {
        let address = BUFFERS + n * 0x1000;
        driver.put(address, &frame(4000, n as u8));
        driver.add(TX, &[(address, 4012, false)]);
    }
    driver.work_off(Work::Queue(TX));
    let before = driver.used(TX).len();
    assert!((1..100).contains(&before), "{before} frames fit into the socket");
    // Neither a further notification nor an unfinished turn makes it try again.
    assert_eq!(driver.work(Work::Queue(TX)), Turn::Idle);
    assert_eq!(driver.work(Work::Continue), Turn::Idle);
    let mut frames = Vec::new();
    for _ in 0..100 {
        frames.extend(received(&wire));
        driver.work_off(SOURCE);
    }
    let expected: Vec<_> = (0..100).map(|n| frame(4000, n)).collect();
    assert!(frames == expected, "{} frames", frames.len());
    assert_eq!(before + driver.used(TX).len(), 100);
    assert_eq!(lock(&driver.device).statistics().tx_dropped, 0);
}

#[test]
fn a_flood_is_served_in_bounded_turns() {
    let (mut driver, wire) = net(MERGEABLE);
    for n in 0..200 {
        driver.add(RX, &[(BUFFERS + n * 0x800, 0x800, true)]);
        driver.add(TX, &[(BUFFERS, 100, false)]);
    }
    let mut sent = 0;
    while sent < 200 && rustix::io::write(&wire, &frame(60, 0)).is_ok() {
        sent += 1;
    }
    assert!(sent > 100, "{sent} frames fit into the socket");
    assert_eq!(driver.work(SOURCE), Turn::More);
    assert_eq!(driver.used(RX).len(), 64);
    assert_eq!(driver.work(Work::Queue(TX)), Turn::More);
    assert_eq!(driver.used(TX).len(), 64);
    driver.work_off(Work::Continue);
    assert_eq!(driver.used(RX).len(), sent - 64);
}

#[test]
fn long_frames_make_short_turns() {
    let (mut driver, wire) = net(0);
    for _ in 0..40 {
        driver.add(TX, &[(BUFFERS, 0xe000, false)]);
    }
    let mut frames = 0;
    let mut turn = driver.work(Work::Queue(TX));
    while frames < 40 {
        let sent = received(&wire).len();
        assert!(sent <= 10, "{sent} frames of 56 KiB in one turn");
        frames += sent;
        turn = if turn == Turn::More { driver.work(Work::Continue) } else { driver.work(SOURCE) };
    }
    assert_eq!(driver.used(TX).len(), 40);
}

#[test]
fn interrupts_come_when_the_driver_wants_them() {
    let (mut driver, _wire) = net(RING_EVENT_IDX);
    driver.set_used_event(TX, 2);
    for (number, wanted) in [(0, 0), (1, 0), (2, 1), (3, 0)] {
        driver.add(TX, &[(BUFFERS, 100, false)]);
        driver.work_off(Work::Queue(TX));
        assert_eq!(driver.take_interrupt(), wanted, "frame {number}");
    }
    driver.set_used_event(TX, 5);
    for _ in 0..4 {
        driver.add(TX, &[(BUFFERS, 100, false)]);
    }
    driver.work_off(Work::Queue(TX));
    assert_eq!(driver.take_interrupt(), 1, "used_event was passed in the middle of a batch");
    assert_eq!(driver.irq_edges(), 2);

    let (mut driver, _wire) = net(0);
    let flags = driver.rings[TX].avail;
    driver.put(flags, &1_u16.to_le_bytes());
    driver.add(TX, &[(BUFFERS, 100, false)]);
    driver.work_off(Work::Queue(TX));
    assert_eq!(driver.take_interrupt(), 0, "VRING_AVAIL_F_NO_INTERRUPT");
}

#[test]
fn offloads_follow_the_features() {
    let (_wire, backend) = wire();
    let offloads = backend.offloads.clone();
    let mut driver = Driver::new(Net::new(net_config(), backend));
    driver.start_with_all();
    assert_eq!(offloads.load(Ordering::SeqCst), 7);
    driver.write(VIRTIO_MMIO_STATUS, 0);
    assert_eq!(offloads.load(Ordering::SeqCst), 0);
    driver.start(1 << VIRTIO_NET_F_GUEST_CSUM);
    assert_eq!(offloads.load(Ordering::SeqCst), 1);
}

#[test]
fn a_reset_throws_away_what_was_on_the_way_in() {
    let (mut driver, wire) = net(0);
    send_to_guest(&wire, &frame(100, 1));
    driver.start(0);
    for ring in 0..2 {
        driver.put(driver.rings[ring].avail, &[0; 0x1000]);
    }
    driver.add(RX, &[(BUFFERS, 2000, true)]);
    driver.work_off(Work::All);
    assert_eq!(driver.used(RX), []);
}

fn status(driver: &mut Driver<Net>) -> u32 {
    driver.read(VIRTIO_MMIO_CONFIG + 4) >> 16
}

fn command(driver: &mut Driver<Net>, class: u8, command: u8) -> (u8, Vec<(u32, u32)>) {
    driver.put(BUFFERS, &[class, command, 0xaa]);
    driver.add(CONTROL, &[(BUFFERS, 2, false), (BUFFERS + 2, 1, true)]);
    driver.work_off(Work::Queue(CONTROL));
    (driver.get(BUFFERS + 2, 1)[0], driver.used(CONTROL))
}

#[test]
fn the_guest_is_asked_to_announce_itself_and_says_that_it_did() {
    let (mut driver, _wire) = full_net();
    assert_eq!(status(&mut driver), 1);
    let generation = driver.read(VIRTIO_MMIO_CONFIG_GENERATION);
    assert!(lock(&driver.device).guest_announce());
    assert_eq!(driver.take_interrupt(), 2, "a configuration change");
    assert_eq!(status(&mut driver), 3);
    assert_ne!(driver.read(VIRTIO_MMIO_CONFIG_GENERATION), generation);

    assert_eq!(command(&mut driver, 1, 0), (1, vec![(0, 1)]), "not offered: VIRTIO_NET_ERR");
    assert_eq!(status(&mut driver), 3);
    assert_eq!(command(&mut driver, 3, 0), (0, vec![(2, 1)]));
    assert_eq!(status(&mut driver), 1);

    driver.write(VIRTIO_MMIO_STATUS, 0);
    assert!(!lock(&driver.device).guest_announce(), "no driver");
    let (driver, _wire) = net(1 << VIRTIO_NET_F_STATUS);
    assert!(!lock(&driver.device).guest_announce(), "not negotiated");
}

#[test]
fn control_commands_that_make_no_sense_get_an_empty_answer() {
    let (mut driver, _wire) = net(0);
    driver.put(BUFFERS, &[3, 0]);
    driver.add(CONTROL, &[(BUFFERS, 2, false)]);
    driver.add(CONTROL, &[(BUFFERS, 1, false), (BUFFERS + 8, 1, true)]);
    driver.add(CONTROL, &[(BUFFERS + 8, 1, true)]);
    driver.add(CONTROL, &[(BUFFERS, 2, false), (BUFFERS + 8, 0, true)]);
    driver.add(CONTROL, &[(BUFFERS, 2, false), (MEMORY_BYTES as u64, 1, true)]);
    driver.work_off(Work::Queue(CONTROL));
    assert_eq!(driver.used(CONTROL).iter().map(|(_, len)| *len).collect::<Vec<_>>(), [0; 5]);
    assert!(!driver.needs_reset());
}

#[test]
fn the_configuration_can_be_read_in_any_piece() {
    let (mut driver, _wire) = net(0);
    let config = [0x52, 0x54, 0, 0x12, 0x34, 0x56, 1, 0];
    use crate::devices::bus::BusDevice;
    for width in [1, 2, 4, 8] {
        for offset in 0..12 {
            let mut data = vec![0xee; width];
            driver.transport.read(0x100 + offset as u64, &mut data);
            let expected: Vec<u8> = (offset..offset + width).map(|at| config.get(at).copied().unwrap_or(0)).collect();
            assert_eq!(data, expected);
        }
    }
}

#[test]
fn frames_of_the_host_enter_the_network_as_if_the_guest_had_sent_them() {
    let (driver, wire) = net(0);
    lock(&driver.device).inject(&frame(60, 9)[12..]).unwrap();
    assert_eq!(received(&wire), [frame(60, 9)]);
}

fn arp(sender_mac: MacAddress, sender: [u8; 4]) -> Vec<u8> {
    let mut frame = vec![0xff; 12];
    frame.extend([0xff; 6]);
    frame.extend(MAC.0);
    frame.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
    frame.extend(sender_mac.0);
    frame.extend(sender);
    frame.extend([0; 10]);
    frame
}

fn neighbour(kind: u8, hop_limit: u8, source: std::net::Ipv6Addr) -> Vec<u8> {
    let mut frame = vec![0; 12];
    frame.extend([0x33, 0x33, 0, 0, 0, 1]);
    frame.extend(MAC.0);
    frame.extend([0x86, 0xdd, 0x60, 0, 0, 0, 0, 24, 58, hop_limit]);
    frame.extend(source.octets());
    frame.extend([0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, kind]);
    frame.extend([0; 23]);
    frame
}

fn send_all(driver: &mut Driver<Net>, frames: &[Vec<u8>]) {
    for frame in frames {
        driver.put(BUFFERS, frame);
        driver.add(TX, &[(BUFFERS, frame.len() as u32, false)]);
        driver.work_off(Work::Queue(TX));
    }
}

#[test]
fn addresses_are_learned_from_what_the_guest_claims_for_itself() {
    let (_wire, backend) = wire();
    let addresses = vec!["10.0.0.1".parse().unwrap(), "fd00::1".parse().unwrap()];
    let mut driver = Driver::new(Net::new(NetConfig { mac: MAC, addresses }, backend));
    driver.start(0);
    let frames = [
        arp(MAC, [10, 0, 0, 2]),
        arp(MAC, [10, 0, 0, 1]),
        arp(MAC, [0, 0, 0, 0]),
        arp(MAC, [224, 0, 0, 1]),
        arp(MAC, [127, 0, 0, 1]),
        arp(MacAddress([2; 6]), [10, 0, 0, 9]),
        arp(MAC, [10, 0, 0, 9])[..41].to_vec(),
        arp(MAC, [10, 0, 0, 3]),
        arp(MAC, [10, 0, 0, 2]),
        neighbour(135, 255, "fe80::1".parse().unwrap()),
        neighbour(136, 255, "fd00::1".parse().unwrap()),
        neighbour(136, 255, "fd00::2".parse().unwrap()),
        neighbour(133, 255, "::".parse().unwrap()),
        neighbour(134, 255, "fd00::8".parse().unwrap()),
        neighbour(135, 64, "fd00::9".parse().unwrap()),
        neighbour(135, 255, "ff02::1".parse().unwrap()),
    ];
    send_all(&mut driver, &frames);
    let addresses = lock(&driver.device).addresses();
    assert_eq!(addresses.mac, MAC);
    assert_eq!(
        addresses.ipv4.iter().map(ToString::to_string).collect::<Vec<_>>(),
        ["10.0.0.1", "10.0.0.2", "10.0.0.3"]
    );
    assert_eq!(addresses.ipv6.iter().map(ToString::to_string).collect::<Vec<_>>(), ["fd00::1", "fd00::2", "fe80::1"]);

    let many: Vec<_> = (10..30).map(|last| arp(MAC, [10, 0, 1, last])).collect();
    send_all(&mut driver, &many);
    let addresses = lock(&driver.device).addresses();
    assert_eq!(addresses.ipv4.len(), 9, "one configured, eight learned");
    assert_eq!(addresses.ipv4[1].to_string(), "10.0.1.29", "the latest first");
}
