//! VDUSE: virtio devices in user space, driven by this machine's kernel or by a VMM.
//!
//! * [`Control`] makes and removes devices, [`vdpa`] puts them on the vDPA bus.
//! * [`Iotlb`] is the driver's memory, mapped when it is touched and never touched after it was
//!   taken back.
//! * [`decode`], [`encode`] and [`Status`] are the kernel's requests and what they mean, without
//!   I/O.
//!
//! # What a driver cannot do
//!
//! Queues, requests and memory are the driver's and are not trusted: a queue that breaks the
//! rules is broken until the driver resets the device, and nothing else happens. The driver is not told, since VDUSE has no way to set `DEVICE_NEEDS_RESET`. Memory
//! that vanishes under an access (the kernel's bounce buffer has pages only where requests are)
//! raises SIGBUS, for which this library installs a handler; other causes of SIGBUS go to the
//! handler that was there before.

mod control;
mod error;
mod iotlb;
mod message;
mod port;
mod status;
mod sys;
pub mod vdpa;

pub use control::{Control, DeviceConfig, available};
pub use error::Error;
pub use iotlb::{Iotlb, Region, Session, Source};
pub use message::{Answer, BadRequest, Request, decode, encode};
pub use port::{DeviceFile, Port};
pub use status::{Status, StatusError, Step};
