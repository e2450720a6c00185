//! Compressing chunks for the page streams: workers that do it while the streams write, and the choice of what to do with the
//! next chunk.
//!
//! A worker copies a chunk's pages out of guest memory once and compresses the copy: the guest may write meanwhile. What is in hand
//! is bounded: a stream starts a few chunks ahead of the one that it writes.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, TryRecvError};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::thread::sched_getaffinity;

use super::control::lock;
use super::courtesy::{self, ByCourtesy};
use super::guarded;
use super::send::{Terms, Wanted, stopped};
use crate::compress::policy::{Policy, Trial, Work, Written};
use crate::compress::{Choice, Compression, Packer, Unpacker};
use crate::layout::{CHUNK_PAGES, PAGE_BYTES, PAGE_SIZE, PageRun};
use crate::pages::Chunk;
use crate::traits::GuestPages;

/// Bytes of pages that one write carries if nothing limits it.
pub(super) const BATCH_BYTES: u64 = CHUNK_PAGES * PAGE_BYTES;
/// The most threads that compress.
const MAX_WORKERS: usize = 8;
/// Pages in a sample, spread over the chunk.
const SAMPLE_PAGES: usize = 32;
/// A chunk with fewer pages is no sample.
const LEAST_SAMPLE_PAGES: usize = 8;

/// A chunk that is ready for the wire.
pub(super) struct Packed {
    /// Its header.
    pub chunk: Chunk,
    /// What was to be done with it.
    pub choice: Choice,
    /// The frame, if it is compressed.
    pub frame: Vec<u8>,
}

/// A chunk in the workers' hands.
pub(super) type InHand = Receiver<io::Result<Packed>>;

struct Job {
    terms: Terms,
    wanted: Wanted,
    level: i32,
    /// Where the frame goes.
    frame: Vec<u8>,
    done: mpsc::Sender<io::Result<Packed>>,
}

/// What all streams and workers share.
pub(super) struct Shared {
    memory: Arc<dyn GuestPages>,
    /// None: it was asked for something fixed.
    policy: Option<Mutex<Policy>>,
    fixed: Choice,
    stop: Arc<AtomicBool>,
    began: Instant,
}

impl Shared {
    /// What to do with the next chunk.
    pub fn choose(&self) -> Choice {
        self.policy.as_ref().map_or(self.fixed, |policy| lock(policy).choose(self.now()))
    }

    /// The most pages to send before choosing again.
    pub fn most_pages(&self) -> u64 {
        self.policy.as_ref().map_or(CHUNK_PAGES, |policy| lock(policy).most_pages())
    }

    /// A round begins; for the last one, with how many bytes of pages.
    pub fn round(&self, last_bytes: Option<u64>) {
        if let Some(policy) = &self.policy {
            lock(policy).round(last_bytes);
        }
    }

    /// What a stream wrote, to learn from it.
    pub fn wrote(&self, choice: Choice, bytes: u64, began: Instant, ended: Instant) {
        if let Some(policy) = &self.policy {
            let since = |at: Instant| at.saturating_duration_since(self.began);
            lock(policy).wrote(Written { choice, bytes, began: since(began), ended: since(ended) });
        }
    }

    fn now(&self) -> Duration {
        self.began.elapsed()
    }
}

/// The workers.
pub(super) struct Packing {
    pub shared: Arc<Shared>,
    workers: Arc<Workers>,
    ahead: usize,
}

/// Threads that compress, started with the first chunk that is to be: many migrations have none.
struct Workers {
    most: usize,
    crews: Mutex<ByCourtesy<Option<Crew>>>,
}

struct Crew {
    jobs: mpsc::Sender<Job>,
    threads: Vec<JoinHandle<()>>,
}

impl Packing {
    pub fn new(
        compression: Compression,
        streams: usize,
        bandwidth: Option<u64>,
        memory: &Arc<dyn GuestPages>,
        stop: &Arc<AtomicBool>,
    ) -> Self {
        // One CPU is left for the streams and the guest, where there is more than one. Not `available_parallelism`, which opens
        // files: a process that runs a VM may not.
        let cpus = sched_getaffinity(None).map_or(1, |cpus| cpus.count() as usize);
        let workers = cpus.saturating_sub(1).clamp(1, MAX_WORKERS);
        let policy = (compression == Compression::Auto).then(|| Mutex::new(Policy::new(workers, streams, bandwidth)));
        let fixed = match compression {
            Compression::Zstd(level) => Choice::Zstd(level),
            Compression::Auto | Compression::None => Choice::Raw,
        };
        let (memory, stop) = (memory.clone(), stop.clone());
        Self {
            shared: Arc::new(Shared { memory, policy, fixed, stop, began: Instant::now() }),
            workers: Arc::new(Workers { most: workers, crews: Mutex::default() }),
            // Enough that no worker waits for a stream that writes.
            ahead: workers.div_ceil(streams.max(1)) + 1,
        }
    }

