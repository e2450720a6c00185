//! The source's host: the machine that ships, a driver without threads, and a VM that is words.

use std::time::Duration;

use migrator::bitmap::Bitmap;
use migrator::driver::request::Offer;
use migrator::handle::Resolution;
use migrator::handoff::{Step, unsettled};
use migrator::pages::{Chunk, Marker, PageFrame};
use migrator::source::{Action, Event as Input, Saved, Source};
use migrator::traits::{Section, VmDescription, VmError};
use migrator::wire::message::AskAnswer;
use migrator::wire::preamble::{HEAD_BYTES, Welcome, body_length};
use migrator::wire::{Header, Message, decode, frame};
use migrator::{Options, Phase, Report};

use crate::disk::Disk;
use crate::faults::What;
use crate::link::{HERE, Purpose};
use crate::memory::{Memory, write_page};
use crate::play::{Event, World, seconds};
use crate::world::Guest;

/// The state that is moved besides memory.
pub const STATE: &[u8] = b"the state of vCPUs and devices";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Process {
    Up,
    Down,
    /// Its host came back and asks, if it must.
    Back {
        asks: bool,
    },
}

pub struct Here {
    pub source: Source,
    pub process: Process,
    /// Counts processes: what was under way in an earlier one is dropped.
    pub life: u32,
    pub memory: Memory,
    pub disk: Disk,
    /// Records that are being written, in order.
    pub writing: Vec<Step>,
    /// The call that fails next.
    pub fails: Option<&'static str>,
    pub not_resumed: bool,
    pub report: Option<Report>,
    pub was_in_doubt: bool,
    pub discarded: bool,
    pub asked_after_restart: bool,
    /// A restarted source has its guest started anew.
    pub started_anew: bool,
    pub tick_at: Option<u64>,
    /// Memory as it was when the guest was paused.
    pub image: Option<Vec<u64>>,
    streams: u16,
    verify: bool,
    dirty: Bitmap,
    round: Bitmap,
    /// Pages of this round were armed at its beginning.
    ahead: bool,
    /// Pages of the first round that were left for the second.
    pub left: u64,
    sent: Vec<Marker>,
    control: Option<usize>,
    pages: Vec<usize>,
    asking: Option<usize>,
    /// All connections are there: control is read from now on.
    connected: bool,
}

impl Here {
    pub fn new(options: Options, memory: Memory) -> Self {
        let description = description(&memory);
        let pages = memory.layout.pages();
        Self {
            streams: options.streams,
            verify: options.verify,
            source: Source::new(options, &description, "there:7437".into()),
            process: Process::Up,
            life: 0,
            memory,
            disk: Disk::default(),
            writing: vec![],
            fails: None,
            not_resumed: false,
            report: None,
            was_in_doubt: false,
            discarded: false,
            asked_after_restart: false,
            started_anew: false,
            tick_at: None,
            image: None,
            dirty: Bitmap::new(pages),
            round: Bitmap::new(pages),
            ahead: false,
            left: 0,
            sent: vec![],
            control: None,
            pages: vec![],
            asking: None,
            connected: false,
        }
    }

    pub fn is_up(&self) -> bool {
        self.process == Process::Up
    }

    /// Whether the guest runs here.
    pub fn runs(&self) -> bool {
        match self.process {
            Process::Up => !self.memory.paused,
            Process::Down => false,
            Process::Back { .. } => self.started_anew,
        }
    }

    pub fn is_over(&self) -> bool {
        match self.process {
            Process::Up => self.report.is_some() && self.writing.is_empty(),
            Process::Down => false,
            Process::Back { asks } => !asks,
        }
    }

    fn call(&mut self, step: &'static str) -> Result<(), VmError> {
        match self.fails.take_if(|fails| *fails == step) {
            Some(_) => Err("injected".into()),
            None => Ok(()),
        }
    }
}

fn description(memory: &Memory) -> VmDescription {
    VmDescription {
        name: "vm".into(),
        ram: memory.layout.clone(),
        paused: false,
        facts: serde_json::json!({"cpus": 2}),
    }
}

