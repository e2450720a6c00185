//! The page streams of the source, which take chunks of the round in hand until none is left. A chunk goes from guest memory to the
//! socket, or through the workers of [`super::pack`]. Each stream has two threads, of which one sends a round: see
//! [`super::courtesy`].

use std::collections::VecDeque;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};

use super::control::lock;
use super::courtesy::{self, ByCourtesy};
use super::guarded;
use super::order::Order;
use super::pace::Pacer;
use super::pack::{BATCH_BYTES, InHand, Line, Packed, Packing, ready, wait};
use crate::bitmap::{Bitmap, ChunkBits};
use crate::compress::{Choice, Compression};
use crate::layout::{CHUNK_PAGES, PAGE_BYTES, PageRun};
use crate::limit::Spent;
use crate::pages::{Chunk, FRAME_BYTES, Marker, PageFrame};
use crate::report::CompressionReport;
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
    /// Pages of the round in hand, with those that are left for the next.
    pub pages: AtomicU64,
    /// Bytes of all rounds.
    pub bytes: AtomicU64,
    totals: Mutex<Totals>,
}

/// Of all rounds and streams.
#[derive(Clone, Debug, Default)]
struct Totals {
    /// Bytes of pages that were sent, and what they were on the wire.
    raw_bytes: u64,
    sent_bytes: u64,
    /// Bytes of pages by what was done with them.
    by_choice: Vec<(Choice, u64)>,
    spent: Spent,
}

impl Totals {
    /// The level that most bytes of compressed pages have, if no more bytes went as they are than with all levels together.
    fn level(&self) -> Option<i32> {
        let (mut raw, mut packed, mut most) = (0, 0, None);
        for (choice, bytes) in &self.by_choice {
            match choice {
                Choice::Raw => raw += bytes,
                Choice::Zstd(level) => {
                    packed += bytes;
                    most = most.max(Some((*bytes, *level)));
                }
            }
        }
        most.filter(|_| packed >= raw).map(|(_, level)| level)
    }
}

impl Sending {
    /// Enters what was written.
    fn enter(&self, packed: &[Packed]) {
        let mut totals = lock(&self.totals);
        for Packed { chunk, choice, .. } in packed {
            self.pages.fetch_add(chunk.data.count() + chunk.zero.count(), Ordering::Relaxed);
            totals.raw_bytes += chunk.data_bytes();
            totals.sent_bytes += chunk.body_bytes();
            let choice = if chunk.packed == 0 { Choice::Raw } else { *choice };
            match totals.by_choice.iter_mut().find(|(known, _)| *known == choice) {
                Some((_, bytes)) => *bytes += chunk.data_bytes(),
                None => totals.by_choice.push((choice, chunk.data_bytes())),
            }
        }
    }

    fn spend(&self, spent: Spent) {
        let all = &mut lock(&self.totals).spent;
        *all = all.plus(spent);
    }

    /// Bytes of pages that were sent, before they were compressed.
    pub fn raw_bytes(&self) -> u64 {
        lock(&self.totals).raw_bytes
    }

    /// What the threads' time went into.
    pub fn spent(&self) -> Spent {
        lock(&self.totals).spent
    }

    /// What compression did so far.
    pub fn compression(&self, mode: Compression) -> CompressionReport {
        let totals = lock(&self.totals);
        let Totals { raw_bytes, sent_bytes, .. } = *totals;
        CompressionReport { mode: mode.to_string(), level: totals.level(), raw_bytes, sent_bytes }
    }
}

/// How pages of a round are sent.
#[derive(Clone, Copy, Debug)]
pub(super) struct Terms {
    /// Its number.
    pub round: u32,
    /// Arm pages again before they are read: the guest runs.
    pub rearm: bool,
    /// Let the guest go first.
    pub courteous: bool,
}

/// One round, shared by all streams.
struct Round {
    terms: Terms,
    order: Mutex<Order>,
    /// Streams that have not closed the round, and what the others carried.
    open: Mutex<(usize, Marker)>,
}

impl Round {
    /// A stream has carried so much of it; after the last one, what all of them did.
    fn close(&self, marker: Marker) -> Option<Marker> {
        let (streams, all) = &mut *lock(&self.open);
        *streams -= 1;
        all.chunks += marker.chunks;
        all.data_pages += marker.data_pages;
        all.zero_pages += marker.zero_pages;
        all.body_bytes += marker.body_bytes;
        (*streams == 0).then_some(*all)
    }
}

