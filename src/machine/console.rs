//! The console of a VM: what the guest's serial port says goes to a log file and to whoever is attached; what they type goes to
//! the guest.
//!
//! The serial port writes byte by byte on a vCPU thread; here bytes are gathered for a moment and moved by a thread of their own,
//! so that a slow disk or client never holds up the guest, and a flood is dropped (and counted) rather than kept.

use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use vmm::sandbox::{self, ThreadKind};

/// Output that waits to be moved; a guest that is faster than the disk for long loses what is beyond.
const MAX_WAITING_BYTES: usize = 4 << 20;
/// How long bytes are gathered.
const GATHER: Duration = Duration::from_millis(2);
/// What an attaching client that asks for it sees of the past.
const BACKLOG_BYTES: usize = 64 << 10;
/// The log is started anew at this size; the part before it stays as `console.log.1`.
const MAX_LOG_BYTES: u64 = 16 << 20;
/// Attached clients; more are turned away.
const MAX_CLIENTS: usize = 16;
/// First byte of a client: whether it wants the backlog.
pub const ATTACH_WITH_BACKLOG: u8 = b'B';
/// First byte of a client: only what comes from now on.
pub const ATTACH_LIVE: u8 = b'L';

struct Output {
    waiting: Vec<u8>,
    dropped: u64,
    closed: bool,
}

struct Viewers {
    backlog: Vec<u8>,
    clients: Vec<UnixStream>,
}

/// Where what is typed goes.
pub type Input = Box<dyn Fn(&[u8]) + Send + Sync>;