impl World {
    pub fn source(&mut self, event: Input) {
        if !self.here.is_up() {
            return;
        }
        self.tell(|| format!("source: {}", brief(&event)));
        let actions = self.here.source.handle(Duration::from_micros(self.now), event);
        self.here.was_in_doubt |= self.here.source.phase() == Phase::InDoubt;
        for action in actions {
            self.source_does(action);
        }
        if let Some(report) = &mut self.here.report {
            *report = self.here.source.report();
        }
        if let Some(next) = self.here.source.next_tick() {
            let next = (next.as_micros() as u64).max(self.now + 1);
            if self.here.tick_at.is_none_or(|at| next < at) {
                self.here.tick_at = Some(next);
                self.at(next, Event::Tick { end: HERE });
            }
        }
    }

    fn source_does(&mut self, action: Action) {
        match action {
            Action::Offer => {
                self.open(Purpose::Offer);
            }
            Action::Connect => {
                self.open(Purpose::Control);
            }
            Action::Ask => {
                let connection = self.open(Purpose::Ask);
                self.here.asking = Some(connection);
            }
            Action::Claim => self.claim(migrator::arbiter::Claimant::Source),
            Action::StartDirtyLog => {
                let result = self.here.call("log");
                self.here.memory.start_log();
                self.later(Input::DirtyLogStarted(result));
            }
            Action::CollectDirty => {
                let result = self.here.call("collect").map(|()| {
                    self.here.memory.collect(&mut self.here.dirty);
                    self.here.dirty.count()
                });
                self.later(Input::Collected(result));
            }
            Action::SendRound { n, all, last } => {
                let pages = self.here.memory.layout.pages();
                let dirty = std::mem::replace(&mut self.here.dirty, Bitmap::new(pages));
                self.here.round = if all { Bitmap::full(pages) } else { dirty };
                self.here.sent = vec![Marker { round: n, ..Marker::default() }; self.here.streams.into()];
                // Some senders arm all of memory first, and leave what was written since.
                self.here.ahead = n == 1 && !last && self.random.chance(50);
                if self.here.ahead {
                    for chunk in 0..self.here.memory.layout.chunks() {
                        self.here.memory.rearm(chunk, &self.here.round.chunk(chunk));
                    }
                }
                self.after(1, Event::SendPart { n, chunk: 0, last });
            }
            Action::Throttle(permille) => {
                assert!(permille == 0 || !self.here.memory.paused, "a paused guest is not slowed down");
                self.here.memory.throttle = permille;
                if let Err(error) = self.here.call("throttle") {
                    self.later(Input::NotThrottled(error));
                }
            }
            Action::Pause => {
                let result = self.here.call("pause");
                if result.is_ok() {
                    self.here.memory.paused = true;
                    self.here.image = Some(self.here.memory.words.clone());
                }
                self.later(Input::Paused(result));
            }
            Action::Save => {
                let result = self.here.call("save").map(|()| Saved {
                    sections: vec![Section { kind: 1, instance: 0, version: 1, bytes: STATE.to_vec() }],
                    ram_hash: self.here.verify.then(|| self.here.memory.hash()),
                    hashing: Duration::ZERO,
                });
                self.later(Input::Saved(result));
            }
            Action::Send(message) => {
                if let Some(control) = self.here.control {
                    self.send(control, HERE, &message);
                }
            }
            Action::Journal(step) => {
                self.here.writing.push(step);
                let delay = 1 + self.random.below(600);
                let process = self.here.life;
                self.after(delay, Event::Write { end: HERE, step, process });
            }
            Action::Resume => {
                let result = self.here.call("resume");
                self.here.not_resumed = result.is_err();
                if result.is_ok() {
                    self.here.memory.paused = false;
                    self.after(1, Event::Guest);
                }
                self.later(Input::Resumed(result));
            }
            Action::CloseStreams => {
                for connection in std::mem::take(&mut self.here.pages) {
                    self.close(connection, HERE);
                }
            }
            Action::StopDirtyLog => self.here.memory.stop_log(),
            Action::Finish => {
                self.here.report = Some(self.here.source.report());
                // After its last words, and those of others.
                for connection in 0..self.connections.len() {
                    self.after(2000, Event::Hang { connection, end: HERE });
                }
            }
        }
    }

    fn later(&mut self, event: Input) {
        let delay = 1 + self.random.below(300);
        self.after(delay, Event::Source(event));
    }

