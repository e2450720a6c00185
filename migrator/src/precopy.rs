//! When to switch over: the policy of convergence.
//!
//! After each round the blackout is predicted: what is dirty now at the measured bandwidth, plus what a switchover costs
//! however little is left. If that fits the allowed downtime, it is time. If it has not become better for some rounds
//! and some time, it never will by itself: then the guest is slowed down, step by step and no more than it takes. If that
//! is not wanted, or not enough, saying so early is worth more than copying on.

use std::time::Duration;

use crate::layout::PAGE_BYTES;
use crate::options::Convergence;

/// What a switchover costs however little memory is left. Guesses at first; each is replaced when it is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Costs {
    /// Stopping vCPUs and devices.
    pub pause: Duration,
    /// Reading the dirty log.
    pub collect: Duration,
    /// Saving the state.
    pub save: Duration,
    /// Sending a last round with next to nothing in it.
    pub transfer: Duration,
    /// There and back.
    pub rtt: Duration,
    /// Loading the state and starting, as the destination guesses it.
    pub load: Duration,
    /// A durable record at the source.
    pub journal_here: Duration,
    /// A durable record at the destination.
    pub journal_there: Duration,
}

impl Default for Costs {
    fn default() -> Self {
        let (ms, us) = (Duration::from_millis, Duration::from_micros);
        Self {
            pause: us(200),
            collect: ms(1),
            save: us(200),
            transfer: us(100),
            rtt: ms(1),
            load: us(500),
            journal_here: ms(1),
            journal_there: ms(1),
        }
    }
}

impl Costs {
    /// All of them. The messages that must follow one another are the state, PREPARED and COMMIT: three ways.
    pub fn total(&self) -> Duration {
        let Self { pause, collect, save, transfer, rtt, load, journal_here, journal_there } = *self;
        // The source writes its journal while the destination loads.
        pause + collect + save + transfer + (rtt + load).max(journal_here) + rtt / 2 + journal_there
    }
}

/// What to do after a round.
#[derive(Clone, Debug, PartialEq)]
pub enum Verdict {
    /// Copy what is dirty, and look again.
    Another,
    /// The same, and from now on take so many thousandths of the guest's time from it.
    Throttle(u16),
    /// Switch over.
    Switchover,
    /// It leads nowhere.
    GiveUp(NotConverging),
}

/// The policy and what it has seen.
#[derive(Clone, Debug)]
pub struct Precopy {
    convergence: Convergence,
    max_downtime: Duration,
    may_throttle: bool,
    /// Thousandths of its time that are taken from the guest.
    throttle: u16,
    /// The costs as known so far.
    pub costs: Costs,
    rounds: u32,
    bandwidth: Option<f64>,
    /// That of the latest round that told it.
    sample: f64,
    dirty_rate: Option<f64>,
    looked_at: Option<Duration>,
    best: Option<Best>,
    /// So many rounds were made although the rest would have fitted.
    further: u32,
    /// Once, the guest dirtied memory too fast for rounds to become much shorter.
    has_lagged: bool,
}

#[derive(Clone, Copy, Debug)]
struct Best {
    predicted: Duration,
    round: u32,
    at: Duration,
}

/// Bytes from which on a round tells the bandwidth and not the latency.
const TELLING_BYTES: u64 = 1 << 20;
/// Time from which on it does.
const TELLING_TIME: Duration = Duration::from_millis(20);

/// What would do is made better by further rounds if each is shorter than the one before by at least this factor, ...
const SHRINKING: f64 = 0.7;
/// ... if they make the migration longer by no more than this part of the time so far, ...
const FURTHER_PART: f64 = 0.05;
/// ... and no more than so many times.
const MOST_FURTHER: u32 = 8;

/// The most that is taken from a guest, in thousandths of its time: what is left must still be a guest.
pub const MAX_THROTTLE: u16 = 990;
/// A guest that is slowed down shall dirty memory this much slower than the link carries it: each round is shorter than the one before.
const THROTTLED_RATE: f64 = 0.7;
/// From here on the rounds do not become shorter fast enough, and it is slowed down further.
const RATE_TOO_HIGH: f64 = 0.85;
/// So many rounds in a row without a better prediction, and it is slowed down; at first only after [`Convergence::stall_time`] as well.
const THROTTLE_ROUNDS: u32 = 2;
/// At each step it keeps at most this much of the time that it had: noise must not lead to a hundred steps.
const SMALLEST_STEP: f64 = 0.9;

