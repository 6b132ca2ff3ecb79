//! Features that a device offers, over whatever carries its requests.

use virtio_bindings::virtio_config::VIRTIO_F_RING_PACKED;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use super::device::{Device, Refusal};

/// The features that a driver is offered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Offer {
    all: u64,
    needed: u64,
}

impl Offer {
    /// Those of a device and of queues, and `needed`: those of the transport, without which it
    /// does not work. `packed`: packed queues, too.
    #[must_use]
    pub fn new(device: &dyn Device, needed: u64, packed: bool) -> Self {
        let mut all = device.features() | needed;
        all |= 1 << VIRTIO_RING_F_INDIRECT_DESC | 1 << VIRTIO_RING_F_EVENT_IDX;
        if packed {
            all |= 1 << VIRTIO_F_RING_PACKED;
        }
        Self { all, needed }
    }

    /// All of them.
    #[must_use]
    pub fn all(&self) -> u64 {
        self.all
    }

    /// Whether the device works with features that a driver took.
    ///
    /// # Errors
    ///
    /// Why not.
    pub fn check(&self, device: &dyn Device, features: u64) -> Result<(), Refusal> {
        let (extra, missing) = (features & !self.all, self.needed & !features);
        if extra != 0 {
            return Err(Refusal::NotOffered(extra));
        }
        if missing != 0 {
            return Err(Refusal::Missing(missing));
        }
        device.check_features(features & device.features())
    }
}
