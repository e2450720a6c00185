//! TCP: dialling, accepting, and what can go wrong before the peers understand each other.
//!
//! A preamble is read to its last byte and not one further, because what follows may be for another process (an agent
//! hands the socket over) or for another layer (TLS).

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream, ToSocketAddrs};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::net::sockopt;

use crate::options::Timeouts;
use crate::traits::{Closer, Connection, ConnectionReader, ConnectionWriter, Dialer, Split};
use crate::wire::WireError;
use crate::wire::preamble::{HEAD_BYTES, MAGIC, Preamble, Welcome, body_length};

/// Why there is no connection to a microvm peer.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The name does not resolve.
    #[error("{peer}: no such host")]
    Resolve {
        /// Whom.
        peer: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// No TCP connection.
    #[error("{peer}: cannot connect")]
    Tcp {
        /// Whom.
        peer: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Nothing came, or not everything, in time.
    #[error("{peer} is connected, but said nothing for {waited:?}")]
    Silent {
        /// Who.
        peer: String,
        /// How long.
        waited: Duration,
    },
    /// Something else is listening there.
    #[error("{peer} answers, but not with the microvm protocol (got {got:?})")]
    NotMicrovm {
        /// Who.
        peer: String,
        /// Its first bytes.
        got: String,
    },
    /// The connection ended meanwhile.
    #[error("{peer}: the connection broke")]
    Broken {
        /// Who.
        peer: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The peer will not talk with us, and says why (another protocol version, an unknown migration).
    #[error("{peer} refuses: {reason}")]
    Refused {
        /// Who.
        peer: String,
        /// Its sentence.
        reason: String,
    },
    /// The peer's bytes make no sense.
    #[error("{peer} broke the protocol: {reason}")]
    Protocol {
        /// Who.
        peer: String,
        /// What is wrong.
        reason: String,
    },
}

impl ConnectError {
    /// What the user might do next.
    pub fn hint(&self) -> String {
        match self {
            Self::Resolve { .. } => "check the host's name".into(),
            Self::Tcp { peer, .. } => format!("is `microvm agent` running on {peer}?"),
            Self::Silent { .. } | Self::NotMicrovm { .. } => {
                "check the port: the agent listens on 7437 unless told otherwise".into()
            }
            Self::Broken { .. } | Self::Protocol { .. } => "look at the log of the destination's agent".into(),
            Self::Refused { .. } => "run the same version of microvm on both hosts, and migrate again".into(),
        }
    }
}

/// Dials one destination over TCP.
#[derive(Clone, Debug)]
pub struct TcpDialer {
    peer: String,
    timeouts: Timeouts,
    addresses: Option<Result<Vec<SocketAddr>, String>>,
}

impl TcpDialer {
    /// For `host:port`.
    pub fn new(peer: impl Into<String>, timeouts: Timeouts) -> Self {
        Self { peer: peer.into(), timeouts, addresses: None }
    }

    /// Takes these addresses (or, instead of them, why there are none) and never looks the name up: for a process that cannot.
    pub fn with_addresses(self, addresses: Result<Vec<SocketAddr>, String>) -> Self {
        Self { addresses: Some(addresses), ..self }
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
        greeting.send(&preamble.encode())?;
        match Welcome::decode(&greeting.receive()?) {
            Ok(Welcome::Accepted) => Ok(Box::new(TcpConnection { stream: greeting.stream, peer: greeting.peer })),
            Ok(Welcome::Refused(reason)) => Err(ConnectError::Refused { peer: greeting.peer, reason }),
            Err(error) => Err(greeting.confused(error)),
        }
    }
}

/// A connection that came in, with its preamble. Answer it with `welcome` or `refuse`.
#[derive(Debug)]
pub struct Accepted {
    /// What it is for.
    pub preamble: Preamble,
    greeting: Greeting,
}

/// Reads the preamble of a connection that came in. Whoever speaks another version of the protocol is told so.
pub fn accept(stream: TcpStream, timeouts: Timeouts) -> Result<Accepted, ConnectError> {
    let peer = stream.peer_addr().map_or_else(|_| "a peer".into(), |address| address.to_string());
    let greeting = Greeting::new(stream, peer, timeouts)?;
    match Preamble::decode(&greeting.receive()?) {
        Ok(preamble) => Ok(Accepted { preamble, greeting }),
        Err(error) => {
            let _ = greeting.send(&Welcome::Refused(error.to_string()).encode());
            Err(greeting.confused(error))
        }
    }
}

impl Accepted {
    /// Who connected.
    pub fn peer(&self) -> &str {
        &self.greeting.peer
    }

    /// Lets it go on.
    pub fn welcome(self) -> Result<TcpConnection, ConnectError> {
        self.greeting.send(&Welcome::Accepted.encode())?;
        Ok(TcpConnection { stream: self.greeting.stream, peer: self.greeting.peer })
    }

    /// Ends it, for this reason.
    pub fn refuse(self, reason: &str) -> Result<(), ConnectError> {
        self.greeting.send(&Welcome::Refused(reason.into()).encode())
    }
}

/// A connection whose preamble is being exchanged.
#[derive(Debug)]
struct Greeting {
    stream: TcpStream,
    peer: String,
    limit: Duration,
    until: Instant,
}

impl Greeting {
    fn new(stream: TcpStream, peer: String, timeouts: Timeouts) -> Result<Self, ConnectError> {
        let limit = timeouts.connect;
        let greeting = Self { stream, peer, limit, until: Instant::now() + limit };
        set_up(&greeting.stream, timeouts).map_err(|source| greeting.broken(source))?;
        greeting.stream.set_write_timeout(Some(limit)).map_err(|source| greeting.broken(source))?;
        Ok(greeting)
    }

    fn send(&self, bytes: &[u8]) -> Result<(), ConnectError> {
        (&self.stream).write_all(bytes).map_err(|source| self.broken(source))
    }

    /// The body of the peer's preamble or answer.
    fn receive(&self) -> Result<Vec<u8>, ConnectError> {
        let mut head = [0; HEAD_BYTES];
        self.fill(&mut head, Some(&MAGIC))?;
        let length = body_length(&head).map_err(|error| self.confused(error))?;
        let mut body = vec![0; length];
        self.fill(&mut body, None)?;
        Ok(body)
    }

    /// Reads so many bytes within the time limit for all of them. Those that differ from what is expected end it at once:
    /// whatever else listens on this port need not send as many as we wait for.
    fn fill(&self, bytes: &mut [u8], expected: Option<&[u8]>) -> Result<(), ConnectError> {
        let mut at = 0;
        while at < bytes.len() {
            let left = self.until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(self.silent());
            }
            self.stream.set_read_timeout(Some(left)).map_err(|source| self.broken(source))?;
            match (&self.stream).read(&mut bytes[at..]) {
                Ok(0) => {
                    let source = io::Error::new(io::ErrorKind::UnexpectedEof, "it was closed without an answer");
                    return Err(self.broken(source));
                }
                Ok(count) => at += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if is_timeout(&error) => return Err(self.silent()),
                Err(error) => return Err(self.broken(error)),
            }
            if let Some(expected) = expected {
                let known = at.min(expected.len());
                if bytes[..known] != expected[..known] {
                    return Err(self.not_microvm(&bytes[..at]));
                }
            }
        }
        Ok(())
    }

    /// Something else listens there. What it says first is the best hint as to what it is.
    fn not_microvm(&self, start: &[u8]) -> ConnectError {
        let mut more = [0; 70];
        let _ = self.stream.set_read_timeout(Some(Duration::from_millis(200)));
        let count = (&self.stream).read(&mut more).unwrap_or(0);
        let bytes = [start, &more[..count]].concat();
        let line = bytes.split(|byte| matches!(byte, b'\r' | b'\n')).next().unwrap_or_default();
        ConnectError::NotMicrovm { peer: self.peer.clone(), got: String::from_utf8_lossy(line).into_owned() }
    }

    fn broken(&self, source: io::Error) -> ConnectError {
        ConnectError::Broken { peer: self.peer.clone(), source }
    }

    fn silent(&self) -> ConnectError {
        ConnectError::Silent { peer: self.peer.clone(), waited: self.limit }
    }

    fn confused(&self, error: WireError) -> ConnectError {
        let (peer, reason) = (self.peer.clone(), error.to_string());
        match error {
            WireError::Version { .. } => ConnectError::Refused { peer, reason },
            _ => ConnectError::Protocol { peer, reason },
        }
    }
}

/// Socket options that every connection has: no Nagle, and the kernel's own watch for dead peers behind ours.
fn set_up(stream: &TcpStream, timeouts: Timeouts) -> io::Result<()> {
    stream.set_nodelay(true)?;
    stream.set_nonblocking(false)?;
    sockopt::set_socket_keepalive(stream, true)?;
    sockopt::set_tcp_keepidle(stream, timeouts.dead_after.max(Duration::from_secs(1)))?;
    sockopt::set_tcp_keepintvl(stream, timeouts.keepalive.max(Duration::from_secs(1)))?;
    sockopt::set_tcp_keepcnt(stream, 3)?;
    Ok(())
}

/// Whether a blocking call gave up for want of time.
pub(crate) fn is_timeout(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut)
}

/// A TCP connection after its preamble.
#[derive(Debug)]
pub struct TcpConnection {
    stream: TcpStream,
    peer: String,
}

impl TcpConnection {
    /// From a socket whose preamble was exchanged elsewhere (by the agent that handed it over).
    pub fn new(stream: TcpStream, timeouts: Timeouts) -> io::Result<Self> {
        set_up(&stream, timeouts)?;
        let peer = stream.peer_addr()?.to_string();
        Ok(Self { stream, peer })
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

struct TcpHalf(TcpStream);

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
