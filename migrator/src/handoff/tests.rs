//! What can be said in a table. Whether it holds together is for the model checker (`tests/model`).

use super::*;
use crate::arbiter::Claimant;
use crate::handle::Resolution;

const ID: MigrationId = MigrationId([7; 16]);

fn record(step: Step) -> HandoffRecord {
    HandoffRecord { id: ID, step, unix_ms: 0, vm: "vm".into(), peer: "peer".into() }
}

#[test]
fn answers() {
    use Step::*;
    for (steps, alive, expected) in [
        (&[][..], false, Answer::NoTrace),
        (&[], true, Answer::Pending),
        (&[Receiving], false, Answer::NoTrace),
        (&[Receiving, Prepared], true, Answer::Pending),
        (&[Receiving, Prepared], false, Answer::NoTrace),
        (&[Receiving, Prepared, Committed], true, Answer::Pending),
        (&[Receiving, Prepared, Committed], false, Answer::Running),
        (&[Receiving, Prepared, Committed, Running], true, Answer::Running),
        (&[Receiving, Prepared, Committed, Running], false, Answer::Running),
        (&[Receiving, Prepared, Committed, GaveUp], true, Answer::GaveUp),
        (&[Receiving, GaveUp], false, Answer::GaveUp),
    ] {
        let records: Vec<_> = steps.iter().map(|step| record(*step)).collect();
        assert_eq!(answer(&records, ID, alive), expected, "{steps:?} {alive}");
        assert_eq!(answer(&records, MigrationId([8; 16]), false), Answer::NoTrace, "another attempt");
    }
}

#[test]
fn what_a_restarted_source_must_ask_about() {
    use Step::*;
    let records = |steps: &[Step]| steps.iter().map(|step| record(*step)).collect::<Vec<_>>();
    for steps in [&[][..], &[Sending], &[Sending, Decided, Kept], &[Sending, Decided, Released]] {
        assert_eq!(unsettled(&records(steps)), None, "{steps:?}");
    }
    assert_eq!(unsettled(&records(&[Sending, Decided])).unwrap().id, ID);
    let mut two = records(&[Sending, Decided, Kept]);
    two.push(HandoffRecord { id: MigrationId([9; 16]), ..record(Decided) });
    assert_eq!(unsettled(&two).unwrap().id, MigrationId([9; 16]));
}

/// Feeds events; gives all actions.
fn source(arbiter: bool, events: &[SourceEvent]) -> (SourceHandoff, Vec<SourceAction>) {
    let mut machine = SourceHandoff::new(arbiter);
    let actions = events.iter().flat_map(|event| machine.on(*event)).collect();
    (machine, actions)
}

fn destination(arbiter: bool, events: &[DestinationEvent]) -> (DestinationHandoff, Vec<DestinationAction>) {
    let mut machine = DestinationHandoff::new(arbiter);
    let actions = events.iter().flat_map(|event| machine.on(*event)).collect();
    (machine, actions)
}

#[test]
fn a_usual_handoff() {
    use {DestinationAction as D, DestinationEvent as E, SourceAction as S};
    let written = |step| SourceEvent::Journaled(step, true);
    let (machine, actions) = source(
        false,
        &[
            SourceEvent::StateSent,
            written(Step::Decided),
            SourceEvent::Prepared,
            SourceEvent::Running,
            written(Step::Released),
        ],
    );
    assert_eq!(machine.state(), SourceState::Released);
    assert_eq!(
        actions,
        [
            S::Journal(Step::Decided),
            S::Send(HandoffMessage::Commit),
            S::Journal(Step::Released),
            S::Release,
            S::Send(HandoffMessage::Released)
        ]
    );
    let written = |step| E::Journaled(step, true);
    let events = [
        E::Begin,
        written(Step::Receiving),
        E::Loaded,
        written(Step::Prepared),
        E::Commit,
        written(Step::Committed),
        E::Started,
        written(Step::Running),
        E::Released,
    ];
    let (machine, actions) = destination(false, &events);
    assert_eq!(machine.state(), DestinationState::Running);
    let expected = [
        D::Journal(Step::Receiving),
        D::Journal(Step::Prepared),
        D::Send(HandoffMessage::Prepared),
        D::Journal(Step::Committed),
        D::Start,
        D::Send(HandoffMessage::Running),
        D::Journal(Step::Running),
        D::Forget,
    ];
    assert_eq!(actions, expected);
    // The same with an arbiter, but for the claim.
    let mut with_claim = expected.to_vec();
    with_claim.insert(4, D::Claim);
    let mut events = events.to_vec();
    events.insert(6, E::Claimed(Claimant::Destination));
    assert_eq!(destination(true, &events).1, with_claim);
}

