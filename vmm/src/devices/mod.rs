//! The devices that a guest sees, and the buses that they sit on.

pub mod bus;
pub mod io_thread;
pub mod power;
pub mod serial;
pub mod virtio;
