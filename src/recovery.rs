//! What processes that died have left: who finds it, asks, records the end, and clears up.
//!
//! Everything here may be done twice and by several at once (an agent, another agent, `microvm rm`): whoever changes a journal
//! holds its lock, and looks again at what it says.

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use migrator::MigrationId;
use migrator::driver::request::{self, AskAnswer};
use migrator::handoff::{self, Answer, HandoffRecord, Step};
use migrator::journal::{FileJournal, JournalError};
use migrator::options::Timeouts;
use migrator::traits::{Durability, Journal};

use crate::agent::dialer;
use crate::journals::{Left, in_doubt, unix_ms};
use crate::machine::view::resolve;
use crate::runtime::{Runtime, VmDir};
use crate::trust::Link;

/// Between two looks for what processes have left.
const LOOK_EVERY: Duration = Duration::from_secs(2);
/// A tombstone that is older is removed: whoever asks after that finds no trace, and is answered the same.
const TOMBSTONE_LIFE: Duration = Duration::from_secs(24 * 3600);
/// An empty journal that is younger may be about to get its first record.
const YOUNG: Duration = Duration::from_secs(60);

/// How a doubt that a dead process left stands now.
#[derive(Debug, PartialEq, Eq)]
pub enum Doubt {
    /// There is none (any more).
    None,
    /// The destination runs the VM: what was left of it here is removed.
    Released {
        /// Where it is.
        to: String,
    },
    /// The destination gave it up: the VM was this host's, and died with its process.
    Kept,
    /// It is not known.
    Open {
        /// What the destination said, or why it said nothing.
        answer: String,
    },
}

/// If the VM's process died in doubt, asks the destination, once, and acts on its answer. If it died just after, clears up.
pub fn settle(dir: &VmDir, timeouts: Timeouts) -> Result<Doubt> {
    let decided = match dir.outgoing.left()? {
        Left::Nothing => return Ok(Doubt::None),
        Left::InDoubt(decided) => decided,
        // What it said at its end stays for whoever wants to read it.
        Left::Released(_) if dir.exit().exists() => return Ok(Doubt::None),
        Left::Released(record) => return clear_up(dir, &record),
    };
    let answer = match ask(&decided, timeouts) {
        Ok(AskAnswer::Running) => return release(dir, &decided),
        Ok(AskAnswer::GaveUp) => return keep(dir, &decided),
        Ok(AskAnswer::Pending) => "it has not decided yet".into(),
        Err(error) => migrator::report::chain(error.as_ref()),
    };
    dir.outgoing.note_asked(&answer);
    Ok(Doubt::Open { answer })
}

fn ask(decided: &HandoffRecord, timeouts: Timeouts) -> Result<AskAnswer> {
    let peer = &decided.peer;
    let dialer = dialer(&Link::for_questions()?, peer, timeouts, resolve(peer))?;
    Ok(request::ask(&*dialer, decided.id, timeouts.request)?)
}

/// [`settle`], for a command that can do nothing before it is known.
pub fn must_settle(dir: &VmDir) -> Result<Doubt> {
    let decided = dir.outgoing.left_in_doubt()?;
    match (settle(dir, Timeouts::default())?, decided) {
        (Doubt::Open { answer }, Some(decided)) => {
            anyhow::bail!("{}. Asked just now: {answer}", in_doubt(dir.name(), &decided))
        }
        (doubt, _) => Ok(doubt),
    }
}

/// The VM is the destination's: records that, and removes what is left of it here.
pub fn release(dir: &VmDir, decided: &HandoffRecord) -> Result<Doubt> {
    let Some(journal) = dir.outgoing.settle(decided, Step::Released)? else { return Ok(Doubt::None) };
    tracing::info!(vm = dir.name(), id = %decided.id, to = decided.peer, "in doubt no more: it is the destination's");
    drop(journal);
    clear_up(dir, decided)
}

/// Removes what is left of a VM that is the destination's.
fn clear_up(dir: &VmDir, record: &HandoffRecord) -> Result<Doubt> {
    // Held, so that no new VM of this name begins meanwhile.
    if let Some((_held, records)) = dir.outgoing.take_what_is_left()?
        && records.last().is_some_and(|last| (last.id, last.step) == (record.id, Step::Released))
    {
        tracing::info!(vm = dir.name(), to = record.peer, "what its process left is removed: it moved away");
        dir.remove()?;
    }
    Ok(Doubt::Released { to: record.peer.clone() })
}

/// The VM was this host's: records that. What is left of it stays, for its logs.
pub fn keep(dir: &VmDir, decided: &HandoffRecord) -> Result<Doubt> {
    if dir.outgoing.settle(decided, Step::Kept)?.is_none() {
        return Ok(Doubt::None);
    }
    tracing::info!(vm = dir.name(), id = %decided.id, "in doubt no more: it was this host's, and died with its process");
    Ok(Doubt::Kept)
}

/// The record that an attempt will never run here.
pub fn tombstone(id: MigrationId, peer: &str) -> HandoffRecord {
    HandoffRecord { id, step: Step::GaveUp, unix_ms: unix_ms(), vm: String::new(), peer: peer.into() }
}

