//! Both machines of a migration against each other, with everything that can fail failing at any time, and with a peer that says
//! anything. Neither panics; the source runs its guest again after COMMIT only on the word that the other side never will, and the
//! destination runs it only after COMMIT; with an arbiter, only whoever won; and as long as nobody lies, the guest never runs on both.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use arbitrary::Unstructured;
use migrator::arbiter::{Arbiter, ArbiterError, Claimant, MemoryArbiter};
use migrator::fuzzing::read_message;
use migrator::handle::Resolution;
use migrator::handoff::{Answer, DestinationState, HandoffRecord, answer};
use migrator::layout::{RamLayout, RamRegion};
use migrator::options::Timeouts;
use migrator::pages::Marker;
use migrator::traits::{Refusal, Section, StartError, VmDescription};
use migrator::transport::ConnectError;
use migrator::wire::message::AskAnswer;
use migrator::wire::{Message, encode};
use migrator::{MigrateError, MigrationId, Mode, Options, destination, source};

pub fn run(data: &[u8]) {
    let mut u = Unstructured::new(data);
    let Ok(how) = u.arbitrary::<u8>() else { return };
    let mut world = World::new(how);
    while !u.is_empty() && world.step(&mut u).is_ok() {}
}

/// One side of the control connection: what is on its way to it, and whether it knows that there is no more.
#[derive(Default)]
struct Inbox {
    messages: VecDeque<Message>,
    lost: bool,
}

struct World {
    source: source::Source,
    destination: destination::Destination,
    now: Duration,
    source_todo: VecDeque<source::Action>,
    destination_todo: VecDeque<destination::Action>,
    to_source: Inbox,
    to_destination: Inbox,
    markers: VecDeque<Marker>,
    /// The destination's journal.
    journal: Vec<HandoffRecord>,
    source_runs: bool,
    destination_runs: bool,
    /// COMMIT was sent; COMMIT was given to the destination.
    commit: (bool, bool),
    /// The source was told, in any way, that the destination never will.
    given_up: bool,
    arbiter: Option<Arc<MemoryArbiter>>,
    /// Somebody said what its machine did not.
    lied: bool,
}

const ID: MigrationId = MigrationId([1; 16]);

fn failed() -> io::Error {
    io::Error::other("injected")
}

fn silent() -> ConnectError {
    ConnectError::Silent { peer: "there".into(), waited: Duration::ZERO }
}

impl World {
    fn new(how: u8) -> Self {
        let arbiter = (how & 16 != 0).then(Arc::<MemoryArbiter>::default);
        let options = Options {
            arbiter: arbiter.clone().map(|arbiter| arbiter as _),
            mode: if how & 1 == 0 { Mode::PreCopy } else { Mode::StopAndCopy },
            verify: how & 2 != 0,
            timeout: (how & 4 != 0).then_some(Duration::from_secs(1)),
            ..Options::default()
        };
        let ram = RamLayout::new(vec![RamRegion { gpa: 0, bytes: 100 * 4096 }]).expect("a layout");
        let paused = how & 8 != 0;
        let vm = VmDescription { name: "web".into(), ram, paused, facts: serde_json::Value::Null };
        let mut world = World {
            source: source::Source::new(options, &vm, "there".into()),
            destination: destination::Destination::new(Timeouts::default(), 1, arbiter.is_some()),
            now: Duration::ZERO,
            source_todo: VecDeque::new(),
            destination_todo: VecDeque::new(),
            to_source: Inbox::default(),
            to_destination: Inbox::default(),
            markers: VecDeque::new(),
            journal: Vec::new(),
            source_runs: !paused,
            destination_runs: false,
            commit: (false, false),
            given_up: false,
            arbiter,
            lied: false,
        };
        world.source(source::Event::Begin);
        world
    }

    fn step(&mut self, u: &mut Unstructured<'_>) -> arbitrary::Result<()> {
        // Most of the time, things go as they should.
        match u.arbitrary::<u8>()? {
            0..=69 => self.source_acts(u)?,
            70..=139 => self.destination_acts(u)?,
            140..=179 => self.source_hears(),
            180..=219 => self.destination_hears(),
            220..=229 => self.pages_arrive(),
            230..=234 => self.time_passes(u)?,
            235..=238 => self.source(source::Event::RoundTrip(Duration::from_micros(u.arbitrary::<u16>()?.into()))),
            239 | 240 => self.cut(),
            241 => self.source(source::Event::Cancel),
            242 => self.destination(destination::Event::Cancel),
            243 => self.source(source::Event::PagesFailed("cut".into())),
            244 => self.destination(destination::Event::PagesFailed("cut".into())),
            245 => self.source(source::Event::GuestGone("powered off".into())),
            246 => self.resolve(u.arbitrary()?),
            247 => self.source(source::Event::Asked(Err(silent()))),
            _ => self.lie(u)?,
        }
        Ok(())
    }

    fn source(&mut self, event: source::Event) {
        let actions = self.source.handle(self.now, event);
        self.source_todo.extend(actions);
        let _ = (self.source.phase(), self.source.report(), self.source.doubt());
    }

