//! Who may talk to whom, and what a peer may make a host do: real processes, real certificates, hostile peers.
#![allow(clippy::unwrap_used)] // Clippy's exception for tests does not reach their helpers.

mod common;

use std::fs;
use std::os::unix::fs::PermissionsExt;

use common::net::{Host, Net, hosts};
use common::trust::{dialer, member, sections};
use common::{no_hosts, skip, wait_until};
use migrator::driver::request::{self, AskAnswer};
use rustix::process::Signal;
use serde_json::json;

fn two_hosts() -> Option<Net> {
    match no_hosts() {
        None => Some(Net::new()),
        Some(reason) => {
            skip(&reason);
            None
        }
    }
}

/// `migrate` fails in preflight and says `words`; the VM runs on.
#[track_caller]
fn does_not_go(from: &Host, to: &Host, more: &str, words: &[&str]) {
    let said = from.migrate("web", to, more);
    said.refused(1, words);
    assert_eq!(said.json()["error"]["phase"], "preflight", "{said:?}");
    assert_eq!(from.state("web").as_deref(), Some("running"));
}

/// Two hosts that have nothing in common but a network.
fn strangers() -> Option<Net> {
    match no_hosts() {
        None => Some(Net::of_strangers()),
        Some(reason) => {
            skip(&reason);
            None
        }
    }
}

#[test]
fn three_commands_make_two_hosts_trust_each_other() {
    let Some(net) = strangers() else { return };
    let (mut a, mut b) = (net.a, net.b);
    // Nothing is trusted, and nothing goes, until somebody says so.
    a.microvm("agent --listen 10.77.0.1:7437")
        .refused(1, &["no certificate", "microvm trust init", "--insecure-plaintext"]);
    a.pulse("web", "--memory 64M", "ws=1M");
    a.microvm("migrate web --to 10.77.0.2")
        .refused(1, &["no certificate", "microvm trust init", "--insecure-plaintext"]);
    a.microvm("trust show").refused(1, &["microvm trust init", "microvm trust import"]);
    a.microvm("trust issue host2").refused(1, &["microvm trust init"]);

    a.microvm("trust init --name lab --host host1").ok();
    let bundle = a.runtime().join("bundle");
    let issue = format!("trust issue host2 --address 10.77.0.2 --out {}", bundle.display());
    a.microvm(&issue).ok();
    a.microvm(&issue).refused(1, &["exists"]);
    let mode = |path: std::path::PathBuf| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(bundle.clone()), 0o600);
    b.microvm(&format!("trust import {}", bundle.display())).ok();
    for host in [&a, &b] {
        let trust = host.config().join("trust");
        assert_eq!(mode(trust.clone()), 0o700);
        for file in fs::read_dir(trust).unwrap().flatten() {
            assert_eq!(mode(file.path()), 0o600, "{file:?}");
        }
    }
    // Without --address, init took the addresses of the host.
    let shown = a.microvm("trust show --json").json();
    assert_eq!(shown["fleet"], "lab");
    assert!(shown["host"]["names"].as_array().unwrap().contains(&json!("10.77.0.1")), "{shown}");
    assert!(b.microvm("trust show").ok().contains("host        host2\n"));

    a.start_agent("");
    b.start_agent("");
    a.moves("web", &b, "");
    b.moves("web", &a, "");
    a.microvm("trust init").refused(1, &["belongs to the fleet lab already"]);
    b.microvm("trust issue host3").refused(1, &["not the CA's host"]);
    b.microvm("trust rotate").refused(1, &["microvm trust issue host2"]);
    a.microvm(&format!("trust import {}", bundle.display())).refused(1, &["the CA's host"]);
    a.microvm("trust issue HOST_2").refused(1, &["not a host's name"]);
    a.microvm("trust issue 10.0.0.1").refused(1, &["not a host's name"]);
}

