//! The messages of request and control connections.

use std::time::Duration;

use super::{Fields, WireError, cut};
use crate::handoff::Answer;
use crate::id::MigrationId;
use crate::report::{AnnounceReport, Report};
use crate::traits::{Mismatch, Refusal, Section, VmDescription};

/// The most sections of state.
pub const MAX_SECTIONS: usize = 1024;
/// The most bytes of state, section headers included.
pub const MAX_STATE_BYTES: usize = 16 << 20;
/// The most bytes of a reason.
pub const MAX_REASON_BYTES: usize = 4096;

/// "Will you take this VM?"
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Offer {
    /// The attempt.
    pub id: MigrationId,
    /// What is offered.
    pub vm: VmDescription,
    /// How many page streams there will be, 1 to [`super::MAX_STREAMS`].
    pub streams: u16,
    /// Memory will be compared by hash.
    pub verify: bool,
    /// Chunks may come compressed.
    pub compressed: bool,
}

/// "Move this VM to me."
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Pull {
    /// The VM's name.
    pub vm: String,
    /// Where to: how the source's host dials the destination's agent.
    pub to: String,
    /// How: what `migrate` takes. Not looked into by this crate.
    pub settings: serde_json::Value,
}

/// What became of an attempt, as an agent answers it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum AskAnswer {
    /// The VM is the destination's.
    Running = 1,
    /// The destination gave the attempt up for good.
    GaveUp = 2,
    /// Not decided yet, or not to be found out now: ask again.
    Pending = 3,
}

impl TryFrom<Answer> for AskAnswer {
    type Error = NoTrace;
    fn try_from(answer: Answer) -> Result<Self, NoTrace> {
        match answer {
            Answer::Running => Ok(Self::Running),
            Answer::GaveUp => Ok(Self::GaveUp),
            Answer::Pending => Ok(Self::Pending),
            Answer::NoTrace => Err(NoTrace),
        }
    }
}

/// There is no trace of the attempt: a tombstone must be written before anything is answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("no trace of this migration: write a tombstone before answering")]
pub struct NoTrace;

/// The destination is built and waits for memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ready {
    /// Its guess at loading the state and starting, together.
    pub load: Duration,
    /// What a durable record of its journal took.
    pub journal: Duration,
}

/// Everything that is not memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct State {
    /// Number of the last round.
    pub round: u32,
    /// Hash of all RAM, if memory is to be compared.
    pub ram_hash: Option<u64>,
    /// The state.
    pub sections: Vec<Section>,
}

/// The destination has loaded everything.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Prepared {
    /// Loading the state.
    pub load: Duration,
    /// Hashing memory.
    pub verify: Duration,
    /// Writing the record.
    pub journal: Duration,
}

/// The VM is the destination's.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Running {
    /// Writing the record before the start, in microseconds.
    pub journal_us: u64,
    /// From then to the first `KVM_RUN` (or the end of the start, if the guest stays paused), in microseconds.
    pub start_us: u64,
    /// From the first `KVM_RUN` to sending this, in microseconds; none if the guest stays paused.
    pub running_us: Option<u64>,
    /// The start failed after the guest may have run: it is lost, at the destination.
    pub failure: Option<String>,
    /// What is announced.
    pub announce: AnnounceReport,
}

