//! What each fuzz target does with its bytes: the first line of each module says what it holds to be true.
//!
//! `fuzz_targets/` gives libFuzzer's inputs to these functions; `tests/fuzz_replay.rs` of the workspace gives them the kept ones,
//! without libFuzzer.
#![allow(clippy::unwrap_used)] // Whatever does not work here is a finding.

mod bitmap;
mod boot;
mod journal;
mod machines;
mod pages;
mod ports;
mod spec;
mod state;
mod virtio;
mod wire;

/// A target: its name, which is that of its folders in `corpus/` and `regressions/`, and its function.
pub type Target = (&'static str, fn(&[u8]));

/// Every target.
pub const TARGETS: &[Target] = &[
    ("bitmap", bitmap::run),
    ("boot", boot::run),
    ("journal", journal::run),
    ("machines", machines::run),
    ("pages", pages::run),
    ("ports", ports::run),
    ("spec", spec::run),
    ("state", state::run),
    ("virtio", virtio::run),
    ("wire", wire::run),
];

/// Runs the target `name`.
pub fn run(name: &str, data: &[u8]) {
    let (_, run) = TARGETS.iter().find(|(known, _)| *known == name).expect("a target of that name");
    run(data);
}