/// Pages of one chunk that are to be sent.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wanted {
    /// Which.
    pub chunk: u64,
    /// These of its pages.
    pub pages: ChunkBits,
    /// They were armed again already.
    pub armed: bool,
}

impl Wanted {
    /// Arms them again, if that is to be, and looks which are all zeros.
    pub fn look(&self, memory: &dyn GuestPages, terms: Terms) -> io::Result<Chunk> {
        if terms.rearm && !self.armed {
            // Before the pages are looked at: a write from here on is logged again.
            memory.rearm(self.chunk, &self.pages)?;
        }
        let zero = memory.find_zero(self.chunk, &self.pages)?.and(&self.pages);
        Ok(Chunk { round: terms.round, chunk: self.chunk, data: self.pages.minus(&zero), zero, packed: 0 })
    }
}

/// All page streams.
pub(super) struct PageSenders {
    rounds: Vec<ByCourtesy<mpsc::Sender<Arc<Round>>>>,
    closers: Vec<Arc<dyn Closer>>,
    threads: Vec<JoinHandle<()>>,
    packing: Packing,
    stop: Arc<AtomicBool>,
    pub sending: Arc<Sending>,
}

impl PageSenders {
    pub fn start(
        connections: Vec<Box<dyn Connection>>,
        memory: &Arc<dyn GuestPages>,
        compression: Compression,
        bandwidth: Option<u64>,
        stall: Duration,
        sink: &Sink,
    ) -> io::Result<Self> {
        let stop = Arc::default();
        let mut senders = Self {
            rounds: Vec::new(),
            closers: Vec::new(),
            threads: Vec::new(),
            packing: Packing::new(compression, connections.len(), bandwidth, memory, &stop),
            stop,
            sending: Arc::default(),
        };
        let pacer = bandwidth.map(|rate| Arc::new(Mutex::new(Pacer::new(rate))));
        for connection in connections {
            let Split { writer, closer, .. } = connection.split()?;
            writer.set_timeout(Some(stall))?;
            let stream = Arc::new(Mutex::new(Stream {
                memory: memory.clone(),
                writer,
                pacer: pacer.clone(),
                stop: senders.stop.clone(),
                sending: senders.sending.clone(),
                began: Instant::now(),
                buffer: Vec::new(),
                line: senders.packing.line(),
                in_hand: VecDeque::new(),
                spare: Vec::new(),
                spent: Spent::default(),
            }));
            senders.closers.push(closer);
            senders.rounds.push(ByCourtesy::try_new(|courteous| {
                let (rounds, queue) = mpsc::channel::<Arc<Round>>();
                let (stream, sink) = (stream.clone(), sink.clone());
                senders.threads.push(thread::Builder::new().name("pages-send".into()).spawn(move || {
                    courtesy::begin(courteous);
                    while let Ok(round) = queue.recv() {
                        // Only then may anybody hear of it: the thread of the next round must not wait for this one.
                        let sent = lock(&stream).serve(&round);
                        match sent.map(|marker| round.close(marker)) {
                            Ok(None) => {}
                            Ok(Some(all)) => sink(SendEvent::Sent(all)),
                            Err(error) => return sink(SendEvent::Failed(error.to_string())),
                        }
                    }
                })?);
                io::Result::Ok(rounds)
            })?);
        }
        Ok(senders)
    }

