//! Slowing a guest down: each vCPU rests for a share of its time, in rests so short that the guest is slow, and not stopped.
//!
//! A thread takes the vCPUs out of the guest at a steady beat, and each rests before it goes back. One that idles in the
//! guest's HLT rests as well, and loses nothing.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use super::Vcpu;

/// How long a vCPU rests at a time.
const REST: Duration = Duration::from_micros(500);
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
            let mut share = permille;
            loop {
                match new_shares.recv_timeout(period(share)) {
                    Ok(new) => share = new,
                    Err(RecvTimeoutError::Timeout) => vcpus.iter().for_each(|vcpu| {
                        if let Err(error) = vcpu.rest(REST) {
                            tracing::warn!(%error, "a vCPU is not slowed down");
                        }
                    }),
                    Err(RecvTimeoutError::Disconnected) => return,
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

/// From one rest to the next, if rests are to be such a share of the time.
fn period(permille: u16) -> Duration {
    REST * 1000 / u32::from(permille.clamp(1, MAX_PERMILLE))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rests_are_the_share_of_the_time_that_was_asked_for() {
        for (permille, micros) in [(500, 1000), (100, 5000), (990, 505), (0, 500_000), (u16::MAX, 505)] {
            assert_eq!(period(permille).as_micros(), micros, "{permille}");
        }
    }
}
