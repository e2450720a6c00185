//! Compressing pages: what the user can ask for, and a chunk's way into one zstd frame and back.
//!
//! When it pays is in [`policy`]. Here is what must hold for every chunk: a frame is shorter than the pages in it, it is
//! one zstd frame and nothing else, and it decompresses to exactly these pages. A buffer of this size is all that a peer can make
//! us fill: a frame that is decompressed in one go needs no window, and it has no room for one byte more.

use std::fmt;
use std::io;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use zstd::bulk::{Compressor, Decompressor};
use zstd::zstd_safe::{ResetDirective, find_frame_compressed_size, get_error_name};

pub mod policy;

/// The fastest level. Below 1 it is faster than zstd's usual range, and compresses less.
pub const MIN_LEVEL: i32 = -7;
/// The slowest level: from here on a chunk takes longer than a cancel may.
pub const MAX_LEVEL: i32 = 12;
/// The level of `zstd` without one.
pub const DEFAULT_LEVEL: i32 = 1;

/// Whether pages are compressed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Compression {
    /// Where it makes the migration faster, as measured while it goes on.
    #[default]
    Auto,
    /// Never.
    None,
    /// Every chunk that gets shorter, with this level ([`MIN_LEVEL`] to [`MAX_LEVEL`]).
    Zstd(i32),
}

/// What is no [`Compression`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("'{0}' is none of auto, none, zstd and zstd:LEVEL with a level from {MIN_LEVEL} to {MAX_LEVEL}, 0 left out")]
pub struct CompressionError(String);

impl FromStr for Compression {
    type Err = CompressionError;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let level = |level: &str| {
            level.parse().ok().filter(|level| (MIN_LEVEL..=MAX_LEVEL).contains(level) && *level != 0).map(Self::Zstd)
        };
        match text {
            "auto" => Some(Self::Auto),
            "none" => Some(Self::None),
            "zstd" => Some(Self::Zstd(DEFAULT_LEVEL)),
            _ => text.strip_prefix("zstd:").and_then(level),
        }
        .ok_or_else(|| CompressionError(text.into()))
    }
}

impl fmt::Display for Compression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::None => f.write_str("none"),
            Self::Zstd(level) => write!(f, "zstd:{level}"),
        }
    }
}

impl TryFrom<String> for Compression {
    type Error = CompressionError;
    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<Compression> for String {
    fn from(compression: Compression) -> Self {
        compression.to_string()
    }
}

/// What is done with one chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Choice {
    /// It goes as it is.
    Raw,
    /// It is compressed with this level.
    Zstd(i32),
}

/// A frame is worth its trouble if it is shorter than the pages by at least one part in so many.
const WORTH: usize = 16;

/// Makes frames.
pub(crate) struct Packer {
    zstd: Compressor<'static>,
    level: Option<i32>,
}

impl Packer {
    pub fn new() -> Self {
        Self { zstd: Compressor::default(), level: None }
    }

    /// Puts the pages into a frame in `frame`, whatever was there before; says whether that is worth it. If not, what is in
    /// `frame` means nothing.
    pub fn pack(&mut self, level: i32, pages: &[u8], frame: &mut Vec<u8>) -> io::Result<bool> {
        if self.level != Some(level) {
            self.zstd.set_compression_level(level)?;
            self.zstd.include_checksum(true)?;
            self.level = Some(level);
        }
        let most = pages.len() - pages.len() / WORTH;
        frame.resize(most, 0);
        // What does not fit is not worth it. There is no other error from memory to memory; and should there be one, the pages
        // go as they are.
        let Ok(length) = self.zstd.compress_to_buffer(pages, &mut frame[..]) else {
            // It is still in the middle of that frame, and would take no other level.
            self.zstd
                .context_mut()
                .reset(ResetDirective::SessionOnly)
                .map_err(|code| io::Error::other(get_error_name(code)))?;
            return Ok(false);
        };
        frame.truncate(length);
        Ok(true)
    }
}

/// Opens frames. Trusts none.
pub(crate) struct Unpacker {
    zstd: Decompressor<'static>,
}

impl Unpacker {
    pub fn new() -> Self {
        Self { zstd: Decompressor::default() }
    }

    /// Fills `pages` from the frame: with neither more nor less than it holds.
    pub fn unpack(&mut self, frame: &[u8], pages: &mut [u8]) -> io::Result<()> {
        let bad = |why: &str| Err(io::Error::new(io::ErrorKind::InvalidData, format!("a compressed chunk {why}")));
        // zstd itself would take several frames in a row, and frames that mean nothing.
        if find_frame_compressed_size(frame) != Ok(frame.len()) {
            return bad("is not one zstd frame");
        }
        match self.zstd.decompress_to_buffer(frame, pages) {
            Ok(length) if length == pages.len() => Ok(()),
            Ok(length) => bad(&format!("holds {length} bytes of {}", pages.len())),
            Err(error) => bad(&format!("cannot be decompressed: {error}")),
        }
    }
}

#[cfg(test)]
mod tests;
