//! A virtual machine and its life: it is built paused, runs, pauses, and says when its guest ends.
//!
//! Pausing stops the vCPUs together, then the device thread; after that nothing of ours touches guest memory, so state can be
//! read. Resuming goes the other way round.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use kvm_bindings::kvm_cpuid_entry2;
use kvm_ioctls::VmFd;

use crate::arch::layout::RamRegion;
use crate::config::VmConfig;
use crate::devices::io_thread::IoThread;
use crate::devices::power::PowerDevice;
use crate::devices::serial::SerialPort;
use crate::devices::virtio::{MmioTransport, Net, NetAddresses, NetStatistics, SharedDevice};
use crate::host::touched::Touched;
use crate::memory::dirty::{DirtyLog, Rearmer};
use crate::memory::pages::Pages;
use crate::memory::{self, MemoryError, SharedMemory};
use crate::vcpu::throttle::Throttle;
use crate::vcpu::{Vcpu, VcpuError};

/// Whether the guest makes progress.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RunState {
    /// vCPUs are parked, devices at rest.
    Paused,
    /// vCPUs run.
    Running,
}

/// What the guest was told of its CPU, and counts on wherever it runs.
#[derive(Debug, Clone)]
pub struct GuestCpu {
    /// CPUID of each vCPU. They differ in APIC ids only.
    pub cpuid: Vec<Vec<kvm_cpuid_entry2>>,
    /// Frequency of its TSC.
    pub tsc_khz: u32,
}

/// One virtual machine. Field order is drop order: threads end before what they use is gone.
pub struct Vm {
    pub(crate) throttle: Option<Throttle>,
    pub(crate) vcpus: Arc<[Vcpu]>,
    pub(crate) io: IoThread,
    pub(crate) virtio: Vec<Arc<Mutex<MmioTransport>>>,
    pub(crate) nets: Vec<SharedDevice<Net>>,
    pub(crate) serial: Arc<Mutex<SerialPort>>,
    pub(crate) power: Arc<Mutex<PowerDevice>>,
    pub(crate) dirty: DirtyLog,
    pub(crate) fd: Arc<VmFd>,
    pub(crate) memory: SharedMemory,
    pub(crate) touched: Touched,
    pub(crate) config: VmConfig,
    pub(crate) cpu: GuestCpu,
    pub(crate) msr_indices: Vec<u32>,
    pub(crate) state: RunState,
}

/// What takes long to free of a [`Vm`]: its memory, and KVM's part of it. Who holds this can drop the VM, and with it its threads,
/// its TAPs and all that others may wait for, and free the rest later.
#[derive(Debug)]
pub struct Remains {
    _fd: Arc<VmFd>,
    _memory: SharedMemory,
}

impl Vm {
    /// See [`Remains`].
    pub fn remains(&self) -> Remains {
        Remains { _fd: self.fd.clone(), _memory: self.memory.clone() }
    }

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
        Pages::new(self.memory.clone(), self.touched.clone())
    }

    /// Where its RAM is.
    pub fn ram_regions(&self) -> Vec<RamRegion> {
        memory::regions(&self.memory)
    }

    /// What the guest was told of its CPU.
    pub fn cpu(&self) -> &GuestCpu {
        &self.cpu
    }

    /// The console.
    pub fn serial(&self) -> Arc<Mutex<SerialPort>> {
        self.serial.clone()
    }

    /// The power button.
    pub fn power(&self) -> Arc<Mutex<PowerDevice>> {
        self.power.clone()
    }

    /// What is known of the addresses of each network interface.
    pub fn addresses(&self) -> Vec<NetAddresses> {
        self.nets.iter().map(|net| locked(net).addresses()).collect()
    }

    /// What each network interface has carried.
    pub fn traffic(&self) -> Vec<NetStatistics> {
        self.nets.iter().map(|net| locked(net).statistics()).collect()
    }

    /// Sends an Ethernet frame out of interface `nic` as if the guest had sent it.
    pub fn inject(&self, nic: usize, frame: &[u8]) -> io::Result<()> {
        let no_such = || io::Error::new(io::ErrorKind::NotFound, format!("there is no network interface {nic}"));
        locked(self.nets.get(nic).ok_or_else(no_such)?).inject(frame)
    }

    /// Whether the guest can announce its addresses itself, on any interface.
    pub fn guest_can_announce(&self) -> bool {
        self.nets.iter().any(|net| locked(net).guest_can_announce())
    }

    /// Asks it to, on every interface where it can.
    pub fn guest_announce(&self) {
        self.nets.iter().for_each(|net| {
            locked(net).guest_announce();
        });
    }

    /// Lets the guest run.
    pub fn resume(&mut self) {
        if self.state == RunState::Paused {
            self.io.resume();
            self.vcpus.iter().for_each(Vcpu::resume);
            self.state = RunState::Running;
        }
    }

    /// Stops the guest where it is. Returns when no vCPU runs and no device touches memory.
    pub fn pause(&mut self) -> Result<(), VcpuError> {
        if self.state == RunState::Running {
            if let Err(error) = self.vcpus.iter().try_for_each(Vcpu::request_pause) {
                self.vcpus.iter().for_each(Vcpu::resume);
                return Err(error);
            }
            self.vcpus.iter().for_each(Vcpu::wait_parked);
            self.io.pause();
            for vcpu in self.vcpus.iter() {
                // Tells a guest with kvm-clock that it was stopped, so that its watchdogs do not bark; EINVAL without one.
                let _ = vcpu.fd().kvmclock_ctrl();
            }
            self.state = RunState::Paused;
        }
        Ok(())
    }

    /// Takes `permille` thousandths (at most [`crate::vcpu::throttle::MAX_PERMILLE`]) of each vCPU's time from the guest, in rests of half a millisecond or little more; 0
    /// gives it all back.
    pub fn throttle(&mut self, permille: u16) -> io::Result<()> {
        match &self.throttle {
            _ if permille == 0 => self.throttle = None,
            Some(throttle) => throttle.set(permille),
            None => self.throttle = Some(Throttle::start(self.vcpus.clone(), permille)?),
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

/// Devices stay usable when a thread that held their lock panicked: their registers are changed in single steps.
pub(crate) fn locked<T: ?Sized>(device: &Mutex<T>) -> MutexGuard<'_, T> {
    device.lock().unwrap_or_else(PoisonError::into_inner)
}
