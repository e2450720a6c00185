//! Which system calls each kind of thread makes: the list that docs/sandbox.md shows.
//!
//! No thread opens a file, starts a program, changes its user, signals another process, or makes memory executable. What the C
//! library calls by itself differs by version, so [`common`] has more than any one version makes.

use std::collections::BTreeMap;

#[allow(clippy::wildcard_imports)] // it is a list of libc's names
use libc::*;
use seccompiler::{SeccompCmpArgLen as Len, SeccompCmpOp as Op, SeccompCondition, SeccompRule};

/// What a thread is for; each kind has its own filter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum ThreadKind {
    /// Starts all others but `Migration`; takes in a VM that comes from another host.
    Main,
    /// Runs a vCPU.
    Vcpu,
    /// Serves virtio devices and their TAPs.
    Devices,
    /// Moves what the guest says to the log and to clients, and what they type to the guest.
    Console,
    /// Answers the control socket.
    Control,
    /// Moves the VM to another host.
    Migration,
}

impl ThreadKind {
    /// All of them.
    pub const ALL: [Self; 6] = [Self::Main, Self::Vcpu, Self::Devices, Self::Console, Self::Control, Self::Migration];

    /// One word.
    pub fn name(self) -> &'static str {
        match self {
            Self::Main => "main",
            Self::Vcpu => "vcpu",
            Self::Devices => "devices",
            Self::Console => "console",
            Self::Control => "control",
            Self::Migration => "migration",
        }
    }

    /// What it may call.
    pub fn calls(self) -> Calls {
        let mut calls = Calls::default();
        common(&mut calls);
        for more in self.more() {
            more(&mut calls);
        }
        calls
    }

    fn more(self) -> &'static [fn(&mut Calls)] {
        match self {
            Self::Vcpu => &[vcpu],
            Self::Devices => &[devices],
            Self::Console => &[sockets, accept, threads, log],
            Self::Control => &[sockets, accept, threads, machine],
            Self::Migration => &[sockets, dial, threads, machine, files, manners],
            // A thread begins with the filter of the one that started it: these are those of all that it starts, and its own.
            Self::Main => &[vcpu, devices, sockets, accept, threads, log, machine, files, build],
        }
    }
}

/// System calls that are allowed.
#[derive(Debug, Clone, Default)]
pub struct Calls(BTreeMap<i64, Call>);

/// A call, and with which arguments.
#[derive(Debug, Clone)]
struct Call {
    /// For the page (see the tests).
    #[cfg_attr(not(test), allow(dead_code))]
    name: &'static str,
    /// In words; empty: with all.
    only: Vec<&'static str>,
    rules: Vec<SeccompRule>,
}

/// `SYS_read` as its name and its number.
macro_rules! named {
    ($($call:ident)+) => { [$((stringify!($call), $call)),+] };
}

