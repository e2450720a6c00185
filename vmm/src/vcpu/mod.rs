//! A virtual CPU: a KVM vCPU and the thread that runs it.
//!
//! A vCPU is *parked* (its thread waits, its state can be read and set) or runs. Pausing sets `immediate_exit` in the shared
//! `kvm_run` page and sends the thread a signal: whether the thread is just before KVM_RUN or inside it, KVM_RUN returns EINTR, and
//! on the way it completes the port or MMIO access of the last exit, without which the saved registers would be wrong (KVM API,
//! KVM_RUN, `immediate_exit`).
#![allow(unsafe_code)] // `immediate_exit` is shared with KVM and written from other threads

use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use kvm_ioctls::VcpuFd;
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use crate::devices::bus::Bus;
use crate::devices::power::GuestEvents;

mod run_loop;
pub mod state;
pub mod throttle;
mod tsc;

/// A vCPU could not be made or steered.
#[derive(Debug, thiserror::Error)]
pub enum VcpuError {
    /// The thread could not be started.
    #[error("the thread of vCPU {id} cannot be started")]
    Spawn {
        /// Which vCPU.
        id: u8,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The signal that interrupts KVM_RUN could not be set up or sent.
    #[error("vCPU {id} cannot be interrupted")]
    Signal {
        /// Which vCPU.
        id: u8,
        /// Why.
        #[source]
        source: vmm_sys_util::errno::Error,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wanted {
    Parked,
    Running,
    Gone,
}

/// What the thread and its owner tell each other.
struct Control {
    shared: Mutex<Shared>,
    changed: Condvar,
}

struct Shared {
    wanted: Wanted,
    parked: bool,
    /// When KVM_RUN was first called after the last resume.
    resumed_at: Option<Instant>,
    /// So long it is to rest before it enters the guest again.
    rest: Duration,
}

impl Control {
    fn lock(&self) -> MutexGuard<'_, Shared> {
        self.shared.lock().expect("no holder of the vCPU lock panics")
    }
}

/// Everything that a vCPU reaches when it leaves the guest.
#[derive(Clone)]
pub struct Exits {
    /// Port I/O.
    pub ports: Arc<Bus>,
    /// Memory-mapped I/O.
    pub mmio: Arc<Bus>,
    /// Where the end of the guest is reported.
    pub events: GuestEvents,
}

/// The byte of `kvm_run` that makes KVM_RUN return at once.
struct ImmediateExit(*const AtomicU8);
// SAFETY: it points into the `kvm_run` mapping of the vCPU, which lives as long as the `Arc` of the fd in the same `Vcpu`; KVM
// and we access the byte atomically.
unsafe impl Send for ImmediateExit {}
// SAFETY: as above.
unsafe impl Sync for ImmediateExit {}

impl ImmediateExit {
    fn set(&self) {
        // SAFETY: see the type.
        unsafe { &*self.0 }.store(1, Ordering::SeqCst);
    }
}

/// Sets up the signal that interrupts KVM_RUN, once a process. Done by the first vCPU, or earlier: in a sandbox the action of a
/// signal cannot be changed any more.
pub fn prepare_signal() -> Result<(), vmm_sys_util::errno::Error> {
    extern "C" fn only_interrupt(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
    static PREPARED: Mutex<bool> = Mutex::new(false);
    let mut prepared = PREPARED.lock().expect("no holder of this lock panics");
    if !*prepared {
        register_signal_handler(SIGRTMIN(), only_interrupt)?;
        *prepared = true;
    }
    Ok(())
}

/// One virtual CPU.
pub struct Vcpu {
    id: u8,
    fd: Arc<Mutex<VcpuFd>>,
    control: Arc<Control>,
    immediate_exit: ImmediateExit,
    thread: Option<JoinHandle<()>>,
}

impl Vcpu {
    /// Starts the thread of `fd`, parked.
    pub fn new(id: u8, mut fd: VcpuFd, exits: Exits) -> Result<Self, VcpuError> {
        prepare_signal().map_err(|source| VcpuError::Signal { id, source })?;
        let immediate_exit = ImmediateExit((&raw const fd.get_kvm_run().immediate_exit).cast());
        let fd = Arc::new(Mutex::new(fd));
        let shared = Shared { wanted: Wanted::Parked, parked: true, resumed_at: None, rest: Duration::ZERO };
        let control = Arc::new(Control { shared: Mutex::new(shared), changed: Condvar::new() });
        let thread = {
            let (fd, control) = (fd.clone(), control.clone());
            std::thread::Builder::new()
                .name(format!("vcpu{id}"))
                .spawn(move || run_loop::run(id, &fd, &control, &exits))
                .map_err(|source| VcpuError::Spawn { id, source })?
        };
        Ok(Vcpu { id, fd, control, immediate_exit, thread: Some(thread) })
    }

    /// Its number, which is its APIC id.
    pub fn id(&self) -> u8 {
        self.id
    }

    /// Lets it run.
    pub fn resume(&self) {
        let mut shared = self.control.lock();
        shared.wanted = Wanted::Running;
        shared.resumed_at = None;
        self.control.changed.notify_all();
    }

    /// Asks it to park; [`Self::wait_parked`] waits for it. Asking all before waiting for any stops all at once.
    pub fn request_pause(&self) -> Result<(), VcpuError> {
        let mut shared = self.control.lock();
        (shared.wanted, shared.rest) = (Wanted::Parked, Duration::ZERO);
        drop(shared);
        self.control.changed.notify_all();
        self.interrupt()
    }

    fn interrupt(&self) -> Result<(), VcpuError> {
        self.immediate_exit.set();
        let thread = self.thread.as_ref().expect("the thread is joined only in drop");
        thread.kill(SIGRTMIN()).map_err(|source| VcpuError::Signal { id: self.id, source })
    }

    /// Takes it out of the guest, if it is there, for so long; a pause ends the rest.
    fn rest(&self, time: Duration) -> Result<(), VcpuError> {
        let mut shared = self.control.lock();
        if shared.wanted == Wanted::Running {
            shared.rest = time;
            drop(shared);
            self.interrupt()?;
        }
        Ok(())
    }

    /// Waits until it is parked.
    pub fn wait_parked(&self) {
        let shared = self.control.lock();
        drop(self.control.changed.wait_while(shared, |s| !s.parked).expect("no holder of the vCPU lock panics"));
    }

    /// When it entered the guest after the last resume; `None` if it has not yet.
    pub fn resumed_at(&self) -> Option<Instant> {
        self.control.lock().resumed_at
    }

    /// Waits until it has entered the guest after the last resume, or is parked again.
    pub fn wait_entered(&self) -> Option<Instant> {
        let shared = self.control.lock();
        let waiting = |s: &mut Shared| s.resumed_at.is_none() && s.wanted == Wanted::Running;
        self.control.changed.wait_while(shared, waiting).expect("no holder of the vCPU lock panics").resumed_at
    }

    /// The KVM vCPU of a parked vCPU. While it runs this blocks.
    pub fn fd(&self) -> MutexGuard<'_, VcpuFd> {
        self.fd.lock().expect("no holder of the vCPU's fd panics")
    }
}

impl Drop for Vcpu {
    fn drop(&mut self) {
        self.control.lock().wanted = Wanted::Gone;
        self.control.changed.notify_all();
        if let Err(error) = self.interrupt() {
            tracing::error!(%error, "a vCPU cannot be stopped");
            return;
        }
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!(vcpu = self.id, "the vCPU's thread panicked");
        }
    }
}
