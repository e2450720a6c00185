//! Page threads that let the guest go first: where there are not enough CPUs for all, the guest runs and its migration takes longer.
//!
//! Only while the guest runs, and only while that is enough. In the last round it stands still, and whoever keeps the threads from
//! their CPUs makes the blackout longer. Not everybody may take back what a thread gave away (`RLIMIT_NICE`), so the last
//! round has threads of its own.

use rustix::process::setpriority_process;

/// The nice value of threads that are courteous (setpriority(2)): a tenth of the guest's share of a CPU that both want.
const NICE: i32 = 10;

/// Something for courteous threads, and for the others.
#[derive(Debug, Default)]
pub(super) struct ByCourtesy<T>([T; 2]);

impl<T> ByCourtesy<T> {
    /// Makes both.
    pub fn try_new<E>(mut make: impl FnMut(bool) -> Result<T, E>) -> Result<Self, E> {
        Ok(Self([make(false)?, make(true)?]))
    }

    pub fn of(&self, courteous: bool) -> &T {
        &self.0[usize::from(courteous)]
    }

    pub fn of_mut(&mut self, courteous: bool) -> &mut T {
        &mut self.0[usize::from(courteous)]
    }

    pub fn into_all(self) -> [T; 2] {
        self.0
    }
}

/// The calling thread is for one or the other from now on.
pub(super) fn begin(courteous: bool) {
    if courteous {
        // One that is nicer already stays so.
        let _ = setpriority_process(None, NICE);
    }
}
