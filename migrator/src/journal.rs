//! The handoff journal in a file.
