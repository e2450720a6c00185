//! What a host must still know when it comes back: `$MICROVM_STATE_DIR`, which is on a disk where the runtime directory is not.
//!
//! `incoming/ID` is the journal of a migration to this host; `outgoing/NAME/journal` is that of all attempts to move the VM NAME
//! away, a folder of the VM's own so that it can be given to whoever runs the VM. A VM's process opens the latter when it
//! starts and holds it (its lock) as long as it lives: so a journal that is in doubt and that nobody holds is what a dead
//! process left, and whoever gets the lock may settle it.

use std::fs::{self, DirBuilder, File, TryLockError};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use migrator::MigrationId;
use migrator::handoff::{self, HandoffRecord, Step};
use migrator::journal::{FileJournal, JournalError};
use migrator::traits::{Durability, Journal};
use serde::{Deserialize, Serialize};

use crate::fault_points;

/// Whoever looks at a journal, or settles it, holds it for moments only.
const PATIENCE: Duration = Duration::from_secs(2);

/// The folder of journals.
#[derive(Debug, Clone)]
pub struct Journals {
    root: PathBuf,
}

/// The journal of one VM's attempts to leave.
#[derive(Debug, Clone)]
pub struct Outgoing {
    name: String,
    folder: PathBuf,
}

/// What a process that died has left to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Left {
    /// Nothing: the VM was this host's, and died with it.
    Nothing,
    /// To find out what became of this attempt.
    InDoubt(HandoffRecord),
    /// To clear up: the VM is the destination's.
    Released(HandoffRecord),
}

/// What the destination of an attempt in doubt said when it was asked last.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Asked {
    /// When, in milliseconds since 1970.
    pub unix_ms: u64,
    /// Its answer, or why there is none.
    pub answer: String,
}

impl Journals {
    /// `$MICROVM_STATE_DIR`. Else the runtime folder, if that was chosen: whoever has several hosts on one machine has several of
    /// these, too. Else `/var/lib/microvm` for root, `$XDG_STATE_HOME/microvm` or `~/.local/state/microvm` for others.
    pub fn from_env(runtime: &Path) -> Result<Self> {
        let set = |name| std::env::var_os(name).map(PathBuf::from);
        let root = if let Some(root) = set("MICROVM_STATE_DIR") {
            root
        } else if set("MICROVM_RUNTIME_DIR").is_some() {
            runtime.into()
        } else if rustix::process::geteuid().is_root() {
            "/var/lib/microvm".into()
        } else {
            let home = set("XDG_STATE_HOME").or_else(|| Some(set("HOME")?.join(".local/state")));
            home.context("none of MICROVM_STATE_DIR, XDG_STATE_HOME and HOME is set: set one of them")?.join("microvm")
        };
        Ok(Journals { root: std::path::absolute(root)? })
    }

    /// In the folder `root`.
    #[cfg(test)]
    pub fn new(root: PathBuf) -> Self {
        Journals { root }
    }

    /// The journal of an incoming migration; its folder is there.
    pub fn incoming(&self, id: MigrationId) -> Result<PathBuf> {
        let folder = self.root.join("incoming");
        make_folder(&folder)?;
        Ok(folder.join(id.to_string()))
    }

    /// All journals of incoming migrations.
    pub fn all_incoming(&self) -> Result<Vec<(MigrationId, PathBuf)>> {
        let folder = self.root.join("incoming");
        let ids = list(&folder)?.into_iter().filter_map(|name| name.parse().ok());
        Ok(ids.map(|id: MigrationId| (id, folder.join(id.to_string()))).collect())
    }

    /// The outgoing journal of the VM `name`, which need not exist.
    pub fn outgoing(&self, name: &str) -> Outgoing {
        Outgoing { name: name.into(), folder: self.root.join("outgoing").join(name) }
    }

    /// The VMs that have an outgoing journal.
    pub fn all_outgoing(&self) -> Result<Vec<String>> {
        list(&self.root.join("outgoing"))
    }
}

/// A journal whose records are steps of a migration ([`fault_points`]).
pub struct Stepped<'a>(pub &'a mut FileJournal);

