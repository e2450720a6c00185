//! A vCPU's state, and the order in which KVM wants it read and written.
//!
//! Saving: `mp_state` first (KVM_GET_MP_STATE delivers pending INIT/SIPI events, which change the rest), events last but MSRs.
//! Restoring: CPUID before all (it decides what the rest may hold); SREGS before the local APIC (they hold the APIC base); the
//! local APIC before MSRs, or a TSC-deadline timer is set on an APIC that is not in that mode and dies without a word; the TSC
//! before its deadline, and after the kvm-clock that it is tied to; events and `mp_state` last.

use kvm_bindings::{
    KVM_MAX_CPUID_ENTRIES, KVM_MAX_MSR_ENTRIES, kvm_clock_data, kvm_cpuid_entry2, kvm_debugregs, kvm_lapic_state,
    kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::VcpuFd;
use serde::{Deserialize, Serialize};

use super::tsc;
use crate::arch::msr::{self, IA32_TSC, IA32_TSC_DEADLINE, MsrError};

/// All of a vCPU.
#[derive(Debug, Serialize, Deserialize)]
pub struct VcpuState {
    pub(crate) cpuid: Vec<kvm_cpuid_entry2>,
    pub(crate) tsc_khz: u32,
    /// The TSC at the instant of the machine's saved clock, where KVM can tell; else IA32_TSC among `msrs` has to do.
    pub(crate) tsc: Option<u64>,
    pub(crate) mp_state: kvm_mp_state,
    pub(crate) regs: kvm_regs,
    pub(crate) sregs: kvm_sregs,
    pub(crate) xsave: kvm_xsave,
    pub(crate) xcrs: kvm_xcrs,
    pub(crate) debug_regs: kvm_debugregs,
    pub(crate) lapic: kvm_lapic_state,
    pub(crate) msrs: Vec<kvm_msr_entry>,
    pub(crate) events: kvm_vcpu_events,
}

/// KVM would not give or take a part of a vCPU's state.
#[derive(Debug, thiserror::Error)]
pub enum VcpuStateError {
    /// An ioctl failed.
    #[error("vCPU {id}: {ioctl} failed")]
    Ioctl {
        /// Which vCPU.
        id: u8,
        /// Which call.
        ioctl: &'static str,
        /// KVM's answer.
        #[source]
        source: vmm_sys_util::errno::Error,
    },
    /// MSRs failed.
    #[error("vCPU {id}")]
    Msr {
        /// Which vCPU.
        id: u8,
        /// Why.
        #[source]
        source: MsrError,
    },
    /// The saved state is not one of a vCPU.
    #[error("vCPU {id}: saved state has {what}")]
    Invalid {
        /// Which vCPU.
        id: u8,
        /// What cannot be.
        what: String,
    },
}

impl VcpuState {
    /// Checks the counts, which KVM would not: of vCPU `id`.
    pub(crate) fn check(&self, id: u8) -> Result<(), VcpuStateError> {
        for (what, count, most) in
            [("MSRs", self.msrs.len(), KVM_MAX_MSR_ENTRIES), ("CPUID entries", self.cpuid.len(), KVM_MAX_CPUID_ENTRIES)]
        {
            if count > most {
                return Err(VcpuStateError::Invalid { id, what: format!("{count} {what}, at most {most} can be set") });
            }
        }
        Ok(())
    }
}

/// Reads the state of the parked vCPU `id`. `cpuid` is what it was told: KVM_GET_CPUID2 is not asked, because a software KVM
/// answers with what the processor has. `clock` is the machine's, just saved. `msr_indices` are those that this host saves.
pub fn save(
    id: u8,
    fd: &VcpuFd,
    cpuid: &[kvm_cpuid_entry2],
    clock: &kvm_clock_data,
    msr_indices: &[u32],
) -> Result<VcpuState, VcpuStateError> {
    let ioctl = |ioctl| move |source| VcpuStateError::Ioctl { id, ioctl, source };
    let mp_state = fd.get_mp_state().map_err(ioctl("KVM_GET_MP_STATE"))?;
    Ok(VcpuState {
        mp_state,
        tsc: tsc::at(fd, clock),
        cpuid: cpuid.to_vec(),
        tsc_khz: fd.get_tsc_khz().map_err(ioctl("KVM_GET_TSC_KHZ"))?,
        regs: fd.get_regs().map_err(ioctl("KVM_GET_REGS"))?,
        sregs: fd.get_sregs().map_err(ioctl("KVM_GET_SREGS"))?,
        xsave: fd.get_xsave().map_err(ioctl("KVM_GET_XSAVE"))?,
        xcrs: fd.get_xcrs().map_err(ioctl("KVM_GET_XCRS"))?,
        debug_regs: fd.get_debug_regs().map_err(ioctl("KVM_GET_DEBUGREGS"))?,
        lapic: fd.get_lapic().map_err(ioctl("KVM_GET_LAPIC"))?,
        msrs: msr::read(fd, msr_indices).map_err(|source| VcpuStateError::Msr { id, source })?,
        events: fd.get_vcpu_events().map_err(ioctl("KVM_GET_VCPU_EVENTS"))?,
    })
}

/// How the guest's time has gone on between saving and restoring.
pub struct Passed {
    /// The kvm-clock as it was saved.
    pub then: kvm_clock_data,
    /// The kvm-clock here, set and read again.
    pub now: kvm_clock_data,
}

/// Sets the state, which was [checked](VcpuState::check), of the parked, fresh vCPU `id`, which has been told `told` as its CPUID.
/// Its TSC goes on by what has `passed` for the kvm-clock, which is set already.
pub fn restore(
    id: u8,
    fd: &VcpuFd,
    told: &[kvm_cpuid_entry2],
    state: &VcpuState,
    passed: &Passed,
) -> Result<(), VcpuStateError> {
    let VcpuState { cpuid, tsc_khz, tsc, mp_state, regs, sregs, xsave, xcrs, debug_regs, lapic, msrs, events } = state;
    let ioctl = |ioctl| move |source| VcpuStateError::Ioctl { id, ioctl, source };
    // The slowest of all these calls, and between hosts of one kind there is nothing to change.
    if cpuid != told {
        let cpuid = kvm_bindings::CpuId::from_entries(cpuid).expect("the number of entries was checked");
        fd.set_cpuid2(&cpuid).map_err(ioctl("KVM_SET_CPUID2"))?;
    }
    // Needed only where the frequency differs, and refused where the host cannot scale: the preflight has compared them.
    if fd.get_tsc_khz().map_err(ioctl("KVM_GET_TSC_KHZ"))? != *tsc_khz {
        fd.set_tsc_khz(*tsc_khz).map_err(ioctl("KVM_SET_TSC_KHZ"))?;
    }
    fd.set_regs(regs).map_err(ioctl("KVM_SET_REGS"))?;
    set_xsave(fd, xsave).map_err(ioctl("KVM_SET_XSAVE"))?;
    fd.set_xcrs(xcrs).map_err(ioctl("KVM_SET_XCRS"))?;
    fd.set_sregs(sregs).map_err(ioctl("KVM_SET_SREGS"))?;
    fd.set_debug_regs(debug_regs).map_err(ioctl("KVM_SET_DEBUGREGS"))?;
    fd.set_lapic(lapic).map_err(ioctl("KVM_SET_LAPIC"))?;
    let mut msrs = msrs.clone();
    let exact = match tsc {
        Some(tsc) => {
            tsc::set(fd, *tsc, passed.then.clock, &passed.now, *tsc_khz).map_err(ioctl("KVM_VCPU_TSC_OFFSET"))?
        }
        None => false,
    };
    if exact {
        msrs.retain(|m| m.index != IA32_TSC);
    } else {
        let passed = tsc::ticks(passed.now.clock.saturating_sub(passed.then.clock), *tsc_khz);
        msrs.iter_mut().filter(|m| m.index == IA32_TSC).for_each(|m| m.data = m.data.wrapping_add(passed));
    }
    // The TSC first, its deadline last; the others keep their order.
    msrs.sort_by_key(|m| match m.index {
        IA32_TSC => 0,
        IA32_TSC_DEADLINE => 2,
        _ => 1,
    });
    msr::write(fd, &msrs).map_err(|source| VcpuStateError::Msr { id, source })?;
    fd.set_vcpu_events(events).map_err(ioctl("KVM_SET_VCPU_EVENTS"))?;
    fd.set_mp_state(*mp_state).map_err(ioctl("KVM_SET_MP_STATE"))
}

#[allow(unsafe_code)]
fn set_xsave(fd: &VcpuFd, xsave: &kvm_xsave) -> Result<(), vmm_sys_util::errno::Error> {
    // SAFETY: KVM reads 4096 bytes unless the process asked for dynamic XSAVE features (AMX) for its guests, and it never does.
    unsafe { fd.set_xsave(xsave) }
}
