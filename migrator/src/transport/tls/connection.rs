//! A TLS connection used by two threads.
//!
//! One rustls connection, behind a lock that is held only while bytes are transformed, never while anybody waits for a socket: what
//! is read from the socket is decrypted under the lock, what is encrypted under the lock is written after it. Only the writing half
//! writes to the socket, so records keep their order. An alert or a key update that the reading half gives rise to goes out with the
//! next bytes that are written. Once the reading half is gone, as in page streams, the writing half has the connection to itself, and
//! records go from rustls to the socket without another copy.

use std::fmt;
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::super::tcp::send_now;
use super::Identity;
use super::timed_out;
use crate::traits::{Closer, Connection, ConnectionReader, ConnectionWriter, Split};

/// The most that is encrypted at once while the reading half may want the lock: a short turn.
const WRITE_BYTES: usize = 256 << 10;
/// The most that is read from the socket at once.
const READ_BYTES: usize = 128 << 10;

/// A connection after its TLS handshake.
pub struct TlsConnection {
    tls: rustls::Connection,
    pub(super) stream: TcpStream,
    /// As it was dialled, or its address.
    address: String,
    identity: Identity,
}

impl fmt::Debug for TlsConnection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TlsConnection").field("identity", &self.identity.host).finish_non_exhaustive()
    }
}

impl TlsConnection {
    pub(super) fn new(mut tls: rustls::Connection, stream: TcpStream, address: String, identity: Identity) -> Self {
        // The buffer is emptied after each write.
        tls.set_buffer_limit(None);
        Self { tls, stream, address, identity }
    }

    /// Who is at the other end.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    pub(super) fn address(&self) -> &str {
        &self.address
    }

    pub(super) fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        let mut out = Vec::new();
        encrypt(&mut self.tls, bytes, &mut out)?;
        self.stream.write_all(&out)
    }

    /// Says that nothing more comes, and lets it arrive.
    pub(super) fn finish(&mut self) {
        self.tls.send_close_notify();
        let mut out = Vec::new();
        let _ = drain(&mut self.tls, &mut out).and_then(|()| self.stream.write_all(&out));
        super::Limited::new(&self.stream, super::LAST_WORDS).let_it_arrive();
    }
}

/// Writes all that waits to `out`.
fn drain(tls: &mut rustls::Connection, out: &mut dyn Write) -> io::Result<()> {
    while tls.wants_write() {
        match tls.write_tls(out) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            written => _ = written?,
        }
    }
    Ok(())
}

/// Writes the records of `bytes`, and whatever else waits, to `out`.
fn encrypt(tls: &mut rustls::Connection, bytes: &[u8], out: &mut dyn Write) -> io::Result<()> {
    tls.writer().write_all(bytes)?;
    drain(tls, out)
}

impl Connection for TlsConnection {
    fn peer(&self) -> String {
        self.address.clone()
    }

    fn split(self: Box<Self>) -> io::Result<Split> {
        let tls = Arc::new(Mutex::new(self.tls));
        let (reading, writing) = (self.stream.try_clone()?, self.stream.try_clone()?);
        Ok(Split {
            reader: Box::new(TlsReader {
                tls: tls.clone(),
                socket: reading,
                timeout: Mutex::new(None),
                received: vec![0; READ_BYTES].into_boxed_slice(),
                unread: 0..0,
                ended: false,
                limited: true,
            }),
            writer: Box::new(TlsWriter { tls, socket: writing, out: Vec::new(), broken: false }),
            closer: Arc::new(SocketCloser(self.stream)),
        })
    }
}

fn lock(tls: &Mutex<rustls::Connection>) -> MutexGuard<'_, rustls::Connection> {
    tls.lock().unwrap_or_else(PoisonError::into_inner)
}

struct TlsReader {
    tls: Arc<Mutex<rustls::Connection>>,
    socket: TcpStream,
    /// How long one read may take altogether.
    timeout: Mutex<Option<Duration>>,
    /// What came from the socket.
    received: Box<[u8]>,
    /// Of it, what TLS has not taken yet.
    unread: std::ops::Range<usize>,
    /// The socket is at its end.
    ended: bool,
    /// The socket may have a timeout.
    limited: bool,
}

