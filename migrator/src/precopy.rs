//! When to switch over: the policy of convergence.

use std::time::Duration;

/// Pre-copy leads nowhere, with the numbers that show it.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("pre-copy does not converge after {rounds} rounds: {}", self.numbers())]
pub struct NotConverging {
    /// Rounds so far.
    pub rounds: u32,
    /// Bytes per second that the guest dirties.
    pub dirty_rate: u64,
    /// Bytes per second that the link carries.
    pub bandwidth: u64,
    /// The best prediction of the blackout.
    pub predicted: Duration,
    /// Its part that does not depend on memory.
    pub fixed: Duration,
    /// What was allowed.
    pub max_downtime: Duration,
}

impl NotConverging {
    fn numbers(&self) -> String {
        String::new()
    }

    /// What would help.
    pub fn hint(&self) -> String {
        String::new()
    }
}
