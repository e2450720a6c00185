//! Every reachable state of the two machines together, with every loss and crash: a small exhaustive walk. The model
//! checker of the next level has more (several attempts, humans); this one runs in every `cargo test`.

use std::collections::{BTreeSet, HashSet, VecDeque};

use super::*;

const ID: MigrationId = MigrationId([7; 16]);

fn record(step: Step) -> HandoffRecord {
    HandoffRecord { id: ID, step, unix_ms: 0, vm: "vm".into(), peer: "peer".into() }
}

/// A destination process: its machine, or gone.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Default)]
struct World {
    source: SourceHandoff,
    destination: DestinationHandoff,
    destination_alive: bool,
    source_alive: bool,
    connected: bool,
    to_destination: VecDeque<HandoffMessage>,
    to_source: VecDeque<HandoffMessage>,
    source_todo: VecDeque<SourceAction>,
    destination_todo: VecDeque<DestinationAction>,
    source_journal: BTreeSet<Step>,
    destination_journal: BTreeSet<Step>,
    source_paused: bool,
    source_released: bool,
    guest_started: bool,
    loaded: bool,
    asking: bool,
}

impl World {
    fn new() -> Self {
        let mut world = World {
            destination_alive: true,
            source_alive: true,
            connected: true,
            source_paused: true,
            ..World::default()
        };
        let actions = world.destination.on(DestinationEvent::Begin);
        world.destination_todo.extend(actions);
        world
    }

    fn source(&mut self, event: SourceEvent) {
        let actions = self.source.on(event);
        self.source_todo.extend(actions);
    }

    fn destination(&mut self, event: DestinationEvent) {
        let actions = self.destination.on(event);
        self.destination_todo.extend(actions);
    }

    fn source_runs(&self) -> bool {
        self.source_alive && !self.source_paused
    }

    fn destination_runs(&self) -> bool {
        self.destination_alive && self.guest_started
    }

    fn check(&self) {
        assert!(!(self.source_runs() && self.guest_started), "both ran it: {self:#?}");
        assert!(
            !(self.source_released
                && !self.guest_started
                && self.destination_alive
                && self.destination == DestinationHandoff::GaveUp),
            "lost: {self:#?}"
        );
        assert!(!(self.source_released && self.destination_journal.contains(&Step::GaveUp)), "lost: {self:#?}");
        if self.source_runs() {
            assert!(self.source.may_run());
        }
        if self.destination_runs() {
            assert!(self.destination.may_run());
        }
    }

