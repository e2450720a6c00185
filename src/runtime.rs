//! Where a host keeps its VMs: `$MICROVM_RUNTIME_DIR/vms/NAME/…`, one folder a VM. What must outlive the host's power is in
//! [`crate::journals`].
//!
//! A VM process holds a lock on its folder as long as it lives; so a name is taken exactly as long as somebody owns it, and a
//! folder without a holder is what a killed process left.

use std::fs::{self, File, TryLockError};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use migrator::MigrationId;
use migrator::handoff::{self, Answer};
use migrator::journal::FileJournal;

use crate::journals::{Journals, Outgoing};

/// The longest name: socket paths have 108 bytes.
pub const MAX_NAME_BYTES: usize = 40;

/// A process writes the first file of its VM's folder at once.
const STILLBORN: Duration = Duration::from_secs(10);

/// This host's runtime folder.
#[derive(Debug, Clone)]
pub struct Runtime {
    root: PathBuf,
    /// The journals of the same host.
    pub journals: Journals,
}

/// A VM's folder.
#[derive(Debug, Clone)]
pub struct VmDir {
    name: String,
    path: PathBuf,
    /// The journal of its attempts to leave.
    pub outgoing: Outgoing,
}

/// The lock on a VM's folder; whoever holds it is the VM's process.
#[derive(Debug)]
pub struct VmLock(File);

impl VmLock {
    /// Lets go also for the processes that were forked with it.
    pub fn release(self) {
        // An error would be one of a descriptor that is none.
        let _ = self.0.unlock();
    }
}

/// Checks a VM's name: it is a folder's name, an argument and a word in messages.
pub fn check_name(name: &str) -> Result<()> {
    let good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if name.is_empty() || name.len() > MAX_NAME_BYTES || name.starts_with(['.', '-']) || !name.chars().all(good) {
        bail!(
            "{name:?} is not a VM name: use 1 to {MAX_NAME_BYTES} letters, digits, '-', '_' or '.', beginning with a letter or digit"
        );
    }
    Ok(())
}

impl Runtime {
    /// `$MICROVM_RUNTIME_DIR`; else `/run/microvm` for root, `$XDG_RUNTIME_DIR/microvm` for others.
    pub fn from_env() -> Result<Self> {
        let root = match std::env::var_os("MICROVM_RUNTIME_DIR") {
            Some(dir) => PathBuf::from(dir),
            None if rustix::process::geteuid().is_root() => "/run/microvm".into(),
            None => PathBuf::from(
                std::env::var_os("XDG_RUNTIME_DIR")
                    .context("neither MICROVM_RUNTIME_DIR nor XDG_RUNTIME_DIR is set: set one of them")?,
            )
            .join("microvm"),
        };
        let root = std::path::absolute(root)?;
        let longest = root.join("vms").join("x".repeat(MAX_NAME_BYTES)).join("control.sock").as_os_str().len();
        if longest >= 108 {
            bail!(
                "the runtime folder {} has too long a path for sockets in it: set MICROVM_RUNTIME_DIR to a shorter one",
                root.display()
            );
        }
        let journals = Journals::from_env(&root)?;
        Ok(Runtime { root, journals })
    }

    /// The folder of the VM `name`, which need not exist.
    pub fn vm(&self, name: &str) -> Result<VmDir> {
        check_name(name)?;
        let (path, outgoing) = (self.root.join("vms").join(name), self.journals.outgoing(name));
        Ok(VmDir { name: name.into(), path, outgoing })
    }

    /// All VMs that there is something of, by name: a folder, or a journal that has outlived it.
    pub fn vms(&self) -> Result<Vec<VmDir>> {
        let mut names = self.folders()?;
        names.extend(self.journals.all_outgoing()?);
        names.retain(|name| check_name(name).is_ok());
        names.sort();
        names.dedup();
        names.iter().map(|name| self.vm(name)).collect()
    }

    /// Removes folders whose removal was cut short.
    pub fn finish_removing(&self) -> Result<()> {
        for name in self.folders()?.iter().filter(|name| name.starts_with('.')) {
            // Somebody may be at it.
            let _ = fs::remove_dir_all(self.root.join("vms").join(name));
        }
        Ok(())
    }

