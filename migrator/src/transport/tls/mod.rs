//! TLS 1.3 between hosts, both sides with certificates.
//!
//! A fleet has a small certificate authority of its own. It certifies hosts, and nothing else. A host's certificate may in turn
//! sign, but only for the host's own names (name constraints, RFC 5280, section 4.2.1.10): so whoever moves a VM works with a key
//! that was made for it and is worth nothing on another host, and the host's key stays with the host. What a peer shows is
//! therefore always two certificates: its leaf, and the host's that signed it. Who the peer is says the second one.
//!
//! Where trust comes from is not known here: [`Credentials`] are given.

use std::fmt;
use std::io::{self, Read, Write};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustls::client::{Resumption, WebPkiServerVerifier};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer, ServerName};
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::{ClientConfig, ClientConnection, RootCertStore, ServerConfig, ServerConnection};
use serde::{Deserialize, Serialize};

use super::{ConnectError, TcpConnection};
use crate::options::Timeouts;
use crate::wire::preamble::{HEAD_BYTES, Preamble, Welcome, body_length};

mod connection;
mod flaw;

pub use connection::TlsConnection;
pub use flaw::Flaw;

/// A handshake that was refused is read on for so long, so that the reason arrives: closing at once could destroy it.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// Who this side is, and whom it trusts. All PEM (RFC 7468).
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Credentials {
    /// The leaf, then the certificate of the host that signed it.
    pub chain: String,
    /// The leaf's key.
    pub key: String,
    /// The fleet's authorities.
    pub roots: String,
    /// What they have revoked; may be empty.
    pub revoked: String,
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credentials").finish_non_exhaustive()
    }
}

/// Credentials that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum CredentialsError {
    /// Not what they should be.
    #[error("the {what} cannot be read")]
    Pem {
        /// Which part.
        what: &'static str,
        /// Why.
        #[source]
        source: rustls::pki_types::pem::Error,
    },
    /// TLS cannot be set up with them.
    #[error("TLS cannot be set up with these credentials")]
    Tls(#[source] Box<dyn std::error::Error + Send + Sync>),
}

/// Both ends of TLS, ready to be used by any number of connections.
#[derive(Clone)]
pub struct Tls {
    client: Arc<ClientConfig>,
    server: Arc<ServerConfig>,
}

impl fmt::Debug for Tls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tls").finish_non_exhaustive()
    }
}

/// Who is at the other end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// The host, as the fleet's authority calls it.
    pub host: String,
    leaf: CertificateDer<'static>,
}

impl Identity {
    /// Whether the host's certificate has this name or address.
    pub fn is_called(&self, name: &str) -> bool {
        let (Ok(name), Ok(leaf)) = (ServerName::try_from(name), webpki::EndEntityCert::try_from(&self.leaf)) else {
            return false;
        };
        leaf.verify_is_valid_for_subject_name(&name).is_ok()
    }
}

