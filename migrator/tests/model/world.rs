//! The world around the two machines of the handoff: processes, journals, links, agents, an arbiter, a human, and what
//! can befall each. The machines, and the answers from journals, are those that ship.

use migrator::MigrationId;
use migrator::arbiter::Claimant;
use migrator::handle::Resolution;
use migrator::handoff::*;
use migrator::traits::Durability;
use migrator::wire::message::AskAnswer;

use crate::rules::{Flaw, Human, Rules};

/// Records of one attempt in one journal: a set, because each side writes its steps in their order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Records(u16);

impl Records {
    fn bit(step: Step) -> u16 {
        let at = Step::ALL.iter().position(|known| *known == step).expect("every step is in ALL");
        1 << at
    }

    pub fn add(&mut self, step: Step) {
        self.0 |= Self::bit(step);
    }

    pub fn has(self, step: Step) -> bool {
        self.0 & Self::bit(step) != 0
    }

    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    fn steps(self) -> impl DoubleEndedIterator<Item = Step> {
        Step::ALL.into_iter().filter(move |step| self.has(*step))
    }

    pub fn list(self, id: MigrationId) -> impl Iterator<Item = HandoffRecord> {
        let (vm, peer) = (String::new(), String::new());
        self.steps().map(move |step| HandoffRecord { id, step, unix_ms: 0, vm: vm.clone(), peer: peer.clone() })
    }

    /// Loses what was not on stable storage: all after the last durable record.
    pub fn lose_power(&mut self, rules: &Rules) {
        while let Some(last) = self.steps().next_back()
            && rules.durability(last) == Durability::Lazy
        {
            self.0 &= !Self::bit(last);
        }
    }
}

/// The name of an attempt.
pub fn id(attempt: usize) -> MigrationId {
    MigrationId([attempt as u8 + 1; 16])
}

/// The process that has the VM at the source.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Here {
    /// It lives.
    Up,
    /// It died, and the guest with it.
    Down,
    /// Its host came back and read the journal. The guest is started anew if nothing is in the way; it is in the way that
    /// an attempt is unsettled: then that is asked about first.
    Back { asks: Option<usize> },
}

/// The process that receives the VM at the destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum There {
    /// The agent has accepted the offer; the process has not opened its journal.
    Spawned,
    /// It lives.
    Alive(DestinationHandoff),
    /// It has ended, or died: then perhaps as the VM's owner by its journal.
    Gone { owner: bool },
}

/// The guest at the destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Guest {
    NeverRan,
    Runs,
    /// It ran, or may have run, and is gone.
    Ran,
}

/// One direction of a control connection. Being TCP it loses only an end of what was sent, and then everything after it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Link {
    pub queue: Vec<HandoffMessage>,
    pub cut: bool,
}

impl Link {
    pub fn send(&mut self, message: HandoffMessage) {
        if !self.cut {
            self.queue.push(message);
        }
    }
}

/// What the arbiter knows of an attempt, and which claims have been sent to it: each may take effect at any time later.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Claims {
    pub by_source: bool,
    pub by_destination: bool,
    pub winner: Option<Claimant>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Attempt {
    pub source: SourceHandoff,
    pub source_todo: Vec<SourceAction>,
    pub source_records: Records,
    pub there: Link,
    pub back: Link,
    pub destination: There,
    pub destination_todo: Vec<DestinationAction>,
    pub destination_records: Records,
    /// The destination's journal was removed.
    pub forgotten: bool,
    pub guest: Guest,
    /// What the agent has ever answered. Each answer is on its way for ever: it may arrive late, twice, or not at all.
    pub said_running: bool,
    pub said_gave_up: bool,
    pub claims: Claims,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct World {
    pub here: Here,
    /// The guest at the source runs.
    pub runs_here: bool,
    pub attempts: Vec<Attempt>,
    /// The human has acted.
    pub human_acted: bool,
    pub kept_by_hand: bool,
}

/// How a start ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Start {
    Runs,
    NeverRan,
    /// It may have run, and failed.
    MayHaveRun,
}

