//! What is written, what goes wrong while it is, and how often each was tried.

use std::collections::BTreeMap;

use migrator::wire::Message;
use migrator::wire::message::Kind;
use migrator::wire::preamble::Role;

use crate::common::Random;

/// One write to a connection: a step of the protocol, as far as a link can see it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum What {
    PreambleRequest,
    PreambleControl,
    PreamblePages,
    Welcome,
    Chunk,
    Pages,
    Marker,
    Message(u16),
}

impl What {
    /// Every step.
    pub fn all() -> Vec<Self> {
        use What as W;
        let mut all =
            vec![W::PreambleRequest, W::PreambleControl, W::PreamblePages, W::Welcome, W::Chunk, W::Pages, W::Marker];
        // What a host says that pulls a VM to itself is beside the migration.
        let of_pulls = [Kind::Pull, Kind::Progress, Kind::Report, Kind::Cancel];
        all.extend(Kind::ALL.iter().filter(|kind| !of_pulls.contains(kind)).map(|kind| W::Message(*kind as u16)));
        all
    }

    pub fn preamble(role: Role) -> Self {
        match role {
            Role::Request => Self::PreambleRequest,
            Role::Control => Self::PreambleControl,
            Role::Pages => Self::PreamblePages,
        }
    }

    pub fn message(message: &Message) -> Self {
        Self::Message(message.kind() as u16)
    }

    fn is(self, kind: Kind) -> bool {
        self == Self::Message(kind as u16)
    }

    pub fn name(self) -> String {
        match self {
            Self::Message(kind) => Kind::try_from(kind).expect("a kind").name().to_owned(),
            other => format!("{other:?}"),
        }
    }
}

/// What goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fault {
    /// The bytes from here on are late.
    Delay,
    /// They are later than any limit allows.
    Stall,
    /// A bit is turned.
    Flip,
    /// The reader's end of the connection closes here.
    Truncate,
    /// All connections are cut, and no new ones can be made for a while. Both sides are told.
    Cut,
    /// The same, and nobody is told.
    Silence,
    /// This direction of all connections swallows everything from here on, and nobody is told.
    HalfOpen,
    /// Somebody opens a connection with the same preamble.
    Again,
    KillHere,
    PowerHere,
    KillThere,
    PowerThere,
    /// The destination's host and its agent never come back.
    HostGone,
    /// Nobody answers on the destination's port for a while.
    AgentAway,
    Cancel,
    CancelThere,
    GuestGone,
    DiskFullHere,
    DiskFullThere,
    /// The next call of this kind fails at the source.
    VmFailsHere,
    VmFailsThere,
    /// The arbiter cannot be reached for a while.
    ArbiterAway,
}

impl Fault {
    pub const ALL: [Self; 22] = [
        Self::Delay,
        Self::Stall,
        Self::Flip,
        Self::Truncate,
        Self::Cut,
        Self::Silence,
        Self::HalfOpen,
        Self::Again,
        Self::KillHere,
        Self::PowerHere,
        Self::KillThere,
        Self::PowerThere,
        Self::HostGone,
        Self::AgentAway,
        Self::Cancel,
        Self::CancelThere,
        Self::GuestGone,
        Self::DiskFullHere,
        Self::DiskFullThere,
        Self::VmFailsHere,
        Self::VmFailsThere,
        Self::ArbiterAway,
    ];
}

/// A fault that waits for its step.
#[derive(Clone, Copy, Debug)]
pub struct Planned {
    pub fault: Fault,
    pub at: What,
    /// How many of these steps go well before.
    pub after: u32,
}

