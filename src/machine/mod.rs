//! The process that owns one VM: the VM itself, its console, its control socket, its migrations.
//!
//! [`Machine`] is shared by the threads of the process; [`process`] is its main loop; [`control`] answers the control socket;
//! [`endpoint`] is how the migrator sees it.

use std::sync::mpsc::Sender;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, anyhow, bail};
use migrator::journal::FileJournal;
use migrator::{MigrationHandle, Outcome, Phase, Report};
use serde::{Deserialize, Serialize};
use vmm::devices::power::GuestEvent;
use vmm::devices::virtio::Tap;
use vmm::host::Host;
use vmm::sandbox::Sandbox;
use vmm::vm::{Remains, RunState, Vm};

pub mod connections;
pub mod console;
pub mod control;
pub mod endpoint;
pub mod keeper;
pub mod process;
pub mod sandbox;
pub mod spawn;
pub mod spec;
mod termination;
pub mod view;

use crate::runtime::VmDir;
use console::Console;
use spec::{MachineSpec, OpenBoot};

/// What wakes the main loop.
#[derive(Debug)]
pub enum Event {
    /// The guest did something, in the VM's life number `boot`.
    Guest {
        /// Which boot of the guest it belongs to; an old one's is not this one's.
        boot: u64,
        /// What it did.
        event: GuestEvent,
    },
    /// End it now.
    Kill,
    /// A migration away has been settled.
    MigrationOver(Box<Report>),
}

/// How a VM's time in this process ended, as it lies in `exit.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "reason", content = "detail")]
pub enum Exit {
    /// The guest switched itself off.
    PoweredOff,
    /// It crashed: triple fault, or KVM cannot go on.
    Crashed(String),
    /// Its kernel panicked, and then reset.
    Panicked,
    /// It asked for a reboot that this host cannot give it.
    CannotReboot(String),
    /// It was stopped by force.
    Killed,
    /// It lives on another host.
    Moved(String),
    /// Its process did what it may not, and was ended.
    Sandbox {
        /// The number of the system call.
        syscall: Option<u32>,
        /// The name of the thread that made it.
        thread: Option<String>,
    },
    /// A human gave it to another host, without that host's word.
    GivenAway(String),
    /// Another host took it over and could not run it.
    Lost(String),
}

impl Exit {
    /// What lies in the VM's folder; `None` while it lives, or if it died.
    pub fn read(dir: &VmDir) -> Result<Option<Self>> {
        match std::fs::read(dir.exit()) {
            Ok(text) => {
                Ok(Some(serde_json::from_slice(&text).with_context(|| format!("{} is damaged", dir.exit().display()))?))
            }
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(e).with_context(|| format!("cannot read {}", dir.exit().display())),
        }
    }

    /// A sentence about the VM `name`.
    pub fn sentence(&self, name: &str) -> String {
        match self {
            Exit::PoweredOff => format!("{name} powered off"),
            Exit::Crashed(why) => format!("{name} crashed: {why}"),
            Exit::Panicked => format!("{name} ended with a kernel panic"),
            Exit::CannotReboot(why) => format!("{name} asked for a reboot and ended: {why}"),
            Exit::Killed => format!("{name} was stopped by force"),
            Exit::Moved(to) => format!("{name} was migrated to {to} and runs there"),
            Exit::Sandbox { syscall: Some(syscall), thread: Some(thread) } => {
                format!(
                    "{name} was ended by its sandbox: the thread {thread} made system call {syscall}, which it may not"
                )
            }
            Exit::Sandbox { .. } => format!("{name} was ended by its sandbox: it made a system call that it may not"),
            Exit::GivenAway(to) => {
                format!("{name} was let go by hand (resolve --discard): it runs on {to}, or nowhere")
            }
            Exit::Lost(why) => format!("{name} was taken over and lost {why}"),
        }
    }

    /// Whether that is what somebody wanted.
    pub fn is_clean(&self) -> bool {
        matches!(self, Exit::PoweredOff | Exit::Killed | Exit::Moved(_) | Exit::GivenAway(_))
    }
}

/// What is known of a migration, at either side.
#[derive(Clone)]
struct Migration {
    handle: MigrationHandle,
    /// The other side, as the user called it.
    peer: String,
    incoming: bool,
}

