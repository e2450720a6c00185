//! A VM without a hypervisor: memory with a dirty log that behaves like KVM's, and a guest that writes to it.
#![allow(dead_code, clippy::unwrap_used, reason = "each test binary uses its part, and a test may panic")]

use std::collections::BTreeSet;
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;
use std::time::{Duration, Instant};

use migrator::bitmap::{Bitmap, ChunkBits};
use migrator::handoff::HandoffRecord;
use migrator::layout::{CHUNK_PAGES, PAGE_SIZE, PageRun, RamLayout, RamRegion};
use migrator::traits::*;

/// How reading the log and clearing it go together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogMode {
    /// `KVM_GET_DIRTY_LOG` of old: reading clears.
    ClearOnRead,
    /// `KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2`: reading leaves it, `rearm` clears.
    Manual,
}

pub struct RamState {
    pub bytes: Vec<u8>,
    log: Option<Bitmap>,
    pub paused: bool,
    /// Thousandths of its time that the guest does not get.
    pub throttle: u16,
}

/// Guest memory.
pub struct MockRam {
    layout: RamLayout,
    mode: LogMode,
    state: Mutex<RamState>,
    pub rearmed: AtomicU64,
    /// Fails sends after so many; for tests of failures.
    pub sends_left: AtomicUsize,
    /// Nice values of the threads that read pages to send or compress them, by whether the guest was paused.
    pub nice: Mutex<BTreeSet<(bool, i32)>>,
}

impl MockRam {
    pub fn new(pages: u64, mode: LogMode) -> Arc<Self> {
        // With a hole, so that indices and addresses differ.
        let low = (pages / 2).max(1);
        let mut regions = vec![RamRegion { gpa: 0, bytes: low * 4096 }];
        if pages > low {
            regions.push(RamRegion { gpa: 1 << 32, bytes: (pages - low) * 4096 });
        }
        let bytes = vec![0; pages as usize * PAGE_SIZE];
        Arc::new(Self {
            layout: RamLayout::new(regions).unwrap(),
            mode,
            state: Mutex::new(RamState { bytes, log: None, paused: false, throttle: 0 }),
            rearmed: AtomicU64::new(0),
            sends_left: AtomicUsize::new(usize::MAX),
            nice: Mutex::default(),
        })
    }

    pub fn lock(&self) -> MutexGuard<'_, RamState> {
        self.state.lock().unwrap()
    }

    /// The guest writes, if it may run.
    pub fn guest_write(&self, page: u64, offset: usize, value: u8) -> bool {
        let mut state = self.lock();
        if state.paused {
            return false;
        }
        state.bytes[page as usize * PAGE_SIZE + offset] = value;
        if let Some(log) = &mut state.log {
            log.set(page);
        }
        true
    }

    fn note_nice(&self) {
        let thread = thread::current();
        if thread.name().is_some_and(|name| matches!(name, "pages-send" | "pages-pack")) {
            let nice = rustix::process::getpriority_process(None).unwrap();
            self.nice.lock().unwrap().insert((self.lock().paused, nice));
        }
    }

    pub fn content(&self) -> Vec<u8> {
        self.lock().bytes.clone()
    }

    fn range(run: PageRun) -> std::ops::Range<usize> {
        run.first as usize * PAGE_SIZE..(run.first + run.pages) as usize * PAGE_SIZE
    }
}

impl GuestPages for MockRam {
    fn layout(&self) -> &RamLayout {
        &self.layout
    }

    fn rearm(&self, chunk: u64, bits: &ChunkBits) -> io::Result<()> {
        self.rearmed.fetch_add(bits.count(), Ordering::Relaxed);
        if self.mode == LogMode::Manual {
            let mut state = self.lock();
            let log = state.log.as_mut().ok_or_else(|| io::Error::other("the log is off"))?;
            let mut cleared = Bitmap::new(log.pages());
            for page in 0..log.pages() {
                let here = page / CHUNK_PAGES == chunk && bits.get(page % CHUNK_PAGES);
                if log.get(page) && !here {
                    cleared.set(page);
                }
            }
            *log = cleared;
        }
        Ok(())
    }

    fn peek_dirty(&self, into: &mut Bitmap) -> io::Result<()> {
        if self.mode == LogMode::Manual {
            into.or(self.lock().log.as_ref().ok_or_else(|| io::Error::other("the log is off"))?);
        }
        Ok(())
    }

