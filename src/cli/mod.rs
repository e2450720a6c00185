//! The command line. Doc comments here are the help.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};
use migrator::Compression;
use migrator::options::DEFAULT_STREAMS;

pub mod trust;

use crate::machine::view::{Mode, Throttle};
use crate::units::{parse_dead_after, parse_duration, parse_rate, parse_size};

/// Port of the agent.
pub const DEFAULT_PORT: u16 = 7437;

/// Run Linux guests as small KVM virtual machines, and move them, running, between hosts.
///
/// Try it:
///   microvm run                                    boots the built-in guest; Ctrl-] leaves its console
///   microvm agent --listen ADDR:7437 …             on the other host: takes VMs in (see microvm agent --help)
///   microvm migrate NAME --to HOST                 moves a running VM there
///
/// VMs are kept under $MICROVM_RUNTIME_DIR (default: /run/microvm, or $XDG_RUNTIME_DIR/microvm without root).
///
/// Journals of migrations are kept under $MICROVM_STATE_DIR (default: /var/lib/microvm, or ~/.local/state/microvm without root;
/// beside the VMs if only MICROVM_RUNTIME_DIR is set).
///
/// Exit codes: 0 done; 1 failed (after a migration: the VM still runs where it was); 2 wrong usage; 3 cancelled, the VM still
/// runs where it was; 4 in doubt: see `microvm resolve --help`; 5 the VM ended or was lost in its migration: it runs nowhere.
#[derive(Debug, Parser)]
#[command(name = "microvm", version = crate::fault_points::VERSION, verbatim_doc_comment, disable_help_subcommand = true)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Boot a VM
    ///
    /// Without --kernel it boots the built-in guest "pulse", which writes memory, checks it, and says so once every 100 ms.
    /// In the foreground the terminal is the guest's console: Ctrl-] leaves it (the VM goes on), and when the guest powers off
    /// the command ends.
    ///
    /// Examples:
    ///   microvm run
    ///   microvm run --name web -d --memory 256M --cmdline 'ws=64M rate=100M'
    ///   microvm run --name web --net bridge=br0,ip=10.0.0.2/24
    ///   microvm run --kernel vmlinuz --initrd initrd.img --cmdline 'console=ttyS0' --memory 512M --cpus 2
    #[command(verbatim_doc_comment)]
    Run(RunArgs),
    /// Move a running VM to another host
    ///
    /// The destination runs `microvm agent` (or `microvm receive`). Memory is copied while the guest runs, in rounds; then it is
    /// paused for the rest, for no longer than --max-downtime as far as can be foreseen. Whatever fails before the switchover is
    /// decided leaves the VM running here. Ctrl-C cancels.
    ///
    /// Examples:
    ///   microvm migrate web --to host2
    ///   microvm migrate web --to 10.0.0.7:7437 --max-downtime 20ms --bandwidth 1gbit --json
    #[command(verbatim_doc_comment)]
    Migrate(MigrateArgs),
    /// Move a VM from another host to this one
    ///
    /// As `migrate`, asked for from the other end. The other host's policy must allow it (docs/trust.md), and `microvm agent` runs on
    /// both hosts. Ctrl-C cancels; if this command dies otherwise, the migration goes on.
    ///
    /// Example:
    ///   microvm pull web --from host1
    #[command(verbatim_doc_comment)]
    Pull(PullArgs),
    /// Take VMs in from other hosts: the host's daemon
    ///
    /// Listens for migrations. Each VM that comes gets a process of its own, which lives on when the agent ends.
    ///
    /// Examples:
    ///   microvm agent                                                  on loopback: for trying it out, or behind a tunnel
    ///   microvm agent --listen 10.0.0.7:7437 --insecure-plaintext      on a network that is yours alone
    #[command(verbatim_doc_comment)]
    Agent(AgentArgs),
    /// Take one VM in, without an agent: waits for it, prints its name, and ends
    Receive(ReceiveArgs),
    /// List the VMs of this host
    Ps(JsonArgs),
    /// Show all about a VM
    Inspect(InspectArgs),
    /// Attach to a VM's console; Ctrl-] leaves it
    Console(NameArgs),
    /// Print what a VM's console has said
    Logs(LogsArgs),
    /// Stop a VM: press its power button, and after a while end it
    Stop(StopArgs),
    /// Stop a VM where it is
    Pause(NameArgs),
    /// Let a paused VM go on
    Resume(NameArgs),
    /// Remove what is left of VMs that have ended
    Rm(RmArgs),
    /// Stop the migration of a VM: it goes on where it is
    Cancel(NameArgs),
    /// Settle by hand a migration that is in doubt
    ///
    /// In doubt: the source has told the destination to run the VM, and has heard nothing since. It keeps asking, and settles by
    /// itself as soon as the destination answers. Settle it by hand only if the destination will never answer.
    ///
    /// --keep runs the VM here. If it runs at the destination too, it then runs twice: make sure first that the destination is off
    /// or does not have it (there: microvm ps).
    /// --discard lets go of the VM here. If the destination does not have it, it is lost.
    #[command(verbatim_doc_comment)]
    Resolve(ResolveArgs),
    /// Set up who may talk to whom: a fleet's own small CA, and hosts' certificates
    ///
    /// Three commands for two hosts (docs/trust.md):
    ///   host1$ microvm trust init
    ///   host1$ microvm trust issue host2 | ssh host2 microvm trust import -
    ///   host2$ microvm agent --listen 0.0.0.0:7437
    ///
    /// Files are kept under $MICROVM_CONFIG_DIR (default: /etc/microvm, or ~/.config/microvm without root), in trust/.
    #[command(subcommand, verbatim_doc_comment)]
    Trust(trust::TrustCommand),
    /// Tell what this host can do, and what is missing
    Doctor(JsonArgs),
    /// The process of one VM; started by `run` and `agent`.
    #[command(hide = true)]
    VmProcess,
}

