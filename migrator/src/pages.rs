//! What a page stream carries: chunks of pages, and a marker at the end of each round.
//!
//! A stream is a sequence of frames with a header of [`FRAME_BYTES`] each. A chunk's header says which pages of 2 MiB
//! of memory follow as bytes (`data`) and which are all zeros and so do not follow (`zero`); then come the data pages, in
//! order, as they are or in one zstd frame. Nothing of it is per page but two bits. A marker closes the round on its stream and repeats the counts, so
//! that a lost frame is noticed. After a chunk there is always another frame (at least the marker), so the receiver takes
//! a chunk's pages and the next header in one read.

use xxhash_rust::xxh3::xxh3_64;

use crate::bitmap::ChunkBits;
use crate::layout::{CHUNK_PAGES, PAGE_BYTES, PageRun, RamLayout};
use crate::wire::{Fields, WireError};

/// Bytes of a frame's header, of either kind.
pub const FRAME_BYTES: usize = 160;

const MAGIC: [u8; 4] = *b"mvPG";
const CHUNK: u16 = 1;
const MARKER: u16 = 2;
const CHECKED: usize = FRAME_BYTES - 8;
const NAME: &str = "page";

/// One frame of a page stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageFrame {
    /// Pages.
    Chunk(Chunk),
    /// The end of a round on this stream.
    Marker(Marker),
}

/// Pages of one chunk; those in `data` follow as bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chunk {
    /// Round that they belong to.
    pub round: u32,
    /// Number of the chunk; its first page is this times [`CHUNK_PAGES`].
    pub chunk: u64,
    /// Pages that follow.
    pub data: ChunkBits,
    /// Pages that are all zeros. None is in `data` too, and not both are empty.
    pub zero: ChunkBits,
    /// Length of the zstd frame that holds the pages of `data`, less than theirs; 0: they come as they are.
    pub packed: u32,
}

/// What one stream carried in one round.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Marker {
    /// The round.
    pub round: u32,
    /// Chunk frames of the round on this stream; a chunk may be sent in parts.
    pub chunks: u64,
    /// Pages that came as bytes.
    pub data_pages: u64,
    /// Pages that came as a bit.
    pub zero_pages: u64,
    /// Bytes that followed the headers of these chunks.
    pub body_bytes: u64,
}

impl Chunk {
    /// The pages that follow, as runs.
    pub fn data_runs(&self) -> impl Iterator<Item = PageRun> {
        self.data.runs(self.chunk * CHUNK_PAGES)
    }

    /// The zero pages, as runs.
    pub fn zero_runs(&self) -> impl Iterator<Item = PageRun> {
        self.zero.runs(self.chunk * CHUNK_PAGES)
    }

    /// Bytes of the pages in `data`.
    pub fn data_bytes(&self) -> u64 {
        self.data.count() * PAGE_BYTES
    }

    /// Bytes that follow the header.
    pub fn body_bytes(&self) -> u64 {
        if self.packed == 0 { self.data_bytes() } else { self.packed.into() }
    }
}

impl Marker {
    /// Counts a chunk.
    pub fn add(&mut self, chunk: &Chunk) {
        self.chunks += 1;
        self.data_pages += chunk.data.count();
        self.zero_pages += chunk.zero.count();
        self.body_bytes += chunk.body_bytes();
    }

    /// Bytes on the stream for this round, headers and marker included.
    pub fn bytes(&self) -> u64 {
        (self.chunks + 1) * FRAME_BYTES as u64 + self.body_bytes
    }

    /// What that would be if nothing were compressed.
    pub fn uncompressed_bytes(&self) -> u64 {
        (self.chunks + 1) * FRAME_BYTES as u64 + self.data_pages * PAGE_BYTES
    }
}

