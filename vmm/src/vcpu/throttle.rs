//! Slowing a guest down: each vCPU rests for a share of its time, in rests so short that the guest is slow, and not stopped.
//!
//! A thread takes the vCPUs out of the guest at a beat, and each rests before it goes back. One that idles in the
//! guest's HLT rests as well, and loses nothing. A host that is busy wakes that thread late, and the guest runs meanwhile: what
//! it had too much is taken from it at the next beats, so that the share holds in the mean.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::Vcpu;

/// How long a vCPU rests at a time, if the thread always wakes in time.
const REST: Duration = Duration::from_micros(500);
/// How long at most.
const LONGEST_REST: Duration = Duration::from_millis(50);
/// What the guest had too much beyond this is forgotten.
const MOST_OWED: Duration = Duration::from_secs(1);
/// The largest share, in thousandths: what is left must still be a guest.
pub const MAX_PERMILLE: u16 = 990;

/// A throttle at work. Dropping it ends it.
pub struct Throttle {
    /// New shares; none when it is to end.
    shares: Option<Sender<u16>>,
    thread: Option<JoinHandle<()>>,
}

impl Throttle {
    /// Begins to take `permille` (1 to [`MAX_PERMILLE`]) of the time of `vcpus`.
    pub(crate) fn start(vcpus: Arc<[Vcpu]>, permille: u16) -> io::Result<Self> {
        let (shares, new_shares) = mpsc::channel();
        let thread = thread::Builder::new().name("throttle".into()).spawn(move || {
            let mut pace = Pace { share: permille, owed: Duration::ZERO };
            let (mut beat, mut wait) = (Instant::now(), Duration::ZERO);
            loop {
                match new_shares.recv_timeout(wait) {
                    Ok(share) => pace.share = share,
                    Err(RecvTimeoutError::Timeout) => {}
                    Err(RecvTimeoutError::Disconnected) => return,
                }
                let now = Instant::now();
                let rest = pace.rest(now - beat);
                (beat, wait) = (now, rest + pace.run());
                for vcpu in vcpus.iter() {
                    if let Err(error) = vcpu.rest(rest) {
                        tracing::warn!(%error, "a vCPU is not slowed down");
                    }
                }
            }
        })?;
        Ok(Throttle { shares: Some(shares), thread: Some(thread) })
    }

    /// Takes another share from now on.
    pub fn set(&self, permille: u16) {
        if let Some(shares) = &self.shares {
            // The thread lives as long as this.
            let _ = shares.send(permille);
        }
    }
}

impl Drop for Throttle {
    fn drop(&mut self) {
        self.shares = None;
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the throttle's thread panicked");
        }
    }
}

/// How long rests are, without a clock.
struct Pace {
    /// In thousandths of the time.
    share: u16,
    /// What vCPUs should have rested and have not yet.
    owed: Duration,
}

impl Pace {
    /// The next rest, so long after the last one began.
    fn rest(&mut self, elapsed: Duration) -> Duration {
        self.owed = (self.owed + elapsed * self.share() / 1000).min(MOST_OWED);
        let rest = self.owed.min(LONGEST_REST);
        self.owed -= rest;
        rest
    }

    /// How long vCPUs run between two rests.
    fn run(&self) -> Duration {
        REST * (1000 - self.share()) / self.share()
    }

    fn share(&self) -> u32 {
        self.share.clamp(1, MAX_PERMILLE).into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of how many thousandths of the time vCPUs rest, if each beat comes so late.
    fn rests(share: u16, late: Duration) -> u128 {
        let mut pace = Pace { share, owed: Duration::ZERO };
        let (mut time, mut rested, mut elapsed) = (Duration::ZERO, Duration::ZERO, Duration::ZERO);
        while time < Duration::from_secs(100) {
            let rest = pace.rest(elapsed);
            elapsed = rest + pace.run() + late;
            (time, rested) = (time + elapsed, rested + rest);
        }
        rested.as_millis() / 100
    }

    #[test]
    fn rests_are_the_share_of_the_time_that_was_asked_for() {
        for share in [1, 10, 100, 500, 900, MAX_PERMILLE] {
            for late in [0, 60, 400] {
                let rests = rests(share, Duration::from_micros(late));
                assert!(rests.abs_diff(share.into()) <= 1, "{rests} thousandths, not {share}, late by {late} µs");
            }
        }
        assert_eq!(rests(0, Duration::ZERO), rests(1, Duration::ZERO));
        assert_eq!(rests(u16::MAX, Duration::ZERO), rests(MAX_PERMILLE, Duration::ZERO));
    }

    #[test]
    fn a_host_that_stands_still_is_not_paid_for_by_the_guest_for_ever() {
        let mut pace = Pace { share: 500, owed: Duration::ZERO };
        assert_eq!(pace.rest(Duration::from_secs(3600)), LONGEST_REST);
        assert_eq!(pace.owed, MOST_OWED - LONGEST_REST);
    }
}
