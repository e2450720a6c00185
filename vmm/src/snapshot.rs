//! The state of everything but memory, as versioned sections.
//!
//! A section is `(kind, instance, version)` and bytes (postcard). Saving and restoring destructure exhaustively, so that a new
//! field does not build until both handle it. Restoring takes a set of sections that fits the machine exactly: a missing, doubled
//! or unknown section is an error, before anything is changed.
//!
//! Order of restoring: interrupt controllers and PIT first (devices raise lines into them), then the kvm-clock, then vCPUs, whose
//! TSCs are tied to that clock, then devices.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use kvm_bindings::{
    KVM_CLOCK_REALTIME, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_clock_data, kvm_irqchip,
    kvm_pit_state2,
};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::devices::power::{PowerState, PowerStateError};
use crate::devices::serial::{SerialState, SerialStateError};
use crate::devices::virtio::{MmioTransportState, RestoreError};
use crate::vcpu::state::{self as vcpu_state, Passed, VcpuState, VcpuStateError};
use crate::vm::{GuestCpu, RunState, Vm, locked};

/// One piece of saved state.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Section {
    /// What it is the state of: see [`kind`].
    pub kind: u16,
    /// Which one of these: vCPU number, virtio slot; 0 where there is one.
    pub instance: u16,
    /// Version of the bytes.
    pub version: u16,
    /// Postcard of the kind's saved type.
    pub bytes: Vec<u8>,
}

/// The kinds of sections. Numbers are never used again for another meaning.
pub mod kind {
    /// Interrupt controllers, PIT and clock of the machine.
    pub const MACHINE: u16 = 1;
    /// A vCPU.
    pub const VCPU: u16 = 2;
    /// COM1.
    pub const SERIAL: u16 = 3;
    /// Power registers.
    pub const POWER: u16 = 4;
    /// A virtio-mmio slot: transport, queues and device.
    pub const VIRTIO: u16 = 5;

    /// Its name for messages.
    pub fn name(kind: u16) -> &'static str {
        match kind {
            MACHINE => "machine",
            VCPU => "vcpu",
            SERIAL => "serial",
            POWER => "power",
            VIRTIO => "virtio",
            _ => "unknown",
        }
    }
}

/// The version that is written, of every kind. The one before it loads too, once there is one.
pub const VERSION: u16 = 1;
/// The largest section that is taken; the largest written is a vCPU's, about 10 KiB.
const MAX_SECTION_BYTES: usize = 1 << 20;

