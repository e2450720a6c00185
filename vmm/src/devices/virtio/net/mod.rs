//! virtio-net (virtio 1.2, section 5.1) on a TAP.
//!
//! Frames go between the guest's buffers and the TAP without a copy of our own, headers and offloads included: the TAP speaks the
//! same `virtio_net_hdr` as the guest.

mod addresses;
mod control;
mod device;
mod offload;
mod rx;
mod state;
mod tap;
mod tx;

pub use addresses::{MacAddress, MacAddressError, NetAddresses};
pub use device::{Net, NetConfig, NetStatistics};
pub use state::NetState;
pub use tap::{Tap, TapError, Unplug};

use std::io;
use std::os::fd::AsFd;

/// Bytes of `struct virtio_net_hdr_v1`, before every frame in both directions.
pub const HEADER_BYTES: usize = 12;

/// The longest frame with its header: 64 KiB of segmentation offload (5.1.6.3.1), with an Ethernet header, a VLAN tag and ours.
pub const MAX_FRAME_BYTES: usize = HEADER_BYTES + 18 + 65_536;

/// Where frames come from and go to: a TAP, or in tests one end of a socket pair that keeps message boundaries.
///
/// The descriptor does not block, and one `readv` or `writev` of it is one frame with its header.
pub trait Backend: AsFd + Send {
    /// How it is called in logs.
    fn name(&self) -> &str;
    /// What the guest takes off the host's hands on received frames: `TUN_F_*`.
    fn set_offloads(&self, offloads: u32) -> io::Result<()>;
}
