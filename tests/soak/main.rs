//! The soak: many VMs of several sizes and loads, moved back and forth between two hosts, several at once and in both directions;
//! some migrations are cancelled, some lose their receiving process or their connections, and every now and then an agent dies.
//! At the end every VM is there exactly once, its memory is right, and nothing has leaked.
//!
//! `scripts/soak` runs it for long; without arguments (as a part of the level `faults`) it is short.
#![allow(clippy::unwrap_used)] // Clippy's exception for tests does not reach their helpers.

#[path = "../common/mod.rs"]
mod common;

mod report;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, RwLock};
use std::time::{Duration, Instant};

use common::net::{Host, Net};
use common::{wait_for, wait_until};
use report::{Leaks, Summary};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

/// The VMs: memory, and load.
const VMS: [(&str, &str); 6] = [
    ("16M", "ws=1M rate=0"),
    ("16M", "ws=1M rate=4M"),
    ("32M", "ws=8M rate=16M"),
    ("64M", "ws=16M rate=32M pattern=random"),
    ("128M", "ws=4M rate=8M"),
    ("256M", "ws=32M rate=64M pattern=random"),
];
const AGENT: &str = "--dead-after 2s";
const MIGRATE: &str = "--dead-after 2s --max-downtime 20s --json";
const AGENT_LIVES: Duration = Duration::from_secs(7);

/// How long it goes on.
struct Limits {
    migrations: u64,
    seconds: u64,
    json: Option<String>,
    seed: u64,
}

fn limits() -> Option<Limits> {
    let mut limits = Limits { migrations: 300, seconds: 75, json: None, seed: 1 };
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        let mut number = || arguments.next().and_then(|n| n.parse().ok()).unwrap_or_else(|| panic!("{argument} N"));
        match argument.as_str() {
            "--migrations" => limits.migrations = number(),
            "--seconds" => limits.seconds = number(),
            "--seed" => limits.seed = number(),
            "--json" => limits.json = arguments.next(),
            // What scripts/test says to every test program; a filter that is not for this one.
            argument if argument.starts_with("--") => {}
            filter if !"soak".contains(filter) => return None,
            _ => {}
        }
    }
    Some(limits)
}

/// xorshift: the same seed is the same soak, as far as machines allow.
struct Random(u64);

impl Random {
    fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % end
    }
}

/// What is done to a migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Trouble {
    None,
    Cancel,
    KillReceiver,
    Reset,
}

struct Soak {
    /// The hosts; an agent that is restarted has one alone for a moment.
    hosts: [RwLock<Host>; 2],
    limits: Limits,
    began: Instant,
    migrations: AtomicU64,
    over: AtomicBool,
    summary: Mutex<Summary>,
}

