//! Telling the network where the guest is now.

use std::time::Duration;

/// When announcements are sent, counted from the start of the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Schedule(pub Vec<Duration>);

impl Default for Schedule {
    fn default() -> Self {
        Self([0, 50, 150, 350, 750, 1550].map(Duration::from_millis).to_vec())
    }
}