    fn folders(&self) -> Result<Vec<String>> {
        let dir = self.root.join("vms");
        let entries = match fs::read_dir(&dir) {
            Ok(entries) => entries,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(e) => return Err(e).with_context(|| format!("cannot list {}", dir.display())),
        };
        Ok(entries.filter_map(|e| e.ok()?.file_name().into_string().ok()).collect())
    }
}

fn has_arrived(id: MigrationId, runtime: &Runtime) -> Result<bool> {
    let journal = runtime.journals.incoming(id)?;
    let records = FileJournal::read(&journal).context("the migration's journal cannot be read")?;
    Ok(handoff::answer(&records, id, false) == Answer::Running)
}

fn make_dir(path: &Path) -> Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(path).with_context(|| {
        format!("cannot make the folder {}: set MICROVM_RUNTIME_DIR to one that you can write to", path.display())
    })
}

impl VmDir {
    /// The VM's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// A file of the VM.
    pub fn file(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// The control socket.
    pub fn control_socket(&self) -> PathBuf {
        self.file("control.sock")
    }

    /// The console's socket.
    pub fn console_socket(&self) -> PathBuf {
        self.file("console.sock")
    }

    /// The console's log.
    pub fn console_log(&self) -> PathBuf {
        self.file("console.log")
    }

    /// What the VM is made from.
    pub fn config(&self) -> PathBuf {
        self.file("config.json")
    }

    /// How the guest ended, once it has.
    pub fn exit(&self) -> PathBuf {
        self.file("exit.json")
    }

    /// The VM process's own messages.
    pub fn process_log(&self) -> PathBuf {
        self.file("vm.log")
    }

    /// Which migration brings the VM, until it is this host's.
    pub fn arriving(&self) -> PathBuf {
        self.file("arriving")
    }

    /// Removes the folder if it is what is left of a process that was receiving the VM and died before it could run it: nothing
    /// in it is of use to anyone, and the VM is where it came from.
    pub fn remove_if_never_arrived(&self, runtime: &Runtime) -> Result<()> {
        if self.is_held()? {
            return Ok(());
        }
        let id = match fs::read_to_string(self.arriving()) {
            Ok(id) => id,
            Err(_) => return self.remove_if_nothing(),
        };
        // Not damage: it died in the middle of writing this, before anything else.
        let Ok(id) = id.parse() else { return self.remove() };
        if !has_arrived(id, runtime)? {
            self.remove()?;
        }
        Ok(())
    }

    /// Whether the VM was being received and may have run here, by its journal.
    pub fn has_arrived(&self, runtime: &Runtime) -> Result<bool> {
        let id = fs::read_to_string(self.arriving()).ok().and_then(|id| id.parse().ok());
        id.map_or(Ok(false), |id| has_arrived(id, runtime))
    }

    /// A directory with nothing in it: the VM's process has it as its root.
    pub fn empty_root(&self) -> Result<PathBuf> {
        let path = self.file("root");
        fs::DirBuilder::new()
            .mode(0o555)
            .recursive(true)
            .create(&path)
            .with_context(|| format!("cannot make the folder {}", path.display()))?;
        Ok(path)
    }

    /// Removes the sockets of a VM that has ended.
    pub fn remove_sockets(&self) {
        for socket in [self.control_socket(), self.console_socket()] {
            let _ = fs::remove_file(socket);
        }
    }

    /// Removes the folder of a process that died before it wrote anything, some time ago: a young one may be about to.
    fn remove_if_nothing(&self) -> Result<()> {
        let made = fs::metadata(&self.path).and_then(|folder| folder.modified());
        if !self.config().exists() && made.is_ok_and(|at| at.elapsed().is_ok_and(|age| age > STILLBORN)) {
            self.remove()?;
        }
        Ok(())
    }

    /// Whether the folder is there: the name is taken.
    pub fn exists(&self) -> bool {
        self.path.is_dir()
    }

    /// Whether there is anything to show: the folder, or a journal that has outlived it.
    pub fn is_known(&self) -> bool {
        self.exists() || self.outgoing.exists()
    }

    /// Makes the folder and takes it, and the VM's journal. Fails if the name is taken, by a living VM or by what is left of one,
    /// or if it is in doubt where the VM of that name is.
    pub fn claim(&self) -> Result<(VmLock, FileJournal)> {
        if let Some(parent) = self.path.parent() {
            make_dir(parent)?;
        }
        match fs::DirBuilder::new().mode(0o700).create(&self.path) {
            Ok(()) => {}
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
                let name = &self.name;
                if self.is_held()? {
                    bail!(
                        "the name {name} is taken by a running VM: choose another with --name, or: microvm stop {name}"
                    );
                }
                bail!(
                    "the name {name} is taken by a VM that has ended: microvm logs {name} shows its output, microvm rm {name} frees the name"
                );
            }
            Err(e) => return Err(e).with_context(|| format!("cannot make the folder {}", self.path.display())),
        }
        self.lock().and_then(|lock| Ok((lock, self.outgoing.take_over()?))).inspect_err(|_| {
            let _ = fs::remove_dir_all(&self.path);
        })
    }

