//! A page stream from a peer into a small guest: memory is what a naive reader of the same stream makes of it.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use arbitrary::{Arbitrary, Unstructured};
use migrator::bitmap::ChunkBits;
use migrator::fuzzing::receive_pages;
use migrator::layout::{CHUNK_PAGES, PAGE_SIZE, PageRun, RamLayout, RamRegion};
use migrator::pages::{Chunk, FRAME_BYTES, Marker, PageFrame};
use migrator::traits::{ConnectionReader, GuestPages, Part};
use vm_memory::GuestAddress;
use vmm::host::touched::Touched;
use vmm::memory::GuestMemoryMmap;
use vmm::memory::pages::Pages;
use xxhash_rust::xxh3::xxh3_64;
use zstd::zstd_safe::find_frame_compressed_size;

/// Two regions, the border inside the first chunk, and a second chunk that is not full.
const REGIONS: [RamRegion; 2] = [RamRegion { gpa: 0, bytes: 500 * 4096 }, RamRegion { gpa: 1 << 32, bytes: 20 * 4096 }];

pub fn run(data: &[u8]) {
    thread_local! {
        static GUEST: RefCell<Guest> = RefCell::new(Guest::new());
    }
    let Some((mode, data)) = data.split_first() else { return };
    let stream = if mode & 1 == 0 { data.to_vec() } else { written(data) };
    GUEST.with_borrow_mut(|guest| guest.receive(&stream, mode & 2 == 0, mode & 4 != 0));
}

/// A memory for all runs.
struct Guest {
    layout: RamLayout,
    pages: Pages,
}

impl Guest {
    fn new() -> Self {
        let ranges = REGIONS.map(|region| (GuestAddress(region.gpa), region.bytes as usize));
        Self {
            layout: RamLayout::new(REGIONS.to_vec()).unwrap(),
            pages: Pages::new(GuestMemoryMmap::from_ranges(&ranges).unwrap().into(), Touched::open()),
        }
    }

    fn receive(&mut self, bytes: &[u8], direct: bool, compressed: bool) {
        let (socket, mut peer) = UnixStream::pair().unwrap();
        // All of it fits into the socket's buffer, or the stream ends where it does not.
        peer.set_nonblocking(true).unwrap();
        let mut length = 0;
        while let Ok(written @ 1..) = peer.write(&bytes[length..]) {
            length += written;
        }
        drop(peer);
        let bytes = &bytes[..length];
        let mut stream = Stream { socket, direct };
        let memory = Memory { layout: &self.layout, pages: &self.pages };
        let (markers, end) = receive_pages(&mut stream, &memory, compressed);
        assert!(end.is_err(), "a stream has no good end of its own");
        let (expected, expected_markers) = naive(bytes, &self.layout, compressed);
        assert_eq!(markers, expected_markers);
        let mut page_bytes = [0; PAGE_SIZE];
        for page in 0..self.pages.count() {
            match expected.get(&page) {
                Some(Some(wanted)) => {
                    self.pages.copy_out(page, &mut page_bytes).unwrap();
                    assert!(page_bytes == **wanted, "page {page}");
                    self.pages.clear(page..page + 1).unwrap();
                }
                Some(None) => self.pages.clear(page..page + 1).unwrap(),
                None => assert!(self.pages.is_zero(page).unwrap(), "page {page} was written"),
            }
        }
    }
}

type Page = Box<[u8; PAGE_SIZE]>;

/// The pages in a frame, if it is one frame of exactly these.
fn open(frame: &[u8], chunk: &Chunk) -> Option<Vec<u8>> {
    let whole = find_frame_compressed_size(frame).ok()? == frame.len();
    let pages = zstd::bulk::decompress(frame, chunk.data_bytes() as usize + 1).ok()?;
    (whole && pages.len() as u64 == chunk.data_bytes()).then_some(pages)
}

