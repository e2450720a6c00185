//! The source's machine: events and the time go in, actions come out. No socket, no thread, no clock.
//!
//! The order of a migration can be read in one function, `Source::step`. What may happen at any time (the user cancels,
//! the connection dies, the guest powers off, a limit passes) is in [`Source::handle`]. Who owns the VM is decided by
//! [`SourceHandoff`] alone.

use std::io;
use std::time::Duration;

use crate::arbiter::{ArbiterError, Claimant};
use crate::error::MigrateError;
use crate::handle::Resolution;
use crate::handoff::{HandoffMessage, SourceAction, SourceEvent, SourceHandoff, Step};
use crate::options::{Mode, Options};
use crate::pages::Marker;
use crate::precopy::{Precopy, Verdict};
use crate::report::{Phase, Report, chain};
use crate::traits::{Refusal, Section, VmDescription, VmError};
use crate::transport::ConnectError;
use crate::wire::message::{AskAnswer, MAX_SECTIONS, MAX_STATE_BYTES, Message, State as StateMessage};

mod account;

use account::Account;

/// What happens to the source. Events after the end mean nothing.
#[derive(Debug)]
pub enum Event {
    /// Go.
    Begin,
    /// The destination's answer to the offer.
    Offered(Result<Result<(), Refusal>, ConnectError>),
    /// Control and page connections are there, or not.
    Connected(Result<(), ConnectError>),
    /// A round trip was measured.
    RoundTrip(Duration),
    /// A message came on control.
    Message(Message),
    /// The dirty log was started.
    DirtyLogStarted(Result<(), VmError>),
    /// The guest could not be slowed down.
    NotThrottled(VmError),
    /// The dirty log was read; so many pages are to be sent now, those of earlier reads included.
    Collected(Result<u64, VmError>),
    /// All page streams have sent the round and their markers; the sum of these.
    RoundSent(Marker),
    /// A page stream failed.
    PagesFailed(String),
    /// The guest was paused.
    Paused(Result<(), VmError>),
    /// The state was saved, and memory was hashed if it is to be compared.
    Saved(Result<Saved, VmError>),
    /// A record was written.
    Journaled(Step, io::Result<()>),
    /// The guest was resumed.
    Resumed(Result<(), VmError>),
    /// The control connection is dead.
    Lost(String),
    /// The user wants to stop.
    Cancel,
    /// The user settles what is in doubt.
    Resolve(Resolution),
    /// The guest is gone.
    GuestGone(String),
    /// What the destination's agent answered.
    Asked(Result<AskAnswer, ConnectError>),
    /// What the arbiter answered: whose the attempt is.
    Claimed(Result<Claimant, ArbiterError>),
    /// Time has passed.
    Tick,
}

/// What was saved in the switchover.
#[derive(Debug, Default)]
pub struct Saved {
    /// The state.
    pub sections: Vec<Section>,
    /// Hash of memory, if asked for.
    pub ram_hash: Option<u64>,
    /// How long hashing took.
    pub hashing: Duration,
}

/// What the driver must do, in this order.
#[derive(Debug, PartialEq)]
pub enum Action {
    /// Offer the VM; report with [`Event::Offered`].
    Offer,
    /// Open control and page connections; report with [`Event::Connected`].
    Connect,
    /// Start the dirty log; report.
    StartDirtyLog,
    /// Read the dirty log; report.
    CollectDirty,
    /// Send pages on the page streams; report with [`Event::RoundSent`].
    SendRound {
        /// Number of the round.
        n: u32,
        /// All pages; else those that were collected and not sent since.
        all: bool,
        /// The guest is paused: pages need not be armed again.
        last: bool,
    },
    /// Take so many thousandths of its time from the guest; 0: give it back. Report only that it failed, and only if not 0.
    Throttle(u16),
    /// Pause the guest; report.
    Pause,
    /// Save the state, and hash memory if `verify`; report.
    Save,
    /// Send a message on control. That it may fail is known.
    Send(Message),
    /// Write a record; report.
    Journal(Step),
    /// Run the guest again; report.
    Resume,
    /// Ask the destination's agent what became of this attempt; report with [`Event::Asked`].
    Ask,
    /// Claim this attempt from the arbiter; report with [`Event::Claimed`].
    Claim,
    /// Stop all streams, at once.
    CloseStreams,
    /// Stop the dirty log.
    StopDirtyLog,
    /// The end: see [`Source::report`].
    Finish,
}

