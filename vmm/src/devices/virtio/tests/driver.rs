//! A driver's half of virtio: real registers, real rings. It reads and writes guest memory through a mapping of its own, which
//! marks no bitmap, as a guest does.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::fs::MemfdFlags;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use virtio_bindings::virtio_mmio::*;
use vm_memory::{Bytes, FileOffset, GuestAddress};

use crate::devices::bus::BusDevice;
use crate::devices::io_thread::Turn;
use crate::devices::virtio::cell::lock;
use crate::devices::virtio::device::{VirtioDevice, Work};
use crate::devices::virtio::mmio::{RING_EVENT_IDX, VERSION_1};
use crate::devices::virtio::net::{Backend, MacAddress, Net, NetConfig};
use crate::devices::virtio::{MmioTransport, SharedDevice};
use crate::memory::{GuestMemoryMmap, SharedMemory};

pub const MEMORY_BYTES: usize = 1 << 20;
/// Two regions that touch, so that buffers can lie across their border.
pub const BORDER: usize = MEMORY_BYTES / 2;
/// Where tests put their buffers: everything below is rings.
pub const BUFFERS: u64 = 0x4_0000;
pub const MAC: MacAddress = MacAddress([0x52, 0x54, 0, 0x12, 0x34, 0x56]);
pub const HEADER: usize = 12;

pub type GuestView = vm_memory::GuestMemoryMmap<()>;

/// The VMM's mapping, and the guest's of the same memory.
pub fn memory() -> (SharedMemory, GuestView) {
    let file = rustix::fs::memfd_create("guest", MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&file, MEMORY_BYTES as u64).unwrap();
    let file = Arc::new(std::fs::File::from(file));
    let ranges: Vec<_> = [0, BORDER]
        .map(|at| (GuestAddress(at as u64), BORDER, Some(FileOffset::from_arc(file.clone(), at as u64))))
        .into();
    let ours = GuestMemoryMmap::from_ranges_with_files(&ranges).unwrap();
    (Arc::new(ours), GuestView::from_ranges_with_files(&ranges).unwrap())
}

/// One end of a socket pair as a backend.
pub struct Socket {
    fd: OwnedFd,
    pub offloads: Arc<AtomicU32>,
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Backend for Socket {
    fn name(&self) -> &str {
        "socket"
    }
    fn set_offloads(&self, offloads: u32) -> std::io::Result<()> {
        self.offloads.store(offloads, Ordering::SeqCst);
        Ok(())
    }
}

/// The network's end, and the backend's.
pub fn wire() -> (OwnedFd, Socket) {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let (ours, fd) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
    (ours, Socket { fd, offloads: Arc::default() })
}

/// What the network has received, with virtio headers.
pub fn received(wire: &OwnedFd) -> Vec<Vec<u8>> {
    let mut frames = Vec::new();
    let mut buffer = vec![0; 1 << 17];
    while let Ok(bytes) = rustix::io::read(wire, &mut buffer[..]) {
        frames.push(buffer[..bytes].to_vec());
    }
    frames
}

/// A frame of `bytes` bytes with a virtio header of zeros before it.
pub fn frame(bytes: usize, seed: u8) -> Vec<u8> {
    let body = (0..bytes).map(|i| (i as u8).wrapping_mul(31).wrapping_add(seed));
    [0; HEADER].into_iter().chain(body).collect()
}

#[derive(Clone, Copy, Debug)]
pub struct Ring {
    pub size: u16,
    pub desc: u64,
    pub avail: u64,
    pub used: u64,
    pub next_desc: u16,
    pub next_avail: u16,
    pub seen_used: u16,
}

impl Ring {
    fn at(index: usize, size: u16) -> Self {
        let base = 0x1_0000 + 0x4000 * index as u64;
        let (desc, avail, used) = (base, base + 0x1000, base + 0x2000);
        Self { size, desc, avail, used, next_desc: 0, next_avail: 0, seen_used: 0 }
    }
}

/// A driver and the device that it drives. `G` is how the guest sees its memory.
pub struct Driver<D: ?Sized, G = GuestView> {
    pub transport: MmioTransport,
    pub device: SharedDevice<D>,
    pub memory: SharedMemory,
    pub guest: G,
    pub rings: Vec<Ring>,
}

impl<D: VirtioDevice + 'static> Driver<D> {
    pub fn new(device: D) -> Self {
        let (memory, guest) = memory();
        Self::with_memory(device, memory, guest)
    }
}

