//! The virtio-mmio transport, version 2 (virtio 1.2, section 4.2): the registers through which a driver finds, sets up and resets
//! a device.
//!
//! vCPU threads come here with the transport's lock held (the bus takes it). What a running driver touches all the time, the
//! interrupt registers and queue notifications, never waits for the device's own lock, under which the I/O thread works.
//! Nothing here reads or writes guest memory but [`MmioTransport::restore`], which reads ring indices.

use std::io;
use std::sync::{Arc, Mutex};

use tracing::debug;
use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FAILED,
    VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET, VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_mmio::*;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::cell::{CellHandler, DeviceCell, SharedDevice, lock};
use super::device::VirtioDevice;
use super::interrupt::Interrupt;
use super::queue::QueueRegisters;
use super::state::{MmioTransportState, RestoreError};
use crate::devices::bus::BusDevice;
use crate::devices::io_thread::{EventHandler, IoHandle, SourceId, Trigger, Watch, duplicate};
use crate::memory::SharedMemory;

/// Length of a transport's range on the MMIO bus, in bytes.
pub const MMIO_RANGE_BYTES: u64 = 0x1000;

pub(super) const VERSION_1: u64 = 1 << VIRTIO_F_VERSION_1;
pub(super) const RING_EVENT_IDX: u64 = 1 << VIRTIO_RING_F_EVENT_IDX;
/// What this transport adds to every device's features.
pub(super) const TRANSPORT_FEATURES: u64 = VERSION_1 | RING_EVENT_IDX | (1 << VIRTIO_RING_F_INDIRECT_DESC);

/// "virt", little-endian.
const MAGIC: u32 = 0x7472_6976;
const VERSION: u32 = 2;
/// Of no meaning to drivers: "mvm1".
const VENDOR: u32 = 0x316d_766d;

/// One device's registers on the MMIO bus.
pub struct MmioTransport {
    device: SharedDevice<dyn VirtioDevice>,
    interrupt: Arc<Interrupt>,
    notifiers: Vec<EventFd>,
    /// Never changes, so that it is read without the device's lock.
    device_type: u32,
    offered: u64,
    max_sizes: &'static [u16],
    status: u32,
    device_features_sel: u32,
    driver_features_sel: u32,
    driver_features: u64,
    queue_sel: u32,
    queues: Vec<QueueRegisters>,
}

/// A write of `QueueNotify` to be turned into an ioeventfd: `eventfd` is signalled by a 32-bit write of `queue` at `offset`.
#[derive(Clone, Copy, Debug)]
pub struct Notification<'a> {
    /// Offset in the transport's range.
    pub offset: u64,
    /// The value written.
    pub queue: u32,
    /// To be signalled.
    pub eventfd: &'a EventFd,
}

