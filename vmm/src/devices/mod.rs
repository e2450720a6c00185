//! The devices that a guest sees, the buses that they sit on, and the thread that serves them.

pub mod bus;
pub mod io_thread;
pub mod virtio;
