//! Boots the built-in guest in QEMU (emulated, so that no `/dev/kvm` is needed) and uses it as a person would.
//!
//! Without QEMU the tests say so and pass: they prove the guest, not the VMM, whose own tests boot it as well.

#![allow(clippy::unwrap_used)] // Clippy's exception for tests does not reach their helpers.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

const QEMU: &str = "qemu-system-x86_64";
/// Far longer than anything takes, even on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

struct Guest {
    qemu: Child,
    lines: Receiver<String>,
    dir: tempfile::TempDir,
}

impl Guest {
    /// Boots; `None`, with a reason, where there is no QEMU.
    fn boot(acpi: &str, cmdline: &str, more: &[&str]) -> Option<Self> {
        if Command::new(QEMU).arg("--version").stdout(Stdio::null()).status().is_err() {
            eprintln!("skipped: {QEMU} is not installed");
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        let kernel = dir.path().join("pulse");
        std::fs::write(&kernel, images::pulse_elf()).unwrap();
        let mut qemu = Command::new(QEMU)
            .args(["-M", &format!("microvm,acpi={acpi},isa-serial=on"), "-accel", "tcg", "-cpu", "max", "-m", "128M"])
            .args(["-nodefaults", "-no-user-config", "-nographic", "-no-reboot", "-serial", "stdio"])
            .args([
                "-chardev",
                &format!("socket,id=g,server=on,wait=off,path={}", gdb(dir.path())),
                "-gdb",
                "chardev:g",
            ])
            .args(["-append", cmdline])
            .arg("-kernel")
            .arg(&kernel)
            .args(more)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let (sender, lines) = channel();
        let stdout = BufReader::new(qemu.stdout.take().unwrap());
        std::thread::spawn(move || stdout.lines().map_while(Result::ok).try_for_each(|line| sender.send(line)));
        Some(Self { qemu, lines, dir })
    }

    /// The next line that has `what` in it.
    fn wait_for(&self, what: &str) -> String {
        let end = Instant::now() + PATIENCE;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            let line = self.lines.recv_timeout(left).unwrap_or_else(|_| panic!("the guest never said {what}"));
            if line.contains(what) {
                return line;
            }
        }
    }

    /// Writes into the guest's memory behind its back, through QEMU's debugger stub.
    fn overwrite(&self, address: u64, bytes: &[u8]) {
        let mut stub = UnixStream::connect(gdb(self.dir.path())).unwrap();
        stub.set_read_timeout(Some(PATIENCE)).unwrap();
        // Attaching stops the machine and detaching lets it go on; a packet holds a little less than 2 KiB.
        let writes = bytes.chunks(1024).zip((address..).step_by(1024)).map(|(chunk, at)| {
            let hex: String = chunk.iter().map(|byte| format!("{byte:02x}")).collect();
            (format!("M{at:x},{:x}:{hex}", chunk.len()), "$OK#")
        });
        let dialogue = [("?".to_owned(), "$T")].into_iter().chain(writes).chain([("D".to_owned(), "$OK#")]);
        for (command, answer) in dialogue {
            let sum = command.bytes().fold(0u8, |sum, byte| sum.wrapping_add(byte));
            write!(stub, "+${command}#{sum:02x}").unwrap();
            let mut got = String::new();
            while !got.contains(answer) {
                let mut byte = [0];
                stub.read_exact(&mut byte).unwrap_or_else(|error| panic!("{command}: {got}: {error}"));
                got.push(char::from(byte[0]));
            }
        }
    }

