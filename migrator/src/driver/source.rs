//! The source's driver: does what the source's machine says.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use super::control::{Control, ControlEvent};
use super::send::{PageSenders, SendEvent, Terms};
use super::{Unseen, claim, guarded, journal, request};
use crate::arbiter::Claimant;
use crate::bitmap::Bitmap;
use crate::compress::Compression;
use crate::handle::MigrationHandle;
use crate::handoff::Step;
use crate::id::MigrationId;
use crate::limit::{self, Facts};
use crate::options::Options;
use crate::report::{Phase, Report, RoundReport, chain};
use crate::source::{Action, Event, Saved, Source};
use crate::traits::{Connection, Dialer, GuestPages, Journal, SourceVm, VmDescription, VmError};
use crate::transport::ConnectError;
use crate::wire::MAX_STREAMS;
use crate::wire::preamble::{Preamble, Role};

/// How often watchers see numbers change, and the guest is looked at, at least.
const BEAT: Duration = Duration::from_millis(50);
/// How long the last words on a connection may take to be read.
const LAST_WORDS: Duration = Duration::from_millis(500);

/// What comes in from the threads.
enum Input {
    Event(Event),
    Connected(Result<Connections, ConnectError>),
    /// A wish was made at the handle.
    Wish,
}

struct Connections {
    control: Box<dyn Connection>,
    pages: Vec<Box<dyn Connection>>,
}

/// Moves the VM to the destination that `dial` reaches. Blocks until the migration is settled; whoever wants to watch
/// or stop it holds a clone of `handle`. Writes to `journal` what must survive this process.
///
/// On return with owner `source`, the VM is as it was before (running, unless it was paused or is gone); with owner
/// `destination`, it is paused for good and can be torn down. It does not return while the owner is unknown.
///
/// `id` must be new: an attempt, and each retry, has its own.
pub fn migrate(
    vm: &mut dyn SourceVm,
    id: MigrationId,
    dial: Arc<dyn Dialer>,
    journal: &mut dyn Journal,
    options: &Options,
    handle: &MigrationHandle,
) -> Report {
    let mut options = options.clone();
    options.streams = options.streams.clamp(1, MAX_STREAMS);
    let (inputs, queue) = mpsc::channel();
    let description = vm.description();
    let wishes = inputs.clone();
    handle.on_wish(Some(Box::new(move || {
        let _ = wishes.send(Input::Wish);
    })));
    let mut driver = Driver {
        machine: Source::new(options.clone(), &description, dial.peer()),
        memory: vm.memory(),
        dirty: Bitmap::new(description.ram.pages()),
        description,
        vm,
        id,
        dial,
        journal,
        options,
        handle,
        inputs,
        began: Instant::now(),
        control: None,
        senders: None,
        round_pages: 0,
        finished: false,
        unseen: Unseen::default(),
        gone: false,
    };
    if guarded(|| driver.run(Event::Begin, &queue)).is_err() {
        // The guest may stand still now, and whoever waits for this migration would wait for ever.
        driver.start_over(&queue);
    }
    let report = driver.finish();
    handle.on_wish(None);
    report
}

struct Driver<'a> {
    vm: &'a mut dyn SourceVm,
    id: MigrationId,
    dial: Arc<dyn Dialer>,
    journal: &'a mut dyn Journal,
    options: Options,
    handle: &'a MigrationHandle,
    machine: Source,
    description: VmDescription,
    memory: Arc<dyn GuestPages>,
    /// Pages that were read from the dirty log and not sent since.
    dirty: Bitmap,
    inputs: mpsc::Sender<Input>,
    began: Instant,
    control: Option<Control>,
    senders: Option<PageSenders>,
    round_pages: u64,
    finished: bool,
    gone: bool,
    unseen: Unseen,
}