impl Journal for Stepped<'_> {
    fn measure(&mut self) -> io::Result<Option<Duration>> {
        self.0.measure()
    }

    fn append(&mut self, record: &HandoffRecord, durability: Durability) -> io::Result<()> {
        let (role, step) = match record.step {
            Step::Sending => ("source", "sending"),
            Step::Decided => ("source", "decided"),
            Step::Kept => ("source", "kept"),
            Step::Released => ("source", "released"),
            Step::Receiving => ("destination", "receiving"),
            Step::Prepared => ("destination", "prepared"),
            Step::Committed => ("destination", "committed"),
            Step::Running => ("destination", "running"),
            Step::GaveUp => ("destination", "gave-up"),
        };
        fault_points::step(role, &format!("{step}.before"))?;
        self.0.append(record, durability)?;
        // It is written: that cannot fail any more.
        let _ = fault_points::step(role, &format!("{step}.after"));
        Ok(())
    }

    fn load(&mut self) -> io::Result<Vec<HandoffRecord>> {
        self.0.load()
    }
}

impl Outgoing {
    fn journal(&self) -> PathBuf {
        self.folder.join("journal")
    }

    fn asked_file(&self) -> PathBuf {
        self.folder.join("asked.json")
    }

    /// Whether there is one. A folder without it is one that is being made or removed.
    pub fn exists(&self) -> bool {
        self.journal().is_file()
    }

    /// Opens and holds it, if a process does not; made if need be.
    pub fn take(&self) -> Result<Option<FileJournal>> {
        let end = Instant::now() + PATIENCE;
        loop {
            make_folder(&self.folder)?;
            match FileJournal::open(&self.journal()) {
                Ok(journal) => return Ok(Some(journal)),
                Err(JournalError::InUse(_)) => return Ok(None),
                // Whoever removes a journal removes its folder with it.
                Err(_) if !self.folder.is_dir() && Instant::now() < end => {}
                Err(error) => return Err(error).context("the migrations' journal cannot be kept"),
            }
        }
    }

    /// [`Self::take`] for the VM's new process: waits for those who only look, and makes room. What lies there is of a VM that
    /// is gone, and must not be in doubt.
    pub fn take_over(&self) -> Result<FileJournal> {
        loop {
            let journal = self.wait_and_take()?;
            let mut journal =
                journal.with_context(|| format!("the journal of {} is held by another process", self.name))?;
            let records = journal.load().context("the migrations' journal cannot be read")?;
            if let Some(decided) = handoff::unsettled(&records) {
                anyhow::bail!(in_doubt(&self.name, decided));
            }
            if records.is_empty() {
                return Ok(journal);
            }
            self.remove_held(journal)?;
        }
    }

    /// All that was recorded.
    fn records(&self) -> Result<Vec<HandoffRecord>> {
        FileJournal::read(&self.journal()).context("the migrations' journal cannot be read")
    }

    /// Whether the last word is that the VM is the destination's.
    pub fn says_released(&self) -> bool {
        self.records().is_ok_and(|records| records.last().is_some_and(|last| last.step == Step::Released))
    }

