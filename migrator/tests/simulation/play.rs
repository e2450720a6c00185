//! One run: a clock, what happens when, and what must be true after each step.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use migrator::arbiter::{Arbiter, ArbiterError, Claimant, MemoryArbiter};
use migrator::handoff::{DestinationState, SourceState, Step};
use migrator::options::{Mode, Options, Timeouts};
use migrator::{MigrationId, Owner};

use crate::common::Random;
use crate::destination_host::There;
use crate::faults::{Coverage, Fault, Planned, What};
use crate::link::{Connection, HERE, Purpose, THERE};
use crate::memory::Memory;
use crate::projection::Projection;
use crate::source_host::Here;
use crate::world::Guest;

/// Microseconds.
pub fn seconds(count: u64) -> u64 {
    count * 1_000_000
}

#[derive(Debug)]
pub enum Event {
    Deliver {
        connection: usize,
        end: usize,
        bytes: Vec<u8>,
    },
    Eof {
        connection: usize,
        end: usize,
    },
    /// The connection is found dead at this end.
    Reset {
        connection: usize,
        end: usize,
    },
    DialLimit {
        connection: usize,
        greeted: bool,
    },
    Ping {
        connection: usize,
        end: usize,
    },
    /// Has anything come lately?
    Watch {
        connection: usize,
        end: usize,
    },
    /// The last words have had their time.
    Hang {
        connection: usize,
        end: usize,
    },
    Source(migrator::source::Event),
    Destination(migrator::destination::Event),
    /// A record is written at this end, or cannot be.
    Write {
        end: usize,
        step: Step,
        process: u32,
    },
    /// A claim takes effect, and is answered.
    Claim(Claimant),
    SendPart {
        n: u32,
        chunk: u64,
        last: bool,
    },
    Tick {
        end: usize,
    },
    Guest,
    Strike(Fault),
    DiskIsMended {
        end: usize,
    },
    Restart,
    AskAgain,
    Human,
}

/// What one run is made of besides its faults.
#[derive(Clone, Debug)]
pub struct Setting {
    pub mode: Mode,
    pub verify: bool,
    pub streams: u16,
    pub arbiter: Option<Arc<MemoryArbiter>>,
    /// The guest writes more than the link carries, and is slowed down at once.
    pub busy: bool,
}

impl Setting {
    pub fn new(random: &mut Random) -> Self {
        Self {
            mode: if random.chance(20) { Mode::StopAndCopy } else { Mode::PreCopy },
            verify: random.chance(50),
            streams: 1 + random.below(3) as u16,
            arbiter: random.chance(30).then(Arc::default),
            busy: random.chance(20),
        }
    }
}

pub struct World {
    pub random: Random,
    pub now: u64,
    pub queue: BTreeMap<(u64, u64), Event>,
    sequence: u64,
    plan: Vec<Planned>,
    pub coverage: Coverage,
    pub trace: bool,
    pub id: MigrationId,
    pub setting: Setting,
    pub timeouts: Timeouts,
    pub connections: Vec<Connection>,
    pub down_until: u64,
    pub agent_away_until: u64,
    pub arbiter_away_until: u64,
    /// A bit of a page was turned on its way.
    pub flipped_page: bool,
    pub here: Here,
    pub there: There,
    worlds: Arc<HashSet<Projection>>,
}

