//! Users and capabilities.

use std::io;

use rustix::process::{DumpableBehavior, set_dumpable_behavior};
use rustix::thread::{
    CapabilitySet, CapabilitySets, Gid, Uid, capabilities, clear_ambient_capability_set,
    remove_capability_from_bounding_set, set_capabilities, set_thread_groups, set_thread_res_gid, set_thread_res_uid,
};

use super::{SandboxError, step};

const NO_CAPABILITIES: CapabilitySets = CapabilitySets {
    effective: CapabilitySet::empty(),
    permitted: CapabilitySet::empty(),
    inheritable: CapabilitySet::empty(),
};

/// Whether this process can take another user and another root directory; if not, why, in a sentence.
pub fn can_switch_user() -> Result<(), String> {
    if !rustix::process::geteuid().is_root() {
        return Err("not started as root: it has the user and the root directory of whoever started it".into());
    }
    let needed = CapabilitySet::SETUID | CapabilitySet::SETGID | CapabilitySet::SYS_CHROOT;
    let has = capabilities(None).map_or(CapabilitySet::empty(), |sets| sets.effective);
    if !has.contains(needed) {
        return Err(
            "root here lacks CAP_SETUID, CAP_SETGID or CAP_SYS_CHROOT: it stays root, without capabilities".into()
        );
    }
    // A user namespace that knows few users.
    let map = std::fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
    let covers_all =
        |line: &str| line.split_whitespace().nth(2).and_then(|n| n.parse::<u64>().ok()).is_some_and(|n| n > 1 << 31);
    if !map.lines().any(covers_all) {
        return Err("this user namespace has no users to spare: it stays root, without capabilities".into());
    }
    Ok(())
}

/// Every capability, every group and, with `user`, the user. It is checked that nothing is left.
pub(super) fn drop_all(user: Option<u32>) -> Result<(), SandboxError> {
    let has = capabilities(None).map_err(step("capget"))?.effective;
    // The bounding set first: emptying it takes a capability.
    if has.contains(CapabilitySet::SETPCAP) {
        for number in 0..64 {
            // EINVAL: the kernel knows no more of them.
            if remove_capability_from_bounding_set(CapabilitySet::from_bits_retain(1 << number)).is_err() {
                break;
            }
        }
    }
    // EINVAL: a kernel before 4.3, which has no such set.
    let _ = clear_ambient_capability_set();
    if let Some(user) = user {
        let (uid, gid) = (Uid::from_raw(user), Gid::from_raw(user));
        set_thread_groups(&[]).map_err(step("setgroups"))?;
        set_thread_res_gid(gid, gid, gid).map_err(step("setresgid"))?;
        set_thread_res_uid(uid, uid, uid).map_err(step("setresuid"))?;
    }
    set_capabilities(None, NO_CAPABILITIES).map_err(step("capset"))?;
    // Nobody of the same user may trace it, and its memory goes into no file.
    set_dumpable_behavior(DumpableBehavior::NotDumpable).map_err(step("PR_SET_DUMPABLE"))?;
    let left = capabilities(None).map_err(step("capget"))?;
    if left != NO_CAPABILITIES {
        return Err(step("dropping all capabilities")(io::Error::other(format!("{left:?} are left"))));
    }
    Ok(())
}

/// For a helper of a caged process: of all capabilities only that of managing network interfaces, if there is any.
pub fn keep_only_network_administration() -> io::Result<()> {
    let keep = capabilities(None)?.permitted & CapabilitySet::NET_ADMIN;
    set_capabilities(None, CapabilitySets { effective: keep, permitted: keep, inheritable: CapabilitySet::empty() })?;
    Ok(rustix::thread::set_no_new_privs(true)?)
}
