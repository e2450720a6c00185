//! Starting a VM's process.

use std::io::{BufRead, BufReader, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result, bail};
use rustix::io::FdFlags;

use super::process::{Start, Started};

/// One at a time: a descriptor that is inheritable for one child must not get into another.
static SPAWNING: Mutex<()> = Mutex::new(());

/// Starts the process of a VM and waits until it says that it is ready. It lives on by itself, in a session of its own, its
/// messages in the VM's log. `inherited` goes to the process; `start` makes what the process is told, from its number. If the
/// process ends before this one does, `ended` is called.
pub fn vm_process(
    start: impl FnOnce(Option<RawFd>) -> Start,
    inherited: Option<UnixStream>,
    ended: impl FnOnce() + Send + 'static,
) -> Result<()> {
    // The very program that runs now, also when its file has been replaced by another version since.
    let mut command = Command::new("/proc/self/exe");
    command.arg0("microvm").arg("vm-process").stdin(Stdio::piped()).stdout(Stdio::piped());
    new_session(&mut command);
    let start = start(inherited.as_ref().map(AsRawFd::as_raw_fd));
    let mut child = {
        let _one = SPAWNING.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(inherited) = &inherited {
            rustix::io::fcntl_setfd(inherited, FdFlags::empty()).context("a socket cannot be handed on")?;
        }
        let child = command.spawn().context("the VM's process cannot be started")?;
        drop(inherited);
        child
    };
    let mut stdin = child.stdin.take().context("the VM's process has no input")?;
    let sent = serde_json::to_vec(&start).map_err(Into::into).and_then(|text| stdin.write_all(&text));
    drop(stdin);
    let stdout = child.stdout.take().context("the VM's process has no output")?;
    let mut line = String::new();
    BufReader::new(stdout).read_line(&mut line).context("the VM's process does not answer")?;
    match serde_json::from_str(&line) {
        Ok(Started::Ready) => {
            sent.context("the VM's process did not listen")?;
            // Whoever stays (the agent) must not collect the dead; a thread that waits is cheaper than a signal handler.
            let reaper = move || {
                let _ = child.wait();
                ended();
            };
            std::thread::Builder::new().name("reaper".into()).stack_size(64 << 10).spawn(reaper)?;
            Ok(())
        }
        Ok(Started::Failed(why)) => {
            let _ = child.wait();
            bail!("{why}")
        }
        Err(_) => {
            let status = child.wait()?;
            bail!("the VM's process ended before it was ready ({status})")
        }
    }
}

#[allow(unsafe_code)]
fn new_session(command: &mut Command) {
    // SAFETY: setsid(2) is async-signal-safe, and the closure does nothing else.
    unsafe { command.pre_exec(|| rustix::process::setsid().map(|_| ()).map_err(Into::into)) };
}