    /// Sends a round. The one before it must be closed.
    pub fn send(&self, terms: Terms, pages: Bitmap) {
        let Terms { round: n, rearm, .. } = terms;
        self.sending.pages.store(0, Ordering::Relaxed);
        self.packing.shared.round((!rearm).then(|| pages.count() * PAGE_BYTES));
        let open = Mutex::new((self.rounds.len(), Marker { round: n, ..Marker::default() }));
        let order = Mutex::new(Order::new(pages, n == 1 && rearm));
        let round = Arc::new(Round { terms, order, open });
        for stream in &self.rounds {
            // A stream that failed has said so.
            let _ = stream.of(terms.courteous).send(round.clone());
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
        self.packing.close();
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
    line: Line,
    /// Chunks that are being compressed, in the order in which they were begun.
    in_hand: VecDeque<InHand>,
    /// Buffers for frames.
    spare: Vec<Vec<u8>>,
    /// Since it was last entered in `sending`.
    spent: Spent,
}

/// What goes out with the next write.
#[derive(Default)]
struct Batch {
    parts: Vec<Packed>,
    bytes: u64,
}

impl Batch {
    fn is_full(&self) -> bool {
        self.bytes >= BATCH_BYTES || self.parts.len() >= MAX_BATCH_CHUNKS
    }
}

impl Stream {
    /// Sends its part of the round, and enters what that took.
    fn serve(&mut self, round: &Round) -> io::Result<Marker> {
        let (began, cpu) = (Instant::now(), cpu_time());
        let sent = guarded(|| self.send(round)).flatten();
        self.spent.all += began.elapsed();
        self.spent.cpu += cpu_time() - cpu;
        self.sending.spend(std::mem::take(&mut self.spent));
        sent
    }

    /// Sends chunks of the round until none is left, and the marker.
    fn send(&mut self, round: &Round) -> io::Result<Marker> {
        let mut marker = Marker { round: round.terms.round, ..Marker::default() };
        let mut batch = Batch::default();
        let mut add = |batch: &mut Batch, packed: Packed| {
            marker.add(&packed.chunk);
            batch.bytes += packed.chunk.body_bytes();
            batch.parts.push(packed);
        };
        let mut rest = None;
        loop {
            if self.stop.load(Ordering::Relaxed) {
                return Err(stopped());
            }
            // What has been compressed goes first.
            while !batch.is_full()
                && let Some(packed) = self.ready()?
            {
                add(&mut batch, packed);
            }
            // With a rest, something is to be learned before it is sent.
            if batch.is_full() || rest.is_some() && !batch.parts.is_empty() {
                self.write(&mut batch, None)?;
            } else if self.in_hand.len() < self.line.ahead
                && let Some(wanted) = self.next(round, &mut rest)?
            {
                if let Some(raw) = self.begin(round, wanted, &mut rest)? {
                    add(&mut batch, raw);
                }
            } else if !self.in_hand.is_empty() {
                // What there is goes before there is nothing to do but wait.
                self.write(&mut batch, None)?;
                add(&mut batch, self.wait()?);
            } else {
                break;
            }
        }
        self.write(&mut batch, Some(marker))?;
        Ok(marker)
    }

    /// What to send next: what is left of a chunk, or another one.
    fn next(&mut self, round: &Round, rest: &mut Option<Wanted>) -> io::Result<Option<Wanted>> {
        if rest.is_some() {
            return Ok(rest.take());
        }
        let began = Instant::now();
        let mut order = lock(&round.order);
        let next = order.next(&*self.memory, self.sending.raw_bytes(), began);
        self.sending.pages.fetch_add(std::mem::take(&mut order.left), Ordering::Relaxed);
        self.spent.pages += began.elapsed();
        next
    }

    /// Gives a chunk to the workers, or gets it ready to go as it is. What is left of it for another choice is put into `rest`.
    fn begin(&mut self, round: &Round, mut wanted: Wanted, rest: &mut Option<Wanted>) -> io::Result<Option<Packed>> {
        let mut choice = self.line.shared.choose();
        if choice == Choice::Raw {
            let began = Instant::now();
            let mut chunk = wanted.look(&*self.memory, round.terms)?;
            wanted.armed = true;
            if self.line.sample(&chunk)? {
                choice = self.line.shared.choose();
            }
            self.spent.pages += began.elapsed();
            if choice == Choice::Raw {
                let all = chunk.data;
                // A cap makes them small, so that watchers see pages move.
                let capped = self.pacer.as_ref().map_or(CHUNK_PAGES, |pacer| lock(pacer).most_bytes() / PAGE_BYTES);
                chunk.data = all.first(self.line.shared.most_pages().min(capped));
                let left = all.minus(&chunk.data);
                *rest = (!left.is_empty()).then_some(Wanted { pages: left, ..wanted });
                return Ok(Some(Packed { chunk, choice, frame: Vec::new() }));
            }
        }
        if let Choice::Zstd(level) = choice {
            let frame = self.spare.pop().unwrap_or_default();
            self.in_hand.push_back(self.line.start(round.terms, wanted, level, frame)?);
        }
        Ok(None)
    }

    /// The first of the chunks in hand, if it is ready.
    fn ready(&mut self) -> io::Result<Option<Packed>> {
        let Some(first) = self.in_hand.front() else { return Ok(None) };
        let packed = ready(first)?;
        if packed.is_some() {
            self.in_hand.pop_front();
        }
        Ok(packed)
    }

    /// Waits for it.
    fn wait(&mut self) -> io::Result<Packed> {
        let began = Instant::now();
        let packed = self.in_hand.pop_front().map_or_else(|| Err(stopped()), |first| wait(&first));
        self.spent.pack += began.elapsed();
        packed
    }

    /// Writes what is in the batch, and the marker if the round ends, at once.
    fn write(&mut self, batch: &mut Batch, marker: Option<Marker>) -> io::Result<()> {
        let Batch { parts: packed, bytes } = std::mem::take(batch);
        let headers: Vec<[u8; FRAME_BYTES]> = packed
            .iter()
            .map(|packed| PageFrame::Chunk(packed.chunk))
            .chain(marker.map(PageFrame::Marker))
            .map(|frame| frame.encode())
            .collect();
        if headers.is_empty() {
            return Ok(());
        }
        let mut parts: Vec<Part<'_>> = Vec::with_capacity(headers.len() * 2);
        for (index, header) in headers.iter().enumerate() {
            parts.push(Part::Bytes(header));
            match packed.get(index) {
                Some(Packed { chunk, frame, .. }) if chunk.packed != 0 => parts.push(Part::Bytes(frame)),
                Some(Packed { chunk, .. }) => parts.extend(chunk.data_runs().map(Part::Pages)),
                None => {}
            }
        }
        let began = Instant::now();
        match &self.pacer {
            None => self.put(&parts)?,
            Some(pacer) => {
                let most = lock(pacer).most_bytes();
                groups(&parts, most).iter().try_for_each(|group| self.put(group))?;
            }
        }
        self.sending.enter(&packed);
        if let Some(last) = packed.iter().rfind(|packed| !packed.chunk.data.is_empty()) {
            self.line.shared.wrote(last.choice, bytes, began, Instant::now());
        }
        self.spare.extend(packed.into_iter().map(|packed| packed.frame).filter(|frame| frame.capacity() > 0));
        self.spare.truncate(self.line.ahead);
        Ok(())
    }

    /// Writes parts when the cap on bandwidth has room for them.
    fn put(&mut self, parts: &[Part<'_>]) -> io::Result<()> {
        let bytes = parts.iter().map(Part::bytes).sum();
        let began = Instant::now();
        self.pace(bytes)?;
        let paced = Instant::now();
        match self.writer.socket() {
            Some(socket) => self.memory.send(parts, socket),
            None => copy_parts(&*self.memory, parts, &mut self.buffer, &mut *self.writer),
        }
        .map_err(|error| match crate::transport::is_timeout(&error) {
            true => io::Error::new(io::ErrorKind::TimedOut, "the other side does not take pages any more"),
            false => error,
        })?;
        self.spent.pace += paced - began;
        self.spent.link += paced.elapsed();
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

/// CPU time of this thread.
fn cpu_time() -> Duration {
    Duration::try_from(clock_gettime(ClockId::ThreadCPUTime)).unwrap_or_default()
}

/// The parts in groups of at most so many bytes, which are whole pages.
fn groups<'a>(parts: &[Part<'a>], most: u64) -> Vec<Vec<Part<'a>>> {
    let (mut groups, mut group, mut room) = (Vec::new(), Vec::new(), most);
    for part in parts {
        let mut rest = Some(*part);
        while let Some(part) = rest {
            let (now, later) = part.cut(room);
            room -= now.map_or(0, |now| now.bytes());
            group.extend(now);
            if later.is_some() {
                groups.push(std::mem::take(&mut group));
                room = most;
            }
            rest = later;
        }
    }
    groups.push(group);
    groups
}

impl<'a> Part<'a> {
    /// Its length.
    fn bytes(&self) -> u64 {
        match self {
            Self::Bytes(bytes) => bytes.len() as u64,
            Self::Pages(run) => run.bytes(),
        }
    }

    /// As much of it as has room in so many bytes, whole pages of pages; and what is left.
    fn cut(self, room: u64) -> (Option<Self>, Option<Self>) {
        if self.bytes() <= room {
            return (Some(self), None);
        }
        match self {
            Self::Bytes(bytes) => {
                let (now, later) = bytes.split_at(room as usize);
                ((!now.is_empty()).then_some(Self::Bytes(now)), Some(Self::Bytes(later)))
            }
            Self::Pages(PageRun { first, pages }) => {
                let now = room / PAGE_BYTES;
                let (head, tail) = (PageRun { first, pages: now }, PageRun { first: first + now, pages: pages - now });
                ((now > 0).then_some(Self::Pages(head)), Some(Self::Pages(tail)))
            }
        }
    }
}

pub(super) fn stopped() -> io::Error {
    io::Error::new(io::ErrorKind::Interrupted, "stopped")
}

/// The way of connections whose bytes are not the socket's bytes: through a buffer of ours.
fn copy_parts(
    memory: &dyn GuestPages,
    parts: &[Part<'_>],
    buffer: &mut Vec<u8>,
    writer: &mut dyn ConnectionWriter,
) -> io::Result<()> {
    // Kept at its length: to lengthen it would be to write zeros first.
    buffer.resize((COPY_PAGES * PAGE_BYTES) as usize, 0);
    let mut filled = 0;
    for part in parts {
        let mut rest = Some(*part);
        while let Some(part) = rest {
            let (now, later) = part.cut((buffer.len() - filled) as u64);
            if let Some(now) = now {
                let into = &mut buffer[filled..filled + now.bytes() as usize];
                match now {
                    Part::Bytes(bytes) => into.copy_from_slice(bytes),
                    Part::Pages(run) => memory.read(run, into)?,
                }
                filled += into.len();
            }
            if later.is_some() {
                writer.write_all(&buffer[..filled])?;
                filled = 0;
            }
            rest = later;
        }
    }
    writer.write_all(&buffer[..filled])
}

/// Pages that go through a buffer of ours at once: 256 KiB, which stays in a core's cache.
pub(super) const COPY_PAGES: u64 = 64;

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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn it_was_compressed_if_all_levels_together_had_most_of_it() {
        let level = |by_choice: &[(Choice, u64)]| Totals { by_choice: by_choice.into(), ..Totals::default() }.level();
        assert_eq!(level(&[]), None);
        assert_eq!(level(&[(Choice::Raw, 5)]), None);
        assert_eq!(level(&[(Choice::Raw, 5), (Choice::Zstd(1), 4)]), None);
        // Each less than went as it is.
        assert_eq!(level(&[(Choice::Raw, 5), (Choice::Zstd(3), 3), (Choice::Zstd(-3), 4)]), Some(-3));
    }

    proptest! {
        #[test]
        fn groups_are_the_parts_and_no_longer_than_they_may_be(
            lengths in prop::collection::vec((any::<bool>(), 1u64..700), 0..20), most in 1u64..40,
        ) {
            let most = most * PAGE_BYTES;
            let bytes = vec![7; 1 << 20];
            let mut first = 0;
            let parts: Vec<Part<'_>> = lengths.iter().map(|(pages, length)| match pages {
                true => {
                    first += length + 1;
                    Part::Pages(PageRun { first: first - length - 1, pages: *length })
                }
                false => Part::Bytes(&bytes[..(length * 1000) as usize]),
            }).collect();
            // As pages and single bytes, in order.
            let flat = |parts: &[Part<'_>]| -> Vec<u64> {
                parts.iter().flat_map(|part| match part {
                    Part::Bytes(bytes) => vec![u64::MAX; bytes.len()],
                    Part::Pages(run) => (run.first..run.first + run.pages).collect(),
                }).collect()
            };
            let groups = groups(&parts, most);
            prop_assert_eq!(flat(&groups.concat()), flat(&parts));
            for (index, group) in groups.iter().enumerate() {
                let length: u64 = group.iter().map(Part::bytes).sum();
                prop_assert!(length <= most);
                // A page may not fit any more, a byte always does.
                prop_assert!(index + 1 == groups.len() || length > most - PAGE_BYTES, "{} of {}", length, most);
            }
        }
    }
}
