//! What is said about a migration: while it runs ([`Progress`]) and at its end ([`Report`]).

use std::collections::BTreeMap;
use std::error::Error;
use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::limit::Limit;

/// How far a migration is. The order is the order in time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// Nothing has begun.
    #[default]
    Idle,
    /// Offer, connections, and the destination builds the VM.
    Preflight,
    /// Memory is copied while the guest runs.
    PreCopy,
    /// The guest is paused; the rest is copied, and the destination loads it.
    Switchover,
    /// The decision is journaled and COMMIT is under way.
    Commit,
    /// COMMIT was sent and nothing was heard since.
    InDoubt,
    /// Settled.
    Done,
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Idle => "idle",
            Self::Preflight => "preflight",
            Self::PreCopy => "pre-copy",
            Self::Switchover => "switchover",
            Self::Commit => "commit",
            Self::InDoubt => "in-doubt",
            Self::Done => "done",
        })
    }
}

/// How a migration ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// The VM is the destination's.
    Completed,
    /// The user stopped it; the VM is where it was.
    Cancelled,
    /// It failed; the VM is where it was.
    Failed,
    /// It is not known yet who owns the VM; the source keeps it paused and keeps asking.
    InDoubt,
}

/// Who may run the VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Owner {
    /// The source.
    Source,
    /// The destination.
    Destination,
    /// Not known here.
    Unknown,
}

impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Source => "source",
            Self::Destination => "destination",
            Self::Unknown => "unknown",
        })
    }
}

/// One round of pre-copy.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct RoundReport {
    /// Its number, from 1.
    pub n: u32,
    /// Pages sent as bytes.
    pub pages: u64,
    /// Pages sent as a bit, because they were all zeros.
    pub zero_pages: u64,
    /// Bytes on the page streams, headers included.
    pub bytes_sent: u64,
    /// From its start to the destination's word that all of it is in memory.
    pub ms: f64,
    /// Pages that the guest had dirtied when the round was over.
    pub dirty_pages_after: u64,
}

/// What compression did.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CompressionReport {
    /// As it was asked for: `auto`, `none` or `zstd:LEVEL`.
    pub mode: String,
    /// The level that most bytes of compressed pages had; none: most bytes of pages went as they are.
    pub level: Option<i32>,
    /// Bytes of the pages that were sent, zero pages left out.
    pub raw_bytes: u64,
    /// What they were on the page streams, headers left out.
    pub sent_bytes: u64,
}

/// What the destination announces, and where.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AnnounceReport {
    /// Gratuitous ARP frames in each burst.
    pub arp: u32,
    /// RARP frames in each burst.
    pub rarp: u32,
    /// Unsolicited neighbour advertisements in each burst.
    pub na: u32,
    /// Bursts planned.
    pub bursts: u32,
    /// Whether the guest was asked to announce itself.
    pub guest: bool,
    /// The addresses, hardware addresses first.
    pub addresses: Vec<String>,
}

/// Why a migration did not complete, or what else there is to say.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorReport {
    /// The phase in which it happened.
    pub phase: Phase,
    /// What happened and why, as one line.
    pub message: String,
    /// What to do next; may be empty.
    pub hint: String,
}

/// The end of a migration, as `microvm migrate --json` prints it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Name of the VM.
    pub vm: String,
    /// This host, if the caller said how it is called.
    pub from: String,
    /// The destination as dialled.
    pub to: String,
    /// [`crate::Mode::name`].
    pub mode: String,
    /// How it ended.
    pub outcome: Outcome,
    /// Whose the VM is.
    pub owner: Owner,
    /// What went wrong, if something did.
    pub error: Option<ErrorReport>,
    /// All rounds; the last one ran in the blackout.
    pub rounds: Vec<RoundReport>,
    /// From the call to the end.
    pub total_ms: f64,
    /// From just before the pause request to the destination's first `KVM_RUN`; none if the guest did not run before,
    /// or does not run there. With two hosts' clocks unrelated, it is the source's time from the pause request to the
    /// arrival of RUNNING, less the destination's time from the first `KVM_RUN` to sending RUNNING, less half of what
    /// COMMIT and RUNNING were on their ways (the time between them at the source less that at the destination).
    pub blackout_ms: Option<f64>,
    /// Its parts, each measured where it happened. `docs/migration-protocol.md` defines them.
    pub blackout: BTreeMap<String, f64>,
    /// Bytes on the page streams.
    pub bytes_sent: u64,
    /// What compression did; none if no page was to be sent yet.
    pub compression: Option<CompressionReport>,
    /// What kept it from being faster; none if no page was sent.
    pub limit: Option<Limit>,
    /// The VM's RAM.
    pub ram_bytes: u64,
    /// The prediction with which the switchover began.
    pub predicted_blackout_ms: Option<f64>,
    /// The most that was taken from the guest so that it converges, in thousandths of its vCPUs' time; 0: it was not slowed down.
    pub throttle_permille: u16,
    /// How long it was slowed down.
    pub throttled_ms: f64,
    /// What the destination announces.
    pub announce: Option<AnnounceReport>,
}