impl Precopy {
    /// A policy that has seen nothing. If it may `throttle`, it does so before it gives up.
    pub fn new(convergence: Convergence, max_downtime: Duration, throttle: bool) -> Self {
        Self {
            convergence,
            max_downtime,
            may_throttle: throttle,
            throttle: 0,
            costs: Costs::default(),
            rounds: 0,
            bandwidth: None,
            sample: 0.0,
            dirty_rate: None,
            looked_at: None,
            best: None,
            further: 0,
            has_lagged: false,
        }
    }

    /// The dirty log begins: what is dirty later was dirtied since `now`.
    pub fn begin(&mut self, now: Duration) {
        self.looked_at = Some(now);
    }

    /// A round of so many bytes, counted uncompressed, took so long, from its start to the destination's word that all is in memory.
    pub fn round_done(&mut self, bytes: u64, took: Duration) {
        self.rounds += 1;
        let took = took.saturating_sub(self.costs.rtt).max(took / 10).max(Duration::from_micros(1));
        let sample = bytes as f64 / took.as_secs_f64();
        // A short round shows the latency: it can only prove that the link is faster than thought.
        let telling = bytes >= TELLING_BYTES || took >= TELLING_TIME;
        self.bandwidth = Some(match self.bandwidth {
            Some(known) if !telling => known.max(sample),
            // The better one of two in a row: while it runs, the guest is in the way of the copy, and now and then more so.
            _ => std::mem::replace(&mut self.sample, sample).max(sample).max(1.0),
        });
    }

    /// Decides, with so many pages dirty at the time `now`.
    pub fn decide(&mut self, now: Duration, dirty_pages: u64) -> Verdict {
        if let Some(since) = self.looked_at.replace(now) {
            let span = now.saturating_sub(since).max(Duration::from_micros(1));
            self.dirty_rate = Some((dirty_pages * PAGE_BYTES) as f64 / span.as_secs_f64());
        }
        self.has_lagged |= self.load() >= SHRINKING;
        let Some(predicted) = self.predict(dirty_pages) else { return Verdict::Another };
        if predicted <= self.max_downtime {
            // The first round takes its time for zero pages, and for memory that the destination has never touched: what the
            // link carries is seen in the next one, which costs less than a blackout and makes this one shorter.
            let first = self.rounds == 1 && dirty_pages > 0;
            let (transfer, costs) = (predicted.saturating_sub(self.costs.total()), self.costs.total());
            // It would do. If the guest is slower than the link, each further round makes the blackout shorter, until the costs are
            // most of it; all of them together take `transfer / (1 - load)`, of which `transfer` must be sent in any case.
            let load = self.load();
            let further = transfer > costs
                && load < SHRINKING
                && transfer.as_secs_f64() * load / (1.0 - load) < FURTHER_PART * now.as_secs_f64()
                && self.further < MOST_FURTHER;
            self.further += u32::from(further);
            return if first || further { Verdict::Another } else { Verdict::Switchover };
        }
        let better =
            |best: Best| predicted.as_secs_f64() < best.predicted.as_secs_f64() * (1.0 - self.convergence.improvement);
        if self.best.is_none_or(better) {
            self.best = Some(Best { predicted, round: self.rounds, at: now });
        }
        let hopeless = self.costs.total() > self.max_downtime || self.rounds >= self.convergence.max_rounds;
        let (rounds, time) =
            self.best.map_or((0, Duration::ZERO), |best| (self.rounds - best.round, now.saturating_sub(best.at)));
        let Convergence { stall_rounds, stall_time, .. } = self.convergence;
        let stalled = rounds >= stall_rounds && time >= stall_time;
        let too_fast = match self.throttle {
            0 => rounds >= THROTTLE_ROUNDS.min(stall_rounds) && time >= stall_time,
            // Bursts have been waited for.
            _ => rounds >= THROTTLE_ROUNDS || self.load() > RATE_TOO_HIGH,
        };
        if !hopeless && too_fast && self.may_throttle && self.throttle < MAX_THROTTLE {
            self.throttle = self.next_throttle();
            // What was seen before says nothing of the guest as it is now.
            self.best = Some(Best { predicted, round: self.rounds, at: now });
            return Verdict::Throttle(self.throttle);
        }
        if hopeless || stalled {
            return Verdict::GiveUp(NotConverging {
                rounds: self.rounds,
                dirty_rate: self.dirty_rate(),
                bandwidth: self.bandwidth(),
                throttle: self.throttle,
                may_throttle: self.may_throttle,
                predicted: self.best.map_or(predicted, |best| best.predicted),
                fixed: self.costs.total(),
                max_downtime: self.max_downtime,
            });
        }
        Verdict::Another
    }

