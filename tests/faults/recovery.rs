//! What is left when a process or a host dies in doubt, and how it is settled: by the agent, by a command, by hand.

use std::fs::{self, File, TryLockError};

use libtest_mimic::Trial;
use migrator::handoff::Step;
use migrator::journal::FileJournal;
use rustix::process::Signal;

use crate::common::wait_until;
use crate::world::{Side, VM, World, signal, wait_gone};

/// All cases.
pub fn trials() -> Vec<Trial> {
    type Case = fn(&mut World);
    let cases: [(&str, Case); 11] = [
        ("the-agent-asks-and-it-was-given-up", given_up),
        ("the-agent-asks-and-it-runs-there", runs_there),
        ("the-runtime-folder-is-lost", runtime_folder_lost),
        ("without-an-agent-rm-asks", rm_asks),
        ("kept-by-hand", kept_by_hand),
        ("discarded-by-hand", discarded_by_hand),
        ("an-agent-that-comes-back-gives-up-what-died", agent_comes_back),
        ("sigterm-presses-the-power-button", sigterm),
        ("sigterm-cancels-a-migration", sigterm_in_a_migration),
        ("the-name-is-free-before-the-memory-is", back_before_memory_is_freed),
        ("a-process-killed-in-doubt-keeps-the-name-to-its-end", killed_in_doubt),
    ];
    cases.into_iter().map(|(name, case)| crate::trial(format!("recovery/{name}"), case)).collect()
}

/// Holds a migration at `step`, takes the link away, and kills the source's process.
fn source_dies_in_doubt(world: &mut World, step: &str) {
    world.boot();
    world.hook.arm(step);
    let migration = world.migrate();
    world.hook.wait();
    let pid = world.vm_pid(Side::A).unwrap();
    world.link(false);
    signal(pid, Signal::KILL);
    wait_gone(pid);
    world.hook.answer("go");
    let said = migration.said();
    said.refused(4, &["in doubt", "microvm resolve web --keep"]);
    // For as long as nobody can be asked, everyone says so.
    let seen = world.seen(Side::A).unwrap();
    assert_eq!(seen["state"], "in-doubt", "{seen}");
    assert!(seen["doubt"]["since_unix_ms"].as_u64().unwrap() > 0, "{seen}");
    let ps = world.net.a.microvm("ps").ok();
    assert!(ps.contains("in doubt since") && ps.contains("microvm resolve --help"), "{ps}");
    let inspect = world.net.a.microvm("inspect web").ok();
    assert!(inspect.contains("in-doubt") && inspect.contains("died"), "{inspect}");
}

/// The commands that must know refuse, and say what to do.
fn nothing_is_done_in_doubt(world: &World) {
    for command in ["rm web", "run -d --name web --memory 16M"] {
        world.net.a.microvm(command).refused(1, &["in doubt", "microvm agent", "microvm resolve web --keep"]);
    }
    world.net.a.microvm("pause web").refused(1, &["in doubt"]);
}

fn is(world: &World, a: Option<&str>, b: Option<&str>) {
    wait_until("it is settled", || (world.state(Side::A).as_deref(), world.state(Side::B).as_deref()) == (a, b));
}

/// COMMIT was never sent: the destination gives up, and says so when it can be asked.
fn given_up(world: &mut World) {
    source_dies_in_doubt(world, "source decided.after");
    nothing_is_done_in_doubt(world);
    wait_until("the agent has asked in vain", || {
        world.seen(Side::A).unwrap()["doubt"]["last_answer"].as_str().is_some_and(|answer| answer.contains("connect"))
    });
    world.link(true);
    is(world, Some("dead"), None);
    world.net.a.microvm("rm web").ok();
    world.clear();
}

fn runs_there(world: &mut World) {
    source_dies_in_doubt(world, "destination start.after");
    is(world, Some("in-doubt"), Some("running"));
    nothing_is_done_in_doubt(world);
    world.link(true);
    is(world, None, Some("running"));
    world.is_well(Side::B);
    world.net.b.microvm(&format!("migrate web --to {} --max-downtime 20s", world.net.a.ip)).ok();
    world.is_well(Side::A);
    world.clear();
}

/// As after a power cut: what was on tmpfs is gone, the journal is not.
fn runtime_folder_lost(world: &mut World) {
    source_dies_in_doubt(world, "destination start.after");
    fs::remove_dir_all(world.net.a.runtime().join("vms")).unwrap();
    is(world, Some("in-doubt"), Some("running"));
    nothing_is_done_in_doubt(world);
    world.restart_agent(Side::A);
    is(world, Some("in-doubt"), Some("running"));
    world.link(true);
    is(world, None, Some("running"));
    world.is_well(Side::B);
    world.clear();
}

fn rm_asks(world: &mut World) {
    world.net.a.stop_agent();
    source_dies_in_doubt(world, "destination start.after");
    nothing_is_done_in_doubt(world);
    world.link(true);
    is(world, Some("in-doubt"), Some("running"));
    let said = world.net.a.microvm("rm web").ok();
    assert!(said.contains("web runs on"), "{said}");
    is(world, None, Some("running"));
    world.restart_agent(Side::A);
    world.is_well(Side::B);
    world.clear();
}

