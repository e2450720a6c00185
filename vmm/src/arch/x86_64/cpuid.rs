//! What CPUID tells the guest, and whether another host can keep that promise.
//!
//! A guest gets what KVM supports here, less what cannot move: nested virtualization and the PMU (their state is not saved), and
//! the invariant TSC (it would let a guest drop kvm-clock, which is what keeps its time right on a host of another frequency).

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::{Cap, Kvm};

/// KVM would not tell or take CPUID.
#[derive(Debug, thiserror::Error)]
#[error("KVM refused {operation}")]
pub struct CpuidError {
    operation: &'static str,
    #[source]
    source: vmm_sys_util::errno::Error,
}

const LEAF1_ECX_VMX: u32 = 1 << 5;
const LEAF1_ECX_PDCM: u32 = 1 << 15;
const LEAF1_ECX_TSC_DEADLINE: u32 = 1 << 24;
const LEAF1_ECX_HYPERVISOR: u32 = 1 << 31;
const LEAF1_EDX_HTT: u32 = 1 << 28;
const EXT1_ECX_SVM: u32 = 1 << 2;
const EXT7_EDX_INVARIANT_TSC: u32 = 1 << 8;

/// What KVM can offer a guest on this host.
pub fn supported(kvm: &Kvm) -> Result<Vec<kvm_cpuid_entry2>, CpuidError> {
    let cpuid = kvm
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(|source| CpuidError { operation: "KVM_GET_SUPPORTED_CPUID", source })?;
    let mut entries = cpuid.as_slice().to_vec();
    let deadline = kvm.check_extension(Cap::TscDeadlineTimer);
    for entry in &mut entries {
        match entry.function {
            1 => {
                entry.ecx |= LEAF1_ECX_HYPERVISOR | if deadline { LEAF1_ECX_TSC_DEADLINE } else { 0 };
                entry.ecx &= !(LEAF1_ECX_VMX | LEAF1_ECX_PDCM);
            }
            0xa | 0x15 | 0x16 | 0x8000_000a => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
            0x8000_0001 => entry.ecx &= !EXT1_ECX_SVM,
            0x8000_0007 => entry.edx &= !EXT7_EDX_INVARIANT_TSC,
            _ => {}
        }
    }
    Ok(entries)
}

/// The CPUID of vCPU `id` out of `cpus`: `supported` with a topology of one socket of single-threaded cores.
pub fn for_vcpu(supported: &[kvm_cpuid_entry2], id: u8, cpus: u8) -> CpuId {
    let mut entries = supported.to_vec();
    let last = u32::from(cpus - 1);
    let id_bits = u32::from(cpus).next_power_of_two().trailing_zeros();
    for entry in &mut entries {
        match entry.function {
            1 => {
                entry.ebx = (entry.ebx & 0xffff) | u32::from(cpus) << 16 | u32::from(id) << 24;
                entry.edx = if cpus > 1 { entry.edx | LEAF1_EDX_HTT } else { entry.edx & !LEAF1_EDX_HTT };
            }
            // Cache topology: L1 and L2 of one core, L3 of all (Intel SDM vol. 2, CPUID leaf 4; AMD APM vol. 3, 8000_001D).
            4 | 0x8000_001d if entry.eax & 0x1f != 0 => {
                let sharing = if entry.eax >> 5 & 7 >= 3 { last } else { 0 };
                let cores = if entry.function == 4 { last.min(63) << 26 } else { 0 };
                entry.eax = (entry.eax & 0x3fff) | sharing << 14 | cores;
            }
            // Extended topology: one thread a core, then the cores.
            0xb | 0x1f => {
                (entry.eax, entry.ebx, entry.ecx) = match entry.index {
                    0 => (0, 1, 1 << 8),
                    1 => (id_bits, u32::from(cpus), 2 << 8 | 1),
                    n => (0, 0, n),
                };
                entry.edx = u32::from(id);
            }
            0x8000_0008 => entry.ecx = (entry.ecx & !0xf0ff) | last | id_bits << 12,
            0x8000_001e => (entry.eax, entry.ebx, entry.ecx) = (u32::from(id), u32::from(id), 0),
            _ => {}
        }
    }
    CpuId::from_entries(&entries).expect("KVM gave no more entries than it takes")
}

/// One register of a CPUID leaf that holds feature bits, and the names of those that people ask about.
struct FeatureWord {
    function: u32,
    index: u32,
    register: fn(&kvm_cpuid_entry2) -> u32,
    register_name: &'static str,
    names: &'static [(u32, &'static str)],
}