    fn send(&self, parts: &[Part<'_>], to: BorrowedFd<'_>) -> io::Result<()> {
        if self.sends_left.fetch_sub(1, Ordering::Relaxed) == 0 {
            return Err(io::Error::other("injected"));
        }
        self.note_nice();
        for part in parts {
            let copy;
            let mut bytes = match part {
                Part::Bytes(bytes) => *bytes,
                Part::Pages(run) => {
                    copy = self.lock().bytes[Self::range(*run)].to_vec();
                    &copy[..]
                }
            };
            while !bytes.is_empty() {
                let count = rustix::net::send(to, bytes, rustix::net::SendFlags::NOSIGNAL)?;
                bytes = &bytes[count..];
            }
        }
        Ok(())
    }

    fn receive(&self, runs: &[PageRun], tail: &mut [u8], from: BorrowedFd<'_>) -> io::Result<()> {
        let fill = |mut bytes: &mut [u8]| -> io::Result<()> {
            while !bytes.is_empty() {
                let count = rustix::io::read(from, &mut *bytes)?;
                if count == 0 {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
                bytes = &mut bytes[count..];
            }
            Ok(())
        };
        for run in runs {
            let mut copy = vec![0; run.bytes() as usize];
            fill(&mut copy)?;
            self.write(*run, &copy)?;
        }
        fill(tail)
    }

    fn read(&self, run: PageRun, into: &mut [u8]) -> io::Result<()> {
        self.note_nice();
        into.copy_from_slice(&self.lock().bytes[Self::range(run)]);
        Ok(())
    }

    fn write(&self, run: PageRun, from: &[u8]) -> io::Result<()> {
        self.lock().bytes[Self::range(run)].copy_from_slice(from);
        Ok(())
    }

    fn clear(&self, run: PageRun) -> io::Result<()> {
        self.lock().bytes[Self::range(run)].fill(0);
        Ok(())
    }
}

/// A small random generator, so that a seed says everything.
#[derive(Clone, Debug)]
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        // splitmix64
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    pub fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }
}

/// The VM at the source.
pub struct MockSource {
    pub ram: Arc<MockRam>,
    pub was_paused: bool,
    pub state: Vec<u8>,
    pub gone: Arc<Mutex<Option<String>>>,
    /// A step that fails.
    pub fails: Option<&'static str>,
    pub log_starts: usize,
    pub log_stops: usize,
    /// All throttles that were asked for.
    pub throttles: Vec<u16>,
}

impl MockSource {
    pub fn new(ram: Arc<MockRam>) -> Self {
        Self {
            ram,
            was_paused: false,
            state: b"vcpu".to_vec(),
            gone: Arc::default(),
            fails: None,
            log_starts: 0,
            log_stops: 0,
            throttles: vec![],
        }
    }

    pub fn paused(&self) -> bool {
        self.ram.lock().paused
    }

    fn may(&self, step: &str) -> Result<(), VmError> {
        if self.fails == Some(step) { Err(format!("injected failure of {step}").into()) } else { Ok(()) }
    }
}

impl SourceVm for MockSource {
    fn description(&self) -> VmDescription {
        VmDescription {
            name: "mock".into(),
            ram: self.ram.layout.clone(),
            paused: self.was_paused,
            facts: serde_json::json!({"cpus": 1}),
        }
    }

    fn memory(&self) -> Arc<dyn GuestPages> {
        self.ram.clone()
    }

    fn start_dirty_log(&mut self) -> Result<(), VmError> {
        self.log_starts += 1;
        self.may("log")?;
        let pages = self.ram.layout.pages();
        let log = if self.ram.mode == LogMode::Manual { Bitmap::full(pages) } else { Bitmap::new(pages) };
        self.ram.lock().log = Some(log);
        Ok(())
    }

    fn collect_dirty(&mut self, into: &mut Bitmap) -> Result<(), VmError> {
        self.may("collect")?;
        let mut state = self.ram.lock();
        let log = state.log.as_mut().expect("the log is on");
        into.or(log);
        if self.ram.mode == LogMode::ClearOnRead {
            log.clear();
        }
        Ok(())
    }

    fn stop_dirty_log(&mut self) {
        self.log_stops += 1;
        self.ram.lock().log = None;
    }

    fn throttle(&mut self, permille: u16) -> Result<(), VmError> {
        assert!(permille == 0 || !self.ram.lock().paused, "a paused guest is not slowed down");
        self.throttles.push(permille);
        self.ram.lock().throttle = permille;
        self.may("throttle")
    }

    fn pause(&mut self) -> Result<(), VmError> {
        assert!(!self.was_paused, "a paused guest is not paused again");
        self.may("pause")?;
        self.ram.lock().paused = true;
        Ok(())
    }

    fn resume(&mut self) -> Result<(), VmError> {
        assert!(!self.was_paused, "a paused guest stays paused");
        self.may("resume")?;
        self.ram.lock().paused = false;
        Ok(())
    }

    fn save_state(&mut self) -> Result<Vec<Section>, VmError> {
        assert!(self.ram.lock().paused);
        assert_ne!(self.fails, Some("panic"), "injected");
        self.may("save")?;
        Ok(vec![Section { kind: 1, instance: 0, version: 1, bytes: self.state.clone() }])
    }

    fn gone(&mut self) -> Option<String> {
        self.gone.lock().unwrap().clone()
    }
}

/// What became of the VM at the destination.
#[derive(Debug, Default)]
pub struct Fate {
    pub started: AtomicBool,
    pub started_paused: AtomicBool,
    pub discarded: AtomicBool,
}

