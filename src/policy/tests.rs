use super::*;

const LOAD: Load = Load { vms: 0, memory_bytes: 0, incoming: 0, incoming_from_peer: 0 };

fn spec(memory_bytes: u64, net: Option<&str>) -> MachineSpec {
    let boot = crate::machine::spec::BootSpec { kernel: None, initrd: None, cmdline: String::new() };
    let nets = net.iter().map(|net| NetSpec::parse(net, "web", 0).unwrap()).collect();
    MachineSpec { name: "web".into(), cpus: 1, memory_bytes, boot, nets }
}

fn policy(text: &str) -> Policy {
    Policy { path: "/etc/microvm/policy.json".into(), rules: serde_json::from_str(text).unwrap() }
}

#[test]
fn by_default_an_ordinary_vm_comes_and_a_tap_does_not() {
    let default = Policy::read(Path::new("/nowhere/policy.json"), false).unwrap();
    assert!(Policy::read(Path::new("/nowhere/policy.json"), true).is_err(), "it was named, and is not there");
    let mut vm = spec(64 << 20, Some("bridge=br0"));
    default.admit(&mut vm, None, LOAD).unwrap();
    assert_eq!(vm.nets[0].bridge.as_deref(), Some("br0"));
    default.admit(&mut vm, Some("br1"), LOAD).unwrap();
    assert_eq!(vm.nets[0].bridge.as_deref(), Some("br1"));
    let error = default.admit(&mut spec(64 << 20, Some("tap=tap0")), Some("br1"), LOAD).unwrap_err().to_string();
    assert!(error.contains(r#"add "tap0" to "taps" in /nowhere/policy.json"#), "{error}");
    assert!(default.check_pull(None, "web").is_err() && default.boot_folders().is_empty());
    default.check_peer(None).unwrap();
}

#[test]
fn no_size_overflows_and_no_vm_is_larger_than_the_host() {
    let default = policy("{}");
    for memory in [1 << 40, 1 << 63, u64::MAX] {
        let error = default.admit(&mut spec(memory, None), None, LOAD).unwrap_err().to_string();
        assert!(error.contains("memory_per_vm"), "{error}");
    }
    let full = Load { memory_bytes: u64::MAX, ..LOAD };
    assert!(default.admit(&mut spec(64 << 20, None), None, full).unwrap_err().to_string().contains("\"memory\""));
    let large = policy(r#"{"limits": {"memory_per_vm": "2T", "memory": "4T"}}"#);
    large.admit(&mut spec(1 << 40, None), None, LOAD).unwrap();
    let half = Load { memory_bytes: 3 << 40, ..LOAD };
    large.admit(&mut spec(1 << 40, None), None, half).unwrap();
    assert!(large.admit(&mut spec((1 << 40) + 1, None), None, half).is_err());
}

#[test]
fn limits_count_the_vm_that_comes() {
    let strict = policy(r#"{"limits": {"vms": 2, "incoming": 1}}"#);
    let admit = |vms, incoming| strict.admit(&mut spec(64 << 20, None), None, Load { vms, incoming, ..LOAD });
    admit(1, 0).unwrap();
    assert!(admit(2, 0).unwrap_err().to_string().contains("\"vms\""));
    assert!(admit(1, 1).unwrap_err().to_string().contains("\"incoming\""));
    let of_one = policy(r#"{"limits": {"incoming_per_peer": 1}}"#);
    let from_peer = |incoming_from_peer| Load { incoming: 1, incoming_from_peer, ..LOAD };
    of_one.admit(&mut spec(64 << 20, None), None, from_peer(0)).unwrap();
    let error = of_one.admit(&mut spec(64 << 20, None), None, from_peer(1)).unwrap_err().to_string();
    assert!(error.contains("incoming_per_peer"), "{error}");
}

#[test]
fn what_is_not_understood_is_an_error() {
    for bad in [
        "",
        "[]",
        r#"{"peer": []}"#,
        r#"{"limits": {"memory": 5}}"#,
        r#"{"limits": {"memory": "much"}}"#,
        r#"{"limits": {"cpus_per_vm": 256}}"#,
        r#"{"pull": [{"peer": "*", "vms": [], "more": 1}]}"#,
    ] {
        assert!(serde_json::from_str::<Rules>(bad).is_err(), "{bad}");
    }
}

#[test]
fn boot_files_are_where_they_are_and_not_where_they_seem_to_be() {
    let root = tempfile::tempdir().unwrap();
    let (inside, outside) = (root.path().join("boot"), root.path().join("secret"));
    std::fs::create_dir(&inside).unwrap();
    std::fs::write(inside.join("kernel"), "k").unwrap();
    std::fs::write(&outside, "s").unwrap();
    std::os::unix::fs::symlink(&outside, inside.join("link")).unwrap();
    let check = |kernel: PathBuf| {
        let boot = crate::machine::spec::BootSpec { kernel: Some(kernel), initrd: None, cmdline: String::new() };
        boot.check_within(std::slice::from_ref(&inside))
    };
    check(inside.join("kernel")).unwrap();
    for bad in [inside.join("link"), inside.join("../secret"), outside.clone(), inside.join("nothing")] {
        assert!(check(bad.clone()).is_err(), "{}", bad.display());
    }
}
