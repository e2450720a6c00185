//! The life of a VM process: from its spec to the guest's end.
//!
//! Whoever starts it (`microvm run`, the agent) gives it the spec on standard input and gets one line back on standard output:
//! `ready`, or why not. From then on the process is on its own; it is reached through its control socket. It forks off its
//! keeper ([`super::keeper`]), opens everything that it will ever need, and enters its sandbox ([`super::sandbox`]); then it
//! makes the VM.

use std::fs::{self, File};
use std::io::{self, Read};
use std::net::Shutdown;
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::mpsc::{self, Receiver};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use migrator::driver::request::Offer;
use migrator::journal::FileJournal;
use migrator::options::Timeouts;
use migrator::{Incoming, MigrationHandle, Outcome, Owner, ReceiveOptions, Received, Report};
use serde::{Deserialize, Serialize};
use vmm::devices::power::GuestEvent;
use vmm::devices::virtio::{Tap, Unplug};
use vmm::host::Host;
use vmm::sandbox::ThreadKind;

use super::connections::{self, Security};
use super::console::{Console, Log};
use super::endpoint::Destination;
use super::keeper::{self, Side, ToKeeper};
use super::sandbox::{Cage, Migrations};
use super::spec::{MachineSpec, NetSpec};
use super::termination::Termination;
use super::{Event, Exit, Machine, Opened, control, lock};
use crate::fault_points;
use crate::journals::Stepped;
use crate::runtime::{Runtime, VmDir, VmLock};
use crate::trust::Link;

/// What a VM process is started with.
#[derive(Debug, Serialize, Deserialize)]
pub struct Start {
    /// The VM.
    pub spec: MachineSpec,
    /// The migration that brings it; `None`: it boots here.
    pub arrival: Option<Arrival>,
    /// What holds its process.
    pub cage: Cage,
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
    /// How long a silent source counts as alive.
    pub dead_after: Duration,
    /// What its connections are secured with.
    pub link: Link,
    /// From where the VM may read its kernel and initrd when it reboots here.
    pub boot_folders: Vec<PathBuf>,
}

/// What it answers.
#[derive(Debug, Serialize, Deserialize)]
pub enum Started {
    /// It runs, or waits for the migration's connections.
    Ready,
    /// It does not, and why.
    Failed(String),
}

/// After the guest's end, clients are answered for no longer than this.
const FAREWELL: Duration = Duration::from_secs(2);

/// The whole life. The result is the process's exit code.
pub fn main() -> Result<u8> {
    // It was started as /proc/self/exe, which is no name to find it by.
    let _ = rustix::thread::set_name(c"microvm");
    let mut text = String::new();
    io::stdin().read_to_string(&mut text).context("the VM's description cannot be read")?;
    let start: Start = serde_json::from_str(&text).context("the VM's description is damaged")?;
    vmm::sandbox::close_all_but(start.arrival.as_ref().map(|arrival| arrival.connections))
        .context("descriptors cannot be closed")?;
    let prepared = prepare(start).and_then(|prepared| match keeper::fork().context("a VM's keeper cannot be made") {
        Ok(side) => Ok((prepared, side)),
        Err(error) => prepared.dir.remove().and(Err(error)),
    });
    let (Prepared { start, dir, lock, journal, runtime, taps, unplug, connections }, side) = match prepared {
        Ok(prepared) => prepared,
        Err(error) => {
            keeper::tell_starter(&Started::Failed(format!("{error:#}")));
            return Ok(1);
        }
    };
    let keeper = match side {
        Side::Keeper(keeper) => {
            drop((taps, connections, journal));
            let arrival = start.arrival.as_ref().map(|arrival| arrival.offer.id);
            return keeper.keep(&dir, &runtime, lock, unplug, arrival);
        }
        Side::Vm(keeper) => Arc::new(keeper),
    };
    keeper::close_stdout();
    unplug.into_iter().for_each(std::mem::forget);
    let result = fault_points::connect()
        .context("the test that MICROVM_FAULT_POINTS names does not listen")
        .and_then(|()| live(start, &dir, &runtime, journal, taps, connections, &keeper));
    match result {
        Ok(exit) => Ok(u8::from(!exit.is_clean())),
        Err(error) => {
            let why = format!("{error:#}");
            // The starter tells the user; once it has heard `ready`, only the log is left.
            if !keeper.answer(Started::Failed(why.clone())) {
                tracing::error!("{why}");
            }
            Ok(1)
        }
    }
}

