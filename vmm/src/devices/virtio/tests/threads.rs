//! Devices on the real I/O thread: notifications, pauses under load, and a move while both directions are busy.

use std::collections::BTreeSet;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use virtio_bindings::virtio_mmio::*;
use virtio_bindings::virtio_net::VIRTIO_NET_F_MRG_RXBUF;

use super::driver::*;
use super::net::{RX, TX};
use crate::devices::io_thread::IoThread;
use crate::devices::virtio::mmio::RING_EVENT_IDX;
use crate::devices::virtio::net::Net;

const FEATURES: u64 = RING_EVENT_IDX | 1 << VIRTIO_NET_F_MRG_RXBUF;
const PATIENCE: Duration = Duration::from_secs(30);

/// A guest that sends numbered frames and takes up numbered frames, notifying only when the device asks for it.
struct Guest {
    driver: Driver<Net>,
    sent: u32,
    in_flight: u16,
    received: Vec<u32>,
    buffers: Vec<u64>,
}

const WINDOW: u16 = 100;

impl Guest {
    fn new(driver: Driver<Net>) -> Self {
        let mut guest = Self { driver, sent: 0, in_flight: 0, received: vec![], buffers: vec![0; 256] };
        for n in 0..u64::from(WINDOW) {
            guest.give_buffer(BUFFERS + n * 0x400);
        }
        guest
    }

    fn give_buffer(&mut self, address: u64) {
        let head = self.driver.add(RX, &[(address, 0x400, true)]);
        self.buffers[head as usize] = address;
        self.notify(RX);
    }

    /// As a Linux driver does: only if the device's event index was passed.
    fn notify(&mut self, queue: usize) {
        std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
        if self.driver.avail_event(queue).wrapping_add(1) == self.driver.rings[queue].next_avail {
            self.driver.write(VIRTIO_MMIO_QUEUE_NOTIFY, queue as u32);
        }
    }

    fn step(&mut self) {
        self.in_flight -= self.driver.used(TX).len() as u16;
        while self.in_flight < WINDOW {
            let slot = BUFFERS + 0x6_0000 + u64::from(self.sent % 200) * 0x200;
            let mut frame = frame(60, 0);
            frame[40..44].copy_from_slice(&self.sent.to_le_bytes());
            self.driver.put(slot, &frame);
            self.driver.add(TX, &[(slot, 72, false)]);
            self.sent += 1;
            self.in_flight += 1;
            self.notify(TX);
        }
        for (head, len) in self.driver.used(RX) {
            let address = self.buffers[head as usize];
            assert_eq!(len, 72);
            let number = self.driver.get(address + 40, 4);
            self.received.push(u32::from_le_bytes(number.try_into().unwrap()));
            self.give_buffer(address);
        }
    }
}

/// The network's end: sends numbered frames and takes down the numbers of those that arrive.
#[derive(Default)]
struct Network {
    sent: u32,
    arrived: Vec<u32>,
}

impl Network {
    fn step(&mut self, wire: &OwnedFd) {
        for frame in received(wire) {
            self.arrived.push(u32::from_le_bytes(frame[40..44].try_into().unwrap()));
        }
        let mut frame = frame(60, 0);
        frame[40..44].copy_from_slice(&self.sent.to_le_bytes());
        if rustix::io::write(wire, &frame).is_ok() {
            self.sent += 1;
        }
    }
}

#[test]
fn traffic_in_both_directions_survives_pauses_and_moves() {
    let (wire, backend) = wire();
    let mut wire = wire;
    let mut driver = Driver::new(Net::new(net_config(), backend));
    driver.start(FEATURES);
    let mut io = IoThread::spawn("test-io").unwrap();
    driver.transport.attach(&io.handle()).unwrap();
    io.resume();
    let mut guest = Guest::new(driver);
    let mut network = Network::default();
    let mut lost_on_the_wire = BTreeSet::new();
    let deadline = Instant::now() + PATIENCE;
    for round in 0..30 {
        let goal = (guest.received.len() + 300, network.arrived.len() + 300);
        while guest.received.len() < goal.0 || network.arrived.len() < goal.1 {
            assert!(Instant::now() < deadline, "round {round}: traffic stands still");
            guest.step();
            network.step(&wire);
        }
        io.pause();
        let quiet = guest.driver.get(0, MEMORY_BYTES);
        network.step(&wire);
        guest.driver.write(VIRTIO_MMIO_QUEUE_NOTIFY, TX as u32);
        assert!(guest.driver.get(0, MEMORY_BYTES) == quiet, "the device wrote while paused");
        if round % 3 == 2 {
            // Elsewhere: another transport, another device, another thread, another wire; what was on the old wire is lost, as
            // it is on a network, but nothing that the device had taken.
            let state = guest.driver.transport.save();
            network.step(&wire);
            let (new_wire, backend) = super::driver::wire();
            let (memory, view) = (guest.driver.memory.clone(), guest.driver.guest.clone());
            let mut other = Driver::with_memory(Net::new(net_config(), backend), memory, view);
            other.transport.restore(&state).unwrap();
            other.rings = guest.driver.rings.clone();
            guest.step_without_notifying(&mut other);
            let new_io = IoThread::spawn("test-io").unwrap();
            other.transport.attach(&new_io.handle()).unwrap();
            let taken = guest.driver.used(RX).len();
            assert_eq!(taken, 0, "taken up before");
            guest.driver = other;
            wire = new_wire;
            io = new_io;
            let first_unseen = guest.received.last().map_or(0, |last| last + 1);
            lost_on_the_wire.extend(first_unseen..network.sent);
        }
        io.resume();
    }
    io.pause();
    let numbers: Vec<_> = (0..network.arrived.len() as u32).collect();
    assert!(network.arrived == numbers, "each frame of the guest's exactly once, in order");
    assert!(guest.received.is_sorted_by(|a, b| a < b), "no frame twice, none out of order");
    let got: BTreeSet<_> = guest.received.iter().copied().collect();
    let last = *guest.received.last().unwrap();
    assert!((0..last).all(|n| got.contains(&n) || lost_on_the_wire.contains(&n)), "a frame was lost");
    assert!(!guest.driver.needs_reset());
}

impl Guest {
    /// Takes up what is used before the machine appears elsewhere, leaving notifications to be lost.
    fn step_without_notifying(&mut self, other: &mut Driver<Net>) {
        for (head, _) in self.driver.used(RX) {
            let address = self.buffers[head as usize];
            let number = self.driver.get(address + 40, 4);
            self.received.push(u32::from_le_bytes(number.try_into().unwrap()));
            let head = self.driver.add(RX, &[(address, 0x400, true)]);
            self.buffers[head as usize] = address;
        }
        self.in_flight -= self.driver.used(TX).len() as u16;
        other.rings = self.driver.rings.clone();
    }
}
