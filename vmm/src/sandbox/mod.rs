//! The cage of a process that runs a guest: what such a process gives up before the guest's first instruction, so that whoever
//! breaks out of the guest finds little that is worth having.
//!
//! [`enter`] is called once, with everything open that the process will ever need, and while it has a single thread: resource
//! limits, a root directory with nothing in it, Landlock, no capabilities, a user of its own. Then each thread, at its start,
//! takes the system-call filter of its kind ([`confine`]). Filters only ever get tighter: a thread begins with the filters of
//! the thread that started it, so a thread that may do more than `main` is started before `main` confines itself.
//!
//! Nothing here knows whose process it is: paths and users are the caller's.

use std::path::Path;
use std::sync::OnceLock;

use serde::{Deserialize, Serialize};

mod calls;
mod descriptors;
mod filters;
mod landlock;
mod limits;
mod privileges;
pub mod violation;

pub use calls::ThreadKind;
pub use descriptors::close_all_but;
pub use landlock::abi as landlock_abi;
pub use privileges::{can_switch_user, keep_only_network_administration};

use filters::Filters;

/// The process cannot be caged as it must be.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// A step that no host refuses was refused.
    #[error("the sandbox cannot be entered: {step} failed (to run without one: --no-sandbox)")]
    Step {
        /// Which step.
        step: &'static str,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The kernel has no seccomp, or refuses the filters.
    #[error("this kernel takes no system-call filters (to run without a sandbox: --no-sandbox)")]
    Seccomp(#[source] Box<dyn std::error::Error + Send + Sync>),
}

fn step<E: Into<std::io::Error>>(step: &'static str) -> impl FnOnce(E) -> SandboxError {
    move |source| SandboxError::Step { step, source: source.into() }
}

/// What to give up, and for what.
#[derive(Debug, Clone, Copy)]
pub struct Settings<'a> {
    /// A user and group (one number) that nobody else has; taken if the process may change its user.
    pub user: u32,
    /// A directory with nothing in it, which becomes the root directory together with the change of user.
    pub root: &'a Path,
}

/// What holds a process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sandbox {
    /// System calls are filtered, thread by thread.
    pub seccomp: bool,
    /// The user and group of the process alone; `None`: it has that of whoever started it.
    pub user: Option<u32>,
    /// ABI version of Landlock; `None`: this kernel has none.
    pub landlock: Option<u32>,
    /// What could not be had here, and why: a sentence each.
    pub missing: Vec<String>,
}

impl Sandbox {
    /// No sandbox at all.
    pub fn off() -> Self {
        Sandbox { seccomp: false, user: None, landlock: None, missing: Vec::new() }
    }
}

/// The filters of this process; there are none without a sandbox, and in a process that is not a guest's.
static FILTERS: OnceLock<Filters> = OnceLock::new();

/// Gives up everything but the system calls, which each thread gives up by itself ([`confine`]). Takes what the host offers;
/// what it does not is in [`Sandbox::missing`]. To be called while the process has one thread: most of this is a thread's, and
/// is inherited.
pub fn enter(settings: &Settings<'_>) -> Result<Sandbox, SandboxError> {
    let mut missing = Vec::new();
    // Before the filters, which let nobody change the action of a signal.
    violation::install_handler().map_err(step("sigaction"))?;
    let filters = Filters::compile()?;
    let user = match can_switch_user() {
        Ok(()) => Some(settings.user),
        Err(why) => {
            missing.push(why);
            None
        }
    };
    limits::set(user.is_some()).map_err(step("setrlimit"))?;
    if user.is_some() {
        rustix::process::chroot(settings.root).map_err(step("chroot"))?;
        rustix::process::chdir("/").map_err(step("chdir"))?;
    }
    rustix::thread::set_no_new_privs(true).map_err(step("PR_SET_NO_NEW_PRIVS"))?;
    let landlock = landlock::restrict().map_err(|source| SandboxError::Step { step: "Landlock", source })?;
    if landlock.is_none() {
        missing.push("this kernel has no Landlock (in Linux since 5.13)".into());
    }
    privileges::drop_all(user)?;
    limits::tame_malloc();
    quiet_panics();
    FILTERS.set(filters).map_err(|_| step("entering it twice")(std::io::Error::other("it has been entered")))?;
    Ok(Sandbox { seccomp: true, user, landlock, missing })
}

/// Whether this kernel takes the filters: tries one, on a thread that then ends.
pub fn filters_work() -> Result<(), SandboxError> {
    let filters = Filters::compile()?;
    let tried = std::thread::spawn(move || filters.install(ThreadKind::Vcpu)).join();
    tried.unwrap_or_else(|_| Err(step("a thread")(std::io::Error::other("it panicked"))))
}

/// Confines the calling thread, and those that it starts from now on, to what its kind needs. Does nothing in a process that is
/// in no sandbox. A thread that cannot be confined must not go on, and ends the process.
pub fn confine(kind: ThreadKind) {
    let Some(filters) = FILTERS.get() else { return };
    if let Err(error) = filters.install(kind) {
        tracing::error!(%error, kind = kind.name(), "a thread cannot be confined");
        std::process::abort();
    }
}

/// A thread that panics says why, as ever, but without a backtrace: for that files are opened.
fn quiet_panics() {
    std::panic::set_hook(Box::new(|info| {
        let thread = std::thread::current();
        tracing::error!("thread {} panicked: {info}", thread.name().unwrap_or("without a name"));
    }));
}
