//! Building a machine: all of it but what the guest's memory and registers hold. A kernel is then loaded into it
//! ([`Vm::load_kernel`]), or a saved state ([`crate::snapshot`]).

use std::sync::{Arc, Mutex};

use kvm_bindings::{KVM_PIT_SPEAKER_DUMMY, kvm_pit_config};
use kvm_ioctls::{IoEventAddress, VmFd};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};
use vmm_sys_util::eventfd::EventFd;

use crate::arch::boot::BootError;
use crate::arch::layout::{
    ACPI_TABLES, COM1_GSI, COM1_PORT, GED_GSI, KVM_IDENTITY_MAP, KVM_TSS, POWER_PORT, PVPANIC_PORT, VIRTIO_GSI_BASE,
    VIRTIO_MMIO_BASE, VIRTIO_MMIO_BYTES,
};
use crate::arch::regs::Entry;
use crate::arch::{acpi, boot, cpuid, msr, regs};
use crate::config::{ConfigError, VmConfig};
use crate::devices::bus::{Bus, BusDevice, OverlapError};
use crate::devices::io_thread::IoThread;
use crate::devices::power::{GuestEvents, PanicDevice, PowerDevice, ResetPort};
use crate::devices::serial::{ConsoleOutput, SERIAL_PORTS, SerialPort};
use crate::devices::virtio::device::VirtioDevice;
use crate::devices::virtio::net::Backend;
use crate::devices::virtio::{Balloon, MmioTransport, Net, Rng, SharedDevice};
use crate::host::Host;
use crate::memory::dirty::DirtyLog;
use crate::memory::{self, MemoryError, SharedMemory};
use crate::vcpu::{Exits, Vcpu, VcpuError};
use crate::vm::{GuestCpu, RunState, Vm};

