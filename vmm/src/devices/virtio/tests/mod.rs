//! Tests of the devices through their registers and rings, with a driver of our own on the other side. No KVM, no TAP, no root.

mod balloon;
mod dirty;
mod driver;
mod hostile;
mod net;
mod rng;
mod state;
mod threads;
mod transport;