impl Driver<'_> {
    /// After a panic: nothing that the machine knew counts any more, only what the journal says of this attempt. What panics
    /// again is let through; the process that it ends leaves the same journal.
    fn start_over(&mut self, queue: &mpsc::Receiver<Input>) {
        (self.control, self.senders) = (None, None);
        let last = self.journal.load().map(|records| records.iter().rfind(|r| r.id == self.id).map(|r| r.step));
        // What cannot be read may say Decided.
        let last = last.unwrap_or(Some(Step::Decided));
        tracing::error!(id = %self.id, ?last, "the migration panicked: going on from its journal");
        self.throttle(0);
        let phase = self.machine.phase();
        self.machine = Source::after_panic(self.options.clone(), &self.description, self.dial.peer(), phase, last);
        self.finished = self.machine.handoff().is_settled();
        if !self.finished {
            self.run(Event::Lost("a bug in microvm stopped it".into()), queue);
        }
    }

    fn run(&mut self, first: Event, queue: &mpsc::Receiver<Input>) {
        self.feed(first);
        while !self.finished {
            let now = self.began.elapsed();
            let wait = self.machine.next_tick().map_or(BEAT, |at| at.saturating_sub(now).min(BEAT));
            match queue.recv_timeout(wait) {
                Ok(Input::Event(event)) => self.feed(event),
                Ok(Input::Connected(Ok(connections))) => {
                    let result = self.start_streams(connections);
                    self.feed(Event::Connected(result));
                }
                Ok(Input::Connected(Err(error))) => self.feed(Event::Connected(Err(error))),
                Ok(Input::Wish) => {
                    let (cancel, resolution) = self.handle.take_wishes();
                    if cancel {
                        self.feed(Event::Cancel);
                    }
                    if let Some(resolution) = resolution {
                        self.feed(Event::Resolve(resolution));
                    }
                }
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {}
            }
            self.feed(Event::Tick);
            if !self.gone
                && let Some(why) = self.vm.gone()
            {
                self.gone = true;
                self.feed(Event::GuestGone(why));
            }
            self.show();
        }
    }

    /// Gives the machine an event, and does what it says, until it says no more.
    fn feed(&mut self, event: Event) {
        let mut events = VecDeque::from([event]);
        while let Some(event) = events.pop_front() {
            if let Event::Message(message) = &event {
                tracing::debug!(id = %self.id, message = message.kind().name(), "from the destination");
            }
            for action in self.machine.handle(self.began.elapsed(), event) {
                events.extend(self.act(action));
            }
        }
    }

    fn act(&mut self, action: Action) -> Option<Event> {
        match action {
            Action::Offer => {
                let (dial, offer) = (
                    self.dial.clone(),
                    request::Offer {
                        id: self.id,
                        vm: self.description.clone(),
                        streams: self.options.streams,
                        verify: self.options.verify,
                        compressed: self.options.compression != Compression::None,
                    },
                );
                let limit = self.options.timeouts.request;
                self.spawn(
                    |answer| Input::Event(Event::Offered(answer)),
                    move || request::offer(&*dial, &offer, limit),
                );
            }
            Action::Connect => {
                let (dial, id, streams) = (self.dial.clone(), self.id, self.options.streams);
                self.spawn(Input::Connected, move || connect(&*dial, id, streams));
            }
            Action::Ask => {
                let (dial, id, limit) = (self.dial.clone(), self.id, self.options.timeouts.request);
                let asked = self.began.elapsed();
                self.handle.update(|progress| progress.last_asked = Some(asked));
                self.handle.publish(self.report());
                self.spawn(|answer| Input::Event(Event::Asked(answer)), move || request::ask(&*dial, id, limit));
            }
            Action::Claim => {
                let inputs = self.inputs.clone();
                claim(self.options.arbiter.as_ref(), self.id, Claimant::Source, move |word| {
                    let _ = inputs.send(Input::Event(Event::Claimed(word)));
                });
            }
            Action::StartDirtyLog => return Some(Event::DirtyLogStarted(self.vm.start_dirty_log())),
            Action::CollectDirty => {
                let result = self.vm.collect_dirty(&mut self.dirty);
                return Some(Event::Collected(result.map(|()| self.dirty.count())));
            }
            Action::SendRound { n, all, last } => {
                let pages = self.description.ram.pages();
                let empty = Bitmap::new(pages);
                let dirty = std::mem::replace(&mut self.dirty, empty);
                let dirty = if all { Bitmap::full(pages) } else { dirty };
                self.round_pages = dirty.count();
                if let Some(senders) = &self.senders {
                    let courteous = !last && self.machine.precopy().has_time(dirty.count());
                    senders.send(Terms { round: n, rearm: !last, courteous }, dirty);
                }
            }
            Action::Throttle(permille) => return self.throttle(permille),
            Action::Pause => return Some(Event::Paused(self.vm.pause())),
            Action::Save => return Some(Event::Saved(self.save())),
            Action::Send(message) => {
                if let Some(control) = &self.control {
                    control.send(&message);
                }
            }
            Action::Journal(step) => {
                let mut result = journal(self.journal, self.id, step, &self.description.name, &self.dial.peer());
                if step == Step::Sending && result.is_ok() {
                    result = self.journal.measure().map(|time| self.machine.journal_takes(time));
                }
                return Some(Event::Journaled(step, result));
            }
            Action::Resume => return Some(Event::Resumed(self.vm.resume())),
            Action::CloseStreams => {
                if let Some(senders) = &mut self.senders {
                    senders.close();
                }
            }
            Action::StopDirtyLog => self.vm.stop_dirty_log(),
            Action::Finish => self.finished = true,
        }
        None
    }

    fn throttle(&mut self, permille: u16) -> Option<Event> {
        match self.vm.throttle(permille) {
            Err(error) if permille > 0 => Some(Event::NotThrottled(error)),
            Err(error) => {
                // It runs no more, or is gone.
                tracing::debug!(error = chain(&*error), "the throttle is not taken off");
                None
            }
            Ok(()) => None,
        }
    }

    fn save(&mut self) -> Result<Saved, VmError> {
        let sections = self.vm.save_state()?;
        let mut saved = Saved { sections, ..Saved::default() };
        if self.options.verify {
            let began = Instant::now();
            saved.ram_hash = Some(self.memory.hash()?);
            saved.hashing = began.elapsed();
        }
        Ok(saved)
    }

    fn start_streams(&mut self, connections: Connections) -> Result<(), ConnectError> {
        let broken = |source| ConnectError::Broken { peer: self.dial.peer(), source };
        let inputs = self.inputs.clone();
        let control = Control::start(
            connections.control,
            self.options.timeouts,
            Arc::new(move |event| {
                let _ = inputs.send(Input::Event(match event {
                    ControlEvent::Message(message) => Event::Message(message),
                    ControlEvent::RoundTrip(rtt) => Event::RoundTrip(rtt),
                    ControlEvent::Lost(why) => Event::Lost(why),
                }));
            }),
        );
        self.control = Some(control.map_err(broken)?);
        let inputs = self.inputs.clone();
        let senders = PageSenders::start(
            connections.pages,
            &self.memory,
            self.options.compression,
            self.options.bandwidth,
            self.options.timeouts.page_stall,
            &(Arc::new(move |event| {
                let _ = inputs.send(Input::Event(match event {
                    SendEvent::Sent(marker) => Event::RoundSent(marker),
                    SendEvent::Failed(why) => Event::PagesFailed(why),
                }));
            }) as super::send::Sink),
        );
        self.senders = Some(senders.map_err(broken)?);
        Ok(())
    }

    /// Runs what may block in a thread of its own. If nobody waits for the result any more, it is dropped.
    fn spawn<T: 'static>(
        &self,
        input: fn(Result<T, ConnectError>) -> Input,
        work: impl FnOnce() -> Result<T, ConnectError> + Send + 'static,
    ) {
        let (inputs, peer) = (self.inputs.clone(), self.dial.peer());
        let spawned = thread::Builder::new().name("migrate-dial".into()).spawn(move || {
            let result = guarded(work);
            let _ = inputs.send(input(result.unwrap_or_else(|source| Err(ConnectError::Broken { peer, source }))));
        });
        if let Err(source) = spawned {
            let _ = self.inputs.send(input(Err(ConnectError::Broken { peer: self.dial.peer(), source })));
        }
    }

    /// Shows watchers where we are.
    fn show(&mut self) {
        let (phase, precopy) = (self.machine.phase(), self.machine.precopy());
        if self.unseen.hides(phase) {
            return;
        }
        let known = |value: u64| (value > 0).then_some(value);
        let sending = self.senders.as_ref().map(|senders| senders.sending.clone()).unwrap_or_default();
        let done = sending.pages.load(Ordering::Relaxed).min(self.round_pages);
        let ((in_doubt_since, last_answer), given_away) = (self.machine.doubt(), self.machine.given_away());
        let left = self.round_pages - done;
        let eta = precopy.predict(left).map(|time| time.saturating_sub(precopy.costs.total()));
        let predicted = precopy.predict(left);
        let (bandwidth, dirty_rate) = (known(precopy.bandwidth()), known(precopy.dirty_rate()));
        let compression = sending.compression(self.options.compression);
        let throttle = precopy.throttle();
        let (round, elapsed) = (self.machine.round_number(), self.began.elapsed());
        self.handle.update(|progress| {
            // Done it is when the report is there, and not before.
            if phase != Phase::Done {
                progress.phase = phase;
            }
            progress.round = round;
            progress.pages_done = done;
            progress.pages_total = self.round_pages;
            progress.bytes_sent = sending.bytes.load(Ordering::Relaxed);
            progress.compression = compression;
            progress.dirty_rate = dirty_rate;
            progress.bandwidth = bandwidth;
            progress.throttle_permille = if phase <= Phase::PreCopy { throttle } else { 0 };
            progress.eta = eta;
            progress.predicted_blackout = predicted;
            progress.elapsed = elapsed;
            progress.in_doubt_since = in_doubt_since;
            progress.last_answer = last_answer;
            progress.given_away = given_away;
        });
    }

    /// The machine's report, with what only the streams know.
    fn report(&self) -> Report {
        let mut report = self.machine.report();
        if let Some(senders) = &self.senders {
            let compression = senders.sending.compression(self.options.compression);
            let pages = |rounds: &[RoundReport]| rounds.iter().map(|round| round.pages).sum();
            report.limit = limit::judge(&Facts {
                options: &self.options,
                total: self.began.elapsed(),
                spent: senders.sending.spent(),
                bytes_sent: report.bytes_sent,
                pages: pages(&report.rounds),
                pages_again: pages(report.rounds.get(1..).unwrap_or_default()),
                page_rate: self.machine.precopy().bandwidth(),
                dirty_rate: self.machine.precopy().dirty_rate(),
                compressed: compression.level.is_some(),
            });
            report.compression = Some(compression);
        }
        report
    }

    fn finish(mut self) -> Report {
        if let Some(control) = self.control.take() {
            control.finish(LAST_WORDS);
        }
        let report = self.report();
        self.handle.publish(report.clone());
        self.handle.update(|progress| progress.phase = Phase::Done);
        report
    }
}

fn connect(dial: &dyn Dialer, id: MigrationId, streams: u16) -> Result<Connections, ConnectError> {
    let control = dial.dial(&Preamble { role: Role::Control, stream: 0, id })?;
    let pages =
        (0..streams).map(|stream| dial.dial(&Preamble { role: Role::Pages, stream, id })).collect::<Result<_, _>>()?;
    Ok(Connections { control, pages })
}