/// `run`.
#[derive(Debug, Args)]
pub struct RunArgs {
    /// The VM's name; a new one is made up if none is given
    #[arg(long)]
    pub name: Option<String>,
    /// vCPUs, 1 to 64
    #[arg(long, default_value_t = 1)]
    pub cpus: u8,
    /// Memory: a multiple of 1M, from 4M to 512G
    #[arg(long, default_value = "256M", value_parser = parse_size)]
    pub memory: u64,
    /// A kernel: Linux bzImage or uncompressed ELF, or any ELF with a PVH note; the built-in guest if none is given
    #[arg(long, value_name = "PATH")]
    pub kernel: Option<PathBuf>,
    /// An initrd for it
    #[arg(long, value_name = "PATH", requires = "kernel")]
    pub initrd: Option<PathBuf>,
    /// Kernel command line (default for a kernel of your own: console=ttyS0)
    ///
    /// The built-in guest takes: ws=64M rate=200M pattern=seq|random seed=7 report=100ms ip=10.0.0.2/24
    #[arg(long, value_name = "STR")]
    pub cmdline: Option<String>,
    /// A network interface: tap=NAME or bridge=NAME, then [,mac=52:54:00:…][,ip=10.0.0.2/24]…
    ///
    /// bridge= makes a TAP and puts it on that bridge; tap= uses (or makes) the TAP of that name. ip= tells which addresses to
    /// announce after a migration; others are learned from what the guest sends. May be given several times.
    #[arg(long, value_name = "SPEC")]
    pub net: Vec<String>,
    /// What holds its process.
    #[command(flatten)]
    pub cage: CageArgs,
    /// Run in the background
    #[arg(short, long)]
    pub detach: bool,
    /// Print the VM as JSON (with --detach)
    #[arg(long, requires = "detach")]
    pub json: bool,
}

/// `pull`.
#[derive(Debug, Args)]
pub struct PullArgs {
    /// The VM
    pub name: String,
    /// Where it is: HOST or HOST:PORT (default port 7437)
    #[arg(long, value_name = "HOST[:PORT]")]
    pub from: String,
    /// This host's agent as the other host dials it (default: the address from which this host reaches the other, if this host's
    /// certificate has it, else this host's name; port 7437)
    #[arg(long, value_name = "HOST[:PORT]")]
    pub to: Option<String>,
    /// How to move it.
    #[command(flatten)]
    pub how: MoveArgs,
}

/// `migrate`.
#[derive(Debug, Args)]
pub struct MigrateArgs {
    /// The VM
    pub name: String,
    /// The destination: HOST or HOST:PORT (default port 7437)
    #[arg(long, value_name = "HOST[:PORT]")]
    pub to: String,
    /// How to move it.
    #[command(flatten)]
    pub how: MoveArgs,
    /// Return as soon as it has begun; `microvm inspect` shows how far it is
    #[arg(long)]
    pub detach: bool,
}

