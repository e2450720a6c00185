//! Stock Linux kernels on two nested hosts with real KVM: boot, migrate there and back, switch off, reboot, panic.
//!
//! Time in the lab is not time: nothing here asserts how fast something is, but for hangs. Needs root and QEMU; `scripts/lab` and
//! `scripts/kernels` install and fetch what is missing.

#![allow(clippy::unwrap_used)] // a test fails by it

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{LazyLock, Mutex, MutexGuard, PoisonError};
use std::thread::sleep;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde_json::Value;

const GUEST: &str = "10.99.0.100";
/// How much the guest's clock may have moved against the machine's by a migration. (When it boots it is behind by what the kernel
/// takes until it reads its clock source: much, here.)
const CLOCK_TOLERANCE_NS: i128 = 50_000_000;
/// What a stock kernel says when time, interrupts or CPUs are not as they were.
const COMPLAINTS: [&str; 9] =
    ["clocksource", "unstable", "rcu:", "soft lockup", "hung_task", "BUG:", "WARNING:", "nobody cared", "Call Trace"];

fn checkout() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn script(name: &str) -> Command {
    let mut command = Command::new(checkout().join("scripts").join(name));
    command.current_dir(checkout()).env("MICROVM_LAB", format!("test-{}", std::process::id())).stdin(Stdio::null());
    command
}

fn output(command: &mut Command) -> Result<String, String> {
    let out = command.output().map_err(|e| format!("{command:?}: {e}"))?;
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    if out.status.success() {
        Ok(text)
    } else {
        Err(format!("{command:?}: {}\n{text}{}", out.status, String::from_utf8_lossy(&out.stderr)))
    }
}

/// Two hosts with an agent each; gone when dropped.
struct Lab {
    agents: Vec<Child>,
}

