//! A device together with its queues: the part that the transport (vCPU threads) and the I/O thread share behind one lock.

use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex, MutexGuard};

use tracing::error;

use super::device::{Context, DeviceError, DeviceStateError, SavedDevice, VirtioDevice, Work};
use super::interrupt::Interrupt;
use super::queue::{QueueRegisters, QueueState, VirtQueue};
use crate::devices::io_thread::{EventHandler, Turn, Wake};
use crate::memory::SharedMemory;

/// A device behind its lock. `SharedDevice<Net>` turns into the `SharedDevice<dyn VirtioDevice>` of its transport.
pub type SharedDevice<D> = Arc<Mutex<DeviceCell<D>>>;

/// Between `DRIVER_OK` and the next reset or failure.
struct Active {
    features: u64,
    queues: Vec<VirtQueue>,
}

/// A device and, while the driver uses it, its queues. Dereferences to the device.
pub struct DeviceCell<D: ?Sized> {
    memory: SharedMemory,
    interrupt: Arc<Interrupt>,
    active: Option<Active>,
    /// The state came from another machine, whose last interrupt may have been lost on the way.
    restored: bool,
    /// How often the device has failed since it was made here.
    failures: u32,
    device: D,
}

impl<D> DeviceCell<D> {
    pub(super) fn new(memory: SharedMemory, interrupt: Arc<Interrupt>, device: D) -> Self {
        Self { memory, interrupt, active: None, restored: false, failures: 0, device }
    }
}

impl<D: ?Sized> Deref for DeviceCell<D> {
    type Target = D;
    fn deref(&self) -> &D {
        &self.device
    }
}

impl<D: ?Sized> DerefMut for DeviceCell<D> {
    fn deref_mut(&mut self) -> &mut D {
        &mut self.device
    }
}

impl<D: ?Sized> DeviceCell<D> {
    /// The negotiated features, while the driver uses the device.
    pub fn negotiated(&self) -> Option<u64> {
        self.active.as_ref().map(|active| active.features)
    }

    /// The device's interrupt.
    pub fn interrupt(&self) -> &Interrupt {
        &self.interrupt
    }
}

impl<D: VirtioDevice + ?Sized> DeviceCell<D> {
    /// `DRIVER_OK`. A failure leaves the device waiting for a reset.
    pub(super) fn activate(&mut self, features: u64, registers: &[QueueRegisters]) {
        let event_idx = features & super::mmio::RING_EVENT_IDX != 0;
        let states: Vec<_> = registers
            .iter()
            .map(|registers| {
                let QueueRegisters { size, ready, desc_table, avail_ring, used_ring } = *registers;
                QueueState { size, ready, desc_table, avail_ring, used_ring, next_avail: 0, next_used: 0, event_idx }
            })
            .collect();
        if let Err(error) = self.start(features, &states) {
            self.fail(&error);
        }
    }

    fn start(&mut self, features: u64, states: &[QueueState]) -> Result<(), DeviceError> {
        let queues = self.make_queues(states)?;
        self.device.activate(features)?;
        self.active = Some(Active { features, queues });
        Ok(())
    }

    fn make_queues(&self, states: &[QueueState]) -> Result<Vec<VirtQueue>, DeviceError> {
        let sizes = self.device.queue_sizes();
        let queue = |(index, (max_size, state)): (usize, (&u16, &QueueState))| {
            VirtQueue::new(&self.memory, *max_size, state).map_err(|source| DeviceError::Queue { index, source })
        };
        sizes.iter().zip(states).enumerate().map(queue).collect()
    }

    /// The driver's reset.
    pub(super) fn reset(&mut self) {
        self.active = None;
        self.device.reset();
        self.interrupt.reset();
    }

    /// The driver takes one queue back.
    pub(super) fn disable_queue(&mut self, index: usize) {
        if let Some(queue) = self.active.as_mut().and_then(|active| active.queues.get_mut(index)) {
            queue.disable();
        }
    }