struct Status {
    /// What the guest did that ends it, until the main loop has acted on it.
    guest_end: Option<GuestEvent>,
    panicked: bool,
    migration: Option<Migration>,
    last_migration: Option<Report>,
    /// The VM is being taken down.
    ending: bool,
    exit: Option<Exit>,
    /// So many have asked something and wait for the answer.
    clients: usize,
    boot: u64,
}

/// Somebody who has asked something.
struct Client<'a>(&'a Machine);

impl Drop for Client<'_> {
    fn drop(&mut self) {
        lock(&self.0.status).clients -= 1;
        self.0.changed.notify_all();
    }
}

/// A VM and what the process knows of it.
pub struct Machine {
    /// What the user asked for.
    pub spec: MachineSpec,
    /// Its console.
    pub console: Console,
    vm: Mutex<Option<Vm>>,
    status: Mutex<Status>,
    changed: Condvar,
    events: Mutex<Sender<Event>>,
    started: SystemTime,
    /// Of the attempts to move it away; `None` once there will be no more.
    journal: Mutex<Option<FileJournal>>,
    /// What was opened at the start.
    opened: Opened,
}

/// What a machine needs and its process cannot get any more once it is in its sandbox.
pub struct Opened {
    /// The host's ends of the network interfaces; each boot takes copies. Empty once the VM is let go.
    pub taps: Mutex<Vec<Tap>>,
    /// The files that boot; why there are none is said at a reboot, which may never come, of a VM from another host.
    pub boot: Result<OpenBoot>,
    /// Where migrations run.
    pub migrations: sandbox::Migrations,
    /// What holds the process.
    pub sandbox: Sandbox,
}

/// How long things may take to end by themselves when the host wants to shut down.
const GRACE: Duration = Duration::from_secs(10);

/// There is no VM: it is not built yet, or gone.
#[derive(Debug, thiserror::Error)]
#[error("the VM is not there")]
pub struct NoVm;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A panic in one thread must not take the VM from the others: what these locks guard is changed in single steps.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn in_words(event: &GuestEvent) -> String {
    match event {
        GuestEvent::PowerOff => "the guest powered off".into(),
        GuestEvent::Reset => "the guest rebooted".into(),
        GuestEvent::Crashed(why) => format!("the guest crashed: {why}"),
        GuestEvent::Panicked => "the guest's kernel panicked".into(),
    }
}

impl Machine {
    /// A machine without a VM.
    pub fn new(
        spec: MachineSpec,
        journal: FileJournal,
        opened: Opened,
        console: Console,
        events: Sender<Event>,
    ) -> Arc<Self> {
        let status = Status {
            guest_end: None,
            panicked: false,
            migration: None,
            last_migration: None,
            ending: false,
            exit: None,
            clients: 0,
            boot: 0,
        };
        Arc::new(Machine {
            spec,
            console,
            vm: Mutex::new(None),
            status: Mutex::new(status),
            changed: Condvar::new(),
            events: Mutex::new(events),
            started: SystemTime::now(),
            journal: Mutex::new(Some(journal)),
            opened,
        })
    }

    /// Does something with the VM. Nobody else does meanwhile.
    pub fn with_vm<T>(&self, action: impl FnOnce(&mut Vm) -> T) -> Result<T, NoVm> {
        lock(&self.vm).as_mut().map(action).ok_or(NoVm)
    }

    /// Wakes the main loop.
    pub fn send(&self, event: Event) {
        // The main loop is gone only when the process ends.
        let _ = lock(&self.events).send(event);
    }

    /// Builds the VM, paused and empty, with its TAPs plugged in.
    pub fn build_vm(self: &Arc<Self>, host: &Host) -> Result<()> {
        let boot = {
            let mut status = lock(&self.status);
            status.boot += 1;
            (status.guest_end, status.panicked) = (None, false);
            self.changed.notify_all();
            status.boot
        };
        let machine = Arc::downgrade(self);
        let events = Arc::new(move |event: GuestEvent| {
            if let Some(machine) = machine.upgrade() {
                machine.guest_did(boot, event);
            }
        });
        let taps = lock(&self.opened.taps).iter().map(Tap::try_clone).collect::<Result<Vec<_>, _>>();
        let taps = taps.context("the network interfaces cannot be used again")?;
        let vm = Vm::build(host, self.spec.vm_config(), taps, Box::new(self.console.writer()), events)?;
        *lock(&self.vm) = Some(vm);
        Ok(())
    }

