//! The lists of [`super::calls`] as programs for the kernel.

use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, TargetArch, sock_filter};

use super::SandboxError;
use super::calls::ThreadKind;

/// One program a kind of thread.
pub(super) struct Filters(Vec<(ThreadKind, BpfProgram)>);

fn refused(error: impl std::error::Error + Send + Sync + 'static) -> SandboxError {
    SandboxError::Seccomp(Box::new(error))
}

/// What each program begins with: clone3 fails with ENOSYS, as in an old kernel. Its arguments lie in memory, where no filter sees
/// them; the C library then takes clone, which says in a register whether it makes a thread. (seccompiler knows one
/// outcome besides the default, so this is written out: load the number, compare, return.)
fn no_clone3() -> [sock_filter; 3] {
    let instruction = |code: u32, jt, jf, k| sock_filter { code: code as u16, jt, jf, k };
    let number = std::mem::offset_of!(libc::seccomp_data, nr) as u32;
    [
        instruction(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, number),
        instruction(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 0, 1, libc::SYS_clone3 as u32),
        instruction(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ERRNO | libc::ENOSYS as u32),
    ]
}

impl Filters {
    /// Compiles them all.
    pub(super) fn compile() -> Result<Self, SandboxError> {
        let program = |kind: ThreadKind| {
            // A trap, not the end at once: the handler says which call it was, and then ends the process (see `violation`).
            let (otherwise, matching) = (SeccompAction::Trap, SeccompAction::Allow);
            let filter = SeccompFilter::new(kind.calls().rules(), otherwise, matching, TargetArch::x86_64);
            let program = filter.and_then(BpfProgram::try_from).map_err(refused)?;
            Ok((kind, no_clone3().into_iter().chain(program).collect()))
        };
        ThreadKind::ALL.into_iter().map(program).collect::<Result<_, SandboxError>>().map(Filters)
    }

    /// Puts the calling thread under the filter of its kind.
    pub(super) fn install(&self, kind: ThreadKind) -> Result<(), SandboxError> {
        let (_, program) = self.0.iter().find(|(other, _)| *other == kind).expect("every kind has a program");
        seccompiler::apply_filter(program).map_err(refused)
    }
}