impl Soak {
    fn host(&self, side: usize) -> std::sync::RwLockReadGuard<'_, Host> {
        self.hosts[side].read().unwrap()
    }

    fn is_over(&self) -> bool {
        self.over.load(Ordering::SeqCst)
            || self.migrations.load(Ordering::SeqCst) >= self.limits.migrations
            || self.began.elapsed() > Duration::from_secs(self.limits.seconds)
    }

    fn boot(&self, vm: usize, side: usize) {
        let (memory, load) = VMS[vm];
        let address = format!("10.77.0.{}/24", 10 + vm);
        let options = format!("--memory {memory} --net bridge=br0,ip={address}");
        let run = format!("run -d --name vm{vm} {options} --cmdline '{load} report=50ms ip={address}'");
        self.host(side).microvm(&run).ok();
        wait_for("the guest works", || self.report(vm, side).filter(|report| report["sweeps"].as_u64() > Some(0)));
    }

    fn seen(&self, vm: usize, side: usize) -> Option<Value> {
        self.host(side).ps().into_iter().find(|seen| seen["name"] == format!("vm{vm}"))
    }

    fn report(&self, vm: usize, side: usize) -> Option<Value> {
        let log = self.host(side).runtime().join(format!("vms/vm{vm}/console.log"));
        let text = String::from_utf8_lossy(&std::fs::read(log).ok()?).into_owned();
        let mut reports = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        reports.rfind(|line| line["sweeps"].is_u64())
    }

    /// The guest goes on, and its memory is right.
    fn is_well(&self, vm: usize, side: usize, sweeps: u64) {
        let number = |report: &Value, key: &str| report[key].as_u64().unwrap();
        let before = wait_for("the guest reports", || self.report(vm, side));
        let after = wait_for("the guest goes on checking", || {
            let report = self.report(vm, side)?;
            let goes_on = number(&report, "t_ms") > number(&before, "t_ms");
            (goes_on && number(&report, "sweeps") >= number(&before, "sweeps") + sweeps).then_some(report)
        });
        assert_eq!(number(&after, "errors"), 0, "vm{vm}: {after}");
    }

    /// Waits until both hosts agree where the VM is: runs on a side, or died there.
    fn settled(&self, vm: usize) -> (usize, bool) {
        wait_for(&format!("both hosts agree on vm{vm}"), || {
            let state = |side| self.seen(vm, side).map(|seen| seen["state"].as_str().unwrap().to_string());
            match (state(0).as_deref(), state(1).as_deref()) {
                (Some("running"), None) => Some((0, true)),
                (None, Some("running")) => Some((1, true)),
                (Some("dead"), None) => Some((0, false)),
                (None, Some("dead")) => Some((1, false)),
                (Some("running"), Some("running")) => panic!("vm{vm} runs twice"),
                _ => None,
            }
        })
    }

    /// One VM goes back and forth.
    fn travel(&self, vm: usize) {
        let mut random = Random(self.limits.seed * 1000 + vm as u64 + 1);
        let mut side = vm % 2;
        self.boot(vm, side);
        while !self.is_over() {
            self.migrations.fetch_add(1, Ordering::SeqCst);
            let trouble = match random.below(100) {
                0..=9 => Trouble::Cancel,
                10..=14 => Trouble::KillReceiver,
                15..=17 => Trouble::Reset,
                _ => Trouble::None,
            };
            let moment = Duration::from_millis(random.below(120));
            let there = self.host(1 - side).ip.clone();
            let running = self.host(side).start(&format!("migrate vm{vm} --to {there} {MIGRATE}"));
            std::thread::sleep(if trouble == Trouble::None { Duration::ZERO } else { moment });
            match trouble {
                Trouble::None => {}
                Trouble::Cancel => {
                    // It may be over, or too late.
                    let _ = self.host(side).microvm(&format!("cancel vm{vm}"));
                }
                Trouble::KillReceiver => {
                    let seen = self.seen(vm, 1 - side).and_then(|seen| seen["pid"].as_i64());
                    if let Some(pid) = seen.and_then(|pid| Pid::from_raw(pid as i32)) {
                        let _ = kill_process(pid, Signal::KILL);
                    }
                }
                Trouble::Reset => {
                    self.host(side).ns.run("ss", "-K dport = :7437").ok();
                }
            }
            let said = running.said();
            let (at, runs) = self.settled(vm);
            let code = said.code();
            match code {
                0 => assert!(at == 1 - side, "vm{vm}: {said:?}"),
                1 | 3 => assert!(at == side && runs, "vm{vm}: {said:?}"),
                4 => {}
                _ => panic!("vm{vm}: {said:?}"),
            }
            let died = !runs;
            assert!(!died || trouble == Trouble::KillReceiver, "vm{vm} died without reason: {said:?}");
            self.summary.lock().unwrap().add(
                format!("{trouble:?}"),
                code,
                died,
                serde_json::from_str(&said.stdout).ok(),
            );
            side = at;
            if died {
                self.host(side).microvm(&format!("rm vm{vm}")).ok();
                self.boot(vm, side);
            } else {
                self.is_well(vm, side, 0);
            }
        }
        self.is_well(vm, side, 2);
    }

    /// The agent of the second host dies now and then; the first one's is watched for leaks.
    fn kill_agents(&self) {
        let mut next = Instant::now() + AGENT_LIVES;
        while !self.is_over() {
            if Instant::now() >= next {
                let mut host = self.hosts[1].write().unwrap();
                host.stop_agent();
                host.start_agent(AGENT);
                self.summary.lock().unwrap().agents_killed += 1;
                next = Instant::now() + AGENT_LIVES;
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    }
}

fn main() {
    let result =
        |passed: u32| println!("test result: ok. {passed} passed; 0 failed; 0 ignored; 0 measured; 0 filtered out");
    let Some(limits) = limits() else { return result(0) };
    if let Some(reason) = common::no_hosts() {
        common::skip(&reason);
        return result(1);
    }
    let Net { mut a, mut b, observer, switch } = Net::new();
    for host in [&mut a, &mut b] {
        host.start_agent(AGENT);
    }
    let soak = Soak {
        hosts: [RwLock::new(a), RwLock::new(b)],
        limits,
        began: Instant::now(),
        migrations: AtomicU64::new(0),
        over: AtomicBool::new(false),
        summary: Mutex::default(),
    };
    let mut before = None;
    std::thread::scope(|scope| {
        let travellers: Vec<_> = (0..VMS.len())
            .map(|vm| {
                scope.spawn({
                    let soak = &soak;
                    move || soak.travel(vm)
                })
            })
            .collect();
        scope.spawn(|| soak.kill_agents());
        // When everything has been used once.
        wait_until("the first migrations are over", || {
            soak.summary.lock().unwrap().migrations() >= 30 || soak.is_over()
        });
        before = Some(Leaks::of(soak.host(0).agent_pid().unwrap()));
        for traveller in travellers {
            if let Err(panic) = traveller.join() {
                soak.over.store(true, Ordering::SeqCst);
                std::panic::resume_unwind(panic);
            }
        }
    });
    // Threads of connections that have just ended.
    std::thread::sleep(Duration::from_secs(1));
    let (before, after) = (before.unwrap(), Leaks::of(soak.host(0).agent_pid().unwrap()));
    for vm in 0..VMS.len() {
        let (side, runs) = soak.settled(vm);
        assert!(runs, "vm{vm} does not run");
        soak.host(side).microvm(&format!("rm --force vm{vm}")).ok();
    }
    soak.host(0).is_empty();
    soak.host(1).is_empty();
    assert!(after.descriptors <= before.descriptors + 4, "descriptors: {before:?}, then {after:?}");
    assert!(after.threads <= before.threads + 4, "threads: {before:?}, then {after:?}");
    assert!(after.rss_kib <= before.rss_kib + (16 << 10), "memory: {before:?}, then {after:?}");
    let journals = [0, 1]
        .map(|side| std::fs::read_dir(soak.host(side).runtime().join("incoming")).map_or(0, |files| files.count()));
    let seconds = soak.began.elapsed().as_secs_f64();
    let summary = soak.summary.into_inner().unwrap();
    summary.print(seconds, &before, &after, journals);
    if let Some(path) = &soak.limits.json {
        std::fs::write(path, summary.json(seconds, &before, &after, journals)).unwrap();
    }
    drop((soak.hosts, observer, switch));
    result(1);
}
