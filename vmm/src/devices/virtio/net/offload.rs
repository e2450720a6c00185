//! Features of virtio-net, and what of them the TAP must know.

use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_GUEST_ANNOUNCE, VIRTIO_NET_F_GUEST_CSUM,
    VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_MAC,
    VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_STATUS,
};

/// All that the device offers. TSO makes the throughput; mergeable buffers let the guest give pages instead of 64 KiB pieces.
pub(super) const OFFERED: u64 = bits(&[
    VIRTIO_NET_F_CSUM,
    VIRTIO_NET_F_GUEST_CSUM,
    VIRTIO_NET_F_MAC,
    VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_HOST_TSO4,
    VIRTIO_NET_F_HOST_TSO6,
    VIRTIO_NET_F_MRG_RXBUF,
    VIRTIO_NET_F_STATUS,
    VIRTIO_NET_F_CTRL_VQ,
    VIRTIO_NET_F_GUEST_ANNOUNCE,
]);

const fn bits(features: &[u32]) -> u64 {
    let mut bits = 0;
    let mut index = 0;
    while index < features.len() {
        bits |= 1 << features[index];
        index += 1;
    }
    bits
}

pub(super) fn has(features: u64, feature: u32) -> bool {
    features & (1 << feature) != 0
}

/// `TUNSETOFFLOAD` flags for negotiated features: what the *guest* can receive. (What it sends, the TAP always understands.)
/// Segmentation without checksums does not exist (5.1.3.1).
pub(super) fn tap_offloads(features: u64) -> u32 {
    if !has(features, VIRTIO_NET_F_GUEST_CSUM) {
        return 0;
    }
    let tso4 = if has(features, VIRTIO_NET_F_GUEST_TSO4) { libc::TUN_F_TSO4 } else { 0 };
    let tso6 = if has(features, VIRTIO_NET_F_GUEST_TSO6) { libc::TUN_F_TSO6 } else { 0 };
    libc::TUN_F_CSUM | tso4 | tso6
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tap_is_told_what_the_guest_can_receive() {
        assert_eq!(tap_offloads(OFFERED), 7);
        assert_eq!(tap_offloads(1 << VIRTIO_NET_F_GUEST_CSUM), 1);
        assert_eq!(tap_offloads(1 << VIRTIO_NET_F_GUEST_TSO4), 0, "no segmentation without checksums");
        assert_eq!(tap_offloads(1 << VIRTIO_NET_F_HOST_TSO4 | 1 << VIRTIO_NET_F_CSUM), 0);
    }
}
