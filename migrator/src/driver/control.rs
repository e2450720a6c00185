//! A control connection: a thread that writes, one that reads, one that keeps it alive. Whoever sends never blocks, so
//! that a peer that does not read cannot hold up a cancel.

use std::io::{self, Read};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::guarded;
use crate::options::Timeouts;
use crate::traits::{Closer, Connection, ConnectionReader, ConnectionWriter};
use crate::transport::is_timeout;
use crate::wire::{Header, Message, decode, encode, frame};

/// The wait between the first two PINGs. It grows to the keepalive's.
const FIRST_WAIT: Duration = Duration::from_millis(2);

/// What happens on a control connection. `Lost` is the last thing.
#[derive(Debug)]
pub(super) enum ControlEvent {
    Message(Message),
    RoundTrip(Duration),
    Lost(String),
}

/// Where events go. Called from more than one thread.
pub(super) type Sink = Arc<dyn Fn(ControlEvent) + Send + Sync>;

enum Outgoing {
    Bytes(Vec<u8>),
    /// Nothing more will be sent.
    End,
}

/// The sending end of a control connection.
pub(super) struct Control {
    outgoing: mpsc::Sender<Outgoing>,
    closer: Arc<dyn Closer>,
    reader: JoinHandle<()>,
    writer: JoinHandle<()>,
}

impl Control {
    pub fn start(connection: Box<dyn Connection>, timeouts: Timeouts, sink: Sink) -> io::Result<Self> {
        let split = connection.split()?;
        split.reader.set_timeout(Some(timeouts.dead_after))?;
        split.writer.set_timeout(Some(timeouts.dead_after))?;
        let (outgoing, queue) = mpsc::channel();
        let (began, pings) = (Instant::now(), outgoing.clone());
        let writer = thread::Builder::new().name("control-write".into()).spawn({
            let (closer, every) = (split.closer.clone(), timeouts.keepalive);
            move || {
                let error = guarded(|| write_loop(split.writer, &queue, every, began)).flatten();
                if let Err(error) = error {
                    tracing::debug!(%error, "control connection cannot be written");
                    // The reader notices and says so.
                    closer.close();
                }
            }
        })?;
        let reader = thread::Builder::new().name("control-read".into()).spawn(move || {
            let why = guarded(|| read_loop(split.reader, &pings, timeouts.dead_after, began, &sink));
            sink(ControlEvent::Lost(why.unwrap_or_else(|error| error.to_string())));
        })?;
        Ok(Self { outgoing, closer: split.closer, reader, writer })
    }

    /// Sends a message, in the order of the calls. Does not wait; a failure shows as [`ControlEvent::Lost`].
    pub fn send(&self, message: &Message) {
        let _ = self.outgoing.send(Outgoing::Bytes(encode(message)));
    }

    /// Says that nothing more comes. What was sent still arrives, and what the peer still says can be heard.
    pub fn end(&self) {
        let _ = self.outgoing.send(Outgoing::End);
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
    }
}

fn write_loop(
    mut writer: Box<dyn ConnectionWriter>,
    queue: &mpsc::Receiver<Outgoing>,
    keepalive: Duration,
    began: Instant,
) -> io::Result<()> {
    let ping = || encode(&Message::Ping(began.elapsed().as_micros() as u64));
    // The first ones measure the round trip: more than one, since any may wait for a thread.
    writer.write_all(&ping())?;
    let mut wait = FIRST_WAIT.min(keepalive);
    let mut next_ping = Instant::now() + wait;
    loop {
        match queue.recv_timeout(next_ping.saturating_duration_since(Instant::now())) {
            Ok(Outgoing::Bytes(bytes)) => writer.write_all(&bytes)?,
            Ok(Outgoing::End) | Err(RecvTimeoutError::Disconnected) => return writer.finish(),
            Err(RecvTimeoutError::Timeout) => {
                writer.write_all(&ping())?;
                wait = (wait * 4).min(keepalive);
                next_ping = Instant::now() + wait;
            }
        }
    }
}

/// Reads until there is no more, and says why.
fn read_loop(
    mut reader: Box<dyn ConnectionReader>,
    pongs: &mpsc::Sender<Outgoing>,
    dead_after: Duration,
    began: Instant,
    sink: &Sink,
) -> String {
    loop {
        match read_message(&mut *reader) {
            Ok(Message::Ping(token)) => {
                let _ = pongs.send(Outgoing::Bytes(encode(&Message::Pong(token))));
            }
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
