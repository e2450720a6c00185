//! Both drivers on real sockets, with a VM that is none.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use common::*;
use migrator::driver::request::{self, AskAnswer, Offer, Requests};
use migrator::handle::{HandleError, Resolution};
use migrator::handoff::{self, Answer, HandoffRecord, Step};
use migrator::options::{DEFAULT_STREAMS, Timeouts};
use migrator::report::AnnounceReport;
use migrator::traits::*;
use migrator::transport::{TcpConnection, TcpDialer, accept};
use migrator::wire::preamble::Role;
use migrator::{
    Arrived, Compression, Incoming, MigrationHandle, MigrationId, Mode, Options, Outcome, Owner, Phase, ReceiveError,
    ReceiveOptions, Received, Report,
};

/// Long enough for any machine; a test that waits so long has hung.
const HANG: Duration = Duration::from_secs(60);

fn timeouts() -> Timeouts {
    Timeouts {
        connect: Duration::from_secs(2),
        request: Duration::from_secs(2),
        keepalive: Duration::from_millis(100),
        dead_after: Duration::from_millis(1500),
        ask_min: Duration::from_millis(20),
        ask_max: Duration::from_millis(100),
        running: Duration::from_millis(500),
        ..Timeouts::default()
    }
}

fn options() -> Options {
    // A busy machine pauses any thread for longer than a real limit allows.
    // Raw, so that a cap on bandwidth makes it as slow as a test needs it.
    let compression = Compression::None;
    Options { max_downtime: Duration::from_secs(2), timeouts: timeouts(), compression, ..Options::default() }
}

type Result_ = Result<Received, ReceiveError>;

/// What a destination host is made of: an agent, and the receiving processes that it started.
struct Host {
    address: SocketAddr,
    shared: Arc<HostState>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct HostState {
    stop: AtomicBool,
    journal: MemoryJournal,
    alive: AtomicBool,
    routes: Mutex<HashMap<MigrationId, mpsc::Sender<Arrived>>>,
    vm: Mutex<Option<MockDestination>>,
    received: Mutex<Vec<JoinHandle<(MockDestination, Result_)>>>,
    refuse_offer: AtomicBool,
    /// Does not answer questions.
    deaf: AtomicBool,
    handle: MigrationHandle,
    /// Connections hide their sockets.
    opaque: AtomicBool,
}

impl Host {
    fn start(vm: MockDestination) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let shared = Arc::new(HostState { vm: Mutex::new(Some(vm)), ..HostState::default() });
        let state = shared.clone();
        let thread = thread::spawn(move || {
            for stream in listener.incoming() {
                if state.stop.load(Ordering::SeqCst) {
                    return;
                }
                let (state, stream) = (state.clone(), stream.unwrap());
                thread::spawn(move || state.serve(stream));
            }
        });
        Self { address, shared, thread: Some(thread) }
    }

    fn dialer(&self) -> Arc<dyn Dialer> {
        Arc::new(TcpDialer::new(self.address.to_string(), timeouts()))
    }

    /// What became of the receiving side.
    fn outcome(&self) -> (MockDestination, Result_) {
        self.shared.received.lock().unwrap().remove(0).join().unwrap()
    }

    fn steps(&self) -> Vec<Step> {
        self.shared.journal.records.lock().unwrap().iter().map(|record| record.step).collect()
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        let _ = TcpStream::connect(self.address);
        self.thread.take().unwrap().join().unwrap();
    }
}

impl HostState {
    fn serve(self: Arc<Self>, stream: TcpStream) {
        let Ok(accepted) = accept(stream, timeouts()) else { return };
        let preamble = accepted.preamble;
        match preamble.role {
            Role::Request if self.deaf.load(Ordering::SeqCst) => {}
            Role::Request => {
                let connection = Box::new(accepted.welcome().unwrap());
                let _ = request::serve(connection, timeouts().request, &mut Agent(self));
            }
            role => {
                let Some(route) = self.routes.lock().unwrap().get(&preamble.id).cloned() else {
                    accepted.refuse("unknown migration").unwrap();
                    return;
                };
                let connection = accepted.welcome().unwrap();
                let connection: Box<dyn Connection> = match self.opaque.load(Ordering::SeqCst) {
                    true => Box::new(Opaque(Box::new(connection))),
                    false => Box::new(connection),
                };
                let _ = route.send(Arrived { role, stream: preamble.stream, connection });
            }
        }
    }
}

struct Agent(Arc<HostState>);

impl Requests for Agent {
    fn offer(&mut self, offer: Offer) -> Result<(), Refusal> {
        if self.0.refuse_offer.load(Ordering::SeqCst) {
            return Err(Refusal { reason: "this host is being emptied".into(), mismatches: vec![] });
        }
        let (sender, connections) = mpsc::channel();
        self.0.routes.lock().unwrap().insert(offer.id, sender);
        let state = self.0.clone();
        let mut vm = state.vm.lock().unwrap().take().unwrap_or_default();
        state.alive.store(true, Ordering::SeqCst);
        let process = thread::spawn(move || {
            let options = ReceiveOptions { timeouts: timeouts(), ..ReceiveOptions::default() };
            let incoming = Incoming { offer, connections };
            let result = migrator::receive(&mut vm, incoming, &mut state.journal.clone(), &options, &state.handle);
            state.alive.store(false, Ordering::SeqCst);
            (vm, result)
        });
        self.0.received.lock().unwrap().push(process);
        Ok(())
    }

    fn ask(&mut self, id: MigrationId) -> Result<AskAnswer, Refusal> {
        let mut records = self.0.journal.records.lock().unwrap();
        match handoff::answer(&records, id, self.0.alive.load(Ordering::SeqCst)) {
            Answer::NoTrace => {
                records.push(HandoffRecord {
                    id,
                    step: Step::GaveUp,
                    unix_ms: 0,
                    vm: String::new(),
                    peer: String::new(),
                });
                Ok(AskAnswer::GaveUp)
            }
            answer => Ok(answer.try_into().unwrap()),
        }
    }
}

fn filled(pages: u64, mode: LogMode) -> Arc<MockRam> {
    let ram = MockRam::new(pages, mode);
    let mut random = Random(pages);
    for page in 0..pages {
        if page % 3 != 0 {
            for offset in [0, 17, 4095] {
                ram.guest_write(page, offset, random.next() as u8);
            }
        }
    }
    ram
}

/// A guest that writes until it is stopped.
struct Guest(Arc<AtomicBool>, Option<JoinHandle<()>>);

impl Guest {
    fn run(ram: Arc<MockRam>, pages: u64, every: Duration) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let flag = stop.clone();
        let thread = thread::spawn(move || {
            let mut random = Random(7);
            while !flag.load(Ordering::Relaxed) {
                ram.guest_write(random.below(pages), random.below(4096) as usize, random.next() as u8);
                thread::sleep(every);
            }
        });
        Self(stop, Some(thread))
    }

    /// So many pages a second, however seldom its thread gets to run; less if it is throttled.
    fn at_rate(ram: Arc<MockRam>, pages: u64, per_second: f64) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let flag = stop.clone();
        let thread = thread::spawn(move || {
            let (mut random, mut due, mut last) = (Random(7), 0.0, Instant::now());
            while !flag.load(Ordering::Relaxed) {
                thread::sleep(Duration::from_millis(1));
                let runs = 1.0 - f64::from(ram.lock().throttle) / 1000.0;
                due += last.elapsed().as_secs_f64() * per_second * runs;
                last = Instant::now();
                while due >= 1.0 {
                    ram.guest_write(random.below(pages), 7, random.next() as u8);
                    due -= 1.0;
                }
            }
        });
        Self(stop, Some(thread))
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
        self.1.take().unwrap().join().unwrap();
    }
}

