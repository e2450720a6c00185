//! The built-in guest as seen from outside.

use serde_json::Value;

use super::net::{Host, Namespace};
use super::{wait_for, wait_until};

/// A VM with the built-in guest, on whatever host it is.
pub struct Pulse {
    pub name: String,
}

/// A number of a report.
pub fn number(report: &Value, key: &str) -> u64 {
    report[key].as_u64().unwrap_or_else(|| panic!("no {key} in {report}"))
}

impl Pulse {
    pub fn new(name: &str) -> Self {
        Pulse { name: name.into() }
    }

    /// All lines that it has said on this host. The first may be the rest of one that began elsewhere, the last may be unfinished.
    #[track_caller]
    pub fn said(&self, host: &Host) -> Vec<Value> {
        let log = host.microvm(&format!("logs {}", self.name)).ok();
        log.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
    }

    /// Its latest report on this host.
    pub fn report(&self, host: &Host) -> Option<Value> {
        self.said(host).into_iter().rfind(|line| line["sweeps"].is_u64())
    }

    /// Waits until it has checked its whole working set twice more (a change that was lost has come up by then), and checks that
    /// nothing was ever wrong. Returns the last report.
    #[track_caller]
    pub fn is_well(&self, host: &Host) -> Value {
        let first = wait_for("the guest reports", || self.report(host));
        let report = wait_for("the guest goes on checking", || {
            self.report(host).filter(|r| number(r, "sweeps") >= number(&first, "sweeps") + 2)
        });
        assert_eq!(number(&report, "errors"), 0, "{report}");
        let said = self.said(host);
        assert!(!said.iter().any(|l| l["event"] == "wrong-page" || l["event"] == "warning"), "{said:?}");
        report
    }

    /// Waits until it has done some more work. It does not go on if it does not run.
    #[track_caller]
    pub fn goes_on(&self, host: &Host) {
        let before = self.report(host);
        wait_until("the guest goes on", || match (&before, self.report(host)) {
            (None, now) => now.is_some(),
            (Some(before), Some(now)) => number(&now, "t_ms") > number(before, "t_ms"),
            _ => false,
        });
    }
}

/// `GET http://ADDRESS/PATH` from a namespace.
#[track_caller]
pub fn http_get(from: &Namespace, address: &str, path: &str) -> String {
    let arguments = format!("-sS -m 30 --retry 3 --retry-connrefused http://{address}{path}");
    from.run("curl", &arguments).ok()
}
