//! The page streams of the source: one thread each, which take chunks of the round in hand until none is left.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::control::lock;
use super::guarded;
use super::pace::Pacer;
use crate::bitmap::{Bitmap, ChunkBits};
use crate::layout::{CHUNK_PAGES, PAGE_BYTES, PageRun};
use crate::pages::{Chunk, FRAME_BYTES, Marker, PageFrame};
use crate::traits::{Closer, Connection, ConnectionWriter, GuestPages, Part, Split};

/// The most chunks that one write carries, however few pages they have.
const MAX_BATCH_CHUNKS: usize = 64;

/// What a round's senders say.
#[derive(Debug)]
pub(super) enum SendEvent {
    /// All streams have sent the round and its markers.
    Sent(Marker),
    /// A stream failed. It takes no more part.
    Failed(String),
}

pub(super) type Sink = Arc<dyn Fn(SendEvent) + Send + Sync>;

/// What the senders have done so far, for watchers.
#[derive(Debug, Default)]
pub(super) struct Sending {
    /// Pages of the round in hand.
    pub pages: AtomicU64,
    /// Bytes of all rounds.
    pub bytes: AtomicU64,
}

/// One round, shared by all streams.
struct Round {
    n: u32,
    pages: Bitmap,
    next_chunk: AtomicU64,
    /// Arm pages again before they are read.
    rearm: bool,
    /// Streams that have not closed the round, and what the others carried.
    open: Mutex<(usize, Marker)>,
}

/// All page streams.
pub(super) struct PageSenders {
    rounds: Vec<mpsc::Sender<Arc<Round>>>,
    closers: Vec<Arc<dyn Closer>>,
    threads: Vec<JoinHandle<()>>,
    stop: Arc<AtomicBool>,
    pub sending: Arc<Sending>,
}

impl PageSenders {
    pub fn start(
        connections: Vec<Box<dyn Connection>>,
        memory: &Arc<dyn GuestPages>,
        bandwidth: Option<u64>,
        stall: Duration,
        sink: &Sink,
    ) -> io::Result<Self> {
        let mut senders = Self {
            rounds: Vec::new(),
            closers: Vec::new(),
            threads: Vec::new(),
            stop: Arc::default(),
            sending: Arc::default(),
        };
        let pacer = bandwidth.map(|rate| Arc::new(Mutex::new(Pacer::new(rate))));
        for connection in connections {
            let Split { writer, closer, .. } = connection.split()?;
            writer.set_timeout(Some(stall))?;
            let (rounds, queue) = mpsc::channel::<Arc<Round>>();
            let mut stream = Stream {
                memory: memory.clone(),
                writer,
                pacer: pacer.clone(),
                stop: senders.stop.clone(),
                sending: senders.sending.clone(),
                began: Instant::now(),
                buffer: Vec::new(),
            };
            let sink = sink.clone();
            senders.rounds.push(rounds);
            senders.closers.push(closer);
            senders.threads.push(thread::Builder::new().name("pages-send".into()).spawn(move || {
                while let Ok(round) = queue.recv() {
                    match guarded(|| stream.send(&round)).flatten() {
                        Ok(marker) => {
                            let mut open = lock(&round.open);
                            open.0 -= 1;
                            open.1.chunks += marker.chunks;
                            open.1.data_pages += marker.data_pages;
                            open.1.zero_pages += marker.zero_pages;
                            if open.0 == 0 {
                                sink(SendEvent::Sent(open.1));
                            }
                        }
                        Err(error) => return sink(SendEvent::Failed(error.to_string())),
                    }
                }
            })?);
        }
        Ok(senders)
    }

    /// Sends a round. The one before it must be closed.
    pub fn send(&self, n: u32, pages: Bitmap, rearm: bool) {
        self.sending.pages.store(0, Ordering::Relaxed);
        let open = Mutex::new((self.rounds.len(), Marker { round: n, ..Marker::default() }));
        let round = Arc::new(Round { n, pages, next_chunk: AtomicU64::new(0), rearm, open });
        for stream in &self.rounds {
            // A stream that failed has said so.
            let _ = stream.send(round.clone());
        }
    }

