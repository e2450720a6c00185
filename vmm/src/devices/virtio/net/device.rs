//! The network device: its configuration, its life, and what the rest of the VMM asks of it.

use std::io::{self, IoSlice};
use std::net::IpAddr;
use std::os::fd::{AsFd, OwnedFd};

use tracing::debug;
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::{VIRTIO_NET_F_GUEST_ANNOUNCE, VIRTIO_NET_S_ANNOUNCE, VIRTIO_NET_S_LINK_UP};

use super::addresses::{Learned, MacAddress, NetAddresses};
use super::offload::{OFFERED, has, tap_offloads};
use super::state::{NET_STATE_VERSION, NetState};
use super::{Backend, HEADER_BYTES, MAX_FRAME_BYTES};
use crate::devices::io_thread::Turn;
use crate::devices::virtio::cell::DeviceCell;
use crate::devices::virtio::device::{Context, DeviceError, DeviceStateError, SavedDevice, VirtioDevice, Work};

pub(super) const RX: usize = 0;
pub(super) const TX: usize = 1;
pub(super) const CONTROL: usize = 2;
const QUEUE_SIZES: &[u16] = &[256, 256, 16];

/// Frames moved in one direction in one turn.
pub(super) const FRAMES_PER_TURN: usize = 64;

/// Bytes moved in one direction in one turn, and a frame more: what a pause may have to wait for.
pub(super) const BYTES_PER_TURN: u64 = 512 << 10;

/// More than a TAP holds.
const MAX_STALE_FRAMES: usize = 2048;

/// What the user said about a network device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetConfig {
    /// The guest's address.
    pub mac: MacAddress,
    /// Addresses that the guest is known to have (`ip=`).
    pub addresses: Vec<IpAddr>,
}

/// Frames since the device was made here, seen from the guest: received are those from the network.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NetStatistics {
    /// Frames given to the guest.
    pub rx_packets: u64,
    /// Their bytes, without virtio headers.
    pub rx_bytes: u64,
    /// Frames that the guest had no fitting buffer for.
    pub rx_dropped: u64,
    /// Frames taken from the guest to the network.
    pub tx_packets: u64,
    /// Their bytes, without virtio headers.
    pub tx_bytes: u64,
    /// Frames of the guest's that were malformed or that the host refused.
    pub tx_dropped: u64,
}

/// A virtio network device.
pub struct Net {
    pub(super) backend: Box<dyn Backend>,
    pub(super) mac: MacAddress,
    configured: Vec<IpAddr>,
    pub(super) learned: Learned,
    pub(super) announce: bool,
    /// No read of the backend has answered `EAGAIN` since it was last said to be readable.
    pub(super) readable: bool,
    /// Likewise for writing.
    pub(super) writable: bool,
    /// How much buffer space the next frame is likely to need, from the last ones.
    pub(super) expected_bytes: usize,
    /// Takes the end of a frame that is longer than expected.
    pub(super) spill: Box<[u8]>,
    pub(super) statistics: NetStatistics,
}

impl Net {
    /// A device between a guest and `backend`. Sends nothing of its own.
    pub fn new(config: NetConfig, backend: impl Backend + 'static) -> Self {
        let NetConfig { mac, addresses } = config;
        Self {
            backend: Box::new(backend),
            mac,
            configured: addresses,
            learned: Learned::default(),
            announce: false,
            readable: true,
            writable: true,
            expected_bytes: 0,
            spill: vec![0; MAX_FRAME_BYTES].into(),
            statistics: NetStatistics::default(),
        }
    }

    /// What the guest answers for on its network.
    pub fn addresses(&self) -> NetAddresses {
        self.learned.after(&self.configured, self.mac)
    }

    /// What went through so far.
    pub fn statistics(&self) -> NetStatistics {
        self.statistics
    }

    /// Sends an Ethernet frame (without checksum) into the network as if it came from the guest.
    pub fn inject(&self, frame: &[u8]) -> io::Result<()> {
        let vectors = [IoSlice::new(&[0; HEADER_BYTES]), IoSlice::new(frame)];
        let written = rustix::io::writev(self.backend.as_fd(), &vectors)?;
        if written == HEADER_BYTES + frame.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
    }

    pub(super) fn host_error(&self, doing: &str, source: io::Error) -> DeviceError {
        DeviceError::Host { what: format!("{doing} {}", self.backend.name()), source }
    }

