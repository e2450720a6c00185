//! What a soak counts.

use std::collections::BTreeMap;
use std::fs;

use serde_json::{Value, json};

/// What a process holds.
#[derive(Clone, Copy, Debug)]
pub struct Leaks {
    pub rss_kib: u64,
    pub descriptors: usize,
    pub threads: usize,
}

impl Leaks {
    pub fn of(pid: i32) -> Self {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        let field = |name: &str| -> u64 {
            let line = status.lines().find(|line| line.starts_with(name)).unwrap();
            line.split_whitespace().nth(1).unwrap().parse().unwrap()
        };
        Leaks {
            rss_kib: field("VmRSS:"),
            descriptors: fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count(),
            threads: field("Threads:") as usize,
        }
    }

    fn json(&self) -> Value {
        json!({"rss_kib": self.rss_kib, "descriptors": self.descriptors, "threads": self.threads})
    }
}

/// All migrations.
#[derive(Debug, Default)]
pub struct Summary {
    /// By what was done to it, and how it ended.
    outcomes: BTreeMap<(String, String), u64>,
    blackouts_ms: Vec<f64>,
    /// VMs whose receiving process was killed after it had taken them over.
    died: u64,
    pub agents_killed: u64,
}

impl Summary {
    pub fn add(&mut self, trouble: String, code: i32, died: bool, report: Option<Value>) {
        let outcome = match code {
            0 => "completed",
            1 => "failed",
            3 => "cancelled",
            _ => "in-doubt",
        };
        *self.outcomes.entry((trouble, outcome.into())).or_default() += 1;
        self.died += u64::from(died);
        self.blackouts_ms.extend(report.and_then(|report| report["blackout_ms"].as_f64()));
    }

    pub fn migrations(&self) -> u64 {
        self.outcomes.values().sum()
    }

    /// Median, 99th percentile, longest.
    fn blackout(&self) -> Option<[f64; 3]> {
        let mut sorted = self.blackouts_ms.clone();
        sorted.sort_by(f64::total_cmp);
        let last = sorted.len().checked_sub(1)?;
        Some([sorted[last / 2], sorted[last * 99 / 100], sorted[last]])
    }

    pub fn print(&self, seconds: f64, before: &Leaks, after: &Leaks, journals: [usize; 2]) {
        println!(
            "{} migrations in {seconds:.0} s; every VM once, no memory error, nothing left over",
            self.migrations()
        );
        for ((trouble, outcome), count) in &self.outcomes {
            println!("  {count:>6} {outcome:<10} ({})", trouble.to_lowercase());
        }
        println!(
            "  {} VMs died with the process that had taken them over; {} agents killed",
            self.died, self.agents_killed
        );
        if let Some([median, p99, max]) = self.blackout() {
            println!("  blackout: median {median:.1} ms, 99 % below {p99:.1} ms, longest {max:.1} ms");
        }
        println!("  an agent's memory: {} KiB, then {} KiB", before.rss_kib, after.rss_kib);
        println!("  its descriptors: {}, then {}", before.descriptors, after.descriptors);
        println!("  journals of incoming migrations: {} and {}", journals[0], journals[1]);
    }

    pub fn json(&self, seconds: f64, before: &Leaks, after: &Leaks, journals: [usize; 2]) -> String {
        let outcomes: Vec<Value> = self
            .outcomes
            .iter()
            .map(|((trouble, outcome), count)| json!({"trouble": trouble, "outcome": outcome, "count": count}))
            .collect();
        let [median, p99, max] = self.blackout().unwrap_or_default();
        let all = json!({
            "migrations": self.migrations(), "seconds": seconds, "outcomes": outcomes, "died": self.died,
            "agents_killed": self.agents_killed,
            "blackout_ms": {"median": median, "p99": p99, "max": max},
            "agent_before": before.json(), "agent_after": after.json(), "incoming_journals": journals,
            "blackouts_ms": self.blackouts_ms,
        });
        all.to_string()
    }
}
