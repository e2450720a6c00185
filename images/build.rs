//! Builds the built-in guest, which the library embeds.
//!
//! The guest is another kind of program (no standard library, a fixed address, a profile of its own), so cargo builds it
//! in a second run, with its own lock file, into a directory of ours. That run must not see the flags of this one: a
//! coverage run's or a linter's `RUSTFLAGS` and wrappers are not meant for it.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

/// What the guest is built for, wherever it is built.
const TARGET: &str = "x86_64-unknown-linux-gnu";

fn main() {
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let source = Path::new(&env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets CARGO_MANIFEST_DIR")).join("pulse");
    for input in ["Cargo.toml", "Cargo.lock", "build.rs", "pulse.ld", "src"] {
        println!("cargo::rerun-if-changed={}", source.join(input).display());
    }
    println!("cargo::rerun-if-changed=build.rs");

    let target_dir = out.join("pulse-target");
    let mut cargo = Command::new(env::var_os("CARGO").expect("cargo sets CARGO"));
    cargo
        .current_dir(&source)
        .args(["build", "--release", "--locked", "--bin", "pulse", "--target", TARGET, "--target-dir"])
        .arg(&target_dir);
    for (name, _) in env::vars_os() {
        if name.to_str().is_none_or(is_of_the_outer_build) {
            cargo.env_remove(name);
        }
    }
    // Set, even if to nothing, it outranks every configuration file on the way up from the guest's directory.
    cargo.env("CARGO_ENCODED_RUSTFLAGS", "");

    let status = cargo.status().unwrap_or_else(|error| panic!("cannot run cargo for the built-in guest: {error}"));
    assert!(status.success(), "the built-in guest does not build: {status}");
    let elf = target_dir.join(TARGET).join("release").join("pulse");
    println!("cargo::rustc-env=PULSE_ELF={}", elf.display());
}

/// Whether a variable belongs to the outer build: what cargo tells build scripts, and flags and wrappers for `rustc`.
/// Where cargo finds its registries and how it reaches them stays, as does the job server.
fn is_of_the_outer_build(name: &str) -> bool {
    const KEPT: [&str; 8] = [
        "CARGO_HOME",
        "CARGO_MAKEFLAGS",
        "CARGO_HTTP_",
        "CARGO_NET_",
        "CARGO_REGISTRIES_",
        "CARGO_REGISTRY_",
        "CARGO_SOURCE_",
        "CARGO_TERM_",
    ];
    const DROPPED: [&str; 7] = ["CARGO", "RUSTC", "RUSTFLAGS", "RUSTDOC", "CLIPPY", "__CARGO", "LD_"];
    let starts = |prefixes: &[&str]| prefixes.iter().any(|prefix| name.starts_with(prefix));
    starts(&DROPPED) && !starts(&KEPT) && name != "LD_LIBRARY_PATH"
}
