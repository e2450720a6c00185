//! virtio-rng (virtio 1.2, section 5.4): the host kernel's random numbers for the guest.

mod device;
mod state;

pub use device::Rng;
pub use state::RngState;