    /// Ends all streams, wherever they are, and waits until none touches memory any more.
    pub fn close(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.rounds.clear();
        for closer in &self.closers {
            closer.close();
        }
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

impl Drop for PageSenders {
    fn drop(&mut self) {
        self.close();
    }
}

struct Stream {
    memory: Arc<dyn GuestPages>,
    writer: Box<dyn ConnectionWriter>,
    pacer: Option<Arc<Mutex<Pacer>>>,
    stop: Arc<AtomicBool>,
    sending: Arc<Sending>,
    began: Instant,
    /// For connections that pages cannot go to directly.
    buffer: Vec<u8>,
}

impl Stream {
    /// Sends chunks of the round until none is left, and the marker.
    fn send(&mut self, round: &Round) -> io::Result<Marker> {
        let mut marker = Marker { round: round.n, ..Marker::default() };
        let most_pages = self.pacer.as_ref().map_or(CHUNK_PAGES, |pacer| lock(pacer).most_pages());
        let mut batch = Vec::new();
        let mut batch_pages = 0;
        let chunks = self.memory.layout().chunks();
        loop {
            let chunk = round.next_chunk.fetch_add(1, Ordering::Relaxed);
            if chunk >= chunks {
                break;
            }
            let wanted = round.pages.chunk(chunk);
            if wanted.is_empty() {
                continue;
            }
            if self.stop.load(Ordering::Relaxed) {
                return Err(stopped());
            }
            if round.rearm {
                // Before the pages are looked at: a write from here on is logged again.
                self.memory.rearm(chunk, &wanted)?;
            }
            let mut zero = self.memory.find_zero(chunk, &wanted)?.and(&wanted);
            let mut left = wanted.minus(&zero);
            while !left.is_empty() || !zero.is_empty() {
                let data = left.first(most_pages);
                left = left.minus(&data);
                let part = Chunk { round: round.n, chunk, data, zero: std::mem::take(&mut zero) };
                batch_pages += data.count();
                marker.add(&part);
                batch.push(part);
                if batch_pages >= most_pages || batch.len() >= MAX_BATCH_CHUNKS {
                    self.write(&batch, None)?;
                    batch.clear();
                    batch_pages = 0;
                }
            }
        }
        self.write(&batch, Some(marker))?;
        Ok(marker)
    }

    /// Writes chunks, and the marker if the round ends, at once.
    fn write(&mut self, batch: &[Chunk], marker: Option<Marker>) -> io::Result<()> {
        let headers: Vec<[u8; FRAME_BYTES]> = batch
            .iter()
            .map(|chunk| PageFrame::Chunk(*chunk))
            .chain(marker.map(PageFrame::Marker))
            .map(|frame| frame.encode())
            .collect();
        let mut parts: Vec<Part<'_>> = Vec::with_capacity(headers.len() * 2);
        for (index, header) in headers.iter().enumerate() {
            parts.push(Part::Bytes(header));
            if let Some(chunk) = batch.get(index) {
                parts.extend(chunk.data_runs().map(Part::Pages));
            }
        }
        let pages: u64 = batch.iter().map(|chunk| chunk.data.count()).sum();
        let zeros: u64 = batch.iter().map(|chunk| chunk.zero.count()).sum();
        let bytes = headers.len() as u64 * FRAME_BYTES as u64 + pages * PAGE_BYTES;
        self.pace(bytes)?;
        match self.writer.socket() {
            Some(socket) => self.memory.send(&parts, socket),
            None => copy_parts(&*self.memory, &parts, &mut self.buffer, &mut *self.writer),
        }
        .map_err(|error| match crate::transport::is_timeout(&error) {
            true => io::Error::new(io::ErrorKind::TimedOut, "the other side does not take pages any more"),
            false => error,
        })?;
        self.sending.pages.fetch_add(pages + zeros, Ordering::Relaxed);
        self.sending.bytes.fetch_add(bytes, Ordering::Relaxed);
        Ok(())
    }

    /// Waits until the cap on bandwidth has room for so many bytes.
    fn pace(&self, bytes: u64) -> io::Result<()> {
        let Some(pacer) = &self.pacer else { return Ok(()) };
        let until = lock(pacer).reserve(self.began.elapsed(), bytes);
        loop {
            if self.stop.load(Ordering::Relaxed) {
                return Err(stopped());
            }
            let left = until.saturating_sub(self.began.elapsed());
            if left.is_zero() {
                return Ok(());
            }
            thread::sleep(left.min(Duration::from_millis(50)));
        }
    }
}

fn stopped() -> io::Error {
    io::Error::new(io::ErrorKind::Interrupted, "stopped")
}

/// The way of connections whose bytes are not the socket's bytes: through a buffer of ours.
fn copy_parts(
    memory: &dyn GuestPages,
    parts: &[Part<'_>],
    buffer: &mut Vec<u8>,
    writer: &mut dyn ConnectionWriter,
) -> io::Result<()> {
    buffer.clear();
    for part in parts {
        match part {
            Part::Bytes(bytes) => buffer.extend_from_slice(bytes),
            Part::Pages(run) => {
                for run in pieces(*run) {
                    let start = buffer.len();
                    buffer.resize(start + run.bytes() as usize, 0);
                    memory.read(run, &mut buffer[start..])?;
                    if buffer.len() as u64 >= COPY_PAGES * PAGE_BYTES {
                        writer.write_all(buffer)?;
                        buffer.clear();
                    }
                }
            }
        }
    }
    writer.write_all(buffer)
}

/// Pages that go through a buffer of ours at once: 256 KiB, which stays in a core's cache.
const COPY_PAGES: u64 = 64;

/// A run in pieces of at most [`COPY_PAGES`].
pub(super) fn pieces(run: PageRun) -> impl Iterator<Item = PageRun> {
    let end = run.first + run.pages;
    let firsts = (run.first..end).step_by(COPY_PAGES as usize);
    firsts.map(move |first| PageRun { first, pages: COPY_PAGES.min(end - first) })
}

impl ChunkBits {
    /// The first `count` of the bits that are set.
    fn first(&self, count: u64) -> Self {
        if self.count() <= count {
            return *self;
        }
        let mut bits = Self::default();
        let mut left = count;
        for run in self.runs(0) {
            for page in run.first..run.first + run.pages.min(left) {
                bits.set(page);
            }
            left -= run.pages.min(left);
        }
        bits
    }
}
