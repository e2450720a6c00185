//! The keeper of a VM: the small process that stays outside of the sandbox and waits for the one inside.
//!
//! The VM's process cannot touch its own folder, and nobody else would learn how it died. So it is forked from its keeper, which
//! writes down how the VM ended, takes TAPs out of bridges and tidies up. Between them is a pipe with a few lines, in one
//! direction. The VM needs no keeper: without one it goes on, and what it leaves is for `rm`.
#![allow(unsafe_code)] // fork(2)

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result};
use migrator::MigrationId;
use rustix::process::{Pid, Signal, WaitOptions, WaitStatus};
use serde::{Deserialize, Serialize};
use vmm::devices::virtio::Unplug;
use vmm::sandbox::violation::Shared;

use super::process::Started;
use super::{Exit, lock};
use crate::runtime::{Runtime, VmDir, VmLock};

/// More than a VM ever says to its keeper.
const MAX_NOTES_BYTES: u64 = 256 << 10;

/// What the VM's process tells its keeper.
#[derive(Debug, Serialize, Deserialize)]
enum Note {
    /// For whoever started it.
    Started(Started),
    /// The VM is this host's: its folder stays when it dies.
    Owned,
    /// The source of the migration that brought it has let go: nobody will ask about that attempt any more.
    Released,
    /// How it ended.
    Ended(Exit),
    /// After that: nobody need wait for this process any more, which has nothing left to do but to free its memory.
    Done,
}

/// The VM's end of the pipe.
pub struct ToKeeper {
    pipe: Mutex<File>,
    answered: AtomicBool,
}

/// The two processes after the fork.
pub enum Side {
    /// This is the VM's.
    Vm(ToKeeper),
    /// This is the keeper's.
    Keeper(Keeper),
}

/// The keeper's view of it.
pub struct Keeper {
    vm: Pid,
    pipe: File,
    violation: Shared,
}

/// Makes two processes of this one, which has one thread.
pub fn fork() -> io::Result<Side> {
    let violation = Shared::new()?;
    let (notes, to_keeper) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
    // SAFETY: there is no other thread that could hold a lock which the child needs.
    let pid = unsafe { libc::fork() };
    match pid {
        -1 => Err(io::Error::last_os_error()),
        0 => {
            violation.note_here();
            Ok(Side::Vm(ToKeeper { pipe: Mutex::new(to_keeper.into()), answered: AtomicBool::new(false) }))
        }
        _ => {
            let vm = Pid::from_raw(pid).expect("fork returns the number of a process");
            Ok(Side::Keeper(Keeper { vm, pipe: notes.into(), violation }))
        }
    }
}

impl ToKeeper {
    fn note(&self, note: &Note) {
        let Ok(mut line) = serde_json::to_vec(note) else { return };
        line.push(b'\n');
        // Without a keeper it goes on.
        if let Err(error) = lock(&self.pipe).write_all(&line) {
            tracing::debug!(%error, "there is no keeper");
        }
    }

    /// Answers whoever started the VM, the first time; afterwards nobody listens. Whether it was the first.
    pub fn answer(&self, started: Started) -> bool {
        let first = !self.answered.swap(true, Ordering::SeqCst);
        if first {
            self.note(&Note::Started(started));
        }
        first
    }

    /// The VM is this host's from now on.
    pub fn owned(&self) {
        self.note(&Note::Owned);
    }

    /// The journal of the migration that brought the VM is not needed any more.
    pub fn released(&self) {
        self.note(&Note::Released);
    }

    /// It has ended.
    pub fn ended(&self, exit: &Exit) {
        self.note(&Note::Ended(exit.clone()));
    }

    /// After [`Self::ended`]: only memory is left to be freed.
    pub fn done(&self) {
        self.note(&Note::Done);
    }
}

