//! TAPs and bridges of a real kernel, each test in a network namespace of its own. Needs root and /dev/net/tun; without them
//! the tests say so and pass.
#![allow(unsafe_code)] // unshare(2) has no safe wrapper.
#![allow(clippy::unwrap_used)] // All of this is test code; the lint knows only functions marked as tests.

use std::io::Write;
use std::net::UdpSocket;
use std::os::fd::AsFd;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use vm_memory::{Bytes, FileOffset, GuestAddress};
use vmm::devices::bus::BusDevice;
use vmm::devices::io_thread::IoThread;
use vmm::devices::virtio::net::{Backend, MAX_FRAME_BYTES};
use vmm::devices::virtio::{MacAddress, MmioTransport, Net, NetConfig, Tap, TapError};
use vmm::memory::GuestMemoryMmap;

/// Runs a test on a thread in a new network namespace; prints the reason if that cannot be.
fn in_own_network(test: fn()) {
    // Past the test runner's capture: a skip is to be seen.
    let skip = |reason: String| std::io::stderr().write_all(format!("skipped: {reason}\n").as_bytes()).unwrap();
    if !std::fs::exists("/dev/net/tun").unwrap_or(false) {
        return skip("there is no /dev/net/tun".into());
    }
    let thread = std::thread::spawn(move || {
        // SAFETY: only this thread's network namespace changes, which no memory depends on.
        if unsafe { libc::unshare(libc::CLONE_NEWNET) } != 0 {
            return Some(std::io::Error::last_os_error());
        }
        test();
        None
    });
    match thread.join() {
        Ok(None) => {}
        Ok(Some(error)) => skip(format!("no network namespace of its own: {error}")),
        Err(panic) => std::panic::resume_unwind(panic),
    }
}

