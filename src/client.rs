//! Talking to a VM's process: one request, then lines of answers.

use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::journals::in_doubt;
use crate::machine::view::{Answer, Request, VmView};
use crate::runtime::{Runtime, VmDir};

/// Answers that should come at once.
const PROMPT: Duration = Duration::from_secs(30);

/// An open conversation.
pub struct Conversation {
    name: String,
    socket: UnixStream,
    lines: io::Lines<BufReader<UnixStream>>,
}

/// The folder of a VM that exists.
pub fn find(runtime: &Runtime, name: &str) -> Result<VmDir> {
    let dir = runtime.vm(name)?;
    if !dir.is_known() {
        let names: Vec<String> = runtime.vms()?.iter().map(|vm| vm.name().to_string()).collect();
        match names.as_slice() {
            [] => bail!("there is no VM {name} on this host: microvm run --name {name} starts one"),
            names => bail!("there is no VM {name} on this host; there is: {}", names.join(", ")),
        }
    }
    Ok(dir)
}

impl Conversation {
    /// Asks the process of the VM `name`.
    pub fn ask(runtime: &Runtime, name: &str, request: &Request) -> Result<Self> {
        let dir = find(runtime, name)?;
        let mut socket = match UnixStream::connect(dir.control_socket()) {
            Ok(socket) => socket,
            Err(_) if !dir.is_held()? => {
                if let Some(decided) = dir.outgoing.left_in_doubt()? {
                    bail!(in_doubt(name, &decided));
                }
                bail!("{name} has ended: microvm logs {name} shows its output, microvm rm {name} removes what is left")
            }
            Err(e) => return Err(e).with_context(|| format!("the process of {name} does not answer")),
        };
        socket.set_read_timeout(Some(PROMPT))?;
        let mut line = serde_json::to_vec(request)?;
        line.push(b'\n');
        socket.write_all(&line).with_context(|| format!("the process of {name} does not listen"))?;
        let lines = BufReader::new(socket.try_clone()?).lines();
        Ok(Conversation { name: name.into(), socket, lines })
    }

    /// Lets the next line take longer.
    pub fn be_patient(&mut self, patience: Duration) -> Result<()> {
        Ok(self.socket.set_read_timeout(Some(patience))?)
    }

    /// The next line. An error that the process answers is an error here.
    pub fn next(&mut self) -> Result<Answer> {
        let name = &self.name;
        let line = self
            .lines
            .next()
            .with_context(|| format!("the process of {name} ended without an answer"))?
            .with_context(|| format!("the process of {name} does not answer"))?;
        match serde_json::from_str(&line).with_context(|| format!("the answer of {name}'s process cannot be read"))? {
            Answer::Error(error) => bail!("{error}"),
            answer => Ok(answer),
        }
    }
}

/// One request, one answer.
pub fn ask(runtime: &Runtime, name: &str, request: &Request) -> Result<Answer> {
    Conversation::ask(runtime, name, request)?.next()
}

/// All about a VM.
pub fn inspect(runtime: &Runtime, name: &str) -> Result<VmView> {
    match ask(runtime, name, &Request::Inspect)? {
        Answer::Vm(view) => Ok(*view),
        other => bail!("unexpected answer: {other:?}"),
    }
}

/// How long a process may need to let go of its VM's folder.
const TIDYING: Duration = Duration::from_secs(5);

/// Waits until the process of a VM that has ended here has let go of the VM's folder: what comes next (rm, run, a migration
/// back) must not find it tidying up.
pub fn wait_until_let_go(runtime: &Runtime, name: &str) -> Result<()> {
    let dir = runtime.vm(name)?;
    let deadline = Instant::now() + TIDYING;
    while dir.is_held()? && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}
