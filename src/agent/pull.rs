//! A peer asks for a VM of this host: an ordinary migration, asked for from the other end.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use migrator::driver::request::{Pull, Pulling};
use migrator::transport::tls::Identity;
use migrator::{Compression, Owner, Report};
use serde::{Deserialize, Serialize};

use super::{Agent, with_port};
use crate::client::{self, Conversation};
use crate::machine::view::{Answer, MigrateRequest, Mode, Request, Throttle, resolve};

/// What `microvm pull` says of how to move the VM: what `migrate` takes.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PullSettings {
    /// Allowed blackout, in microseconds.
    pub max_downtime_us: u64,
    /// Limit for everything up to the switchover, in milliseconds.
    pub timeout_ms: Option<u64>,
    /// Cap, bytes a second.
    pub bandwidth: Option<u64>,
    /// Page streams.
    pub streams: u16,
    /// Whether pages are compressed.
    pub compression: Compression,
    /// How memory moves.
    pub mode: Mode,
    /// Compare hashes of all memory at the switchover.
    pub verify: bool,
    /// Whether the guest may be slowed down.
    pub throttle: Throttle,
    /// How long a silent destination counts as alive, in milliseconds.
    pub dead_after_ms: u64,
}

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
    let settings: PullSettings =
        serde_json::from_value(pull.settings.clone()).context("how to move it cannot be understood")?;
    ensure!(
        (1..=migrator::wire::MAX_STREAMS).contains(&settings.streams),
        "{} page streams cannot be",
        settings.streams
    );
    let (runtime, vm) = (&agent.runtime, pull.vm.as_str());
    ensure!(runtime.vm(vm)?.exists(), "there is no VM {vm} on this host");
    let PullSettings {
        max_downtime_us,
        timeout_ms,
        bandwidth,
        streams,
        compression,
        mode,
        verify,
        throttle,
        dead_after_ms,
    } = settings;
    let (to, addresses, link) = (pull.to.clone(), resolve(&pull.to), agent.peers.link()?);
    let request = MigrateRequest {
        to,
        addresses,
        max_downtime_us,
        timeout_ms,
        bandwidth,
        streams,
        compression,
        mode,
        verify,
        throttle,
        dead_after_ms,
        link,
    };
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