fn ip(arguments: &str) -> String {
    let output = Command::new("ip").args(arguments.split_whitespace()).output().expect("iproute2 is installed");
    assert!(output.status.success(), "ip {arguments}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn exists(interface: &str) -> bool {
    Command::new("ip").args(["link", "show", interface]).output().unwrap().status.success()
}

/// What another test starts at the same moment inherits all descriptors until its `exec`, and keeps the interface that long.
fn eventually(condition: impl Fn() -> bool) -> bool {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !condition() {
        if Instant::now() > deadline {
            return false;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    true
}

fn is_gone(interface: &str) -> bool {
    eventually(|| !exists(interface))
}

fn ports_of(bridge: &str) -> String {
    ip(&format!("-o link show master {bridge}"))
}

fn ipv6_is_off(interface: &str) -> bool {
    std::fs::read_to_string(format!("/proc/sys/net/ipv6/conf/{interface}/disable_ipv6")).unwrap().trim() == "1"
}

#[test]
fn a_bridge_keeps_its_address_whatever_taps_come_and_go() {
    in_own_network(|| {
        let address_of = |name: &str| {
            let line = ip(&format!("-o link show {name}"));
            line.split_once("link/ether ").unwrap().1[..17].to_owned()
        };
        // A random address is lower than the first more often than not; one that only begins with fe is lower than the second.
        for uplink in ["ee:00:00:00:00:01", "fe:ff:fe:00:00:01"] {
            ip("link add br0 type bridge");
            ip(&format!("link add up0 address {uplink} type veth peer name up1"));
            ip("link set up0 master br0");
            assert_eq!(address_of("br0"), uplink);
            let taps: Vec<Tap> = (0..8).map(|_| Tap::open(None, Some("br0")).unwrap()).collect();
            assert_eq!(address_of("br0"), uplink);
            let mut all: Vec<String> = taps.iter().map(|tap| address_of(tap.name())).collect();
            all.sort();
            all.dedup();
            assert_eq!(all.len(), taps.len(), "each has an address of its own");
            drop(taps);
            assert_eq!(address_of("br0"), uplink);
            ip("link del up0");
            ip("link del br0");
        }
    });
}

#[test]
fn a_tap_without_a_name_gets_one_and_disappears_with_its_descriptor() {
    in_own_network(|| {
        let first = Tap::open(None, None).unwrap();
        let second = Tap::open(None, None).unwrap();
        assert_eq!((first.name(), second.name()), ("mvm0", "mvm1"));
        assert!(ip("link show mvm0").contains(",UP"), "{}", ip("link show mvm0"));
        drop(first);
        assert!(is_gone("mvm0"));
        assert!(exists("mvm1"));
    });
}

#[test]
fn a_tap_that_is_open_is_busy_and_one_that_was_there_stays() {
    in_own_network(|| {
        ip("tuntap add tap7 mode tap");
        let tap = Tap::open(Some("tap7"), None).unwrap();
        let error = Tap::open(Some("tap7"), None).unwrap_err();
        assert!(matches!(&error, TapError::Busy(name) if name == "tap7"), "{error}");
        drop(tap);
        assert!(exists("tap7"));
        assert!(eventually(|| Tap::open(Some("tap7"), None).is_ok()));

        let made = Tap::open(Some("tap8"), None).unwrap();
        assert_eq!(made.name(), "tap8");
        assert!(matches!(Tap::open(Some("tap8"), None), Err(TapError::Busy(_))));
    });
}

#[test]
fn what_is_not_a_tap_is_refused() {
    in_own_network(|| {
        ip("tuntap add tun0 mode tun");
        ip("link add br0 type bridge");
        for name in ["tun0", "br0", "lo"] {
            let error = Tap::open(Some(name), None).unwrap_err();
            assert!(matches!(error, TapError::NotATap(_)), "{name}: {error:?}");
        }
    });
}

#[test]
fn without_the_capability_the_error_says_which() {
    in_own_network(|| {
        let mut sets = rustix::thread::capabilities(None).unwrap();
        sets.effective.remove(rustix::thread::CapabilitySet::NET_ADMIN);
        rustix::thread::set_capabilities(None, sets).unwrap();
        for name in [None, Some("tap6")] {
            let error = Tap::open(name, None).unwrap_err();
            assert!(matches!(error, TapError::Permission(..)), "{error:?}");
            assert!(error.to_string().contains("CAP_NET_ADMIN"), "{error}");
        }
    });
}

#[test]
fn a_tap_is_plugged_into_a_bridge_and_says_nothing() {
    in_own_network(|| {
        let error = Tap::open(None, Some("br0")).unwrap_err();
        assert!(matches!(error, TapError::NoBridge(_)), "{error:?}");
        assert!(is_gone("mvm0"), "what was made for nothing is gone");
        let error = Tap::open(None, Some("lo")).unwrap_err();
        assert!(matches!(error, TapError::NotABridge(_)), "{error:?}");

        ip("link add br0 type bridge");
        ip("link set br0 up");
        ip("tuntap add tap7 mode tap");
        let made = Tap::open(None, Some("br0")).unwrap();
        let there = Tap::open(Some("tap7"), Some("br0")).unwrap();
        let ports = ports_of("br0");
        assert!(ports.contains("mvm0") && ports.contains("tap7"), "{ports}");
        assert!(ipv6_is_off("mvm0") && ipv6_is_off("tap7"));
        // The bridge has got no frame from either, and knows nobody behind them.
        std::thread::sleep(Duration::from_millis(300));
        for tap in ["mvm0", "tap7"] {
            let statistics = ip(&format!("-s link show {tap}"));
            let rx = statistics.lines().skip_while(|line| !line.contains("RX:")).nth(1).unwrap();
            assert!(rx.trim_start().starts_with("0 "), "{statistics}");
        }

        ip("link add br1 type bridge");
        ip("tuntap add tap9 mode tap");
        ip("link set tap9 master br1");
        let error = Tap::open(Some("tap9"), Some("br0")).unwrap_err();
        assert!(matches!(error, TapError::PluggedInElsewhere { .. }), "{error:?}");
        assert!(ports_of("br1").contains("tap9"));
        assert!(!ipv6_is_off("tap9"), "left as it was");

        drop((made, there));
        assert!(eventually(|| ports_of("br0").is_empty()));
        assert!(exists("tap7"));
        assert!(!ipv6_is_off("tap7"), "as it was before");
    });
}

fn wait_for_frame(tap: &Tap, wanted: impl Fn(&[u8]) -> bool) -> Option<Vec<u8>> {
    let deadline = Instant::now() + Duration::from_secs(10);
    let mut buffer = vec![0; MAX_FRAME_BYTES];
    while Instant::now() < deadline {
        match rustix::io::read(tap.as_fd(), &mut buffer[..]) {
            Ok(bytes) if wanted(&buffer[12..bytes]) => return Some(buffer[..bytes].to_vec()),
            Ok(_) => {}
            Err(_) => std::thread::sleep(Duration::from_millis(1)),
        }
    }
    None
}

/// A TCP segment of 20 000 bytes, to be cut into pieces of 1 448 by whoever cannot take it whole.
fn large_segment() -> Vec<u8> {
    const PAYLOAD: usize = 20_000;
    // NEEDS_CSUM, TCPV4, 54 bytes of headers, pieces of 1448, the sum from 34 on goes to 16 after that.
    let mut frame = vec![1, 1, 54, 0, 0xa8, 5, 34, 0, 16, 0, 0, 0];
    frame.extend([0xff; 6]);
    frame.extend([0x52, 0x54, 0, 0, 0, 1, 8, 0]);
    let mut header = vec![0x45, 0, 0, 0, 0, 1, 0, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2];
    header[2..4].copy_from_slice(&((40 + PAYLOAD) as u16).to_be_bytes());
    let sum = header.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum::<u32>();
    let sum = (sum & 0xffff) + (sum >> 16);
    header[10..12].copy_from_slice(&(!(((sum & 0xffff) + (sum >> 16)) as u16)).to_be_bytes());
    frame.extend(header);
    frame.extend([0x12, 0x34, 0x56, 0x78, 0, 0, 0, 1, 0, 0, 0, 1, 0x50, 0x10, 0xff, 0xff, 0, 0, 0, 0]);
    frame.extend((0..PAYLOAD).map(|n| n as u8));
    frame
}

#[test]
fn large_segments_travel_whole_between_those_who_can() {
    in_own_network(|| {
        ip("link add br0 type bridge");
        ip("link set br0 up");
        let sender = Tap::open(None, Some("br0")).unwrap();
        let able = Tap::open(None, Some("br0")).unwrap();
        let unable = Tap::open(None, Some("br0")).unwrap();
        able.set_offloads(libc::TUN_F_CSUM | libc::TUN_F_TSO4 | libc::TUN_F_TSO6).unwrap();
        let sent = large_segment();
        let is_ours = |frame: &[u8]| frame.get(6..12) == Some(&[0x52, 0x54, 0, 0, 0, 1]);
        // Ports of a bridge forward from a moment after they are up.
        let mut whole = None;
        for _ in 0..50 {
            rustix::io::write(sender.as_fd(), &sent).unwrap();
            std::thread::sleep(Duration::from_millis(100));
            let mut buffer = vec![0; MAX_FRAME_BYTES];
            while let Ok(bytes) = rustix::io::read(able.as_fd(), &mut buffer[..]) {
                if is_ours(&buffer[12..bytes]) {
                    whole = Some(buffer[..bytes].to_vec());
                }
            }
            if whole.is_some() {
                break;
            }
        }
        let whole = whole.expect("the segment arrives");
        assert_eq!(whole[..2], [1, 1], "as a segment to be cut, without its checksum");
        assert!(whole[12..] == sent[12..], "{} bytes", whole.len());
        let piece = wait_for_frame(&unable, is_ours).expect("a piece arrives");
        assert_eq!(piece[..2], [0, 0]);
        assert_eq!(piece.len(), 12 + 14 + 40 + 1448);
    });
}

/// A guest's driver, just enough of it: rings at fixed places, one buffer a ring.
struct Guest {
    transport: MmioTransport,
    memory: vm_memory::GuestMemoryMmap<()>,
}

const MAC: MacAddress = MacAddress([0x52, 0x54, 0, 0, 0, 2]);
const RX_BUFFER: u64 = 0x1_0000;
const TX_BUFFER: u64 = 0x3_0000;

impl Guest {
    fn write(&mut self, register: u64, value: u32) {
        self.transport.write(register, &value.to_le_bytes());
    }

    fn ring(queue: u64) -> u64 {
        0x1000 + queue * 0x4000
    }

    fn start(transport: MmioTransport, memory: vm_memory::GuestMemoryMmap<()>) -> Self {
        let mut guest = Self { transport, memory };
        guest.write(0x70, 1);
        guest.write(0x70, 3);
        // Checksums and segmentation both ways, mergeable buffers; VERSION_1.
        for (select, features) in [(0, 1 | 2 | 1 << 7 | 1 << 11 | 1 << 15), (1, 1)] {
            guest.write(0x24, select);
            guest.write(0x20, features);
        }
        guest.write(0x70, 0xb);
        for queue in 0..2_u32 {
            let base = Self::ring(queue.into()) as u32;
            guest.write(0x30, queue);
            guest.write(0x38, 16);
            guest.write(0x80, base);
            guest.write(0x90, base + 0x1000);
            guest.write(0xa0, base + 0x2000);
            guest.write(0x44, 1);
        }
        guest.write(0x70, 0xf);
        let mut status = [0; 4];
        guest.transport.read(0x70, &mut status);
        assert_eq!(status, [0xf, 0, 0, 0]);
        guest
    }

    /// Makes the one buffer of `queue` available for the `round`th time (from 0), waits until it is used, and returns how many
    /// bytes were written.
    fn exchange(&mut self, queue: u64, round: u16, address: u64, len: u32) -> u32 {
        let base = Self::ring(queue);
        let descriptor = [address, u64::from(len) | if queue == 0 { 2 << 32 } else { 0 }];
        for (at, half) in [base, base + 8].into_iter().zip(descriptor) {
            self.memory.write_obj(half, GuestAddress(at)).unwrap();
        }
        self.memory.write_obj(0_u16, GuestAddress(base + 0x1004 + 2 * u64::from(round % 16))).unwrap();
        self.memory.write_obj(round + 1, GuestAddress(base + 0x1002)).unwrap();
        self.write(0x50, queue as u32);
        let deadline = Instant::now() + Duration::from_secs(10);
        while self.memory.read_obj::<u16>(GuestAddress(base + 0x2002)).unwrap() != round + 1 {
            assert!(Instant::now() < deadline, "queue {queue} does not move");
            std::thread::sleep(Duration::from_millis(1));
        }
        self.memory.read_obj(GuestAddress(base + 0x2008 + 8 * u64::from(round % 16))).unwrap()
    }
}

#[test]
fn a_guest_answers_a_program_on_the_host() {
    in_own_network(|| {
        let tap = Tap::open(Some("tap0"), None).unwrap();
        ip("addr add 10.9.8.1/24 dev tap0");
        ip("neigh add 10.9.8.2 lladdr 52:54:00:00:00:02 dev tap0");
        let memfd = rustix::fs::memfd_create("guest", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&memfd, 1 << 20).unwrap();
        let ranges = [(GuestAddress(0), 1 << 20, Some(FileOffset::new(memfd.into(), 0)))];
        let memory = Arc::new(GuestMemoryMmap::from_ranges_with_files(&ranges).unwrap());
        let net = Net::new(NetConfig { mac: MAC, addresses: vec![] }, tap);
        let (transport, device) = MmioTransport::new(memory, net).unwrap();
        let io = IoThread::spawn("test-io").unwrap();
        transport.attach(&io.handle()).unwrap();
        io.resume();
        let mut guest = Guest::start(transport, vm_memory::GuestMemoryMmap::from_ranges_with_files(&ranges).unwrap());

        let host = UdpSocket::bind("10.9.8.1:0").unwrap();
        host.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        let mut round = 0;
        for (sent, question) in [&b"who is there?"[..], &[7; 1400]].into_iter().enumerate() {
            host.send_to(question, "10.9.8.2:7").unwrap();
            // The host also talks IPv6 to everyone.
            let frame = loop {
                let len = guest.exchange(0, round, RX_BUFFER, 0x1_0000) as usize;
                round += 1;
                let mut frame = vec![0; len];
                guest.memory.read_slice(&mut frame, GuestAddress(RX_BUFFER)).unwrap();
                if frame[24..26] == [8, 0] && frame[12 + 14 + 9] == 17 {
                    break frame;
                }
            };
            assert_eq!(frame[10..12], [1, 0], "num_buffers");
            assert_eq!(frame[0] & 1, 1, "the host leaves the checksum to the guest");
            assert_eq!(frame[12 + 42..], *question);
            // Back to the sender: addresses and ports swapped (which the pseudo header's sum does not mind), the checksum again
            // left to the other side.
            let mut answer = frame.clone();
            answer[10..12].fill(0);
            for (one, other, len) in [(12, 18, 6), (38, 42, 4), (46, 48, 2)] {
                answer[one..one + len].copy_from_slice(&frame[other..other + len]);
                answer[other..other + len].copy_from_slice(&frame[one..one + len]);
            }
            guest.memory.write_slice(&answer, GuestAddress(TX_BUFFER)).unwrap();
            guest.exchange(1, sent as u16, TX_BUFFER, answer.len() as u32);
            let mut buffer = [0; 2000];
            let (len, from) = host.recv_from(&mut buffer).unwrap();
            assert_eq!((&buffer[..len], from.to_string().as_str()), (question, "10.9.8.2:7"));
        }
        let statistics = device.lock().unwrap().statistics();
        assert_eq!((statistics.tx_packets, statistics.tx_dropped, statistics.rx_dropped), (2, 0, 0));

        // A gratuitous ARP of ours, as after a migration, moves the neighbour to the guest.
        ip("neigh replace 10.9.8.3 lladdr 52:54:00:00:00:99 nud stale dev tap0");
        let mut arp = vec![0xff; 6];
        arp.extend(MAC.0);
        arp.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
        arp.extend(MAC.0);
        arp.extend([10, 9, 8, 3, 0, 0, 0, 0, 0, 0, 10, 9, 8, 3]);
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            device.lock().unwrap().inject(&arp).unwrap();
            let neighbour = ip("neigh show 10.9.8.3 dev tap0");
            if neighbour.contains("52:54:00:00:00:02") {
                break;
            }
            // The kernel does not believe a second change within a second of the first (locktime).
            assert!(Instant::now() < deadline, "{neighbour}");
            std::thread::sleep(Duration::from_millis(100));
        }

        // The interface lives as long as its last descriptor.
        io.stop();
        drop((io, guest, device));
        assert!(is_gone("tap0"));
    });
}
