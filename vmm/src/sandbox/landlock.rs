//! Landlock: no file, no TCP port to listen on, no abstract socket and no process outside can be reached any more. What is open
//! stays open.
#![allow(unsafe_code)] // the crate does not tell the kernel's version of Landlock

use std::io;
use std::ptr;

use landlock::{ABI, Access, AccessFs, AccessNet, Ruleset, RulesetAttr, RulesetStatus, Scope};

/// The newest that this knows; an older kernel does what it can.
const NEWEST: ABI = ABI::V6;

/// The version of the kernel's Landlock, if it has one that is switched on.
pub fn abi() -> Option<u32> {
    /// `LANDLOCK_CREATE_RULESET_VERSION` of linux/landlock.h.
    const VERSION: u32 = 1;
    // SAFETY: asks for the version only; no memory is read or written.
    let version =
        unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, ptr::null::<libc::c_void>(), 0_usize, VERSION) };
    u32::try_from(version).ok()
}

/// Takes everything that Landlock can take. Returns its version, `None` without one.
pub(super) fn restrict() -> io::Result<Option<u32>> {
    let ruleset = Ruleset::default()
        .handle_access(AccessFs::from_all(NEWEST))
        .and_then(|rules| rules.handle_access(AccessNet::BindTcp))
        .and_then(|rules| rules.scope(Scope::from_all(NEWEST)))
        .and_then(Ruleset::create);
    let status = ruleset.and_then(|rules| rules.restrict_self()).map_err(io::Error::other)?;
    Ok(if status.ruleset == RulesetStatus::NotEnforced { None } else { abi() })
}
