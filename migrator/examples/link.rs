//! Moves memory without a VM over TCP, to measure what compression does on a link.
//!
//!     link receive ADDR:PORT
//!     link send ADDR:PORT CONTENT MIB COMPRESSION [STREAMS [BANDWIDTH]]
//!
//! CONTENT is zero, text, binary (this program's own file) or random. `send` prints a line: milliseconds of the first round, of
//! everything, megabytes sent, the level that most pages were compressed with, and what limited it. `benches/compress` runs it on
//! links of several speeds.
#![allow(clippy::unwrap_used, clippy::print_stdout, missing_docs, reason = "a tool for measuring")]

use std::io::{self, IoSlice, Read};
use std::net::{TcpListener, TcpStream};
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, mpsc};

use migrator::bitmap::{Bitmap, ChunkBits};
use migrator::driver::request::{self, AskAnswer, Offer, Requests};
use migrator::handoff::HandoffRecord;
use migrator::layout::{CHUNK_PAGES, PAGE_SIZE, PageRun, RamLayout, RamRegion};
use migrator::options::Timeouts;
use migrator::traits::*;
use migrator::transport::{TcpDialer, accept};
use migrator::wire::preamble::Role;
use migrator::{Arrived, Incoming, MigrationHandle, MigrationId, Options, ReceiveOptions};

/// Memory that nobody writes to but the migration: in pieces, so that streams do not wait for each other.
struct Ram {
    layout: RamLayout,
    chunks: Vec<Mutex<Vec<u8>>>,
}

impl Ram {
    fn new(layout: RamLayout) -> Self {
        let chunks = (0..layout.chunks()).map(|n| Mutex::new(vec![0; layout.chunk_pages(n) as usize * PAGE_SIZE]));
        Self { chunks: chunks.collect(), layout }
    }

    /// Runs do not span chunks: frames do not.
    fn with<T>(&self, run: PageRun, action: impl FnOnce(&mut [u8]) -> T) -> T {
        let first = (run.first % CHUNK_PAGES) as usize * PAGE_SIZE;
        let mut chunk = self.chunks[(run.first / CHUNK_PAGES) as usize].lock().unwrap();
        action(&mut chunk[first..first + run.bytes() as usize])
    }
}

