//! Both machines against each other on a simulated clock and link, from a seed: delays, cuts, flipped bits, crashes,
//! cancels, at every step. At most one side may run the VM at any time, and in the end exactly one owns it.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use std::time::Duration;

use common::*;
use migrator::bitmap::Bitmap;
use migrator::destination::{self, Destination, Loaded};
use migrator::error::MigrateError;
use migrator::handle::Resolution;
use migrator::handoff::{self, Answer, DestinationState, HandoffRecord, Step};
use migrator::layout::{CHUNK_PAGES, PAGE_SIZE};
use migrator::options::{Convergence, Timeouts};
use migrator::pages::{Chunk, FRAME_BYTES, Marker, PageFrame};
use migrator::source::{self, Saved, Source};
use migrator::traits::*;
use migrator::transport::ConnectError;
use migrator::wire::message::AskAnswer;
use migrator::wire::{Header, Message, decode, encode};
use migrator::{MigrationId, Mode, Options, Outcome, Owner, Phase, Report};

const PAGES: u64 = 560;

/// What goes wrong, at one step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    /// The link is cut; what is on its way in either direction arrives, or not.
    Cut {
        lose_there: bool,
        lose_back: bool,
    },
    /// A bit of what arrives next at the destination, or at the source, is flipped.
    Flip {
        there: bool,
    },
    KillSource,
    KillDestination,
    Cancel,
    CancelAtDestination,
    GuestGone,
    JournalFullHere,
    JournalFullThere,
}

const FAULTS: [Fault; 13] = [
    Fault::Cut { lose_there: false, lose_back: false },
    Fault::Cut { lose_there: true, lose_back: false },
    Fault::Cut { lose_there: false, lose_back: true },
    Fault::Cut { lose_there: true, lose_back: true },
    Fault::Flip { there: true },
    Fault::Flip { there: false },
    Fault::KillSource,
    Fault::KillDestination,
    Fault::Cancel,
    Fault::CancelAtDestination,
    Fault::GuestGone,
    Fault::JournalFullHere,
    Fault::JournalFullThere,
];

/// Something that happens at a time.
enum Happening {
    ToSource(source::Event),
    ToDestination(destination::Event),
    /// A frame of control, there or back.
    Control {
        there: bool,
        bytes: Vec<u8>,
        connection: u32,
    },
    /// A frame of a page stream and its pages.
    Page {
        stream: u16,
        header: [u8; FRAME_BYTES],
        pages: Vec<u8>,
    },
    /// The source reads part of a chunk and sends it.
    SendPart {
        n: u32,
        part: u64,
        last: bool,
    },
    Offer,
    Connect,
    Ask,
    Heal,
    Guest,
    Tick,
}

struct World {
    random: Random,
    now: Duration,
    queue: BTreeMap<(Duration, u64), Happening>,
    sequence: u64,
    steps: u64,
    fault: Option<(u64, Fault)>,
    fired: bool,
    flip: Option<bool>,
    link_up: bool,
    /// Number of the connection; frames of an older one are lost.
    connection: u32,
    connected: bool,
    last_arrival: [Duration; 4],
    streams: u16,
    id: MigrationId,

    source: Source,
    source_alive: bool,
    source_vm: MockSource,
    source_journal: MemoryJournal,
    dirty: Bitmap,
    round: Bitmap,
    sent: Vec<Marker>,
    report: Option<Report>,

    destination: Option<Destination>,
    destination_alive: bool,
    destination_vm: MockDestination,
    destination_journal: MemoryJournal,
    arrived: Vec<Marker>,
    memory_at_start: Option<Vec<u8>>,
    /// Pages that the guest writes at a time: fewer than this.
    guest_writes: u64,
}

fn timeouts() -> Timeouts {
    Timeouts { dead_after: Duration::from_secs(5), ..Timeouts::default() }
}

