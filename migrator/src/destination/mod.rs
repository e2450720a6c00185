//! The destination's machine: events and the time go in, actions come out. No socket, no thread, no clock.
//!
//! The order of a migration can be read in one function, `Destination::step`. What may happen at any time is in
//! [`Destination::handle`]. Who owns the VM is decided by [`DestinationHandoff`] alone.

use std::io;
use std::time::Duration;

use crate::arbiter::{ArbiterError, Claimant};
use crate::error::MigrateError;
use crate::handoff::{DestinationAction, DestinationEvent, DestinationHandoff, DestinationState, HandoffMessage, Step};
use crate::options::Timeouts;
use crate::pages::Marker;
use crate::report::{AnnounceReport, Phase, chain};
use crate::traits::{Refusal, Section, StartError};
use crate::wire::cut;
use crate::wire::message::{MAX_REASON_BYTES, Message, Prepared, Ready, Running, State as StateMessage};

/// What happens to the destination. Events after the end mean nothing.
#[derive(Debug)]
pub enum Event {
    /// Go.
    Begin,
    /// A record was written.
    Journaled(Step, io::Result<()>),
    /// Everything was built; with a guess at loading and starting.
    Built(Result<Duration, Refusal>),
    /// The control connection and all page streams are there.
    Connected,
    /// A message came on control.
    Message(Message),
    /// A stream closed a round: its pages are all in memory.
    Marker {
        /// Number of the stream.
        stream: u16,
        /// What it carried.
        marker: Marker,
    },
    /// A page stream failed.
    PagesFailed(String),
    /// The control connection is dead.
    Lost(String),
    /// The state was loaded.
    Loaded(Result<Loaded, MigrateError>),
    /// The guest was started, at this time; no time if it stays paused.
    Started(Result<Option<Duration>, StartError>),
    /// What the arbiter answered: whose the attempt is.
    Claimed(Result<Claimant, ArbiterError>),
    /// The user of this host wants to stop.
    Cancel,
    /// Time has passed.
    Tick,
}

/// What loading found out.
#[derive(Debug, Default)]
pub struct Loaded {
    /// How long loading took.
    pub load: Duration,
    /// How long hashing memory took.
    pub verify: Duration,
    /// What will be announced.
    pub announce: AnnounceReport,
}

/// What the driver must do, in this order.
#[derive(Debug, PartialEq)]
pub enum Action {
    /// Write a record; report.
    Journal(Step),
    /// Build the VM; report with [`Event::Built`].
    Build,
    /// Send a message on control. That it may fail is known.
    Send(Message),
    /// Compare memory if there is a hash, load the state; report with [`Event::Loaded`].
    Load {
        /// The state.
        sections: Vec<Section>,
        /// Hash of the source's memory.
        ram_hash: Option<u64>,
    },
    /// Claim this attempt from the arbiter; report with [`Event::Claimed`].
    Claim,
    /// Start the guest; report with [`Event::Started`].
    Start,
    /// Free everything.
    Discard,
    /// Stop all page streams.
    CloseStreams,
    /// Begin to announce.
    Announce,
    /// The source will never ask about this attempt: its journal may be removed.
    Forget,
    /// The end.
    Finish,
}

/// How far it is. In order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Idle,
    Opening,
    Building,
    /// Refused, and waiting for a connection on which to say so.
    Refusing,
    Connecting,
    Receiving,
    Loading,
    Prepared,
    Committing,
    Settled,
}

/// How long a failed page stream waits for the source's own word on why.
const EXPLANATION: Duration = Duration::from_millis(300);

/// The destination's machine.
pub struct Destination {
    timeouts: Timeouts,
    state: State,
    handoff: DestinationHandoff,
    now: Duration,
    connected: bool,
    deadline: Option<(Duration, Duration, &'static str)>,
    page_failure: Option<(Duration, String)>,
    /// When what did not work is tried again: the claim, or the record that we gave up.
    next_try: Option<Duration>,
    try_wait: Duration,
    /// Rounds that are in memory.
    round: u32,
    /// What has come of the round in hand: the sum of the markers, and from which streams.
    markers: Marker,
    streams_done: Vec<bool>,
    waiting_state: Option<StateMessage>,
    refusal: Option<Refusal>,
    failure: Option<(Phase, MigrateError)>,
    ready: Ready,
    prepared: Prepared,
    running: Running,
    /// When what is being measured began.
    mark: Duration,
    actions: Vec<Action>,
}

impl Destination {
    /// A machine for one attempt with so many page streams, that must win it from an arbiter or need not.
    pub fn new(timeouts: Timeouts, streams: u16, arbiter: bool) -> Self {
        Self {
            timeouts,
            state: State::Idle,
            handoff: DestinationHandoff::new(arbiter),
            now: Duration::ZERO,
            connected: false,
            deadline: None,
            page_failure: None,
            next_try: None,
            try_wait: timeouts.ask_min,
            round: 0,
            markers: Marker::default(),
            streams_done: vec![false; streams.into()],
            waiting_state: None,
            refusal: None,
            failure: None,
            ready: Ready { journal: Duration::from_millis(1), ..Ready::default() },
            prepared: Prepared::default(),
            running: Running::default(),
            mark: Duration::ZERO,
            actions: Vec::new(),
        }
    }

