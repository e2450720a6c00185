//! The first bytes of every connection, in clear text also where TLS follows: nothing in them is secret.

use crate::id::MigrationId;

/// What a connection is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Role {
    /// Questions to the host's agent.
    Request = 1,
    /// Messages of one migration.
    Control = 2,
    /// Pages of one migration.
    Pages = 3,
}

/// What the connecting side says first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Preamble {
    /// What the connection is for.
    pub role: Role,
    /// Number of the page stream, from 0; 0 for the other roles.
    pub stream: u16,
    /// The attempt.
    pub id: MigrationId,
}
