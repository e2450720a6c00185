//! The thread on which all devices of a VM do their work, and the switch that stops it for a snapshot or a migration.
//!
//! One thread a VM waits in epoll for every device's file descriptors (queue notifications, the TAP, console input). A handler
//! does a bounded piece of work and returns: one that has more to do says so and gets its next turn after all others had
//! theirs, so that a flood on one device cannot starve another.
//!
//! [`IoThread::pause`] is what makes saved state consistent: when it returns, the thread sits on a condition variable, no
//! handler runs and none will, so nothing of ours writes guest memory. Pause *before* reading the interrupt controller's
//! state, because a device may raise its interrupt up to that moment. [`IoThread::resume`] tells every handler to look at
//! everything again, because edges that came meanwhile, or that a restored machine never saw, must not be missed.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::{JoinHandle, ThreadId};

use rustix::event::{Timespec, epoll};
use tracing::{error, warn};
use vmm_sys_util::eventfd::EventFd;

use crate::sandbox::{self, ThreadKind};

/// What a handler wants after its piece of work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// Nothing more to do until a descriptor is ready.
    Idle,
    /// There is more to do now: call again with [`Wake::Continue`] when the others had their turn.
    More,
    /// The source is used up (end of input, gone device): forget it and close its descriptors.
    Finished,
}

impl Turn {
    /// `More` if either has more to do.
    pub fn and(self, other: Self) -> Self {
        if self == Self::Idle { other } else { self }
    }
}

/// Why a handler is called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wake {
    /// The descriptor registered with this token is ready. Errors and hang-ups read as readable and writable: the call on
    /// the descriptor tells what it is.
    Ready {
        /// As given to [`Watch`].
        token: u32,
        /// A read will not block.
        readable: bool,
        /// A write will not block.
        writable: bool,
    },
    /// The handler answered [`Turn::More`] before.
    Continue,
    /// The thread was started or resumed: anything may be ready, edges may have been lost.
    Resumed,
}

/// Does a source's work on the I/O thread: never blocks, never takes long.
pub trait EventHandler: Send {
    /// Does one bounded piece of work.
    fn handle(&mut self, wake: Wake) -> Turn;
}

/// When a descriptor wakes its handler.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trigger {
    /// As long as it is readable. The handler must read, or switch the watch off with [`IoHandle::set_watch`].
    Readable,
    /// When it *becomes* readable or writable. The handler remembers it until a call answers `EAGAIN`. An eventfd watched so
    /// need not be read at all: every write of it is an edge.
    Edge,
}

/// One descriptor of a source.
#[derive(Debug)]
pub struct Watch {
    /// Owned by the thread until the source is finished or unregistered.
    pub fd: OwnedFd,
    /// Handed back in [`Wake::Ready`].
    pub token: u32,
    /// When to wake.
    pub trigger: Trigger,
}

/// Names a registered source.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct SourceId(u32);

struct WatchSlot {
    watch: Watch,
    on: bool,
}

struct Source {
    /// None once it is finished or unregistered: whoever has found the source before must not call it any more.
    handler: Mutex<Option<Box<dyn EventHandler>>>,
    watches: Mutex<Vec<WatchSlot>>,
}

