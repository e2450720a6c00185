//! From the network to the guest: one `readv` a frame, into the guest's buffers.
//!
//! The length of a frame is known only when it has been read, and what does not fit is cut off and lost. Buffers for the longest
//! frame, 64 KiB, would mean dozens of chains for every small one. So as many are offered as the last frames make likely, with a
//! spill buffer of our own behind them; the end of a longer frame is copied from there into further chains.

use std::collections::VecDeque;
use std::io;
use std::os::fd::AsFd;

use tracing::debug;
use virtio_bindings::virtio_net::VIRTIO_NET_F_MRG_RXBUF;

use super::device::{BYTES_PER_TURN, FRAMES_PER_TURN, Net, RX};
use super::offload::has;
use super::{HEADER_BYTES, MAX_FRAME_BYTES};
use crate::devices::io_thread::Turn;
use crate::devices::virtio::device::{Context, DeviceError};
use crate::devices::virtio::iovec::{MAX_SLICES, Slice, collect, copy_in, read_into};
use crate::devices::virtio::queue::{QueueError, Used, VirtQueue};
use crate::memory::GuestMemoryMmap;

/// Offset of `num_buffers` in the header.
const NUM_BUFFERS: usize = 10;

/// A chain that was taken from the queue and not used yet.
struct Chain {
    head: u16,
    slices: usize,
    /// 0 for a malformed chain.
    bytes: usize,
}

/// Chains taken from the queue, oldest first; those left over are given back, so there are none between two turns.
struct Buffers<'m> {
    memory: &'m GuestMemoryMmap,
    chains: VecDeque<Chain>,
    slices: Vec<Slice<'m>>,
    bytes: usize,
    mergeable: bool,
}

impl<'m> Buffers<'m> {
    fn new(memory: &'m GuestMemoryMmap, mergeable: bool) -> Self {
        Self { memory, chains: VecDeque::new(), slices: Vec::new(), bytes: 0, mergeable }
    }

    /// Takes chains until there is room for `wanted` bytes, or one chain without mergeable buffers. False if there is not.
    fn gather(&mut self, queue: &mut VirtQueue, wanted: usize) -> Result<bool, QueueError> {
        while self.bytes < wanted {
            if !self.mergeable && !self.chains.is_empty() || self.slices.len() > MAX_SLICES {
                break;
            }
            // A malformed chain ends what can be used together.
            if self.chains.back().is_some_and(|last| last.bytes == 0) {
                break;
            }
            let Some(chain) = queue.pop(self.memory)? else { break };
            let head = chain.head_index();
            let before = self.slices.len();
            let bytes = match collect(self.memory, chain, true, &mut self.slices) {
                Ok(bytes) if bytes >= HEADER_BYTES => bytes,
                Ok(bytes) => {
                    debug!(bytes, "a receive buffer is too short for a header");
                    self.slices.truncate(before);
                    0
                }
                Err(error) => {
                    debug!(%error, "a receive buffer is refused");
                    0
                }
            };
            self.chains.push_back(Chain { head, slices: self.slices.len() - before, bytes });
            self.bytes += bytes;
        }
        Ok(self.bytes >= wanted)
    }

    /// Hands over the first chains with `bytes` bytes in them, all at once.
    fn publish(&mut self, queue: &mut VirtQueue, bytes: usize) -> Result<(), QueueError> {
        let mut used = Vec::with_capacity(4);
        let mut left = bytes;
        let mut slices = 0;
        while let Some(chain) = self.chains.pop_front() {
            let len = left.min(chain.bytes);
            left -= len;
            slices += chain.slices;
            self.bytes -= chain.bytes;
            used.push(Used { head: chain.head, len: len as u32 });
            if left == 0 {
                break;
            }
        }
        self.slices.drain(..slices);
        queue.publish(self.memory, &used)
    }

    /// How many chains `bytes` bytes take.
    fn chains_for(&self, bytes: usize) -> usize {
        let mut room = 0;
        let needed = |chain: &&Chain| {
            let needed = room < bytes;
            room += chain.bytes;
            needed
        };
        self.chains.iter().take_while(needed).count()
    }

