//! The destination's host: an agent, and the receiving process with the machine that ships.

use std::time::Duration;

use migrator::destination::{Action, Destination, Event as Input, Loaded};
use migrator::driver::request::Offer;
use migrator::error::MigrateError;
use migrator::handoff::{Answer, DestinationState, Step, answer};
use migrator::layout::PAGE_SIZE;
use migrator::pages::{FRAME_BYTES, Marker, PageFrame};
use migrator::traits::{Refusal, StartError};
use migrator::wire::Message;
use migrator::wire::message::AskAnswer;
use migrator::wire::preamble::{HEAD_BYTES, Preamble, Role, Welcome, body_length};

use crate::disk::Disk;
use crate::faults::What;
use crate::link::THERE;
use crate::memory::{Memory, read_page};
use crate::play::{Event, World};
use crate::source_host::STATE;
use crate::world::Guest;

pub struct There {
    machine: Option<Destination>,
    alive: bool,
    /// The receiving process has ended its part: it lets go of its journal.
    finished: bool,
    pub life: u32,
    pub host_gone: bool,
    pub memory: Option<Memory>,
    pub disk: Disk,
    pub writing: Vec<Step>,
    pub starting: bool,
    pub fails: Option<&'static str>,
    /// How far the VM is: built, loaded, started.
    pub vm_steps: usize,
    pub guest: Guest,
    pub discarded: bool,
    /// RELEASED came.
    may_forget: bool,
    pub forgotten: bool,
    /// It died with COMMIT on record, or all but.
    pub died_as_owner: bool,
    pub tick_at: Option<u64>,
    offer: Option<Offer>,
    control: Option<usize>,
    /// Connections of page streams, in order of arrival, each with what came of the round.
    pages: Vec<(u16, usize, Marker)>,
    connected: bool,
    streams: u16,
}

impl There {
    pub fn new(streams: u16) -> Self {
        Self {
            machine: None,
            alive: false,
            finished: false,
            life: 0,
            host_gone: false,
            memory: None,
            disk: Disk::default(),
            writing: vec![],
            starting: false,
            fails: None,
            vm_steps: 0,
            guest: Guest::NeverRan,
            discarded: false,
            may_forget: false,
            forgotten: false,
            died_as_owner: false,
            tick_at: None,
            offer: None,
            control: None,
            pages: vec![],
            connected: false,
            streams,
        }
    }

    pub fn state(&self) -> Option<DestinationState> {
        self.machine.as_ref().filter(|_| self.alive).map(|machine| machine.handoff().state())
    }

    pub fn is_over(&self) -> bool {
        !self.alive || self.finished && self.writing.is_empty()
    }

    pub fn process_is_gone(&self) -> bool {
        self.machine.is_some() && !self.alive
    }

    fn call(&mut self, step: &'static str) -> Result<(), migrator::traits::VmError> {
        match self.fails.take_if(|fails| *fails == step) {
            Some(_) => Err("injected".into()),
            None => Ok(()),
        }
    }

    /// Whether a process holds the journal.
    fn holds_journal(&self) -> bool {
        self.alive && !self.forgotten && !(self.finished && self.writing.is_empty())
    }
}

impl World {
    pub fn destination(&mut self, event: Input) {
        let now = Duration::from_micros(self.now);
        if !self.there.alive {
            return;
        }
        self.tell(|| format!("destination: {}", format!("{event:?}").chars().take(160).collect::<String>()));
        self.there.starting &= !matches!(event, Input::Started(_));
        let Some(machine) = &mut self.there.machine else { return };
        for action in machine.handle(now, event) {
            self.destination_does(action);
        }
        if let Some(next) = self.there.machine.as_ref().and_then(Destination::next_tick) {
            let next = (next.as_micros() as u64).max(self.now + 1);
            if self.there.tick_at.is_none_or(|at| next < at) {
                self.there.tick_at = Some(next);
                self.at(next, Event::Tick { end: THERE });
            }
        }
    }

