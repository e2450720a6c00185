//! The I/O around the machines: threads, sockets and clocks. One call moves a VM away, one takes a VM in.
//!
//! Each call runs its machine on the caller's thread, which alone touches the VM. Everything that can block (dialling,
//! sockets) is in threads of its own that report to it, so that a cancel or a limit is answered at once.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crate::arbiter::{Arbiter, ArbiterError, Claimant};
use crate::handoff::{HandoffRecord, Step};
use crate::id::MigrationId;
use crate::report::Phase;
use crate::traits::Journal;

pub(crate) mod control;
mod courtesy;
mod destination;
mod order;
mod pace;
mod pack;
pub(crate) mod receive;
pub mod request;
mod send;
mod source;

pub use destination::{Arrived, Incoming, ReceiveError, Received, receive};
pub use source::migrate;

/// Does what a thread is for. A panic in it, which is a bug, becomes an error: whoever waits for the thread must hear of it.
fn guarded<T>(work: impl FnOnce() -> T) -> io::Result<T> {
    // Nothing that the work had is used again but behind locks that do not mind.
    catch_unwind(AssertUnwindSafe(work)).map_err(|_| io::Error::other("a bug in microvm: its thread panicked"))
}

/// While a guest stands still, nobody is told how far it is: watchers that wake up would take a processor away from the switchover.
#[derive(Default)]
struct Unseen(Option<Instant>);

impl Unseen {
    /// A switchover that takes longer than this is shown after all.
    const LONGEST: Duration = Duration::from_millis(50);

    fn hides(&mut self, phase: Phase) -> bool {
        let still = matches!(phase, Phase::Switchover | Phase::Commit);
        self.0 = still.then(|| self.0.unwrap_or_else(Instant::now));
        self.0.is_some_and(|since| since.elapsed() < Self::LONGEST)
    }
}

/// Writes a record of this attempt.
fn journal(journal: &mut dyn Journal, id: MigrationId, step: Step, vm: &str, peer: &str) -> io::Result<()> {
    let unix_ms = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64);
    let record = HandoffRecord { id, step, unix_ms, vm: vm.into(), peer: peer.into() };
    journal.append(&record, step.durability())
}

/// Claims an attempt in a thread of its own: an arbiter may take its time.
fn claim(
    arbiter: Option<&Arc<dyn Arbiter>>,
    id: MigrationId,
    by: Claimant,
    answer: impl Fn(Result<Claimant, ArbiterError>) + Send + Clone + 'static,
) {
    let Some(arbiter) = arbiter.cloned() else { return };
    let later = answer.clone();
    let spawned = thread::Builder::new().name("claim".into()).spawn(move || later(arbiter.claim(id, by)));
    if let Err(error) = spawned {
        answer(Err(ArbiterError(error.into())));
    }
}