impl<D: VirtioDevice + 'static, G: Bytes<GuestAddress, E: std::fmt::Debug>> Driver<D, G> {
    pub fn with_memory(device: D, memory: SharedMemory, guest: G) -> Self {
        let sizes = device.queue_sizes();
        let (transport, device) = MmioTransport::new(memory.clone(), device).unwrap();
        let rings = sizes.iter().enumerate().map(|(index, size)| Ring::at(index, *size)).collect();
        Self { transport, device, memory, guest, rings }
    }

    pub fn read(&mut self, register: u32) -> u32 {
        let mut data = [0xee; 4];
        self.transport.read(register.into(), &mut data);
        u32::from_le_bytes(data)
    }

    pub fn write(&mut self, register: u32, value: u32) {
        self.transport.write(register.into(), &value.to_le_bytes());
    }

    pub fn acknowledge(&mut self, features: u64) {
        self.write(VIRTIO_MMIO_STATUS, 0);
        self.write(VIRTIO_MMIO_STATUS, 1);
        self.write(VIRTIO_MMIO_STATUS, 3);
        for half in 0..2 {
            self.write(VIRTIO_MMIO_DRIVER_FEATURES_SEL, half);
            self.write(VIRTIO_MMIO_DRIVER_FEATURES, (features >> (32 * half)) as u32);
        }
        self.write(VIRTIO_MMIO_STATUS, 0xb);
    }

    pub fn set_up_queues(&mut self) {
        for (index, ring) in self.rings.clone().into_iter().enumerate() {
            self.write(VIRTIO_MMIO_QUEUE_SEL, index as u32);
            self.write(VIRTIO_MMIO_QUEUE_NUM, ring.size.into());
            for (low, address) in [
                (VIRTIO_MMIO_QUEUE_DESC_LOW, ring.desc),
                (VIRTIO_MMIO_QUEUE_AVAIL_LOW, ring.avail),
                (VIRTIO_MMIO_QUEUE_USED_LOW, ring.used),
            ] {
                self.write(low, address as u32);
                self.write(low + 4, (address >> 32) as u32);
            }
            self.write(VIRTIO_MMIO_QUEUE_READY, 1);
        }
    }

    /// All of the initialization, with `features` and `VERSION_1`.
    pub fn start(&mut self, features: u64) {
        self.acknowledge(features | VERSION_1);
        assert_eq!(self.read(VIRTIO_MMIO_STATUS), 0xb, "features refused");
        self.set_up_queues();
        self.write(VIRTIO_MMIO_STATUS, 0xf);
        assert_eq!(self.read(VIRTIO_MMIO_STATUS), 0xf);
    }

    /// With everything that is offered.
    pub fn start_with_all(&mut self) {
        self.write(VIRTIO_MMIO_DEVICE_FEATURES_SEL, 0);
        let low = self.read(VIRTIO_MMIO_DEVICE_FEATURES);
        self.start(low.into());
    }

    pub fn needs_reset(&mut self) -> bool {
        self.read(VIRTIO_MMIO_STATUS) & 64 != 0
    }

    pub fn descriptor(&self, queue: usize, index: u16, address: u64, len: u32, flags: u16, next: u16) {
        self.raw_descriptor(self.rings[queue].desc + 16 * u64::from(index), address, len, flags, next);
    }

    pub fn raw_descriptor(&self, at: u64, address: u64, len: u32, flags: u16, next: u16) {
        let high = u64::from(len) | u64::from(flags) << 32 | u64::from(next) << 48;
        self.guest.write_obj(address, GuestAddress(at)).unwrap();
        self.guest.write_obj(high, GuestAddress(at + 8)).unwrap();
    }

    /// Makes the chain beginning at `head` available.
    pub fn make_available(&mut self, queue: usize, head: u16) {
        let ring = &mut self.rings[queue];
        let slot = ring.avail + 4 + 2 * u64::from(ring.next_avail % ring.size);
        self.guest.write_obj(head, GuestAddress(slot)).unwrap();
        ring.next_avail = ring.next_avail.wrapping_add(1);
        self.guest.write_obj(ring.next_avail, GuestAddress(ring.avail + 2)).unwrap();
    }

    /// Makes a chain of (address, length, writable) available.
    pub fn add(&mut self, queue: usize, buffers: &[(u64, u32, bool)]) -> u16 {
        let size = self.rings[queue].size;
        let head = self.rings[queue].next_desc;
        for (position, (address, len, writable)) in buffers.iter().enumerate() {
            let index = (head + position as u16) % size;
            let last = position + 1 == buffers.len();
            let flags = u16::from(!last) | u16::from(*writable) << 1;
            self.descriptor(queue, index, *address, *len, flags, (index + 1) % size);
        }
        self.rings[queue].next_desc = (head + buffers.len() as u16) % size;
        self.make_available(queue, head);
        head
    }

    pub fn used(&mut self, queue: usize) -> Vec<(u32, u32)> {
        let ring = &mut self.rings[queue];
        let index: u16 = self.guest.read_obj(GuestAddress(ring.used + 2)).unwrap();
        let mut used = Vec::new();
        while ring.seen_used != index {
            let slot = ring.used + 4 + 8 * u64::from(ring.seen_used % ring.size);
            let element: u64 = self.guest.read_obj(GuestAddress(slot)).unwrap();
            used.push((element as u32, (element >> 32) as u32));
            ring.seen_used = ring.seen_used.wrapping_add(1);
        }
        used
    }

    /// `VIRTIO_F_RING_EVENT_IDX`: interrupt when the buffer with this running number is used.
    pub fn set_used_event(&self, queue: usize, number: u16) {
        let ring = self.rings[queue];
        self.guest.write_obj(number, GuestAddress(ring.avail + 4 + 2 * u64::from(ring.size))).unwrap();
    }

    pub fn avail_event(&self, queue: usize) -> u16 {
        let ring = self.rings[queue];
        self.guest.read_obj(GuestAddress(ring.used + 4 + 8 * u64::from(ring.size))).unwrap()
    }

    pub fn work(&self, work: Work) -> Turn {
        lock(&self.device).work(work)
    }

    /// Works until there is nothing more, which must be soon.
    pub fn work_off(&self, work: Work) {
        let mut turn = self.work(work);
        for _ in 0..100 {
            if turn == Turn::Idle {
                return;
            }
            turn = self.work(Work::Continue);
        }
        panic!("the device does not come to rest");
    }

    pub fn put(&self, address: u64, data: &[u8]) {
        self.guest.write_slice(data, GuestAddress(address)).unwrap();
    }

    pub fn get(&self, address: u64, bytes: usize) -> Vec<u8> {
        let mut data = vec![0; bytes];
        self.guest.read_slice(&mut data, GuestAddress(address)).unwrap();
        data
    }

    /// Reads and acknowledges the interrupt, as a handler does.
    pub fn take_interrupt(&mut self) -> u32 {
        let status = self.read(VIRTIO_MMIO_INTERRUPT_STATUS);
        self.write(VIRTIO_MMIO_INTERRUPT_ACK, status);
        status
    }

    pub fn irq_edges(&self) -> u64 {
        self.transport.irq_eventfd().read().unwrap_or(0)
    }
}

pub fn net_config() -> NetConfig {
    NetConfig { mac: MAC, addresses: Vec::new() }
}

/// A started network device and the network's end of its wire.
pub fn net(features: u64) -> (Driver<Net>, OwnedFd) {
    let (wire, backend) = wire();
    let mut driver = Driver::new(Net::new(net_config(), backend));
    driver.start(features);
    (driver, wire)
}

/// With event indices and all that the device offers.
pub fn full_net() -> (Driver<Net>, OwnedFd) {
    let (wire, backend) = wire();
    let mut driver = Driver::new(Net::new(net_config(), backend));
    driver.start_with_all();
    assert!(lock(&driver.device).negotiated().unwrap() & RING_EVENT_IDX != 0);
    (driver, wire)
}
