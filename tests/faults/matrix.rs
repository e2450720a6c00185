//! What is done at which step, and what must be true afterwards.

use std::time::{Duration, Instant};

use libtest_mimic::Trial;
use rustix::process::Signal;

use crate::common::{PATIENCE, Running, Said, wait_for, wait_until};
use crate::world::{DEAD_AFTER, MIGRATE, Side, VM, World, signal, wait_gone};

/// How far the handoff is at a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd)]
enum Handoff {
    /// There is no receiving process yet.
    Before,
    /// COMMIT has not been sent.
    Open,
    /// COMMIT has come, and is not journaled.
    Sent,
    /// The VM is the destination's.
    Committed,
}
use Handoff::{Before, Committed, Open, Sent};

/// Every step of a migration that succeeds.
const STEPS: [(&str, Handoff); 35] = [
    ("source sending.before", Before),
    ("source sending.after", Before),
    ("source dial-request.before", Before),
    ("source dial-request.after", Before),
    ("agent offer.before", Before),
    ("destination receiving.before", Open),
    ("destination receiving.after", Open),
    ("destination prepare.before", Open),
    ("destination prepare.after", Open),
    ("agent offer.after", Open),
    ("source dial-control.before", Open),
    ("source dial-control.after", Open),
    ("agent hand-over", Open),
    ("source dial-pages.after", Open),
    ("source start-dirty-log.before", Open),
    ("source start-dirty-log.after", Open),
    ("source round-1", Open),
    ("source pause.before", Open),
    ("source pause.after", Open),
    ("source save.before", Open),
    ("source save.after", Open),
    ("destination load.before", Open),
    ("destination load.after", Open),
    ("destination prepared.before", Open),
    ("destination prepared.after", Open),
    ("source decided.before", Open),
    ("source decided.after", Open),
    ("destination committed.before", Sent),
    ("destination committed.after", Committed),
    ("destination start.before", Committed),
    ("destination start.after", Committed),
    ("destination running.before", Committed),
    ("destination running.after", Committed),
    ("source released.before", Committed),
    ("source released.after", Committed),
];

/// A process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Who {
    Source,
    Destination,
    SourceAgent,
    DestinationAgent,
}

/// What is done while a process is held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    Kill(Who),
    /// SIGSTOP, and SIGCONT when the others have noticed.
    Stop(Who),
    /// Its connections are reset.
    Reset,
    /// Nothing passes the link, and nobody is told; then it heals.
    BlackHole,
    /// The link is slow.
    Throttle,
    /// The step fails.
    Fail,
    /// The step panics: a bug.
    Panic,
}

/// Who has the VM in the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// It runs at the source.
    Here,
    /// It runs at the destination.
    There,
    /// It runs on one of them.
    OneRuns,
    /// It died at the source, and the destination has nothing.
    DeadHere,
    /// It died at the destination, and the source has nothing.
    DeadThere,
    /// It was lost in its start at the destination; the source says so.
    Lost,
}

fn expected(fault: Fault, handoff: Handoff) -> End {
    match (fault, handoff) {
        (Fault::Kill(Who::Source), Before | Open) => End::DeadHere,
        (Fault::Kill(Who::Source), Sent | Committed) => End::There,
        (Fault::Kill(Who::Destination), Before | Open | Sent) => End::Here,
        (Fault::Kill(Who::Destination), Committed) => End::DeadThere,
        _ => End::OneRuns,
    }
}

/// Steps that can fail, and what follows.
const FAILS: [(&str, End); 21] = [
    ("source sending.before", End::Here),
    ("source dial-request.before", End::Here),
    ("source dial-control.before", End::Here),
    ("source dial-pages.before", End::Here),
    ("source start-dirty-log.before", End::Here),
    ("source start-dirty-log.after", End::Here),
    ("source round-1", End::Here),
    ("source pause.before", End::Here),
    ("source pause.after", End::Here),
    ("source save.before", End::Here),
    ("source decided.before", End::Here),
    ("source released.before", End::There),
    ("destination receiving.before", End::Here),
    ("destination prepare.before", End::Here),
    ("destination prepare.after", End::Here),
    ("destination load.before", End::Here),
    ("destination prepared.before", End::Here),
    ("destination committed.before", End::Here),
    ("destination start.before", End::Here),
    ("destination start.after", End::Lost),
    ("destination running.before", End::There),
];

