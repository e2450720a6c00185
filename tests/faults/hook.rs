//! The other end of the program's fault points: every process says each step that it takes, and one step is held.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;

use crate::common::PATIENCE;

#[derive(Default)]
struct State {
    /// `ROLE STEP` that is to be held, once.
    armed: Option<String>,
    /// A process waits there.
    held: bool,
    answer: Option<String>,
    /// Every step, in the order in which they came.
    trace: Vec<String>,
}

/// Where processes report. Clones are the same.
#[derive(Clone, Default)]
pub struct Hook(Arc<(Mutex<State>, Condvar)>);

impl Hook {
    /// Listens at `path` for ever.
    pub fn listen(path: &Path) -> Self {
        let hook = Hook::default();
        let listener = UnixListener::bind(path).unwrap();
        let ours = hook.clone();
        thread::spawn(move || {
            for process in listener.incoming().flatten() {
                let hook = ours.clone();
                // A process that is killed says no more.
                thread::spawn(move || hook.serve(process));
            }
        });
        hook
    }

    fn serve(&self, process: UnixStream) -> Option<()> {
        let mut answers = process.try_clone().ok()?;
        for line in BufReader::new(process).lines() {
            let line = line.ok()?;
            let words: Vec<&str> = line.split(' ').collect();
            let [role, _pid, step, ..] = words[..] else { panic!("not a step: {line}") };
            let answer = self.at(&line, &format!("{role} {step}"));
            writeln!(answers, "{answer}").ok()?;
        }
        Some(())
    }

    fn at(&self, line: &str, step: &str) -> String {
        let (state, changed) = &*self.0;
        let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
        state.trace.push(line.into());
        if state.armed.as_deref() != Some(step) {
            return "go".into();
        }
        state.armed = None;
        state.held = true;
        changed.notify_all();
        let mut state = changed.wait_while(state, |state| state.answer.is_none()).unwrap();
        state.held = false;
        state.answer.take().unwrap()
    }

    /// Holds the next process that comes to this step; forgets what was before.
    pub fn arm(&self, step: &str) {
        let mut state = self.0.0.lock().unwrap();
        *state = State { armed: Some(step.into()), ..State::default() };
    }

    /// Waits until a process is there.
    #[track_caller]
    pub fn wait(&self) {
        let (state, changed) = &*self.0;
        let state = state.lock().unwrap();
        let (state, _) = changed.wait_timeout_while(state, PATIENCE, |state| !state.held).unwrap();
        assert!(state.held, "nobody came to the step {:?}", state.armed);
    }

    /// Lets it go on (`go`), or not (`fail`, `panic`).
    pub fn answer(&self, word: &str) {
        let (state, changed) = &*self.0;
        state.lock().unwrap().answer = Some(word.into());
        changed.notify_all();
    }

    /// Lets whatever is held go, and holds nothing any more.
    pub fn disarm(&self) {
        let held = {
            let mut state = self.0.0.lock().unwrap_or_else(PoisonError::into_inner);
            state.armed = None;
            state.held && state.answer.is_none()
        };
        if held {
            self.answer("go");
        }
    }

    /// All steps since it was armed.
    pub fn trace(&self) -> Vec<String> {
        self.0.0.lock().unwrap_or_else(PoisonError::into_inner).trace.clone()
    }
}
