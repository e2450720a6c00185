//! What the source measures, and the report that it makes of it.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::error::MigrateError;
use crate::handoff::{SourceHandoff, SourceState};
use crate::options::Options;
use crate::pages::{FRAME_BYTES, Marker};
use crate::report::{ErrorReport, Outcome, Owner, Phase, Report, RoundReport, chain, ms};
use crate::traits::VmDescription;
use crate::wire::message::{Prepared, Running};

pub(super) struct Account {
    /// The time of the event in hand.
    pub now: Duration,
    pub began: Duration,
    /// When the pause was asked for; none if the guest was not running.
    pub pause_began: Option<Duration>,
    /// When the part of the blackout in hand began.
    pub mark: Duration,
    pub predicted: Option<Duration>,
    pub in_doubt_since: Option<Duration>,
    pub last_answer: Option<String>,
    /// What the arbiter said, or why it could not be asked.
    pub arbiter_word: Option<String>,
    /// The arbiter gave the VM to the destination.
    pub given_away: bool,
    pub resume_failure: Option<String>,
    vm: String,
    from: String,
    to: String,
    mode: &'static str,
    ram_bytes: u64,
    rounds: Vec<RoundReport>,
    round_began: Duration,
    round_took: Duration,
    throttle: u16,
    throttle_began: Option<Duration>,
    throttle_ended: Option<Duration>,
    blackout: BTreeMap<String, f64>,
    blackout_time: Option<Duration>,
    running: Option<Running>,
}

impl Account {
    pub fn new(options: &Options, vm: &VmDescription, to: String) -> Self {
        Self {
            now: Duration::ZERO,
            began: Duration::ZERO,
            pause_began: None,
            mark: Duration::ZERO,
            predicted: None,
            in_doubt_since: None,
            last_answer: None,
            arbiter_word: None,
            given_away: false,
            resume_failure: None,
            vm: vm.name.clone(),
            from: options.from.clone(),
            to,
            mode: options.mode.name(),
            ram_bytes: vm.ram.bytes(),
            rounds: Vec::new(),
            round_began: Duration::ZERO,
            round_took: Duration::ZERO,
            throttle: 0,
            throttle_began: None,
            throttle_ended: None,
            blackout: BTreeMap::new(),
            blackout_time: None,
            running: None,
        }
    }

    /// Number of the round in hand; 0 before the first.
    pub fn round(&self) -> u32 {
        self.rounds.len() as u32
    }

    pub fn begin_round(&mut self) -> u32 {
        self.round_began = self.now;
        self.rounds.push(RoundReport { n: self.round() + 1, ..RoundReport::default() });
        self.round()
    }

    pub fn round_arrived(&mut self) {
        self.round_took = self.now.saturating_sub(self.round_began);
    }

    /// Enters what a round sent, over so many streams; gives how long it took.
    pub fn close_round(&mut self, sent: Marker, streams: u16) -> Duration {
        let took = self.round_took;
        if let Some(round) = self.rounds.last_mut() {
            round.pages = sent.data_pages;
            round.zero_pages = sent.zero_pages;
            // Each stream has a marker of its own.
            round.bytes_sent = sent.bytes() + u64::from(streams.max(1) - 1) * FRAME_BYTES as u64;
            round.ms = ms(took);
        }
        took
    }

    pub fn dirty_after(&mut self, pages: u64) {
        if let Some(round) = self.rounds.last_mut() {
            round.dirty_pages_after = pages;
        }
    }

    /// The guest has so many thousandths of its time less from now on.
    pub fn throttled(&mut self, permille: u16) {
        self.throttle = self.throttle.max(permille);
        self.throttle_began.get_or_insert(self.now);
    }

    /// It is paused, or has all its time again.
    pub fn throttle_ends(&mut self) {
        self.throttle_ended.get_or_insert(self.now);
    }

    fn throttle_time(&self) -> Duration {
        let ended = self.throttle_ended.unwrap_or(self.now);
        self.throttle_began.map_or(Duration::ZERO, |began| ended.saturating_sub(began))
    }

    /// A part of the blackout ends here, and the next one begins.
    pub fn phase(&mut self, name: &str) {
        self.part(name, self.now.saturating_sub(self.mark));
        self.mark = self.now;
    }

    fn part(&mut self, name: &str, time: Duration) {
        self.blackout.insert(name.into(), ms(time));
    }

    pub fn saved(&mut self, hashing: Duration) {
        self.part("save", self.now.saturating_sub(self.mark).saturating_sub(hashing));
        if !hashing.is_zero() {
            self.part("hash", hashing);
        }
        self.mark = self.now;
    }

