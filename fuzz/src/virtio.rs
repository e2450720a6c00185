//! A hostile guest at a virtio device: nothing it does in registers and rings panics, every page that the device writes is in the
//! dirty bitmap, and whatever state it has got the device into can be saved and taken over by another.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use arbitrary::{Arbitrary, Unstructured};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};
use vmm::devices::bus::BusDevice;
use vmm::devices::io_thread::{EventHandler, Turn, Wake};
use vmm::devices::virtio::net::{Backend, MAX_FRAME_BYTES};
use vmm::devices::virtio::{Balloon, MacAddress, MmioTransport, Net, NetConfig, Rng, SharedDevice};
use vmm::memory::{GuestMemoryMmap, PAGE_BYTES, SharedMemory};

/// Small, so that it can be compared after each step; two regions that touch, so that buffers cross their border.
const MEMORY_BYTES: u64 = 64 << 10;
const HEADER_BYTES: usize = 12;
/// That of the golden state.
const MAC: MacAddress = MacAddress([0x52, 0x54, 0, 0, 0, 7]);

pub fn run(data: &[u8]) {
    let mut u = Unstructured::new(data);
    let Ok(kind) = u.arbitrary::<u8>() else { return };
    let memory = guest_memory();
    let kind = if kind & 1 == 0 { Kind::Net } else { [Kind::Rng, Kind::Balloon][usize::from(kind >> 7)] };
    let mut guest = Guest::new(Device::new(kind, &memory), memory);
    // Its end is the end of the input.
    while guest.step(&mut u).is_ok() {}
    guest.migrate();
}

/// One memory for all runs, cleared.
pub fn guest_memory() -> SharedMemory {
    thread_local! {
        static MEMORY: SharedMemory = {
            let half = MEMORY_BYTES as usize / 2;
            GuestMemoryMmap::from_ranges(&[(GuestAddress(0), half), (GuestAddress(half as u64), half)]).unwrap().into()
        };
    }
    MEMORY.with(|memory| {
        memory.write_slice(&[0; MEMORY_BYTES as usize], GuestAddress(0)).unwrap();
        memory.clone()
    })
}

/// One end of a socket pair in the place of a TAP.
struct Socket(OwnedFd);

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Backend for Socket {
    fn name(&self) -> &str {
        "socket"
    }

    fn set_offloads(&self, _: u32) -> io::Result<()> {
        Ok(())
    }
}

/// What a device is.
#[derive(Clone, Copy)]
pub enum Kind {
    Rng,
    Net,
    Balloon,
}

/// A device behind its transport, what the I/O thread calls, and for a network device the other end of its wire.
pub struct Device {
    kind: Kind,
    pub transport: MmioTransport,
    handler: Box<dyn EventHandler>,
    net: Option<(SharedDevice<Net>, OwnedFd)>,
}

impl Device {
    pub fn new(kind: Kind, memory: &SharedMemory) -> Self {
        let (transport, net) = match kind {
            Kind::Net => {
                let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
                let (wire, backend) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
                let config = NetConfig { mac: MAC, addresses: Vec::new() };
                let (transport, net) = MmioTransport::new(memory.clone(), Net::new(config, Socket(backend))).unwrap();
                (transport, Some((net, wire)))
            }
            Kind::Rng => (MmioTransport::new(memory.clone(), Rng::new()).unwrap().0, None),
            Kind::Balloon => (MmioTransport::new(memory.clone(), Balloon::new()).unwrap().0, None),
        };
        Self { kind, handler: transport.handler(), transport, net }
    }

    /// Has the device work until it has nothing more to do, or long enough: it may write into its own rings.
    fn work(&mut self, wake: Wake) {
        let mut turn = self.handler.handle(wake);
        for _ in 0..32 {
            if turn != Turn::More {
                return;
            }
            turn = self.handler.handle(Wake::Continue);
        }
    }
}

pub struct Guest {
    device: Device,
    memory: SharedMemory,
}

impl Guest {
    pub fn new(device: Device, memory: SharedMemory) -> Self {
        Self { device, memory }
    }

