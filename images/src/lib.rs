//! What a guest is made from: the built-in guest, kernels, container images.
