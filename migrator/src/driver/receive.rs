//! The page streams of the destination: one thread each, from the socket to guest memory.

use std::io::{self, Read};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::{self, JoinHandle};

use super::guarded;
use super::send::COPY_PAGES;
use crate::compress::Unpacker;
use crate::layout::PageRun;
use crate::pages::{Chunk, FRAME_BYTES, Marker, PageFrame};
use crate::traits::{Closer, Connection, ConnectionReader, GuestPages, Split};

/// What a stream says.
#[derive(Debug)]
pub(crate) enum ReceiveEvent {
    /// A round was closed: its pages from this stream are in memory.
    Marker(u16, Marker),
    /// The stream ended, or what came was no page.
    Failed(String),
}

pub(crate) type Sink = Arc<dyn Fn(ReceiveEvent) + Send + Sync>;

/// One page stream.
pub(super) struct PageReceiver {
    closer: Arc<dyn Closer>,
    thread: Option<JoinHandle<()>>,
}

impl PageReceiver {
    pub fn start(
        stream: u16,
        connection: Box<dyn Connection>,
        memory: Arc<dyn GuestPages>,
        compressed: bool,
        received: Arc<AtomicU64>,
        sink: Sink,
    ) -> io::Result<Self> {
        let Split { mut reader, closer, .. } = connection.split()?;
        // Silence is no failure here: the source may have nothing to send. The control connection tells whether it lives.
        reader.set_timeout(None)?;
        let thread = thread::Builder::new().name("pages-receive".into()).spawn(move || {
            let work = || receive(stream, &mut *reader, &*memory, compressed, &received, &sink);
            let result = guarded(work).flatten();
            if let Err(error) = result {
                sink(ReceiveEvent::Failed(match error.kind() {
                    io::ErrorKind::UnexpectedEof => "the other side closed it".into(),
                    _ => error.to_string(),
                }));
            }
        })?;
        Ok(Self { closer, thread: Some(thread) })
    }

    /// Ends the stream, and waits until it does not touch memory any more.
    pub fn close(&mut self) {
        self.closer.close();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Drop for PageReceiver {
    fn drop(&mut self) {
        self.close();
    }
}

/// Takes pages in until the stream ends. Compressed ones only if the offer said so.
pub(crate) fn receive(
    stream: u16,
    reader: &mut dyn ConnectionReader,
    memory: &dyn GuestPages,
    compressed: bool,
    received: &AtomicU64,
    sink: &Sink,
) -> io::Result<()> {
    let invalid = |error: String| io::Error::new(io::ErrorKind::InvalidData, error);
    let mut buffer = Vec::new();
    let mut frames = compressed.then(Frames::new);
    let mut header = [0; FRAME_BYTES];
    let mut count = Marker { round: 1, ..Marker::default() };
    reader.read_exact(&mut header)?;
    loop {
        match PageFrame::decode(&header, memory.layout()).map_err(|error| invalid(error.to_string()))? {
            PageFrame::Chunk(chunk) if chunk.round == count.round => {
                count.add(&chunk);
                for run in chunk.zero_runs() {
                    memory.clear(run)?;
                }
                let runs: Vec<PageRun> = chunk.data_runs().collect();
                match (reader.socket(), &mut frames) {
                    (_, Some(frames)) if chunk.packed != 0 => frames.take(&chunk, memory, &mut header, reader)?,
                    _ if chunk.packed != 0 => {
                        return Err(invalid("a compressed chunk, of which the offer said nothing".into()));
                    }
                    // There is always another frame, so its header comes with the pages.
                    (Some(socket), _) => memory.receive(&runs, &mut header, socket)?,
                    (None, _) => copy_pages(memory, &runs, &mut header, reader, &mut buffer)?,
                }
                received.fetch_add(chunk.data.count() + chunk.zero.count(), Ordering::Relaxed);
            }
            PageFrame::Marker(marker) if marker == count => {
                count = Marker { round: marker.round.saturating_add(1), ..Marker::default() };
                sink(ReceiveEvent::Marker(stream, marker));
                reader.read_exact(&mut header)?;
            }
            frame => {
                return Err(invalid(format!("{frame:?} does not fit what came before it in round {}", count.round)));
            }
        }
    }
}

/// The way of compressed chunks: through a buffer for the frame and one for its pages, neither longer than a chunk.
struct Frames {
    unpacker: Unpacker,
    frame: Vec<u8>,
    pages: Vec<u8>,
}

impl Frames {
    fn new() -> Self {
        Self { unpacker: Unpacker::new(), frame: Vec::new(), pages: Vec::new() }
    }

    /// Puts the chunk's pages into memory, and what comes after its frame into `tail`. Nothing of a bad frame gets into memory.
    fn take(
        &mut self,
        chunk: &Chunk,
        memory: &dyn GuestPages,
        tail: &mut [u8; FRAME_BYTES],
        reader: &mut dyn Read,
    ) -> io::Result<()> {
        self.frame.resize(chunk.packed as usize + FRAME_BYTES, 0);
        reader.read_exact(&mut self.frame)?;
        let (frame, next) = self.frame.split_at(chunk.packed as usize);
        self.pages.resize(chunk.data_bytes() as usize, 0);
        self.unpacker.unpack(frame, &mut self.pages)?;
        let mut rest = &self.pages[..];
        for run in chunk.data_runs() {
            memory.expect(run)?;
            let (pages, later) = rest.split_at(run.bytes() as usize);
            memory.write(run, pages)?;
            rest = later;
        }
        tail.copy_from_slice(next);
        Ok(())
    }
}

/// The way of connections whose bytes are not the socket's bytes: through a buffer of ours.
fn copy_pages(
    memory: &dyn GuestPages,
    runs: &[PageRun],
    tail: &mut [u8],
    reader: &mut dyn Read,
    buffer: &mut Vec<u8>,
) -> io::Result<()> {
    for run in runs {
        memory.expect(*run)?;
        for piece in pieces(*run) {
            buffer.resize(piece.bytes() as usize, 0);
            reader.read_exact(buffer)?;
            memory.write(piece, buffer)?;
        }
    }
    reader.read_exact(tail)
}

/// A run in pieces of at most [`COPY_PAGES`].
fn pieces(run: PageRun) -> impl Iterator<Item = PageRun> {
    let end = run.first + run.pages;
    let firsts = (run.first..end).step_by(COPY_PAGES as usize);
    firsts.map(move |first| PageRun { first, pages: COPY_PAGES.min(end - first) })
}
