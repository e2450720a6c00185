//! Processes killed and stopped, links cut, silenced and slowed, at each step of a migration: afterwards there is one copy of the VM,
//! both hosts agree on it, its memory is right, and it can be migrated.
//!
//! Each case has a name, `source.decided.after/kill-destination`, and can be run by it. The program is one with the feature
//! `fault-points` ([`hook`]); `scripts/test --level faults` builds it.
#![allow(clippy::unwrap_used)] // Clippy's exception for tests does not reach their helpers.

#[path = "../common/mod.rs"]
mod common;

mod guest;
mod hook;
mod matrix;
mod recovery;
mod world;

use std::panic::{AssertUnwindSafe, catch_unwind};

use libtest_mimic::{Arguments, Failed, Trial};
use world::World;

/// So many cases are promised.
const AT_LEAST: usize = 200;

/// A case in a world of its own. What it says when it fails is followed by what the processes did.
fn trial(name: String, case: impl FnOnce(&mut World) + Send + 'static) -> Trial {
    Trial::test(name, move || {
        if let Some(reason) = common::no_hosts() {
            common::skip(&reason);
            return Ok(());
        }
        let mut world = World::get();
        match catch_unwind(AssertUnwindSafe(|| case(&mut world))) {
            Ok(()) => {
                world.put_back();
                Ok(())
            }
            Err(panic) => {
                let text = panic.downcast_ref::<String>().cloned();
                let text = text.or_else(|| panic.downcast_ref::<&str>().map(ToString::to_string)).unwrap_or_default();
                let story = catch_unwind(AssertUnwindSafe(|| world.story())).unwrap_or_default();
                Err(Failed::from(format!("{text}\n{story}")))
            }
        }
    })
}

fn main() {
    // What scripts/test says to every test program.
    let arguments = Arguments::from_iter(std::env::args().filter(|argument| argument != "--show-output"));
    let mut version = std::process::Command::new(common::net::program());
    let version = common::run({
        version.arg("--version");
        version
    });
    assert!(version.stdout.contains("fault points"), "built without fault points: {version:?}");
    let trials: Vec<Trial> = [matrix::trials(), guest::trials(), recovery::trials()].into_iter().flatten().collect();
    println!("{} cases", trials.len());
    assert!(trials.len() >= AT_LEAST);
    let conclusion = libtest_mimic::run(&arguments, trials);
    World::remove_all();
    conclusion.exit();
}