impl Tls {
    /// With these credentials.
    pub fn new(credentials: &Credentials) -> Result<Self, CredentialsError> {
        fn tls<E: std::error::Error + Send + Sync + 'static>(error: E) -> CredentialsError {
            CredentialsError::Tls(Box::new(error))
        }
        fn list<T: PemObject>(pem: &str, what: &'static str) -> Result<Vec<T>, CredentialsError> {
            T::pem_slice_iter(pem.as_bytes())
                .collect::<Result<_, _>>()
                .map_err(|source| CredentialsError::Pem { what, source })
        }
        let chain: Vec<CertificateDer<'static>> = list(&credentials.chain, "certificates")?;
        let key = PrivateKeyDer::from_pem_slice(credentials.key.as_bytes())
            .map_err(|source| CredentialsError::Pem { what: "key", source })?;
        let revoked: Vec<CertificateRevocationListDer<'static>> = list(&credentials.revoked, "revocation list")?;
        let mut roots = RootCertStore::empty();
        for root in list::<CertificateDer<'static>>(&credentials.roots, "authorities' certificates")? {
            roots.add(root).map_err(tls)?;
        }
        let roots = Arc::new(roots);
        let provider = Arc::new(provider());
        // Only the authorities publish what they revoked; nobody does for a host's short-lived leaves.
        let servers = WebPkiServerVerifier::builder_with_provider(roots.clone(), provider.clone())
            .with_crls(revoked.clone())
            .allow_unknown_revocation_status()
            .build()
            .map_err(tls)?;
        let clients = WebPkiClientVerifier::builder_with_provider(roots, provider.clone())
            .with_crls(revoked)
            .allow_unknown_revocation_status()
            .build()
            .map_err(tls)?;
        let mut client = ClientConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(tls)?
            .with_webpki_verifier(servers)
            .with_client_auth_cert(chain.clone(), key.clone_key())
            .map_err(tls)?;
        let mut server = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(tls)?
            .with_client_cert_verifier(clients)
            .with_single_cert(chain, key)
            .map_err(tls)?;
        // Every connection proves anew who is there.
        client.resumption = Resumption::disabled();
        server.session_storage = Arc::new(NoServerSessionStorage {});
        server.send_tls13_tickets = 0;
        Ok(Self { client: Arc::new(client), server: Arc::new(server) })
    }

    /// The dialling side, after the preamble: the peer must have the name that `connection` was dialled by.
    pub(super) fn connect(
        &self,
        connection: TcpConnection,
        preamble: &Preamble,
        timeouts: Timeouts,
    ) -> Result<TlsConnection, ConnectError> {
        let TcpConnection { stream, peer } = connection;
        let broken = |source| ConnectError::Broken { peer: peer.clone(), source };
        let name = ServerName::try_from(host_part(&peer).to_owned())
            .map_err(|error| broken(io::Error::new(io::ErrorKind::InvalidInput, error)))?;
        let tls = ClientConnection::new(self.client.clone(), name).map_err(|error| broken(io::Error::other(error)))?;
        let mut socket = Limited::new(&stream, timeouts.connect);
        let mut tls = rustls::Connection::Client(tls);
        let flawed = |error| flaw::explain(error, &peer, timeouts.connect, true);
        handshake(&mut tls, &mut socket).map_err(flawed)?;
        let host = sender(&tls).ok_or_else(|| ConnectError::Untrusted { peer: peer.clone(), flaw: Flaw::Chain })?;
        let answer = {
            let written = tls.writer().write_all(&preamble.encode(true)).and_then(|()| flush(&mut tls, &mut socket));
            written.map_err(flawed)?;
            // If the peer does not like our certificate, this is where we hear of it: it looks only after our last word of the
            // handshake.
            receive(&mut Inside { tls: &mut tls, socket: &mut socket }).map_err(flawed)?
        };
        match Welcome::decode(&answer) {
            Ok(Welcome::Accepted) => Ok(TlsConnection::new(tls, stream, peer, host)),
            Ok(Welcome::Refused(reason)) => Err(ConnectError::Refused { peer, reason }),
            Err(error) => Err(ConnectError::Protocol { peer, reason: error.to_string() }),
        }
    }

    /// The accepting side, after `preamble` was read and welcomed in clear text, here or by another process. The peer has proved
    /// who it is, and that this is the preamble that it sent.
    pub fn accept(
        &self,
        connection: TcpConnection,
        preamble: &Preamble,
        timeouts: Timeouts,
    ) -> Result<Authenticated, ConnectError> {
        let TcpConnection { stream, peer } = connection;
        let tls = ServerConnection::new(self.server.clone())
            .map_err(|error| ConnectError::Broken { peer: peer.clone(), source: io::Error::other(error) })?;
        let mut socket = Limited::new(&stream, timeouts.connect);
        let mut tls = rustls::Connection::Server(tls);
        let flawed = |error| flaw::explain(error, &peer, timeouts.connect, false);
        if let Err(error) = handshake(&mut tls, &mut socket) {
            socket.let_it_arrive();
            return Err(flawed(error));
        }
        let said = receive(&mut Inside { tls: &mut tls, socket: &mut socket }).map_err(flawed)?;
        let host = sender(&tls);
        let (same, well_formed) = (said == preamble.encode(true)[HEAD_BYTES..], host.is_some());
        let host = host.unwrap_or_else(|| Identity { host: String::new(), leaf: Vec::new().into() });
        let authenticated = Authenticated { connection: TlsConnection::new(tls, stream, peer, host) };
        match (same, well_formed) {
            (true, true) => Ok(authenticated),
            (false, _) => Err(authenticated.end("the preamble was changed on its way")),
            (_, false) => Err(authenticated.end("your certificate was not issued to a host of the fleet")),
        }
    }
}

/// A peer that has proved who it is, and waits for an answer. Answer it with `welcome` or `refuse`.
#[derive(Debug)]
pub struct Authenticated {
    connection: TlsConnection,
}

impl Authenticated {
    /// Who it is.
    pub fn identity(&self) -> &Identity {
        self.connection.identity()
    }

    /// Lets it go on.
    pub fn welcome(mut self) -> Result<TlsConnection, ConnectError> {
        self.say(&Welcome::Accepted).map(|()| self.connection)
    }

    /// Ends it, for this reason.
    pub fn refuse(mut self, reason: &str) -> Result<(), ConnectError> {
        self.say(&Welcome::Refused(reason.into()))?;
        self.connection.finish();
        Ok(())
    }

