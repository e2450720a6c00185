//! A virtual machine and its life: it is built paused, runs, pauses, and says when its guest ends.
//!
//! Pausing stops the vCPUs together, then the device thread; after that nothing of ours touches guest memory, so state can be
//! read. Resuming goes the other way round.

use std::sync::mpsc::Receiver;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use kvm_ioctls::VmFd;

use crate::config::VmConfig;
use crate::devices::power::{GuestEvent, PowerDevice};
use crate::devices::serial::SerialPort;
use crate::memory::dirty::{DirtyLog, Rearmer};
use crate::memory::pages::Pages;
use crate::memory::{MemoryError, SharedMemory};
use crate::vcpu::{Vcpu, VcpuError};

/// Whether the guest makes progress.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RunState {
    /// vCPUs are parked, devices at rest.
    Paused,
    /// vCPUs run.
    Running,
}

/// One virtual machine. Field order is drop order: threads end before what they use is gone.
pub struct Vm {
    pub(crate) vcpus: Vec<Vcpu>,
    pub(crate) serial: Arc<Mutex<SerialPort>>,
    pub(crate) power: Arc<Mutex<PowerDevice>>,
    pub(crate) dirty: DirtyLog,
    pub(crate) fd: Arc<VmFd>,
    pub(crate) memory: SharedMemory,
    pub(crate) config: VmConfig,
    pub(crate) msr_indices: Vec<u32>,
    pub(crate) state: RunState,
    pub(crate) events: Option<Receiver<GuestEvent>>,
}

impl Vm {
    /// The machine that the guest sees.
    pub fn config(&self) -> &VmConfig {
        &self.config
    }

    /// Whether it runs.
    pub fn state(&self) -> RunState {
        self.state
    }

    /// The guest's memory as pages.
    pub fn pages(&self) -> Pages {
        Pages::new(self.memory.clone())
    }

    /// Where the guest's end will be reported; to be taken once.
    pub fn take_events(&mut self) -> Option<Receiver<GuestEvent>> {
        self.events.take()
    }

    /// The console.
    pub fn serial(&self) -> Arc<Mutex<SerialPort>> {
        self.serial.clone()
    }

    /// The power button.
    pub fn power(&self) -> Arc<Mutex<PowerDevice>> {
        self.power.clone()
    }

    /// Lets the guest run.
    pub fn resume(&mut self) {
        if self.state == RunState::Paused {
            self.vcpus.iter().for_each(Vcpu::resume);
            self.state = RunState::Running;
        }
    }

    /// Stops the guest where it is. Returns when no vCPU runs and no device touches memory.
    pub fn pause(&mut self) -> Result<(), VcpuError> {
        if self.state == RunState::Running {
            self.vcpus.iter().try_for_each(Vcpu::request_pause)?;
            self.vcpus.iter().for_each(Vcpu::wait_parked);
            for vcpu in &self.vcpus {
                // Tells a guest with kvm-clock that it was stopped, so that its watchdogs do not bark; EINVAL without one.
                let _ = vcpu.fd().kvmclock_ctrl();
            }
            self.state = RunState::Paused;
        }
        Ok(())
    }

    /// When the first vCPU entered the guest after the last [`Self::resume`]; waits for it.
    pub fn wait_entered(&self) -> Option<Instant> {
        self.vcpus.iter().filter_map(Vcpu::wait_entered).min()
    }

    /// Starts logging dirty pages; every page counts as dirty now.
    pub fn start_dirty_log(&mut self) -> Result<(), MemoryError> {
        self.dirty.start()
    }

    /// See [`DirtyLog::collect`].
    pub fn collect_dirty(&mut self) -> Result<Vec<Vec<u64>>, MemoryError> {
        self.dirty.collect()
    }

    /// See [`DirtyLog::rearmer`].
    pub fn rearmer(&self) -> Rearmer {
        self.dirty.rearmer()
    }

    /// Stops logging dirty pages.
    pub fn stop_dirty_log(&mut self) -> Result<(), MemoryError> {
        self.dirty.stop()
    }
}