/// What pages of a stream hold when it ends; `None`: it ended in the middle of this one. And the rounds that were closed.
fn naive(mut stream: &[u8], layout: &RamLayout, compressed: bool) -> (BTreeMap<u64, Option<Page>>, Vec<Marker>) {
    let (mut pages, mut markers) = (BTreeMap::new(), Vec::new());
    let mut count = Marker { round: 1, ..Marker::default() };
    while let Some((header, rest)) = stream.split_first_chunk::<FRAME_BYTES>() {
        stream = rest;
        match PageFrame::decode(header, layout) {
            Ok(PageFrame::Chunk(chunk)) if chunk.round == count.round => {
                count.add(&chunk);
                let numbers = |bits: ChunkBits| {
                    (0..CHUNK_PAGES)
                        .filter(move |page| bits.get(*page))
                        .map(move |page| chunk.chunk * CHUNK_PAGES + page)
                };
                pages.extend(numbers(chunk.zero).map(|page| (page, Some(Page::new([0; PAGE_SIZE])))));
                if chunk.packed != 0 {
                    let Some((frame, rest)) = stream.split_at_checked(chunk.packed as usize) else { break };
                    // It is read with the header after it, and not looked at without.
                    let opened = if compressed && rest.len() >= FRAME_BYTES { open(frame, &chunk) } else { None };
                    let Some(opened) = opened else { break };
                    let bytes = opened.chunks(PAGE_SIZE).map(|page| Some(Page::new(page.try_into().unwrap())));
                    pages.extend(numbers(chunk.data).zip(bytes));
                    stream = rest;
                    continue;
                }
                for page in numbers(chunk.data) {
                    let Some((bytes, rest)) = stream.split_first_chunk() else {
                        // What was there may be overwritten in part, this page's or (without a socket) none of the run's.
                        pages.extend(numbers(chunk.data).map(|page| (page, None)));
                        return (pages, markers);
                    };
                    pages.insert(page, Some(Page::new(*bytes)));
                    stream = rest;
                }
            }
            Ok(PageFrame::Marker(marker)) if marker == count => {
                markers.push(marker);
                count = Marker { round: marker.round.saturating_add(1), ..Marker::default() };
            }
            _ => break,
        }
    }
    (pages, markers)
}

/// A stream in which most frames follow the rules, so that what comes after them is reached.
fn written(data: &[u8]) -> Vec<u8> {
    let (mut stream, mut u) = (Vec::new(), Unstructured::new(data));
    let _ = write(&mut u, &mut stream);
    stream
}

fn write(u: &mut Unstructured<'_>, stream: &mut Vec<u8>) -> arbitrary::Result<()> {
    let mut count = Marker { round: 1, ..Marker::default() };
    while !u.is_empty() {
        let mut frame = Vec::new();
        let mut header = match u.arbitrary::<u8>()? % 8 {
            kind @ 0..=3 => {
                let first = u64::from(u.arbitrary::<u8>()? & 1);
                let (data, zero) = (bits(u)?, bits(u)?);
                let mut chunk = Chunk { round: count.round, chunk: first, data, zero: zero.minus(&data), packed: 0 };
                if kind == 3 {
                    frame = packed(u, &chunk)?;
                    chunk.packed = frame.len() as u32;
                }
                count.add(&chunk);
                PageFrame::Chunk(chunk).encode()
            }
            4 | 5 => {
                let marker = count;
                count = Marker { round: count.round + 1, ..Marker::default() };
                PageFrame::Marker(marker).encode()
            }
            _ => <[u8; FRAME_BYTES]>::arbitrary(u)?,
        };
        if u.ratio(1, 8)? {
            let at = u.int_in_range(0..=FRAME_BYTES - 1)?;
            header[at] = u.arbitrary()?;
        }
        let sum = xxh3_64(&header[..FRAME_BYTES - 8]);
        header[FRAME_BYTES - 8..].copy_from_slice(&sum.to_le_bytes());
        stream.extend(header);
        // Of pages, only their first bytes are chosen.
        let layout = RamLayout::new(REGIONS.to_vec()).unwrap();
        if let Ok(PageFrame::Chunk(chunk)) = PageFrame::decode(&header, &layout) {
            match chunk.packed {
                0 => {
                    for _ in 0..chunk.data.count().min(40) {
                        stream.extend(page(u)?);
                    }
                }
                _ => stream.append(&mut frame),
            }
        }
    }
    Ok(())
}