#[test]
fn bundles_that_are_none() {
    let Some(net) = two_hosts() else { return };
    let (a, b) = (&net.a, &net.b);
    let before = fs::read(b.config().join("trust/host.pem")).unwrap();
    let bundle = a.microvm("trust issue host2").ok();
    let path = b.runtime().join("bundle");
    let refused = |text: &str, words: &[&str]| {
        fs::write(&path, text).unwrap();
        b.microvm(&format!("trust import {}", path.display())).refused(1, words);
        assert_eq!(fs::read(b.config().join("trust/host.pem")).unwrap(), before, "it was installed all the same");
    };
    refused("", &["nothing came"]);
    refused("hello", &["cannot import"]);
    refused(&bundle[..bundle.len() / 2], &["cannot import"]);
    let parts: Vec<String> = pem::parse_many(&bundle).unwrap().iter().map(pem::encode).collect();
    let [certificate, key, root] = parts.as_slice() else { panic!("{bundle}") };
    refused(&(certificate.clone() + key), &["no authority"]);
    refused(&(certificate.clone() + root), &["without its key"]);
    refused(&(key.clone() + root), &["key without a certificate"]);
    let other = rcgen::KeyPair::generate().unwrap().serialize_pem();
    refused(&(certificate.clone() + &other + root), &["cannot import"]);
    // Another fleet, whole; and its authority with our certificate.
    let stranger = Net::of_strangers();
    stranger.a.microvm("trust init --name test --host host1").ok();
    let theirs = stranger.a.microvm("trust export").ok();
    refused(&(certificate.clone() + key + &theirs), &["did not sign"]);
    stranger.b.microvm("trust init --name other --host host1").ok();
    refused(&stranger.b.microvm("trust issue host2").ok(), &["belongs to the fleet test", "other"]);
    b.microvm("trust import /nowhere").refused(1, &["/nowhere"]);
}

#[test]
fn who_is_not_trusted_and_what_the_user_reads() {
    let Some(mut net) = two_hosts() else { return };
    net.b.start_agent("");
    let pulse = net.a.pulse("web", "--memory 64M", "ws=1M rate=1M");
    let (a, b) = (&net.a, &net.b);
    // Clear text to a port that wants TLS.
    does_not_go(a, b, "--insecure-plaintext", &["encrypted connections only", "microvm trust issue"]);
    // A host that its certificate does not name.
    b.ns.ip("addr add 10.77.0.22/24 dev br0");
    let elsewhere = b.start("agent --listen 10.77.0.22:7437");
    wait_until("it listens", || b.ns.run("ss", "-Hltn").ok().contains("10.77.0.22:7437"));
    let said = a.microvm("migrate web --to 10.77.0.22");
    drop(elsewhere);
    said.refused(
        1,
        &["10.77.0.22:7437 is not trusted", "is for host2, 10.77.0.2,", "not for 10.77.0.22", "--address 10.77.0.22"],
    );

    // Our certificate has expired: said before anything is dialled.
    let host = a.config().join("trust/host.pem");
    let good = fs::read(&host).unwrap();
    let authority = |tag| pem::encode(&sections(a, "authority.pem", tag)[0]);
    let issuer_key = rcgen::KeyPair::from_pem(&authority("PRIVATE KEY")).unwrap();
    let issuer = rcgen::Issuer::from_ca_cert_pem(&authority("CERTIFICATE"), issuer_key).unwrap();
    for (from, to, word) in [(2001, 2002, "has expired"), (3001, 3002, "not valid yet")] {
        let mut params = rcgen::CertificateParams::default();
        params.distinguished_name.push(rcgen::DnType::CommonName, "host1");
        params.subject_alt_names = vec![rcgen::SanType::DnsName("host1".try_into().unwrap())];
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Constrained(0));
        (params.not_before, params.not_after) = (rcgen::date_time_ymd(from, 1, 1), rcgen::date_time_ymd(to, 1, 1));
        let key = rcgen::KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &issuer).unwrap();
        fs::write(&host, certificate.pem() + &key.serialize_pem()).unwrap();
        a.microvm("migrate web --to 10.77.0.2").refused(1, &["this host, host1,", word]);
        a.microvm("agent --listen 10.77.0.1:7438").refused(1, &["this host, host1,", word]);
    }
    assert!(a.microvm("trust show").ok().contains("3002-01-01"));
    fs::write(&host, good).unwrap();

    // Another fleet.
    let trust = a.config().join("trust");
    fs::rename(&trust, a.config().join("kept")).unwrap();
    a.microvm("trust init --name elsewhere --host host1 --address 10.77.0.1").ok();
    does_not_go(a, b, "", &["10.77.0.2:7437 is not trusted", "not from this fleet's authority", "microvm trust show"]);
    fs::remove_dir_all(&trust).unwrap();
    // None at all.
    a.microvm("migrate web --to 10.77.0.2").refused(1, &["no certificate"]);
    fs::rename(a.config().join("kept"), &trust).unwrap();
    // An agent that does without.
    net.b.stop_agent();
    net.b.start_agent("--insecure-plaintext");
    does_not_go(&net.a, &net.b, "", &["in clear text only", "--insecure-plaintext"]);
    net.a.moves("web", &net.b, "--insecure-plaintext");
    pulse.is_well(&net.b);
}