/// What a VM and its keeper begin with.
struct Prepared {
    start: Start,
    dir: VmDir,
    lock: VmLock,
    /// Of the attempts to move it away.
    journal: FileJournal,
    runtime: Runtime,
    taps: Vec<Tap>,
    unplug: Vec<Unplug>,
    /// From the agent.
    connections: Option<UnixStream>,
}

/// Claims the name and plugs in the network.
fn prepare(start: Start) -> Result<Prepared> {
    let connections = start.arrival.as_ref().map(|arrival| inherited(arrival.connections));
    let runtime = Runtime::from_env()?;
    let dir = runtime.vm(&start.spec.name)?;
    let (lock, journal) = dir.claim()?;
    let taps = || {
        // First of all: what is left of a process that dies must tell what it was.
        if let Some(arrival) = &start.arrival {
            fs::write(dir.arriving(), arrival.offer.id.to_string()).context("the VM's folder cannot be written")?;
        }
        // From here on messages go to the VM's log: the terminal that they would go to is somebody else's soon.
        let log = File::options().create(true).append(true).open(dir.process_log());
        rustix::stdio::dup2_stderr(&log.context("the VM's log cannot be made")?)
            .context("messages cannot be sent to the VM's log")?;
        start.spec.nets.iter().map(NetSpec::plug_in).collect::<Result<Vec<_>>>()
    };
    let mut taps = match taps() {
        Ok(taps) => taps,
        Err(error) => {
            dir.remove()?;
            return Err(error);
        }
    };
    let unplug = taps.iter_mut().filter_map(Tap::take_unplug).collect();
    Ok(Prepared { start, dir, lock, journal, runtime, taps, unplug, connections })
}

fn live(
    start: Start,
    dir: &VmDir,
    runtime: &Runtime,
    outgoing: FileJournal,
    taps: Vec<Tap>,
    handed_over: Option<UnixStream>,
    keeper: &Arc<ToKeeper>,
) -> Result<Exit> {
    let Start { spec, arrival, cage } = start;
    let host = Arc::new(Host::open()?);
    let config = serde_json::to_vec_pretty(&spec)?;
    fs::write(dir.config(), config).context("the VM's folder cannot be written")?;
    let control = UnixListener::bind(dir.control_socket()).context("the control socket cannot be made")?;
    let console_socket = UnixListener::bind(dir.console_socket()).context("the console's socket cannot be made")?;
    let log = Log::open(&dir.console_log()).context("the console's log cannot be written")?;
    let boot = match &arrival {
        Some(arrival) => spec.boot.check_within(&arrival.boot_folders).and_then(|()| spec.boot.open()),
        None => spec.boot.open(),
    };
    let incoming = arrival.as_ref().map(|arrival| {
        let journal = runtime.journals.incoming(arrival.offer.id)?;
        FileJournal::open(&journal).context("the migration's journal cannot be kept")
    });
    let incoming = incoming.transpose()?;
    let terminate = Termination::prepare().context("SIGTERM cannot be waited for")?;

    let sandbox = cage.enter(dir)?;
    let migrations = Migrations::prepare().context("the migrations' thread cannot be started")?;
    vmm::sandbox::confine(ThreadKind::Main);

    let (events, inbox) = mpsc::channel();
    let console = Console::start(log).context("the console cannot be started")?;
    let opened = Opened { taps: Mutex::new(taps), boot, migrations, sandbox };
    let machine = Machine::new(spec, outgoing, opened, console, events);
    let typed = Arc::downgrade(&machine);
    let input = move |bytes: &[u8]| {
        if let Some(serial) = typed.upgrade().and_then(|machine| machine.with_vm(|vm| vm.serial()).ok()) {
            lock(&serial).input(bytes);
        }
    };
    machine.console.serve(console_socket, Box::new(input))?;
    terminate.serve(&machine).context("SIGTERM cannot be waited for")?;
    let result = match (arrival, handed_over, incoming) {
        (Some(arrival), Some(connections), Some(journal)) => {
            control::serve(machine.clone(), host.clone(), control)?;
            receive(&machine, &host, arrival, connections, journal, keeper)
        }
        _ => machine.boot(&host).and_then(|()| {
            control::serve(machine.clone(), host.clone(), control)?;
            keeper.answer(Started::Ready);
            Ok(())
        }),
    };
    let result = result.and_then(|()| {
        keeper.owned();
        until_the_end(&machine, &host, &inbox, keeper)
    });
    machine.console.close();
    result
}