impl Lab {
    fn up() -> Self {
        let built = Path::new(env!("CARGO_BIN_EXE_microvm"));
        assert!(built.starts_with(checkout()), "hosts of the lab see this checkout; {} is elsewhere", built.display());
        let mut lab = Lab { agents: Vec::new() };
        output(script("lab").args(["up", "2"])).unwrap();
        lab.join_hosts();
        // VMs that came may boot again from where their kernels lie.
        let policy = Path::new(env!("CARGO_TARGET_TMPDIR")).join("policy.json").display().to_string();
        std::fs::write(&policy, r#"{"boot_files": ["/"]}"#).unwrap();
        for n in [1, 2] {
            let listen = format!("10.99.0.{n}:7437");
            let mut agent = lab.command(n, &["agent", "--listen", &listen, "--policy", &policy]);
            lab.agents.push(agent.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap());
            let probe = format!("until ss -ltn | grep -q {listen}; do sleep 0.1; done");
            output(script("lab").args([
                "exec",
                "-n",
                &format!("host{n}"),
                "--",
                "timeout",
                "30",
                "bash",
                "-c",
                &probe,
            ]))
            .unwrap();
        }
        lab
    }

    /// Makes the hosts a fleet.
    fn join_hosts(&self) {
        use std::io::Write;
        self.microvm(1, &["trust", "init", "--host", "host1", "--address", "10.99.0.1"]).unwrap();
        let bundle = self.microvm(1, &["trust", "issue", "host2", "--address", "10.99.0.2", "--out", "-"]).unwrap();
        let program = env!("CARGO_BIN_EXE_microvm");
        let mut import = script("lab");
        import.args(["exec", "host2", "--", program, "trust", "import", "-"]).stdin(Stdio::piped());
        let mut import = import.spawn().unwrap();
        import.stdin.take().unwrap().write_all(bundle.as_bytes()).unwrap();
        assert!(import.wait().unwrap().success());
    }

    fn command(&self, host: u8, args: &[&str]) -> Command {
        let mut command = script("lab");
        command.args(["exec", "-n", &format!("host{host}"), "--", env!("CARGO_BIN_EXE_microvm")]).args(args);
        command
    }

    fn microvm(&self, host: u8, args: &[&str]) -> Result<String, String> {
        output(&mut self.command(host, args))
    }

    /// In the lab's network, on this machine.
    fn net(&self, args: &[&str]) -> Result<String, String> {
        output(script("lab").arg("net").arg("--").args(args))
    }

    fn status(&self) -> Result<Value, String> {
        let text = self.net(&["curl", "-sf", "-m", "10", &format!("http://{GUEST}/cgi-bin/status")])?;
        serde_json::from_str(&text).map_err(|e| format!("{e}: {text}"))
    }

    /// How far the guest's clock is ahead of the machine's, and how exact that is: half the quickest of some round trips.
    fn clock_ahead(&self) -> (i128, i128) {
        let sample = |_| {
            let asked = now_ns();
            let realtime = i128::from(self.status().unwrap()["realtime_ns"].as_u64().unwrap());
            let answered = now_ns();
            ((answered - asked) / 2, realtime - (asked + answered) / 2)
        };
        let (exact, ahead) = (0..8).map(sample).min().unwrap();
        (ahead, exact)
    }

    fn wait_for(&self, what: &str, mut done: impl FnMut() -> bool) {
        let deadline = Instant::now() + Duration::from_secs(120);
        while !done() {
            assert!(Instant::now() < deadline, "no {what} within two minutes");
            sleep(Duration::from_millis(300));
        }
    }

    fn boot(&self, guest: &Guest) {
        self.boot_with(guest, "microvm.rate=8M");
    }

    fn boot_with(&self, guest: &Guest, words: &str) {
        let Guest { kernel, initrd, cpus, memory, .. } = guest;
        let cmdline = format!("console=ttyS0 panic=-1 microvm.ip={GUEST}/24 microvm.gw=10.99.0.254 {words}");
        let net = format!("bridge=br0,ip={GUEST}/24");
        let (kernel, initrd) = (kernel.to_str().unwrap(), initrd.to_str().unwrap());
        self.microvm(
            1,
            &[
                "run",
                "-d",
                "--name",
                "lin",
                "--kernel",
                kernel,
                "--initrd",
                initrd,
                "--cpus",
                cpus,
                "--memory",
                memory,
                "--net",
                &net,
                "--cmdline",
                &cmdline,
            ],
        )
        .unwrap();
        self.wait_for("answer from the guest", || self.status().is_ok());
    }

    fn state(&self, host: u8) -> Option<Value> {
        let lines: Value = serde_json::from_str(&self.microvm(host, &["ps", "--json"]).ok()?).ok()?;
        lines.as_array()?.iter().find(|vm| vm["name"] == "lin").cloned()
    }

    /// Memory of the VM's process that is resident on its host, in bytes.
    fn resident(&self, host: u8) -> u64 {
        let inspected: Value =
            serde_json::from_str(&self.microvm(host, &["inspect", "lin", "--json"]).unwrap()).unwrap();
        let file = format!("/proc/{}/status", inspected["pid"]);
        let status = output(script("lab").args(["exec", "-n", &format!("host{host}"), "--", "cat", &file])).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10
    }

    /// Types a line, without single quotes, at the guest's shell.
    fn type_line(&self, host: u8, line: &str) {
        let program = format!(
            "(sleep 2; printf '%s\\n' '{line}'; sleep 3) | timeout 8 {} console lin; true",
            env!("CARGO_BIN_EXE_microvm")
        );
        output(script("lab").args(["exec", "-n", &format!("host{host}"), "--", "bash", "-c", &program])).unwrap();
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        for agent in &mut self.agents {
            let _ = agent.kill();
            let _ = agent.wait();
        }
        if let Err(error) = output(script("lab").arg("down")) {
            eprintln!("{error}");
        }
    }
}

struct Guest {
    kernel: PathBuf,
    initrd: PathBuf,
    cpus: &'static str,
    memory: &'static str,
}

fn guest(series: &str, image: &str, cpus: &'static str, memory: &'static str) -> Guest {
    let dir = PathBuf::from(output(script("kernels").arg(series)).unwrap().trim());
    let initrd = dir.join(format!("guest-{}.cpio", std::process::id()));
    output(script("guest-initrd").arg("--kernel").arg(&dir).args(["--module", "pvpanic-mmio"]).arg(&initrd)).unwrap();
    Guest { kernel: dir.join(image), initrd, cpus, memory }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.initrd);
    }
}

/// One lab at a time: two would wait for the same two cores.
fn lab() -> (MutexGuard<'static, ()>, Lab) {
    static ONE: LazyLock<Mutex<()>> = LazyLock::new(Mutex::default);
    (ONE.lock().unwrap_or_else(PoisonError::into_inner), Lab::up())
}

fn now_ns() -> i128 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos() as i128
}

