//! One virtual machine on one host: KVM, memory, vCPUs, devices and their saved state. Knows nothing of migration.

pub mod arch;
pub mod builder;
pub mod config;
pub mod devices;
pub mod host;
pub mod memory;
pub mod sandbox;
pub mod snapshot;
pub mod vcpu;
pub mod vm;
