//! One virtual machine on one host: KVM, memory, vCPUs, devices and their saved state. Knows nothing of migration.

pub mod arch;
pub mod devices;
pub mod memory;