struct Attempt {
    vm: MockSource,
    journal: MemoryJournal,
    report: Report,
}

impl Attempt {
    fn steps(&self) -> Vec<Step> {
        self.journal.records.lock().unwrap().iter().map(|record| record.step).collect()
    }

    fn error(&self) -> String {
        self.report.error.as_ref().map_or(String::new(), |error| format!("{}: {}", error.phase, error.message))
    }

    /// The VM is where it was, as if nothing had happened.
    fn assert_still_here(&self) {
        assert_eq!(self.report.owner, Owner::Source, "{:?}", self.report);
        assert_eq!(self.vm.paused(), self.vm.was_paused);
        assert_eq!(self.vm.log_starts, self.vm.log_stops, "the dirty log was stopped");
    }
}

fn migrate(vm: MockSource, dial: Arc<dyn Dialer>, options: &Options, handle: &MigrationHandle) -> Attempt {
    migrate_as(MigrationId::random().unwrap(), vm, dial, options, handle)
}

fn migrate_as(
    id: MigrationId,
    mut vm: MockSource,
    dial: Arc<dyn Dialer>,
    options: &Options,
    handle: &MigrationHandle,
) -> Attempt {
    let journal = MemoryJournal::default();
    let report = migrator::migrate(&mut vm, id, dial, &mut journal.clone(), options, handle);
    let progress = handle.progress();
    assert_eq!(progress.phase, Phase::Done);
    assert_eq!(handle.report().as_ref(), Some(&report));
    assert_eq!(handle.cancel(), Err(HandleError::Over));
    Attempt { vm, journal, report }
}

/// Runs a migration on a thread, so that the test can interfere.
fn in_background(vm: MockSource, dial: Arc<dyn Dialer>, options: Options) -> (MigrationHandle, JoinHandle<Attempt>) {
    let handle = MigrationHandle::new();
    let clone = handle.clone();
    (handle, thread::spawn(move || migrate(vm, dial, &options, &clone)))
}

fn wait_for(handle: &MigrationHandle, what: impl Fn(&migrator::Progress) -> bool) {
    let (mut seen, until) = (0, Instant::now() + HANG);
    loop {
        let (change, progress) = handle.wait(seen, Duration::from_secs(1));
        if what(&progress) {
            return;
        }
        assert!(Instant::now() < until, "hung at {progress:?}");
        seen = change;
    }
}

#[test]
fn moves_a_running_guest() {
    for (mode, streams, verify) in
        [(LogMode::Manual, 1, true), (LogMode::ClearOnRead, 1, true), (LogMode::Manual, 4, false)]
    {
        let ram = filled(3000, mode);
        let host = Host::start(MockDestination::default());
        let options = Options { streams, verify, from: "here".into(), ..options() };
        let guest = Guest::run(ram.clone(), 3000, Duration::from_micros(50));
        let attempt = migrate(MockSource::new(ram.clone()), host.dialer(), &options, &MigrationHandle::new());
        drop(guest);
        let report = &attempt.report;
        assert_eq!((report.outcome, report.owner), (Outcome::Completed, Owner::Destination), "{report:?}");
        assert_eq!(report.error, None);
        let (vm, received) = host.outcome();
        let received = received.unwrap();
        assert!(vm.ram.as_ref().unwrap().content() == ram.content(), "memory is the same");
        assert_eq!(vm.state, b"vcpu");
        assert!(attempt.vm.paused() && !vm.ram.unwrap().lock().paused);
        assert_eq!(attempt.steps(), [Step::Sending, Step::Decided, Step::Released]);
        assert_eq!(host.steps(), [Step::Receiving, Step::Prepared, Step::Committed, Step::Running]);
        assert_eq!((attempt.vm.log_starts, attempt.vm.log_stops), (1, 1));
        // The report.
        assert_eq!((report.vm.as_str(), report.from.as_str(), report.mode.as_str()), ("mock", "here", "pre-copy"));
        assert_eq!(report.to, host.address.to_string());
        assert!(report.rounds.len() >= 2);
        assert_eq!(report.rounds[0].pages + report.rounds[0].zero_pages, 3000);
        assert!(report.rounds[0].zero_pages > 0);
        assert_eq!(report.bytes_sent, report.rounds.iter().map(|round| round.bytes_sent).sum::<u64>());
        assert!(report.rounds[0].bytes_sent > report.rounds[0].pages * 4096);
        assert_eq!(report.ram_bytes, 3000 * 4096);
        // Pages are armed again in each round but the last.
        let (_, before) = report.rounds.split_last().unwrap();
        let armed: u64 = before.iter().map(|round| round.pages + round.zero_pages).sum();
        assert_eq!(ram.rearmed.load(Ordering::Relaxed), armed);
        assert!(report.blackout_ms.unwrap() > 0.0 && report.blackout_ms.unwrap() <= report.total_ms);
        assert!(report.predicted_blackout_ms.is_some());
        for part in [
            "pause",
            "collect",
            "save",
            "transfer",
            "load",
            "prepare-journal",
            "decide-journal",
            "commit",
            "commit-journal",
            "start",
        ] {
            assert!(report.blackout.contains_key(part), "{part}");
        }
        assert_eq!(report.blackout.contains_key("verify"), verify);
        let parts: f64 = report.blackout.values().sum();
        let whole = report.blackout_ms.unwrap();
        assert!(
            parts > whole * 0.9 - 1.0 && parts < whole * 1.05 + 1.0,
            "the parts make the whole: {parts} {report:?}"
        );
        // Announced: at once, and again.
        assert_eq!(report.announce.as_ref(), Some(&received.announce));
        assert_eq!((received.announce.arp, received.announce.rarp, received.announce.bursts), (2, 1, 6));
        received.announcing.unwrap().join().unwrap();
        assert_eq!(vm.announcer.frames.lock().unwrap().len(), 18);
    }
}

/// A connection whose bytes are not the socket's bytes, as with TLS.
struct Opaque(Box<dyn Connection>);
struct OpaqueHalf<T: ?Sized>(Box<T>);

impl Connection for Opaque {
    fn peer(&self) -> String {
        self.0.peer()
    }
    fn split(self: Box<Self>) -> std::io::Result<Split> {
        let Split { reader, writer, closer } = self.0.split()?;
        Ok(Split { reader: Box::new(OpaqueHalf(reader)), writer: Box::new(OpaqueHalf(writer)), closer })
    }
}

impl Read for OpaqueHalf<dyn ConnectionReader> {
    fn read(&mut self, bytes: &mut [u8]) -> std::io::Result<usize> {
        self.0.read(bytes)
    }
}

impl ConnectionReader for OpaqueHalf<dyn ConnectionReader> {
    fn set_timeout(&self, timeout: Option<Duration>) -> std::io::Result<()> {
        self.0.set_timeout(timeout)
    }
    fn socket(&self) -> Option<std::os::fd::BorrowedFd<'_>> {
        None
    }
}