    /// Queues and device. `registers` is what the driver wrote, for queues that are not in operation.
    pub(super) fn save(&self, registers: &[QueueRegisters]) -> (Vec<QueueState>, SavedDevice) {
        let Self { memory: _, interrupt: _, active, restored: _, failures: _, device } = self;
        let queues = match active {
            Some(Active { features: _, queues }) => {
                queues.iter().zip(registers).map(|(queue, registers)| queue.save(registers)).collect()
            }
            None => registers
                .iter()
                .map(|registers| {
                    let QueueRegisters { size, ready, desc_table, avail_ring, used_ring } = *registers;
                    QueueState { size, ready, desc_table, avail_ring, used_ring, ..QueueState::default() }
                })
                .collect(),
        };
        (queues, device.save())
    }

    /// Takes over saved queues and device. With `features`, the device was active.
    pub(super) fn restore(
        &mut self,
        features: Option<u64>,
        queues: &[QueueState],
        device: &SavedDevice,
    ) -> Result<(), CellRestoreError> {
        if let Some(features) = features {
            let event_idx = features & super::mmio::RING_EVENT_IDX != 0;
            for (index, state) in queues.iter().enumerate().filter(|(_, state)| state.ready) {
                if state.event_idx != event_idx {
                    return Err(CellRestoreError::EventIdx { index });
                }
            }
            // What the rings hold is the driver's, and looked at when the device works: a driver that breaks them gets a device
            // that waits for a reset, there as here, and not a machine that cannot be moved.
            let made = self.make_queues(queues)?;
            self.device.restore(device)?;
            self.device.activate(features)?;
            self.active = Some(Active { features, queues: made });
        } else {
            self.device.restore(device)?;
        }
        self.restored = true;
        Ok(())
    }

    /// Does work if the driver uses the device, and ends the use if that fails.
    pub(super) fn work(&mut self, work: Work) -> Turn {
        let Some(active) = &mut self.active else { return Turn::Idle };
        let Active { features, queues } = active;
        let mut context = Context { memory: &self.memory, queues, interrupt: &self.interrupt, features: *features };
        match self.device.process(work, &mut context) {
            Ok(turn) => turn,
            Err(error) => {
                self.fail(&error);
                Turn::Idle
            }
        }
    }

    /// After a pause: raises what was not acknowledged and looks at all queues.
    fn resumed(&mut self) -> Turn {
        if std::mem::take(&mut self.restored) && self.active.is_some() {
            self.interrupt.used_buffers();
        } else {
            self.interrupt.raise_pending();
        }
        self.work(Work::All)
    }

    fn fail(&mut self, error: &DeviceError) {
        // A guest can reset and break a device as often as it likes, and must not fill the host's log with it.
        self.failures = self.failures.saturating_add(1);
        if self.failures.is_power_of_two() {
            let mut chain = error.to_string();
            let mut cause = std::error::Error::source(error);
            while let Some(error) = cause {
                chain += &format!(": {error}");
                cause = error.source();
            }
            let (name, times) = (self.device.name(), self.failures);
            error!(times, "{name}: {chain}; the device waits for a reset by the guest");
        }
        self.active = None;
        self.interrupt.fail();
    }
}

/// Why queues and device cannot take over a state.
#[derive(Debug, thiserror::Error)]
pub enum CellRestoreError {
    /// A queue's event index flag is not what was negotiated.
    #[error("queue {index} has another event index flag than the negotiated features")]
    EventIdx {
        /// Which queue.
        index: usize,
    },
    /// A queue or the host's side of the device.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The device's own state.
    #[error(transparent)]
    State(#[from] DeviceStateError),
}

/// The I/O thread's end of a device: the queues' notifications come first, then the device's own descriptors.
pub(super) struct CellHandler {
    pub(super) cell: SharedDevice<dyn VirtioDevice>,
    pub(super) queues: usize,
}

impl EventHandler for CellHandler {
    fn handle(&mut self, wake: Wake) -> Turn {
        let mut cell = lock(&self.cell);
        match wake {
            Wake::Ready { token, readable, writable } => match (token as usize).checked_sub(self.queues) {
                None => cell.work(Work::Queue(token as usize)),
                Some(index) => cell.work(Work::Source { index, readable, writable }),
            },
            Wake::Continue => cell.work(Work::Continue),
            Wake::Resumed => cell.resumed(),
        }
    }
}

/// A device's lock is never held by code that blocks.
pub(super) fn lock<D: ?Sized>(cell: &Mutex<DeviceCell<D>>) -> MutexGuard<'_, DeviceCell<D>> {
    cell.lock().expect("a device panicked")
}
