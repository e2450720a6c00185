//! A system call that is not allowed ends the process, and it is said which one it was.
//!
//! The filters raise SIGSYS, whose handler writes a line into the log and a number into memory that is shared with whoever
//! waits for the process. Then it makes a second such call; the handler is gone by then, and the kernel ends the process as it
//! would have without one. Nobody can install another handler: the filters do not let them.
#![allow(unsafe_code)] // a signal handler, and memory that two processes share

use std::io;
use std::ptr;
use std::sync::atomic::{AtomicPtr, AtomicU32, AtomicU64, Ordering};

use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous};

/// Memory that a process shares with those that it forks: the call that ended one of them.
#[derive(Debug, Clone, Copy)]
pub struct Shared(&'static Noted);

/// A call that was not allowed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Violation {
    /// The number of the system call (`ausyscall NUMBER` tells its name).
    pub syscall: u32,
    /// The name of the thread that made it.
    pub thread: String,
}

/// A thread's name, with the zero at its end.
const NAME_BYTES: usize = 16;

/// All zero: nothing.
#[derive(Debug)]
struct Noted {
    present: AtomicU32,
    syscall: AtomicU32,
    thread: [AtomicU64; NAME_BYTES / 8],
}

/// Where the handler notes it.
static NOTED: AtomicPtr<Noted> = AtomicPtr::new(ptr::null_mut());

impl Shared {
    /// Before the fork.
    pub fn new() -> io::Result<Self> {
        // SAFETY: a new mapping, as long as the process lives.
        let page = unsafe {
            mmap_anonymous(ptr::null_mut(), size_of::<Noted>(), ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED)?
        };
        // SAFETY: a page is aligned and long enough, and all zero is valid for atomics, which is all that is in there.
        Ok(Shared(unsafe { &*page.cast::<Noted>() }))
    }

    /// After the fork, in the process that will be caged.
    pub fn note_here(self) {
        NOTED.store(ptr::from_ref(self.0).cast_mut(), Ordering::SeqCst);
    }

    /// After the fork, in the other one, when the process has ended by SIGSYS. The process could have written anything.
    pub fn read(self) -> Option<Violation> {
        let Noted { present, syscall, thread } = self.0;
        let name: Vec<u8> = thread.iter().flat_map(|word| word.load(Ordering::SeqCst).to_ne_bytes()).collect();
        let printable = name.iter().take_while(|byte| byte.is_ascii_graphic());
        (present.load(Ordering::SeqCst) != 0).then(|| Violation {
            syscall: syscall.load(Ordering::SeqCst),
            thread: printable.map(|byte| char::from(*byte)).collect(),
        })
    }
}

pub(super) fn install_handler() -> io::Result<()> {
    // SAFETY: an all-zero sigaction is valid; the handler does what is allowed in one, see there.
    let done = unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        let handler: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) = on_sigsys;
        action.sa_sigaction = handler as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_RESETHAND;
        libc::sigaction(libc::SIGSYS, &raw const action, ptr::null_mut())
    };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Only memory of its own, atomics, and write(2): async-signal-safe.
extern "C" fn on_sigsys(_signal: libc::c_int, info: *mut libc::siginfo_t, _context: *mut libc::c_void) {
    /// `si_syscall` of `siginfo_t` on x86-64: after signo, errno, code, padding and `si_call_addr`. Not in libc.
    const SYSCALL_AT: usize = 24;
    // SAFETY: the kernel gives a whole siginfo_t for SIGSYS.
    let syscall = unsafe { info.byte_add(SYSCALL_AT).cast::<u32>().read() };
    let mut name = [0_u8; NAME_BYTES];
    // SAFETY: PR_GET_NAME writes so many bytes at most.
    unsafe { libc::prctl(libc::PR_GET_NAME, name.as_mut_ptr()) };
    let noted = NOTED.load(Ordering::SeqCst);
    if !noted.is_null() {
        // SAFETY: set by `note_here`, from a reference that lives as long as the process.
        let noted = unsafe { &*noted };
        noted.syscall.store(syscall, Ordering::SeqCst);
        for (word, bytes) in noted.thread.iter().zip(name.as_chunks().0) {
            word.store(u64::from_ne_bytes(*bytes), Ordering::SeqCst);
        }
        noted.present.store(1, Ordering::SeqCst);
    }
    let mut line = Line { bytes: [0; 128], used: 0 };
    line.add(b"ERROR the sandbox ends this process: the thread ");
    line.add(name.split(|byte| *byte == 0).next().unwrap_or_default());
    line.add(b" made system call ");
    line.add_number(syscall);
    line.add(b", which it may not\n");
    // SAFETY: write(2) of bytes of ours.
    unsafe { libc::write(libc::STDERR_FILENO, line.bytes.as_ptr().cast(), line.used) };
    loop {
        // SAFETY: getppid(2) changes nothing; it is in no list, and so the end.
        unsafe { libc::syscall(libc::SYS_getppid) };
    }
}

/// Text without an allocator.
struct Line {
    bytes: [u8; 128],
    used: usize,
}

impl Line {
    fn add(&mut self, text: &[u8]) {
        for (to, from) in self.bytes[self.used..].iter_mut().zip(text) {
            *to = *from;
            self.used += 1;
        }
    }

    fn add_number(&mut self, mut number: u32) {
        let mut digits = [0; 10];
        let mut first = digits.len();
        loop {
            first -= 1;
            digits[first] = b'0' + (number % 10) as u8;
            number /= 10;
            if number == 0 {
                break;
            }
        }
        self.add(&digits[first..]);
    }
}
