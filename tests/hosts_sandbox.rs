//! The process of a VM is in its sandbox: what it has given up, what happens when it tries nevertheless, and that a VM does there
//! all that it ever did. (That all other tests run in it is no test here, and the better proof.)
#![allow(clippy::unwrap_used)] // Clippy's exception for tests does not reach their helpers.

mod common;
#[path = "common/inject.rs"]
mod inject;

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use common::guest::http_get;
use common::net::{Host, MICROVM, hosts};
use common::{Said, run, skip, wait_for, wait_until};
use inject::{Outcome, TEXT, Thread, threads};
use serde_json::Value;

const GUEST: &str = "10.77.0.10";

/// A field of /proc/PID/status, or of a thread's.
fn status(process: &str, field: &str) -> String {
    let text = fs::read_to_string(format!("/proc/{process}/status")).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
    line.unwrap_or_else(|| panic!("no {field} in {text}")).split_whitespace().collect::<Vec<_>>().join(" ")
}

fn pid(host: &Host, name: &str) -> i64 {
    host.inspect(name)["pid"].as_i64().unwrap()
}

/// Checks everything that can be seen of a VM's sandbox from outside, and returns its user.
#[track_caller]
fn is_caged(host: &Host, name: &str) -> u64 {
    let view = host.inspect(name);
    let pid = view["pid"].as_i64().unwrap();
    let user = view["sandbox"]["user"].as_u64().unwrap_or_else(|| panic!("{}", view["sandbox"]));
    assert_eq!(view["sandbox"]["seccomp"], true);
    assert_eq!(
        view["sandbox"]["missing"].as_array().map(Vec::len),
        Some(usize::from(view["sandbox"]["landlock"].is_null()))
    );
    let four = vec![user.to_string(); 4].join(" ");
    for (tid, thread) in threads(pid) {
        let process = format!("{pid}/task/{tid}");
        assert_eq!(status(&process, "Uid"), four, "{thread}");
        assert_eq!(status(&process, "Gid"), four, "{thread}");
        assert_eq!(status(&process, "Groups"), "", "{thread}");
        for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
            assert_eq!(status(&process, set), "0000000000000000", "{thread} {set}");
        }
        assert_eq!(status(&process, "NoNewPrivs"), "1", "{thread}");
        assert_eq!(status(&process, "Seccomp"), "2", "{thread}");
        // That of main, or of migrations, and one of its own kind. (KVM makes threads, too, with those of whoever makes a VM.)
        let own = ["console", "console-accept", "control", "devices", "vcpu0"].contains(&thread.as_str());
        assert!(status(&process, "Seccomp_filters").parse::<u32>().unwrap() >= if own { 2 } else { 1 }, "{thread}");
    }
    let limits = fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
    let limit =
        |name: &str| limits.lines().find_map(|l| l.strip_prefix(name)).unwrap().split_whitespace().nth(1).unwrap();
    for (name, value) in
        [("Max core file size", 0), ("Max file size", 64 << 20), ("Max open files", 1024), ("Max processes", 512)]
    {
        assert!(limit(name).parse::<u64>().unwrap() <= value, "{limits}");
    }
    // Nothing in its root directory, and nothing that it owns in its folder.
    assert_eq!(fs::read_dir(format!("/proc/{pid}/root/")).unwrap().count(), 0);
    let folder = host.runtime().join("vms").join(name);
    for file in [folder.clone()].into_iter().chain(fs::read_dir(&folder).unwrap().map(|file| file.unwrap().path())) {
        assert_eq!(file.metadata().unwrap().uid(), 0, "{}", file.display());
    }
    for descriptor in fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten() {
        let Ok(target) = fs::read_link(descriptor.path()) else { continue };
        let target = target.display().to_string();
        let inside = target.strip_prefix(&format!("{}/", host.runtime().display()));
        let good = match inside {
            Some(file) => {
                !Path::new(&target).is_dir()
                    && (["vms/web", "incoming/", "outgoing/web"].iter().any(|good| file.starts_with(good)))
            }
            None => {
                ["/dev/kvm", "/dev/net/tun", "/dev/null", "/proc/meminfo", &format!("/proc/{pid}/pagemap")]
                    .contains(&target.as_str())
                    || ["anon_inode:", "socket:", "pipe:"].iter().any(|kind| target.starts_with(kind))
            }
        };
        assert!(good, "{name} has {target} open");
    }
    // Its keeper has the privileges that it needs, and no more.
    let keeper = status(&pid.to_string(), "PPid");
    assert_eq!(status(&keeper, "Name"), "microvm-keeper");
    assert_eq!(u64::from_str_radix(&status(&keeper, "CapEff"), 16).unwrap() & !(1 << 12), 0);
    user
}

