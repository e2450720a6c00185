//! The host daemon: takes migrations in.
//!
//! It never touches guest memory. An offer that it accepts becomes a process of the VM's own; the connections of that migration are
//! handed to it as they come. What became of a migration it reads from that migration's journal, so it need not have been there: an
//! agent that was killed and started again answers like the one before.

use std::collections::HashMap;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::mpsc::{self, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use migrator::MigrationId;
use migrator::driver::request;
use migrator::options::Timeouts;
use migrator::traits::{Connection, Dialer};
use migrator::transport::{self, ConnectError};
use migrator::wire::preamble::{Preamble, Role};

mod gate;
mod peers;
pub mod pull;
mod requests;

use crate::cli::{AgentArgs, DEFAULT_PORT};
use crate::client;
use crate::fault_points;
use crate::machine::sandbox::Cage;
use crate::machine::{State, connections};
use crate::policy::{self, Policy};
use crate::recovery;
use crate::runtime::{Runtime, VmDir};
use crate::trust::Link;
use crate::trust::store::config_dir;
use gate::Gate;
use peers::Peers;

/// How long it serves.
pub enum Service {
    /// Until a signal.
    UntilStopped,
    /// Until one VM has come.
    OneVm {
        /// How long to wait for it.
        patience: Option<Duration>,
    },
}

/// After the one VM of `receive` has come, questions about its migration are answered for so long.
const LINGER: Duration = Duration::from_secs(10);
/// Between two looks at the VM that `receive` waits for.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// A migration that was accepted.
struct Arriving {
    receiver: UnixStream,
    /// Which host offered it; in clear text, which address.
    from: String,
}

/// What its threads share.
struct Agent {
    runtime: Runtime,
    bridge: Option<String>,
    cage: Cage,
    timeouts: Timeouts,
    /// Where connections of a migration go: to the process that receives it.
    arrivals: Mutex<HashMap<MigrationId, Arriving>>,
    /// Told of each VM that is on its way.
    accepted: Sender<VmDir>,
    gate: Arc<Gate>,
    peers: Peers,
    /// Where the policy stands; whether it was named, and so must be there.
    policy: (PathBuf, bool),
    /// Held from looking at what the host has to starting one more VM.
    admitting: Mutex<()>,
}

/// Serves.
pub fn run(runtime: &Runtime, args: &AgentArgs, service: Service) -> Result<u8> {
    let peers = Peers::new(args.listen, args.insecure_plaintext)?;
    let policy = match &args.policy {
        Some(path) => (path.clone(), true),
        None => (config_dir()?.join(policy::FILE), false),
    };
    Policy::read(&policy.0, policy.1)?;
    vmm::host::Host::open().context("this host cannot take VMs in")?;
    let listener = TcpListener::bind(args.listen).with_context(|| format!("cannot listen on {}", args.listen))?;
    let (accepted, arrivals) = mpsc::channel();
    let agent = Arc::new(Agent {
        runtime: runtime.clone(),
        bridge: args.bridge.clone(),
        cage: args.cage.settings()?,
        timeouts: Timeouts::with_dead_after(args.dead_after),
        arrivals: Mutex::default(),
        accepted,
        gate: Arc::default(),
        peers,
        policy,
        admitting: Mutex::default(),
    });
    // Before the first answer: a migration that will not come is given up by then.
    recovery::start(runtime, agent.timeouts)?;
    let address = listener.local_addr()?;
    tracing::info!(%address, "ready for migrations");
    let acceptor = thread::Builder::new().name("accept".into()).spawn(move || accept(&agent, &listener))?;
    match service {
        Service::UntilStopped => {
            acceptor.join().map_err(|_| anyhow::anyhow!("the acceptor panicked"))?;
            Ok(0)
        }
        Service::OneVm { patience } => {
            let deadline = patience.map(|p| Instant::now() + p);
            let left = || deadline.map_or(Duration::MAX, |d| d.saturating_duration_since(Instant::now()));
            let none = || format!("no VM came within {:?}", patience.unwrap_or_default());
            let vm = match deadline {
                None => arrivals.recv().context("the acceptor is gone")?,
                Some(_) => arrivals.recv_timeout(left()).with_context(none)?,
            };
            wait_for(runtime, &vm)?;
            println!("{}", vm.name());
            thread::sleep(LINGER);
            Ok(0)
        }
    }
}

/// Until the VM is this host's.
fn wait_for(runtime: &Runtime, vm: &VmDir) -> Result<()> {
    loop {
        if !vm.is_held()? {
            bail!("{} was not received: its migration failed or was cancelled, and it is where it was", vm.name());
        }
        match client::inspect(runtime, vm.name()).map(|view| view.state) {
            Ok(State::Starting | State::Receiving | State::InDoubt) | Err(_) => thread::sleep(LOOK_EVERY),
            Ok(_) => return Ok(()),
        }
    }
}

/// `host` or `host:port`, as one can dial it.
pub fn with_port(host: &str) -> String {
    let has_port = host
        .rsplit_once(':')
        .is_some_and(|(name, port)| port.parse::<u16>().is_ok() && (!name.contains(':') || name.ends_with(']')));
    match host {
        _ if has_port => host.into(),
        v6 if v6.contains(':') && !v6.starts_with('[') => format!("[{v6}]:{DEFAULT_PORT}"),
        name => format!("{name}:{DEFAULT_PORT}"),
    }
}

/// How this host reaches the agent of another one: to migrate, and to ask what became of a migration.
/// `addresses` are those of its name, or why there are none: whoever is in a sandbox cannot look them up.
pub fn dialer(
    link: &Link,
    host: &str,
    timeouts: Timeouts,
    addresses: Result<Vec<SocketAddr>, String>,
) -> Result<Arc<dyn Dialer>> {
    Ok(Arc::new(Stepped(link.dialer(host, timeouts)?.with_addresses(addresses))))
}

/// A dialer whose connections are steps of a migration ([`fault_points`]).
struct Stepped<D>(D);

impl<D: Dialer> Dialer for Stepped<D> {
    fn peer(&self) -> String {
        self.0.peer()
    }

    fn dial(&self, preamble: &Preamble) -> Result<Box<dyn Connection>, ConnectError> {
        let step = |when| {
            let what = format!("dial-{:?}.{when}", preamble.role).to_lowercase();
            let failed = |source| ConnectError::Broken { peer: self.peer(), source };
            fault_points::step_of("source", &what, preamble.id, "").map_err(failed)
        };
        step("before")?;
        let connection = self.0.dial(preamble)?;
        step("after")?;
        Ok(connection)
    }
}

fn accept(agent: &Arc<Agent>, listener: &TcpListener) {
    loop {
        let (stream, peer) = match listener.accept() {
            Ok(accepted) => accepted,
            Err(error) => {
                // Out of descriptors, most likely: others may end meanwhile.
                tracing::warn!(%error, "a connection cannot be accepted");
                thread::sleep(Duration::from_millis(100));
                continue;
            }
        };
        let place = match agent.gate.enter(peer.ip()) {
            Ok(place) => place,
            Err(why) => {
                tracing::warn!(%peer, "turned away: {why}");
                continue;
            }
        };
        let for_thread = agent.clone();
        let served = thread::Builder::new().name("connection".into()).stack_size(512 << 10).spawn(move || {
            if let Err(error) = serve(&for_thread, stream) {
                tracing::info!(%peer, "{}", migrator::report::chain(error.as_ref()));
            }
            drop(place);
        });
        if let Err(error) = served {
            tracing::warn!(%error, %peer, "turned away");
        }
    }
}

fn serve(agent: &Agent, stream: TcpStream) -> Result<()> {
    let tls = agent.peers.tls();
    let accepted = match &tls {
        Some(_) => transport::accept_tls(stream, agent.timeouts)?,
        None => transport::accept(stream, agent.timeouts)?,
    };
    let preamble = accepted.preamble;
    match preamble.role {
        Role::Request => {
            let address = accepted.peer().to_string();
            let connection = accepted.welcome()?;
            let (connection, identity): (Box<dyn Connection>, _) = match tls {
                None => (Box::new(connection), None),
                Some(tls) => {
                    let peer = tls.accept(connection, &preamble, agent.timeouts)?;
                    if let Err(error) = agent.policy().and_then(|policy| policy.check_peer(Some(peer.identity()))) {
                        peer.refuse(&format!("{error:#}"))?;
                        return Err(error);
                    }
                    let identity = peer.identity().clone();
                    (Box::new(peer.welcome()?), Some(identity))
                }
            };
            request::serve(connection, agent.timeouts.request, &mut requests::Handler::new(agent, identity, address))?;
        }
        Role::Control | Role::Pages => {
            let receiver = {
                let arrivals = agent.arrivals.lock().unwrap_or_else(PoisonError::into_inner);
                arrivals.get(&preamble.id).map(|arriving| arriving.receiver.try_clone()).transpose()?
            };
            let Some(receiver) = receiver else {
                accepted.refuse("there is no such migration here (any more)")?;
                bail!("a connection for an unknown migration");
            };
            let stream = accepted.welcome()?.into_stream();
            fault_points::step_of("agent", "hand-over", preamble.id, "")?;
            connections::hand_over(&receiver, &stream, preamble.role, preamble.stream)
                .context("the receiving process does not take the connection")?;
        }
    }
    Ok(())
}

impl Agent {
    /// What peers may do, as the file says now.
    fn policy(&self) -> Result<Policy> {
        Policy::read(&self.policy.0, self.policy.1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_port_is_added_where_there_is_none() {
        for (given, dialled) in [
            ("host2", "host2:7437"),
            ("host2:99", "host2:99"),
            ("10.0.0.7", "10.0.0.7:7437"),
            ("fd00::2", "[fd00::2]:7437"),
            ("[fd00::2]:99", "[fd00::2]:99"),
            ("[fd00::2]", "[fd00::2]:7437"),
        ] {
            assert_eq!(with_port(given), dialled);
        }
    }
}
