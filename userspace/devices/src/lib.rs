//! Device models, written once for every way in which a driver can reach them.
//!
//! * [`memory`]: the driver's memory.
//! * [`virtio`]: what all virtio devices share: queues in both formats, and the trait of a device.
//! * [`blk`]: a disk.
//! * [`console`]: a console.
//! * [`net`]: a network device.
//! * [`rng`]: a source of random bytes.
//! * [`mmio`]: registers by which a guest reaches any of them.
//!
//! A device gets requests and answers them. It knows neither who carries notifications nor whose
//! memory it works on: a driver in this machine's kernel over VDUSE, or one in a guest.

pub mod blk;
pub mod console;
pub mod memory;
pub mod mmio;
pub mod net;
pub mod rng;
pub mod virtio;