impl World {
    pub fn new(
        mut random: Random,
        memory: Memory,
        setting: Setting,
        plan: Vec<Planned>,
        worlds: Arc<HashSet<Projection>>,
    ) -> Self {
        let id = MigrationId(std::array::from_fn(|_| random.next() as u8));
        let timeouts = Timeouts::default();
        let mut options = Options {
            streams: setting.streams,
            mode: setting.mode,
            verify: setting.verify,
            max_downtime: Duration::from_millis(40),
            timeouts,
            arbiter: setting.arbiter.clone().map(|arbiter| arbiter as Arc<dyn Arbiter>),
            ..Options::default()
        };
        if setting.busy {
            // Little more than a switchover alone takes, and as little patience as can be.
            options.max_downtime = Duration::from_millis(6);
            (options.convergence.stall_rounds, options.convergence.stall_time) = (0, Duration::ZERO);
        }
        let mut world = Self {
            here: Here::new(options, memory),
            there: There::new(setting.streams),
            random,
            now: 0,
            queue: BTreeMap::new(),
            sequence: 0,
            plan,
            coverage: Coverage::default(),
            trace: false,
            id,
            setting,
            timeouts,
            connections: vec![],
            down_until: 0,
            agent_away_until: 0,
            arbiter_away_until: 0,
            flipped_page: false,
            worlds,
        };
        world.at(0, Event::Source(migrator::source::Event::Begin));
        world.at(0, Event::Guest);
        world.at(seconds(100), Event::Human);
        world
    }

    pub fn at(&mut self, time: u64, event: Event) {
        self.sequence += 1;
        self.queue.insert((time, self.sequence), event);
    }

    pub fn after(&mut self, delay: u64, event: Event) {
        self.at(self.now + delay, event);
    }

    pub fn tell(&self, what: impl FnOnce() -> String) {
        if self.trace {
            println!("{:>12} µs  {}", self.now, what());
        }
    }

    /// The faults that were planned for this step.
    pub fn hits(&mut self, what: What) -> Vec<Fault> {
        let (mut hits, coverage) = (Vec::new(), &mut self.coverage);
        self.plan.retain_mut(|planned| {
            if planned.at != what {
                return true;
            }
            if planned.after > 0 {
                planned.after -= 1;
                return true;
            }
            *coverage.tried.entry((what, planned.fault)).or_default() += 1;
            hits.push(planned.fault);
            false
        });
        for fault in &hits {
            self.tell(|| format!("FAULT {fault:?} at {}", what.name()));
        }
        hits
    }

    /// Plays until everything is settled, and a little longer.
    pub fn run(&mut self) {
        let mut until = None;
        while let Some(((at, _), event)) = self.queue.pop_first() {
            if until.is_some_and(|until| at > until) {
                return;
            }
            self.now = at;
            assert!(at < seconds(900), "it hangs: {:?} {:?}", self.here.source.phase(), self.there.state());
            self.happen(event);
            self.check();
            let over = self.here.is_over() && self.there.is_over();
            until = until.filter(|_| over).or(over.then_some(at + 400_000));
        }
        assert!(until.is_some(), "nothing happens any more: {:?} {:?}", self.here.source.phase(), self.there.state());
    }

    fn happen(&mut self, event: Event) {
        match event {
            Event::Deliver { connection, end, bytes } => {
                let reader = &mut self.connections[connection].ends[end];
                if reader.reads {
                    reader.buffer.extend(bytes);
                    reader.heard = self.now;
                    if end == HERE { self.read_here(connection) } else { self.read_there(connection) }
                }
            }
            Event::Eof { connection, end } => {
                // What this end still has to say can be heard.
                let writes = self.connections[connection].ends[end].writes;
                self.connections[connection].ends[end].writes = false;
                self.over(connection, end, "the other side closed it");
                let last_words = self.connections[connection].purpose == Purpose::Control;
                self.connections[connection].ends[end].writes = writes && last_words;
            }
            Event::Reset { connection, end } => self.over(connection, end, "connection reset by peer"),
            Event::Hang { connection, end } => self.close(connection, end),
            Event::DialLimit { connection, greeted } => {
                let end = &self.connections[connection].ends[HERE];
                if end.reads && end.greeted == greeted {
                    self.over(connection, HERE, "nothing came in time");
                }
            }
            Event::Ping { connection, end } => {
                if self.connections[connection].ends[end].writes {
                    self.send(connection, end, &migrator::wire::Message::Ping(self.now));
                    self.after(seconds(1), Event::Ping { connection, end });
                }
            }
            Event::Watch { connection, end } => {
                let reader = &self.connections[connection].ends[end];
                let due = reader.heard + self.timeouts.dead_after.as_micros() as u64;
                if reader.reads && due <= self.now {
                    self.over(connection, end, "nothing came for 5s");
                } else if reader.reads {
                    self.at(due, Event::Watch { connection, end });
                }
            }
            Event::Source(event) => self.source(event),
            Event::Destination(event) => self.destination(event),
            Event::Write { end, step, process } => self.writes(end, step, process),
            Event::Claim(by) => self.claims(by),
            Event::SendPart { n, chunk, last } => self.send_part(n, chunk, last),
            Event::Tick { end } if end == HERE => {
                if self.here.tick_at.take_if(|at| *at <= self.now).is_some() {
                    self.source(migrator::source::Event::Tick);
                }
            }
            Event::Tick { .. } => {
                if self.there.tick_at.take_if(|at| *at <= self.now).is_some() {
                    self.destination(migrator::destination::Event::Tick);
                }
            }
            Event::Guest => self.guest(),
            Event::Strike(fault) => self.strike(fault),
            Event::DiskIsMended { end } if end == HERE => self.here.disk.full = false,
            Event::DiskIsMended { .. } => self.there.disk.full = false,
            Event::Restart => self.restart(),
            Event::AskAgain => self.ask_again(),
            Event::Human => self.resolve(),
        }
    }

