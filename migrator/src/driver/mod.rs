//! The I/O around the machines: threads, sockets and clocks. One call moves a VM away, one takes a VM in.

use std::sync::Arc;
use std::sync::mpsc;

use crate::announce::Schedule;
use crate::handle::MigrationHandle;
use crate::id::MigrationId;
use crate::options::{Options, ReceiveOptions};
use crate::report::{AnnounceReport, Report};
use crate::traits::{Connection, DestinationVm, Dialer, Journal, Refusal, SourceVm, VmDescription};
use crate::wire::preamble::Role;

pub mod request;

/// Moves the VM to the destination that `dial` reaches. Blocks until the migration is settled; whoever wants to watch
/// or stop it holds a clone of `handle`. Writes to `journal` what must survive this process.
///
/// On return with owner `source`, the VM is as it was before (running, unless it was paused or is gone); with owner
/// `destination`, it is paused for good and can be torn down. It does not return while the owner is unknown.
pub fn migrate(
    vm: &mut dyn SourceVm,
    id: MigrationId,
    dial: Arc<dyn Dialer>,
    journal: &mut dyn Journal,
    options: &Options,
    handle: &MigrationHandle,
) -> Report {
    let _ = (vm, id, dial, journal, options, handle);
    unimplemented!()
}

/// A connection that came in for a migration, preamble read and answered.
pub struct Arrived {
    /// [`Role::Control`] or [`Role::Pages`].
    pub role: Role,
    /// Number of the page stream.
    pub stream: u16,
    /// The connection.
    pub connection: Box<dyn Connection>,
}

/// A migration that was offered to this host and accepted.
pub struct Incoming {
    /// The offer, as it came.
    pub offer: request::Offer,
    /// Where its connections arrive. They may come before `receive` is called, or after.
    pub connections: mpsc::Receiver<Arrived>,
}

/// A VM that is this host's now.
#[derive(Debug)]
pub struct Received {
    /// What it is.
    pub description: VmDescription,
    /// What is being announced, in the background.
    pub announce: AnnounceReport,
}

/// Why the VM is not this host's. Everything has been discarded, and the journal says so.
#[derive(Debug, thiserror::Error)]
pub enum ReceiveError {
    /// This host cannot take it; the source was told.
    #[error("refused: {0}")]
    Refused(Refusal),
    /// It was given up.
    #[error("the incoming migration was given up")]
    GaveUp(#[source] crate::error::MigrateError),
}

/// Takes a VM in. Blocks until it runs here (or is held here paused), or was given up. Returns as soon as the source was
/// told; announcing goes on in a thread of its own.
pub fn receive(
    vm: &mut dyn DestinationVm,
    incoming: Incoming,
    journal: &mut dyn Journal,
    options: &ReceiveOptions,
    handle: &MigrationHandle,
) -> Result<Received, ReceiveError> {
    let _ = (vm, incoming, journal, options, handle, Schedule::default());
    unimplemented!()
}
