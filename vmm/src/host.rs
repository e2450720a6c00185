//! What this host can do: KVM and its capabilities, its CPU, its memory. Every lack is named.

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader};
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;

use kvm_bindings::{KVM_API_VERSION, kvm_cpuid_entry2};
use kvm_ioctls::{Cap, Kvm};
use serde::{Deserialize, Serialize};

use crate::arch::cpuid::{self, CpuidError};

pub mod touched;

use touched::Touched;

/// Why no VM can run here.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// There is no /dev/kvm.
    #[error(
        "this machine has no /dev/kvm: switch on virtualization in the firmware and load the module kvm_intel or kvm_amd \
         (in a VM: allow nested virtualization)"
    )]
    NoKvm,
    /// /dev/kvm is there and not ours to open.
    #[error(
        "no permission to open /dev/kvm: run as root, or join its group (usually: sudo usermod -aG kvm $USER, then log in again)"
    )]
    Permission,
    /// Opening failed otherwise.
    #[error("/dev/kvm cannot be opened")]
    Open(#[source] io::Error),
    /// An ancient kernel.
    #[error(
        "/dev/kvm answers with API version {found}, KVM with {KVM_API_VERSION} (since Linux 2.6.22): is that device KVM's?"
    )]
    ApiVersion {
        /// What KVM says.
        found: i32,
    },
    /// Capabilities are missing.
    #[error("this kernel's KVM lacks what a VM needs: {}", .0.join(", "))]
    Capabilities(Vec<&'static str>),
    /// CPUID could not be read.
    #[error(transparent)]
    Cpuid(#[from] CpuidError),
    /// The MSR list could not be read.
    #[error("KVM refused KVM_GET_MSR_INDEX_LIST")]
    Msrs(#[source] vmm_sys_util::errno::Error),
}

/// What every VM of ours needs of KVM.
const REQUIRED: &[(Cap, &str)] = &[
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
    (Cap::Irqfd, "KVM_CAP_IRQFD"),
    (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
    (Cap::Pit2, "KVM_CAP_PIT2"),
    (Cap::PitState2, "KVM_CAP_PIT_STATE2"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
    (Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR"),
    (Cap::SetIdentityMapAddr, "KVM_CAP_SET_IDENTITY_MAP_ADDR"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
    (Cap::AdjustClock, "KVM_CAP_ADJUST_CLOCK"),
    (Cap::MpState, "KVM_CAP_MP_STATE"),
    (Cap::VcpuEvents, "KVM_CAP_VCPU_EVENTS"),
    (Cap::Debugregs, "KVM_CAP_DEBUGREGS"),
    (Cap::Xsave, "KVM_CAP_XSAVE"),
    (Cap::Xcrs, "KVM_CAP_XCRS"),
    (Cap::GetTscKhz, "KVM_CAP_GET_TSC_KHZ"),
];

/// An open /dev/kvm that has all that is needed.
pub struct Host {
    /// KVM itself.
    pub kvm: Kvm,
    /// CPUID as a guest can get it here.
    pub cpuid: Vec<kvm_cpuid_entry2>,
    /// The MSRs that are part of a vCPU's state here.
    pub msr_indices: Vec<u32>,
    /// The page table of this process: opened once, while files can be.
    pub touched: Touched,
    cpu: Cpu,
    kernel: String,
    meminfo: Option<File>,
}

/// What /proc/cpuinfo says.
struct Cpu {
    model: String,
    kvm: KvmKind,
}

impl Host {
    /// Opens /dev/kvm and checks it.
    pub fn open() -> Result<Self, HostError> {
        use std::io::ErrorKind::{NotFound, PermissionDenied};
        let fd = fs::OpenOptions::new().read(true).write(true).open("/dev/kvm").map_err(|e| match e.kind() {
            NotFound => HostError::NoKvm,
            PermissionDenied => HostError::Permission,
            // ENXIO and ENODEV: the node is there, the module is not.
            _ if matches!(e.raw_os_error(), Some(libc::ENXIO | libc::ENODEV)) => HostError::NoKvm,
            _ => HostError::Open(e),
        })?;
        let kvm = kvm_from(fd.into());
        let found = kvm.get_api_version();
        if found != KVM_API_VERSION as i32 {
            return Err(HostError::ApiVersion { found });
        }
        let missing: Vec<_> =
            REQUIRED.iter().filter(|(cap, _)| !kvm.check_extension(*cap)).map(|(_, name)| *name).collect();
        if !missing.is_empty() {
            return Err(HostError::Capabilities(missing));
        }
        let cpuid = cpuid::supported(&kvm)?;
        let msr_indices = kvm.get_msr_index_list().map_err(HostError::Msrs)?.as_slice().to_vec();
        let kernel = rustix::system::uname().release().to_string_lossy().into_owned();
        let meminfo = File::open("/proc/meminfo").ok();
        Ok(Host { kvm, cpuid, msr_indices, touched: Touched::open(), cpu: Cpu::look(), kernel, meminfo })
    }

    /// Total and available RAM in bytes, as of now; zeros where /proc/meminfo cannot be read.
    pub fn memory(&self) -> (u64, u64) {
        let mut text = [0; 4096];
        let length = self.meminfo.as_ref().and_then(|file| file.read_at(&mut text, 0).ok()).unwrap_or(0);
        let text = String::from_utf8_lossy(&text[..length]);
        let kib = |key: &str| -> u64 {
            let line = text.lines().find_map(|l| l.strip_prefix(key)?.strip_prefix(':'));
            line.and_then(|l| l.trim().strip_suffix(" kB")?.parse().ok()).unwrap_or(0)
        };
        (kib("MemTotal") << 10, kib("MemAvailable") << 10)
    }

    /// The TSC frequency that a guest gets here, if KVM tells.
    pub fn tsc_khz(&self) -> Option<u32> {
        let vm = self.kvm.create_vm().ok()?;
        vm.create_vcpu(0).ok()?.get_tsc_khz().ok()
    }

    /// What a person or a peer wants to know of this host.
    pub fn facts(&self) -> HostFacts {
        let (memory_bytes, memory_available_bytes) = self.memory();
        HostFacts {
            cpu_model: self.cpu.model.clone(),
            cpu_vendor: cpuid::vendor(&self.cpuid),
            kernel: self.kernel.clone(),
            kvm: self.cpu.kvm,
            max_vcpus: self.kvm.get_nr_vcpus(),
            tsc_scaling: self.kvm.check_extension(Cap::TscControl),
            manual_dirty_log: self.kvm.check_extension_raw(kvm_bindings::KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2.into()) > 0,
            memory_bytes,
            memory_available_bytes,
        }
    }
}

#[allow(unsafe_code)]
fn kvm_from(fd: OwnedFd) -> Kvm {
    use std::os::fd::IntoRawFd;
    // SAFETY: the descriptor is open on /dev/kvm and owned by nobody else from here on.
    unsafe { Kvm::from_raw_fd(fd.into_raw_fd()) }
}

/// How KVM runs guests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum KvmKind {
    /// With the processor's virtualization (VMX or SVM).
    Hardware,
    /// Without it (PVM and the like): guest ring 3 runs natively, ring 0 is emulated and slow.
    Software,
}

/// This host, for `doctor` and for a peer's preflight.
#[derive(Debug, Clone, Serialize)]
pub struct HostFacts {
    /// As in /proc/cpuinfo.
    pub cpu_model: String,
    /// `GenuineIntel`, `AuthenticAMD`, …
    pub cpu_vendor: String,
    /// Kernel release.
    pub kernel: String,
    /// Hardware or software virtualization.
    pub kvm: KvmKind,
    /// vCPUs that KVM recommends at most.
    pub max_vcpus: usize,
    /// Whether a guest can keep its TSC frequency on a host of another one (KVM_CAP_TSC_CONTROL).
    pub tsc_scaling: bool,
    /// Whether the dirty log is cleared by chunks (KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2).
    pub manual_dirty_log: bool,
    /// RAM of the host.
    pub memory_bytes: u64,
    /// RAM that could be used now (MemAvailable).
    pub memory_available_bytes: u64,
}

impl Cpu {
    /// Looks at the first CPU: there is one paragraph for each.
    fn look() -> Self {
        let (mut model, mut flags) = (None, None);
        let lines = File::open("/proc/cpuinfo").map(|file| BufReader::new(file).lines());
        for line in lines.into_iter().flatten().map_while(io::Result::ok).take_while(|line| !line.is_empty()) {
            match line.split_once(':').map(|(key, value)| (key.trim(), value.trim())) {
                Some(("model name", value)) => model = Some(value.to_string()),
                Some(("flags", value)) => flags = Some(value.to_string()),
                _ => {}
            }
        }
        // KVM without VMX and SVM is a software one.
        let hardware = flags.is_some_and(|flags| flags.split(' ').any(|flag| flag == "vmx" || flag == "svm"));
        let kvm = if hardware { KvmKind::Hardware } else { KvmKind::Software };
        Cpu { model: model.unwrap_or_else(|| "unknown".into()), kvm }
    }
}
