//! What peers ask an agent: to take a VM, and what became of a migration.

use std::net::SocketAddr;
use std::os::unix::net::UnixStream;
use std::sync::PoisonError;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use migrator::driver::request::{AskAnswer, Offer, Pull, Pulling, Requests};
use migrator::handoff::{self, Answer, HandoffRecord, Step};
use migrator::journal::{FileJournal, JournalError};
use migrator::traits::{Durability, Journal, Refusal};
use migrator::transport::tls::Identity;
use migrator::{MigrationId, Report};
use rustix::net::RecvFlags;

use super::{Agent, Arriving, pull};
use crate::fault_points;
use crate::machine::endpoint::SourceFacts;
use crate::machine::process::{Arrival, Start};
use crate::machine::spawn;
use crate::machine::spec::MachineSpec;
use crate::policy::Load;
use crate::recovery;

/// The name of a VM whose migration has just failed here, or which has just left, is free again in a moment.
const TIDYING: Duration = Duration::from_secs(1);

/// Whether the receiving process wants no more connections.
fn is_closed(receiver: &UnixStream) -> bool {
    let mut byte = [0];
    let seen = rustix::net::recv(receiver, &mut byte, RecvFlags::PEEK | RecvFlags::DONTWAIT);
    !matches!(seen, Err(rustix::io::Errno::AGAIN))
}

impl Agent {
    /// What this host has.
    fn load(&self, peer: &str) -> Result<Load> {
        let mut load = Load { vms: 0, memory_bytes: 0, incoming: 0, incoming_from_peer: 0 };
        for vm in self.runtime.vms()? {
            if !vm.is_held()? {
                continue;
            }
            // It has none while it is being made; what is being made by us was counted before.
            let spec =
                std::fs::read(vm.config()).ok().and_then(|text| serde_json::from_slice::<MachineSpec>(&text).ok());
            load.vms += 1;
            load.memory_bytes += spec.map_or(0, |spec| spec.memory_bytes);
        }
        let mut arrivals = self.arrivals.lock().unwrap_or_else(PoisonError::into_inner);
        arrivals.retain(|_, arriving| !is_closed(&arriving.receiver));
        load.incoming = arrivals.len();
        load.incoming_from_peer = arrivals.values().filter(|arriving| arriving.from == peer).count();
        Ok(load)
    }
}

/// One connection's requests.
pub(super) struct Handler<'a> {
    agent: &'a Agent,
    /// Who has proved to be there; none in clear text.
    identity: Option<Identity>,
    /// The host that it is, or its address in clear text.
    peer: String,
    address: String,
}

impl Requests for Handler<'_> {
    fn offer(&mut self, offer: Offer) -> Result<(), Refusal> {
        let name = offer.vm.name.clone();
        tracing::info!(vm = name, from = self.peer, "offered");
        let id = offer.id;
        let _ = fault_points::step_of("agent", "offer.before", id, &name);
        let taken = self.take(offer);
        let _ = fault_points::step_of("agent", "offer.after", id, &name);
        taken.map_err(|error| {
            tracing::info!(vm = name, from = self.peer, reason = format!("{error:#}"), "not taken");
            refusal(&error)
        })
    }

    fn ask(&mut self, id: MigrationId) -> Result<AskAnswer, Refusal> {
        let _ = fault_points::step_of("agent", "ask.before", id, "");
        let answer = self.what_became_of(id).unwrap_or_else(|error| {
            tracing::warn!(%id, "cannot tell what became of a migration: {error:#}");
            Some(AskAnswer::Pending)
        });
        tracing::info!(%id, from = self.peer, ?answer, "asked");
        let reason = format!("the migration {id} is not one of {}", self.peer);
        answer.ok_or(Refusal { reason, mismatches: Vec::new() })
    }

    fn pull(&mut self, pull: Pull, peer: &mut dyn Pulling) -> Result<Option<Report>, Refusal> {
        pull::serve(self.agent, &pull, self.identity.as_ref(), &self.address, peer).map_err(|error| {
            tracing::info!(vm = pull.vm, by = self.peer, reason = format!("{error:#}"), "not pulled");
            refusal(&error)
        })
    }
}

fn refusal(error: &anyhow::Error) -> Refusal {
    Refusal { reason: format!("{error:#}"), mismatches: Vec::new() }
}

/// Whether a migration that was offered by `recorded` is another's than `asking`'s. What was offered in clear text is on record by
/// address, and anybody may ask.
fn is_anothers(recorded: &str, asking: Option<&Identity>) -> bool {
    asking.is_some_and(|asking| {
        !recorded.is_empty() && recorded != asking.host && recorded.parse::<SocketAddr>().is_err()
    })
}