    /// Takes the lock of a folder that was just made here: at most somebody who looks ([`Self::is_held`]) has it, for a moment.
    fn lock(&self) -> Result<VmLock> {
        let path = self.file("lock");
        let file = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .with_context(|| format!("cannot open {}", path.display()))?;
        file.lock().with_context(|| format!("cannot lock {}", path.display()))?;
        Ok(VmLock(file))
    }

    /// Whether a living process owns the VM. Looking leaves nothing behind: the folder may be being removed right now.
    pub fn is_held(&self) -> Result<bool> {
        let path = self.file("lock");
        let file = match File::options().write(true).open(&path) {
            Ok(file) => file,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(false),
            Err(e) => return Err(e).with_context(|| format!("cannot open {}", path.display())),
        };
        match file.try_lock_shared() {
            Ok(()) => Ok(false),
            Err(TryLockError::WouldBlock) => Ok(true),
            Err(TryLockError::Error(e)) => Err(e).with_context(|| format!("cannot lock {}", path.display())),
        }
    }

    /// Removes the folder and the VM's journal. For the VM's keeper, and for what a dead one left.
    ///
    /// Whoever looks meanwhile sees no half of it: the folder goes at once, and a journal that says where the VM is goes last.
    pub fn remove(&self) -> Result<()> {
        let tells = self.outgoing.says_released();
        if !tells {
            self.outgoing.remove()?;
        }
        let gone = self.path.with_file_name(format!(".{}-{}", self.name, std::process::id()));
        match fs::rename(&self.path, &gone).and_then(|()| fs::remove_dir_all(&gone)) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                return Err(e).with_context(|| format!("cannot remove {}", self.path.display()));
            }
            _ => {}
        }
        if tells { self.outgoing.remove() } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_are_no_folder_are_refused() {
        for name in ["web", "web-1", "a.b_c", "0"] {
            check_name(name).unwrap();
        }
        for name in ["", ".", "..", "-x", ".hidden", "a/b", "a b", "ü", &"x".repeat(41)] {
            assert!(check_name(name).is_err(), "{name}");
        }
    }

    #[test]
    fn looking_at_a_folder_does_not_keep_it_from_being_removed() {
        let root = tempfile::tempdir().unwrap();
        let runtime = Runtime { root: root.path().into(), journals: Journals::new(root.path().into()) };
        let vm = runtime.vm("web").unwrap();
        let over = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !over.load(std::sync::atomic::Ordering::Relaxed) {
                    let _ = vm.is_held().unwrap();
                }
            });
            for _ in 0..300 {
                let lock = vm.claim().unwrap();
                vm.remove().unwrap();
                assert!(!vm.exists());
                drop(lock);
            }
            over.store(true, std::sync::atomic::Ordering::Relaxed);
        });
    }

    #[test]
    fn a_name_is_taken_as_long_as_somebody_holds_it_and_until_its_rest_is_removed() {
        let root = tempfile::tempdir().unwrap();
        let runtime = Runtime { root: root.path().into(), journals: Journals::new(root.path().into()) };
        let vm = runtime.vm("web").unwrap();
        let (lock, _journal) = vm.claim().unwrap();
        assert!(vm.is_held().unwrap());
        assert!(vm.claim().unwrap_err().to_string().contains("running VM"));
        // As a process that was forked meanwhile has it.
        let copy = lock.0.try_clone().unwrap();
        lock.release();
        assert!(!vm.is_held().unwrap());
        drop(copy);
        assert!(vm.claim().unwrap_err().to_string().contains("microvm rm web"));
        vm.remove().unwrap();
        drop(vm.claim().unwrap());
        assert_eq!(runtime.vms().unwrap().iter().map(VmDir::name).collect::<Vec<_>>(), ["web"]);
    }
}
