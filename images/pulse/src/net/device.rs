//! The network card: virtio-net over virtio-mmio, as smoltcp sees it.
//!
//! Frames live in buffers of our own that are lent to the device and come back by the ring. `virtio-drivers` keeps the
//! rings; what is here is who owns which buffer. A buffer is in one place at a time: posted for receiving, being read,
//! free for sending, being filled, or sent and not yet returned.

#![allow(unsafe_code)] // Memory that is shared with a device, and its registers.

use crate::platform::memory::Memory;
use core::ptr::NonNull;
use core::sync::atomic::{AtomicUsize, Ordering, fence};
use pulse_core::discovery::MmioDevice;
use smoltcp::phy::{Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::time::Instant;
use virtio_drivers::device::net::VirtIONetRaw;
use virtio_drivers::transport::mmio::MmioTransport;
use virtio_drivers::transport::{DeviceType, Transport};
use virtio_drivers::{BufferDirection, Hal, PAGE_SIZE, PhysAddr};

/// Descriptors of each ring: no device offers less.
const RING: usize = 128;
/// A frame of an MTU of 1500 with its virtio header has 1526 bytes.
const FRAME_BYTES: usize = 2048;
const MOST_ETHERNET_BYTES: usize = 1514;

/// The card.
pub struct Nic {
    raw: VirtIONetRaw<Dma, MmioTransport<'static>, RING>,
    receive: Frames,
    send: Frames,
    /// A received frame that has been read, and is to be posted again.
    read: Option<u8>,
    /// Frames free for sending.
    free: [u8; RING],
    free_count: usize,
}

/// One direction's frames: as many as the ring has descriptors.
struct Frames {
    start: NonNull<u8>,
    /// The frame that a ring token stands for.
    of_token: [u8; RING],
    /// Bytes that were lent to the device.
    lent_bytes: [u16; RING],
}

impl Frames {
    fn take(memory: &mut Memory) -> Option<Self> {
        let buffer = memory.take_buffer(RING * FRAME_BYTES)?;
        Some(Self { start: NonNull::from(buffer).cast(), of_token: [0; RING], lent_bytes: [0; RING] })
    }

    /// Frame `index`.
    ///
    /// # Safety
    ///
    /// The device must not own the frame, and no other reference to it may live as long as `'a`.
    unsafe fn get<'a>(&self, index: u8) -> &'a mut [u8] {
        let offset = usize::from(index) % RING * FRAME_BYTES;
        // SAFETY: `take` gave RING frames to us for good, and the offset is that of one of them; the caller vouches that
        // nobody else uses it.
        unsafe { core::slice::from_raw_parts_mut(self.start.as_ptr().add(offset), FRAME_BYTES) }
    }

    fn lend(&mut self, token: u16, index: u8, bytes: usize) {
        self.of_token[usize::from(token) % RING] = index;
        self.lent_bytes[usize::from(index) % RING] = bytes as u16;
    }

    fn of(&self, token: u16) -> u8 {
        self.of_token[usize::from(token) % RING]
    }
}

impl Nic {
    /// Brings up the card in `device`'s place, if there is one.
    pub fn start(device: &MmioDevice, memory: &mut Memory) -> Option<Self> {
        let registers = NonNull::new(device.base as *mut _)?;
        // SAFETY: a window that the VMM named, and that `Devices::add` found aligned, large enough and below 4 GiB, where
        // everything is mapped. If there is no virtio device in it, the first reads show that.
        let transport = unsafe { MmioTransport::new(registers, device.bytes as usize) }.ok()?;
        if transport.device_type() != DeviceType::Network {
            // Dropped, it would reset a device that is none of our business.
            core::mem::forget(transport);
            return None;
        }
        let (receive, send) = (Frames::take(memory)?, Frames::take(memory)?);
        let raw = VirtIONetRaw::new(transport).ok()?;
        let mut nic = Self { raw, receive, send, read: None, free: [0; RING], free_count: 0 };
        for index in 0..RING as u8 {
            nic.post(index);
            nic.release(index);
        }
        Some(nic)
    }

    /// Its address.
    pub fn mac(&self) -> [u8; 6] {
        self.raw.mac_address()
    }

    /// Whether a frame has come. Cheap: a look at memory.
    pub fn has_frame(&self) -> bool {
        // The guest sleeps when this says no. The ring's event index was stored before, and must be seen by the device
        // before its ring is looked at, or a frame in between would wake nobody.
        fence(Ordering::SeqCst);
        self.raw.poll_receive().is_some()
    }

    /// Tells the device that its interrupt was seen, without which a level-like line stays up and wakes no more.
    pub fn acknowledge(&mut self) {
        self.raw.ack_interrupt();
    }

    fn post(&mut self, index: u8) {
        // SAFETY: the frame was just taken or has just come back, so that neither the device nor a token has it.
        let frame = unsafe { self.receive.get(index) };
        // SAFETY: nobody touches the frame until `receive` gets its token back.
        if let Ok(token) = unsafe { self.raw.receive_begin(frame) } {
            self.receive.lend(token, index, FRAME_BYTES);
        }
    }

    fn release(&mut self, index: u8) {
        self.free[self.free_count] = index;
        self.free_count += 1;
    }

    /// Takes sent frames back, once the free ones become few: each look at the ring may ask for an interrupt.
    fn reclaim(&mut self) {
        if self.free_count > RING / 2 {
            return;
        }
        while let Some(token) = self.raw.poll_transmit() {
            let index = self.send.of(token);
            let bytes = usize::from(self.send.lent_bytes[usize::from(index)]);
            // SAFETY: the device has returned the frame, and it is not free yet, so that nobody else has it.
            let frame = unsafe { self.send.get(index) };
            // SAFETY: the same bytes as in `transmit`, which noted the token and the length.
            if unsafe { self.raw.transmit_complete(token, &frame[..bytes]) }.is_err() {
                return;
            }
            self.release(index);
        }
    }

    fn can_send(&mut self) -> bool {
        self.reclaim();
        self.free_count > 0
    }

    fn send<R>(&mut self, bytes: usize, fill: impl FnOnce(&mut [u8]) -> R) -> R {
        self.free_count -= 1;
        let index = self.free[self.free_count];
        // SAFETY: the frame was free, and has just been taken.
        let frame = unsafe { self.send.get(index) };
        let head_bytes = self.raw.fill_buffer_header(frame).expect("a frame holds a header");
        let total = head_bytes + bytes;
        let result = fill(&mut frame[head_bytes..total]);
        // SAFETY: nobody touches the frame until `reclaim` gets its token back.
        match unsafe { self.raw.transmit_begin(&frame[..total]) } {
            Ok(token) => self.send.lend(token, index, total),
            Err(_) => self.release(index),
        }
        result
    }
}

impl Device for Nic {
    type RxToken<'a> = Received<'a>;
    type TxToken<'a> = Sender<'a>;

    fn receive(&mut self, _: Instant) -> Option<(Received<'_>, Sender<'_>)> {
        if let Some(index) = self.read.take() {
            self.post(index);
        }
        if !self.can_send() {
            return None;
        }
        let token = self.raw.poll_receive()?;
        let index = self.receive.of(token);
        // SAFETY: the device has returned the frame. It is read by the token below and posted again only by the next
        // call, which borrows the card and so comes after the token.
        let frame = unsafe { self.receive.get(index) };
        // SAFETY: the frame that `post` lent under this token.
        let (head_bytes, bytes) = unsafe { self.raw.receive_complete(token, frame) }.ok()?;
        self.read = Some(index);
        // A device that claims more than it was given is answered with an empty frame, which smoltcp drops.
        Some((Received(frame.get(head_bytes..head_bytes + bytes).unwrap_or(&[])), Sender(self)))
    }

    fn transmit(&mut self, _: Instant) -> Option<Sender<'_>> {
        self.can_send().then_some(Sender(self))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = MOST_ETHERNET_BYTES;
        capabilities
    }
}

