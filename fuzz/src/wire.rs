//! Preambles, their answers, and messages from a peer: what is understood is written again as it came.

use std::io::Cursor;

use migrator::fuzzing::read_message;
use migrator::wire::frame::HEADER_BYTES;
use migrator::wire::message::Kind;
use migrator::wire::preamble::{HEAD_BYTES, MAGIC, Preamble, Welcome, body_length};
use migrator::wire::{Message, encode};
use xxhash_rust::xxh3::xxh3_64;

pub fn run(data: &[u8]) {
    let Some((mode, data)) = data.split_first() else { return };
    match mode % 4 {
        0 => preamble(data),
        1 => preamble(&framed(data)),
        2 => messages(data),
        _ => messages(&sealed(data)),
    }
}

/// What a connection begins with, in either direction.
fn preamble(data: &[u8]) {
    let Some((head, rest)) = data.split_first_chunk::<HEAD_BYTES>() else { return };
    let Ok(length) = body_length(head) else { return };
    let Some(body) = rest.get(..length) else { return };
    let whole = &data[..HEAD_BYTES + length];
    if let Ok((preamble, tls)) = Preamble::decode(body) {
        assert_eq!(preamble.encode(tls), whole);
    }
    if let Ok(welcome) = Welcome::decode(body) {
        assert_eq!(welcome.encode(), whole);
    }
}

/// `body` behind a head that fits it, so that mutations need not find the magic.
fn framed(body: &[u8]) -> Vec<u8> {
    [&MAGIC, &(body.len() as u16).to_le_bytes()[..], body].concat()
}

/// A connection's messages, until the first that is none.
fn messages(stream: &[u8]) {
    let mut reader = Cursor::new(stream);
    loop {
        let start = reader.position() as usize;
        let Ok(message) = read_message(&mut reader) else { return };
        check(&message, &stream[start..reader.position() as usize]);
    }
}

fn check(message: &Message, frame: &[u8]) {
    let again = encode(message);
    if again != frame {
        // JSON has more than one way to say the same. But what we write ourselves must be understood, and stay what it is.
        serde_json::from_slice::<serde_json::Value>(&frame[HEADER_BYTES..]).expect("only JSON has two forms");
        let read = read_message(&mut Cursor::new(&again)).expect("our own bytes are a message");
        assert_eq!(encode(&read), again);
    }
}

/// Frames with the checksums that they need: a type (any that is none counts as one), a length, and the payload.
fn sealed(mut data: &[u8]) -> Vec<u8> {
    let mut stream = Vec::new();
    while let Some(([kind, low, high], rest)) = data.split_first_chunk() {
        let kind = Kind::try_from(u16::from(*kind)).unwrap_or(Kind::ALL[usize::from(*kind) % Kind::ALL.len()]) as u16;
        let length = usize::from(u16::from_le_bytes([*low, *high])).min(rest.len());
        let (payload, rest) = rest.split_at(length);
        let mut start = [0; 8];
        start[..2].copy_from_slice(&kind.to_le_bytes());
        start[4..].copy_from_slice(&(length as u32).to_le_bytes());
        stream.extend(start);
        stream.extend(xxh3_64(&[&start, payload].concat()).to_le_bytes());
        stream.extend(payload);
        data = rest;
    }
    stream
}
