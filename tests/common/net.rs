//! Hosts, and the network between them.
//!
//! ```text
//! host 1: br0 — up0 ─┐
//! host 2: br0 — up0 ─┼─ h1, h2, obs on bridge sw0 of the switch
//! observer:    eth0 ─┘
//! ```

use std::fs;
use std::io;
use std::net::{SocketAddr, TcpStream};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use serde_json::Value;

use super::{Running, Said, no_hosts, run, sh, skip, wait_for, wait_until};

/// The observer's address.
pub const OBSERVER_IP: &str = "10.77.0.254";
const PREFIX: &str = "mvt";

/// The program under test.
pub const MICROVM: &str = env!("CARGO_BIN_EXE_microvm");

/// The program that hosts run: `$MICROVM_PROGRAM`, if a test needs one that was built otherwise.
pub fn program() -> PathBuf {
    std::env::var_os("MICROVM_PROGRAM").map_or_else(|| MICROVM.into(), PathBuf::from)
}

/// A network namespace, removed with all that runs in it.
pub struct Namespace(String);

impl Namespace {
    fn new(name: String) -> Self {
        sh("ip", &format!("netns add {name}"));
        let namespace = Namespace(name);
        namespace.ip("link set lo up");
        namespace
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.0
    }

    /// A command in it.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.0]).arg(program);
        command
    }

    /// Runs `program` in it with the words of `arguments`.
    #[track_caller]
    pub fn run(&self, program: &str, arguments: &str) -> Said {
        let mut command = self.command(program);
        command.args(arguments.split_whitespace());
        run(command)
    }

    /// `ip ARGUMENTS` in it.
    #[track_caller]
    pub fn ip(&self, arguments: &str) -> String {
        sh("ip", &format!("-n {} {arguments}", self.0))
    }

    /// Does something on a thread in it: sockets made there are the namespace's.
    pub fn within<T: Send + 'static>(&self, action: impl FnOnce() -> T + Send + 'static) -> JoinHandle<T> {
        let namespace = fs::File::open(Path::new("/run/netns").join(&self.0)).unwrap();
        std::thread::spawn(move || {
            move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network)).unwrap();
            action()
        })
    }

    /// What runs in it.
    pub fn pids(&self) -> Vec<i32> {
        pids(&self.0)
    }
}

fn pids(namespace: &str) -> Vec<i32> {
    let output = Command::new("ip").args(["netns", "pids", namespace]).stderr(Stdio::null()).output();
    let text = output.map(|o| String::from_utf8_lossy(&o.stdout).into_owned()).unwrap_or_default();
    text.split_whitespace().filter_map(|pid| pid.parse().ok()).collect()
}