/// Steps at which a bug may show, and what follows.
const PANICS: [(&str, End); 16] = [
    ("source sending.before", End::Here),
    ("source dial-request.before", End::Here),
    ("source start-dirty-log.before", End::Here),
    ("source round-1", End::Here),
    ("source pause.after", End::Here),
    ("source save.before", End::Here),
    ("source decided.before", End::Here),
    ("source decided.after", End::Here),
    ("source released.before", End::There),
    ("source released.after", End::There),
    ("destination receiving.before", End::Here),
    ("destination prepare.after", End::Here),
    ("destination load.before", End::Here),
    ("destination prepared.after", End::Here),
    ("destination committed.after", End::DeadThere),
    ("destination start.before", End::DeadThere),
];

/// All cases.
pub fn trials() -> Vec<Trial> {
    use Who::{Destination, DestinationAgent, Source, SourceAgent};
    let mut trials = Vec::new();
    let mut add = |step: &'static str, fault: Fault, end: End| {
        let name = format!("{}/{}", step.replace(' ', "."), name(fault));
        trials.push(crate::trial(name, move |world| case(world, step, fault, end)));
    };
    for (n, (step, handoff)) in STEPS.into_iter().enumerate() {
        let mut faults = vec![Fault::Reset, Fault::BlackHole, Fault::Throttle];
        for who in [Source, Destination, DestinationAgent] {
            if who != Destination || handoff != Before {
                faults.extend([Fault::Kill(who), Fault::Stop(who)]);
            }
        }
        // It has no part in it, which a few cases show.
        if n % 8 == 0 {
            faults.extend([Fault::Kill(SourceAgent), Fault::Stop(SourceAgent)]);
        }
        for fault in faults {
            add(step, fault, expected(fault, handoff));
        }
    }
    for (step, end) in FAILS {
        add(step, Fault::Fail, end);
    }
    for (step, end) in PANICS {
        add(step, Fault::Panic, end);
    }
    trials
}

fn name(fault: Fault) -> String {
    let process = |who| match who {
        Who::Source => "source",
        Who::Destination => "destination",
        Who::SourceAgent => "source-agent",
        Who::DestinationAgent => "destination-agent",
    };
    match fault {
        Fault::Kill(who) => format!("kill-{}", process(who)),
        Fault::Stop(who) => format!("stop-{}", process(who)),
        Fault::Reset => "reset-link".into(),
        Fault::BlackHole => "silence-link".into(),
        Fault::Throttle => "slow-link".into(),
        Fault::Fail => "fail".into(),
        Fault::Panic => "panic".into(),
    }
}

fn pid(world: &World, who: Who) -> Option<i32> {
    match who {
        Who::Source => world.vm_pid(Side::A),
        Who::Destination => world.vm_pid(Side::B),
        Who::SourceAgent => world.net.a.agent_pid(),
        Who::DestinationAgent => world.net.b.agent_pid(),
    }
}