impl World {
    fn new(seed: u64, source_vm: MockSource, mode: Mode, fault: Option<(u64, Fault)>) -> Self {
        let mut random = Random(seed);
        let id = MigrationId(std::array::from_fn(|_| random.next() as u8));
        let streams = 1 + random.below(3) as u16;
        let options = Options {
            streams,
            mode,
            verify: true,
            max_downtime: Duration::from_millis(40),
            timeouts: timeouts(),
            ..Options::default()
        };
        let description = source_vm.description();
        Self {
            source: Source::new(options, &description, "there:7437".into()),
            random,
            now: Duration::ZERO,
            queue: BTreeMap::new(),
            sequence: 0,
            steps: 0,
            fault,
            fired: false,
            flip: None,
            link_up: true,
            connection: 0,
            connected: false,
            last_arrival: [Duration::ZERO; 4],
            streams,
            id,
            source_alive: true,
            source_vm,
            source_journal: MemoryJournal::default(),
            dirty: Bitmap::new(PAGES),
            round: Bitmap::new(PAGES),
            sent: vec![],
            report: None,
            destination: None,
            destination_alive: false,
            destination_vm: MockDestination::default(),
            destination_journal: MemoryJournal::default(),
            arrived: vec![],
            memory_at_start: None,
            guest_writes: 4,
        }
    }

    /// With a guest that writes more than the link carries, unless it is slowed down.
    fn busy(seed: u64, fault: Option<(u64, Fault)>) -> Self {
        let mut world = Self::new(seed, source_vm(seed), Mode::PreCopy, fault);
        let options = Options {
            streams: world.streams,
            max_downtime: Duration::from_millis(7),
            convergence: Convergence { stall_rounds: 0, stall_time: Duration::ZERO, ..Convergence::default() },
            verify: true,
            timeouts: timeouts(),
            ..Options::default()
        };
        world.source = Source::new(options, &world.source_vm.description(), "there:7437".into());
        world.guest_writes = 100;
        world
    }

    fn after(&mut self, delay: Duration, happening: Happening) {
        self.sequence += 1;
        self.queue.insert((self.now + delay, self.sequence), happening);
    }

    fn micros(&mut self, most: u64) -> Duration {
        Duration::from_micros(1 + self.random.below(most))
    }

    /// After a delay, but not before what went the same way earlier.
    fn carry(&mut self, way: usize, most: u64, happening: Happening) {
        let at = (self.now + self.micros(most)).max(self.last_arrival[way]);
        self.last_arrival[way] = at;
        self.after(at - self.now, happening);
    }

    fn run(&mut self) {
        self.after(Duration::ZERO, Happening::ToSource(source::Event::Begin));
        self.after(Duration::ZERO, Happening::Guest);
        self.after(Duration::from_millis(5), Happening::Tick);
        while let Some(((at, _), happening)) = self.queue.pop_first() {
            self.now = at;
            let counts = !matches!(happening, Happening::Guest | Happening::Tick);
            if counts {
                self.steps += 1;
                if let Some((step, fault)) = self.fault
                    && step == self.steps
                {
                    self.fired = true;
                    self.strike(fault);
                }
            }
            self.happen(happening);
            self.check();
            if self.source_alive && (self.source.handoff().is_settled() || self.source.phase() == Phase::InDoubt) {
                assert_eq!(self.source_vm.ram.lock().throttle, 0, "still slowed down: {:?}", self.fault);
            }
            if self.is_over() {
                return;
            }
            assert!(self.now < Duration::from_secs(600), "hangs: {:?} {:?}", self.source.phase(), self.fault);
        }
        panic!("nothing happens any more");
    }

    fn is_over(&self) -> bool {
        let source = !self.source_alive || self.report.is_some();
        let destination =
            !self.destination_alive || self.destination.as_ref().is_none_or(|machine| machine.handoff().is_settled());
        source && destination
    }

    /// The promise.
    fn check(&self) {
        let here = self.source_alive && !self.source_vm.ram.lock().paused;
        let there = self.destination_vm.fate.started.load(Ordering::SeqCst);
        assert!(!(here && there), "both run it: {:?}", self.fault);
        if there {
            assert!(!self.source.handoff().may_run() || !self.source_alive);
        }
    }

