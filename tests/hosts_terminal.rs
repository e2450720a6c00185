//! The foreground `run` is a terminal: raw while attached, as before afterwards, whatever ends it.
#![allow(clippy::unwrap_used)] // a test fails by it

use std::process::Command;

/// Runs `microvm run` on a pseudo-terminal, ends it as told, and prints what became of the terminal and the command.
const PROGRAM: &str = r#"
import json, os, pty, signal, subprocess, sys, termios, time
microvm, how = sys.argv[1:]
master, slave = pty.openpty()
before = termios.tcgetattr(slave)
run = subprocess.Popen([microvm, "run", "--name", "t"], stdin=slave, stdout=slave, stderr=slave, start_new_session=True)
os.set_blocking(master, False)
seen = b""
def read_until(done, limit=60):
    global seen
    end = time.monotonic() + limit
    while not done():
        if time.monotonic() > end: sys.exit(f"gave up; the terminal shows {seen!r}")
        try: seen += os.read(master, 65536)
        except BlockingIOError: time.sleep(0.02)
read_until(lambda: b'"sweeps"' in seen)
raw = termios.tcgetattr(slave)
assert not raw[3] & (termios.ICANON | termios.ECHO | termios.ISIG), "not raw"
if how == "key": os.write(master, b"\x1d")
elif how == "term": run.send_signal(signal.SIGTERM)
elif how == "stop": subprocess.run([microvm, "stop", "t"], check=True, stdout=subprocess.DEVNULL)
elif how == "crash":
    seen_by_ps = subprocess.run([microvm, "inspect", "t", "--json"], check=True, capture_output=True).stdout
    os.kill(json.loads(seen_by_ps)["pid"], signal.SIGKILL)
read_until(lambda: run.poll() is not None)
try:
    while True: seen += os.read(master, 65536)
except (BlockingIOError, OSError): pass
assert termios.tcgetattr(slave) == before, "the terminal is not as it was"
print(run.returncode)
print(seen.decode(errors="replace").strip().splitlines()[-1])
"#;

/// The exit code, the last line on the terminal, and the VMs that are left.
fn end_by(how: &str) -> Option<(i32, String, Vec<String>)> {
    if let Err(error) = vmm::host::Host::open() {
        println!("skipped: {error}");
        return None;
    }
    let runtime = tempfile::tempdir().unwrap();
    let microvm = |args: &[&str]| {
        Command::new(env!("CARGO_BIN_EXE_microvm"))
            .args(args)
            .env("MICROVM_RUNTIME_DIR", runtime.path())
            .output()
            .unwrap()
    };
    let mut python = Command::new("python3");
    python.args(["-c", PROGRAM, env!("CARGO_BIN_EXE_microvm"), how]).env("MICROVM_RUNTIME_DIR", runtime.path());
    let out = python.output().unwrap();
    let left: serde_json::Value = serde_json::from_slice(&microvm(&["ps", "--json"]).stdout).unwrap();
    let left = left.as_array().unwrap().iter().map(|vm| format!("{} {}", vm["name"], vm["state"])).collect();
    microvm(&["rm", "--force", "t"]);
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let text = String::from_utf8(out.stdout).unwrap();
    let (code, last) = text.trim().split_once('\n').unwrap();
    Some((code.parse().unwrap(), last.to_string(), left))
}

#[test]
fn the_key_leaves_the_guest_running() {
    let Some((code, last, left)) = end_by("key") else { return };
    assert_eq!(code, 0);
    assert!(last.contains("microvm console t"), "{last}");
    assert_eq!(left, ["\"t\" \"running\""]);
}

#[test]
fn a_signal_stops_the_guest() {
    let Some((code, last, left)) = end_by("term") else { return };
    assert_eq!(code, 130);
    assert!(last.contains("t powered off"), "{last}");
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn the_guests_end_ends_it() {
    let Some((code, last, left)) = end_by("stop") else { return };
    assert_eq!(code, 0);
    assert!(last.contains("t powered off"), "{last}");
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn a_vm_process_that_is_killed_leaves_the_terminal_as_it_was() {
    let Some((code, last, left)) = end_by("crash") else { return };
    assert_eq!(code, 1);
    assert!(last.contains("the process of t died"), "{last}");
    assert_eq!(left, ["\"t\" \"dead\""]);
}
