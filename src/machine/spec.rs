//! What a user asked for, as the VM process gets it, as it lies in `config.json`, and as it travels to another host.

use std::borrow::Cow;
use std::fs::File;
use std::io::{Read, Seek};
use std::net::IpAddr;
use std::path::PathBuf;
use std::str::FromStr;

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};
use vmm::config::VmConfig;
use vmm::devices::virtio::{MacAddress, NetConfig, Tap};

/// A VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineSpec {
    /// Its name.
    pub name: String,
    /// vCPUs.
    pub cpus: u8,
    /// RAM in bytes.
    pub memory_bytes: u64,
    /// What boots.
    pub boot: BootSpec,
    /// Network interfaces.
    pub nets: Vec<NetSpec>,
}

/// What boots.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BootSpec {
    /// The kernel's file; `None` is the built-in guest.
    pub kernel: Option<PathBuf>,
    /// The initrd's file.
    pub initrd: Option<PathBuf>,
    /// Kernel command line.
    pub cmdline: String,
}

/// A network interface: what the guest sees, and where the host plugs it in.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetSpec {
    /// The TAP's name; `None`: a new one, named by the kernel.
    pub tap: Option<String>,
    /// The bridge that the TAP is put on.
    pub bridge: Option<String>,
    /// The guest's MAC address.
    pub mac: MacAddress,
    /// The guest's addresses, for announcing; with prefix lengths as given.
    pub ips: Vec<Cidr>,
}

/// An address with the length of its network's prefix.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Cidr {
    /// The address.
    pub address: IpAddr,
    /// Bits of the prefix.
    pub prefix: u8,
}

impl FromStr for Cidr {
    type Err = anyhow::Error;

    fn from_str(word: &str) -> Result<Self> {
        let (address, prefix) = word.split_once('/').map_or((word, None), |(a, p)| (a, Some(p)));
        let address: IpAddr = address
            .parse()
            .map_err(|_| anyhow::anyhow!("{word:?} is not an address: write 10.0.0.2/24 or fd00::2/64"))?;
        let bits = if address.is_ipv4() { 32 } else { 128 };
        let prefix = prefix.map_or(Ok(bits), |p| {
            p.parse()
                .ok()
                .filter(|p| *p <= bits)
                .with_context(|| format!("{word:?} has no prefix length from 0 to {bits}"))
        })?;
        Ok(Cidr { address, prefix })
    }
}

impl std::fmt::Display for Cidr {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.address, self.prefix)
    }
}

impl TryFrom<String> for Cidr {
    type Error = anyhow::Error;
    fn try_from(word: String) -> Result<Self> {
        word.parse()
    }
}

impl From<Cidr> for String {
    fn from(cidr: Cidr) -> Self {
        cidr.to_string()
    }
}

/// A MAC address of the locally administered kind that QEMU uses, the same for the same name and interface.
fn mac_of(name: &str, index: usize) -> MacAddress {
    let mut hash = 0xcbf2_9ce4_8422_2325u64; // FNV-1a: stable, and good enough for 24 bits
    for byte in name.bytes().chain([index as u8]) {
        hash = (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3);
    }
    let [a, b, c, ..] = hash.to_be_bytes();
    MacAddress([0x52, 0x54, 0x00, a, b, c])
}

impl NetSpec {
    /// `tap=NAME | bridge=NAME[,mac=…][,ip=CIDR]…`, interface number `index` of the VM `name`.
    pub fn parse(option: &str, name: &str, index: usize) -> Result<Self> {
        let mut net = NetSpec { tap: None, bridge: None, mac: mac_of(name, index), ips: Vec::new() };
        for part in option.split(',') {
            let (key, value) = part.split_once('=').unwrap_or((part, ""));
            ensure!(
                !value.is_empty(),
                "--net {option}: {part:?} has no value; write tap=NAME or bridge=NAME, then ,mac=… and ,ip=… as needed"
            );
            match key {
                "tap" => net.tap = Some(value.into()),
                "bridge" => net.bridge = Some(value.into()),
                "mac" => net.mac = value.parse().map_err(|e| anyhow::anyhow!("--net {option}: {value:?} is {e}"))?,
                "ip" => net.ips.push(value.parse().with_context(|| format!("--net {option}"))?),
                _ => bail!("--net {option}: {key:?} is not known; it takes tap=, bridge=, mac= and ip="),
            }
        }
        ensure!(
            net.tap.is_some() || net.bridge.is_some(),
            "--net {option}: say where to plug it in, with bridge=NAME or tap=NAME"
        );
        Ok(net)
    }
}

impl NetSpec {
    /// Opens the TAP, on its bridge.
    pub fn plug_in(&self) -> Result<Tap> {
        Tap::open(self.tap.as_deref(), self.bridge.as_deref()).context("the network interface cannot be plugged in")
    }
}

/// The files that boot.
pub struct BootFiles {
    /// The kernel.
    pub kernel: Cow<'static, [u8]>,
    /// The initrd.
    pub initrd: Option<Vec<u8>>,
}

impl BootSpec {
    /// What to call it.
    pub fn kernel_name(&self) -> String {
        self.kernel.as_ref().map_or_else(|| "the built-in guest".into(), |path| path.display().to_string())
    }