    fn strike(&mut self, fault: Fault) {
        match fault {
            Fault::Cut { lose_there, lose_back } => {
                self.link_up = false;
                self.cut(lose_there, lose_back);
                let heal = Duration::from_millis(100 + self.random.below(20_000));
                self.after(heal, Happening::Heal);
            }
            Fault::Flip { there } => self.flip = Some(there),
            Fault::KillSource => {
                self.source_alive = false;
                self.cut(false, true);
            }
            Fault::KillDestination => {
                self.destination_alive = false;
                self.cut(true, false);
            }
            Fault::Cancel => self.after(Duration::ZERO, Happening::ToSource(source::Event::Cancel)),
            Fault::CancelAtDestination => {
                self.after(Duration::ZERO, Happening::ToDestination(destination::Event::Cancel));
            }
            Fault::GuestGone => self.after(Duration::ZERO, Happening::ToSource(source::Event::GuestGone("off".into()))),
            Fault::JournalFullHere => self.source_journal.fails.store(true, Ordering::SeqCst),
            Fault::JournalFullThere => self.destination_journal.fails.store(true, Ordering::SeqCst),
        }
    }

    /// Ends the connections. Each side notices when it notices.
    fn cut(&mut self, lose_there: bool, lose_back: bool) {
        if !self.connected {
            return;
        }
        self.connected = false;
        let connection = self.connection;
        self.queue.retain(|_, happening| match happening {
            Happening::Control { there, connection: of, .. } => {
                *of != connection || !(*there && lose_there || !*there && lose_back)
            }
            Happening::Page { .. } => !lose_there,
            _ => true,
        });
        let (here, there) = (self.micros(5_000_000), self.micros(5_000_000));
        // Not before what still arrives.
        let (here, there) = (
            here.max(self.last_arrival[1].saturating_sub(self.now)),
            there.max(self.last_arrival[0].saturating_sub(self.now)),
        );
        self.after(here, Happening::ToSource(source::Event::Lost("cut".into())));
        self.after(there, Happening::ToDestination(destination::Event::Lost("cut".into())));
    }