impl TlsReader {
    /// Decrypts into `bytes` as much as is there. None: more must come from the socket first.
    fn decrypt(&mut self, bytes: &mut [u8]) -> io::Result<Option<usize>> {
        let mut tls = lock(&self.tls);
        let mut done = 0;
        loop {
            match tls.reader().read(&mut bytes[done..]) {
                // The peer has said that nothing more comes.
                Ok(0) => return Ok(Some(done)),
                Ok(count) => done += count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(_) if done > 0 => return Ok(Some(done)),
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                    return Err(io::Error::new(io::ErrorKind::ConnectionAborted, "the connection was cut"));
                }
                Err(error) => return Err(error),
            }
            if done == bytes.len() {
                return Ok(Some(done));
            }
            let mut unread = &self.received[self.unread.clone()];
            if unread.is_empty() && !self.ended {
                return Ok((done > 0).then_some(done));
            }
            self.unread.start += tls.read_tls(&mut unread)?;
            tls.process_new_packets().map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
        }
    }
}

impl Read for TlsReader {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        if bytes.is_empty() {
            return Ok(0);
        }
        let timeout = *self.timeout.lock().unwrap_or_else(PoisonError::into_inner);
        let until = timeout.map(|timeout| Instant::now() + timeout);
        loop {
            if let Some(count) = self.decrypt(bytes)? {
                return Ok(count);
            }
            // A record may come in any number of pieces: the limit is for all of them.
            let left = until.map(|until| until.saturating_duration_since(Instant::now()));
            if left.is_some_and(|left| left.is_zero()) {
                return Err(io::ErrorKind::TimedOut.into());
            }
            // Each call counts: pages come without a limit.
            if left.is_some() || self.limited {
                self.socket.set_read_timeout(left)?;
                self.limited = left.is_some();
            }
            let count = self.socket.read(&mut self.received).map_err(timed_out)?;
            self.ended = count == 0;
            self.unread = 0..count;
        }
    }
}

impl ConnectionReader for TlsReader {
    fn set_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        *self.timeout.lock().unwrap_or_else(PoisonError::into_inner) = timeout;
        Ok(())
    }

    fn socket(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}

struct TlsWriter {
    tls: Arc<Mutex<rustls::Connection>>,
    socket: TcpStream,
    /// Records on their way to the socket.
    out: Vec<u8>,
    /// A write failed, perhaps in the middle of a record: nothing that follows could be understood.
    broken: bool,
}

impl Write for TlsWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.broken {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        if let Some(tls) = Arc::get_mut(&mut self.tls) {
            let tls = tls.get_mut().unwrap_or_else(PoisonError::into_inner);
            let written = self.socket.write_all(&self.out).and_then(|()| encrypt(tls, bytes, &mut self.socket));
            self.out.clear();
            self.broken |= written.is_err();
            return written.map(|()| bytes.len());
        }
        let bytes = &bytes[..bytes.len().min(WRITE_BYTES)];
        encrypt(&mut lock(&self.tls), bytes, &mut self.out)?;
        self.flush().map(|()| bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        let written = self.socket.write_all(&self.out);
        self.out.clear();
        self.broken |= written.is_err();
        written
    }
}

impl ConnectionWriter for TlsWriter {
    fn set_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        self.socket.set_write_timeout(timeout)
    }

    fn socket(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn write_now(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.broken || self.waits() {
            return Ok(0);
        }
        let bytes = &bytes[..bytes.len().min(WRITE_BYTES)];
        encrypt(&mut lock(&self.tls), bytes, &mut self.out)?;
        let sent = send_now(&self.socket, &self.out).inspect_err(|_| self.broken = true)?;
        self.out.drain(..sent);
        Ok(bytes.len())
    }

    fn waits(&self) -> bool {
        !self.out.is_empty()
    }

    fn finish(&self) -> io::Result<()> {
        if !self.broken {
            let mut out = Vec::new();
            {
                let mut tls = lock(&self.tls);
                tls.send_close_notify();
                drain(&mut tls, &mut out)?;
            }
            { &self.socket }.write_all(&out)?;
        }
        self.socket.shutdown(Shutdown::Write)
    }
}

struct SocketCloser(TcpStream);

impl Closer for SocketCloser {
    fn close(&self) {
        // It may be closed already, from either end.
        let _ = self.0.shutdown(Shutdown::Both);
    }
}
