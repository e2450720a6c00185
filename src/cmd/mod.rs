//! The commands, one file each; small ones that only ask a VM's process are here.

use anyhow::Result;

use crate::cli::{Command, NameArgs};
use crate::client;
use crate::machine::view::{Answer, Request};
use crate::runtime::Runtime;

mod console;
mod doctor;
mod inspect;
mod logs;
mod migrate;
mod ps;
mod pull;
mod resolve;
mod rm;
mod run;
mod stop;
mod terminal;
mod trust;

/// Carries out a command; the result is the exit code.
pub fn run(command: Command) -> Result<u8> {
    if let Command::VmProcess = command {
        return crate::machine::process::main();
    }
    if let Command::Trust(command) = command {
        return trust::run(command);
    }
    let runtime = Runtime::from_env()?;
    match command {
        Command::Run(args) => run::run(&runtime, args),
        Command::Migrate(args) => migrate::run(&runtime, &args),
        Command::Pull(args) => pull::run(&args),
        Command::Agent(args) => crate::agent::run(&runtime, &args, crate::agent::Service::UntilStopped),
        Command::Receive(args) => {
            crate::agent::run(&runtime, &args.agent, crate::agent::Service::OneVm { patience: args.timeout })
        }
        Command::Ps(args) => ps::run(&runtime, args.json),
        Command::Inspect(args) => inspect::run(&runtime, &args),
        Command::Console(args) => console::run(&runtime, &args.name),
        Command::Logs(args) => logs::run(&runtime, &args),
        Command::Stop(args) => stop::run(&runtime, &args),
        Command::Pause(args) => simple(&runtime, &args, &Request::Pause),
        Command::Resume(args) => simple(&runtime, &args, &Request::Resume),
        Command::Rm(args) => rm::run(&runtime, &args),
        Command::Cancel(args) => simple(&runtime, &args, &Request::Cancel),
        Command::Resolve(args) => resolve::run(&runtime, &args),
        Command::Doctor(args) => doctor::run(&runtime, args.json),
        Command::Trust(_) | Command::VmProcess => unreachable!("handled above"),
    }
}

fn simple(runtime: &Runtime, args: &NameArgs, request: &Request) -> Result<u8> {
    match client::ask(runtime, &args.name, request)? {
        Answer::Ok => Ok(0),
        other => anyhow::bail!("unexpected answer: {other:?}"),
    }
}