#[test]
fn each_vm_has_a_cage_of_its_own_and_gets_one_wherever_it_goes() {
    let Some(net) = hosts() else { return };
    let web = net.a.pulse("web", &format!("--memory 64M --net bridge=br0,ip={GUEST}/24"), "ws=4M rate=10M");
    net.a.pulse("web2", "--memory 64M --net bridge=br0", "ws=4M rate=10M");
    let users = [is_caged(&net.a, "web"), is_caged(&net.a, "web2")];
    assert_ne!(users[0], users[1]);
    for (from, to) in [(&net.a, &net.b), (&net.b, &net.a)] {
        from.moves("web", to, "--verify");
        web.is_well(to);
        is_caged(to, "web");
    }
    net.a.microvm("pause web").ok();
    net.a.microvm("resume web").ok();
    web.is_well(&net.a);
    net.a.microvm("stop web").ok();
    net.a.microvm("rm --force web web2").ok();
    net.a.is_empty();
}

/// Calls that whoever breaks out would like to make.
fn wishes(neighbour: i64) -> Vec<(&'static str, i64, [u64; 6])> {
    let at_cwd = libc::AT_FDCWD.cast_unsigned().into();
    let neighbour = neighbour.cast_unsigned();
    vec![
        ("open a file", libc::SYS_openat, [at_cwd, TEXT, 0, 0, 0, 0]),
        ("open a file, as long ago", libc::SYS_open, [TEXT, 0, 0, 0, 0, 0]),
        ("remove a file", libc::SYS_unlink, [TEXT, 0, 0, 0, 0, 0]),
        ("start a program", libc::SYS_execve, [TEXT, 0, 0, 0, 0, 0]),
        ("fork", libc::SYS_fork, [0; 6]),
        ("fork by clone", libc::SYS_clone, [libc::SIGCHLD as u64, 0, 0, 0, 0, 0]),
        (
            "a socket to programs of the host",
            libc::SYS_socket,
            [libc::AF_UNIX as u64, libc::SOCK_STREAM as u64, 0, 0, 0, 0],
        ),
        ("a raw socket", libc::SYS_socket, [libc::AF_INET as u64, libc::SOCK_RAW as u64, 0, 0, 0, 0]),
        ("listen", libc::SYS_bind, [0; 6]),
        ("trace a neighbour", libc::SYS_ptrace, [u64::from(libc::PTRACE_SEIZE), neighbour, 0, 0, 0, 0]),
        ("read a neighbour's memory", libc::SYS_process_vm_readv, [neighbour, 0, 0, 0, 0, 0]),
        ("kill a neighbour", libc::SYS_kill, [neighbour, 9, 0, 0, 0, 0]),
        ("kill a neighbour's thread", libc::SYS_tgkill, [neighbour, neighbour, 9, 0, 0, 0]),
        ("become root", libc::SYS_setresuid, [0; 6]),
        ("mount", libc::SYS_mount, [0; 6]),
        ("leave its root directory", libc::SYS_chroot, [TEXT, 0, 0, 0, 0, 0]),
        ("run what it wrote", libc::SYS_mmap, [0, 4096, libc::PROT_EXEC as u64, 0x22, u64::MAX, 0]),
        ("type into a terminal", libc::SYS_ioctl, [0, libc::TIOCSTI, TEXT, 0, 0, 0]),
        ("handle its own violations", libc::SYS_rt_sigaction, [libc::SIGSYS as u64, 0, 0, 8, 0, 0]),
        ("BPF", libc::SYS_bpf, [0; 6]),
        ("io_uring", libc::SYS_io_uring_setup, [1, 0, 0, 0, 0, 0]),
    ]
}