/// What must hold after every move: memory as written, clocks on and right, work going on, no complaints.
fn check_guest(lab: &Lab, host: u8, before: &Value) -> Value {
    lab.wait_for("progress of the guest after the move", || {
        lab.status().is_ok_and(|now| now["worker"]["ticks"].as_u64() > before["worker"]["ticks"].as_u64())
    });
    let status = lab.status().unwrap();
    let worker = &status["worker"];
    assert_eq!(worker["errors"], 0, "{worker}");
    for clock in ["monotonic", "realtime", "boottime"] {
        assert_eq!(worker["clocks"][clock]["backwards"], 0, "{worker}");
    }
    assert_eq!(status["clocksource"], "kvm-clock");
    assert!(status["monotonic_ns"].as_u64() > before["monotonic_ns"].as_u64());
    // The log begins anew where the guest arrives.
    let log = lab.microvm(host, &["logs", "lin"]).unwrap();
    let complaints: Vec<&str> = log.lines().filter(|l| COMPLAINTS.iter().any(|c| l.contains(c))).collect();
    assert!(complaints.is_empty(), "{complaints:#?}");
    status
}

fn there_and_back(lab: &Lab, times: u32) {
    let mut before = lab.status().unwrap();
    let (ahead, exact) = lab.clock_ahead();
    let mut tcp = Echo::connect(lab);
    for (from, to) in std::iter::repeat_n([(1, 2), (2, 1)], times as usize).flatten() {
        let destination = format!("host{to}");
        let report = lab
            .microvm(from, &["migrate", "lin", "--to", &destination, "--max-downtime", "3s", "--verify", "--json"])
            .unwrap();
        let report: Value = serde_json::from_str(report.lines().last().unwrap()).unwrap();
        assert_eq!((&report["outcome"], &report["owner"]), (&"completed".into(), &"destination".into()), "{report}");
        assert_eq!(report["announce"]["guest"], true, "Linux's virtio-net can announce itself: {report}");
        assert!(lab.state(from).is_none(), "nothing stays at the source");
        before = check_guest(lab, to, &before);
        let (now_ahead, now_exact) = lab.clock_ahead();
        let moved = (now_ahead - ahead).abs();
        assert!(
            moved <= CLOCK_TOLERANCE_NS + exact + now_exact,
            "the guest's clock has moved by {moved} ns (exact to {exact} and {now_exact})"
        );
        tcp.check();
    }
}

/// One TCP connection to the guest's echo service, kept open.
struct Echo {
    child: Child,
    sent: u64,
}

impl Echo {
    fn connect(_lab: &Lab) -> Self {
        const PROGRAM: &str = "
import socket, sys
s = socket.create_connection((sys.argv[1], 7), 30); s.settimeout(60)
for line in sys.stdin.buffer:
    s.sendall(line); got = b''
    while len(got) < len(line):
        part = s.recv(65536)
        if not part: sys.exit('closed')
        got += part
    sys.stdout.buffer.write(b'same\\n' if got == line else b'differs\\n'); sys.stdout.flush()
";
        let mut command = script("lab");
        command.args(["net", "--", "python3", "-c", PROGRAM, GUEST]).stdin(Stdio::piped()).stdout(Stdio::piped());
        Echo { child: command.spawn().unwrap(), sent: 0 }
    }

