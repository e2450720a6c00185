//! What the control socket says: requests, answers, and the VM as others see it. One JSON object a line.

use std::net::{SocketAddr, ToSocketAddrs};
use std::time::Duration;

use anyhow::{Result, ensure};
use migrator::handoff::HandoffRecord;
use migrator::options::Timeouts;
use migrator::report::CompressionReport;
use migrator::wire::MAX_STREAMS;
use migrator::{Compression, Options, Progress, Report};
use serde::{Deserialize, Serialize};
use vmm::sandbox::Sandbox;

use super::spec::{BootSpec, NetSpec};
use super::{Exit, Machine, State, lock, unix_seconds};
use crate::agent::with_port;
use crate::cli::MoveArgs;
use crate::journals::unix_ms;
use crate::runtime::VmDir;
use crate::trust::Link;
use crate::units::check_dead_after;

/// What a client asks.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "op")]
pub enum Request {
    /// All about the VM.
    Inspect,
    /// Stop the guest where it is.
    Pause,
    /// Let it go on.
    Resume,
    /// Power button, then by force.
    Stop {
        /// How long to wait for the guest, in milliseconds.
        patience_ms: u64,
    },
    /// Move it to another host. Answered by progress lines and then the report.
    Migrate(MigrateRequest),
    /// Stop the migration.
    Cancel,
    /// Settle a migration in doubt.
    Resolve {
        /// Keep the VM here (true), or give it to the destination.
        keep: bool,
    },
}

/// `microvm migrate`, as the VM process gets it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct MigrateRequest {
    /// HOST or HOST:PORT.
    pub to: String,
    /// The addresses of that host, or why there are none: the VM's process looks up no names.
    pub addresses: Result<Vec<SocketAddr>, String>,
    /// How it moves.
    pub how: How,
    /// What its connections are secured with.
    pub link: Link,
}

/// How a VM moves, as `migrate` and `pull` were told. Peers say it, too: see [`How::check`].
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct How {
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
    /// `pre-copy` or `stop-and-copy`.
    pub mode: Mode,
    /// Compare hashes of all memory at the switchover.
    pub verify: bool,
    /// Whether the guest may be slowed down.
    pub throttle: Throttle,
    /// How long a silent destination counts as alive, in milliseconds.
    pub dead_after_ms: u64,
}

impl From<&MoveArgs> for How {
    fn from(args: &MoveArgs) -> Self {
        How {
            max_downtime_us: args.max_downtime.as_micros() as u64,
            timeout_ms: args.timeout.map(|limit| limit.as_millis() as u64),
            bandwidth: args.bandwidth,
            streams: args.streams,
            compression: args.compress,
            mode: args.mode,
            verify: args.verify,
            throttle: args.throttle,
            dead_after_ms: args.dead_after.as_millis() as u64,
        }
    }
}

impl How {
    /// Refuses what the command line would not have taken.
    pub fn check(&self) -> Result<()> {
        let streams = self.streams;
        ensure!((1..=MAX_STREAMS).contains(&streams), "{streams} page streams cannot be: 1 to {MAX_STREAMS} can");
        check_dead_after(Duration::from_millis(self.dead_after_ms))?;
        Ok(())
    }
}

/// How memory moves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// Copy while the guest runs, pause it for the rest.
    PreCopy,
    /// Pause it, then copy everything.
    StopAndCopy,
}

/// Whether a guest may be slowed down.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Throttle {
    /// Rather give up.
    Never,
    /// Where it writes faster than the link carries, and no more than it takes.
    Auto,
}

/// The addresses of `host` or `host:port`.
pub fn resolve(host: &str) -> Result<Vec<SocketAddr>, String> {
    with_port(host).to_socket_addrs().map(Iterator::collect).map_err(|error| error.to_string())
}

impl MigrateRequest {
    /// As the migrator wants it.
    pub fn options(&self) -> Options {
        let from = rustix::system::uname().nodename().to_string_lossy().into_owned();
        let how = &self.how;
        Options {
            from,
            mode: match how.mode {
                Mode::PreCopy => migrator::Mode::PreCopy,
                Mode::StopAndCopy => migrator::Mode::StopAndCopy,
            },
            max_downtime: Duration::from_micros(how.max_downtime_us),
            timeout: how.timeout_ms.map(Duration::from_millis),
            bandwidth: how.bandwidth,
            streams: how.streams,
            compression: how.compression,
            verify: how.verify,
            throttle: how.throttle == Throttle::Auto,
            timeouts: Timeouts::with_dead_after(Duration::from_millis(how.dead_after_ms)),
            ..Options::default()
        }
    }
}