impl Write for OpaqueHalf<dyn ConnectionWriter> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.write(bytes)
    }
    fn flush(&mut self) -> std::io::Result<()> {
        self.0.flush()
    }
}

impl ConnectionWriter for OpaqueHalf<dyn ConnectionWriter> {
    fn set_timeout(&self, timeout: Option<Duration>) -> std::io::Result<()> {
        self.0.set_timeout(timeout)
    }
    fn socket(&self) -> Option<std::os::fd::BorrowedFd<'_>> {
        None
    }
    fn finish(&self) -> std::io::Result<()> {
        self.0.finish()
    }
}

struct OpaqueDialer(Arc<dyn Dialer>);

impl Dialer for OpaqueDialer {
    fn peer(&self) -> String {
        self.0.peer()
    }
    fn dial(
        &self,
        preamble: &migrator::wire::preamble::Preamble,
    ) -> Result<Box<dyn Connection>, migrator::transport::ConnectError> {
        Ok(Box::new(Opaque(self.0.dial(preamble)?)))
    }
}

#[test]
fn moves_it_over_connections_without_a_socket() {
    let ram = filled(1500, LogMode::Manual);
    let host = Host::start(MockDestination::default());
    host.shared.opaque.store(true, Ordering::SeqCst);
    let guest = Guest::run(ram.clone(), 1500, Duration::from_micros(50));
    let dial = Arc::new(OpaqueDialer(host.dialer()));
    let options = Options { verify: true, streams: 2, ..options() };
    let attempt = migrate(MockSource::new(ram.clone()), dial, &options, &MigrationHandle::new());
    drop(guest);
    assert_eq!(attempt.report.outcome, Outcome::Completed, "{:?}", attempt.report);
    assert!(host.outcome().0.ram.unwrap().content() == ram.content());
}

#[test]
fn stop_and_copy_pauses_first() {
    let ram = filled(600, LogMode::Manual);
    let host = Host::start(MockDestination::default());
    let options = Options { mode: Mode::StopAndCopy, verify: true, ..options() };
    let attempt = migrate(MockSource::new(ram.clone()), host.dialer(), &options, &MigrationHandle::new());
    assert_eq!(attempt.report.outcome, Outcome::Completed, "{:?}", attempt.report);
    assert_eq!((attempt.report.rounds.len(), attempt.vm.log_starts), (1, 0));
    assert!(host.outcome().0.ram.unwrap().content() == ram.content());
}

#[test]
fn a_paused_guest_stays_paused() {
    for refuse in [false, true] {
        let ram = filled(600, LogMode::Manual);
        ram.lock().paused = true;
        let host = Host::start(MockDestination { fails: refuse.then_some("load"), ..MockDestination::default() });
        let vm = MockSource { was_paused: true, ..MockSource::new(ram.clone()) };
        let attempt = migrate(vm, host.dialer(), &options(), &MigrationHandle::new());
        let (destination, result) = host.outcome();
        if refuse {
            attempt.assert_still_here();
            continue;
        }
        assert_eq!(attempt.report.outcome, Outcome::Completed);
        assert_eq!(attempt.report.blackout_ms, None);
        assert!(destination.fate.started_paused.load(Ordering::SeqCst));
        let ram_there = destination.ram.unwrap();
        assert!(ram_there.content() == ram.content() && ram_there.lock().paused);
        let received = result.unwrap();
        assert!(received.announcing.is_none() && received.announce == AnnounceReport::default());
    }
}

#[test]
fn a_cap_on_bandwidth_holds() {
    let ram = filled(1500, LogMode::Manual);
    let host = Host::start(MockDestination::default());
    let options = Options { bandwidth: Some(8_000_000), ..options() };
    let attempt = migrate(MockSource::new(ram), host.dialer(), &options, &MigrationHandle::new());
    assert_eq!(attempt.report.outcome, Outcome::Completed);
    let round = &attempt.report.rounds[0];
    let rate = round.bytes_sent as f64 / round.ms * 1e3;
    assert!(rate < 8_400_000.0, "{rate} bytes a second");
}

#[test]
fn a_refusal_names_everything_wherever_it_comes_from() {
    let host = Host::start(MockDestination::default());
    host.shared.refuse_offer.store(true, Ordering::SeqCst);
    let attempt =
        migrate(MockSource::new(filled(10, LogMode::Manual)), host.dialer(), &options(), &MigrationHandle::new());
    attempt.assert_still_here();
    assert!(attempt.error().contains("this host is being emptied"), "{}", attempt.error());

    let mismatch = |what: &str| Mismatch {
        what: what.into(),
        source: "yes".into(),
        destination: "no".into(),
        hint: "mask it".into(),
    };
    let refusal =
        Refusal { reason: "2 mismatches".into(), mismatches: vec![mismatch("avx512f"), mismatch("tsc_scaling")] };
    let host = Host::start(MockDestination { refusal: Some(refusal), ..MockDestination::default() });
    let attempt =
        migrate(MockSource::new(filled(10, LogMode::Manual)), host.dialer(), &options(), &MigrationHandle::new());
    attempt.assert_still_here();
    for word in ["preflight", "avx512f: yes here, no there (mask it)", "tsc_scaling"] {
        assert!(attempt.error().contains(word), "{}", attempt.error());
    }
    assert!(matches!(host.outcome().1, Err(ReceiveError::Refused(_))));
    assert_eq!(host.steps(), [Step::Receiving, Step::GaveUp]);
}

#[test]
fn failures_of_either_vm_leave_the_guest_running() {
    for (at_source, at_destination, says) in [
        (Some("log"), None, "could not start its dirty log: injected failure of log"),
        (Some("collect"), None, "could not read its dirty log: injected"),
        (Some("pause"), None, "could not be paused: injected"),
        (Some("save"), None, "could not save its state: injected"),
        (None, Some("load"), "could not load its state: injected"),
        (None, Some("start"), "could not be started"),
    ] {
        let ram = filled(700, LogMode::ClearOnRead);
        let host = Host::start(MockDestination { fails: at_destination, ..MockDestination::default() });
        let vm = MockSource { fails: at_source, ..MockSource::new(ram.clone()) };
        let attempt = migrate(vm, host.dialer(), &options(), &MigrationHandle::new());
        attempt.assert_still_here();
        assert_eq!(attempt.report.outcome, Outcome::Failed);
        assert!(attempt.error().contains(says), "{says}: {}", attempt.error());
        let (destination, result) = host.outcome();
        assert!(result.is_err() && destination.fate.discarded.load(Ordering::SeqCst), "{says}");
        assert_eq!(host.steps().last(), Some(&Step::GaveUp));
        assert_eq!(attempt.steps().last(), Some(&Step::Kept));

        // And again: the log was read and cleared in between, but nothing is missing.
        ram.guest_write(3, 3, 77);
        let vm = MockSource { fails: None, ..attempt.vm };
        let attempt = migrate(vm, host.dialer(), &Options { verify: true, ..options() }, &MigrationHandle::new());
        assert_eq!(attempt.report.outcome, Outcome::Completed, "{:?}", attempt.report);
        assert_eq!(attempt.report.rounds[0].pages + attempt.report.rounds[0].zero_pages, 700, "a full first round");
        assert!(host.outcome().0.ram.unwrap().content() == ram.content());
    }
}