    pub fn prepared(&mut self, Prepared { load, verify, journal }: Prepared) {
        let there = load + verify + journal;
        self.part("transfer", self.now.saturating_sub(self.mark).saturating_sub(there));
        self.part("load", load);
        if !verify.is_zero() {
            self.part("verify", verify);
        }
        self.part("prepare-journal", journal);
        self.mark = self.now;
    }

    pub fn running(&mut self, running: Running) {
        let us = Duration::from_micros;
        let (journal, start, ran) = (us(running.journal_us), us(running.start_us), running.running_us.map(us));
        let there = journal.saturating_add(start).saturating_add(ran.unwrap_or_default());
        // What remains of the time since COMMIT was sent is its way there and the answer's way back.
        let ways = self.now.saturating_sub(self.mark).saturating_sub(there);
        let back = ways / 2;
        self.part("commit", ways - back);
        self.part("commit-journal", journal);
        self.part("start", start);
        self.blackout_time = self
            .pause_began
            .zip(ran)
            .map(|(began, ran)| self.now.saturating_sub(began).saturating_sub(ran).saturating_sub(back));
        self.running = Some(running);
    }

    /// What is known while it is in doubt: the destination's latest answer, and the arbiter's.
    pub fn answers(&self) -> Option<String> {
        let words: Vec<_> = [&self.last_answer, &self.arbiter_word].into_iter().flatten().map(String::as_str).collect();
        (!words.is_empty()).then(|| words.join("; "))
    }

    pub fn report(&self, handoff: SourceHandoff, failure: Option<&(Phase, MigrateError)>) -> Report {
        let lost = self.running.as_ref().and_then(|running| running.failure.clone());
        let cancelled = matches!(failure, Some((_, MigrateError::Cancelled)));
        let (outcome, owner) = match handoff.state() {
            SourceState::Released if lost.is_some() => (Outcome::Failed, Owner::Destination),
            SourceState::Released => (Outcome::Completed, Owner::Destination),
            SourceState::Committed { .. } => (Outcome::InDoubt, Owner::Unknown),
            _ if cancelled => (Outcome::Cancelled, Owner::Source),
            _ => (Outcome::Failed, Owner::Source),
        };
        let error = match (outcome, failure) {
            (Outcome::Failed, _) if owner == Owner::Destination => Some(ErrorReport {
                phase: Phase::Commit,
                message: format!(
                    "the VM failed at the destination after it had taken over: {}",
                    lost.unwrap_or_default()
                ),
                hint: "look at the log of the destination's agent".into(),
            }),
            (Outcome::InDoubt, _) => Some(ErrorReport {
                phase: Phase::InDoubt,
                message: format!(
                    "{} was told to run the VM and has not answered since{}{}",
                    self.to,
                    failure.map_or(String::new(), |(_, error)| format!(": {}", chain(error))),
                    self.answers().map_or(String::new(), |answer| format!("; asked again: {answer}")),
                ),
                hint: format!(
                    "it settles itself when {} can be reached; if that host is gone for good, `microvm resolve {} --{}`",
                    self.to,
                    self.vm,
                    if self.given_away { "discard" } else { "keep" }
                ),
            }),
            (Outcome::Completed, Some((phase, error @ MigrateError::Resolved))) | (_, Some((phase, error)))
                if outcome != Outcome::Completed || matches!(error, MigrateError::Resolved) =>
            {
                let mut message = chain(error);
                let mut hint = error.hint(*phase);
                if let Some(why) = &self.resume_failure {
                    message = format!("{message}; and the guest could not be resumed: {why}");
                    hint = format!("look at the VM's log (microvm logs {})", self.vm);
                }
                Some(ErrorReport { phase: *phase, message, hint })
            }
            _ => None,
        };
        Report {
            vm: self.vm.clone(),
            from: self.from.clone(),
            to: self.to.clone(),
            mode: self.mode.into(),
            outcome,
            owner,
            error,
            rounds: self.rounds.clone(),
            total_ms: ms(self.now.saturating_sub(self.began)),
            blackout_ms: self.blackout_time.map(ms),
            blackout: self.blackout.clone(),
            bytes_sent: self.rounds.iter().map(|round| round.bytes_sent).sum(),
            // The driver knows.
            compression: None,
            limit: None,
            ram_bytes: self.ram_bytes,
            predicted_blackout_ms: self.predicted.map(ms),
            throttle_permille: self.throttle,
            throttled_ms: ms(self.throttle_time()),
            announce: self.running.as_ref().map(|running| running.announce.clone()),
        }
    }
}