impl Keeper {
    /// Waits for the end of the VM, and tidies up: bridges first, then the folder; `lock` goes last, so that whoever waits for it
    /// finds everything done. That is when the process is gone, or when it says that it is done: to free its memory may take long.
    /// `arrival` is the migration that brings the VM. Returns the exit code of the VM's process.
    pub fn keep(
        self,
        dir: &VmDir,
        runtime: &Runtime,
        lock: VmLock,
        unplug: Vec<Unplug>,
        arrival: Option<MigrationId>,
    ) -> Result<u8> {
        // Who ends a VM ends its process. A signal for all of them is not for this one.
        for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP] {
            // SAFETY: ignoring a signal runs no code of ours.
            unsafe { libc::signal(signal, libc::SIG_IGN) };
        }
        let _ = rustix::thread::set_name(c"microvm-keeper");
        vmm::sandbox::keep_only_network_administration().context("the keeper cannot give up its capabilities")?;
        let Keeper { vm, pipe, violation } = self;
        let (mut answered, mut owned, mut exit) = (false, false, None);
        let (mut held, mut put_away) = (Some((unplug, lock)), Ok(()));
        for line in BufReader::new(pipe.take(MAX_NOTES_BYTES)).lines().map_while(io::Result::ok) {
            match serde_json::from_str(&line) {
                Ok(Note::Started(started)) if !answered => answered = tell_starter(&started),
                Ok(Note::Owned) => {
                    owned = true;
                    // The journal says as well that it runs here.
                    let _ = fs::remove_file(dir.arriving());
                }
                Ok(Note::Released) => {
                    if let Some(journal) = arrival.and_then(|id| runtime.journals.incoming(id).ok()) {
                        let _ = fs::remove_file(journal);
                    }
                }
                Ok(Note::Ended(end)) => exit = Some(end),
                Ok(Note::Done) if owned => {
                    if let Some(exit) = &exit
                        && let Some((unplug, lock)) = held.take()
                    {
                        drop(unplug);
                        put_away = put_folder_away(dir, exit);
                        lock.release();
                    }
                }
                Ok(Note::Started(_) | Note::Done) | Err(_) => {}
            }
        }
        let status = wait(vm)?;
        let code = status.exit_status().map_or(1, |code| code as u8);
        let Some((unplug, _lock)) = held else { return put_away.map(|()| code) };
        drop(unplug);
        let signal = status.terminating_signal();
        if exit.is_none() && signal == Some(Signal::SYS.as_raw()) {
            let (syscall, thread) = violation.read().map(|v| (v.syscall, v.thread)).unzip();
            exit = Some(Exit::Sandbox { syscall, thread });
        }
        if !answered {
            let why = match (&exit, signal) {
                (Some(exit), _) => exit.sentence(dir.name()),
                (None, Some(signal)) => format!("the VM's process ended before it was ready (signal {signal})"),
                (None, None) => "the VM's process ended before it was ready".into(),
            };
            tell_starter(&Started::Failed(why));
        }
        match exit {
            Some(exit) if owned => put_folder_away(dir, &exit)?,
            // A bug after the VM was this host's, by its journal: that it died here is what there is to see.
            _ if !owned && dir.has_arrived(runtime)? => {}
            // It ended by itself before it had a VM, or nobody has heard of it.
            _ if !owned && (status.exited() || !answered) => dir.remove()?,
            // It was killed: what it leaves tells of it.
            _ => {}
        }
        Ok(code)
    }
}

/// Leaves of the folder what is of use after such an end.
fn put_folder_away(dir: &VmDir, exit: &Exit) -> Result<()> {
    if matches!(exit, Exit::Moved(_)) {
        return dir.remove();
    }
    fs::write(dir.exit(), serde_json::to_vec(exit)?).context("the VM's folder cannot be written")?;
    dir.remove_sockets();
    Ok(())
}

fn wait(vm: Pid) -> Result<WaitStatus> {
    loop {
        match rustix::process::waitpid(Some(vm), WaitOptions::empty()) {
            Ok(Some((_, status))) => return Ok(status),
            Ok(None) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error).context("the VM's process cannot be waited for"),
        }
    }
}

/// Answers on standard output, and closes it: whoever waits for the end of our output waits no longer.
pub fn tell_starter(started: &Started) -> bool {
    let mut out = io::stdout();
    let _ = serde_json::to_writer(&mut out, started).map_err(io::Error::from).and_then(|()| writeln!(out));
    let _ = out.flush();
    close_stdout();
    true
}

/// Puts nothing where standard output was.
pub fn close_stdout() {
    if let Ok(null) = File::options().write(true).open("/dev/null") {
        let _ = rustix::stdio::dup2_stdout(&null);
    }
}
