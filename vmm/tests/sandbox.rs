//! The walls of the sandbox, one without the others: each must hold by itself.
#![allow(unsafe_code)] // fork(2), and what a caged process tries
#![allow(clippy::unwrap_used)] // Clippy's exception for tests does not reach their helpers.

use std::ffi::CString;
use std::io;
use std::os::unix::fs::PermissionsExt;

use vmm::sandbox::violation::Shared;
use vmm::sandbox::{self, Sandbox, Settings, ThreadKind};

const USER: u32 = 0x7000_0000 + 4_194_305; // above any process's number

/// Runs `action` in a process of its own: its exit code, or the negative number of the signal that ended it.
fn in_a_process(action: impl FnOnce() -> i32) -> i32 {
    // SAFETY: the tests of this file run one after the other (see `alone`), and the harness's own thread waits for them: nobody
    // holds a lock that the child needs.
    let pid = unsafe { libc::fork() };
    assert!(pid >= 0, "{}", io::Error::last_os_error());
    if pid == 0 {
        let code = action();
        // SAFETY: ends the process and nothing else.
        unsafe { libc::_exit(code) };
    }
    let mut status = 0;
    // SAFETY: the kernel writes an int.
    assert_eq!(unsafe { libc::waitpid(pid, &raw mut status, 0) }, pid);
    if libc::WIFSIGNALED(status) { -libc::WTERMSIG(status) } else { libc::WEXITSTATUS(status) }
}

static ALONE: std::sync::Mutex<()> = std::sync::Mutex::new(());

fn alone() -> std::sync::MutexGuard<'static, ()> {
    ALONE.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

fn enter(root: &tempfile::TempDir) -> Sandbox {
    sandbox::enter(&Settings { user: USER, root: root.path() }).unwrap()
}

fn empty_root() -> tempfile::TempDir {
    let root = tempfile::tempdir().unwrap();
    std::fs::set_permissions(root.path(), std::fs::Permissions::from_mode(0o555)).unwrap();
    root
}

/// The error number of a call, 0 if it went through.
fn errno(returned: i64) -> i32 {
    if returned < 0 { io::Error::last_os_error().raw_os_error().unwrap_or(-1) } else { 0 }
}

#[test]
fn without_filters_the_user_and_the_root_directory_and_landlock_still_hold() {
    let _alone = alone();
    if let Err(why) = sandbox::can_switch_user() {
        return eprintln!("skipped: {why}");
    }
    let (root, outside) = (empty_root(), tempfile::NamedTempFile::new().unwrap());
    let (parent, listener) = (std::process::id() as i32, std::net::TcpListener::bind("127.0.0.1:0").unwrap());
    let outside = CString::new(outside.path().to_str().unwrap()).unwrap();
    let tried = in_a_process(|| {
        let sandbox = enter(&root);
        let landlock = sandbox.landlock.is_some();
        // SAFETY: plain system calls with valid strings and numbers.
        let tries = unsafe {
            [
                (errno(libc::open(c"/etc/passwd".as_ptr(), libc::O_RDONLY).into()), libc::ENOENT),
                (errno(libc::open(outside.as_ptr(), libc::O_RDONLY).into()), libc::ENOENT),
                (errno(libc::open(c"/".as_ptr(), libc::O_RDONLY).into()), if landlock { libc::EACCES } else { 0 }),
                (errno(libc::open(c"/new".as_ptr(), libc::O_CREAT | libc::O_WRONLY, 0o600).into()), libc::EACCES),
                (errno(libc::mkdir(c"/new".as_ptr(), 0o700).into()), libc::EACCES),
                (errno(libc::kill(parent, 0).into()), libc::EPERM),
                (errno(libc::chroot(c"/".as_ptr()).into()), libc::EPERM),
                (errno(libc::setuid(0).into()), libc::EPERM),
                (errno(libc::getuid().into()), 0),
                (if libc::getuid() == USER && libc::getgid() == USER { 0 } else { 1 }, 0),
                (libc::prctl(libc::PR_GET_DUMPABLE), 0),
                (libc::prctl(libc::PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0), 1),
                (i32::from(std::net::TcpListener::bind("127.0.0.1:0").is_err()), i32::from(landlock)),
                (i32::from(listener.local_addr().is_err()), 0),
            ]
        };
        // The number of the first that differs, counted from 1.
        tries.iter().position(|(is, expected)| is != expected).map_or(0, |n| n as i32 + 1)
    });
    assert_eq!(tried, 0, "which of the tries went otherwise, counted from 1");
}

