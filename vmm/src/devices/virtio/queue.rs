//! A split virtqueue as devices use it, over `virtio_queue::Queue`.
//!
//! `Queue` finds and walks descriptor chains and suppresses the driver's notifications. The device's half of the used ring is
//! here, because a frame spread over several receive buffers must be published at once (virtio 1.2, 5.1.6.4.2) and
//! `Queue::add_used` moves the index for each buffer.
//!
//! All writes go through `vm_memory` and so mark the dirty bitmap.

use std::num::Wrapping;
use std::sync::atomic::{Ordering, fence};

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use super::interrupt::Interrupt;
use crate::devices::io_thread::Turn;
use crate::memory::GuestMemoryMmap;

/// What the driver wrote into the queue registers: nothing of it is checked before the queue is made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QueueRegisters {
    /// Entries in each ring.
    pub size: u16,
    /// The driver has set the queue up.
    pub ready: bool,
    /// Guest-physical address of the descriptor table.
    pub desc_table: u64,
    /// Guest-physical address of the available ring ("driver area").
    pub avail_ring: u64,
    /// Guest-physical address of the used ring ("device area").
    pub used_ring: u64,
}

/// A queue, saved.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueState {
    /// Entries in each ring.
    pub size: u16,
    /// The driver has set the queue up.
    pub ready: bool,
    /// Guest-physical address of the descriptor table.
    pub desc_table: u64,
    /// Guest-physical address of the available ring.
    pub avail_ring: u64,
    /// Guest-physical address of the used ring.
    pub used_ring: u64,
    /// Next entry of the available ring to take. Entries between it and the driver's index are requests in flight.
    pub next_avail: u16,
    /// Next entry of the used ring to fill.
    pub next_used: u16,
    /// `VIRTIO_F_RING_EVENT_IDX` is in force.
    pub event_idx: bool,
}

impl QueueState {
    /// The part that the driver wrote.
    pub fn registers(&self) -> QueueRegisters {
        let Self { size, ready, desc_table, avail_ring, used_ring, next_avail: _, next_used: _, event_idx: _ } = *self;
        QueueRegisters { size, ready, desc_table, avail_ring, used_ring }
    }
}

/// A queue cannot be set up, or the driver broke it.
#[derive(Debug, thiserror::Error)]
pub enum QueueError {
    /// The driver's registers or the state's fields make no queue.
    #[error("the queue is not valid")]
    Invalid(#[source] virtio_queue::Error),
    /// A ring is not in guest memory.
    #[error("the queue's rings are not all in guest memory")]
    NotInMemory,
    /// The driver made more buffers available than the queue holds, or the ring cannot be read.
    #[error("the available ring is broken")]
    Available(#[source] virtio_queue::Error),
    /// The driver made a descriptor available that does not exist.
    #[error("descriptor {0} is outside the queue")]
    NoSuchDescriptor(u16),
    /// A ring cannot be accessed.
    #[error("the queue's memory cannot be accessed")]
    Memory(#[source] GuestMemoryError),
}

/// A buffer to hand back to the driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Used {
    /// The chain's first descriptor.
    pub head: u16,
    /// Bytes that the device wrote.
    pub len: u32,
}

/// A queue in operation.
#[derive(Debug)]
pub struct VirtQueue {
    queue: Queue,
    /// Buffers published since [`signal`](Self::signal) last decided about an interrupt. Zero between two turns of a device,
    /// so it is no part of the saved state.
    unsignalled: Wrapping<u16>,
}

impl VirtQueue {
    /// Checks everything about the queue but what its rings hold. A queue that is not ready is checked when it never will be:
    /// it holds nothing.
    pub fn new(memory: &GuestMemoryMmap, max_size: u16, state: &QueueState) -> Result<Self, QueueError> {
        let QueueState { size, ready, desc_table, avail_ring, used_ring, next_avail, next_used, event_idx } = *state;
        if !ready {
            let queue = Queue::new(max_size).map_err(QueueError::Invalid)?;
            return Ok(Self { queue, unsignalled: Wrapping(0) });
        }
        let queue = Queue::try_from(virtio_queue::QueueState {
            max_size,
            next_avail,
            next_used,
            event_idx_enabled: event_idx,
            size,
            ready,
            desc_table,
            avail_ring,
            used_ring,
        })
        .map_err(QueueError::Invalid)?;
        // `Queue` takes an available ring at 0 for one that was never set.
        if avail_ring == 0 || !queue.is_valid(memory) {
            return Err(QueueError::NotInMemory);
        }
        Ok(Self { queue, unsignalled: Wrapping(0) })
    }

    /// Saves everything, with the registers as the driver wrote them (`registers`), which a queue that is not ready does not have.
    pub fn save(&self, registers: &QueueRegisters) -> QueueState {
        let Self { queue, unsignalled: _ } = self;
        let QueueRegisters { size, ready: _, desc_table, avail_ring, used_ring } = *registers;
        QueueState {
            size,
            ready: queue.ready(),
            desc_table,
            avail_ring,
            used_ring,
            next_avail: queue.next_avail(),
            next_used: queue.next_used(),
            event_idx: queue.event_idx_enabled(),
        }
    }

    /// Whether the driver has set the queue up.
    pub fn ready(&self) -> bool {
        self.queue.ready()
    }

    /// The driver takes the queue back (`QueueReady` = 0): nothing of it is left.
    pub fn disable(&mut self) {
        self.queue.reset();
    }

    /// Takes the next available chain.
    pub fn pop<'m>(
        &mut self,
        memory: &'m GuestMemoryMmap,
    ) -> Result<Option<DescriptorChain<&'m GuestMemoryMmap>>, QueueError> {
        let size = self.queue.size();
        let chain = self.queue.iter(memory).map_err(QueueError::Available)?.next();
        match chain {
            Some(chain) if chain.head_index() >= size => Err(QueueError::NoSuchDescriptor(chain.head_index())),
            chain => Ok(chain),
        }
    }