    /// Builds the VM and starts its kernel.
    pub fn boot(self: &Arc<Self>, host: &Host) -> Result<()> {
        let files = self.opened.boot.as_ref().map_err(|error| anyhow!("{error:#}"))?.read()?;
        self.build_vm(host)?;
        self.with_vm(|vm| {
            let kernel = self.spec.boot.kernel_name();
            vm.load_kernel(&files.kernel, files.initrd.as_deref(), &self.spec.boot_cmdline())
                .with_context(|| format!("cannot boot {kernel}"))?;
            vm.resume();
            Ok(())
        })?
    }

    /// Lets go of the VM: threads and memory. Its TAPs stay open for the next boot.
    pub fn drop_vm(&self) {
        let vm = lock(&self.vm).take();
        drop(vm);
    }

    /// Lets go of the VM and of its TAPs, for good. Nobody has to wait for what remains of it.
    pub fn let_go(&self) -> Option<Remains> {
        let vm = lock(&self.vm).take();
        let remains = vm.as_ref().map(Vm::remains);
        drop(vm);
        lock(&self.opened.taps).clear();
        remains
    }

    fn guest_did(&self, boot: u64, event: GuestEvent) {
        {
            let mut status = lock(&self.status);
            if status.boot != boot {
                return;
            }
            match event {
                GuestEvent::Panicked => status.panicked = true,
                _ if status.guest_end.is_none() => status.guest_end = Some(event.clone()),
                _ => return,
            }
        }
        tracing::info!("{}", in_words(&event));
        self.send(Event::Guest { boot, event });
    }

    /// Why the guest is at its end, if it is.
    pub fn guest_ended(&self) -> Option<String> {
        lock(&self.status).guest_end.as_ref().map(in_words)
    }

    /// Takes part in a migration until [`Self::end_migration`]; refused while another one runs.
    fn begin_migration(&self, handle: MigrationHandle, peer: String, incoming: bool) -> Result<()> {
        let mut status = lock(&self.status);
        if let Some(migration) = &status.migration {
            let name = &self.spec.name;
            let peer = &migration.peer;
            bail!(
                "{name} is being migrated already (with {peer}): microvm inspect {name} shows how far, microvm cancel {name} stops it"
            );
        }
        if let Some(exit) = &status.exit {
            bail!("{}", exit.sentence(&self.spec.name));
        }
        if status.ending {
            bail!("{} is ending and cannot be migrated any more", self.spec.name);
        }
        status.migration = Some(Migration { handle, peer, incoming });
        Ok(())
    }

    fn end_migration(&self, report: Option<Report>) {
        let mut status = lock(&self.status);
        status.migration = None;
        status.last_migration = report.or(status.last_migration.take());
        self.changed.notify_all();
    }

    /// The migration under way.
    fn migration(&self) -> Option<Migration> {
        lock(&self.status).migration.clone()
    }

    /// Refuses what must not happen to a VM that is on its way.
    fn check_at_home(&self, action: &str) -> Result<()> {
        if self.migration().is_some() {
            let name = &self.spec.name;
            bail!("{name} is being migrated and cannot be {action} now: wait, or microvm cancel {name}");
        }
        Ok(())
    }

    /// Stops the guest where it is.
    pub fn pause(&self) -> Result<()> {
        self.check_at_home("paused")?;
        self.with_vm(Vm::pause)?.context("the VM cannot be paused")
    }

    /// Lets it go on.
    pub fn resume(&self) -> Result<()> {
        self.check_at_home("resumed")?;
        Ok(self.with_vm(Vm::resume)?)
    }

    /// Presses the power button; waits for the guest to switch itself off until `patience` ends, then ends it.
    pub fn stop(&self, patience: Duration) -> Result<Exit> {
        self.check_at_home("stopped")?;
        // A paused guest cannot answer.
        if !patience.is_zero() && self.run_state() == Some(RunState::Running) {
            let power = self.with_vm(|vm| vm.power())?;
            lock(&power).press_button().context("the power button cannot be pressed")?;
            if let Some(exit) = self.wait_exit(patience) {
                return Ok(exit);
            }
        }
        self.send(Event::Kill);
        self.wait_exit(Duration::from_secs(10)).context("the VM does not end")
    }

