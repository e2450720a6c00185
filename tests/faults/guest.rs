//! A guest that ends or reboots by itself in each phase of its migration.

use libtest_mimic::Trial;

use crate::common::guest::http_get;
use crate::common::{wait_for, wait_until};
use crate::world::{GUEST, Side, VM, World};

/// Steps at which the guest runs, and on which host.
const PHASES: [(&str, Side); 5] = [
    ("source dial-request.before", Side::A),
    ("destination prepare.after", Side::A),
    ("source round-1", Side::A),
    ("source pause.before", Side::A),
    ("destination start.after", Side::B),
];

/// All cases.
pub fn trials() -> Vec<Trial> {
    let ends =
        [("poweroff", "the guest powered off"), ("crash", "the guest crashed"), ("reboot", "the guest rebooted")];
    let cases = PHASES.into_iter().flat_map(|phase| ends.map(|end| (phase, end)));
    cases
        .map(|((step, side), (end, logged))| {
            let name = format!("{}/guest-{end}", step.replace(' ', "."));
            crate::trial(name, move |world| case(world, step, side, end, logged))
        })
        .collect()
}

fn case(world: &mut World, step: &str, side: Side, end: &str, logged: &str) {
    world.boot();
    world.hook.arm(step);
    let migration = world.migrate();
    world.hook.wait();
    http_get(&world.net.observer, GUEST, &format!("/{end}"));
    // It does so a moment after it has said it.
    wait_until("the guest does as it was told", || {
        let log = world.host(side).runtime().join("vms").join(VM).join("vm.log");
        std::fs::read_to_string(log).is_ok_and(|text| text.contains(logged))
    });
    world.hook.answer("go");
    let said = migration.said();
    world.hook.disarm();
    // What is left of the process that let go of it is cleared away in a moment.
    let here = wait_for(&format!("one host has it, after {said:?}"), || {
        let (a, b) = world.settled();
        let (here, there) = if side == Side::A { (a, b) } else { (b, a) };
        there.is_none().then_some(here)
    });
    let seen = world.seen(side).unwrap();
    let state = if end == "reboot" { "running" } else { "ended" };
    let codes: &[i32] = match (state, side) {
        ("running", Side::A) => &[1],
        (_, Side::A) => &[5],
        // Held for as long as the guest takes, the destination may say too late that it runs.
        (_, Side::B) => &[0, 4],
    };
    assert_eq!(here.as_deref(), Some(state), "{seen} {said:?}");
    assert!(codes.contains(&said.code()), "{seen} {said:?}");
    match end {
        "reboot" => world.is_well(side),
        "crash" => assert_eq!(seen["exit"]["reason"], "crashed", "{seen}"),
        _ => assert_eq!(seen["exit"]["reason"], "powered-off", "{seen}"),
    }
    world.clear();
}