    fn destination(&mut self, event: destination::Event) {
        let actions = self.destination.handle(self.now, event);
        self.destination_todo.extend(actions);
        let _ = (self.destination.phase(), self.destination.next_tick());
    }

    /// Sends through the encoding, which must carry whatever a machine says.
    fn sent(message: &Message, to: &mut Inbox) {
        let again = read_message(&mut &encode(message)[..]).expect("what we send is a message");
        if !to.lost {
            to.messages.push_back(again);
        }
    }

    fn source_acts(&mut self, u: &mut Unstructured<'_>) -> arbitrary::Result<()> {
        use source::{Action, Event};
        let Some(action) = self.source_todo.pop_front() else { return Ok(()) };
        let fails = u.ratio(1, 32)?;
        let vm = |result: bool| if result { Err("injected".into()) } else { Ok(()) };
        match action {
            Action::Offer => {
                let answer = if fails { Err(silent()) } else { Ok(Ok(())) };
                if answer.is_ok() {
                    self.destination(destination::Event::Begin);
                }
                self.source(Event::Offered(answer));
            }
            Action::Connect => {
                if !fails {
                    self.destination(destination::Event::Connected);
                }
                self.source(Event::Connected(if fails { Err(silent()) } else { Ok(()) }));
            }
            Action::StartDirtyLog => self.source(Event::DirtyLogStarted(vm(fails))),
            Action::CollectDirty => {
                let pages = u64::from(u.arbitrary::<u8>()?) * if fails { 1 << 24 } else { 1 };
                self.source(Event::Collected(Ok(pages)));
            }
            Action::SendRound { n, .. } => {
                let (data_pages, zero_pages) = (u.arbitrary::<u8>()?.into(), u.arbitrary::<u8>()?.into());
                let marker = Marker { round: n, chunks: 1, data_pages, zero_pages, body_bytes: data_pages * 4096 };
                self.markers.push_back(marker);
                self.source(Event::RoundSent(marker));
            }
            Action::Pause => {
                self.source_runs = fails;
                self.source(Event::Paused(vm(fails)));
            }
            Action::Save => {
                let sections = vec![Section { kind: 1, instance: 0, version: 1, bytes: vec![1] }];
                let saved = source::Saved { sections, ram_hash: Some(1), hashing: Duration::ZERO };
                self.source(Event::Saved(if fails { Err("injected".into()) } else { Ok(saved) }));
            }
            Action::Send(message) => {
                if message == Message::Commit {
                    assert!(!self.commit.0, "COMMIT is sent once");
                    self.commit.0 = true;
                }
                Self::sent(&message, &mut self.to_destination);
            }
            Action::Journal(step) => {
                self.source(Event::Journaled(step, if fails { Err(failed()) } else { Ok(()) }));
            }
            Action::Resume => {
                let won = self.won(Claimant::Source);
                assert!(!self.commit.0 || self.given_up || won, "the source runs on after COMMIT");
                self.source_runs = true;
                self.check();
                self.source(Event::Resumed(vm(fails)));
            }
            Action::Ask => self.ask(fails),
            Action::Claim => self.source(Event::Claimed(self.claim(Claimant::Source, fails))),
            // The stop of streams and of the dirty log, and the end.
            _ => {}
        }
        Ok(())
    }

    /// The word of the arbiter; where it fails, it may have been won all the same.
    fn claim(&self, claimant: Claimant, fails: bool) -> Result<Claimant, ArbiterError> {
        let arbiter = self.arbiter.as_ref().expect("only where there is an arbiter is it asked");
        let winner = arbiter.claim(ID, claimant)?;
        if fails { Err(ArbiterError("injected".into())) } else { Ok(winner) }
    }

    fn won(&self, claimant: Claimant) -> bool {
        self.arbiter.as_ref().is_some_and(|arbiter| arbiter.winner(ID) == Some(claimant))
    }

    fn ask(&mut self, fails: bool) {
        // The receiving process lives until its machine has settled it.
        let alive = !self.destination.handoff().is_settled();
        let said = match answer(&self.journal, ID, alive) {
            Answer::NoTrace if self.journal.is_empty() => return self.source(source::Event::Asked(Err(silent()))),
            said => AskAnswer::try_from(said).unwrap_or(AskAnswer::Pending),
        };
        self.given_up |= !fails && said == AskAnswer::GaveUp;
        self.source(source::Event::Asked(if fails { Err(silent()) } else { Ok(said) }));
    }

