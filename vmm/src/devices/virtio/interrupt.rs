//! What a device and its transport share: the interrupt and the parts of the registers that a device changes by itself.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use virtio_bindings::virtio_mmio::{VIRTIO_MMIO_INT_CONFIG, VIRTIO_MMIO_INT_VRING};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// The bits of `InterruptStatus` that exist (virtio 1.2, 4.2.2).
pub(super) const INTERRUPT_BITS: u32 = VIRTIO_MMIO_INT_VRING | VIRTIO_MMIO_INT_CONFIG;

/// A device's interrupt. vCPU threads read and acknowledge it without waiting for a device at work on the I/O thread.
///
/// The eventfd is to be registered as an edge-triggered irqfd.
#[derive(Debug)]
pub struct Interrupt {
    status: AtomicU32,
    config_generation: AtomicU32,
    needs_reset: AtomicBool,
    eventfd: EventFd,
}

impl Interrupt {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self {
            status: AtomicU32::new(0),
            config_generation: AtomicU32::new(0),
            needs_reset: AtomicBool::new(false),
            eventfd: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
        })
    }

    /// For `KVM_IRQFD`.
    pub fn eventfd(&self) -> &EventFd {
        &self.eventfd
    }

    /// `InterruptStatus`.
    pub(super) fn status(&self) -> u32 {
        self.status.load(Ordering::SeqCst)
    }

    /// `InterruptACK`.
    pub(super) fn acknowledge(&self, bits: u32) {
        self.status.fetch_and(!bits, Ordering::SeqCst);
    }

    pub(super) fn config_generation(&self) -> u32 {
        self.config_generation.load(Ordering::SeqCst)
    }

    pub(super) fn needs_reset(&self) -> bool {
        self.needs_reset.load(Ordering::SeqCst)
    }

    /// Tells the driver that buffers were used.
    pub fn used_buffers(&self) {
        self.raise(VIRTIO_MMIO_INT_VRING);
    }

    /// The device's configuration has changed, and the driver need not be told.
    pub fn config_changed_silently(&self) {
        self.config_generation.fetch_add(1, Ordering::SeqCst);
    }

    /// Tells the driver that the device's configuration has changed.
    pub fn config_changed(&self) {
        self.config_changed_silently();
        self.raise(VIRTIO_MMIO_INT_CONFIG);
    }

    /// The device cannot go on: `DEVICE_NEEDS_RESET` (virtio 1.2, 2.1).
    pub(super) fn fail(&self) {
        self.needs_reset.store(true, Ordering::SeqCst);
        self.config_changed();
    }

    /// Raises again what the driver has not acknowledged: the edge itself may have been lost with another machine.
    pub(super) fn raise_pending(&self) {
        if self.status() != 0 {
            self.raise(0);
        }
    }

    /// Back to the beginning, but for the configuration's generation, which may only move forward.
    pub(super) fn reset(&self) {
        self.status.store(0, Ordering::SeqCst);
        self.needs_reset.store(false, Ordering::SeqCst);
    }

    pub(super) fn restore(&self, status: u32, config_generation: u32, needs_reset: bool) {
        self.status.store(status, Ordering::SeqCst);
        self.config_generation.store(config_generation, Ordering::SeqCst);
        self.needs_reset.store(needs_reset, Ordering::SeqCst);
    }

    /// The bit first, the edge after it: a driver that sees the edge must find the bit.
    fn raise(&self, bits: u32) {
        self.status.fetch_or(bits, Ordering::SeqCst);
        // The only possible failure is a full counter, which is an edge just as well.
        let _ = self.eventfd.write(1);
    }
}
