//! What answers: echo over UDP and TCP on port 7, counters over UDP on port 8, HTTP on port 80.

use crate::platform::memory::Memory;
use pulse_core::http::{self, Answer, Command, Guest, MOST_ANSWER_BYTES, MOST_REQUEST_BYTES};
use smoltcp::iface::{SocketHandle, SocketSet};
use smoltcp::socket::{tcp, udp};
use smoltcp::time::{Duration, Instant};

const ECHO_PORT: u16 = 7;
const COUNTERS_PORT: u16 = 8;
const HTTP_PORT: u16 = 80;
/// Connections at once, of each kind.
const CONNECTIONS: usize = 8;
/// Sockets altogether.
pub const SOCKETS: usize = 2 + 2 * CONNECTIONS;

const ECHO_BUFFER_BYTES: usize = 32 << 10;
const UDP_BUFFER_BYTES: usize = 64 << 10;
const UDP_DATAGRAMS: usize = 64;
/// Bytes that one connection may echo in one turn, so that a turn stays short.
const MOST_BYTES_A_TURN: usize = 2048;
const MOST_DATAGRAMS_A_TURN: usize = 4;

/// A request must be over by then, or its connection is dropped.
const HTTP_PATIENCE: Duration = Duration::from_secs(15);
/// A long connection is tried this often when nothing is said, and dropped when nobody has answered for that long:
/// longer than any blackout.
const ECHO_KEEP_ALIVE: Duration = Duration::from_secs(10);
const ECHO_PATIENCE: Duration = Duration::from_secs(300);

/// The sockets and what is known of each.
pub struct Services {
    udp: SocketHandle,
    counters: SocketHandle,
    echo: [SocketHandle; CONNECTIONS],
    http: [HttpConnection; CONNECTIONS],
    answer: Answer,
    scratch: [u8; MOST_BYTES_A_TURN],
}

#[derive(Clone, Copy)]
struct HttpConnection {
    handle: SocketHandle,
    /// Since when a peer is connected.
    since: Option<Instant>,
    answered: bool,
}

impl Services {
    /// Opens the sockets; `None` when there is not enough memory for them.
    pub fn open(sockets: &mut SocketSet<'_>, memory: &mut Memory) -> Option<Self> {
        let udp = sockets.add(udp_socket(memory, ECHO_PORT)?);
        let counters = sockets.add(udp_socket(memory, COUNTERS_PORT)?);
        let mut echo = [udp; CONNECTIONS];
        for handle in &mut echo {
            let mut socket = tcp_socket(memory, ECHO_BUFFER_BYTES, ECHO_BUFFER_BYTES)?;
            socket.set_keep_alive(Some(ECHO_KEEP_ALIVE));
            socket.set_timeout(Some(ECHO_PATIENCE));
            socket.set_nagle_enabled(false);
            *handle = sockets.add(socket);
        }
        let mut http = [HttpConnection { handle: udp, since: None, answered: false }; CONNECTIONS];
        for connection in &mut http {
            connection.handle = sockets.add(tcp_socket(memory, MOST_REQUEST_BYTES, MOST_ANSWER_BYTES)?);
        }
        let mut services = Self { udp, counters, echo, http, answer: Answer::new(), scratch: [0; MOST_BYTES_A_TURN] };
        services.rearm(sockets);
        Some(services)
    }

    /// Gives every socket a turn. Returns what a request wants done.
    pub fn poll(&mut self, now: Instant, sockets: &mut SocketSet<'_>, guest: &mut dyn Guest) -> Option<Command> {
        self.echo_udp(sockets.get_mut(self.udp));
        self.tell_counters(sockets.get_mut(self.counters), guest);
        for handle in self.echo {
            echo_tcp(sockets.get_mut(handle), &mut self.scratch);
        }
        let mut command = None;
        for connection in &mut self.http {
            let socket = sockets.get_mut(connection.handle);
            command = command.or(serve_http(socket, connection, now, guest, &mut self.answer));
        }
        command
    }

