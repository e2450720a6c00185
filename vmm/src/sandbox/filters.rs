//! The lists of [`super::calls`] as programs for the kernel.

use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, TargetArch};

use super::SandboxError;
use super::calls::ThreadKind;

/// One program a kind of thread, and one that is every thread's.
pub(super) struct Filters {
    kinds: Vec<(ThreadKind, BpfProgram)>,
    no_clone3: BpfProgram,
}

fn refused(error: impl std::error::Error + Send + Sync + 'static) -> SandboxError {
    SandboxError::Seccomp(Box::new(error))
}

impl Filters {
    /// Compiles them all.
    pub(super) fn compile() -> Result<Self, SandboxError> {
        let program = |rules, otherwise, matching| -> Result<BpfProgram, SandboxError> {
            let filter = SeccompFilter::new(rules, otherwise, matching, TargetArch::x86_64);
            filter.and_then(BpfProgram::try_from).map_err(refused)
        };
        // A trap, not the end at once: the handler says which call it was, and then ends the process (see `violation`).
        let kind =
            |kind: ThreadKind| Ok((kind, program(kind.calls().rules(), SeccompAction::Trap, SeccompAction::Allow)?));
        let clone3 = [(libc::SYS_clone3, Vec::new())].into();
        Ok(Filters {
            kinds: ThreadKind::ALL.into_iter().map(kind).collect::<Result<_, SandboxError>>()?,
            no_clone3: program(clone3, SeccompAction::Allow, SeccompAction::Errno(libc::ENOSYS as u32))?,
        })
    }

    /// Puts the calling thread under the filter of its kind.
    pub(super) fn install(&self, kind: ThreadKind) -> Result<(), SandboxError> {
        let (_, program) = self.kinds.iter().find(|(other, _)| *other == kind).expect("every kind has a program");
        // The threads that these start inherit it.
        if matches!(kind, ThreadKind::Main | ThreadKind::Migration) {
            seccompiler::apply_filter(&self.no_clone3).map_err(refused)?;
        }
        seccompiler::apply_filter(program).map_err(refused)
    }
}