    fn destination_does(&mut self, action: Action) {
        let event = match action {
            Action::Journal(step) => {
                self.there.writing.push(step);
                let delay = 1 + self.random.below(600);
                let process = self.there.life;
                return self.after(delay, Event::Write { end: THERE, step, process });
            }
            Action::Build => {
                let refusal = |_| Refusal { reason: "it does not fit".into(), mismatches: vec![] };
                let built = self.there.call("prepare").map_err(refusal);
                self.there.vm_steps = 1;
                if built.is_ok() {
                    let offer = self.there.offer.as_ref().expect("an offer came");
                    let mut memory = Memory::empty(offer.vm.ram.clone(), true);
                    memory.paused = true;
                    self.there.memory = Some(memory);
                    for at in 0..self.there.pages.len() {
                        self.read_pages(at);
                    }
                }
                Input::Built(built.map(|()| Duration::from_millis(1)))
            }
            Action::Send(message) => {
                if let Some(control) = self.there.control {
                    self.send(control, THERE, &message);
                }
                return;
            }
            Action::Load { sections, ram_hash } => {
                assert!(sections.len() == 1 && sections[0].bytes == STATE, "the state differs");
                let here = self.there.memory.as_ref().expect("it was built").hash();
                self.there.vm_steps = 2;
                Input::Loaded(match ram_hash {
                    Some(there) if there != here => {
                        assert!(self.flipped_page, "memory differs");
                        self.coverage.outcome("  a flipped page was found by --verify");
                        Err(MigrateError::Differs { here, there })
                    }
                    _ => self
                        .there
                        .call("load")
                        .map(|()| Loaded::default())
                        .map_err(|source| MigrateError::Vm { what: "load its state", source }),
                })
            }
            Action::Claim => return self.claim(migrator::arbiter::Claimant::Destination),
            Action::Start => {
                self.there.starting = true;
                Input::Started(self.start())
            }
            Action::Discard => {
                assert!(!self.there.discarded && self.there.guest == Guest::NeverRan);
                self.there.discarded = true;
                self.there.memory = None;
                return;
            }
            Action::Forget => {
                self.there.may_forget = true;
                return self.forget();
            }
            Action::CloseStreams => {
                for (_, connection, _) in std::mem::take(&mut self.there.pages) {
                    self.close(connection, THERE);
                }
                return;
            }
            Action::Announce => return,
            Action::Finish => {
                self.there.finished = true;
                if let Some(connection) = self.there.control {
                    self.half_close(connection, THERE);
                    let runs = self.there.guest != Guest::NeverRan;
                    let patience = if runs { 10_000_000 } else { 1_000_000 };
                    self.after(patience, Event::Hang { connection, end: THERE });
                }
                return;
            }
        };
        let delay = 1 + self.random.below(400);
        self.after(delay, Event::Destination(event));
    }

    /// Removes the journal once the last record is written.
    pub fn forget(&mut self) {
        if self.there.may_forget && self.there.writing.is_empty() && !self.there.forgotten {
            self.coverage.outcome("  journals removed after RELEASED");
            self.there.forgotten = true;
            self.there.disk.remove();
        }
    }

    fn start(&mut self) -> Result<Option<Duration>, StartError> {
        let failed = |may_have_run| Err(StartError { may_have_run, source: "injected".into() });
        self.there.vm_steps = 3;
        if self.there.call("start").is_err() {
            return failed(false);
        }
        let memory = self.there.memory.as_mut().expect("it was built");
        let same = self.here.image.as_ref() == Some(&memory.words);
        assert!(same || self.flipped_page && !self.setting.verify, "memory differs");
        if !same {
            self.coverage.unseen_flips += 1;
        }
        if self.there.call("start-late").is_err() {
            self.there.guest = Guest::Ran;
            return failed(true);
        }
        self.there.guest = Guest::Runs;
        Ok(Some(Duration::from_micros(self.now)))
    }

