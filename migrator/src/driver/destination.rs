//! The destination's driver: does what the destination's machine says.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use super::control::{Control, ControlEvent};
use super::receive::{PageReceiver, ReceiveEvent};
use super::request::Offer;
use super::{Unseen, claim, journal};
use crate::announce::{self, Plan, Schedule};
use crate::arbiter::Claimant;
use crate::destination::{Action, Destination, Event, Loaded};
use crate::error::MigrateError;
use crate::handle::MigrationHandle;
use crate::handoff::{DestinationState, Step};
use crate::options::ReceiveOptions;
use crate::report::{AnnounceReport, Phase};
use crate::traits::{Announcer, Connection, DestinationVm, GuestPages, Journal, Refusal, Section, VmDescription};
use crate::wire::Message;
use crate::wire::preamble::Role;

const BEAT: Duration = Duration::from_millis(50);
/// How long the last words on a connection may take to be read.
const LAST_WORDS: Duration = Duration::from_secs(1);
/// How long the source's last word may take. Nobody waits for it, and it takes a durable record to say it.
const RELEASED: Duration = Duration::from_secs(10);

/// A connection that came in for a migration, preamble read and answered.
pub struct Arrived {
    /// [`Role::Control`] or [`Role::Pages`].
    pub role: Role,
    /// Number of the page stream.
    pub stream: u16,
    /// The connection.
    pub connection: Box<dyn Connection>,
}

/// A migration that was offered to this host and accepted.
pub struct Incoming {
    /// The offer, as it came.
    pub offer: Offer,
    /// Where its connections arrive. They may come before `receive` is called, or after.
    pub connections: mpsc::Receiver<Arrived>,
}

/// A VM that is this host's now.
#[derive(Debug)]
pub struct Received {
    /// What it is.
    pub description: VmDescription,
    /// What is being announced.
    pub announce: AnnounceReport,
    /// The thread that announces. It ends by itself, when the schedule does.
    pub announcing: Option<thread::JoinHandle<()>>,
    /// The thread that hears the source out. It ends within seconds; with true if the source has on record that the VM is
    /// this host's, so that nobody will ever ask about this attempt and its journal may be removed. Where that word is lost
    /// (false), the journal must stay.
    pub released: Option<thread::JoinHandle<bool>>,
}