#[test]
fn no_thread_can_do_what_a_guest_that_broke_out_would_like_to() {
    let Some(net) = hosts() else { return };
    let web = net.a.pulse("web", "--memory 64M --net bridge=br0", "ws=4M rate=10M");
    net.a.pulse("other", "--memory 64M", "ws=4M rate=10M");
    let (pid, neighbour) = (pid(&net.a, "web"), pid(&net.a, "other"));
    let tids: HashMap<String, i32> = threads(pid).into_iter().map(|(tid, name)| (name, tid)).collect();
    for name in ["microvm", "vcpu0", "devices", "console", "console-accept", "control", "migrations"] {
        let mut thread = Thread::stop(tids[name]);
        for (wish, number, arguments) in wishes(neighbour) {
            assert_eq!(thread.call(number, arguments, "/etc/passwd"), Outcome::Trapped, "{name}: {wish}");
        }
        // What some may, and others not.
        let tcp = [libc::AF_INET as u64, libc::SOCK_STREAM as u64, 0, 0, 0, 0];
        let socket = thread.call(libc::SYS_socket, tcp, "");
        assert_eq!(socket != Outcome::Trapped, name == "migrations", "{name}: {socket:?}");
        if let Outcome::Returned(socket) = socket {
            assert!(socket > 2, "{socket}");
            assert_eq!(thread.call(libc::SYS_close, [socket.cast_unsigned(), 0, 0, 0, 0, 0], ""), Outcome::Returned(0));
        }
        let create_vm = thread.call(libc::SYS_ioctl, [u64::MAX, 0xae01, 0, 0, 0, 0], "");
        let asks_kvm = ["microvm", "control", "migrations"].contains(&name);
        let expected = if asks_kvm { Outcome::Returned(-i64::from(libc::EBADF)) } else { Outcome::Trapped };
        assert_eq!(create_vm, expected, "{name}");
        // Not the end: the C library tries it first.
        let clone3 = thread.call(libc::SYS_clone3, [0; 6], "");
        assert_eq!(clone3, Outcome::Returned(-i64::from(libc::ENOSYS)), "{name}");
        // Harmless ones go through, or all the above says nothing.
        assert_eq!(thread.call(libc::SYS_getpid, [0; 6], ""), Outcome::Returned(pid), "{name}");
    }
    web.is_well(&net.a);
}

#[test]
fn a_thread_that_misbehaves_ends_the_vm_and_the_user_learns_which_call_it_was() {
    let Some(net) = hosts() else { return };
    for (thread, number) in [("vcpu0", libc::SYS_openat), ("devices", libc::SYS_socket), ("microvm", libc::SYS_execve)]
    {
        net.a.pulse("web", "--memory 64M --net bridge=br0", "ws=4M rate=10M");
        let tid = threads(pid(&net.a, "web")).into_iter().find(|(_, name)| name == thread).unwrap().0;
        Thread::stop(tid).let_it_call(number);
        let line = wait_for("it has ended", || net.a.ps().into_iter().find(|vm| vm["state"] == "ended"));
        let expected = serde_json::json!({"reason": "sandbox", "detail": {"syscall": number, "thread": thread}});
        assert_eq!(line["exit"], expected, "{line}");
        let said = net.a.microvm("ps").ok();
        let sentence =
            format!("web was ended by its sandbox: the thread {thread} made system call {number}, which it may not");
        assert!(said.contains(&sentence), "{said}");
        let log = net.a.microvm("logs --process web").ok();
        assert!(log.contains(&format!("the thread {thread} made system call {number}, which it may not")), "{log}");
        assert!(net.a.taps().is_empty());
        net.a.microvm("rm web").ok();
        net.a.is_empty();
    }
}