#[test]
fn a_revoked_host_is_out_and_comes_back_with_a_new_certificate() {
    let Some(mut net) = two_hosts() else { return };
    net.a.start_agent("");
    net.b.start_agent("");
    let (a, b) = (&net.a, &net.b);
    b.pulse("web", "--memory 64M", "ws=1M rate=1M");
    a.microvm("trust revoke nobody").refused(1, &["no host nobody"]);
    a.microvm("trust revoke host1").refused(1, &["is this host"]);
    a.microvm("trust revoke host2").ok();
    // The agents are not restarted. Host 1 knows at once, in both directions.
    does_not_go(b, a, "", &["does not trust this host", "was revoked"]);
    a.pulse("db", "--memory 64M", "ws=1M");
    let said = a.microvm("migrate db --to 10.77.0.2");
    said.refused(1, &["10.77.0.2:7437 is not trusted", "was revoked", "microvm trust issue"]);
    // A new certificate for it, and all is well; the list came along.
    let path = a.runtime().join("bundle");
    a.microvm(&format!("trust issue host2 --address 10.77.0.2 --out {}", path.display())).ok();
    b.microvm(&format!("trust import {}", path.display())).ok();
    b.moves("web", a, "");
    a.moves("db", b, "");
    assert_eq!(b.microvm("trust show --json").json()["revoked_serials"].as_array().unwrap().len(), 1);
    // An older list does not undo a newer one.
    let old = a.microvm("trust export").ok();
    let host3 = a.microvm("trust issue host3").ok();
    a.microvm("trust revoke host3").ok();
    for text in [&a.microvm("trust export").ok(), &old] {
        fs::write(&path, text).unwrap();
        b.microvm(&format!("trust import {}", path.display())).ok();
        assert_eq!(b.microvm("trust show --json").json()["revoked_serials"].as_array().unwrap().len(), 2);
    }
    fs::write(&path, host3).unwrap();
    b.microvm(&format!("trust import {}", path.display())).refused(1, &["was revoked"]);
}

#[test]
fn the_authority_is_replaced_while_vms_move() {
    let Some(mut net) = two_hosts() else { return };
    net.a.start_agent("");
    net.b.start_agent("");
    let (a, b) = (&net.a, &net.b);
    a.pulse("web", "--memory 64M", "ws=1M rate=1M");
    let there_and_back = || {
        a.moves("web", b, "");
        b.moves("web", a, "");
    };
    let path = a.runtime().join("bundle");
    let carry = |text: String| {
        fs::write(&path, text).unwrap();
        b.microvm(&format!("trust import {}", path.display())).ok();
    };
    a.microvm("trust rotate --finish").refused(1, &["rotate --ca begins"]);
    a.microvm("trust rotate --ca").ok();
    a.microvm("trust rotate --ca").refused(1, &["--finish"]);
    there_and_back();
    carry(a.microvm("trust export").ok());
    there_and_back();
    carry(a.microvm("trust issue host2 --address 10.77.0.2").ok());
    there_and_back();
    a.microvm("trust rotate --finish").refused(1, &["microvm trust rotate first"]);
    a.microvm("trust rotate").ok();
    there_and_back();
    a.microvm("trust rotate --finish").ok();
    there_and_back();
    carry(a.microvm("trust export").ok());
    there_and_back();
    assert_eq!(b.microvm("trust show --json").json()["authorities"].as_array().unwrap().len(), 1);
}