impl GuestPages for Ram {
    fn layout(&self) -> &RamLayout {
        &self.layout
    }
    fn find_zero(&self, chunk: u64, wanted: &ChunkBits) -> io::Result<ChunkBits> {
        let mut zero = ChunkBits::default();
        let run = PageRun { first: chunk * CHUNK_PAGES, pages: self.layout.chunk_pages(chunk) };
        self.with(run, |bytes| {
            for (page, bytes) in bytes.chunks(PAGE_SIZE).enumerate() {
                if wanted.get(page as u64)
                    && u128::from_le_bytes(bytes[..16].try_into().unwrap()) == 0
                    && bytes == [0; PAGE_SIZE]
                {
                    zero.set(page as u64);
                }
            }
        });
        Ok(zero)
    }
    fn send(&self, parts: &[Part<'_>], to: BorrowedFd<'_>) -> io::Result<()> {
        for part in parts {
            let write = |mut bytes: &[u8]| -> io::Result<()> {
                while !bytes.is_empty() {
                    let done = rustix::io::writev(to, &[IoSlice::new(bytes)])?;
                    bytes = &bytes[done..];
                }
                Ok(())
            };
            match part {
                Part::Bytes(bytes) => write(bytes)?,
                Part::Pages(run) => self.with(*run, |bytes| write(bytes))?,
            }
        }
        Ok(())
    }
    fn receive(&self, runs: &[PageRun], tail: &mut [u8], from: BorrowedFd<'_>) -> io::Result<()> {
        let read = |bytes: &mut [u8]| -> io::Result<()> {
            let mut done = 0;
            while done < bytes.len() {
                match rustix::net::recv(from, &mut bytes[done..], rustix::net::RecvFlags::WAITALL)?.0 {
                    0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                    count => done += count,
                }
            }
            Ok(())
        };
        runs.iter().try_for_each(|run| self.with(*run, read))?;
        read(tail)
    }
    fn read(&self, run: PageRun, into: &mut [u8]) -> io::Result<()> {
        self.with(run, |bytes| into.copy_from_slice(bytes));
        Ok(())
    }
    fn write(&self, run: PageRun, from: &[u8]) -> io::Result<()> {
        self.with(run, |bytes| bytes.copy_from_slice(from));
        Ok(())
    }
    fn clear(&self, run: PageRun) -> io::Result<()> {
        for first in run.first..run.first + run.pages {
            self.with(PageRun { first, pages: 1 }, |bytes| bytes.fill(0));
        }
        Ok(())
    }
}

/// A VM that is nothing but memory.
struct Vm(Option<Arc<Ram>>);

impl SourceVm for Vm {
    fn description(&self) -> VmDescription {
        let ram = self.0.as_ref().unwrap().layout.clone();
        VmDescription { name: "memory".into(), ram, paused: false, facts: serde_json::Value::Null }
    }
    fn memory(&self) -> Arc<dyn GuestPages> {
        self.0.clone().unwrap()
    }
    fn start_dirty_log(&mut self) -> Result<(), VmError> {
        Ok(())
    }
    fn collect_dirty(&mut self, _: &mut Bitmap) -> Result<(), VmError> {
        Ok(())
    }
    fn stop_dirty_log(&mut self) {}
    fn throttle(&mut self, _: u16) -> Result<(), VmError> {
        Ok(())
    }
    fn pause(&mut self) -> Result<(), VmError> {
        Ok(())
    }
    fn resume(&mut self) -> Result<(), VmError> {
        Ok(())
    }
    fn save_state(&mut self) -> Result<Vec<Section>, VmError> {
        Ok(vec![])
    }
    fn gone(&mut self) -> Option<String> {
        None
    }
}

impl DestinationVm for Vm {
    fn prepare(&mut self, description: &VmDescription) -> Result<(), Refusal> {
        self.0 = Some(Arc::new(Ram::new(description.ram.clone())));
        Ok(())
    }
    fn memory(&self) -> Arc<dyn GuestPages> {
        self.0.clone().unwrap()
    }
    fn load_state(&mut self, _: Vec<Section>) -> Result<(), VmError> {
        Ok(())
    }
    fn start(&mut self, _: bool) -> Result<Started, StartError> {
        Ok(Started { first_run: Some(std::time::Instant::now()) })
    }
    fn announcer(&self) -> Arc<dyn Announcer> {
        Arc::new(Nobody)
    }
    fn discard(&mut self) {}
}

struct Nobody;

impl Announcer for Nobody {
    fn addresses(&self) -> Vec<NicAddresses> {
        vec![]
    }
    fn inject_frame(&self, _: usize, _: &[u8]) -> io::Result<()> {
        Ok(())
    }
}

#[derive(Default)]
struct NoJournal(Vec<HandoffRecord>);

impl Journal for NoJournal {
    fn append(&mut self, record: &HandoffRecord, _: Durability) -> io::Result<()> {
        self.0.push(record.clone());
        Ok(())
    }
    fn load(&mut self) -> io::Result<Vec<HandoffRecord>> {
        Ok(self.0.clone())
    }
}

type Routes = Arc<Mutex<Vec<(MigrationId, mpsc::Sender<Arrived>)>>>;

struct Agent(Routes);

impl Requests for Agent {
    fn offer(&mut self, offer: Offer) -> Result<(), Refusal> {
        let (sender, connections) = mpsc::channel();
        self.0.lock().unwrap().push((offer.id, sender));
        std::thread::spawn(move || {
            let incoming = Incoming { offer, connections };
            let (mut journal, handle) = (NoJournal::default(), MigrationHandle::new());
            migrator::receive(&mut Vm(None), incoming, &mut journal, &ReceiveOptions::default(), &handle).map(|_| ())
        });
        Ok(())
    }
    fn ask(&mut self, _: MigrationId) -> Result<AskAnswer, Refusal> {
        Ok(AskAnswer::Pending)
    }
}

fn receive(address: &str) {
    let routes = Routes::default();
    for stream in TcpListener::bind(address).unwrap().incoming() {
        let routes = routes.clone();
        std::thread::spawn(move || serve(stream.unwrap(), &routes));
    }
}

fn serve(stream: TcpStream, routes: &Routes) {
    let accepted = accept(stream, Timeouts::default()).unwrap();
    let preamble = accepted.preamble;
    let connection = Box::new(accepted.welcome().unwrap());
    if preamble.role == Role::Request {
        let _ = request::serve(connection, Timeouts::default().request, &mut Agent(routes.clone()));
        return;
    }
    let route = routes.lock().unwrap().iter().find(|(id, _)| *id == preamble.id).map(|(_, route)| route.clone());
    let _ = route.unwrap().send(Arrived { role: preamble.role, stream: preamble.stream, connection });
}

/// splitmix64.
fn random(state: &AtomicU64) -> u64 {
    let mut z = state.fetch_add(0x9e37_79b9_7f4a_7c15, Ordering::Relaxed);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

fn fill(ram: &Ram, content: &str) {
    let state = AtomicU64::new(7);
    // Words of a language that has few common ones and many rare ones.
    let words: Vec<String> = (0..20_000)
        .map(|_| {
            (0..2 + random(&state) % 9)
                .map(|_| char::from(b"etaoinsrhldcumfpgwybvk"[(random(&state) % 22) as usize]))
                .collect()
        })
        .collect();
    let mut program = Vec::new();
    std::fs::File::open("/proc/self/exe").unwrap().read_to_end(&mut program).unwrap();
    let mut programs = program.chunks_exact(PAGE_SIZE).cycle();
    for chunk in &ram.chunks {
        let mut chunk = chunk.lock().unwrap();
        match content {
            "zero" => {}
            "text" => {
                let mut text = Vec::new();
                while text.len() < chunk.len() {
                    let rank = words.len() as f64 * (random(&state) as f64 / u64::MAX as f64).powi(4);
                    text.extend(words[(rank as usize).min(words.len() - 1)].bytes());
                    text.push(if random(&state).is_multiple_of(12) { b'\n' } else { b' ' });
                }
                let length = chunk.len();
                chunk.copy_from_slice(&text[..length]);
            }
            "binary" => chunk.chunks_mut(PAGE_SIZE).for_each(|page| page.copy_from_slice(programs.next().unwrap())),
            "random" => chunk.chunks_mut(8).for_each(|word| word.copy_from_slice(&random(&state).to_le_bytes())),
            other => panic!("'{other}' is none of zero, text, binary and random"),
        }
    }
}

fn send(arguments: &[String]) {
    let [to, content, mib, compression, more @ ..] = arguments else { panic!("see the head of this file") };
    let regions = vec![RamRegion { gpa: 0, bytes: mib.parse::<u64>().unwrap() << 20 }];
    let ram = Arc::new(Ram::new(RamLayout::new(regions).unwrap()));
    fill(&ram, content);
    let options = Options {
        compression: compression.parse().unwrap(),
        streams: more.first().map_or(1, |streams| streams.parse().unwrap()),
        bandwidth: more.get(1).map(|rate| rate.parse().unwrap()),
        max_downtime: std::time::Duration::from_secs(1),
        ..Options::default()
    };
    let dial = Arc::new(TcpDialer::new(to.clone(), options.timeouts));
    let (id, mut journal, handle) = (MigrationId::random().unwrap(), NoJournal::default(), MigrationHandle::new());
    let report = migrator::migrate(&mut Vm(Some(ram)), id, dial, &mut journal, &options, &handle);
    assert!(report.error.is_none(), "{report:?}");
    let level = report.compression.and_then(|c| c.level).map_or("raw".into(), |level| level.to_string());
    let limit = report.limit.map_or(String::new(), |limit| limit.sentence);
    let (round, sent) = (report.rounds[0].ms, report.bytes_sent as f64 / 1e6);
    println!("{round:.1} {:.1} {sent:.1} {level} {limit}", report.total_ms);
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.split_first() {
        Some((what, rest)) if what == "send" => send(rest),
        Some((what, rest)) if what == "receive" && rest.len() == 1 => receive(&rest[0]),
        _ => panic!("see the head of this file"),
    }
}
