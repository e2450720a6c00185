//! A control connection: a thread that reads, and one that keeps it alive and writes what the kernel has no room for. Whoever sends
//! never blocks, so that a peer that does not read cannot hold up a cancel.

use std::collections::VecDeque;
use std::io::{self, Read};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::guarded;
use crate::options::Timeouts;
use crate::traits::{Closer, Connection, ConnectionReader, ConnectionWriter};
use crate::transport::is_timeout;
use crate::wire::{Header, Message, decode, encode, frame};

/// The wait between the first two PINGs. It grows to the keepalive's.
const FIRST_WAIT: Duration = Duration::from_millis(2);

/// So many messages may wait for the peer to read before its PINGs are not answered any more.
const MOST_WAITING: usize = 64;

/// What happens on a control connection. `Lost` is the last thing.
#[derive(Debug)]
pub(super) enum ControlEvent {
    Message(Message),
    RoundTrip(Duration),
    Lost(String),
}

/// Where events go. Called from more than one thread.
pub(super) type Sink = Arc<dyn Fn(ControlEvent) + Send + Sync>;

/// What is to be written.
struct Outbox {
    state: Mutex<OutboxState>,
    changed: Condvar,
}

struct OutboxState {
    /// Not there while its thread writes, and once that has ended.
    writer: Option<Box<dyn ConnectionWriter>>,
    /// What the thread has to write, in this order. Empty ones are only to be flushed.
    queue: VecDeque<Vec<u8>>,
    /// Nothing more will be sent.
    end: bool,
}

impl Outbox {
    /// Sends a message: at once if nothing waits and the kernel has room, so that no thread has to wake up for it.
    fn send(&self, message: &Message) {
        let mut bytes = encode(message);
        let mut state = lock(&self.state);
        if state.queue.is_empty()
            && let Some(writer) = &mut state.writer
        {
            // An error shows again when the thread writes.
            let sent = writer.write_now(&bytes).unwrap_or(0);
            if sent == bytes.len() && !writer.waits() {
                return;
            }
            bytes.drain(..sent);
        }
        state.queue.push_back(bytes);
        self.changed.notify_one();
    }

    /// Answers a PING, but for a peer that asks and asks and does not read.
    fn answer(&self, token: u64) {
        if lock(&self.state).queue.len() < MOST_WAITING {
            self.send(&Message::Pong(token));
        }
    }

    fn end(&self) {
        lock(&self.state).end = true;
        self.changed.notify_one();
    }

    /// Writes what is queued, and `ping` when the connection was quiet for `wait`, until the end.
    fn write(&self, keepalive: Duration, began: Instant) -> io::Result<()> {
        // The first ones measure the round trip: more than one, since any may wait for a thread.
        let mut wait = Duration::ZERO;
        let mut next_ping = Instant::now();
        loop {
            let (bytes, mut writer) = {
                let state = lock(&self.state);
                let quiet = next_ping.saturating_duration_since(Instant::now());
                let idle = |state: &mut OutboxState| state.queue.is_empty() && !state.end;
                let waited = self.changed.wait_timeout_while(state, quiet, idle);
                let mut state = waited.unwrap_or_else(PoisonError::into_inner).0;
                let bytes = state.queue.pop_front();
                let Some(writer) = state.writer.take() else { return Ok(()) };
                if bytes.is_none() && state.end {
                    return writer.finish();
                }
                (bytes, writer)
            };
            let bytes = bytes.unwrap_or_else(|| {
                wait = if wait.is_zero() { FIRST_WAIT.min(keepalive) } else { (wait * 4).min(keepalive) };
                next_ping = Instant::now() + wait;
                encode(&Message::Ping(began.elapsed().as_micros() as u64))
            });
            writer.write_all(&bytes)?;
            writer.flush()?;
            lock(&self.state).writer = Some(writer);
        }
    }
}

/// The sending end of a control connection.
pub(super) struct Control {
    outbox: Arc<Outbox>,
    closer: Arc<dyn Closer>,
    reader: JoinHandle<()>,
    writer: JoinHandle<()>,
}

impl Control {
    pub fn start(connection: Box<dyn Connection>, timeouts: Timeouts, sink: Sink) -> io::Result<Self> {
        let split = connection.split()?;
        split.reader.set_timeout(Some(timeouts.dead_after))?;
        split.writer.set_timeout(Some(timeouts.dead_after))?;
        let state = OutboxState { writer: Some(split.writer), queue: VecDeque::new(), end: false };
        let outbox = Arc::new(Outbox { state: Mutex::new(state), changed: Condvar::new() });
        let (began, pongs) = (Instant::now(), outbox.clone());
        let writer = thread::Builder::new().name("control-write".into()).spawn({
            let (outbox, closer) = (outbox.clone(), split.closer.clone());
            move || {
                let error = guarded(|| outbox.write(timeouts.keepalive, began)).flatten();
                if let Err(error) = error {
                    tracing::debug!(%error, "control connection cannot be written");
                    // The reader notices and says so.
                    closer.close();
                }
            }
        })?;
        let reader = thread::Builder::new().name("control-read".into()).spawn(move || {
            let why = guarded(|| read_loop(split.reader, &pongs, timeouts.dead_after, began, &sink));
            sink(ControlEvent::Lost(why.unwrap_or_else(|error| error.to_string())));
        })?;
        Ok(Self { outbox, closer: split.closer, reader, writer })
    }

    /// Sends a message, in the order of the calls. Does not wait; a failure shows as [`ControlEvent::Lost`].
    pub fn send(&self, message: &Message) {
        self.outbox.send(message);
    }

    /// Says that nothing more comes. What was sent still arrives, and what the peer still says can be heard.
    pub fn end(&self) {
        self.outbox.end();
    }