/// One line of an answer.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Answer {
    /// Done.
    Ok,
    /// Not done, and why.
    Error(String),
    /// [`Request::Inspect`].
    Vm(Box<VmView>),
    /// How far a migration is.
    Progress(Box<ProgressView>),
    /// How it ended, or how it stands if it is in doubt for long.
    Report {
        /// What there is to say of it.
        report: Box<Report>,
        /// How the VM ended, if it did so meanwhile.
        exit: Option<Exit>,
    },
    /// How the VM ended.
    Exit(Exit),
}

/// A VM, for `inspect` and `ps`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct VmView {
    /// Its name.
    pub name: String,
    /// What it is doing.
    pub state: State,
    /// Its process.
    pub pid: u32,
    /// Seconds since 1970 at which this process got it.
    pub since: u64,
    /// vCPUs.
    pub cpus: u8,
    /// RAM in bytes.
    pub memory_bytes: u64,
    /// What boots.
    pub boot: BootSpec,
    /// Interfaces as configured.
    pub nets: Vec<NetSpec>,
    /// What holds its process.
    pub sandbox: Sandbox,
    /// The guest's addresses as far as they are known, interface by interface.
    pub addresses: Vec<Vec<String>>,
    /// Traffic, interface by interface.
    pub traffic: Vec<Traffic>,
    /// The migration under way.
    pub migration: Option<ProgressView>,
    /// The last migration that ended here, or the report so far of one that is in doubt.
    pub last_migration: Option<Report>,
}

/// What an interface has carried, from the guest's side.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Traffic {
    /// Frames received by the guest.
    pub rx_packets: u64,
    /// Bytes received.
    pub rx_bytes: u64,
    /// Frames sent by the guest.
    pub tx_packets: u64,
    /// Bytes sent.
    pub tx_bytes: u64,
    /// Frames lost here, either way.
    pub dropped: u64,
}

/// How far a migration is.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ProgressView {
    /// The other side.
    pub peer: String,
    /// Whether the VM comes here.
    pub incoming: bool,
    /// `preflight`, `pre-copy`, …
    pub phase: migrator::Phase,
    /// The round under way.
    pub round: u32,
    /// Pages of this round sent.
    pub pages_done: u64,
    /// Pages of this round.
    pub pages_total: u64,
    /// Bytes sent so far.
    pub bytes_sent: u64,
    /// What compression did so far; nothing on the side that receives.
    pub compression: Option<CompressionReport>,
    /// Bytes a second that the guest dirties.
    pub dirty_rate: Option<u64>,
    /// Bytes a second that the link carries.
    pub bandwidth: Option<u64>,
    /// Thousandths of its time that are taken from the guest right now.
    pub throttle_permille: u16,
    /// Milliseconds that this round will still take.
    pub eta_ms: Option<u64>,
    /// The blackout if the switchover began now, in milliseconds.
    pub predicted_blackout_ms: Option<f64>,
    /// Milliseconds since the start.
    pub elapsed_ms: u64,
    /// In doubt for so many milliseconds.
    pub in_doubt_ms: Option<u64>,
    /// How it stands, if it is in doubt.
    pub doubt: Option<DoubtView>,
}

/// A migration in doubt: COMMIT was sent, and what became of it is not known.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct DoubtView {
    /// The destination.
    pub peer: String,
    /// Since when, in milliseconds since 1970.
    pub since_unix_ms: u64,
    /// When the destination was asked last, in milliseconds since 1970.
    pub last_asked_unix_ms: Option<u64>,
    /// The latest answer, or why there is none.
    pub last_answer: Option<String>,
}

impl DoubtView {
    /// Of a VM whose process died in doubt, from its journal.
    pub fn of_the_dead(dir: &VmDir, decided: HandoffRecord) -> Self {
        let asked = dir.outgoing.asked(&decided);
        DoubtView {
            peer: decided.peer,
            since_unix_ms: decided.unix_ms,
            last_asked_unix_ms: asked.as_ref().map(|asked| asked.unix_ms),
            last_answer: asked.map(|asked| asked.answer),
        }
    }

    /// A line for people, with this host's local times.
    pub fn sentence(&self) -> String {
        let asked = match (self.last_asked_unix_ms, &self.last_answer) {
            (None, _) => "not asked yet".into(),
            (Some(at), None) => format!("last asked {}: no answer yet", local_time(at)),
            (Some(at), Some(answer)) => format!("last asked {}: {answer}", local_time(at)),
        };
        let since = local_time(self.since_unix_ms);
        format!("in doubt since {since} whether it runs on {}, {asked}; microvm resolve --help", self.peer)
    }
}