/// The console. Clones are the same console.
#[derive(Clone)]
pub struct Console {
    output: Arc<(Mutex<Output>, Condvar)>,
    viewers: Arc<Mutex<Viewers>>,
    drained: Arc<(Mutex<bool>, Condvar)>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Bytes on their way: nothing that a panic elsewhere could leave half done.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Console {
    /// Starts the mover, writing to `log`.
    pub fn start(mut log: Log) -> io::Result<Self> {
        let console = Console {
            output: Arc::new((Mutex::new(Output { waiting: Vec::new(), dropped: 0, closed: false }), Condvar::new())),
            viewers: Arc::new(Mutex::new(Viewers { backlog: Vec::new(), clients: Vec::new() })),
            drained: Arc::default(),
        };
        let mover = console.clone();
        thread::Builder::new().name("console".into()).spawn(move || {
            sandbox::confine(ThreadKind::Console);
            while let Some(bytes) = mover.next() {
                if let Err(error) = log.write(&bytes) {
                    tracing::warn!(%error, "the console's log cannot be written");
                }
                mover.show(&bytes);
            }
            *lock(&mover.drained.0) = true;
            mover.drained.1.notify_all();
        })?;
        Ok(console)
    }

    /// What the serial port writes to.
    pub fn writer(&self) -> ConsoleWriter {
        ConsoleWriter(self.clone())
    }

    /// Accepts clients on `listener` for ever; what they type goes to `input`.
    pub fn serve(&self, listener: UnixListener, input: Input) -> io::Result<()> {
        let console = self.clone();
        let input = Arc::new(input);
        thread::Builder::new().name("console-accept".into()).spawn(move || {
            sandbox::confine(ThreadKind::Console);
            for client in listener.incoming().flatten() {
                let (console, input) = (console.clone(), input.clone());
                let spawned = thread::Builder::new().name("console-in".into()).spawn(move || {
                    if let Err(error) = console.attach(client, &**input) {
                        tracing::debug!(%error, "a console client went away");
                    }
                });
                if let Err(error) = spawned {
                    tracing::warn!(%error, "a console client was turned away");
                }
            }
        })?;
        Ok(())
    }

    fn attach(&self, mut client: UnixStream, input: &dyn Fn(&[u8])) -> io::Result<()> {
        let mut wish = [0];
        client.set_read_timeout(Some(Duration::from_secs(5)))?;
        client.read_exact(&mut wish)?;
        client.set_read_timeout(None)?;
        {
            let mut viewers = lock(&self.viewers);
            if viewers.clients.len() >= MAX_CLIENTS {
                return client.write_all(b"too many are attached to this console\r\n");
            }
            if wish[0] == ATTACH_WITH_BACKLOG {
                client.write_all(&viewers.backlog)?;
            }
            let mut shown = client.try_clone()?;
            shown.set_nonblocking(false)?;
            shown.set_write_timeout(Some(Duration::from_millis(200)))?;
            shown.flush()?;
            viewers.clients.push(shown);
        }
        let mut buffer = [0; 1024];
        loop {
            match client.read(&mut buffer)? {
                0 => return Ok(()),
                n => input(&buffer[..n]),
            }
        }
    }

    /// Waits for output; `None` when the console is closed and everything has been moved.
    fn next(&self) -> Option<Vec<u8>> {
        let (mutex, changed) = &*self.output;
        let waited = changed.wait_while(lock(mutex), |o| o.waiting.is_empty() && !o.closed);
        let output = waited.unwrap_or_else(PoisonError::into_inner);
        let closed = output.closed;
        drop(output);
        if !closed {
            thread::sleep(GATHER);
        }
        let mut output = lock(mutex);
        let mut bytes = std::mem::take(&mut output.waiting);
        if output.dropped > 0 {
            bytes.extend(format!("\r\n[microvm: {} bytes of output dropped]\r\n", output.dropped).into_bytes());
            output.dropped = 0;
        }
        (!bytes.is_empty()).then_some(bytes)
    }

    fn show(&self, bytes: &[u8]) {
        let mut viewers = lock(&self.viewers);
        viewers.backlog.extend_from_slice(bytes);
        let excess = viewers.backlog.len().saturating_sub(BACKLOG_BYTES);
        viewers.backlog.drain(..excess);
        viewers.clients.retain_mut(|client| client.write_all(bytes).is_ok());
    }

    /// Ends the console: what was said is moved, then clients see the end.
    pub fn close(&self) {
        lock(&self.output.0).closed = true;
        self.output.1.notify_all();
        let (mutex, changed) = &*self.drained;
        let waited = changed.wait_timeout_while(lock(mutex), Duration::from_secs(2), |drained| !*drained);
        drop(waited);
        for client in lock(&self.viewers).clients.drain(..) {
            // Not dropped only: the thread that reads what is typed has the same socket.
            let _ = client.shutdown(Shutdown::Both);
        }
    }
}

/// The serial port's end of a console.
pub struct ConsoleWriter(Console);

impl Write for ConsoleWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let (mutex, changed) = &*self.0.output;
        let mut output = lock(mutex);
        if output.waiting.len() + bytes.len() > MAX_WAITING_BYTES {
            output.dropped += bytes.len() as u64;
        } else {
            if output.waiting.is_empty() {
                changed.notify_all();
            }
            output.waiting.extend_from_slice(bytes);
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The log file, of bounded size, and the file that its older part goes to. Both are open from the start: the process cannot open
/// any later.
pub struct Log {
    file: File,
    older: File,
    bytes: u64,
}

impl Log {
    /// Opens the log at `path`; the older part is `path` with `.1`.
    pub fn open(path: &Path) -> io::Result<Self> {
        let file = File::options().create(true).read(true).append(true).open(path)?;
        let older = File::options().create(true).truncate(false).write(true).open(path.with_extension("log.1"))?;
        let bytes = file.metadata()?.len();
        Ok(Log { file, older, bytes })
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        let moved = if self.bytes > MAX_LOG_BYTES { self.begin_anew() } else { Ok(()) };
        self.bytes += bytes.len() as u64;
        self.file.write_all(bytes)?;
        moved
    }

    fn begin_anew(&mut self) -> io::Result<()> {
        let moved = (|| {
            self.older.set_len(0)?;
            self.older.rewind()?;
            self.file.rewind()?;
            io::copy(&mut self.file, &mut self.older)
        })();
        // On a full disk, too: what cannot be kept is lost.
        self.file.set_len(0)?;
        self.bytes = 0;
        moved.map(|_| ())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn output_reaches_the_log_and_clients_and_input_the_guest() {
        let dir = tempfile::tempdir().unwrap();
        let console = Console::start(Log::open(&dir.path().join("console.log")).unwrap()).unwrap();
        let listener = UnixListener::bind(dir.path().join("sock")).unwrap();
        let (typed, received) = std::sync::mpsc::channel();
        console.serve(listener, Box::new(move |bytes| typed.send(bytes.to_vec()).unwrap())).unwrap();
        let mut writer = console.writer();
        writer.write_all(b"before ").unwrap();
        while lock(&console.viewers).backlog.is_empty() {
            thread::sleep(Duration::from_millis(1));
        }
        let mut client = UnixStream::connect(dir.path().join("sock")).unwrap();
        client.write_all(&[ATTACH_WITH_BACKLOG]).unwrap();
        let mut seen = [0; 7];
        client.read_exact(&mut seen).unwrap();
        client.write_all(b"typed").unwrap();
        assert_eq!(received.recv_timeout(Duration::from_secs(10)).unwrap(), b"typed");
        writer.write_all(b"after").unwrap();
        console.close();
        let mut rest = String::new();
        client.read_to_string(&mut rest).unwrap();
        assert_eq!(rest, "after");
        assert_eq!(std::fs::read_to_string(dir.path().join("console.log")).unwrap(), "before after");
    }

    #[test]
    fn a_flood_is_bounded_and_said() {
        let dir = tempfile::tempdir().unwrap();
        let console = Console::start(Log::open(&dir.path().join("console.log")).unwrap()).unwrap();
        let mut writer = console.writer();
        let chunk = vec![b'x'; MAX_WAITING_BYTES + 1];
        writer.write_all(&chunk).unwrap();
        writer.write_all(b"end").unwrap();
        console.close();
        let log = std::fs::read_to_string(dir.path().join("console.log")).unwrap();
        assert!(
            log.starts_with("end") && log.contains(&format!("{} bytes of output dropped", MAX_WAITING_BYTES + 1)),
            "{log}"
        );
    }

    #[test]
    fn the_log_is_bounded() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("console.log");
        let mut log = Log::open(&path).unwrap();
        for n in 0..40 {
            log.write(&vec![b'a' + n; 1 << 20]).unwrap();
        }
        let older = std::fs::read(dir.path().join("console.log.1")).unwrap();
        let both = [older, std::fs::read(&path).unwrap()];
        assert!(both.iter().all(|part| part.len() as u64 <= MAX_LOG_BYTES + (1 << 20)));
        // Nothing is lost in between, and the latest is there.
        let said: Vec<u8> = both.concat().chunks(1 << 20).map(|chunk| chunk[0]).collect();
        assert_eq!(said, (b'a' + 17..b'a' + 40).collect::<Vec<_>>());
    }
}
