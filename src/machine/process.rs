//! The life of a VM process: from its spec to the guest's end.
//!
//! Whoever starts it (`microvm run`, the agent) gives it the spec on standard input and gets one line back on standard output:
//! `ready`, or why not. From then on the process is on its own; it is reached through its control socket.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver};
use std::time::Duration;

use anyhow::{Context, Result};
use migrator::driver::request::Offer;
use migrator::{Incoming, MigrationHandle, Outcome, Owner, ReceiveOptions, Received};
use serde::{Deserialize, Serialize};
use vmm::devices::power::GuestEvent;
use vmm::host::Host;

use super::console::Console;
use super::endpoint::Destination;
use super::spec::MachineSpec;
use super::{Event, Exit, Machine, connections, control, lock};
use crate::runtime::{self, Runtime, VmLock};

/// What a VM process is started with.
#[derive(Debug, Serialize, Deserialize)]
pub struct Start {
    /// The VM.
    pub spec: MachineSpec,
    /// The migration that brings it; `None`: it boots here.
    pub arrival: Option<Arrival>,
}

/// A migration that brings a VM here.
#[derive(Debug, Serialize, Deserialize)]
pub struct Arrival {
    /// As it was offered.
    pub offer: Offer,
    /// Who offers it.
    pub from: String,
    /// The descriptor through which the agent hands over connections.
    pub connections: i32,
}

/// What it answers.
#[derive(Debug, Serialize, Deserialize)]
pub enum Started {
    /// It runs, or waits for the migration's connections.
    Ready,
    /// It does not, and why.
    Failed(String),
}

/// After the guest's end, clients that wait for the answer get this long.
const FAREWELL: Duration = Duration::from_millis(100);

/// The whole life. The result is the process's exit code.
pub fn main() -> Result<u8> {
    // It was started as /proc/self/exe, which is no name to find it by.
    let _ = rustix::thread::set_name(c"microvm");
    let mut text = String::new();
    io::stdin().read_to_string(&mut text).context("the VM's description cannot be read")?;
    let start: Start = serde_json::from_str(&text).context("the VM's description is damaged")?;
    match live(start) {
        Ok(exit) => Ok(u8::from(!exit.is_clean())),
        Err(error) => {
            let why = format!("{error:#}");
            // The starter tells the user; once it has heard `ready`, only the log is left.
            if !answer(&Started::Failed(why.clone())) {
                tracing::error!("{why}");
            }
            Ok(1)
        }
    }
}

/// Tells the starter, the first time; afterwards nobody listens.
fn answer(started: &Started) -> bool {
    static ANSWERED: AtomicBool = AtomicBool::new(false);
    if ANSWERED.swap(true, Ordering::SeqCst) {
        return false;
    }
    let mut out = io::stdout();
    let _ = serde_json::to_writer(&mut out, started).map_err(io::Error::from).and_then(|()| writeln!(out));
    let _ = out.flush();
    // Whoever waits for the end of our output waits no longer.
    if let Ok(null) = File::options().write(true).open("/dev/null") {
        let _ = rustix::stdio::dup2_stdout(&null);
    }
    true
}

fn live(start: Start) -> Result<Exit> {
    let runtime = Runtime::from_env()?;
    let dir = runtime.vm(&start.spec.name)?;
    let folder = Folder { _lock: dir.claim()?, dir, keep: false };
    // From here on messages go to the VM's log: the terminal that they would go to is somebody else's soon.
    let log = File::options()
        .create(true)
        .append(true)
        .open(folder.dir.process_log())
        .context("the VM's log cannot be made")?;
    rustix::stdio::dup2_stderr(&log).context("messages cannot be sent to the VM's log")?;
    let (events, inbox) = mpsc::channel();
    let console = Console::start(folder.dir.console_log()).context("the console's log cannot be written")?;
    let machine = Machine::new(start.spec, folder.dir.clone(), runtime, console, events);
    let result = run(&machine, start.arrival, &inbox, folder);
    machine.console.close();
    result
}

/// The VM's folder, removed at the end unless there is something in it to see.
struct Folder {
    dir: runtime::VmDir,
    _lock: VmLock,
    keep: bool,
}

impl Drop for Folder {
    fn drop(&mut self) {
        if self.keep {
            for socket in [self.dir.control_socket(), self.dir.console_socket()] {
                let _ = fs::remove_file(socket);
            }
        } else if let Err(error) = self.dir.remove() {
            tracing::warn!("{error:#}");
        }
    }
}

