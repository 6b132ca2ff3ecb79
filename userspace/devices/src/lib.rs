//! Device models, written once for every way in which a driver can reach them.
//!
//! * [`memory`]: the driver's memory.
//! * [`virtio`]: what all virtio devices share: queues in both formats, and the trait of a device.
//! * [`disk`]: the image behind a disk of any kind, and work on it.
//! * [`blk`]: a virtio disk.
//! * [`console`]: a virtio console.
//! * [`net`]: a virtio network device.
//! * [`rng`]: a virtio source of random bytes.
//! * [`mmio`]: registers by which a guest reaches any virtio device.
//! * [`nvme`]: an NVMe controller.
//!
//! A device gets requests and answers them. It knows neither who carries notifications nor whose
//! memory it works on: a driver in this machine's kernel over VDUSE, or one in a guest.

pub mod blk;
pub mod console;
pub mod disk;
pub mod memory;
pub mod mmio;
pub mod net;
pub mod nvme;
pub mod rng;
pub mod virtio;
