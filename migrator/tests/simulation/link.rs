//! Connections: bytes each way in order, cut into pieces, late, and whatever the plan does to them.

use migrator::transport::ConnectError;
use migrator::wire::preamble::Role;

use crate::faults::{Fault, What};
use crate::play::{Event, World, seconds};

/// The two ends. A pipe has the number of the end that it leads to.
pub const HERE: usize = 0;
pub const THERE: usize = 1;

/// What the source opened a connection for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    Offer,
    Ask,
    Control,
    Pages(u16),
    /// Somebody else's.
    Stray,
}

#[derive(Debug, Default)]
pub struct End {
    pub reads: bool,
    pub writes: bool,
    /// The preamble was exchanged, as far as this end knows.
    pub greeted: bool,
    /// What the acceptor took it for.
    pub role: Option<(Role, u16)>,
    pub buffer: Vec<u8>,
    pub taken: usize,
    /// When something came.
    pub heard: u64,
}

#[derive(Debug, Default)]
pub struct Pipe {
    pub last: u64,
    /// What is written is lost.
    pub dead: bool,
}

#[derive(Debug)]
pub struct Connection {
    pub purpose: Purpose,
    pub ends: [End; 2],
    pub pipes: [Pipe; 2],
}

impl World {
    /// Opens a connection and says the preamble; or fails to, now or after a while.
    pub fn open(&mut self, purpose: Purpose) -> usize {
        let connection = self.connections.len();
        let end = || End { reads: true, writes: true, heard: self.now, ..End::default() };
        self.connections.push(Connection { purpose, ends: [end(), end()], pipes: Default::default() });
        let (role, stream) = match purpose {
            Purpose::Offer | Purpose::Ask | Purpose::Stray => (Role::Request, 0),
            Purpose::Control => (Role::Control, 0),
            Purpose::Pages(stream) => (Role::Pages, stream),
        };
        let limit = self.timeouts.connect.as_micros() as u64;
        self.after(limit, Event::DialLimit { connection, greeted: false });
        if self.now < self.down_until || self.there.host_gone {
            // Nothing answers: until the limit, or at once if there is no way.
            self.kill_pipes(connection);
            if self.random.chance(50) {
                self.after(1, Event::Reset { connection, end: HERE });
            }
        } else if self.now < self.agent_away_until {
            self.kill_pipes(connection);
            self.after(200, Event::Reset { connection, end: HERE });
        }
        let preamble = migrator::wire::preamble::Preamble { role, stream, id: self.id };
        self.write(connection, HERE, What::preamble(role), preamble.encode(false));
        connection
    }

    fn kill_pipes(&mut self, connection: usize) {
        self.connections[connection].pipes.iter_mut().for_each(|pipe| pipe.dead = true);
    }

    /// Writes to a connection; what is planned for this step happens in the middle of it.
    pub fn write(&mut self, connection: usize, from: usize, what: What, mut bytes: Vec<u8>) {
        if !self.connections[connection].ends[from].writes {
            return;
        }
        self.coverage.writes += 1;
        let to = 1 - from;
        let (mut later, mut ends) = (Vec::new(), false);
        for fault in self.hits(what) {
            let at = self.random.below(bytes.len().max(1) as u64) as usize;
            let now = self.now;
            let pipe = &mut self.connections[connection].pipes[to];
            match fault {
                Fault::Delay => pipe.last = pipe.last.max(now) + 10_000 + self.random.below(900_000),
                Fault::Stall => pipe.last = pipe.last.max(now) + seconds(6) + self.random.below(seconds(20)),
                Fault::Flip if bytes.is_empty() => {}
                Fault::Flip => {
                    bytes[at] ^= 1 << self.random.below(8);
                    self.flipped_page |= what == What::Pages;
                }
                Fault::Truncate => {
                    bytes.truncate(at);
                    ends = true;
                }
                Fault::Cut | Fault::Silence | Fault::HalfOpen => {
                    bytes.truncate(at);
                    later.push(fault);
                }
                // Who dies in the middle of a write has written some of it.
                Fault::KillHere | Fault::PowerHere if from == HERE => {
                    bytes.truncate(at);
                    later.push(fault);
                }
                Fault::KillThere | Fault::PowerThere | Fault::HostGone if from == THERE => {
                    bytes.truncate(at);
                    later.push(fault);
                }
                _ => later.push(fault),
            }
        }
        let late = if matches!(what, What::Chunk | What::Pages | What::Marker) { 400 } else { 1500 };
        let first = if bytes.len() > 1 && self.random.chance(30) {
            self.random.below(bytes.len() as u64) as usize
        } else {
            bytes.len()
        };
        let rest = bytes.split_off(first);
        for piece in [bytes, rest] {
            if !piece.is_empty() {
                self.carry(connection, to, late, Event::Deliver { connection, end: to, bytes: piece });
            }
        }
        if ends {
            self.carry(connection, to, late, Event::Eof { connection, end: to });
            self.connections[connection].pipes[to].dead = true;
        }
        for fault in later {
            self.link_fault(fault, connection, to);
        }
    }

