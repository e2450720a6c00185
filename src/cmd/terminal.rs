//! The terminal as a VM's console: raw mode, restored whatever happens; Ctrl-] leaves.

use std::io::{self, IsTerminal};
use std::time::Duration;

use anyhow::{Context, Result};
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcsetattr};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::signal::unix::{SignalKind, signal};

use crate::machine::console::{ATTACH_LIVE, ATTACH_WITH_BACKLOG};
use crate::runtime::VmDir;

/// Ctrl-], as in telnet and virsh.
const LEAVE_KEY: u8 = 0x1d;

/// Why the console was left.
pub enum Left {
    /// The user pressed the key.
    ByKey,
    /// The VM's process closed it.
    Ended,
    /// A signal asked this command to end.
    BySignal,
}

/// The terminal in raw mode; dropping it puts everything back.
struct RawTerminal(Termios);

impl RawTerminal {
    /// `None` where standard input is no terminal.
    fn enter() -> io::Result<Option<Self>> {
        let stdin = io::stdin();
        if !stdin.is_terminal() {
            return Ok(None);
        }
        let before = tcgetattr(&stdin)?;
        let mut raw = before.clone();
        raw.make_raw();
        // What this program and the VM print keeps its line ends.
        raw.output_modes |= rustix::termios::OutputModes::OPOST;
        tcsetattr(&stdin, OptionalActions::Now, &raw)?;
        Ok(Some(RawTerminal(before)))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        let _ = tcsetattr(io::stdin(), OptionalActions::Drain, &self.0);
    }
}

/// Joins this terminal (or whatever standard input and output are) with the VM's console until one of them ends.
pub fn attach(dir: &VmDir, with_backlog: bool) -> Result<Left> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let left = runtime.block_on(session(dir, with_backlog));
    // A read of standard input that nobody waits for any more must not keep the program.
    runtime.shutdown_timeout(Duration::ZERO);
    left
}

async fn session(dir: &VmDir, with_backlog: bool) -> Result<Left> {
    let name = dir.name();
    let socket = UnixStream::connect(dir.console_socket()).await;
    let (mut from_guest, mut to_guest) =
        socket.with_context(|| format!("the console of {name} is not there"))?.into_split();
    to_guest.write_all(&[if with_backlog { ATTACH_WITH_BACKLOG } else { ATTACH_LIVE }]).await?;
    let mut signals =
        (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?, signal(SignalKind::hangup())?);
    let terminal = RawTerminal::enter().context("the terminal cannot be made raw")?;
    if terminal.is_some() {
        eprintln!("console of {name}; Ctrl-] leaves it");
    }
    let (mut stdin, mut stdout) = (tokio::io::stdin(), tokio::io::stdout());
    let (mut typed, mut said) = ([0; 1024], [0; 16384]);
    let mut stdin_open = true;
    let left = loop {
        tokio::select! {
            n = from_guest.read(&mut said) => match n {
                Ok(n) if n > 0 => {
                    stdout.write_all(&said[..n]).await?;
                    stdout.flush().await?;
                }
                _ => break Left::Ended,
            },
            n = stdin.read(&mut typed), if stdin_open => {
                let bytes = &typed[..n?];
                stdin_open = !bytes.is_empty();
                let key = bytes.iter().position(|b| *b == LEAVE_KEY && terminal.is_some());
                let _ = to_guest.write_all(&bytes[..key.unwrap_or(bytes.len())]).await;
                if key.is_some() {
                    break Left::ByKey;
                }
            },
            _ = signals.0.recv() => break Left::BySignal,
            _ = signals.1.recv() => break Left::BySignal,
            _ = signals.2.recv() => break Left::BySignal,
        }
    };
    drop(terminal);
    if !said.is_empty() && io::stdout().is_terminal() {
        println!();
    }
    Ok(left)
}