/// A page of which only the ends are not zero.
fn page(u: &mut Unstructured<'_>) -> arbitrary::Result<[u8; PAGE_SIZE]> {
    let mut page = [0; PAGE_SIZE];
    page[0] = u.arbitrary()?;
    page[PAGE_SIZE - 1] = page[0];
    Ok(page)
}

/// A frame of the chunk's pages, mostly: of a page too many or too few, with another after it, or with a byte that is wrong.
fn packed(u: &mut Unstructured<'_>, chunk: &Chunk) -> arbitrary::Result<Vec<u8>> {
    let wrong = u.int_in_range(0..=15)?;
    let count = match wrong {
        0 => chunk.data.count() + 1,
        1 => chunk.data.count().saturating_sub(1),
        _ => chunk.data.count(),
    };
    let mut pages = Vec::new();
    for _ in 0..count {
        pages.extend(page(u)?);
    }
    let mut frame = zstd::bulk::compress(&pages, 1).expect("memory to memory");
    match wrong {
        2 => frame.extend(zstd::bulk::compress(&[], 1).expect("memory to memory")),
        3 => frame.extend(0x184d_2a50u64.to_le_bytes()), // a frame to be skipped, of no bytes
        4 => {
            let at = u.int_in_range(0..=frame.len() - 1)?;
            frame[at] = u.arbitrary()?;
        }
        _ => {}
    }
    Ok(frame)
}

/// A few pages, in the two chunks' terms.
fn bits(u: &mut Unstructured<'_>) -> arbitrary::Result<ChunkBits> {
    let mut bits = ChunkBits::default();
    for _ in 0..u.int_in_range(0..=3)? {
        let first = u.int_in_range(0..=520u64)?;
        (first..first + u.int_in_range(1..=4)?).for_each(|page| bits.set(page));
    }
    Ok(bits)
}

struct Stream {
    socket: UnixStream,
    direct: bool,
}

impl Read for Stream {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        self.socket.read(into)
    }
}

impl ConnectionReader for Stream {
    fn set_timeout(&self, _: Option<Duration>) -> io::Result<()> {
        Ok(())
    }

    fn socket(&self) -> Option<BorrowedFd<'_>> {
        self.direct.then(|| self.socket.as_fd())
    }
}

/// As the program's adapter has it.
struct Memory<'a> {
    layout: &'a RamLayout,
    pages: &'a Pages,
}

fn range(run: PageRun) -> Range<u64> {
    run.first..run.first + run.pages
}

impl GuestPages for Memory<'_> {
    fn layout(&self) -> &RamLayout {
        self.layout
    }

    fn send(&self, _: &[Part<'_>], _: BorrowedFd<'_>) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn receive(&self, runs: &[PageRun], tail: &mut [u8], from: BorrowedFd<'_>) -> io::Result<()> {
        let runs: Vec<_> = runs.iter().map(|run| range(*run)).collect();
        self.pages.read_from(&runs, tail, from)
    }

    fn read(&self, run: PageRun, into: &mut [u8]) -> io::Result<()> {
        self.pages.copy_out(run.first, into)
    }

    fn write(&self, run: PageRun, from: &[u8]) -> io::Result<()> {
        self.pages.copy_in(run.first, from)
    }

    fn clear(&self, run: PageRun) -> io::Result<()> {
        self.pages.clear(range(run))
    }
}