#[test]
fn released_is_not_said_before_it_is_on_record() {
    let (mut machine, _) = source(
        false,
        &[
            SourceEvent::StateSent,
            SourceEvent::Journaled(Step::Decided, true),
            SourceEvent::Prepared,
            SourceEvent::Running,
        ],
    );
    assert_eq!(machine.on(SourceEvent::Journaled(Step::Released, false)), []);
    assert_eq!(machine.state(), SourceState::Released);
}

#[test]
fn claims() {
    let doubt = [
        SourceEvent::StateSent,
        SourceEvent::Journaled(Step::Decided, true),
        SourceEvent::Prepared,
        SourceEvent::Silence,
    ];
    let (in_doubt, _) = source(true, &doubt);
    for due in [SourceEvent::ClaimDue, SourceEvent::Resolve(Resolution::Keep)] {
        let mut machine = in_doubt;
        assert_eq!((machine.on(due), machine), (vec![SourceAction::Claim], in_doubt), "{due:?}");
        assert_eq!((machine.on(SourceEvent::Claimed(Claimant::Destination)), machine), (vec![], in_doubt), "lost");
        let keeps = machine.on(SourceEvent::Claimed(Claimant::Source));
        assert_eq!(keeps, [SourceAction::Journal(Step::Kept), SourceAction::Resume]);
        assert_eq!(machine.state(), SourceState::Kept);
    }
    // Without one nobody is asked.
    let (mut machine, _) = source(false, &doubt);
    assert_eq!(machine.on(SourceEvent::ClaimDue), []);
    assert!(machine.on(SourceEvent::Resolve(Resolution::Keep)).contains(&SourceAction::Resume));
    // A claim that nobody made means nothing.
    let (mut machine, _) = source(true, &doubt[..2]);
    assert_eq!(machine.on(SourceEvent::Claimed(Claimant::Source)), []);

    let committing = DestinationHandoff { state: DestinationState::Committing, arbiter: true };
    let mut machine = committing;
    assert_eq!(machine.on(DestinationEvent::Journaled(Step::Committed, true)), [DestinationAction::Claim]);
    assert!(machine.can_retry() && !machine.can_give_up() && !machine.may_run());
    assert_eq!(machine.on(DestinationEvent::Again), [DestinationAction::Claim]);
    let claiming = machine;
    assert_eq!(machine.on(DestinationEvent::Claimed(Claimant::Destination)), [DestinationAction::Start]);
    let mut machine = claiming;
    assert_eq!(machine.on(DestinationEvent::Claimed(Claimant::Source)), [DestinationAction::Journal(Step::GaveUp)]);
    assert_eq!(machine.on(DestinationEvent::Claimed(Claimant::Destination)), []);
}

#[test]
fn a_record_that_it_gave_up_is_tried_again_where_the_journal_says_otherwise() {
    use DestinationAction::{Discard, Journal, Send};
    let failed = DestinationEvent::Journaled(Step::GaveUp, false);
    let mut machine = DestinationHandoff { state: DestinationState::Starting, arbiter: false };
    assert_eq!(machine.on(DestinationEvent::NotStarted), [Journal(Step::GaveUp)]);
    assert_eq!(machine.on(failed), [Send(HandoffMessage::GaveUp), Discard]);
    assert!(machine.can_retry() && !machine.is_settled());
    for _ in 0..3 {
        assert_eq!(machine.on(DestinationEvent::Again), [Journal(Step::GaveUp)]);
        assert_eq!(machine.on(failed), []);
    }
    machine.on(DestinationEvent::Again);
    assert_eq!(machine.on(DestinationEvent::Journaled(Step::GaveUp, true)), []);
    assert_eq!(machine.state(), DestinationState::GaveUp);
    // Without COMMIT on record, whoever asks later finds no trace: that is enough.
    let mut machine = DestinationHandoff { state: DestinationState::Committing, arbiter: false };
    machine.on(DestinationEvent::Journaled(Step::Committed, false));
    assert_eq!(machine.on(failed), [Send(HandoffMessage::GaveUp), Discard]);
    assert!(machine.is_settled());
}

#[test]
fn late_messages_change_nothing() {
    let mut machine = DestinationHandoff { state: DestinationState::Prepared, arbiter: false };
    assert_eq!(machine.on(DestinationEvent::Abort), [DestinationAction::Journal(Step::GaveUp)]);
    assert_eq!(machine.on(DestinationEvent::Commit), []);
    machine.on(DestinationEvent::Journaled(Step::GaveUp, true));
    assert_eq!(machine.on(DestinationEvent::Commit), [DestinationAction::Send(HandoffMessage::GaveUp)]);
    assert_eq!(machine.on(DestinationEvent::Released), []);
    let released = SourceHandoff { state: SourceState::Released, arbiter: true };
    for event in [
        SourceEvent::GaveUp,
        SourceEvent::Abort,
        SourceEvent::Resolve(Resolution::Keep),
        SourceEvent::ClaimDue,
        SourceEvent::Claimed(Claimant::Source),
    ] {
        let mut machine = released;
        assert_eq!((machine.on(event), machine), (vec![], released));
    }
}