/// A message.
#[derive(Clone, Debug, PartialEq)]
pub enum Message {
    /// Request: will you take this VM?
    Offer(Offer),
    /// Answer to an offer: yes.
    Accepted,
    /// Answer to an offer, or the first word on control: no.
    Refused(Refusal),
    /// Request: what became of this attempt?
    Ask(MigrationId),
    /// Answer to it.
    Answer(AskAnswer),
    /// Request: move this VM to me. Answered by PROGRESS, again and again, and then REPORT; or by REFUSED.
    Pull(Pull),
    /// How far it is. Not looked into by this crate.
    Progress(serde_json::Value),
    /// How it ended.
    Report(Box<Report>),
    /// Whoever pulls wants to stop it. Going away without a word does not.
    Cancel,
    /// Are you there? Answered by a PONG with the same token.
    Ping(u64),
    /// I am.
    Pong(u64),
    /// Destination: built.
    Ready(Ready),
    /// Source: a round begins.
    Round {
        /// Its number, from 1.
        n: u32,
        /// Pages in it.
        pages: u64,
        /// It is the last one: the guest is paused.
        last: bool,
    },
    /// Destination: a round is in memory.
    RoundDone {
        /// Its number.
        n: u32,
        /// Pages that came as bytes.
        data_pages: u64,
        /// Pages that came as a bit.
        zero_pages: u64,
    },
    /// Source: everything but memory.
    State(State),
    /// Destination: loaded.
    Prepared(Prepared),
    /// Source: run it.
    Commit,
    /// Destination: it is mine.
    Running(Running),
    /// Destination: I will never run it, for this reason.
    GaveUp(String),
    /// Source: this attempt is over, for this reason.
    Abort(String),
    /// Source: that the VM is yours is on record here. I will never ask about this attempt.
    Released,
}

