//! When compressing pays: measurements go in, a choice comes out. No clock, no thread, no zstd.
//!
//! A chunk that goes raw moves at the speed of the link. One that is compressed moves at the speed of the slowest of three that
//! work at the same time: the workers that compress it, the link that carries the shorter frame, the destination that opens it. All
//! are in bytes of guest memory a second, and the greatest is the best.
//!
//! Where the numbers come from:
//!
//! - *The link*: from writes, raw or not. It carries at least what went through it, and at most what the sockets took while they were
//!   written to.
//! - *Ratio and speed of a level*: from samples of pages; of the level in use, from its chunks. A level in use is slower than on
//!   samples, which fit into a cache and take a busy machine's CPU only now and then.
//! - *The destination*: as fast as this host, until raw pages (sent now and then for that) show that the link carries more than frames
//!   went with.

use std::time::Duration;

use super::Choice;
use crate::layout::{CHUNK_PAGES, PAGE_BYTES};

/// The levels to choose from. Higher ones take CPU from the guest for a few percent.
pub const LEVELS: [i32; 3] = [-3, 1, 3];
/// No worker compresses more bytes a second: faster links are left alone.
const FASTEST: f64 = 1.5e9;

/// By this factor compression must be better than nothing, ...
const BETTER: f64 = 1.05;
/// ... and another choice than the one in use, so that noise does not decide.
const OTHER_BETTER: f64 = 1.03;
/// Pages that do not get shorter than this do not get much shorter with a higher level.
const HOPELESS: f64 = 0.97;

/// A window tells the link's speed after so many bytes, or so long. The first ones are shorter (each half as long as the next): what is
/// chosen before the link is known is chosen blindly. Socket buffers hide a link for as much as they hold.
const WINDOW: (u64, Duration) = (4 << 20, Duration::from_millis(40));
const FIRST_WINDOWS: u32 = 3;
/// A link that seems faster than this may be much faster: nothing is compressed in the first windows, because connections and processes
/// that have just begun are slower than they will be, and a better look costs little there.
const YOUNG: f64 = 200e6;
/// A window or a chunk with less than this tells nothing.
const TELLING_BYTES: u64 = 64 << 10;
/// The most pages to send before choosing again in the first windows: as many as the first one takes.
const FIRST_PAGES: u64 = (WINDOW.0 >> FIRST_WINDOWS) / PAGE_BYTES;
/// A sample is taken so often.
const SAMPLE_EVERY: Duration = Duration::from_millis(100);
/// How much one chunk counts against those before it.
const RECENT: f64 = 0.15;

/// Raw pages for one window are tried so often, and for no greater part of the time: on a link that seems fast the first times sooner,
/// because many a migration is over by then.
const PROBES: [(Duration, f64); 3] =
    [(Duration::from_millis(100), 0.05), (Duration::from_millis(200), 0.05), (Duration::from_millis(500), 0.02)];
/// Streams that spend more than this part of their time in writes wait for the link or the destination.
const SATURATED: f64 = 0.7;
/// For the destination, if frames went with less than this part of what the link carries.
const HELD_UP: f64 = 0.7;

/// A last round of at most so many bytes is decided on as a whole.
const SHORT_ROUND: u64 = 64 << 20;
/// What a compressed round costs beyond its bytes, in seconds: threads wake each other.
const HANDING_OVER: f64 = 300e-6;

/// What a sample of pages showed of one level.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Trial {
    /// The level.
    pub level: i32,
    /// Length of the frame, as a part of that of the pages.
    pub ratio: f64,
    /// Bytes of pages a second that one worker compresses.
    pub pack: f64,
    /// Bytes of pages a second that one thread decompresses.
    pub unpack: f64,
}

/// One chunk that a worker compressed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Work {
    /// The level.
    pub level: i32,
    /// Bytes of its pages.
    pub bytes: u64,
    /// What they were made to; as many if that was not worth it.
    pub packed: u64,
    /// How long it took.
    pub took: Duration,
}

/// One write to a page stream.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Written {
    /// What was done with the pages.
    pub choice: Choice,
    /// Bytes.
    pub bytes: u64,
    /// When it began, ...
    pub began: Duration,
    /// ... and when it was over. What a cap on bandwidth made it wait is in between.
    pub ended: Duration,
}

/// The policy, and what it knows of the migration in hand. Its times count from any one moment.
#[derive(Clone, Debug)]
pub struct Policy {
    workers: f64,
    streams: f64,
    /// Bytes a second.
    link: Option<f64>,
    levels: [Option<Level>; LEVELS.len()],
    choice: Choice,
    /// For a short last round.
    only: Option<Choice>,
    window: Option<Window>,
    windows: u32,
    sampled: Option<Duration>,
    /// When raw pages last told of the link.
    raw_at: Duration,
    /// Raw pages are being tried.
    probing: bool,
    /// So many times they were.
    probes: usize,
    /// Bytes a second that frames went with, on the wire, if the streams waited for nothing else.
    packed_link: Option<f64>,
    /// Bytes of guest memory a second that the destination opens.
    opens: f64,
}