fn kept_by_hand(world: &mut World) {
    source_dies_in_doubt(world, "source decided.after");
    let said = world.net.a.microvm("resolve web --keep").ok();
    assert!(said.contains("died with its process"), "{said}");
    is(world, Some("dead"), None);
    world.net.a.microvm("resolve web --keep").refused(1, &["nothing to resolve"]);
    world.net.a.microvm("rm web").ok();
    world.link(true);
    world.clear();
}

fn discarded_by_hand(world: &mut World) {
    source_dies_in_doubt(world, "destination start.after");
    let said = world.net.a.microvm("resolve web --discard").ok();
    assert!(said.contains("removed"), "{said}");
    is(world, None, Some("running"));
    world.link(true);
    world.is_well(Side::B);
    world.clear();
}

/// Both the receiving process and its agent are killed: the next agent records that nothing came of it, before anyone asks.
fn agent_comes_back(world: &mut World) {
    world.boot();
    world.hook.arm("destination load.before");
    let migration = world.migrate();
    world.hook.wait();
    let receiver = world.vm_pid(Side::B).unwrap();
    world.net.b.stop_agent();
    signal(receiver, Signal::KILL);
    wait_gone(receiver);
    world.hook.answer("go");
    assert_eq!(migration.said().code(), 1);
    assert_eq!(world.state(Side::B).as_deref(), Some("dead"));
    assert_eq!(newest_incoming(world), [Step::Receiving]);
    world.restart_agent(Side::B);
    wait_until("the agent gives it up", || newest_incoming(world) == [Step::Receiving, Step::GaveUp]);
    is(world, Some("running"), None);
    world.net.b.is_empty();
    world.is_well(Side::A);
    world.clear();
}

/// The steps of the latest migration to B.
fn newest_incoming(world: &World) -> Vec<Step> {
    let journals = fs::read_dir(world.net.b.runtime().join("incoming")).unwrap().flatten();
    let newest = journals.max_by_key(|file| file.metadata().unwrap().modified().unwrap()).unwrap();
    FileJournal::read(&newest.path()).unwrap().iter().map(|record| record.step).collect()
}

fn sigterm(world: &mut World) {
    world.boot();
    let pid = world.vm_pid(Side::A).unwrap();
    signal(pid, Signal::TERM);
    wait_until("it has ended", || world.settled() == (Some("ended".into()), None));
    assert_eq!(world.seen(Side::A).unwrap()["exit"]["reason"], "powered-off");
    world.clear();
}

fn sigterm_in_a_migration(world: &mut World) {
    world.boot();
    let slowly = format!("migrate web --to {} --bandwidth 100K", world.net.b.ip);
    let migration = world.net.a.start(&slowly);
    wait_until("pages are under way", || world.state(Side::B).as_deref() == Some("receiving"));
    signal(world.vm_pid(Side::A).unwrap(), Signal::TERM);
    let said = migration.said();
    assert!([3, 5].contains(&said.code()), "{said:?}");
    wait_until("it has ended", || world.settled() == (Some("ended".into()), None));
    assert_eq!(world.seen(Side::A).unwrap()["exit"]["reason"], "powered-off");
    world.clear();
}

/// The VM goes and comes back while the process that it left has not freed its memory.
fn back_before_memory_is_freed(world: &mut World) {
    world.boot();
    let first = world.vm_pid(Side::A).unwrap();
    world.hook.arm("vm free.before");
    world.migrate().said().ok();
    world.hook.wait();
    is(world, None, Some("running"));
    world.net.b.microvm(&format!("migrate web --to {} --max-downtime 20s", world.net.a.ip)).ok();
    is(world, Some("running"), None);
    world.is_well(Side::A);
    assert!(fs::exists(format!("/proc/{first}")).unwrap(), "it is held");
    world.hook.answer("go");
    wait_gone(first);
    world.is_well(Side::A);
    world.clear();
}

/// A migration that is in doubt may write to its journal as long as there is its process: until then nobody else may settle it.
fn killed_in_doubt(world: &mut World) {
    world.boot();
    world.hook.arm("destination start.after");
    let migration = world.migrate();
    world.hook.wait();
    world.link(false);
    migration.said().refused(4, &["in doubt"]);
    world.hook.answer("go");
    let pid = world.vm_pid(Side::A).unwrap();
    world.hook.arm("vm free.before");
    signal(pid, Signal::TERM);
    let folder = world.net.a.runtime().join("vms").join(VM);
    wait_until("it was asked once", || {
        fs::read_to_string(folder.join("vm.log")).is_ok_and(|log| log.contains("asked to end by SIGTERM"))
    });
    signal(pid, Signal::TERM);
    world.hook.wait();
    for file in [folder.join("lock"), world.net.a.runtime().join("outgoing").join(VM).join("journal")] {
        let lock = File::open(&file).unwrap().try_lock_shared();
        assert!(matches!(lock, Err(TryLockError::WouldBlock)), "{}: {lock:?}", file.display());
    }
    world.hook.answer("go");
    wait_gone(pid);
    is(world, Some("in-doubt"), Some("running"));
    nothing_is_done_in_doubt(world);
    world.link(true);
    is(world, None, Some("running"));
    world.is_well(Side::B);
    world.clear();
}