    /// A durable record takes so long, if that is known.
    pub fn journal_takes(&mut self, time: Option<Duration>) {
        self.ready.journal = time.unwrap_or(self.ready.journal);
    }

    /// Takes an event in, at the time `now` (since the start, never going back). What is to be done comes out.
    pub fn handle(&mut self, now: Duration, event: Event) -> Vec<Action> {
        self.now = now;
        let result = match event {
            Event::Cancel => Err(MigrateError::Cancelled),
            Event::Lost(why) => Err(MigrateError::Lost(why)),
            Event::Message(Message::Abort(reason)) => Err(MigrateError::GaveUp(reason)),
            Event::Message(Message::Ping(_) | Message::Pong(_)) => Ok(()),
            Event::PagesFailed(why) => {
                // The source may have said why on control: give its word time to arrive.
                self.page_failure.get_or_insert((now + EXPLANATION, why));
                Ok(())
            }
            Event::Claimed(word) => {
                self.claimed(word);
                Ok(())
            }
            Event::Tick => self.tick(),
            event => self.step(event),
        };
        if let Err(error) = result {
            self.fail(error);
        }
        std::mem::take(&mut self.actions)
    }

    /// The order of a migration.
    fn step(&mut self, event: Event) -> Result<(), MigrateError> {
        use State as S;
        match (self.state, event) {
            // Preflight: everything is built before the source copies a page.
            (S::Idle, Event::Begin) => {
                self.mark = self.now;
                self.hand(DestinationEvent::Begin);
                self.enter(S::Opening, None);
            }
            (S::Opening, Event::Journaled(Step::Receiving, Err(error))) => {
                let reason = format!("its handoff journal could not be written: {error}");
                self.refuse(Refusal { reason, mismatches: Vec::new() });
            }
            (S::Opening, Event::Journaled(Step::Receiving, Ok(()))) => {
                self.hand(DestinationEvent::Journaled(Step::Receiving, true));
                self.actions.push(Action::Build);
                self.enter(S::Building, None);
            }
            (S::Opening | S::Building, Event::Connected) => self.connected = true,
            (S::Building, Event::Built(Ok(load))) => {
                self.ready.load = load;
                let limit = self.timeouts.connect * 2 + self.timeouts.request;
                self.enter(S::Connecting, Some((limit, "waiting for the source's connections")));
                self.ready_if_connected();
            }
            (S::Building, Event::Built(Err(refusal))) => {
                self.refuse(refusal);
            }
            (S::Refusing, Event::Connected) => {
                self.connected = true;
                self.say_refusal();
            }
            (S::Connecting, Event::Connected) => {
                self.connected = true;
                self.ready_if_connected();
            }

            // Pre-copy, and the last round: each round ends when all streams have closed it.
            (S::Receiving, Event::Message(Message::Round { .. })) => {}
            (S::Receiving, Event::Marker { stream, marker }) => self.marker(stream, marker)?,
            (S::Receiving, Event::Message(Message::State(state))) if self.waiting_state.is_none() => {
                if state.round != self.round && state.round != self.round + 1 {
                    return Err(MigrateError::Protocol(format!(
                        "STATE of round {} in round {}",
                        state.round, self.round
                    )));
                }
                self.waiting_state = Some(state);
                self.load_if_complete();
            }

            // Switchover: memory is complete, and the state is here.
            (S::Loading, Event::Loaded(result)) => {
                let Loaded { load, verify, announce } = result?;
                self.prepared = Prepared { load, verify, journal: Duration::ZERO };
                self.running.announce = announce;
                self.mark = self.now;
                self.hand(DestinationEvent::Loaded);
                self.enter(S::Prepared, None);
            }
            (S::Prepared, Event::Journaled(Step::Prepared, Ok(()))) => {
                self.prepared.journal = self.lap();
                self.hand(DestinationEvent::Journaled(Step::Prepared, true));
            }

            // Commit: the source said so, it is on record, the guest runs.
            (S::Prepared, Event::Message(Message::Commit)) => {
                self.mark = self.now;
                self.enter(S::Committing, None);
                self.hand(DestinationEvent::Commit);
            }
            (S::Committing, Event::Journaled(Step::Committed, Ok(()))) => {
                self.running.journal_us = micros(self.lap());
                self.hand(DestinationEvent::Journaled(Step::Committed, true));
            }
            (S::Committing, Event::Started(result)) => self.started(result),

            // Whatever could not be written is the handoff's to judge.
            (_, Event::Journaled(step, result)) => {
                if let Err(error) = result {
                    tracing::error!(?step, %error, "the handoff journal could not be written");
                    self.failure.get_or_insert((phase(self.state), MigrateError::Journal(error)));
                    self.hand(DestinationEvent::Journaled(step, false));
                    if self.handoff.can_retry() {
                        self.try_later();
                    }
                } else {
                    self.hand(DestinationEvent::Journaled(step, true));
                }
            }
            (S::Committing | S::Settled, Event::Message(Message::Commit)) => self.hand(DestinationEvent::Commit),
            (S::Committing | S::Settled, Event::Message(Message::Released)) => self.hand(DestinationEvent::Released),
            (S::Committing | S::Settled, _) => {}
            (state, Event::Message(message)) => {
                return Err(MigrateError::Protocol(format!("{} while {state:?}", message.kind().name())));
            }
            (state, Event::Marker { .. }) => {
                return Err(MigrateError::Protocol(format!("pages while {state:?}")));
            }
            // Results that are not waited for any more.
            (_, _) => {}
        }
        Ok(())
    }