/// Whether `needle` is anywhere in the memory of a process.
fn has_in_memory(pid: u64, needle: &[u8]) -> bool {
    use std::os::unix::fs::FileExt;
    let memory = fs::File::open(format!("/proc/{pid}/mem")).unwrap();
    fs::read_to_string(format!("/proc/{pid}/maps")).unwrap().lines().any(|line| {
        let mut words = line.split([' ', '-']);
        let mut number = || u64::from_str_radix(words.next().unwrap(), 16).unwrap();
        let (start, end) = (number(), number());
        let mut bytes = vec![0; (end - start) as usize];
        line.split(' ').nth(1).unwrap().starts_with('r')
            && memory.read_exact_at(&mut bytes, start).is_ok()
            && bytes.windows(needle.len()).any(|window| window == needle)
    })
}

#[test]
fn no_vm_process_ever_holds_the_hosts_key() {
    let Some(net) = hosts() else { return };
    net.a.pulse("web", "--memory 64M", "ws=1M rate=1M");
    net.a.moves("web", &net.b, "");
    net.b.moves("web", &net.a, "");
    net.a.moves("web", &net.b, "");
    let pid = net.b.inspect("web")["pid"].as_u64().unwrap();
    let key = sections(&net.b, "host.pem", "PRIVATE KEY").remove(0);
    // PKCS #8 around an elliptic curve's key (RFC 5915): the secret number is its 32 bytes from 36 on.
    let secret = &key.contents()[36..68];
    assert!(!has_in_memory(pid, secret), "a guest that breaks out would find the host's key");
    // This finds what is there: the VM's name, and in the agent the key.
    assert!(has_in_memory(pid, b"web"));
    assert!(
        has_in_memory(u64::from(net.b.agent_pid().unwrap().cast_unsigned()), secret)
            || has_in_memory(u64::from(net.b.agent_pid().unwrap().cast_unsigned()), pem_line(&key))
    );
}

/// The first line of a key's text: the agent has it as it was in the file.
fn pem_line(key: &pem::Pem) -> &'static [u8] {
    let text = pem::encode(key);
    text.lines().nth(1).unwrap().to_owned().leak().as_bytes()
}

#[test]
fn a_migration_is_nobody_elses_to_ask_about() {
    let Some(net) = hosts() else { return };
    net.b.pulse("web", "--memory 64M", "ws=16M rate=1M");
    let migration = net.b.start("migrate web --to 10.77.0.1 --bandwidth 1M --json");
    wait_until("pages are under way", || net.b.inspect("web")["migration"]["phase"] == "pre-copy");
    let journal = fs::read_dir(net.a.runtime().join("incoming")).unwrap().find_map(Result::ok).unwrap();
    let id = journal.file_name().to_str().unwrap().parse().unwrap();
    let before = fs::read(journal.path()).unwrap();
    let (host2, host3) = (member(&net.a, "host2", "10.77.0.2"), member(&net.a, "host3", "10.77.0.3"));
    let (as_host2, as_host3) = (dialer(&host2, &net.a), dialer(&host3, &net.a));
    net.b
        .ns
        .within(move || {
            assert_eq!(request::ask(&*as_host2, id, common::PATIENCE).unwrap(), AskAnswer::Pending);
            let error = request::ask(&*as_host3, id, common::PATIENCE).unwrap_err().to_string();
            assert!(error.contains("is not one of host3"), "{error}");
            // Of an attempt that never was, everybody hears the same, whoever asked first.
            let never = migrator::MigrationId([5; 16]);
            for dialer in [&as_host3, &as_host2] {
                assert_eq!(request::ask(&**dialer, never, common::PATIENCE).unwrap(), AskAnswer::GaveUp);
            }
        })
        .join()
        .unwrap();
    assert_eq!(fs::read(journal.path()).unwrap(), before);
    migration.signal(Signal::INT);
    assert_eq!(migration.said().code(), 3);
}