fn until_the_end(machine: &Arc<Machine>, host: &Arc<Host>, inbox: &Receiver<Event>, keeper: &ToKeeper) -> Result<Exit> {
    let exit = main_loop(machine, host, inbox)?;
    tracing::info!("{}", exit.sentence(&machine.spec.name));
    machine.set_ending();
    let remains = machine.let_go();
    machine.console.close();
    keeper.ended(&exit);
    if machine.give_up_journal() {
        keeper.done();
    }
    machine.set_exit(exit.clone());
    machine.wait_for_clients(FAREWELL);
    let _ = fault_points::step("vm", "free.before");
    drop(remains);
    Ok(exit)
}

#[allow(unsafe_code)]
fn inherited(fd: i32) -> UnixStream {
    // SAFETY: the agent made this descriptor for us, told us its number, and nothing else in this process uses it.
    UnixStream::from(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Takes the VM in; control answers meanwhile.
fn receive(
    machine: &Arc<Machine>,
    host: &Arc<Host>,
    arrival: Arrival,
    handed_over: UnixStream,
    mut journal: FileJournal,
    keeper: &Arc<ToKeeper>,
) -> Result<()> {
    let Arrival { offer, from, connections: _, dead_after, link, boot_folders: _ } = arrival;
    let timeouts = Timeouts::with_dead_after(dead_after);
    let no_more = handed_over.try_clone()?;
    let security = link.tls()?.map(|tls| Security { tls, id: offer.id, host: from.clone() });
    let connections =
        connections::take_over(handed_over, security, timeouts).context("connections cannot be taken over")?;
    let handle = MigrationHandle::new();
    machine.begin_migration(handle.clone(), from.clone(), true)?;
    fault_points::about(offer.id, &machine.spec.name);
    keeper.answer(Started::Ready);
    let mut destination = Destination::new(machine.clone(), host.clone());
    let incoming = Incoming { offer, connections };
    let options = ReceiveOptions { from, timeouts, ..ReceiveOptions::default() };
    let result = migrator::receive(&mut destination, incoming, &mut Stepped(&mut journal), &options, &handle);
    machine.end_migration(None);
    // The agent sees that it need not keep its end.
    let _ = no_more.shutdown(Shutdown::Both);
    let Received { description, announce, announcing: _, released } = result.context("the VM was not received")?;
    tracing::info!(name = description.name, ?announce, "received");
    let keeper = keeper.clone();
    let tell = move || {
        if released.and_then(|heard| heard.join().ok()) == Some(true) {
            keeper.released();
        }
    };
    // Without that thread the journal stays, and does no harm.
    let _ = thread::Builder::new().name("released".into()).spawn(tell);
    Ok(())
}

/// Until the guest ends here.
fn main_loop(machine: &Arc<Machine>, host: &Arc<Host>, inbox: &Receiver<Event>) -> Result<Exit> {
    loop {
        match inbox.recv().context("every sender is gone")? {
            Event::Kill => return Ok(Exit::Killed),
            Event::MigrationOver(report) => {
                if report.owner == Owner::Destination {
                    let exit = left(&report);
                    // Clients that watch get the report; the VM here is let go only now, outside the blackout.
                    machine.end_migration(Some(*report));
                    return Ok(exit);
                }
                if report.outcome == Outcome::Failed {
                    tracing::warn!(error = ?report.error, "the migration failed; the VM stays here");
                }
                machine.end_migration(Some(*report));
                if let Some(exit) = pending_end(machine, host)? {
                    return Ok(exit);
                }
            }
            Event::Guest { boot, .. } if boot != lock(&machine.status).boot => {}
            Event::Guest { event: GuestEvent::Panicked, .. } => {}
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

/// How a VM ended here that is the destination's now.
fn left(report: &Report) -> Exit {
    let why = report.error.as_ref().map(|error| error.message.clone());
    match (report.outcome, why) {
        (Outcome::Failed, why) => Exit::Lost(format!("on {}: {}", report.to, why.unwrap_or_default())),
        (_, None) => Exit::Moved(report.to.clone()),
        // Completed, and yet something to say: a human did it.
        (_, Some(_)) => Exit::GivenAway(report.to.clone()),
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
            machine.drop_vm();
            match machine.boot(host) {
                Ok(()) => None,
                Err(error) => Some(Exit::CannotReboot(format!("{error:#}"))),
            }
        }
    })
}