impl MmioTransport {
    /// Makes the transport of `device`, and the handle through which the rest of the VMM reaches the device.
    pub fn new<D: VirtioDevice + 'static>(memory: SharedMemory, device: D) -> io::Result<(Self, SharedDevice<D>)> {
        let interrupt = Arc::new(Interrupt::new()?);
        let max_sizes = device.queue_sizes();
        let notifiers =
            max_sizes.iter().map(|_| EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)).collect::<io::Result<Vec<_>>>()?;
        let device_type = device.device_type();
        let offered = device.features() | TRANSPORT_FEATURES;
        let cell = Arc::new(Mutex::new(DeviceCell::new(memory, interrupt.clone(), device)));
        let transport = Self {
            device: cell.clone(),
            interrupt,
            notifiers,
            device_type,
            offered,
            max_sizes,
            status: 0,
            device_features_sel: 0,
            driver_features_sel: 0,
            driver_features: 0,
            queue_sel: 0,
            queues: initial_queues(max_sizes),
        };
        Ok((transport, cell))
    }

    /// The interrupt's eventfd, for an edge-triggered `KVM_IRQFD`.
    pub fn irq_eventfd(&self) -> &EventFd {
        self.interrupt.eventfd()
    }

    /// The writes to be turned into ioeventfds. They work without, slower.
    pub fn notifications(&self) -> impl Iterator<Item = Notification<'_>> {
        self.notifiers.iter().zip(0..).map(|(eventfd, queue)| Notification {
            offset: u64::from(VIRTIO_MMIO_QUEUE_NOTIFY),
            queue,
            eventfd,
        })
    }

    /// Has the device's queues and descriptors served by the I/O thread. To be called while that is paused.
    pub fn attach(&self, io: &IoHandle) -> io::Result<SourceId> {
        let queues = self.notifiers.iter().map(duplicate).collect::<io::Result<Vec<_>>>()?;
        let own = lock(&self.device).event_fds()?;
        let watches =
            queues.into_iter().chain(own).zip(0..).map(|(fd, token)| Watch { fd, token, trigger: Trigger::Edge });
        io.register(watches.collect(), self.handler())
    }

    /// What the I/O thread calls. Public for `fuzz/`, which does without the thread.
    #[doc(hidden)]
    pub fn handler(&self) -> Box<dyn EventHandler> {
        Box::new(CellHandler { cell: self.device.clone(), queues: self.notifiers.len() })
    }

    /// Saves transport, queues and device. The I/O thread must be paused and the vCPUs stopped.
    pub fn save(&self) -> MmioTransportState {
        let Self {
            device,
            interrupt,
            notifiers: _, // Whatever they hold, all queues are looked at after a restore.
            device_type,
            offered: _,
            max_sizes: _,
            status,
            device_features_sel,
            driver_features_sel,
            driver_features,
            queue_sel,
            queues,
        } = self;
        let (queues, device) = lock(device).save(queues);
        MmioTransportState {
            device_type: *device_type,
            status: *status,
            needs_reset: interrupt.needs_reset(),
            device_features_sel: *device_features_sel,
            driver_features_sel: *driver_features_sel,
            driver_features: *driver_features,
            queue_sel: *queue_sel,
            interrupt_status: interrupt.status(),
            config_generation: interrupt.config_generation(),
            queues,
            device,
        }
    }

    /// Takes over a saved state, on a transport that no driver has touched, with guest memory already in place and the I/O
    /// thread paused. The interrupt is raised and the queues are served when the I/O thread resumes, so the interrupt
    /// controller's state must be in place by then. After an error the transport must be thrown away.
    pub fn restore(&mut self, state: &MmioTransportState) -> Result<(), RestoreError> {
        if self.status != 0 {
            return Err(RestoreError::InUse);
        }
        state.check(self.device_type, self.offered, self.max_sizes.len())?;
        let MmioTransportState {
            device_type: _,
            status,
            needs_reset,
            device_features_sel,
            driver_features_sel,
            driver_features,
            queue_sel,
            interrupt_status,
            config_generation,
            queues,
            device,
        } = state;
        {
            let mut cell = lock(&self.device);
            let features = state.is_active().then_some(*driver_features);
            cell.restore(features, queues, device)
                .map_err(|source| RestoreError::Device { name: cell.name(), source })?;
        }
        self.interrupt.restore(*interrupt_status, *config_generation, *needs_reset);
        self.status = *status;
        self.device_features_sel = *device_features_sel;
        self.driver_features_sel = *driver_features_sel;
        self.driver_features = *driver_features;
        self.queue_sel = *queue_sel;
        self.queues = queues.iter().map(super::queue::QueueState::registers).collect();
        Ok(())
    }

    fn read_register(&self, offset: u64) -> u32 {
        let Ok(offset) = u32::try_from(offset) else { return 0 };
        let queue = self.queues.get(self.queue_sel as usize);
        match offset {
            VIRTIO_MMIO_MAGIC_VALUE => MAGIC,
            VIRTIO_MMIO_VERSION => VERSION,
            VIRTIO_MMIO_DEVICE_ID => self.device_type,
            VIRTIO_MMIO_VENDOR_ID => VENDOR,
            VIRTIO_MMIO_DEVICE_FEATURES => match self.device_features_sel {
                0 => self.offered as u32,
                1 => (self.offered >> 32) as u32,
                _ => 0,
            },
            VIRTIO_MMIO_QUEUE_NUM_MAX => self.max_sizes.get(self.queue_sel as usize).copied().unwrap_or(0).into(),
            VIRTIO_MMIO_QUEUE_READY => queue.is_some_and(|queue| queue.ready).into(),
            VIRTIO_MMIO_INTERRUPT_STATUS => self.interrupt.status(),
            VIRTIO_MMIO_STATUS if self.interrupt.needs_reset() => self.status | VIRTIO_CONFIG_S_NEEDS_RESET,
            VIRTIO_MMIO_STATUS => self.status,
            // A region that does not exist has a length of all ones (4.2.2.1).
            VIRTIO_MMIO_SHM_LEN_LOW
            | VIRTIO_MMIO_SHM_LEN_HIGH
            | VIRTIO_MMIO_SHM_BASE_LOW
            | VIRTIO_MMIO_SHM_BASE_HIGH => u32::MAX,
            VIRTIO_MMIO_CONFIG_GENERATION => self.interrupt.config_generation(),
            _ => 0,
        }
    }

    fn write_register(&mut self, offset: u64, value: u32) {
        let Ok(offset) = u32::try_from(offset) else { return };
        match offset {
            VIRTIO_MMIO_DEVICE_FEATURES_SEL => self.device_features_sel = value,
            VIRTIO_MMIO_DRIVER_FEATURES_SEL => self.driver_features_sel = value,
            VIRTIO_MMIO_DRIVER_FEATURES => self.write_features(value),
            VIRTIO_MMIO_QUEUE_SEL => self.queue_sel = value,
            VIRTIO_MMIO_QUEUE_NOTIFY => {
                // Only reached where no ioeventfd is registered.
                if let Some(notifier) = self.notifiers.get(value as usize) {
                    // The only possible failure is a full counter, which wakes just as well.
                    let _ = notifier.write(1);
                }
            }
            VIRTIO_MMIO_INTERRUPT_ACK => self.interrupt.acknowledge(value),
            VIRTIO_MMIO_STATUS => self.write_status(value),
            VIRTIO_MMIO_QUEUE_READY => self.write_queue_ready(value),
            // 0 is no size, so a queue with a size out of range is found to be invalid when it is put into operation.
            VIRTIO_MMIO_QUEUE_NUM => self.set_up_queue(|queue| queue.size = u16::try_from(value).unwrap_or(0)),
            VIRTIO_MMIO_QUEUE_DESC_LOW => self.set_up_queue(|queue| set_low(&mut queue.desc_table, value)),
            VIRTIO_MMIO_QUEUE_DESC_HIGH => self.set_up_queue(|queue| set_high(&mut queue.desc_table, value)),
            VIRTIO_MMIO_QUEUE_AVAIL_LOW => self.set_up_queue(|queue| set_low(&mut queue.avail_ring, value)),
            VIRTIO_MMIO_QUEUE_AVAIL_HIGH => self.set_up_queue(|queue| set_high(&mut queue.avail_ring, value)),
            VIRTIO_MMIO_QUEUE_USED_LOW => self.set_up_queue(|queue| set_low(&mut queue.used_ring, value)),
            VIRTIO_MMIO_QUEUE_USED_HIGH => self.set_up_queue(|queue| set_high(&mut queue.used_ring, value)),
            _ => {}
        }
    }

    fn has(&self, status: u32) -> bool {
        self.status & status == status
    }

    fn write_features(&mut self, value: u32) {
        if !self.has(VIRTIO_CONFIG_S_DRIVER) || self.has(VIRTIO_CONFIG_S_FEATURES_OK) {
            return;
        }
        match self.driver_features_sel {
            0 => set_low(&mut self.driver_features, value),
            1 => set_high(&mut self.driver_features, value),
            _ => {}
        }
    }

    /// Queues are set up between `FEATURES_OK` and `DRIVER_OK` (3.1.1), and not while they are ready (4.2.2.2).
    fn set_up_queue(&mut self, change: impl FnOnce(&mut QueueRegisters)) {
        if !self.has(VIRTIO_CONFIG_S_FEATURES_OK) || self.has(VIRTIO_CONFIG_S_DRIVER_OK) {
            return;
        }
        if let Some(queue) = self.queues.get_mut(self.queue_sel as usize)
            && !queue.ready
        {
            change(queue);
        }
    }

    fn write_queue_ready(&mut self, value: u32) {
        if value & 1 == 1 {
            return self.set_up_queue(|queue| queue.ready = true);
        }
        let index = self.queue_sel as usize;
        if let Some(queue) = self.queues.get_mut(index) {
            queue.ready = false;
            // When the device's lock is ours, nothing is in flight any more: the register reads 0 as 4.2.2.1 demands.
            lock(&self.device).disable_queue(index);
        }
    }

    /// The status state machine (2.1 and 3.1.1). A driver may only add bits, in order; a reset takes all back.
    fn write_status(&mut self, value: u32) {
        if value == 0 {
            return self.reset();
        }
        if self.status & !value != 0 {
            debug!(value, status = self.status, "the driver tried to take back bits of the device status");
            return;
        }
        self.status |= value & VIRTIO_CONFIG_S_FAILED;
        let steps = [
            VIRTIO_CONFIG_S_ACKNOWLEDGE,
            VIRTIO_CONFIG_S_DRIVER,
            VIRTIO_CONFIG_S_FEATURES_OK,
            VIRTIO_CONFIG_S_DRIVER_OK,
        ];
        for step in steps {
            if self.has(step) {
                continue;
            }
            if value & step == 0 || !self.take_step(step) {
                break;
            }
        }
    }

    fn take_step(&mut self, step: u32) -> bool {
        match step {
            VIRTIO_CONFIG_S_FEATURES_OK => {
                let unknown = self.driver_features & !self.offered;
                if unknown != 0 || self.driver_features & VERSION_1 == 0 {
                    debug!(features = self.driver_features, unknown, "the driver's features are refused");
                    return false;
                }
            }
            VIRTIO_CONFIG_S_DRIVER_OK => {
                lock(&self.device).activate(self.driver_features, &self.queues);
                // A driver may have filled queues before.
                for notifier in &self.notifiers {
                    // The only possible failure is a full counter, which wakes just as well.
                    let _ = notifier.write(1);
                }
            }
            _ => {}
        }
        self.status |= step;
        true
    }

    fn reset(&mut self) {
        let Self {
            device,
            interrupt: _, // Reset with the device.
            notifiers: _, // An edge too many does no harm.
            device_type: _,
            offered: _,
            max_sizes,
            status,
            device_features_sel,
            driver_features_sel,
            driver_features,
            queue_sel,
            queues,
        } = self;
        lock(device).reset();
        *queues = initial_queues(max_sizes);
        (*status, *device_features_sel, *driver_features_sel, *queue_sel) = (0, 0, 0, 0);
        *driver_features = 0;
    }
}

fn initial_queues(max_sizes: &[u16]) -> Vec<QueueRegisters> {
    max_sizes.iter().map(|size| QueueRegisters { size: *size, ..QueueRegisters::default() }).collect()
}

fn set_low(register: &mut u64, value: u32) {
    *register = *register & !u64::from(u32::MAX) | u64::from(value);
}

fn set_high(register: &mut u64, value: u32) {
    *register = *register & u64::from(u32::MAX) | u64::from(value) << 32;
}

/// Registers take aligned 32-bit accesses, the configuration space takes all (4.2.2.2); everything else reads as zeros and
/// writes nothing. The devices that we have use no configuration that a driver writes (a balloon's driver writes its size).
impl BusDevice for MmioTransport {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        match offset.checked_sub(u64::from(VIRTIO_MMIO_CONFIG)) {
            Some(offset) => lock(&self.device).read_config(offset, data),
            None => {
                if let Ok(data) = <&mut [u8; 4]>::try_from(data) {
                    *data = self.read_register(offset).to_le_bytes();
                }
            }
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let Ok(data) = <[u8; 4]>::try_from(data) {
            self.write_register(offset, u32::from_le_bytes(data));
        }
    }
}