/// Writes a host's policy. Agents read it with the next request.
fn policy(host: &Host, policy: &serde_json::Value) {
    fs::write(host.config().join("policy.json"), policy.to_string()).unwrap();
}

#[test]
fn what_a_peer_may_make_a_host_do() {
    let Some(net) = hosts() else { return };
    let (a, b) = (&net.a, &net.b);
    let file = b.config().join("policy.json").display().to_string();
    a.pulse("web", "--memory 64M --cpus 2 --net bridge=br0", "ws=1M rate=1M");
    for (rules, words) in [
        (json!({"peers": ["host3"]}), ["host1", "peers"]),
        (json!({"bridges": ["br9"]}), ["br0", "bridges"]),
        (json!({"bridges": {"br9": "br0"}}), ["br0", "bridges"]),
        (json!({"limits": {"memory_per_vm": "63M"}}), ["64 MiB", "memory_per_vm"]),
        (json!({"limits": {"memory": "63M"}}), ["64 MiB", "\"memory\""]),
        (json!({"limits": {"cpus_per_vm": 1}}), ["2 vCPUs", "cpus_per_vm"]),
        (json!({"limits": {"vms": 0}}), ["VMs on this host", "\"vms\""]),
        (json!({"limits": {"incoming": 0}}), ["on their way here", "incoming"]),
        (json!({"limit": {}}), ["cannot be understood", "limit"]),
        (json!({"limits": {"memory": -1}}), ["cannot be understood", "policy.json"]),
        (json!({"pull": [{"peer": "host1"}]}), ["cannot be understood", "vms"]),
    ] {
        policy(b, &rules);
        does_not_go(a, b, "", &[words[0], words[1], &file]);
        b.is_empty();
    }
    policy(b, &json!({"peers": ["host1"], "bridges": {"br0": "br7"}}));
    does_not_go(a, b, "", &["br7"]);
    b.ns.ip("link add br7 type bridge");
    b.ns.ip("link set br7 up");
    a.moves("web", b, "");
    assert_eq!(b.inspect("web")["nets"][0]["bridge"], "br7");
    policy(a, &json!({"bridges": {"br7": "br0"}}));
    b.moves("web", a, "");
    assert_eq!(a.inspect("web")["nets"][0]["bridge"], "br0");

    // A TAP of ours has to be given away by name.
    a.microvm("rm --force web").ok();
    a.pulse("web", "--memory 64M --net tap=tap7,bridge=br0", "ws=1M rate=1M");
    policy(b, &json!({}));
    does_not_go(a, b, "", &["tap7", "\"taps\"", &file]);
    policy(b, &json!({"taps": ["tap7"]}));
    a.moves("web", b, "");
}

#[test]
fn a_vm_that_came_reads_only_boot_files_that_it_may() {
    let Some(net) = hosts() else { return };
    let (a, b) = (&net.a, &net.b);
    let folder = a.runtime().join("boot");
    fs::create_dir(&folder).unwrap();
    fs::write(folder.join("kernel"), images::pulse_elf()).unwrap();
    let net_option = "--net bridge=br0,ip=10.77.0.50/24";
    let options = format!("--memory 64M {net_option} --kernel {}", folder.join("kernel").display());
    let policies = [json!({}), json!({"boot_files": ["/nowhere"]}), json!({"boot_files": [folder]})];
    for (may, rules) in [false, false, true].into_iter().zip(policies) {
        policy(b, &rules);
        // Both namespaces see the same files, so only the policy is in the way.
        a.pulse("web", &options, "ws=1M rate=1M ip=10.77.0.50/24");
        a.moves("web", b, "");
        assert!(!b.microvm("logs web").ok().contains("\"filled\""), "it has not booted here");
        // It may be gone before it has answered.
        net.observer.run("curl", "-sS -m 30 --retry 3 --retry-connrefused http://10.77.0.50/reboot");
        if may {
            wait_until("the guest boots again", || b.microvm("logs web").ok().contains("\"filled\""));
        } else {
            let reason = || b.ps().first().map(|vm| vm["exit"]["reason"].clone());
            wait_until("the guest reboots", || reason() == Some("cannot-reboot".into()));
            let why = b.ps()[0]["exit"]["detail"].as_str().unwrap().to_owned();
            assert!(why.contains("does not let it read") && why.contains("boot_files"), "{why}");
        }
        b.microvm("rm --force web").ok();
    }
}

