//! What the network sees of a migration: connections go on, switches and neighbours learn at once where the guest is now.
#![allow(clippy::unwrap_used)] // Clippy's exception for tests does not reach their helpers.

mod common;

use std::io::{Read, Write};
use std::net::{TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use common::guest::{http_get, number};
use common::net::{Namespace, Net, OBSERVER_IP, hosts};
use common::{PATIENCE, Running, wait_until};
use rustix::process::Signal;

const GUEST: &str = "10.77.0.10";
const GUEST6: &str = "fd00:77::10";
const MAC: &str = "52:54:00:77:00:10";

/// There, back, and there again.
fn three_moves(net: &Net) {
    for (from, to) in [(&net.a, &net.b), (&net.b, &net.a), (&net.a, &net.b)] {
        from.moves("web", to, "");
    }
}

#[test]
fn a_tcp_connection_lives_through_three_migrations() {
    let Some(net) = hosts() else { return };
    let nic = format!("--memory 64M --net bridge=br0,mac={MAC},ip={GUEST}/24");
    let pulse = net.a.pulse("web", &nic, "ws=8M rate=20M");
    let (done, rounds) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let (until, count) = (done.clone(), rounds.clone());
    // Both ways at once, every byte compared, on one connection.
    let talk = net.observer.within(move || {
        let mut stream = TcpStream::connect((GUEST, 7)).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        let mut back = stream.try_clone().unwrap();
        while !until.load(Ordering::Relaxed) {
            let n = count.fetch_add(1, Ordering::Relaxed);
            let sent: Vec<u8> =
                (0..20_000u64).map(|i| ((i ^ n).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8).collect();
            let mut got = vec![0; sent.len()];
            std::thread::scope(|scope| {
                scope.spawn(|| stream.write_all(&sent).unwrap());
                back.read_exact(&mut got).unwrap();
            });
            assert!(got == sent, "what came back is not what was sent");
        }
    });
    let progress = || {
        let before = rounds.load(Ordering::Relaxed);
        wait_until("the connection goes on", || talk.is_finished() || rounds.load(Ordering::Relaxed) > before + 2);
        assert!(!talk.is_finished(), "the connection broke");
    };
    progress();
    for (from, to) in [(&net.a, &net.b), (&net.b, &net.a), (&net.a, &net.b)] {
        from.moves("web", to, "");
        progress();
    }
    done.store(true, Ordering::Relaxed);
    talk.join().unwrap();
    pulse.is_well(&net.b);
    let traffic = &net.b.inspect("web")["traffic"][0];
    assert!(number(traffic, "rx_packets") > 0 && number(traffic, "tx_packets") > 0, "{traffic}");
}

#[test]
fn pings_and_datagrams_are_answered_before_and_after() {
    let Some(net) = hosts() else { return };
    let nic = format!("--memory 64M --net bridge=br0,mac={MAC},ip={GUEST}/24,ip={GUEST6}/64");
    net.a.pulse("web", &nic, "ws=8M rate=20M");
    net.observer.run("ping", &format!("-c 1 -W 30 {GUEST}")).ok();
    let mut command = net.observer.command("ping");
    command.args(["-i", "0.05", "-n", GUEST]);
    let ping = Running::start(command);
    three_moves(&net);
    net.observer.run("ping", &format!("-c 3 -i 0.2 {GUEST}")).ok();
    net.observer.run("ping", &format!("-6 -c 3 -i 0.2 {GUEST6}")).ok();
    ping.signal(Signal::INT);
    let said = ping.said().ok();
    // What was on its way while nobody listened is lost; this bounds it without measuring time.
    let numbers: Vec<u64> = said.split_whitespace().filter_map(|word| word.parse().ok()).collect();
    let summary = said.lines().find(|line| line.contains("packets transmitted")).unwrap();
    let counts: Vec<u64> = summary.split_whitespace().filter_map(|word| word.parse().ok()).collect();
    let (sent, received) = (counts[0], counts[1]);
    assert!(sent > 10 && received * 4 >= sent * 3, "{summary} {numbers:?}");
    assert!(!said.contains("DUP!"), "an echo came twice: {said}");
    let echoed = net.observer.within(|| {
        let socket = UdpSocket::bind((OBSERVER_IP, 0)).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        socket.send_to(b"are you there?", (GUEST, 7)).unwrap();
        let mut datagram = [0; 64];
        let bytes = socket.recv(&mut datagram).unwrap();
        datagram[..bytes].to_vec()
    });
    assert_eq!(echoed.join().unwrap(), b"are you there?");
    assert!(http_get(&net.observer, GUEST, "/status").contains("\"errors\":0"));
}

/// What came by on the observer's interface while `action` ran: ARP, RARP and IPv6 neighbour discovery, one line a frame.
fn capture(observer: &Namespace, action: impl FnOnce()) -> Vec<String> {
    let mut command = observer.command("tcpdump");
    command.args(["-l", "-e", "-nn", "-i", "eth0", "arp or rarp or icmp6"]);
    let tcpdump = Running::start(command);
    wait_until("tcpdump listens", || observer.run("cat", "/proc/net/packet").ok().lines().count() > 1);
    action();
    tcpdump.signal(Signal::INT);
    tcpdump.said().stdout.lines().map(String::from).collect()
}

#[track_caller]
fn seen(frames: &[String], parts: &[&str]) {
    let found = frames.iter().any(|frame| parts.iter().all(|part| frame.contains(part)));
    assert!(found, "no frame with {parts:?} in {frames:#?}");
}

/// The switch's port on which it would send to the guest.
fn port_of_guest(net: &Net) -> String {
    let table = net.switch.run("bridge", "fdb show br sw0").ok();
    let line = table.lines().find(|line| line.starts_with(MAC)).unwrap_or_default();
    line.split_whitespace().nth(2).unwrap_or_default().into()
}

#[track_caller]
fn neighbour_is_known(observer: &Namespace) {
    let entry = observer.ip(&format!("neigh show {GUEST} dev eth0"));
    assert!(entry.contains(MAC) && !entry.contains("FAILED") && !entry.contains("INCOMPLETE"), "{entry:?}");
}

#[test]
fn switches_and_neighbours_are_told() {
    let Some(net) = hosts() else { return };
    let nic = format!("--memory 64M --net bridge=br0,mac={MAC},ip={GUEST}/24,ip={GUEST6}/64");
    net.a.pulse("web", &nic, "ws=8M rate=0");
    net.observer.run("ping", &format!("-c 1 -W 30 {GUEST}")).ok();
    assert_eq!(port_of_guest(&net), "h1");
    for (from, to, port) in [(&net.a, &net.b, "h2"), (&net.b, &net.a, "h1")] {
        let mut report = serde_json::Value::Null;
        // Nothing but the announcement speaks here: the guest is not asked anything.
        let frames = capture(&net.observer, || {
            report = from.moves("web", to, "");
            wait_until("the switch has learned it", || port_of_guest(&net) == port);
            neighbour_is_known(&net.observer);
            std::thread::sleep(std::time::Duration::from_millis(300));
        });
        let from_guest = format!("{MAC} > ");
        seen(&frames, &[&from_guest, "ff:ff:ff:ff:ff:ff", "ARP", "Request who-has", GUEST, &format!("tell {GUEST}")]);
        seen(&frames, &[&from_guest, "ff:ff:ff:ff:ff:ff", "ARP", &format!("Reply {GUEST} is-at {MAC}")]);
        seen(&frames, &[&from_guest, "Reverse ARP", MAC]);
        seen(&frames, &[&from_guest, "33:33:00:00:00:01", "neighbor advertisement", GUEST6]);
        let announce = &report["announce"];
        assert!(number(announce, "arp") > 0 && number(announce, "rarp") > 0 && number(announce, "na") > 0, "{report}");
        let addresses = announce["addresses"].to_string();
        assert!(addresses.contains(GUEST) && addresses.contains(GUEST6), "{report}");
        neighbour_is_known(&net.observer);
        net.observer.run("ping", &format!("-c 1 -W 30 {GUEST}")).ok();
    }
}

#[test]
fn addresses_that_nobody_told_are_learned_and_announced() {
    let Some(net) = hosts() else { return };
    let nic = format!("--memory 64M --net bridge=br0,mac={MAC}");
    net.a.pulse("web", &nic, &format!("ws=8M rate=0 ip={GUEST}/24"));
    net.observer.run("ping", &format!("-c 1 -W 30 {GUEST}")).ok();
    assert!(net.a.inspect("web")["addresses"].to_string().contains(GUEST), "{}", net.a.inspect("web"));
    // The second time the destination of the first one knows it from the saved state.
    for (from, to, port) in [(&net.a, &net.b, "h2"), (&net.b, &net.a, "h1")] {
        let frames = capture(&net.observer, || {
            from.moves("web", to, "");
            wait_until("the switch has learned it", || port_of_guest(&net) == port);
            std::thread::sleep(std::time::Duration::from_millis(300));
        });
        seen(&frames, &["ARP", &format!("Reply {GUEST} is-at {MAC}")]);
        net.observer.run("ping", &format!("-c 1 -W 30 {GUEST}")).ok();
    }
}

#[test]
fn vms_that_come_are_put_on_the_bridge_of_this_host() {
    let Some(mut net) = hosts() else { return };
    net.b.stop_agent();
    net.b.ns.ip("link set br0 name lan0");
    net.b.start_agent("--bridge lan0");
    net.a.pulse("web", &format!("--memory 64M --net bridge=br0,mac={MAC},ip={GUEST}/24"), "ws=8M rate=0");
    net.a.moves("web", &net.b, "");
    assert_eq!(net.b.inspect("web")["nets"][0]["bridge"], "lan0");
    net.observer.run("ping", &format!("-c 1 -W 30 {GUEST}")).ok();
}