#[test]
fn a_guest_reboots_in_there_with_its_tap_and_with_the_kernel_as_it_is_by_then() {
    let Some(net) = hosts() else { return };
    let kernel = net.a.runtime().join("kernel");
    fs::write(&kernel, images::pulse_elf()).unwrap();
    let options = format!("--memory 64M --net bridge=br0,ip={GUEST}/24 --kernel {}", kernel.display());
    let web = net.a.pulse("web", &options, &format!("ws=4M rate=10M ip={GUEST}/24"));
    let (pid, taps) = (pid(&net.a, "web"), net.a.taps());
    let boots = || web.said(&net.a).iter().filter(|line| line["event"] == "filled").count();
    for boot in 2..4 {
        http_get(&net.observer, GUEST, "/reboot");
        wait_until("it has booted again", || boots() == boot);
        web.is_well(&net.a);
        assert_eq!((self::pid(&net.a, "web"), net.a.taps()), (pid, taps.clone()));
        http_get(&net.observer, GUEST, "/status");
    }
    is_caged_but_for_its_kernel(&net.a, &kernel);
    // As written to meanwhile, and not as it was.
    fs::write(&kernel, b"no kernel any more").unwrap();
    http_get(&net.observer, GUEST, "/reboot");
    let exit = wait_for("it has ended", || Some(net.a.ps()[0]["exit"].clone()).filter(|exit| !exit.is_null()));
    assert_eq!(exit["reason"], "cannot-reboot", "{exit}");
    assert!(exit["detail"].as_str().unwrap().contains(&kernel.display().to_string()), "{exit}");
}

#[track_caller]
fn is_caged_but_for_its_kernel(host: &Host, kernel: &Path) {
    let pid = pid(host, "web");
    let open =
        fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten().filter_map(|fd| fs::read_link(fd.path()).ok());
    assert_eq!(open.filter(|target| target == kernel).count(), 1);
    assert_eq!(status(&pid.to_string(), "Seccomp"), "2");
}

#[test]
fn without_a_sandbox_it_is_said() {
    let Some(mut net) = hosts() else { return };
    net.b.stop_agent();
    net.b.start_agent("--no-sandbox");
    let web = net.a.pulse("web", "--memory 64M --no-sandbox --net bridge=br0", "ws=4M rate=10M");
    for (host, here) in [(&net.a, true), (&net.b, false)] {
        if !here {
            net.a.moves("web", &net.b, "");
        }
        web.is_well(host);
        let view = host.inspect("web");
        assert_eq!((&view["sandbox"]["seccomp"], &view["sandbox"]["user"]), (&false.into(), &Value::Null), "{view}");
        let pid = view["pid"].to_string();
        assert_eq!((status(&pid, "Seccomp"), status(&pid, "Uid")), ("0".into(), "0 0 0 0".into()));
        for command in ["ps", "inspect web", "logs --process web"] {
            let said = host.microvm(command).ok();
            assert!(said.contains("no sandbox"), "{command}: {said}");
        }
    }
    // Back where there is one.
    net.b.moves("web", &net.a, "");
    is_caged(&net.a, "web");
}

