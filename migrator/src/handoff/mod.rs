//! The commit protocol: who owns the VM, whatever fails and whenever.
//!
//! Both sides are small machines without I/O: an event goes in, actions come out, and the whole state is a value that
//! can be compared, hashed and copied, so that a model checker drives the very code that ships. The rules, in full in
//! `docs/failure-model.md`:
//!
//! - The source sends COMMIT at most once, after PREPARED came and its decision is durable. (It writes that down while the
//!   destination loads: it only says that COMMIT may have been sent.) From then on it runs the VM again only if it hears that the destination gave this attempt up for good (or a human says so).
//! - The destination runs the VM only after COMMIT came and that is durable. It gives up for good when it loses the
//!   source before COMMIT; that is durable before anyone hears of it, and a later COMMIT is refused.
//! - An attempt is named by a random id, so no message and no record can be taken for another attempt's.
//! - Where there is an arbiter, the destination must win the attempt from it after COMMIT is durable and before it runs the
//!   VM, and a source in doubt that wins it runs the VM again.

use serde::{Deserialize, Serialize};

use crate::id::MigrationId;
use crate::traits::Durability;

mod destination;
mod source;

pub use destination::{DestinationAction, DestinationEvent, DestinationHandoff, DestinationState};
pub use source::{SourceAction, SourceEvent, SourceHandoff, SourceState};

/// What a side has journaled of one attempt. The order is the order in time; only `GaveUp` may follow anything before
/// `Running`, and `Kept` anything at the source before `Released`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Step {
    /// Source: an attempt began.
    Sending = 1,
    /// Source: COMMIT may have been sent. Whoever finds this as the last record must ask before the VM may run here.
    Decided = 2,
    /// Source: the VM stays, this attempt is over.
    Kept = 3,
    /// Source: the VM is the destination's.
    Released = 4,
    /// Destination: an attempt began.
    Receiving = 16,
    /// Destination: all state is loaded, waiting for COMMIT.
    Prepared = 17,
    /// Destination: COMMIT came; the VM is about to run here.
    Committed = 18,
    /// Destination: the VM was started here.
    Running = 19,
    /// Destination: this attempt will never run here. For good.
    GaveUp = 20,
}

impl Step {
    /// Every step.
    pub const ALL: [Self; 9] = [
        Self::Sending,
        Self::Decided,
        Self::Kept,
        Self::Released,
        Self::Receiving,
        Self::Prepared,
        Self::Committed,
        Self::Running,
        Self::GaveUp,
    ];

    /// Whether the next step must wait until this one is on stable storage.
    ///
    /// Two may be lost to a power cut, because the process dies with it, and the answer is the same without them: a
    /// destination that was waiting for COMMIT has given up either way, and one that has `Committed` owns the VM. The
    /// first record of either side is durable so that a journal that cannot be written is noticed before the blackout,
    /// and to measure what a durable record costs.
    pub fn durability(self) -> Durability {
        match self {
            Self::Prepared | Self::Running => Durability::Lazy,
            _ => Durability::Durable,
        }
    }
}

/// One record of a journal.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct HandoffRecord {
    /// The attempt.
    pub id: MigrationId,
    /// What happened.
    pub step: Step,
    /// When, in milliseconds since 1970 by this host's clock. For humans; nothing is decided by it.
    pub unix_ms: u64,
    /// Name of the VM.
    pub vm: String,
    /// The other side: for the source, where to ask.
    pub peer: String,
}

/// What the two machines say to each other. The wire adds reasons and measurements.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum HandoffMessage {
    /// Destination: everything is loaded.
    Prepared,
    /// Source: run it. The commit point.
    Commit,
    /// Source: this attempt is over.
    Abort,
    /// Source: the VM is yours, and I will never ask about this attempt again.
    Released,
    /// Destination: the VM is mine.
    Running,
    /// Destination: I will never run it.
    GaveUp,
}

/// What a destination's journal says of an attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Answer {
    /// The VM is this host's (or was, and died here).
    Running,
    /// It never ran here and never will.
    GaveUp,
    /// The receiving process lives and has not settled it: ask again.
    Pending,
    /// No process has it and nothing was promised. Whoever answers must first write [`Step::GaveUp`], and then say so.
    NoTrace,
}

/// Answers "what became of this attempt?" from a destination's journal. `alive`: the receiving process still holds the
/// journal (see [`crate::journal::FileJournal`]), so the records may not be its last word.
pub fn answer(records: &[HandoffRecord], id: MigrationId, alive: bool) -> Answer {
    let has = |step| records.iter().any(|record| record.id == id && record.step == step);
    if has(Step::GaveUp) {
        Answer::GaveUp
    } else if has(Step::Running) {
        Answer::Running
    } else if alive {
        // Also with `Committed`: the start may still fail before the guest ran.
        Answer::Pending
    } else if has(Step::Committed) {
        // It died between COMMIT and its word that it runs: the guest may have run, so it is lost here, not there.
        Answer::Running
    } else {
        Answer::NoTrace
    }
}

/// The attempt that a restarted source must ask about before the VM may run again: `Decided`, and nothing after it.
pub fn unsettled(records: &[HandoffRecord]) -> Option<&HandoffRecord> {
    records.iter().rfind(|record| record.step == Step::Decided).filter(|decided| {
        !records.iter().any(|record| record.id == decided.id && matches!(record.step, Step::Kept | Step::Released))
    })
}

#[cfg(test)]
mod tests;
