//! What is peculiar to the processor architecture: the address map, boot protocols, CPUID, MSRs, ACPI tables. x86-64 for now.

pub mod x86_64;
pub use x86_64::*;