/// How far it is. In order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Idle,
    Offering,
    Connecting,
    Preparing,
    Arming,
    Copying,
    Looking,
    Pausing,
    LastLook,
    Saving,
    Finishing,
    Deciding,
    Committed,
    Settled,
}

/// How long a failed page stream waits for the destination's own word on why.
const EXPLANATION: Duration = Duration::from_millis(300);

/// The source's machine.
pub struct Source {
    options: Options,
    paused_before: bool,
    total_pages: u64,
    state: State,
    handoff: SourceHandoff,
    precopy: Precopy,
    account: Account,
    failure: Option<(Phase, MigrateError)>,
    /// When the state in hand has lasted too long, and what it is called then.
    deadline: Option<(Duration, Duration, &'static str)>,
    page_failure: Option<(Duration, String)>,
    rtt: Option<Duration>,
    next_ask: Option<Duration>,
    ask_wait: Duration,
    next_claim: Option<Duration>,
    claim_wait: Duration,
    /// A claim is under way.
    claiming: bool,
    dirty_log: bool,
    paused_here: bool,
    /// What the round in hand sent, and the destination's word that it arrived.
    sent: Option<Marker>,
    arrived: Option<Marker>,
    actions: Vec<Action>,
}

impl Source {
    /// A machine for one attempt to move this VM to `to`.
    pub fn new(options: Options, vm: &VmDescription, to: String) -> Self {
        Self {
            paused_before: vm.paused,
            total_pages: vm.ram.pages(),
            state: State::Idle,
            handoff: SourceHandoff::new(options.arbiter.is_some()),
            precopy: Precopy::new(options.convergence, options.max_downtime, options.throttle),
            account: Account::new(&options, vm, to),
            failure: None,
            deadline: None,
            page_failure: None,
            rtt: None,
            next_ask: None,
            ask_wait: options.timeouts.ask_min,
            next_claim: None,
            claim_wait: options.timeouts.ask_min,
            claiming: false,
            dirty_log: false,
            paused_here: false,
            sent: None,
            arrived: None,
            actions: Vec::new(),
            options,
        }
    }

    /// A machine that goes on where one broke down, which is a bug: from the last step in its journal. Give it
    /// [`Event::Lost`], unless that is settled: before `Decided` it keeps the VM, after it it asks.
    pub fn after_panic(options: Options, vm: &VmDescription, to: String, phase: Phase, last: Option<Step>) -> Self {
        let mut source = Self::new(options, vm, to);
        (source.paused_here, source.dirty_log) = (!vm.paused, true);
        source.failure = Some((phase, MigrateError::Panicked));
        source.handoff = SourceHandoff::recovered(last, source.options.arbiter.is_some());
        source.state = match last {
            Some(Step::Decided) => State::Committed,
            Some(Step::Released) => State::Settled,
            _ => State::Idle,
        };
        source
    }

    /// A durable record takes so long, if that is known.
    pub fn journal_takes(&mut self, time: Option<Duration>) {
        self.precopy.costs.journal_here = time.unwrap_or(self.precopy.costs.journal_here);
    }

