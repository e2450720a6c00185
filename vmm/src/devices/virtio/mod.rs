//! virtio devices (virtio 1.2) behind the MMIO transport.