    /// The first slices, enough for `bytes` if there are so many, and the room in them.
    fn first(&self, bytes: usize) -> (&[Slice<'m>], usize) {
        let mut room = 0;
        let count = self
            .slices
            .iter()
            .take(MAX_SLICES)
            .take_while(|slice| {
                let more = room < bytes;
                room += if more { slice.len() } else { 0 };
                more
            })
            .count();
        (&self.slices[..count], room)
    }
}

impl Net {
    /// Receives what the network has ready, as long as the guest has buffers. Without buffers the backend is left alone until
    /// the guest notifies us of new ones.
    pub(super) fn receive(&mut self, context: &mut Context<'_>) -> Result<Turn, DeviceError> {
        if !self.readable || !context.queues[RX].ready() {
            return Ok(Turn::Idle);
        }
        let failed = |source: QueueError| DeviceError::Queue { index: RX, source };
        let memory = context.memory;
        let queue = &mut context.queues[RX];
        queue.disable_notification(memory).map_err(failed)?;
        let mut buffers = Buffers::new(memory, has(context.features, VIRTIO_NET_F_MRG_RXBUF));
        let mut result = Ok(Turn::More);
        let enough = self.statistics.rx_bytes.saturating_add(BYTES_PER_TURN);
        for _ in 0..FRAMES_PER_TURN {
            match self.receive_one(queue, &mut buffers) {
                Ok(Turn::More) if self.statistics.rx_bytes < enough => {}
                end => {
                    result = end;
                    break;
                }
            }
        }
        queue.unpop(buffers.chains.len() as u16);
        queue.signal(memory, context.interrupt).map_err(failed)?;
        result
    }

    fn receive_one(&mut self, queue: &mut VirtQueue, buffers: &mut Buffers<'_>) -> Result<Turn, DeviceError> {
        let failed = |source: QueueError| DeviceError::Queue { index: RX, source };
        buffers.gather(queue, self.expected_bytes.max(HEADER_BYTES)).map_err(failed)?;
        match buffers.chains.front() {
            None => {
                // None came while we looked: the guest's next buffers wake us.
                let some = queue.enable_notification(buffers.memory).map_err(failed)?;
                return Ok(if some { Turn::More } else { Turn::Idle });
            }
            Some(Chain { bytes: 0, .. }) => {
                buffers.publish(queue, 0).map_err(failed)?;
                return Ok(Turn::More);
            }
            Some(_) => {}
        }
        let (slices, direct) = buffers.first(self.expected_bytes.max(HEADER_BYTES));
        let bytes = match read_into(self.backend.as_fd(), slices, &mut self.spill) {
            Ok(0) => {
                self.readable = false;
                return Ok(Turn::Idle);
            }
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => return Ok(Turn::More),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                self.readable = false;
                return Ok(Turn::Idle);
            }
            Err(error) => return Err(self.host_error("reading from", error)),
        };
        // Up at once, down slowly.
        self.expected_bytes = bytes.min(MAX_FRAME_BYTES).max(self.expected_bytes - self.expected_bytes / 8);
        if bytes < HEADER_BYTES || bytes > buffers.bytes && !buffers.gather(queue, bytes).map_err(failed)? {
            self.statistics.rx_dropped += 1;
            return Ok(Turn::More);
        }
        if bytes > direct {
            copy_in(&buffers.slices, direct, &self.spill[..bytes - direct]);
        }
        // The TAP leaves this field alone, and the driver wants it whether buffers are mergeable or not (5.1.6.4.1).
        let count = buffers.chains_for(bytes) as u16;
        copy_in(&buffers.slices, NUM_BUFFERS, &count.to_le_bytes());
        buffers.publish(queue, bytes).map_err(failed)?;
        self.statistics.rx_packets += 1;
        self.statistics.rx_bytes += (bytes - HEADER_BYTES) as u64;
        Ok(Turn::More)
    }
}
