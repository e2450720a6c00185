//! Virtio 1.2 devices behind the MMIO transport (version 2, "modern" only).
//!
//! | who | owns |
//! | --- | --- |
//! | [`mmio`] | the registers; called by vCPU threads, behind the bus's lock |
//! | [`cell`] | a device and its queues behind one lock; called by the I/O thread, and by the transport on set-up and reset |
//! | [`interrupt`] | the interrupt and what a device changes by itself in the registers; atomics, no lock |
//! | [`queue`], [`iovec`] | rings and buffers in guest memory; every write of ours is marked in the dirty bitmap |
//! | [`device`] | the trait of a device; each device is one folder: [`balloon`], [`net`], [`rng`] |
//! | [`state`] | what is saved, and what is checked when it is read back |
//!
//! Locks are taken in this order: transport, then device; the I/O thread takes only the device's. Nothing blocks under either.

pub mod balloon;
pub mod cell;
pub mod device;
pub mod interrupt;
pub mod iovec;
pub mod mmio;
pub mod net;
pub mod queue;
pub mod rng;
pub mod state;

pub use balloon::Balloon;
pub use cell::{DeviceCell, SharedDevice};
pub use mmio::{MMIO_RANGE_BYTES, MmioTransport, Notification};
pub use net::{MacAddress, Net, NetAddresses, NetConfig, NetStatistics, Tap, TapError, Unplug};
pub use rng::Rng;
pub use state::{MmioTransportState, RestoreError};

#[cfg(test)]
mod tests;
