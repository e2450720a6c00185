//! What is checked: the bounds of a world, and what must be true in all of it.

use std::fmt;

use migrator::arbiter::Claimant;
use migrator::handoff::*;
use migrator::traits::Durability;
use stateright::{Model, Property};

use crate::world::{Action, Attempt, Guest, Here, There, World};

/// Who might type `microvm resolve`, once, while it is in doubt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Human {
    Nobody,
    /// Somebody who looks at the destination first.
    Looks,
    KeepsBlindly,
    DiscardsBlindly,
}

/// A rule that is broken on purpose, to see that it is found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flaw {
    /// The source resumes when it hears nothing after COMMIT.
    ResumesInDoubt,
    /// The source's decision is not durable before COMMIT is sent.
    DecidesLazily,
    /// COMMIT is not durable before the destination starts the guest.
    CommitsLazily,
    /// The destination starts the guest though COMMIT could not be recorded.
    RunsUnrecorded,
    /// A destination that has given up starts the guest when a COMMIT comes late.
    LateCommitRevives,
    /// The agent answers GAVE_UP where there is no trace, without a tombstone.
    NoTombstone,
    /// The agent answers from a journal that a process still holds.
    AgentIgnoresLock,
    /// A destination that gave up after COMMIT ends without having recorded it.
    LeavesUnrecorded,
    /// The destination removes its journal when it runs, not when the source says RELEASED.
    ForgetsAtOnce,
    /// The source says RELEASED before that is on record.
    ReleasesBeforeRecord,
    /// The destination starts the guest without a claim.
    DestinationSkipsArbiter,
    /// `resolve --keep` does not ask the arbiter.
    SourceSkipsArbiter,
    /// A source whose claim is lost lets go of the VM.
    LostClaimReleases,
    /// A receiving process holds its journal for as long as the VM runs.
    KeepsJournal,
}

/// One world to check: its bounds, who is in it, what can fail.
#[derive(Clone, Copy, Debug)]
pub struct Rules {
    /// The user tries so often; each attempt has a new id.
    pub attempts: usize,
    pub arbiter: bool,
    pub human: Human,
    /// Any write to a journal may fail.
    pub full_disks: bool,
    /// Other things happen while a record is being written, or the guest started. The driver waits; the machines need not.
    pub slow_disks: bool,
    /// A process may die with its host's power, and then lazy records are lost.
    pub power_cuts: bool,
    pub flaw: Option<Flaw>,
}

impl fmt::Display for Rules {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let arbiter = if self.arbiter { "an arbiter" } else { "no arbiter" };
        let human = match self.human {
            Human::Nobody => "nobody resolves",
            Human::Looks => "somebody looks and resolves",
            Human::KeepsBlindly => "somebody keeps blindly",
            Human::DiscardsBlindly => "somebody discards blindly",
        };
        write!(f, "{} attempts, {arbiter}, {human}", self.attempts)?;
        self.flaw.map_or(Ok(()), |flaw| write!(f, ", {flaw:?}"))
    }
}

impl Rules {
    pub fn durability(&self, step: Step) -> Durability {
        match (self.flaw, step) {
            (Some(Flaw::CommitsLazily), Step::Committed) | (Some(Flaw::DecidesLazily), Step::Decided) => {
                Durability::Lazy
            }
            _ => step.durability(),
        }
    }
}

/// Never two that run the guest at once.
pub const NEVER_TWO: &str = "never two: at most one host runs the guest";
/// Never back in time.
pub const NEVER_BACK: &str = "never back: a guest that ran at the destination never runs at the source again";
/// Never nobody.
pub const NEVER_LOST: &str = "never lost: the source lets go only of a guest that the destination has";
/// What settles at the source runs there.
pub const KEPT_RUNS: &str = "kept runs: a source that keeps the guest runs it, and one that let go does not";
/// Dead is dead.
pub const NEVER_REVIVED: &str = "never revived: an attempt of which GAVE_UP was recorded or said never runs";
/// Answers agree.
pub const ONE_ANSWER: &str = "one answer: nobody is told RUNNING of an attempt and somebody else GAVE_UP";
/// Machines agree with the world.
pub const MAY_RUN: &str = "may run: where the guest runs, the machine says that it may";

fn released(world: &World, attempt: &Attempt) -> bool {
    match world.here {
        Here::Up => attempt.source.state() == SourceState::Released,
        Here::Down | Here::Back { .. } => attempt.source_records.has(Step::Released),
    }
}

fn runs_there(world: &World) -> usize {
    world.attempts.iter().filter(|attempt| attempt.guest == Guest::Runs).count()
}

fn any(world: &World, is: impl Fn(&Attempt) -> bool) -> bool {
    world.attempts.iter().any(is)
}

impl Model for Rules {
    type State = World;
    type Action = Action;

    fn init_states(&self) -> Vec<World> {
        vec![World::new(self)]
    }

    fn actions(&self, world: &World, actions: &mut Vec<Action>) {
        world.actions(self, actions);
    }