    /// What its dead process has left to do. A living one does it itself.
    pub fn left(&self) -> Result<Left> {
        let left = |records: &[HandoffRecord]| match (handoff::unsettled(records), records.last()) {
            (Some(decided), _) => Left::InDoubt(decided.clone()),
            (None, Some(last)) if last.step == Step::Released => Left::Released(last.clone()),
            _ => Left::Nothing,
        };
        // Most have nothing, and that can be seen without the lock.
        if matches!(left(&self.records()?), Left::Nothing) {
            return Ok(Left::Nothing);
        }
        let end = Instant::now() + PATIENCE;
        loop {
            let file = match File::open(self.journal()) {
                Ok(file) => file,
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Left::Nothing),
                Err(error) => return Err(error).context("the migrations' journal cannot be read"),
            };
            match file.try_lock_shared() {
                Ok(()) => return Ok(left(&self.records()?)),
                // The VM's process, or somebody who settles it right now.
                Err(TryLockError::WouldBlock) if Instant::now() < end => thread::sleep(Duration::from_millis(10)),
                Err(TryLockError::WouldBlock) => return Ok(Left::Nothing),
                Err(TryLockError::Error(error)) => {
                    return Err(error).context("the migrations' journal cannot be locked");
                }
            }
        }
    }

    /// The attempt that its dead process left in doubt, if it did.
    pub fn left_in_doubt(&self) -> Result<Option<HandoffRecord>> {
        Ok(match self.left()? {
            Left::InDoubt(decided) => Some(decided),
            Left::Nothing | Left::Released(_) => None,
        })
    }

    /// Opens and holds the journal of a dead process, if it is still there: it must not come back after it was removed.
    pub fn take_what_is_left(&self) -> Result<Option<(FileJournal, Vec<HandoffRecord>)>> {
        if !self.exists() {
            return Ok(None);
        }
        let Some(mut journal) = self.wait_and_take()? else { return Ok(None) };
        let records = journal.load().context("the migrations' journal cannot be read")?;
        if records.is_empty() {
            self.remove_held(journal)?;
            return Ok(None);
        }
        Ok(Some((journal, records)))
    }

    /// Opens and holds it, waiting for those who only look.
    fn wait_and_take(&self) -> Result<Option<FileJournal>> {
        let end = Instant::now() + PATIENCE;
        loop {
            match self.take()? {
                None if Instant::now() < end => thread::sleep(Duration::from_millis(10)),
                taken => return Ok(taken),
            }
        }
    }

    /// Records how the attempt `decided` ended, if nobody else has meanwhile and no process holds it. Returns the journal, held.
    pub fn settle(&self, decided: &HandoffRecord, step: Step) -> Result<Option<FileJournal>> {
        let Some((mut journal, records)) = self.take_what_is_left()? else { return Ok(None) };
        if handoff::unsettled(&records).is_none_or(|record| record.id != decided.id) {
            return Ok(None);
        }
        let record = HandoffRecord { step, unix_ms: unix_ms(), ..decided.clone() };
        journal.append(&record, step.durability()).context("the migrations' journal cannot be written")?;
        let _ = fs::remove_file(self.asked_file());
        Ok(Some(journal))
    }

    /// What the destination said last of this attempt.
    pub fn asked(&self, decided: &HandoffRecord) -> Option<Asked> {
        let asked: Asked = serde_json::from_slice(&fs::read(self.asked_file()).ok()?).ok()?;
        Some(asked).filter(|asked| asked.unix_ms >= decided.unix_ms)
    }

    /// Notes what the destination said, for people: nothing is decided by it.
    pub fn note_asked(&self, answer: &str) {
        let asked = Asked { unix_ms: unix_ms(), answer: answer.into() };
        // Whoever reads it meanwhile must not see half of it.
        let new = self.folder.join("asked.new");
        let noted = serde_json::to_vec(&asked)
            .map_err(io::Error::from)
            .and_then(|text| fs::write(&new, text))
            .and_then(|()| fs::rename(&new, self.asked_file()));
        if let Err(error) = noted {
            tracing::warn!(%error, vm = self.name, "what the destination said cannot be noted");
        }
    }

    /// Removes it, for whoever holds it.
    pub fn remove_held(&self, journal: FileJournal) -> Result<()> {
        journal.remove().with_context(|| format!("the journal of {} cannot be removed", self.name))?;
        self.remove_folder();
        Ok(())
    }

    /// Removes it, for the VM's own process.
    pub fn remove(&self) -> Result<()> {
        match fs::remove_file(self.journal()) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(error).with_context(|| format!("the journal of {} cannot be removed", self.name))
            }
            _ => {
                self.remove_folder();
                Ok(())
            }
        }
    }

    /// Removes the folder that is left if its removal was cut short.
    pub fn finish_removing(&self) {
        if !self.exists() {
            self.remove_folder();
        }
    }

    fn remove_folder(&self) {
        for file in ["asked.json", "asked.new"] {
            let _ = fs::remove_file(self.folder.join(file));
        }
        // Somebody may be making a new journal in it.
        let _ = fs::remove_dir(&self.folder);
    }
}

/// What is to be said of a VM whose process died in doubt.
pub fn in_doubt(name: &str, decided: &HandoffRecord) -> String {
    format!(
        "{name} is in doubt: its process died after it had told {} to run the VM. When that host answers, microvm agent settles it; \
         if it never will, microvm resolve {name} --keep or --discard does",
        decided.peer
    )
}

/// Now, in milliseconds since 1970.
pub fn unix_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
}