    /// Takes an event in, at the time `now` (since the start, never going back). What is to be done comes out.
    pub fn handle(&mut self, now: Duration, event: Event) -> Vec<Action> {
        self.account.now = now;
        let failed = match event {
            Event::RoundTrip(rtt) => {
                // The shortest is the truest: the others waited for a thread, or behind pages.
                let shortest = *self.rtt.insert(self.rtt.map_or(rtt, |shortest| shortest.min(rtt)));
                self.precopy.costs.rtt = shortest;
                Ok(())
            }
            Event::Cancel => Err(MigrateError::Cancelled),
            Event::GuestGone(why) => Err(MigrateError::GuestGone(why)),
            Event::Lost(why) => Err(MigrateError::Lost(why)),
            Event::NotThrottled(source) => Err(MigrateError::Vm { what: "be slowed down", source }),
            Event::PagesFailed(why) => {
                // The destination may have said why on control: give its word time to arrive.
                self.page_failure.get_or_insert((now + EXPLANATION, why));
                Ok(())
            }
            Event::Message(Message::GaveUp(reason)) => {
                self.settle_by_word(SourceEvent::GaveUp, MigrateError::GaveUp(reason));
                Ok(())
            }
            Event::Journaled(step, result) => {
                self.journaled(step, result);
                Ok(())
            }
            Event::Resumed(Err(source)) => {
                self.account.resume_failure = Some(chain(&MigrateError::Vm { what: "be resumed", source }));
                Ok(())
            }
            Event::Asked(answer) => {
                self.answered(answer);
                Ok(())
            }
            Event::Claimed(word) => {
                self.claimed(word);
                Ok(())
            }
            Event::Resolve(resolution) => {
                if self.handoff.in_doubt() {
                    self.hand(SourceEvent::Resolve(resolution));
                    if self.handoff.is_settled() {
                        self.failure = Some((Phase::InDoubt, MigrateError::Resolved));
                    }
                }
                Ok(())
            }
            Event::Tick => self.tick(),
            event => self.step(event),
        };
        if let Err(error) = failed {
            self.fail(error);
        }
        std::mem::take(&mut self.actions)
    }

