//! The wire protocol: bytes in, values out, and back. No socket here. `docs/migration-protocol.md` has the tables.

pub mod preamble;

/// The protocol that this crate speaks.
pub const VERSION: u16 = 1;
/// The port that an agent listens on.
pub const DEFAULT_PORT: u16 = 7437;
/// The most page streams of one migration.
pub const MAX_STREAMS: u16 = 16;
