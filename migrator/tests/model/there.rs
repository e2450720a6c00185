//! The destination's host: the receiving process and the agent.

use migrator::MigrationId;
use migrator::arbiter::Claimant;
use migrator::handoff::*;

use crate::rules::{Flaw, Rules};
use crate::world::{Action, Attempt, Guest, Start, There};

impl Attempt {
    /// What can happen to the receiving process.
    pub fn destination_actions(
        &self,
        rules: &Rules,
        at: usize,
        outcomes: &[bool],
        deaths: &[bool],
        actions: &mut Vec<Action>,
    ) {
        let machine = match self.destination {
            There::Spawned => {
                actions.push(Action::DestinationBegins(at));
                actions.push(Action::DestinationDies { attempt: at, with_power: false });
                return;
            }
            There::Gone { .. } => return,
            There::Alive(machine) => machine,
        };
        match self.destination_todo.first() {
            Some(DestinationAction::Start) => {
                for start in [Start::Runs, Start::NeverRan, Start::MayHaveRun] {
                    actions.push(Action::DestinationStarts(at, start));
                }
            }
            Some(_) => actions.extend(outcomes.iter().map(|ok| Action::DestinationWrites(at, *ok))),
            None => {}
        }
        if self.destination_todo.is_empty() || rules.slow_disks {
            if machine.state() == DestinationState::Open {
                actions.push(Action::DestinationLoads(at));
            }
            if machine.can_give_up() {
                actions.push(Action::DestinationAborts(at));
            }
            if machine.state() == DestinationState::GaveUp && self.destination_todo.is_empty() {
                actions.push(Action::DestinationExits(at));
            }
            if rules.flaw == Some(Flaw::LeavesUnrecorded) && machine.state() == DestinationState::Unrecorded {
                actions.push(Action::DestinationExits(at));
            }
            if !self.there.queue.is_empty() {
                actions.push(Action::DestinationHears(at));
            }
            if machine.state() == DestinationState::Claiming && self.claims.winner.is_some() {
                actions.push(Action::DestinationIsAwarded(at));
            }
            if machine.can_retry() && self.destination_todo.is_empty() {
                actions.push(Action::DestinationTriesAgain(at));
            }
        }
        for with_power in deaths {
            actions.push(Action::DestinationDies { attempt: at, with_power: *with_power });
        }
    }

    pub fn happen_there(&mut self, rules: &Rules, action: Action) {
        match action {
            Action::DestinationBegins(_) => {
                if !self.destination_records.is_empty() {
                    // A tombstone: `receive` does not begin.
                    self.destination = There::Gone { owner: false };
                    return;
                }
                let arbiter = rules.arbiter && rules.flaw != Some(Flaw::DestinationSkipsArbiter);
                self.destination = There::Alive(DestinationHandoff::new(arbiter));
                self.destination(rules, DestinationEvent::Begin);
            }
            Action::DestinationLoads(_) => self.destination(rules, DestinationEvent::Loaded),
            Action::DestinationWrites(_, ok) => {
                let DestinationAction::Journal(step) = self.destination_todo.remove(0) else { unreachable!() };
                if ok {
                    self.destination_records.add(step);
                }
                let ok = ok || step == Step::Committed && rules.flaw == Some(Flaw::RunsUnrecorded);
                self.destination(rules, DestinationEvent::Journaled(step, ok));
            }
            Action::DestinationStarts(_, start) => {
                self.destination_todo.remove(0);
                let event = match start {
                    Start::Runs => {
                        self.guest = Guest::Runs;
                        DestinationEvent::Started
                    }
                    Start::MayHaveRun => {
                        self.guest = Guest::Ran;
                        DestinationEvent::Started
                    }
                    Start::NeverRan => DestinationEvent::NotStarted,
                };
                self.destination(rules, event);
            }
            Action::DestinationAborts(_) => self.destination(rules, DestinationEvent::Abort),
            Action::DestinationHears(_) => {
                let There::Alive(machine) = self.destination else { unreachable!() };
                let event = match self.there.queue.remove(0) {
                    HandoffMessage::Commit => {
                        let given_up = machine.state() == DestinationState::GaveUp;
                        if given_up && rules.flaw == Some(Flaw::LateCommitRevives) {
                            self.guest = Guest::Runs;
                        }
                        DestinationEvent::Commit
                    }
                    HandoffMessage::Abort => DestinationEvent::Abort,
                    // Before COMMIT that is no word of our protocol, and ends the attempt.
                    HandoffMessage::Released if machine.can_give_up() => DestinationEvent::Abort,
                    HandoffMessage::Released => DestinationEvent::Released,
                    message => unreachable!("the destination hears {message:?}"),
                };
                self.destination(rules, event);
            }
            Action::DestinationIsAwarded(_) => {
                let winner = self.claims.winner.expect("a word that is there");
                self.destination(rules, DestinationEvent::Claimed(winner));
            }
            Action::DestinationTriesAgain(_) => self.destination(rules, DestinationEvent::Again),
            Action::DestinationDies { with_power, .. } => {
                let committed = self.destination_records.has(Step::Committed) || self.forgotten;
                let owner = committed && !self.destination_records.has(Step::GaveUp);
                self.destination = There::Gone { owner };
                self.destination_todo.clear();
                if self.guest == Guest::Runs {
                    self.guest = Guest::Ran;
                }
                if with_power {
                    self.destination_records.lose_power(rules);
                }
            }
            Action::DestinationExits(_) => self.destination = There::Gone { owner: false },
            action => unreachable!("{action:?} is not the destination's"),
        }
    }