    /// Everything that may happen next.
    fn next(&self) -> Vec<World> {
        let mut worlds = Vec::new();
        let mut with = |change: &dyn Fn(&mut World)| {
            let mut world = self.clone();
            change(&mut world);
            world.check();
            worlds.push(world);
        };
        if self.source_alive {
            if let Some(action) = self.source_todo.front().copied() {
                with(&|w| {
                    w.source_todo.pop_front();
                    match action {
                        SourceAction::Journal(step) => {
                            w.source_journal.insert(step);
                            w.source(SourceEvent::Journaled(step, true));
                        }
                        SourceAction::Send(message) => {
                            if w.connected && w.destination_alive {
                                w.to_destination.push_back(message);
                            }
                        }
                        SourceAction::Resume => w.source_paused = false,
                        SourceAction::Release => w.source_released = true,
                        SourceAction::Ask => w.asking = true,
                    }
                });
                if let SourceAction::Journal(step) = action {
                    with(&|w| {
                        w.source_todo.pop_front();
                        w.source(SourceEvent::Journaled(step, false));
                    });
                }
            } else {
                if self.source.can_abort() {
                    with(&|w| w.source(SourceEvent::Abort));
                }
                if self.source == (SourceHandoff::Committed { in_doubt: false }) {
                    with(&|w| w.source(SourceEvent::Silence));
                }
                if let Some(message) = self.to_source.front().copied() {
                    with(&|w| {
                        w.to_source.pop_front();
                        match message {
                            HandoffMessage::Prepared => w.source(SourceEvent::Prepared),
                            HandoffMessage::Running => w.source(SourceEvent::Running),
                            HandoffMessage::GaveUp => w.source(SourceEvent::GaveUp),
                            HandoffMessage::Commit | HandoffMessage::Abort => unreachable!(),
                        }
                    });
                } else if !self.connected && self.source.can_abort() {
                    with(&|w| w.source(SourceEvent::Abort));
                }
                if self.asking && !self.source.is_settled() {
                    with(&|w| {
                        let records: Vec<_> = w.destination_journal.iter().map(|step| record(*step)).collect();
                        match answer(&records, ID, w.destination_alive) {
                            Answer::Running => w.source(SourceEvent::Running),
                            Answer::GaveUp => w.source(SourceEvent::GaveUp),
                            Answer::Pending => {}
                            Answer::NoTrace => {
                                w.destination_journal.insert(Step::GaveUp);
                                w.source(SourceEvent::GaveUp);
                            }
                        }
                    });
                }
            }
            with(&|w| {
                w.source_alive = false;
                w.connected = false;
            });
        }
        if self.destination_alive {
            if let Some(action) = self.destination_todo.front().copied() {
                with(&|w| {
                    w.destination_todo.pop_front();
                    match action {
                        DestinationAction::Journal(step) => {
                            w.destination_journal.insert(step);
                            w.destination(DestinationEvent::Journaled(step, true));
                        }
                        DestinationAction::Send(message) => {
                            if w.connected && w.source_alive {
                                w.to_source.push_back(message);
                            }
                        }
                        DestinationAction::Start => {
                            w.guest_started = true;
                            w.destination(DestinationEvent::Started);
                        }
                        DestinationAction::Discard => {
                            assert!(!w.guest_started);
                        }
                    }
                });
                match action {
                    DestinationAction::Journal(step) => {
                        with(&|w| {
                            w.destination_todo.pop_front();
                            w.destination(DestinationEvent::Journaled(step, false));
                        });
                    }
                    DestinationAction::Start => {
                        with(&|w| {
                            w.destination_todo.pop_front();
                            w.destination(DestinationEvent::NotStarted);
                        });
                    }
                    _ => {}
                }
            } else {
                if !self.loaded && self.destination == DestinationHandoff::Open {
                    with(&|w| {
                        w.loaded = true;
                        w.destination(DestinationEvent::Loaded);
                    });
                }
                if let Some(message) = self.to_destination.front().copied() {
                    with(&|w| {
                        w.to_destination.pop_front();
                        w.destination(match message {
                            HandoffMessage::Commit => DestinationEvent::Commit,
                            _ => DestinationEvent::Abort,
                        });
                    });
                } else if !self.connected {
                    with(&|w| w.destination(DestinationEvent::Abort));
                }
                with(&|w| w.destination(DestinationEvent::Abort));
            }
            with(&|w| {
                w.destination_alive = false;
                w.connected = false;
                w.destination_todo.clear();
            });
        }
        if self.connected {
            with(&|w| w.connected = false);
            with(&|w| {
                w.connected = false;
                w.to_destination.clear();
            });
            with(&|w| {
                w.connected = false;
                w.to_source.clear();
            });
        }
        worlds
    }
}

#[test]
fn at_most_one_owner_whatever_fails() {
    let mut seen = HashSet::from([World::new()]);
    let mut queue = VecDeque::from([World::new()]);
    let (mut completed, mut kept) = (0, 0);
    while let Some(world) = queue.pop_front() {
        let next = world.next();
        // A world in which nothing can change any more, with both processes alive, has exactly one owner.
        if world.source_alive && world.source.is_settled() && world.source_todo.is_empty() {
            match world.source {
                SourceHandoff::Released => {
                    completed += 1;
                    assert!(world.guest_started || !world.destination_alive);
                }
                _ => {
                    kept += 1;
                    assert!(world.source_runs() && !world.guest_started);
                }
            }
        }
        for world in next {
            if seen.insert(world.clone()) {
                queue.push_back(world);
            }
        }
    }
    assert!(seen.len() > 1000 && completed > 10 && kept > 10, "{} states, {completed}, {kept}", seen.len());
}

