//! `microvm stop`.

use std::time::Duration;

use anyhow::{Result, bail};

use crate::cli::StopArgs;
use crate::client::{self, Conversation};
use crate::machine::Exit;
use crate::machine::view::{Answer, Request};
use crate::runtime::Runtime;

/// How long a guest may take to switch itself off.
pub const PATIENCE: Duration = Duration::from_secs(10);

/// Carries it out.
pub fn run(runtime: &Runtime, args: &StopArgs) -> Result<u8> {
    let sentence = stop(runtime, &args.name, args.timeout)?;
    println!("{sentence}");
    Ok(0)
}

/// Asks the guest to switch itself off, and ends it if it has not after `patience`. Returns what became of it.
pub fn stop(runtime: &Runtime, name: &str, patience: Duration) -> Result<String> {
    let request = Request::Stop { patience_ms: patience.as_millis() as u64 };
    let mut conversation = Conversation::ask(runtime, name, &request)?;
    conversation.be_patient(patience + Duration::from_secs(30))?;
    let answer = conversation.next();
    client::wait_until_let_go(runtime, name)?;
    let exit = match answer {
        Ok(Answer::Exit(exit)) => exit,
        Ok(other) => bail!("unexpected answer: {other:?}"),
        // It may have ended by itself just now.
        Err(error) => Exit::read(&runtime.vm(name)?)?.ok_or(error)?,
    };
    Ok(exit.sentence(name))
}
