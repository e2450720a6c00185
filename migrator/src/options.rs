//! What the user can ask for, and the limits that keep a migration from hanging.

use std::sync::Arc;
use std::time::Duration;

use crate::announce::Schedule;
use crate::arbiter::Arbiter;
use crate::compress::Compression;

/// How memory moves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Mode {
    /// Copy while the guest runs, pause it for the rest.
    #[default]
    PreCopy,
    /// Pause first, then copy everything. Moves any guest, with a long blackout.
    StopAndCopy,
}

impl Mode {
    /// As the command line and the report write it.
    pub fn name(self) -> &'static str {
        match self {
            Self::PreCopy => "pre-copy",
            Self::StopAndCopy => "stop-and-copy",
        }
    }
}

/// Page streams that are taken where nobody says how many: while one waits for its peer, the other has work. One TCP connection
/// keeps no more than a core busy on either side.
pub const DEFAULT_STREAMS: u16 = 2;

/// What was asked of the source.
#[derive(Clone, Debug)]
pub struct Options {
    /// How this host is called, for the report; may be empty.
    pub from: String,
    /// How memory moves.
    pub mode: Mode,
    /// The longest predicted blackout with which to switch over.
    pub max_downtime: Duration,
    /// How long everything up to the switchover may take; none: as long as it makes progress.
    pub timeout: Option<Duration>,
    /// The most bytes per second that pages may take on the wire; none: as fast as the link.
    pub bandwidth: Option<u64>,
    /// Whether pages are compressed.
    pub compression: Compression,
    /// Page streams, 1 to [`crate::wire::MAX_STREAMS`].
    pub streams: u16,
    /// Hash all RAM at both ends within the blackout and compare. For tests and for the distrustful.
    pub verify: bool,
    /// Slow the guest down where pre-copy would give up.
    pub throttle: bool,
    /// When pre-copy gives up.
    pub convergence: Convergence,
    /// Limits on waiting.
    pub timeouts: Timeouts,
    /// When to announce, after the guest runs.
    pub announce: Schedule,
    /// Who decides when it is in doubt; none: the destination's word, or a human. Both sides must have the same one.
    pub arbiter: Option<Arc<dyn Arbiter>>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            from: String::new(),
            mode: Mode::PreCopy,
            max_downtime: Duration::from_millis(50),
            timeout: None,
            bandwidth: None,
            compression: Compression::default(),
            streams: DEFAULT_STREAMS,
            verify: false,
            throttle: true,
            convergence: Convergence::default(),
            timeouts: Timeouts::default(),
            announce: Schedule::default(),
            arbiter: None,
        }
    }
}

/// When pre-copy counts as going nowhere.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Convergence {
    /// So many rounds in a row without a better prediction ...
    pub stall_rounds: u32,
    /// ... that together took at least so long. Both must hold: a guest may have bursts.
    pub stall_time: Duration,
    /// A prediction is better if it is below the best one so far by this fraction.
    pub improvement: f64,
    /// Never more rounds than this.
    pub max_rounds: u32,
}

impl Default for Convergence {
    fn default() -> Self {
        Self { stall_rounds: 4, stall_time: Duration::from_secs(3), improvement: 0.05, max_rounds: 1000 }
    }
}

/// How long to wait for what, at either side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timeouts {
    /// For a TCP connection and its preamble.
    pub connect: Duration,
    /// For the answer to a request (an offer, a question).
    pub request: Duration,
    /// For the destination to build the VM.
    pub prepare: Duration,
    /// Between two PINGs on the control connection.
    pub keepalive: Duration,
    /// A control connection on which nothing came for so long is dead.
    pub dead_after: Duration,
    /// A page stream on which nothing could be sent for so long is dead.
    pub page_stall: Duration,
    /// A switchover that has not reached the commit point after so long, or after ten times the allowed downtime if
    /// that is longer, is undone: the guest must not stand still for nothing.
    pub switchover: Duration,
    /// After COMMIT: how long to wait for RUNNING before saying `in-doubt` and asking on a connection of its own.
    pub running: Duration,
    /// First wait between two questions when in doubt; doubles up to `ask_max`.
    pub ask_min: Duration,
    /// Longest wait between two questions when in doubt.
    pub ask_max: Duration,
    /// How long it is in doubt before the source claims the VM from the arbiter, if there is one.
    pub grace: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(5),
            request: Duration::from_secs(10),
            prepare: Duration::from_secs(30),
            keepalive: Duration::from_secs(1),
            dead_after: Duration::from_secs(5),
            page_stall: Duration::from_secs(10),
            switchover: Duration::from_secs(3),
            running: Duration::from_secs(3),
            ask_min: Duration::from_millis(100),
            ask_max: Duration::from_secs(5),
            grace: Duration::from_secs(10),
        }
    }
}

impl Timeouts {
    /// Limits for a network on which a peer that is silent for so long is dead: those that hang on how fast the peer is heard
    /// are in proportion, as in the default; those on how much work it has are as they were.
    pub fn with_dead_after(dead_after: Duration) -> Self {
        let usual = Self::default();
        let scaled = |time: Duration| time.mul_f64(dead_after.as_secs_f64() / usual.dead_after.as_secs_f64());
        Self {
            // A first SYN that is lost (nobody has the peer's address yet) is sent again after a second.
            connect: scaled(usual.connect).max(Duration::from_millis(2500)),
            request: scaled(usual.request),
            keepalive: scaled(usual.keepalive),
            dead_after,
            page_stall: scaled(usual.page_stall),
            running: scaled(usual.running),
            ask_max: scaled(usual.ask_max).max(usual.ask_min),
            ..usual
        }
    }
}

/// What the receiving side may choose.
#[derive(Clone, Debug, Default)]
pub struct ReceiveOptions {
    /// Who offered the VM, for the journal: the host's name where it has proved it. Empty: the address from which it connects.
    pub from: String,
    /// Limits on waiting.
    pub timeouts: Timeouts,
    /// When to announce, after the guest runs.
    pub announce: Schedule,
    /// From whom the VM must be won before it is started; none: COMMIT is enough. The source must have the same one.
    pub arbiter: Option<Arc<dyn Arbiter>>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_in_proportion_to_the_silence_that_means_death() {
        let usual = Timeouts::default();
        assert_eq!(Timeouts::with_dead_after(usual.dead_after), usual);
        let short = Timeouts::with_dead_after(Duration::from_secs(1));
        assert_eq!((short.dead_after, short.keepalive), (Duration::from_secs(1), Duration::from_millis(200)));
        assert_eq!((short.page_stall, short.request), (Duration::from_secs(2), Duration::from_secs(2)));
        assert_eq!((short.prepare, short.switchover), (usual.prepare, usual.switchover));
        assert_eq!(Timeouts::with_dead_after(Duration::from_millis(1)).ask_max, usual.ask_min);
    }
}
