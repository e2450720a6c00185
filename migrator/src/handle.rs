//! The handle on a running migration: watch it, cancel it, settle it. Shared by as many watchers as there are.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::report::{Phase, Progress, Report};

/// How a human settles a migration that is in doubt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Resolution {
    /// The source owns the VM and runs on. Right only if the destination will never run it.
    Keep,
    /// The destination owns the VM; the source lets go of its copy.
    Discard,
}

/// Why a wish was not granted. Each is a sentence for the user.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HandleError {
    /// Cancel after the commit point.
    #[error("too late to cancel: the destination was told to run the VM")]
    Committed,
    /// The migration is over.
    #[error("the migration is already over")]
    Over,
    /// Resolve while nothing is in doubt.
    #[error("nothing to resolve: the migration is not in doubt")]
    NotInDoubt,
    /// Keep what the arbiter gave away.
    #[error("it cannot be kept here: the arbiter gave the VM to the destination")]
    GivenAway,
}

#[derive(Default)]
struct State {
    progress: Progress,
    changes: u64,
    cancel: bool,
    resolution: Option<Resolution>,
    report: Option<Report>,
    waker: Option<Box<dyn Fn() + Send>>,
}

/// A handle on one migration, at either side. Clones are the same handle.
#[derive(Clone, Default)]
pub struct MigrationHandle {
    shared: Arc<(Mutex<State>, Condvar)>,
}

impl MigrationHandle {
    /// A handle for a migration that has not begun.
    pub fn new() -> Self {
        Self::default()
    }

    /// Asks to stop. Answered within a second, and the guest runs on where it was; refused after the commit point.
    ///
    /// A granted wish may still come too late, by as much as the commit point is near: the report tells.
    pub fn cancel(&self) -> Result<(), HandleError> {
        let mut state = self.lock();
        match state.progress.phase {
            Phase::Done => return Err(HandleError::Over),
            Phase::Commit | Phase::InDoubt => return Err(HandleError::Committed),
            Phase::Idle | Phase::Preflight | Phase::PreCopy | Phase::Switchover => {}
        }
        state.cancel = true;
        wake(&state);
        Ok(())
    }

    /// Settles a migration that is in doubt by hand. Where there is an arbiter, to keep the VM means to claim it: that is
    /// refused at once if the claim is known to be lost, and else comes true only if it is won.
    pub fn resolve(&self, resolution: Resolution) -> Result<(), HandleError> {
        let mut state = self.lock();
        match state.progress.phase {
            Phase::Done => Err(HandleError::Over),
            Phase::InDoubt if state.progress.given_away && resolution == Resolution::Keep => {
                Err(HandleError::GivenAway)
            }
            Phase::InDoubt => {
                state.resolution = Some(resolution);
                wake(&state);
                Ok(())
            }
            _ => Err(HandleError::NotInDoubt),
        }
    }

    /// What is going on right now.
    pub fn progress(&self) -> Progress {
        self.lock().progress.clone()
    }

    /// Waits until something has changed since the change number `seen` (0 at first), or the timeout has passed;
    /// gives the change number to go on with, and the progress.
    pub fn wait(&self, seen: u64, timeout: Duration) -> (u64, Progress) {
        let state = self.lock();
        let (state, _) = self
            .shared
            .1
            .wait_timeout_while(state, timeout, |state| state.changes == seen)
            .unwrap_or_else(PoisonError::into_inner);
        (state.changes, state.progress.clone())
    }

    /// The report: final once the phase is [`Phase::Done`], preliminary while it is [`Phase::InDoubt`], else none.
    pub fn report(&self) -> Option<Report> {
        self.lock().report.clone()
    }

    /// Changes what watchers see.
    pub(crate) fn update(&self, change: impl FnOnce(&mut Progress)) {
        let mut state = self.lock();
        change(&mut state.progress);
        state.changes += 1;
        self.shared.1.notify_all();
    }

    /// Shows a report.
    pub(crate) fn publish(&self, report: Report) {
        let mut state = self.lock();
        state.report = Some(report);
        state.changes += 1;
        self.shared.1.notify_all();
    }

    /// What is called when a wish comes in (also at once, if one has come in before); none: nothing any more.
    pub(crate) fn on_wish(&self, waker: Option<Box<dyn Fn() + Send>>) {
        let mut state = self.lock();
        state.waker = waker;
        if state.cancel || state.resolution.is_some() {
            wake(&state);
        }
    }

    /// Takes the wishes that have come in.
    pub(crate) fn take_wishes(&self) -> (bool, Option<Resolution>) {
        let mut state = self.lock();
        (std::mem::take(&mut state.cancel), state.resolution.take())
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing here can be left half done by a panic.
        self.shared.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn wake(state: &State) {
    if let Some(waker) = &state.waker {
        waker();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wishes_depend_on_the_phase() {
        let handle = MigrationHandle::new();
        assert_eq!(handle.resolve(Resolution::Keep), Err(HandleError::NotInDoubt));
        handle.cancel().unwrap();
        assert_eq!(handle.take_wishes(), (true, None));
        for (phase, cancel, resolve) in [
            (Phase::Switchover, Ok(()), Err(HandleError::NotInDoubt)),
            (Phase::Commit, Err(HandleError::Committed), Err(HandleError::NotInDoubt)),
            (Phase::InDoubt, Err(HandleError::Committed), Ok(())),
            (Phase::Done, Err(HandleError::Over), Err(HandleError::Over)),
        ] {
            handle.update(|progress| progress.phase = phase);
            assert_eq!(handle.cancel(), cancel, "{phase}");
            assert_eq!(handle.resolve(Resolution::Discard), resolve, "{phase}");
        }
        assert_eq!(handle.take_wishes(), (true, Some(Resolution::Discard)));
    }

    #[test]
    fn what_the_arbiter_gave_away_cannot_be_kept() {
        let handle = MigrationHandle::new();
        handle.update(|progress| (progress.phase, progress.given_away) = (Phase::InDoubt, true));
        assert_eq!(handle.resolve(Resolution::Keep), Err(HandleError::GivenAway));
        assert_eq!(handle.resolve(Resolution::Discard), Ok(()));
    }

    #[test]
    fn waiting_sees_a_change() {
        let handle = MigrationHandle::new();
        let (seen, _) = handle.wait(0, Duration::ZERO);
        let other = handle.clone();
        let watcher = std::thread::spawn(move || other.wait(seen, Duration::from_secs(60)));
        handle.update(|progress| progress.round = 3);
        assert_eq!(watcher.join().unwrap().1.round, 3);
    }
}