    /// The order of a migration.
    fn step(&mut self, event: Event) -> Result<(), MigrateError> {
        use State as S;
        let limits = self.options.timeouts;
        match (self.state, event) {
            // Preflight: nothing moves before the destination is built.
            (S::Idle, Event::Begin) => {
                self.account.began = self.account.now;
                self.journal(Step::Sending);
                self.act(Action::Offer);
                self.enter(S::Offering, Some((limits.connect + limits.request, "the answer to the offer")));
            }
            (S::Offering, Event::Offered(answer)) => {
                answer?.map_err(MigrateError::Refused)?;
                self.act(Action::Connect);
                self.enter(S::Connecting, Some((limits.connect * 2, "opening the connections")));
            }
            (S::Connecting, Event::Connected(result)) => {
                result?;
                self.enter(S::Preparing, Some((limits.prepare, "preparing the destination")));
            }
            (S::Preparing, Event::Message(Message::Refused(refusal))) => return Err(MigrateError::Refused(refusal)),
            (S::Preparing, Event::Message(Message::Ready(ready))) => {
                self.precopy.costs.load = ready.load;
                self.precopy.costs.journal_there = ready.journal;
                if self.paused_before {
                    self.account.pause_began = None;
                    self.last_round();
                } else if self.options.mode == Mode::StopAndCopy {
                    self.pause();
                } else {
                    self.act(Action::StartDirtyLog);
                    self.dirty_log = true;
                    self.enter(S::Arming, None);
                }
            }

            // Pre-copy: rounds, until what is left fits.
            (S::Arming, Event::DirtyLogStarted(result)) => {
                result.map_err(|source| MigrateError::Vm { what: "start its dirty log", source })?;
                self.precopy.begin(self.account.now);
                self.round(true, false, self.total_pages);
                self.enter(S::Copying, None);
            }
            (S::Copying, Event::RoundSent(sent)) => {
                self.sent = Some(sent);
                self.enter(S::Copying, Some((limits.page_stall, "the destination's word that a round arrived")));
                self.look()?;
            }
            (S::Copying, Event::Message(Message::RoundDone { n, data_pages, zero_pages })) => {
                self.arrived(n, data_pages, zero_pages)?;
                self.look()?;
            }
            (S::Looking, Event::Collected(result)) => {
                let dirty = self.collected(result)?;
                self.account.dirty_after(dirty);
                let verdict = self.precopy.decide(self.account.now, dirty);
                if let Verdict::Throttle(permille) = verdict {
                    self.account.throttled(permille);
                    self.act(Action::Throttle(permille));
                }
                match verdict {
                    Verdict::Another | Verdict::Throttle(_) => {
                        self.round(false, false, dirty);
                        self.enter(S::Copying, None);
                    }
                    Verdict::Switchover => {
                        self.account.predicted = self.precopy.predict(dirty);
                        tracing::debug!(dirty, bandwidth = self.precopy.bandwidth(), costs = ?self.precopy.costs, "predicted parts");
                        self.pause();
                    }
                    Verdict::GiveUp(why) => return Err(why.into()),
                }
            }

            // Switchover: the guest stands still from here on.
            (S::Pausing, Event::Paused(result)) => {
                result.map_err(|source| MigrateError::Vm { what: "be paused", source })?;
                self.account.phase("pause");
                self.account.throttle_ends();
                if self.dirty_log {
                    self.act(Action::CollectDirty);
                    self.state = S::LastLook;
                } else {
                    self.last_round();
                }
            }
            (S::LastLook, Event::Collected(result)) => {
                let dirty = self.collected(result)?;
                self.account.phase("collect");
                self.round(false, true, dirty);
                self.act(Action::Save);
                self.state = S::Saving;
            }
            (S::Saving, Event::Saved(result)) => {
                let saved = result.map_err(|source| MigrateError::Vm { what: "save its state", source })?;
                self.send_state(saved)?;
                self.state = S::Finishing;
            }
            (S::Saving | S::Finishing, Event::Message(Message::RoundDone { n, data_pages, zero_pages })) => {
                self.arrived(n, data_pages, zero_pages)?;
                self.close_round()?;
            }
            (S::Saving | S::Finishing | S::Deciding | S::Committed | S::Settled, Event::RoundSent(sent)) => {
                self.sent = Some(sent);
                if self.deadline.is_none() && self.handoff.can_abort() {
                    let limit = limits.prepare;
                    self.deadline = Some((self.account.now + limit, limit, "loading at the destination"));
                }
                self.close_round()?;
            }
            (S::Finishing, Event::Message(Message::Prepared(prepared))) => {
                if self.arrived.is_none() {
                    return Err(MigrateError::Protocol("PREPARED before the last round arrived".into()));
                }
                self.account.prepared(prepared);
                self.enter(S::Deciding, None);
                self.hand(SourceEvent::Prepared);
            }

            // Commit.
            (S::Committed, Event::Message(Message::Running(running))) => {
                self.account.running(running);
                self.hand(SourceEvent::Running);
            }

            (_, Event::Message(Message::Ping(_) | Message::Pong(_))) | (S::Settled | S::Committed, _) => {}
            (_, Event::Resumed(_)) => {}
            (state, Event::Message(message)) => {
                return Err(MigrateError::Protocol(format!("{} while {state:?}", message.kind().name())));
            }
            // Results that are not waited for any more.
            (_, _) => {}
        }
        Ok(())
    }

    fn pause(&mut self) {
        self.paused_here = true;
        self.account.pause_began = Some(self.account.now);
        self.account.mark = self.account.now;
        self.act(Action::Pause);
        let limit = self.options.timeouts.switchover.max(self.options.max_downtime * 10);
        // Without pre-copy all memory is sent in the blackout, and with `verify` all of it is hashed: that was asked for.
        let limited = self.options.mode == Mode::PreCopy && !self.options.verify;
        self.enter(State::Pausing, limited.then_some((limit, "the switchover")));
    }