/// Up to three faults. Many steps are never taken when all goes well: then the first fault leads there.
pub fn plan(random: &mut Random) -> Vec<Planned> {
    let steps = What::all();
    let at = steps[random.below(steps.len() as u64) as usize];
    let fault = Fault::ALL[random.below(Fault::ALL.len() as u64) as usize];
    let after = if random.chance(75) { 0 } else { random.below(4) as u32 };
    let mut plan = Vec::new();
    let after_commit = [What::Message(Kind::Commit as u16), What::Message(Kind::Running as u16)];
    if at.is(Kind::Ask) || at.is(Kind::Answer) || random.chance(10) {
        let losses = [Fault::Cut, Fault::Silence, Fault::HalfOpen, Fault::Truncate, Fault::Flip, Fault::KillHere];
        let fault = losses[random.below(6) as usize];
        plan.push(Planned { fault, at: after_commit[random.below(2) as usize], after: 0 });
    } else if at.is(Kind::Refused) || at.is(Kind::GaveUp) || random.chance(5) {
        // Building, or loading, or starting.
        let before = match random.below(if at.is(Kind::Refused) { 1 } else { 3 }) {
            0 => What::Message(Kind::Accepted as u16),
            1 => What::Message(Kind::State as u16),
            _ => What::Message(Kind::Commit as u16),
        };
        plan.push(Planned { fault: Fault::VmFailsThere, at: before, after: 0 });
    } else if at.is(Kind::Abort) {
        let until = [Kind::Ready, Kind::Round, Kind::State, Kind::Prepared][random.below(4) as usize];
        plan.push(Planned { fault: Fault::Cancel, at: What::Message(until as u16), after: 0 });
    }
    plan.push(Planned { fault, at, after });
    if random.chance(25) {
        let at = steps[random.below(steps.len() as u64) as usize];
        let fault = Fault::ALL[random.below(Fault::ALL.len() as u64) as usize];
        plan.push(Planned { fault, at, after: random.below(3) as u32 });
    }
    plan
}

/// What was tried, and what came of it.
#[derive(Clone, Debug, Default)]
pub struct Coverage {
    pub runs: u64,
    pub retries: u64,
    pub writes: u64,
    /// Pages that were left for the second round.
    pub left: u64,
    pub tried: BTreeMap<(What, Fault), u64>,
    pub outcomes: BTreeMap<String, u64>,
    /// Times that both machines were in a world of the model.
    pub compared: u64,
    /// Bits turned in pages that nobody compared.
    pub unseen_flips: u64,
}

impl Coverage {
    pub fn add(&mut self, other: Self) {
        let Self { runs, retries, writes, left, tried, outcomes, compared, unseen_flips } = other;
        self.runs += runs;
        self.retries += retries;
        self.writes += writes;
        self.left += left;
        self.compared += compared;
        self.unseen_flips += unseen_flips;
        for (key, count) in tried {
            *self.tried.entry(key).or_default() += count;
        }
        for (key, count) in outcomes {
            *self.outcomes.entry(key).or_default() += count;
        }
    }

    pub fn outcome(&mut self, what: impl Into<String>) {
        *self.outcomes.entry(what.into()).or_default() += 1;
    }

    pub fn print(&self) {
        let faults: u64 = self.tried.values().sum();
        println!(
            "{} runs, {} retries, {} writes, {} pages left, {faults} faults, {} comparisons with the model, {} unseen flips",
            self.runs, self.retries, self.writes, self.left, self.compared, self.unseen_flips
        );
        for fault in Fault::ALL {
            let counts = |count: fn(u64, u64) -> u64, first| {
                What::all().into_iter().map(|at| self.tried.get(&(at, fault)).copied().unwrap_or(0)).fold(first, count)
            };
            println!("  {fault:?}: {}, at least {} at each step", counts(|a, b| a + b, 0), counts(u64::min, u64::MAX));
        }
        for at in What::all() {
            let at_step: Vec<_> =
                Fault::ALL.iter().map(|fault| self.tried.get(&(at, *fault)).copied().unwrap_or(0)).collect();
            let (sum, least) = (at_step.iter().sum::<u64>(), at_step.iter().min().unwrap());
            println!("  at {}: {sum} faults, at least {least} of each kind", at.name());
        }
        for (outcome, count) in &self.outcomes {
            println!("  {count} {outcome}");
        }
    }
}
