//! virtio-balloon (virtio 1.2, section 5.5), only to hear which pages the guest does not use (free page reporting, 5.5.6.7).
//! They go back to the host, and a migration finds them untouched. The balloon itself is never inflated.

mod device;
mod state;

pub use device::Balloon;
pub use state::BalloonState;
