//! What a peer may make this host do: `policy.json`, read anew for each request, so that a change needs no restart.
//!
//! What is not said has a default that is safe for a fleet's hosts and lets an ordinary VM in (`docs/trust.md` has the table). A refusal
//! names the file and what to add to it.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use migrator::transport::tls::Identity;
use serde::Deserialize;

use crate::machine::spec::{MachineSpec, NetSpec};
use crate::units::{format_bytes, parse_size};

/// The file's name in the configuration folder.
pub const FILE: &str = "policy.json";
const ALL: &str = "*";

/// What the file may say.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Rules {
    /// Hosts that may offer VMs, and ask. Default: the whole fleet.
    peers: Option<Vec<String>>,
    /// Bridges that VMs may be put on. Default: the bridge of the same name.
    bridges: Option<Bridges>,
    /// TAPs that VMs may use by name. Default: none.
    #[serde(default)]
    taps: Vec<String>,
    /// Folders from which a VM that came may read its kernel and initrd when it reboots. Default: none.
    #[serde(default)]
    boot_files: Vec<PathBuf>,
    #[serde(default)]
    limits: Limits,
    /// Who may pull which VMs from here. Default: nobody.
    #[serde(default)]
    pull: Vec<PullRule>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Bridges {
    Same(Vec<String>),
    Map(BTreeMap<String, String>),
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Limits {
    /// Default: the host's memory.
    memory_per_vm: Option<Size>,
    /// Of all VMs of the host. Default: the host's memory.
    memory: Option<Size>,
    /// Default: no limit but the VMM's own.
    cpus_per_vm: Option<u8>,
    vms: Option<usize>,
    incoming: Option<usize>,
    incoming_per_peer: Option<usize>,
}

/// Default for `limits.vms`.
const VMS: usize = 256;
/// Default for `limits.incoming`.
const INCOMING: usize = 16;
/// Default for `limits.incoming_per_peer`: one peer alone does not keep the others out.
const INCOMING_PER_PEER: usize = 8;

#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(try_from = "String")]
struct Size(u64);

impl TryFrom<String> for Size {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        parse_size(&text).map(Size).map_err(|error| error.to_string())
    }
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct PullRule {
    peer: String,
    vms: Vec<String>,
}

/// A policy, and where it stands.
#[derive(Debug)]
pub struct Policy {
    path: PathBuf,
    rules: Rules,
}

/// What this host has already, that limits count.
#[derive(Debug, Clone, Copy)]
pub struct Load {
    /// Living VMs.
    pub vms: usize,
    /// Their memory, in bytes.
    pub memory_bytes: u64,
    /// Of them, those that are on their way here.
    pub incoming: usize,
    /// Of these, those that come from the peer in question.
    pub incoming_from_peer: usize,
}

impl Policy {
    /// Reads the file; everything is as by default if it is not there. `given`: it was named, and must be there.
    pub fn read(path: &Path, given: bool) -> Result<Self> {
        let rules = match std::fs::read(path) {
            Ok(text) => serde_json::from_slice(&text)
                .with_context(|| format!("the policy {} cannot be understood", path.display()))?,
            Err(error) if error.kind() == io::ErrorKind::NotFound && !given => Rules::default(),
            Err(error) => return Err(error).with_context(|| format!("cannot read the policy {}", path.display())),
        };
        Ok(Policy { path: path.into(), rules })
    }

    /// What to do so that it is allowed.
    fn allow(&self, what: &str) -> String {
        format!("to allow it, {what} in {} on that host", self.path.display())
    }

    /// Whether `peer` may ask anything; none: it need not say who it is.
    pub fn check_peer(&self, peer: Option<&Identity>) -> Result<()> {
        if let (Some(peers), Some(peer)) = (&self.rules.peers, peer) {
            let host = &peer.host;
            ensure!(
                peers.contains(host),
                "the policy of this host does not know {host}: {}",
                self.allow(&format!("add {host:?} to \"peers\""))
            );
        }
        Ok(())
    }

    /// Whether a VM may come, and where it is plugged in then. `bridge`: the one bridge for all that were on any.
    pub fn admit(&self, spec: &mut MachineSpec, bridge: Option<&str>, load: Load) -> Result<()> {
        self.check_limits(spec, load)?;
        spec.nets.iter_mut().try_for_each(|net| self.plug(net, bridge))
    }

    fn check_limits(&self, spec: &MachineSpec, load: Load) -> Result<()> {
        let limits = &self.rules.limits;
        let host = host_memory_bytes();
        let too_much = |limit: u64, what: &str, key: &str| {
            let set = format!("raise \"{key}\" in \"limits\"");
            anyhow::anyhow!(
                "{} has {} of memory, {what} on this host is {}: {}",
                spec.name,
                format_bytes(spec.memory_bytes),
                format_bytes(limit),
                self.allow(&set)
            )
        };
        let of_one = limits.memory_per_vm.map_or(host, |size| size.0);
        if spec.memory_bytes > of_one {
            return Err(too_much(of_one, "the most for one VM", "memory_per_vm"));
        }
        let of_all = limits.memory.map_or(host, |size| size.0);
        if load.memory_bytes.saturating_add(spec.memory_bytes) > of_all {
            return Err(too_much(of_all.saturating_sub(load.memory_bytes), "what is left for VMs", "memory"));
        }
        let of_one_peer = limits.incoming_per_peer.unwrap_or(INCOMING_PER_PEER);
        let counts = [
            (
                Some(of_one_peer),
                load.incoming_from_peer + 1,
                "VMs on their way here from one host",
                "incoming_per_peer",
            ),
            (limits.cpus_per_vm.map(usize::from), usize::from(spec.cpus), "vCPUs of one VM", "cpus_per_vm"),
            (Some(limits.vms.unwrap_or(VMS)), load.vms + 1, "VMs on this host", "vms"),
            (Some(limits.incoming.unwrap_or(INCOMING)), load.incoming + 1, "VMs on their way here", "incoming"),
        ];
        for (limit, wanted, what, key) in counts {
            if let Some(limit) = limit.filter(|limit| wanted > *limit) {
                bail!(
                    "{wanted} {what} are too many, {limit} are allowed: {}",
                    self.allow(&format!("raise \"{key}\" in \"limits\""))
                );
            }
        }
        Ok(())
    }

    fn plug(&self, net: &mut NetSpec, bridge: Option<&str>) -> Result<()> {
        if let Some(tap) = &net.tap {
            ensure!(
                self.rules.taps.contains(tap),
                "the policy of this host does not let VMs that come use the TAP {tap}: {}; or start the VM with bridge= alone",
                self.allow(&format!("add {tap:?} to \"taps\""))
            );
        }
        let Some(theirs) = &net.bridge else { return Ok(()) };
        let ours = match (bridge, &self.rules.bridges) {
            (Some(bridge), _) => Some(bridge.to_owned()),
            (None, None) => Some(theirs.clone()),
            (None, Some(Bridges::Same(names))) => names.contains(theirs).then(|| theirs.clone()),
            (None, Some(Bridges::Map(map))) => map.get(theirs).cloned(),
        };
        net.bridge = Some(ours.with_context(|| {
            format!(
                "the policy of this host does not let VMs that come onto the bridge {theirs}: {}",
                self.allow(&format!("add {theirs:?} to \"bridges\""))
            )
        })?);
        Ok(())
    }

    /// From where a VM that came may read its kernel and initrd.
    pub fn boot_folders(&self) -> &[PathBuf] {
        &self.rules.boot_files
    }

    /// Whether `peer` may pull the VM `vm`.
    pub fn check_pull(&self, peer: Option<&Identity>, vm: &str) -> Result<()> {
        let host = peer.map_or(ALL, |peer| peer.host.as_str());
        let fits = |pattern: &str, value: &str| pattern == ALL || pattern == value;
        let allowed = |rule: &PullRule| fits(&rule.peer, host) && rule.vms.iter().any(|pattern| fits(pattern, vm));
        ensure!(
            self.rules.pull.iter().any(allowed),
            "the policy of this host does not let {} pull {vm}: {}",
            peer.map_or("anybody", |peer| peer.host.as_str()),
            self.allow(&format!("add {{\"peer\": {host:?}, \"vms\": [{vm:?}]}} to \"pull\""))
        );
        Ok(())
    }
}

/// All memory of this machine.
fn host_memory_bytes() -> u64 {
    let info = rustix::system::sysinfo();
    info.totalram.saturating_mul(u64::from(info.mem_unit))
}

#[cfg(test)]
mod tests;
