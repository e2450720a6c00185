//! A peer asks for a VM of this host: an ordinary migration, asked for from the other end.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use migrator::driver::request::{Pull, Pulling};
use migrator::transport::tls::Identity;
use migrator::{Owner, Report};

use super::{Agent, with_port};
use crate::client::{self, Conversation};
use crate::machine::view::{Answer, How, MigrateRequest, Request, resolve};

/// The VM's process says something more often than this.
const PROMPT: Duration = Duration::from_secs(30);

/// HOST or HOST:PORT without the port.
pub fn host_of(to: &str) -> String {
    let with_port = with_port(to);
    let host = with_port.rsplit_once(':').map_or(with_port.as_str(), |(host, _)| host);
    host.trim_start_matches('[').trim_end_matches(']').into()
}

/// Moves the VM to whoever asks, and to nobody else. None: it went away meanwhile; the migration goes on.
pub(super) fn serve(
    agent: &Agent,
    pull: &Pull,
    identity: Option<&Identity>,
    address: &str,
    peer: &mut dyn Pulling,
) -> Result<Option<Report>> {
    agent.policy()?.check_pull(identity, &pull.vm)?;
    let to = host_of(&pull.to);
    let own = match identity {
        Some(identity) => identity.is_called(&to),
        None => address.parse::<SocketAddr>().is_ok_and(|address| address.ip().to_string() == to),
    };
    let whose = identity.map_or(address, |identity| identity.host.as_str());
    ensure!(
        own,
        "{to} is not a name or address of {whose}: a host pulls VMs to itself, under a name that its certificate has (--to)"
    );
    let how: How = serde_json::from_value(pull.settings.clone()).context("how to move it cannot be understood")?;
    how.check()?;
    let (runtime, vm) = (&agent.runtime, pull.vm.as_str());
    ensure!(runtime.vm(vm)?.exists(), "there is no VM {vm} on this host");
    let (to, addresses, link) = (pull.to.clone(), resolve(&pull.to), agent.peers.link()?);
    let request = MigrateRequest { to, addresses, how, link };
    tracing::info!(vm, to = request.to, by = whose, "pulled");
    let mut conversation = Conversation::ask(runtime, vm, &Request::Migrate(request))?;
    conversation.be_patient(PROMPT)?;
    let mut cancelled = false;
    loop {
        match conversation.next()? {
            Answer::Progress(progress) => match peer.progress(serde_json::to_value(progress)?) {
                Ok(true) if !cancelled => {
                    cancelled = true;
                    // Too late, perhaps: then the report says so.
                    if let Err(error) = client::ask(runtime, vm, &Request::Cancel) {
                        tracing::info!(vm, "not cancelled: {error:#}");
                    }
                }
                Ok(_) => {}
                Err(error) => {
                    tracing::info!(vm, %error, "whoever pulled it does not listen any more; its migration goes on");
                    return Ok(None);
                }
            },
            Answer::Report { report, .. } => {
                if report.owner == Owner::Destination {
                    client::wait_until_let_go(runtime, vm)?;
                }
                return Ok(Some(*report));
            }
            other => bail!("unexpected answer: {other:?}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_of_destinations() {
        for (to, host) in [
            ("host2", "host2"),
            ("host2:99", "host2"),
            ("10.0.0.7", "10.0.0.7"),
            ("fd00::2", "fd00::2"),
            ("[fd00::2]:99", "fd00::2"),
        ] {
            assert_eq!(host_of(to), host);
        }
    }
}