#[test]
fn whoever_is_not_root_has_all_of_it_but_the_user() {
    let Some(net) = hosts() else { return };
    let host = &net.a;
    let kvm = host.runtime().join("kvm");
    let device = rustix::fs::makedev(10, 232);
    let made = rustix::fs::mknodat(rustix::fs::CWD, &kvm, rustix::fs::FileType::CharacterDevice, 0o666.into(), device);
    if let Err(error) = made.and_then(|()| rustix::fs::chmod(&kvm, 0o666.into())) {
        return skip(&format!("no device node of KVM's for another user: {error}"));
    }
    let home = host.runtime().join("home");
    fs::create_dir(&home).unwrap();
    std::os::unix::fs::chown(&home, Some(65534), Some(65534)).unwrap();
    fs::set_permissions(host.runtime(), fs::Permissions::from_mode(0o755)).unwrap();
    // A copy: the program may lie where only root comes.
    let program = host.runtime().join("microvm");
    fs::copy(MICROVM, &program).unwrap();
    let as_nobody = |arguments: &str| {
        let mut command = host.ns.command("sh");
        let (kvm, home, program) = (kvm.display(), home.display(), program.display());
        command.arg("-c").arg(format!(
            "mount --bind {kvm} /dev/kvm && exec setpriv --reuid 65534 --regid 65534 --clear-groups \
             env MICROVM_RUNTIME_DIR={home} {program} {arguments}"
        ));
        run(command)
    };
    as_nobody("run -d --name web --memory 64M --cmdline 'ws=4M rate=10M'").ok();
    let view = as_nobody("inspect web --json").json();
    assert_eq!((&view["sandbox"]["seccomp"], &view["sandbox"]["user"]), (&true.into(), &Value::Null));
    let missing = view["sandbox"]["missing"].to_string();
    assert!(missing.contains("not started as root"), "{missing}");
    let pid = view["pid"].as_i64().unwrap();
    assert_eq!(status(&pid.to_string(), "Uid"), "65534 65534 65534 65534");
    for (tid, name) in threads(pid) {
        assert_eq!(status(&format!("{pid}/task/{tid}"), "Seccomp"), "2", "{name}");
        assert_eq!(status(&format!("{pid}/task/{tid}"), "NoNewPrivs"), "1", "{name}");
    }
    wait_until("the guest says something", || as_nobody("logs web").ok().contains("sweeps"));
    let log = as_nobody("logs --process web").ok();
    assert!(log.contains("the sandbox lacks something: not started as root"), "{log}");
    as_nobody("stop web").ok();
    as_nobody("rm web").ok();
    assert_eq!(fs::read_dir(home.join("vms")).unwrap().count(), 0);
}

/// The program without a namespace around it; the VM web is gone with it.
struct Alone {
    runtime: PathBuf,
}

impl Alone {
    fn microvm(&self, arguments: &str) -> Said {
        let mut command = Command::new(MICROVM);
        command.args(arguments.split_whitespace()).env("MICROVM_RUNTIME_DIR", &self.runtime);
        run(command)
    }
}

impl Drop for Alone {
    fn drop(&mut self) {
        let _ = self.microvm("rm --force web");
    }
}

#[test]
fn a_vm_is_put_into_the_cgroup_that_was_asked_for() {
    let Some(net) = hosts() else { return };
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    let found = mounts.lines().find(|line| line.split(' ').nth(2) == Some("cgroup2"));
    let Some(root) = found.and_then(|line| line.split(' ').nth(1)) else {
        return skip("there is no cgroup v2");
    };
    let name = format!("mvt-{}", std::process::id());
    let group = Path::new(root).join(&name);
    if let Err(error) = fs::create_dir(&group) {
        return skip(&format!("{}: {error}", group.display()));
    }
    let path = group.display();
    // Not in a namespace of `ip netns exec`: it hides all cgroups.
    let host = Alone { runtime: net.a.runtime().to_path_buf() };
    host.microvm(&format!("run -d --name bad --cgroup {path}-not")).refused(1, &["is no cgroup", "mkdir"]);
    host.microvm(&format!("run -d --name web --memory 64M --cgroup {path}")).ok();
    let pid = host.microvm("inspect web --json").json()["pid"].as_i64().unwrap();
    let member = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
    assert!(member.lines().any(|line| line == format!("0::/{name}")), "{member}");
    assert_eq!(status(&pid.to_string(), "Seccomp"), "2");
    drop(host);
    wait_until("the cgroup is empty", || fs::remove_dir(&group).is_ok());
}

#[test]
fn without_its_keeper_a_vm_goes_on_and_leaves_only_what_rm_removes() {
    let Some(net) = hosts() else { return };
    let web = net.a.pulse("web", "--memory 64M", "ws=4M rate=10M");
    let keeper: i32 = status(&pid(&net.a, "web").to_string(), "PPid").parse().unwrap();
    rustix::process::kill_process(rustix::process::Pid::from_raw(keeper).unwrap(), rustix::process::Signal::KILL)
        .unwrap();
    web.is_well(&net.a);
    assert_eq!(net.a.migrate("web", &net.b, "").code(), 0);
    web.is_well(&net.b);
    net.a.microvm("rm web").ok();
    net.a.is_empty();
}