    fn say(&mut self, welcome: &Welcome) -> Result<(), ConnectError> {
        self.connection
            .write_all(&welcome.encode())
            .map_err(|source| ConnectError::Broken { peer: self.connection.address().into(), source })
    }

    fn end(self, reason: &str) -> ConnectError {
        let peer = self.connection.address().to_owned();
        let _ = self.refuse(reason);
        ConnectError::Protocol { peer, reason: reason.into() }
    }
}

/// ring, but for what is done with every byte of a guest's memory: AES-GCM of AWS-LC is up to twice as fast. Not all of AWS-LC,
/// whose random numbers take 50 ms to begin with, and look for files, which a process that runs a VM may not.
fn provider() -> CryptoProvider {
    let fast = rustls::crypto::aws_lc_rs::default_provider();
    let mut provider = rustls::crypto::ring::default_provider();
    provider.cipher_suites = fast.cipher_suites;
    // AES with a key of 128 bits first: ten rounds instead of fourteen.
    provider.cipher_suites.sort_by_key(|suite| suite.suite() != rustls::CipherSuite::TLS13_AES_128_GCM_SHA256);
    provider
}

/// `host:port` without the port and the brackets of an IPv6 address.
fn host_part(peer: &str) -> &str {
    let host = peer.rsplit_once(':').map_or(peer, |(host, _)| host);
    host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host)
}

/// Who the peer is, from the certificates that were just verified: exactly a leaf and the host's. With two there is only one path
/// that they can have been verified on, so the second one did sign.
fn sender(tls: &rustls::Connection) -> Option<Identity> {
    let Some([leaf, host]) = tls.peer_certificates() else { return None };
    let name = webpki::EndEntityCert::try_from(host).ok()?.valid_dns_names().next()?.to_owned();
    Some(Identity { host: name, leaf: leaf.clone().into_owned() })
}

fn handshake(tls: &mut rustls::Connection, socket: &mut Limited<'_>) -> io::Result<()> {
    while tls.is_handshaking() {
        if tls.complete_io(socket)? == (0, 0) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
    flush(tls, socket)
}

fn flush(tls: &mut rustls::Connection, socket: &mut Limited<'_>) -> io::Result<()> {
    while tls.wants_write() {
        tls.write_tls(socket)?;
    }
    Ok(())
}

/// A preamble or its answer, without its head.
fn receive(from: &mut impl Read) -> io::Result<Vec<u8>> {
    let invalid = |error| io::Error::new(io::ErrorKind::InvalidData, error);
    let mut head = [0; HEAD_BYTES];
    from.read_exact(&mut head)?;
    let mut body = vec![0; body_length(&head).map_err(invalid)?];
    from.read_exact(&mut body)?;
    Ok(body)
}

/// The inside of a connection that is not taken apart yet.
struct Inside<'a, 'b> {
    tls: &'a mut rustls::Connection,
    socket: &'a mut Limited<'b>,
}

impl Read for Inside<'_, '_> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.tls.reader().read(bytes) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                result => return result,
            }
            self.tls.read_tls(self.socket)?;
            self.tls.process_new_packets().map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
        }
    }
}

/// A socket that must be done with everything by a certain time, however little comes at once.
struct Limited<'a> {
    stream: &'a std::net::TcpStream,
    until: Instant,
}

impl<'a> Limited<'a> {
    fn new(stream: &'a std::net::TcpStream, limit: Duration) -> Self {
        Self { stream, until: Instant::now() + limit }
    }

    fn left(&self) -> io::Result<Duration> {
        match self.until.saturating_duration_since(Instant::now()) {
            Duration::ZERO => Err(io::ErrorKind::TimedOut.into()),
            left => Ok(left),
        }
    }

    /// Reads what still comes, for a moment.
    fn let_it_arrive(&mut self) {
        let _ = self.stream.shutdown(std::net::Shutdown::Write);
        self.until = self.until.min(Instant::now() + LAST_WORDS);
        let mut bytes = [0; 4096];
        while self.read(&mut bytes).is_ok_and(|count| count > 0) {}
    }
}

/// Kinder words for a timeout: rustls takes [`io::ErrorKind::WouldBlock`] for an invitation to go on.
fn timed_out(error: io::Error) -> io::Error {
    if super::is_timeout(&error) { io::ErrorKind::TimedOut.into() } else { error }
}

impl Read for Limited<'_> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        self.stream.set_read_timeout(Some(self.left()?))?;
        { self.stream }.read(bytes).map_err(timed_out)
    }
}

impl Write for Limited<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.stream.set_write_timeout(Some(self.left()?))?;
        { self.stream }.write(bytes).map_err(timed_out)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests;