    /// Whether there is time, with so many pages to send: a switchover is out of reach, and gets nearer by itself. Where it is within
    /// reach, what the link carries must be seen.
    pub fn has_time(&self, pages: u64) -> bool {
        !self.has_lagged && self.predict(pages).is_none_or(|predicted| predicted > self.max_downtime)
    }

    /// How fast the guest dirties memory, by how fast the link carries it.
    fn load(&self) -> f64 {
        self.dirty_rate.zip(self.bandwidth).map_or(0.0, |(dirty, link)| dirty / link)
    }

    /// The mildest throttle that should be enough, if the guest dirties memory in proportion to the time that it has. Where it writes
    /// the same pages over and over it dirties more than that, and the next round shows it.
    fn next_throttle(&self) -> u16 {
        let has = f64::from(1000 - self.throttle);
        let keeps = has * (THROTTLED_RATE / self.load()).min(SMALLEST_STEP);
        (1000 - keeps as u16).min(MAX_THROTTLE)
    }

    /// The blackout if the switchover began now with so many pages to send; none before the first round.
    pub fn predict(&self, pages: u64) -> Option<Duration> {
        let seconds = (pages * PAGE_BYTES) as f64 / self.bandwidth?;
        // A slow link and a lot of memory may exceed what a Duration is; a year is as good as for ever.
        Some(Duration::from_secs_f64(seconds.min(3e7)) + self.costs.total())
    }

    /// Bytes of guest memory per second that the link carries; 0 if not known.
    pub fn bandwidth(&self) -> u64 {
        self.bandwidth.unwrap_or(0.0) as u64
    }

    /// Thousandths of its time that are to be taken from the guest.
    pub fn throttle(&self) -> u16 {
        self.throttle
    }

    /// Bytes per second that the guest dirties; 0 if not known.
    pub fn dirty_rate(&self) -> u64 {
        self.dirty_rate.unwrap_or(0.0) as u64
    }
}

/// Pre-copy leads nowhere, with the numbers that show it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("pre-copy does not converge: after {rounds} rounds {}", self.numbers())]
pub struct NotConverging {
    /// Rounds so far.
    pub rounds: u32,
    /// Bytes per second that the guest dirties.
    pub dirty_rate: u64,
    /// Bytes per second that the link carries.
    pub bandwidth: u64,
    /// Thousandths of its time that were taken from the guest, to no avail.
    pub throttle: u16,
    /// Whether any could be.
    pub may_throttle: bool,
    /// The best prediction of the blackout.
    pub predicted: Duration,
    /// Its part that does not depend on memory.
    pub fixed: Duration,
    /// What was allowed.
    pub max_downtime: Duration,
}

impl NotConverging {
    fn numbers(&self) -> String {
        let Self { dirty_rate, bandwidth, throttle, predicted, fixed, max_downtime, .. } = self;
        let ms = |time: &Duration| time.as_secs_f64() * 1e3;
        if fixed > max_downtime {
            let (fixed, max) = (ms(fixed), ms(max_downtime));
            return format!(
                "a switchover alone takes {fixed:.1} ms, whatever the guest does, and {max:.1} ms are allowed"
            );
        }
        format!(
            "the guest dirties {}{} and the link carries {}: the predicted blackout stays at {:.0} ms > {:.0} ms",
            rate(*dirty_rate),
            if *throttle > 0 { format!(" (throttled to {} %)", running_percent(*throttle)) } else { String::new() },
            rate(*bandwidth),
            ms(predicted),
            ms(max_downtime),
        )
    }

    /// What would help.
    pub fn hint(&self) -> String {
        let enough = (self.predicted.as_secs_f64() * 1.1e3).ceil();
        if self.fixed > self.max_downtime {
            return format!("raise --max-downtime to {enough}ms or more");
        }
        let slower =
            if self.may_throttle { "lower the guest's load" } else { "let it be slowed down with --throttle auto" };
        format!("raise --max-downtime to {enough}ms or more, raise --bandwidth, or {slower}")
    }
}

/// What a throttle, in thousandths, leaves to the guest, in percent.
pub fn running_percent(throttle: u16) -> u16 {
    (1000 - throttle.min(1000)).div_ceil(10)
}

/// Bytes per second as a human writes them.
pub(crate) fn rate(bytes: u64) -> String {
    let bytes = bytes as f64;
    match bytes {
        _ if bytes >= 1e9 => format!("{:.1} GB/s", bytes / 1e9),
        _ if bytes >= 1e6 => format!("{:.0} MB/s", bytes / 1e6),
        _ => format!("{:.0} kB/s", bytes / 1e3),
    }
}

#[cfg(test)]
mod tests;