#[test]
fn a_start_that_may_have_run_is_the_destinations_loss() {
    let host = Host::start(MockDestination { fails: Some("start-late"), ..MockDestination::default() });
    let attempt =
        migrate(MockSource::new(filled(10, LogMode::Manual)), host.dialer(), &options(), &MigrationHandle::new());
    assert_eq!((attempt.report.outcome, attempt.report.owner), (Outcome::Failed, Owner::Destination));
    assert!(attempt.vm.paused() && attempt.error().contains("injected failure of start"), "{}", attempt.error());
    assert!(matches!(host.outcome().1, Err(ReceiveError::Lost(_))));
}

#[test]
fn verify_finds_memory_that_differs() {
    let host = Host::start(MockDestination { corrupt: true, ..MockDestination::default() });
    let options = Options { verify: true, ..options() };
    let attempt =
        migrate(MockSource::new(filled(100, LogMode::Manual)), host.dialer(), &options, &MigrationHandle::new());
    attempt.assert_still_here();
    assert!(attempt.error().contains("memory differs"), "{}", attempt.error());
    assert!(host.outcome().1.is_err());
}

#[test]
fn a_journal_that_cannot_be_written_ends_it_before_anything_moves() {
    let host = Host::start(MockDestination::default());
    let mut vm = MockSource::new(filled(10, LogMode::Manual));
    let mut journal = MemoryJournal::default();
    journal.fails.store(true, Ordering::SeqCst);
    let id = MigrationId::random().unwrap();
    let report = migrator::migrate(&mut vm, id, host.dialer(), &mut journal, &options(), &MigrationHandle::new());
    assert_eq!(report.owner, Owner::Source);
    assert!(report.error.unwrap().message.contains("disk full") && report.rounds.is_empty());

    host.shared.journal.fails.store(true, Ordering::SeqCst);
    let attempt = migrate(vm, host.dialer(), &options(), &MigrationHandle::new());
    attempt.assert_still_here();
    assert!(attempt.report.rounds.is_empty());
    assert!(
        attempt.error().contains("the destination refused") && attempt.error().contains("disk full"),
        "{}",
        attempt.error()
    );
    assert!(host.outcome().1.is_err());
}

#[test]
fn a_guest_that_is_gone_ends_it() {
    let ram = filled(3000, LogMode::Manual);
    let host = Host::start(MockDestination::default());
    let vm = MockSource::new(ram);
    let gone = vm.gone.clone();
    let (handle, thread) = in_background(vm, host.dialer(), Options { bandwidth: Some(1_000_000), ..options() });
    wait_for(&handle, |progress| progress.phase == Phase::PreCopy);
    *gone.lock().unwrap() = Some("it powered off".into());
    let attempt = thread.join().unwrap();
    assert_eq!((attempt.report.outcome, attempt.report.owner), (Outcome::Failed, Owner::Source));
    assert!(attempt.error().contains("it powered off"));
    assert!(host.outcome().1.is_err());
}

#[test]
fn cancel_while_pages_flow_and_then_again() {
    let ram = filled(3000, LogMode::Manual);
    let host = Host::start(MockDestination::default());
    let (handle, thread) =
        in_background(MockSource::new(ram.clone()), host.dialer(), Options { bandwidth: Some(2_000_000), ..options() });
    wait_for(&handle, |progress| progress.phase == Phase::PreCopy && progress.pages_done > 0);
    let progress = handle.progress();
    assert_eq!((progress.round, progress.pages_total), (1, 3000));
    handle.cancel().unwrap();
    let attempt = thread.join().unwrap();
    attempt.assert_still_here();
    assert_eq!(attempt.report.outcome, Outcome::Cancelled);
    let (vm, result) = host.outcome();
    assert!(vm.fate.discarded.load(Ordering::SeqCst));
    let Err(ReceiveError::GaveUp(error)) = result else { panic!() };
    assert!(error.to_string().contains("cancelled"), "{error}");

    let attempt = migrate(attempt.vm, host.dialer(), &Options { verify: true, ..options() }, &MigrationHandle::new());
    assert_eq!(attempt.report.outcome, Outcome::Completed);
    assert!(host.outcome().0.ram.unwrap().content() == ram.content());
}

#[test]
fn cancel_before_it_began_and_while_the_destination_builds() {
    let host = Host::start(MockDestination::default());
    let handle = MigrationHandle::new();
    handle.cancel().unwrap();
    let attempt = migrate(MockSource::new(filled(10, LogMode::Manual)), host.dialer(), &options(), &handle);
    attempt.assert_still_here();
    assert_eq!(attempt.report.outcome, Outcome::Cancelled);

    let host = Host::start(MockDestination { prepare_takes: Duration::from_secs(3), ..MockDestination::default() });
    let (handle, thread) = in_background(MockSource::new(filled(10, LogMode::Manual)), host.dialer(), options());
    wait_for(&handle, |progress| progress.phase == Phase::Preflight && progress.elapsed > Duration::from_millis(300));
    handle.cancel().unwrap();
    let attempt = thread.join().unwrap();
    assert_eq!(attempt.report.outcome, Outcome::Cancelled);
    assert!(host.outcome().1.is_err());
}

/// A destination that welcomes everyone, says READY, and reads no page.
fn peer_that_does_not_read() -> (SocketAddr, mpsc::Receiver<Vec<TcpStream>>) {
    use migrator::wire::{Message, encode, message::Ready};
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let (sender, kept) = mpsc::channel();
    thread::spawn(move || {
        let mut streams = Vec::new();
        // A request, control, and pages.
        for _ in 0..2 + DEFAULT_STREAMS {
            let accepted = accept(listener.accept().unwrap().0, timeouts()).unwrap();
            let role = accepted.preamble.role;
            let mut stream = accepted.welcome().unwrap().into_stream();
            match role {
                Role::Request => {
                    let mut head = [0; 16];
                    stream.read_exact(&mut head).unwrap();
                    stream.write_all(&encode(&Message::Accepted)).unwrap();
                }
                Role::Control => {
                    stream.write_all(&encode(&Message::Ready(Ready::default()))).unwrap();
                    let mut alive = stream.try_clone().unwrap();
                    thread::spawn(move || {
                        while alive.write_all(&encode(&Message::Ping(0))).is_ok() {
                            thread::sleep(Duration::from_millis(100));
                        }
                    });
                }
                Role::Pages => {}
            }
            streams.push(stream);
        }
        sender.send(streams).unwrap();
    });
    (address, kept)
}

#[test]
fn cancel_while_the_peer_does_not_read() {
    let (address, kept) = peer_that_does_not_read();
    let ram = filled(20_000, LogMode::Manual);
    let dial = Arc::new(TcpDialer::new(address.to_string(), timeouts()));
    let (handle, thread) = in_background(MockSource::new(ram), dial, options());
    let _streams = kept.recv_timeout(HANG).unwrap();
    // Sockets are full long before.
    wait_for(&handle, |progress| progress.phase == Phase::PreCopy && progress.elapsed > Duration::from_secs(1));
    let began = Instant::now();
    handle.cancel().unwrap();
    let attempt = thread.join().unwrap();
    assert!(began.elapsed() < Duration::from_secs(10));
    attempt.assert_still_here();
    assert_eq!(attempt.report.outcome, Outcome::Cancelled);
}