/// What can happen. The number is that of the attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Action {
    /// The record that the source waits for is written, or cannot be.
    SourceWrites(usize, bool),
    /// The user cancels, something fails, the connection is found dead: before COMMIT.
    SourceAborts(usize),
    /// The same after COMMIT, or RUNNING does not come in time.
    SourceHearsNothing(usize),
    /// The next message on control.
    SourceHears(usize),
    /// An answer of the agent arrives.
    SourceIsTold(usize, AskAnswer),
    /// It has been in doubt for the grace.
    SourceLosesPatience(usize),
    /// The arbiter's answer arrives.
    SourceIsAwarded(usize),
    Resolve(usize, Resolution),
    SourceDies {
        with_power: bool,
    },
    SourceReturns,
    /// The guest runs here again, and the user tries again.
    Retry,

    /// The receiving process opens its journal.
    DestinationBegins(usize),
    DestinationLoads(usize),
    DestinationWrites(usize, bool),
    DestinationStarts(usize, Start),
    /// Something fails there, or the connection is found dead.
    DestinationAborts(usize),
    DestinationHears(usize),
    DestinationIsAwarded(usize),
    DestinationTriesAgain(usize),
    DestinationDies {
        attempt: usize,
        with_power: bool,
    },
    /// It has given up and ends.
    DestinationExits(usize),

    /// The connection dies in this direction; so many messages that are on their way still arrive.
    Cut {
        attempt: usize,
        there: bool,
        keep: usize,
    },
    /// Somebody asks the agent. Where a tombstone is to be written, that works or does not.
    AgentIsAsked {
        attempt: usize,
        writes: bool,
    },
    /// A claim takes effect.
    Arbitrates(usize, Claimant),
}

impl World {
    pub fn new(rules: &Rules) -> Self {
        let mut world =
            World { here: Here::Up, runs_here: false, attempts: vec![], human_acted: false, kept_by_hand: false };
        world.begin(rules);
        world
    }

    /// An attempt begins, with its state being sent: all that comes before ends as `SourceAborts` does.
    fn begin(&mut self, rules: &Rules) {
        (self.here, self.runs_here) = (Here::Up, false);
        let mut source_records = Records::default();
        source_records.add(Step::Sending);
        self.attempts.push(Attempt {
            source: SourceHandoff::new(rules.arbiter && rules.flaw != Some(Flaw::SourceSkipsArbiter)),
            source_todo: vec![],
            source_records,
            there: Link::default(),
            back: Link::default(),
            destination: There::Spawned,
            destination_todo: vec![],
            destination_records: Records::default(),
            forgotten: false,
            guest: Guest::NeverRan,
            said_running: false,
            said_gave_up: false,
            claims: Claims::default(),
        });
        self.source(rules, self.current(), SourceEvent::StateSent);
    }

    /// The attempt that the source is about.
    pub fn current(&self) -> usize {
        self.attempts.len() - 1
    }

    /// Everything that can happen next.
    pub fn actions(&self, rules: &Rules, actions: &mut Vec<Action>) {
        let outcomes: &[bool] = if rules.full_disks { &[true, false] } else { &[true] };
        let deaths: &[bool] = if rules.power_cuts { &[false, true] } else { &[false] };
        let now = self.current();
        let last = &self.attempts[now];
        match self.here {
            Here::Up => {
                if let Some(SourceAction::Journal(_)) = last.source_todo.first() {
                    actions.extend(outcomes.iter().map(|ok| Action::SourceWrites(now, *ok)));
                }
                if last.source_todo.is_empty() || rules.slow_disks {
                    self.source_actions(rules, now, actions);
                }
                actions.extend(deaths.iter().map(|with_power| Action::SourceDies { with_power: *with_power }));
            }
            Here::Down => actions.push(Action::SourceReturns),
            Here::Back { asks: Some(attempt) } => {
                let asked = &self.attempts[attempt];
                if asked.said_running {
                    actions.push(Action::SourceIsTold(attempt, AskAnswer::Running));
                }
                if asked.said_gave_up {
                    actions.push(Action::SourceIsTold(attempt, AskAnswer::GaveUp));
                }
            }
            Here::Back { asks: None } => {}
        }
        if matches!(self.here, Here::Back { .. }) {
            actions.extend(deaths.iter().map(|with_power| Action::SourceDies { with_power: *with_power }));
        }
        let kept = matches!(self.here, Here::Back { .. }) || last.source.state() == SourceState::Kept;
        if self.runs_here && kept && last.source_todo.is_empty() && self.attempts.len() < rules.attempts {
            actions.push(Action::Retry);
        }
        for (at, attempt) in self.attempts.iter().enumerate() {
            attempt.destination_actions(rules, at, outcomes, deaths, actions);
            for (there, link) in [(true, &attempt.there), (false, &attempt.back)] {
                if !link.cut {
                    actions.extend((0..=link.queue.len()).map(|keep| Action::Cut { attempt: at, there, keep }));
                }
            }
            actions.extend(outcomes.iter().map(|writes| Action::AgentIsAsked { attempt: at, writes: *writes }));
            let Claims { by_source, by_destination, winner } = attempt.claims;
            for (claims, by) in [(by_source, Claimant::Source), (by_destination, Claimant::Destination)] {
                if claims && winner.is_none() {
                    actions.push(Action::Arbitrates(at, by));
                }
            }
        }
    }