    /// Whether every file that it needs lies in one of `folders`, symbolic links followed. For a VM whose owner may name files, but
    /// is not this host's.
    pub fn check_within(&self, folders: &[PathBuf]) -> Result<()> {
        for path in self.kernel.iter().chain(&self.initrd) {
            let real = path.canonicalize().with_context(|| format!("cannot read {}", path.display()))?;
            let within = |folder: &PathBuf| folder.canonicalize().is_ok_and(|folder| real.starts_with(folder));
            ensure!(
                folders.iter().any(within),
                "the VM came from another host, and this one's policy does not let it read {}: to allow it, add the file's folder to \
                 \"boot_files\" in policy.json, before the VM comes",
                path.display()
            );
        }
        Ok(())
    }

    /// Opens the files.
    pub fn open(&self) -> Result<OpenBoot> {
        let open = |what, path: &PathBuf| {
            let file = File::open(path).with_context(|| format!("cannot read the {what} {}", path.display()))?;
            anyhow::Ok(OpenFile { what, path: path.clone(), file })
        };
        let kernel = self.kernel.as_ref().map(|path| open("kernel", path)).transpose()?;
        let initrd = self.initrd.as_ref().map(|path| open("initrd", path)).transpose()?;
        Ok(OpenBoot { kernel, initrd })
    }
}

/// The files that boot, open: each boot reads them again, and files that were written to meanwhile boot as they are then.
#[derive(Debug)]
pub struct OpenBoot {
    kernel: Option<OpenFile>,
    initrd: Option<OpenFile>,
}

#[derive(Debug)]
struct OpenFile {
    what: &'static str,
    path: PathBuf,
    file: File,
}

impl OpenFile {
    fn read(&self) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        let read = (&self.file).rewind().and_then(|()| (&self.file).read_to_end(&mut bytes));
        read.with_context(|| format!("cannot read the {} {}", self.what, self.path.display()))?;
        Ok(bytes)
    }
}

impl OpenBoot {
    /// Reads them.
    pub fn read(&self) -> Result<BootFiles> {
        let kernel = match &self.kernel {
            None => Cow::Borrowed(images::pulse_elf()),
            Some(file) => Cow::Owned(file.read()?),
        };
        Ok(BootFiles { kernel, initrd: self.initrd.as_ref().map(OpenFile::read).transpose()? })
    }
}

impl MachineSpec {
    /// The kernel's command line: the user's; the built-in guest also gets the address of its first interface from `--net`.
    pub fn boot_cmdline(&self) -> String {
        let cmdline = &self.boot.cmdline;
        let given = |word: &str| cmdline.split_whitespace().any(|w| w.starts_with(word));
        match self.nets.first().filter(|_| self.boot.kernel.is_none()) {
            None => cmdline.clone(),
            Some(net) => {
                let mut line = cmdline.clone();
                let mut add = |word: &str, ip: Option<&Cidr>| {
                    if let Some(ip) = ip.filter(|_| !given(word)) {
                        line = format!("{line} {word}{ip}");
                    }
                };
                add("ip=", net.ips.iter().find(|c| c.address.is_ipv4()));
                add("ip6=", net.ips.iter().find(|c| c.address.is_ipv6()));
                line.trim_start().to_string()
            }
        }
    }

    /// The machine that the guest sees.
    pub fn vm_config(&self) -> VmConfig {
        let addresses = |net: &NetSpec| net.ips.iter().map(|cidr| cidr.address).collect();
        let nics = self.nets.iter().map(|net| NetConfig { mac: net.mac, addresses: addresses(net) });
        VmConfig { cpus: self.cpus, memory_bytes: self.memory_bytes, nics: nics.collect() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn net_options() {
        let net = NetSpec::parse("bridge=br0,mac=52:54:00:00:00:07,ip=10.0.0.2/24,ip=fd00::2", "web", 0).unwrap();
        assert_eq!(net.bridge.as_deref(), Some("br0"));
        assert_eq!(net.mac, MacAddress([0x52, 0x54, 0, 0, 0, 7]));
        assert_eq!(net.ips.iter().map(Cidr::to_string).collect::<Vec<_>>(), ["10.0.0.2/24", "fd00::2/128"]);
        for bad in [
            "",
            "br0",
            "bridge=",
            "mac=52:54:00:00:00:07",
            "bridge=b,mac=1",
            "bridge=b,ip=1",
            "bridge=b,ip=10.0.0.1/33",
            "bridge=b,x=y",
        ] {
            assert!(NetSpec::parse(bad, "web", 0).is_err(), "{bad}");
        }
    }

    #[test]
    fn macs_are_stable_unicast_and_differ() {
        assert_eq!(mac_of("web", 0), mac_of("web", 0));
        assert_ne!(mac_of("web", 0), mac_of("web", 1));
        assert_ne!(mac_of("web", 0), mac_of("db", 0));
    }

    #[test]
    fn a_spec_survives_its_file() {
        let spec = MachineSpec {
            name: "web".into(),
            cpus: 2,
            memory_bytes: 1 << 30,
            boot: BootSpec { kernel: None, initrd: None, cmdline: "ws=1M".into() },
            nets: vec![NetSpec::parse("bridge=br0,ip=10.0.0.2/24", "web", 0).unwrap()],
        };
        let text = serde_json::to_string(&spec).unwrap();
        assert_eq!(serde_json::from_str::<MachineSpec>(&text).unwrap(), spec);
    }
}