    /// The only round of a guest that is paused before the copy begins.
    fn last_round(&mut self) {
        self.account.mark = self.account.now;
        self.round(true, true, self.total_pages);
        self.act(Action::Save);
        self.enter(State::Saving, None);
    }

    fn round(&mut self, all: bool, last: bool, pages: u64) {
        let n = self.account.begin_round();
        (self.sent, self.arrived) = (None, None);
        self.act(Action::Send(Message::Round { n, pages, last }));
        self.act(Action::SendRound { n, all, last });
    }

    fn arrived(&mut self, n: u32, data_pages: u64, zero_pages: u64) -> Result<(), MigrateError> {
        if n != self.account.round() || self.arrived.is_some() {
            return Err(MigrateError::Protocol(format!("ROUND_DONE {n} in round {}", self.account.round())));
        }
        self.arrived = Some(Marker { round: n, data_pages, zero_pages, ..Marker::default() });
        self.account.round_arrived();
        Ok(())
    }

    /// Closes the round once it was sent and has arrived; says whether it is closed.
    fn close_round(&mut self) -> Result<bool, MigrateError> {
        let (Some(sent), Some(arrived)) = (self.sent, self.arrived) else { return Ok(false) };
        if (sent.data_pages, sent.zero_pages) != (arrived.data_pages, arrived.zero_pages) {
            return Err(MigrateError::Protocol(format!(
                "{} and {} zero pages arrived of {} and {} that were sent",
                arrived.data_pages, arrived.zero_pages, sent.data_pages, sent.zero_pages
            )));
        }
        let took = self.account.close_round(sent, self.options.streams);
        // What is left will be counted in pages: so are these, however short they were made for the link.
        self.precopy.round_done(sent.uncompressed_bytes(), took);
        Ok(true)
    }

    fn look(&mut self) -> Result<(), MigrateError> {
        if self.close_round()? {
            self.account.mark = self.account.now;
            self.act(Action::CollectDirty);
            self.enter(State::Looking, None);
        }
        Ok(())
    }

    fn collected(&mut self, result: Result<u64, VmError>) -> Result<u64, MigrateError> {
        let dirty = result.map_err(|source| MigrateError::Vm { what: "read its dirty log", source })?;
        self.precopy.costs.collect = self.account.now.saturating_sub(self.account.mark);
        Ok(dirty)
    }

    fn send_state(&mut self, Saved { sections, ram_hash, hashing }: Saved) -> Result<(), MigrateError> {
        let bytes: usize = sections.iter().map(|section| section.bytes.len() + 10).sum();
        if sections.len() > MAX_SECTIONS || bytes + 15 > MAX_STATE_BYTES {
            let source =
                format!("{} sections with {bytes} bytes of state are more than can be sent", sections.len()).into();
            return Err(MigrateError::Vm { what: "save its state", source });
        }
        self.account.saved(hashing);
        self.act(Action::Send(Message::State(StateMessage { round: self.account.round(), ram_hash, sections })));
        self.hand(SourceEvent::StateSent);
        Ok(())
    }

    fn journaled(&mut self, step: Step, result: io::Result<()>) {
        let ok = result.is_ok();
        match (step, result) {
            // Before COMMIT a journal that cannot be written ends the attempt; later it changes nothing any more.
            (Step::Sending, Err(error)) => return self.fail(MigrateError::Journal(error)),
            (Step::Decided, Err(error)) => {
                self.failure.get_or_insert((Phase::Commit, MigrateError::Journal(error)));
            }
            (step, Err(error)) => tracing::error!(?step, %error, "the handoff journal could not be written"),
            (_, Ok(())) => {}
        }
        self.hand(SourceEvent::Journaled(step, ok));
    }