    fn ready_if_connected(&mut self) {
        if self.connected {
            self.actions.push(Action::Send(Message::Ready(self.ready)));
            self.enter(State::Receiving, None);
        }
    }

    /// Gives up, but not before there is a connection on which to say why.
    fn refuse(&mut self, refusal: Refusal) {
        self.refusal = Some(refusal);
        self.enter(State::Refusing, Some((self.timeouts.connect * 2, "waiting for the source's connections")));
        self.say_refusal();
    }

    fn say_refusal(&mut self) {
        if self.connected
            && let Some(refusal) = self.refusal.take()
        {
            self.fail(MigrateError::Refused(refusal));
        }
    }

    fn marker(&mut self, stream: u16, marker: Marker) -> Result<(), MigrateError> {
        if self.waiting_state.as_ref().is_some_and(|state| state.round <= self.round) || marker.round != self.round + 1
        {
            return Err(MigrateError::Protocol(format!("round {} closed in round {}", marker.round, self.round + 1)));
        }
        match self.streams_done.get_mut(usize::from(stream)) {
            Some(done) if !*done => *done = true,
            _ => return Err(MigrateError::Protocol(format!("stream {stream} closed round {} twice", marker.round))),
        }
        self.markers.round = marker.round;
        self.markers.chunks += marker.chunks;
        self.markers.data_pages += marker.data_pages;
        self.markers.zero_pages += marker.zero_pages;
        if self.streams_done.iter().all(|done| *done) {
            self.streams_done.fill(false);
            let Marker { round, data_pages, zero_pages, .. } = std::mem::take(&mut self.markers);
            self.round = round;
            self.actions.push(Action::Send(Message::RoundDone { n: round, data_pages, zero_pages }));
            self.load_if_complete();
        }
        Ok(())
    }

    fn load_if_complete(&mut self) {
        if let Some(StateMessage { ram_hash, sections, .. }) =
            self.waiting_state.take_if(|state| state.round == self.round)
        {
            self.actions.push(Action::Load { sections, ram_hash });
            self.enter(State::Loading, None);
        }
    }

    fn started(&mut self, result: Result<Option<Duration>, StartError>) {
        let first_run = match result {
            Ok(first_run) => first_run,
            Err(error) if error.may_have_run => {
                self.running.failure = Some(cut(&chain(&error), MAX_REASON_BYTES).into());
                None
            }
            Err(error) => {
                let source = Box::new(error);
                self.failure = Some((Phase::Commit, MigrateError::Vm { what: "be started", source }));
                return self.hand(DestinationEvent::NotStarted);
            }
        };
        self.running.start_us = micros(first_run.unwrap_or(self.now).saturating_sub(self.mark));
        self.running.running_us = first_run.map(|at| micros(self.now.saturating_sub(at)));
        self.hand(DestinationEvent::Started);
    }

    /// The arbiter answered, or could not be asked.
    fn claimed(&mut self, word: Result<Claimant, ArbiterError>) {
        match word {
            Ok(winner) => {
                if winner == Claimant::Source && self.handoff.state() == DestinationState::Claiming {
                    self.failure = Some((Phase::Commit, MigrateError::Arbitrated));
                }
                self.hand(DestinationEvent::Claimed(winner));
            }
            Err(error) => {
                tracing::warn!(error = chain(&error), "the VM is not started before the arbiter has answered");
                self.try_later();
            }
        }
    }

