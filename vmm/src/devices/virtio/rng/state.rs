//! The saved state of a virtio-rng device: there is none but its queue.

use serde::{Deserialize, Serialize};

/// Version of [`RngState`].
pub(super) const RNG_STATE_VERSION: u16 = 1;

/// What a virtio-rng device has besides its queue: nothing. (Numbers drawn before are in the guest.)
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RngState {}