    pub fn claim(&mut self, by: migrator::arbiter::Claimant) {
        let delay = 1 + self.random.below(3000);
        self.after(delay, Event::Claim(by));
    }

    /// A record is written, or the disk is full.
    pub fn writes(&mut self, end: usize, step: Step, process: u32) {
        let (id, here) = (self.id, end == HERE);
        let (writing, disk, life) = match here {
            true => (&mut self.here.writing, &mut self.here.disk, self.here.life),
            false => (&mut self.there.writing, &mut self.there.disk, self.there.life),
        };
        if process != life {
            return;
        }
        let at = writing.iter().position(|waits| *waits == step).expect("it is being written");
        if at > 0 {
            // One after the other.
            return self.after(50, Event::Write { end, step, process });
        }
        writing.remove(0);
        let result = disk.append(id, step);
        self.tell(|| format!("end {end} writes {step:?}: {result:?}"));
        match here {
            true => self.source(Input::Journaled(step, result)),
            false => {
                self.destination(migrator::destination::Event::Journaled(step, result));
                self.forget();
            }
        }
    }

    /// Sends part of a chunk, as a sender thread does, and the markers after the last.
    pub fn send_part(&mut self, n: u32, chunk: u64, last: bool) {
        if !self.here.is_up() || self.here.pages.is_empty() {
            return;
        }
        if chunk == self.here.memory.layout.chunks() {
            let mut sum = Marker { round: n, ..Marker::default() };
            for (stream, marker) in self.here.sent.clone().into_iter().enumerate() {
                sum.chunks += marker.chunks;
                sum.data_pages += marker.data_pages;
                sum.zero_pages += marker.zero_pages;
                let connection = self.here.pages[stream];
                self.write(connection, HERE, What::Marker, PageFrame::Marker(marker).encode().to_vec());
                if !self.connections[connection].ends[HERE].writes {
                    return self.source(Input::PagesFailed("broken pipe".into()));
                }
            }
            return self.source(Input::RoundSent(sum));
        }
        let mut wanted = self.here.round.chunk(chunk);
        if self.here.ahead {
            let left = wanted.and(&self.here.memory.written(chunk));
            self.here.left += left.count();
            self.coverage.left += left.count();
            wanted = wanted.minus(&left);
        }
        if !wanted.is_empty() {
            if !last && !self.here.ahead {
                self.here.memory.rearm(chunk, &wanted);
            }
            let zero = self.here.memory.find_zero(chunk, &wanted);
            // Between the look and the read the guest goes on.
            if self.random.chance(30) {
                self.here.memory.guest_writes(&mut self.random);
            }
            let frame = Chunk { round: n, chunk, data: wanted.minus(&zero), zero, packed: 0 };
            let stream = self.random.below(self.here.streams.into()) as usize;
            self.here.sent[stream].add(&frame);
            let mut pages = Vec::new();
            for run in frame.data_runs() {
                for page in run.first..run.first + run.pages {
                    write_page(self.here.memory.words[page as usize], &mut pages);
                }
            }
            let connection = self.here.pages[stream];
            self.write(connection, HERE, What::Chunk, PageFrame::Chunk(frame).encode().to_vec());
            if !pages.is_empty() {
                self.write(connection, HERE, What::Pages, pages);
            }
            if !self.connections[connection].ends[HERE].writes {
                return self.source(Input::PagesFailed("broken pipe".into()));
            }
        }
        let delay = 1 + self.random.below(400);
        self.after(delay, Event::SendPart { n, chunk: chunk + 1, last });
    }

    pub fn guest(&mut self) {
        if !self.here.is_up() || self.here.memory.paused {
            return;
        }
        let (most, runs) = (if self.setting.busy { 1000 } else { 3 }, 1000 - u64::from(self.here.memory.throttle));
        for _ in 0..self.random.below(most) * runs / 1000 {
            self.here.memory.guest_writes(&mut self.random);
        }
        // Most of a long time is waiting.
        let slow = if self.now > seconds(1) { 300 } else { 1 };
        let delay = (1 + self.random.below(2000)) * slow;
        self.after(delay, Event::Guest);
    }