    /// For one stream.
    pub fn line(&self) -> Line {
        Line {
            workers: self.workers.clone(),
            jobs: ByCourtesy::default(),
            shared: self.shared.clone(),
            ahead: self.ahead,
            sampler: None,
        }
    }

    /// Waits until no worker touches memory any more. `stop` is set, and no stream has a line.
    pub fn close(&mut self) {
        for Crew { jobs, threads } in std::mem::take(&mut *lock(&self.workers.crews)).into_all().into_iter().flatten() {
            drop(jobs);
            for thread in threads {
                let _ = thread.join();
            }
        }
    }
}

impl Workers {
    /// The way to them.
    fn jobs(&self, shared: &Arc<Shared>, courteous: bool) -> io::Result<mpsc::Sender<Job>> {
        let mut crews = lock(&self.crews);
        let crew = crews.of_mut(courteous);
        if let Some(Crew { jobs, .. }) = crew {
            return Ok(jobs.clone());
        }
        let (jobs, queue) = mpsc::channel();
        let queue = Arc::new(Mutex::new(queue));
        let mut threads = Vec::new();
        for _ in 0..self.most {
            let (queue, shared) = (queue.clone(), shared.clone());
            let work = move || {
                let mut worker = Worker::new(shared);
                courtesy::begin(courteous);
                // The lock is given back before the work begins.
                while let Some(job) = next(&queue) {
                    worker.work(job);
                }
            };
            // Should one fail to start, those before it end with the queue.
            threads.push(thread::Builder::new().name("pages-pack".into()).spawn(work)?);
        }
        *crew = Some(Crew { jobs: jobs.clone(), threads });
        Ok(jobs)
    }
}

fn next(queue: &Mutex<Receiver<Job>>) -> Option<Job> {
    lock(queue).recv().ok()
}

/// One stream's way to the workers.
pub(super) struct Line {
    workers: Arc<Workers>,
    jobs: ByCourtesy<Option<mpsc::Sender<Job>>>,
    pub shared: Arc<Shared>,
    /// The most chunks to have in hand.
    pub ahead: usize,
    sampler: Option<Sampler>,
}

impl Line {
    /// Lets a worker compress a chunk; its frame will be in the buffer `frame`.
    pub fn start(&mut self, terms: Terms, wanted: Wanted, level: i32, frame: Vec<u8>) -> io::Result<InHand> {
        let jobs = match self.jobs.of_mut(terms.courteous) {
            Some(jobs) => jobs,
            none => none.insert(self.workers.jobs(&self.shared, terms.courteous)?),
        };
        let (done, in_hand) = mpsc::channel();
        // If no worker is left, nobody will answer, which says it.
        let _ = jobs.send(Job { terms, wanted, level, frame, done });
        Ok(in_hand)
    }

    /// Tries levels on these pages, if it is time to.
    pub fn sample(&mut self, chunk: &Chunk) -> io::Result<bool> {
        sample(&self.shared, &mut self.sampler, chunk)
    }
}

/// Takes a chunk out of the workers' hands, if it is ready.
pub(super) fn ready(in_hand: &InHand) -> io::Result<Option<Packed>> {
    match in_hand.try_recv() {
        Ok(packed) => packed.map(Some),
        Err(TryRecvError::Empty) => Ok(None),
        Err(TryRecvError::Disconnected) => Err(gone()),
    }
}

/// Waits until it is.
pub(super) fn wait(in_hand: &InHand) -> io::Result<Packed> {
    in_hand.recv().map_err(|_| gone())?
}

fn gone() -> io::Error {
    io::Error::other("a thread that compresses pages ended")
}

struct Worker {
    shared: Arc<Shared>,
    packer: Packer,
    pages: Vec<u8>,
    sampler: Option<Sampler>,
}

impl Worker {
    fn new(shared: Arc<Shared>) -> Self {
        Self { shared, packer: Packer::new(), pages: Vec::new(), sampler: None }
    }

    fn work(&mut self, job: Job) {
        let Job { terms, wanted, level, frame, done } = job;
        let packed = guarded(|| self.pack(terms, wanted, level, frame)).flatten();
        // A stream that has failed meanwhile does not wait for it.
        let _ = done.send(packed);
    }

