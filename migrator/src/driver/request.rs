//! Questions to a host's agent: "will you take this VM?", "what became of migration ID?".

use std::io::{self, Write};
use std::time::Duration;

use super::control::read_message;
use crate::id::MigrationId;
use crate::traits::{Connection, Dialer, Refusal, Split};
use crate::transport::{ConnectError, is_timeout};
use crate::wire::preamble::{Preamble, Role};
use crate::wire::{Message, encode};

pub use crate::wire::message::{AskAnswer, Offer};

/// What an agent answers requests with.
pub trait Requests {
    /// An offer. Once accepted, the agent has a process waiting for the connections of this id.
    fn offer(&mut self, offer: Offer) -> Result<(), Refusal>;

    /// What became of an attempt: [`crate::handoff::answer`] over the journal of that id. If that finds no trace, the
    /// agent first writes a tombstone ([`crate::handoff::Step::GaveUp`]) and then answers [`AskAnswer::GaveUp`].
    fn ask(&mut self, id: MigrationId) -> AskAnswer;
}

/// Answers the requests of one connection until the peer ends it, or is silent for `limit`.
pub fn serve(
    connection: Box<dyn Connection>,
    limit: Duration,
    requests: &mut dyn Requests,
) -> Result<(), ConnectError> {
    let mut line = Line::new(connection, limit)?;
    loop {
        let answer = match read_message(&mut *line.split.reader) {
            Ok(Message::Offer(offer)) => match requests.offer(offer) {
                Ok(()) => Message::Accepted,
                Err(refusal) => Message::Refused(refusal),
            },
            Ok(Message::Ask(id)) => Message::Answer(requests.ask(id)),
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
            split.reader.set_timeout(Some(limit))?;
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
        read_message(&mut *self.split.reader).map_err(|error| self.broken(error))
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