#[derive(Default)]
struct Sources {
    next_id: u32,
    by_id: BTreeMap<SourceId, Arc<Source>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wanted {
    Run,
    Pause,
    Stop,
}

struct Gate {
    wanted: Wanted,
    /// The thread waits at the gate, outside all handlers.
    parked: bool,
    /// The thread has ended, in whatever way.
    finished: bool,
    /// Handlers must look at everything again when the gate opens.
    look_again: bool,
    thread: Option<ThreadId>,
}

struct Shared {
    epoll: OwnedFd,
    waker: OwnedFd,
    gate: Mutex<Gate>,
    gate_moved: Condvar,
    /// Set whenever the thread must come to the gate: read between two handlers without taking the lock.
    attention: AtomicBool,
    sources: Mutex<Sources>,
}

/// The key of the waker in epoll; sources have keys below `u32::MAX << 32`.
const WAKER: u64 = u64::MAX;
const EVENTS_PER_WAIT: usize = 32;

/// Registers sources with an [`IoThread`]; handlers may hold one.
#[derive(Clone)]
pub struct IoHandle {
    shared: Arc<Shared>,
}

/// The I/O thread of one VM. Dropping it stops the thread.
pub struct IoThread {
    handle: IoHandle,
    thread: Mutex<Option<JoinHandle<()>>>,
}

/// Locks whose holder cannot leave broken data behind: a panic elsewhere must not keep a VM from being paused or stopped.
fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

impl IoThread {
    /// Starts the thread, paused: nothing runs until [`resume`](Self::resume).
    pub fn spawn(name: &str) -> io::Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let waker =
            rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC | rustix::event::EventfdFlags::NONBLOCK)?;
        epoll::add(&epoll, &waker, epoll::EventData::new_u64(WAKER), epoll::EventFlags::IN | epoll::EventFlags::ET)?;
        let shared = Arc::new(Shared {
            epoll,
            waker,
            gate: Mutex::new(Gate {
                wanted: Wanted::Pause,
                parked: false,
                finished: false,
                look_again: false,
                thread: None,
            }),
            gate_moved: Condvar::new(),
            attention: AtomicBool::new(true),
            sources: Mutex::default(),
        });
        let for_thread = shared.clone();
        let thread = std::thread::Builder::new().name(name.into()).spawn(move || run(&for_thread))?;
        Ok(Self { handle: IoHandle { shared }, thread: Mutex::new(Some(thread)) })
    }

    /// For registering sources.
    pub fn handle(&self) -> IoHandle {
        self.handle.clone()
    }

    /// Returns when no handler is running and none will run until [`resume`](Self::resume): after at most one piece of work
    /// of one handler. Idempotent, not counted: pausing and resuming belong in one hand. Must not be called from a handler (it would wait for itself; it returns at once instead).
    pub fn pause(&self) {
        let shared = &self.handle.shared;
        let mut gate = lock(&shared.gate);
        if gate.wanted == Wanted::Run {
            gate.wanted = Wanted::Pause;
        }
        shared.call_attention();
        if gate.thread == Some(std::thread::current().id()) {
            error!("the I/O thread was paused from one of its own handlers");
            return;
        }
        // Whoever resumes meanwhile takes this pause back; waiting for another one would be waiting for ever.
        while gate.wanted == Wanted::Pause && !gate.parked && !gate.finished {
            gate = shared.gate_moved.wait(gate).unwrap_or_else(std::sync::PoisonError::into_inner);
        }
    }

    /// Lets the thread run, beginning with [`Wake::Resumed`] for every source. Does nothing when it runs already.
    pub fn resume(&self) {
        let shared = &self.handle.shared;
        let mut gate = lock(&shared.gate);
        if gate.wanted == Wanted::Pause {
            gate.wanted = Wanted::Run;
            gate.look_again = true;
            shared.attention.store(false, Ordering::Release);
            shared.gate_moved.notify_all();
        }
    }

    /// Ends the thread, paused or not, drops all handlers and closes their descriptors. Idempotent.
    pub fn stop(&self) {
        let shared = &self.handle.shared;
        {
            let mut gate = lock(&shared.gate);
            gate.wanted = Wanted::Stop;
            shared.call_attention();
            shared.gate_moved.notify_all();
            if gate.thread == Some(std::thread::current().id()) {
                return;
            }
        }
        if let Some(thread) = lock(&self.thread).take()
            && thread.join().is_err()
        {
            error!("the I/O thread panicked");
        }
        let sources = std::mem::take(&mut lock(&shared.sources).by_id);
        drop(sources);
    }
}

impl Drop for IoThread {
    fn drop(&mut self) {
        self.stop();
    }
}

impl IoHandle {
    /// Serves `handler` whenever one of `watches` is ready. Descriptors that epoll does not take (regular files) are refused
    /// with `EPERM`.
    pub fn register(&self, watches: Vec<Watch>, handler: Box<dyn EventHandler>) -> io::Result<SourceId> {
        let mut sources = lock(&self.shared.sources);
        let id = SourceId(sources.next_id);
        sources.next_id =
            sources.next_id.checked_add(1).filter(|next| *next < u32::MAX).ok_or(io::ErrorKind::OutOfMemory)?;
        for (index, watch) in watches.iter().enumerate() {
            if let Err(error) = self.shared.add_watch(id, watch) {
                // Closing is not enough: others may hold duplicates of the descriptors, which would keep them in epoll.
                for added in &watches[..index] {
                    let _ = epoll::delete(&self.shared.epoll, &added.fd);
                }
                return Err(error);
            }
        }
        let watches = watches.into_iter().map(|watch| WatchSlot { watch, on: true }).collect();
        sources.by_id.insert(id, Arc::new(Source { handler: Mutex::new(Some(handler)), watches: Mutex::new(watches) }));
        Ok(id)
    }