/// Intel SDM vol. 2 (CPUID), AMD APM vol. 3 appendix E, Linux's Documentation/virt/kvm/x86/cpuid.rst.
const FEATURE_WORDS: &[FeatureWord] = &[
    FeatureWord {
        function: 1,
        index: 0,
        register: |e| e.ecx,
        register_name: "ECX",
        names: &[
            (0, "sse3"),
            (1, "pclmulqdq"),
            (9, "ssse3"),
            (12, "fma"),
            (13, "cx16"),
            (17, "pcid"),
            (19, "sse4_1"),
            (20, "sse4_2"),
            (21, "x2apic"),
            (22, "movbe"),
            (23, "popcnt"),
            (24, "tsc_deadline_timer"),
            (25, "aes"),
            (26, "xsave"),
            (28, "avx"),
            (29, "f16c"),
            (30, "rdrand"),
        ],
    },
    FeatureWord {
        function: 1,
        index: 0,
        register: |e| e.edx & !LEAF1_EDX_HTT,
        register_name: "EDX",
        names: &[(4, "tsc"), (15, "cmov"), (23, "mmx"), (24, "fxsr"), (25, "sse"), (26, "sse2")],
    },
    FeatureWord { function: 6, index: 0, register: |e| e.eax & 4, register_name: "EAX", names: &[(2, "arat")] },
    FeatureWord {
        function: 7,
        index: 0,
        register: |e| e.ebx,
        register_name: "EBX",
        names: &[
            (0, "fsgsbase"),
            (1, "tsc_adjust"),
            (3, "bmi1"),
            (5, "avx2"),
            (7, "smep"),
            (8, "bmi2"),
            (9, "erms"),
            (10, "invpcid"),
            (16, "avx512f"),
            (17, "avx512dq"),
            (18, "rdseed"),
            (19, "adx"),
            (20, "smap"),
            (21, "avx512ifma"),
            (23, "clflushopt"),
            (24, "clwb"),
            (28, "avx512cd"),
            (29, "sha_ni"),
            (30, "avx512bw"),
            (31, "avx512vl"),
        ],
    },
    FeatureWord {
        function: 7,
        index: 0,
        register: |e| e.ecx,
        register_name: "ECX",
        names: &[
            (1, "avx512vbmi"),
            (2, "umip"),
            (3, "pku"),
            (6, "avx512_vbmi2"),
            (7, "shstk"),
            (8, "gfni"),
            (9, "vaes"),
            (10, "vpclmulqdq"),
            (11, "avx512_vnni"),
            (12, "avx512_bitalg"),
            (14, "avx512_vpopcntdq"),
            (16, "la57"),
            (22, "rdpid"),
            (25, "cldemote"),
            (27, "movdiri"),
            (28, "movdir64b"),
        ],
    },
    FeatureWord {
        function: 7,
        index: 0,
        register: |e| e.edx,
        register_name: "EDX",
        names: &[
            (4, "fsrm"),
            (10, "md_clear"),
            (14, "serialize"),
            (20, "ibt"),
            (22, "amx_bf16"),
            (23, "avx512_fp16"),
            (24, "amx_tile"),
            (25, "amx_int8"),
            (26, "spec_ctrl"),
            (28, "flush_l1d"),
            (29, "arch_capabilities"),
            (31, "ssbd"),
        ],
    },
    FeatureWord {
        function: 7,
        index: 1,
        register: |e| e.eax,
        register_name: "EAX",
        names: &[(4, "avx_vnni"), (5, "avx512_bf16"), (10, "fzrm"), (11, "fsrs"), (12, "fsrc")],
    },
    FeatureWord {
        function: 0xd,
        index: 0,
        register: |e| e.eax,
        register_name: "EAX",
        names: &[
            (0, "xsave:x87"),
            (1, "xsave:sse"),
            (2, "xsave:avx"),
            (5, "xsave:avx512_opmask"),
            (6, "xsave:avx512_zmm_hi256"),
            (7, "xsave:avx512_hi16_zmm"),
            (9, "xsave:pkru"),
            (17, "xsave:amx_cfg"),
            (18, "xsave:amx_data"),
        ],
    },
    FeatureWord {
        function: 0xd,
        index: 1,
        register: |e| e.eax,
        register_name: "EAX",
        names: &[(0, "xsaveopt"), (1, "xsavec"), (2, "xgetbv1"), (3, "xsaves")],
    },
    FeatureWord {
        function: 0x4000_0001,
        index: 0,
        register: |e| e.eax,
        register_name: "EAX",
        names: &[
            (0, "kvm-clock"),
            (3, "kvm-clock2"),
            (4, "kvm-async-pf"),
            (5, "kvm-steal-time"),
            (6, "kvm-pv-eoi"),
            (7, "kvm-pv-unhalt"),
            (9, "kvm-pv-tlb-flush"),
            (11, "kvm-pv-ipi"),
            (12, "kvm-poll-control"),
            (13, "kvm-pv-sched-yield"),
            (14, "kvm-async-pf-int"),
            (24, "kvm-clock-stable"),
        ],
    },
    FeatureWord {
        function: 0x8000_0001,
        index: 0,
        register: |e| e.ecx,
        register_name: "ECX",
        names: &[
            (0, "lahf_lm"),
            (5, "lzcnt"),
            (6, "sse4a"),
            (8, "3dnowprefetch"),
            (11, "xop"),
            (16, "fma4"),
            (22, "topoext"),
        ],
    },
    FeatureWord {
        function: 0x8000_0001,
        index: 0,
        register: |e| e.edx,
        register_name: "EDX",
        names: &[(11, "syscall"), (20, "nx"), (26, "pdpe1gb"), (27, "rdtscp"), (29, "lm")],
    },
    FeatureWord {
        function: 0x8000_0008,
        index: 0,
        register: |e| e.ebx,
        register_name: "EBX",
        names: &[
            (0, "clzero"),
            (9, "wbnoinvd"),
            (12, "ibpb"),
            (14, "ibrs"),
            (15, "stibp"),
            (24, "amd_ssbd"),
            (25, "virt_ssbd"),
        ],
    },
];

