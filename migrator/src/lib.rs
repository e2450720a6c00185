//! Moving a virtual machine between two hosts: wire protocol, source and destination machines, convergence,
//! commit protocol, announcement. Knows nothing of KVM: a VM is what implements [`traits`].
#![forbid(unsafe_code)]
