//! What `fuzz/` reaches of this crate besides its public face. Not for anyone else.

use std::io::{self, Read};
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex};

use crate::driver::control;
use crate::driver::receive::{ReceiveEvent, receive};
use crate::pages::Marker;
use crate::traits::{ConnectionReader, GuestPages};
use crate::wire::Message;

/// Reads one message of a request or control connection.
pub fn read_message(reader: &mut dyn Read) -> io::Result<Message> {
    control::read_message(reader)
}

/// Runs a page stream to its end: the rounds that were closed, and what ended it. Chunks may be `compressed` only if it says so.
pub fn receive_pages(
    reader: &mut dyn ConnectionReader,
    memory: &dyn GuestPages,
    compressed: bool,
) -> (Vec<Marker>, io::Result<()>) {
    let markers = Arc::new(Mutex::new(Vec::new()));
    let sink = {
        let markers = markers.clone();
        Arc::new(move |event| {
            if let ReceiveEvent::Marker(_, marker) = event {
                control::lock(&markers).push(marker);
            }
        })
    };
    let end = receive(0, reader, memory, compressed, &AtomicU64::new(0), &(sink as _));
    (std::mem::take(&mut control::lock(&markers)), end)
}
