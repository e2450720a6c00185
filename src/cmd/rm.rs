//! `microvm rm`.

use std::time::Duration;

use anyhow::{Result, bail};

use crate::cli::RmArgs;
use crate::client;
use crate::recovery::{self, Doubt};
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
        if !args.force
            && let Doubt::Released { to } = recovery::must_settle(&dir)?
        {
            println!("{name} runs on {to}");
        }
        dir.remove()?;
    }
    Ok(0)
}