    /// Bytes came for the destination's host.
    pub fn read_there(&mut self, connection: usize) {
        if !self.connections[connection].ends[THERE].greeted {
            let Some(head) = self.peek(connection, THERE, HEAD_BYTES) else { return };
            let length = body_length(head.try_into().expect("so many bytes"));
            let Ok(length) = length else { return self.close(connection, THERE) };
            let Some(bytes) = self.take(connection, THERE, HEAD_BYTES + length) else { return };
            let preamble = match Preamble::decode(&bytes[HEAD_BYTES..]) {
                Ok((preamble, false)) => preamble,
                Ok(_) => return self.refuse(connection, "this agent speaks in clear text"),
                Err(error) => return self.refuse(connection, &error.to_string()),
            };
            let end = &mut self.connections[connection].ends[THERE];
            (end.greeted, end.role) = (true, Some((preamble.role, preamble.stream)));
            let waits = self.there.alive && !self.there.finished && preamble.id == self.id;
            if preamble.role != Role::Request && !waits {
                return self.refuse(connection, "unknown migration");
            }
            self.write(connection, THERE, What::Welcome, Welcome::Accepted.encode());
            if preamble.role != Role::Request {
                self.arrives(connection, preamble);
            }
        }
        match self.connections[connection].ends[THERE].role {
            Some((Role::Request, _)) => self.read_request(connection),
            Some((Role::Control, _)) => self.read_control(connection),
            Some((Role::Pages, _)) => {
                if let Some(at) = self.there.pages.iter().position(|(_, of, _)| *of == connection) {
                    self.read_pages(at);
                }
            }
            None => {}
        }
    }

    fn refuse(&mut self, connection: usize, reason: &str) {
        self.write(connection, THERE, What::Welcome, Welcome::Refused(reason.into()).encode());
        self.close(connection, THERE);
    }

    /// A connection is handed over to the receiving process. The first of each kind counts.
    fn arrives(&mut self, connection: usize, preamble: Preamble) {
        let known = |(stream, ..): &(u16, usize, Marker)| *stream == preamble.stream;
        match preamble.role {
            Role::Control if self.there.control.is_none() => {
                self.there.control = Some(connection);
                self.keep_alive(connection, THERE);
            }
            Role::Pages if preamble.stream < self.there.streams && !self.there.pages.iter().any(known) => {
                let first = Marker { round: 1, ..Marker::default() };
                self.there.pages.push((preamble.stream, connection, first));
            }
            _ => return self.close(connection, THERE),
        }
        let all = self.there.control.is_some() && self.there.pages.len() == usize::from(self.there.streams);
        if all && !std::mem::replace(&mut self.there.connected, true) {
            self.destination(Input::Connected);
        }
    }

    fn read_request(&mut self, connection: usize) {
        while self.connections[connection].ends[THERE].reads
            && let Some(message) = self.message(connection, THERE)
        {
            let answer = match message {
                Ok(Message::Offer(offer)) => match self.offered(offer) {
                    Ok(()) => Message::Accepted,
                    Err(refusal) => Message::Refused(refusal),
                },
                Ok(Message::Ask(id)) if id == self.id => Message::Answer(self.asked()),
                _ => return self.close(connection, THERE),
            };
            self.send(connection, THERE, &answer);
        }
    }

    fn read_control(&mut self, connection: usize) {
        if self.there.control != Some(connection) {
            return;
        }
        while self.connections[connection].ends[THERE].reads
            && let Some(message) = self.message(connection, THERE)
        {
            match message {
                Ok(Message::Ping(token)) => self.send(connection, THERE, &Message::Pong(token)),
                Ok(message) => self.destination(Input::Message(message)),
                Err(error) => return self.over_there(connection, &error),
            }
        }
    }