/// Ends what runs in the namespace and removes it. May be called in a panic, so it does not.
fn remove_namespace(name: &str) {
    for _ in 0..100 {
        let pids = pids(name);
        if pids.is_empty() {
            break;
        }
        for pid in pids.into_iter().filter_map(rustix::process::Pid::from_raw) {
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    let _ = Command::new("ip").args(["netns", "del", name]).stderr(Stdio::null()).status();
}

impl Drop for Namespace {
    fn drop(&mut self) {
        remove_namespace(&self.0);
    }
}

/// A folder that goes with its owner.
struct Folder(PathBuf);

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = Command::new("umount").args(["-q", "-R"]).arg(&self.0).stderr(Stdio::null()).status();
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Removes what runs that were killed have left: their process is gone.
fn clean_up() {
    let alive = |name: &str| {
        let pid = name.split('-').nth(1).unwrap_or_default();
        pid.is_empty() || Path::new("/proc").join(pid).exists()
    };
    let ours = |dir: &str| -> Vec<String> {
        let entries = fs::read_dir(dir).into_iter().flatten().flatten();
        let names = entries.filter_map(|e| e.file_name().into_string().ok());
        names.filter(|name| name.starts_with(&format!("{PREFIX}-")) && !alive(name)).collect()
    };
    for name in ours("/run/netns") {
        remove_namespace(&name);
    }
    for name in ours("/tmp") {
        drop(Folder(Path::new("/tmp").join(name)));
    }
}

/// A host: a network namespace and a runtime folder; an agent if wanted.
pub struct Host {
    agent: Option<Running>,
    pub ns: Namespace,
    runtime: Folder,
    /// Its address on `br0`.
    pub ip: String,
    /// What the program gets in its environment besides.
    pub env: Vec<(&'static str, String)>,
}

impl Host {
    /// The program on this host.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = self.ns.command(program());
        command.args(arguments).env("MICROVM_RUNTIME_DIR", self.runtime()).env("MICROVM_CONFIG_DIR", self.config());
        command.envs(self.env.iter().map(|(name, value)| (name, value)));
        command
    }

    /// Runs the program; the words of `arguments` may be quoted with '.
    #[track_caller]
    pub fn microvm(&self, arguments: &str) -> Said {
        run(self.command(&words(arguments)))
    }

    /// Starts the program, to be waited for.
    pub fn start(&self, arguments: &str) -> Running {
        let mut command = self.command(&words(arguments));
        command.stdin(Stdio::null());
        Running::start(command)
    }

    /// Its runtime folder.
    pub fn runtime(&self) -> &Path {
        &self.runtime.0
    }

    /// Its configuration folder.
    pub fn config(&self) -> PathBuf {
        self.runtime().join("config")
    }

    /// Forgets the fleet: from now on it can do without encryption only.
    pub fn leave_fleet(&self) {
        fs::remove_dir_all(self.config()).unwrap();
    }

    /// Starts the agent on the host's address, and waits until it listens.
    pub fn start_agent(&mut self, more: &str) {
        let listen = format!("{}:7437", self.ip);
        let mut arguments = vec!["agent", "--listen", &listen];
        arguments.extend(more.split_whitespace());
        let mut command = self.command(&arguments);
        command.stdin(Stdio::null());
        let mut agent = Running::start(command);
        wait_until("the agent listens", || {
            assert!(!agent.has_ended(), "the agent has ended");
            self.ns.run("ss", "-Hltn sport = :7437").ok().contains("7437")
        });
        self.agent = Some(agent);
    }

    /// The agent's process.
    pub fn agent_pid(&self) -> Option<i32> {
        self.agent.as_ref().map(|agent| agent.pid().cast_signed())
    }

    /// Kills the agent.
    pub fn stop_agent(&mut self) {
        self.agent = None;
    }

    /// All VMs of the host.
    #[track_caller]
    pub fn ps(&self) -> Vec<Value> {
        match self.microvm("ps --json").json() {
            Value::Array(vms) => vms,
            other => panic!("{other}"),
        }
    }

    /// A VM's state, if it is here.
    pub fn state(&self, name: &str) -> Option<String> {
        let vms = self.ps();
        vms.iter().find(|vm| vm["name"] == name).map(|vm| vm["state"].as_str().unwrap().into())
    }

    /// All about a VM.
    #[track_caller]
    pub fn inspect(&self, name: &str) -> Value {
        let said = self.microvm(&format!("inspect {name} --json"));
        assert!(said.status.success(), "{said:?}");
        said.json()
    }

    /// The host's network interfaces that are no part of the host itself: VMs' TAPs.
    pub fn taps(&self) -> Vec<String> {
        let text = self.ns.ip("-o link show");
        let names = text.lines().filter_map(|line| line.split(": ").nth(1)).map(|n| n.split('@').next().unwrap());
        names.filter(|n| !["lo", "br0", "lan0", "up0"].contains(n)).map(String::from).collect()
    }

    /// Checks that no VM and nothing of one is here: no folder, no TAP, no process but the agent.
    #[track_caller]
    pub fn is_empty(&self) {
        let agent = self.agent.as_ref().map(|agent| agent.pid().cast_signed());
        let what = || {
            let folders = ["vms", "outgoing"].map(|name| fs::read_dir(self.runtime().join(name)));
            let vms = folders.into_iter().flatten().flatten().flatten();
            let mut left: Vec<String> = vms.map(|e| format!("folder {}", e.path().display())).collect();
            left.extend(self.taps().into_iter().map(|tap| format!("TAP {tap}")));
            let others = self.ns.pids().into_iter().filter(|pid| Some(*pid) != agent);
            left.extend(others.filter_map(|pid| {
                let command = fs::read_to_string(format!("/proc/{pid}/cmdline")).ok()?.replace('\0', " ");
                command.contains("vm-process").then(|| format!("process {command}"))
            }));
            left
        };
        let end = std::time::Instant::now() + Duration::from_secs(15);
        while !what().is_empty() {
            assert!(std::time::Instant::now() < end, "left behind: {:?}", what());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Runs the built-in guest in the background, and waits until its working set is filled.
    #[track_caller]
    pub fn pulse(&self, name: &str, options: &str, cmdline: &str) -> super::guest::Pulse {
        self.microvm(&format!("run -d --name {name} {options} --cmdline '{cmdline}'")).ok();
        let pulse = super::guest::Pulse::new(name);
        wait_for("the guest has filled its working set", || {
            pulse.said(self).iter().find(|l| l["event"] == "filled").cloned()
        });
        pulse
    }

    /// `migrate NAME --to THERE MORE --json`.
    #[track_caller]
    pub fn migrate(&self, name: &str, to: &Host, more: &str) -> Said {
        self.microvm(&format!("migrate {name} --to {} {more} --json", to.ip))
    }

    /// Migrates, checks that it did, and returns the report. A machine that is too busy to switch over within the usual downtime
    /// says so, and is then allowed more of it.
    #[track_caller]
    pub fn moves(&self, name: &str, to: &Host, more: &str) -> Value {
        let mut said = self.migrate(name, to, more);
        if said.code() == 1 && said.stdout.contains("does not converge") && !more.contains("--max-downtime") {
            assert_eq!(self.state(name).as_deref(), Some("running"), "{said:?}");
            said = self.migrate(name, to, &format!("{more} --max-downtime 20s"));
        }
        assert_eq!(said.code(), 0, "{said:?}");
        let report = said.json();
        assert_eq!((&report["outcome"], &report["owner"]), (&"completed".into(), &"destination".into()), "{report}");
        let end = std::time::Instant::now() + super::PATIENCE / 2;
        while self.state(name).is_some() {
            let log = || self.microvm(&format!("logs --process {name}")).stdout;
            assert!(std::time::Instant::now() < end, "the source does not let go: {:?}\n{}", self.ps(), log());
            std::thread::sleep(Duration::from_millis(10));
        }
        assert!(to.state(name).is_some(), "{name} is nowhere");
        report
    }
}

/// Words, with '…' around those that have blanks.
fn words(text: &str) -> Vec<&str> {
    let (mut words, mut rest) = (Vec::new(), text.trim_start());
    while !rest.is_empty() {
        let (word, after) = match rest.strip_prefix('\'') {
            Some(quoted) => quoted.split_once('\'').unwrap(),
            None => rest.split_once(' ').unwrap_or((rest, "")),
        };
        words.push(word);
        rest = after.trim_start();
    }
    words
}

/// Two hosts, a switch and an observer.
pub struct Net {
    pub a: Host,
    pub b: Host,
    pub observer: Namespace,
    pub switch: Namespace,
}

static NETS: AtomicU32 = AtomicU32::new(0);

impl Net {
    /// Hosts of one fleet, without agents.
    pub fn new() -> Self {
        let net = Net::of_strangers();
        net.a.microvm("trust init --name test --host host1 --address 10.77.0.1").ok();
        let bundle = net.a.runtime().join("host2.pem");
        let path = bundle.display();
        net.a.microvm(&format!("trust issue host2 --address 10.77.0.2 --out {path}")).ok();
        net.b.microvm(&format!("trust import {path}")).ok();
        fs::remove_file(bundle).unwrap();
        net
    }

    /// Hosts that have nothing in common but a network, without agents.
    pub fn of_strangers() -> Self {
        clean_up();
        let base = format!("{PREFIX}-{}-{}", std::process::id(), NETS.fetch_add(1, Ordering::Relaxed));
        let namespace = |part: &str| Namespace::new(format!("{base}-{part}"));
        let switch = namespace("sw");
        switch.ip("link add sw0 type bridge forward_delay 0");
        switch.ip("link set sw0 up");
        let plug = |end: &Namespace, name: &str, port: &str| {
            switch.ip(&format!("link add {port} type veth peer name {name} netns {}", end.name()));
            switch.ip(&format!("link set {port} master sw0 up"));
            end.ip(&format!("link set {name} up"));
        };
        let host = |n: u8| {
            let ns = namespace(&format!("h{n}"));
            plug(&ns, "up0", &format!("h{n}"));
            ns.ip("link add br0 type bridge forward_delay 0");
            ns.ip("link set up0 master br0");
            ns.ip("link set br0 up");
            let ip = format!("10.77.0.{n}");
            ns.ip(&format!("addr add {ip}/24 dev br0"));
            let runtime = Folder(PathBuf::from(format!("/tmp/{base}-h{n}")));
            fs::create_dir(&runtime.0).unwrap();
            Host { agent: None, ns, runtime, ip, env: Vec::new() }
        };
        let (a, b) = (host(1), host(2));
        let observer = namespace("obs");
        plug(&observer, "eth0", "obs");
        observer.ip(&format!("addr add {OBSERVER_IP}/24 dev eth0"));
        observer.ip("addr add fd00:77::fe/64 dev eth0 nodad");
        // A busy kernel lets a new link carry packets only seconds after it is up. Nobody listens there, which is an answer.
        for end in [&a.ns, &observer] {
            wait_until("packets pass", || {
                let refused = |error: io::Error| error.kind() == io::ErrorKind::ConnectionRefused;
                let there = SocketAddr::from(([10, 77, 0, 2], 9));
                let dial = move || TcpStream::connect_timeout(&there, Duration::from_millis(200)).is_err_and(refused);
                end.within(dial).join().unwrap()
            });
        }
        Net { a, b, observer, switch }
    }

    /// Hosts with agents.
    pub fn with_agents() -> Self {
        let mut net = Net::new();
        net.a.start_agent("");
        net.b.start_agent("");
        net
    }
}

/// Hosts with agents; `None`, with a reason, where there can be none.
pub fn hosts() -> Option<Net> {
    match no_hosts() {
        None => Some(Net::with_agents()),
        Some(reason) => {
            skip(&reason);
            None
        }
    }
}