#[test]
fn a_peer_that_does_not_read_is_given_up() {
    let (address, kept) = peer_that_does_not_read();
    let dial = Arc::new(TcpDialer::new(address.to_string(), timeouts()));
    let mut options = options();
    options.timeouts.page_stall = Duration::from_millis(500);
    let (_, thread) = in_background(MockSource::new(filled(20_000, LogMode::Manual)), dial, options);
    let _streams = kept.recv_timeout(HANG).unwrap();
    let attempt = thread.join().unwrap();
    attempt.assert_still_here();
    assert!(attempt.error().contains("does not take pages any more"), "{}", attempt.error());
}

/// A proxy before the destination that can be cut, or made silent.
struct Link {
    address: SocketAddr,
    streams: Arc<Mutex<Vec<TcpStream>>>,
    mute: Arc<AtomicBool>,
}

impl Link {
    fn to(host: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let (streams, mute): (Arc<Mutex<Vec<TcpStream>>>, Arc<AtomicBool>) = Default::default();
        let (list, flag) = (streams.clone(), mute.clone());
        thread::spawn(move || {
            for near in listener.incoming() {
                let near = near.unwrap();
                if flag.load(Ordering::SeqCst) {
                    continue;
                }
                let far = TcpStream::connect(host).unwrap();
                for (mut from, mut to) in [
                    (near.try_clone().unwrap(), far.try_clone().unwrap()),
                    (far.try_clone().unwrap(), near.try_clone().unwrap()),
                ] {
                    let flag = flag.clone();
                    thread::spawn(move || {
                        let mut buffer = [0; 65536];
                        while let Ok(count) = from.read(&mut buffer) {
                            while flag.load(Ordering::SeqCst) {
                                thread::sleep(Duration::from_millis(10));
                            }
                            if count == 0 || to.write_all(&buffer[..count]).is_err() {
                                break;
                            }
                        }
                        let _ = to.shutdown(std::net::Shutdown::Write);
                    });
                }
                list.lock().unwrap().extend([near, far]);
            }
        });
        Self { address, streams, mute }
    }

    fn cut(&self) {
        for stream in self.streams.lock().unwrap().drain(..) {
            let _ = stream.shutdown(std::net::Shutdown::Both);
        }
    }
}

#[test]
fn a_cut_link_and_a_silent_link_leave_the_guest_here() {
    for silent in [false, true] {
        let host = Host::start(MockDestination::default());
        let link = Link::to(host.address);
        let dial = Arc::new(TcpDialer::new(link.address.to_string(), timeouts()));
        let ram = filled(3000, LogMode::Manual);
        let (handle, thread) =
            in_background(MockSource::new(ram), dial, Options { bandwidth: Some(1_000_000), ..options() });
        wait_for(&handle, |progress| progress.phase == Phase::PreCopy && progress.pages_done > 0);
        if silent {
            link.mute.store(true, Ordering::SeqCst);
        } else {
            link.cut();
        }
        let attempt = thread.join().unwrap();
        attempt.assert_still_here();
        assert_eq!(attempt.report.outcome, Outcome::Failed);
        assert!(
            attempt.error().contains(if silent { "nothing came for" } else { "pre-copy: " }),
            "{}",
            attempt.error()
        );
        let (vm, result) = host.outcome();
        assert!(result.is_err() && vm.fate.discarded.load(Ordering::SeqCst));
        link.mute.store(false, Ordering::SeqCst);
    }
}

/// A destination process that dies, or hangs, when COMMIT comes: from the outside of its start.
struct Deadly {
    inner: MockDestination,
    link: Arc<Link>,
    /// Runs before it loses the link.
    starts: bool,
}

impl DestinationVm for Deadly {
    fn prepare(&mut self, description: &VmDescription) -> Result<(), Refusal> {
        self.inner.prepare(description)
    }
    fn memory(&self) -> Arc<dyn GuestPages> {
        self.inner.memory()
    }
    fn load_state(&mut self, sections: Vec<Section>) -> Result<(), VmError> {
        self.inner.load_state(sections)
    }
    fn start(&mut self, paused: bool) -> Result<Started, StartError> {
        // COMMIT is here: from now on the source hears nothing on control.
        self.link.cut();
        thread::sleep(Duration::from_millis(200));
        if self.starts {
            self.inner.start(paused)
        } else {
            Err(StartError { may_have_run: false, source: "no".into() })
        }
    }
    fn announcer(&self) -> Arc<dyn Announcer> {
        self.inner.announcer()
    }
    fn discard(&mut self) {
        self.inner.discard();
    }
}

/// Migrates through a link that is cut between COMMIT and RUNNING. Gives back the attempt's thread and the host.
fn cut_after_commit(
    starts: bool,
    deaf: bool,
) -> (Host, MigrationHandle, JoinHandle<Attempt>, JoinHandle<Result_>, MigrationId) {
    let host = Host::start(MockDestination::default());
    let link = Arc::new(Link::to(host.address));
    let id = MigrationId::random().unwrap();
    let ram = filled(100, LogMode::Manual);
    let (sender, connections) = mpsc::channel();
    host.shared.routes.lock().unwrap().insert(id, sender);
    host.shared.alive.store(true, Ordering::SeqCst);
    let mut vm = Deadly { inner: MockDestination::default(), link: link.clone(), starts };
    let description = MockSource::new(ram.clone()).description();
    let state = host.shared.clone();
    let receiver = thread::spawn(move || {
        let offer = Offer { id, vm: description, streams: DEFAULT_STREAMS, verify: false, compressed: false };
        let options = ReceiveOptions { timeouts: timeouts(), ..ReceiveOptions::default() };
        let result = migrator::receive(
            &mut vm,
            Incoming { offer, connections },
            &mut state.journal.clone(),
            &options,
            &MigrationHandle::new(),
        );
        state.alive.store(false, Ordering::SeqCst);
        result
    });
    // The offer is answered by an agent that does nothing more: the receiver is there already.
    let handle = MigrationHandle::new();
    let dial = Arc::new(OfferedDialer {
        link: TcpDialer::new(link.address.to_string(), timeouts()),
        host: host.shared.clone(),
        deaf,
    });
    let clone = handle.clone();
    let thread = thread::spawn(move || migrate_as(id, MockSource::new(ram), dial, &options(), &clone));
    (host, handle, thread, receiver, id)
}

/// Answers the offer itself, and dials everything else.
struct OfferedDialer {
    link: TcpDialer,
    host: Arc<HostState>,
    deaf: bool,
}

impl Dialer for OfferedDialer {
    fn peer(&self) -> String {
        self.link.peer()
    }
    fn dial(
        &self,
        preamble: &migrator::wire::preamble::Preamble,
    ) -> Result<Box<dyn Connection>, migrator::transport::ConnectError> {
        if preamble.role == Role::Request
            && self.host.journal.records.lock().unwrap().iter().all(|record| record.step < Step::Committed)
        {
            let (near, far) = pair();
            thread::spawn(move || {
                struct Yes;
                impl Requests for Yes {
                    fn offer(&mut self, _: Offer) -> Result<(), Refusal> {
                        Ok(())
                    }
                    fn ask(&mut self, _: MigrationId) -> Result<AskAnswer, Refusal> {
                        Ok(AskAnswer::Pending)
                    }
                }
                let _ = request::serve(Box::new(far), Duration::from_secs(1), &mut Yes);
            });
            return Ok(Box::new(near));
        }
        if preamble.role == Role::Request && self.deaf {
            self.host.deaf.store(true, Ordering::SeqCst);
        }
        self.link.dial(preamble)
    }
}