    /// Forgets a source and closes its descriptors: when this returns, its handler is not running and never will again.
    /// Not for a handler about itself, which would wait for itself: it ends with [`Turn::Finished`] instead.
    pub fn unregister(&self, id: SourceId) {
        let source = lock(&self.shared.sources).by_id.remove(&id);
        if let Some(source) = source {
            let handler = lock(&source.handler).take();
            self.shared.remove_watches(&source);
            drop(handler);
        }
    }

    /// Switches one descriptor of a source off or on again: a console whose buffer is full has no use for being woken.
    pub fn set_watch(&self, id: SourceId, token: u32, on: bool) -> io::Result<()> {
        let source = lock(&self.shared.sources).by_id.get(&id).cloned();
        let Some(source) = source else { return Ok(()) };
        let mut watches = lock(&source.watches);
        for slot in watches.iter_mut().filter(|slot| slot.watch.token == token && slot.on != on) {
            if on {
                self.shared.add_watch(id, &slot.watch)?;
            } else {
                // Not a modification to no events: epoll reports hang-ups whether asked for or not, and would spin.
                epoll::delete(&self.shared.epoll, &slot.watch.fd)?;
            }
            slot.on = on;
        }
        Ok(())
    }
}

impl Shared {
    fn call_attention(&self) {
        self.attention.store(true, Ordering::Release);
        // The only possible failure is a full counter, which wakes just as well.
        let _ = rustix::io::write(&self.waker, &1_u64.to_ne_bytes());
    }

    fn add_watch(&self, id: SourceId, watch: &Watch) -> io::Result<()> {
        let flags = match watch.trigger {
            Trigger::Readable => epoll::EventFlags::IN,
            Trigger::Edge => epoll::EventFlags::IN | epoll::EventFlags::OUT | epoll::EventFlags::ET,
        };
        let key = (u64::from(id.0) << 32) | u64::from(watch.token);
        Ok(epoll::add(&self.epoll, &watch.fd, epoll::EventData::new_u64(key), flags)?)
    }

    fn remove_watches(&self, source: &Source) {
        for slot in lock(&source.watches).drain(..).filter(|slot| slot.on) {
            // Said explicitly, because others may hold duplicates of the descriptor, which would keep it in epoll.
            if let Err(error) = epoll::delete(&self.epoll, &slot.watch.fd) {
                warn!(%error, fd = slot.watch.fd.as_raw_fd(), "a descriptor was not in epoll");
            }
        }
    }

    /// Waits as long as a pause is wanted. False: the thread must end. The second value: everything must be looked at again.
    fn pass_gate(&self) -> Option<bool> {
        let mut gate = lock(&self.gate);
        while gate.wanted == Wanted::Pause {
            gate.parked = true;
            self.gate_moved.notify_all();
            gate = self.gate_moved.wait(gate).unwrap_or_else(std::sync::PoisonError::into_inner);
        }
        gate.parked = false;
        (gate.wanted == Wanted::Run).then(|| std::mem::take(&mut gate.look_again))
    }

    /// Calls a handler; true when it wants to be called again.
    fn dispatch(&self, id: SourceId, wake: Wake) -> bool {
        let source = lock(&self.sources).by_id.get(&id).cloned();
        let Some(source) = source else { return false };
        let turn = {
            let mut handler = lock(&source.handler);
            let Some(running) = handler.as_mut() else { return false };
            let turn = running.handle(wake);
            if turn == Turn::Finished {
                *handler = None;
            }
            turn
        };
        if turn == Turn::Finished {
            lock(&self.sources).by_id.remove(&id);
            self.remove_watches(&source);
        }
        turn == Turn::More
    }
}

