//! What the model has of a moment of the simulation: each must be a moment of some world of the model.

use std::collections::{HashMap, HashSet, VecDeque};

use migrator::handoff::*;
use stateright::Model;

use crate::play::World;
use crate::rules::{Human, Rules};
use crate::world::{self, Guest, Records};

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Projection {
    /// The source's machine; none if its process died.
    source: Option<SourceState>,
    source_records: Records,
    runs_here: bool,
    /// The destination's machine, while its process lives.
    destination: Option<DestinationState>,
    destination_records: Records,
    guest: Guest,
}

impl Projection {
    /// Sees only what both have: the model begins when the state is sent, and its attempts have always been recorded as begun.
    fn common(mut self) -> Self {
        use SourceState::{Decided, Deciding, Open};
        if self.source == Some(Open) {
            self.source = Some(Deciding { prepared: false });
        }
        if matches!(self.source, Some(Deciding { .. } | Decided)) {
            self.runs_here = false;
        }
        self.source_records.add(Step::Sending);
        self
    }

    /// None while a side waits for its disk or its VM: in the model a write and the word that it worked are one step.
    pub fn of(world: &World) -> Option<Self> {
        let (here, there) = (&world.here, &world.there);
        // A copy that is let go though it never ran there: what blind humans do in the model, and what is left to do when a
        // host that won the claim is gone for good.
        if here.discarded && there.guest == Guest::NeverRan {
            return None;
        }
        if !here.writing.is_empty() || !there.writing.is_empty() || there.starting || here.not_resumed {
            return None;
        }
        let records = |disk: &crate::disk::Disk| {
            let mut records = Records::default();
            disk.records().iter().filter(|record| record.id == world.id).for_each(|record| records.add(record.step));
            records
        };
        let projection = Self {
            source: here.is_up().then(|| here.source.handoff().state()),
            source_records: records(&here.disk),
            runs_here: here.runs(),
            destination: there.state(),
            destination_records: records(&there.disk),
            guest: there.guest,
        };
        Some(projection.common())
    }

    fn of_model(world: &world::World) -> Self {
        let attempt = &world.attempts[0];
        let destination = match attempt.destination {
            world::There::Alive(machine) => Some(machine.state()),
            world::There::Spawned | world::There::Gone { .. } => None,
        };
        Self {
            source: (world.here == world::Here::Up).then(|| attempt.source.state()),
            source_records: attempt.source_records,
            runs_here: world.runs_here,
            destination,
            destination_records: attempt.destination_records,
            guest: attempt.guest,
        }
        .common()
    }

    /// All that the model has of one attempt, with or without an arbiter.
    pub fn all(arbiter: bool) -> HashSet<Self> {
        let human = Human::Looks;
        let rules =
            Rules { attempts: 1, arbiter, human, full_disks: true, slow_disks: true, power_cuts: true, flaw: None };
        let mut seen: HashMap<world::World, ()> = HashMap::new();
        let mut queue: VecDeque<_> = rules.init_states().into();
        while let Some(world) = queue.pop_front() {
            if seen.insert(world.clone(), ()).is_none() {
                queue.extend(rules.next_states(&world));
            }
        }
        seen.keys().map(Self::of_model).collect()
    }
}
