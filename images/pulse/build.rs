//! Links the guest at a fixed address, without the host's start files and C library.
//!
//! The arguments are given here and not in `RUSTFLAGS`, so that a plain `cargo build` makes the same ELF whatever
//! flags it was called with.

fn main() {
    let dir = std::env::var("CARGO_MANIFEST_DIR").expect("cargo sets CARGO_MANIFEST_DIR");
    for argument in ["-nostartfiles", "-nodefaultlibs", "-static", "-no-pie", "-Wl,--build-id=none", "-Wl,-n"] {
        println!("cargo:rustc-link-arg-bins={argument}");
    }
    println!("cargo:rustc-link-arg-bins=-Wl,-T{dir}/pulse.ld");
    println!("cargo:rerun-if-changed=pulse.ld");
    println!("cargo:rerun-if-changed=build.rs");
}
