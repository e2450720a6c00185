use proptest::prelude::*;

use super::*;

#[test]
fn every_way_of_writing_it() {
    for (text, wanted) in [
        ("auto", Compression::Auto),
        ("none", Compression::None),
        ("zstd", Compression::Zstd(DEFAULT_LEVEL)),
        ("zstd:-7", Compression::Zstd(-7)),
        ("zstd:12", Compression::Zstd(12)),
    ] {
        assert_eq!(text.parse(), Ok(wanted));
        let json = serde_json::to_string(&wanted).unwrap();
        assert_eq!(serde_json::from_str::<Compression>(&json).unwrap(), wanted);
    }
    for bad in ["", "zstd:", "zstd:0", "zstd:-8", "zstd:13", "zstd:x", "lz4", "AUTO", "zstd:1 "] {
        let error = bad.parse::<Compression>().unwrap_err().to_string();
        assert!(error.contains(&format!("'{bad}'")) && error.contains("from -7 to 12"), "{error}");
        assert!(serde_json::from_str::<Compression>(&format!("{bad:?}")).is_err());
    }
}

/// Pages that get shorter.
fn text(pages: usize) -> Vec<u8> {
    let mut text = Vec::new();
    for line in 0.. {
        text.extend(format!("{line} pages of text, and the next line is {}\n", line * 7919 % 1000).bytes());
        if text.len() >= pages * 4096 {
            break;
        }
    }
    text.truncate(pages * 4096);
    text
}

fn noise(pages: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut step = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    };
    (0..pages * 4096).map(|_| step()).collect()
}

fn frame_of(pages: &[u8]) -> Vec<u8> {
    let mut frame = Vec::new();
    assert!(Packer::new().pack(1, pages, &mut frame).unwrap());
    frame
}

fn refused(frame: &[u8], pages: usize) -> String {
    let mut opened = vec![0; pages * 4096];
    let error = Unpacker::new().unpack(frame, &mut opened).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    error.to_string()
}

#[test]
fn there_and_back_with_every_level() {
    let (mut packer, mut unpacker, mut frame) = (Packer::new(), Unpacker::new(), Vec::new());
    for pages in [text(512), text(1), vec![7; 4096]] {
        for level in (MIN_LEVEL..=MAX_LEVEL).filter(|level| *level != 0) {
            assert!(packer.pack(level, &pages, &mut frame).unwrap(), "level {level}");
            assert!(frame.len() < pages.len());
            let mut opened = vec![1; pages.len()];
            unpacker.unpack(&frame, &mut opened).unwrap();
            assert!(opened == pages, "level {level}");
        }
    }
}

#[test]
fn what_hardly_gets_shorter_goes_as_it_is() {
    let (mut packer, mut frame) = (Packer::new(), Vec::new());
    assert!(!packer.pack(1, &noise(512), &mut frame).unwrap());
    // One part in sixteen is where it begins to be worth it.
    let mut pages = noise(512);
    pages[..512 * 4096 / 24].fill(0);
    assert!(!packer.pack(1, &pages, &mut frame).unwrap());
    pages[..512 * 4096 / 12].fill(0);
    assert!(packer.pack(1, &pages, &mut frame).unwrap());
    assert!(frame.len() <= pages.len() - pages.len() / 16);
}

#[test]
fn after_what_did_not_fit_every_level_works() {
    let (mut packer, mut unpacker, mut frame) = (Packer::new(), Unpacker::new(), Vec::new());
    for level in [1, 3, -3, 6, 1] {
        assert!(!packer.pack(level, &noise(64), &mut frame).unwrap(), "level {level}");
        assert!(!packer.pack(level, &noise(64), &mut frame).unwrap(), "level {level}");
    }
    for level in [1, 6] {
        assert!(packer.pack(level, &text(64), &mut frame).unwrap());
        let mut opened = vec![0; 64 * 4096];
        unpacker.unpack(&frame, &mut opened).unwrap();
        assert!(opened == text(64));
        packer.pack(level, &noise(64), &mut frame).unwrap();
    }
}