/// Says that the thread has ended, also when a handler panicked: whoever waits in `pause` must not wait for ever.
struct FinishedGuard<'a>(&'a Shared);
impl Drop for FinishedGuard<'_> {
    fn drop(&mut self) {
        lock(&self.0.gate).finished = true;
        self.0.gate_moved.notify_all();
    }
}

fn run(shared: &Shared) {
    let _guard = FinishedGuard(shared);
    sandbox::confine(ThreadKind::Devices);
    lock(&shared.gate).thread = Some(std::thread::current().id());
    let mut unfinished: VecDeque<(SourceId, Wake)> = VecDeque::new();
    let mut events = Vec::with_capacity(EVENTS_PER_WAIT);
    while let Some(look_again) = shared.pass_gate() {
        if look_again {
            unfinished = lock(&shared.sources).by_id.keys().map(|id| (*id, Wake::Resumed)).collect();
        }
        events.clear();
        let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
        let timeout = (!unfinished.is_empty()).then_some(&at_once);
        match epoll::wait(&shared.epoll, rustix::buffer::spare_capacity(&mut events), timeout) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => {
                error!(%error, "the I/O thread cannot wait for events and ends: the devices of this VM stand still");
                return;
            }
        }
        // What was unfinished goes first, each source once; what is still unfinished goes to the end of the line. A pause in
        // between may drop edges that were taken from epoll already: the resume after it looks at everything again.
        let ready = events.iter().filter(|event| event.data.u64() != WAKER).map(|event| {
            let flags = event.flags;
            let failed = flags.intersects(epoll::EventFlags::ERR | epoll::EventFlags::HUP | epoll::EventFlags::RDHUP);
            let wake = Wake::Ready {
                token: event.data.u64() as u32,
                readable: failed || flags.contains(epoll::EventFlags::IN),
                writable: failed || flags.contains(epoll::EventFlags::OUT),
            };
            (SourceId((event.data.u64() >> 32) as u32), wake)
        });
        let turns: Vec<_> = unfinished.drain(..).chain(ready).collect();
        for (id, wake) in turns {
            if shared.attention.load(Ordering::Acquire) {
                break;
            }
            if shared.dispatch(id, wake) && !unfinished.iter().any(|(other, _)| *other == id) {
                unfinished.push_back((id, Wake::Continue));
            }
        }
    }
}