/// Why the VM is not this host's.
#[derive(Debug, thiserror::Error)]
pub enum ReceiveError {
    /// This host cannot take it; the source was told.
    #[error("refused: {0}")]
    Refused(Refusal),
    /// It was given up; everything has been discarded, and the journal says so.
    #[error("the incoming migration was given up")]
    GaveUp(#[source] MigrateError),
    /// It was taken over, and failed in the start, after the guest may have run: it is lost, and was this host's.
    #[error("the VM was taken over and lost")]
    Lost(#[source] MigrateError),
}

/// What comes in from the threads.
enum Input {
    Event(Event),
    Control(Control, String),
    Pages(u16, Box<dyn Connection>),
    /// A wish was made at the handle.
    Wish,
}

/// Takes a VM in. Blocks until it runs here (or is held here paused), or was given up. Returns as soon as the source was
/// told; announcing goes on in a thread of its own.
pub fn receive(
    vm: &mut dyn DestinationVm,
    incoming: Incoming,
    journal: &mut dyn Journal,
    options: &ReceiveOptions,
    handle: &MigrationHandle,
) -> Result<Received, ReceiveError> {
    let Incoming { offer, connections } = incoming;
    // A tombstone, or a record of a process before this one: this attempt is not ours to begin.
    let settled = match journal.load() {
        Ok(records) if records.iter().any(|record| record.id == offer.id) => {
            Some(MigrateError::Protocol("this migration was begun or given up here before".into()))
        }
        Ok(_) => None,
        Err(error) => Some(MigrateError::Journal(error)),
    };
    if let Some(error) = settled {
        vm.discard();
        handle.update(|progress| progress.phase = Phase::Done);
        return Err(ReceiveError::GaveUp(error));
    }
    let (inputs, queue) = mpsc::channel();
    let wishes = inputs.clone();
    handle.on_wish(Some(Box::new(move || {
        let _ = wishes.send(Input::Wish);
    })));
    let mut driver = Driver {
        machine: Destination::new(options.timeouts, offer.streams, options.arbiter.is_some()),
        vm,
        offer,
        journal,
        options,
        handle,
        inputs,
        stop: Arc::default(),
        began: Instant::now(),
        memory: None,
        control: None,
        peer: options.from.clone(),
        waiting_pages: Vec::new(),
        receivers: Vec::new(),
        streams: Vec::new(),
        round_pages: 0,
        received: Arc::default(),
        announcement: None,
        announcing: None,
        connected: false,
        finished: false,
        unseen: Unseen::default(),
    };
    driver.listen(connections);
    driver.run(&queue);
    let result = driver.finish(queue);
    handle.on_wish(None);
    handle.update(|progress| progress.phase = Phase::Done);
    result
}

struct Driver<'a> {
    vm: &'a mut dyn DestinationVm,
    offer: Offer,
    journal: &'a mut dyn Journal,
    options: &'a ReceiveOptions,
    handle: &'a MigrationHandle,
    machine: Destination,
    inputs: mpsc::Sender<Input>,
    stop: Arc<AtomicBool>,
    began: Instant,
    memory: Option<Arc<dyn GuestPages>>,
    control: Option<Control>,
    /// The source, for the journal: as the options call it, or else once it has connected.
    peer: String,
    /// Page connections that came before there was memory.
    waiting_pages: Vec<(u16, Box<dyn Connection>)>,
    receivers: Vec<PageReceiver>,
    /// Numbers of the page streams that have come.
    streams: Vec<u16>,
    round_pages: u64,
    received: Arc<AtomicU64>,
    announcement: Option<(Plan, Arc<dyn Announcer>)>,
    announcing: Option<thread::JoinHandle<()>>,
    connected: bool,
    finished: bool,
    unseen: Unseen,
}

impl Driver<'_> {
    /// Takes connections as they come, also while the VM is being built: the source wants an answer to its PINGs.
    fn listen(&self, connections: mpsc::Receiver<Arrived>) {
        let (inputs, stop, timeouts) = (self.inputs.clone(), self.stop.clone(), self.options.timeouts);
        let spawned = thread::Builder::new().name("migrate-listen".into()).spawn(move || {
            let mut control_came = false;
            while !stop.load(Ordering::Relaxed) {
                let Arrived { role, stream, connection } = match connections.recv_timeout(BEAT) {
                    Ok(arrived) => arrived,
                    Err(RecvTimeoutError::Timeout) => continue,
                    Err(RecvTimeoutError::Disconnected) => return,
                };
                let input = match role {
                    Role::Pages => Input::Pages(stream, connection),
                    Role::Control if !control_came => {
                        control_came = true;
                        let (inputs, peer) = (inputs.clone(), connection.peer());
                        let sink: super::control::Sink = Arc::new(move |event| {
                            let _ = inputs.send(Input::Event(match event {
                                ControlEvent::Message(message) => Event::Message(message),
                                ControlEvent::Lost(why) => Event::Lost(why),
                                ControlEvent::RoundTrip(_) => return,
                            }));
                        });
                        match Control::start(connection, timeouts, sink) {
                            Ok(control) => Input::Control(control, peer),
                            Err(error) => Input::Event(Event::Lost(error.to_string())),
                        }
                    }
                    // The first one counts.
                    Role::Control | Role::Request => continue,
                };
                if inputs.send(input).is_err() {
                    return;
                }
            }
        });
        if let Err(error) = spawned {
            let _ = self.inputs.send(Input::Event(Event::Lost(error.to_string())));
        }
    }

    fn run(&mut self, queue: &mpsc::Receiver<Input>) {
        self.feed(Event::Begin);
        while !self.finished {
            let now = self.began.elapsed();
            let wait = self.machine.next_tick().map_or(BEAT, |at| at.saturating_sub(now).min(BEAT));
            match queue.recv_timeout(wait) {
                Ok(Input::Event(event)) => self.feed(event),
                Ok(Input::Control(control, peer)) => {
                    self.control = Some(control);
                    if self.peer.is_empty() {
                        self.peer = peer;
                    }
                    self.connected_if_all();
                }
                Ok(Input::Pages(stream, connection)) => {
                    if stream < self.offer.streams && !self.streams.contains(&stream) {
                        self.streams.push(stream);
                        self.waiting_pages.push((stream, connection));
                        self.start_pages();
                        self.connected_if_all();
                    }
                }
                Ok(Input::Wish) => {
                    if let (true, _) = self.handle.take_wishes() {
                        self.feed(Event::Cancel);
                    }
                }
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {}
            }
            self.feed(Event::Tick);
            self.show();
        }
    }