    /// What can happen to a source that waits.
    fn source_actions(&self, rules: &Rules, now: usize, actions: &mut Vec<Action>) {
        let attempt = &self.attempts[now];
        if attempt.source.can_abort() {
            actions.push(Action::SourceAborts(now));
        }
        if attempt.source.state() == (SourceState::Committed { in_doubt: false }) {
            actions.push(Action::SourceHearsNothing(now));
        }
        if !attempt.back.queue.is_empty() {
            actions.push(Action::SourceHears(now));
        }
        if attempt.source.in_doubt() {
            if attempt.said_running {
                actions.push(Action::SourceIsTold(now, AskAnswer::Running));
            }
            if attempt.said_gave_up {
                actions.push(Action::SourceIsTold(now, AskAnswer::GaveUp));
            }
            if rules.arbiter && !attempt.claims.by_source {
                actions.push(Action::SourceLosesPatience(now));
            }
            if attempt.claims.by_source && attempt.claims.winner.is_some() {
                actions.push(Action::SourceIsAwarded(now));
            }
            if !self.human_acted {
                // `--keep` is right if that host is gone for good, or has given up; `--discard` if the VM is there.
                let never_there =
                    matches!(attempt.destination, There::Gone { .. }) || attempt.destination_records.has(Step::GaveUp);
                let keeps = rules.human == Human::KeepsBlindly || rules.human == Human::Looks && never_there;
                let is_there = attempt.guest != Guest::NeverRan;
                let discards = rules.human == Human::DiscardsBlindly || rules.human == Human::Looks && is_there;
                if keeps {
                    actions.push(Action::Resolve(now, Resolution::Keep));
                }
                if discards {
                    actions.push(Action::Resolve(now, Resolution::Discard));
                }
            }
        }
    }

    /// What comes of it.
    pub fn next(&self, rules: &Rules, action: Action) -> World {
        let mut world = self.clone();
        world.happen(rules, action);
        world.tidy();
        world
    }