    fn check(&mut self) {
        use std::io::{BufRead, BufReader, Write};
        let stdin = self.child.stdin.as_mut().unwrap();
        self.sent += 1;
        writeln!(stdin, "{} {}", self.sent, "x".repeat(20_000)).unwrap();
        stdin.flush().unwrap();
        let mut answer = String::new();
        BufReader::with_capacity(1, self.child.stdout.as_mut().unwrap()).read_line(&mut answer).unwrap();
        assert_eq!(answer, "same\n", "the connection of before the first move, message {}", self.sent);
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn a_debian_6_1_bzimage_moves_there_and_back_and_ends_as_it_wishes() {
    let (_one, lab) = lab();
    let guest = guest("6.1-cloud", "vmlinuz", "1", "256M");
    lab.boot(&guest);
    there_and_back(&lab, 2);

    // Reboot: the same VM boots again.
    lab.type_line(1, "reboot -f");
    lab.wait_for("guest that has booted again", || {
        lab.status().is_ok_and(|s| s["uptime_s"].as_f64().is_some_and(|up| up < 60.0) && s["worker"]["errors"] == 0)
            && lab.microvm(1, &["logs", "lin"]).is_ok_and(|log| log.matches("GUEST-READY").count() >= 1)
    });
    assert_eq!(lab.state(1).unwrap()["state"], "running");

    // The power button.
    let said = lab.microvm(1, &["stop", "lin", "--timeout", "60s"]).unwrap();
    assert_eq!(said.trim(), "lin powered off");
    lab.microvm(1, &["rm", "lin"]).unwrap();

    // Panic: named as what it is.
    lab.boot(&guest);
    lab.type_line(1, "echo c > /proc/sysrq-trigger");
    lab.wait_for("end by panic", || lab.state(1).is_some_and(|vm| vm["exit"]["reason"] == "panicked"));
    lab.microvm(1, &["rm", "lin"]).unwrap();
}

#[test]
fn a_debian_6_12_elf_with_two_vcpus_moves_there_and_back_and_powers_off() {
    let (_one, lab) = lab();
    let guest = guest("6.12-cloud", "vmlinux", "2", "512M");
    lab.boot(&guest);
    assert_eq!(lab.status().unwrap()["cpus"], 2);
    there_and_back(&lab, 1);

    // Paused, it moves and stays paused.
    lab.microvm(1, &["pause", "lin"]).unwrap();
    lab.microvm(1, &["migrate", "lin", "--to", "host2"]).unwrap();
    assert_eq!(lab.state(2).unwrap()["state"], "paused");
    assert!(lab.status().is_err(), "a paused guest answers nothing");
    lab.microvm(2, &["resume", "lin"]).unwrap();
    lab.wait_for("answer after resuming", || lab.status().is_ok_and(|s| s["worker"]["errors"] == 0));

    lab.type_line(2, "poweroff -f");
    lab.wait_for("end by poweroff", || lab.state(2).is_some_and(|vm| vm["exit"]["reason"] == "powered-off"));
}

#[test]
fn memory_that_the_guest_has_freed_goes_back_to_the_host_and_is_not_sent() {
    /// More than half of what the guest fills and frees.
    const MOST: u64 = 64 << 20;
    let (_one, lab) = lab();
    let guest = guest("6.1-cloud", "vmlinuz", "1", "512M");
    lab.boot_with(&guest, "microvm.rate=0");
    // About 113 MiB in a file system in memory. The number is put together only when all is done.
    let fill = "i=0; while [ $i -lt 60 ]; do cat /bin/busybox; i=$((i+1)); done >/run/file";
    lab.type_line(1, &format!("{fill}; echo filled-$((40+2))"));
    lab.wait_for("memory of the guest's that is full", || {
        lab.microvm(1, &["logs", "lin"]).is_ok_and(|log| log.contains("filled-42"))
    });
    let (before, full) = (lab.status().unwrap(), lab.resident(1));
    lab.type_line(1, "rm /run/file");
    let mut freed = full;
    lab.wait_for("less resident memory", || {
        freed = lab.resident(1);
        freed + MOST < full
    });
    // It is not sent either: without reports, what the guest once touched is.
    let migrate = |from, to: &str| {
        let args = ["migrate", "lin", "--to", to, "--max-downtime", "3s", "--verify", "--compress", "none", "--json"];
        let report = lab.microvm(from, &args).unwrap();
        let report: Value = serde_json::from_str(report.lines().last().unwrap()).unwrap();
        assert_eq!((&report["outcome"], &report["owner"]), (&"completed".into(), &"destination".into()), "{report}");
        report["bytes_sent"].as_u64().unwrap()
    };
    let sent = migrate(1, "host2");
    println!("resident: {full}, then {freed} bytes; sent: {sent} bytes");
    assert!(sent < freed && sent + MOST < full, "{sent} bytes sent of {full}, then {freed}");
    let before = check_guest(&lab, 2, &before);

    // While it is sent, too: both sides have the same memory at the switchover.
    lab.type_line(2, &format!("(while :; do {fill}; rm /run/file; sleep 3; done) &"));
    migrate(2, "host1");
    check_guest(&lab, 1, &before);
}

#[test]
fn small_and_large_memories_boot() {
    let (_one, lab) = lab();
    let guest_128 = guest("6.1-cloud", "vmlinux", "1", "128M");
    lab.boot(&guest_128);
    let said = lab.microvm(1, &["stop", "lin", "--timeout", "60s"]).unwrap();
    assert_eq!(said.trim(), "lin powered off");
    // More than the nested host has is refused with numbers, before anything is made.
    let refused = lab.microvm(2, &["run", "-d", "--name", "big", "--memory", "8G"]).unwrap_err();
    assert!(refused.contains("8192 MiB of memory are asked for"), "{refused}");
    assert_eq!(lab.microvm(2, &["ps", "--json"]).unwrap().trim(), "[]");
}
