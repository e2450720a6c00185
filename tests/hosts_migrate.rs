//! Live migration between two hosts: real processes in two network namespaces. What arrives is what left, at any rate of writing,
//! as often as one likes.
#![allow(clippy::unwrap_used)] // Clippy's exception for tests does not reach their helpers.

mod common;

use std::collections::BTreeMap;
use std::process::Command;

use common::guest::{Pulse, number};
use common::net::{Host, Net, hosts};
use common::{Running, no_hosts, skip, wait_until};
use rustix::process::Signal;
use serde_json::Value;

/// There and back, with memory compared at each switchover, and checked by the guest after it.
#[track_caller]
fn there_and_back(net: &Net, pulse: &Pulse, more: &str) {
    for (from, to) in [(&net.a, &net.b), (&net.b, &net.a)] {
        from.moves(&pulse.name, to, &format!("--verify {more}"));
        pulse.is_well(to);
        from.is_empty();
        let arrivals = to.runtime().join("incoming");
        wait_until("the journal that nobody will ask about is removed", || {
            arrivals.read_dir().is_ok_and(|mut journals| journals.next().is_none())
        });
    }
}

fn writes_while_it_moves(rates: &[&str], pattern: &str) {
    let Some(net) = hosts() else { return };
    for rate in rates {
        let pulse = net.a.pulse("web", "--memory 64M", &format!("ws=16M rate={rate} pattern={pattern}"));
        there_and_back(&net, &pulse, "");
        let before = pulse.report(&net.a).unwrap();
        let after = pulse.is_well(&net.a);
        assert!(number(&after, "pages_verified") > number(&before, "pages_verified"), "{before} {after}");
        let writes = number(&after, "pages_written") > number(&before, "pages_written");
        assert_eq!(writes, *rate != "0", "rate={rate}: {before} {after}");
        net.a.microvm("rm --force web").ok();
    }
}

#[test]
fn an_idle_guest_and_sequential_writers_arrive_whole() {
    writes_while_it_moves(&["0", "50M", "400M"], "seq");
}

#[test]
fn random_writers_arrive_whole() {
    writes_while_it_moves(&["50M", "400M"], "random");
}

#[test]
fn two_vcpus() {
    let Some(net) = hosts() else { return };
    let pulse = net.a.pulse("web", "--memory 64M --cpus 2", "ws=16M rate=50M");
    there_and_back(&net, &pulse, "");
    assert_eq!(net.a.inspect("web")["cpus"], 2);
}

#[test]
fn several_page_streams() {
    let Some(net) = hosts() else { return };
    let pulse = net.a.pulse("web", "--memory 64M", "ws=16M rate=200M pattern=random");
    for (from, to, streams) in [(&net.a, &net.b, 4), (&net.b, &net.a, 16)] {
        let report = from.moves("web", to, &format!("--verify --compress none --streams {streams}"));
        pulse.is_well(to);
        // Each stream closes each round with a frame of its own: 160 bytes that belong to no chunk.
        for round in report["rounds"].as_array().unwrap() {
            let frames = number(round, "bytes_sent") - 4096 * number(round, "pages");
            assert!(frames.is_multiple_of(160) && frames >= 160 * streams, "{streams} streams: {round}");
        }
    }
    let said = net.a.microvm("migrate web --to 127.0.0.1 --streams 17");
    assert!(said.code() == 2 && said.stderr.contains("17 is not in 1..=16"), "{said:?}");
}

#[test]
fn compressed_pages() {
    let Some(net) = hosts() else { return };
    for (content, rate) in [("text", "50M"), ("random", "50M"), ("zero", "0")] {
        let pulse = net.a.pulse("web", "--memory 64M", &format!("ws=16M rate={rate} pattern=random content={content}"));
        for (how, mode) in [
            ("--compress zstd", "zstd:1"),
            ("--compress zstd:-3 --streams 4", "zstd:-3"),
            ("--compress auto", "auto"),
            ("--bandwidth 20M", "auto"),
        ] {
            for (from, to) in [(&net.a, &net.b), (&net.b, &net.a)] {
                let report = from.moves("web", to, &format!("--verify {how}"));
                pulse.is_well(to);
                let did = &report["compression"];
                let (raw, sent) = (number(did, "raw_bytes"), number(did, "sent_bytes"));
                assert_eq!(did["mode"], mode);
                assert!((number(&report, "bytes_sent") - sent).is_multiple_of(160), "{report}");
                // Text gets much shorter; where it does not depend on what is measured here, it must have.
                if content == "text" && how.contains("zstd") {
                    assert!(did["level"].is_i64() && sent * 2 < raw, "{report}");
                }
                assert!(sent <= raw && !report["limit"]["sentence"].as_str().unwrap().is_empty(), "{report}");
            }
        }
        net.a.microvm("rm --force web").ok();
    }
    let said = net.a.microvm("migrate web --to 127.0.0.1 --compress zstd:13");
    assert!(
        said.code() == 2 && said.stderr.contains("'zstd:13' is none of auto, none, zstd and zstd:LEVEL"),
        "{said:?}"
    );
}