    fn happen(&mut self, rules: &Rules, action: Action) {
        match action {
            Action::SourceWrites(at, ok) => {
                let SourceAction::Journal(step) = self.attempts[at].source_todo.remove(0) else { unreachable!() };
                if ok {
                    self.attempts[at].source_records.add(step);
                }
                self.source(rules, at, SourceEvent::Journaled(step, ok));
            }
            Action::SourceAborts(at) => self.source(rules, at, SourceEvent::Abort),
            Action::SourceHearsNothing(at) => {
                self.source(rules, at, SourceEvent::Silence);
                if rules.flaw == Some(Flaw::ResumesInDoubt) {
                    self.runs_here = true;
                }
            }
            Action::SourceHears(at) => {
                let event = match self.attempts[at].back.queue.remove(0) {
                    HandoffMessage::Prepared => SourceEvent::Prepared,
                    HandoffMessage::Running => SourceEvent::Running,
                    HandoffMessage::GaveUp => SourceEvent::GaveUp,
                    message => unreachable!("the source hears {message:?}"),
                };
                self.source(rules, at, event);
            }
            Action::SourceIsTold(at, answer) => match (self.here, answer) {
                (Here::Up, AskAnswer::Running) => self.source(rules, at, SourceEvent::Running),
                (Here::Up, _) => self.source(rules, at, SourceEvent::GaveUp),
                (_, answer) => {
                    let kept = answer == AskAnswer::GaveUp;
                    self.attempts[at].source_records.add(if kept { Step::Kept } else { Step::Released });
                    self.here = Here::Back { asks: None };
                    self.runs_here = kept;
                }
            },
            Action::SourceLosesPatience(at) => self.source(rules, at, SourceEvent::ClaimDue),
            Action::SourceIsAwarded(at) => match self.attempts[at].claims.winner {
                Some(Claimant::Destination) if rules.flaw == Some(Flaw::LostClaimReleases) => {
                    self.source(rules, at, SourceEvent::Running);
                }
                Some(winner) => self.source(rules, at, SourceEvent::Claimed(winner)),
                None => unreachable!(),
            },
            Action::Resolve(at, resolution) => {
                self.human_acted = true;
                self.kept_by_hand = resolution == Resolution::Keep;
                self.source(rules, at, SourceEvent::Resolve(resolution));
            }
            Action::SourceDies { with_power } => {
                self.here = Here::Down;
                self.runs_here = false;
                for attempt in &mut self.attempts {
                    attempt.source = SourceHandoff::default();
                    attempt.source_todo.clear();
                    if with_power {
                        attempt.source_records.lose_power(rules);
                    }
                }
            }
            Action::SourceReturns => {
                let records: Vec<_> = (self.attempts.iter().enumerate())
                    .flat_map(|(at, attempt)| attempt.source_records.list(id(at)))
                    .collect();
                let asks = unsettled(&records).map(|record| usize::from(record.id.0[0]) - 1);
                self.here = Here::Back { asks };
                self.runs_here = asks.is_none() && !self.attempts[self.current()].source_records.has(Step::Released);
            }
            Action::Retry => self.begin(rules),
            Action::Cut { attempt, there, keep } => {
                let attempt = &mut self.attempts[attempt];
                let link = if there { &mut attempt.there } else { &mut attempt.back };
                link.queue.truncate(keep);
                link.cut = true;
            }
            Action::AgentIsAsked { attempt, writes } => self.attempts[attempt].answer(rules, id(attempt), writes),
            Action::Arbitrates(at, by) => {
                self.attempts[at].claims.winner.get_or_insert(by);
            }
            Action::DestinationBegins(at)
            | Action::DestinationLoads(at)
            | Action::DestinationWrites(at, _)
            | Action::DestinationStarts(at, _)
            | Action::DestinationAborts(at)
            | Action::DestinationHears(at)
            | Action::DestinationIsAwarded(at)
            | Action::DestinationTriesAgain(at)
            | Action::DestinationDies { attempt: at, .. }
            | Action::DestinationExits(at) => self.attempts[at].happen_there(rules, action),
        }
    }

    /// Gives the source an event, and does what it says up to the next record.
    fn source(&mut self, rules: &Rules, at: usize, event: SourceEvent) {
        let attempt = &mut self.attempts[at];
        let actions = attempt.source.on(event);
        attempt.source_todo.extend(actions);
        while let Some(action) = attempt.source_todo.first().copied() {
            match action {
                SourceAction::Journal(Step::Released) if rules.flaw == Some(Flaw::ReleasesBeforeRecord) => {
                    attempt.there.send(HandoffMessage::Released);
                    return;
                }
                SourceAction::Journal(_) => return,
                SourceAction::Send(message) => attempt.there.send(message),
                SourceAction::Resume => self.runs_here = true,
                SourceAction::Claim => attempt.claims.by_source = true,
                // Anybody may ask at any time, see `AgentIsAsked`.
                SourceAction::Ask | SourceAction::Release => {}
            }
            attempt.source_todo.remove(0);
        }
    }

    /// Forgets what makes no difference any more, so that there are fewer worlds.
    fn tidy(&mut self) {
        let (up, now) = (self.here == Here::Up, self.current());
        for (at, attempt) in self.attempts.iter_mut().enumerate() {
            let settled = attempt.source.is_settled() && attempt.source_todo.is_empty();
            if !up || at != now || settled {
                // Nobody reads or writes at this end. What was sent still arrives at the other.
                attempt.back = Link { queue: vec![], cut: true };
                attempt.there.cut = true;
            }
            if matches!(attempt.destination, There::Gone { .. }) {
                attempt.there = Link { queue: vec![], cut: true };
                attempt.back.cut = true;
            }
        }
    }
}