    fn exit(mut self) {
        let end = Instant::now() + PATIENCE;
        while self.qemu.try_wait().unwrap().is_none() {
            assert!(Instant::now() < end, "the machine never ended");
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }
}

fn gdb(dir: &Path) -> String {
    dir.join("gdb").to_str().unwrap().to_owned()
}

fn field(line: &str, name: &str) -> u64 {
    let (_, rest) = line.split_once(&format!("\"{name}\":")).unwrap_or_else(|| panic!("no {name} in {line}"));
    rest.split(|c: char| !c.is_ascii_digit()).next().unwrap().parse().unwrap()
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

fn get(port: u16, target: &str) -> String {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    write!(stream, "GET {target} HTTP/1.1\r\nHost: pulse\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

#[test]
fn it_writes_checks_and_reports() {
    let Some(guest) = Guest::boot("off", "ws=8M rate=8M report=50ms seed=oops", &[]) else { return };
    assert!(guest.wait_for("warning").contains("seed=oops"));
    assert_eq!(field(&guest.wait_for("\"start\""), "ws"), 8 << 20);
    guest.wait_for("filled");
    let line = guest.wait_for("\"sweeps\":2,");
    assert!(field(&line, "pages_written") > 2048 && field(&line, "pages_verified") > 4096, "{line}");
    assert_eq!(field(&line, "errors"), 0);
}

#[test]
fn a_single_damaged_byte_is_found_once() {
    let Some(guest) = Guest::boot("off", "ws=8M rate=0 report=50ms", &[]) else { return };
    guest.wait_for("filled");
    // Somewhere in the working set, which begins within 2 MiB of the image and its tables.
    guest.overwrite(0x60_0fff, &[0xa5]);
    let line = guest.wait_for("wrong-page");
    assert!(line.contains("\"fault\":\"torn\""), "{line}");
    assert_eq!(
        (field(&line, "address"), field(&line, "first_bad_byte"), field(&line, "bad_words")),
        (0x60_0000, 4088, 1)
    );
    guest.overwrite(0x50_0000, &[0; 4096]);
    assert!(guest.wait_for("wrong-page").contains("\"fault\":\"zero\""));
    let sweeps = field(&guest.wait_for("sweeps"), "sweeps") + 2;
    assert_eq!(field(&guest.wait_for(&format!("\"sweeps\":{sweeps},")), "errors"), 2);
}

#[test]
fn it_answers_the_network_and_switches_off() {
    for acpi in ["off", "on"] {
        let (http, echo, counters) = (free_port(), free_port(), free_port());
        let net = format!(
            "user,id=n,hostfwd=tcp:127.0.0.1:{http}-10.0.2.15:80,hostfwd=tcp:127.0.0.1:{echo}-10.0.2.15:7,\
             hostfwd=udp:127.0.0.1:{echo}-10.0.2.15:7,hostfwd=udp:127.0.0.1:{counters}-10.0.2.15:8"
        );
        let more = ["-netdev", &net, "-device", "virtio-net-device,netdev=n"];
        let Some(guest) = Guest::boot(acpi, "ws=8M rate=1M ip=10.0.2.15/24 gw=10.0.2.2", &more) else { return };
        assert!(guest.wait_for("network").contains("\"interrupt\":true"));
        guest.wait_for("filled");

        let status = get(http, "/status");
        assert!(status.starts_with("HTTP/1.1 200 ") && field(&status, "errors") == 0, "{status}");
        assert!(get(http, "/").contains("<title>pulse</title>"));
        assert!(get(http, "/nothing").starts_with("HTTP/1.1 404 "));
        assert!(get(http, "/work?ws=much").starts_with("HTTP/1.1 400 "));
        assert_eq!(field(&get(http, "/work?ws=4M&rate=2M&pattern=random"), "rate"), 2 << 20);

        let udp = UdpSocket::bind("127.0.0.1:0").unwrap();
        udp.set_read_timeout(Some(PATIENCE)).unwrap();
        udp.send_to(b"are you there?", ("127.0.0.1", echo)).unwrap();
        let mut datagram = [0; 128];
        let bytes = udp.recv(&mut datagram).unwrap();
        assert_eq!(&datagram[..bytes], b"are you there?");
        udp.send_to(b"which answer is mine", ("127.0.0.1", counters)).unwrap();
        assert_eq!((udp.recv(&mut datagram).unwrap(), &datagram[..16]), (72, &b"which answer is "[..]));
        assert_eq!(datagram[64], 1, "it was filled");

        // More than all the buffers on the way hold, so that the windows close and open.
        let sent: Vec<u8> = (0..2_000_000u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
        let mut stream = TcpStream::connect(("127.0.0.1", echo)).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut back = stream.try_clone().unwrap();
        let mut got = vec![0; sent.len()];
        std::thread::scope(|scope| {
            scope.spawn(|| stream.write_all(&sent).unwrap());
            back.read_exact(&mut got).unwrap();
        });
        assert!(got == sent, "what came back is not what was sent");

        get(http, "/poweroff");
        guest.wait_for("poweroff");
        guest.exit();
    }
}

#[test]
fn a_crash_is_the_end_of_the_machine() {
    let http = free_port();
    let net = format!("user,id=n,hostfwd=tcp:127.0.0.1:{http}-10.0.2.15:80");
    let more = ["-netdev", &net, "-device", "virtio-net-device,netdev=n"];
    let Some(guest) = Guest::boot("off", "ws=1M ip=10.0.2.15/24 gw=10.0.2.2", &more) else { return };
    guest.wait_for("filled");
    get(http, "/crash");
    guest.wait_for("crash");
    guest.exit();
}
