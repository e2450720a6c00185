//! The one adapter between the two libraries: a [`vmm`] VM as [`migrator`] sees it.
//!
//! Nothing here decides anything: it translates page numbers, sections and errors, and compares what the two hosts can.

use std::io;
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use migrator::bitmap::{Bitmap, ChunkBits};
use migrator::layout::{CHUNK_PAGES, PageRun, RamLayout, RamRegion};
use migrator::traits::{
    Announcer, DestinationVm, GuestPages, Mismatch, NicAddresses, Part, Refusal, Section, SourceVm, StartError,
    Started, VmDescription, VmError,
};
use serde::{Deserialize, Serialize};
use vmm::host::{Host, KvmKind};
use vmm::memory::dirty::Rearmer;
use vmm::memory::pages::{self, Pages};
use vmm::vm::{RunState, Vm};

use super::Machine;
use super::spec::MachineSpec;
use crate::fault_points::{self, step};

/// What the source tells of itself for the destination's preflight.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct SourceFacts {
    /// The VM as the user asked for it.
    pub spec: MachineSpec,
    /// CPUID as the guest has it.
    pub cpuid: Vec<CpuidLeaf>,
    /// Frequency of the guest's TSC.
    pub tsc_khz: u32,
    /// Hardware or software KVM.
    pub kvm: KvmKind,
    /// The host's CPU, for messages.
    pub cpu_model: String,
    /// `GenuineIntel`, …
    pub cpu_vendor: String,
}

/// One CPUID leaf: function, index, eax, ebx, ecx, edx.
pub type CpuidLeaf = [u32; 6];

/// TSC frequencies this close (parts per million) count as equal: KVM does too (its tsc_tolerance_ppm).
const TSC_TOLERANCE_PPM: u64 = 250;

/// Guest memory for the page streams.
struct EndpointMemory {
    layout: RamLayout,
    pages: Pages,
    rearmer: Rearmer,
}

impl EndpointMemory {
    fn new(vm: &Vm) -> Self {
        EndpointMemory { layout: layout(vm), pages: vm.pages(), rearmer: vm.rearmer() }
    }
}

fn layout(vm: &Vm) -> RamLayout {
    let regions = vm.ram_regions().into_iter().map(|r| RamRegion { gpa: r.gpa, bytes: r.bytes }).collect();
    RamLayout::new(regions).expect("a VM that was built has a valid layout")
}

/// Sets the bits of all pages that are in the regions' logs.
fn enter(ram: &RamLayout, logs: &[Vec<u64>], into: &mut Bitmap) -> io::Result<()> {
    let regions = ram.regions();
    if logs.len() != regions.len() {
        // A region without a log would be taken for one that nobody wrote to.
        let message = format!("KVM's dirty log has {} regions and the VM {}", logs.len(), regions.len());
        return Err(io::Error::other(message));
    }
    for (index, (region, words)) in regions.iter().zip(logs).enumerate() {
        let first = ram.region_start(index).ok_or_else(|| io::Error::other("a region of the VM has no first page"))?;
        into.or_words(first, region.bytes / vmm::memory::PAGE_BYTES, words);
    }
    Ok(())
}

fn range(run: PageRun) -> Range<u64> {
    run.first..run.first + run.pages
}

impl GuestPages for EndpointMemory {
    fn layout(&self) -> &RamLayout {
        &self.layout
    }

    fn find_zero(&self, chunk: u64, wanted: &ChunkBits) -> io::Result<ChunkBits> {
        let mut zero = ChunkBits::default();
        for run in wanted.runs(chunk * CHUNK_PAGES) {
            self.pages.find_zero(range(run), |page| zero.set(page - chunk * CHUNK_PAGES))?;
        }
        Ok(zero)
    }

    fn rearm(&self, chunk: u64, bits: &ChunkBits) -> io::Result<()> {
        fault_points::in_round()?;
        let run = PageRun { first: chunk * CHUNK_PAGES, pages: self.layout.chunk_pages(chunk) };
        let mut done = 0;
        for piece in self.layout.pieces(run) {
            // Regions are whole chunks but for the last one, so a piece begins at a word of the bitmap.
            let words = &bits.0[(done / 64) as usize..(done + piece.pages).div_ceil(64) as usize];
            self.rearmer.rearm(piece.region as u32, piece.first, words).map_err(io::Error::other)?;
            done += piece.pages;
        }
        Ok(())
    }

