//! `microvm run`: checks what was asked for, starts the VM's process, and attaches to its console.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use migrator::MigrationId;

use super::stop::{self, PATIENCE};
use super::terminal::{self, Left};
use crate::Usage;
use crate::cli::RunArgs;
use crate::client;
use crate::machine::Exit;
use crate::machine::process::Start;
use crate::machine::spawn;
use crate::machine::spec::{BootSpec, MachineSpec, NetSpec};
use crate::recovery::{self, Doubt};
use crate::runtime::{Runtime, VmDir, check_name};

/// `console=` is what makes a stock kernel say anything.
const DEFAULT_CMDLINE: &str = "console=ttyS0";
/// Exit code of a command that a signal ended (128 + SIGINT).
const INTERRUPTED: u8 = 130;

/// Carries it out.
pub fn run(runtime: &Runtime, args: RunArgs) -> Result<u8> {
    let (detach, json) = (args.detach, args.json);
    let cage = args.cage.settings()?;
    let spec = spec(args).map_err(Usage)?;
    for net in &spec.nets {
        check_mac_is_free(runtime, &spec.name, net)?;
    }
    // Here, where the user sees it at once; the process reads them again.
    spec.boot.open()?.read()?;
    let dir = runtime.vm(&spec.name)?;
    let name = spec.name.clone();
    if let Doubt::Released { to } = recovery::must_settle(&dir)? {
        eprintln!("microvm: the {name} that was here runs on {to}; this is another one");
    }
    spawn::vm_process(|_| Start { spec, arrival: None, cage }, None, || ())?;
    if detach {
        if json {
            println!("{}", serde_json::to_string(&client::inspect(runtime, &name)?)?);
        } else {
            println!("{name}");
        }
        return Ok(0);
    }
    match terminal::attach(&dir, true)? {
        Left::ByKey => {
            eprintln!(
                "{name} goes on in the background: microvm console {name} comes back to it, microvm stop {name} stops it"
            );
            Ok(0)
        }
        Left::BySignal => {
            eprintln!("microvm: stopping {name}");
            stop::stop(runtime, &name, PATIENCE)?;
            ended(&dir)?;
            Ok(INTERRUPTED)
        }
        Left::Ended => ended(&dir),
    }
}

/// The VM's process has ended, or gone elsewhere: says which, and removes what is left.
fn ended(dir: &VmDir) -> Result<u8> {
    let name = dir.name();
    while dir.is_held()? {
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    if !dir.exists() {
        eprintln!("{name} was migrated to another host and runs there");
        return Ok(0);
    }
    let Some(exit) = Exit::read(dir)? else {
        bail!("the process of {name} died: microvm logs --process {name} may say why");
    };
    eprintln!("{}", exit.sentence(name));
    dir.remove()?;
    Ok(u8::from(!exit.is_clean()))
}

/// What the user asked for, checked as far as it needs no look at the host.
fn spec(args: RunArgs) -> Result<MachineSpec> {
    let RunArgs { name, cpus, memory, kernel, initrd, cmdline, net, cage: _, detach: _, json: _ } = args;
    let name = match name {
        Some(name) => name,
        None => format!("vm-{}", &MigrationId::random()?.to_string()[..6]),
    };
    check_name(&name)?;
    let nets =
        net.iter().enumerate().map(|(i, option)| NetSpec::parse(option, &name, i)).collect::<Result<Vec<_>>>()?;
    let cmdline = cmdline.unwrap_or_else(|| if kernel.is_some() { DEFAULT_CMDLINE.into() } else { String::new() });
    let absolute = |path: PathBuf| std::path::absolute(&path).with_context(|| format!("{}", path.display()));
    let boot =
        BootSpec { kernel: kernel.map(absolute).transpose()?, initrd: initrd.map(absolute).transpose()?, cmdline };
    let spec = MachineSpec { name, cpus, memory_bytes: memory, boot, nets };
    spec.vm_config().validate()?;
    Ok(spec)
}

/// Two VMs of one MAC address on one host's bridges would take each other's frames.
fn check_mac_is_free(runtime: &Runtime, name: &str, net: &NetSpec) -> Result<()> {
    for other in runtime.vms()?.iter().filter(|vm| vm.name() != name) {
        let Ok(text) = fs::read(other.config()) else { continue };
        let Ok(spec) = serde_json::from_slice::<MachineSpec>(&text) else { continue };
        if spec.nets.iter().any(|n| n.mac == net.mac) && other.is_held()? {
            bail!("the VM {} has the MAC address {} already: give another with mac=", other.name(), net.mac);
        }
    }
    Ok(())
}
