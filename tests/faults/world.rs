//! Two hosts whose processes can be held, and what is asked of them after each case.

use std::fs;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::common::guest::number;
use crate::common::net::{Host, Net};
use crate::common::{Running, wait_for, wait_until};
use crate::hook::Hook;

/// Silence that is death in these tests.
pub const DEAD_AFTER: Duration = Duration::from_millis(1000);
const AGENT: &str = "--dead-after 1s";
/// How each migration is asked for. A busy machine must not make it refuse to switch over.
pub const MIGRATE: &str = "--dead-after 1s --max-downtime 20s --json";

/// The one VM of each case.
pub const VM: &str = "web";
/// Its address.
pub const GUEST: &str = "10.77.0.10";

/// Where the VM is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    A,
    B,
}

impl Side {
    pub fn other(self) -> Self {
        if self == Side::A { Side::B } else { Side::A }
    }
}

/// Two hosts with agents, and the hook of all their processes.
pub struct World {
    pub net: Net,
    pub hook: Hook,
    socket: PathBuf,
}

static POOL: Mutex<Vec<World>> = Mutex::new(Vec::new());

impl World {
    /// One that is free, or a new one.
    pub fn get() -> Self {
        let free = POOL.lock().unwrap_or_else(PoisonError::into_inner).pop();
        free.unwrap_or_else(Self::new)
    }

    /// For the next case: nothing is in it.
    pub fn put_back(self) {
        POOL.lock().unwrap_or_else(PoisonError::into_inner).push(self);
    }

    /// Removes those that nobody uses any more.
    pub fn remove_all() {
        POOL.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    fn new() -> Self {
        let mut net = Net::new();
        let socket = net.a.runtime().join("hook");
        let hook = Hook::listen(&socket);
        for host in [&mut net.a, &mut net.b] {
            host.env.push(("MICROVM_FAULT_POINTS", socket.display().to_string()));
            host.start_agent(AGENT);
        }
        World { net, hook, socket }
    }

    pub fn host(&self, side: Side) -> &Host {
        if side == Side::A { &self.net.a } else { &self.net.b }
    }

    pub fn host_mut(&mut self, side: Side) -> &mut Host {
        if side == Side::A { &mut self.net.a } else { &mut self.net.b }
    }

    /// Starts the guest on host A.
    pub fn boot(&self) {
        let options = format!("--memory 16M --net bridge=br0,ip={GUEST}/24");
        let load = format!("ws=1M rate=1M report=20ms ip={GUEST}/24");
        self.net.a.microvm(&format!("run -d --name {VM} {options} --cmdline '{load}'")).ok();
        wait_for("the guest works", || self.report(Side::A).filter(|report| number(report, "sweeps") > 0));
    }

    /// Starts to move it from A to B.
    pub fn migrate(&self) -> Running {
        self.net.a.start(&format!("migrate {VM} --to {} {MIGRATE}", self.net.b.ip))
    }

    /// The guest's latest report on this host, by its own console.
    pub fn report(&self, side: Side) -> Option<Value> {
        let log = self.host(side).runtime().join("vms").join(VM).join("console.log");
        let text = String::from_utf8_lossy(&fs::read(log).ok()?).into_owned();
        let mut reports = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        reports.rfind(|line| line["sweeps"].is_u64())
    }

    /// The VM as `ps` shows it on this host.
    pub fn seen(&self, side: Side) -> Option<Value> {
        self.host(side).ps().into_iter().find(|vm| vm["name"] == VM)
    }

    pub fn state(&self, side: Side) -> Option<String> {
        self.seen(side).map(|vm| vm["state"].as_str().unwrap().to_string())
    }

    /// Waits until both hosts know what they have, and says it.
    pub fn settled(&self) -> (Option<String>, Option<String>) {
        let settled = |vm: &Option<Value>| {
            let Some(vm) = vm else { return true };
            match vm["state"].as_str().unwrap() {
                "running" | "paused" | "dead" => true,
                // As long as it has a process, that is about to end.
                "ended" => vm["pid"].is_null(),
                _ => false,
            }
        };
        let state = |vm: Option<Value>| vm.map(|vm| vm["state"].as_str().unwrap().to_string());
        wait_for("both hosts know", || {
            let (a, b) = (self.seen(Side::A), self.seen(Side::B));
            (settled(&a) && settled(&b)).then(|| (state(a), state(b)))
        })
    }

    /// The guest works here and its memory is right: it checks all of it once more.
    pub fn is_well(&self, side: Side) {
        let before = wait_for("the guest reports", || self.report(side));
        let after = wait_for("the guest goes on checking", || {
            let report = self.report(side)?;
            let more = |key, n| number(&report, key) >= number(&before, key) + n;
            (more("sweeps", 2) && more("t_ms", 1)).then_some(report)
        });
        assert_eq!(number(&after, "errors"), 0, "{after}");
    }

    /// The VM's process on this host, from what `ps` shows.
    pub fn vm_pid(&self, side: Side) -> Option<i32> {
        self.seen(side).and_then(|vm| vm["pid"].as_i64()).map(|pid| pid as i32)
    }

    /// Takes the link of host A away, without a word to anyone, or gives it back.
    pub fn link(&self, up: bool) {
        self.net.switch.ip(&format!("link set h1 {}", if up { "up" } else { "down" }));
    }

    /// Resets every migration's connections.
    pub fn reset(&self) {
        self.net.a.ns.run("ss", "-K dport = :7437").ok();
    }

    /// Makes the link to host B slow, or not.
    pub fn throttle(&self, slow: bool) {
        if slow {
            let rate = "root tbf rate 16mbit burst 32kb latency 200ms";
            self.net.switch.run("tc", &format!("qdisc add dev h2 {rate}")).ok();
        } else {
            let _ = self.net.switch.run("tc", "qdisc del dev h2 root");
        }
    }

    /// An agent that was killed comes back.
    pub fn restart_agent(&mut self, side: Side) {
        let host = self.host_mut(side);
        host.stop_agent();
        host.start_agent(AGENT);
    }

    /// Ends the VM wherever it is, and checks that nothing is left.
    pub fn clear(&self) {
        for side in [Side::A, Side::B] {
            if self.state(side).is_some() {
                self.host(side).microvm(&format!("rm --force {VM}")).ok();
            }
        }
        self.net.a.is_empty();
        self.net.b.is_empty();
    }

    /// What there is to read after a failure.
    pub fn story(&self) -> String {
        let mut story = format!("steps:\n  {}\n", self.hook.trace().join("\n  "));
        for side in [Side::A, Side::B] {
            let host = self.host(side);
            story += &format!("ps on {side:?}: {:?}\n", host.ps());
            for log in ["vm.log", "console.log"] {
                let path = host.runtime().join("vms").join(VM).join(log);
                let text = fs::read(path).unwrap_or_default();
                let text = String::from_utf8_lossy(&text[text.len().saturating_sub(3000)..]).into_owned();
                story += &format!("{log} on {side:?}:\n{text}\n");
            }
        }
        story
    }
}

impl Drop for World {
    fn drop(&mut self) {
        self.hook.disarm();
        let _ = fs::remove_file(&self.socket);
    }
}

/// Sends a signal to a process that may be gone.
pub fn signal(pid: i32, signal: Signal) {
    if let Some(pid) = Pid::from_raw(pid) {
        let _ = kill_process(pid, signal);
    }
}

/// Waits until a process is gone.
pub fn wait_gone(pid: i32) {
    wait_until("a killed process is gone", || {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        stat.is_empty() || stat.rsplit(") ").next().is_some_and(|rest| rest.starts_with('Z'))
    });
}