/// The VM at the destination.
pub struct MockDestination {
    pub ram: Option<Arc<MockRam>>,
    pub state: Vec<u8>,
    pub refusal: Option<Refusal>,
    /// A step that fails.
    pub fails: Option<&'static str>,
    /// Flips a byte before memory is compared.
    pub corrupt: bool,
    pub prepare_takes: Duration,
    pub fate: Arc<Fate>,
    pub announcer: Arc<MockAnnouncer>,
}

impl Default for MockDestination {
    fn default() -> Self {
        Self {
            ram: None,
            state: vec![],
            refusal: None,
            fails: None,
            corrupt: false,
            prepare_takes: Duration::ZERO,
            fate: Arc::default(),
            announcer: Arc::default(),
        }
    }
}

#[derive(Debug, Default)]
pub struct MockAnnouncer {
    pub frames: Mutex<Vec<Vec<u8>>>,
}

impl Announcer for MockAnnouncer {
    fn addresses(&self) -> Vec<NicAddresses> {
        vec![NicAddresses { mac: [2, 0, 0, 0, 0, 1], ipv4: vec![Ipv4Addr::new(10, 0, 0, 2)], ipv6: vec![] }]
    }

    fn inject_frame(&self, _: usize, frame: &[u8]) -> io::Result<()> {
        self.frames.lock().unwrap().push(frame.to_vec());
        Ok(())
    }
}

/// Memory that is not what was received.
struct Corrupt(Arc<MockRam>);

impl GuestPages for Corrupt {
    fn layout(&self) -> &RamLayout {
        self.0.layout()
    }
    fn send(&self, parts: &[Part<'_>], to: BorrowedFd<'_>) -> io::Result<()> {
        self.0.send(parts, to)
    }
    fn receive(&self, runs: &[PageRun], tail: &mut [u8], from: BorrowedFd<'_>) -> io::Result<()> {
        self.0.receive(runs, tail, from)
    }
    fn read(&self, run: PageRun, into: &mut [u8]) -> io::Result<()> {
        self.0.read(run, into)?;
        into[0] ^= 1;
        Ok(())
    }
    fn write(&self, run: PageRun, from: &[u8]) -> io::Result<()> {
        self.0.write(run, from)
    }
    fn clear(&self, run: PageRun) -> io::Result<()> {
        self.0.clear(run)
    }
}

impl DestinationVm for MockDestination {
    fn prepare(&mut self, description: &VmDescription) -> Result<(), Refusal> {
        thread::sleep(self.prepare_takes);
        if let Some(refusal) = self.refusal.clone() {
            return Err(refusal);
        }
        let ram = MockRam::new(description.ram.pages(), LogMode::Manual);
        ram.lock().paused = true;
        self.ram = Some(ram);
        Ok(())
    }

    fn memory(&self) -> Arc<dyn GuestPages> {
        let ram = self.ram.clone().expect("prepared");
        if self.corrupt { Arc::new(Corrupt(ram)) } else { ram }
    }

    fn load_state(&mut self, mut sections: Vec<Section>) -> Result<(), VmError> {
        if self.fails == Some("load") {
            return Err("injected failure of load".into());
        }
        assert_eq!(sections.len(), 1);
        self.state = sections.remove(0).bytes;
        Ok(())
    }

    fn start(&mut self, paused: bool) -> Result<Started, StartError> {
        if let Some(step @ ("start" | "start-late")) = self.fails {
            return Err(StartError { may_have_run: step == "start-late", source: "injected failure of start".into() });
        }
        assert!(!self.fate.discarded.load(Ordering::SeqCst));
        self.fate.started.store(true, Ordering::SeqCst);
        self.fate.started_paused.store(paused, Ordering::SeqCst);
        if !paused {
            self.ram.as_ref().unwrap().lock().paused = false;
        }
        Ok(Started { first_run: (!paused).then(Instant::now) })
    }

    fn announcer(&self) -> Arc<dyn Announcer> {
        self.announcer.clone()
    }

    fn discard(&mut self) {
        assert!(!self.fate.discarded.swap(true, Ordering::SeqCst), "discarded twice");
        assert!(!self.fate.started.load(Ordering::SeqCst), "discarded while it runs");
        self.ram = None;
    }
}

/// A journal in memory, which survives the process that writes it.
#[derive(Clone, Default)]
pub struct MemoryJournal {
    pub records: Arc<Mutex<Vec<HandoffRecord>>>,
    pub fails: Arc<AtomicBool>,
}

impl Journal for MemoryJournal {
    fn append(&mut self, record: &HandoffRecord, _: Durability) -> io::Result<()> {
        if self.fails.load(Ordering::SeqCst) {
            return Err(io::Error::other("disk full"));
        }
        self.records.lock().unwrap().push(record.clone());
        Ok(())
    }

    fn load(&mut self) -> io::Result<Vec<HandoffRecord>> {
        Ok(self.records.lock().unwrap().clone())
    }
}
