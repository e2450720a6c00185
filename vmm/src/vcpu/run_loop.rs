//! The vCPU's thread: enter the guest, answer its exits, park when asked.

use std::sync::Mutex;
use std::time::Instant;

use kvm_ioctls::{VcpuExit, VcpuFd};

use super::{Control, Exits, Shared, Wanted};
use crate::devices::power::GuestEvent;
use crate::sandbox::{self, ThreadKind};

/// Runs until the vCPU is dropped.
pub(super) fn run(id: u8, fd: &Mutex<VcpuFd>, control: &Control, exits: &Exits) {
    sandbox::confine(ThreadKind::Vcpu);
    loop {
        {
            let mut shared = control.lock();
            shared.parked = true;
            control.changed.notify_all();
            shared = control
                .changed
                .wait_while(shared, |s| s.wanted == Wanted::Parked)
                .expect("no holder of the vCPU lock panics");
            if shared.wanted == Wanted::Gone {
                return;
            }
            shared.parked = false;
            shared.resumed_at = Some(Instant::now());
            control.changed.notify_all();
        }
        let mut fd = fd.lock().expect("no holder of the vCPU's fd panics");
        if let Some(end) = run_until_parked(&mut fd, control, exits) {
            drop(fd);
            if end != GuestEvent::PowerOff {
                tracing::info!(vcpu = id, ?end, "the guest ended");
            }
            (exits.events)(end);
            let mut shared = control.lock();
            if shared.wanted == Wanted::Running {
                shared.wanted = Wanted::Parked;
            }
        }
    }
}

/// Runs the guest until the owner wants it parked (None) or it cannot go on.
fn run_until_parked(fd: &mut VcpuFd, control: &Control, exits: &Exits) -> Option<GuestEvent> {
    loop {
        let crash = match fd.run() {
            Ok(VcpuExit::IoOut(port, data)) => {
                exits.ports.write(port.into(), data);
                continue;
            }
            Ok(VcpuExit::IoIn(port, data)) => {
                exits.ports.read(port.into(), data);
                continue;
            }
            Ok(VcpuExit::MmioRead(address, data)) => {
                exits.mmio.read(address, data);
                continue;
            }
            Ok(VcpuExit::MmioWrite(address, data)) => {
                exits.mmio.write(address, data);
                continue;
            }
            Ok(VcpuExit::Intr | VcpuExit::IrqWindowOpen | VcpuExit::IoapicEoi(_)) => continue,
            Ok(VcpuExit::Shutdown) => "triple fault".to_string(),
            Ok(VcpuExit::SystemEvent(kind, _)) => format!("KVM system event {kind}"),
            Ok(VcpuExit::InternalError) => {
                "KVM cannot emulate what the guest does (KVM_EXIT_INTERNAL_ERROR)".to_string()
            }
            Ok(VcpuExit::FailEntry(reason, cpu)) => {
                format!("the host's CPU {cpu} refuses to enter the guest (reason {reason:#x})")
            }
            Ok(VcpuExit::Hlt) => "the guest halted a CPU that nothing can wake".to_string(),
            Ok(other) => format!("KVM exit that is not handled: {other:?}"),
            Err(error) if error.errno() == libc::EINTR => {
                // Only here may the vCPU park: KVM_RUN has completed the access of the exit before.
                fd.set_kvm_immediate_exit(0);
                let mut shared = control.lock();
                let rest = std::mem::take(&mut shared.rest);
                if !rest.is_zero() {
                    let running = |s: &mut Shared| s.wanted == Wanted::Running;
                    let rested = control.changed.wait_timeout_while(shared, rest, running);
                    shared = rested.expect("no holder of the vCPU lock panics").0;
                }
                if shared.wanted != Wanted::Running {
                    return None;
                }
                continue;
            }
            Err(error) if error.errno() == libc::EAGAIN => continue,
            Err(error) => format!("KVM_RUN failed: {error}"),
        };
        let at = fd.get_regs().map_or_else(|_| String::new(), |regs| format!(" at rip {:#x}", regs.rip));
        return Some(GuestEvent::Crashed(format!("{crash}{at}")));
    }
}