    fn peek_dirty(&self, into: &mut Bitmap) -> io::Result<()> {
        let Some(logs) = self.rearmer.peek().map_err(io::Error::other)? else { return Ok(()) };
        enter(&self.layout, &logs, into)
    }

    fn send(&self, parts: &[Part<'_>], to: BorrowedFd<'_>) -> io::Result<()> {
        let parts: Vec<pages::Part<'_>> = parts
            .iter()
            .map(|part| match part {
                Part::Bytes(bytes) => pages::Part::Bytes(bytes),
                Part::Pages(run) => pages::Part::Pages(range(*run)),
            })
            .collect();
        self.pages.write_to(&parts, to)
    }

    fn receive(&self, runs: &[PageRun], tail: &mut [u8], from: BorrowedFd<'_>) -> io::Result<()> {
        let runs: Vec<Range<u64>> = runs.iter().map(|run| range(*run)).collect();
        self.pages.read_from(&runs, tail, from)
    }

    fn read(&self, run: PageRun, into: &mut [u8]) -> io::Result<()> {
        self.pages.copy_out(run.first, into)
    }

    fn expect(&self, run: PageRun) -> io::Result<()> {
        self.pages.expect(&range(run))
    }

    fn write(&self, run: PageRun, from: &[u8]) -> io::Result<()> {
        self.pages.copy_in(run.first, from)
    }

    fn clear(&self, run: PageRun) -> io::Result<()> {
        self.pages.clear(range(run))
    }
}

/// The VM that leaves.
pub struct Source {
    machine: Arc<Machine>,
    description: VmDescription,
    memory: Arc<dyn GuestPages>,
}

impl Source {
    /// The machine's VM, described as it is now.
    pub fn new(machine: Arc<Machine>, host: &Host) -> anyhow::Result<Self> {
        let here = host.facts();
        let (description, memory) = machine.with_vm(|vm| {
            let facts = SourceFacts {
                spec: machine.spec.clone(),
                cpuid: vm.cpu().cpuid[0].iter().map(|e| [e.function, e.index, e.eax, e.ebx, e.ecx, e.edx]).collect(),
                tsc_khz: vm.cpu().tsc_khz,
                kvm: here.kvm,
                cpu_model: here.cpu_model,
                cpu_vendor: here.cpu_vendor,
            };
            let description = VmDescription {
                name: machine.spec.name.clone(),
                ram: layout(vm),
                paused: vm.state() == RunState::Paused,
                facts: serde_json::to_value(facts)?,
            };
            let memory: Arc<dyn GuestPages> = Arc::new(EndpointMemory::new(vm));
            anyhow::Ok((description, memory))
        })??;
        Ok(Source { machine, description, memory })
    }

    fn vm<T, E: Into<VmError>>(&self, action: impl FnOnce(&mut Vm) -> Result<T, E>) -> Result<T, VmError> {
        self.machine.with_vm(action)?.map_err(Into::into)
    }
}

impl SourceVm for Source {
    fn description(&self) -> VmDescription {
        self.description.clone()
    }

    fn memory(&self) -> Arc<dyn GuestPages> {
        self.memory.clone()
    }

    fn start_dirty_log(&mut self) -> Result<(), VmError> {
        step("source", "start-dirty-log.before")?;
        self.vm(Vm::start_dirty_log)?;
        fault_points::round();
        Ok(step("source", "start-dirty-log.after")?)
    }

    fn collect_dirty(&mut self, into: &mut Bitmap) -> Result<(), VmError> {
        let logs = self.vm(Vm::collect_dirty)?;
        fault_points::round();
        Ok(enter(&self.description.ram, &logs, into)?)
    }

    fn stop_dirty_log(&mut self) {
        if let Err(error) = self.vm(Vm::stop_dirty_log) {
            tracing::warn!(%error, "the dirty log cannot be stopped");
        }
    }

    fn throttle(&mut self, permille: u16) -> Result<(), VmError> {
        self.vm(|vm| vm.throttle(permille))
    }

    fn pause(&mut self) -> Result<(), VmError> {
        step("source", "pause.before")?;
        self.vm(Vm::pause)?;
        Ok(step("source", "pause.after")?)
    }

    fn resume(&mut self) -> Result<(), VmError> {
        step("source", "resume.before")?;
        Ok(self.machine.with_vm(Vm::resume)?)
    }