    /// Bytes came for the source.
    pub fn read_here(&mut self, connection: usize) {
        let purpose = self.connections[connection].purpose;
        if !self.connections[connection].ends[HERE].greeted {
            let Some(head) = self.peek(connection, HERE, HEAD_BYTES) else { return };
            let length = body_length(head.try_into().expect("so many bytes"));
            let Ok(length) = length else { return self.over_here(connection, "no microvm") };
            let Some(bytes) = self.take(connection, HERE, HEAD_BYTES + length) else { return };
            match Welcome::decode(&bytes[HEAD_BYTES..]) {
                Ok(Welcome::Accepted) => {}
                Ok(Welcome::Refused(reason)) => return self.over_here(connection, &reason),
                Err(error) => return self.over_here(connection, &error.to_string()),
            }
            self.connections[connection].ends[HERE].greeted = true;
            let limit = self.timeouts.request.as_micros() as u64;
            match purpose {
                Purpose::Offer => {
                    let (vm, verify) = (description(&self.here.memory), self.here.verify);
                    let offer = Offer { id: self.id, vm, streams: self.here.streams, verify, compressed: false };
                    self.send(connection, HERE, &Message::Offer(offer));
                    self.after(limit, Event::DialLimit { connection, greeted: true });
                }
                Purpose::Ask | Purpose::Stray => {
                    self.send(connection, HERE, &Message::Ask(self.id));
                    self.after(limit, Event::DialLimit { connection, greeted: true });
                }
                Purpose::Control | Purpose::Pages(_) => self.dialled(connection),
            }
        }
        while self.connections[connection].ends[HERE].reads
            && (purpose != Purpose::Control || self.here.connected)
            && let Some(message) = self.message(connection, HERE)
        {
            match (purpose, message) {
                (_, Err(error)) => return self.over_here(connection, &error),
                (Purpose::Control, Ok(Message::Ping(token))) => self.send(connection, HERE, &Message::Pong(token)),
                (Purpose::Control, Ok(Message::Pong(token))) => {
                    let rtt = Duration::from_micros(self.now.saturating_sub(token));
                    self.source(Input::RoundTrip(rtt));
                }
                (Purpose::Control, Ok(message)) => self.source(Input::Message(message)),
                (Purpose::Offer, Ok(Message::Accepted)) => {
                    self.close(connection, HERE);
                    self.source(Input::Offered(Ok(Ok(()))));
                }
                (Purpose::Offer, Ok(Message::Refused(refusal))) => {
                    self.close(connection, HERE);
                    self.source(Input::Offered(Ok(Err(refusal))));
                }
                (Purpose::Ask, Ok(Message::Answer(answer))) => {
                    self.close(connection, HERE);
                    self.told(answer);
                }
                (Purpose::Stray, Ok(_)) => self.close(connection, HERE),
                (_, Ok(_)) => return self.over_here(connection, "that was not to be said here"),
            }
        }
    }

    /// The next message, if it has come whole.
    pub fn message(&mut self, connection: usize, end: usize) -> Option<Result<Message, String>> {
        let head = self.peek(connection, end, frame::HEADER_BYTES)?;
        let header = match Header::decode(head.try_into().expect("so many bytes")) {
            Ok(header) => header,
            Err(error) => return Some(Err(error.to_string())),
        };
        let bytes = self.take(connection, end, frame::HEADER_BYTES + header.length())?;
        Some(decode(&header, &bytes[frame::HEADER_BYTES..]).map_err(|error| error.to_string()))
    }

    /// A connection of the migration is there: the next one is dialled.
    fn dialled(&mut self, connection: usize) {
        if !self.here.is_up() || self.here.report.is_some() {
            return self.close(connection, HERE);
        }
        match self.connections[connection].purpose {
            Purpose::Control => self.here.control = Some(connection),
            _ => self.here.pages.push(connection),
        }
        let have = self.here.pages.len() as u16;
        if have < self.here.streams {
            self.open(Purpose::Pages(have));
            return;
        }
        let control = self.here.control.expect("it was dialled first");
        self.keep_alive(control, HERE);
        self.here.connected = true;
        self.source(Input::Connected(Ok(())));
        // What came already.
        self.read_here(control);
    }

