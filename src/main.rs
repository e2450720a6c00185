//! The `microvm` program.

fn main() {}