    fn step(&mut self, u: &mut Unstructured<'_>) -> arbitrary::Result<()> {
        if u.is_empty() {
            return Err(arbitrary::Error::NotEnoughData);
        }
        match u.arbitrary::<u8>()? % 20 {
            0 | 1 => {
                let value = match u.arbitrary::<u8>()? % 4 {
                    0 => u.arbitrary()?,
                    1 => u32::from(u.arbitrary::<u16>()?) << 4,
                    _ => u32::from(u.arbitrary::<u8>()? & 31),
                };
                self.write((u.arbitrary::<u8>()? & 0x3f).into(), value);
            }
            2 => {
                let (offset, width) = (u.arbitrary::<u64>()?, u.int_in_range(1..=8usize)?);
                let offset = if offset >> 60 == 0 { offset } else { offset & 0x1ff };
                if u.arbitrary()? {
                    self.device.transport.read(offset, &mut [0; 8][..width]);
                } else {
                    self.device.transport.write(offset, &<[u8; 8]>::arbitrary(u)?[..width]);
                }
            }
            3 => self.start(u)?,
            4 | 5 => {
                let at = u64::from(u.arbitrary::<u16>()?);
                let bytes = u.int_in_range(1..=8usize)?;
                self.put(at, u.bytes(bytes)?);
            }
            6 | 7 => {
                let (queue, index, flags) = (u.arbitrary::<u8>()?, u.arbitrary::<u8>()?, u.arbitrary::<u8>()?);
                let at = Ring::at(queue).desc + 16 * u64::from(index & 15);
                let address = if u.ratio(1, 16)? { u.arbitrary()? } else { u64::from(u.arbitrary::<u16>()?) };
                let len = if u.ratio(1, 16)? { u.arbitrary()? } else { u32::from(u.arbitrary::<u16>()?) };
                let next = u16::from(u.arbitrary::<u8>()? & 31);
                self.descriptor(at, address, len, u16::from(flags & 7), next);
            }
            8 | 9 => {
                let ring = Ring::at(u.arbitrary()?);
                let index: u16 = self.memory.read_obj(GuestAddress(ring.avail + 2)).unwrap();
                // The size that most queues get; others find other entries.
                let slot = ring.avail + 4 + 2 * u64::from(index % 16);
                self.put(slot, &u16::from(u.arbitrary::<u8>()? & 31).to_le_bytes());
                self.put(ring.avail + 2, &index.wrapping_add(1).to_le_bytes());
            }
            10 => self.put(Ring::at(u.arbitrary()?).avail + 2, &u.arbitrary::<u16>()?.to_le_bytes()),
            11 | 12 => {
                let (token, ready) = (u32::from(u.arbitrary::<u8>()? & 3), u.arbitrary::<u8>()?);
                self.work(Wake::Ready { token, readable: ready & 1 == 0, writable: ready & 2 == 0 });
            }
            13 => self.work(Wake::Continue),
            14 => self.work(Wake::Resumed),
            15 | 16 => {
                let (bytes, seed) = (u.arbitrary::<u16>()?, u.arbitrary::<u8>()?);
                if let Some((_, wire)) = &self.device.net {
                    let frame = vec![seed; usize::from(bytes) + usize::from(seed & 31)];
                    let _ = rustix::io::write(wire, &frame);
                }
            }
            17 => self.drain(),
            18 => {
                if let Some((net, _)) = &self.device.net {
                    net.lock().unwrap().guest_announce();
                }
            }
            _ => self.migrate(),
        }
        Ok(())
    }

    /// A 32-bit write of the register with this number.
    fn write(&mut self, register: u64, value: u32) {
        self.device.transport.write(register * 4, &value.to_le_bytes());
    }

    fn put(&self, at: u64, bytes: &[u8]) {
        // What lies outside is no write.
        let _ = self.memory.write_slice(bytes, GuestAddress(at));
    }

    fn descriptor(&self, at: u64, address: u64, len: u32, flags: u16, next: u16) {
        self.put(at, &address.to_le_bytes());
        self.put(at + 8, &len.to_le_bytes());
        self.put(at + 12, &flags.to_le_bytes());
        self.put(at + 14, &next.to_le_bytes());
    }

