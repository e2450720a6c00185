//! `microvm resolve`.

use anyhow::{Result, bail};

use crate::cli::ResolveArgs;
use crate::client;
use crate::machine::view::{Answer, Request};
use crate::recovery::{self, Doubt};
use crate::runtime::Runtime;

/// Settles a doubt by hand: the VM's process does it, or, if that is dead, its journal is settled here.
pub fn run(runtime: &Runtime, args: &ResolveArgs) -> Result<u8> {
    let name = &args.name;
    let dir = client::find(runtime, name)?;
    if dir.is_held()? {
        return match client::ask(runtime, name, &Request::Resolve { keep: args.keep })? {
            Answer::Ok => Ok(0),
            other => bail!("unexpected answer: {other:?}"),
        };
    }
    let Some(decided) = dir.outgoing.left_in_doubt()? else { bail!("{name} is not in doubt: nothing to resolve") };
    let doubt = if args.keep { recovery::keep(&dir, &decided)? } else { recovery::release(&dir, &decided)? };
    match doubt {
        Doubt::Kept => {
            println!("{name} is this host's. It died with its process: microvm rm {name}, then run it again");
        }
        Doubt::Released { to } => println!("{name} is {to}'s; what was left of it here is removed"),
        Doubt::None | Doubt::Open { .. } => bail!("{name} has just been settled: microvm ps"),
    }
    Ok(0)
}