/// Looks after what processes leave, now and for as long as this process lives.
pub fn start(runtime: &Runtime, timeouts: Timeouts) -> Result<()> {
    let (runtime, asked) = (runtime.clone(), Arc::<Mutex<HashSet<String>>>::default());
    let mut incoming = runtime.journals.all_incoming()?;
    look(&runtime, timeouts, &asked, &mut incoming, true);
    thread::Builder::new().name("recovery".into()).spawn(move || {
        loop {
            thread::sleep(LOOK_EVERY);
            look(&runtime, timeouts, &asked, &mut incoming, false);
        }
    })?;
    Ok(())
}

/// One look. Nothing that is damaged keeps it from the rest. `incoming` are journals of before this agent's time that are still to
/// be looked at; those of processes that it started are when they end.
fn look(
    runtime: &Runtime,
    timeouts: Timeouts,
    asked: &Arc<Mutex<HashSet<String>>>,
    incoming: &mut Vec<(MigrationId, PathBuf)>,
    first: bool,
) {
    let complain = |what: &str, error: anyhow::Error| tracing::warn!("{what}: {error:#}");
    incoming.retain(|(id, path)| match look_at_incoming(*id, path) {
        Ok(looked) => looked == Looked::Held,
        Err(error) => {
            complain(&id.to_string(), error);
            false
        }
    });
    if first && let Err(error) = runtime.finish_removing() {
        complain("what is left of VMs", error);
    }
    for dir in runtime.vms().unwrap_or_default() {
        let name = dir.name().to_string();
        let looked = dir.is_held().and_then(|held| match held {
            true if first => {
                tracing::info!(vm = name, "found: it runs in a process of its own");
                Ok(())
            }
            true => Ok(()),
            false => {
                dir.remove_if_never_arrived(runtime)?;
                dir.outgoing.finish_removing();
                ask_for_ever(dir, timeouts, asked)
            }
        });
        if let Err(error) = looked {
            complain(&name, error);
        }
    }
}

/// What a look at a journal has led to.
#[derive(Debug, PartialEq, Eq)]
pub enum Looked {
    /// There is nothing to do, or it was done.
    Done,
    /// Its process lives.
    Held,
}

/// An incoming migration that nobody holds any more will not come: that is recorded before anyone asks.
pub fn look_at_incoming(id: MigrationId, path: &Path) -> Result<Looked> {
    let age = fs::metadata(path).and_then(|file| file.modified()).ok().and_then(|at| at.elapsed().ok());
    let older = |than| age.is_some_and(|age| age > than);
    let unreadable = "the migration's journal cannot be read";
    // Most have nothing to be done, and that can be seen without the lock.
    let nothing_to_do = |records: &[HandoffRecord]| match handoff::answer(records, id, false) {
        Answer::NoTrace => records.is_empty() && !older(YOUNG),
        Answer::GaveUp => !older(TOMBSTONE_LIFE),
        // The source may still ask. It says when it has let go; then the journal is removed.
        Answer::Running | Answer::Pending => true,
    };
    if nothing_to_do(&FileJournal::read(path).context(unreadable)?) {
        return Ok(Looked::Done);
    }
    let mut journal = match FileJournal::open(path) {
        Ok(journal) => journal,
        Err(JournalError::InUse(_)) => return Ok(Looked::Held),
        Err(error) => return Err(error).context("the migration's journal cannot be kept"),
    };
    let records = journal.load().context(unreadable)?;
    match records.last() {
        _ if nothing_to_do(&records) => {}
        Some(last) if last.step != Step::GaveUp => {
            journal.append(&tombstone(id, &last.peer), Durability::Durable)?;
            tracing::info!(%id, vm = last.vm, "its process died before it was told to run the VM: given up");
        }
        _ => journal.remove()?,
    }
    Ok(Looked::Done)
}

/// Starts to ask about a VM whose process died in doubt, unless that is being done.
fn ask_for_ever(dir: VmDir, timeouts: Timeouts, asked: &Arc<Mutex<HashSet<String>>>) -> Result<()> {
    let lock = |asked: &Mutex<HashSet<String>>| -> bool {
        asked.lock().unwrap_or_else(PoisonError::into_inner).insert(dir.name().to_string())
    };
    match dir.outgoing.left()? {
        Left::Nothing => return Ok(()),
        Left::Released(_) => return settle(&dir, timeouts).map(|_| ()),
        Left::InDoubt(_) if !lock(asked) => return Ok(()),
        Left::InDoubt(_) => {}
    }
    let asked = asked.clone();
    thread::Builder::new().name("ask".into()).stack_size(256 << 10).spawn(move || {
        let mut wait = timeouts.ask_min;
        tracing::info!(vm = dir.name(), "its process died in doubt: asking the destination");
        loop {
            match settle(&dir, timeouts) {
                Ok(Doubt::Open { answer }) => tracing::debug!(vm = dir.name(), answer, "still in doubt"),
                Ok(_) => break,
                Err(error) => tracing::warn!(vm = dir.name(), "{error:#}"),
            }
            thread::sleep(wait);
            wait = (wait * 2).min(timeouts.ask_max);
        }
        asked.lock().unwrap_or_else(PoisonError::into_inner).remove(dir.name());
    })?;
    Ok(())
}