    /// Gives the machine an event, and does what it says, until it says no more.
    fn feed(&mut self, event: Event) {
        let mut events = VecDeque::from([event]);
        while let Some(event) = events.pop_front() {
            if let Event::Message(message) = &event {
                tracing::debug!(id = %self.offer.id, message = message.kind().name(), "from the source");
            }
            if let Event::Message(Message::Round { pages, .. }) = &event {
                self.round_pages = *pages;
                self.received.store(0, Ordering::Relaxed);
            }
            for action in self.machine.handle(self.began.elapsed(), event) {
                events.extend(self.act(action));
            }
        }
    }

    fn act(&mut self, action: Action) -> Option<Event> {
        match action {
            Action::Journal(step) => {
                let mut result = journal(self.journal, self.offer.id, step, &self.offer.vm.name, &self.peer);
                if step == Step::Receiving && result.is_ok() {
                    result = self.journal.measure().map(|time| self.machine.journal_takes(time));
                }
                return Some(Event::Journaled(step, result));
            }
            Action::Build => {
                let built = self.vm.prepare(&self.offer.vm).map(|()| {
                    self.memory = Some(self.vm.memory());
                    self.start_pages();
                    self.vm.estimate()
                });
                return Some(Event::Built(built));
            }
            Action::Send(message) => {
                if let Some(control) = &self.control {
                    control.send(&message);
                }
            }
            Action::Load { sections, ram_hash } => return Some(Event::Loaded(self.load(sections, ram_hash))),
            Action::Start => {
                let began = self.began;
                let started = self.vm.start(self.offer.vm.paused);
                return Some(Event::Started(
                    started.map(|started| started.first_run.map(|at| at.saturating_duration_since(began))),
                ));
            }
            Action::Claim => {
                let inputs = self.inputs.clone();
                claim(self.options.arbiter.as_ref(), self.offer.id, Claimant::Destination, move |word| {
                    let _ = inputs.send(Input::Event(Event::Claimed(word)));
                });
            }
            Action::Discard => {
                self.memory = None;
                self.vm.discard();
            }
            // What comes after the end is heard by `last_words`.
            Action::Forget => {}
            Action::CloseStreams => self.receivers.clear(),
            Action::Announce => self.announce(),
            Action::Finish => self.finished = true,
        }
        None
    }

    fn load(&mut self, sections: Vec<Section>, ram_hash: Option<u64>) -> Result<Loaded, MigrateError> {
        let vm_error = |what| move |source| MigrateError::Vm { what, source };
        let began = Instant::now();
        if let (Some(there), Some(memory)) = (ram_hash, &self.memory) {
            let here = memory.hash().map_err(|error| vm_error("hash its memory")(error.into()))?;
            if here != there {
                return Err(MigrateError::Differs { here, there });
            }
        }
        let verify = if ram_hash.is_some() { began.elapsed() } else { Duration::ZERO };
        let began = Instant::now();
        self.vm.load_state(sections).map_err(vm_error("load its state"))?;
        let mut announce = AnnounceReport::default();
        // A guest that stays paused does not answer: whoever resumes it announces it.
        if !self.offer.vm.paused {
            let announcer = self.vm.announcer();
            let mut plan = announce::plan(&announcer.addresses(), &self.options.announce);
            plan.report.guest = announcer.guest_can_announce();
            announce = plan.report.clone();
            self.announcement = Some((plan, announcer));
        }
        Ok(Loaded { load: began.elapsed(), verify, announce })
    }

