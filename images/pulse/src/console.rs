//! Lines on their way to the serial port.
//!
//! Each byte on a serial port is an exit from the guest, and a line written in one go would be a hole in the guest's
//! own time that it then reports. So lines wait here and leave a byte a step. Only whole lines enter: a reader may lose
//! lines, and is told how many, but never sees half of one.

/// A queue of bytes that holds `N` at most.
#[derive(Debug)]
pub struct LineQueue<const N: usize> {
    bytes: [u8; N],
    head: usize,
    len: usize,
    dropped: u64,
}

impl<const N: usize> LineQueue<N> {
    /// An empty queue.
    pub const fn new() -> Self {
        Self { bytes: [0; N], head: 0, len: 0, dropped: 0 }
    }

    /// Adds `line` and a newline, or counts it as dropped when it does not fit.
    pub fn push_line(&mut self, line: &[u8]) {
        if line.len() + 1 > N - self.len {
            self.dropped += 1;
            return;
        }
        for &byte in line.iter().chain(b"\n") {
            self.bytes[(self.head + self.len) % N] = byte;
            self.len += 1;
        }
    }

    /// The next byte to send.
    pub fn pop(&mut self) -> Option<u8> {
        if self.len == 0 {
            return None;
        }
        let byte = self.bytes[self.head];
        self.head = (self.head + 1) % N;
        self.len -= 1;
        Some(byte)
    }

    /// Whether nothing waits.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Lines dropped since the last call.
    pub fn take_dropped(&mut self) -> u64 {
        core::mem::take(&mut self.dropped)
    }
}

impl<const N: usize> Default for LineQueue<N> {
    fn default() -> Self {
        Self::new()
    }
}

/// Lets through so many events a second, and counts the others.
#[derive(Debug)]
pub struct Limiter {
    a_second: u32,
    left: u32,
    second: u64,
    suppressed: u64,
}

impl Limiter {
    /// A limiter of `a_second` events a second.
    pub const fn new(a_second: u32) -> Self {
        Self { a_second, left: a_second, second: 0, suppressed: 0 }
    }

    /// Whether an event at `now_ns` may pass.
    pub fn admit(&mut self, now_ns: u64) -> bool {
        let second = now_ns / 1_000_000_000;
        if second != self.second {
            self.second = second;
            self.left = self.a_second;
        }
        if self.left == 0 {
            self.suppressed += 1;
            return false;
        }
        self.left -= 1;
        true
    }

    /// Events held back since the last call.
    pub fn take_suppressed(&mut self) -> u64 {
        core::mem::take(&mut self.suppressed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drain<const N: usize>(queue: &mut LineQueue<N>) -> String {
        core::iter::from_fn(|| queue.pop()).map(char::from).collect()
    }

    #[test]
    fn whole_lines_or_none() {
        let mut queue = LineQueue::<8>::new();
        for _ in 0..5 {
            queue.push_line(b"abc");
            queue.push_line(b"def");
            queue.push_line(b"");
            assert_eq!(queue.take_dropped(), 1);
            assert_eq!(drain(&mut queue), "abc\ndef\n");
            assert!(queue.is_empty());
            queue.push_line(b"1234567");
            queue.pop();
            queue.push_line(b"x");
            assert_eq!(queue.take_dropped(), 1);
            drain(&mut queue);
        }
    }

    #[test]
    fn a_storm_is_counted_and_not_printed() {
        let mut limiter = Limiter::new(2);
        let passed = (0..100).filter(|_| limiter.admit(5)).count();
        assert_eq!((passed, limiter.take_suppressed(), limiter.take_suppressed()), (2, 98, 0));
        assert!(limiter.admit(1_000_000_000));
    }
}