    /// Ends it because the host wants to shut down: first a migration, if that is possible, then the guest, gently, then by force.
    /// What is in doubt stays so in its journal.
    fn terminate(&self) {
        if let Some(migration) = self.migration() {
            // Too late, or over by itself: either way there is an end to wait for.
            let _ = migration.handle.cancel();
            self.wait_until(GRACE, |status| status.migration.is_none());
        }
        if let Err(error) = self.stop(GRACE) {
            tracing::warn!("ended by force: {error:#}");
        }
        self.send(Event::Kill);
    }

    /// After a migration that left the VM here: how it has ended meanwhile, if it has.
    fn wait_fate(&self) -> Option<Exit> {
        self.wait_until(GRACE, |s| s.exit.is_some() || (s.migration.is_none() && s.guest_end.is_none()))
    }

    fn wait_until(&self, patience: Duration, so: impl Fn(&Status) -> bool) -> Option<Exit> {
        let status = lock(&self.status);
        let waited = self.changed.wait_timeout_while(status, patience, |status| !so(status));
        waited.unwrap_or_else(PoisonError::into_inner).0.exit.clone()
    }

    /// Waits until the VM has ended here, for no longer than `patience`.
    fn wait_exit(&self, patience: Duration) -> Option<Exit> {
        self.wait_until(patience, |status| status.exit.is_some())
    }

    /// Somebody asks, for as long as the result lives.
    fn client(&self) -> Client<'_> {
        lock(&self.status).clients += 1;
        Client(self)
    }

    /// Waits until everybody who asked has an answer, for no longer than `patience`.
    fn wait_for_clients(&self, patience: Duration) {
        self.wait_until(patience, |status| status.clients == 0);
    }

    fn set_ending(&self) {
        lock(&self.status).ending = true;
    }

    /// Gives up the journal of a VM that is ending, unless a migration is under way: that may write to it as long as there is the
    /// process. Says whether it did.
    fn give_up_journal(&self) -> bool {
        let idle = self.migration().is_none();
        if idle {
            lock(&self.journal).take();
        }
        idle
    }

    fn set_exit(&self, exit: Exit) {
        lock(&self.status).exit = Some(exit);
        self.changed.notify_all();
    }

    fn run_state(&self) -> Option<RunState> {
        self.with_vm(|vm| vm.state()).ok()
    }

    /// One word for `ps`.
    pub fn state(&self) -> State {
        let (migration, ended, panicked) = {
            let status = lock(&self.status);
            (status.migration.clone(), status.ending, status.panicked)
        };
        match migration.as_ref().map(|m| (m.incoming, m.handle.progress().phase)) {
            Some((_, Phase::InDoubt)) => State::InDoubt,
            Some((true, phase)) if phase != Phase::Done => State::Receiving,
            Some((false, phase)) if phase != Phase::Done => State::Migrating,
            _ if ended => State::Ended,
            _ => match self.run_state() {
                None => State::Starting,
                Some(RunState::Paused) => State::Paused,
                Some(RunState::Running) if panicked => State::Panicked,
                Some(RunState::Running) => State::Running,
            },
        }
    }
}

/// What `ps` says of a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// Being built.
    Starting,
    /// Running.
    Running,
    /// Stopped where it is; `resume` lets it go on.
    Paused,
    /// Running, and its kernel says that it panicked.
    Panicked,
    /// Running here, on its way to another host.
    Migrating,
    /// On its way here from another host.
    Receiving,
    /// COMMIT was sent and nothing heard: paused here until it is known who owns the VM.
    InDoubt,
    /// Its time here is over.
    Ended,
}

impl std::fmt::Display for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            State::Starting => "starting",
            State::Running => "running",
            State::Paused => "paused",
            State::Panicked => "panicked",
            State::Migrating => "migrating",
            State::Receiving => "receiving",
            State::InDoubt => "in-doubt",
            State::Ended => "ended",
        })
    }
}

/// Seconds since 1970, for what people read.
fn unix_seconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

/// The exit code that an outcome stands for (docs: "Exit codes").
pub fn exit_code(outcome: Outcome) -> u8 {
    match outcome {
        Outcome::Completed => 0,
        Outcome::Failed => 1,
        Outcome::Cancelled => 3,
        Outcome::InDoubt => 4,
    }
}
