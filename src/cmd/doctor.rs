//! `microvm doctor`: what this host can do, and what is missing.

use std::fs;

use anyhow::Result;
use serde::Serialize;
use vmm::host::{Host, HostFacts, KvmKind};

use crate::runtime::Runtime;
use crate::units::format_bytes;

/// One thing looked at.
#[derive(Serialize)]
struct Finding {
    what: &'static str,
    ok: bool,
    /// What was found; where it is not ok, what to do.
    says: String,
}

/// Looks, and tells. Exit code 1 if no VM can run here.
pub fn run(runtime: &Runtime, json: bool) -> Result<u8> {
    let host = Host::open();
    let mut findings = Vec::new();
    let mut find = |what, ok, says: String| findings.push(Finding { what, ok, says });
    match &host {
        Ok(host) => kvm(&host.facts(), &mut find),
        Err(error) => find("KVM", false, error.to_string()),
    }
    let tun = fs::OpenOptions::new().read(true).write(true).open("/dev/net/tun");
    match tun {
        Ok(_) => find("TAP", true, "/dev/net/tun can be opened".into()),
        Err(e) => find("TAP", false, format!("/dev/net/tun: {e}; VMs run without a network (modprobe tun; be root)")),
    }
    let root = rustix::process::geteuid().is_root();
    let says = if root {
        "root: TAPs can be made and put on bridges"
    } else {
        "not root: only TAPs made for this user can be used"
    };
    find("privileges", true, says.into());
    sandbox(&mut find);
    let bridges = bridges();
    let says = match bridges.as_slice() {
        [] => "none; one is made with: ip link add br0 type bridge && ip link set br0 up".to_string(),
        names => names.join(", "),
    };
    find("bridges", true, says);
    match runtime.vms() {
        Ok(vms) => find("VMs", true, format!("{} here", vms.len())),
        Err(e) => find("runtime folder", false, format!("{e:#}")),
    }
    if json {
        let facts = host.as_ref().ok().map(Host::facts);
        println!("{}", serde_json::json!({ "host": facts, "findings": findings }));
    } else {
        for Finding { what, ok, says } in &findings {
            println!("{} {what:<14} {says}", if *ok { "ok     " } else { "MISSING" });
        }
    }
    Ok(u8::from(host.is_err()))
}

fn kvm(facts: &HostFacts, find: &mut dyn FnMut(&'static str, bool, String)) {
    let kind = match facts.kvm {
        KvmKind::Hardware => "hardware virtualization".to_string(),
        KvmKind::Software => {
            "software (no VMX or SVM): user code of guests runs at full speed, kernel code is emulated and very \
                              slow; the built-in guest runs well, stock Linux kernels do not boot"
                .to_string()
        }
    };
    find("KVM", true, kind);
    find("CPU", true, format!("{} ({})", facts.cpu_model, facts.cpu_vendor));
    find("kernel", true, facts.kernel.clone());
    find("vCPUs", true, format!("KVM recommends {} at most", facts.max_vcpus));
    let says = if facts.manual_dirty_log {
        "cleared by chunks: guests do not stall while they are copied"
    } else {
        "cleared at once (kernel older than 5.2): guests stall a little at each round of a migration"
    };
    find("dirty log", true, says.into());
    let says = if facts.tsc_scaling {
        "can be scaled: guests may come from hosts of another frequency"
    } else {
        "cannot be scaled: guests must come from hosts of the same frequency"
    };
    find("TSC", true, says.into());
    let (free, all) = (format_bytes(facts.memory_available_bytes), format_bytes(facts.memory_bytes));
    find("memory", true, format!("{free} available of {all}"));
}

/// What a VM's process could be held by here. Only the filters are a must.
fn sandbox(find: &mut dyn FnMut(&'static str, bool, String)) {
    match vmm::sandbox::filters_work() {
        Ok(()) => find("seccomp", true, "system calls of VM processes are filtered".into()),
        Err(error) => find("seccomp", false, migrator::report::chain(&error)),
    }
    match vmm::sandbox::can_switch_user() {
        Ok(()) => find("own users", true, "each VM's process gets a user and a root directory of its own".into()),
        Err(why) => find("own users", true, format!("none: {why}")),
    }
    let says = match vmm::sandbox::landlock_abi() {
        Some(abi) => format!("ABI {abi}: VM processes can open no file and no port"),
        None => "none (Linux 5.13, boot with lsm=landlock,…): the filters alone keep VM processes from files".into(),
    };
    find("Landlock", true, says);
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let mut fields = mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>());
    let says = match fields.find(|mount| mount.get(2) == Some(&"cgroup2")) {
        Some(mount) => format!("v2 at {}: for --cgroup", mount[1]),
        None => "no version 2 here: --cgroup takes the directory of another".into(),
    };
    find("cgroups", true, says);
}

fn bridges() -> Vec<String> {
    let Ok(entries) = fs::read_dir("/sys/class/net") else { return Vec::new() };
    let is_bridge = |entry: &fs::DirEntry| entry.path().join("bridge").is_dir();
    let mut names: Vec<String> =
        entries.flatten().filter(is_bridge).filter_map(|e| e.file_name().into_string().ok()).collect();
    names.sort();
    names
}
