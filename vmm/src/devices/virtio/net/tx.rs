//! From the guest to the network: one `writev` a frame, from the guest's buffers.

use std::io;
use std::os::fd::AsFd;

use tracing::debug;

use super::addresses::LOOK_BYTES;
use super::device::{BYTES_PER_TURN, FRAMES_PER_TURN, Net, TX};
use super::{HEADER_BYTES, MAX_FRAME_BYTES};
use crate::devices::io_thread::Turn;
use crate::devices::virtio::device::{Context, DeviceError};
use crate::devices::virtio::iovec::{Slice, collect, copy_out, write_from};
use crate::devices::virtio::queue::{QueueError, Used};

/// The shortest Ethernet frame that a TAP takes: a header alone.
const MIN_FRAME_BYTES: usize = HEADER_BYTES + 14;

enum Sent {
    Gone,
    Dropped,
    /// The network takes no more: the frame stays in the queue.
    Full,
}

impl Net {
    /// Sends what the guest has ready, as long as the network takes it.
    pub(super) fn send(&mut self, context: &mut Context<'_>) -> Result<Turn, DeviceError> {
        let failed = |source: QueueError| DeviceError::Queue { index: TX, source };
        let memory = context.memory;
        if !self.writable || !context.queues[TX].ready() {
            return Ok(Turn::Idle);
        }
        context.queues[TX].disable_notification(memory).map_err(failed)?;
        let mut turn = Turn::More;
        let mut slices = Vec::with_capacity(32);
        let enough = self.statistics.tx_bytes.saturating_add(BYTES_PER_TURN);
        for _ in 0..FRAMES_PER_TURN {
            let Some(chain) = context.queues[TX].pop(memory).map_err(failed)? else {
                if context.queues[TX].enable_notification(memory).map_err(failed)? {
                    continue;
                }
                turn = Turn::Idle;
                break;
            };
            let head = chain.head_index();
            slices.clear();
            let sent = match collect(memory, chain, false, &mut slices) {
                Ok(bytes) if (MIN_FRAME_BYTES..=MAX_FRAME_BYTES).contains(&bytes) => self.send_frame(&slices, bytes)?,
                Ok(bytes) => {
                    debug!(bytes, "a frame of a length that does not exist is dropped");
                    Sent::Dropped
                }
                Err(error) => {
                    debug!(%error, "a frame to send is dropped");
                    Sent::Dropped
                }
            };
            match sent {
                Sent::Gone => {}
                Sent::Dropped => self.statistics.tx_dropped += 1,
                Sent::Full => {
                    context.queues[TX].unpop(1);
                    self.writable = false;
                    turn = Turn::Idle;
                    break;
                }
            }
            context.queues[TX].publish(memory, &[Used { head, len: 0 }]).map_err(failed)?;
            if self.statistics.tx_bytes >= enough {
                break;
            }
        }
        context.queues[TX].signal(memory, context.interrupt).map_err(failed)?;
        Ok(turn)
    }

    fn send_frame(&mut self, slices: &[Slice<'_>], bytes: usize) -> Result<Sent, DeviceError> {
        let mut look = [0; LOOK_BYTES];
        let looked = copy_out(slices, HEADER_BYTES, &mut look);
        self.learned.see(self.mac, &look[..looked]);
        loop {
            return match write_from(self.backend.as_fd(), slices) {
                Ok(_) => {
                    self.statistics.tx_packets += 1;
                    self.statistics.tx_bytes += (bytes - HEADER_BYTES) as u64;
                    Ok(Sent::Gone)
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(Sent::Full),
                // The TAP is gone: no later frame will fare better.
                Err(error) if error.raw_os_error() == Some(libc::EBADFD) => Err(self.host_error("writing to", error)),
                // A header that makes no sense (EINVAL), no memory, an interface that is down (EIO): this frame's trouble.
                Err(error) => {
                    debug!(%error, "{}: a frame is dropped", self.backend.name());
                    Ok(Sent::Dropped)
                }
            };
        }
    }
}