#[test]
fn stop_and_copy() {
    let Some(net) = hosts() else { return };
    let pulse = net.a.pulse("web", "--memory 64M", "ws=16M rate=200M");
    let report = net.a.moves("web", &net.b, "--mode stop-and-copy --verify");
    assert_eq!(report["mode"], "stop-and-copy");
    assert_eq!(report["rounds"].as_array().unwrap().len(), 1, "{report}");
    pulse.is_well(&net.b);
}

#[test]
fn a_hundred_times_there_and_back() {
    let Some(net) = hosts() else { return };
    let pulse = net.a.pulse("web", "--memory 64M", "ws=8M rate=50M");
    let (mut here, mut there) = (&net.a, &net.b);
    for _ in 0..200 {
        here.moves("web", there, "");
        (here, there) = (there, here);
    }
    let report = pulse.is_well(here);
    assert!(number(&report, "t_ms") > 0);
    there.is_empty();
    // Sockets, descriptors, threads and journals of two hundred migrations do not pile up.
    let pid = here.inspect("web")["pid"].as_u64().unwrap();
    let count = |what: &str| std::fs::read_dir(format!("/proc/{pid}/{what}")).unwrap().count();
    assert!(count("fd") < 60 && count("task") < 30, "{} descriptors, {} threads", count("fd"), count("task"));
}

#[test]
fn a_paused_vm_stays_paused() {
    let Some(net) = hosts() else { return };
    let pulse = net.a.pulse("web", "--memory 64M", "ws=8M rate=50M");
    net.a.microvm("pause web").ok();
    for (from, to) in [(&net.a, &net.b), (&net.b, &net.a)] {
        let report = from.moves("web", to, "--verify");
        assert_eq!(report["blackout_ms"], Value::Null, "{report}");
        assert_eq!(to.state("web").as_deref(), Some("paused"));
        assert_eq!(pulse.said(to).len(), 0, "a paused guest said something");
    }
    net.a.microvm("resume web").ok();
    assert_eq!(net.a.state("web").as_deref(), Some("running"));
    pulse.is_well(&net.a);
}

/// The keys of an object, in order.
fn keys(object: &Value) -> Vec<&str> {
    object.as_object().unwrap_or_else(|| panic!("{object}")).keys().map(String::as_str).collect()
}

#[test]
fn the_report_has_the_documented_keys_and_adds_up() {
    let Some(net) = hosts() else { return };
    net.a.pulse("web", "--memory 64M --net bridge=br0,ip=10.77.0.10/24", "ws=16M rate=50M");
    let report = net.a.moves("web", &net.b, "--max-downtime 100ms --compress none");
    let mut wanted = vec![
        "vm",
        "from",
        "to",
        "mode",
        "outcome",
        "owner",
        "error",
        "rounds",
        "total_ms",
        "blackout_ms",
        "blackout",
        "bytes_sent",
        "compression",
        "limit",
        "ram_bytes",
        "predicted_blackout_ms",
        "throttle_permille",
        "throttled_ms",
        "announce",
    ];
    wanted.sort_unstable();
    let mut got = keys(&report);
    got.sort_unstable();
    assert_eq!(got, wanted);
    let mut wanted = vec!["n", "pages", "zero_pages", "bytes_sent", "ms", "dirty_pages_after"];
    wanted.sort_unstable();
    let rounds = report["rounds"].as_array().unwrap();
    assert!(rounds.len() >= 2, "{report}");
    let mut bytes = 0;
    for (round, n) in rounds.iter().zip(1u64..) {
        let mut got = keys(round);
        got.sort_unstable();
        assert_eq!(got, wanted);
        assert_eq!(number(round, "n"), n);
        bytes += number(round, "bytes_sent");
        assert!(number(round, "bytes_sent") >= number(round, "pages") * 4096, "{round}");
    }
    assert_eq!(number(&rounds[0], "pages") + number(&rounds[0], "zero_pages"), (64 << 20) / 4096, "{report}");
    assert_eq!(bytes, number(&report, "bytes_sent"), "{report}");
    assert_eq!(number(&report, "ram_bytes"), 64 << 20);
    assert_eq!((&report["vm"], &report["mode"], &report["error"]), (&"web".into(), &"pre-copy".into(), &Value::Null));
    assert_eq!(report["throttle_permille"], 0, "slowed down for nothing: {report}");
    let ms = |value: &Value| value.as_f64().unwrap_or_else(|| panic!("{report}"));
    assert!(ms(&report["blackout_ms"]) > 0.0 && ms(&report["blackout_ms"]) <= ms(&report["total_ms"]), "{report}");
    let parts: f64 = report["blackout"].as_object().unwrap().values().map(ms).sum();
    assert!(parts > 0.0, "{report}");
}