#[test]
fn filters_alone_end_a_process_that_makes_another_call_and_it_is_known_which() {
    let _alone = alone();
    for kind in ThreadKind::ALL {
        let (root, shared) = (empty_root(), Shared::new().unwrap());
        let ended = in_a_process(|| {
            shared.note_here();
            enter(&root);
            let name = CString::new(kind.name()).unwrap();
            // SAFETY: a valid name.
            unsafe { libc::prctl(libc::PR_SET_NAME, name.as_ptr()) };
            sandbox::confine(kind);
            // SAFETY: it is not allowed, and a null pointer in any case.
            unsafe { libc::syscall(libc::SYS_openat, libc::AT_FDCWD, std::ptr::null::<u8>(), 0) };
            0
        });
        assert_eq!(ended, -libc::SIGSYS, "{}", kind.name());
        let violation = shared.read().unwrap();
        assert_eq!((i64::from(violation.syscall), violation.thread.as_str()), (libc::SYS_openat, kind.name()));
    }
}

#[test]
fn a_thread_that_panics_ends_by_itself_and_the_others_go_on() {
    let _alone = alone();
    for kind in [ThreadKind::Vcpu, ThreadKind::Devices, ThreadKind::Console, ThreadKind::Control] {
        let root = empty_root();
        let ended = in_a_process(|| {
            // SAFETY: no other thread of this process reads the environment.
            unsafe { std::env::set_var("RUST_BACKTRACE", "1") };
            enter(&root);
            sandbox::confine(ThreadKind::Main);
            let thread = std::thread::spawn(move || {
                sandbox::confine(kind);
                let empty: Vec<u8> = Vec::new();
                std::hint::black_box(&empty)[std::hint::black_box(3)]
            });
            i32::from(thread.join().is_ok())
        });
        assert_eq!(ended, 0, "{}", kind.name());
    }
}

/// Prints what it costs as well: `MICROVM_ENTRIES=20000 cargo test --release -p vmm --test sandbox enters -- --nocapture` has the
/// figures in docs/sandbox.md.
#[test]
fn a_vcpu_enters_its_guest_under_the_filters() {
    let _alone = alone();
    let (entries, repeat) = match std::env::var("MICROVM_ENTRIES") {
        Ok(entries) => (entries.parse().unwrap(), 10),
        Err(_) => (100, 1),
    };
    for caged in [false, true].repeat(repeat) {
        let root = empty_root();
        in_a_process(|| {
            let host = vmm::host::Host::open().unwrap();
            let vm = host.kvm.create_vm().unwrap();
            let mut vcpu = vm.create_vcpu(0).unwrap();
            if caged {
                enter(&root);
                sandbox::confine(ThreadKind::Main);
                sandbox::confine(ThreadKind::Vcpu);
            }
            let per_call = |count: u32, call: &mut dyn FnMut()| {
                let begin = std::time::Instant::now();
                (0..count).for_each(|_| call());
                begin.elapsed() / count
            };
            let run = per_call(entries, &mut || {
                vcpu.set_kvm_immediate_exit(1);
                assert_eq!(vcpu.run().unwrap_err().errno(), libc::EINTR);
            });
            // SAFETY: there is no such descriptor.
            let none = per_call(entries * 100, &mut || unsafe {
                libc::ioctl(-1, 0xae80);
            });
            let how = if caged { "with" } else { "without" };
            println!("{how} filters: KVM_RUN that returns at once {run:?}, the same on no descriptor {none:?}");
            0
        });
    }
}
