//! How the agent hands a migration's connections to the process that receives the VM: the sockets themselves, over a Unix socket
//! (SCM_RIGHTS), each with three bytes that say what it is: its role, and the number of its page stream, little-endian.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::net::TcpStream;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, mpsc};
use std::thread;

use migrator::options::Timeouts;
use migrator::transport::tls::{Tls, TlsConnection};
use migrator::transport::{ConnectError, TcpConnection};
use migrator::wire::preamble::{Preamble, Role};
use migrator::{Arrived, MigrationId};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
    recvmsg, sendmsg,
};

/// Hands over `connection`, its preamble read and answered.
pub fn hand_over(to: &UnixStream, connection: &TcpStream, role: Role, stream: u16) -> io::Result<()> {
    let [low, high] = stream.to_le_bytes();
    let label = [role as u8, low, high];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let fds = [connection.as_fd()];
    control.push(SendAncillaryMessage::ScmRights(&fds));
    sendmsg(to, &[IoSlice::new(&label)], &mut control, SendFlags::NOSIGNAL)?;
    Ok(())
}

/// What a migration's connections must prove.
pub struct Security {
    /// With what.
    pub tls: Tls,
    /// That they belong to this migration.
    pub id: MigrationId,
    /// That they come from the host that offered it.
    pub host: String,
}

/// Handshakes at once: the most connections of one migration, and a few strangers who wait for their time to be over.
const MAX_HANDSHAKES: usize = 32;

/// Takes connections from `from` until the agent closes it. With `security`, each is asked for its proof first, on a thread of its own.
pub fn take_over(
    from: UnixStream,
    security: Option<Security>,
    timeouts: Timeouts,
) -> io::Result<mpsc::Receiver<Arrived>> {
    let (sender, receiver) = mpsc::channel();
    let security = security.map(Arc::new);
    let handshakes = Arc::new(AtomicUsize::new(0));
    thread::Builder::new().name("connections".into()).spawn(move || {
        loop {
            let (role, stream, connection) = match take_one(&from, timeouts) {
                Ok(Some(taken)) => taken,
                Ok(None) => return,
                Err(error) => return tracing::warn!(%error, "the agent's connections end"),
            };
            let Some(security) = &security else {
                if sender.send(Arrived { role, stream, connection: Box::new(connection) }).is_err() {
                    return;
                }
                continue;
            };
            if handshakes.fetch_add(1, Ordering::SeqCst) >= MAX_HANDSHAKES {
                handshakes.fetch_sub(1, Ordering::SeqCst);
                tracing::warn!("a connection was turned away: {MAX_HANDSHAKES} have not proved yet who they are");
                continue;
            }
            let (security, sender, handshakes) = (security.clone(), sender.clone(), handshakes.clone());
            let proving = thread::Builder::new().name("handshake".into()).spawn(move || {
                match security.prove(connection, role, stream, timeouts) {
                    // If nobody waits for it any more, it ends.
                    Ok(connection) => drop(sender.send(Arrived { role, stream, connection: Box::new(connection) })),
                    Err(error) => tracing::warn!("a connection was turned away: {}", migrator::report::chain(&error)),
                }
                handshakes.fetch_sub(1, Ordering::SeqCst);
            });
            if let Err(error) = proving {
                tracing::warn!(%error, "a connection was turned away");
            }
        }
    })?;
    Ok(receiver)
}

impl Security {
    fn prove(
        &self,
        connection: TcpConnection,
        role: Role,
        stream: u16,
        timeouts: Timeouts,
    ) -> Result<TlsConnection, ConnectError> {
        let peer = self.tls.accept(connection, &Preamble { role, stream, id: self.id }, timeouts)?;
        let host = &peer.identity().host;
        if *host != self.host {
            let reason = format!("this is a migration from {}, not from {host}", self.host);
            let peer_name = host.clone();
            peer.refuse(&reason)?;
            return Err(ConnectError::Protocol { peer: peer_name, reason });
        }
        peer.welcome()
    }
}

fn take_one(from: &UnixStream, timeouts: Timeouts) -> io::Result<Option<(Role, u16, TcpConnection)>> {
    let mut label = [0; 3];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = recvmsg(from, &mut [IoSliceMut::new(&mut label)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
    let fd: Option<OwnedFd> = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
        _ => None,
    });
    let Some(fd) = fd else { return Ok(None) };
    let role = [Role::Control, Role::Pages].into_iter().find(|role| *role as u8 == label[0]);
    let role = role.filter(|_| received.bytes == label.len()).ok_or(io::ErrorKind::InvalidData)?;
    let connection = TcpConnection::new(TcpStream::from(fd), timeouts)?;
    Ok(Some((role, u16::from_le_bytes([label[1], label[2]]), connection)))
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    #[test]
    fn a_connection_changes_hands() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let dialled = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (accepted, _) = listener.accept().unwrap();
        let (ours, theirs) = UnixStream::pair().unwrap();
        let arrivals = take_over(theirs, None, Timeouts::default()).unwrap();
        hand_over(&ours, &accepted, Role::Pages, 3).unwrap();
        drop(accepted);
        let arrived = arrivals.recv().unwrap();
        assert_eq!((arrived.role, arrived.stream), (Role::Pages, 3));
        io::Write::write_all(&mut { &dialled }, b"hello").unwrap();
        let mut seen = [0; 5];
        let mut split = arrived.connection.split().unwrap();
        io::Read::read_exact(&mut split.reader, &mut seen).unwrap();
        assert_eq!(&seen, b"hello");
        drop(ours);
    }
}