/// `2026-03-01 14:03:05`, in this host's time zone.
fn local_time(unix_ms: u64) -> String {
    let time = i64::try_from(unix_ms).ok().and_then(|ms| jiff::Timestamp::from_millisecond(ms).ok());
    let local = |time: jiff::Timestamp| time.to_zoned(jiff::tz::TimeZone::system()).strftime("%F %T").to_string();
    time.map_or_else(|| "an unknown time".into(), local)
}

impl ProgressView {
    /// From the migrator's own.
    pub fn new(peer: &str, incoming: bool, progress: &Progress) -> Self {
        let ms = |d: Duration| d.as_millis() as u64;
        let now = unix_ms();
        let at = |since_the_start: Duration| now.saturating_sub(ms(progress.elapsed.saturating_sub(since_the_start)));
        ProgressView {
            peer: peer.into(),
            incoming,
            phase: progress.phase,
            round: progress.round,
            pages_done: progress.pages_done,
            pages_total: progress.pages_total,
            bytes_sent: progress.bytes_sent,
            compression: (!incoming).then(|| progress.compression.clone()),
            dirty_rate: progress.dirty_rate,
            bandwidth: progress.bandwidth,
            throttle_permille: progress.throttle_permille,
            eta_ms: progress.eta.map(ms),
            predicted_blackout_ms: progress.predicted_blackout.map(|d| d.as_secs_f64() * 1e3),
            elapsed_ms: ms(progress.elapsed),
            in_doubt_ms: progress.in_doubt_since.map(|since| ms(progress.elapsed.saturating_sub(since))),
            doubt: progress.in_doubt_since.map(|since| DoubtView {
                peer: peer.into(),
                since_unix_ms: at(since),
                last_asked_unix_ms: progress.last_asked.map(at),
                last_answer: progress.last_answer.clone(),
            }),
        }
    }
}

impl Machine {
    /// All about the VM.
    pub fn view(&self) -> VmView {
        let migration = self.migration().map(|m| ProgressView::new(&m.peer, m.incoming, &m.handle.progress()));
        // In doubt, the report so far is what there is to say.
        let so_far = self.migration().filter(|m| m.handle.progress().phase == migrator::Phase::InDoubt);
        let last_migration =
            so_far.and_then(|m| m.handle.report()).or_else(|| lock(&self.status).last_migration.clone());
        let (addresses, traffic) = self.with_vm(|vm| (vm.addresses(), vm.traffic())).unwrap_or_default();
        let addresses = addresses.into_iter().map(|nic| {
            let v4 = nic.ipv4.iter().map(ToString::to_string);
            v4.chain(nic.ipv6.iter().map(ToString::to_string)).collect()
        });
        let traffic = traffic.into_iter().map(|t| Traffic {
            rx_packets: t.rx_packets,
            rx_bytes: t.rx_bytes,
            tx_packets: t.tx_packets,
            tx_bytes: t.tx_bytes,
            dropped: t.rx_dropped + t.tx_dropped,
        });
        VmView {
            name: self.spec.name.clone(),
            state: self.state(),
            pid: std::process::id(),
            since: unix_seconds(self.started),
            cpus: self.spec.cpus,
            memory_bytes: self.spec.memory_bytes,
            boot: self.spec.boot.clone(),
            nets: self.spec.nets.clone(),
            sandbox: self.opened.sandbox.clone(),
            addresses: addresses.collect(),
            traffic: traffic.collect(),
            migration,
            last_migration,
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_peer_cannot_say_what_the_command_line_would_not_take() {
        let good = json!({
            "max_downtime_us": 50_000, "timeout_ms": null, "bandwidth": null, "streams": 1, "compression": "auto",
            "mode": "pre-copy", "verify": false, "throttle": "auto", "dead_after_ms": 5000,
        });
        let taken =
            |how: &serde_json::Value| serde_json::from_value::<How>(how.clone()).is_ok_and(|how| how.check().is_ok());
        assert!(taken(&good));
        for (field, bad) in [
            ("streams", json!(0)),
            ("streams", json!(17)),
            ("dead_after_ms", json!(0)),
            ("dead_after_ms", json!(u64::MAX)),
            ("compression", json!("zstd:99")),
            ("throttle", json!("maybe")),
            ("more", json!(1)),
        ] {
            let mut how = good.clone();
            how[field] = bad;
            assert!(!taken(&how), "{how}");
        }
    }
}
