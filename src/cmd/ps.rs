//! `microvm ps`.

use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::Result;
use serde::Serialize;

use crate::client;
use crate::machine::view::VmView;
use crate::machine::{Exit, State};
use crate::runtime::Runtime;
use crate::units::format_bytes;

/// A line of `ps --json`: a VM whose process answers, or what is left of one.
#[derive(Serialize)]
#[serde(untagged)]
enum Line {
    Alive(Box<VmView>),
    Left { name: String, state: &'static str, exit: Option<Exit>, error: Option<String> },
}

/// Lists the VMs of this host.
pub fn run(runtime: &Runtime, json: bool) -> Result<u8> {
    let mut lines = Vec::new();
    for dir in runtime.vms()? {
        let name = dir.name().to_string();
        lines.push(if dir.is_held()? {
            match client::inspect(runtime, &name) {
                Ok(view) => Line::Alive(Box::new(view)),
                // It has just ended, or moved away: no line is truer than a line about a socket.
                Err(_) if !dir.is_held()? => continue,
                Err(error) => Line::Left { name, state: "silent", exit: None, error: Some(format!("{error:#}")) },
            }
        } else {
            let exit = Exit::read(&dir)?;
            Line::Left { name, state: if exit.is_some() { "ended" } else { "dead" }, exit, error: None }
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
            Line::Left { name, state, exit, error } => {
                let details = match (exit, error) {
                    (Some(exit), _) => exit.sentence(name),
                    (None, Some(error)) => error.clone(),
                    (None, None) => format!("its process died; microvm logs --process {name}, then microvm rm {name}"),
                };
                println!("{name:<20} {state:<10} {:>4} {:>9} {:>8} {:>8}  {details}", "-", "-", "-", "-");
            }
        }
    }
    Ok(0)
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
    let seconds = |ms: u64| format!("{:.1} s", ms as f64 / 1e3);
    match (&vm.migration, vm.state) {
        (Some(m), State::InDoubt) => format!(
            "in doubt for {} with {}; last asked: {}; microvm resolve --help",
            seconds(m.in_doubt_ms.unwrap_or(0)),
            m.peer,
            m.last_answer.as_deref().unwrap_or("no answer yet")
        ),
        (Some(m), _) if m.incoming => format!("from {}", m.peer),
        (Some(m), _) => format!("to {}: {}, round {}, {} sent", m.peer, m.phase, m.round, format_bytes(m.bytes_sent)),
        (None, _) => {
            let addresses: Vec<&str> = vm.addresses.iter().flatten().map(String::as_str).collect();
            addresses.join(" ")
        }
    }
}
