//! Why a migration did not complete.

use std::io;
use std::time::Duration;

use crate::precopy::NotConverging;
use crate::report::Phase;
use crate::traits::{Refusal, VmError};
use crate::transport::ConnectError;

/// Why a migration ended before the commit point, or was given up after it. Whose the VM is afterwards is not said here:
/// [`crate::handoff`] decides it, and the report names it.
#[derive(Debug, thiserror::Error)]
pub enum MigrateError {
    /// The destination cannot be reached, or what answers there is no agent.
    #[error("the destination cannot be used")]
    Connect(#[from] ConnectError),
    /// The destination will not take this VM.
    #[error("the destination refused: {0}")]
    Refused(Refusal),
    /// The VM did not do what was asked.
    #[error("the VM could not {what}")]
    Vm {
        /// What was asked of it.
        what: &'static str,
        /// Its answer.
        #[source]
        source: VmError,
    },
    /// The guest powered off or crashed meanwhile.
    #[error("the guest is gone: {0}")]
    GuestGone(String),
    /// The control connection is dead.
    #[error("the control connection was lost: {0}")]
    Lost(String),
    /// A page stream is dead.
    #[error("a page stream failed: {0}")]
    Pages(String),
    /// The peer gave this attempt up and said why.
    #[error("the other side gave up: {0}")]
    GaveUp(String),
    /// The peer said something that it must not say here.
    #[error("the other side broke the protocol: {0}")]
    Protocol(String),
    /// The guest writes faster than the link carries.
    #[error(transparent)]
    NotConverging(#[from] NotConverging),
    /// Something took longer than allowed.
    #[error("{what} took longer than {limit:?}")]
    TimedOut {
        /// What took so long.
        what: &'static str,
        /// The limit.
        limit: Duration,
    },
    /// The memory at the destination is not that of the source (`verify`).
    #[error("memory differs after the last round: hash {here:#018x} here, {there:#018x} at the source")]
    Differs {
        /// Hash of the destination's memory.
        here: u64,
        /// Hash of the source's memory.
        there: u64,
    },
    /// The user asked for it.
    #[error("cancelled")]
    Cancelled,
    /// The journal could not be written.
    #[error("the handoff journal could not be written")]
    Journal(#[source] io::Error),
    /// A panic in the middle of it.
    #[error("a bug in microvm stopped it (what panicked is in the log of the VM's process)")]
    Panicked,
    /// A human settled what was in doubt.
    #[error("settled by hand after it was in doubt")]
    Resolved,
    /// The arbiter gave the VM to the source when it was in doubt, or before the destination claimed it.
    #[error("the arbiter gave the VM to the source")]
    Arbitrated,
}

impl MigrateError {
    /// What the user might do next. `phase` is where it happened; the VM runs at the source.
    pub fn hint(&self, phase: Phase) -> String {
        match self {
            Self::Connect(error) => error.hint(),
            Self::Refused(_) => "change what the refusal names, or choose another host".into(),
            Self::Vm { .. } => "look at the VM's log (microvm logs NAME)".into(),
            Self::GuestGone(_) | Self::Cancelled | Self::Resolved => String::new(),
            Self::Arbitrated => "look at the link and the destination, then migrate again".into(),
            Self::Lost(_) | Self::Pages(_) => "check the link and the destination, then migrate again".into(),
            Self::GaveUp(_) | Self::Protocol(_) => {
                "look at the log of the destination's agent, then migrate again".into()
            }
            Self::NotConverging(error) => error.hint(),
            Self::TimedOut { .. } if phase == Phase::PreCopy => {
                "raise --timeout or --bandwidth, or lower the guest's load".into()
            }
            Self::TimedOut { .. } => "check the link and the destination, then migrate again".into(),
            Self::Panicked => {
                "report it with that log (microvm logs --process NAME); the VM itself is not harmed".into()
            }
            Self::Differs { .. } => "do not use this pair of hosts, and report it: a page was lost".into(),
            Self::Journal(_) => "make room for the journal, or mend the disk that it is on".into(),
        }
    }
}
