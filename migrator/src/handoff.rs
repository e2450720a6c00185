//! The commit protocol: who owns the VM, whatever fails and whenever.
//!
//! Both sides are small machines without I/O: an event goes in, actions come out, and the whole state is a value that
//! can be compared, hashed and copied, so that a model checker drives the very code that ships. The rules, in full in
//! `docs/failure-model.md`:
//!
//! - The source sends COMMIT at most once, after PREPARED came and its decision is durable. From then on it runs the VM
//!   again only if it hears that the destination gave this attempt up for good (or a human says so).
//! - The destination runs the VM only after COMMIT came and that is durable. It gives up for good when it loses the
//!   source before COMMIT; that is durable before anyone hears of it, and a later COMMIT is refused.
//! - An attempt is named by a random id, so no message and no record can be taken for another attempt's.

use serde::{Deserialize, Serialize};

use crate::handle::Resolution;
use crate::id::MigrationId;
use crate::traits::Durability;

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
    /// Destination: the VM is mine.
    Running,
    /// Destination: I will never run it.
    GaveUp,
}

/// What happens to the source.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SourceEvent {
    /// PREPARED came.
    Prepared,
    /// The record that was asked for is on stable storage, or (false) could not be written.
    Journaled(Step, bool),
    /// Something failed, the user cancelled, the connection died: stop if it is not too late.
    Abort,
    /// After COMMIT: the connection died, or RUNNING did not come in time.
    Silence,
    /// The destination says, in whatever way, that the VM is its own.
    Running,
    /// The destination says, in whatever way, that it gave up for good.
    GaveUp,
    /// A human decides.
    Resolve(Resolution),
}

/// What the source must do, in this order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SourceAction {
    /// Write the record and report with [`SourceEvent::Journaled`].
    Journal(Step),
    /// Send the message. Whether that works makes no difference: a message may always be lost.
    Send(HandoffMessage),
    /// Run the VM again if it was running.
    Resume,
    /// Let go of the VM: it is the destination's.
    Release,
    /// Begin to ask what became of the attempt.
    Ask,
}

/// The source's half.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum SourceHandoff {
    /// The VM is ours and may run.
    #[default]
    Open,
    /// PREPARED came; the decision is being journaled. COMMIT has not been sent.
    Deciding,
    /// COMMIT may have been sent. The VM is paused and stays so.
    Committed {
        /// Nothing was heard in time: we are asking.
        in_doubt: bool,
    },
    /// Settled: the VM is ours.
    Kept,
    /// Settled: the VM is the destination's.
    Released,
}

impl SourceHandoff {
    /// Takes an event in. An event that means nothing in this state changes nothing.
    pub fn on(&mut self, event: SourceEvent) -> Vec<SourceAction> {
        use SourceAction::{Ask, Journal, Release, Resume, Send};
        let (next, actions) = match (*self, event) {
            (Self::Open, SourceEvent::Prepared) => (Self::Deciding, vec![Journal(Step::Decided)]),
            (Self::Deciding, SourceEvent::Journaled(Step::Decided, true)) => {
                (Self::Committed { in_doubt: false }, vec![Send(HandoffMessage::Commit)])
            }
            // COMMIT was not sent, so the VM may run at once. A record that says `Decided` only makes a restarted source ask.
            (Self::Open | Self::Deciding, SourceEvent::Abort)
            | (Self::Deciding, SourceEvent::Journaled(Step::Decided, false)) => {
                (Self::Kept, vec![Resume, Send(HandoffMessage::Abort), Journal(Step::Kept)])
            }
            // The destination gave up by itself; the same, and nobody to tell.
            (Self::Open | Self::Deciding, SourceEvent::GaveUp) => (Self::Kept, vec![Resume, Journal(Step::Kept)]),

            (Self::Committed { in_doubt: false }, SourceEvent::Silence) => {
                (Self::Committed { in_doubt: true }, vec![Ask])
            }
            (Self::Committed { .. }, SourceEvent::Running) => (Self::Released, vec![Journal(Step::Released), Release]),
            (Self::Committed { .. }, SourceEvent::GaveUp) => (Self::Kept, vec![Journal(Step::Kept), Resume]),
            (Self::Committed { in_doubt: true }, SourceEvent::Resolve(Resolution::Keep)) => {
                (Self::Kept, vec![Journal(Step::Kept), Resume])
            }
            (Self::Committed { in_doubt: true }, SourceEvent::Resolve(Resolution::Discard)) => {
                (Self::Released, vec![Journal(Step::Released), Release])
            }
            (state, _) => (state, vec![]),
        };
        *self = next;
        actions
    }

    /// Whether it can still be stopped.
    pub fn can_abort(self) -> bool {
        matches!(self, Self::Open | Self::Deciding)
    }