    fn save_state(&mut self) -> Result<Vec<Section>, VmError> {
        step("source", "save.before")?;
        let sections = self.vm(|vm| vm.save())?;
        step("source", "save.after")?;
        Ok(sections
            .into_iter()
            .map(|s| Section { kind: s.kind, instance: s.instance, version: s.version, bytes: s.bytes })
            .collect())
    }

    fn gone(&mut self) -> Option<String> {
        self.machine.guest_ended()
    }
}

/// The VM that arrives.
pub struct Destination {
    machine: Arc<Machine>,
    host: Arc<Host>,
    memory: Option<Arc<dyn GuestPages>>,
}

impl Destination {
    /// To be built into `machine`.
    pub fn new(machine: Arc<Machine>, host: Arc<Host>) -> Self {
        Destination { machine, host, memory: None }
    }
}

impl DestinationVm for Destination {
    fn prepare(&mut self, description: &VmDescription) -> Result<(), Refusal> {
        step("destination", "prepare.before").map_err(|e| refusal(e.to_string()))?;
        let facts: SourceFacts = serde_json::from_value(description.facts.clone())
            .map_err(|e| refusal(format!("the VM's description cannot be read: {e}")))?;
        // Where it is plugged in may differ: that is this host's own choice.
        let (theirs, ours) = (&facts.spec, &self.machine.spec);
        if theirs.name != ours.name || theirs.boot != ours.boot || theirs.vm_config() != ours.vm_config() {
            return Err(refusal("the VM's description changed after the offer".into()));
        }
        let mut mismatches = compare(&facts, &self.host);
        // It takes a VM to see what TSC a guest gets here. If nothing else is in the way, that is the one to be built.
        let tsc_khz = match mismatches.is_empty() {
            true => {
                self.machine.build_vm(&self.host).map_err(|e| refusal(format!("{e:#}")))?;
                self.machine.with_vm(|vm| vm.cpu().tsc_khz).ok()
            }
            false => self.host.tsc_khz(),
        };
        mismatches.extend(tsc_khz.and_then(|here| compare_tsc(facts.tsc_khz, here, self.host.facts().tsc_scaling)));
        if !mismatches.is_empty() {
            return Err(Refusal { reason: format!("this host cannot run {}", description.name), mismatches });
        }
        let built = self.machine.with_vm(|vm| {
            let memory: Arc<dyn GuestPages> = Arc::new(EndpointMemory::new(vm));
            // What goes wrong with that would go wrong with the guest standing still.
            vm.rehearse().map(|()| memory)
        });
        let memory = built
            .map_err(|e| refusal(e.to_string()))?
            .map_err(|e| refusal(format!("this host's KVM cannot save a VM: {:#}", anyhow::Error::from(e))))?;
        if *memory.layout() != description.ram {
            return Err(refusal("the VM's memory is laid out differently by this version of microvm".into()));
        }
        self.memory = Some(memory);
        step("destination", "prepare.after").map_err(|e| refusal(e.to_string()))
    }

    fn memory(&self) -> Arc<dyn GuestPages> {
        self.memory.clone().expect("the migrator prepares before it asks for memory")
    }

    fn load_state(&mut self, sections: Vec<Section>) -> Result<(), VmError> {
        let sections = sections
            .into_iter()
            .map(|s| vmm::snapshot::Section { kind: s.kind, instance: s.instance, version: s.version, bytes: s.bytes })
            .collect();
        step("destination", "load.before")?;
        self.machine.with_vm(|vm| vm.restore(sections))??;
        Ok(step("destination", "load.after")?)
    }

    fn start(&mut self, paused: bool) -> Result<Started, StartError> {
        step("destination", "start.before").map_err(|e| StartError { may_have_run: false, source: e.into() })?;
        let started = self.machine.with_vm(|vm| {
            if paused {
                return Started { first_run: None };
            }
            vm.resume();
            Started { first_run: vm.wait_entered() }
        });
        let started = started.map_err(|e| StartError { may_have_run: false, source: e.into() })?;
        step("destination", "start.after").map_err(|e| StartError { may_have_run: true, source: e.into() })?;
        Ok(started)
    }

    fn announcer(&self) -> Arc<dyn Announcer> {
        self.machine.clone()
    }

