//! Questions to a host's agent: "will you take this VM?", "what became of migration ID?".

use crate::id::MigrationId;
use crate::traits::{Connection, Dialer, Refusal};
use crate::transport::ConnectError;

pub use crate::wire::message::{AskAnswer, Offer};

/// What an agent answers requests with.
pub trait Requests {
    /// An offer. Once accepted, the agent has a process waiting for the connections of this id.
    fn offer(&mut self, offer: Offer) -> Result<(), Refusal>;

    /// What became of an attempt: [`crate::handoff::answer`] over the journal of that id. If that finds no trace, the
    /// agent first writes a tombstone ([`crate::handoff::Step::GaveUp`]) and then answers [`AskAnswer::GaveUp`].
    fn ask(&mut self, id: MigrationId) -> AskAnswer;
}

/// Answers the requests of one connection until it ends.
pub fn serve(connection: Box<dyn Connection>, requests: &mut dyn Requests) -> Result<(), ConnectError> {
    let _ = (connection, requests);
    unimplemented!()
}

/// Offers a VM. The inner result is the destination's answer.
pub fn offer(dial: &dyn Dialer, offer: &Offer) -> Result<Result<(), Refusal>, ConnectError> {
    let _ = (dial, offer);
    unimplemented!()
}

/// Asks what became of an attempt.
pub fn ask(dial: &dyn Dialer, id: MigrationId) -> Result<AskAnswer, ConnectError> {
    let _ = (dial, id);
    unimplemented!()
}