    /// What came of a page stream, into memory.
    fn read_pages(&mut self, at: usize) {
        loop {
            let Some((stream, connection, count)) = self.there.pages.get(at).copied() else { return };
            let Some(layout) = self.there.memory.as_ref().map(|memory| memory.layout.clone()) else { return };
            let Some(head) = self.peek(connection, THERE, FRAME_BYTES) else { return };
            match PageFrame::decode(head.try_into().expect("so many bytes"), &layout) {
                Ok(PageFrame::Chunk(chunk)) if chunk.round == count.round => {
                    let bytes = chunk.data_bytes() as usize;
                    let Some(bytes) = self.take(connection, THERE, FRAME_BYTES + bytes) else { return };
                    let mut pages = bytes[FRAME_BYTES..].chunks_exact(PAGE_SIZE);
                    let memory = self.there.memory.as_mut().expect("it was built");
                    for run in chunk.zero_runs() {
                        memory.words[run.first as usize..(run.first + run.pages) as usize].fill(0);
                    }
                    for run in chunk.data_runs() {
                        for page in run.first..run.first + run.pages {
                            memory.words[page as usize] = read_page(pages.next().expect("so many bytes"));
                        }
                    }
                    self.there.pages[at].2.add(&chunk);
                }
                Ok(PageFrame::Marker(marker)) if marker == count => {
                    self.take(connection, THERE, FRAME_BYTES);
                    self.there.pages[at].2 = Marker { round: marker.round + 1, ..Marker::default() };
                    self.destination(Input::Marker { stream, marker });
                }
                other => {
                    self.close(connection, THERE);
                    return self.destination(Input::PagesFailed(format!("{other:?}")));
                }
            }
        }
    }

    /// A connection of the destination's host is over.
    pub fn over_there(&mut self, connection: usize, why: &str) {
        self.close(connection, THERE);
        if self.there.control == Some(connection) {
            self.destination(Input::Lost(why.into()));
        } else if self.there.pages.iter().any(|(_, of, _)| *of == connection) {
            self.destination(Input::PagesFailed(why.into()));
        }
    }

    /// The agent starts a receiving process. One that finds a record of its attempt does not begin.
    fn offered(&mut self, offer: Offer) -> Result<(), Refusal> {
        if self.there.machine.is_some() || !self.there.disk.records().is_empty() {
            return Err(Refusal { reason: "this migration is known here".into(), mismatches: vec![] });
        }
        let arbiter = self.setting.arbiter.is_some();
        self.there.machine = Some(Destination::new(self.timeouts, offer.streams, arbiter));
        (self.there.alive, self.there.offer) = (true, Some(offer));
        self.destination(Input::Begin);
        Ok(())
    }

    /// What the agent answers, from the journal and under its lock.
    fn asked(&mut self) -> AskAnswer {
        match answer(&self.there.disk.records(), self.id, self.there.holds_journal()) {
            Answer::NoTrace => match self.there.disk.append(self.id, Step::GaveUp) {
                Ok(()) => AskAnswer::GaveUp,
                Err(_) => AskAnswer::Pending,
            },
            answer => answer.try_into().expect("there is a trace"),
        }
    }

    pub fn destination_dies(&mut self, with_power: bool) {
        if self.there.alive {
            let state = self.there.state();
            self.tell(|| format!("the destination dies, {state:?}"));
            self.there.life += 1;
            if let Some(step) = self.there.writing.first() {
                self.there.disk.interrupt(self.id, *step, &mut self.random);
            }
            self.there.writing.clear();
        }
        if with_power {
            self.there.disk.lose_power(&mut self.random);
            self.silence_all(THERE);
        } else if self.there.alive {
            self.close_all(THERE);
        }
        if self.there.alive {
            let has = |step| self.there.disk.records().iter().any(|record| record.step == step);
            self.there.died_as_owner = (has(Step::Committed) || self.there.forgotten) && !has(Step::GaveUp);
            (self.there.alive, self.there.starting) = (false, false);
            if self.there.guest == Guest::Runs {
                self.there.guest = Guest::Ran;
            }
        }
    }
}