    fn happen(&mut self, happening: Happening) {
        match happening {
            Happening::ToSource(event) => self.source_event(event),
            Happening::ToDestination(event) => self.destination_event(event),
            Happening::Control { there, mut bytes, .. } => {
                if self.flip == Some(there) {
                    self.flip = None;
                    let bit = self.random.below(bytes.len() as u64 * 8) as usize;
                    bytes[bit / 8] ^= 1 << (bit % 8);
                }
                let (head, payload) = bytes.split_first_chunk().unwrap();
                match Header::decode(head).and_then(|header| decode(&header, payload)) {
                    Ok(message) if there => self.destination_event(destination::Event::Message(message)),
                    Ok(message) => self.source_event(source::Event::Message(message)),
                    Err(error) => {
                        // Whoever reads nonsense ends the connection.
                        let error = error.to_string();
                        if there {
                            self.destination_event(destination::Event::Lost(error));
                        } else {
                            self.source_event(source::Event::Lost(error));
                        }
                        self.cut(true, true);
                    }
                }
            }
            Happening::Page { stream, mut header, pages } => {
                if self.flip == Some(true) && self.random.chance(50) {
                    self.flip = None;
                    header[self.random.below(FRAME_BYTES as u64) as usize] ^= 4;
                }
                self.page(stream, &header, &pages);
            }
            Happening::SendPart { n, part, last } => self.send_part(n, part, last),
            Happening::Offer => {
                let accepted = if self.link_up {
                    let mut machine = Destination::new(timeouts(), self.streams, false);
                    self.destination_alive = true;
                    self.arrived = vec![Marker { round: 1, ..Marker::default() }; self.streams.into()];
                    let actions = machine.handle(self.now, destination::Event::Begin);
                    self.destination = Some(machine);
                    self.destination_actions(actions);
                    Ok(Ok(()))
                } else {
                    Err(ConnectError::Protocol { peer: "there".into(), reason: "no link".into() })
                };
                self.source_event(source::Event::Offered(accepted));
            }
            Happening::Connect => {
                if self.link_up && self.source_alive && self.destination_alive {
                    self.connected = true;
                    self.connection += 1;
                    let delay = self.micros(1000);
                    self.carry_event_there(delay, destination::Event::Connected);
                    self.source_event(source::Event::RoundTrip(Duration::from_micros(400)));
                    self.source_event(source::Event::Connected(Ok(())));
                    if self.report.is_some() {
                        // Nobody waits for the connections any more: they are dropped.
                        self.cut(true, true);
                    }
                } else {
                    let error = ConnectError::Protocol { peer: "there".into(), reason: "no link".into() };
                    self.source_event(source::Event::Connected(Err(error)));
                }
            }
            Happening::Ask => {
                let answer = if self.link_up {
                    Ok(self.ask())
                } else {
                    Err(ConnectError::Protocol { peer: "there".into(), reason: "no link".into() })
                };
                // An answer may be slow, and be overtaken.
                let delay = self.micros(200_000);
                if let (Ok(answer), true) = (&answer, self.random.chance(20)) {
                    self.after(delay * 2, Happening::ToSource(source::Event::Asked(Ok(*answer))));
                }
                self.after(delay, Happening::ToSource(source::Event::Asked(answer)));
            }
            Happening::Heal => self.link_up = true,
            Happening::Guest => {
                if self.source_alive {
                    let runs = 1000 - u64::from(self.source_vm.ram.lock().throttle);
                    for _ in 0..self.random.below(self.guest_writes) * runs / 1000 {
                        let (page, offset, value) =
                            (self.random.below(PAGES), self.random.below(4096), self.random.next());
                        self.source_vm.ram.guest_write(page, offset as usize, value as u8 % 3);
                    }
                }
                let delay = self.micros(2000) * self.slow();
                self.after(delay, Happening::Guest);
            }
            Happening::Tick => {
                self.source_event(source::Event::Tick);
                self.destination_event(destination::Event::Tick);
                self.after(Duration::from_millis(5) * self.slow(), Happening::Tick);
            }
        }
    }

    /// After a second of its time, only waiting is left: no need to look so often.
    fn slow(&self) -> u32 {
        if self.now > Duration::from_secs(1) { 50 } else { 1 }
    }

    fn carry_event_there(&mut self, delay: Duration, event: destination::Event) {
        self.last_arrival[0] = self.last_arrival[0].max(self.now + delay);
        self.after(delay, Happening::ToDestination(event));
    }

    /// The agent's answer, as an agent makes it.
    fn ask(&mut self) -> AskAnswer {
        let mut records = self.destination_journal.records.lock().unwrap();
        match handoff::answer(&records, self.id, self.destination_alive) {
            Answer::NoTrace => {
                records.push(HandoffRecord {
                    id: self.id,
                    step: Step::GaveUp,
                    unix_ms: 0,
                    vm: String::new(),
                    peer: String::new(),
                });
                AskAnswer::GaveUp
            }
            answer => answer.try_into().unwrap(),
        }
    }

    fn source_event(&mut self, event: source::Event) {
        if !self.source_alive {
            return;
        }
        let actions = self.source.handle(self.now, event);
        for action in actions {
            if !self.source_alive {
                return;
            }
            self.source_action(action);
            self.check();
        }
    }

