//! The entropy device: fills what the guest makes available.

use tracing::debug;
use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;
use vm_memory::Bytes;

use super::state::{RNG_STATE_VERSION, RngState};
use crate::devices::io_thread::Turn;
use crate::devices::virtio::device::{Context, DeviceError, DeviceStateError, SavedDevice, VirtioDevice, Work};
use crate::devices::virtio::iovec::collect;
use crate::devices::virtio::queue::QueueError;

const QUEUE: usize = 0;
const QUEUE_SIZES: &[u16] = &[64];
/// A request gets at most this much; the driver sees how much it was and asks again.
const MAX_REQUEST_BYTES: usize = 64 << 10;
/// Requests served in one turn.
const REQUESTS_PER_TURN: usize = 4;
/// Filled and handed over piece by piece.
const CHUNK_BYTES: usize = 4096;

/// A virtio entropy device.
#[derive(Debug, Default)]
pub struct Rng {}

impl Rng {
    /// A device that takes from the host kernel's generator.
    pub fn new() -> Self {
        Self {}
    }

    fn serve(&mut self, context: &mut Context<'_>) -> Result<Turn, QueueError> {
        let memory = context.memory;
        let mut slices = Vec::new();
        context.queues[QUEUE].serve(memory, context.interrupt, REQUESTS_PER_TURN, |chain| {
            slices.clear();
            let mut len = 0;
            match collect(memory, chain, true, &mut slices) {
                Ok(_) => {
                    'request: for slice in &slices {
                        let mut offset = 0;
                        while offset < slice.len() {
                            let bytes = (slice.len() - offset).min(CHUNK_BYTES).min(MAX_REQUEST_BYTES - len);
                            let mut chunk = [0; CHUNK_BYTES];
                            if bytes == 0 || !fill(&mut chunk[..bytes]) {
                                break 'request;
                            }
                            slice.write_slice(&chunk[..bytes], offset).expect("the piece lies inside the slice");
                            offset += bytes;
                            len += bytes;
                        }
                    }
                }
                Err(error) => debug!(%error, "virtio-rng: a request is refused"),
            }
            Some(len as u32)
        })
    }
}

/// False when the host has no entropy yet, moments after it started.
fn fill(buffer: &mut [u8]) -> bool {
    let mut filled = 0;
    while filled < buffer.len() {
        match rustix::rand::getrandom(&mut buffer[filled..], rustix::rand::GetRandomFlags::NONBLOCK) {
            Ok(bytes) => filled += bytes,
            Err(rustix::io::Errno::INTR) => {}
            Err(_) => return false,
        }
    }
    true
}

impl VirtioDevice for Rng {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_RNG
    }

    fn name(&self) -> String {
        "virtio-rng".into()
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &'static [u16] {
        QUEUE_SIZES
    }

    fn read_config(&self, _offset: u64, _data: &mut [u8]) {}

    fn activate(&mut self, _features: u64) -> Result<(), DeviceError> {
        Ok(())
    }

    fn reset(&mut self) {}

    fn process(&mut self, _work: Work, context: &mut Context<'_>) -> Result<Turn, DeviceError> {
        self.serve(context).map_err(|source| DeviceError::Queue { index: QUEUE, source })
    }

    fn save(&self) -> SavedDevice {
        let Self {} = self;
        SavedDevice::encode(RNG_STATE_VERSION, &RngState {})
    }

    fn restore(&mut self, saved: &SavedDevice) -> Result<(), DeviceStateError> {
        let RngState {} = saved.decode(RNG_STATE_VERSION)?;
        Ok(())
    }
}