/// A descriptor of an eventfd's own for [`Watch::fd`], where the eventfd itself has another owner.
#[allow(unsafe_code)] // vmm-sys-util's EventFd has no AsFd.
pub fn duplicate(eventfd: &EventFd) -> io::Result<OwnedFd> {
    // SAFETY: the eventfd is borrowed for longer than the `BorrowedFd` lives, and keeps its descriptor open.
    unsafe { BorrowedFd::borrow_raw(eventfd.as_raw_fd()) }.try_clone_to_owned()
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;
    use std::time::{Duration, Instant};

    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

    use super::*;

    /// Long enough for a loaded machine; nothing waits for all of it when things go right.
    const PATIENCE: Duration = Duration::from_secs(20);

    fn eventually(what: &str, condition: impl Fn() -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !condition() {
            assert!(Instant::now() < deadline, "never: {what}");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    struct Closure<F>(F);
    impl<F: FnMut(Wake) -> Turn + Send> EventHandler for Closure<F> {
        fn handle(&mut self, wake: Wake) -> Turn {
            (self.0)(wake)
        }
    }

    fn eventfd() -> EventFd {
        EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).unwrap()
    }

    fn edge(fd: &EventFd, token: u32) -> Watch {
        Watch { fd: duplicate(fd).unwrap(), token, trigger: Trigger::Edge }
    }

    type Wakes = Arc<Mutex<Vec<Wake>>>;

    /// Records why it is called and answers `turn`.
    fn recorder(turn: Turn) -> (Wakes, Box<dyn EventHandler>) {
        let wakes = Wakes::default();
        let for_handler = wakes.clone();
        let handler = Closure(move |wake| {
            lock(&for_handler).push(wake);
            turn
        });
        (wakes, Box::new(handler))
    }

    fn readies(wakes: &Wakes) -> usize {
        lock(wakes).iter().filter(|wake| matches!(wake, Wake::Ready { readable: true, .. })).count()
    }

    #[test]
    fn every_write_of_an_eventfd_wakes_though_nobody_reads_it() {
        let io = IoThread::spawn("test-io").unwrap();
        let fd = eventfd();
        let (wakes, handler) = recorder(Turn::Idle);
        io.handle().register(vec![edge(&fd, 7)], handler).unwrap();
        io.resume();
        eventually("resumed", || lock(&wakes).contains(&Wake::Resumed));
        for count in 1..=5 {
            fd.write(1).unwrap();
            eventually("woken", || readies(&wakes) == count);
        }
        assert!(lock(&wakes).iter().all(|wake| matches!(wake, Wake::Resumed | Wake::Ready { token: 7, .. })));
    }

    #[test]
    fn nothing_runs_while_paused_and_nothing_is_missed() {
        let io = IoThread::spawn("test-io").unwrap();
        let fd = eventfd();
        let calls = Arc::new(AtomicUsize::new(0));
        let for_handler = calls.clone();
        // Always busy, as under a flood.
        let handler = Closure(move |_| {
            for_handler.fetch_add(1, Ordering::SeqCst);
            Turn::More
        });
        io.handle().register(vec![edge(&fd, 0)], Box::new(handler)).unwrap();
        assert_eq!(calls.load(Ordering::SeqCst), 0, "the thread starts paused");
        for _ in 0..50 {
            io.resume();
            let before = calls.load(Ordering::SeqCst);
            eventually("running", || calls.load(Ordering::SeqCst) > before);
            io.pause();
            let paused = calls.load(Ordering::SeqCst);
            fd.write(1).unwrap();
            std::thread::yield_now();
            io.pause();
            assert_eq!(calls.load(Ordering::SeqCst), paused);
        }
    }

    #[test]
    fn an_edge_during_a_pause_is_seen_after_it() {
        let io = IoThread::spawn("test-io").unwrap();
        let fd = eventfd();
        let (wakes, handler) = recorder(Turn::Idle);
        io.handle().register(vec![edge(&fd, 0)], handler).unwrap();
        for round in 1..=20 {
            io.resume();
            eventually("resumed", || lock(&wakes).iter().filter(|wake| **wake == Wake::Resumed).count() == round);
            io.pause();
            fd.write(1).unwrap();
        }
    }

    #[test]
    fn pauses_and_resumes_in_any_order_from_several_threads_come_to_an_end() {
        let io = IoThread::spawn("test-io").unwrap();
        let calls = Arc::new(AtomicUsize::new(0));
        let for_handler = calls.clone();
        let handler = Closure(move |_| {
            for_handler.fetch_add(1, Ordering::SeqCst);
            Turn::More
        });
        io.handle().register(vec![], Box::new(handler)).unwrap();
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    for _ in 0..200 {
                        io.resume();
                        io.pause();
                        io.resume();
                    }
                });
            }
        });
        // The last to act resumed, or paused while another resumed; whichever, it can be resumed.
        io.resume();
        let before = calls.load(Ordering::SeqCst);
        eventually("still running", || calls.load(Ordering::SeqCst) > before);
    }

    fn cpu_time_of_thread(io: &IoThread) -> u64 {
        let name = io.thread_name();
        let mut ticks = 0;
        for task in std::fs::read_dir("/proc/self/task").unwrap() {
            let stat = std::fs::read_to_string(task.unwrap().path().join("stat")).unwrap_or_default();
            if let Some((head, tail)) = stat.rsplit_once(')')
                && head.ends_with(&name)
            {
                let fields: Vec<_> = tail.split_whitespace().collect();
                ticks += fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap();
            }
        }
        ticks
    }

    impl IoThread {
        fn thread_name(&self) -> String {
            lock(&self.thread).as_ref().and_then(|thread| thread.thread().name().map(Into::into)).unwrap_or_default()
        }
    }

    #[test]
    fn a_paused_thread_and_an_idle_one_do_not_spin() {
        let io = IoThread::spawn("test-quiet").unwrap();
        let (theirs, ours) = socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None).unwrap();
        let fd = eventfd();
        let (wakes, handler) = recorder(Turn::Idle);
        // Readable and hung up for good: an edge each, no more.
        let hung_up = Watch { fd: ours, token: 1, trigger: Trigger::Edge };
        io.handle().register(vec![edge(&fd, 0), hung_up], handler).unwrap();
        fd.write(1).unwrap();
        drop(theirs);
        io.resume();
        eventually("woken", || readies(&wakes) == 2);
        let busy = cpu_time_of_thread(&io);
        std::thread::sleep(Duration::from_millis(100));
        io.pause();
        fd.write(1).unwrap();
        std::thread::sleep(Duration::from_millis(100));
        // In hundredths of a second, of which twenty have passed.
        assert!(cpu_time_of_thread(&io) - busy <= 5);
        assert_eq!(lock(&wakes).len(), 3);
    }

    #[test]
    fn a_busy_handler_starves_nobody() {
        let io = IoThread::spawn("test-io").unwrap();
        let (busy, handler) = recorder(Turn::More);
        io.handle().register(vec![], handler).unwrap();
        let fd = eventfd();
        let (wakes, handler) = recorder(Turn::Idle);
        io.handle().register(vec![edge(&fd, 0)], handler).unwrap();
        io.resume();
        eventually("both run", || lock(&busy).len() > 10 && !lock(&wakes).is_empty());
        for count in 1..=20 {
            fd.write(1).unwrap();
            eventually("a turn between those of the busy one", || readies(&wakes) >= count);
        }
        assert!(lock(&busy).iter().skip(1).all(|wake| *wake == Wake::Continue));
    }

    #[test]
    fn a_level_watch_can_be_switched_off_and_on() {
        let io = IoThread::spawn("test-io").unwrap();
        let (theirs, ours) = socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None).unwrap();
        let (wakes, handler) = recorder(Turn::Idle);
        let handle = io.handle();
        let watch = Watch { fd: ours, token: 3, trigger: Trigger::Readable };
        let id = handle.register(vec![watch], handler).unwrap();
        io.resume();
        rustix::io::write(&theirs, b"x").unwrap();
        eventually("woken again and again", || readies(&wakes) > 10);
        handle.set_watch(id, 3, false).unwrap();
        handle.set_watch(id, 3, false).unwrap();
        io.pause();
        io.resume();
        let before = readies(&wakes);
        drop(theirs);
        std::thread::sleep(Duration::from_millis(20));
        assert!(readies(&wakes) <= before + 1, "not even a hang-up wakes");
        handle.set_watch(id, 3, true).unwrap();
        eventually("woken", || readies(&wakes) > before + 1);
        handle.unregister(id);
        let after = lock(&wakes).len();
        std::thread::sleep(Duration::from_millis(20));
        assert_eq!(lock(&wakes).len(), after);
    }

    #[test]
    fn a_finished_source_is_closed() {
        let io = IoThread::spawn("test-io").unwrap();
        let (theirs, ours) = socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None).unwrap();
        let (wakes, handler) = recorder(Turn::Finished);
        io.handle().register(vec![Watch { fd: ours, token: 0, trigger: Trigger::Readable }], handler).unwrap();
        io.resume();
        let mut byte = [0];
        eventually("closed", || rustix::io::write(&theirs, b"x").is_err());
        let _ = rustix::io::read(&theirs, &mut byte);
        assert_eq!(lock(&wakes).len(), 1);
    }

    #[test]
    fn stopping_ends_the_thread_from_any_state_and_drops_the_handlers() {
        for state in 0..3 {
            let io = IoThread::spawn("test-io").unwrap();
            let (wakes, handler) = recorder(Turn::More);
            io.handle().register(vec![], handler).unwrap();
            if state > 0 {
                io.resume();
            }
            if state > 1 {
                io.pause();
            }
            io.stop();
            io.stop();
            io.pause();
            io.resume();
            assert_eq!(Arc::strong_count(&wakes), 1);
        }
    }

    #[test]
    fn a_regular_file_is_refused_and_a_panic_does_not_hang_a_pause() {
        let io = IoThread::spawn("test-io").unwrap();
        let file = tempfile::tempfile().unwrap();
        let (_, handler) = recorder(Turn::Idle);
        let watch = Watch { fd: file.into(), token: 0, trigger: Trigger::Readable };
        let error = io.handle().register(vec![watch], handler).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EPERM));
        io.handle().register(vec![], Box::new(Closure(|_| panic!("a test's panic")))).unwrap();
        io.resume();
        io.pause();
        io.stop();
    }
}