#[test]
fn a_guest_that_writes_faster_than_the_link_is_slowed_down_and_arrives() {
    let Some(net) = hosts() else { return };
    let pulse = net.a.pulse("web", "--memory 128M", "ws=64M rate=800M");
    // The link carries 64 MiB a second: all of the working set takes a second, and 400 ms are allowed.
    let said = net.a.migrate("web", &net.b, "--verify --compress none --bandwidth 64M --max-downtime 400ms");
    assert_eq!(said.code(), 0, "{said:?}");
    let report = said.json();
    assert_eq!((&report["outcome"], &report["owner"]), (&"completed".into(), &"destination".into()), "{report}");
    assert!((1..=990).contains(&number(&report, "throttle_permille")), "{report}");
    assert!(report["throttled_ms"].as_f64().unwrap() > 0.0, "{report}");
    assert!(said.stderr.contains("throttled to "), "{said:?}");
    let rounds = report["rounds"].as_array().unwrap();
    let left: Vec<_> = rounds.iter().map(|round| number(round, "dirty_pages_after")).collect();
    let most = (64 << 20) / 4096 * 400 / 1000;
    assert!(left[left.len() - 2] <= most && left[0] > most, "{report}");
    pulse.is_well(&net.b);
}

/// The system calls, by name, of a process and of those that it starts, while something happens.
fn system_calls(pid: i32, meanwhile: impl FnOnce()) -> BTreeMap<String, u64> {
    let mut strace = Command::new("strace");
    let trace = Running::start({
        strace.args(["-f", "-c", "-U", "name,calls", "-p", &pid.to_string()]);
        strace
    });
    wait_until("strace watches", || {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        status.lines().any(|line| line.strip_prefix("TracerPid:").is_some_and(|tracer| tracer.trim() != "0"))
    });
    meanwhile();
    trace.signal(Signal::INT);
    let said = trace.said();
    let calls = said.stderr.lines().filter_map(|line| {
        let (name, count) = line.trim().split_once(' ')?;
        Some((name.into(), count.trim().parse().ok()?))
    });
    calls.collect()
}

/// For each 2 MiB, the source asks the page table and writes; the destination asks the page table, asks for a huge page, and reads.
/// With TLS, as much is written at once as fits into a core's cache, and read as has come.
#[test]
fn few_system_calls_for_much_memory() {
    if let Some(reason) = no_hosts() {
        return skip(&reason);
    }
    few_system_calls(Net::of_strangers(), "--insecure-plaintext", 1, 1);
    few_system_calls(Net::new(), "", 10, 64);
}

/// So many writes and reads, for each 2 MiB.
fn few_system_calls(mut net: Net, how: &str, writes: u64, reads: u64) {
    /// What a migration needs however large the guest is.
    const ANYWAY: u64 = 300;
    let pieces = 512 / 2;
    net.a.start_agent(how);
    net.b.start_agent(how);
    let pulse = net.a.pulse("web", "--memory 512M", "fill=400M ws=1M rate=0");
    let (source, agent) = (net.a.inspect("web")["pid"].as_i64().unwrap() as i32, net.b.agent_pid().unwrap());
    let mut there = BTreeMap::new();
    let here = system_calls(source, || {
        there = system_calls(agent, || {
            net.a.moves("web", &net.b, how);
        });
    });
    pulse.is_well(&net.b);
    let few = |calls: &BTreeMap<String, u64>, names: &[&str], most: u64| {
        let count: u64 = names.iter().filter_map(|name| calls.get(*name)).sum();
        assert!(count > 0 && count <= most * pieces + ANYWAY, "{count} of {names:?}, {how}: {calls:?}");
    };
    few(&here, &["writev", "sendmsg", "sendto"], writes);
    few(&there, &["readv", "recvmsg", "recvfrom"], reads);
    for side in [&here, &there] {
        few(side, &["pread64"], 1);
        few(side, &["madvise", "mmap", "munmap", "mprotect"], 1);
        few(side, &["setsockopt"], 0);
    }
}

#[test]
fn detached_it_goes_on_by_itself() {
    let Some(net) = hosts() else { return };
    let pulse = net.a.pulse("web", "--memory 64M", "ws=8M rate=10M");
    net.a.microvm(&format!("migrate web --to {} --detach", net.b.ip)).ok();
    wait_until("the VM is there", || net.b.state("web").as_deref() == Some("running"));
    pulse.is_well(&net.b);
    net.a.is_empty();
}

#[test]
fn one_that_waits_without_an_agent_takes_one_in() {
    let Some(reason) = no_hosts() else {
        let net = Net::new();
        return without_an_agent(&net.a, &net.b);
    };
    skip(&reason);
}

fn without_an_agent(a: &Host, b: &Host) {
    let pulse = a.pulse("web", "--memory 64M", "ws=8M rate=10M");
    let waiting = b.start(&format!("receive --listen {}:7437", b.ip));
    wait_until("it listens", || b.ns.run("ss", "-Hltn sport = :7437").ok().contains("7437"));
    a.moves("web", b, "");
    assert_eq!(waiting.said().ok().trim(), "web");
    pulse.is_well(b);
}