    fn source_action(&mut self, action: source::Action) {
        use source::{Action, Event};
        match action {
            Action::Offer => self.carry(3, 2000, Happening::Offer),
            Action::Connect => self.carry(3, 2000, Happening::Connect),
            Action::Ask => self.carry(3, 2000, Happening::Ask),
            Action::Claim => {}
            Action::StartDirtyLog => {
                let result = self.source_vm.start_dirty_log();
                self.later(Event::DirtyLogStarted(result));
            }
            Action::CollectDirty => {
                let result = self.source_vm.collect_dirty(&mut self.dirty).map(|()| self.dirty.count());
                self.later(Event::Collected(result));
            }
            Action::SendRound { n, all, last } => {
                let dirty = std::mem::replace(&mut self.dirty, Bitmap::new(PAGES));
                self.round = if all { Bitmap::full(PAGES) } else { dirty };
                self.sent = vec![Marker { round: n, ..Marker::default() }; self.streams.into()];
                self.after(Duration::ZERO, Happening::SendPart { n, part: 0, last });
            }
            Action::Throttle(permille) => {
                if let Err(error) = self.source_vm.throttle(permille) {
                    self.later(Event::NotThrottled(error));
                }
            }
            Action::Pause => {
                let result = self.source_vm.pause();
                self.later(Event::Paused(result));
            }
            Action::Save => {
                let saved = self.source_vm.save_state().map(|sections| Saved {
                    sections,
                    ram_hash: Some(self.source_vm.ram.hash().unwrap()),
                    hashing: Duration::ZERO,
                });
                self.later(Event::Saved(saved));
            }
            Action::Send(message) => self.send(true, &message),
            Action::Journal(step) => {
                let record = HandoffRecord { id: self.id, step, unix_ms: 0, vm: "vm".into(), peer: "there".into() };
                let result = self.source_journal.append(&record, step.durability());
                self.later(Event::Journaled(step, result));
            }
            Action::Resume => {
                let result = self.source_vm.resume();
                self.later(Event::Resumed(result));
            }
            Action::CloseStreams => self.queue.retain(|_, happening| !matches!(happening, Happening::SendPart { .. })),
            Action::StopDirtyLog => self.source_vm.stop_dirty_log(),
            Action::Finish => {
                self.report = Some(self.source.report());
                // Its sockets close with it.
                self.cut(false, true);
            }
        }
    }

    fn later(&mut self, event: source::Event) {
        let delay = self.micros(300);
        self.after(delay, Happening::ToSource(event));
    }

    fn send(&mut self, there: bool, message: &Message) {
        if self.connected {
            let happening = Happening::Control { there, bytes: encode(message), connection: self.connection };
            self.carry(usize::from(!there), 3000, happening);
        }
    }

    /// Sends 128 pages, as a sender thread does, and the markers after the last.
    fn send_part(&mut self, n: u32, part: u64, last: bool) {
        if !self.source_alive || !self.connected {
            return;
        }
        let first = part * 128;
        if first >= PAGES {
            for stream in 0..self.streams {
                let header = PageFrame::Marker(self.sent[usize::from(stream)]).encode();
                self.carry(2, 500, Happening::Page { stream, header, pages: vec![] });
            }
            let mut sum = Marker { round: n, ..Marker::default() };
            for marker in &self.sent {
                sum.chunks += marker.chunks;
                sum.data_pages += marker.data_pages;
                sum.zero_pages += marker.zero_pages;
            }
            return self.source_event(source::Event::RoundSent(sum));
        }
        let chunk = first / CHUNK_PAGES;
        let mut wanted = self.round.chunk(chunk);
        for page in 0..CHUNK_PAGES {
            let page_there = chunk * CHUNK_PAGES + page;
            if page_there < first || page_there >= first + 128 {
                wanted.0[(page / 64) as usize] &= !(1 << (page % 64));
            }
        }
        if !wanted.is_empty() {
            let ram = self.source_vm.ram.clone();
            if !last {
                ram.rearm(chunk, &wanted).unwrap();
            }
            let zero = ram.find_zero(chunk, &wanted).unwrap();
            // Between the look and the read the guest goes on.
            if self.random.chance(30) {
                let page = first + self.random.below(128);
                if page < PAGES {
                    ram.guest_write(page, 5, 9);
                }
            }
            let frame = Chunk { round: n, chunk, data: wanted.minus(&zero), zero };
            let mut pages = Vec::new();
            for run in frame.data_runs() {
                let start = pages.len();
                pages.resize(start + run.bytes() as usize, 0);
                ram.read(run, &mut pages[start..]).unwrap();
            }
            let stream = self.random.below(self.streams.into()) as u16;
            self.sent[usize::from(stream)].add(&frame);
            let header = PageFrame::Chunk(frame).encode();
            self.carry(2, 500, Happening::Page { stream, header, pages });
        }
        let delay = self.micros(500);
        self.after(delay, Happening::SendPart { n, part: part + 1, last });
    }