    /// All of the initialization, by the book but for the features and sizes.
    fn start(&mut self, u: &mut Unstructured<'_>) -> arbitrary::Result<()> {
        const STATUS: u64 = 0x70 / 4;
        let (features, sizes): (u64, u8) = (u.arbitrary()?, u.arbitrary()?);
        for status in [0, 1, 3] {
            self.write(STATUS, status);
        }
        let mut offered = [0; 4];
        self.write(0x14 / 4, 0);
        self.device.transport.read(0x10, &mut offered);
        let features = features & u64::from(u32::from_le_bytes(offered)) | 1 << 32;
        for half in 0..2 {
            self.write(0x24 / 4, half);
            self.write(0x20 / 4, (features >> (32 * half)) as u32);
        }
        self.write(STATUS, 0xb);
        for queue in 0..3 {
            let ring = Ring::at(queue);
            self.write(0x30 / 4, queue.into());
            let size = if sizes & 0x80 == 0 { 16 } else { 1 << (sizes & 15) };
            for (register, value) in [
                (0x38, size),
                (0x80, ring.desc),
                (0x84, 0),
                (0x90, ring.avail),
                (0x94, 0),
                (0xa0, ring.used),
                (0xa4, 0),
            ] {
                self.write(register / 4, value as u32);
            }
            if sizes & 0x40 == 0 || sizes & 1 << queue != 0 {
                self.write(0x44 / 4, 1);
            }
        }
        self.write(STATUS, 0xf);
        Ok(())
    }

    /// Every page that changes is in the bitmap of the VMM's own writes.
    fn work(&mut self, wake: Wake) {
        self.memory.iter().for_each(|region| region.bitmap().reset());
        let before = self.content();
        self.device.work(wake);
        let after = self.content();
        let page_bytes = PAGE_BYTES as usize;
        for (page, (before, after)) in before.chunks(page_bytes).zip(after.chunks(page_bytes)).enumerate() {
            let (region, offset) = self.memory.to_region_addr(GuestAddress((page * page_bytes) as u64)).unwrap();
            assert!(
                before == after || region.bitmap().is_addr_set(offset.0 as usize),
                "page {page} was written unseen"
            );
        }
    }

    fn content(&self) -> Vec<u8> {
        let mut content = vec![0; MEMORY_BYTES as usize];
        self.memory.read_slice(&mut content, GuestAddress(0)).unwrap();
        content
    }

    /// What the guest has sent is no longer than a frame can be.
    fn drain(&self) {
        let Some((_, wire)) = &self.device.net else { return };
        let mut frame = vec![0; MAX_FRAME_BYTES + 1];
        while let Ok(bytes) = rustix::io::read(wire, &mut frame) {
            assert!((HEADER_BYTES + 14..=MAX_FRAME_BYTES).contains(&bytes), "a frame of {bytes} bytes");
        }
    }

    /// A little of everything, on a device as it is.
    pub fn use_all(&mut self) {
        self.work(Wake::Resumed);
        for token in 0..4 {
            self.work(Wake::Ready { token, readable: true, writable: true });
        }
        self.drain();
        self.migrate();
        self.write(0x70 / 4, 0);
    }

    /// The device's state goes on in another one.
    fn migrate(&mut self) {
        let state = self.device.transport.save();
        let bytes = postcard::to_stdvec(&state).unwrap();
        let state = postcard::from_bytes(&bytes).unwrap();
        let mut other = Device::new(self.device.kind, &self.memory);
        other.transport.restore(&state).expect("what was saved can be taken over");
        assert_eq!(other.transport.save(), state);
        self.device = other;
        self.work(Wake::Resumed);
    }
}

/// Where the guest has its rings; others find them where they were pointed to.
struct Ring {
    desc: u64,
    avail: u64,
    used: u64,
}

impl Ring {
    fn at(queue: u8) -> Self {
        let base = 0x1000 + 0x2000 * u64::from(queue % 3);
        Self { desc: base, avail: base + 0x1000, used: base + 0x1800 }
    }
}