#[test]
fn pulling_a_vm() {
    let Some(net) = hosts() else { return };
    let (a, b) = (&net.a, &net.b);
    let pulse = a.pulse("web", "--memory 64M", "ws=4M rate=1M");
    let refused = |arguments: &str, words: &[&str]| {
        b.microvm(arguments).refused(1, words);
        assert_eq!(a.state("web").as_deref(), Some("running"));
        b.is_empty();
    };
    // Nobody may, unless the policy says so; and nothing else than what it says.
    refused("pull web --from 10.77.0.1", &["host2", "pull", "policy.json", "\"vms\""]);
    policy(a, &json!({"pull": [{"peer": "host3", "vms": ["*"]}, {"peer": "host2", "vms": ["db"]}]}));
    refused("pull web --from 10.77.0.1", &["host2 pull web", "policy.json"]);
    policy(a, &json!({"pull": [{"peer": "host2", "vms": ["web", "nobody"]}]}));
    refused("pull nobody --from 10.77.0.1", &["no VM nobody"]);
    refused("pull web --from 10.77.0.1 --to 10.77.0.1", &["10.77.0.1 is not a name or address of host2"]);
    refused("pull web --from 10.77.0.1 --to host1", &["host1 is not a name or address of host2"]);
    refused("pull web --from 10.77.0.1 --insecure-plaintext", &["encrypted connections only"]);
    refused("pull web --from 10.77.0.3", &["10.77.0.3"]);
    refused("pull web --from 10.77.0.1 --to 10.77.0.2:1", &["10.77.0.2:1"]);

    // Ctrl-C there stops it.
    let running = b.start("pull web --from 10.77.0.1 --bandwidth 1M --json");
    wait_until("the VM is on its way", || a.inspect("web")["migration"]["phase"] == "pre-copy");
    running.signal(Signal::INT);
    let said = running.said();
    assert_eq!((said.code(), said.json()["outcome"].as_str()), (3, Some("cancelled")), "{said:?}");
    assert!(said.stderr.contains("web runs on at 10.77.0.1"), "{said:?}");
    pulse.goes_on(a);
    b.is_empty();

    // Whoever pulls may die: the migration goes on.
    let running = b.start("pull web --from 10.77.0.1 --bandwidth 8M");
    wait_until("the VM is on its way", || a.inspect("web")["migration"]["phase"] == "pre-copy");
    running.signal(Signal::KILL);
    drop(running);
    wait_until("the VM arrives", || b.state("web").as_deref() == Some("running"));
    wait_until("the source lets go", || a.state("web").is_none());
    pulse.is_well(b);
    b.moves("web", a, "");

    let said = b.microvm("pull web --from 10.77.0.1 --verify --json");
    assert_eq!(said.code(), 0, "{said:?}");
    let report = said.json();
    assert_eq!((&report["outcome"], &report["owner"]), (&json!("completed"), &json!("destination")), "{report}");
    assert_eq!(report["to"], "10.77.0.2:7437", "{report}");
    pulse.is_well(b);
    a.is_empty();
}

/// How the guest moves is said by whoever pulls, and done by the host that has it.
#[test]
fn pulling_with_settings() {
    let Some(net) = hosts() else { return };
    let (a, b) = (&net.a, &net.b);
    policy(a, &json!({"pull": [{"peer": "host2", "vms": ["web"]}]}));
    let pulse = a.pulse("web", "--memory 128M", "ws=64M rate=800M");
    let pull = "pull web --from 10.77.0.1 --compress none --bandwidth 64M --json";
    let said = b.microvm(&format!("{pull} --throttle never"));
    assert_eq!(said.code(), 1, "{said:?}");
    let error = &said.json()["error"];
    assert!(error["message"].as_str().unwrap().contains("does not converge"), "{error}");
    assert!(error["hint"].as_str().unwrap().contains("--throttle auto"), "{error}");
    pulse.goes_on(a);
    b.is_empty();
    let said = b.microvm(&format!("{pull} --max-downtime 400ms --verify"));
    assert_eq!(said.code(), 0, "{said:?}");
    let report = said.json();
    assert!((1..=990).contains(&report["throttle_permille"].as_u64().unwrap()), "{report}");
    assert_eq!((&report["compression"]["mode"], &report["mode"]), (&json!("none"), &json!("pre-copy")), "{report}");
    pulse.is_well(b);
    a.is_empty();
}

