//! The control socket: one JSON request a line, answered by one or more lines (see [`super::view`]).

use std::io::{BufRead, BufReader, BufWriter, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use migrator::handle::Resolution;
use migrator::{MigrationHandle, MigrationId, Owner, Phase};
use vmm::host::Host;
use vmm::sandbox::{self, ThreadKind};

use super::endpoint::Source;
use super::view::{Answer, MigrateRequest, ProgressView, Request};
use super::{Event, Machine, lock};
use crate::agent::dialer;
use crate::fault_points;
use crate::journals::Stepped;

/// The longest request: a migration's has certificates and revocations in it.
const MAX_REQUEST_BYTES: u64 = 4 << 20;
/// How long a client may be silent before its thread is let go.
const CLIENT_TIMEOUT: Duration = Duration::from_secs(30);
/// Between two progress lines while nothing changes.
const PROGRESS_EVERY: Duration = Duration::from_millis(200);

/// Answers `listener` for ever.
pub fn serve(machine: Arc<Machine>, host: Arc<Host>, listener: UnixListener) -> std::io::Result<()> {
    thread::Builder::new().name("control".into()).spawn(move || {
        sandbox::confine(ThreadKind::Control);
        for client in listener.incoming().flatten() {
            let (machine, host) = (machine.clone(), host.clone());
            let spawned = thread::Builder::new().name("control-client".into()).spawn(move || {
                if let Err(error) = serve_client(&machine, &host, client) {
                    tracing::debug!(%error, "a control client went away");
                }
            });
            if let Err(error) = spawned {
                tracing::warn!(%error, "a control client was turned away");
            }
        }
    })?;
    Ok(())
}

fn serve_client(machine: &Arc<Machine>, host: &Arc<Host>, client: UnixStream) -> std::io::Result<()> {
    client.set_read_timeout(Some(CLIENT_TIMEOUT))?;
    client.set_write_timeout(Some(CLIENT_TIMEOUT))?;
    let mut out = BufWriter::new(client.try_clone()?);
    let mut send = |answer: &Answer| -> std::io::Result<()> {
        serde_json::to_writer(&mut out, answer)?;
        out.write_all(b"\n")?;
        out.flush()
    };
    let mut line = String::new();
    BufReader::new(client.take(MAX_REQUEST_BYTES)).read_line(&mut line)?;
    let _asks = machine.client();
    match serde_json::from_str(&line) {
        Err(error) => send(&Answer::Error(format!("the request cannot be read: {error}"))),
        Ok(request) => match answer(machine, host, request, &mut send) {
            Ok(answer) => send(&answer),
            Err(error) => send(&Answer::Error(format!("{error:#}"))),
        },
    }
}

type Send<'a> = &'a mut dyn FnMut(&Answer) -> std::io::Result<()>;

fn answer(machine: &Arc<Machine>, host: &Arc<Host>, request: Request, send: Send<'_>) -> Result<Answer> {
    match request {
        Request::Inspect => Ok(Answer::Vm(Box::new(machine.view()))),
        Request::Pause => machine.pause().map(|()| Answer::Ok),
        Request::Resume => machine.resume().map(|()| Answer::Ok),
        Request::Stop { patience_ms } => machine.stop(Duration::from_millis(patience_ms)).map(Answer::Exit),
        Request::Migrate(request) => {
            let peer = request.to.clone();
            let handle = migrate(machine, host, &request)?;
            let patience = Duration::from_millis(request.how.dead_after_ms) * IN_DOUBT_PATIENCE;
            watch(machine, &handle, &peer, patience, send)
        }
        Request::Cancel => {
            let migration =
                machine.migration().with_context(|| format!("{} is not being migrated", machine.spec.name))?;
            migration.handle.cancel()?;
            Ok(Answer::Ok)
        }
        Request::Resolve { keep } => {
            let name = &machine.spec.name;
            let Some(migration) = machine.migration() else { bail!("{name} is not in doubt: nothing to resolve") };
            migration.handle.resolve(if keep { Resolution::Keep } else { Resolution::Discard })?;
            Ok(Answer::Ok)
        }
    }
}

/// Starts moving the VM, in a thread of its own: whoever asked may go away.
fn migrate(machine: &Arc<Machine>, host: &Arc<Host>, request: &MigrateRequest) -> Result<MigrationHandle> {
    let options = request.options();
    let dialer = dialer(&request.link, &request.to, options.timeouts, request.addresses.clone())?;
    let handle = MigrationHandle::new();
    machine.begin_migration(handle.clone(), request.to.clone(), false)?;
    let started = (|| {
        let mut source = Source::new(machine.clone(), host)?;
        let id = MigrationId::random().context("the kernel gives no random numbers")?;
        let (for_thread, handle) = (machine.clone(), handle.clone());
        let migration = move || {
            let machine = for_thread;
            let mut journal = lock(&machine.journal);
            let kept = journal.as_mut().expect("no migration begins on a machine that is ending");
            fault_points::about(id, &machine.spec.name);
            let report = migrator::migrate(&mut source, id, dialer, &mut Stepped(kept), &options, &handle);
            drop(journal);
            machine.send(Event::MigrationOver(Box::new(report)));
        };
        machine.opened.migrations.start(migration).context("the migration's thread cannot be started")
    })();
    if started.is_err() {
        machine.end_migration(None);
    }
    started.map(|_| handle)
}

/// A doubt may settle itself within so many times what counts as death; whoever waits longer is told how it stands.
const IN_DOUBT_PATIENCE: u32 = 2;

/// Sends progress until the migration is over or in doubt for longer than `patience`, then its report.
fn watch(
    machine: &Machine,
    handle: &MigrationHandle,
    peer: &str,
    patience: Duration,
    send: Send<'_>,
) -> Result<Answer> {
    let mut seen = 0;
    loop {
        let (now, progress) = handle.wait(seen, PROGRESS_EVERY);
        seen = now;
        let doubt = progress.in_doubt_since.map_or(Duration::ZERO, |since| progress.elapsed.saturating_sub(since));
        let enough = match progress.phase {
            Phase::Done => true,
            Phase::InDoubt => doubt > patience,
            _ => false,
        };
        if enough && let Some(report) = handle.report() {
            let exit = if report.owner == Owner::Source { machine.wait_fate() } else { None };
            return Ok(Answer::Report { report: Box::new(report), exit });
        }
        // A watcher that went away is no reason to stop anything.
        send(&Answer::Progress(Box::new(ProgressView::new(peer, false, &progress))))?;
    }
}