    /// A frame of a page stream arrives.
    fn page(&mut self, stream: u16, header: &[u8; FRAME_BYTES], pages: &[u8]) {
        let Some(ram) = self.destination_vm.ram.clone().filter(|_| self.destination_alive) else { return };
        let count = &mut self.arrived[usize::from(stream)];
        match PageFrame::decode(header, ram.layout()) {
            Ok(PageFrame::Chunk(chunk)) if chunk.round == count.round => {
                count.add(&chunk);
                for run in chunk.zero_runs() {
                    ram.clear(run).unwrap();
                }
                let mut at = 0;
                for run in chunk.data_runs() {
                    let end = at + run.pages as usize * PAGE_SIZE;
                    ram.write(run, &pages[at..end]).unwrap();
                    at = end;
                }
            }
            Ok(PageFrame::Marker(marker)) if marker == *count => {
                *count = Marker { round: marker.round + 1, ..Marker::default() };
                self.destination_event(destination::Event::Marker { stream, marker });
            }
            other => self.destination_event(destination::Event::PagesFailed(format!("{other:?}"))),
        }
    }

    fn destination_event(&mut self, event: destination::Event) {
        if !self.destination_alive {
            return;
        }
        let Some(machine) = &mut self.destination else { return };
        let actions = machine.handle(self.now, event);
        self.destination_actions(actions);
    }

    fn destination_actions(&mut self, actions: Vec<destination::Action>) {
        use destination::{Action, Event};
        for action in actions {
            let event = match action {
                Action::Journal(step) => {
                    let record = HandoffRecord { id: self.id, step, unix_ms: 0, vm: "vm".into(), peer: "here".into() };
                    Event::Journaled(step, self.destination_journal.append(&record, step.durability()))
                }
                Action::Build => Event::Built(
                    self.destination_vm.prepare(&self.source_vm.description()).map(|()| Duration::from_millis(1)),
                ),
                Action::Send(message) => {
                    self.send(false, &message);
                    continue;
                }
                Action::Load { sections, ram_hash } => {
                    let here = self.destination_vm.ram.as_ref().unwrap().hash().unwrap();
                    let loaded = match ram_hash {
                        Some(there) if there != here => Err(MigrateError::Differs { here, there }),
                        _ => self
                            .destination_vm
                            .load_state(sections)
                            .map(|()| Loaded::default())
                            .map_err(|_| MigrateError::Cancelled),
                    };
                    if let Err(MigrateError::Differs { .. }) = loaded {
                        panic!("memory differs: {:?}", self.fault);
                    }
                    Event::Loaded(loaded)
                }
                Action::Start => {
                    self.memory_at_start = Some(self.destination_vm.ram.as_ref().unwrap().content());
                    let started = self.destination_vm.start(false).map(|_| Some(self.now));
                    self.check();
                    Event::Started(started)
                }
                Action::Discard => {
                    self.destination_vm.discard();
                    continue;
                }
                Action::CloseStreams | Action::Announce | Action::Forget | Action::Claim => continue,
                Action::Finish => {
                    if self
                        .destination
                        .as_ref()
                        .is_some_and(|machine| machine.handoff().state() == DestinationState::GaveUp)
                    {
                        self.cut(true, false);
                    }
                    continue;
                }
            };
            let delay = self.micros(500);
            self.after(delay, Happening::ToDestination(event));
        }
    }