    /// Starts the streams that wait for memory, once there is some.
    fn start_pages(&mut self) {
        let Some(memory) = &self.memory else { return };
        for (stream, connection) in self.waiting_pages.drain(..) {
            let inputs = self.inputs.clone();
            let sink: super::receive::Sink = Arc::new(move |event| {
                let _ = inputs.send(Input::Event(match event {
                    ReceiveEvent::Marker(stream, marker) => Event::Marker { stream, marker },
                    ReceiveEvent::Failed(why) => Event::PagesFailed(why),
                }));
            });
            let (memory, received) = (memory.clone(), self.received.clone());
            match PageReceiver::start(stream, connection, memory, self.offer.compressed, received, sink) {
                Ok(receiver) => self.receivers.push(receiver),
                Err(error) => {
                    let _ = self.inputs.send(Input::Event(Event::PagesFailed(error.to_string())));
                }
            }
        }
    }

    fn connected_if_all(&mut self) {
        if !self.connected && self.control.is_some() && self.streams.len() == usize::from(self.offer.streams) {
            self.connected = true;
            self.feed(Event::Connected);
        }
    }

    /// Announces, the first time at once: until then what is sent to the guest goes to its old host, so no thread is waited for.
    fn announce(&mut self) {
        let Some((plan, announcer)) = self.announcement.take() else { return };
        let Schedule(times) = self.options.announce.clone();
        let began = Instant::now();
        let (now, later): (Vec<_>, Vec<_>) = times.into_iter().partition(Duration::is_zero);
        now.iter().for_each(|_| announce::burst(&plan, &announcer));
        if plan.report.guest {
            announcer.guest_announce();
        }
        self.announcing = thread::Builder::new()
            .name("announce".into())
            .spawn(move || {
                for at in later {
                    thread::sleep(at.saturating_sub(began.elapsed()));
                    announce::burst(&plan, &announcer);
                }
            })
            .inspect_err(|error| tracing::error!(%error, "cannot announce"))
            .ok();
    }

    /// Shows watchers where we are.
    fn show(&mut self) {
        let phase = self.machine.phase();
        if self.unseen.hides(phase) {
            return;
        }
        let (round, elapsed) = (self.machine.rounds() + 1, self.began.elapsed());
        self.handle.update(|progress| {
            if phase != Phase::Done {
                progress.phase = phase;
            }
            progress.round = round;
            progress.pages_done = self.received.load(Ordering::Relaxed);
            progress.pages_total = self.round_pages;
            progress.elapsed = elapsed;
        });
    }

    fn finish(mut self, queue: mpsc::Receiver<Input>) -> Result<Received, ReceiveError> {
        self.stop.store(true, Ordering::Relaxed);
        if self.machine.handoff().state() != DestinationState::Running {
            if let Some(control) = self.control.take() {
                control.finish(LAST_WORDS);
            }
            return Err(match self.machine.into_failure() {
                Some(MigrateError::Refused(refusal)) => ReceiveError::Refused(refusal),
                Some(error) => ReceiveError::GaveUp(error),
                None => ReceiveError::GaveUp(MigrateError::Protocol("COMMIT before PREPARED".into())),
            });
        }
        let announce = self.machine.announce().clone();
        let lost = self.machine.lost();
        // RUNNING is on its way; this process goes on, so nobody has to wait for it to be read. Should that thread fail to
        // start, the source asks.
        let (machine, control, began) = (self.machine, self.control.take(), self.began);
        let released = thread::Builder::new()
            .name("last-words".into())
            .spawn(move || control.is_some_and(|control| last_words(machine, control, &queue, began)))
            .ok();
        match lost {
            Some(error) => Err(ReceiveError::Lost(error)),
            None => Ok(Received { description: self.offer.vm, announce, announcing: self.announcing, released }),
        }
    }
}

/// Lets the source read RUNNING, and hears it out: says whether it will never ask about this attempt.
fn last_words(mut machine: Destination, control: Control, queue: &mpsc::Receiver<Input>, began: Instant) -> bool {
    control.end();
    let until = Instant::now() + RELEASED;
    while let Ok(input) = queue.recv_timeout(until.saturating_duration_since(Instant::now())) {
        let Input::Event(event) = input else { continue };
        let ends = matches!(event, Event::Lost(_));
        let forgets = machine.handle(began.elapsed(), event).contains(&Action::Forget);
        if ends || forgets {
            return forgets;
        }
    }
    false
}