impl<'a> Handler<'a> {
    pub(super) fn new(agent: &'a Agent, identity: Option<Identity>, address: String) -> Self {
        let peer = identity.as_ref().map_or_else(|| address.clone(), |identity| identity.host.clone());
        Handler { agent, identity, peer, address }
    }

    fn take(&self, offer: Offer) -> Result<()> {
        let agent = self.agent;
        let facts: SourceFacts =
            serde_json::from_value(offer.vm.facts.clone()).context("the VM's description cannot be read")?;
        let mut spec = facts.spec;
        anyhow::ensure!(spec.name == offer.vm.name, "the offer has two names for the VM");
        let dir = agent.runtime.vm(&spec.name)?;
        // What a process left of a VM of this name may be in the way, and need not be.
        recovery::settle(&dir, agent.timeouts)?;
        dir.remove_if_never_arrived(&agent.runtime)?;
        let deadline = Instant::now() + TIDYING;
        while dir.exists() {
            anyhow::ensure!(
                Instant::now() < deadline,
                "the name {} is taken on the destination: microvm ps there shows by what",
                spec.name
            );
            thread::sleep(Duration::from_millis(20));
        }
        let from = match (&self.identity, self.address.parse::<SocketAddr>()) {
            (None, Ok(address)) => address.ip().to_string(),
            _ => self.peer.clone(),
        };
        let policy = agent.policy()?;
        let link = agent.peers.link()?;
        let _admitting = agent.admitting.lock().unwrap_or_else(PoisonError::into_inner);
        policy.admit(&mut spec, agent.bridge.as_deref(), agent.load(&from)?)?;
        let id = offer.id;
        // Whoever has seen the id on the wire must not take another's place.
        let taken = agent.arrivals.lock().unwrap_or_else(PoisonError::into_inner).contains_key(&id);
        anyhow::ensure!(!taken, "this migration is under way already");
        let (ours, theirs) = UnixStream::pair()?;
        {
            let mut arrivals = agent.arrivals.lock().unwrap_or_else(PoisonError::into_inner);
            arrivals.insert(id, Arriving { receiver: ours, from });
        }
        let boot_folders = policy.boot_folders().to_vec();
        let arrival = |connections| Arrival {
            offer,
            from: self.peer.clone(),
            connections,
            dead_after: agent.timeouts.dead_after,
            link,
            boot_folders,
        };
        let (left, runtime) = (dir.clone(), agent.runtime.clone());
        let ended = move || {
            let journal = runtime.journals.incoming(id).and_then(|path| recovery::look_at_incoming(id, &path));
            if let Err(error) = journal.and_then(|_| left.remove_if_never_arrived(&runtime)) {
                tracing::warn!(vm = left.name(), "{error:#}");
            }
        };
        let cage = agent.cage.clone();
        let started = spawn::vm_process(|fd| Start { spec, arrival: fd.map(arrival), cage }, Some(theirs), ended);
        if started.is_err() {
            agent.arrivals.lock().unwrap_or_else(PoisonError::into_inner).remove(&id);
        }
        started?;
        // Nobody listens when this is no one-shot service.
        let _ = agent.accepted.send(dir);
        Ok(())
    }

    /// From the migration's journal. If the receiving process holds it, it may not be the last word; if nobody does and nothing was
    /// promised, the migration is given up here and now, for good.
    /// None: it is another host's migration, about which nothing is said and nothing written.
    fn what_became_of(&self, id: MigrationId) -> Result<Option<AskAnswer>> {
        let path = self.agent.runtime.journals.incoming(id)?;
        let anothers = |records: &[HandoffRecord]| {
            // A tombstone names who asked, not whose it was: whatever became of that attempt, it never will, for anybody.
            let mut begun = records.iter().filter(|record| record.id == id && record.step != Step::GaveUp);
            begun.any(|record| is_anothers(&record.peer, self.identity.as_ref()))
        };
        let answer = match FileJournal::open(&path) {
            Err(JournalError::InUse(_)) => match FileJournal::read(&path)? {
                records if anothers(&records) => return Ok(None),
                records => handoff::answer(&records, id, true),
            },
            Err(error) => return Err(error.into()),
            Ok(mut journal) => {
                let records = journal.load()?;
                if anothers(&records) {
                    return Ok(None);
                }
                let answer = handoff::answer(&records, id, false);
                if answer == Answer::NoTrace {
                    journal.append(&recovery::tombstone(id, &self.peer), Durability::Durable)?;
                    Answer::GaveUp
                } else {
                    answer
                }
            }
        };
        // A living process with nothing promised yet settles it itself.
        Ok(Some(AskAnswer::try_from(answer).unwrap_or(AskAnswer::Pending)))
    }
}