    /// Ends the connection so that what was sent still arrives: says that nothing more comes, and waits until the peer has
    /// ended it too, but not longer than `patience`. To close at once could destroy what the peer has not read yet.
    pub fn finish(self, patience: Duration) {
        let until = Instant::now() + patience;
        self.end();
        while !(self.writer.is_finished() && self.reader.is_finished()) && Instant::now() < until {
            thread::sleep(Duration::from_millis(1));
        }
    }
}

impl Drop for Control {
    /// Its threads would keep the connection alive, and the peer waiting.
    fn drop(&mut self) {
        self.closer.close();
        self.outbox.end();
    }
}

/// Reads until there is no more, and says why.
fn read_loop(
    mut reader: Box<dyn ConnectionReader>,
    pongs: &Outbox,
    dead_after: Duration,
    began: Instant,
    sink: &Sink,
) -> String {
    loop {
        match read_message(&mut *reader) {
            Ok(Message::Ping(token)) => pongs.answer(token),
            Ok(Message::Pong(token)) => {
                if let Some(rtt) = began.elapsed().checked_sub(Duration::from_micros(token)) {
                    sink(ControlEvent::RoundTrip(rtt));
                }
            }
            Ok(message) => sink(ControlEvent::Message(message)),
            Err(error) if is_timeout(&error) => return format!("nothing came for {dead_after:?}"),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return "the other side closed it".into(),
            Err(error) => return error.to_string(),
        }
    }
}

/// Reads one message. What is no message is [`io::ErrorKind::InvalidData`].
pub(crate) fn read_message(reader: &mut dyn Read) -> io::Result<Message> {
    let invalid = |error| io::Error::new(io::ErrorKind::InvalidData, error);
    let mut head = [0; frame::HEADER_BYTES];
    reader.read_exact(&mut head)?;
    let header = Header::decode(&head).map_err(invalid)?;
    let mut payload = vec![0; header.length()];
    reader.read_exact(&mut payload)?;
    decode(&header, &payload).map_err(invalid)
}

/// A lock that a panic elsewhere does not make unusable: what it guards here is never left half changed.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::os::fd::BorrowedFd;
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    /// Takes some of what it is given, now and then nothing, and holds some of that back.
    struct Fickle {
        written: Arc<Mutex<Vec<u8>>>,
        held: Vec<u8>,
        turn: usize,
        finished: Arc<AtomicBool>,
    }

    impl io::Write for Fickle {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.flush()?;
            lock(&self.written).extend(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            lock(&self.written).append(&mut self.held);
            Ok(())
        }
    }

    impl ConnectionWriter for Fickle {
        fn set_timeout(&self, _: Option<Duration>) -> io::Result<()> {
            Ok(())
        }

        fn socket(&self) -> Option<BorrowedFd<'_>> {
            None
        }

        fn write_now(&mut self, bytes: &[u8]) -> io::Result<usize> {
            assert!(!self.waits(), "what waits goes first");
            self.turn += 1;
            match self.turn % 5 {
                0 => Ok(0),
                1 => Err(io::ErrorKind::OutOfMemory.into()),
                2 => {
                    self.held.extend(bytes);
                    Ok(bytes.len())
                }
                some => {
                    let taken = &bytes[..bytes.len() * (some - 2) / 2];
                    lock(&self.written).extend(taken);
                    Ok(taken.len())
                }
            }
        }

        fn waits(&self) -> bool {
            !self.held.is_empty()
        }

        fn finish(&self) -> io::Result<()> {
            self.finished.store(true, Ordering::Relaxed);
            Ok(())
        }
    }

    #[test]
    fn who_asks_and_does_not_read_gets_no_more_answers() {
        let state = OutboxState { writer: None, queue: VecDeque::new(), end: false };
        let outbox = Outbox { state: Mutex::new(state), changed: Condvar::new() };
        (0..10_000).for_each(|token| outbox.answer(token));
        assert_eq!(lock(&outbox.state).queue.len(), MOST_WAITING);
        // What the migration has to say is said.
        outbox.send(&Message::Commit);
        assert_eq!(lock(&outbox.state).queue.len(), MOST_WAITING + 1);
    }

    #[test]
    fn messages_stay_whole_and_in_order_whoever_writes_them() {
        let (written, finished) = (Arc::<Mutex<Vec<u8>>>::default(), Arc::<AtomicBool>::default());
        let writer = Fickle { written: written.clone(), held: vec![], turn: 0, finished: finished.clone() };
        let state = OutboxState { writer: Some(Box::new(writer)), queue: VecDeque::new(), end: false };
        let outbox = Arc::new(Outbox { state: Mutex::new(state), changed: Condvar::new() });
        let far = Duration::from_secs(3600);
        thread::scope(|scope| {
            let writes = scope.spawn(|| outbox.write(far, Instant::now()));
            let senders = [0, 1].map(|sender| {
                let outbox = &outbox;
                scope.spawn(move || (0..2000).for_each(|n| outbox.send(&Message::Pong(sender << 32 | n))))
            });
            senders.into_iter().for_each(|sender| sender.join().unwrap());
            outbox.end();
            writes.join().unwrap().unwrap();
        });
        assert!(finished.load(Ordering::Relaxed));
        let bytes = lock(&written);
        let (mut rest, mut next) = (bytes.as_slice(), [0, 0]);
        while !rest.is_empty() {
            match read_message(&mut rest).unwrap() {
                Message::Pong(token) => {
                    let (sender, n) = ((token >> 32) as usize, token & 0xffff_ffff);
                    assert_eq!(n, next[sender]);
                    next[sender] += 1;
                }
                message => assert!(matches!(message, Message::Ping(_))),
            }
        }
        assert_eq!(next, [2000, 2000]);
    }
}