fn pair() -> (TcpConnection, TcpConnection) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let far = listener.accept().unwrap().0;
    (TcpConnection::new(near, timeouts()).unwrap(), TcpConnection::new(far, timeouts()).unwrap())
}

#[test]
fn in_doubt_settles_itself_when_the_agent_answers() {
    let (_host, _, thread, receiver, _) = cut_after_commit(true, false);
    let attempt = thread.join().unwrap();
    assert!(receiver.join().unwrap().is_ok());
    assert_eq!(
        (attempt.report.outcome, attempt.report.owner),
        (Outcome::Completed, Owner::Destination),
        "{:?}",
        attempt.report
    );
    assert!(attempt.vm.paused());
    assert_eq!(attempt.steps(), [Step::Sending, Step::Decided, Step::Released]);

    let (host, _, thread, receiver, id) = cut_after_commit(false, false);
    let attempt = thread.join().unwrap();
    assert!(receiver.join().unwrap().is_err());
    attempt.assert_still_here();
    assert_eq!(attempt.report.outcome, Outcome::Failed);
    assert_eq!(attempt.steps(), [Step::Sending, Step::Decided, Step::Kept]);
    let records = host.shared.journal.records.lock().unwrap().clone();
    assert_eq!(handoff::answer(&records, id, false), Answer::GaveUp);
}

#[test]
fn in_doubt_stays_until_someone_says_who_it_is() {
    for (resolution, owner) in [(Resolution::Keep, Owner::Source), (Resolution::Discard, Owner::Destination)] {
        let (_host, handle, thread, receiver, _) = cut_after_commit(resolution == Resolution::Discard, true);
        wait_for(&handle, |progress| progress.phase == Phase::InDoubt && progress.last_answer.is_some());
        let report = handle.report().unwrap();
        assert_eq!((report.outcome, report.owner), (Outcome::InDoubt, Owner::Unknown));
        assert!(report.error.unwrap().hint.contains("microvm resolve mock --keep"));
        assert_eq!(handle.cancel(), Err(HandleError::Committed));
        handle.resolve(resolution).unwrap();
        let attempt = thread.join().unwrap();
        assert_eq!(attempt.report.owner, owner);
        assert_eq!(attempt.vm.paused(), owner == Owner::Destination);
        assert!(attempt.error().contains("settled by hand"), "{}", attempt.error());
        let _ = receiver.join().unwrap();
    }
}

/// Something that listens and is no microvm.
fn stranger(says: &'static [u8], then_waits: bool) -> Arc<dyn Dialer> {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        let mut stream = listener.accept().unwrap().0;
        stream.write_all(says).unwrap();
        if then_waits {
            let _ = stream.read_to_end(&mut Vec::new());
        }
        thread::sleep(Duration::from_millis(100));
    });
    Arc::new(TcpDialer::new(address.to_string(), Timeouts { connect: Duration::from_millis(500), ..timeouts() }))
}