#[test]
fn a_settled_source_can_be_reached_from_every_state() {
    // No trap: wherever a living source is, the world has a way on to a settled one.
    let mut all = vec![World::new()];
    let mut index: std::collections::HashMap<World, usize> = [(World::new(), 0)].into();
    let mut before: Vec<Vec<usize>> = vec![vec![]];
    let mut at = 0;
    while at < all.len() {
        for world in all[at].next() {
            let to = *index.entry(world.clone()).or_insert_with(|| {
                all.push(world);
                before.push(vec![]);
                all.len() - 1
            });
            before[to].push(at);
        }
        at += 1;
    }
    let mut good: Vec<bool> = all.iter().map(|world| !world.source_alive || world.source.is_settled()).collect();
    // A way on must not need the source to die.
    for (world, good) in all.iter().zip(&mut good) {
        if !world.source_alive {
            *good = false;
        }
    }
    let mut queue: VecDeque<usize> = (0..all.len()).filter(|n| good[*n]).collect();
    while let Some(n) = queue.pop_front() {
        for from in &before[n] {
            if !good[*from] {
                good[*from] = true;
                queue.push_back(*from);
            }
        }
    }
    for (world, good) in all.iter().zip(good) {
        assert!(good || !world.source_alive, "a trap: {world:#?}");
    }
}

#[test]
fn answers() {
    use Step::*;
    for (steps, alive, expected) in [
        (&[][..], false, Answer::NoTrace),
        (&[], true, Answer::Pending),
        (&[Receiving], false, Answer::NoTrace),
        (&[Receiving, Prepared], true, Answer::Pending),
        (&[Receiving, Prepared], false, Answer::NoTrace),
        (&[Receiving, Prepared, Committed], true, Answer::Pending),
        (&[Receiving, Prepared, Committed], false, Answer::Running),
        (&[Receiving, Prepared, Committed, Running], true, Answer::Running),
        (&[Receiving, Prepared, Committed, Running], false, Answer::Running),
        (&[Receiving, Prepared, Committed, GaveUp], true, Answer::GaveUp),
        (&[Receiving, GaveUp], false, Answer::GaveUp),
    ] {
        let records: Vec<_> = steps.iter().map(|step| record(*step)).collect();
        assert_eq!(answer(&records, ID, alive), expected, "{steps:?} {alive}");
        assert_eq!(answer(&records, MigrationId([8; 16]), false), Answer::NoTrace, "another attempt");
    }
}

#[test]
fn what_a_restarted_source_must_ask_about() {
    use Step::*;
    let records = |steps: &[Step]| steps.iter().map(|step| record(*step)).collect::<Vec<_>>();
    for steps in [&[][..], &[Sending], &[Sending, Decided, Kept], &[Sending, Decided, Released]] {
        assert_eq!(unsettled(&records(steps)), None, "{steps:?}");
    }
    assert_eq!(unsettled(&records(&[Sending, Decided])).unwrap().id, ID);
    let mut two = records(&[Sending, Decided, Kept]);
    two.push(HandoffRecord { id: MigrationId([9; 16]), ..record(Decided) });
    assert_eq!(unsettled(&two).unwrap().id, MigrationId([9; 16]));
}

#[test]
fn late_messages_change_nothing() {
    let mut destination = DestinationHandoff::Prepared;
    assert_eq!(destination.on(DestinationEvent::Abort), [DestinationAction::Journal(Step::GaveUp)]);
    assert_eq!(destination.on(DestinationEvent::Commit), []);
    destination.on(DestinationEvent::Journaled(Step::GaveUp, true));
    assert_eq!(destination.on(DestinationEvent::Commit), [DestinationAction::Send(HandoffMessage::GaveUp)]);
    let mut source = SourceHandoff::Released;
    for event in [SourceEvent::GaveUp, SourceEvent::Abort, SourceEvent::Resolve(Resolution::Keep)] {
        assert_eq!(source.on(event), []);
        assert_eq!(source, SourceHandoff::Released);
    }
}
