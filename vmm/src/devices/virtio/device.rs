//! What a virtio device is to its transport and to the I/O thread. A new device is one folder that implements [`VirtioDevice`].

use std::io;
use std::os::fd::OwnedFd;

use serde::{Deserialize, Serialize};

use super::interrupt::Interrupt;
use super::queue::{QueueError, VirtQueue};
use crate::devices::io_thread::Turn;
use crate::memory::GuestMemoryMmap;

/// What there is to do for a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// The driver notified this queue.
    Queue(usize),
    /// One of [`VirtioDevice::event_fds`], by its position, became ready (edge-triggered).
    Source {
        /// Its position.
        index: usize,
        /// A read will not block.
        readable: bool,
        /// A write will not block.
        writable: bool,
    },
    /// Go on where [`Turn::More`] was answered.
    Continue,
    /// Look at everything: notifications may have been lost.
    All,
}

/// What a device works with while it is active.
pub struct Context<'a> {
    /// The guest's memory.
    pub memory: &'a GuestMemoryMmap,
    /// As many as [`VirtioDevice::queue_sizes`]; those that the driver did not set up are not [ready](VirtQueue::ready).
    pub queues: &'a mut [VirtQueue],
    /// The device's interrupt.
    pub interrupt: &'a Interrupt,
    /// The negotiated features.
    pub features: u64,
}

/// A device cannot go on until the driver resets it.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// The driver broke a queue.
    #[error("queue {index} is broken")]
    Queue {
        /// Which.
        index: usize,
        /// Why.
        #[source]
        source: QueueError,
    },
    /// What stands behind the device on the host failed.
    #[error("{what} failed")]
    Host {
        /// For example, `reading from TAP mvm0`.
        what: String,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// A device's own part of the saved state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedDevice {
    /// Version of the device's state type.
    pub version: u16,
    /// That type, encoded with postcard.
    pub data: Vec<u8>,
}

/// A device's own part of the saved state is not one that this device can take over.
#[derive(Debug, thiserror::Error)]
pub enum DeviceStateError {
    /// Saved by another version of this program.
    #[error("version {found} of the state is not known (known: {known})")]
    Version {
        /// In the state.
        found: u16,
        /// Of this program.
        known: u16,
    },
    /// Not the encoding of a state.
    #[error("the state cannot be decoded")]
    Encoding(#[source] postcard::Error),
    /// A field makes no sense.
    #[error("{field} is not valid: {reason}")]
    Field {
        /// Its name.
        field: &'static str,
        /// What is wrong with it.
        reason: String,
    },
}

impl SavedDevice {
    /// Encodes a device's state type.
    pub fn encode<T: Serialize>(version: u16, state: &T) -> Self {
        let data = postcard::to_stdvec(state).expect("a state of plain data encodes");
        Self { version, data }
    }

    /// Decodes it, all of it and nothing else.
    pub fn decode<'a, T: Deserialize<'a>>(&'a self, known: u16) -> Result<T, DeviceStateError> {
        let Self { version, data } = self;
        if *version != known {
            return Err(DeviceStateError::Version { found: *version, known });
        }
        let (state, rest) = postcard::take_from_bytes(data).map_err(DeviceStateError::Encoding)?;
        if !rest.is_empty() {
            return Err(DeviceStateError::Field { field: "data", reason: format!("{} bytes too long", rest.len()) });
        }
        Ok(state)
    }
}

/// A virtio device without its transport. All calls come with the device's lock held; none may block.
pub trait VirtioDevice: Send {
    /// `VIRTIO_ID_*`.
    fn device_type(&self) -> u32;
    /// How it is called in logs, for example `virtio-net mvm0`.
    fn name(&self) -> String;
    /// The device's own features. The transport adds `VERSION_1`, `RING_EVENT_IDX` and `RING_INDIRECT_DESC`.
    fn features(&self) -> u64;
    /// The largest size of each queue, in entries, a power of two.
    fn queue_sizes(&self) -> &'static [u16];
    /// Reads the device's configuration; `data` is all zeros before, and what lies past the end stays so.
    fn read_config(&self, offset: u64, data: &mut [u8]);
    /// Descriptors whose readiness the device wants to know, duplicated.
    fn event_fds(&self) -> io::Result<Vec<OwnedFd>> {
        Ok(Vec::new())
    }
    /// The driver is ready (`DRIVER_OK`), or was when the state was saved that [`restore`](Self::restore) has just taken over.
    fn activate(&mut self, features: u64) -> Result<(), DeviceError>;
    /// The driver has reset the device: back to how it was made. Only called with nothing in flight.
    fn reset(&mut self);
    /// Does a bounded piece of work on the I/O thread. After an error the device is not called until it is reset.
    fn process(&mut self, work: Work, context: &mut Context<'_>) -> Result<Turn, DeviceError>;
    /// Saves what is the device's own.
    fn save(&self) -> SavedDevice;
    /// Takes over what another device of this type saved; on an error, nothing has changed. The device is not active.
    fn restore(&mut self, saved: &SavedDevice) -> Result<(), DeviceStateError>;
}