/// A leaf from its numbers: `registers` are EAX, EBX, ECX, EDX.
pub fn leaf(function: u32, index: u32, registers: [u32; 4]) -> kvm_cpuid_entry2 {
    let [eax, ebx, ecx, edx] = registers;
    kvm_cpuid_entry2 { function, index, eax, ebx, ecx, edx, ..Default::default() }
}

fn find(entries: &[kvm_cpuid_entry2], function: u32, index: u32) -> Option<&kvm_cpuid_entry2> {
    entries.iter().find(|e| e.function == function && e.index == index)
}

/// `GenuineIntel`, `AuthenticAMD`, …: leaf 0.
pub fn vendor(entries: &[kvm_cpuid_entry2]) -> String {
    let Some(leaf) = find(entries, 0, 0) else { return "unknown".into() };
    let bytes = [leaf.ebx, leaf.edx, leaf.ecx].map(u32::to_le_bytes).concat();
    String::from_utf8_lossy(&bytes).into_owned()
}

/// The features that a guest with CPUID `guest` has been promised and a host with `host` does not have, by name.
pub fn missing_features(guest: &[kvm_cpuid_entry2], host: &[kvm_cpuid_entry2]) -> Vec<String> {
    let mut missing = Vec::new();
    for word in FEATURE_WORDS {
        let bits = |entries| find(entries, word.function, word.index).map_or(0, word.register);
        let gone = bits(guest) & !bits(host);
        for bit in (0..32).filter(|bit| gone >> bit & 1 == 1) {
            missing.push(match word.names.iter().find(|(b, _)| *b == bit) {
                Some((_, name)) => (*name).to_string(),
                None => format!("cpuid leaf {:#x}.{} {} bit {bit}", word.function, word.index, word.register_name),
            });
        }
    }
    missing
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(function: u32, index: u32) -> kvm_cpuid_entry2 {
        super::leaf(function, index, [0; 4])
    }

    #[test]
    fn missing_features_are_named() {
        let guest = [
            kvm_cpuid_entry2 { ecx: 1 << 28 | 1 << 2, ..leaf(1, 0) },
            kvm_cpuid_entry2 { ebx: 1 << 16 | 1 << 5, ..leaf(7, 0) },
        ];
        let host = [kvm_cpuid_entry2 { ebx: 1 << 5, ..leaf(7, 0) }];
        assert_eq!(missing_features(&guest, &host), ["cpuid leaf 0x1.0 ECX bit 2", "avx", "avx512f"]);
        assert!(missing_features(&host, &guest).is_empty());
        assert!(missing_features(&guest, &guest).is_empty());
    }

    #[test]
    fn each_vcpu_has_its_own_apic_id_and_all_agree_on_the_count() {
        let supported = [leaf(1, 0), leaf(0xb, 0), leaf(0xb, 1), kvm_cpuid_entry2 { eax: 3 << 5 | 1, ..leaf(4, 3) }];
        for id in 0..3 {
            let cpuid = for_vcpu(&supported, id, 3);
            let entries = cpuid.as_slice();
            assert_eq!(find(entries, 1, 0).unwrap().ebx >> 16, 3 | u32::from(id) << 8);
            assert_eq!(find(entries, 0xb, 1).map(|e| (e.eax, e.ebx, e.edx)), Some((2, 3, id.into())));
            assert_eq!(find(entries, 4, 3).unwrap().eax >> 14, 2 | 2 << 12);
        }
    }
}