    /// Limits on time.
    fn tick(&mut self) -> Result<(), MigrateError> {
        let now = self.account.now;
        if let Some((_, why)) = self.page_failure.take_if(|(until, _)| *until <= now)
            && self.handoff.can_abort()
        {
            return Err(MigrateError::Pages(why));
        }
        if self.next_ask.is_some_and(|at| at <= now) {
            self.next_ask = None;
            self.act(Action::Ask);
        }
        if self.next_claim.take_if(|at| *at <= now).is_some() {
            self.hand(SourceEvent::ClaimDue);
        }
        if let Some((_, limit, what)) = self.deadline.take_if(|(at, ..)| *at <= now) {
            return Err(MigrateError::TimedOut { what, limit });
        }
        let limit = self.options.timeout.filter(|_| self.phase() <= Phase::PreCopy && self.phase() != Phase::Idle);
        if let Some(limit) = limit.filter(|limit| self.account.began + *limit <= now) {
            return Err(MigrateError::TimedOut { what: "everything before the switchover", limit });
        }
        Ok(())
    }

    /// When [`Event::Tick`] is due at the latest; none: when something happens.
    pub fn next_tick(&self) -> Option<Duration> {
        if self.state == State::Settled {
            return None;
        }
        let overall =
            self.options.timeout.filter(|_| self.phase() <= Phase::PreCopy).map(|limit| self.account.began + limit);
        let deadline = self.deadline.map(|(at, ..)| at);
        let page_failure = self.page_failure.as_ref().map(|(at, _)| *at);
        [overall, deadline, self.next_ask, self.next_claim, page_failure].into_iter().flatten().min()
    }

    /// Something failed. Before the commit point that ends the attempt; after it, it is in doubt.
    fn fail(&mut self, error: MigrateError) {
        if self.handoff.can_abort() {
            self.failure.get_or_insert((self.phase(), error));
            self.hand(SourceEvent::Abort);
        } else if self.state == State::Committed
            && !matches!(error, MigrateError::Cancelled | MigrateError::GuestGone(_))
        {
            self.failure.get_or_insert((Phase::Commit, error));
            self.hand(SourceEvent::Silence);
        }
    }

    /// The destination said, on whatever way, what became of this attempt.
    fn settle_by_word(&mut self, event: SourceEvent, why: MigrateError) {
        if event == SourceEvent::GaveUp && !self.handoff.is_settled() {
            self.failure = Some((self.phase(), why));
        }
        self.hand(event);
    }

    fn answered(&mut self, answer: Result<AskAnswer, ConnectError>) {
        if !self.handoff.in_doubt() {
            return;
        }
        match answer {
            Ok(AskAnswer::Running) => return self.hand(SourceEvent::Running),
            Ok(AskAnswer::GaveUp) => {
                let why = MigrateError::GaveUp("it lost the connection before it was told to run the VM".into());
                return self.settle_by_word(SourceEvent::GaveUp, why);
            }
            Ok(AskAnswer::Pending) => self.account.last_answer = Some("the destination has not decided yet".into()),
            Err(error) => self.account.last_answer = Some(chain(&error)),
        }
        self.next_ask = Some(self.account.now + self.ask_wait);
        self.ask_wait = (self.ask_wait * 2).min(self.options.timeouts.ask_max);
    }

    /// The arbiter answered, or could not be asked.
    fn claimed(&mut self, word: Result<Claimant, ArbiterError>) {
        self.claiming = false;
        if !self.handoff.in_doubt() {
            return;
        }
        match word {
            Ok(winner) => {
                if winner == Claimant::Source {
                    self.failure = Some((Phase::InDoubt, MigrateError::Arbitrated));
                } else {
                    self.account.given_away = true;
                    self.account.arbiter_word = Some("the arbiter gave the VM to the destination".into());
                }
                self.hand(SourceEvent::Claimed(winner));
            }
            Err(error) => {
                self.account.arbiter_word = Some(chain(&error));
                self.next_claim = Some(self.account.now + self.claim_wait);
                self.claim_wait = (self.claim_wait * 2).min(self.options.timeouts.ask_max);
            }
        }
    }

