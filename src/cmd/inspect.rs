//! `microvm inspect`.

use anyhow::Result;
use migrator::precopy::running_percent;
use migrator::report::CompressionReport;
use vmm::sandbox::Sandbox;

use crate::cli::InspectArgs;
use crate::client;
use crate::machine::State;
use crate::machine::view::{DoubtView, ProgressView, VmView};
use crate::runtime::Runtime;
use crate::units::format_bytes;

/// Shows all about a VM.
pub fn run(runtime: &Runtime, args: &InspectArgs) -> Result<u8> {
    let dir = client::find(runtime, &args.name)?;
    if !dir.is_held()?
        && let Some(decided) = dir.outgoing.left_in_doubt()?
    {
        return dead(&args.name, &DoubtView::of_the_dead(&dir, decided), args.json);
    }
    let vm = client::inspect(runtime, &args.name)?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&vm)?);
    } else {
        print(&vm);
    }
    Ok(0)
}

/// A VM whose process died in doubt: there is nobody to ask.
fn dead(name: &str, doubt: &DoubtView, json: bool) -> Result<u8> {
    if json {
        let view = serde_json::json!({"name": name, "state": State::InDoubt, "pid": null, "doubt": doubt});
        println!("{}", serde_json::to_string_pretty(&view)?);
    } else {
        line("name", name.into());
        line("state", State::InDoubt.to_string());
        line("process", "died".into());
        line("migration", format!("to {}: {}", doubt.peer, doubt.sentence()));
    }
    Ok(0)
}

fn line(key: &str, value: String) {
    println!("{key:<12} {value}");
}

fn print(vm: &VmView) {
    line("name", vm.name.clone());
    line("state", vm.state.to_string());
    line("process", vm.pid.to_string());
    line("sandbox", sandbox(&vm.sandbox));
    vm.sandbox.missing.iter().for_each(|missing| line("", missing.clone()));
    line("cpus", vm.cpus.to_string());
    line("memory", format_bytes(vm.memory_bytes));
    line("kernel", vm.boot.kernel_name());
    if let Some(initrd) = &vm.boot.initrd {
        line("initrd", initrd.display().to_string());
    }
    line("cmdline", vm.boot.cmdline.clone());
    for (i, net) in vm.nets.iter().enumerate() {
        let plug = [("bridge", &net.bridge), ("tap", &net.tap)];
        let plug: Vec<String> = plug.iter().filter_map(|(k, v)| v.as_ref().map(|v| format!("{k} {v}"))).collect();
        line(&format!("net {i}"), format!("{}, {}", net.mac, plug.join(", ")));
        if let Some(addresses) = vm.addresses.get(i).filter(|a| !a.is_empty()) {
            line("", addresses.join(" "));
        }
        if let Some(t) = vm.traffic.get(i) {
            let (rx, tx) = (format_bytes(t.rx_bytes), format_bytes(t.tx_bytes));
            line(
                "",
                format!("received {} frames ({rx}), sent {} ({tx}), dropped {}", t.rx_packets, t.tx_packets, t.dropped),
            );
        }
    }
    if let Some(migration) = &vm.migration {
        line("migration", progress(migration));
    }
    if let Some(report) = &vm.last_migration {
        let error = report.error.as_ref().map_or(String::new(), |e| format!(": {}", e.message));
        line("last move", format!("to {}, {:?}{error}", report.to, report.outcome).to_lowercase());
    }
}

/// What holds the process, on one line.
fn sandbox(sandbox: &Sandbox) -> String {
    if !sandbox.seccomp {
        return "no sandbox: it was started with --no-sandbox".into();
    }
    let user = sandbox.user.map_or("no user of its own".into(), |user| format!("user {user}"));
    let landlock = sandbox.landlock.map_or("no Landlock".into(), |abi| format!("Landlock {abi}"));
    format!("system calls filtered, {user}, {landlock}")
}

/// What compression did: `zstd:1 to 31 %`.
pub fn compressed(c: &CompressionReport) -> String {
    let how = c.level.map_or("raw".into(), |level| format!("zstd:{level}"));
    format!("{how} to {} %", (100 * c.sent_bytes).checked_div(c.raw_bytes).unwrap_or(100))
}

/// A migration's progress on one line.
pub fn progress(m: &ProgressView) -> String {
    use migrator::Phase;
    let direction = if m.incoming { "from" } else { "to" };
    let mut text = format!("{direction} {}: {}", m.peer, m.phase);
    let mut add = |part: String| {
        text.push_str(", ");
        text.push_str(&part);
    };
    if let (Phase::InDoubt, Some(doubt)) = (m.phase, &m.doubt) {
        add(doubt.sentence());
        return text;
    }
    if m.round > 0 {
        let percent = (100 * m.pages_done).checked_div(m.pages_total).unwrap_or(100);
        add(format!("round {} {percent} %", m.round));
        add(format!("{} sent", format_bytes(m.bytes_sent)));
    }
    if let Some(c) = m.compression.as_ref().filter(|c| c.level.is_some()) {
        add(compressed(c));
    }
    if let Some(rate) = m.dirty_rate {
        add(format!("dirtying {}/s", format_bytes(rate)));
    }
    if let Some(rate) = m.bandwidth {
        add(format!("sending {}/s", format_bytes(rate)));
    }
    if m.throttle_permille > 0 {
        add(format!("throttled to {} %", running_percent(m.throttle_permille)));
    }
    if let Some(eta) = m.eta_ms {
        add(format!("{:.1} s left in this round", eta as f64 / 1e3));
    }
    if let Some(blackout) = m.predicted_blackout_ms {
        add(format!("blackout {blackout:.1} ms if it were now"));
    }
    text
}
