//! The source's half of the handoff.

use super::{HandoffMessage, Step};
use crate::arbiter::Claimant;
use crate::handle::Resolution;

/// What happens to the source.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SourceEvent {
    /// The state was sent, after all pages: the destination loads it now.
    StateSent,
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
    /// It has been in doubt for long enough to claim the VM. Means nothing without an arbiter.
    ClaimDue,
    /// The arbiter's word: whose this attempt is. That it could not be had is no event.
    Claimed(Claimant),
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
    /// Claim the attempt from the arbiter and report with [`SourceEvent::Claimed`].
    Claim,
}

/// How far the source is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum SourceState {
    /// The VM is ours and may run.
    #[default]
    Open,
    /// The destination loads, and meanwhile the decision is being journaled. COMMIT has not been sent.
    Deciding {
        /// PREPARED came.
        prepared: bool,
    },
    /// The decision is journaled. PREPARED has not come, so COMMIT has not been sent.
    Decided,
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

/// The source's half.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct SourceHandoff {
    pub(super) state: SourceState,
    pub(super) arbiter: bool,
}

impl SourceHandoff {
    /// One that has an arbiter to claim from, or none.
    pub fn new(arbiter: bool) -> Self {
        Self { state: SourceState::Open, arbiter }
    }

    /// One that goes on from the last record of its journal.
    pub fn recovered(last: Option<Step>, arbiter: bool) -> Self {
        let state = match last {
            Some(Step::Decided) => SourceState::Committed { in_doubt: false },
            Some(Step::Released) => SourceState::Released,
            _ => SourceState::Open,
        };
        Self { state, arbiter }
    }

    /// Takes an event in. An event that means nothing in this state changes nothing.
    pub fn on(&mut self, event: SourceEvent) -> Vec<SourceAction> {
        use SourceAction::{Ask, Claim, Journal, Release, Resume, Send};
        use SourceState as S;
        let keep = || (S::Kept, vec![Journal(Step::Kept), Resume]);
        let (next, actions) = match (self.state, event) {
            // Early, so that the disk works while the destination loads: `Decided` only says that COMMIT may have been sent.
            (S::Open, SourceEvent::StateSent) => (S::Deciding { prepared: false }, vec![Journal(Step::Decided)]),
            (S::Deciding { prepared: false }, SourceEvent::Prepared) => (S::Deciding { prepared: true }, vec![]),
            (S::Deciding { prepared: false }, SourceEvent::Journaled(Step::Decided, true)) => (S::Decided, vec![]),
            (S::Deciding { prepared: true }, SourceEvent::Journaled(Step::Decided, true))
            | (S::Decided, SourceEvent::Prepared) => {
                (S::Committed { in_doubt: false }, vec![Send(HandoffMessage::Commit)])
            }
            // COMMIT was not sent, so the VM may run at once. A record that says `Decided` only makes a restarted source ask.
            (S::Open | S::Deciding { .. } | S::Decided, SourceEvent::Abort)
            | (S::Deciding { .. }, SourceEvent::Journaled(Step::Decided, false)) => {
                (S::Kept, vec![Resume, Send(HandoffMessage::Abort), Journal(Step::Kept)])
            }
            // The destination gave up by itself; the same, and nobody to tell.
            (S::Open | S::Deciding { .. } | S::Decided, SourceEvent::GaveUp) => {
                (S::Kept, vec![Resume, Journal(Step::Kept)])
            }

            (S::Committed { in_doubt: false }, SourceEvent::Silence) => (S::Committed { in_doubt: true }, vec![Ask]),
            (S::Committed { .. }, SourceEvent::Running) => (S::Released, vec![Journal(Step::Released), Release]),
            (S::Committed { .. }, SourceEvent::GaveUp) => keep(),

            // A lost claim says that we will never win it. It does not settle anything: a destination that won it may
            // still find that it cannot start the VM, and then says so; so we go on asking.
            (S::Committed { in_doubt: true }, SourceEvent::ClaimDue) if self.arbiter => (self.state, vec![Claim]),
            (S::Committed { in_doubt: true }, SourceEvent::Claimed(Claimant::Source)) => keep(),

            // Where there is an arbiter, a human may be wrong without harm: it is asked first.
            (S::Committed { in_doubt: true }, SourceEvent::Resolve(Resolution::Keep)) if self.arbiter => {
                (self.state, vec![Claim])
            }
            (S::Committed { in_doubt: true }, SourceEvent::Resolve(Resolution::Keep)) => keep(),
            (S::Committed { in_doubt: true }, SourceEvent::Resolve(Resolution::Discard)) => {
                (S::Released, vec![Journal(Step::Released), Release])
            }

            // From here on no restart of ours will ask about this attempt, so its journal there is not needed any more.
            (S::Released, SourceEvent::Journaled(Step::Released, true)) => {
                (S::Released, vec![Send(HandoffMessage::Released)])
            }
            (state, _) => (state, vec![]),
        };
        self.state = next;
        actions
    }

    /// How far it is.
    pub fn state(self) -> SourceState {
        self.state
    }

    /// Whether it can still be stopped.
    pub fn can_abort(self) -> bool {
        matches!(self.state, SourceState::Open | SourceState::Deciding { .. } | SourceState::Decided)
    }

    /// Whether COMMIT may have been sent and nothing was heard in time.
    pub fn in_doubt(self) -> bool {
        self.state == SourceState::Committed { in_doubt: true }
    }

    /// Whether it is known whose the VM is.
    pub fn is_settled(self) -> bool {
        matches!(self.state, SourceState::Kept | SourceState::Released)
    }

    /// Whether the VM may run here.
    pub fn may_run(self) -> bool {
        self.can_abort() || self.state == SourceState::Kept
    }
}
