//! The guest's time-stamp counter, tied to its kvm-clock.
//!
//! A guest compares the two all the time (Linux calls a TSC unstable that drifts from its clock by a tenth of a millisecond), so
//! both must be carried over as one reading, however long saving and restoring take. KVM_GET_CLOCK tells the clock together with
//! the host's TSC at the same instant, and KVM_VCPU_TSC_OFFSET what the guest's TSC is ahead of the host's (KVM API,
//! Documentation/virt/kvm/devices/vcpu.rst, section 4). Where KVM does not offer that, IA32_TSC is written, less exactly.
#![allow(unsafe_code)] // KVM_GET_DEVICE_ATTR and KVM_SET_DEVICE_ATTR take an address of ours

use kvm_bindings::{
    KVM_CLOCK_HOST_TSC, KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, KVMIO, kvm_clock_data, kvm_device_attr,
};
use kvm_ioctls::VcpuFd;
use vmm_sys_util::errno;
use vmm_sys_util::ioctl::ioctl_with_ref;

mod ioctl {
    #![allow(missing_docs)] // the macro writes a public function
    use super::{KVMIO, kvm_device_attr};
    vmm_sys_util::ioctl_iow_nr!(KVM_SET_DEVICE_ATTR, KVMIO, 0xe1, kvm_device_attr);
    vmm_sys_util::ioctl_iow_nr!(KVM_GET_DEVICE_ATTR, KVMIO, 0xe2, kvm_device_attr);
}

fn attribute(address: *const u64) -> kvm_device_attr {
    kvm_device_attr {
        group: KVM_VCPU_TSC_CTRL,
        attr: KVM_VCPU_TSC_OFFSET.into(),
        addr: address as u64,
        ..Default::default()
    }
}

/// How far the guest's TSC is ahead of the host's; `None` where KVM does not tell.
fn offset(fd: &VcpuFd) -> Option<u64> {
    let mut offset = 0u64;
    let attr = attribute(&raw mut offset);
    // SAFETY: KVM writes one u64 to the address in `attr`, which is that of `offset`.
    let result = unsafe { ioctl_with_ref(fd, ioctl::KVM_GET_DEVICE_ATTR(), &attr) };
    (result == 0).then_some(offset)
}

/// The guest's TSC at the instant of `clock`; `None` where KVM does not tell.
pub fn at(fd: &VcpuFd, clock: &kvm_clock_data) -> Option<u64> {
    let told = clock.flags & KVM_CLOCK_HOST_TSC != 0;
    offset(fd).filter(|_| told).map(|offset| clock.host_tsc.wrapping_add(offset))
}

/// Makes the guest's TSC what it must be now: it was `tsc` when the kvm-clock stood at `then_ns`, and runs with `khz`. `now` is
/// the clock as it is here. False where KVM cannot.
pub fn set(fd: &VcpuFd, tsc: u64, then_ns: u64, now: &kvm_clock_data, khz: u32) -> Result<bool, errno::Error> {
    if now.flags & KVM_CLOCK_HOST_TSC == 0 || offset(fd).is_none() {
        return Ok(false);
    }
    let passed_ns = now.clock.saturating_sub(then_ns);
    let expected = tsc.wrapping_add(ticks(passed_ns, khz));
    let offset = expected.wrapping_sub(now.host_tsc);
    // SAFETY: KVM reads one u64 from the address in the attribute, which is that of `offset`.
    match unsafe { ioctl_with_ref(fd, ioctl::KVM_SET_DEVICE_ATTR(), &attribute(&raw const offset)) } {
        0 => Ok(true),
        _ => Err(errno::Error::last()),
    }
}

/// Ticks of a counter of `khz` in `ns` nanoseconds.
pub fn ticks(ns: u64, khz: u32) -> u64 {
    (u128::from(ns) * u128::from(khz) / 1_000_000) as u64
}

#[cfg(test)]
mod tests {
    #[test]
    fn ticks_do_not_overflow() {
        assert_eq!(super::ticks(1_000_000_000, 2_445_000), 2_445_000_000);
        assert_eq!(super::ticks(u64::MAX, 1_000_000), u64::MAX);
    }
}
