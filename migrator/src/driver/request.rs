//! Questions to a host's agent: "will you take this VM?", "what became of migration ID?".

use std::io::{self, Read};
use std::time::{Duration, Instant};

use super::control::read_message;
use crate::id::MigrationId;
use crate::traits::{Connection, ConnectionReader, Dialer, Refusal, Split};
use crate::transport::{ConnectError, is_timeout};
use crate::wire::preamble::{Preamble, Role};
use crate::wire::{Message, encode};

pub use crate::wire::message::{AskAnswer, Offer};

/// What an agent answers requests with.
pub trait Requests {
    /// An offer. Once accepted, the agent has a process waiting for the connections of this id.
    fn offer(&mut self, offer: Offer) -> Result<(), Refusal>;

    /// What became of an attempt: [`crate::handoff::answer`] over the journal of that id. If that finds no trace, the
    /// agent first writes a tombstone ([`crate::handoff::Step::GaveUp`]) and then answers [`AskAnswer::GaveUp`]. Refused, and nothing
    /// is written, if the attempt is not the peer's own.
    fn ask(&mut self, id: MigrationId) -> Result<AskAnswer, Refusal>;
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