/// State could not be saved or restored.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// The VM runs.
    #[error("the VM must be paused")]
    Running,
    /// KVM refused something.
    #[error("{ioctl} failed")]
    Kvm {
        /// Which call.
        ioctl: &'static str,
        /// KVM's answer.
        #[source]
        source: vmm_sys_util::errno::Error,
    },
    /// A vCPU.
    #[error(transparent)]
    Vcpu(#[from] VcpuStateError),
    /// The serial port.
    #[error(transparent)]
    Serial(#[from] SerialStateError),
    /// The power registers.
    #[error(transparent)]
    Power(#[from] PowerStateError),
    /// A virtio device.
    #[error("virtio slot {slot}")]
    Virtio {
        /// Its slot.
        slot: u16,
        /// Why.
        #[source]
        source: RestoreError,
    },
    /// A section that this machine has no part for.
    #[error("saved state has a section that this machine has no use for: {} {instance}", kind::name(*.kind))]
    Unknown {
        /// Its kind.
        kind: u16,
        /// Its instance.
        instance: u16,
    },
    /// Two sections for one part.
    #[error("saved state has the section {} {instance} twice", kind::name(*.kind))]
    Twice {
        /// Its kind.
        kind: u16,
        /// Its instance.
        instance: u16,
    },
    /// A part without a section.
    #[error("saved state lacks the section {} {instance}", kind::name(*.kind))]
    Missing {
        /// Its kind.
        kind: u16,
        /// Its instance.
        instance: u16,
    },
    /// Another version.
    #[error("saved state: section {} has version {version}, this program reads version {VERSION}", kind::name(*.kind))]
    Version {
        /// Its kind.
        kind: u16,
        /// Its version.
        version: u16,
    },
    /// The bytes are not what the kind says.
    #[error("saved state: section {} {instance} is damaged", kind::name(*.kind))]
    Damaged {
        /// Its kind.
        kind: u16,
        /// Its instance.
        instance: u16,
        /// What the decoder says.
        #[source]
        source: postcard::Error,
    },
    /// A section is implausibly large.
    #[error("saved state: section {} {instance} has {bytes} bytes, at most {MAX_SECTION_BYTES} are possible", kind::name(*.kind))]
    TooLarge {
        /// Its kind.
        kind: u16,
        /// Its instance.
        instance: u16,
        /// Its length.
        bytes: usize,
    },
}

/// Interrupt controllers, PIT and clock.
#[derive(Serialize, Deserialize)]
struct MachineState {
    pic_master: kvm_irqchip,
    pic_slave: kvm_irqchip,
    ioapic: kvm_irqchip,
    pit: kvm_pit_state2,
    clock: kvm_clock_data,
    /// When the clock was read: nanoseconds since 1970, by this host's clock.
    clock_read_at_ns: u64,
}

/// Hosts whose clocks differ by more than this plainly disagree about the time: then nothing has passed.
const MAX_PASSED: Duration = Duration::from_secs(60);

/// How long ago, by this host's clock, another host's (or this one's) clock stood at `then_ns`.
fn passed_since(then_ns: u64) -> Duration {
    let passed = SystemTime::now().duration_since(UNIX_EPOCH + Duration::from_nanos(then_ns)).unwrap_or_default();
    if passed > MAX_PASSED {
        tracing::warn!(?passed, "the clocks of the two hosts disagree: the guest's clock goes on from where it was");
        return Duration::ZERO;
    }
    passed
}

fn kvm(ioctl: &'static str) -> impl FnOnce(vmm_sys_util::errno::Error) -> SnapshotError {
    move |source| SnapshotError::Kvm { ioctl, source }
}

fn section(kind: u16, instance: u16, state: &impl Serialize) -> Section {
    let bytes = postcard::to_stdvec(state).expect("saved types serialize to memory");
    Section { kind, instance, version: VERSION, bytes }
}

/// Sections by part; taken out one by one, so that what remains is what nobody wants.
struct Sections(BTreeMap<(u16, u16), Section>);

impl Sections {
    fn new(sections: Vec<Section>) -> Result<Self, SnapshotError> {
        let mut map = BTreeMap::new();
        for section in sections {
            let Section { kind, instance, version, ref bytes } = section;
            if version != VERSION {
                return Err(SnapshotError::Version { kind, version });
            }
            if bytes.len() > MAX_SECTION_BYTES {
                return Err(SnapshotError::TooLarge { kind, instance, bytes: bytes.len() });
            }
            if map.insert((kind, instance), section).is_some() {
                return Err(SnapshotError::Twice { kind, instance });
            }
        }
        Ok(Sections(map))
    }

    fn take<T: Serialize + DeserializeOwned>(&mut self, kind: u16, instance: u16) -> Result<T, SnapshotError> {
        let found = self.0.remove(&(kind, instance)).ok_or(SnapshotError::Missing { kind, instance })?;
        let damaged = |source| SnapshotError::Damaged { kind, instance, source };
        let state = postcard::from_bytes(&found.bytes).map_err(damaged)?;
        // Not a byte too many, and not another length of a structure of KVM's, which kvm-bindings would fill up or cut without a word.
        if section(kind, instance, &state).bytes != found.bytes {
            return Err(damaged(postcard::Error::DeserializeBadEncoding));
        }
        Ok(state)
    }

    fn done(self) -> Result<(), SnapshotError> {
        match self.0.into_keys().next() {
            Some((kind, instance)) => Err(SnapshotError::Unknown { kind, instance }),
            None => Ok(()),
        }
    }
}

/// All of a machine's state, before anything of it is set: what is wrong with the sections themselves is known.
struct Decoded {
    machine: MachineState,
    vcpus: Vec<VcpuState>,
    serial: SerialState,
    power: PowerState,
    virtio: Vec<MmioTransportState>,
}

impl Decoded {
    /// For a machine with so many vCPUs and virtio devices.
    fn new(sections: Vec<Section>, vcpus: usize, virtio: usize) -> Result<Self, SnapshotError> {
        let mut sections = Sections::new(sections)?;
        let decoded = Decoded {
            machine: sections.take(kind::MACHINE, 0)?,
            vcpus: (0u16..).take(vcpus).map(|id| sections.take(kind::VCPU, id)).collect::<Result<_, _>>()?,
            serial: sections.take(kind::SERIAL, 0)?,
            power: sections.take(kind::POWER, 0)?,
            virtio: (0u16..).take(virtio).map(|slot| sections.take(kind::VIRTIO, slot)).collect::<Result<_, _>>()?,
        };
        sections.done()?;
        for (id, vcpu) in (0u8..).zip(&decoded.vcpus) {
            vcpu.check(id)?;
        }
        Ok(decoded)
    }
}

/// For `fuzz/`, which has no KVM: decodes as [`Vm::restore`] does, and gives what is restored without KVM.
#[doc(hidden)]
pub fn decode_devices(
    sections: Vec<Section>,
    vcpus: usize,
    virtio: usize,
) -> Result<(SerialState, PowerState, Vec<MmioTransportState>), SnapshotError> {
    let Decoded { machine: _, vcpus: _, serial, power, virtio } = Decoded::new(sections, vcpus, virtio)?;
    Ok((serial, power, virtio))
}

impl Vm {
    /// The state of the paused VM.
    pub fn save(&self) -> Result<Vec<Section>, SnapshotError> {
        if self.state != RunState::Paused {
            return Err(SnapshotError::Running);
        }
        let chip = |chip_id| {
            let mut chip = kvm_irqchip { chip_id, ..Default::default() };
            self.fd.get_irqchip(&mut chip).map(|()| chip).map_err(kvm("KVM_GET_IRQCHIP"))
        };
        let clock = self.fd.get_clock().map_err(kvm("KVM_GET_CLOCK"))?;
        let clock_read_at_ns = if clock.flags & KVM_CLOCK_REALTIME != 0 {
            clock.realtime
        } else {
            SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_nanos() as u64)
        };
        let machine = MachineState {
            pic_master: chip(KVM_IRQCHIP_PIC_MASTER)?,
            pic_slave: chip(KVM_IRQCHIP_PIC_SLAVE)?,
            ioapic: chip(KVM_IRQCHIP_IOAPIC)?,
            pit: self.fd.get_pit2().map_err(kvm("KVM_GET_PIT2"))?,
            clock,
            clock_read_at_ns,
        };
        let mut sections = vec![section(kind::MACHINE, 0, &machine)];
        for (vcpu, cpuid) in self.vcpus.iter().zip(&self.cpu.cpuid) {
            let state = vcpu_state::save(vcpu.id(), &vcpu.fd(), cpuid, &machine.clock, &self.msr_indices)?;
            sections.push(section(kind::VCPU, vcpu.id().into(), &state));
        }
        sections.push(section(kind::SERIAL, 0, &locked(&self.serial).save()));
        sections.push(section(kind::POWER, 0, &locked(&self.power).save()));
        for (slot, transport) in (0u16..).zip(&self.virtio) {
            sections.push(section(kind::VIRTIO, slot, &locked(transport).save()));
        }
        Ok(sections)
    }

    /// Saves, and reads what was saved as [`Vm::restore`] will: the first time takes much longer than the others, because the program's
    /// pages are mapped as it goes.
    pub fn rehearse(&self) -> Result<(), SnapshotError> {
        Decoded::new(self.save()?, self.vcpus.len(), self.virtio.len()).map(drop)
    }

    /// Gives the state to a machine just built. The guest's clocks go on by what has passed since it was saved, as far as the clocks
    /// of the two hosts agree.
    pub fn restore(&mut self, sections: Vec<Section>) -> Result<(), SnapshotError> {
        if self.state != RunState::Paused {
            return Err(SnapshotError::Running);
        }
        let Decoded { machine, vcpus, serial, power, virtio } =
            Decoded::new(sections, self.vcpus.len(), self.virtio.len())?;
        let MachineState { pic_master, pic_slave, ioapic, pit, clock, clock_read_at_ns } = machine;
        for (chip_id, mut chip) in
            [(KVM_IRQCHIP_PIC_MASTER, pic_master), (KVM_IRQCHIP_PIC_SLAVE, pic_slave), (KVM_IRQCHIP_IOAPIC, ioapic)]
        {
            chip.chip_id = chip_id;
            self.fd.set_irqchip(&chip).map_err(kvm("KVM_SET_IRQCHIP"))?;
        }
        self.fd.set_pit2(&pit).map_err(kvm("KVM_SET_PIT2"))?;
        // Without KVM_CLOCK_REALTIME KVM takes the value as it is; what has passed is looked up last.
        let passed_ns = passed_since(clock_read_at_ns).as_nanos() as u64;
        let set = kvm_clock_data { clock: clock.clock.saturating_add(passed_ns), ..Default::default() };
        self.fd.set_clock(&set).map_err(kvm("KVM_SET_CLOCK"))?;
        let passed = Passed { then: clock, now: self.fd.get_clock().map_err(kvm("KVM_GET_CLOCK"))? };
        for ((vcpu, state), told) in self.vcpus.iter().zip(&vcpus).zip(&self.cpu.cpuid) {
            vcpu_state::restore(vcpu.id(), &vcpu.fd(), told, state, &passed)?;
        }
        let tsc_khz = vcpus.first().map_or(self.cpu.tsc_khz, |first| first.tsc_khz);
        self.cpu = GuestCpu { cpuid: vcpus.into_iter().map(|vcpu| vcpu.cpuid).collect(), tsc_khz };
        locked(&self.serial).restore(serial)?;
        locked(&self.power).restore(power)?;
        for ((slot, transport), state) in (0u16..).zip(&self.virtio).zip(&virtio) {
            locked(transport).restore(state).map_err(|source| SnapshotError::Virtio { slot, source })?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_that_passed_counts_only_where_the_clocks_can_be_right() {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
        let ago = |d: Duration| passed_since((now - d).as_nanos() as u64);
        assert!((Duration::from_secs(5)..Duration::from_secs(20)).contains(&ago(Duration::from_secs(5))));
        assert_eq!(ago(Duration::from_secs(3600)), Duration::ZERO);
        assert_eq!(passed_since((now + Duration::from_secs(3600)).as_nanos() as u64), Duration::ZERO);
        assert_eq!(passed_since(0), Duration::ZERO);
        assert_eq!(passed_since(u64::MAX), Duration::ZERO);
    }

    /// Decodes a section as its kind says, and encodes it again.
    fn again(saved: Section) -> Section {
        fn of<T: Serialize + DeserializeOwned>(given: Section) -> Section {
            let (kind, instance) = (given.kind, given.instance);
            let state: T = Sections::new(vec![given]).unwrap().take(kind, instance).unwrap();
            section(kind, instance, &state)
        }
        match saved.kind {
            kind::MACHINE => of::<MachineState>(saved),
            kind::VCPU => of::<VcpuState>(saved),
            kind::SERIAL => of::<SerialState>(saved),
            kind::POWER => of::<PowerState>(saved),
            kind::VIRTIO => of::<MmioTransportState>(saved),
            other => panic!("kind {other}"),
        }
    }

    /// `tests/golden/state-v1/KIND-INSTANCE`, as a VM of that version saved them.
    #[test]
    fn sections_of_version_1_are_read_as_they_were_written() {
        let dir = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/state-v1");
        let mut kinds = std::collections::BTreeSet::new();
        for file in std::fs::read_dir(dir).unwrap() {
            let path = file.unwrap().path();
            let name = path.file_name().unwrap().to_str().unwrap();
            let (kind, instance) = name.split_once('-').unwrap();
            let (kind, instance) = (kind.parse().unwrap(), instance.parse().unwrap());
            let section = Section { kind, instance, version: 1, bytes: std::fs::read(&path).unwrap() };
            assert_eq!(again(section.clone()), section, "{}", kind::name(kind));
            kinds.insert(kind);
        }
        assert_eq!(kinds.into_iter().collect::<Vec<_>>(), [1, 2, 3, 4, 5], "each kind has a file");
    }

    /// `tests/golden/state-v1`: a machine with one vCPU, an entropy device, a network device and a balloon.
    fn golden() -> Vec<Section> {
        let dir = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/state-v1");
        let read = |(kind, instance)| {
            let bytes = std::fs::read(dir.join(format!("{kind}-{instance}"))).unwrap();
            Section { kind, instance, version: 1, bytes }
        };
        [(1, 0), (2, 0), (3, 0), (4, 0), (5, 0), (5, 1), (5, 2)].map(read).into()
    }

    #[test]
    fn more_registers_or_cpuid_entries_than_kvm_takes_at_once_are_refused_before_anything_is_set() {
        let decode = |change: fn(&mut VcpuState)| {
            let mut sections = golden();
            let mut vcpu = Sections::new(golden()).unwrap().take(kind::VCPU, 0).unwrap();
            change(&mut vcpu);
            sections[1] = section(kind::VCPU, 0, &vcpu);
            Decoded::new(sections, 1, 3).map(drop)
        };
        decode(|vcpu| vcpu.msrs.resize(256, Default::default())).unwrap();
        decode(|vcpu| vcpu.cpuid.resize(256, Default::default())).unwrap();
        let error = decode(|vcpu| vcpu.msrs.resize(257, Default::default())).unwrap_err().to_string();
        assert_eq!(error, "vCPU 0: saved state has 257 MSRs, at most 256 can be set");
        assert!(decode(|vcpu| vcpu.cpuid.resize(257, Default::default())).is_err());
    }

    #[test]
    fn a_structure_of_another_length_than_kvms_is_refused() {
        let mut sections = golden();
        // The first of a machine's is a `kvm_irqchip` of 520 bytes.
        assert_eq!(sections[0].bytes[..2], [0x88, 4]);
        sections[0].bytes[0] -= 1;
        sections[0].bytes.remove(2);
        assert!(matches!(Decoded::new(sections, 1, 3), Err(SnapshotError::Damaged { kind: 1, .. })));
    }

    #[test]
    fn sections_that_are_missing_doubled_or_not_the_machines_are_refused() {
        let decode = |change: fn(&mut Vec<Section>)| {
            let mut sections = golden();
            change(&mut sections);
            Decoded::new(sections, 1, 3).map(drop)
        };
        decode(|_| {}).unwrap();
        decode(|sections| sections.reverse()).unwrap();
        assert!(matches!(decode(|s| drop(s.remove(6))), Err(SnapshotError::Missing { kind: 5, instance: 2 })));
        assert!(matches!(decode(|s| s.push(s[0].clone())), Err(SnapshotError::Twice { kind: 1, instance: 0 })));
        assert!(matches!(decode(|s| s[0].version = 2), Err(SnapshotError::Version { kind: 1, version: 2 })));
        let more = |s: &mut Vec<Section>| s.push(Section { instance: 3, ..s[6].clone() });
        assert!(matches!(decode(more), Err(SnapshotError::Unknown { kind: 5, instance: 3 })));
    }

    #[test]
    fn a_section_cut_off_anywhere_or_too_long_is_refused() {
        let good = section(kind::SERIAL, 0, &[0u8; 11]);
        for bytes in (0..good.bytes.len()).map(|n| good.bytes[..n].to_vec()).chain([vec![0; MAX_SECTION_BYTES + 1]]) {
            let cut = Section { bytes, ..good.clone() };
            let taken = Sections::new(vec![cut]).and_then(|mut s| s.take::<SerialState>(kind::SERIAL, 0));
            assert!(taken.is_err());
        }
    }
}