    /// Gives the destination an event, and does what it says up to the next record or start.
    fn destination(&mut self, rules: &Rules, event: DestinationEvent) {
        let There::Alive(machine) = &mut self.destination else { unreachable!() };
        let actions = machine.on(event);
        self.destination_todo.extend(actions);
        while let Some(action) = self.destination_todo.first().copied() {
            match action {
                DestinationAction::Journal(_) | DestinationAction::Start => return,
                DestinationAction::Send(message) => {
                    self.back.send(message);
                    if message == HandoffMessage::Running && rules.flaw == Some(Flaw::ForgetsAtOnce) {
                        self.forget();
                    }
                }
                DestinationAction::Claim => self.claims.by_destination = true,
                DestinationAction::Discard => {}
                DestinationAction::Forget => self.forget(),
            }
            self.destination_todo.remove(0);
        }
    }

    fn forget(&mut self) {
        self.destination_records = Default::default();
        self.forgotten = true;
    }

    /// Whether a process holds the journal: it lets go when it is settled, and nobody holds a file that is not there.
    fn is_held(&self, rules: &Rules) -> bool {
        match self.destination {
            There::Alive(machine) => {
                let settled = machine.is_settled() && self.destination_todo.is_empty();
                !(self.forgotten || settled && rules.flaw != Some(Flaw::KeepsJournal))
            }
            There::Spawned | There::Gone { .. } => false,
        }
    }

    /// What an agent does when it is asked.
    pub fn answer(&mut self, rules: &Rules, id: MigrationId, writes: bool) {
        let alive = self.is_held(rules) && rules.flaw != Some(Flaw::AgentIgnoresLock);
        let records: Vec<_> = self.destination_records.list(id).collect();
        match answer(&records, id, alive) {
            Answer::Running => self.said_running = true,
            Answer::GaveUp => self.said_gave_up = true,
            Answer::Pending => {}
            Answer::NoTrace if rules.flaw == Some(Flaw::NoTombstone) => self.said_gave_up = true,
            Answer::NoTrace if writes => {
                self.destination_records.add(Step::GaveUp);
                self.said_gave_up = true;
            }
            Answer::NoTrace => {}
        }
    }

    /// Whether the destination has the VM, or had it when it died.
    pub fn owns_there(&self) -> bool {
        use DestinationState as S;
        let has = match self.destination {
            There::Alive(machine) => {
                matches!(machine.state(), S::Committing | S::Claiming | S::Starting | S::Running)
                    || matches!(machine.state(), S::GivingUp { committed: true }) && !self.destination_todo.is_empty()
            }
            There::Gone { owner } => owner,
            There::Spawned => false,
        };
        has || self.guest != Guest::NeverRan
    }

    pub fn won_by(&self, side: Claimant) -> bool {
        self.claims.winner == Some(side)
    }
}
