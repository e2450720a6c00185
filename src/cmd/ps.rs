//! `microvm ps`.

use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::Result;
use serde::Serialize;

use crate::client;
use crate::journals::Left;
use crate::machine::view::{DoubtView, ProgressView, VmView};
use crate::machine::{Exit, State};
use crate::runtime::{Runtime, VmDir};
use crate::units::format_bytes;

/// A line of `ps --json`: a VM whose process answers, or what is left of one.
#[derive(Serialize)]
#[serde(untagged)]
enum Line {
    Alive(Box<VmView>),
    Left { name: String, state: &'static str, exit: Option<Exit>, doubt: Option<DoubtView>, error: Option<String> },
}

/// Lists the VMs of this host.
pub fn run(runtime: &Runtime, json: bool) -> Result<u8> {
    let mut lines = Vec::new();
    for dir in runtime.vms()? {
        let name = dir.name().to_string();
        lines.push(if dir.is_held()? {
            match client::inspect(runtime, &name) {
                Ok(view) => Line::Alive(Box::new(view)),
                // It has just ended, or moved away: that is truer than a line about a socket.
                Err(_) if !dir.is_held()? => match left(&dir)? {
                    Some(line) => line,
                    None => continue,
                },
                Err(error) => {
                    Line::Left { name, state: "silent", exit: None, doubt: None, error: Some(format!("{error:#}")) }
                }
            }
        } else {
            match left(&dir)? {
                Some(line) => line,
                None => continue,
            }
        });
    }
    if json {
        println!("{}", serde_json::to_string(&lines)?);
        return Ok(0);
    }
    println!("{:<20} {:<10} {:>4} {:>9} {:>8} {:>8}  DETAILS", "NAME", "STATE", "CPUS", "MEMORY", "PID", "AGE");
    for line in &lines {
        match line {
            Line::Alive(vm) => println!(
                "{:<20} {:<10} {:>4} {:>9} {:>8} {:>8}  {}",
                vm.name,
                vm.state.to_string(),
                vm.cpus,
                format_bytes(vm.memory_bytes),
                vm.pid,
                age(vm.since),
                details(vm)
            ),
            Line::Left { name, state, exit, doubt, error } => {
                let details = match (doubt, exit, error) {
                    (Some(doubt), ..) => format!("its process died; {}", doubt.sentence()),
                    (None, Some(exit), _) => exit.sentence(name),
                    (None, None, Some(error)) => error.clone(),
                    (None, None, None) if !runtime.vm(name)?.exists() => {
                        format!(
                            "it died with its host; microvm run --name {name} starts it again, microvm rm {name} forgets it"
                        )
                    }
                    (None, None, None) => {
                        format!("its process died; microvm logs --process {name}, then microvm rm {name}")
                    }
                };
                println!("{name:<20} {state:<10} {:>4} {:>9} {:>8} {:>8}  {details}", "-", "-", "-", "-");
            }
        }
    }
    Ok(0)
}

/// What is left of a VM without a process; nothing, if it was removed just now.
fn left(dir: &VmDir) -> Result<Option<Line>> {
    let (mut exit, left) = (Exit::read(dir)?, dir.outgoing.left()?);
    if !dir.is_known() {
        return Ok(None);
    }
    let doubt = match left {
        Left::InDoubt(decided) => Some(DoubtView::of_the_dead(dir, decided)),
        Left::Released(record) => {
            exit.get_or_insert(Exit::Moved(record.peer));
            None
        }
        Left::Nothing => None,
    };
    let state = match (&doubt, &exit) {
        (Some(_), _) => "in-doubt",
        (None, Some(_)) => "ended",
        (None, None) => "dead",
    };
    Ok(Some(Line::Left { name: dir.name().into(), state, exit, doubt, error: None }))
}

fn age(since: u64) -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
    match now.saturating_sub(since) {
        s @ 0..=119 => format!("{s}s"),
        s @ 120..=7199 => format!("{}m", s / 60),
        s @ 7200..=172_799 => format!("{}h", s / 3600),
        s => format!("{}d", s / 86400),
    }
}

fn details(vm: &VmView) -> String {
    match (&vm.migration, vm.state) {
        (Some(ProgressView { doubt: Some(doubt), .. }), State::InDoubt) => doubt.sentence(),
        (Some(m), _) if m.incoming => format!("from {}", m.peer),
        (Some(m), _) => format!("to {}: {}, round {}, {} sent", m.peer, m.phase, m.round, format_bytes(m.bytes_sent)),
        (None, _) => {
            let mut details: Vec<&str> = vm.addresses.iter().flatten().map(String::as_str).collect();
            details.extend((!vm.sandbox.seccomp).then_some("no sandbox"));
            details.join(" ")
        }
    }
}
