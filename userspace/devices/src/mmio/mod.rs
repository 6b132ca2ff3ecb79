//! virtio-mmio, version 2: any virtio device behind registers that a guest reads and writes.
//!
//! * [`Registers`] is what the registers mean (virtio 1.2, section 4.2), without I/O.
//! * [`Mmio`] serves a [`virtio::Device`](crate::virtio::Device) behind them, with a thread for
//!   each queue. It is a [`Device`](ioregion_dispatch::Device) for the dispatch library, and so
//!   never knows how accesses reach it.
//! * [`region`] is what a VMM assigns to a mechanism.
//! * [`Interrupt`] is how the driver hears of the device.
//!
//! What the guest writes is not trusted. What means nothing changes nothing ([`Misuse`]); a queue
//! that breaks the rules makes the device say `DEVICE_NEEDS_RESET`, by the status and an interrupt.
//!
//! # Resets
//!
//! A write of 0 to the status waits until nothing that the driver before has asked for touches its
//! memory any more. A file that hangs can make that impossible: after
//! [`Options::grace`] the guest goes on, and the status reads `DEVICE_NEEDS_RESET`, and nothing
//! else, until it is done. Drivers that wait for 0, as the specification has it, see when; others
//! find that the device takes none of their features.

mod device;
mod interrupt;
mod registers;

use ioregion_dispatch::{Delivery, Doorbell, Region, Size};

pub use device::{Handle, Mmio, MmioError, Options};
pub use interrupt::Interrupt;
pub use registers::{Effect, Misuse, Registers};

/// Bytes of the region: one page.
pub const REGION_BYTES: u64 = 0x1000;

/// Offsets of the registers, by their names in the specification.
pub mod at {
    use virtio_bindings::virtio_mmio as of;

    macro_rules! registers {
        ($($(#[$doc:meta])* $name:ident = $from:ident;)*) => {
            $($(#[$doc])* pub const $name: u64 = of::$from as u64;)*
        };
    }

    registers! {
        /// `MagicValue`, "virt".
        MAGIC = VIRTIO_MMIO_MAGIC_VALUE;
        /// `Version`, 2.
        VERSION = VIRTIO_MMIO_VERSION;
        /// `DeviceID`: the device type.
        DEVICE_ID = VIRTIO_MMIO_DEVICE_ID;
        /// `VendorID`.
        VENDOR_ID = VIRTIO_MMIO_VENDOR_ID;
        /// `DeviceFeatures`: 32 of those that are offered.
        DEVICE_FEATURES = VIRTIO_MMIO_DEVICE_FEATURES;
        /// `DeviceFeaturesSel`: which 32.
        DEVICE_FEATURES_SEL = VIRTIO_MMIO_DEVICE_FEATURES_SEL;
        /// `DriverFeatures`: 32 of those that the driver takes.
        DRIVER_FEATURES = VIRTIO_MMIO_DRIVER_FEATURES;
        /// `DriverFeaturesSel`: which 32.
        DRIVER_FEATURES_SEL = VIRTIO_MMIO_DRIVER_FEATURES_SEL;
        /// `QueueSel`: the queue that the others are about.
        QUEUE_SEL = VIRTIO_MMIO_QUEUE_SEL;
        /// `QueueSizeMax`; 0: no such queue.
        QUEUE_SIZE_MAX = VIRTIO_MMIO_QUEUE_NUM_MAX;
        /// `QueueSize`: descriptors.
        QUEUE_SIZE = VIRTIO_MMIO_QUEUE_NUM;
        /// `QueueReady`.
        QUEUE_READY = VIRTIO_MMIO_QUEUE_READY;
        /// `QueueNotify`: the index of a queue.
        QUEUE_NOTIFY = VIRTIO_MMIO_QUEUE_NOTIFY;
        /// `InterruptStatus`.
        INTERRUPT_STATUS = VIRTIO_MMIO_INTERRUPT_STATUS;
        /// `InterruptACK`.
        INTERRUPT_ACK = VIRTIO_MMIO_INTERRUPT_ACK;
        /// `Status`.
        STATUS = VIRTIO_MMIO_STATUS;
        /// `QueueDescLow`.
        QUEUE_DESC_LOW = VIRTIO_MMIO_QUEUE_DESC_LOW;
        /// `QueueDescHigh`.
        QUEUE_DESC_HIGH = VIRTIO_MMIO_QUEUE_DESC_HIGH;
        /// `QueueDriverLow`.
        QUEUE_DRIVER_LOW = VIRTIO_MMIO_QUEUE_AVAIL_LOW;
        /// `QueueDriverHigh`.
        QUEUE_DRIVER_HIGH = VIRTIO_MMIO_QUEUE_AVAIL_HIGH;
        /// `QueueDeviceLow`.
        QUEUE_DEVICE_LOW = VIRTIO_MMIO_QUEUE_USED_LOW;
        /// `QueueDeviceHigh`.
        QUEUE_DEVICE_HIGH = VIRTIO_MMIO_QUEUE_USED_HIGH;
        /// `SHMSel`: shared memory, of which there is none.
        SHM_SEL = VIRTIO_MMIO_SHM_SEL;
        /// `SHMLenLow`.
        SHM_LEN_LOW = VIRTIO_MMIO_SHM_LEN_LOW;
        /// `SHMLenHigh`.
        SHM_LEN_HIGH = VIRTIO_MMIO_SHM_LEN_HIGH;
        /// `SHMBaseLow`.
        SHM_BASE_LOW = VIRTIO_MMIO_SHM_BASE_LOW;
        /// `SHMBaseHigh`.
        SHM_BASE_HIGH = VIRTIO_MMIO_SHM_BASE_HIGH;
        /// `ConfigGeneration`.
        CONFIG_GENERATION = VIRTIO_MMIO_CONFIG_GENERATION;
        /// `Config`: the configuration space, to the region's end.
        CONFIG = VIRTIO_MMIO_CONFIG;
    }
}

/// How notifications of the driver's, which are doorbells, are told apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Notify {
    /// A doorbell for each queue, which rings for the queue's index. The kernel matches it, so
    /// that even an ioeventfd, which carries no value, says which queue it is; and merging
    /// notifications of one queue loses nothing.
    #[default]
    Matched,
    /// One doorbell, whose value is the queue's index. Notifications of different queues must not
    /// be merged, so each is delivered; mechanisms that cannot do so carry it as a command.
    Carried,
}

/// The region of a device with so many queues, one page from `base` on.
#[must_use]
pub fn region(base: u64, queues: u16, notify: Notify) -> Region {
    let region = Region::mmio(base, REGION_BYTES);
    let doorbell = Doorbell::new(at::QUEUE_NOTIFY, Size::B4);
    match notify {
        Notify::Matched => (0..queues).fold(region, |region, queue| {
            region.doorbell(doorbell.matching(queue.into()))
        }),
        Notify::Carried => region.doorbell(doorbell.delivery(Delivery::Fifo)),
    }
}