impl PageFrame {
    /// The header.
    pub fn encode(&self) -> [u8; FRAME_BYTES] {
        let mut bytes = [0; FRAME_BYTES];
        bytes[0..4].copy_from_slice(&MAGIC);
        let (kind, round) = match self {
            Self::Chunk(Chunk { round, chunk, data, zero, packed }) => {
                bytes[12..16].copy_from_slice(&packed.to_le_bytes());
                bytes[16..24].copy_from_slice(&(chunk * CHUNK_PAGES).to_le_bytes());
                for (at, word) in data.0.iter().chain(&zero.0).enumerate() {
                    bytes[24 + at * 8..32 + at * 8].copy_from_slice(&word.to_le_bytes());
                }
                (CHUNK, round)
            }
            Self::Marker(Marker { round, chunks, data_pages, zero_pages, body_bytes }) => {
                bytes[16..24].copy_from_slice(&chunks.to_le_bytes());
                bytes[24..32].copy_from_slice(&data_pages.to_le_bytes());
                bytes[32..40].copy_from_slice(&zero_pages.to_le_bytes());
                bytes[40..48].copy_from_slice(&body_bytes.to_le_bytes());
                (MARKER, round)
            }
        };
        bytes[4..6].copy_from_slice(&kind.to_le_bytes());
        bytes[8..12].copy_from_slice(&round.to_le_bytes());
        let checksum = xxh3_64(&bytes[..CHECKED]);
        bytes[CHECKED..].copy_from_slice(&checksum.to_le_bytes());
        bytes
    }

    /// Reads a header and checks it against the memory that it is for.
    pub fn decode(bytes: &[u8; FRAME_BYTES], layout: &RamLayout) -> Result<Self, WireError> {
        let (checked, checksum) = bytes.split_at(CHECKED);
        if xxh3_64(checked).to_le_bytes() != checksum {
            return Err(WireError::Checksum(NAME));
        }
        let mut fields = Fields::new(NAME, checked);
        if fields.array()? != MAGIC {
            return Err(WireError::Magic);
        }
        let kind = fields.u16()?;
        let flags = fields.u16()?;
        if flags != 0 {
            return Err(WireError::Flags(flags));
        }
        let round = fields.u32()?;
        if round == 0 {
            return Err(fields.value("round", 0));
        }
        let packed = fields.u32()?;
        match kind {
            CHUNK => Self::chunk(round, packed, fields, layout),
            MARKER => {
                if packed != 0 {
                    return Err(fields.value("reserved", packed.into()));
                }
                let marker = Marker {
                    round,
                    chunks: fields.u64()?,
                    data_pages: fields.u64()?,
                    zero_pages: fields.u64()?,
                    body_bytes: fields.u64()?,
                };
                for (name, value, most) in [
                    ("chunks", marker.chunks, layout.pages()),
                    ("data_pages", marker.data_pages, layout.pages()),
                    ("zero_pages", marker.zero_pages, layout.pages()),
                    ("body_bytes", marker.body_bytes, marker.data_pages.saturating_mul(PAGE_BYTES)),
                ] {
                    if value > most {
                        return Err(fields.value(name, value));
                    }
                }
                while let Ok(byte) = fields.u8() {
                    if byte != 0 {
                        return Err(fields.value("padding", byte.into()));
                    }
                }
                Ok(Self::Marker(marker))
            }
            other => Err(fields.value("kind", other.into())),
        }
    }

