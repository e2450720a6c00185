//! Steps at which a test holds a process, to kill it, stop it or cut its link at that very point. Only with the feature
//! `fault-points`, which no release has; without it everything here is nothing.
//!
//! A process connects to the Unix socket `$MICROVM_FAULT_POINTS` when it starts. At each step it writes a line, `ROLE PID STEP
//! ID VM`, and waits for one: `go`; `fail`, where a step can fail; or `panic`.

#[cfg(feature = "fault-points")]
pub use with::*;
#[cfg(not(feature = "fault-points"))]
pub use without::*;

#[cfg(not(feature = "fault-points"))]
mod without {
    use std::io;

    use migrator::MigrationId;

    /// What `microvm --version` says.
    pub const VERSION: &str = env!("CARGO_PKG_VERSION");

    /// Connects to the test.
    pub fn connect() -> io::Result<()> {
        Ok(())
    }

    /// What this process does from now on.
    pub fn about(_id: MigrationId, _vm: &str) {}

    /// A step of this process's migration.
    #[inline(always)]
    pub fn step(_role: &str, _step: &str) -> io::Result<()> {
        Ok(())
    }

    /// A step of one of many migrations.
    #[inline(always)]
    pub fn step_of(_role: &str, _step: &str, _id: MigrationId, _vm: &str) -> io::Result<()> {
        Ok(())
    }

    /// A round of pre-copy begins.
    #[inline(always)]
    pub fn round() {}

    /// In the middle of it: the first time, a step.
    #[inline(always)]
    pub fn in_round() -> io::Result<()> {
        Ok(())
    }
}

#[cfg(feature = "fault-points")]
mod with {
    use std::fs::File;
    use std::io::{self, BufRead, BufReader, Write};
    use std::os::fd::OwnedFd;
    use std::os::unix::net::UnixStream;
    use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
    use std::sync::{Mutex, PoisonError};

    use migrator::MigrationId;

    pub const VERSION: &str = concat!(env!("CARGO_PKG_VERSION"), " with fault points: for tests only");

    static TEST: Mutex<Option<BufReader<File>>> = Mutex::new(None);
    static ABOUT: Mutex<(MigrationId, String)> = Mutex::new((MigrationId([0; 16]), String::new()));
    static ROUND: AtomicU32 = AtomicU32::new(0);
    static ROUND_BEGINS: AtomicBool = AtomicBool::new(false);

    pub fn connect() -> io::Result<()> {
        if let Some(path) = std::env::var_os("MICROVM_FAULT_POINTS") {
            // As a file: every thread in a sandbox may read and write, but not every one may use sockets.
            let test = File::from(OwnedFd::from(UnixStream::connect(path)?));
            *TEST.lock().unwrap_or_else(PoisonError::into_inner) = Some(BufReader::new(test));
        }
        Ok(())
    }

    pub fn about(id: MigrationId, vm: &str) {
        *ABOUT.lock().unwrap_or_else(PoisonError::into_inner) = (id, vm.into());
        ROUND.store(0, Ordering::SeqCst);
    }

    pub fn step(role: &str, step: &str) -> io::Result<()> {
        let (id, vm) = ABOUT.lock().unwrap_or_else(PoisonError::into_inner).clone();
        step_of(role, step, id, &vm)
    }

    pub fn step_of(role: &str, step: &str, id: MigrationId, vm: &str) -> io::Result<()> {
        let mut answer = String::new();
        if let Some(test) = TEST.lock().unwrap_or_else(PoisonError::into_inner).as_mut() {
            let vm = if vm.is_empty() { "-" } else { vm };
            // A test that has ended holds nobody.
            let asked = writeln!(test.get_mut(), "{role} {} {step} {id} {vm}", std::process::id());
            let _ = asked.and_then(|()| test.read_line(&mut answer));
        }
        match answer.trim_end() {
            "fail" => Err(io::Error::other(format!("the test lets {step} fail"))),
            "panic" => panic!("the test lets {step} panic"),
            _ => Ok(()),
        }
    }

    pub fn round() {
        ROUND.fetch_add(1, Ordering::SeqCst);
        ROUND_BEGINS.store(true, Ordering::SeqCst);
    }

    pub fn in_round() -> io::Result<()> {
        match ROUND_BEGINS.swap(false, Ordering::SeqCst) {
            true => step("source", &format!("round-{}", ROUND.load(Ordering::SeqCst))),
            false => Ok(()),
        }
    }
}