#[test]
fn without_trust_there_is_loopback_only() {
    let Some(net) = strangers() else { return };
    let (a, there) = (net.a, net.b);
    // Two hosts on one machine, as in the README: two runtime folders.
    let listen = |host: &Host, port: u16| {
        let mut command = a.ns.command(common::net::MICROVM);
        command.args(["agent", "--listen", &format!("127.0.0.1:{port}")]);
        command.env("MICROVM_RUNTIME_DIR", host.runtime()).env("MICROVM_CONFIG_DIR", host.config());
        common::Running::start(command)
    };
    let _agents = [listen(&a, 7001), listen(&there, 7002)];
    wait_until("the agents listen", || {
        let ports = a.ns.run("ss", "-Hltn").ok();
        ports.contains(":7001") && ports.contains(":7002")
    });
    a.pulse("web", "--memory 64M", "ws=1M rate=1M");
    assert_eq!(a.microvm("migrate web --to 127.0.0.1:7002").code(), 0);
    // And back, pulled: in clear text nobody has a name, so the policy must let anybody.
    let pull = "pull web --from 127.0.0.1:7002 --to 127.0.0.1:7001";
    a.microvm(pull).refused(1, &["let anybody pull web", "\"*\""]);
    fs::create_dir_all(there.config()).unwrap();
    policy(&there, &json!({"pull": [{"peer": "*", "vms": ["web"]}]}));
    a.microvm("pull web --from 127.0.0.1:7002 --to 127.0.0.2:7001").refused(1, &["127.0.0.2 is not a name or address"]);
    assert_eq!(a.microvm(pull).code(), 0);
    assert_eq!(a.state("web").as_deref(), Some("running"));
}

