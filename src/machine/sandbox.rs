//! What the process of a VM goes through before its guest's first instruction, in which order: see docs/sandbox.md.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, Sender};
use std::thread;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use vmm::sandbox::{self, Sandbox, Settings, ThreadKind};

use crate::cli::CageArgs;
use crate::runtime::VmDir;

/// The user of a VM is this and the number of its process: nobody else has that number as long as the process lives, on the whole
/// machine, and there is no list to keep. Distributions, containers and systemd give away nothing from here to 2^31
/// (systemd.io, "Users, Groups, UIDs and GIDs on systemd Systems").
const FIRST_USER: u32 = 0x7000_0000;

/// What was asked for.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Cage {
    /// No sandbox.
    pub off: bool,
    /// A cgroup's directory.
    pub cgroup: Option<PathBuf>,
}

impl CageArgs {
    /// Checked as far as that can be done before.
    pub fn settings(&self) -> Result<Cage> {
        let cgroup = self.cgroup.as_ref().map(|dir| Path::new("/sys/fs/cgroup").join(dir));
        if let Some(dir) = cgroup.as_ref().filter(|dir| !processes(dir).exists()) {
            bail!("{} is no cgroup: make it with mkdir, or give another with --cgroup", dir.display());
        }
        Ok(Cage { off: self.no_sandbox, cgroup })
    }
}

/// The file to which one writes who joins a cgroup.
fn processes(cgroup: &Path) -> PathBuf {
    cgroup.join("cgroup.procs")
}

impl Cage {
    /// Shuts it behind this process, which has one thread and everything open. What is missing is said in the log.
    pub fn enter(&self, dir: &VmDir) -> Result<Sandbox> {
        if let Some(cgroup) = &self.cgroup {
            fs::write(processes(cgroup), "0")
                .with_context(|| format!("cannot join the cgroup {}", cgroup.display()))?;
        }
        if self.off {
            tracing::warn!("there is no sandbox: a guest that breaks out has the rights of whoever started it");
            return Ok(Sandbox::off());
        }
        // The action of a signal cannot be changed in there.
        vmm::vcpu::prepare_signal().context("a signal cannot be set up")?;
        let root = dir.empty_root()?;
        let sandbox = sandbox::enter(&Settings { user: FIRST_USER + std::process::id(), root: &root })?;
        for missing in &sandbox.missing {
            tracing::warn!("the sandbox lacks something: {missing}");
        }
        Ok(sandbox)
    }
}

/// The thread that starts those of migrations: only they may connect to other hosts, and a thread can do no more than the one
/// that starts it.
pub struct Migrations(Sender<Job>);

/// What the thread does, and where to say that it does it.
type Job = (Box<dyn FnOnce() + Send>, Sender<io::Result<()>>);

impl Migrations {
    /// Before the calling thread confines itself.
    pub fn prepare() -> io::Result<Self> {
        let (sender, jobs) = mpsc::channel::<Job>();
        let (confined, is_confined) = mpsc::channel();
        thread::Builder::new().name("migrations".into()).spawn(move || {
            sandbox::confine(ThreadKind::Migration);
            let _ = confined.send(());
            for (job, started) in jobs {
                let _ = started.send(thread::Builder::new().name("migration".into()).spawn(job).map(|_| ()));
            }
        })?;
        is_confined.recv().map_err(io::Error::other)?;
        Ok(Migrations(sender))
    }

    /// Does `job` on a thread of its own.
    pub fn start(&self, job: impl FnOnce() + Send + 'static) -> io::Result<()> {
        let (started, has_started) = mpsc::channel();
        self.0.send((Box::new(job), started)).map_err(|_| io::ErrorKind::BrokenPipe)?;
        has_started.recv().map_err(io::Error::other)?
    }
}