/// What is going on right now.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Progress {
    /// How far it is.
    pub phase: Phase,
    /// The round under way, from 1; 0 before the first.
    pub round: u32,
    /// Pages of this round that are on their way or done.
    pub pages_done: u64,
    /// Pages of this round altogether.
    pub pages_total: u64,
    /// Bytes on the page streams since the start.
    pub bytes_sent: u64,
    /// What compression did so far.
    pub compression: CompressionReport,
    /// How fast the guest dirties memory, in bytes per second, by the latest round.
    pub dirty_rate: Option<u64>,
    /// How fast the link carries pages, in bytes of guest memory per second, by the latest round.
    pub bandwidth: Option<u64>,
    /// Thousandths of its time that are taken from the guest right now.
    pub throttle_permille: u16,
    /// How long this round still takes at that speed.
    pub eta: Option<Duration>,
    /// The blackout if the switchover began now.
    pub predicted_blackout: Option<Duration>,
    /// Since the start.
    pub elapsed: Duration,
    /// When in doubt: since when (since the start).
    pub in_doubt_since: Option<Duration>,
    /// When in doubt: when the destination was asked last (since the start).
    pub last_asked: Option<Duration>,
    /// When in doubt: the latest answer, or why there is none.
    pub last_answer: Option<String>,
    /// When in doubt: the arbiter gave the VM to the destination, so it cannot be kept by hand.
    pub given_away: bool,
}

/// The text of an error and its causes on one line. A cause that the text before it already tells is left out.
pub fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let part = error.to_string();
        if !text.contains(&part) {
            text.push_str(": ");
            text.push_str(&part);
        }
        cause = error.source();
    }
    text
}

pub(crate) fn ms(time: Duration) -> f64 {
    // Microseconds are what the peers report too; more digits would pretend.
    (time.as_secs_f64() * 1e6).round() / 1e3
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::limit::LimitedBy;

    #[test]
    fn report_has_exactly_the_promised_keys() {
        let report = Report {
            vm: "web".into(),
            from: "host1".into(),
            to: "host2:7437".into(),
            mode: "pre-copy".into(),
            outcome: Outcome::InDoubt,
            owner: Owner::Unknown,
            error: None,
            rounds: vec![RoundReport::default()],
            total_ms: 1.5,
            blackout_ms: None,
            blackout: BTreeMap::from([("pause".into(), 0.25)]),
            bytes_sent: 7,
            compression: Some(CompressionReport { mode: "auto".into(), level: Some(3), raw_bytes: 9, sent_bytes: 4 }),
            limit: Some(Limit { by: LimitedBy::Link, sentence: "the link".into() }),
            ram_bytes: 8,
            predicted_blackout_ms: Some(3.0),
            throttle_permille: 700,
            throttled_ms: 2.5,
            announce: None,
        };
        assert_eq!(
            serde_json::to_string(&report).unwrap(),
            concat!(
                r#"{"vm":"web","from":"host1","to":"host2:7437","mode":"pre-copy","outcome":"in-doubt","owner":"unknown","#,
                r#""error":null,"rounds":[{"n":0,"pages":0,"zero_pages":0,"bytes_sent":0,"ms":0.0,"dirty_pages_after":0}],"#,
                r#""total_ms":1.5,"blackout_ms":null,"blackout":{"pause":0.25},"bytes_sent":7,"#,
                r#""compression":{"mode":"auto","level":3,"raw_bytes":9,"sent_bytes":4},"#,
                r#""limit":{"by":"link","sentence":"the link"},"ram_bytes":8,"#,
                r#""predicted_blackout_ms":3.0,"throttle_permille":700,"throttled_ms":2.5,"announce":null}"#
            )
        );
    }

    #[test]
    fn chain_does_not_repeat_itself() {
        #[derive(Debug, thiserror::Error)]
        #[error("{text}")]
        struct Layer {
            text: &'static str,
            source: Option<Box<Layer>>,
        }
        let leaf = Layer { text: "connection refused", source: None };
        let middle = Layer { text: "connecting to h:1: connection refused", source: Some(Box::new(leaf)) };
        let top = Layer { text: "no offer", source: Some(Box::new(middle)) };
        assert_eq!(chain(&top), "no offer: connecting to h:1: connection refused");
    }
}
