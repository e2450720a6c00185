//! TCP: dialling, accepting, and what can go wrong before the peers understand each other.

use std::io;
use std::time::Duration;

/// Why there is no connection to a microvm peer.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The name does not resolve.
    #[error("{peer}: no such host")]
    Resolve {
        /// Whom.
        peer: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// No TCP connection.
    #[error("{peer}: cannot connect")]
    Tcp {
        /// Whom.
        peer: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Nothing came, or not everything, in time.
    #[error("{peer} is connected, but said nothing for {waited:?}")]
    Silent {
        /// Who.
        peer: String,
        /// How long.
        waited: Duration,
    },
    /// Something else is listening there.
    #[error("{peer} answers, but not with the microvm protocol (got {got:?})")]
    NotMicrovm {
        /// Who.
        peer: String,
        /// Its first bytes.
        got: String,
    },
    /// The connection ended meanwhile.
    #[error("{peer}: the connection broke")]
    Broken {
        /// Who.
        peer: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The peer will not talk with us, and says why (another protocol version, an unknown migration).
    #[error("{peer} refuses: {reason}")]
    Refused {
        /// Who.
        peer: String,
        /// Its sentence.
        reason: String,
    },
    /// The peer's bytes make no sense.
    #[error("{peer} broke the protocol: {reason}")]
    Protocol {
        /// Who.
        peer: String,
        /// What is wrong.
        reason: String,
    },
}

impl ConnectError {
    /// What the user might do next.
    pub fn hint(&self) -> String {
        match self {
            Self::Resolve { .. } => "check the host's name".into(),
            Self::Tcp { peer, .. } => format!("is `microvm agent` running on {peer}?"),
            Self::Silent { .. } | Self::NotMicrovm { .. } => {
                "check the port: the agent listens on 7437 unless told otherwise".into()
            }
            Self::Broken { .. } | Self::Protocol { .. } => "look at the log of the destination's agent".into(),
            Self::Refused { .. } => "run the same version of microvm on both hosts, and migrate again".into(),
        }
    }
}