fn case(world: &mut World, step: &str, fault: Fault, end: End) {
    world.boot();
    world.hook.arm(step);
    let mut migration = world.migrate();
    world.hook.wait();
    match fault {
        Fault::Kill(who) => {
            // At the last steps the source may be gone by itself.
            if let Some(pid) = pid(world, who) {
                signal(pid, Signal::KILL);
                wait_gone(pid);
            }
            world.hook.answer("go");
            // An agent comes back when the others have noticed.
            if matches!(who, Who::SourceAgent | Who::DestinationAgent) {
                wait_while(&mut migration, DEAD_AFTER);
                world.restart_agent(if who == Who::SourceAgent { Side::A } else { Side::B });
            }
        }
        Fault::Stop(who) => {
            let pid = pid(world, who);
            pid.inspect(|pid| signal(*pid, Signal::STOP));
            world.hook.answer("go");
            // Longer than silence may be; the migration does not end before if its own process is the one.
            std::thread::sleep(DEAD_AFTER * 13 / 10);
            pid.inspect(|pid| signal(*pid, Signal::CONT));
        }
        Fault::Reset => {
            world.reset();
            world.hook.answer("go");
        }
        Fault::BlackHole => {
            world.link(false);
            world.hook.answer("go");
            // Around the commit point until it is said to be in doubt; otherwise until it has been noticed.
            let long = step.contains("decided") || step.contains("committed") || step.contains("start.");
            wait_while(&mut migration, if long { PATIENCE } else { DEAD_AFTER * 3 / 2 });
            world.link(true);
        }
        Fault::Throttle => {
            world.throttle(true);
            world.hook.answer("go");
            wait_while(&mut migration, PATIENCE);
            world.throttle(false);
        }
        Fault::Fail => world.hook.answer("fail"),
        Fault::Panic => world.hook.answer("panic"),
    }
    let said = migration.said();
    world.hook.disarm();
    ended(world, end, &said);
}

/// Waits until the migration's command has ended, or for so long.
fn wait_while(migration: &mut Running, limit: Duration) {
    let end = Instant::now() + limit;
    while !migration.has_ended() && Instant::now() < end {
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// What must be true after every case: the one owner that is expected, whom both hosts and the command's exit code agree on, a guest
/// that is well, a retry that succeeds, and nothing left over.
pub fn ended(world: &World, end: End, said: &Said) {
    // What is left of the dead is cleared away in a moment; two that run, or none, do not become one.
    let seen = wait_for(&format!("both hosts agree, after {said:?}"), || {
        let (a, b) = world.settled();
        let seen = match (a.as_deref(), b.as_deref()) {
            (Some("running"), None) => End::Here,
            (None, Some("running")) => End::There,
            (Some("dead"), None) => End::DeadHere,
            (None, Some("dead")) => End::DeadThere,
            // Its process there has left its log.
            (Some("ended"), Some("dead")) => End::Lost,
            (Some("running"), Some("running")) => panic!("it runs twice; {said:?}"),
            (None, None) => panic!("it is nowhere; {said:?}"),
            _ => return None,
        };
        Some(seen)
    });
    let as_expected = seen == end || (end == End::OneRuns && matches!(seen, End::Here | End::There));
    assert!(as_expected, "{end:?} was expected, and it is {seen:?}; {said:?}");
    let codes: &[i32] = match seen {
        // In doubt for too long; who owns it came out later.
        End::Here => &[1, 4],
        End::There | End::DeadThere => &[0, 4],
        End::DeadHere => &[4, 5],
        End::Lost | End::OneRuns => &[5],
    };
    assert!(codes.contains(&said.code()), "{seen:?}, and the exit code is {}: {said:?}", said.code());
    let runs = match seen {
        End::Here => Some(Side::A),
        End::There => Some(Side::B),
        _ => None,
    };
    if let Some(side) = runs {
        world.is_well(side);
        let (from, to) = (world.host(side), world.host(side.other()));
        wait_until("the retry succeeds", || {
            let again = from.microvm(&format!("migrate {VM} --to {} {MIGRATE}", to.ip));
            // What the first attempt began there may not have ended yet.
            let taken = again.code() == 1 && again.stderr.contains("is taken on the destination");
            assert!(taken || again.code() == 0, "the retry: {again:?}");
            !taken
        });
        let moved = if side == Side::A { side_b() } else { side_a() };
        wait_until("both hosts agree after the retry", || world.settled() == moved);
        world.is_well(side.other());
    }
    world.clear();
}

fn side_a() -> (Option<String>, Option<String>) {
    (Some("running".into()), None)
}

fn side_b() -> (Option<String>, Option<String>) {
    (None, Some("running".into()))
}