/// Names in a folder that need not exist, in order.
fn list(folder: &Path) -> Result<Vec<String>> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(e).with_context(|| format!("cannot list {}", folder.display())),
    };
    let mut names: Vec<String> = entries.filter_map(|e| e.ok()?.file_name().into_string().ok()).collect();
    names.sort();
    Ok(names)
}

/// Makes a folder that is still there after a power cut.
fn make_folder(folder: &Path) -> Result<()> {
    if folder.is_dir() {
        return Ok(());
    }
    let made = DirBuilder::new().recursive(true).mode(0o700).create(folder).and_then(|()| {
        // Those above it may be new, too.
        folder.ancestors().skip(1).take(2).try_for_each(|above| File::open(above)?.sync_all())
    });
    made.with_context(|| {
        format!("cannot make the folder {}: set MICROVM_STATE_DIR to one that you can write to", folder.display())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(step: Step) -> HandoffRecord {
        HandoffRecord { id: MigrationId([7; 16]), step, unix_ms: 1, vm: "web".into(), peer: "host2:7437".into() }
    }

    fn outgoing(steps: &[Step]) -> (tempfile::TempDir, Outgoing) {
        let root = tempfile::tempdir().unwrap();
        let outgoing = Journals::new(root.path().into()).outgoing("web");
        let mut journal = outgoing.take().unwrap().unwrap();
        for step in steps {
            journal.append(&record(*step), Durability::Lazy).unwrap();
        }
        (root, outgoing)
    }

    #[test]
    fn a_doubt_is_left_only_by_the_dead() {
        let (_root, web) = outgoing(&[Step::Sending, Step::Decided]);
        let held = web.take().unwrap().unwrap();
        assert_eq!(web.left().unwrap(), Left::Nothing);
        drop(held);
        // Whoever else looks is no process of the VM's.
        let looking = File::open(web.journal()).unwrap();
        looking.lock_shared().unwrap();
        assert_eq!(web.left_in_doubt().unwrap(), Some(record(Step::Decided)));
        drop(looking);
        assert!(web.take_over().unwrap_err().to_string().contains("microvm resolve web --keep"));
    }

    #[test]
    fn it_is_settled_once() {
        let (_root, web) = outgoing(&[Step::Sending, Step::Decided]);
        let decided = web.left_in_doubt().unwrap().unwrap();
        web.note_asked("connection refused");
        assert_eq!(web.asked(&decided).unwrap().answer, "connection refused");
        let held = web.settle(&decided, Step::Kept).unwrap().unwrap();
        drop(held);
        assert!(web.settle(&decided, Step::Released).unwrap().is_none());
        assert!(web.left_in_doubt().unwrap().is_none() && web.asked(&decided).is_none());
        assert_eq!(web.records().unwrap().last().unwrap().step, Step::Kept);
        // Whoever was still asking when it was removed does not bring it back.
        web.remove().unwrap();
        assert!(web.settle(&decided, Step::Released).unwrap().is_none() && !web.exists());
        let (_root, web) = outgoing(&[Step::Sending, Step::Decided, Step::Released]);
        assert_eq!(web.left().unwrap(), Left::Released(record(Step::Released)));
    }

    #[test]
    fn what_is_settled_makes_room_for_a_vm_of_the_same_name() {
        let (root, web) = outgoing(&[Step::Sending, Step::Decided, Step::Kept]);
        let journal = web.take_over().unwrap();
        assert!(web.take().unwrap().is_none());
        assert!(web.records().unwrap().is_empty());
        drop(journal);
        web.remove().unwrap();
        web.remove().unwrap();
        assert_eq!(Journals::new(root.path().into()).all_outgoing().unwrap(), Vec::<String>::new());
    }

    #[test]
    fn incoming_ones_are_found_again() {
        let root = tempfile::tempdir().unwrap();
        let journals = Journals::new(root.path().into());
        assert!(journals.all_incoming().unwrap().is_empty());
        let id = MigrationId([3; 16]);
        let path = journals.incoming(id).unwrap();
        fs::write(&path, "").unwrap();
        fs::write(path.with_file_name("no id"), "").unwrap();
        assert_eq!(journals.all_incoming().unwrap(), [(id, path)]);
    }
}
