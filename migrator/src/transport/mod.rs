//! Connections between hosts: TCP, TLS on it, and what can go wrong before the peers understand each other.
//!
//! A preamble is read to its last byte and not one further, because what follows may be for another process (an agent
//! hands the socket over) or for another layer (TLS).

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use rustix::net::sockopt;
use socket2::SockRef;

use crate::options::Timeouts;
use crate::wire::preamble::{HEAD_BYTES, MAGIC, Preamble, Welcome, body_length};
use crate::wire::{VERSION, WireError};

mod tcp;
pub mod tls;

pub use tcp::{TcpConnection, TcpDialer};
use tls::Flaw;

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
    /// The peer speaks another version of the protocol.
    #[error("{peer} speaks version {theirs} of the migration protocol, this host version {VERSION}")]
    Version {
        /// Who.
        peer: String,
        /// Its version.
        theirs: u16,
    },
    /// The peer's certificate is not good.
    #[error("{peer} is not trusted: its certificate {flaw}")]
    Untrusted {
        /// Who.
        peer: String,
        /// What is wrong with it.
        flaw: Flaw,
    },
    /// This host's certificate is not good enough for the peer.
    #[error("{peer} does not trust this host: its certificate {flaw}")]
    NotTrusted {
        /// Who.
        peer: String,
        /// What the peer does not like.
        flaw: Flaw,
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
            Self::Version { .. } => "run the same version of microvm on both hosts, and migrate again".into(),
            // Whoever refuses says what to do in the same sentence.
            Self::Refused { .. } => String::new(),
            Self::Untrusted { peer, flaw } => flaw.hint(peer),
            Self::NotTrusted { flaw, .. } => flaw.hint("this host"),
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

/// Reads the preamble of a connection that came in in clear text. Whoever speaks another version of the protocol, or wants TLS,
/// is told so.
pub fn accept(stream: TcpStream, timeouts: Timeouts) -> Result<Accepted, ConnectError> {
    accept_if(stream, timeouts, false)
}

/// Likewise where TLS must follow ([`tls::Tls::accept`], after `welcome`). Whoever wants to go on in clear text is told so.
pub fn accept_tls(stream: TcpStream, timeouts: Timeouts) -> Result<Accepted, ConnectError> {
    accept_if(stream, timeouts, true)
}

fn accept_if(stream: TcpStream, timeouts: Timeouts, must: bool) -> Result<Accepted, ConnectError> {
    let peer = stream.peer_addr().map_or_else(|_| "a peer".into(), |address| address.to_string());
    let greeting = Greeting::new(stream, peer, timeouts)?;
    let refused = match Preamble::decode(&greeting.receive()?) {
        Ok((preamble, tls)) if tls == must => return Ok(Accepted { preamble, greeting }),
        Ok((_, true)) => {
            "this host takes connections in clear text only: it has no certificate (set up trust there, with \
                          microvm trust), or its agent was started with --insecure-plaintext"
                .into()
        }
        Ok((_, false)) => {
            "this host takes encrypted connections only: join its fleet (microvm trust issue on the CA's host, microvm \
                           trust import on yours), and leave --insecure-plaintext away"
                .into()
        }
        Err(error) => {
            let _ = greeting.send(&Welcome::Refused(error.to_string()).encode());
            return Err(greeting.confused(error));
        }
    };
    let _ = greeting.send(&Welcome::Refused(refused).encode());
    let reason = if must { "it does not encrypt" } else { "it wants to encrypt" };
    Err(ConnectError::Protocol { peer: greeting.peer, reason: reason.into() })
}

impl Accepted {
    /// Who connected.
    pub fn peer(&self) -> &str {
        &self.greeting.peer
    }

    /// Lets it go on.
    pub fn welcome(self) -> Result<TcpConnection, ConnectError> {
        self.greeting.send(&Welcome::Accepted.encode())?;
        Ok(TcpConnection::after(self.greeting))
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
        let got = match bytes.as_slice() {
            // RFC 8446, section 5.1: a handshake record.
            [22, 3, ..] => "a TLS handshake, without a preamble".into(),
            _ => String::from_utf8_lossy(line).into_owned(),
        };
        ConnectError::NotMicrovm { peer: self.peer.clone(), got }
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
            WireError::Version { theirs } => ConnectError::Version { peer, theirs },
            _ => ConnectError::Protocol { peer, reason },
        }
    }
}

/// The most that the kernel takes from us ahead of what it may send: enough for a link of 10 Gb/s for 200 µs. All beyond it
/// would only wait there, stale and uncounted, and hide how slow the link is from whoever measures it by its writes.
const UNSENT_BYTES: u32 = 256 << 10;

/// Socket options that every connection has: no Nagle, little that waits unsent, and the kernel's own watch for dead peers behind
/// ours.
fn set_up(stream: &TcpStream, timeouts: Timeouts) -> io::Result<()> {
    stream.set_nodelay(true)?;
    SockRef::from(stream).set_tcp_notsent_lowat(UNSENT_BYTES)?;
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