#[test]
fn strangers_are_called_by_name() {
    let refused = {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        Arc::new(TcpDialer::new(listener.local_addr().unwrap().to_string(), timeouts()))
    };
    for (dial, says) in [
        (
            stranger(b"HTTP/1.1 400 Bad Request\r\nServer: x\r\n\r\n", true),
            r#"answers, but not with the microvm protocol (got "HTTP/1.1 400 Bad Request")"#,
        ),
        (stranger(b"SSH-2.0-x\r\n", true), r#"(got "SSH-2.0-x")"#),
        (stranger(b"\xff\x00\xfe", true), "not with the microvm protocol"),
        (stranger(b"", true), "said nothing for 500ms"),
        (stranger(b"", false), "the connection broke"),
        (
            stranger(b"MICROVM\n\x04\x00\x09\x00\x00\x00", true),
            "speaks version 9 of the migration protocol, this host version 2",
        ),
        (stranger(b"MICROVM\n\xff\xff", true), "broke the protocol"),
        (refused, "cannot connect: Connection refused"),
        (Arc::new(TcpDialer::new("no.such.host.invalid:7437", timeouts())), "no such host"),
    ] as [(Arc<dyn Dialer>, &str); 9]
    {
        let attempt = migrate(MockSource::new(filled(10, LogMode::Manual)), dial, &options(), &MigrationHandle::new());
        attempt.assert_still_here();
        assert!(attempt.error().contains(says), "{says}: {}", attempt.error());
        assert!(attempt.error().starts_with("preflight: "));
        assert!(!attempt.report.error.as_ref().unwrap().hint.is_empty());
    }
}

#[test]
fn an_agent_tells_strangers_why() {
    let host = Host::start(MockDestination::default());
    let ask = |bytes: &[u8]| {
        let mut stream = TcpStream::connect(host.address).unwrap();
        stream.write_all(bytes).unwrap();
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        String::from_utf8_lossy(&answer).into_owned()
    };
    assert!(
        ask(b"MICROVM\n\x04\x00\x01\x00\x01\x00")
            .contains("the peer speaks version 1 of the migration protocol, this host version 2")
    );
    assert_eq!(ask(b"GET / HTTP/1.1\r\n\r\n"), "");
    // A migration that nobody knows.
    let preamble = migrator::wire::preamble::Preamble { role: Role::Control, stream: 0, id: MigrationId([9; 16]) };
    assert!(ask(&preamble.encode(false)).contains("unknown migration"));
    // Asking about it leaves a tombstone, and the attempt can never begin.
    assert_eq!(request::ask(&*host.dialer(), MigrationId([9; 16]), HANG).unwrap(), AskAnswer::GaveUp);
    let vm = MockSource::new(filled(10, LogMode::Manual));
    let attempt = migrate_as(MigrationId([9; 16]), vm, host.dialer(), &options(), &MigrationHandle::new());
    attempt.assert_still_here();
    assert!(host.outcome().1.is_err());
}

/// Memory of every kind, chunk by chunk: zeros, text, noise, and pages of all three.
fn mixed(pages: u64) -> Arc<MockRam> {
    let ram = MockRam::new(pages, LogMode::Manual);
    let mut random = Random(5);
    for (page, bytes) in ram.lock().bytes.chunks_mut(4096).enumerate() {
        let kind = if page / 512 % 4 < 3 { page / 512 % 4 } else { page % 3 };
        match kind {
            0 => {}
            1 => {
                let text = format!("page {page} has text, as other pages do. ");
                bytes.iter_mut().zip(text.bytes().cycle()).for_each(|(byte, letter)| *byte = letter);
            }
            _ => bytes.chunks_mut(8).for_each(|word| word.copy_from_slice(&random.next().to_le_bytes())),
        }
    }
    ram
}

#[test]
fn moves_it_with_every_kind_of_compression() {
    for (compression, streams, bandwidth, opaque) in [
        (Compression::None, 1, None, false),
        (Compression::Zstd(1), 1, None, false),
        (Compression::Zstd(-3), 4, None, false),
        (Compression::Zstd(3), 2, None, true),
        (Compression::Zstd(1), 1, Some(20_000_000), false),
        (Compression::Auto, 1, None, false),
        (Compression::Auto, 3, None, true),
        (Compression::Auto, 1, Some(5_000_000), false),
    ] {
        let name = format!("{compression} {streams} {bandwidth:?} {opaque}");
        let pages = 5000;
        let ram = mixed(pages);
        let host = Host::start(MockDestination::default());
        host.shared.opaque.store(opaque, Ordering::SeqCst);
        let dial = if opaque { Arc::new(OpaqueDialer(host.dialer())) } else { host.dialer() };
        let guest = Guest::run(ram.clone(), pages, Duration::from_micros(500));
        let options = Options { compression, streams, bandwidth, verify: true, ..options() };
        let attempt = migrate(MockSource::new(ram.clone()), dial, &options, &MigrationHandle::new());
        drop(guest);
        let report = &attempt.report;
        assert_eq!(report.outcome, Outcome::Completed, "{name}: {report:?}");
        assert!(host.outcome().0.ram.unwrap().content() == ram.content(), "{name}");
        // What it did, and that it adds up.
        let compressed = report.compression.as_ref().unwrap();
        let pages: u64 = report.rounds.iter().map(|round| round.pages).sum();
        assert_eq!((compressed.mode.as_str(), compressed.raw_bytes), (compression.to_string().as_str(), pages * 4096));
        let headers = report.bytes_sent - compressed.sent_bytes;
        assert!(headers > 0 && headers.is_multiple_of(160), "{name}: {report:?}");
        assert!(compressed.level.is_none() || compressed.sent_bytes < compressed.raw_bytes, "{name}: {compressed:?}");
        match compression {
            Compression::None => {
                assert_eq!((compressed.level, compressed.sent_bytes), (None, compressed.raw_bytes), "{name}");
            }
            Compression::Zstd(level) => assert_eq!(compressed.level, Some(level), "{name}: {compressed:?}"),
            // At this rate there is no doubt.
            Compression::Auto if bandwidth.is_some() => assert!(compressed.level.is_some(), "{name}: {report:?}"),
            // It may have tried levels, and sent most as it is.
            Compression::Auto => {}
        }
        assert!(report.limit.is_some(), "{name}: {report:?}");
    }
}

/// Threads that send and compress pages stand back for the guest while it runs, and for nobody while it does not.
#[test]
fn the_guest_goes_first_while_it_runs() {
    let usual = rustix::process::getpriority_process(None).unwrap();
    for compression in [Compression::None, Compression::Zstd(1)] {
        let ram = mixed(2000);
        let host = Host::start(MockDestination::default());
        let options = Options { compression, ..options() };
        let guest = Guest::run(ram.clone(), 2000, Duration::from_micros(500));
        let attempt = migrate(MockSource::new(ram.clone()), host.dialer(), &options, &MigrationHandle::new());
        drop(guest);
        assert_eq!(attempt.report.outcome, Outcome::Completed, "{compression}: {:?}", attempt.report);
        let nice = ram.nice.lock().unwrap();
        assert!(nice.contains(&(false, usual.max(10))), "{compression}: {nice:?}");
        assert!(nice.contains(&(true, usual)), "{compression}: {nice:?}");
        assert!(!nice.contains(&(true, usual + 10)), "{compression}: {nice:?}");
    }
}

#[test]
fn what_the_guest_writes_while_it_is_compressed_is_not_lost() {
    // Pages are armed again before they are copied, wherever that is done.
    let ram = mixed(3000);
    let host = Host::start(MockDestination::default());
    let options = Options { compression: Compression::Zstd(6), streams: 2, verify: true, ..options() };
    let guest = Guest::run(ram.clone(), 3000, Duration::from_micros(50));
    let attempt = migrate(MockSource::new(ram.clone()), host.dialer(), &options, &MigrationHandle::new());
    drop(guest);
    let report = &attempt.report;
    assert_eq!(report.outcome, Outcome::Completed, "{report:?}");
    let (_, before) = report.rounds.split_last().unwrap();
    let armed: u64 = before.iter().map(|round| round.pages + round.zero_pages).sum();
    assert_eq!(ram.rearmed.load(Ordering::Relaxed), armed);
    assert!(host.outcome().0.ram.unwrap().content() == ram.content());
}

#[test]
fn what_the_guest_writes_all_the_time_is_left_for_the_second_round() {
    const HOT: std::ops::Range<u64> = 15_000..15_100;
    for (mode, left) in [(LogMode::Manual, HOT.end - HOT.start), (LogMode::ClearOnRead, 0)] {
        let ram = filled(20_000, mode);
        let host = Host::start(MockDestination::default());
        let options = Options { bandwidth: Some(40_000_000), verify: true, ..options() };
        let (stop, guest) = (Arc::new(AtomicBool::new(false)), ram.clone());
        let flag = stop.clone();
        let writer = thread::spawn(move || {
            for n in 0u64.. {
                HOT.for_each(|page| {
                    guest.guest_write(page, 8, n as u8);
                });
                if flag.load(Ordering::Relaxed) {
                    return;
                }
                thread::sleep(Duration::from_millis(1));
            }
        });
        let attempt = migrate(MockSource::new(ram.clone()), host.dialer(), &options, &MigrationHandle::new());
        stop.store(true, Ordering::Relaxed);
        writer.join().unwrap();
        let rounds = &attempt.report.rounds;
        assert_eq!(attempt.report.outcome, Outcome::Completed, "{:?}", attempt.report);
        assert_eq!(rounds[0].pages + rounds[0].zero_pages, 20_000 - left, "{rounds:?}");
        assert_eq!(rounds[0].dirty_pages_after, HOT.end - HOT.start);
        assert_eq!(rounds[1].pages, HOT.end - HOT.start);
        assert!(host.outcome().0.ram.unwrap().content() == ram.content());
    }
}

#[test]
fn cancel_while_it_is_compressed() {
    for (compression, streams) in [(Compression::Zstd(12), 1), (Compression::Zstd(12), 8), (Compression::Auto, 4)] {
        let ram = mixed(20_000);
        let host = Host::start(MockDestination::default());
        let options = Options { compression, streams, bandwidth: Some(1_000_000), ..options() };
        let (handle, thread) = in_background(MockSource::new(ram.clone()), host.dialer(), options);
        wait_for(&handle, |progress| progress.phase == Phase::PreCopy && progress.compression.level.is_some());
        handle.cancel().unwrap();
        let attempt = thread.join().unwrap();
        attempt.assert_still_here();
        assert_eq!(attempt.report.outcome, Outcome::Cancelled);
        assert!(host.outcome().1.is_err());
    }
}

#[test]
fn cancel_while_the_peer_takes_no_frames() {
    let (address, kept) = peer_that_does_not_read();
    let dial = Arc::new(TcpDialer::new(address.to_string(), timeouts()));
    let options = Options { compression: Compression::Zstd(1), ..options() };
    let ram = MockRam::new(20_000, LogMode::Manual);
    let mut random = Random(1);
    // Half noise: it gets shorter, but not short enough for the sockets' buffers.
    for page in ram.lock().bytes.chunks_mut(4096) {
        page[..2048].chunks_mut(8).for_each(|word| word.copy_from_slice(&random.next().to_le_bytes()));
    }
    let (handle, thread) = in_background(MockSource::new(ram), dial, options);
    let _streams = kept.recv_timeout(HANG).unwrap();
    wait_for(&handle, |progress| progress.phase == Phase::PreCopy && progress.elapsed > Duration::from_secs(1));
    handle.cancel().unwrap();
    let attempt = thread.join().unwrap();
    attempt.assert_still_here();
    assert_eq!(attempt.report.outcome, Outcome::Cancelled);
}

/// Offers a VM to a host whose agent is this test, and sends bytes on its page stream. What the host made of it.
fn sent_to(host: &Host, compressed: bool, bytes: &[u8]) -> (MockDestination, String) {
    use migrator::wire::preamble::Preamble;
    let id = MigrationId::random().unwrap();
    let vm = MockSource::new(MockRam::new(600, LogMode::Manual)).description();
    let dialer = host.dialer();
    request::offer(&*dialer, &Offer { id, vm, streams: 1, verify: false, compressed }, HANG).unwrap().unwrap();
    let dial = |role| dialer.dial(&Preamble { role, stream: 0, id }).unwrap().split().unwrap();
    let (_control, mut pages) = (dial(Role::Control), dial(Role::Pages));
    pages.writer.write_all(bytes).unwrap();
    pages.writer.finish().unwrap();
    let (vm, result) = host.outcome();
    let Err(ReceiveError::GaveUp(error)) = result else { panic!("{result:?}") };
    (vm, error.to_string())
}

#[test]
fn hostile_frames_end_the_migration() {
    use migrator::bitmap::ChunkBits;
    use migrator::pages::{Chunk, PageFrame};
    let golden = include_str!("golden/v2/page-chunk-packed.hex");
    let good: Vec<u8> = golden.split_whitespace().map(|byte| u8::from_str_radix(byte, 16).unwrap()).collect();
    let (_, frame) = good.split_at(160);
    let chunk = |pages: u64, packed: usize, body: &[u8]| {
        let mut data = ChunkBits::default();
        (0..pages).for_each(|page| data.set(page));
        let zero = ChunkBits::default();
        let header = PageFrame::Chunk(Chunk { round: 1, chunk: 0, data, zero, packed: packed as u32 }).encode();
        // The header of the next frame comes with the body.
        [&header[..], body, &[0; 160]].concat()
    };
    let garbage = [0x5a; 4000];
    let doubled = [frame, frame].concat();
    let mut turned = frame.to_vec();
    *turned.last_mut().unwrap() ^= 0x80;
    // 8 GiB of one byte in 256 KB.
    let mut bomb = vec![0x28, 0xb5, 0x2f, 0xfd, 0x00, 0x38];
    for block in 1..=65_536u32 {
        bomb.extend(&((128 << 13) | 2 | u32::from(block == 65_536)).to_le_bytes()[..3]);
        bomb.push(b'x');
    }
    for (bytes, says) in [
        (chunk(3, 3 * 4096, &vec![0; 3 * 4096]), "packed"),
        (chunk(3, u32::MAX as usize, &[]), "packed"),
        (chunk(3, garbage.len(), &garbage), "is not one zstd frame"),
        (chunk(3, frame.len() - 1, &frame[..frame.len() - 1]), "is not one zstd frame"),
        (chunk(3, frame.len() + 1, &[frame, &[0]].concat()), "is not one zstd frame"),
        (chunk(6, doubled.len(), &doubled), "is not one zstd frame"),
        (chunk(2, frame.len(), frame), "cannot be decompressed"),
        (chunk(4, frame.len(), frame), "holds 12288 bytes of 16384"),
        (chunk(3, turned.len(), &turned), "cannot be decompressed"),
        (chunk(512, bomb.len(), &bomb), "cannot be decompressed"),
        (good[..170].to_vec(), "the other side closed it"),
    ] {
        let host = Host::start(MockDestination::default());
        let (vm, error) = sent_to(&host, true, &bytes);
        assert!(error.contains(says), "{says}: {error}");
        assert!(vm.fate.discarded.load(Ordering::SeqCst) && host.steps().last() == Some(&Step::GaveUp));
    }
    // A good one, which was not announced; and one that was: then it is what comes next that is wrong.
    let host = Host::start(MockDestination::default());
    let (_, error) = sent_to(&host, false, &chunk(3, frame.len(), frame));
    assert!(error.contains("of which the offer said nothing"), "{error}");
    let host = Host::start(MockDestination::default());
    let (_, error) = sent_to(&host, true, &chunk(3, frame.len(), frame));
    assert!(error.contains("checksum"), "{error}");
}

#[test]
fn does_not_converge_and_says_so() {
    let ram = filled(600, LogMode::Manual);
    let host = Host::start(MockDestination::default());
    // Slow enough that the guest is faster on a busy machine, too.
    let mut options =
        Options { bandwidth: Some(2_000_000), max_downtime: Duration::from_millis(60), throttle: false, ..options() };
    options.convergence.stall_time = Duration::from_millis(300);
    let guest = Guest::run(ram.clone(), 600, Duration::from_nanos(1));
    let attempt = migrate(MockSource::new(ram), host.dialer(), &options, &MigrationHandle::new());
    drop(guest);
    attempt.assert_still_here();
    assert!(attempt.error().starts_with("pre-copy: pre-copy does not converge"), "{}", attempt.error());
    assert!(attempt.error().contains("the link carries"), "{}", attempt.error());
    assert_eq!(attempt.vm.throttles, [0; 0]);
}

/// Moves a guest that writes three times what the link carries; the throttle follows.
fn moves_slowly(fails: Option<&'static str>) -> Attempt {
    let ram = filled(1000, LogMode::Manual);
    let host = Host::start(MockDestination::default());
    let mut options = Options { bandwidth: Some(4_000_000), max_downtime: Duration::from_millis(400), ..options() };
    (options.convergence.stall_rounds, options.convergence.stall_time) = (2, Duration::ZERO);
    let guest = Guest::at_rate(ram.clone(), 1000, 3000.0);
    let attempt =
        migrate(MockSource { fails, ..MockSource::new(ram) }, host.dialer(), &options, &MigrationHandle::new());
    drop(guest);
    attempt
}

#[test]
fn a_guest_that_writes_too_fast_is_slowed_down() {
    let Attempt { vm, report, .. } = moves_slowly(None);
    assert_eq!(report.outcome, Outcome::Completed, "{report:?}");
    assert!(report.throttle_permille > 0 && report.throttled_ms > 0.0, "{report:?}");
    assert_eq!(vm.throttles.iter().max(), Some(&report.throttle_permille));
    let (last, raised) = vm.throttles.split_last().unwrap();
    assert!(*last == 0 && raised.is_sorted(), "{:?}", vm.throttles);
}

#[test]
fn the_throttle_is_taken_off_whatever_happens() {
    let says =
        [("throttle", "could not be slowed down"), ("save", "could not save its state"), ("panic", "a bug in microvm")];
    for (fails, says) in says {
        let attempt = moves_slowly(Some(fails));
        attempt.assert_still_here();
        assert!(attempt.error().contains(says), "{}", attempt.error());
        let throttles = &attempt.vm.throttles;
        assert!(throttles.len() > 1 && throttles.last() == Some(&0), "{fails}: {throttles:?}");
    }
}

#[test]
fn a_time_limit_ends_pre_copy() {
    let host = Host::start(MockDestination::default());
    let options = Options { bandwidth: Some(500_000), timeout: Some(Duration::from_millis(700)), ..options() };
    let attempt =
        migrate(MockSource::new(filled(3000, LogMode::Manual)), host.dialer(), &options, &MigrationHandle::new());
    attempt.assert_still_here();
    assert!(attempt.error().contains("took longer than 700ms"), "{}", attempt.error());
}