    fn over(&mut self, connection: usize, end: usize, why: &str) {
        if !self.connections[connection].ends[end].reads {
            return;
        }
        self.tell(|| format!("connection {connection} is over for end {end}: {why}"));
        // What came before and makes no whole message is lost with it.
        if end == HERE { self.over_here(connection, why) } else { self.over_there(connection, why) }
    }

    /// Sends a message on a connection.
    pub fn send(&mut self, connection: usize, from: usize, message: &migrator::wire::Message) {
        self.tell(|| format!("{} from end {from} on connection {connection}", message.kind().name()));
        self.write(connection, from, What::message(message), migrator::wire::encode(message));
    }

    /// A control connection begins: each end wants to hear from the other.
    pub fn keep_alive(&mut self, connection: usize, end: usize) {
        self.connections[connection].ends[end].heard = self.now;
        self.after(0, Event::Ping { connection, end });
        let limit = self.timeouts.dead_after.as_micros() as u64;
        self.after(limit, Event::Watch { connection, end });
    }

    fn claims(&mut self, by: Claimant) {
        let Some(arbiter) = self.setting.arbiter.clone() else { unreachable!() };
        let away = self.now < self.arbiter_away_until;
        // A claim whose answer is lost may have been made.
        let word = if away && self.random.chance(50) { None } else { Some(arbiter.claim(self.id, by)) };
        let answer = word.filter(|_| !away).unwrap_or_else(|| Err(ArbiterError("it cannot be reached".into())));
        self.tell(|| format!("the {by} claims: {answer:?}, winner {:?}", arbiter.winner(self.id)));
        let delay = 1 + self.random.below(3000);
        let event = match by {
            Claimant::Source => Event::Source(migrator::source::Event::Claimed(answer)),
            Claimant::Destination => Event::Destination(migrator::destination::Event::Claimed(answer)),
        };
        self.after(delay, event);
    }

    fn strike(&mut self, fault: Fault) {
        let while_ = 200_000 + self.random.below(seconds(30));
        match fault {
            Fault::KillHere | Fault::PowerHere => self.source_dies(fault == Fault::PowerHere),
            Fault::KillThere | Fault::PowerThere => self.destination_dies(fault == Fault::PowerThere),
            Fault::HostGone => {
                self.destination_dies(true);
                self.there.host_gone = true;
            }
            Fault::AgentAway => self.agent_away_until = self.now + while_,
            Fault::Cancel => self.source(migrator::source::Event::Cancel),
            Fault::CancelThere => self.destination(migrator::destination::Event::Cancel),
            Fault::GuestGone => self.source(migrator::source::Event::GuestGone("it powered off".into())),
            Fault::DiskFullHere => {
                self.here.disk.full = true;
                self.after(while_, Event::DiskIsMended { end: HERE });
            }
            Fault::DiskFullThere => {
                self.there.disk.full = true;
                self.after(while_, Event::DiskIsMended { end: THERE });
            }
            Fault::VmFailsHere => {
                let steps = ["log", "collect", "throttle", "pause", "save", "resume"];
                self.here.fails = Some(steps[self.random.below(6) as usize]);
            }
            Fault::VmFailsThere => {
                let steps = ["prepare", "load", "start", "start-late"];
                // Those that can still come, and most often the next one.
                let left = &steps[self.there.vm_steps.min(2)..];
                let which = if self.random.chance(60) { 0 } else { self.random.below(left.len() as u64) as usize };
                self.there.fails = Some(left[which]);
            }
            Fault::ArbiterAway => self.arbiter_away_until = self.now + while_,
            fault => unreachable!("{fault:?} befalls a link"),
        }
    }