macro_rules! kinds {
    ($($name:ident = $number:literal, $text:literal, $cap:expr;)*) => {
        /// Type of a message, as in its header.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[repr(u16)]
        pub enum Kind { $(#[allow(missing_docs, reason = "named after the messages")] $name = $number,)* }

        impl Kind {
            /// Every type.
            pub const ALL: &[Self] = &[$(Self::$name,)*];

            /// Its name, as in the documentation.
            pub fn name(self) -> &'static str {
                match self { $(Self::$name => $text,)* }
            }

            /// The most bytes of payload.
            pub fn cap(self) -> u32 {
                match self { $(Self::$name => $cap as u32,)* }
            }
        }

        impl TryFrom<u16> for Kind {
            type Error = WireError;
            fn try_from(number: u16) -> Result<Self, WireError> {
                match number { $($number => Ok(Self::$name),)* other => Err(WireError::Type(other)) }
            }
        }
    };
}

kinds! {
    Offer = 1, "OFFER", 1 << 20;
    Accepted = 2, "ACCEPTED", 0;
    Refused = 3, "REFUSED", 256 << 10;
    Ask = 4, "ASK", 16;
    Answer = 5, "ANSWER", 1;
    Pull = 6, "PULL", 8 << 10;
    Progress = 7, "PROGRESS", 16 << 10;
    Report = 8, "REPORT", 1 << 20;
    Cancel = 9, "CANCEL", 0;
    Ping = 16, "PING", 8;
    Pong = 17, "PONG", 8;
    Ready = 18, "READY", 16;
    Round = 19, "ROUND", 13;
    RoundDone = 20, "ROUND_DONE", 20;
    State = 21, "STATE", MAX_STATE_BYTES;
    Prepared = 22, "PREPARED", 24;
    Commit = 23, "COMMIT", 0;
    Running = 24, "RUNNING", 64 << 10;
    GaveUp = 25, "GAVE_UP", MAX_REASON_BYTES;
    Abort = 26, "ABORT", MAX_REASON_BYTES;
    Released = 27, "RELEASED", 0;
}

impl Message {
    /// Its type.
    pub fn kind(&self) -> Kind {
        match self {
            Self::Offer(_) => Kind::Offer,
            Self::Accepted => Kind::Accepted,
            Self::Refused(_) => Kind::Refused,
            Self::Ask(_) => Kind::Ask,
            Self::Answer(_) => Kind::Answer,
            Self::Pull(_) => Kind::Pull,
            Self::Progress(_) => Kind::Progress,
            Self::Report(_) => Kind::Report,
            Self::Cancel => Kind::Cancel,
            Self::Ping(_) => Kind::Ping,
            Self::Pong(_) => Kind::Pong,
            Self::Ready(_) => Kind::Ready,
            Self::Round { .. } => Kind::Round,
            Self::RoundDone { .. } => Kind::RoundDone,
            Self::State(_) => Kind::State,
            Self::Prepared(_) => Kind::Prepared,
            Self::Commit => Kind::Commit,
            Self::Running(_) => Kind::Running,
            Self::GaveUp(_) => Kind::GaveUp,
            Self::Abort(_) => Kind::Abort,
            Self::Released => Kind::Released,
        }
    }

    /// Adds the payload. Reasons and refusals are cut to what their types may carry.
    pub(super) fn write(&self, to: &mut Vec<u8>) {
        match self {
            Self::Offer(offer) => json(to, offer),
            Self::Refused(refusal) => json(to, &bounded(refusal)),
            Self::Running(running) => json(to, running),
            Self::Pull(pull) => json(to, pull),
            Self::Progress(progress) => json(to, progress),
            Self::Report(report) => json(to, report),
            Self::Accepted | Self::Cancel | Self::Commit | Self::Released => {}
            Self::Ask(id) => to.extend(id.0),
            Self::Answer(answer) => to.push(*answer as u8),
            Self::Ping(token) | Self::Pong(token) => to.extend(token.to_le_bytes()),
            Self::Ready(Ready { load, journal }) => micros(to, &[*load, *journal]),
            Self::Prepared(Prepared { load, verify, journal }) => micros(to, &[*load, *verify, *journal]),
            Self::Round { n, pages, last } => {
                to.extend(n.to_le_bytes());
                to.extend(pages.to_le_bytes());
                to.push((*last).into());
            }
            Self::RoundDone { n, data_pages, zero_pages } => {
                to.extend(n.to_le_bytes());
                to.extend(data_pages.to_le_bytes());
                to.extend(zero_pages.to_le_bytes());
            }
            Self::State(State { round, ram_hash, sections }) => {
                to.extend(round.to_le_bytes());
                to.push(ram_hash.is_some().into());
                to.extend(ram_hash.unwrap_or(0).to_le_bytes());
                to.extend((sections.len() as u16).to_le_bytes());
                for Section { kind, instance, version, bytes } in sections {
                    for field in [kind, instance, version] {
                        to.extend(field.to_le_bytes());
                    }
                    to.extend((bytes.len() as u32).to_le_bytes());
                    to.extend(bytes);
                }
            }
            Self::GaveUp(reason) | Self::Abort(reason) => {
                to.extend(cut(reason, MAX_REASON_BYTES).as_bytes());
            }
        }
    }

    /// Reads a payload.
    pub(super) fn read(kind: Kind, payload: &[u8]) -> Result<Self, WireError> {
        let mut fields = Fields::new(kind.name(), payload);
        let message = match kind {
            Kind::Offer => {
                let offer: Offer = fields.json()?;
                if offer.streams == 0 || offer.streams > super::MAX_STREAMS {
                    return Err(fields.value("streams", offer.streams.into()));
                }
                Self::Offer(offer)
            }
            Kind::Accepted => Self::Accepted,
            Kind::Refused => Self::Refused(fields.json()?),
            Kind::Ask => Self::Ask(MigrationId(fields.array()?)),
            Kind::Answer => Self::Answer(match fields.u8()? {
                1 => AskAnswer::Running,
                2 => AskAnswer::GaveUp,
                3 => AskAnswer::Pending,
                other => return Err(fields.value("answer", other.into())),
            }),
            Kind::Pull => Self::Pull(fields.json()?),
            Kind::Progress => Self::Progress(fields.json()?),
            Kind::Report => Self::Report(fields.json()?),
            Kind::Cancel => Self::Cancel,
            Kind::Ping => Self::Ping(fields.u64()?),
            Kind::Pong => Self::Pong(fields.u64()?),
            Kind::Ready => Self::Ready(Ready { load: duration(&mut fields)?, journal: duration(&mut fields)? }),
            Kind::Round => {
                Self::Round { n: round(&mut fields)?, pages: pages(&mut fields)?, last: fields.flag("last")? }
            }
            Kind::RoundDone => Self::RoundDone {
                n: round(&mut fields)?,
                data_pages: pages(&mut fields)?,
                zero_pages: pages(&mut fields)?,
            },
            Kind::State => Self::State(state(&mut fields)?),
            Kind::Prepared => Self::Prepared(Prepared {
                load: duration(&mut fields)?,
                verify: duration(&mut fields)?,
                journal: duration(&mut fields)?,
            }),
            Kind::Commit => Self::Commit,
            Kind::Running => Self::Running(fields.json()?),
            Kind::GaveUp => Self::GaveUp(fields.text()?),
            Kind::Abort => Self::Abort(fields.text()?),
            Kind::Released => Self::Released,
        };
        fields.end()?;
        Ok(message)
    }
}

fn state(fields: &mut Fields<'_>) -> Result<State, WireError> {
    let round = round(fields)?;
    let has_hash = fields.flag("has_hash")?;
    let hash = fields.u64()?;
    if !has_hash && hash != 0 {
        return Err(fields.value("ram_hash", hash));
    }
    let count = fields.u16()? as usize;
    if count > MAX_SECTIONS {
        return Err(fields.value("sections", count as u64));
    }
    // Grown as they come: the count alone allocates nothing.
    let mut sections = Vec::new();
    for _ in 0..count {
        let (kind, instance, version) = (fields.u16()?, fields.u16()?, fields.u16()?);
        let length = fields.u32()? as usize;
        sections.push(Section { kind, instance, version, bytes: fields.bytes(length)?.to_vec() });
    }
    Ok(State { round, ram_hash: has_hash.then_some(hash), sections })
}

/// Rounds count from 1.
fn round(fields: &mut Fields<'_>) -> Result<u32, WireError> {
    match fields.u32()? {
        0 => Err(fields.value("round", 0)),
        n => Ok(n),
    }
}

fn pages(fields: &mut Fields<'_>) -> Result<u64, WireError> {
    let pages = fields.u64()?;
    if pages > crate::layout::MAX_RAM_BYTES / crate::layout::PAGE_BYTES {
        return Err(fields.value("pages", pages));
    }
    Ok(pages)
}

/// A measured time. More than an hour is nonsense, and would only spoil arithmetic.
fn duration(fields: &mut Fields<'_>) -> Result<Duration, WireError> {
    match fields.u64()? {
        us if us <= 3_600_000_000 => Ok(Duration::from_micros(us)),
        us => Err(fields.value("time", us)),
    }
}

fn micros(to: &mut Vec<u8>, times: &[Duration]) {
    for time in times {
        to.extend((time.as_micros().min(3_600_000_000) as u64).to_le_bytes());
    }
}

/// A refusal that fits into its message, whatever was found: what is too much is counted.
fn bounded(refusal: &Refusal) -> Refusal {
    let mut bounded = Refusal { reason: cut(&refusal.reason, MAX_REASON_BYTES).into(), mismatches: Vec::new() };
    let mut room = 128usize << 10;
    for mismatch in &refusal.mismatches {
        let Mismatch { what, source, destination, hint } = mismatch;
        // JSON may write one byte as six.
        let Some(left) = room.checked_sub(6 * (what.len() + source.len() + destination.len() + hint.len()) + 64) else {
            break;
        };
        room = left;
        bounded.mismatches.push(mismatch.clone());
    }
    let left_out = refusal.mismatches.len() - bounded.mismatches.len();
    if left_out > 0 {
        bounded.reason.push_str(&format!(" (and {left_out} more mismatches)"));
    }
    bounded
}

fn json(to: &mut Vec<u8>, value: &impl serde::Serialize) {
    // Strings, numbers and JSON values with string keys always serialise, and a Vec always takes them.
    serde_json::to_writer(to, value).expect("plain data serialises");
}
