//! A third party that both sides trust: it gives each attempt to one of them, the first that claims it, for ever.
//!
//! With one, a source in doubt need not wait for the destination or for a human: if it wins the claim, the destination
//! never will, and so never runs the VM. The price is paid by the destination, which claims in every migration, within the
//! blackout, and cannot start the VM while the arbiter cannot be reached (`docs/decisions/0010-arbiter.md`).

use std::collections::HashMap;
use std::error::Error;
use std::fmt;
use std::sync::{Mutex, PoisonError};

use crate::id::MigrationId;

/// A side of a migration, as the arbiter knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Claimant {
    /// The host that the VM leaves.
    Source,
    /// The host that it goes to.
    Destination,
}

impl fmt::Display for Claimant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Source => "source",
            Self::Destination => "destination",
        })
    }
}

/// The arbiter's word could not be had. The claim may have been made nevertheless.
#[derive(Debug, thiserror::Error)]
#[error("the arbiter could not be asked")]
pub struct ArbiterError(#[source] pub Box<dyn Error + Send + Sync>);

/// Where both sides of a migration claim it. Behind it is a store with an atomic "set if nothing is there": the same one
/// for both hosts, and one that never forgets an id.
pub trait Arbiter: fmt::Debug + Send + Sync {
    /// Claims an attempt; gives whose it is. The first claim of an id wins for ever: every later one, of either side and
    /// however often, is answered with that winner. The winner is on stable storage before this returns.
    ///
    /// May block: it is called from a thread of its own, at most one at a time for each side of an attempt. An error says
    /// that the winner is not known, not that nothing was claimed; the claim is repeated.
    fn claim(&self, id: MigrationId, by: Claimant) -> Result<Claimant, ArbiterError>;
}

/// An arbiter in memory, for tests and for two sides in one process. It is gone with the process.
#[derive(Debug, Default)]
pub struct MemoryArbiter {
    winners: Mutex<HashMap<MigrationId, Claimant>>,
}

impl MemoryArbiter {
    /// Whose an attempt is; none if nobody has claimed it.
    pub fn winner(&self, id: MigrationId) -> Option<Claimant> {
        self.winners.lock().unwrap_or_else(PoisonError::into_inner).get(&id).copied()
    }
}

impl Arbiter for MemoryArbiter {
    fn claim(&self, id: MigrationId, by: Claimant) -> Result<Claimant, ArbiterError> {
        Ok(*self.winners.lock().unwrap_or_else(PoisonError::into_inner).entry(id).or_insert(by))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_claim_wins_for_ever() {
        let (first, other) = (MigrationId([1; 16]), MigrationId([2; 16]));
        let arbiter = MemoryArbiter::default();
        assert_eq!(arbiter.winner(first), None);
        for by in [Claimant::Destination, Claimant::Source, Claimant::Destination] {
            assert_eq!(arbiter.claim(first, by).unwrap(), Claimant::Destination);
        }
        assert_eq!(arbiter.claim(other, Claimant::Source).unwrap(), Claimant::Source);
        assert_eq!(
            (arbiter.winner(first), arbiter.winner(other)),
            (Some(Claimant::Destination), Some(Claimant::Source))
        );
    }

    #[test]
    fn of_many_that_claim_at_once_one_wins() {
        let arbiter = MemoryArbiter::default();
        for n in 0..50 {
            let id = MigrationId([n; 16]);
            let claim = |by| arbiter.claim(id, by).unwrap();
            let words = std::thread::scope(|scope| {
                let sides = [Claimant::Source, Claimant::Destination].map(|by| scope.spawn(move || claim(by)));
                sides.map(|side| side.join().unwrap())
            });
            assert_eq!(words[0], words[1]);
        }
    }
}
