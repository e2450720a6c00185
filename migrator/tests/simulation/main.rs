//! Both machines, with the encoders and decoders that ship, over a link that loses, delays and damages bytes; on hosts whose
//! processes die and whose disks fill up; from a seed that says everything.
//!
//! `MICROVM_SIM_SEED=N cargo test -p migrator --test simulation replay -- --nocapture` plays one run and says what happens.
//! `MICROVM_SIM_RUNS=N` plays so many instead of the usual number.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

#[path = "../common/mod.rs"]
mod common;
mod destination_host;
mod disk;
mod faults;
mod link;
mod memory;
mod play;
mod projection;
#[path = "../model/rules.rs"]
#[allow(dead_code, reason = "the model's own test uses all of it")]
mod rules;
mod source_host;
#[path = "../model/there.rs"]
#[allow(dead_code, reason = "the model's own test uses all of it")]
mod there;
#[path = "../model/world.rs"]
#[allow(dead_code, reason = "the model's own test uses all of it")]
mod world;

use std::collections::HashSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use common::Random;
use faults::{Coverage, Fault, What, plan};
use memory::Memory;
use migrator::{Mode, Outcome};
use play::{Setting, World};
use projection::Projection;

/// Runs in a usual test.
const RUNS: u64 = 100_000;
/// How often each kind of fault is to be tried at each step of the protocol, at least.
const TRIED: u64 = 50;
/// What must come about. `Coverage::print` shows all that did.
const OUTCOMES: [&str; 20] = [
    "moved",
    "moved, and died there",
    "discarded by hand",
    "kept: Cancelled in preflight",
    "kept: Cancelled in pre-copy",
    "kept: Cancelled in switchover",
    "kept: Failed in preflight",
    "kept: Failed in pre-copy",
    "kept: Failed in switchover",
    "kept: Failed in commit",
    "kept: Failed in in-doubt",
    "source died before COMMIT",
    "source died, asked, has it",
    "source died, asked, has it not",
    "source died after it let go",
    "  of these slowed down, then the source's",
    "  of these slowed down, then the destination's",
    "  of these slowed down, in doubt, then the source's",
    "  of these slowed down, in doubt, then the destination's",
    "  a flipped page was found by --verify",
];

/// The worlds of the model without an arbiter, and with one.
struct Model([Arc<HashSet<Projection>>; 2]);

impl Model {
    fn new() -> Self {
        Self([false, true].map(|arbiter| Arc::new(Projection::all(arbiter))))
    }

    fn of(&self, setting: &Setting) -> Arc<HashSet<Projection>> {
        self.0[usize::from(setting.arbiter.is_some())].clone()
    }
}

/// One run with its faults, and, where the guest then runs at the source, another without.
fn run(seed: u64, model: &Model, trace: bool) -> Coverage {
    let mut random = Random(seed);
    let memory = Memory::new(&mut random);
    let (setting, plan) = (Setting::new(&mut random), plan(&mut random));
    if trace {
        println!("{} pages, {setting:?}", memory.words.len());
        plan.iter().for_each(|planned| println!("{planned:?}"));
    }
    let worlds = model.of(&setting);
    let mut world = World::new(random.clone(), memory, setting.clone(), plan, worlds.clone());
    world.trace = trace;
    world.run();
    world.settle();
    let mut coverage = std::mem::take(&mut world.coverage);
    coverage.runs = 1;
    if world.here.is_up() && world.here.runs() {
        if trace {
            println!("--- again");
        }
        let pages = world.here.memory.words.len() as u64;
        let setting = Setting { busy: false, ..setting };
        let mut again = World::new(Random(random.next()), world.here.memory, setting.clone(), vec![], worlds);
        again.trace = trace;
        again.run();
        again.settle();
        let report = again.here.report.as_ref().expect("it is over");
        assert_eq!(report.outcome, Outcome::Completed, "the retry: {report:?}");
        let first = &report.rounds[0];
        assert_eq!(first.pages + first.zero_pages + again.here.left, pages, "a retry begins with all pages");
        assert_eq!(report.rounds.len() == 1, setting.mode == Mode::StopAndCopy);
        coverage.retries = 1;
        coverage.compared += again.coverage.compared;
        coverage.writes += again.coverage.writes;
        coverage.left += again.coverage.left;
    }
    coverage
}

/// Plays these seeds on all cores. The first that fails is named, with the way to see it again.
fn play(seeds: u64) -> Coverage {
    let (model, next, failed) = (Model::new(), AtomicU64::new(0), AtomicBool::new(false));
    let sum = Mutex::new(Coverage::default());
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(|| {
                let mut mine = Coverage::default();
                while !failed.load(Ordering::Relaxed) {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= seeds {
                        break;
                    }
                    match catch_unwind(AssertUnwindSafe(|| run(seed, &model, false))) {
                        Ok(coverage) => mine.add(coverage),
                        Err(_) => {
                            failed.store(true, Ordering::Relaxed);
                            eprintln!("seed {seed} fails. To see it again:");
                            eprintln!(
                                "MICROVM_SIM_SEED={seed} cargo test -p migrator --test simulation replay -- --nocapture"
                            );
                        }
                    }
                }
                sum.lock().unwrap().add(mine);
            });
        }
    });
    assert!(!failed.into_inner(), "a run failed");
    sum.into_inner().unwrap()
}

fn number(name: &str) -> Option<u64> {
    let value = std::env::var(name).ok()?;
    Some(value.parse().unwrap_or_else(|error| panic!("{name}={value}: {error}")))
}

#[test]
fn whatever_happens_there_is_one_owner_and_no_page_is_lost() {
    let runs = number("MICROVM_SIM_RUNS").unwrap_or(RUNS);
    let coverage = play(runs);
    coverage.print();
    if runs >= RUNS {
        for fault in Fault::ALL {
            for at in What::all() {
                let tried = coverage.tried.get(&(at, fault)).copied().unwrap_or(0);
                assert!(tried >= TRIED, "{fault:?} was tried {tried} times at {}", at.name());
            }
        }
        for outcome in OUTCOMES {
            assert!(coverage.outcomes.contains_key(outcome), "it never came about: {outcome}");
        }
        assert!(coverage.left > 0, "no page was left for the second round");
    }
}

/// Plays the run of one seed and says what happens.
#[test]
fn replay() {
    let seed = number("MICROVM_SIM_SEED").unwrap_or(1);
    run(seed, &Model::new(), true).print();
}