    /// The promise, at every moment.
    fn check(&mut self) {
        let (here, there) = (self.here.runs(), self.there.guest);
        assert!(!(here && there == Guest::Runs), "both run it");
        assert!(!(here && there != Guest::NeverRan), "it runs here again after it ran there");
        if self.here.is_up() && (self.here.source.handoff().is_settled() || self.here.source.handoff().in_doubt()) {
            assert_eq!(self.here.memory.throttle, 0, "it is still slowed down");
        }
        if let Some(projection) = Projection::of(self) {
            self.coverage.compared += 1;
            assert!(
                self.worlds.contains(&projection),
                "this is in no world of the model (docs/model.md): {projection:#?}"
            );
        }
    }

    /// What must be true in the end.
    pub fn settle(&mut self) {
        let there = self.there.guest;
        // Whoever lost what it had by dying had it.
        let lost_there = there == Guest::Ran || self.there.died_as_owner;
        match (self.here.is_up(), self.here.report.clone()) {
            (true, report) => {
                let report = report.expect("it is over");
                assert_eq!(
                    report.owner == Owner::Destination,
                    self.here.source.handoff().state() == SourceState::Released
                );
                let text = |error: &Option<migrator::report::ErrorReport>| {
                    error.as_ref().map_or(String::new(), |e| e.message.clone())
                };
                match report.owner {
                    Owner::Destination => {
                        assert!(there == Guest::Runs || lost_there || self.here.discarded, "nobody has it: {report:?}");
                        assert!(self.here.memory.paused);
                        let how = if self.here.discarded {
                            "discarded by hand"
                        } else if lost_there {
                            "moved, and died there"
                        } else {
                            "moved"
                        };
                        self.coverage.outcome(how);
                    }
                    Owner::Source => {
                        assert!(there == Guest::NeverRan, "it ran there: {report:?}");
                        let not_resumed = text(&report.error).contains("could not be resumed");
                        assert!(!self.here.memory.paused || not_resumed, "nobody runs it: {report:?}");
                        assert!(!self.here.memory.is_logging());
                        let phase = report.error.as_ref().expect("why").phase;
                        self.coverage.outcome(format!("kept: {:?} in {phase}", report.outcome));
                    }
                    Owner::Unknown => panic!("in doubt at the end: {report:?}"),
                }
                if report.throttle_permille > 0 {
                    let doubt = if self.here.was_in_doubt { ", in doubt" } else { "" };
                    self.coverage.outcome(format!("  of these slowed down{doubt}, then the {}'s", report.owner));
                }
                if self.here.was_in_doubt {
                    self.coverage.outcome(format!("  of these in doubt first, then the {}'s", report.owner));
                }
            }
            (false, _) => {
                let how = match (self.here.runs(), self.here.asked_after_restart) {
                    (true, true) => "source died, asked, has it",
                    (true, false) => "source died before COMMIT",
                    (false, true) => "source died, asked, has it not",
                    (false, false) => "source died after it let go",
                };
                self.coverage.outcome(how);
                assert!(self.here.runs() || there == Guest::Runs || lost_there, "nobody has it");
            }
        }
        if self.there.state() == Some(DestinationState::GaveUp) {
            assert!(self.there.discarded, "given up, and not freed");
        }
    }
}