/// How a VM is moved, whoever asks for it.
#[derive(Debug, Args)]
pub struct MoveArgs {
    /// The longest blackout with which to switch over
    #[arg(long, value_name = "TIME", default_value = "50ms", value_parser = parse_duration)]
    pub max_downtime: Duration,
    /// Give up if the switchover has not begun after so long
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    pub timeout: Option<Duration>,
    /// Send pages no faster than this: 100M (bytes a second) or 1gbit
    #[arg(long, value_name = "RATE", value_parser = parse_rate)]
    pub bandwidth: Option<u64>,
    /// TCP connections over which pages go, 1 to 16: more of them help where these do not fill the link
    #[arg(long, value_name = "N", default_value_t = DEFAULT_STREAMS, value_parser = clap::value_parser!(u16).range(1..=16))]
    pub streams: u16,
    /// Compress pages: auto (where that is faster, as measured meanwhile), none, zstd or zstd:LEVEL (-7 to 12)
    #[arg(long, value_name = "HOW", default_value = "auto")]
    pub compress: Compression,
    /// How memory moves
    #[arg(long, value_enum, default_value_t = Mode::PreCopy)]
    pub mode: Mode,
    /// Compare hashes of all memory before the switchover (takes blackout time: for tests and the distrustful)
    #[arg(long)]
    pub verify: bool,
    /// Whether the guest may be slowed down where it writes faster than the link carries: by no more than it takes, until the switchover
    #[arg(long, value_enum, default_value_t = Throttle::Auto)]
    pub throttle: Throttle,
    /// A destination that is silent for so long is dead; other limits on waiting for it are in proportion
    #[arg(long, value_name = "TIME", default_value = "5s", value_parser = parse_dead_after)]
    pub dead_after: Duration,
    /// Neither encrypt nor prove anything to anybody: whoever is on the way can read and change the VM
    #[arg(long)]
    pub insecure_plaintext: bool,
    /// Print the report as one JSON object
    #[arg(long)]
    pub json: bool,
}

/// `agent`.
#[derive(Debug, Args)]
pub struct AgentArgs {
    /// Address to listen on
    #[arg(long, default_value_t = SocketAddr::from(([127, 0, 0, 1], DEFAULT_PORT)), value_name = "ADDR:PORT")]
    pub listen: SocketAddr,
    /// Take connections in clear text, from anybody
    ///
    /// Whoever reaches the port can read and replace guests' memory, and start VMs here: only for a network that is yours alone.
    #[arg(long)]
    pub insecure_plaintext: bool,
    /// A source that is silent for so long is dead; other limits on waiting for it are in proportion
    #[arg(long, value_name = "TIME", default_value = "5s", value_parser = parse_dead_after)]
    pub dead_after: Duration,
    /// Put VMs that were on a bridge elsewhere on this bridge here
    #[arg(long, value_name = "NAME")]
    pub bridge: Option<String>,
    /// What peers may make this host do (docs/trust.md); default: policy.json in $MICROVM_CONFIG_DIR, if it is there
    #[arg(long, value_name = "FILE")]
    pub policy: Option<PathBuf>,
    /// What holds the processes of VMs that come.
    #[command(flatten)]
    pub cage: CageArgs,
}

/// What holds a VM's process.
#[derive(Debug, Args)]
pub struct CageArgs {
    /// Put the VM's process into this cgroup, a directory below /sys/fs/cgroup
    #[arg(long, value_name = "DIR")]
    pub cgroup: Option<PathBuf>,
    /// Give the VM's process no sandbox
    ///
    /// A guest that breaks out of KVM then has all rights of whoever typed this command. For looking into what goes wrong.
    #[arg(long)]
    pub no_sandbox: bool,
}

/// `receive`.
#[derive(Debug, Args)]
pub struct ReceiveArgs {
    /// Where and how to listen.
    #[command(flatten)]
    pub agent: AgentArgs,
    /// Give up if no VM has come after so long
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    pub timeout: Option<Duration>,
}

/// A VM.
#[derive(Debug, Args)]
pub struct NameArgs {
    /// The VM
    pub name: String,
}

/// Only `--json`.
#[derive(Debug, Args)]
pub struct JsonArgs {
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// `inspect`.
#[derive(Debug, Args)]
pub struct InspectArgs {
    /// The VM
    pub name: String,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// `logs`.
#[derive(Debug, Args)]
pub struct LogsArgs {
    /// The VM
    pub name: String,
    /// Go on until the VM ends
    #[arg(short, long)]
    pub follow: bool,
    /// The VM process's own messages instead of the guest's
    #[arg(long)]
    pub process: bool,
}

/// `stop`.
#[derive(Debug, Args)]
pub struct StopArgs {
    /// The VM
    pub name: String,
    /// How long the guest may take to switch itself off; 0: end it at once
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = parse_duration)]
    pub timeout: Duration,
}

/// `rm`.
#[derive(Debug, Args)]
pub struct RmArgs {
    /// The VMs
    #[arg(required = true)]
    pub names: Vec<String>,
    /// End VMs that still run, and remove what a VM that died in the middle of a migration has left
    #[arg(short, long)]
    pub force: bool,
}

/// `resolve`.
#[derive(Debug, Args)]
#[command(group(clap::ArgGroup::new("resolution").required(true).args(["keep", "discard"])))]
pub struct ResolveArgs {
    /// The VM
    pub name: String,
    /// Run it here
    #[arg(long)]
    pub keep: bool,
    /// Let go of it here
    #[arg(long)]
    pub discard: bool,
}
