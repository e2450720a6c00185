//! SIGTERM to a VM's process: a host that shuts down, and wants the guest to do so first.
#![allow(unsafe_code)] // signalfd(2) and sigprocmask(2) have no safe wrapper

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{FromRawFd, OwnedFd};
use std::sync::Arc;
use std::thread;

use super::{Event, Machine};

/// Where it is read that the signal has come: a handler could not be installed once the process is in its sandbox.
pub struct Termination(File);

impl Termination {
    /// Takes the signal away from every thread that the calling one will start. That must be the only one.
    pub fn prepare() -> io::Result<Self> {
        // SAFETY: an empty set is a valid one to start from, and sigemptyset makes it one.
        let mut signals = unsafe { std::mem::zeroed::<libc::sigset_t>() };
        // SAFETY: `signals` lives across the calls, which write to it and read it and nothing else; no old mask is asked for.
        let fd = unsafe {
            libc::sigemptyset(&raw mut signals);
            libc::sigaddset(&raw mut signals, libc::SIGTERM);
            match libc::pthread_sigmask(libc::SIG_BLOCK, &raw const signals, std::ptr::null_mut()) {
                0 => libc::signalfd(-1, &raw const signals, libc::SFD_CLOEXEC),
                error => return Err(io::Error::from_raw_os_error(error)),
            }
        };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: signalfd has just made this descriptor, for us alone.
        Ok(Termination(File::from(unsafe { OwnedFd::from_raw_fd(fd) })))
    }

    /// The first one gives the guest time to switch itself off; the second one does not.
    pub fn serve(mut self, machine: &Arc<Machine>) -> io::Result<()> {
        let machine = machine.clone();
        thread::Builder::new().name("terminate".into()).spawn(move || {
            let mut signal = [0; size_of::<libc::signalfd_siginfo>()];
            if self.0.read_exact(&mut signal).is_err() {
                return;
            }
            tracing::info!("asked to end by SIGTERM");
            let gently = machine.clone();
            let spawned = thread::Builder::new().name("stop".into()).spawn(move || gently.terminate());
            if spawned.is_ok() {
                let _ = self.0.read_exact(&mut signal);
            }
            machine.send(Event::Kill);
        })?;
        Ok(())
    }
}
