//! `microvm rm`.

use std::time::Duration;

use anyhow::{Result, bail};

use crate::cli::RmArgs;
use crate::client;
use crate::runtime::Runtime;

/// Removes what is left of VMs; with `--force` also ends those that run.
pub fn run(runtime: &Runtime, args: &RmArgs) -> Result<u8> {
    for name in &args.names {
        let dir = client::find(runtime, name)?;
        if dir.is_held()? {
            if !args.force {
                bail!("{name} runs: microvm stop {name} first, or microvm rm --force {name}");
            }
            super::stop::stop(runtime, name, Duration::ZERO)?;
        }
        if let Some(decided) = crate::runtime::unsettled(&dir.journal())?
            && !args.force
        {
            bail!(
                "{name} died in the middle of migration {}: it may run at the destination. If it does, microvm rm --force {name} removes what is left here",
                decided
            );
        }
        dir.remove()?;
    }
    Ok(0)
}
