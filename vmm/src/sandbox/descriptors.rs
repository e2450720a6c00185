//! Descriptors that nobody meant to hand on.
#![allow(unsafe_code)] // closes descriptors by number

use std::io;
use std::os::fd::RawFd;

/// Closes every descriptor from 3 on but `keep`: a process starts with whatever its starter forgot to mark, and a directory among
/// that would be a way out of the sandbox. To be called before the process opens anything.
pub fn close_all_but(keep: Option<RawFd>) -> io::Result<()> {
    let (first, last) = (3, u32::MAX);
    match keep.and_then(|fd| u32::try_from(fd).ok()).filter(|fd| *fd >= first) {
        None => close_range(first, last),
        Some(fd) => {
            if fd > first {
                close_range(first, fd - 1)?;
            }
            close_range(fd + 1, last)
        }
    }
}

fn close_range(first: u32, last: u32) -> io::Result<()> {
    // SAFETY: nothing in this process owns a descriptor of this range yet: see `close_all_but`.
    if unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) } == 0 {
        return Ok(());
    }
    match io::Error::last_os_error() {
        // Before Linux 5.9. Who starts us marks its own descriptors.
        error if error.raw_os_error() == Some(libc::ENOSYS) => Ok(()),
        error => Err(error),
    }
}
