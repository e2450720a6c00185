//! COM1, a 16550.

use super::port;
use core::fmt;
use pulse_core::console::LineQueue;
use pulse_core::text::Text;

const DATA: u16 = 0x3f8;
const FIFO_CONTROL: u16 = DATA + 2;
const LINE_STATUS: u16 = DATA + 5;
const TRANSMITTER_EMPTY: u8 = 1 << 5;
/// A 16550's FIFO: that many bytes may follow one look at the line status.
const FIFO_BYTES: u8 = 16;
/// Lines that wait: some hundred of them.
const QUEUE_BYTES: usize = 16 << 10;
/// The longest line.
const MOST_LINE_BYTES: usize = 512;

/// The serial port and the lines on their way to it.
pub struct Serial {
    queue: LineQueue<QUEUE_BYTES>,
    burst_left: u8,
}

impl Serial {
    /// Switches the FIFO on.
    pub fn new() -> Self {
        port::write_u8(FIFO_CONTROL, 1);
        Self { queue: LineQueue::new(), burst_left: 0 }
    }

    /// Queues a line.
    pub fn line(&mut self, text: fmt::Arguments<'_>) {
        let mut line = Text::<MOST_LINE_BYTES>::new();
        // A `Text` never fails: it cuts.
        let _ = fmt::write(&mut line, text);
        self.queue.push_line(line.as_bytes());
    }

    /// Sends one byte, if one waits and the port takes it. Returns whether any waited.
    pub fn step(&mut self) -> bool {
        if self.queue.is_empty() {
            return false;
        }
        if self.burst_left == 0 {
            if port::read_u8(LINE_STATUS) & TRANSMITTER_EMPTY == 0 {
                return true;
            }
            self.burst_left = FIFO_BYTES;
        }
        if let Some(byte) = self.queue.pop() {
            self.burst_left -= 1;
            port::write_u8(DATA, byte);
        }
        true
    }

    /// Sends all that waits, however long it takes: for the last words.
    pub fn flush(&mut self) {
        while self.step() {}
    }

    /// Lines dropped since the last call, because too many waited.
    pub fn take_dropped(&mut self) -> u64 {
        self.queue.take_dropped()
    }
}

/// Writes past the queue, for a guest that is about to end.
pub struct Emergency;

impl fmt::Write for Emergency {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            // A port that is not there, or stuck, must not keep the guest from ending.
            for _ in 0..1000 {
                if port::read_u8(LINE_STATUS) & TRANSMITTER_EMPTY != 0 {
                    break;
                }
            }
            port::write_u8(DATA, byte);
        }
        Ok(())
    }
}