    /// Passes an event to the handoff, and does what it says.
    fn hand(&mut self, event: SourceEvent) {
        for action in self.handoff.on(event) {
            match action {
                SourceAction::Journal(step) => self.journal(step),
                SourceAction::Send(HandoffMessage::Abort) => {
                    let reason = self.failure.as_ref().map_or(String::new(), |(_, error)| chain(error));
                    self.act(Action::Send(Message::Abort(reason)));
                }
                SourceAction::Send(HandoffMessage::Released) => self.act(Action::Send(Message::Released)),
                SourceAction::Send(_) => {
                    self.account.phase("decide-journal");
                    let limit = self.options.timeouts.running;
                    self.enter(State::Committed, Some((limit, "the destination's word that it runs")));
                    self.act(Action::Send(Message::Commit));
                }
                SourceAction::Resume if self.paused_here => self.act(Action::Resume),
                SourceAction::Resume | SourceAction::Release => {}
                SourceAction::Ask => {
                    self.unthrottle();
                    self.account.in_doubt_since = Some(self.account.now);
                    self.deadline = None;
                    if self.options.arbiter.is_some() {
                        self.next_claim = Some(self.account.now + self.options.timeouts.grace);
                    }
                    self.act(Action::Ask);
                }
                SourceAction::Claim if self.claiming => {}
                SourceAction::Claim => {
                    self.claiming = true;
                    self.next_claim = None;
                    self.act(Action::Claim);
                }
            }
        }
        if self.handoff.is_settled() && self.state != State::Settled {
            self.act(Action::CloseStreams);
            self.unthrottle();
            if self.dirty_log {
                self.act(Action::StopDirtyLog);
            }
            self.act(Action::Finish);
            self.enter(State::Settled, None);
        }
    }

    /// Whatever was taken of the guest's time is given back, after it was resumed or when it is the destination's to run: in the blackout
    /// it would cost time, and changes nothing.
    fn unthrottle(&mut self) {
        if self.precopy.throttle() > 0 {
            self.account.throttle_ends();
            self.act(Action::Throttle(0));
        }
    }

    fn journal(&mut self, step: Step) {
        self.act(Action::Journal(step));
    }

    fn enter(&mut self, state: State, limit: Option<(Duration, &'static str)>) {
        self.state = state;
        self.deadline = limit.map(|(limit, what)| (self.account.now + limit, limit, what));
    }

    fn act(&mut self, action: Action) {
        self.actions.push(action);
    }

    /// How far it is, for watchers.
    pub fn phase(&self) -> Phase {
        match self.state {
            State::Idle => Phase::Idle,
            State::Offering | State::Connecting | State::Preparing => Phase::Preflight,
            State::Arming | State::Copying | State::Looking => Phase::PreCopy,
            State::Pausing | State::LastLook | State::Saving | State::Finishing => Phase::Switchover,
            State::Deciding | State::Committed if self.account.in_doubt_since.is_some() => Phase::InDoubt,
            State::Deciding | State::Committed => Phase::Commit,
            State::Settled => Phase::Done,
        }
    }

    /// Number of the round in hand.
    pub fn round_number(&self) -> u32 {
        self.account.round()
    }

    /// What convergence knows.
    pub fn precopy(&self) -> &Precopy {
        &self.precopy
    }

    /// Who owns the VM, as far as it is known.
    pub fn handoff(&self) -> SourceHandoff {
        self.handoff
    }

    /// Since when it is in doubt, and the latest answers.
    pub fn doubt(&self) -> (Option<Duration>, Option<String>) {
        (self.account.in_doubt_since, self.account.answers())
    }

    /// Whether the arbiter gave the VM to the destination: it cannot be kept here by hand.
    pub fn given_away(&self) -> bool {
        self.account.given_away
    }

    /// The report: final after [`Action::Finish`], preliminary before.
    pub fn report(&self) -> Report {
        self.account.report(self.handoff, self.failure.as_ref())
    }
}
