//! Questions to a host's agent: "will you take this VM?", "what became of migration ID?", "move this
//! VM to me".

use std::io::{self, Read};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use super::control::read_message;
use crate::id::MigrationId;
use crate::report::Report;
use crate::traits::{Connection, ConnectionReader, ConnectionWriter, Dialer, Refusal, Split};
use crate::transport::{ConnectError, is_timeout};
use crate::wire::preamble::{Preamble, Role};
use crate::wire::{Message, encode};

pub use crate::wire::message::{AskAnswer, Offer, Pull};

/// What an agent answers requests with.
pub trait Requests {
    /// An offer. Once accepted, the agent has a process waiting for the connections of this id.
    fn offer(&mut self, offer: Offer) -> Result<(), Refusal>;

    /// What became of an attempt: [`crate::handoff::answer`] over the journal of that id. If that finds no trace, the
    /// agent first writes a tombstone ([`crate::handoff::Step::GaveUp`]) and then answers [`AskAnswer::GaveUp`]. Refused, and nothing
    /// is written, if the attempt is not the peer's own.
    fn ask(&mut self, id: MigrationId) -> Result<AskAnswer, Refusal>;

    /// Moves a VM to the peer. Blocks until that is over, and tells `peer` how far it is, at least once within the limit of the
    /// connection. None: the peer is gone.
    fn pull(&mut self, pull: Pull, peer: &mut dyn Pulling) -> Result<Option<Report>, Refusal> {
        let (_, _) = (pull, peer);
        Err(Refusal { reason: "this host lets nobody pull VMs".into(), mismatches: Vec::new() })
    }
}

/// The connection over which a VM is being pulled.
pub trait Pulling {
    /// Tells whoever pulls how far it is. True: it wants the migration to be cancelled. An error: it is gone, which changes nothing
    /// for the migration.
    fn progress(&mut self, progress: serde_json::Value) -> io::Result<bool>;
}

/// Answers the requests of one connection until the peer ends it, or has not sent a whole one within `limit`.
pub fn serve(
    connection: Box<dyn Connection>,
    limit: Duration,
    requests: &mut dyn Requests,
) -> Result<(), ConnectError> {
    let mut line = Line::new(connection, limit)?;
    loop {
        let answer = match line.receive() {
            Ok(Message::Offer(offer)) => match requests.offer(offer) {
                Ok(()) => Message::Accepted,
                Err(refusal) => Message::Refused(refusal),
            },
            Ok(Message::Ask(id)) => match requests.ask(id) {
                Ok(answer) => Message::Answer(answer),
                Err(refusal) => Message::Refused(refusal),
            },
            // The last request of its connection.
            Ok(Message::Pull(pull)) => return line.serve_pull(pull, requests),
            Ok(other) => return Err(line.protocol(&other)),
            // The peer has what it wanted.
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof || is_timeout(&error) => return Ok(()),
            Err(error) => return Err(line.broken(error)),
        };
        line.send(&answer)?;
    }
}

/// Offers a VM. The inner result is the destination's answer, for which `limit` is the time.
pub fn offer(dial: &dyn Dialer, offer: &Offer, limit: Duration) -> Result<Result<(), Refusal>, ConnectError> {
    let mut line = Line::dial(dial, offer.id, limit)?;
    match line.ask(&Message::Offer(offer.clone()))? {
        Message::Accepted => Ok(Ok(())),
        Message::Refused(refusal) => Ok(Err(refusal)),
        other => Err(line.protocol(&other)),
    }
}

/// Asks what became of an attempt. `limit` is the time for the answer.
pub fn ask(dial: &dyn Dialer, id: MigrationId, limit: Duration) -> Result<AskAnswer, ConnectError> {
    let mut line = Line::dial(dial, id, limit)?;
    match line.ask(&Message::Ask(id))? {
        Message::Answer(answer) => Ok(answer),
        Message::Refused(refusal) => Err(ConnectError::Refused { peer: dial.peer(), reason: refusal.to_string() }),
        other => Err(line.protocol(&other)),
    }
}

/// Asks the source's agent to move a VM to this host. `tell` is given what the agent says on the way, and says whether to cancel;
/// `limit` is how long the agent may be silent. The inner result is how the migration ended, or why there is none.
pub fn pull(
    dial: &dyn Dialer,
    id: MigrationId,
    pull: &Pull,
    limit: Duration,
    tell: &mut dyn FnMut(serde_json::Value) -> bool,
) -> Result<Result<Report, Refusal>, ConnectError> {
    let mut line = Line::dial(dial, id, limit)?;
    let mut cancelled = false;
    let mut answer = line.ask(&Message::Pull(pull.clone()))?;
    loop {
        match answer {
            Message::Progress(progress) => {
                if tell(progress) && !std::mem::replace(&mut cancelled, true) {
                    line.send(&Message::Cancel)?;
                }
            }
            Message::Report(report) => return Ok(Ok(*report)),
            Message::Refused(refusal) => return Ok(Err(refusal)),
            other => return Err(line.protocol(&other)),
        }
        answer = line.receive().map_err(|error| line.broken(error))?;
    }
}