    fn destination_acts(&mut self, u: &mut Unstructured<'_>) -> arbitrary::Result<()> {
        use destination::{Action, Event, Loaded};
        let Some(action) = self.destination_todo.pop_front() else { return Ok(()) };
        let fails = u.ratio(1, 32)?;
        match action {
            Action::Journal(step) => {
                if !fails {
                    let record = HandoffRecord { id: ID, step, unix_ms: 0, vm: String::new(), peer: String::new() };
                    self.journal.push(record);
                }
                self.destination(Event::Journaled(step, if fails { Err(failed()) } else { Ok(()) }));
            }
            Action::Build => {
                let refusal = Refusal { reason: "injected".into(), mismatches: Vec::new() };
                self.destination(Event::Built(if fails { Err(refusal) } else { Ok(Duration::from_millis(1)) }));
            }
            Action::Send(message) => Self::sent(&message, &mut self.to_source),
            Action::Load { .. } => {
                let loaded =
                    if fails { Err(MigrateError::Differs { here: 1, there: 2 }) } else { Ok(Loaded::default()) };
                self.destination(Event::Loaded(loaded));
            }
            Action::Start => {
                assert!(self.commit.1, "the destination starts without COMMIT");
                assert!(self.arbiter.is_none() || self.won(Claimant::Destination), "it starts what it has not won");
                let result = match (fails, u.arbitrary()?) {
                    (true, may_have_run) => Err(StartError { may_have_run, source: "injected".into() }),
                    (false, paused) => Ok((!paused).then_some(self.now)),
                };
                self.destination_runs = !matches!(result, Err(StartError { may_have_run: false, .. }));
                self.check();
                self.destination(Event::Started(result));
            }
            Action::Claim => self.destination(Event::Claimed(self.claim(Claimant::Destination, fails))),
            Action::Discard => assert!(!self.destination_runs, "a VM that runs is discarded"),
            // The streams' stop, the announcement, and the end.
            _ => {}
        }
        Ok(())
    }

    fn source_hears(&mut self) {
        let Some(message) = self.to_source.messages.pop_front() else { return };
        self.given_up |= matches!(message, Message::GaveUp(_) | Message::Refused(_));
        self.source(source::Event::Message(message));
    }

    fn destination_hears(&mut self) {
        let Some(message) = self.to_destination.messages.pop_front() else { return };
        self.commit.1 |= message == Message::Commit;
        self.destination(destination::Event::Message(message));
    }

    fn pages_arrive(&mut self) {
        if let Some(marker) = self.markers.pop_front() {
            self.destination(destination::Event::Marker { stream: 0, marker });
        }
    }

    fn time_passes(&mut self, u: &mut Unstructured<'_>) -> arbitrary::Result<()> {
        self.now += Duration::from_millis(u.arbitrary::<u16>()?.into());
        self.source(source::Event::Tick);
        self.destination(destination::Event::Tick);
        Ok(())
    }

    /// What is on its way arrives, or not: each side sees the end where the other's words end for it.
    fn cut(&mut self) {
        for inbox in [&mut self.to_source, &mut self.to_destination] {
            inbox.messages.clear();
            inbox.lost = true;
        }
        self.markers.clear();
        self.source(source::Event::Lost("cut".into()));
        self.destination(destination::Event::Lost("cut".into()));
    }

    /// A human who looks before answering.
    fn resolve(&mut self, keep: bool) {
        let never = self.destination.handoff().state() == DestinationState::GaveUp;
        if keep && never {
            self.given_up = true;
            self.source(source::Event::Resolve(Resolution::Keep));
        } else if !keep {
            self.source(source::Event::Resolve(Resolution::Discard));
        }
    }

    /// A peer, or a stream, that says anything at all at any time.
    fn lie(&mut self, u: &mut Unstructured<'_>) -> arbitrary::Result<()> {
        self.lied = true;
        let round = u.int_in_range(0..=3u32)?;
        let pages = u64::from(u.arbitrary::<u8>()?);
        let message = match u.arbitrary::<u8>()? % 16 {
            0 => Message::Accepted,
            1 => Message::Refused(Refusal::default()),
            2 => Message::Ready(Default::default()),
            3 => Message::Round { n: round, pages, last: false },
            4 | 5 => Message::RoundDone { n: round, data_pages: pages, zero_pages: 0 },
            6 | 7 => Message::State(migrator::wire::message::State { round, ram_hash: None, sections: Vec::new() }),
            8 => Message::Prepared(Default::default()),
            9 => Message::Commit,
            10 => Message::Running(migrator::wire::message::Running {
                journal_us: u.arbitrary()?,
                start_us: u.arbitrary()?,
                running_us: u.arbitrary()?,
                ..Default::default()
            }),
            11 => Message::GaveUp("so".into()),
            12 => Message::Abort("so".into()),
            13 => Message::Ask(ID),
            14 => Message::Released,
            _ => {
                let marker = Marker { round, chunks: pages, data_pages: pages, zero_pages: 0, body_bytes: 0 };
                let stream = u.int_in_range(0..=2)?;
                self.destination(destination::Event::Marker { stream, marker });
                return Ok(());
            }
        };
        if u.arbitrary()? {
            self.given_up |= matches!(message, Message::GaveUp(_) | Message::Refused(_));
            self.source(source::Event::Message(message));
        } else {
            self.commit.1 |= message == Message::Commit;
            self.destination(destination::Event::Message(message));
        }
        Ok(())
    }

    fn check(&self) {
        assert!(self.lied || !(self.source_runs && self.destination_runs), "the guest runs on both");
    }
}
