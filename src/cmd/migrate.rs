//! `microvm migrate`: asks the VM's process to move it, and watches.

use std::io::{IsTerminal, stderr};
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use indicatif::{ProgressBar, ProgressStyle};
use migrator::{Outcome, Owner, Phase, Report};

use super::inspect::progress;
use crate::cli::MigrateArgs;
use crate::client::{self, Conversation};
use crate::machine::exit_code;
use crate::machine::view::{Answer, MigrateRequest, ProgressView, Request, resolve};
use crate::runtime::Runtime;
use crate::units::format_bytes;

/// Lines without a terminal: at each new round or phase, and at least this often.
const LINE_EVERY: Duration = Duration::from_secs(1);

/// Carries it out.
pub fn run(runtime: &Runtime, args: &MigrateArgs) -> Result<u8> {
    let request = MigrateRequest {
        to: args.to.clone(),
        addresses: resolve(&args.to),
        max_downtime_us: args.max_downtime.as_micros() as u64,
        timeout_ms: args.timeout.map(|t| t.as_millis() as u64),
        bandwidth: args.bandwidth,
        streams: args.streams,
        mode: args.mode,
        verify: args.verify,
    };
    let name = &args.name;
    let mut conversation = Conversation::ask(runtime, name, &Request::Migrate(request))?;
    cancel_on_interrupt(runtime, name)?;
    let mut show = Show::new(args);
    let report = loop {
        match conversation.next()? {
            Answer::Progress(_) if args.detach => {
                if !args.json {
                    println!("{name} is on its way to {}: microvm inspect {name} shows how far", args.to);
                }
                return Ok(0);
            }
            Answer::Progress(p) => {
                show.progress(&p);
                if p.phase == Phase::InDoubt && p.in_doubt_ms.unwrap_or(0) > IN_DOUBT_PATIENCE.as_millis() as u64 {
                    show.end();
                    eprintln!(
                        "microvm: in doubt: {} was told to run {name} and does not answer. {name} stays paused here, and goes on asking; \
                         microvm ps shows how it stands, microvm resolve --help how to settle it by hand",
                        args.to
                    );
                    if let (true, Some(report)) = (args.json, client::inspect(runtime, name)?.last_migration) {
                        println!("{}", serde_json::to_string(&report)?);
                    }
                    return Ok(exit_code(Outcome::InDoubt));
                }
            }
            Answer::Report(report) => break report,
            other => bail!("unexpected answer: {other:?}"),
        }
    };
    show.end();
    if report.owner == Owner::Destination {
        // The name is free again when this command says that it is done, so that the VM can come back at once.
        client::wait_until_let_go(runtime, name)?;
    }
    if args.json {
        println!("{}", serde_json::to_string(&report)?);
    }
    tell(&report, args.json);
    Ok(exit_code(report.outcome))
}

/// How long the command waits for a doubt to settle itself before it says so and ends.
const IN_DOUBT_PATIENCE: Duration = Duration::from_secs(10);

/// The first Ctrl-C cancels and waits for the answer; the second lets the migration go on and ends the command.
fn cancel_on_interrupt(runtime: &Runtime, name: &str) -> Result<()> {
    let (runtime, name) = (runtime.clone(), name.to_string());
    let tokio = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let (ready, is_ready) = std::sync::mpsc::channel();
    std::thread::Builder::new().name("interrupt".into()).spawn(move || {
        tokio.block_on(async move {
            use tokio::signal::unix::{SignalKind, signal};
            let (Ok(mut interrupt), Ok(mut terminate)) =
                (signal(SignalKind::interrupt()), signal(SignalKind::terminate()))
            else {
                return;
            };
            let _ = ready.send(());
            tokio::select! { _ = interrupt.recv() => {}, _ = terminate.recv() => {} }
            eprintln!("\nmicrovm: cancelling");
            if let Err(error) = client::ask(&runtime, &name, &Request::Cancel) {
                eprintln!("microvm: {error:#}");
            }
            tokio::select! { _ = interrupt.recv() => {}, _ = terminate.recv() => {} }
            eprintln!("microvm: leaving; microvm inspect {name} shows how it goes on");
            std::process::exit(1);
        });
    })?;
    let _ = is_ready.recv();
    Ok(())
}

/// What is shown while it runs: a bar on a terminal, lines elsewhere.
struct Show {
    bar: Option<ProgressBar>,
    last: (Phase, u32, Option<Instant>),
}

impl Show {
    fn new(args: &MigrateArgs) -> Self {
        let bar = (stderr().is_terminal() && !args.detach).then(|| {
            let style = ProgressStyle::with_template("{bar:24} {msg}").expect("the template is a constant");
            ProgressBar::new(1).with_style(style)
        });
        Show { bar, last: (Phase::Idle, 0, None) }
    }

    fn progress(&mut self, p: &ProgressView) {
        if let Some(bar) = &self.bar {
            bar.set_length(p.pages_total.max(1));
            bar.set_position(p.pages_done);
            bar.set_message(progress(p));
            return;
        }
        let (phase, round, at) = self.last;
        if (phase, round) != (p.phase, p.round) || at.is_none_or(|at| at.elapsed() >= LINE_EVERY) {
            eprintln!("{}", progress(p));
            self.last = (p.phase, p.round, Some(Instant::now()));
        }
    }

    fn end(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

/// The end, for people.
fn tell(report: &Report, json: bool) {
    let Report { vm, to, .. } = report;
    match (report.outcome, &report.error) {
        (Outcome::Completed, _) if !json => {
            let blackout =
                report.blackout_ms.map_or("it was paused and stays so".into(), |ms| format!("blackout {ms:.2} ms"));
            println!(
                "{vm} runs on {to}: {blackout}, total {:.2} s, rounds: {}, {} sent",
                report.total_ms / 1e3,
                report.rounds.len(),
                format_bytes(report.bytes_sent)
            );
        }
        (Outcome::Completed, _) => {}
        (Outcome::Cancelled, _) => eprintln!("microvm: cancelled; {vm} runs on here"),
        (outcome, error) => {
            let owner = match report.owner {
                Owner::Source => format!("{vm} is here, as it was"),
                Owner::Destination => format!("{vm} is on {to}"),
                Owner::Unknown => format!("it is not known who owns {vm}"),
            };
            match error {
                Some(e) => {
                    eprintln!("microvm: the migration of {vm} to {to} failed in {}: {}; {owner}", e.phase, e.message);
                    if !e.hint.is_empty() {
                        eprintln!("  what to do: {}", e.hint);
                    }
                }
                None => eprintln!("microvm: the migration of {vm} to {to} ended {outcome:?}; {owner}"),
            }
        }
    }
}
