//! The saved state of a device behind virtio-mmio, and what is checked before it is believed.
//!
//! What the *driver* may write into registers at any time is taken over as it is, because a guest must not be able to make
//! itself impossible to move; it is checked where it is used. What only the *device* writes is checked here.

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FAILED,
    VIRTIO_CONFIG_S_FEATURES_OK,
};

use super::cell::CellRestoreError;
use super::device::SavedDevice;
use super::interrupt::INTERRUPT_BITS;
use super::mmio::VERSION_1;
use super::queue::QueueState;

/// A transport and its device, saved.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MmioTransportState {
    /// `DeviceID`.
    pub device_type: u32,
    /// `Status` as the driver wrote it, without `DEVICE_NEEDS_RESET`.
    pub status: u32,
    /// `DEVICE_NEEDS_RESET`: the device is not active whatever the status says.
    pub needs_reset: bool,
    /// `DeviceFeaturesSel`.
    pub device_features_sel: u32,
    /// `DriverFeaturesSel`.
    pub driver_features_sel: u32,
    /// `DriverFeatures`, as acknowledged so far.
    pub driver_features: u64,
    /// `QueueSel`.
    pub queue_sel: u32,
    /// `InterruptStatus`.
    pub interrupt_status: u32,
    /// `ConfigGeneration`.
    pub config_generation: u32,
    /// One for each queue of the device.
    pub queues: Vec<QueueState>,
    /// What is the device's own.
    pub device: SavedDevice,
}

/// A saved state cannot be taken over.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// Restoring is for a transport that no driver has touched.
    #[error("the device is in use already")]
    InUse,
    /// The state of another kind of device.
    #[error("the state is of device type {found}, the device is of type {expected}")]
    DeviceType {
        /// In the state.
        found: u32,
        /// Of this device.
        expected: u32,
    },
    /// Not a status that the state machine can be in.
    #[error("status {0:#x} is impossible")]
    Status(u32),
    /// Not offered here, though in use there.
    #[error("features {0:#x} are in use but not offered here")]
    Features(u64),
    /// In use without `VIRTIO_F_VERSION_1`, which would not have been accepted.
    #[error("the features {0:#x} lack VIRTIO_F_VERSION_1")]
    Legacy(u64),
    /// Bits that do not exist.
    #[error("interrupt status {0:#x} has unknown bits")]
    InterruptStatus(u32),
    /// Another number of queues.
    #[error("the state has {found} queues, the device {expected}")]
    QueueCount {
        /// In the state.
        found: usize,
        /// Of this device.
        expected: usize,
    },
    /// A queue or the device's own state.
    #[error("the state of {name} cannot be taken over")]
    Device {
        /// The device.
        name: String,
        /// Why.
        #[source]
        source: CellRestoreError,
    },
}

impl MmioTransportState {
    /// Whether the driver was using the device.
    pub(super) fn is_active(&self) -> bool {
        self.status & VIRTIO_CONFIG_S_DRIVER_OK != 0 && !self.needs_reset
    }

    /// Checks what does not depend on guest memory and on the device's own state.
    pub(super) fn check(&self, device_type: u32, offered: u64, queues: usize) -> Result<(), RestoreError> {
        let Self {
            device_type: found_type,
            status,
            needs_reset: _,
            device_features_sel: _,
            driver_features_sel: _,
            driver_features,
            queue_sel: _,
            interrupt_status,
            config_generation: _,
            queues: found_queues,
            device: _,
        } = self;
        if *found_type != device_type {
            return Err(RestoreError::DeviceType { found: *found_type, expected: device_type });
        }
        if !status_is_possible(*status) {
            return Err(RestoreError::Status(*status));
        }
        // Before FEATURES_OK the driver may have acknowledged anything; it is refused when it asks.
        if status & VIRTIO_CONFIG_S_FEATURES_OK != 0 {
            if driver_features & !offered != 0 {
                return Err(RestoreError::Features(driver_features & !offered));
            }
            if driver_features & VERSION_1 == 0 {
                return Err(RestoreError::Legacy(*driver_features));
            }
        }
        if interrupt_status & !INTERRUPT_BITS != 0 {
            return Err(RestoreError::InterruptStatus(*interrupt_status));
        }
        if found_queues.len() != queues {
            return Err(RestoreError::QueueCount { found: found_queues.len(), expected: queues });
        }
        Ok(())
    }
}

/// Each step of the initialization (virtio 1.2, 3.1.1) presupposes the ones before it.
fn status_is_possible(status: u32) -> bool {
    let steps =
        [VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_DRIVER_OK];
    let reached = steps.iter().take_while(|step| status & **step != 0).fold(0, |bits, step| bits | step);
    status & !VIRTIO_CONFIG_S_FAILED == reached
}