/// A machine could not be built.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// The description is impossible.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// More memory than the host has free.
    #[error(
        "{wanted_mib} MiB of memory are asked for and this host has {available_mib} MiB available (of {total_mib} MiB)"
    )]
    HostMemory {
        /// The guest's, MiB.
        wanted_mib: u64,
        /// MemAvailable, MiB.
        available_mib: u64,
        /// MemTotal, MiB.
        total_mib: u64,
    },
    /// Memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// KVM refused something.
    #[error("{ioctl} failed")]
    Kvm {
        /// Which call.
        ioctl: &'static str,
        /// KVM's answer.
        #[source]
        source: vmm_sys_util::errno::Error,
    },
    /// No eventfd: too many open files, most likely.
    #[error("an eventfd cannot be made (too many open files?)")]
    EventFd(#[source] std::io::Error),
    /// The device thread.
    #[error("the device thread cannot be started")]
    IoThread(#[source] std::io::Error),
    /// A mistake of the caller's.
    #[error("{nics} network interfaces and {backends} host ends for them")]
    Backends {
        /// Interfaces of the machine.
        nics: usize,
        /// Host ends given.
        backends: usize,
    },
    /// Two devices at one address: a mistake in the layout.
    #[error(transparent)]
    Bus(#[from] OverlapError),
    /// vCPU threads.
    #[error(transparent)]
    Vcpu(#[from] VcpuError),
    /// MSRs of the cold boot.
    #[error(transparent)]
    Msr(#[from] msr::MsrError),
    /// The kernel.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// Boot structures outside memory.
    #[error("the boot structures do not fit in guest memory")]
    BootMemory(#[from] GuestMemoryError),
}

fn kvm(ioctl: &'static str) -> impl FnOnce(vmm_sys_util::errno::Error) -> BuildError {
    move |source| BuildError::Kvm { ioctl, source }
}

fn eventfd() -> Result<EventFd, BuildError> {
    EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(BuildError::EventFd)
}

/// An eventfd that raises `gsi`, edge-triggered.
pub(crate) fn interrupt_line(vm: &VmFd, gsi: u32) -> Result<EventFd, BuildError> {
    let fd = eventfd()?;
    vm.register_irqfd(&fd, gsi).map_err(kvm("KVM_IRQFD"))?;
    Ok(fd)
}

/// Refuses memory that the host cannot give: an overcommitted guest is killed later, in the middle of its work.
fn check_host_memory(host: &Host, bytes: u64) -> Result<(), BuildError> {
    let (total, available) = host.memory();
    if available > 0 && bytes > available {
        let [wanted_mib, available_mib, total_mib] = [bytes, available, total].map(|b| b >> 20);
        return Err(BuildError::HostMemory { wanted_mib, available_mib, total_mib });
    }
    Ok(())
}

/// A LAPIC as firmware leaves it: the PIC through LINT0, NMI through LINT1 (Intel SDM vol. 3, 11.5.1).
fn set_up_lapic(vcpu: &kvm_ioctls::VcpuFd) -> Result<(), BuildError> {
    const LVT_LINT0: usize = 0x350;
    const LVT_LINT1: usize = 0x360;
    const EXTINT: u32 = 7 << 8;
    const NMI: u32 = 4 << 8;
    let mut lapic = vcpu.get_lapic().map_err(kvm("KVM_GET_LAPIC"))?;
    for (register, mode) in [(LVT_LINT0, EXTINT), (LVT_LINT1, NMI)] {
        for (byte, value) in lapic.regs[register..register + 4].iter_mut().zip(mode.to_le_bytes()) {
            *byte = value.cast_signed();
        }
    }
    vcpu.set_lapic(&lapic).map_err(kvm("KVM_SET_LAPIC"))
}

impl Vm {
    /// Builds the machine `config`, paused, memory all zero. `nets` are the host's ends of its network interfaces, in the order of
    /// `config.nics` and as many.
    pub fn build<B: Backend + 'static>(
        host: &Host,
        config: VmConfig,
        nets: Vec<B>,
        console: ConsoleOutput,
        events: GuestEvents,
    ) -> Result<Self, BuildError> {
        config.validate()?;
        check_host_memory(host, config.memory_bytes)?;
        let fd = Arc::new(host.kvm.create_vm().map_err(kvm("KVM_CREATE_VM"))?);
        fd.set_tss_address(KVM_TSS as usize).map_err(kvm("KVM_SET_TSS_ADDR"))?;
        fd.set_identity_map_address(KVM_IDENTITY_MAP).map_err(kvm("KVM_SET_IDENTITY_MAP_ADDR"))?;
        // Memory before any device in the kernel: Linux 6.18 takes their old lists of devices apart later (call_srcu), and whoever sets
        // up memory meanwhile waits for that, 5 to 10 ms.
        let memory = memory::map(config.memory_bytes)?;
        let dirty = DirtyLog::new(fd.clone(), memory.clone())?;
        fd.create_irq_chip().map_err(kvm("KVM_CREATE_IRQCHIP"))?;
        let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
        fd.create_pit2(pit).map_err(kvm("KVM_CREATE_PIT2"))?;

        let serial = Arc::new(Mutex::new(SerialPort::new(interrupt_line(&fd, COM1_GSI)?, console)));
        let power = Arc::new(Mutex::new(PowerDevice::new(events.clone(), interrupt_line(&fd, GED_GSI)?)));
        let ports = port_bus(serial.clone(), power.clone(), &events)?;
        let io = IoThread::spawn("devices").map_err(BuildError::IoThread)?;
        let mut mmio = Bus::default();
        let mut slots = VirtioSlots { vm: &fd, io: &io, memory: &memory, bus: &mut mmio, transports: Vec::new() };
        slots.plug(Rng::new())?;
        if nets.len() != config.nics.len() {
            return Err(BuildError::Backends { nics: config.nics.len(), backends: nets.len() });
        }
        let nets = config.nics.iter().zip(nets).map(|(nic, backend)| slots.plug(Net::new(nic.clone(), backend)));
        let nets = nets.collect::<Result<Vec<_>, _>>()?;
        // Last, so that the interfaces' slots do not depend on it.
        slots.plug(Balloon::new())?;
        let virtio = slots.transports;

        let exits = Exits { ports: Arc::new(ports), mmio: Arc::new(mmio), events };
        let mut vcpus = Vec::new();
        let mut cpu = GuestCpu { cpuid: Vec::new(), tsc_khz: 0 };
        for id in 0..config.cpus {
            let vcpu = fd.create_vcpu(id.into()).map_err(kvm("KVM_CREATE_VCPU"))?;
            let cpuid = cpuid::for_vcpu(&host.cpuid, id, config.cpus);
            vcpu.set_cpuid2(&cpuid).map_err(kvm("KVM_SET_CPUID2"))?;
            set_up_lapic(&vcpu)?;
            cpu.cpuid.push(cpuid.as_slice().to_vec());
            cpu.tsc_khz = vcpu.get_tsc_khz().map_err(kvm("KVM_GET_TSC_KHZ"))?;
            vcpus.push(Vcpu::new(id, vcpu, exits.clone())?);
        }
        Ok(Vm {
            throttle: None,
            vcpus: vcpus.into(),
            io,
            virtio,
            nets,
            serial,
            power,
            dirty,
            fd,
            memory,
            touched: host.touched.clone(),
            config,
            cpu,
            msr_indices: host.msr_indices.clone(),
            state: RunState::Paused,
        })
    }

    /// Puts a kernel into a machine just built, so that [`Vm::resume`] boots it.
    pub fn load_kernel(&mut self, kernel: &[u8], initrd: Option<&[u8]>, cmdline: &str) -> Result<(), BuildError> {
        let entry = boot::load(&*self.memory, kernel, initrd, cmdline)?;
        self.memory.write_slice(&acpi::tables(self.config.cpus, self.virtio.len()), GuestAddress(ACPI_TABLES))?;
        self.set_boot_registers(entry, &self.memory.clone())
    }

    /// The first vCPU gets the boot protocol's registers; the others wait for INIT and SIPI as KVM made them.
    fn set_boot_registers(&self, entry: Entry, memory: &SharedMemory) -> Result<(), BuildError> {
        for vcpu in self.vcpus.iter() {
            let fd = vcpu.fd();
            msr::write(&fd, &msr::boot_entries())?;
            if vcpu.id() == 0 {
                let mut sregs = fd.get_sregs().map_err(kvm("KVM_GET_SREGS"))?;
                let regs = regs::set_up(&**memory, entry, &mut sregs)?;
                fd.set_sregs(&sregs).map_err(kvm("KVM_SET_SREGS"))?;
                fd.set_regs(&regs).map_err(kvm("KVM_SET_REGS"))?;
            }
        }
        Ok(())
    }
}

/// Plugs virtio devices into slot after slot: registers, interrupt, notifications.
struct VirtioSlots<'a> {
    vm: &'a VmFd,
    io: &'a IoThread,
    memory: &'a SharedMemory,
    bus: &'a mut Bus,
    transports: Vec<Arc<Mutex<MmioTransport>>>,
}

impl VirtioSlots<'_> {
    fn plug<D: VirtioDevice + 'static>(&mut self, device: D) -> Result<SharedDevice<D>, BuildError> {
        let slot = self.transports.len() as u32;
        let base = VIRTIO_MMIO_BASE + u64::from(slot) * VIRTIO_MMIO_BYTES;
        let (transport, device) = MmioTransport::new(self.memory.clone(), device).map_err(BuildError::EventFd)?;
        self.vm.register_irqfd(transport.irq_eventfd(), VIRTIO_GSI_BASE + slot).map_err(kvm("KVM_IRQFD"))?;
        for notification in transport.notifications() {
            let address = IoEventAddress::Mmio(base + notification.offset);
            self.vm
                .register_ioevent(notification.eventfd, &address, notification.queue)
                .map_err(kvm("KVM_IOEVENTFD"))?;
        }
        transport.attach(&self.io.handle()).map_err(BuildError::IoThread)?;
        let transport = Arc::new(Mutex::new(transport));
        self.bus.insert(base, VIRTIO_MMIO_BYTES, transport.clone())?;
        self.transports.push(transport);
        Ok(device)
    }
}

const KEYBOARD_CONTROLLER: u64 = 0x64;
const KEYBOARD_RESET: &[u8] = &[0xfe];
const CHIPSET_RESET: u64 = 0xcf9;
const CHIPSET_RESETS: &[u8] = &[0x6, 0xe];

fn port_bus(
    serial: Arc<Mutex<SerialPort>>,
    power: Arc<Mutex<PowerDevice>>,
    events: &GuestEvents,
) -> Result<Bus, OverlapError> {
    let shared = |device: ResetPort| -> Arc<Mutex<dyn BusDevice>> { Arc::new(Mutex::new(device)) };
    let mut bus = Bus::default();
    bus.insert(COM1_PORT, SERIAL_PORTS, serial)?;
    bus.insert(POWER_PORT, acpi::POWER_PORT_BYTES, power)?;
    bus.insert(PVPANIC_PORT, 1, Arc::new(Mutex::new(PanicDevice(events.clone()))))?;
    bus.insert(KEYBOARD_CONTROLLER, 1, shared(ResetPort { events: events.clone(), values: KEYBOARD_RESET }))?;
    bus.insert(CHIPSET_RESET, 1, shared(ResetPort { events: events.clone(), values: CHIPSET_RESETS }))?;
    Ok(bus)
}
