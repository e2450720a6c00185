//! The destination's half of the handoff.

use super::{HandoffMessage, Step};
use crate::arbiter::Claimant;

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
    /// The arbiter's word: whose this attempt is. That it could not be had is no event.
    Claimed(Claimant),
    /// The VM was started: it runs, or it is held paused, or it may have run before it failed.
    Started,
    /// The VM could not be started, and certainly never ran.
    NotStarted,
    /// Time to try again what did not work: the claim, or the record that we gave up.
    Again,
    /// RELEASED came.
    Released,
}

/// What the destination must do, in this order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DestinationAction {
    /// Write the record and report with [`DestinationEvent::Journaled`].
    Journal(Step),
    /// Send the message, if there still is a connection.
    Send(HandoffMessage),
    /// Claim the attempt from the arbiter and report with [`DestinationEvent::Claimed`].
    Claim,
    /// Start the VM and report with [`DestinationEvent::Started`] or [`DestinationEvent::NotStarted`].
    Start,
    /// Free everything.
    Discard,
    /// Nobody will ask about this attempt any more: its journal may be removed.
    Forget,
}

/// How far the destination is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum DestinationState {
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
    /// COMMIT is journaled; the arbiter is being asked.
    Claiming,
    /// COMMIT is journaled (and the claim won, where there is an arbiter); the VM is being started.
    Starting,
    /// Settled: the VM is ours.
    Running,
    /// That we give up is being journaled.
    GivingUp {
        /// COMMIT is on record: without this record an answer from the journal would be that the VM is ours.
        committed: bool,
    },
    /// We gave up and have said so, but the journal still says that COMMIT came. Until it says more, nobody may answer
    /// from it: this process stays and holds it.
    Unrecorded,
    /// Settled: the VM will never run here.
    GaveUp,
}

/// The destination's half.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct DestinationHandoff {
    pub(super) state: DestinationState,
    pub(super) arbiter: bool,
}

impl DestinationHandoff {
    /// One that must win the attempt from an arbiter before it starts the VM, or need not.
    pub fn new(arbiter: bool) -> Self {
        Self { state: DestinationState::Begun, arbiter }
    }

    /// Takes an event in. An event that means nothing in this state changes nothing.
    pub fn on(&mut self, event: DestinationEvent) -> Vec<DestinationAction> {
        use DestinationAction::{Claim, Discard, Forget, Journal, Send, Start};
        use DestinationEvent as E;
        use DestinationState as S;
        let give_up = |committed| (S::GivingUp { committed }, vec![Journal(Step::GaveUp)]);
        let (next, actions) = match (self.state, event) {
            (S::Begun, E::Begin) => (S::Begun, vec![Journal(Step::Receiving)]),
            (S::Begun, E::Journaled(Step::Receiving, true)) => (S::Open, vec![]),
            (S::Open, E::Loaded) => (S::Preparing, vec![Journal(Step::Prepared)]),
            (S::Preparing, E::Journaled(Step::Prepared, true)) => (S::Prepared, vec![Send(HandoffMessage::Prepared)]),
            (S::Prepared, E::Commit) => (S::Committing, vec![Journal(Step::Committed)]),
            // Both sides must win the claim, so a source that has won it may run the VM whatever happens here.
            (S::Committing, E::Journaled(Step::Committed, true)) if self.arbiter => (S::Claiming, vec![Claim]),
            (S::Committing, E::Journaled(Step::Committed, true)) => (S::Starting, vec![Start]),
            (S::Claiming, E::Claimed(Claimant::Destination)) => (S::Starting, vec![Start]),
            (S::Claiming, E::Claimed(Claimant::Source)) => give_up(true),
            // The claim may have been won without our hearing of it: there is nothing to do but to ask again.
            (S::Claiming, E::Again) => (S::Claiming, vec![Claim]),
            (S::Starting, E::Started) => (S::Running, vec![Send(HandoffMessage::Running), Journal(Step::Running)]),
            (S::Running, E::Released) => (S::Running, vec![Forget]),

            // It never ran, and we say so only once that is on record: until then an answer would be "pending".
            (S::Starting, E::NotStarted) => give_up(true),
            (S::Begun | S::Open | S::Preparing | S::Prepared, E::Abort) => give_up(false),
            // COMMIT before PREPARED was sent: not our protocol.
            (S::Begun | S::Open | S::Preparing, E::Commit) => give_up(false),
            (S::Begun, E::Journaled(Step::Receiving, false))
            | (S::Preparing, E::Journaled(Step::Prepared, false))
            | (S::Committing, E::Journaled(Step::Committed, false)) => give_up(false),
            // If even this cannot be written, saying so is still true: this process will not run it, ever. Whoever asks
            // after its end finds no trace and writes the record, unless COMMIT is on record.
            (S::GivingUp { committed: true }, E::Journaled(Step::GaveUp, false)) => {
                (S::Unrecorded, vec![Send(HandoffMessage::GaveUp), Discard])
            }
            (S::GivingUp { .. }, E::Journaled(Step::GaveUp, _)) => {
                (S::GaveUp, vec![Send(HandoffMessage::GaveUp), Discard])
            }
            (S::Unrecorded, E::Again) => (S::Unrecorded, vec![Journal(Step::GaveUp)]),
            (S::Unrecorded, E::Journaled(Step::GaveUp, true)) => (S::GaveUp, vec![]),
            (S::GaveUp, E::Commit) => (S::GaveUp, vec![Send(HandoffMessage::GaveUp)]),
            (state, _) => (state, vec![]),
        };
        self.state = next;
        actions
    }

    /// How far it is.
    pub fn state(self) -> DestinationState {
        self.state
    }

    /// Whether the loss of the source still means giving up.
    pub fn can_give_up(self) -> bool {
        use DestinationState as S;
        matches!(self.state, S::Begun | S::Open | S::Preparing | S::Prepared)
    }

    /// Whether it waits to be told to try again ([`DestinationEvent::Again`]).
    pub fn can_retry(self) -> bool {
        matches!(self.state, DestinationState::Claiming | DestinationState::Unrecorded)
    }

    /// Whether it is known whose the VM is.
    pub fn is_settled(self) -> bool {
        matches!(self.state, DestinationState::Running | DestinationState::GaveUp)
    }

    /// Whether the VM may run here.
    pub fn may_run(self) -> bool {
        matches!(self.state, DestinationState::Starting | DestinationState::Running)
    }
}
