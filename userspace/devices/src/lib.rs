//! Device models, written once for every way in which a driver can reach them.
//!
//! * [`virtio`]: what all virtio devices share: the driver's memory, queues in both formats, and
//!   the trait of a device.
//! * [`blk`]: a disk.
//! * [`net`]: a network device.
//!
//! A device gets requests and answers them. It knows neither who carries notifications nor whose
//! memory it works on: a driver in this machine's kernel over VDUSE, or one in a guest.

pub mod blk;
pub mod net;
pub mod virtio;
