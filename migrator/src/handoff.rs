//! The commit protocol: who owns the VM, whatever fails and whenever.
//!
//! Both sides are small machines without I/O: an event goes in, actions come out, and the whole state is a value that
//! can be compared, hashed and copied, so that a model checker drives the very code that ships. The rules, in full in
//! `docs/failure-model.md`:
//!
//! - The source sends COMMIT at most once, after PREPARED came and its decision is durable. From then on it runs the VM
//!   again only if it hears that the destination gave this attempt up for good (or a human says so).
//! - The destination runs the VM only after COMMIT came and that is durable. It gives up for good when it loses the
//!   source before COMMIT; that is durable before anyone hears of it, and a later COMMIT is refused.
//! - An attempt is named by a random id, so no message and no record can be taken for another attempt's.

use serde::{Deserialize, Serialize};

use crate::id::MigrationId;
use crate::traits::Durability;

/// What a side has journaled of one attempt. The order is the order in time; only `GaveUp` may follow anything before
/// `Running`, and `Kept` anything at the source before `Released`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Step {
    /// Source: an attempt began.
    Sending = 1,
    /// Source: COMMIT may have been sent. Whoever finds this as the last record must ask before the VM may run here.
    Decided = 2,
    /// Source: the VM stays, this attempt is over.
    Kept = 3,
    /// Source: the VM is the destination's.
    Released = 4,
    /// Destination: an attempt began.
    Receiving = 16,
    /// Destination: all state is loaded, waiting for COMMIT.
    Prepared = 17,
    /// Destination: COMMIT came; the VM is about to run here.
    Committed = 18,
    /// Destination: the VM was started here.
    Running = 19,
    /// Destination: this attempt will never run here. For good.
    GaveUp = 20,
}

impl Step {
    /// Every step.
    pub const ALL: [Self; 9] = [
        Self::Sending,
        Self::Decided,
        Self::Kept,
        Self::Released,
        Self::Receiving,
        Self::Prepared,
        Self::Committed,
        Self::Running,
        Self::GaveUp,
    ];

    /// Whether the next step must wait until this one is on stable storage.
    ///
    /// The others may be lost to a power cut, because the process died with it, and the answer is the same without them:
    /// a destination that was waiting for COMMIT has given up either way, and one that has `Committed` owns the VM.
    pub fn durability(self) -> Durability {
        match self {
            Self::Decided | Self::Kept | Self::Released | Self::Receiving | Self::Committed | Self::GaveUp => {
                Durability::Durable
            }
            Self::Sending | Self::Prepared | Self::Running => Durability::Lazy,
        }
    }
}

/// One record of a journal.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct HandoffRecord {
    /// The attempt.
    pub id: MigrationId,
    /// What happened.
    pub step: Step,
    /// When, in milliseconds since 1970 by this host's clock. For humans; nothing is decided by it.
    pub unix_ms: u64,
    /// Name of the VM.
    pub vm: String,
    /// The other side: for the source, where to ask.
    pub peer: String,
}