/// A number of `/proc/PID/status`.
fn status(pid: u32, key: &str) -> u64 {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = text.lines().find(|line| line.starts_with(key)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

#[test]
fn hostile_peers_do_not_keep_others_out() {
    use std::io::Write;
    use std::net::TcpStream;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

    use migrator::MigrationId;
    use migrator::layout::{RamLayout, RamRegion};
    use migrator::traits::VmDescription;
    use migrator::wire::preamble::{Preamble, Role};

    let Some(net) = hosts() else { return };
    let (a, b) = (&net.a, &net.b);
    let pulse = a.pulse("web", "--memory 64M", "ws=4M rate=10M");
    let agent = b.agent_pid().unwrap().cast_unsigned();
    let idle = status(agent, "VmRSS");
    let stop = Arc::new(AtomicBool::new(false));
    let mut attackers = Vec::new();
    let mut attack = |work: Box<dyn Fn(&AtomicBool) + Send>| {
        let stop = stop.clone();
        attackers.push(net.observer.within(move || {
            while !stop.load(Ordering::Relaxed) {
                work(&stop);
            }
        }));
    };
    let connect = || TcpStream::connect(("10.77.0.2", 7437));
    // A thousand connections that say nothing, again and again.
    attack(Box::new(move |stop| {
        let held: Vec<_> = (0..1000).filter_map(|_| connect().ok()).collect();
        for _ in 0..20 {
            if stop.load(Ordering::Relaxed) {
                break;
            }
            std::thread::sleep(std::time::Duration::from_millis(100));
        }
        drop(held);
    }));
    // A byte now and then: of a preamble, and of a handshake after it.
    let preamble = Preamble { role: Role::Request, stream: 0, id: MigrationId([3; 16]) }.encode(true);
    let hello = [preamble.clone(), vec![22, 3, 1, 0x3f, 0xff]].concat();
    for bytes in [preamble, hello] {
        attack(Box::new(move |stop| {
            let Ok(mut stream) = connect() else { return };
            for byte in bytes.iter().copied().chain(std::iter::repeat_n(0, 10_000)) {
                if stop.load(Ordering::Relaxed) || stream.write_all(&[byte]).is_err() {
                    return;
                }
                std::thread::sleep(std::time::Duration::from_millis(200));
            }
        }));
    }
    // Garbage, as fast as it goes.
    attack(Box::new(move |_| {
        if let Ok(mut stream) = connect() {
            let _ = stream.write_all(&[0xa5; 100_000]);
        }
    }));
    // A host of the fleet that offers what cannot be, and too much of what can.
    let host3 = member(a, "host3", "10.77.0.254");
    let dialer = dialer(&host3, b);
    let (offered, refused) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
    let facts = |name: &str, memory: u64| {
        let spec = json!({"name": name, "cpus": 1, "memory_bytes": memory, "nets": [],
                          "boot": {"kernel": null, "initrd": null, "cmdline": ""}});
        json!({"spec": spec, "cpuid": [], "tsc_khz": 1, "kvm": "software", "cpu_model": "", "cpu_vendor": ""})
    };
    let kvm = b.microvm("doctor --json").json()["kvm"].clone();
    for attacker in 0..4 {
        let (dialer, offered, refused, kvm) = (dialer.clone(), offered.clone(), refused.clone(), kvm.clone());
        attack(Box::new(move |stop| {
            for n in 0..25 {
                if stop.load(Ordering::Relaxed) {
                    return;
                }
                let memory = [1u64 << 40, 1 << 63, 64 << 20, 64 << 20, 64 << 20][n % 5];
                let name = format!("x{attacker}-{n}");
                let ram = RamLayout::new(vec![RamRegion { gpa: 0, bytes: memory.min(16 << 40) }]).unwrap();
                let mut facts = facts(&name, memory);
                if kvm.is_string() {
                    facts["kvm"] = kvm.clone();
                }
                let vm = VmDescription { name, ram, paused: false, facts };
                let id = MigrationId::random().unwrap();
                let offer = request::Offer { id, vm, streams: 1, verify: false, compressed: false };
                match request::offer(&*dialer, &offer, common::PATIENCE) {
                    Ok(Ok(())) => offered.fetch_add(1, Ordering::Relaxed),
                    Ok(Err(_)) => refused.fetch_add(1, Ordering::Relaxed),
                    Err(_) => 0,
                };
            }
        }));
    }
    wait_until("the attackers are at work", || refused.load(Ordering::Relaxed) >= 40 && status(agent, "Threads") > 50);
    let (mut threads, mut descriptors) = (0, 0);
    let mut measure = || {
        threads = threads.max(status(agent, "Threads"));
        descriptors = descriptors.max(fs::read_dir(format!("/proc/{agent}/fd")).unwrap().count());
    };
    // Meanwhile somebody has work to do.
    let (mut here, mut there) = (a, b);
    for _ in 0..3 {
        measure();
        here.moves("web", there, "--max-downtime 20s");
        (here, there) = (there, here);
    }
    measure();
    pulse.is_well(here);
    stop.store(true, Ordering::Relaxed);
    attackers.into_iter().for_each(|attacker| attacker.join().unwrap());
    let peak = status(agent, "VmHWM");
    println!(
        "agent: {idle} KiB idle, {peak} KiB at most, {threads} threads, {descriptors} descriptors; offers: {} taken, {} refused",
        offered.load(Ordering::Relaxed),
        refused.load(Ordering::Relaxed)
    );
    assert!(peak < 64 << 10, "{peak} KiB");
    assert!(threads < 256 && descriptors < 512, "{threads} threads, {descriptors} descriptors");
    // What was offered and never sent is gone after a while, and so are the connections.
    here.moves("web", there, "");
    if here.ns.name() == b.ns.name() {
        b.is_empty();
    }
    wait_until("the agent is idle again", || status(agent, "Threads") < 30);
}