#[test]
fn hostile_frames() {
    let pages = text(8);
    let good = frame_of(&pages);
    assert!(refused(&[], 8).contains("not one zstd frame"));
    assert!(refused(b"certainly no frame at all", 8).contains("not one zstd frame"));
    for short in [1, 4, good.len() / 2, good.len() - 1] {
        refused(&good[..short], 8);
    }
    assert!(refused(&[&good[..], &[0]].concat(), 8).contains("not one zstd frame"));
    // More pages or fewer than there is room for.
    assert!(refused(&good, 7).contains("cannot be decompressed"));
    assert!(refused(&good, 9).contains("holds 32768 bytes of 36864"));
    // Two frames that together are as long; an empty frame; one that is to be skipped.
    let half = frame_of(&pages[..4 * 4096]);
    assert!(refused(&[&half[..], &half].concat(), 8).contains("not one zstd frame"));
    assert!(refused(&[0x28, 0xb5, 0x2f, 0xfd, 0x20, 0, 1, 0, 0], 8).contains("holds 0 bytes"));
    assert!(refused(&[0x50, 0x2a, 0x4d, 0x18, 0, 0, 0, 0], 8).contains("holds 0 bytes"));
    // A dictionary that nobody has: its number is in the frame's head.
    let mut wanted = good.clone();
    wanted[4] |= 1;
    wanted.insert(5 + usize::from(good[4] & 0x20 == 0), 9);
    refused(&wanted, 8);
    // Content that is not what it was: the frame has a checksum of it.
    let mut turned = good.clone();
    *turned.last_mut().unwrap() ^= 1;
    assert!(refused(&turned, 8).contains("checksum"), "{}", refused(&turned, 8));
}

/// 128 KiB of one byte in a block of four bytes, as often as one likes.
fn bomb(blocks: usize) -> Vec<u8> {
    // No checksum, no length of the content, a window of 128 KiB (RFC 8878, section 3.1.1.1).
    let mut frame = vec![0x28, 0xb5, 0x2f, 0xfd, 0x00, 0x38];
    for block in 1..=blocks {
        let header = (128u32 << 10) << 3 | 1 << 1 | u32::from(block == blocks);
        frame.extend(&header.to_le_bytes()[..3]);
        frame.push(b'x');
    }
    frame
}

#[test]
fn a_bomb_gets_no_more_room_than_its_pages() {
    // Exactly a chunk: a frame like any other.
    let mut opened = vec![0; 512 * 4096];
    Unpacker::new().unpack(&bomb(16), &mut opened).unwrap();
    assert!(opened.iter().all(|byte| *byte == b'x'));
    // Eight GiB: stopped at the first byte too many.
    assert!(refused(&bomb(65_536), 512).contains("cannot be decompressed"));
    // A frame that says it needs a window of 3.75 TiB.
    let mut window = bomb(16);
    window[5] = 0xff;
    refused(&window, 512);
}

proptest! {
    #[test]
    fn no_frame_panics_or_fills_more_than_its_pages(
        bytes in prop::collection::vec(any::<u8>(), 0..300), head in any::<bool>(), pages in 1usize..4, cut in any::<u16>(), bit in any::<u16>(),
    ) {
        let mut frame = if head { vec![0x28, 0xb5, 0x2f, 0xfd] } else { vec![] };
        frame.extend(&bytes);
        let mut opened = vec![0; pages * 4096];
        let mut unpacker = Unpacker::new();
        let _ = unpacker.unpack(&frame, &mut opened);
        // One bit of a good frame, or the end of it: never other pages than were put in.
        let good = frame_of(&text(3));
        let mut opened = vec![0; 3 * 4096];
        let mut turned = good.clone();
        let at = usize::from(bit) % (good.len() * 8);
        turned[at / 8] ^= 1 << (at % 8);
        if unpacker.unpack(&turned, &mut opened).is_ok() {
            prop_assert!(opened == text(3));
        }
        prop_assert!(unpacker.unpack(&good[..usize::from(cut) % good.len()], &mut opened).is_err());
    }

    #[test]
    fn round_trip(level in -7i32..=12, parts in prop::collection::vec((any::<u8>(), 1usize..9000, any::<bool>()), 1..40)) {
        prop_assume!(level != 0);
        let mut pages: Vec<u8> = parts.iter().flat_map(|(byte, length, noisy)| {
            let noise = noise(3);
            (0..*length).map(move |at| if *noisy { noise[at] } else { *byte })
        }).collect();
        pages.resize(pages.len().next_multiple_of(4096), 0);
        let mut frame = vec![9; 17];
        if Packer::new().pack(level, &pages, &mut frame).unwrap() {
            prop_assert!(frame.len() < pages.len());
            let mut opened = vec![1; pages.len()];
            Unpacker::new().unpack(&frame, &mut opened).unwrap();
            prop_assert!(opened == pages);
        }
    }
}