    fn try_later(&mut self) {
        self.next_try = Some(self.now + self.try_wait);
        self.try_wait = (self.try_wait * 2).min(self.timeouts.ask_max);
    }

    /// Limits on time.
    fn tick(&mut self) -> Result<(), MigrateError> {
        if self.next_try.take_if(|at| *at <= self.now).is_some() {
            self.hand(DestinationEvent::Again);
        }
        if let Some((_, why)) = self.page_failure.take_if(|(until, _)| *until <= self.now) {
            return Err(MigrateError::Pages(why));
        }
        if let Some((_, limit, what)) = self.deadline.take_if(|(at, ..)| *at <= self.now) {
            return Err(MigrateError::TimedOut { what, limit });
        }
        Ok(())
    }

    /// When [`Event::Tick`] is due at the latest; none: when something happens.
    pub fn next_tick(&self) -> Option<Duration> {
        let page_failure = self.page_failure.as_ref().map(|(at, _)| *at);
        let deadline = self.deadline.map(|(at, ..)| at);
        [deadline, page_failure, self.next_try].into_iter().flatten().min().filter(|_| self.state != State::Settled)
    }

    /// Something failed. Before COMMIT came, that ends the attempt; after it, it means nothing.
    fn fail(&mut self, error: MigrateError) {
        if self.handoff.can_give_up() {
            self.failure.get_or_insert((phase(self.state), error));
            self.hand(DestinationEvent::Abort);
        }
    }

    /// Passes an event to the handoff, and does what it says.
    fn hand(&mut self, event: DestinationEvent) {
        for action in self.handoff.on(event) {
            let action = match action {
                DestinationAction::Journal(step) => Action::Journal(step),
                DestinationAction::Send(HandoffMessage::Prepared) => Action::Send(Message::Prepared(self.prepared)),
                DestinationAction::Send(HandoffMessage::Running) => {
                    Action::Send(Message::Running(self.running.clone()))
                }
                DestinationAction::Send(_) => Action::Send(match &self.failure {
                    Some((_, MigrateError::Refused(refusal))) => Message::Refused(refusal.clone()),
                    Some((_, error)) => Message::GaveUp(chain(error)),
                    None => Message::GaveUp("COMMIT came before PREPARED".into()),
                }),
                DestinationAction::Claim => Action::Claim,
                DestinationAction::Start => Action::Start,
                DestinationAction::Discard => {
                    self.actions.push(Action::CloseStreams);
                    Action::Discard
                }
                DestinationAction::Forget => Action::Forget,
            };
            self.actions.push(action);
        }
        if self.handoff.is_settled() && self.state != State::Settled {
            if self.handoff.state() == DestinationState::Running {
                self.actions.push(Action::CloseStreams);
                if self.running.failure.is_none() {
                    self.actions.push(Action::Announce);
                }
            }
            self.actions.push(Action::Finish);
            self.enter(State::Settled, None);
        }
    }

    fn enter(&mut self, state: State, limit: Option<(Duration, &'static str)>) {
        self.state = state;
        self.deadline = limit.map(|(limit, what)| (self.now + limit, limit, what));
    }

    /// The time since the mark, which moves here.
    fn lap(&mut self) -> Duration {
        let mark = std::mem::replace(&mut self.mark, self.now);
        self.now.saturating_sub(mark)
    }

    /// How far it is, for watchers.
    pub fn phase(&self) -> Phase {
        phase(self.state)
    }

    /// Who owns the VM, as far as it is known.
    pub fn handoff(&self) -> DestinationHandoff {
        self.handoff
    }

    /// Rounds that are in memory.
    pub fn rounds(&self) -> u32 {
        self.round
    }

    /// What is announced.
    pub fn announce(&self) -> &AnnounceReport {
        &self.running.announce
    }

    /// Why it was given up.
    pub fn into_failure(self) -> Option<MigrateError> {
        self.failure.map(|(_, error)| error)
    }

    /// Why the guest was lost in the start, if it was.
    pub fn lost(&self) -> Option<MigrateError> {
        let why = self.running.failure.clone()?;
        Some(MigrateError::Vm { what: "be started", source: why.into() })
    }
}

fn phase(state: State) -> Phase {
    match state {
        State::Idle => Phase::Idle,
        State::Opening | State::Building | State::Refusing | State::Connecting => Phase::Preflight,
        State::Receiving => Phase::PreCopy,
        State::Loading | State::Prepared => Phase::Switchover,
        State::Committing => Phase::Commit,
        State::Settled => Phase::Done,
    }
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}