    /// What must be true in the end, whatever happened.
    fn settle(&mut self) {
        let fault = self.fault;
        let started = self.destination_vm.fate.started.load(Ordering::SeqCst);
        if self.source_alive {
            let report = self.report.as_ref().unwrap();
            match report.owner {
                Owner::Destination => {
                    assert_eq!(report.outcome, Outcome::Completed, "{fault:?}");
                    assert!(self.source_vm.paused());
                    // Killed between its decision and its start, it lost the VM as any host does that dies.
                    assert!(started || !self.destination_alive, "{fault:?}");
                }
                Owner::Source => {
                    assert!(!started && !self.source_vm.paused(), "{fault:?} {report:?}");
                    assert_ne!(report.outcome, Outcome::Completed);
                    assert_eq!(
                        report.outcome == Outcome::Cancelled,
                        fault.unwrap().1 == Fault::Cancel,
                        "{fault:?} {report:?}"
                    );
                    assert!(report.error.is_some());
                    if self.destination_alive && self.destination.is_some() {
                        assert!(self.destination_vm.fate.discarded.load(Ordering::SeqCst), "{fault:?}");
                    }
                }
                Owner::Unknown => panic!("in doubt at the end: {fault:?}"),
            }
        } else {
            // A restarted source asks before it says anything.
            let records = self.source_journal.records.lock().unwrap().clone();
            match handoff::unsettled(&records) {
                Some(record) => {
                    assert_eq!(record.id, self.id);
                    match self.ask() {
                        AskAnswer::Running => assert!(started || !self.destination_alive),
                        AskAnswer::GaveUp => assert!(!started),
                        AskAnswer::Pending => panic!("still pending: {fault:?}"),
                    }
                }
                None => assert_eq!(started, records.iter().any(|record| record.step == Step::Released), "{fault:?}"),
            }
        }
        if started {
            assert!(self.memory_at_start.as_ref() == Some(&self.source_vm.ram.content()), "memory differs: {fault:?}");
            assert_eq!(self.destination_vm.state, self.source_vm.state);
        }
    }
}

fn source_vm(seed: u64) -> MockSource {
    let ram = MockRam::new(PAGES, if seed.is_multiple_of(2) { LogMode::Manual } else { LogMode::ClearOnRead });
    let mut random = Random(seed);
    for page in 0..PAGES {
        if page % 9 == 0 {
            ram.guest_write(page, random.below(4096) as usize, 1 + random.below(255) as u8);
        }
    }
    MockSource::new(ram)
}

/// Runs it, and, where the guest still runs at the source, once more without a fault.
fn run(seed: u64, mode: Mode, fault: Option<(u64, Fault)>) -> (u64, bool) {
    let mut world = World::new(seed, source_vm(seed), mode, fault);
    world.run();
    world.settle();
    let (steps, fired) = (world.steps, world.fired);
    let retry = world.source_alive && !world.source_vm.paused();
    if retry {
        assert_eq!(world.source_vm.log_starts, world.source_vm.log_stops, "{fault:?}");
        let mut again = World::new(seed + 1, world.source_vm, mode, None);
        again.run();
        assert_eq!(
            again.report.as_ref().unwrap().outcome,
            Outcome::Completed,
            "retry after {fault:?}: {:?}",
            again.report
        );
        let first = &again.report.as_ref().unwrap().rounds[0];
        assert_eq!(first.pages + first.zero_pages, PAGES, "a retry begins with all pages");
        again.settle();
    }
    (steps, fired)
}

#[test]
fn without_faults_it_completes_and_memory_is_the_same() {
    for seed in 0..40 {
        for mode in [Mode::PreCopy, Mode::StopAndCopy] {
            let mut world = World::new(seed, source_vm(seed), mode, None);
            world.run();
            world.settle();
            let report = world.report.unwrap();
            assert_eq!(report.outcome, Outcome::Completed, "seed {seed}: {report:?}");
            assert_eq!(report.rounds.len() == 1, mode == Mode::StopAndCopy);
            assert!(report.blackout_ms.unwrap() > 0.0);
        }
    }
}