impl Calls {
    /// Allows calls whatever their arguments.
    fn allow(&mut self, calls: &[(&'static str, c_long)]) {
        for (name, number) in calls {
            let call = Call { name: name.trim_start_matches("SYS_"), only: Vec::new(), rules: Vec::new() };
            self.0.insert(*number, call);
        }
    }

    /// Allows a call if all `conditions` are met, which `words` says; besides what is allowed of it already.
    fn allow_if<const N: usize>(
        &mut self,
        [(name, number)]: [(&'static str, c_long); 1],
        words: &'static str,
        conditions: [Condition; N],
    ) {
        let condition = |Condition(argument, length, comparison, value)| {
            SeccompCondition::new(argument, length, comparison, value).expect("arguments have numbers from 0 to 5")
        };
        let rule = SeccompRule::new(conditions.into_iter().map(condition).collect()).expect("there is a condition");
        let name = name.trim_start_matches("SYS_");
        let new = !self.0.contains_key(&number);
        let call = self.0.entry(number).or_insert(Call { name, only: Vec::new(), rules: Vec::new() });
        // A call without conditions is allowed whatever its arguments, and stays so.
        if new || !call.only.is_empty() && !call.only.contains(&words) {
            call.only.push(words);
            call.rules.push(rule);
        }
    }

    /// As seccompiler wants them.
    pub(super) fn rules(self) -> BTreeMap<i64, Vec<SeccompRule>> {
        self.0.into_iter().map(|(number, call)| (number, call.rules)).collect()
    }
}

/// A comparison of one argument.
struct Condition(u8, Len, Op, u64);

/// The argument, an int, is `value`.
fn is(argument: u8, value: c_int) -> Condition {
    Condition(argument, Len::Dword, Op::Eq, value.cast_unsigned().into())
}

/// Of the bits of `mask` the argument, an int, has those of `value`.
fn has(argument: u8, mask: c_int, value: c_int) -> Condition {
    Condition(argument, Len::Dword, Op::MaskedEq(mask.cast_unsigned().into()), value.cast_unsigned().into())
}

/// The ioctl is `request`. The kernel takes an unsigned int.
fn request(request: u64) -> [Condition; 1] {
    [Condition(1, Len::Dword, Op::Eq, request)]
}

/// Memory, locks, time, the thread's own end: whatever a thread does, and the C library for it.
fn common(calls: &mut Calls) {
    calls.allow(&named![
        SYS_read SYS_write SYS_close SYS_futex SYS_munmap SYS_mremap SYS_madvise SYS_brk
        SYS_clock_gettime SYS_gettimeofday SYS_clock_nanosleep SYS_nanosleep SYS_restart_syscall
        SYS_sched_yield SYS_sched_getaffinity SYS_getrandom
        SYS_gettid SYS_getpid SYS_set_robust_list SYS_rseq SYS_sigaltstack SYS_rt_sigprocmask SYS_rt_sigreturn
        SYS_exit SYS_exit_group
    ]);
    calls.allow_if(named![SYS_mmap], "not executable", [has(2, PROT_EXEC, 0)]);
    calls.allow_if(named![SYS_mprotect], "not executable", [has(2, PROT_EXEC, 0)]);
    calls.allow_if(named![SYS_prctl], "PR_SET_NAME", [is(0, PR_SET_NAME)]);
    calls.allow_if(named![SYS_prctl], "PR_GET_NAME", [is(0, PR_GET_NAME)]);
    calls.allow_if(named![SYS_prctl], "PR_SET_VMA", [is(0, PR_SET_VMA)]);
    calls.allow_if(named![SYS_tgkill], "to itself", [is(0, std::process::id().cast_signed())]);
    // The last acts of a process that dies by a bug: Rust's handler of segmentation faults, and abort(3).
    for (signal, words) in [(SIGSEGV, "SIGSEGV"), (SIGBUS, "SIGBUS"), (SIGABRT, "SIGABRT")] {
        calls.allow_if(named![SYS_rt_sigaction], words, [is(0, signal)]);
    }
    for (command, words) in
        [(F_GETFD, "F_GETFD"), (F_DUPFD_CLOEXEC, "F_DUPFD_CLOEXEC"), (F_GETFL, "F_GETFL"), (F_SETFL, "F_SETFL")]
    {
        calls.allow_if(named![SYS_fcntl], words, [is(1, command)]);
    }
}

/// KVM_RUN is compared first: it is the one that counts.
fn vcpu(calls: &mut Calls) {
    calls.allow_if(named![SYS_ioctl], "KVM_RUN", request(0xae80));
    calls.allow_if(named![SYS_ioctl], "KVM_GET_REGS", request(0x8090_ae81));
    offloads(calls);
}

fn devices(calls: &mut Calls) {
    calls.allow(&named![SYS_readv SYS_writev SYS_epoll_wait SYS_epoll_pwait SYS_epoll_pwait2 SYS_epoll_ctl]);
    offloads(calls);
}

/// The guest's driver says which offloads it knows, by registers or by its control queue.
fn offloads(calls: &mut Calls) {
    calls.allow_if(named![SYS_ioctl], "TUNSETOFFLOAD", request(TUNSETOFFLOAD));
}

/// What is done with connected sockets.
fn sockets(calls: &mut Calls) {
    calls.allow(&named![
        SYS_recvfrom SYS_recvmsg SYS_sendto SYS_sendmsg SYS_readv SYS_writev SYS_poll SYS_ppoll SYS_shutdown
        SYS_setsockopt SYS_getsockopt SYS_getsockname SYS_getpeername
    ]);
    calls.allow_if(named![SYS_ioctl], "FIONBIO", request(FIONBIO));
}

fn accept(calls: &mut Calls) {
    calls.allow(&named![SYS_accept4]);
}

fn dial(calls: &mut Calls) {
    calls.allow(&named![SYS_connect]);
    for (family, words) in [(AF_INET, "TCP over IPv4"), (AF_INET6, "TCP over IPv6")] {
        calls.allow_if(named![SYS_socket], words, [is(0, family), has(1, 0xf, SOCK_STREAM)]);
    }
}

/// Starting a thread, and nothing else. (clone3 fails in all filters: see [`super::filters`].)
fn threads(calls: &mut Calls) {
    let thread = CLONE_VM | CLONE_SIGHAND | CLONE_THREAD;
    calls.allow_if(named![SYS_clone], "threads", [has(0, thread, thread)]);
}

/// Reading and writing open files.
fn files(calls: &mut Calls) {
    calls.allow(&named![SYS_pread64 SYS_lseek SYS_fstat SYS_fdatasync SYS_fsync SYS_ftruncate]);
    calls.allow_if(named![SYS_statx], "of a descriptor", [has(2, AT_EMPTY_PATH, AT_EMPTY_PATH)]);
    calls.allow_if(named![SYS_newfstatat], "of a descriptor", [has(3, AT_EMPTY_PATH, AT_EMPTY_PATH)]);
}

/// Letting others go first. (Nobody who has no capabilities can do the opposite.)
fn manners(calls: &mut Calls) {
    calls.allow_if(named![SYS_setpriority], "its own", [is(0, PRIO_PROCESS as c_int), is(1, 0)]);
}

/// The console's log begins anew when it is long: its bytes go over to a second file.
fn log(calls: &mut Calls) {
    files(calls);
    calls.allow(&named![SYS_copy_file_range SYS_sendfile SYS_splice]);
}

/// A VM's state, its dirty log, its pauses; what the host is, and how much memory it has left.
fn machine(calls: &mut Calls) {
    calls.allow_if(named![SYS_ioctl], "KVM's", [has(1, 0xff00, 0xae00)]);
    calls.allow(&named![SYS_uname SYS_pread64]);
}

/// Making a VM: at the start, and at each reboot. Its threads begin with this filter and take a tighter one.
fn build(calls: &mut Calls) {
    calls.allow(&named![SYS_eventfd2 SYS_epoll_create1]);
    calls.allow_if(named![SYS_prctl], "PR_SET_NO_NEW_PRIVS", [is(0, PR_SET_NO_NEW_PRIVS)]);
    calls.allow_if(named![SYS_seccomp], "one filter more", [is(0, SECCOMP_SET_MODE_FILTER as c_int)]);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The calls of `calls` that `without` does not have, in alphabetical order, with their conditions in words.
    fn in_words(calls: &Calls, without: &Calls) -> String {
        let mut all = Vec::new();
        for (number, call) in &calls.0 {
            let there = without.0.get(number).map(|call| call.only.as_slice());
            let more: Vec<_> =
                call.only.iter().filter(|words| there.is_none_or(|there| !there.contains(words))).collect();
            match (there, more.as_slice()) {
                (None, []) => all.push(call.name.to_string()),
                (Some(_), []) => {}
                (_, more) => {
                    all.push(format!("{} ({})", call.name, more.iter().map(|w| **w).collect::<Vec<_>>().join(", ")));
                }
            }
        }
        all.sort();
        all.join(", ")
    }

    #[test]
    fn the_page_has_the_lists() {
        let page = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/sandbox.md")).unwrap();
        let mut every = Calls::default();
        common(&mut every);
        let mut rows = vec![format!("| every kind | {} |", in_words(&every, &Calls::default()))];
        for kind in ThreadKind::ALL {
            rows.push(format!("| `{}` | {} |", kind.name(), in_words(&kind.calls(), &every)));
        }
        let missing: Vec<_> = rows.iter().filter(|row| !page.contains(row.as_str())).collect();
        assert!(missing.is_empty(), "docs/sandbox.md has to say:\n{}", rows.join("\n"));
    }

    #[test]
    fn a_thread_has_what_those_have_that_it_starts() {
        for started in ThreadKind::ALL.into_iter().filter(|kind| *kind != ThreadKind::Migration) {
            assert_eq!(in_words(&started.calls(), &ThreadKind::Main.calls()), "", "{}", started.name());
        }
        assert!(in_words(&ThreadKind::Migration.calls(), &ThreadKind::Main.calls()).contains("connect"));
    }

    #[test]
    fn what_is_allowed_in_any_case_stays_so() {
        let mut calls = Calls::default();
        calls.allow(&named![SYS_ioctl]);
        calls.allow_if(named![SYS_ioctl], "KVM_RUN", request(0xae80));
        assert_eq!(in_words(&calls, &Calls::default()), "ioctl");
        assert!(calls.rules()[&SYS_ioctl].is_empty());
    }
}
