//! Ways out. The checker's own `eventually` misses paths that end in a cycle (its documentation says so), and asking again is a
//! cycle. So the graph of all worlds is built here, and walked backwards from the settled ones over steps that are no faults.
//! If each world that can come about has such a way on, then as soon as the faults stop, and everything that can happen
//! happens in the end, it settles: also each world on that way has one.

use std::collections::HashMap;
use std::hash::Hash;

use stateright::Model;
use xxhash_rust::xxh3::Xxh3;

use crate::rules::Rules;
use crate::world::{Action, World};

pub struct Graph {
    pub worlds: usize,
    pub steps: usize,
    pub settled: usize,
    /// A world with no way out, if there is one.
    pub trap: Option<World>,
}

pub fn walk(rules: &Rules) -> Graph {
    let first = World::new(rules);
    let mut index = HashMap::from([(digest(&first), 0u32)]);
    let mut worlds = vec![first];
    // Steps that are no faults, backwards.
    let mut before: Vec<Vec<u32>> = vec![vec![]];
    let (mut at, mut steps, mut actions) = (0, 0, Vec::new());
    while at < worlds.len() {
        let world = worlds[at].clone();
        rules.actions(&world, &mut actions);
        for action in actions.drain(..) {
            let Some(next) = rules.next_state(&world, action) else { continue };
            steps += 1;
            let to = *index.entry(digest(&next)).or_insert_with(|| {
                worlds.push(next);
                before.push(vec![]);
                worlds.len() as u32 - 1
            });
            if !world.is_fault(action) {
                before[to as usize].push(at as u32);
            }
        }
        at += 1;
    }
    let mut has_way: Vec<bool> = worlds.iter().map(World::is_settled).collect();
    let settled = has_way.iter().filter(|settled| **settled).count();
    let mut queue: Vec<u32> = (0..worlds.len() as u32).filter(|at| has_way[*at as usize]).collect();
    while let Some(at) = queue.pop() {
        for from in std::mem::take(&mut before[at as usize]) {
            if !std::mem::replace(&mut has_way[from as usize], true) {
                queue.push(from);
            }
        }
    }
    let trap = has_way.iter().position(|has| !has).map(|at| worlds.swap_remove(at));
    Graph { worlds: index.len(), steps, settled, trap }
}

/// 128 bits, so that two worlds among millions are not taken for one.
fn digest(world: &World) -> u128 {
    let mut hasher = Xxh3::new();
    world.hash(&mut hasher);
    hasher.digest128()
}

impl World {
    /// Whether this is something that goes wrong, or a human's or a user's deed: none of it may be needed to settle.
    fn is_fault(&self, action: Action) -> bool {
        match action {
            // Each side ends an attempt by itself only because the connection is dead, or the other side has ended it.
            Action::SourceAborts(at) => {
                let attempt = &self.attempts[at];
                !(attempt.there.cut || attempt.back.cut)
            }
            Action::DestinationAborts(at) => {
                let attempt = &self.attempts[at];
                let still_comes = !attempt.there.queue.is_empty();
                !(attempt.there.cut || attempt.back.cut) || still_comes
            }
            Action::SourceWrites(_, works) | Action::DestinationWrites(_, works) => !works,
            Action::AgentIsAsked { writes, .. } => !writes,
            Action::Resolve(..)
            | Action::SourceDies { .. }
            | Action::Retry
            | Action::DestinationDies { .. }
            | Action::Cut { .. } => true,
            Action::SourceHearsNothing(_)
            | Action::SourceHears(_)
            | Action::SourceIsTold(..)
            | Action::SourceLosesPatience(_)
            | Action::SourceIsAwarded(_)
            | Action::SourceReturns
            | Action::DestinationBegins(_)
            | Action::DestinationLoads(_)
            | Action::DestinationStarts(..)
            | Action::DestinationHears(_)
            | Action::DestinationIsAwarded(_)
            | Action::DestinationTriesAgain(_)
            | Action::DestinationExits(_)
            | Action::Arbitrates(..) => false,
        }
    }

    /// Whether every side knows whose the VM is, and has recorded it.
    fn is_settled(&self) -> bool {
        use crate::world::{Here, There};
        let last = &self.attempts[self.current()];
        let here = match self.here {
            Here::Up => last.source.is_settled() && last.source_todo.is_empty(),
            Here::Down => false,
            Here::Back { asks } => asks.is_none(),
        };
        here && self.attempts.iter().all(|attempt| match attempt.destination {
            There::Spawned => false,
            There::Alive(machine) => machine.is_settled() && attempt.destination_todo.is_empty(),
            There::Gone { .. } => true,
        })
    }
}
