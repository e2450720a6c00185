//! TCP: dialling, and the two halves of a connection in clear text.

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream, ToSocketAddrs};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::SendFlags;

use super::tls::Tls;
use super::{ConnectError, Greeting, set_up};
use crate::options::Timeouts;
use crate::traits::{Closer, Connection, ConnectionReader, ConnectionWriter, Dialer, Split};
use crate::wire::preamble::{Preamble, Welcome};

/// Dials one destination over TCP, in clear text or with TLS.
#[derive(Clone, Debug)]
pub struct TcpDialer {
    peer: String,
    timeouts: Timeouts,
    addresses: Option<Result<Vec<SocketAddr>, String>>,
    tls: Option<Tls>,
}

impl TcpDialer {
    /// For `host:port`, in clear text.
    pub fn new(peer: impl Into<String>, timeouts: Timeouts) -> Self {
        Self { peer: peer.into(), timeouts, addresses: None, tls: None }
    }

    /// Takes these addresses (or, instead of them, why there are none) and never looks the name up: for a process that cannot.
    pub fn with_addresses(self, addresses: Result<Vec<SocketAddr>, String>) -> Self {
        Self { addresses: Some(addresses), ..self }
    }

    /// With TLS: whoever answers must prove to be the host that is dialled.
    pub fn with_tls(self, tls: Tls) -> Self {
        Self { tls: Some(tls), ..self }
    }

    fn connect(&self) -> Result<TcpStream, ConnectError> {
        let peer = || self.peer.clone();
        let addresses = match &self.addresses {
            Some(known) => known.clone().map_err(io::Error::other),
            None => self.peer.to_socket_addrs().map(Iterator::collect),
        };
        let addresses = addresses.map_err(|source| ConnectError::Resolve { peer: peer(), source })?;
        let mut failure = io::Error::new(io::ErrorKind::NotFound, "the name has no addresses");
        for address in addresses {
            match TcpStream::connect_timeout(&address, self.timeouts.connect) {
                Ok(stream) => return Ok(stream),
                Err(error) => failure = error,
            }
        }
        Err(ConnectError::Tcp { peer: peer(), source: failure })
    }
}

impl Dialer for TcpDialer {
    fn peer(&self) -> String {
        self.peer.clone()
    }

    fn dial(&self, preamble: &Preamble) -> Result<Box<dyn Connection>, ConnectError> {
        let greeting = Greeting::new(self.connect()?, self.peer.clone(), self.timeouts)?;
        greeting.send(&preamble.encode(self.tls.is_some()))?;
        match Welcome::decode(&greeting.receive()?) {
            Ok(Welcome::Accepted) => {}
            Ok(Welcome::Refused(reason)) => return Err(ConnectError::Refused { peer: greeting.peer, reason }),
            Err(error) => return Err(greeting.confused(error)),
        }
        let connection = TcpConnection::after(greeting);
        match &self.tls {
            None => Ok(Box::new(connection)),
            Some(tls) => Ok(Box::new(tls.connect(connection, preamble, self.timeouts)?)),
        }
    }
}

/// A TCP connection after its preamble.
#[derive(Debug)]
pub struct TcpConnection {
    pub(super) stream: TcpStream,
    pub(super) peer: String,
}

impl TcpConnection {
    /// From a socket whose preamble was exchanged elsewhere (by the agent that handed it over).
    pub fn new(stream: TcpStream, timeouts: Timeouts) -> io::Result<Self> {
        set_up(&stream, timeouts)?;
        let peer = stream.peer_addr()?.to_string();
        Ok(Self { stream, peer })
    }

    pub(super) fn after(greeting: Greeting) -> Self {
        Self { stream: greeting.stream, peer: greeting.peer }
    }

    /// The socket, to hand it over. Nothing beyond the preamble has been read from it.
    pub fn into_stream(self) -> TcpStream {
        self.stream
    }
}

impl Connection for TcpConnection {
    fn peer(&self) -> String {
        self.peer.clone()
    }

    fn split(self: Box<Self>) -> io::Result<Split> {
        Ok(Split {
            reader: Box::new(TcpHalf(self.stream.try_clone()?)),
            writer: Box::new(TcpHalf(self.stream.try_clone()?)),
            closer: Arc::new(TcpHalf(self.stream)),
        })
    }
}

/// Sends as many bytes as the socket has room for, and says how many.
pub(super) fn send_now(stream: &TcpStream, bytes: &[u8]) -> io::Result<usize> {
    match rustix::net::send(stream, bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
        Err(Errno::WOULDBLOCK | Errno::INTR) => Ok(0),
        sent => Ok(sent?),
    }
}

pub(super) struct TcpHalf(pub(super) TcpStream);

impl Read for TcpHalf {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        self.0.read(bytes)
    }
}

impl Write for TcpHalf {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl ConnectionReader for TcpHalf {
    fn set_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        self.0.set_read_timeout(timeout)
    }

    fn socket(&self) -> Option<BorrowedFd<'_>> {
        Some(self.0.as_fd())
    }
}

impl ConnectionWriter for TcpHalf {
    fn set_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        self.0.set_write_timeout(timeout)
    }

    fn socket(&self) -> Option<BorrowedFd<'_>> {
        Some(self.0.as_fd())
    }

    fn write_now(&mut self, bytes: &[u8]) -> io::Result<usize> {
        send_now(&self.0, bytes)
    }

    fn finish(&self) -> io::Result<()> {
        self.0.shutdown(Shutdown::Write)
    }
}

impl Closer for TcpHalf {
    fn close(&self) {
        // It may be closed already, from either end.
        let _ = self.0.shutdown(Shutdown::Both);
    }
}