    /// Whether it is known whose the VM is.
    pub fn is_settled(self) -> bool {
        matches!(self, Self::Kept | Self::Released)
    }

    /// Whether the VM may run here.
    pub fn may_run(self) -> bool {
        matches!(self, Self::Open | Self::Deciding | Self::Kept)
    }
}

/// What happens to the destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DestinationEvent {
    /// The attempt begins.
    Begin,
    /// The record that was asked for is on stable storage (where it must be), or (false) could not be written.
    Journaled(Step, bool),
    /// Memory and state are loaded.
    Loaded,
    /// COMMIT came.
    Commit,
    /// ABORT came, the connection died, something failed here.
    Abort,
    /// The VM was started: it runs, or it is held paused, or it may have run before it failed.
    Started,
    /// The VM could not be started, and certainly never ran.
    NotStarted,
}

/// What the destination must do, in this order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DestinationAction {
    /// Write the record and report with [`DestinationEvent::Journaled`].
    Journal(Step),
    /// Send the message, if there still is a connection.
    Send(HandoffMessage),
    /// Start the VM and report with [`DestinationEvent::Started`] or [`DestinationEvent::NotStarted`].
    Start,
    /// Free everything.
    Discard,
}

/// The destination's half.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum DestinationHandoff {
    /// Nothing happened yet, or the first record is being written.
    #[default]
    Begun,
    /// Building and receiving.
    Open,
    /// Loaded; that is being journaled.
    Preparing,
    /// PREPARED was sent.
    Prepared,
    /// COMMIT came and is being journaled. From here on the loss of the source changes nothing.
    Committing,
    /// COMMIT is journaled; the VM is being started.
    Starting,
    /// Settled: the VM is ours.
    Running,
    /// That we give up is being journaled.
    GivingUp,
    /// Settled: the VM will never run here.
    GaveUp,
}

impl DestinationHandoff {
    /// Takes an event in. An event that means nothing in this state changes nothing.
    pub fn on(&mut self, event: DestinationEvent) -> Vec<DestinationAction> {
        use DestinationAction::{Discard, Journal, Send, Start};
        let give_up = || (Self::GivingUp, vec![Journal(Step::GaveUp)]);
        let (next, actions) = match (*self, event) {
            (Self::Begun, DestinationEvent::Begin) => (Self::Begun, vec![Journal(Step::Receiving)]),
            (Self::Begun, DestinationEvent::Journaled(Step::Receiving, true)) => (Self::Open, vec![]),
            (Self::Open, DestinationEvent::Loaded) => (Self::Preparing, vec![Journal(Step::Prepared)]),
            (Self::Preparing, DestinationEvent::Journaled(Step::Prepared, true)) => {
                (Self::Prepared, vec![Send(HandoffMessage::Prepared)])
            }
            (Self::Prepared, DestinationEvent::Commit) => (Self::Committing, vec![Journal(Step::Committed)]),
            (Self::Committing, DestinationEvent::Journaled(Step::Committed, true)) => (Self::Starting, vec![Start]),
            (Self::Starting, DestinationEvent::Started) => {
                (Self::Running, vec![Send(HandoffMessage::Running), Journal(Step::Running)])
            }

            // It never ran, and we say so only once that is on record: until then an answer would be "pending".
            (Self::Starting, DestinationEvent::NotStarted) => give_up(),
            (Self::Begun | Self::Open | Self::Preparing | Self::Prepared, DestinationEvent::Abort) => give_up(),
            // COMMIT before PREPARED was sent: not our protocol.
            (Self::Begun | Self::Open | Self::Preparing, DestinationEvent::Commit) => give_up(),
            (Self::Begun, DestinationEvent::Journaled(Step::Receiving, false))
            | (Self::Preparing, DestinationEvent::Journaled(Step::Prepared, false))
            | (Self::Committing, DestinationEvent::Journaled(Step::Committed, false)) => give_up(),
            // If even this cannot be written, saying so is still true: this process will not run it, ever.
            (Self::GivingUp, DestinationEvent::Journaled(Step::GaveUp, _)) => {
                (Self::GaveUp, vec![Send(HandoffMessage::GaveUp), Discard])
            }
            (Self::GaveUp, DestinationEvent::Commit) => (Self::GaveUp, vec![Send(HandoffMessage::GaveUp)]),
            (state, _) => (state, vec![]),
        };
        *self = next;
        actions
    }

    /// Whether the loss of the source still means giving up.
    pub fn can_give_up(self) -> bool {
        matches!(self, Self::Begun | Self::Open | Self::Preparing | Self::Prepared)
    }

    /// Whether it is known whose the VM is.
    pub fn is_settled(self) -> bool {
        matches!(self, Self::Running | Self::GaveUp)
    }

    /// Whether the VM may run here.
    pub fn may_run(self) -> bool {
        matches!(self, Self::Starting | Self::Running)
    }
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
