//! How the agent hands a migration's connections to the process that receives the VM: the sockets themselves, over a Unix socket
//! (SCM_RIGHTS), each with three bytes that say what it is: its role, and the number of its page stream, little-endian.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::net::TcpStream;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::mpsc;
use std::thread;

use migrator::Arrived;
use migrator::options::Timeouts;
use migrator::transport::TcpConnection;
use migrator::wire::preamble::Role;
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

/// Takes connections from `from` until the agent closes it.
pub fn take_over(from: UnixStream, timeouts: Timeouts) -> io::Result<mpsc::Receiver<Arrived>> {
    let (sender, receiver) = mpsc::channel();
    thread::Builder::new().name("connections".into()).spawn(move || {
        loop {
            match take_one(&from, timeouts) {
                Ok(Some(arrived)) => {
                    if sender.send(arrived).is_err() {
                        return;
                    }
                }
                Ok(None) => return,
                Err(error) => return tracing::warn!(%error, "the agent's connections end"),
            }
        }
    })?;
    Ok(receiver)
}

fn take_one(from: &UnixStream, timeouts: Timeouts) -> io::Result<Option<Arrived>> {
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
    let connection = Box::new(TcpConnection::new(TcpStream::from(fd), timeouts)?);
    Ok(Some(Arrived { role, stream: u16::from_le_bytes([label[1], label[2]]), connection }))
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
        let arrivals = take_over(theirs, Timeouts::default()).unwrap();
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
