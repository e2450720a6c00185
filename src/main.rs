//! The `microvm` program: parses the command line, carries out one command, and turns its end into an exit code.

mod agent;
mod cli;
mod client;
mod cmd;
mod fault_points;
mod journals;
mod machine;
mod policy;
mod recovery;
mod runtime;
mod trust;
mod units;

use std::io::IsTerminal;
use std::process::ExitCode;

use clap::Parser;
use cli::{Cli, Command};

fn main() -> ExitCode {
    let cli = Cli::parse();
    // Messages of daemons and of VM processes; commands speak for themselves.
    let daemon = matches!(cli.command, Command::VmProcess | Command::Agent(_) | Command::Receive(_));
    let default = if daemon { "info" } else { "warn" };
    let filter = tracing_subscriber::EnvFilter::try_from_env("MICROVM_LOG").unwrap_or_else(|_| default.into());
    // A message that cannot be written (the log's disk is full) is lost; complaining about it on the same stream would panic.
    let subscriber = tracing_subscriber::fmt().log_internal_errors(false).with_ansi(std::io::stderr().is_terminal());
    subscriber.with_env_filter(filter).with_writer(std::io::stderr).with_target(false).init();

    // A VM's process does that when it has closed what it inherited.
    let at_once = daemon && !matches!(cli.command, Command::VmProcess);
    if at_once && let Err(error) = fault_points::connect() {
        eprintln!("microvm: the test that MICROVM_FAULT_POINTS names does not listen: {error}");
        return ExitCode::FAILURE;
    }
    match cmd::run(cli.command) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("microvm: {}", chain(&error));
            ExitCode::from(if error.is::<Usage>() { 2 } else { 1 })
        }
    }
}

/// What the user wrote cannot be meant: exit code 2, as for a mistake that the command line's parser finds.
#[derive(Debug, thiserror::Error)]
#[error("{0:#}")]
pub struct Usage(anyhow::Error);

/// An error and its causes on one line. A cause that the text before it already tells is left out.
fn chain(error: &anyhow::Error) -> String {
    migrator::report::chain(error.as_ref())
}
