//! `microvm pull`: asks another host's agent for a VM, and watches.

use std::net::{ToSocketAddrs, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result, anyhow};
use migrator::driver::request::{self, Pull};
use migrator::options::Timeouts;
use migrator::{MigrationId, Outcome};

use super::migrate::{Show, exit_code_of, on_interrupt, tell};
use crate::agent::pull::host_of;
use crate::agent::with_port;
use crate::cli::PullArgs;
use crate::machine::exit_code;
use crate::machine::view::{How, ProgressView};
use crate::trust::Link;
use crate::trust::store::Store;

/// Carries it out.
pub fn run(args: &PullArgs) -> Result<u8> {
    let (name, how) = (&args.name, &args.how);
    let link = Link::to(&args.from, how.insecure_plaintext)?;
    let to = match &args.to {
        Some(to) => to.clone(),
        None => own_address(&args.from, &link)?,
    };
    let settings = How::from(how);
    let timeouts = Timeouts::with_dead_after(how.dead_after);
    let dialer = link.dialer(&args.from, timeouts)?;
    let cancelled = Arc::new(AtomicBool::new(false));
    let cancel = {
        let cancelled = cancelled.clone();
        move || {
            cancelled.store(true, Ordering::Relaxed);
            Ok(())
        }
    };
    on_interrupt(cancel, format!("the migration goes on; microvm ps here and on {} shows how", args.from))?;
    let source = format!("at {}", args.from);
    let (mut show, json) = (Show::new(true), how.json);
    let mut begun = false;
    let mut watch = |progress| {
        begun = true;
        // A peer that makes no sense is not a reason to stop: its report will tell.
        let Ok(progress) = serde_json::from_value::<ProgressView>(progress) else { return false };
        show.progress(&progress);
        cancelled.load(Ordering::Relaxed)
    };
    let pull = Pull { vm: name.clone(), to, settings: serde_json::to_value(settings)? };
    let id = MigrationId::random().context("the kernel gives no random numbers")?;
    let result = request::pull(&dialer, id, &pull, timeouts.request, &mut watch);
    show.end();
    let report = match result {
        Ok(Ok(report)) => report,
        Ok(Err(refusal)) => return Err(anyhow!("{} does not let {name} go: {refusal}", args.from)),
        // It may have come here, or be on its way, or be where it was.
        Err(error) if begun => {
            eprintln!(
                "microvm: the connection to {} was lost: {}; the migration of {name} goes on without it. microvm ps here and on {} shows \
                 where it is",
                args.from,
                migrator::report::chain(&error),
                args.from
            );
            return Ok(exit_code(Outcome::InDoubt));
        }
        Err(error) => {
            let hint = error.hint();
            let error = anyhow::Error::new(error).context(format!("{name} cannot be pulled"));
            return Err(if hint.is_empty() { error } else { anyhow!("{error:#}; {hint}") });
        }
    };
    if json {
        println!("{}", serde_json::to_string(&report)?);
    }
    tell(&report, None, json, &source);
    Ok(exit_code_of(&report, None))
}

/// How the other host reaches this one: by the address from which this one reaches it, or by this host's name if its certificate does
/// not have that address.
fn own_address(peer: &str, link: &Link) -> Result<String> {
    let unknown = || format!("this host's own address towards {peer} is not known: give it with --to");
    let address = with_port(peer).to_socket_addrs().with_context(|| format!("{}: no such host", host_of(peer)))?;
    let address = address.into_iter().next().with_context(unknown)?;
    // Connecting a datagram socket sends nothing; it only chooses the route.
    let socket = UdpSocket::bind(if address.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" }).with_context(unknown)?;
    socket.connect(address).with_context(unknown)?;
    let own = socket.local_addr().with_context(unknown)?.ip().to_string();
    Ok(match (link, Store::from_env()?.open()?) {
        (Link::Tls(_), Some(host)) if !host.facts.names.contains(&own) => host.facts.subject,
        _ => own,
    })
}
