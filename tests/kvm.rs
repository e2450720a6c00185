//! One VM on this host's KVM: it stops when it is told to, goes on elsewhere from its saved state, and tells of every page that it
//! changes, whatever its guest does.
#![allow(clippy::unwrap_used)] // Clippy's exception for tests does not reach their helpers.

use std::collections::BTreeSet;
use std::io::{self, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixDatagram;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use vmm::arch::layout::{VIRTIO_MMIO_BASE, VIRTIO_MMIO_BYTES};
use vmm::config::VmConfig;
use vmm::devices::power::GuestEvent;
use vmm::devices::virtio::net::Backend;
use vmm::devices::virtio::{MacAddress, NetConfig};
use vmm::host::Host;
use vmm::snapshot::{Section, SnapshotError, kind};
use vmm::vm::Vm;

/// Far longer than anything takes, even on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);
const MEMORY: u64 = 64 << 20;
const PAGE: usize = 4096;

/// The host's end of the network interface: one datagram a frame.
struct Wire(UnixDatagram);

impl AsFd for Wire {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Backend for Wire {
    fn name(&self) -> &str {
        "wire"
    }
    fn set_offloads(&self, _: u32) -> io::Result<()> {
        Ok(())
    }
}

/// What the guest says on its serial port.
#[derive(Clone, Default)]
struct Output(Arc<Mutex<Vec<u8>>>);

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut all = self.0.lock().unwrap();
        if all.len() < 8 << 20 {
            all.extend_from_slice(bytes);
        }
        Ok(bytes.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Output {
    fn text(&self) -> String {
        String::from_utf8_lossy(&self.0.lock().unwrap()).into_owned()
    }

    /// The number `key` of the latest whole report.
    fn latest(&self, key: &str) -> Option<u64> {
        let text = self.text();
        let (whole, _) = text.rsplit_once('\n')?;
        let line = whole.lines().rfind(|line| line.contains("\"sweeps\":"))?;
        let (_, rest) = line.split_once(&format!("\"{key}\":"))?;
        rest.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
    }

    /// Waits for two more checks of all of the working set.
    fn is_well(&self) {
        let sweeps = wait("a report", || self.latest("sweeps"));
        wait("two more sweeps", || self.latest("sweeps").filter(|now| *now >= sweeps + 2));
        assert_eq!(self.latest("errors"), Some(0), "{}", self.text());
    }
}

fn wait<T>(what: &str, mut ask: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + PATIENCE;
    loop {
        if let Some(answer) = ask() {
            return answer;
        }
        assert!(Instant::now() < end, "never came: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

struct Machine {
    vm: Vm,
    output: Output,
    events: Receiver<GuestEvent>,
    wire: UnixDatagram,
}

/// This host's KVM; `None`, with a reason, where there is none.
fn host() -> Option<Host> {
    Host::open().map_err(|error| io::stderr().write_all(format!("skipped: {error}\n").as_bytes()).unwrap()).ok()
}

fn build(host: &Host, cpus: u8) -> Machine {
    let nic = NetConfig { mac: MacAddress([0x52, 0x54, 0, 0, 0, 7]), addresses: vec![] };
    let config = VmConfig { cpus, memory_bytes: MEMORY, nics: vec![nic] };
    let (wire, ours) = UnixDatagram::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    wire.set_nonblocking(true).unwrap();
    let output = Output::default();
    let (sender, events) = channel();
    let sender = Mutex::new(sender);
    let tell = Arc::new(move |event| {
        let _ = sender.lock().unwrap().send(event);
    });
    let vm = Vm::build(host, config, vec![Wire(ours)], Box::new(output.clone()), tell).unwrap();
    Machine { vm, output, events, wire }
}

fn pulse(host: &Host, cpus: u8, cmdline: &str) -> Machine {
    let mut machine = build(host, cpus);
    machine.vm.load_kernel(images::pulse_elf(), None, cmdline).unwrap();
    machine.vm.resume();
    wait("the guest has filled its working set", || machine.output.text().contains("\"filled\"").then_some(()));
    machine
}

fn copy(vm: &Vm) -> Vec<u8> {
    let mut all = vec![0; MEMORY as usize];
    vm.pages().copy_out(0, &mut all).unwrap();
    all
}

#[test]
fn pausing_stops_all_of_it_and_resuming_goes_on() {
    let Some(host) = host() else { return };
    for cpus in [1, 2] {
        let Machine { mut vm, output, .. } = pulse(&host, cpus, "ws=8M rate=100M");
        for _ in 0..20 {
            vm.pause().unwrap();
            let (memory, said) = (copy(&vm), output.text().len());
            std::thread::sleep(Duration::from_millis(20));
            assert!(copy(&vm) == memory, "memory changed in a paused VM of {cpus} vCPUs");
            assert_eq!(output.text().len(), said);
            vm.resume();
            std::thread::sleep(Duration::from_millis(5));
        }
        output.is_well();
    }
}

#[test]
fn a_guest_that_is_slowed_down_does_less_and_stops_at_once() {
    let Some(host) = host() else { return };
    let Machine { mut vm, output, .. } = pulse(&host, 1, "ws=8M rate=64G report=10ms");
    let work = |output: &Output| {
        let written = || wait("a report", || output.latest("pages_written"));
        let before = written();
        std::thread::sleep(Duration::from_millis(500));
        written() - before
    };
    let free = work(&output);
    vm.throttle(950).unwrap();
    // One that gets a twentieth of its time does less than half, however busy the machine is.
    assert!(work(&output) < free / 2, "{free} pages before");
    for _ in 0..50 {
        vm.pause().unwrap();
        vm.resume();
    }
    vm.throttle(10).unwrap();
    output.is_well();
    vm.throttle(0).unwrap();
    output.is_well();
    vm.throttle(990).unwrap();
    // Ending a VM ends its throttle.
    drop(vm);
}

#[test]
fn it_goes_on_in_another_vm_with_its_memory_and_state() {
    let Some(host) = host() else { return };
    for cpus in [1, 2] {
        let mut from = pulse(&host, cpus, "ws=8M rate=50M ip=10.0.0.2/24");
        for _ in 0..3 {
            from.vm.pause().unwrap();
            let mut to = build(&host, cpus);
            to.vm.pages().copy_in(0, &copy(&from.vm)).unwrap();
            let saved = from.vm.save().unwrap();
            to.vm.restore(saved.clone()).unwrap();
            let again = to.vm.save().unwrap();
            let names = |sections: &[Section]| -> Vec<_> { sections.iter().map(|s| (s.kind, s.instance)).collect() };
            assert_eq!(names(&again), names(&saved));
            // Time goes on in clocks, TSCs and timers; devices are as they were.
            for (before, after) in saved.iter().zip(&again) {
                if [kind::SERIAL, kind::POWER, kind::VIRTIO].contains(&before.kind) {
                    assert_eq!(before, after, "{} {}", kind::name(before.kind), before.instance);
                }
            }
            // KVM itself writes each vCPU's kvm-clock page and, with the wall clock, one more; nobody else writes anything.
            let (before, after) = (copy(&from.vm), copy(&to.vm));
            let changed = before.chunks(PAGE).zip(after.chunks(PAGE)).filter(|(a, b)| a != b).count();
            assert!(changed <= usize::from(cpus) + 1, "restoring changed {changed} pages");
            drop(from);
            to.vm.resume();
            to.output.is_well();
            from = to;
        }
    }
}

#[test]
fn state_that_does_not_fit_is_refused_and_the_next_try_succeeds() {
    let Some(host) = host() else { return };
    let mut from = pulse(&host, 1, "ws=1M rate=1M");
    assert!(matches!(from.vm.save(), Err(SnapshotError::Running)));
    from.vm.pause().unwrap();
    let good = from.vm.save().unwrap();
    // With MICROVM_WRITE_GOLDEN set, what this version writes becomes what later versions must read.
    if std::env::var_os("MICROVM_WRITE_GOLDEN").is_some() {
        let dir = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/state-v1");
        std::fs::create_dir_all(&dir).unwrap();
        for Section { kind, instance, bytes, .. } in &good {
            std::fs::write(dir.join(format!("{kind}-{instance}")), bytes).unwrap();
        }
    }
    let mut to = build(&host, 1);
    let mut refuses = |sections: Vec<Section>| to.vm.restore(sections).unwrap_err();
    for i in 0..good.len() {
        let (section, name) = (&good[i], format!("{} {}", kind::name(good[i].kind), good[i].instance));
        let without: Vec<Section> = good.iter().filter(|s| *s != section).cloned().collect();
        let error = refuses(without.clone());
        assert!(matches!(error, SnapshotError::Missing { .. }), "{error}");
        assert!(error.to_string().contains(&name), "{error}");
        assert!(matches!(refuses([good.clone(), vec![section.clone()]].concat()), SnapshotError::Twice { .. }));
        let changed = |change: fn(&mut Section)| {
            let mut section = section.clone();
            change(&mut section);
            [without.clone(), vec![section]].concat()
        };
        for version in [|s: &mut Section| s.version = 0, |s: &mut Section| s.version += 1] {
            let error = refuses(changed(version));
            assert!(matches!(error, SnapshotError::Version { .. }), "{name}: {error}");
        }
        for damage in [
            |s: &mut Section| s.bytes.clear(),
            |s: &mut Section| s.bytes.truncate(s.bytes.len() - 1),
            |s: &mut Section| s.bytes.push(0),
        ] {
            let error = refuses(changed(damage));
            assert!(matches!(error, SnapshotError::Damaged { .. }), "{name}: {error}");
        }
        assert!(matches!(refuses(changed(|s| s.bytes = vec![0; 2 << 20])), SnapshotError::TooLarge { .. }));
    }
    let stranger = Section { kind: 77, instance: 0, version: 1, bytes: vec![] };
    assert!(matches!(refuses([good.clone(), vec![stranger]].concat()), SnapshotError::Unknown { kind: 77, .. }));
    to.vm.pages().copy_in(0, &copy(&from.vm)).unwrap();
    to.vm.restore(good).unwrap();
    to.vm.resume();
    to.output.is_well();
}

/// Sends the guest frames that it answers, until told to stop: so that the VMM, too, writes to guest memory. Counts the answers.
fn traffic(wire: UnixDatagram, over: Arc<AtomicBool>, answers: Arc<AtomicU64>) -> std::thread::JoinHandle<()> {
    // Who has 10.0.0.2? Tell 02:00:00:00:00:01, 10.0.0.1 (RFC 826), after virtio-net's header.
    let mut frame = vec![0; 12];
    frame.extend([0xff; 6]);
    frame.extend([2, 0, 0, 0, 0, 1, 8, 6, 0, 1, 8, 0, 6, 4, 0, 1, 2, 0, 0, 0, 0, 1, 10, 0, 0, 1]);
    frame.extend([0, 0, 0, 0, 0, 0, 10, 0, 0, 2]);
    std::thread::spawn(move || {
        let mut answer = [0; 2048];
        while !over.load(Ordering::Relaxed) {
            let _ = wire.send(&frame);
            while wire.recv(&mut answer).is_ok() {
                answers.fetch_add(1, Ordering::Relaxed);
            }
            std::thread::sleep(Duration::from_micros(500));
        }
        let _ = wire.shutdown(Shutdown::Both);
    })
}

/// The numbers of the bits that are set. The guest has one region of RAM.
fn numbers(bits: &[Vec<u64>]) -> BTreeSet<usize> {
    assert_eq!(bits.len(), 1);
    let set = |n: &usize| bits[0][n / 64] >> (n % 64) & 1 == 1;
    (0..MEMORY as usize / PAGE).filter(set).collect()
}

#[test]
fn every_page_that_changes_is_in_the_log() {
    let Some(host) = host() else { return };
    for pattern in ["seq", "random"] {
        let cmdline = format!("ws=16M rate=40M verify=8M pattern={pattern} ip=10.0.0.2/24");
        let Machine { mut vm, output, wire, .. } = pulse(&host, 2, &cmdline);
        let (over, answers) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let sender = traffic(wire, over.clone(), answers.clone());
        vm.pause().unwrap();
        vm.start_dirty_log().unwrap();
        let rearm = |vm: &Vm, bits: &[Vec<u64>]| vm.rearmer().rearm(0, 0, &bits[0]).unwrap();
        let all = vm.collect_dirty().unwrap();
        rearm(&vm, &all);
        // What somebody would have who copies just what the log names, while the guest runs.
        let mut copied = copy(&vm);
        let mut least = usize::MAX;
        for _ in 0..8 {
            let before = copy(&vm);
            vm.resume();
            let mut logged = BTreeSet::new();
            for _ in 0..3 {
                std::thread::sleep(Duration::from_millis(30));
                let bits = vm.collect_dirty().unwrap();
                rearm(&vm, &bits);
                for page in numbers(&bits) {
                    vm.pages().copy_out(page as u64, &mut copied[page * PAGE..(page + 1) * PAGE]).unwrap();
                    logged.insert(page);
                }
            }
            std::thread::sleep(Duration::from_millis(30));
            vm.pause().unwrap();
            let peeked = vm.rearmer().peek().unwrap();
            let bits = vm.collect_dirty().unwrap();
            if let Some(peeked) = peeked.map(|bits| numbers(&bits)) {
                // Who looks sees what the guest wrote, and takes nothing away. What the VMM wrote is in the log only.
                assert!(!peeked.is_empty() && peeked.is_subset(&numbers(&bits)), "{pattern}: {peeked:?}");
            }
            rearm(&vm, &bits);
            logged.extend(numbers(&bits));
            let now = copy(&vm);
            for page in numbers(&bits) {
                copied[page * PAGE..(page + 1) * PAGE].copy_from_slice(&now[page * PAGE..(page + 1) * PAGE]);
            }
            let differing = |a: &[u8]| -> BTreeSet<usize> {
                let pages = a.chunks(PAGE).zip(now.chunks(PAGE)).enumerate();
                pages.filter(|(_, (a, b))| a != b).map(|(n, _)| n).collect()
            };
            let changed = differing(&before);
            let missed: Vec<&usize> = changed.difference(&logged).collect();
            assert!(missed.is_empty(), "{pattern}: pages changed and were not logged: {missed:?}");
            let stale = differing(&copied);
            assert!(stale.is_empty(), "{pattern}: the copy that followed the log is wrong in pages {stale:?}");
            assert!(logged.len() < MEMORY as usize / PAGE / 2, "a log that names everything proves nothing");
            least = least.min(changed.len());
        }
        assert!(least > 0, "the guest wrote nothing");
        vm.resume();
        over.store(true, Ordering::Relaxed);
        sender.join().unwrap();
        assert!(answers.load(Ordering::Relaxed) > 10, "the guest did not answer: the VMM wrote nothing");
        vm.stop_dirty_log().unwrap();
        output.is_well();
    }
}

/// A guest that reports free pages to its balloon when it is told to, and writes to the first of them when it is told again.
#[test]
fn pages_that_the_guest_reports_as_free_are_zeros_and_in_the_log() {
    const FREE: std::ops::Range<usize> = 4096..6144;
    const DESC: u32 = 0x20_0000;
    const AVAIL: u32 = 0x20_1000;
    const USED: u32 = 0x20_2000;
    const SEND: u32 = 0x20_3000;
    const WRITE: u32 = 0x20_4000;
    let Some(host) = host() else { return };
    // After the entropy device and the network interface.
    let device = (VIRTIO_MMIO_BASE + 2 * VIRTIO_MMIO_BYTES) as u32;
    let free = (FREE.start * PAGE) as u32;
    let status = |value: u32| (device + 0x70, value);
    let writes = [
        status(0),
        status(1),
        status(3),
        // Reporting, version 1.
        (device + 0x24, 0),
        (device + 0x20, 1 << 5),
        (device + 0x24, 1),
        (device + 0x20, 1),
        status(0xb),
        // Queue 2, as Linux has it.
        (device + 0x30, 2),
        (device + 0x38, 64),
        (device + 0x80, DESC),
        (device + 0x90, AVAIL),
        (device + 0xa0, USED),
        (device + 0x44, 1),
        status(0xf),
        // One range, device-writable.
        (DESC, free),
        (DESC + 8, (FREE.len() * PAGE) as u32),
        (DESC + 12, 2),
    ];
    // mov esi, table; again: mov edi, [esi]; mov eax, [esi + 4]; mov [edi], eax; add esi, 8; cmp esi, end; jb again
    let table = (1 << 20) + 0x200;
    let mut code = vec![0xbe];
    code.extend(u32::to_le_bytes(table));
    code.extend([0x8b, 0x3e, 0x8b, 0x46, 0x04, 0x89, 0x07, 0x83, 0xc6, 0x08, 0x81, 0xfe]);
    code.extend((table + 8 * writes.len() as u32).to_le_bytes());
    code.extend([0x72, 0xee]);
    // wait: cmp dword [flag], 0; je wait; mov dword [address], value.
    for (flag, address, value) in [(SEND, AVAIL, 1 << 16), (SEND, device + 0x50, 2), (WRITE, free, 0x1234_5678)] {
        code.extend([0x83, 0x3d]);
        code.extend(flag.to_le_bytes());
        code.extend([0, 0x74, 0xf7, 0xc7, 0x05]);
        code.extend([address, value].map(u32::to_le_bytes).concat());
    }
    // hlt; jmp to it
    code.extend([0xf4, 0xeb, 0xfd]);
    code.resize(0x200, 0);
    code.extend(writes.iter().flat_map(|(address, value)| [*address, *value]).flat_map(u32::to_le_bytes));

    let Machine { mut vm, .. } = build(&host, 1);
    vm.load_kernel(&kernel(&code), None, "").unwrap();
    let around = FREE.start - 1..FREE.end + 1;
    vm.pages().copy_in(around.start as u64, &vec![0xa5; around.len() * PAGE]).unwrap();
    vm.resume();
    let word = |vm: &Vm, at: u32| {
        let mut page = [0; PAGE];
        vm.pages().copy_out(u64::from(at) / PAGE as u64, &mut page).unwrap();
        u32::from_le_bytes(page[..4].try_into().unwrap())
    };
    wait("the report is made", || (word(&vm, DESC) == free).then_some(()));
    vm.pause().unwrap();
    vm.start_dirty_log().unwrap();
    let all = vm.collect_dirty().unwrap();
    vm.rearmer().rearm(0, 0, &all[0]).unwrap();
    let mut copied = copy(&vm);
    assert!(copied[free as usize..].iter().take(PAGE).all(|byte| *byte == 0xa5));
    for (flag, done, least, most) in
        [(SEND, (USED, 1 << 16), FREE.len(), FREE.len() + 16), (WRITE, (free, 0x1234_5678), 1, 16)]
    {
        vm.pages().copy_in(u64::from(flag) / PAGE as u64, &[1; PAGE]).unwrap();
        vm.resume();
        wait("the guest has done what it was told", || (word(&vm, done.0) == done.1).then_some(()));
        vm.pause().unwrap();
        let bits = vm.collect_dirty().unwrap();
        vm.rearmer().rearm(0, 0, &bits[0]).unwrap();
        let (logged, now) = (numbers(&bits), copy(&vm));
        for page in &logged {
            copied[page * PAGE..][..PAGE].copy_from_slice(&now[page * PAGE..][..PAGE]);
        }
        assert!(copied == now, "a copy that follows the log is what the guest has");
        assert!(logged.contains(&FREE.start) && !logged.contains(&around.start) && !logged.contains(&FREE.end));
        assert!((least..=most).contains(&logged.len()), "{} pages logged", logged.len());
    }
    let (written, zeros) = copied[free as usize..][..FREE.len() * PAGE].split_at(4);
    assert_eq!(written, 0x1234_5678_u32.to_le_bytes());
    assert!(zeros.iter().all(|byte| *byte == 0));
    assert!([around.start, FREE.end].iter().all(|page| copied[page * PAGE..][..PAGE] == [0xa5; PAGE]));
}

/// A kernel of nothing but `code`: 32-bit, at 1 MiB, entered by its PVH note; the last KiB of its page is zeros.
fn kernel(code: &[u8]) -> Vec<u8> {
    const LOAD: u64 = 1 << 20;
    let mut note = Vec::new();
    [4u32, 4, 18].iter().for_each(|word| note.extend(word.to_le_bytes()));
    note.extend(b"Xen\0");
    note.extend((LOAD as u32).to_le_bytes());
    let mut elf = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    elf.extend([2, 0, 62, 0, 1, 0, 0, 0]);
    [LOAD, 64, 0].iter().for_each(|word| elf.extend(word.to_le_bytes()));
    elf.extend([0, 0, 0, 0, 64, 0, 56, 0, 2, 0, 64, 0, 0, 0, 0, 0]);
    let mut header = |kind: u32, offset: u64, address: u64, bytes: u64, align: u64| {
        elf.extend(kind.to_le_bytes());
        elf.extend(7u32.to_le_bytes());
        [offset, address, address, bytes, bytes, align].iter().for_each(|word| elf.extend(word.to_le_bytes()));
    };
    header(1, 4096, LOAD, 4096, 4096);
    header(4, 512, 0, note.len() as u64, 4);
    elf.resize(512, 0);
    elf.extend(note);
    elf.resize(4096, 0);
    elf.extend(code);
    elf.resize(8192, 0);
    elf
}

/// Boots `code`, lets it do its worst, and checks that the VM stays ours: it pauses, saves, goes on and ends when it is told to.
fn stays_controllable(what: &str, code: &[u8]) -> Vec<GuestEvent> {
    let Some(host) = host() else { return vec![] };
    let Machine { mut vm, events, .. } = build(&host, 1);
    vm.load_kernel(&kernel(code), None, "").unwrap();
    let (done, is_done) = channel();
    let worker = std::thread::spawn(move || {
        for _ in 0..5 {
            vm.resume();
            std::thread::sleep(Duration::from_millis(60));
            vm.pause().unwrap();
            vm.save().unwrap();
        }
        vm.resume();
        drop(vm);
        done.send(()).unwrap();
    });
    let ended = is_done.recv_timeout(PATIENCE);
    assert!(ended.is_ok(), "{what}: the VM cannot be controlled ({ended:?})");
    worker.join().unwrap();
    events.try_iter().collect()
}

#[test]
fn a_triple_fault_ends_with_a_sentence() {
    // lidt of six zeros; ud2
    let events = stays_controllable("triple fault", &[0x0f, 0x01, 0x1d, 0x00, 0x0c, 0x10, 0x00, 0x0f, 0x0b]);
    if host().is_some() {
        // Each time that it is let go on it crashes again.
        let crashed = |event: &GuestEvent| matches!(event, GuestEvent::Crashed(why) if why.contains("triple fault"));
        assert!(!events.is_empty() && events.iter().all(crashed), "{events:?}");
    }
}

#[test]
fn guests_that_do_nothing_can_be_paused() {
    for (what, code) in [("cli; hlt", &[0xfa, 0xf4, 0xeb, 0xfc][..]), ("jmp $", &[0xeb, 0xfe])] {
        assert_eq!(stays_controllable(what, code).len(), 0, "{what}");
    }
}

#[test]
fn a_flood_on_the_serial_port_is_only_a_flood() {
    // mov dx, 0x3f8; mov al, 'x'; again: out dx, al; jmp again
    assert_eq!(stays_controllable("flood", &[0x66, 0xba, 0xf8, 0x03, 0xb0, 0x78, 0xee, 0xeb, 0xfd]).len(), 0);
}

#[test]
fn garbage_on_all_ports_harms_only_the_guest() {
    // xor edx, edx; again: mov al, dl; out dx, al; in al, dx; inc edx; jmp again. Some ports mean the guest's end.
    stays_controllable("ports", &[0x31, 0xd2, 0x88, 0xd0, 0xee, 0xec, 0x42, 0xeb, 0xf9]);
}

#[test]
fn garbage_in_all_device_registers_harms_only_the_guest() {
    let base = VIRTIO_MMIO_BASE as u32;
    let end = base + 8 * VIRTIO_MMIO_BYTES as u32;
    // start: mov edi, base; again: mov [edi], eax; add eax, …; mov ebx, [edi]; add edi, 4; cmp edi, end; jb again; jmp start
    let mut code = vec![0xbf];
    code.extend(base.to_le_bytes());
    code.extend([0x89, 0x07, 0x05, 0xb9, 0x79, 0x37, 0x9e, 0x8b, 0x1f, 0x83, 0xc7, 0x04, 0x81, 0xff]);
    code.extend(end.to_le_bytes());
    code.extend([0x72, 0xec, 0xeb, 0xe5]);
    stays_controllable("registers", &code);
}