/// Every fault at every step of one run.
fn every_step(seed: u64, mode: Mode) -> u64 {
    let (steps, _) = run(seed, mode, None);
    let mut points = 0;
    for fault in FAULTS {
        for step in 1..=steps {
            let (_, fired) = run(seed, mode, Some((step, fault)));
            points += u64::from(fired);
        }
    }
    points
}

#[test]
fn every_fault_at_every_step() {
    let points = every_step(2, Mode::PreCopy) + every_step(3, Mode::PreCopy);
    println!("{points} fault points");
    assert!(points > 1000, "{points}");
}

#[test]
fn every_fault_at_every_step_of_stop_and_copy() {
    assert!(every_step(5, Mode::StopAndCopy) > 300);
}

#[test]
fn every_fault_at_every_step_of_a_guest_that_is_slowed_down() {
    let busy = |fault| {
        let mut world = World::busy(6, fault);
        world.run();
        world.settle();
        world
    };
    let free = busy(None);
    let report = free.report.as_ref().unwrap();
    assert_eq!(report.outcome, Outcome::Completed, "{report:?}");
    assert!(report.throttle_permille > 0 && report.throttled_ms > 0.0, "{report:?}");
    let most = free.source_vm.throttles.iter().max();
    assert_eq!((most, free.source_vm.throttles.last()), (Some(&report.throttle_permille), Some(&0)));
    let mut slowed = 0;
    for fault in FAULTS {
        for step in 1..=free.steps {
            slowed += usize::from(busy(Some((step, fault))).source_vm.throttles.len() > 1);
        }
    }
    assert!(slowed > 100, "{slowed} runs in which it was slowed down before the fault");
}

#[test]
fn random_faults() {
    for seed in 100..400 {
        let mut random = Random(seed);
        let fault = FAULTS[random.below(FAULTS.len() as u64) as usize];
        run(seed, Mode::PreCopy, Some((1 + random.below(90), fault)));
    }
}

#[test]
fn a_human_settles_what_stays_in_doubt() {
    // Find a step at which a cut leaves it in doubt, and never heal.
    for (resolution, owner) in [(Resolution::Keep, Owner::Source), (Resolution::Discard, Owner::Destination)] {
        let mut found = false;
        for step in 1..200 {
            let fault = Fault::Cut { lose_there: owner == Owner::Source, lose_back: true };
            let mut world = World::new(8, source_vm(8), Mode::PreCopy, Some((step, fault)));
            world.after(Duration::ZERO, Happening::ToSource(source::Event::Begin));
            world.after(Duration::ZERO, Happening::Tick);
            while let Some(((at, _), happening)) = world.queue.pop_first() {
                world.now = at;
                if matches!(happening, Happening::Heal) {
                    continue;
                }
                if !matches!(happening, Happening::Tick) {
                    world.steps += 1;
                    if world.steps == step {
                        world.strike(fault);
                    }
                }
                world.happen(happening);
                if world.report.is_some() || world.now > Duration::from_secs(60) {
                    break;
                }
            }
            if world.report.is_none() && world.source.phase() == Phase::InDoubt {
                // The one precondition: who keeps it must know that the destination did not run it.
                if resolution == Resolution::Keep && world.destination_vm.fate.started.load(Ordering::SeqCst) {
                    continue;
                }
                found = true;
                assert_eq!(world.source.report().outcome, Outcome::InDoubt);
                world.source_event(source::Event::Cancel);
                assert_eq!(world.source.phase(), Phase::InDoubt, "too late");
                world.source_event(source::Event::Resolve(resolution));
                let report = world.report.clone().unwrap();
                assert_eq!(report.owner, owner);
                // Whatever is heard afterwards changes nothing.
                for answer in [AskAnswer::Running, AskAnswer::GaveUp] {
                    world.source_event(source::Event::Asked(Ok(answer)));
                }
                assert_eq!(world.source.report().owner, owner);
                assert_eq!(world.source_vm.paused(), owner == Owner::Destination);
            }
        }
        assert!(found, "no step leaves it in doubt");
    }
}