fn run(machine: &Arc<Machine>, arrival: Option<Arrival>, inbox: &Receiver<Event>, mut folder: Folder) -> Result<Exit> {
    let host = Arc::new(Host::open()?);
    let config = serde_json::to_vec_pretty(&machine.spec)?;
    fs::write(machine.dir.config(), config).context("the VM's folder cannot be written")?;
    let control = UnixListener::bind(machine.dir.control_socket()).context("the control socket cannot be made")?;
    let console = UnixListener::bind(machine.dir.console_socket()).context("the console's socket cannot be made")?;
    let typed = Arc::downgrade(machine);
    let input = move |bytes: &[u8]| {
        if let Some(serial) = typed.upgrade().and_then(|machine| machine.with_vm(|vm| vm.serial()).ok()) {
            lock(&serial).input(bytes);
        }
    };
    machine.console.serve(console, Box::new(input))?;
    match arrival {
        None => {
            machine.boot(&host)?;
            control::serve(machine.clone(), host.clone(), control)?;
            answer(&Started::Ready);
        }
        Some(arrival) => receive(machine, &host, arrival, control)?,
    }
    folder.keep = true;
    let exit = main_loop(machine, &host, inbox)?;
    tracing::info!("{}", exit.sentence(&machine.spec.name));
    folder.keep = !matches!(exit, Exit::Moved(_));
    machine.set_ending();
    machine.drop_vm();
    fs::write(machine.dir.exit(), serde_json::to_vec(&exit)?).context("the VM's folder cannot be written")?;
    machine.console.close();
    machine.set_exit(exit.clone());
    std::thread::sleep(FAREWELL);
    Ok(exit)
}

#[allow(unsafe_code)]
fn inherited(fd: i32) -> UnixStream {
    // SAFETY: the agent made this descriptor for us, told us its number, and nothing else in this process uses it.
    UnixStream::from(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Takes the VM in; control answers meanwhile.
fn receive(machine: &Arc<Machine>, host: &Arc<Host>, arrival: Arrival, control: UnixListener) -> Result<()> {
    let Arrival { offer, from, connections } = arrival;
    let handed_over = inherited(connections);
    let no_more = handed_over.try_clone()?;
    let connections = connections::take_over(handed_over).context("connections cannot be taken over")?;
    let handle = MigrationHandle::new();
    machine.begin_migration(handle.clone(), from, true)?;
    fs::write(machine.dir.arriving(), offer.id.to_string()).context("the VM's folder cannot be written")?;
    let mut journal = runtime::create_journal(&machine.runtime.handoff(offer.id)?)?;
    control::serve(machine.clone(), host.clone(), control)?;
    answer(&Started::Ready);
    let mut destination = Destination::new(machine.clone(), host.clone());
    let incoming = Incoming { offer, connections };
    let result = migrator::receive(&mut destination, incoming, &mut journal, &ReceiveOptions::default(), &handle);
    machine.end_migration(None);
    // The agent sees that it need not keep its end.
    let _ = no_more.shutdown(Shutdown::Both);
    let Received { description, announce, announcing: _ } = result.context("the VM was not received")?;
    // The journal says as well that it runs here.
    let _ = fs::remove_file(machine.dir.arriving());
    tracing::info!(name = description.name, ?announce, "received");
    Ok(())
}

/// Until the guest ends here.
fn main_loop(machine: &Arc<Machine>, host: &Arc<Host>, inbox: &Receiver<Event>) -> Result<Exit> {
    loop {
        match inbox.recv().context("every sender is gone")? {
            Event::Kill => return Ok(Exit::Killed),
            Event::MigrationOver(report) => {
                let (owner, to, outcome) = (report.owner, report.to.clone(), report.outcome);
                if owner == Owner::Destination {
                    // Clients that watch get the report; the VM here is let go only now, outside the blackout.
                    machine.end_migration(Some(*report));
                    return Ok(Exit::Moved(to));
                }
                if outcome == Outcome::Failed {
                    tracing::warn!(error = ?report.error, "the migration failed; the VM stays here");
                }
                machine.end_migration(Some(*report));
                if let Some(exit) = pending_end(machine, host)? {
                    return Ok(exit);
                }
            }
            Event::Guest { boot, .. } if boot != lock(&machine.status).boot => {}
            Event::Guest { event: GuestEvent::Panicked, .. } => tracing::warn!("the guest's kernel panicked"),
            // While it is on its way the migration sees the end itself, fails, and brings us back here.
            Event::Guest { .. } if machine.migration().is_some() => {}
            Event::Guest { .. } => {
                if let Some(exit) = pending_end(machine, host)? {
                    return Ok(exit);
                }
            }
        }
    }
}

/// Acts on the guest's end, if it has come: a reboot starts it again, everything else is the end here too.
fn pending_end(machine: &Arc<Machine>, host: &Arc<Host>) -> Result<Option<Exit>> {
    let (end, panicked) = {
        let status = lock(&machine.status);
        (status.guest_end.clone(), status.panicked)
    };
    Ok(match end {
        None | Some(GuestEvent::Panicked) => None,
        Some(GuestEvent::PowerOff) => Some(Exit::PoweredOff),
        Some(GuestEvent::Crashed(why)) => Some(Exit::Crashed(why)),
        Some(GuestEvent::Reset) if panicked => Some(Exit::Panicked),
        Some(GuestEvent::Reset) => {
            tracing::info!("the guest reboots");
            machine.drop_vm();
            match machine.boot(host) {
                Ok(()) => None,
                Err(error) => Some(Exit::CannotReboot(format!("{error:#}"))),
            }
        }
    })
}