/// What is known of a level.
#[derive(Clone, Copy, Debug)]
struct Level {
    trial: Trial,
    /// In this round, whole chunks told how fast it is.
    used: bool,
}

#[derive(Clone, Copy, Debug)]
struct Window {
    choice: Choice,
    began: Duration,
    ended: Duration,
    bytes: u64,
    busy: Duration,
}

impl Policy {
    /// For so many workers that compress and streams that carry; with the cap on bandwidth, in bytes a second.
    pub fn new(workers: usize, streams: usize, cap: Option<u64>) -> Self {
        Self {
            workers: workers.max(1) as f64,
            streams: streams.max(1) as f64,
            link: cap.map(|cap| cap.max(1) as f64),
            levels: [None; LEVELS.len()],
            choice: Choice::Raw,
            only: None,
            window: None,
            windows: 0,
            sampled: None,
            raw_at: Duration::ZERO,
            probing: false,
            probes: 0,
            packed_link: None,
            opens: f64::INFINITY,
        }
    }

    /// A round begins; for the last one, with how many bytes of pages. In that one the guest stands still, and what counts is
    /// when its last byte is there: its first frame must be made before anything is sent, and its last be opened after it.
    pub fn round(&mut self, last_bytes: Option<u64>) {
        // Hosts that were busy may be so no more.
        self.levels.iter_mut().flatten().for_each(|level| level.used = false);
        self.opens = f64::INFINITY;
        self.only = last_bytes.filter(|bytes| *bytes <= SHORT_ROUND).map(|bytes| {
            let bytes = bytes as f64;
            let (Some(link), Some(trial)) = (self.link, self.trial(self.choice)) else { return Choice::Raw };
            let ends = bytes.min((CHUNK_PAGES * PAGE_BYTES) as f64) * (1.0 / trial.pack + 1.0 / trial.unpack);
            let packed = bytes / self.packed_speed(link, trial) + ends + HANDING_OVER;
            if packed * BETTER < bytes / link { self.choice } else { Choice::Raw }
        });
    }

    /// What to do with the next chunk.
    pub fn choose(&mut self, now: Duration) -> Choice {
        if let Some(only) = self.only {
            return only;
        }
        if let (Some(link), Choice::Zstd(_), false) = (self.link, self.choice, self.probing) {
            let last = PROBES.len() - 1;
            let (every, part) = PROBES[if link < YOUNG { last } else { self.probes.min(last) }];
            let every = every.as_secs_f64().max(WINDOW.0 as f64 / link / part);
            self.probing = now.saturating_sub(self.raw_at).as_secs_f64() >= every;
        }
        if self.probing { Choice::Raw } else { self.choice }
    }

    /// The most pages to send before choosing again: few where a window is waited for.
    pub fn most_pages(&self) -> u64 {
        if self.windows <= FIRST_WINDOWS || self.probing { FIRST_PAGES } else { CHUNK_PAGES }
    }

    /// A chunk is about to be sent: whether to try levels on a sample of it, from the first that [`Self::next_level`] gives.
    pub fn sample(&mut self, now: Duration) -> bool {
        let due = self.sampled.is_none_or(|at| now.saturating_sub(at) >= SAMPLE_EVERY);
        // Without a link to compare with there is nothing to find out, and in a last round no time to.
        let sample = due && self.only.is_none() && self.link.is_some_and(|link| link < FASTEST * self.workers);
        if sample {
            self.sampled = Some(now);
        }
        sample
    }

    /// The level to try after the one that was just tried. A higher level is of use only where the one below it makes the link
    /// the slowest, and makes pages shorter at all.
    pub fn next_level(&self, tried: Option<i32>) -> Option<i32> {
        let link = self.link?;
        let mut next = tried.map_or(0, |tried| LEVELS.partition_point(|level| *level <= tried));
        loop {
            if let Some(below) = next.checked_sub(1) {
                let Trial { ratio, pack, .. } = self.levels[below]?.trial;
                if ratio > HOPELESS || pack * self.workers * ratio < link {
                    return None;
                }
            }
            let level = *LEVELS.get(next)?;
            if self.choice != Choice::Zstd(level) || !self.levels[next].is_some_and(|level| level.used) {
                return Some(level);
            }
            // Its chunks tell more than samples.
            next += 1;
        }
    }