    fn discard(&mut self) {
        self.memory = None;
        self.machine.drop_vm();
    }
}

impl Announcer for Machine {
    fn addresses(&self) -> Vec<NicAddresses> {
        let addresses = self.with_vm(|vm| vm.addresses()).unwrap_or_default();
        addresses.into_iter().map(|a| NicAddresses { mac: a.mac.0, ipv4: a.ipv4, ipv6: a.ipv6 }).collect()
    }

    fn inject_frame(&self, nic: usize, frame: &[u8]) -> io::Result<()> {
        self.with_vm(|vm| vm.inject(nic, frame)).map_err(io::Error::other)?
    }

    fn guest_can_announce(&self) -> bool {
        self.with_vm(|vm| vm.guest_can_announce()).unwrap_or(false)
    }

    fn guest_announce(&self) {
        // A VM that has ended meanwhile has nothing to announce.
        let _ = self.with_vm(|vm| vm.guest_announce());
    }
}

fn refusal(reason: String) -> Refusal {
    Refusal { reason, mismatches: Vec::new() }
}

/// Everything in which this host falls short of what the guest was promised, but for the TSC.
fn compare(facts: &SourceFacts, host: &Host) -> Vec<Mismatch> {
    let here = host.facts();
    let mut mismatches = Vec::new();
    let mut differ = |what: &str, source: String, destination: String, hint: &str| {
        mismatches.push(Mismatch { what: what.into(), source, destination, hint: hint.into() });
    };
    if facts.kvm != here.kvm {
        let name = |kind| match kind {
            KvmKind::Hardware => "hardware (VMX or SVM)".to_string(),
            KvmKind::Software => "software".to_string(),
        };
        differ("KVM", name(facts.kvm), name(here.kvm), "migrate between hosts of one kind");
    }
    if facts.cpu_vendor != here.cpu_vendor {
        differ("CPU vendor", facts.cpu_vendor.clone(), here.cpu_vendor.clone(), "");
    }
    let guest: Vec<_> = facts
        .cpuid
        .iter()
        .map(|&[function, index, eax, ebx, ecx, edx]| vmm::arch::cpuid::leaf(function, index, [eax, ebx, ecx, edx]))
        .collect();
    for feature in vmm::arch::cpuid::missing_features(&guest, &host.cpuid) {
        differ(&format!("CPU feature {feature}"), "yes".into(), "no".into(), "");
    }
    if facts.spec.memory_bytes > here.memory_available_bytes {
        let mib = |bytes: u64| format!("{} MiB", bytes >> 20);
        let (needed, available) = (mib(facts.spec.memory_bytes), mib(here.memory_available_bytes));
        differ("memory", format!("{needed} needed"), format!("{available} available"), "");
    }
    mismatches
}

/// A guest's TSC runs as fast as at the source, where KVM can see to it.
fn compare_tsc(there: u32, here: u32, scaling: bool) -> Option<Mismatch> {
    let difference = u64::from(here.abs_diff(there)) * 1_000_000 / u64::from(here.max(1));
    (difference > TSC_TOLERANCE_PPM && !scaling).then(|| Mismatch {
        what: "TSC frequency".into(),
        source: format!("{there} kHz"),
        destination: format!("{here} kHz"),
        hint: "this CPU cannot scale its TSC".into(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_must_be_of_all_regions() {
        let region = |gpa| RamRegion { gpa, bytes: 8192 };
        let ram = RamLayout::new(vec![region(0), region(1 << 32)]).unwrap();
        let mut dirty = Bitmap::new(4);
        for logs in [vec![], vec![vec![3]], vec![vec![3]; 3]] {
            assert!(enter(&ram, &logs, &mut dirty).is_err(), "{logs:?}");
        }
        assert_eq!(dirty.count(), 0);
        enter(&ram, &[vec![1], vec![2]], &mut dirty).unwrap();
        assert!(dirty.count() == 2 && dirty.get(0) && dirty.get(3));
    }

    #[test]
    fn a_tsc_of_another_frequency_is_a_mismatch_where_kvm_cannot_scale_it() {
        let khz = 2_000_000;
        assert_eq!(compare_tsc(khz, khz, false), None);
        // 250 ppm, and a little more.
        assert_eq!(compare_tsc(khz + 500, khz, false), None);
        assert_eq!(compare_tsc(khz - 502, khz, true), None);
        let mismatch = compare_tsc(khz - 502, khz, false).unwrap();
        assert_eq!((mismatch.source.as_str(), mismatch.destination.as_str()), ("1999498 kHz", "2000000 kHz"));
    }
}