    /// After a delay, and not before what went the same way earlier.
    fn carry(&mut self, connection: usize, to: usize, late: u64, event: Event) {
        let at = self.now + 1 + self.random.below(late);
        let pipe = &mut self.connections[connection].pipes[to];
        if !pipe.dead {
            pipe.last = pipe.last.max(at);
            let at = pipe.last;
            self.at(at, event);
        }
    }

    fn link_fault(&mut self, fault: Fault, connection: usize, to: usize) {
        match fault {
            Fault::Cut => self.cut(),
            Fault::Silence => {
                self.go_down();
                (0..self.connections.len()).for_each(|connection| self.kill_pipes(connection));
            }
            Fault::HalfOpen => {
                self.go_down();
                self.connections.iter_mut().for_each(|connection| connection.pipes[to].dead = true);
            }
            Fault::Again => {
                let again = self.open(Purpose::Stray);
                let purpose = self.connections[connection].purpose;
                self.tell(|| format!("connection {again} is opened by somebody else, as {purpose:?}"));
            }
            fault => self.after(0, Event::Strike(fault)),
        }
    }

    fn go_down(&mut self) {
        self.down_until = self.now + 100_000 + self.random.below(seconds(20));
    }

    /// Cuts all connections: what is on its way arrives, or not, and each end is told some time.
    fn cut(&mut self) {
        self.go_down();
        for end in [HERE, THERE] {
            self.lose_what_is_under_way(end, 50);
        }
        for connection in 0..self.connections.len() {
            self.kill_pipes(connection);
            for end in [HERE, THERE] {
                let at = (self.now + self.random.below(seconds(2))).max(self.connections[connection].pipes[end].last);
                self.at(at, Event::Reset { connection, end });
            }
        }
    }

    fn lose_what_is_under_way(&mut self, to: usize, percent: u64) {
        if self.random.chance(percent) {
            self.queue.retain(|_, event| !matches!(event, Event::Deliver { end, .. } if *end == to));
        }
    }

    /// The process at this end dies: its kernel closes what it had.
    pub fn close_all(&mut self, end: usize) {
        self.lose_what_is_under_way(1 - end, 30);
        for connection in 0..self.connections.len() {
            self.close(connection, end);
        }
    }

    /// The host at this end has no power: nobody is told anything.
    pub fn silence_all(&mut self, end: usize) {
        for connection in &mut self.connections {
            connection.pipes.iter_mut().for_each(|pipe| pipe.dead = true);
            (connection.ends[end].reads, connection.ends[end].writes) = (false, false);
        }
    }

    /// Says that nothing more comes.
    pub fn half_close(&mut self, connection: usize, end: usize) {
        if std::mem::take(&mut self.connections[connection].ends[end].writes) {
            self.carry(connection, 1 - end, 500, Event::Eof { connection, end: 1 - end });
        }
    }

    pub fn close(&mut self, connection: usize, end: usize) {
        self.half_close(connection, end);
        let end = &mut self.connections[connection].ends[end];
        (end.reads, end.taken) = (false, 0);
        end.buffer = Vec::new();
    }

    /// Takes the next bytes that came, if so many are there.
    pub fn take(&mut self, connection: usize, end: usize, count: usize) -> Option<Vec<u8>> {
        let end = &mut self.connections[connection].ends[end];
        let bytes = end.buffer.get(end.taken..end.taken + count)?.to_vec();
        end.taken += count;
        Some(bytes)
    }

    /// The next bytes that came, if so many are there, without taking them.
    pub fn peek(&self, connection: usize, end: usize, count: usize) -> Option<&[u8]> {
        let end = &self.connections[connection].ends[end];
        end.buffer.get(end.taken..end.taken + count)
    }

    pub fn no_connection(&self) -> ConnectError {
        ConnectError::Protocol { peer: "there:7437".into(), reason: "the connection failed".into() }
    }
}
