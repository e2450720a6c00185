//! What cannot be is refused: with exit code 1 or 2, a sentence that names what is wrong, and nothing left behind.
#![allow(clippy::unwrap_used)] // Clippy's exception for tests does not reach their helpers.

mod common;

use std::fs;
use std::io::{Read, Write};
use std::net::TcpListener;

use common::net::{Host, MICROVM, Net, hosts};
use common::{no_hosts, run, skip, wait_until};

fn two_hosts() -> Option<Net> {
    match no_hosts() {
        None => Some(Net::new()),
        Some(reason) => {
            skip(&reason);
            None
        }
    }
}

/// `run -d` with `options` is refused, and nothing stays.
#[track_caller]
fn run_refused(host: &Host, options: &str, code: i32, words: &[&str]) {
    host.microvm(&format!("run -d --name bad {options}")).refused(code, words);
    host.is_empty();
}

#[test]
fn kernels_that_are_none() {
    let Some(net) = two_hosts() else { return };
    let host = &net.a;
    let dir = host.runtime().join("files");
    fs::create_dir(&dir).unwrap();
    let elf = images::pulse_elf();
    let mut large = elf.to_vec();
    // The first program header's size in memory: 4 GiB.
    let headers = u64::from_le_bytes(elf[32..40].try_into().unwrap()) as usize;
    large[headers + 40..headers + 48].copy_from_slice(&(4u64 << 30).to_le_bytes());
    let files: [(&str, &[u8]); 4] =
        [("text", b"this is no kernel\n"), ("empty", b""), ("truncated", &elf[..elf.len() / 2]), ("large", &large)];
    for (name, bytes) in files {
        fs::write(dir.join(name), bytes).unwrap();
        let path = dir.join(name).display().to_string();
        run_refused(host, &format!("--memory 64M --kernel {path}"), 1, &[&path]);
    }
    run_refused(host, "--kernel /nowhere/vmlinuz", 1, &["/nowhere/vmlinuz", "no such file"]);
    run_refused(host, &format!("--kernel {}", dir.display()), 1, &["directory"]);
    let kernel = dir.join("kernel").display().to_string();
    fs::write(&kernel, elf).unwrap();
    run_refused(host, &format!("--kernel {kernel} --initrd /nowhere/initrd"), 1, &["/nowhere/initrd", "no such file"]);
    run_refused(host, "--initrd /nowhere/initrd", 2, &["--kernel"]);
}

#[test]
fn sizes_names_and_options() {
    let Some(net) = two_hosts() else { return };
    let host = &net.a;
    run_refused(host, "--memory 0", 2, &["memory"]);
    run_refused(host, "--memory much", 2, &["much", "--memory"]);
    run_refused(host, "--memory 200G", 1, &["memory", "MiB"]);
    run_refused(host, "--cpus 0", 2, &["vcpus"]);
    run_refused(host, "--cpus 65", 2, &["vcpus"]);
    run_refused(host, "--unknown", 2, &["--unknown"]);
    host.microvm("run -d --name a/b").refused(2, &["a/b", "not a VM name"]);
    host.microvm("unknown").refused(2, &["unknown"]);
    host.is_empty();
    for command in
        ["inspect", "console", "logs", "stop", "pause", "resume", "rm", "cancel", "resolve --keep", "migrate --to x"]
    {
        let (name, more) = command.split_once(' ').unwrap_or((command, ""));
        host.microvm(&format!("{name} nobody {more}")).refused(1, &["no VM nobody"]);
    }
    host.pulse("web", "--memory 64M", "ws=1M");
    host.microvm("run -d --name web").refused(1, &["web is taken", "--name"]);
    host.microvm("run --name other --json").refused(2, &["--detach"]);
    host.microvm("rm web").refused(1, &["web runs", "--force"]);
    host.microvm("rm --force web").ok();
    host.is_empty();
}

#[test]
fn every_command_explains_itself() {
    let Some(net) = two_hosts() else { return };
    let commands = "run migrate agent receive ps inspect console logs stop pause resume rm cancel resolve doctor";
    for command in commands.split(' ') {
        assert!(net.a.microvm(&format!("{command} --help")).ok().contains("Usage: microvm"), "{command}");
        net.a.microvm(&format!("{command} --no-such-option")).refused(2, &["--no-such-option"]);
    }
}

#[test]
fn interfaces_that_cannot_be() {
    let Some(net) = two_hosts() else { return };
    let host = &net.a;
    run_refused(host, "--net bridge=br7", 1, &["br7", "ip link add br7 type bridge"]);
    run_refused(host, "--net bridge=lo", 1, &["lo", "not a bridge"]);
    run_refused(host, "--net bridge=br0,mac=52:54", 2, &["52:54"]);
    run_refused(host, "--net bridge=br0,mac=01:00:5e:00:00:01", 2, &["01:00:5e:00:00:01", "unicast"]);
    run_refused(host, "--net bridge=br0,ip=10.0.0", 2, &["10.0.0", "address"]);
    run_refused(host, "--net br0", 2, &["bridge=NAME"]);
    let twice = "--net bridge=br0,mac=52:54:00:00:00:01 --net bridge=br0,mac=52:54:00:00:00:01";
    run_refused(host, twice, 2, &["two network interfaces", "52:54:00:00:00:01"]);
    host.pulse("web", "--memory 64M --net tap=tap7,bridge=br0,mac=52:54:00:00:00:01", "ws=1M");
    host.microvm("run -d --name bad --net tap=tap7").refused(1, &["tap7", "in use"]);
    let again = host.microvm("run -d --name bad --net bridge=br0,mac=52:54:00:00:00:01");
    again.refused(1, &["web", "52:54:00:00:00:01", "mac="]);
    host.microvm("rm --force web").ok();
    host.is_empty();
}

