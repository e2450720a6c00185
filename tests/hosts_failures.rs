//! Migrations that do not complete: cancelled, hopeless, out of time, or with an end that dies. The VM is where it was and goes on,
//! the other host keeps nothing, and the next attempt succeeds.
#![allow(clippy::unwrap_used)] // Clippy's exception for tests does not reach their helpers.

mod common;

use common::guest::{Pulse, http_get, number};
use common::net::{Host, Net, hosts};
use common::{PATIENCE, Running, wait_for};
use rustix::process::Signal;

const GUEST: &str = "10.77.0.10";

/// A guest whose memory takes seconds to send at [`SLOWLY`].
fn large(host: &Host) -> Pulse {
    host.pulse("web", &format!("--memory 128M --net bridge=br0,ip={GUEST}/24"), "ws=64M rate=1M")
}
const SLOWLY: &str = "--bandwidth 4M";

/// Starts a slow migration and waits until pages flow.
fn on_its_way(net: &Net, more: &str) -> Running {
    let running = net.a.start(&format!("migrate web --to {} {SLOWLY} {more} --json", net.b.ip));
    wait_for("pages are under way", || {
        let view = net.a.inspect("web");
        let migration = &view["migration"];
        (migration["phase"] == "pre-copy" && migration["bytes_sent"].as_u64()? > 1 << 20).then_some(())
    });
    running
}

/// The VM is at the source and works, the destination has nothing, and the next attempt succeeds.
#[track_caller]
fn nothing_happened(net: &Net, pulse: &Pulse) {
    assert_eq!(net.a.state("web").as_deref(), Some("running"));
    pulse.goes_on(&net.a);
    net.b.is_empty();
    http_get(&net.observer, GUEST, "/status");
    net.a.moves("web", &net.b, "--verify");
    pulse.is_well(&net.b);
    net.a.is_empty();
}

#[test]
fn cancelled_by_the_command() {
    let Some(net) = hosts() else { return };
    let pulse = large(&net.a);
    let migration = on_its_way(&net, "");
    let asked = std::time::Instant::now();
    net.a.microvm("cancel web").ok();
    let said = migration.said();
    assert_eq!(said.code(), 3, "{said:?}");
    // Far less than the pages that were left would take; the promise is a second on a machine that is not busy.
    assert!(asked.elapsed() < PATIENCE / 4, "{:?}", asked.elapsed());
    let report = said.json();
    assert_eq!((&report["outcome"], &report["owner"]), (&"cancelled".into(), &"source".into()), "{report}");
    nothing_happened(&net, &pulse);
}

#[test]
fn cancelled_by_ctrl_c() {
    let Some(net) = hosts() else { return };
    let pulse = large(&net.a);
    let migration = on_its_way(&net, "");
    migration.signal(Signal::INT);
    let said = migration.said();
    assert_eq!(said.code(), 3, "{said:?}");
    assert_eq!(said.json()["outcome"], "cancelled");
    assert!(said.stderr.contains("web runs on here"), "{said:?}");
    nothing_happened(&net, &pulse);
}

#[test]
fn there_is_nothing_to_cancel_or_resolve_without_a_migration() {
    let Some(net) = hosts() else { return };
    let pulse = large(&net.a);
    net.a.microvm("cancel web").refused(1, &["web is not being migrated"]);
    net.a.microvm("resolve web --keep").refused(1, &["not in doubt"]);
    net.a.microvm("resolve web").refused(2, &["--keep", "--discard"]);
    nothing_happened(&net, &pulse);
}

#[test]
fn what_would_disturb_a_migration_is_refused() {
    let Some(net) = hosts() else { return };
    let pulse = large(&net.a);
    let migration = on_its_way(&net, "");
    net.a.migrate("web", &net.b, "").refused(1, &["being migrated already", "microvm cancel web"]);
    for command in ["pause", "resume", "stop"] {
        net.a.microvm(&format!("{command} web")).refused(1, &["is being migrated", "microvm cancel web"]);
    }
    assert_eq!(net.a.state("web").as_deref(), Some("migrating"));
    assert_eq!(net.b.state("web").as_deref(), Some("receiving"));
    net.a.microvm("cancel web").ok();
    assert_eq!(migration.said().code(), 3);
    nothing_happened(&net, &pulse);
}

#[test]
fn a_guest_that_writes_faster_than_the_link_is_given_up_early_with_numbers() {
    let Some(net) = hosts() else { return };
    let pulse = net.a.pulse("web", &format!("--memory 128M --net bridge=br0,ip={GUEST}/24"), "ws=32M rate=200M");
    let said = net.a.migrate("web", &net.b, "--bandwidth 16M --throttle never");
    assert_eq!(said.code(), 1, "{said:?}");
    let report = said.json();
    assert_eq!((&report["outcome"], &report["owner"]), (&"failed".into(), &"source".into()), "{report}");
    assert_eq!(report["error"]["phase"], "pre-copy", "{report}");
    let message = report["error"]["message"].as_str().unwrap();
    assert!(message.contains("does not converge") && message.contains("ms"), "{message}");
    let hint = report["error"]["hint"].as_str().unwrap();
    assert!(hint.contains("--max-downtime") && hint.contains("--throttle auto"), "{report}");
    // Early: nothing like a round after another of what cannot end.
    assert!(number(&report, "bytes_sent") < 20 * (32 << 20), "{report}");
    nothing_happened(&net, &pulse);
}

