//! A guest that has broken out, as the kernel sees it: any system call, on a thread of a real process of one's choice.
//!
//! The thread is stopped by ptrace where it waits in the kernel, just behind a SYSCALL instruction. It is made to run that
//! instruction once more with other registers; then it is put back, and goes on. The program under test knows nothing of it, and is the one
//! that users have.
#![allow(unsafe_code)] // ptrace(2), and registers of another process

use std::io;
use std::ptr;

/// What became of a system call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// It returned this; a negative number is an error's.
    Returned(i64),
    /// It was not made: the filter raised SIGSYS.
    Trapped,
}

/// A stopped thread.
pub struct Thread {
    tid: libc::pid_t,
    before: libc::user_regs_struct,
}

fn check(done: i64) -> io::Result<()> {
    if done == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// The threads of a process: number and name.
pub fn threads(pid: i64) -> Vec<(i32, String)> {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let name = |tid: i32| std::fs::read_to_string(format!("/proc/{pid}/task/{tid}/comm")).ok();
    let all = tasks.filter_map(|task| task.file_name().into_string().ok()?.parse().ok());
    all.filter_map(|tid| Some((tid, name(tid)?.trim().to_string()))).collect()
}

impl Thread {
    /// Stops it in a system call that waits.
    pub fn stop(tid: i32) -> Self {
        loop {
            // SAFETY: ptrace changes another process, not this one; so everywhere below.
            unsafe {
                check(libc::ptrace(libc::PTRACE_SEIZE, tid, 0, 0)).unwrap();
                check(libc::ptrace(libc::PTRACE_INTERRUPT, tid, 0, 0)).unwrap();
            }
            let mut thread = Thread { tid, before: registers() };
            thread.wait();
            thread.before = thread.get();
            if thread.before.orig_rax != u64::MAX && thread.peek(thread.before.rip - 2) & 0xffff == 0x050f {
                return thread;
            }
            drop(thread);
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
    }

    /// Makes a system call there. `text` is put into its memory, where the argument [`TEXT`] points.
    pub fn call(&mut self, number: i64, arguments: [u64; 6], text: &str) -> Outcome {
        let below = (self.before.rsp - 2048) & !7;
        for (at, word) in (0..).step_by(8).zip(text.bytes().chain([0; 8]).collect::<Vec<_>>().chunks_exact(8)) {
            let word = i64::from_ne_bytes(word.try_into().unwrap());
            // SAFETY: see `stop`.
            unsafe { check(libc::ptrace(libc::PTRACE_POKEDATA, self.tid, below + at, word)).unwrap() };
        }
        let [rdi, rsi, rdx, r10, r8, r9] = arguments.map(|argument| if argument == TEXT { below } else { argument });
        let rax = number.cast_unsigned();
        let rip = self.before.rip - 2;
        self.set(libc::user_regs_struct { rip, rax, rdi, rsi, rdx, r10, r8, r9, orig_rax: u64::MAX, ..self.before });
        let outcome = loop {
            // SAFETY: see `stop`.
            unsafe { check(libc::ptrace(libc::PTRACE_SINGLESTEP, self.tid, 0, 0)).unwrap() };
            match self.wait() {
                libc::SIGSYS => break Outcome::Trapped,
                // The end of a step that was trapped comes late.
                libc::SIGTRAP if self.get().rip == rip => {}
                libc::SIGTRAP => break Outcome::Returned(self.get().rax.cast_signed()),
                signal => panic!("signal {signal}"),
            }
        };
        self.set(self.before);
        outcome
    }

    /// Lets it make a system call with nobody watching.
    pub fn let_it_call(self, number: i64) {
        self.set(libc::user_regs_struct {
            rip: self.before.rip - 2,
            rax: number.cast_unsigned(),
            orig_rax: u64::MAX,
            ..self.before
        });
    }

    fn get(&self) -> libc::user_regs_struct {
        let mut registers = registers();
        // SAFETY: the kernel writes a whole `user_regs_struct`.
        unsafe { check(libc::ptrace(libc::PTRACE_GETREGS, self.tid, 0, &raw mut registers)).unwrap() };
        registers
    }

    fn set(&self, registers: libc::user_regs_struct) {
        // SAFETY: the kernel reads a whole `user_regs_struct`.
        unsafe { check(libc::ptrace(libc::PTRACE_SETREGS, self.tid, 0, &raw const registers)).unwrap() };
    }

    fn peek(&self, address: u64) -> i64 {
        // SAFETY: see `stop`.
        unsafe { libc::ptrace(libc::PTRACE_PEEKTEXT, self.tid, address, 0) }
    }

    /// Until it stops; the signal that it stops for.
    fn wait(&self) -> i32 {
        let mut status = 0;
        // SAFETY: the kernel writes an int.
        let waited = unsafe { libc::waitpid(self.tid, ptr::from_mut(&mut status), libc::__WALL) };
        assert_eq!(waited, self.tid, "{}", io::Error::last_os_error());
        assert!(libc::WIFSTOPPED(status), "it has ended: {status:#x}");
        libc::WSTOPSIG(status)
    }
}

impl Drop for Thread {
    fn drop(&mut self) {
        // SAFETY: see `stop`. It may have ended.
        unsafe { libc::ptrace(libc::PTRACE_DETACH, self.tid, 0, 0) };
    }
}

/// Stands for the address of the text.
pub const TEXT: u64 = 0x7e47_7e47_7e47_7e47;

fn registers() -> libc::user_regs_struct {
    // SAFETY: all zero is a valid set of registers.
    unsafe { std::mem::zeroed() }
}
