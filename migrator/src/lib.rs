//! Moving a virtual machine between two hosts: wire protocol, source and destination machines, convergence,
//! commit protocol, announcement. Knows nothing of KVM: a VM is what implements [`traits`].
//!
//! Pure, that is without socket, thread and clock: `source` and `destination` (each has one function in which the
//! order of the phases can be read), [`handoff`], [`precopy`], [`compress::policy`], [`limit`], [`wire`], [`bitmap`], [`announce`]. The I/O is in
//! [`driver`] and [`transport`]. `docs/migration-protocol.md` is the map.
#![forbid(unsafe_code)]

pub mod announce;
pub mod arbiter;
pub mod bitmap;
pub mod compress;
pub mod destination;
pub mod driver;
pub mod error;
#[doc(hidden)]
pub mod fuzzing;
#[cfg(test)]
mod golden;
pub mod handle;
pub mod handoff;
pub mod id;
pub mod journal;
pub mod layout;
pub mod limit;
pub mod options;
pub mod pages;
pub mod precopy;
pub mod report;
pub mod source;
pub mod traits;
pub mod transport;
pub mod wire;

pub use compress::Compression;
pub use driver::{Arrived, Incoming, ReceiveError, Received, migrate, receive};
pub use error::MigrateError;
pub use handle::MigrationHandle;
pub use id::MigrationId;
pub use options::{Mode, Options, ReceiveOptions};
pub use report::{Outcome, Owner, Phase, Progress, Report};
