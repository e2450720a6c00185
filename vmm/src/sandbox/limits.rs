//! Limits on what a process can use up.
#![allow(unsafe_code)] // mallopt(3) and signal(2) have no safe wrapper

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// A regular file may grow to so many bytes: the console's log ends far below, and the messages of a process that goes mad do
/// not fill the disk.
const FILE_BYTES: u64 = 64 << 20;
/// Open files: the largest VM has some three hundred, clients a few each.
const FILES: u64 = 1024;
/// Threads of the user, where the process has one of its own: 64 vCPUs, and a few for each client and stream.
const THREADS: u64 = 512;

/// Sets them, hard and soft. None is above what it was.
pub(super) fn set(own_user: bool) -> rustix::io::Result<()> {
    let limits = [(Resource::Core, 0), (Resource::Fsize, FILE_BYTES), (Resource::Nofile, FILES)];
    for (resource, limit) in limits.into_iter().chain(own_user.then_some((Resource::Nproc, THREADS))) {
        let limit = Some(getrlimit(resource).maximum.map_or(limit, |maximum| maximum.min(limit)));
        setrlimit(resource, Rlimit { current: limit, maximum: limit })?;
    }
    // A file that is too long is an error of the write, and not the end.
    // SAFETY: ignoring a signal runs no code of ours.
    unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };
    Ok(())
}

/// glibc opens a file before it gives back memory of any heap but the first (overcommit_memory), and in old versions to learn how
/// many heaps are good. With one heap it never does; nothing here is so busy with memory that it would want more.
pub(super) fn tame_malloc() {
    const HEAPS: libc::c_int = 1;
    #[cfg(target_env = "gnu")]
    // SAFETY: a number for the allocator, which reads it under its own lock.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, HEAPS)
    };
}