    fn next_state(&self, world: &World, action: Action) -> Option<World> {
        Some(world.next(self, action)).filter(|next| next != world)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        let mut properties = vec![
            Property::<Self>::always(NEVER_TWO, |_, world| usize::from(world.runs_here) + runs_there(world) <= 1),
            Property::<Self>::always(NEVER_BACK, |rules, world| {
                // A human who knows that the destination is gone for good may want the older copy.
                let wanted = world.kept_by_hand && rules.human == Human::Looks && !rules.arbiter;
                wanted || !(world.runs_here && any(world, |attempt| attempt.guest != Guest::NeverRan))
            }),
            Property::<Self>::always(NEVER_LOST, |_, world| {
                !any(world, |attempt| released(world, attempt) && !attempt.owns_there())
            }),
            Property::<Self>::always(KEPT_RUNS, |_, world| {
                let last = &world.attempts[world.current()];
                match (world.here, last.source.state()) {
                    (Here::Up, SourceState::Kept) => world.runs_here || !last.source_todo.is_empty(),
                    (Here::Up, SourceState::Released) => !world.runs_here,
                    _ => true,
                }
            }),
            Property::<Self>::always(NEVER_REVIVED, |_, world| {
                !any(world, |attempt| {
                    let dead = attempt.destination_records.has(Step::GaveUp) || attempt.said_gave_up;
                    dead && !attempt.forgotten && attempt.guest != Guest::NeverRan
                })
            }),
            Property::<Self>::always(ONE_ANSWER, |_, world| {
                !any(world, |attempt| attempt.said_running && attempt.said_gave_up && !attempt.forgotten)
            }),
            Property::<Self>::always(MAY_RUN, |_, world| {
                let last = &world.attempts[world.current()];
                let here = world.here != Here::Up || !world.runs_here || last.source.may_run();
                here && !any(world, |attempt| match attempt.destination {
                    There::Alive(machine) => attempt.guest == Guest::Runs && !machine.may_run(),
                    _ => attempt.guest == Guest::Runs,
                })
            }),
            // What the model must be able to do, or it proves nothing.
            Property::<Self>::sometimes("the VM moves", |_, world| {
                any(world, |attempt| released(world, attempt) && attempt.guest == Guest::Runs && !attempt.said_running)
            }),
            Property::<Self>::sometimes("it is in doubt", |_, world| any(world, |attempt| attempt.source.in_doubt())),
            Property::<Self>::sometimes("RUNNING is lost, and asked for", |_, world| {
                any(world, |attempt| {
                    let lost = attempt.back.cut && attempt.back.queue.is_empty();
                    lost && attempt.said_running && attempt.source.in_doubt() && attempt.guest == Guest::Runs
                })
            }),
            Property::<Self>::sometimes("COMMIT is lost, and the source keeps the VM", |_, world| {
                let last = &world.attempts[world.current()];
                let kept = world.here == Here::Up && last.source.state() == SourceState::Kept;
                kept && last.source_records.has(Step::Decided) && last.said_gave_up
            }),
            Property::<Self>::sometimes("a tombstone is written", |_, world| {
                any(world, |attempt| {
                    attempt.destination_records.has(Step::GaveUp) && matches!(attempt.destination, There::Gone { .. })
                })
            }),
            Property::<Self>::sometimes("a restarted source hears that it has the VM", |_, world| {
                let Here::Back { asks: None } = world.here else { return false };
                let last = &world.attempts[world.current()];
                world.runs_here && last.source_records.has(Step::Decided) && last.source_records.has(Step::Kept)
            }),
            Property::<Self>::sometimes("a restarted source hears that it has not", |_, world| {
                let Here::Back { asks: None } = world.here else { return false };
                let last = &world.attempts[world.current()];
                !world.runs_here && last.guest == Guest::Runs && last.said_running
            }),
            Property::<Self>::sometimes("a journal is forgotten, and somebody asks", |_, world| {
                any(world, |attempt| attempt.forgotten && attempt.said_gave_up)
            }),
        ];
        if self.attempts > 1 {
            properties.push(Property::<Self>::sometimes("a retry moves the VM", |_, world| {
                world.attempts.len() > 1 && runs_there(world) == 1 && released(world, &world.attempts[world.current()])
            }));
        }
        if self.full_disks {
            properties.push(Property::<Self>::sometimes("a destination gave up and cannot record it", |_, world| {
                any(world, |attempt| match attempt.destination {
                    There::Alive(machine) => machine.state() == DestinationState::Unrecorded,
                    _ => false,
                })
            }));
        }
        if self.arbiter {
            properties.push(Property::<Self>::sometimes(
                "the source wins the claim, and the destination loses it",
                |_, world| {
                    let last = &world.attempts[world.current()];
                    let lost = |machine: DestinationHandoff| machine.state() == DestinationState::GaveUp;
                    last.won_by(Claimant::Source)
                        && world.runs_here
                        && matches!(last.destination, There::Alive(machine) if lost(machine))
                        && last.claims.by_destination
                },
            ));
            properties.push(Property::<Self>::sometimes("the destination wins the claim", |_, world| {
                any(world, |attempt| attempt.won_by(Claimant::Destination) && attempt.guest == Guest::Runs)
            }));
            properties.push(Property::<Self>::sometimes(
                "the destination wins, cannot start, and gives the VM back",
                |_, world| world.runs_here && any(world, |attempt| attempt.won_by(Claimant::Destination)),
            ));
        }
        properties
    }
}