    /// Gives the last `count` popped chains back, to be popped again.
    pub fn unpop(&mut self, count: u16) {
        self.queue.set_next_avail(self.queue.next_avail().wrapping_sub(count));
    }

    /// Hands buffers back to the driver, all at once.
    pub fn publish(&mut self, memory: &GuestMemoryMmap, used: &[Used]) -> Result<(), QueueError> {
        let mut next = Wrapping(self.queue.next_used());
        for Used { head, len } in used {
            let slot = u64::from(next.0 % self.queue.size());
            // struct virtq_used_elem: le32 id, le32 len.
            let element = u64::from(*head) | u64::from(*len) << 32;
            memory.write_obj(element.to_le(), self.used_ring(4 + 8 * slot)).map_err(QueueError::Memory)?;
            next += 1;
        }
        // Release: the driver must see the elements before the index.
        memory.store(next.0.to_le(), self.used_ring(2), Ordering::Release).map_err(QueueError::Memory)?;
        self.queue.set_next_used(next.0);
        self.unsignalled += used.len() as u16;
        Ok(())
    }

    /// Interrupts the driver if it wants to know about what was published since the last call (virtio 1.2, 2.7.7 and 2.7.10).
    pub fn signal(&mut self, memory: &GuestMemoryMmap, interrupt: &Interrupt) -> Result<(), QueueError> {
        let published = std::mem::take(&mut self.unsignalled);
        if published.0 == 0 {
            return Ok(());
        }
        // The driver publishes its wish and then looks at the index; we publish the index and then look at its wish.
        fence(Ordering::SeqCst);
        let wanted = if self.queue.event_idx_enabled() {
            let used_event = self.load_avail(4 + 2 * u64::from(self.queue.size()), memory)?;
            let next_used = Wrapping(self.queue.next_used());
            next_used - Wrapping(used_event) - Wrapping(1) < published
        } else {
            u32::from(self.load_avail(0, memory)?) & VRING_AVAIL_F_NO_INTERRUPT == 0
        };
        if wanted {
            interrupt.used_buffers();
        }
        Ok(())
    }

    /// One turn of a device that takes one chain after the other: hands at most `most` of them to `serve`, which says how many bytes
    /// it wrote into a chain, or none if it is not done with it: that one stays available, and is the first of the next turn.
    pub fn serve<'m>(
        &mut self,
        memory: &'m GuestMemoryMmap,
        interrupt: &Interrupt,
        most: usize,
        mut serve: impl FnMut(DescriptorChain<&'m GuestMemoryMmap>) -> Option<u32>,
    ) -> Result<Turn, QueueError> {
        if !self.ready() {
            return Ok(Turn::Idle);
        }
        self.disable_notification(memory)?;
        let mut turn = Turn::More;
        for _ in 0..most {
            let Some(chain) = self.pop(memory)? else {
                if self.enable_notification(memory)? {
                    continue;
                }
                turn = Turn::Idle;
                break;
            };
            let head = chain.head_index();
            let Some(len) = serve(chain) else {
                self.unpop(1);
                break;
            };
            self.publish(memory, &[Used { head, len }])?;
        }
        self.signal(memory, interrupt)?;
        Ok(turn)
    }

    /// Asks the driver to notify us of further buffers; true when there are some already.
    pub fn enable_notification(&mut self, memory: &GuestMemoryMmap) -> Result<bool, QueueError> {
        self.queue.enable_notification(memory).map_err(QueueError::Available)
    }

    /// Tells the driver that we will look for ourselves.
    pub fn disable_notification(&mut self, memory: &GuestMemoryMmap) -> Result<(), QueueError> {
        self.queue.disable_notification(memory).map_err(QueueError::Available)
    }

    /// The used ring was found to lie in guest memory as a whole, so no sum overflows.
    fn used_ring(&self, offset: u64) -> GuestAddress {
        GuestAddress(self.queue.used_ring() + offset)
    }

    fn load_avail(&self, offset: u64, memory: &GuestMemoryMmap) -> Result<u16, QueueError> {
        let address = GuestAddress(self.queue.avail_ring() + offset);
        memory.load(address, Ordering::Relaxed).map(u16::from_le).map_err(QueueError::Memory)
    }
}
