//! The balloon device: gives back to the host what the guest reports as free.
//!
//! A report is a chain of device-writable buffers: the free ranges themselves. The driver keeps its hands off them until it has the
//! chain back. A long report takes several turns; it stays in the available ring meanwhile, and how far it is done is remembered only
//! to save work: begun again, after a restore, it ends in the same way. Each turn reads the descriptors anew and checks them anew: a
//! driver that changes them meanwhile loses other pages of its own, or keeps some.
//!
//! Which queue has the reports depends on the driver. By the specification it is queue 4 (virtio 1.2, 5.5.2); Linux leaves out the
//! queues of features that were not negotiated, here those for statistics and for hints, and has them in queue 2. So all
//! queues from there on are taken for it.
//!
//! `VIRTIO_BALLOON_F_PAGE_POISON` is not offered: drivers of guests that count on what is in their free pages then do not report.

use tracing::debug;
use virtio_bindings::virtio_ids::VIRTIO_ID_BALLOON;
use virtio_queue::DescriptorChain;
use vm_memory::GuestAddress;

use super::state::{BALLOON_STATE_VERSION, BalloonState};
use crate::devices::io_thread::Turn;
use crate::devices::virtio::device::{Context, DeviceError, DeviceStateError, SavedDevice, VirtioDevice, Work};
use crate::devices::virtio::queue::QueueError;
use crate::memory::{GuestMemoryMmap, PAGE_BYTES, discard};

/// `VIRTIO_BALLOON_F_REPORTING`, as a bit.
pub(super) const REPORTING: u64 = 1 << 5;
/// Inflate and deflate come before it.
const FIRST_REPORTS: usize = 2;
const QUEUES: usize = 5;
/// Linux wants at least 32 for reports.
const QUEUE_SIZES: &[u16] = &[64; QUEUES];
/// The most ranges of one report: a chain may not be longer than its queue (virtio 1.2, 2.7.5.3.1).
const MAX_RANGES: usize = 64;
/// Chains of one queue that are served in one turn.
const CHAINS_PER_TURN: usize = 4;
/// Given back from one queue in one turn: what a pause may have to wait for. A multiple of a huge page.
const BYTES_PER_TURN: u64 = 2 << 20;

/// A virtio balloon device that only takes reports of free pages.
#[derive(Debug, Default)]
pub struct Balloon {
    /// Bytes of each queue's next chain that earlier turns have been through.
    done: [u64; QUEUES],
    /// The host has refused to take memory back. Said once.
    refused: bool,
}

impl Balloon {
    /// A device whose balloon is empty and stays so.
    pub fn new() -> Self {
        Self::default()
    }

    fn serve(&mut self, index: usize, context: &mut Context<'_>) -> Result<Turn, QueueError> {
        let memory = context.memory;
        // A driver that inflates without having been asked to gets its buffers back, and no more.
        let reports = index >= FIRST_REPORTS && context.features & REPORTING != 0;
        let mut left = BYTES_PER_TURN;
        context.queues[index].serve(memory, context.interrupt, CHAINS_PER_TURN, |chain| {
            (!reports || self.take(index, chain, memory, &mut left)).then_some(0)
        })
    }

    /// Gives back at most `left` bytes of what `chain` reports, and says whether that was the last of it. A chain that does not end
    /// properly is a shorter report.
    fn take(
        &mut self,
        index: usize,
        chain: DescriptorChain<&GuestMemoryMmap>,
        memory: &GuestMemoryMmap,
        left: &mut u64,
    ) -> bool {
        let mut passed = 0;
        for range in chain.take(MAX_RANGES).filter(|descriptor| descriptor.is_write_only()) {
            let (bytes, address) = (u64::from(range.len()), range.addr().0);
            let skip = self.done[index].saturating_sub(passed).min(bytes);
            passed += bytes;
            let (start, end) = (address.saturating_add(skip), address.saturating_add(bytes));
            // Between two pages, so that none is left out.
            let stop = if end - start > *left { ((start + *left) / PAGE_BYTES * PAGE_BYTES).max(start) } else { end };
            if let Err(error) = discard::pages(memory, GuestAddress(start), stop - start)
                && !std::mem::replace(&mut self.refused, true)
            {
                debug!(%error, "virtio-balloon: the host does not take free pages back");
            }
            *left -= stop - start;
            if stop < end {
                self.done[index] = passed - (end - stop);
                return false;
            }
        }
        self.done[index] = 0;
        true
    }
}

impl VirtioDevice for Balloon {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_BALLOON
    }

    fn name(&self) -> String {
        "virtio-balloon".into()
    }

    fn features(&self) -> u64 {
        REPORTING
    }

    fn queue_sizes(&self) -> &'static [u16] {
        QUEUE_SIZES
    }

    /// `struct virtio_balloon_config`: the size that the balloon should have, 0, and what the driver writes into it, which nobody
    /// asks for.
    fn read_config(&self, _offset: u64, _data: &mut [u8]) {}

    fn activate(&mut self, _features: u64) -> Result<(), DeviceError> {
        Ok(())
    }

    fn reset(&mut self) {
        self.done = Default::default();
    }

    fn process(&mut self, work: Work, context: &mut Context<'_>) -> Result<Turn, DeviceError> {
        let queues = match work {
            Work::Queue(index) => index..index + 1,
            Work::Source { .. } | Work::Continue | Work::All => 0..QUEUES,
        };
        let mut turn = Turn::Idle;
        for index in queues {
            let served = self.serve(index, context).map_err(|source| DeviceError::Queue { index, source })?;
            turn = turn.and(served);
        }
        Ok(turn)
    }

    fn save(&self) -> SavedDevice {
        let Self {
            done: _,    // Begun again.
            refused: _, // Of this host.
        } = self;
        SavedDevice::encode(BALLOON_STATE_VERSION, &BalloonState {})
    }

    fn restore(&mut self, saved: &SavedDevice) -> Result<(), DeviceStateError> {
        let BalloonState {} = saved.decode(BALLOON_STATE_VERSION)?;
        self.done = Default::default();
        Ok(())
    }
}