    fn pack(&mut self, terms: Terms, wanted: Wanted, level: i32, mut frame: Vec<u8>) -> io::Result<Packed> {
        if self.shared.stop.load(Ordering::Relaxed) {
            return Err(stopped());
        }
        let memory = self.shared.memory.clone();
        let began = Instant::now();
        let mut chunk = wanted.look(&*memory, terms)?;
        let choice = Choice::Zstd(level);
        if chunk.data.is_empty() {
            frame.clear();
            return Ok(Packed { chunk, choice, frame });
        }
        let looked = began.elapsed();
        sample(&self.shared, &mut self.sampler, &chunk)?;
        let began = Instant::now();
        self.pages.resize(chunk.data_bytes() as usize, 0);
        let mut at = 0;
        for run in chunk.data_runs() {
            let bytes = run.bytes() as usize;
            memory.read(run, &mut self.pages[at..at + bytes])?;
            at += bytes;
        }
        match self.packer.pack(level, &self.pages, &mut frame)? {
            true => chunk.packed = frame.len() as u32,
            // Read again when it is written: nothing was said about what is in these pages.
            false => frame.clear(),
        }
        if let Some(policy) = &self.shared.policy {
            let (bytes, packed) = (chunk.data_bytes(), chunk.body_bytes());
            lock(policy).worked(Work { level, bytes, packed, took: looked + began.elapsed() });
        }
        Ok(Packed { chunk, choice, frame })
    }
}

/// Tries levels on a few pages of the chunk, if it is time to; says whether it did.
fn sample(shared: &Shared, sampler: &mut Option<Sampler>, chunk: &Chunk) -> io::Result<bool> {
    let Some(policy) = &shared.policy else { return Ok(false) };
    if chunk.data.count() < LEAST_SAMPLE_PAGES as u64 {
        return Ok(false);
    }
    if !lock(policy).sample(shared.now()) {
        return Ok(false);
    }
    let sampler = sampler.get_or_insert_with(Sampler::new);
    let read = sampler.read(&*shared.memory, chunk)?;
    let mut tried = None;
    while let Some(level) = next_level(policy, tried) {
        let trial = sampler.try_level(level, read)?;
        lock(policy).tried(trial);
        tried = Some(level);
    }
    Ok(true)
}

fn next_level(policy: &Mutex<Policy>, tried: Option<i32>) -> Option<i32> {
    lock(policy).next_level(tried)
}

/// Compresses samples, to see how far and how fast.
struct Sampler {
    packer: Packer,
    unpacker: Unpacker,
    /// Levels whose tables have been set up.
    warm: Vec<i32>,
    pages: Vec<u8>,
    frame: Vec<u8>,
    back: Vec<u8>,
}

impl Sampler {
    fn new() -> Self {
        let (packer, unpacker) = (Packer::new(), Unpacker::new());
        Self { packer, unpacker, warm: Vec::new(), pages: Vec::new(), frame: Vec::new(), back: Vec::new() }
    }

    /// Takes a copy of some pages; says how long that took.
    fn read(&mut self, memory: &dyn GuestPages, chunk: &Chunk) -> io::Result<Duration> {
        let pages: Vec<u64> = chunk.data_runs().flat_map(|run| run.first..run.first + run.pages).collect();
        let step = pages.len().div_ceil(SAMPLE_PAGES);
        let picked: Vec<u64> = pages.into_iter().step_by(step).collect();
        self.pages.resize(picked.len() * PAGE_SIZE, 0);
        let began = Instant::now();
        for (page, into) in picked.into_iter().zip(self.pages.chunks_mut(PAGE_SIZE)) {
            memory.read(PageRun { first: page, pages: 1 }, into)?;
        }
        Ok(began.elapsed())
    }

    /// Compresses what was `read` in that time, which a worker takes as well.
    fn try_level(&mut self, level: i32, read: Duration) -> io::Result<Trial> {
        if !self.warm.contains(&level) {
            self.packer.pack(level, &self.pages, &mut self.frame)?;
            self.warm.push(level);
        }
        let began = Instant::now();
        let shorter = self.packer.pack(level, &self.pages, &mut self.frame)?;
        let packed = Instant::now();
        self.back.resize(self.pages.len(), 0);
        let frame = if shorter { self.frame.len() } else { self.pages.len() };
        if shorter {
            self.unpacker.unpack(&self.frame, &mut self.back)?;
        }
        let bytes = self.pages.len() as f64;
        let speed = |time: Duration| bytes / time.as_secs_f64().max(1e-6);
        Ok(Trial {
            level,
            ratio: frame as f64 / bytes,
            pack: speed(read + (packed - began)),
            unpack: speed(packed.elapsed()),
        })
    }
}
