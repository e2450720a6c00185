//! `microvm console`.

use anyhow::Result;

use super::terminal::{self, Left};
use crate::client;
use crate::runtime::Runtime;

/// Attaches to the console of a VM that runs.
pub fn run(runtime: &Runtime, name: &str) -> Result<u8> {
    // An error about the VM is better than one about its console's socket.
    client::inspect(runtime, name)?;
    match terminal::attach(&client::find(runtime, name)?, false)? {
        Left::ByKey | Left::BySignal => {}
        Left::Ended => eprintln!("the console of {name} has closed"),
    }
    Ok(0)
}
