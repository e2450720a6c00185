//! Everything of the guest that needs no machine: what it writes, how it checks, what it says and what it is told.
//!
//! The guest's promise is that one lost write is seen, so the code that keeps it is apart from the hardware and runs
//! under `cargo test` on the host, against memory that the tests corrupt. The program (`main.rs`) adds the machine:
//! the entry, the clock, the interrupts, the serial port and the network card.

#![cfg_attr(not(test), no_std)]
#![forbid(unsafe_code)]

pub mod acpi;
pub mod cmdline;
pub mod console;
pub mod discovery;
pub mod http;
pub mod load;
pub mod pacer;
pub mod page;
pub mod pvclock;
pub mod ram;
pub mod report;
pub mod text;
pub mod workload;
