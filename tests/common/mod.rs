//! What the tests with real processes share: two hosts on one network, made of network namespaces, and everything that is asked of
//! them.
//!
//! Names carry the number of the test's process, so that runs side by side do not meet; addresses are the same everywhere, because
//! each test has a network of its own. What a run that was killed left behind is removed by the next one.
#![allow(dead_code)] // Each test file uses its own part of this.
#![allow(clippy::unwrap_used)] // Clippy's exception for tests does not reach their helpers.

pub mod guest;
pub mod net;
pub mod trust;

use std::io::{Read, Write};
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// Far longer than anything takes, even on a busy machine: a limit against hangs, never a measurement.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Says past the test runner's capture why this test does not run.
pub fn skip(reason: &str) {
    std::io::stderr().write_all(format!("skipped: {reason}\n").as_bytes()).unwrap();
}

/// Why VMs cannot run here, if they cannot.
pub fn no_kvm() -> Option<String> {
    let open = std::fs::File::options().read(true).write(true).open("/dev/kvm");
    open.err().map(|error| format!("/dev/kvm: {error}"))
}

/// Why there can be no hosts here, if so.
pub fn no_hosts() -> Option<String> {
    if let Some(reason) = no_kvm() {
        return Some(reason);
    }
    if !rustix::process::geteuid().is_root() {
        return Some("network namespaces need root".into());
    }
    (!Path::new("/dev/net/tun").exists()).then(|| "there is no /dev/net/tun".into())
}

/// Asks until there is an answer. Panics with `what` when there is none for a very long time.
pub fn wait_for<T>(what: &str, mut ask: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + PATIENCE;
    loop {
        if let Some(answer) = ask() {
            return answer;
        }
        assert!(Instant::now() < end, "never came: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Asks until it is so.
pub fn wait_until(what: &str, mut so: impl FnMut() -> bool) {
    wait_for(what, || so().then_some(()));
}

/// What a command said, and how it ended.
#[derive(Debug)]
pub struct Said {
    pub status: ExitStatus,
    pub stdout: String,
    pub stderr: String,
}

impl Said {
    /// Its exit code; a signal is a failure of the test.
    pub fn code(&self) -> i32 {
        self.status.code().unwrap_or_else(|| panic!("ended by a signal: {self:?}"))
    }

    /// Its output, if it succeeded.
    #[track_caller]
    pub fn ok(self) -> String {
        assert!(self.status.success(), "{}\n{}\n{}", self.status, self.stdout, self.stderr);
        self.stdout
    }

    /// The JSON that it printed, whatever its exit code.
    #[track_caller]
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    /// Checks that it failed with `code` and said each of `words`, without panicking and without repeating itself.
    #[track_caller]
    pub fn refused(&self, code: i32, words: &[&str]) {
        assert_eq!(self.code(), code, "{self:?}");
        let text = self.stderr.to_lowercase();
        for word in words {
            assert!(text.contains(&word.to_lowercase()), "nothing of {word:?} in {self:?}");
        }
        assert!(!text.contains("panicked at") && !text.contains("rust_backtrace"), "{self:?}");
    }
}

/// A command under way. It is killed when it is dropped, or when it takes far too long.
pub struct Running {
    child: std::process::Child,
    what: String,
    stdout: Option<std::thread::JoinHandle<Vec<u8>>>,
    stderr: Option<std::thread::JoinHandle<Vec<u8>>>,
}

impl Running {
    /// Starts it, its output kept.
    pub fn start(mut command: Command) -> Self {
        let what = format!("{command:?}");
        let piped = command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = piped.spawn().unwrap_or_else(|error| panic!("{what}: {error}"));
        fn reader(mut from: impl Read + Send + 'static) -> std::thread::JoinHandle<Vec<u8>> {
            std::thread::spawn(move || {
                let mut all = Vec::new();
                from.read_to_end(&mut all).unwrap();
                all
            })
        }
        let (stdout, stderr) = (child.stdout.take().map(reader), child.stderr.take().map(reader));
        Running { child, what, stdout, stderr }
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Whether it has ended.
    pub fn has_ended(&mut self) -> bool {
        self.child.try_wait().unwrap().is_some()
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, signal).unwrap_or_else(|error| panic!("{}: {error}", self.what));
    }

    /// Waits for its end.
    #[track_caller]
    pub fn said(mut self) -> Said {
        let end = Instant::now() + PATIENCE * 2;
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            assert!(Instant::now() < end, "does not end: {}", self.what);
            std::thread::sleep(Duration::from_millis(2));
        };
        let text = |reader: Option<std::thread::JoinHandle<Vec<u8>>>| {
            String::from_utf8_lossy(&reader.unwrap().join().unwrap()).into_owned()
        };
        Said { status, stdout: text(self.stdout.take()), stderr: text(self.stderr.take()) }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Runs a command to its end.
#[track_caller]
pub fn run(mut command: Command) -> Said {
    command.stdin(Stdio::null());
    Running::start(command).said()
}

/// Runs `program` with the words of `arguments`.
#[track_caller]
pub fn sh(program: &str, arguments: &str) -> String {
    let mut command = Command::new(program);
    command.args(arguments.split_whitespace());
    run(command).ok()
}
