//! What kept a migration from being faster, in one sentence, and what to try: from where the threads that send pages spent
//! their time, and how fast the guest wrote meanwhile. No clock.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::compress::Compression;
use crate::options::Options;
use crate::precopy::rate;

/// Where the threads that send pages spent their time, all together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Spent {
    /// In rounds altogether.
    pub all: Duration,
    /// In writes to sockets.
    pub link: Duration,
    /// Waiting for the cap on bandwidth.
    pub pace: Duration,
    /// Looking for zero pages and arming the dirty log again.
    pub pages: Duration,
    /// Waiting for pages to be compressed.
    pub pack: Duration,
    /// On a CPU, whatever they did.
    pub cpu: Duration,
}

impl Spent {
    /// Both together.
    pub fn plus(self, other: Self) -> Self {
        Self {
            all: self.all + other.all,
            link: self.link + other.link,
            pace: self.pace + other.pace,
            pages: self.pages + other.pages,
            pack: self.pack + other.pack,
            cpu: self.cpu + other.cpu,
        }
    }
}

/// What limited a migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LimitedBy {
    /// What was to be done however little there was to send.
    Setup,
    /// The link, or a destination that does not take more.
    Link,
    /// The CPU of a thread here that writes to a socket.
    Cpu,
    /// The cap on bandwidth.
    Bandwidth,
    /// Looking at memory.
    Memory,
    /// Compressing.
    Compression,
    /// The guest's writing: most pages went more than once.
    DirtyRate,
}

/// What limited a migration, and what to try.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limit {
    /// In one word.
    pub by: LimitedBy,
    /// In a sentence.
    pub sentence: String,
}

/// What is known of a migration.
#[derive(Clone, Debug)]
pub struct Facts<'a> {
    /// What was asked for.
    pub options: &'a Options,
    /// Since the beginning.
    pub total: Duration,
    /// Of all page streams.
    pub spent: Spent,
    /// Bytes on the page streams.
    pub bytes_sent: u64,
    /// Pages sent as bytes.
    pub pages: u64,
    /// Those of them that were sent after the first round.
    pub pages_again: u64,
    /// Bytes of guest memory that went in a second.
    pub page_rate: u64,
    /// Bytes of guest memory that the guest dirtied in a second.
    pub dirty_rate: u64,
    /// Whether frames were of use.
    pub compressed: bool,
}

/// If the rounds took a smaller part of the time than this, it was not they that took it.
const ROUNDS_COUNT: f64 = 0.3;
/// A thread that is on a CPU for this part of its time waits for nothing else.
const CPU_BOUND: f64 = 0.8;
/// From here on more streams are of no use.
const ENOUGH_STREAMS: u16 = 4;

/// What limited it; none if nothing was sent.
pub fn judge(facts: &Facts<'_>) -> Option<Limit> {
    let Facts { options, spent, .. } = facts;
    if spent.all.is_zero() {
        return None;
    }
    let streams = u32::from(options.streams.max(1));
    let part = |time: Duration| time.as_secs_f64() / spent.all.as_secs_f64();
    let percent = |time: Duration| (part(time) * 100.0).round().min(100.0);
    let per_second = (facts.bytes_sent as f64 / (spent.all / streams).as_secs_f64()) as u64;
    let by = if facts.pages_again * 2 > facts.pages {
        LimitedBy::DirtyRate
    } else if (spent.all / streams).as_secs_f64() < facts.total.as_secs_f64() * ROUNDS_COUNT {
        LimitedBy::Setup
    } else {
        let socket = if part(spent.cpu) >= CPU_BOUND { LimitedBy::Cpu } else { LimitedBy::Link };
        let shares = [
            (spent.link, socket),
            (spent.pace, LimitedBy::Bandwidth),
            (spent.pages, LimitedBy::Memory),
            (spent.pack, LimitedBy::Compression),
        ];
        shares.into_iter().max_by_key(|(time, _)| *time).map_or(socket, |(_, by)| by)
    };
    let compress = (options.compression == Compression::None).then_some("--compress auto");
    let streams = (options.streams < ENOUGH_STREAMS).then_some("--streams 4");
    let (what, tries) = match by {
        LimitedBy::Setup => ("what it takes however little there is to send".to_string(), vec![]),
        LimitedBy::Link => {
            let hardly = if compress.is_none() && !facts.compressed { "; its pages hardly get shorter" } else { "" };
            let text = format!(
                "the link, or how fast the destination reads: it took {}, and the senders waited for it for {} % of the time{hardly}",
                rate(per_second),
                percent(spent.link)
            );
            (text, vec![compress, streams])
        }
        LimitedBy::Cpu => {
            let text = format!("this host's CPU: the senders were busy for {} % of the time", percent(spent.cpu));
            (text, vec![streams])
        }
        LimitedBy::Bandwidth => {
            let text = format!("--bandwidth: the senders waited for it for {} % of the time", percent(spent.pace));
            (text, vec![Some("a higher one"), compress])
        }
        LimitedBy::Memory => {
            let text =
                format!("looking for zero pages and dirty ones, for {} % of the senders' time", percent(spent.pages));
            (text, vec![streams])
        }
        LimitedBy::Compression => {
            let text = format!("compressing: the senders waited for it for {} % of the time", percent(spent.pack));
            let other = (options.compression != Compression::Auto).then_some("--compress auto");
            (text, vec![other])
        }
        LimitedBy::DirtyRate => {
            let again = facts.pages_again * 100 / facts.pages.max(1);
            let text = format!(
                "the guest's writing: it dirtied {} while pages went at {}, and {again} % of the pages went again",
                rate(facts.dirty_rate),
                rate(facts.page_rate)
            );
            let bandwidth = options.bandwidth.map(|_| "a higher --bandwidth");
            (text, vec![Some("a larger --max-downtime"), compress, bandwidth, streams])
        }
    };
    let tries: Vec<&str> = tries.into_iter().flatten().collect();
    let sentence = match tries.is_empty() {
        true => what,
        false => format!("{what}; to try: {}", tries.join(", ")),
    };
    Some(Limit { by, sentence })
}

#[cfg(test)]
mod tests;