/// A received frame.
pub struct Received<'a>(&'a [u8]);

impl RxToken for Received<'_> {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, read: F) -> R {
        read(self.0)
    }
}

/// Permission to send one frame.
pub struct Sender<'a>(&'a mut Nic);

impl TxToken for Sender<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, bytes: usize, fill: F) -> R {
        self.0.send(bytes, fill)
    }
}

/// Memory for the rings, from a pool in the image: virtual and physical addresses are the same.
struct Dma;

/// Two rings, each of two pages.
const POOL_PAGES: usize = 8;

#[repr(C, align(4096))]
struct Pool([u8; POOL_PAGES * PAGE_SIZE]);

static mut POOL: Pool = Pool([0; POOL_PAGES * PAGE_SIZE]);
static POOL_USED: AtomicUsize = AtomicUsize::new(0);

// SAFETY: `dma_alloc` hands out zeroed, page-aligned pages, each once; addresses are physical ones since everything is
// mapped one to one.
unsafe impl Hal for Dma {
    fn dma_alloc(pages: usize, _: BufferDirection) -> (PhysAddr, NonNull<u8>) {
        let first = POOL_USED.fetch_add(pages, Ordering::Relaxed);
        if first + pages > POOL_PAGES {
            return (0, NonNull::dangling()); // 0 means that there is none
        }
        let start = (&raw mut POOL).cast::<u8>().wrapping_add(first * PAGE_SIZE);
        (start as PhysAddr, NonNull::new(start).unwrap_or(NonNull::dangling()))
    }

    unsafe fn dma_dealloc(_: PhysAddr, _: NonNull<u8>, _: usize) -> i32 {
        0 // A card that fails to start is not tried again: what it took stays taken.
    }

    unsafe fn mmio_phys_to_virt(address: PhysAddr, _: usize) -> NonNull<u8> {
        NonNull::new(address as *mut u8).unwrap_or(NonNull::dangling())
    }

    unsafe fn share(buffer: NonNull<[u8]>, _: BufferDirection) -> PhysAddr {
        buffer.as_ptr().cast::<u8>() as PhysAddr
    }

    unsafe fn unshare(_: PhysAddr, _: NonNull<[u8]>, _: BufferDirection) {}
}
