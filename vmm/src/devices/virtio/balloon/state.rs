//! The saved state of a virtio-balloon device: there is none but its queues.

use serde::{Deserialize, Serialize};

/// Version of [`BalloonState`].
pub(super) const BALLOON_STATE_VERSION: u16 = 1;

/// What a virtio-balloon device has besides its queues: nothing. (Which pages are free is seen in the memory itself.)
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BalloonState {}