    /// A connection of the source is over.
    pub fn over_here(&mut self, connection: usize, why: &str) {
        let dialling = !self.here.connected;
        self.close(connection, HERE);
        match self.connections[connection].purpose {
            Purpose::Offer => self.source(Input::Offered(Err(self.no_connection()))),
            Purpose::Ask if self.here.asking == Some(connection) => {
                if self.here.is_up() {
                    self.source(Input::Asked(Err(self.no_connection())));
                } else {
                    self.after(seconds(1), Event::AskAgain);
                }
            }
            Purpose::Control | Purpose::Pages(_) if dialling => {
                self.source(Input::Connected(Err(self.no_connection())));
            }
            Purpose::Control => self.source(Input::Lost(why.into())),
            Purpose::Pages(_) => self.source(Input::PagesFailed(why.into())),
            Purpose::Ask | Purpose::Stray => {}
        }
    }

    /// The agent has answered.
    fn told(&mut self, answer: AskAnswer) {
        if self.here.is_up() {
            // An answer may come twice, the second time late.
            if self.random.chance(20) {
                let delay = self.random.below(seconds(3));
                self.after(delay, Event::Source(Input::Asked(Ok(answer))));
            }
            return self.source(Input::Asked(Ok(answer)));
        }
        if self.here.process != (Process::Back { asks: true }) {
            return;
        }
        let step = match answer {
            AskAnswer::Running => Step::Released,
            AskAnswer::GaveUp => Step::Kept,
            AskAnswer::Pending => return self.after(seconds(1), Event::AskAgain),
        };
        if self.here.disk.append(self.id, step).is_err() {
            return self.after(seconds(1), Event::AskAgain);
        }
        self.here.process = Process::Back { asks: false };
        self.here.started_anew = step == Step::Kept;
    }

    pub fn source_dies(&mut self, with_power: bool) {
        if !self.here.is_up() {
            return;
        }
        self.tell(|| format!("the source dies, {:?}", self.here.source.handoff()));
        (self.here.process, self.here.life) = (Process::Down, self.here.life + 1);
        if let Some(step) = self.here.writing.first() {
            self.here.disk.interrupt(self.id, *step, &mut self.random);
        }
        self.here.writing.clear();
        if with_power {
            self.here.disk.lose_power(&mut self.random);
            self.silence_all(HERE);
        } else {
            self.close_all(HERE);
        }
        let delay = 300_000 + self.random.below(seconds(10));
        self.after(delay, Event::Restart);
    }

    /// The source's host is back, and reads the journal.
    pub fn restart(&mut self) {
        let records = self.here.disk.records();
        let asks = unsettled(&records).is_some();
        self.here.process = Process::Back { asks };
        self.here.asked_after_restart = asks;
        self.here.started_anew = !asks && records.iter().all(|record| record.step != Step::Released);
        self.tell(|| format!("the source is back: {:?}", self.here.process));
        if asks {
            self.ask_again();
        }
    }

    pub fn ask_again(&mut self) {
        if self.here.process == (Process::Back { asks: true }) {
            let connection = self.open(Purpose::Ask);
            self.here.asking = Some(connection);
        }
    }

    /// A human settles what nobody else will: one who has looked at the destination.
    pub fn resolve(&mut self) {
        if self.here.is_over() {
            return;
        }
        self.after(seconds(50), Event::Human);
        let gone = self.there.process_is_gone();
        let ran = self.there.guest != Guest::NeverRan;
        let resolution = match () {
            () if ran => Resolution::Discard,
            // `--keep` is refused then. The guest may never have run there; who won it is gone for good all the same.
            () if gone && self.here.source.given_away() => Resolution::Discard,
            () if gone => Resolution::Keep,
            () => return,
        };
        self.tell(|| format!("a human says {resolution:?}"));
        match self.here.process {
            Process::Up if self.here.source.phase() == Phase::InDoubt => {
                self.here.discarded = resolution == Resolution::Discard;
                self.source(Input::Resolve(resolution));
            }
            // `rm --force`, and whatever is right then.
            Process::Back { asks: true } if self.there.host_gone => {
                let kept = resolution == Resolution::Keep;
                let step = if kept { Step::Kept } else { Step::Released };
                if self.here.disk.append(self.id, step).is_ok() {
                    self.here.process = Process::Back { asks: false };
                    self.here.started_anew = kept;
                    self.coverage.outcome("  of these settled by hand after a restart");
                }
            }
            _ => {}
        }
    }
}

fn brief(event: &Input) -> String {
    let text = format!("{event:?}");
    text.chars().take(160).collect()
}
