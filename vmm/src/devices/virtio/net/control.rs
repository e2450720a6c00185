//! The control queue (virtio 1.2, 5.1.6.5): the guest says that it has announced itself; nothing else is offered.

use tracing::debug;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_CTRL_ANNOUNCE, VIRTIO_NET_CTRL_ANNOUNCE_ACK, VIRTIO_NET_ERR, VIRTIO_NET_OK,
};
use virtio_queue::DescriptorChain;
use vm_memory::{Bytes, GuestMemory, Permissions};

use super::device::{CONTROL, Net};
use crate::devices::io_thread::Turn;
use crate::devices::virtio::device::{Context, DeviceError};
use crate::devices::virtio::iovec::{MAX_SLICES, Slice, copy_out};
use crate::devices::virtio::queue::QueueError;
use crate::memory::GuestMemoryMmap;

const COMMANDS_PER_TURN: usize = 4;

impl Net {
    /// Serves the control queue.
    pub(super) fn control(&mut self, context: &mut Context<'_>) -> Result<Turn, DeviceError> {
        self.serve_control(context).map_err(|source| DeviceError::Queue { index: CONTROL, source })
    }

    fn serve_control(&mut self, context: &mut Context<'_>) -> Result<Turn, QueueError> {
        let (memory, interrupt) = (context.memory, context.interrupt);
        context.queues[CONTROL].serve(memory, interrupt, COMMANDS_PER_TURN, |chain| {
            let Some((command, answer)) = split(memory, chain) else { return Some(0) };
            let result = if command == [VIRTIO_NET_CTRL_ANNOUNCE as u8, VIRTIO_NET_CTRL_ANNOUNCE_ACK as u8] {
                if std::mem::take(&mut self.announce) {
                    interrupt.config_changed_silently();
                }
                VIRTIO_NET_OK
            } else {
                debug!(?command, "a control command that was not offered");
                VIRTIO_NET_ERR
            };
            Some(answer.write(&[result as u8], 0).unwrap_or(0) as u32)
        })
    }
}

/// The class and the command at the beginning, and where the answer goes: into the first writable byte. None when there is no
/// room for either.
fn split<'m>(memory: &'m GuestMemoryMmap, chain: DescriptorChain<&'m GuestMemoryMmap>) -> Option<([u8; 2], Slice<'m>)> {
    let mut readable = Vec::new();
    for descriptor in chain.take(MAX_SLICES) {
        let mut slices =
            memory.get_slices(descriptor.addr(), descriptor.len() as usize, Permissions::ReadWrite).ok()?;
        if descriptor.is_write_only() {
            let mut command = [0; 2];
            let answer = slices.next()?.ok()?;
            return (copy_out(&readable, 0, &mut command) == 2).then_some((command, answer));
        }
        for slice in slices {
            readable.push(slice.ok()?);
        }
    }
    None
}