    /// Throws away what waits at the backend. Frames from before are of no use to a guest that has just come, and may have
    /// offloads that it does not know.
    fn drain(&mut self) {
        for _ in 0..MAX_STALE_FRAMES {
            match rustix::io::read(self.backend.as_fd(), &mut self.spill[..]) {
                Ok(1..) | Err(rustix::io::Errno::INTR) => {}
                Ok(0) | Err(_) => return,
            }
        }
    }
}

impl DeviceCell<Net> {
    /// Whether the guest's driver knows how to announce itself, and is running.
    pub fn guest_can_announce(&self) -> bool {
        self.negotiated().is_some_and(|features| has(features, VIRTIO_NET_F_GUEST_ANNOUNCE))
    }

    /// Asks the guest to announce itself on its network (virtio 1.2, 5.1.6.5.4). False when it cannot be asked: its driver does
    /// not know how, or is not running.
    pub fn guest_announce(&mut self) -> bool {
        if !self.guest_can_announce() {
            return false;
        }
        self.announce = true;
        self.interrupt().config_changed();
        true
    }
}

impl VirtioDevice for Net {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_NET
    }

    fn name(&self) -> String {
        format!("virtio-net on {}", self.backend.name())
    }

    fn features(&self) -> u64 {
        OFFERED
    }

    fn queue_sizes(&self) -> &'static [u16] {
        QUEUE_SIZES
    }

    /// `struct virtio_net_config`: the address and the status; without multiple queues there is no more.
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let status = VIRTIO_NET_S_LINK_UP | if self.announce { VIRTIO_NET_S_ANNOUNCE } else { 0 };
        let mut config = [0; 8];
        config[..6].copy_from_slice(&self.mac.0);
        config[6..].copy_from_slice(&(status as u16).to_le_bytes());
        if let Some(config) = usize::try_from(offset).ok().and_then(|offset| config.get(offset..)) {
            let len = config.len().min(data.len());
            data[..len].copy_from_slice(&config[..len]);
        }
    }

    fn event_fds(&self) -> io::Result<Vec<OwnedFd>> {
        Ok(vec![self.backend.as_fd().try_clone_to_owned()?])
    }

    fn activate(&mut self, features: u64) -> Result<(), DeviceError> {
        let offloads = tap_offloads(features);
        self.backend.set_offloads(offloads).map_err(|source| self.host_error("setting the offloads of", source))?;
        // Edges may have come while nobody listened.
        self.readable = true;
        self.writable = true;
        Ok(())
    }

    fn reset(&mut self) {
        self.announce = false;
        self.expected_bytes = 0;
        if let Err(error) = self.backend.set_offloads(0) {
            debug!(%error, "{}: cannot reset the offloads", self.backend.name());
        }
        self.drain();
    }

    fn process(&mut self, work: Work, context: &mut Context<'_>) -> Result<Turn, DeviceError> {
        match work {
            Work::Queue(RX) => self.receive(context),
            Work::Queue(TX) => self.send(context),
            Work::Queue(_) => self.control(context),
            Work::Source { index: _, readable, writable } => {
                self.readable |= readable;
                let was_full = !self.writable;
                self.writable |= writable;
                let turn = if was_full { self.send(context)? } else { Turn::Idle };
                Ok(turn.and(self.receive(context)?))
            }
            Work::Continue => Ok(self.receive(context)?.and(self.send(context)?).and(self.control(context)?)),
            Work::All => {
                self.readable = true;
                self.writable = true;
                Ok(self.receive(context)?.and(self.send(context)?).and(self.control(context)?))
            }
        }
    }

    fn save(&self) -> SavedDevice {
        let Self {
            backend: _,
            mac,
            configured: _, // Part of the machine's configuration.
            learned: Learned { ipv4, ipv6 },
            announce,
            readable: _, // Found out anew.
            writable: _,
            expected_bytes: _,
            spill: _,      // Empty between two frames.
            statistics: _, // Of this host.
        } = self;
        let state = NetState { mac: *mac, announce: *announce, ipv4: ipv4.clone(), ipv6: ipv6.clone() };
        SavedDevice::encode(NET_STATE_VERSION, &state)
    }

    /// Also throws away what came in before: while the machine ran elsewhere, its TAP here got whatever the bridge floods.
    fn restore(&mut self, saved: &SavedDevice) -> Result<(), DeviceStateError> {
        let state: NetState = saved.decode(NET_STATE_VERSION)?;
        let (announce, learned) = state.check(self.mac)?;
        self.announce = announce;
        self.learned = learned;
        self.drain();
        Ok(())
    }
}