#[test]
fn hosts_without_kvm_or_without_room() {
    let Some(net) = two_hosts() else { return };
    let (host, runtime) = (&net.a, net.a.runtime().display().to_string());
    let shell = |script: String| {
        let mut command = host.ns.command("unshare");
        command.args(["-m", "sh", "-c", &script]).env("MICROVM_RUNTIME_DIR", &runtime);
        run(command)
    };
    shell(format!("mount --bind /dev/null /dev/kvm && {MICROVM} run -d")).refused(1, &["KVM"]);
    shell(format!("mount -t tmpfs none /dev && {MICROVM} run -d")).refused(1, &["/dev/kvm"]);
    host.is_empty();
    let full = format!(
        "mount -t tmpfs -o size=4k none {runtime} && head -c 4096 /dev/zero >{runtime}/all; {MICROVM} run -d --name bad"
    );
    shell(full).refused(1, &["no space left"]);
    host.leave_fleet();
    host.microvm("agent --listen 10.77.0.1:7437").refused(1, &["--insecure-plaintext", "microvm trust"]);
    host.microvm("agent --listen 192.0.2.1:7437 --insecure-plaintext").refused(1, &["192.0.2.1:7437"]);
}

/// Something that is no agent, on host 2's port.
fn answers(net: &Net, answer: Option<Vec<u8>>) {
    let (ready, is_ready) = std::sync::mpsc::channel();
    net.b.ns.within(move || {
        let listener = TcpListener::bind(("10.77.0.2", 7437)).unwrap();
        ready.send(()).unwrap();
        let (mut stream, _) = listener.accept().unwrap();
        if let Some(answer) = answer {
            let _ = stream.read(&mut [0; 64]);
            let _ = stream.write_all(&answer);
        }
        // Until the other side has had enough.
        let _ = stream.read_to_end(&mut Vec::new());
    });
    is_ready.recv().unwrap();
}

#[test]
fn destinations_that_are_none() {
    let Some(net) = two_hosts() else { return };
    let pulse = net.a.pulse("web", "--memory 64M", "ws=4M rate=10M");
    let refuses = |words: &[&str]| {
        let said = net.a.migrate("web", &net.b, "");
        said.refused(1, words);
        let report = said.json();
        assert_eq!((&report["outcome"], &report["owner"]), (&"failed".into(), &"source".into()), "{report}");
        assert_eq!(report["error"]["phase"], "preflight", "{report}");
        assert_eq!(net.a.state("web").as_deref(), Some("running"));
        pulse.goes_on(&net.a);
    };
    refuses(&["10.77.0.2:7437", "refused", "microvm agent"]);
    answers(&net, Some(b"HTTP/1.1 400 Bad Request\r\n\r\n".to_vec()));
    refuses(&["10.77.0.2:7437", "protocol", "HTTP/1.1"]);
    answers(&net, Some((0..=255).map(|i: u8| i.wrapping_mul(167) ^ 0x5a).collect()));
    refuses(&["10.77.0.2:7437", "protocol"]);
    answers(&net, None);
    refuses(&["10.77.0.2:7437"]);
    // Version 99, refused, with a sentence.
    let mut newer = b"MICROVM\n".to_vec();
    newer.extend([7, 0, 99, 0, 1, 0]);
    newer.extend(b"too old");
    newer[8] = 4 + 7;
    answers(&net, Some(newer));
    refuses(&["99"]);
    net.a.microvm("migrate web --to 192.0.2.1").refused(1, &["192.0.2.1"]);
    net.a.microvm("migrate web --to no-such-host.invalid").refused(1, &["no-such-host.invalid"]);
    pulse.is_well(&net.a);
}

#[test]
fn destinations_that_cannot_take_it() {
    let Some(mut net) = hosts() else { return };
    let pulse = net.a.pulse("web", "--memory 64M --net bridge=br0", "ws=4M rate=10M");
    net.b.microvm("run -d --name web --memory 64M").ok();
    net.a.migrate("web", &net.b, "").refused(1, &["web is taken on the destination"]);
    pulse.goes_on(&net.a);
    net.b.microvm("rm --force web").ok();
    net.b.stop_agent();
    net.b.ns.ip("link set br0 name lan0");
    net.b.start_agent("");
    net.a.migrate("web", &net.b, "").refused(1, &["br0", "does not exist"]);
    net.b.is_empty();
    pulse.goes_on(&net.a);
    net.b.ns.ip("link set lan0 name br0");
    wait_until("the bridge is back", || net.b.ns.ip("link show br0").contains("br0"));
    net.a.moves("web", &net.b, "");
    pulse.is_well(&net.b);
}

#[test]
fn stopping_and_removing() {
    let Some(net) = two_hosts() else { return };
    let host = &net.a;
    host.pulse("web", "--memory 64M", "ws=1M");
    let said = host.microvm("stop web --timeout 10s").ok();
    assert!(said.contains("powered off") || said.contains("stopped by force"), "{said}");
    wait_until("it has ended", || host.ps()[0]["exit"]["reason"].is_string());
    assert!(host.microvm("logs web").ok().contains("\"filled\""));
    host.microvm("stop web").refused(1, &["web has ended"]);
    host.microvm("run -d --name web").refused(1, &["web is taken", "microvm rm web"]);
    host.microvm("rm web").ok();
    host.is_empty();
    host.pulse("web", "--memory 64M", "ws=1M");
    let follower = host.start("logs -f web");
    host.microvm("stop web --timeout 0").ok();
    assert!(follower.said().ok().contains("\"filled\""));
}
