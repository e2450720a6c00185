//! Every world that the handoff can get into, up to a bound: the machines that ship, in a model checker. `docs/model.md` says
//! what is modelled and what is not, and how to read a counterexample.
//!
//! `MICROVM_MODEL=large` checks more than fits into a usual test run.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod graph;
mod rules;
mod there;
mod world;

use std::collections::BTreeSet;

use rules::*;
use stateright::{Checker, Expectation, Model};

/// One attempt, everything can fail, nobody interferes.
const ONE: Rules = Rules {
    attempts: 1,
    arbiter: false,
    human: Human::Nobody,
    full_disks: true,
    slow_disks: true,
    power_cuts: true,
    flaw: None,
};
const ARBITER: Rules = Rules { arbiter: true, ..ONE };

fn is_large() -> bool {
    std::env::var("MICROVM_MODEL").is_ok_and(|bound| bound == "large")
}

/// Checks all properties; gives those that do not hold, each with its shortest way there.
fn broken(rules: Rules) -> BTreeSet<&'static str> {
    let checker = rules.checker().spawn_bfs().join();
    assert!(checker.is_done());
    println!("{rules}: {} worlds", checker.unique_state_count());
    let mut discoveries = checker.discoveries();
    let mut broken = BTreeSet::new();
    for property in rules.properties() {
        match (property.expectation, discoveries.remove(property.name)) {
            (Expectation::Sometimes, None) => panic!("{rules}: it never comes about that {}", property.name),
            (Expectation::Always, Some(path)) => {
                println!("  not so: {}", property.name);
                for action in path.into_actions() {
                    println!("    {action:?}");
                }
                broken.insert(property.name);
            }
            _ => {}
        }
    }
    broken
}

fn holds(rules: Rules) {
    let broken = broken(rules);
    assert!(broken.is_empty(), "{rules}: {broken:?}");
}

#[test]
fn never_two_and_never_lost() {
    holds(ONE);
    holds(ARBITER);
    holds(Rules { attempts: 2, ..ONE });
}

#[test]
fn never_two_and_never_lost_with_an_arbiter() {
    holds(Rules { attempts: 2, ..ARBITER });
}

#[test]
fn there_is_always_a_way_out() {
    let mut worlds = vec![ONE, ARBITER, Rules { attempts: 2, ..ONE }];
    for human in [Human::Looks, Human::KeepsBlindly, Human::DiscardsBlindly] {
        worlds.extend([Rules { human, ..ONE }, Rules { human, ..ARBITER }]);
    }
    if is_large() {
        worlds.push(Rules { attempts: 2, ..ARBITER });
    }
    for rules in worlds {
        let graph::Graph { worlds, steps, settled, trap } = graph::walk(&rules);
        println!("{rules}: {worlds} worlds, {settled} of them settled, {steps} steps");
        assert!(settled > 0 && settled < worlds);
        assert!(trap.is_none(), "{rules}: no way out of {trap:#?}");
    }
}

#[test]
fn who_resolves_by_hand_must_look_first() {
    let attempts = if is_large() { 2 } else { 1 };
    let (one, arbiter) = (Rules { attempts, ..ONE }, Rules { attempts, ..ARBITER });
    for rules in [one, arbiter] {
        holds(Rules { human: Human::Looks, ..rules });
        // Only to let go blindly can lose the VM, and an arbiter does not help: it is not asked to let go.
        assert_eq!(broken(Rules { human: Human::DiscardsBlindly, ..rules }), BTreeSet::from([NEVER_LOST]));
    }
    // Only to keep blindly can double it, and not where there is an arbiter.
    assert_eq!(broken(Rules { human: Human::KeepsBlindly, ..one }), BTreeSet::from([NEVER_TWO, NEVER_BACK]));
    holds(Rules { human: Human::KeepsBlindly, ..arbiter });
}

/// Rules that are broken on purpose: the checker finds each.
#[test]
fn every_flaw_is_found() {
    let keeps = Human::KeepsBlindly;
    for (flaw, rules, property) in [
        (Flaw::ResumesInDoubt, ONE, NEVER_TWO),
        (Flaw::DecidesLazily, ONE, NEVER_TWO),
        (Flaw::CommitsLazily, ONE, NEVER_BACK),
        (Flaw::RunsUnrecorded, ONE, NEVER_TWO),
        (Flaw::LateCommitRevives, ONE, NEVER_REVIVED),
        (Flaw::NoTombstone, ONE, NEVER_REVIVED),
        (Flaw::AgentIgnoresLock, ONE, NEVER_TWO),
        (Flaw::LeavesUnrecorded, ONE, NEVER_LOST),
        (Flaw::ForgetsAtOnce, ONE, NEVER_TWO),
        (Flaw::ReleasesBeforeRecord, ONE, NEVER_TWO),
        (Flaw::DestinationSkipsArbiter, ARBITER, NEVER_TWO),
        (Flaw::SourceSkipsArbiter, Rules { human: keeps, ..ARBITER }, NEVER_TWO),
        (Flaw::LostClaimReleases, ARBITER, NEVER_LOST),
    ] {
        let checker = Rules { flaw: Some(flaw), ..rules }.checker().spawn_bfs().join();
        let path = checker.discovery(property);
        println!("{flaw:?}: {property}: after {:?} steps", path.as_ref().map(|path| path.clone().into_actions().len()));
        assert!(path.is_some(), "{flaw:?} is not found");
    }
}

/// A way out that is closed is found, too: a destination that keeps its journal after it has settled.
#[test]
fn a_trap_is_found() {
    let graph = graph::walk(&Rules { flaw: Some(Flaw::KeepsJournal), ..ONE });
    println!("{:#?}", graph.trap);
    assert!(graph.trap.is_some());
}
