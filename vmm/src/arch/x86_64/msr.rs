//! Model-specific registers: which ones are saved, and setting them with a name for the one that failed.

use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::VcpuFd;

/// IA32_TSC: set from the elapsed time, not as it was saved.
pub const IA32_TSC: u32 = 0x10;
/// IA32_TSC_DEADLINE: after the local APIC, or its timer dies without a word.
pub const IA32_TSC_DEADLINE: u32 = 0x6e0;
/// IA32_MISC_ENABLE.
pub const IA32_MISC_ENABLE: u32 = 0x1a0;
/// Fast string operations, which Linux expects on.
pub const MISC_ENABLE_FAST_STRING: u64 = 1;

/// KVM would not take an MSR.
#[derive(Debug, thiserror::Error)]
pub enum MsrError {
    /// The ioctl itself failed.
    #[error("KVM refused to {operation} MSRs")]
    Ioctl {
        /// `read` or `write`.
        operation: &'static str,
        /// KVM's answer.
        #[source]
        source: vmm_sys_util::errno::Error,
    },
    /// One register was refused; those before it are set.
    #[error("this host does not take MSR {index:#x} = {value:#x} (it has {current:?})")]
    Refused {
        /// The register's number.
        index: u32,
        /// The refused value.
        value: u64,
        /// What the register holds here, if it can be read.
        current: Option<u64>,
    },
}

fn entry(index: u32, data: u64) -> kvm_msr_entry {
    kvm_msr_entry { index, data, ..Default::default() }
}

/// Reads those of `indices` that can be read. KVM_GET_MSRS stops at the first that cannot: it is left out, and the rest read.
pub fn read(vcpu: &VcpuFd, indices: &[u32]) -> Result<Vec<kvm_msr_entry>, MsrError> {
    let mut found = Vec::with_capacity(indices.len());
    let mut rest = indices;
    while !rest.is_empty() {
        let entries: Vec<_> = rest.iter().map(|index| entry(*index, 0)).collect();
        let mut msrs = Msrs::from_entries(&entries).expect("an MSR list has fewer entries than KVM_MAX_MSR_ENTRIES");
        let count = vcpu.get_msrs(&mut msrs).map_err(|source| MsrError::Ioctl { operation: "read", source })?;
        found.extend_from_slice(&msrs.as_slice()[..count]);
        rest = &rest[(count + 1).min(rest.len())..];
    }
    Ok(found)
}

/// Writes `entries` in order. A register that is refused but already has the value (a read-only feature register of an equal
/// host, say) is no error.
pub fn write(vcpu: &VcpuFd, entries: &[kvm_msr_entry]) -> Result<(), MsrError> {
    let mut rest = entries;
    while !rest.is_empty() {
        let msrs = Msrs::from_entries(rest).expect("an MSR list has fewer entries than KVM_MAX_MSR_ENTRIES");
        let count = vcpu.set_msrs(&msrs).map_err(|source| MsrError::Ioctl { operation: "write", source })?;
        if let Some(refused) = rest.get(count) {
            let current = read(vcpu, &[refused.index])?.first().map(|e| e.data);
            if current != Some(refused.data) {
                return Err(MsrError::Refused { index: refused.index, value: refused.data, current });
            }
        }
        rest = &rest[(count + 1).min(rest.len())..];
    }
    Ok(())
}

/// The registers of a cold boot.
pub fn boot_entries() -> Vec<kvm_msr_entry> {
    vec![entry(IA32_MISC_ENABLE, MISC_ENABLE_FAST_STRING)]
}