#[test]
fn a_migration_ends_with_its_time() {
    let Some(net) = hosts() else { return };
    let pulse = large(&net.a);
    let said = net.a.migrate("web", &net.b, &format!("{SLOWLY} --timeout 1s"));
    assert_eq!(said.code(), 1, "{said:?}");
    let report = said.json();
    assert_eq!((&report["outcome"], &report["owner"]), (&"failed".into(), &"source".into()), "{report}");
    assert!(report["error"].to_string().contains("1"), "{report}");
    nothing_happened(&net, &pulse);
}

#[test]
fn a_guest_that_powers_off_on_the_way_is_off() {
    let Some(net) = hosts() else { return };
    large(&net.a);
    let migration = on_its_way(&net, "");
    http_get(&net.observer, GUEST, "/poweroff");
    let said = migration.said();
    assert_eq!(said.code(), 5, "{said:?}");
    assert!(said.json()["error"].to_string().contains("powered off"), "{said:?}");
    let exit = wait_for("it is over", || Some(net.a.ps()[0]["exit"].clone()).filter(|exit| !exit.is_null()));
    assert_eq!(exit["reason"], "powered-off");
    net.b.is_empty();
    net.a.microvm("rm web").ok();
    net.a.is_empty();
}

#[test]
fn a_guest_that_crashes_on_the_way_has_crashed() {
    let Some(net) = hosts() else { return };
    large(&net.a);
    let migration = on_its_way(&net, "");
    http_get(&net.observer, GUEST, "/crash");
    let said = migration.said();
    assert_eq!(said.code(), 5, "{said:?}");
    assert!(said.json()["error"].to_string().contains("crashed"), "{said:?}");
    let exit = wait_for("it is over", || Some(net.a.ps()[0]["exit"].clone()).filter(|exit| !exit.is_null()));
    assert_eq!(exit["reason"], "crashed");
    net.b.is_empty();
}

#[test]
fn the_receiving_process_is_killed() {
    let Some(net) = hosts() else { return };
    let pulse = large(&net.a);
    let migration = on_its_way(&net, "");
    let pid = net.b.inspect("web")["pid"].as_i64().unwrap();
    let pid = rustix::process::Pid::from_raw(pid as i32).unwrap();
    rustix::process::kill_process(pid, Signal::KILL).unwrap();
    let said = migration.said();
    assert_eq!(said.code(), 1, "{said:?}");
    let report = said.json();
    assert_eq!((&report["outcome"], &report["owner"]), (&"failed".into(), &"source".into()), "{report}");
    assert_eq!(net.a.state("web").as_deref(), Some("running"));
    pulse.goes_on(&net.a);
    // A process that was killed cannot clear up after itself: the agent does.
    net.b.is_empty();
    nothing_happened(&net, &pulse);
}

#[test]
fn all_of_the_destination_is_killed() {
    let Some(mut net) = hosts() else { return };
    let pulse = large(&net.a);
    let migration = on_its_way(&net, "");
    let pid = net.b.inspect("web")["pid"].as_i64().unwrap();
    net.b.stop_agent();
    rustix::process::kill_process(rustix::process::Pid::from_raw(pid as i32).unwrap(), Signal::KILL).unwrap();
    assert_eq!(migration.said().code(), 1);
    pulse.goes_on(&net.a);
    // Nobody has cleared up; that is no reason to refuse the next attempt.
    assert_eq!(net.b.state("web").as_deref(), Some("dead"));
    net.b.start_agent("");
    net.a.moves("web", &net.b, "");
    pulse.is_well(&net.b);
}

#[test]
fn the_agent_is_killed_and_the_migration_goes_on() {
    let Some(mut net) = hosts() else { return };
    let pulse = large(&net.a);
    let migration = on_its_way(&net, "--max-downtime 20s");
    net.b.stop_agent();
    let said = migration.said();
    assert_eq!(said.code(), 0, "{said:?}");
    pulse.is_well(&net.b);
    net.b.start_agent("");
    net.b.moves("web", &net.a, "");
    pulse.is_well(&net.a);
}

#[test]
fn the_source_is_killed_and_the_destination_discards() {
    let Some(net) = hosts() else { return };
    large(&net.a);
    let migration = on_its_way(&net, "");
    let pid = net.a.inspect("web")["pid"].as_i64().unwrap();
    let pid = rustix::process::Pid::from_raw(pid as i32).unwrap();
    rustix::process::kill_process(pid, Signal::KILL).unwrap();
    let said = migration.said();
    assert_eq!(said.code(), 5, "{said:?}");
    net.b.is_empty();
    assert_eq!(net.a.state("web").as_deref(), Some("dead"));
    net.a.microvm("rm web").ok();
    net.a.is_empty();
}

#[test]
fn not_onto_itself() {
    let Some(net) = hosts() else { return };
    let pulse = large(&net.a);
    let said = net.a.migrate("web", &net.a, "");
    said.refused(1, &["web"]);
    assert!(said.stderr.contains("taken") || said.stderr.contains("itself"), "{said:?}");
    pulse.goes_on(&net.a);
    nothing_happened(&net, &pulse);
}
