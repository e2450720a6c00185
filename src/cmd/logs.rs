//! `microvm logs`.

use std::fs::File;
use std::io::{self, Seek, Write};
use std::time::Duration;

use anyhow::{Context, Result};

use crate::cli::LogsArgs;
use crate::client;
use crate::runtime::Runtime;

/// Between two looks at a log that is followed.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// Prints the log; with `--follow`, until the VM's process ends.
pub fn run(runtime: &Runtime, args: &LogsArgs) -> Result<u8> {
    let dir = client::find(runtime, &args.name)?;
    let path = if args.process { dir.process_log() } else { dir.console_log() };
    let mut log = File::open(&path).with_context(|| format!("{} has no log", args.name))?;
    let mut out = io::stdout().lock();
    loop {
        let alive = args.follow && dir.is_held()?;
        // It is shorter than what was read of it: it has begun anew.
        if log.metadata()?.len() < log.stream_position()? {
            log.rewind()?;
        }
        let copied = io::copy(&mut log, &mut out).and_then(|n| out.flush().map(|()| n));
        match copied {
            // Whoever reads us has seen enough.
            Err(e) if e.kind() == io::ErrorKind::BrokenPipe => return Ok(0),
            Err(e) => return Err(e.into()),
            Ok(_) if !alive => return Ok(0),
            Ok(_) => std::thread::sleep(LOOK_EVERY),
        }
    }
}