    /// What a sample showed.
    pub fn tried(&mut self, trial: Trial) {
        let Some(at) = LEVELS.iter().position(|level| *level == trial.level) else { return };
        // Half of what was known, half of what is new: memory is not the same everywhere.
        let level = self.levels[at].map_or(Level { trial, used: false }, |Level { trial: old, used }| {
            let pack = if used { old.pack } else { mean(old.pack, trial.pack) };
            let (ratio, unpack) = (mean(old.ratio, trial.ratio), mean(old.unpack, trial.unpack));
            Level { trial: Trial { ratio, pack, unpack, ..trial }, used }
        });
        self.levels[at] = Some(level);
        self.decide();
    }

    /// What a worker did.
    pub fn worked(&mut self, work: Work) {
        let Some(at) = LEVELS.iter().position(|level| *level == work.level) else { return };
        let Some(Level { trial, used }) = self.levels[at].as_mut().filter(|_| work.bytes >= TELLING_BYTES) else {
            return;
        };
        let (ratio, pack) =
            (work.packed as f64 / work.bytes as f64, work.bytes as f64 / work.took.as_secs_f64().max(1e-6));
        trial.ratio += (ratio - trial.ratio) * RECENT;
        trial.pack += (pack - trial.pack) * RECENT;
        *used = true;
        self.decide();
    }

    /// What was written, by any of the streams.
    pub fn wrote(&mut self, written: Written) {
        let Written { choice, bytes, began, ended } = written;
        let fresh = |began| Window { choice, began, ended, bytes: 0, busy: Duration::ZERO };
        let window = self.window.get_or_insert(fresh(began));
        if window.choice != choice {
            // What is in the sockets' buffers is of another kind, and this write had to wait for it.
            *window = fresh(ended);
            return;
        }
        // Streams tell of their writes in no order.
        (window.began, window.ended) = (window.began.min(began), window.ended.max(ended));
        window.bytes += bytes;
        window.busy += ended.saturating_sub(began);
        let window = *window;
        let elapsed = window.ended.saturating_sub(window.began);
        let shorter = FIRST_WINDOWS.saturating_sub(self.windows);
        let over = window.bytes >= WINDOW.0 >> shorter || elapsed >= WINDOW.1 / (1 << shorter) && !self.probing;
        if !over || window.bytes < TELLING_BYTES {
            return;
        }
        self.window = None;
        self.windows += 1;
        self.measured(window, elapsed);
        if choice == Choice::Raw {
            self.raw_at = ended;
            self.probes += usize::from(self.probing);
            self.probing = false;
        }
        self.decide();
    }

    fn measured(&mut self, window: Window, elapsed: Duration) {
        let per_second = |time: Duration| window.bytes as f64 / time.as_secs_f64().max(1e-6);
        // Writes that ended sooner than the link could carry them went to the buffers.
        let (least, most) = (per_second(elapsed), per_second(window.busy) * self.streams);
        let most = most.max(least);
        let old = self.link.unwrap_or(most);
        let new = old.max(least).min(most);
        // What was asked for on purpose is believed at once, like the first windows.
        let link = if self.probing || self.windows <= FIRST_WINDOWS { new } else { mean(old, new) };
        self.link = Some(link);
        match window.choice {
            Choice::Raw => {
                if let (Some(packed), Some(trial)) = (self.packed_link.take(), self.trial(self.choice))
                    && self.probing
                    && packed < link * HELD_UP
                {
                    self.opens = packed / trial.ratio;
                }
            }
            Choice::Zstd(_) => self.packed_link = (least >= most * SATURATED).then_some(least),
        }
    }

    fn trial(&self, choice: Choice) -> Option<Trial> {
        self.levels.iter().flatten().map(|level| level.trial).find(|trial| choice == Choice::Zstd(trial.level))
    }

    /// Bytes of guest memory a second, if everything were compressed so.
    fn packed_speed(&self, link: f64, trial: Trial) -> f64 {
        (link / trial.ratio).min(trial.pack * self.workers).min(trial.unpack * self.streams).min(self.opens)
    }

    fn decide(&mut self) {
        let Some(link) = self.link.filter(|link| self.windows > FIRST_WINDOWS || *link < YOUNG) else { return };
        let speeds = self.levels.iter().flatten().map(|Level { trial, .. }| {
            let choice = Choice::Zstd(trial.level);
            (choice, self.packed_speed(link, *trial) / BETTER)
        });
        let (mut best, mut now) = ((Choice::Raw, link), link);
        for (choice, speed) in speeds {
            if choice == self.choice {
                now = speed;
            }
            if speed > best.1 {
                best = (choice, speed);
            }
        }
        if best.1 > now * OTHER_BETTER {
            self.choice = best.0;
        }
    }
}

fn mean(one: f64, other: f64) -> f64 {
    (one + other) / 2.0
}

#[cfg(test)]
mod tests;