/// A request connection.
struct Line {
    peer: String,
    limit: Duration,
    split: Split,
}

impl Line {
    fn dial(dial: &dyn Dialer, id: MigrationId, limit: Duration) -> Result<Self, ConnectError> {
        Self::new(dial.dial(&Preamble { role: Role::Request, stream: 0, id })?, limit)
    }

    fn new(connection: Box<dyn Connection>, limit: Duration) -> Result<Self, ConnectError> {
        let peer = connection.peer();
        let set_up = || {
            let split = connection.split()?;
            split.writer.set_timeout(Some(limit))?;
            Ok(split)
        };
        match set_up() {
            Ok(split) => Ok(Self { peer, limit, split }),
            Err(source) => Err(ConnectError::Broken { peer, source }),
        }
    }

    fn ask(&mut self, question: &Message) -> Result<Message, ConnectError> {
        self.send(question)?;
        self.receive().map_err(|error| self.broken(error))
    }

    /// One message, whole within the limit, however little of it comes at once.
    fn receive(&mut self) -> io::Result<Message> {
        read_message(&mut Until { reader: &mut *self.split.reader, until: Instant::now() + self.limit })
    }

    fn send(&mut self, message: &Message) -> Result<(), ConnectError> {
        self.split.writer.write_all(&encode(message)).map_err(|error| self.broken(error))
    }

    fn serve_pull(self, pull: Pull, requests: &mut dyn Requests) -> Result<(), ConnectError> {
        let Self { peer, limit, split: Split { mut reader, writer, closer } } = self;
        let broken = |source| ConnectError::Broken { peer: peer.clone(), source };
        // Whoever pulls may say nothing for as long as it takes.
        reader.set_timeout(None).map_err(broken)?;
        let cancelled = Arc::new(AtomicBool::new(false));
        let listener = thread::Builder::new().name("pull-listen".into()).stack_size(128 << 10).spawn({
            let cancelled = cancelled.clone();
            // Anything else ends the conversation, and nothing but that.
            move || {
                while let Ok(Message::Cancel) = read_message(&mut *reader) {
                    cancelled.store(true, Ordering::Relaxed);
                }
            }
        });
        let listener = listener.map_err(broken)?;
        let mut peer = Puller { writer, cancelled };
        let answer = match requests.pull(pull, &mut peer) {
            Ok(Some(report)) => Some(Message::Report(Box::new(report))),
            Ok(None) => None,
            Err(refusal) => Some(Message::Refused(refusal)),
        };
        let told = answer.map_or(Ok(()), |answer| peer.writer.write_all(&encode(&answer)));
        // Until the peer has read it: to close at once could destroy it.
        let told = told.and_then(|()| peer.writer.finish());
        let until = Instant::now() + limit;
        while told.is_ok() && !listener.is_finished() && Instant::now() < until {
            thread::sleep(Duration::from_millis(5));
        }
        closer.close();
        let _ = listener.join();
        told.map_err(broken)
    }

    fn broken(&self, source: io::Error) -> ConnectError {
        let peer = self.peer.clone();
        match source.kind() {
            _ if is_timeout(&source) => ConnectError::Silent { peer, waited: self.limit },
            io::ErrorKind::InvalidData => ConnectError::Protocol { peer, reason: source.to_string() },
            _ => ConnectError::Broken { peer, source },
        }
    }

    fn protocol(&self, message: &Message) -> ConnectError {
        let reason = format!("{} was not to be said here", message.kind().name());
        ConnectError::Protocol { peer: self.peer.clone(), reason }
    }
}

/// Whoever pulls, as the agent sees it.
struct Puller {
    writer: Box<dyn ConnectionWriter>,
    cancelled: Arc<AtomicBool>,
}

impl Pulling for Puller {
    fn progress(&mut self, progress: serde_json::Value) -> io::Result<bool> {
        self.writer.write_all(&encode(&Message::Progress(progress)))?;
        Ok(self.cancelled.load(Ordering::Relaxed))
    }
}

/// A reader that must be done with everything by a certain time.
struct Until<'a> {
    reader: &'a mut dyn ConnectionReader,
    until: Instant,
}

impl Read for Until<'_> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let left = self.until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        self.reader.set_timeout(Some(left))?;
        self.reader.read(bytes)
    }
}