    fn chunk(round: u32, packed: u32, mut fields: Fields<'_>, layout: &RamLayout) -> Result<Self, WireError> {
        let first_page = fields.u64()?;
        if first_page % CHUNK_PAGES != 0 || first_page >= layout.pages() {
            return Err(fields.value("first_page", first_page));
        }
        let (mut data, mut zero) = (ChunkBits::default(), ChunkBits::default());
        for word in data.0.iter_mut().chain(&mut zero.0) {
            *word = fields.u64()?;
        }
        let chunk = first_page / CHUNK_PAGES;
        let there = ChunkBits::full(layout.chunk_pages(chunk));
        for (name, bits) in [("data", data), ("zero", zero)] {
            let beyond = bits.minus(&there).count();
            if beyond != 0 {
                return Err(fields.value(name, beyond));
            }
        }
        let both = data.and(&zero).count();
        if both != 0 || data.is_empty() && zero.is_empty() {
            return Err(fields.value("data and zero", both));
        }
        let chunk = Chunk { round, chunk, data, zero, packed };
        if packed != 0 && u64::from(packed) >= chunk.data_bytes() {
            return Err(fields.value("packed", packed.into()));
        }
        fields.end()?;
        Ok(Self::Chunk(chunk))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::compress::Unpacker;
    use crate::layout::RamRegion;

    fn layout(pages: u64) -> RamLayout {
        RamLayout::new(vec![RamRegion { gpa: 0, bytes: pages * PAGE_BYTES }]).unwrap()
    }

    fn sample() -> PageFrame {
        let (mut data, mut zero) = (ChunkBits::default(), ChunkBits::default());
        [0, 1, 2, 64].into_iter().for_each(|page| data.set(page));
        [3, 87].into_iter().for_each(|page| zero.set(page));
        PageFrame::Chunk(Chunk { round: 2, chunk: 1, data, zero, packed: 0 })
    }

    const MARK: PageFrame =
        PageFrame::Marker(Marker { round: 2, chunks: 2, data_pages: 500, zero_pages: 12, body_bytes: 123_456 });

    /// Three pages of letters, which begin a chunk.
    fn letters() -> (Chunk, Vec<u8>) {
        let mut data = ChunkBits::default();
        (0..3).for_each(|page| data.set(page));
        let pages = (b'a'..=b'c').flat_map(|letter| [letter; PAGE_BYTES as usize]).collect();
        (Chunk { round: 1, chunk: 0, data, zero: ChunkBits::default(), packed: 0 }, pages)
    }

    #[test]
    fn golden() {
        crate::golden::check("page-chunk", &sample().encode());
        crate::golden::check("page-marker", &MARK.encode());
    }

    /// Only opened: what a frame is made of may change with the version of zstd, and every version opens it.
    #[test]
    fn golden_compressed_chunk() {
        let bytes = crate::golden::bytes("page-chunk-packed");
        let (header, frame) = bytes.split_first_chunk().unwrap();
        let (chunk, pages) = letters();
        let chunk = Chunk { packed: frame.len() as u32, ..chunk };
        assert_eq!(PageFrame::decode(header, &layout(600)), Ok(PageFrame::Chunk(chunk)));
        let mut opened = vec![0; pages.len()];
        Unpacker::new().unpack(frame, &mut opened).unwrap();
        assert!(opened == pages);
    }

    #[test]
    fn every_flipped_bit_is_noticed() {
        for frame in [sample(), MARK] {
            let good = frame.encode();
            assert_eq!(PageFrame::decode(&good, &layout(600)), Ok(frame));
            for bit in 0..FRAME_BYTES * 8 {
                let mut bytes = good;
                bytes[bit / 8] ^= 1 << (bit % 8);
                assert_eq!(PageFrame::decode(&bytes, &layout(600)), Err(WireError::Checksum(NAME)));
            }
        }
    }

    #[test]
    fn hostile_fields() {
        let with = |frame: PageFrame, at: usize, value: &[u8]| {
            let mut bytes = frame.encode();
            bytes[at..at + value.len()].copy_from_slice(value);
            let sum = xxh3_64(&bytes[..CHECKED]);
            bytes[CHECKED..].copy_from_slice(&sum.to_le_bytes());
            PageFrame::decode(&bytes, &layout(600))
        };
        let field = |result: Result<PageFrame, WireError>, name: &str| {
            assert!(matches!(&result, Err(WireError::Value { field, .. }) if *field == name), "{name}: {result:?}");
        };
        for frame in [sample(), MARK] {
            assert_eq!(with(frame, 0, b"mvPH"), Err(WireError::Magic));
            for kind in [0u16, 3, u16::MAX] {
                field(with(frame, 4, &kind.to_le_bytes()), "kind");
            }
            assert_eq!(with(frame, 6, &[1]), Err(WireError::Flags(1)));
            field(with(frame, 8, &[0; 4]), "round");
        }
        field(with(MARK, 12, &[1]), "reserved");
        // As long as the pages or longer, and for a chunk of zeros any length.
        for packed in [4 * 4096u32, 4 * 4096 + 1, u32::MAX] {
            field(with(sample(), 12, &packed.to_le_bytes()), "packed");
        }
        assert!(with(sample(), 12, &(4 * 4096u32 - 1).to_le_bytes()).is_ok());
        let PageFrame::Chunk(chunk) = sample() else { unreachable!() };
        let zeros = PageFrame::Chunk(Chunk { data: ChunkBits::default(), ..chunk });
        field(with(zeros, 12, &[1]), "packed");
        for first_page in [1, 511, 1024, 600, u64::MAX, u64::MAX - 511] {
            field(with(sample(), 16, &first_page.to_le_bytes()), "first_page");
        }
        field(with(sample(), 24 + 11, &[1]), "data"); // page 88 of a chunk of 88
        field(with(sample(), 88 + 63, &[0x80]), "zero");
        field(with(sample(), 24, &[0xff]), "data and zero");
        field(with(sample(), 24, &[0; 128]), "data and zero");
        for (at, name) in [(16, "chunks"), (24, "data_pages"), (32, "zero_pages")] {
            field(with(MARK, at, &601u64.to_le_bytes()), name);
            field(with(MARK, at, &[0xff; 8]), name);
        }
        field(with(MARK, 40, &(500 * PAGE_BYTES + 1).to_le_bytes()), "body_bytes");
        field(with(MARK, 48, &[1]), "padding");
        field(with(MARK, CHECKED - 1, &[1]), "padding");
    }

    proptest! {
        #[test]
        fn round_trip(round in 1u32.., chunk in 0u64..3, data in any::<[u64; 8]>(), zero in any::<[u64; 8]>(), packed in any::<u32>(), counts in any::<[u16; 3]>()) {
            let layout = layout(1200);
            let there = ChunkBits::full(layout.chunk_pages(chunk));
            let data = ChunkBits(data).and(&there);
            let zero = ChunkBits(zero).and(&there).minus(&data);
            prop_assume!(!data.is_empty() || !zero.is_empty());
            let packed = packed.checked_rem(data.count() as u32 * PAGE_BYTES as u32).unwrap_or(0);
            let frame = PageFrame::Chunk(Chunk { round, chunk, data, zero, packed });
            prop_assert_eq!(PageFrame::decode(&frame.encode(), &layout), Ok(frame));
            let data_pages = u64::from(counts[1]) % 1201;
            let body_bytes = u64::from(packed) % (data_pages * PAGE_BYTES + 1);
            let marker = PageFrame::Marker(Marker {
                round, chunks: u64::from(counts[0]) % 4, data_pages, zero_pages: u64::from(counts[2]) % 1201, body_bytes,
            });
            prop_assert_eq!(PageFrame::decode(&marker.encode(), &layout), Ok(marker));
        }

        #[test]
        fn no_bytes_panic(bytes in prop::collection::vec(any::<u8>(), FRAME_BYTES), pages in 1u64..2000) {
            let mut bytes: [u8; FRAME_BYTES] = bytes.try_into().unwrap();
            let _ = PageFrame::decode(&bytes, &layout(pages));
            bytes[0..4].copy_from_slice(&MAGIC);
            bytes[4] %= 3;
            bytes[5..8].fill(0);
            let sum = xxh3_64(&bytes[..CHECKED]);
            bytes[CHECKED..].copy_from_slice(&sum.to_le_bytes());
            let _ = PageFrame::decode(&bytes, &layout(pages));
        }
    }
}