    /// Lets sockets whose connection is over listen again, also out of TIME-WAIT: waiting would keep the few sockets there
    /// are from the next clients. To be called when all that was to be sent has been, or the last ACK would be lost.
    pub fn rearm(&mut self, sockets: &mut SocketSet<'_>) {
        // `listen` refuses only port 0 and an open socket, so neither result says anything.
        for handle in self.echo {
            let socket = sockets.get_mut::<tcp::Socket>(handle);
            if !socket.is_open() {
                let _ = socket.listen(ECHO_PORT);
            }
        }
        for connection in &mut self.http {
            let socket = sockets.get_mut::<tcp::Socket>(connection.handle);
            if !socket.is_open() {
                let _ = socket.listen(HTTP_PORT);
                (connection.since, connection.answered) = (None, false);
            }
        }
    }

    fn echo_udp(&mut self, socket: &mut udp::Socket<'_>) {
        for _ in 0..MOST_DATAGRAMS_A_TURN {
            // A datagram that cannot be sent back now is better lost than late. The answer leaves from the address
            // that was asked, since the metadata goes back as it came.
            let Ok((bytes, from)) = socket.recv_slice(&mut self.scratch) else { return };
            let _ = socket.send_slice(&self.scratch[..bytes], from);
        }
    }

    fn tell_counters(&mut self, socket: &mut udp::Socket<'_>, guest: &mut dyn Guest) {
        for _ in 0..MOST_DATAGRAMS_A_TURN {
            let Ok((bytes, from)) = socket.recv_slice(&mut self.scratch) else { return };
            let _ = socket.send_slice(&guest.sample().answer(&self.scratch[..bytes]), from);
        }
    }
}

/// Sends back what came, as far as there is room for it: what is not taken from the receive buffer closes the peer's
/// window, so nothing is lost and nothing grows.
fn echo_tcp(socket: &mut tcp::Socket<'_>, scratch: &mut [u8]) {
    let room = socket.send_capacity() - socket.send_queue();
    let most = room.min(scratch.len());
    if socket.can_recv() && socket.can_send() && most > 0 {
        if let Ok(bytes) = socket.recv_slice(&mut scratch[..most]) {
            // There is room for all of it, see above.
            let _ = socket.send_slice(&scratch[..bytes]);
        }
    } else if socket.state() == tcp::State::CloseWait && !socket.can_recv() {
        socket.close();
    }
}

fn serve_http(
    socket: &mut tcp::Socket<'_>,
    connection: &mut HttpConnection,
    now: Instant,
    guest: &mut dyn Guest,
    answer: &mut Answer,
) -> Option<Command> {
    if matches!(socket.state(), tcp::State::Listen | tcp::State::Closed | tcp::State::TimeWait) {
        return None;
    }
    let since = *connection.since.get_or_insert(now);
    if now - since > HTTP_PATIENCE {
        socket.abort();
        return None;
    }
    if connection.answered {
        // What comes after the request is of no interest, but must be taken for the connection to end in order.
        if socket.can_recv() {
            let _ = socket.recv(|bytes| (bytes.len(), ()));
        }
        return None;
    }
    let request = socket.peek(MOST_REQUEST_BYTES).unwrap_or(&[]);
    if let Some(command) = http::answer(request, guest, answer) {
        // The send buffer is empty and as large as the largest answer.
        let _ = socket.send_slice(answer.as_bytes());
        let _ = socket.recv(|bytes| (bytes.len(), ()));
        socket.close();
        connection.answered = true;
        return command;
    }
    if socket.state() == tcp::State::CloseWait {
        socket.abort(); // It hung up in the middle of a request.
    }
    None
}

fn tcp_socket(memory: &mut Memory, receive_bytes: usize, send_bytes: usize) -> Option<tcp::Socket<'static>> {
    let receive = tcp::SocketBuffer::new(memory.take_buffer(receive_bytes)?);
    let send = tcp::SocketBuffer::new(memory.take_buffer(send_bytes)?);
    Some(tcp::Socket::new(receive, send))
}

fn udp_socket(memory: &mut Memory, port: u16) -> Option<udp::Socket<'static>> {
    let receive = udp::PacketBuffer::new(
        memory.take_array(udp::PacketMetadata::EMPTY, UDP_DATAGRAMS)?,
        memory.take_buffer(UDP_BUFFER_BYTES)?,
    );
    let send = udp::PacketBuffer::new(
        memory.take_array(udp::PacketMetadata::EMPTY, UDP_DATAGRAMS)?,
        memory.take_buffer(UDP_BUFFER_BYTES)?,
    );
    let mut socket = udp::Socket::new(receive, send);
    socket.bind(port).ok()?;
    Some(socket)
}
