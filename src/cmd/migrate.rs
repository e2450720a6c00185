//! `microvm migrate`: asks the VM's process to move it, and watches.

use std::io::{IsTerminal, stderr};
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use indicatif::{ProgressBar, ProgressStyle};
use migrator::precopy::running_percent;
use migrator::{Outcome, Owner, Phase, Report};

use super::inspect::{compressed, progress};
use crate::cli::MigrateArgs;
use crate::client::{self, Conversation};
use crate::journals::{Left, in_doubt};
use crate::machine::view::{Answer, MigrateRequest, ProgressView, Request, resolve};
use crate::machine::{Exit, exit_code};
use crate::runtime::Runtime;
use crate::trust::Link;
use crate::units::format_bytes;

/// Lines without a terminal: at each new round or phase, and at least this often.
const LINE_EVERY: Duration = Duration::from_secs(1);

/// Carries it out.
pub fn run(runtime: &Runtime, args: &MigrateArgs) -> Result<u8> {
    client::find(runtime, &args.name)?;
    let how = &args.how;
    let request = MigrateRequest {
        to: args.to.clone(),
        addresses: resolve(&args.to),
        how: how.into(),
        link: Link::to(&args.to, how.insecure_plaintext)?,
    };
    let name = &args.name;
    let mut conversation = Conversation::ask(runtime, name, &Request::Migrate(request))?;
    let cancel = {
        let (runtime, name) = (runtime.clone(), name.clone());
        move || client::ask(&runtime, &name, &Request::Cancel).map(drop)
    };
    on_interrupt(cancel, format!("microvm inspect {name} shows how it goes on"))?;
    let mut show = Show::new(!args.detach);
    let (report, exit) = loop {
        let answer = match conversation.next() {
            Ok(answer) => answer,
            Err(error) => return no_answer(runtime, name, error),
        };
        match answer {
            Answer::Progress(_) if args.detach => {
                if !how.json {
                    println!("{name} is on its way to {}: microvm inspect {name} shows how far", args.to);
                }
                return Ok(0);
            }
            Answer::Progress(p) => show.progress(&p),
            Answer::Report { report, exit } => break (report, exit),
            other => bail!("unexpected answer: {other:?}"),
        }
    };
    show.end();
    if report.owner == Owner::Destination {
        // The name is free again when this command says that it is done, so that the VM can come back at once.
        client::wait_until_let_go(runtime, name)?;
    }
    if how.json {
        println!("{}", serde_json::to_string(&report)?);
    }
    tell(&report, exit.as_ref(), how.json, "here");
    Ok(exit_code_of(&report, exit.as_ref()))
}

/// What the command ends with.
pub(super) fn exit_code_of(report: &Report, exit: Option<&Exit>) -> u8 {
    let lost = report.outcome == Outcome::Failed && report.owner == Owner::Destination;
    if lost || exit.is_some() { NOWHERE } else { exit_code(report.outcome) }
}

/// Exit code: the VM ended, or was lost, and runs nowhere.
const NOWHERE: u8 = 5;
/// Exit code of a command that its user left (128 + SIGINT).
const LEFT: i32 = 130;

/// The VM's process said no more. If it is dead, that is the news, and its journal says the rest.
fn no_answer(runtime: &Runtime, name: &str, error: anyhow::Error) -> Result<u8> {
    let dir = runtime.vm(name)?;
    // A process that dies closes its sockets before it lets go of its locks.
    client::wait_until_let_go(runtime, name)?;
    if dir.is_held()? {
        return Err(error);
    }
    let left = dir.outgoing.left()?;
    if let Left::InDoubt(decided) = left {
        eprintln!("microvm: {}", in_doubt(name, &decided));
        return Ok(exit_code(Outcome::InDoubt));
    }
    if matches!(left, Left::Released(_)) || !dir.is_known() {
        // It let go, or its agent has asked meanwhile and cleared up.
        println!("{name} runs on the other host; its process here ended before it could say more");
        return Ok(exit_code(Outcome::Completed));
    }
    if let Some(exit) = Exit::read(&dir)? {
        eprintln!("microvm: {}", exit.sentence(name));
        return Ok(NOWHERE);
    }
    eprintln!(
        "microvm: {error:#}: the process of {name} died, and {name} with it: microvm logs --process {name} may say why, \
         microvm rm {name} removes what is left"
    );
    Ok(NOWHERE)
}

/// The first Ctrl-C cancels and waits for the answer; the second lets the migration go on and ends the command. `later` says how to
/// see then how it goes on.
pub(super) fn on_interrupt(mut cancel: impl FnMut() -> Result<()> + Send + 'static, later: String) -> Result<()> {
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
            if let Err(error) = cancel() {
                eprintln!("microvm: {error:#}");
            }
            tokio::select! { _ = interrupt.recv() => {}, _ = terminate.recv() => {} }
            eprintln!("microvm: leaving; {later}");
            std::process::exit(LEFT);
        });
    })?;
    let _ = is_ready.recv();
    Ok(())
}

/// What is shown while it runs: a bar on a terminal, lines elsewhere.
pub(super) struct Show {
    bar: Option<ProgressBar>,
    last: (Phase, u32, Option<Instant>),
}

impl Show {
    /// With a bar on a terminal, if there is time for one.
    pub(super) fn new(waits: bool) -> Self {
        let bar = (stderr().is_terminal() && waits).then(|| {
            let style = ProgressStyle::with_template("{bar:24} {msg}").expect("the template is a constant");
            ProgressBar::new(1).with_style(style)
        });
        Show { bar, last: (Phase::Idle, 0, None) }
    }

    pub(super) fn progress(&mut self, p: &ProgressView) {
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

    pub(super) fn end(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

/// The end, for people. `exit`: how the VM ended meanwhile, if it did. `source`: where the VM was, "here" or "at host1".
pub(super) fn tell(report: &Report, exit: Option<&Exit>, json: bool, source: &str) {
    let Report { vm, to, .. } = report;
    if report.outcome == Outcome::InDoubt {
        return eprintln!(
            "microvm: in doubt: {to} was told to run {vm} and does not answer. {vm} stays paused {source}, and goes on asking; \
             microvm ps shows how it stands, microvm resolve --help how to settle it by hand"
        );
    }
    match (report.outcome, &report.error) {
        (Outcome::Completed, _) if !json => {
            let blackout =
                report.blackout_ms.map_or("it was paused and stays so".into(), |ms| format!("blackout {ms:.2} ms"));
            println!(
                "{vm} runs on {to}: {blackout}, total {:.2} s, rounds: {}, {} sent{}",
                report.total_ms / 1e3,
                report.rounds.len(),
                format_bytes(report.bytes_sent),
                report
                    .compression
                    .iter()
                    .filter(|c| c.level.is_some())
                    .map(|c| format!(" ({})", compressed(c)))
                    .collect::<String>()
            );
            if let Some(limit) = &report.limit {
                println!("  limited by {}", limit.sentence);
            }
            if report.throttle_permille > 0 {
                let (percent, seconds) = (running_percent(report.throttle_permille), report.throttled_ms / 1e3);
                println!("  the guest was throttled for {seconds:.1} s, at last to {percent} %");
            }
        }
        (Outcome::Completed, _) => {}
        (Outcome::Cancelled, _) if exit.is_none() => eprintln!("microvm: cancelled; {vm} runs on {source}"),
        (outcome, error) => {
            let owner = match report.owner {
                Owner::Source => exit.map_or_else(|| format!("{vm} is {source}, as it was"), |exit| exit.sentence(vm)),
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
