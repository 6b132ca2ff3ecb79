//! VDUSE: virtio devices in user space, driven by this machine's kernel or by a VMM.
//!
//! * [`Control`] makes and removes devices, [`vdpa`] puts them on the vDPA bus.
//! * [`Service`] serves a [`Device`](ioregion_devices::virtio::Device): it answers the kernel's
//!   requests and runs a thread for each queue.
//! * A [`Log`] has another process take the device over where this one dies, at any instruction.
//! * [`Iotlb`] is the driver's memory, mapped when it is touched and never touched after it was
//!   taken back.
//! * [`decode`], [`encode`] and [`Status`] are what the service decides with, without I/O.
//!
//! # A complete device
//!
//! `examples/ramdisk.rs`. A disk over a file is `ioregion_devices::blk`.
//!
//! ```no_run
#![doc = include_str!("../examples/ramdisk.rs")]
//! ```
//!
//! A service that is to outlive its process is started by [`Service::start_logged`], with the
//! device's [`Log`]: see there what the next process has to do, which is the same again, but for
//! [`Control::create`] and [`vdpa::attach`].
//!
//! # What a driver cannot do
//!
//! Queues, requests and memory are the driver's and are not trusted: a queue that breaks the
//! rules is broken ([`Health::Broken`]) until the driver resets the device, and nothing else
//! happens. The driver is not told, since VDUSE has no way to set `DEVICE_NEEDS_RESET`. Memory
//! that vanishes under an access (the kernel's bounce buffer has pages only where requests are)
//! raises SIGBUS, for which this library installs a handler; other causes of SIGBUS go to the
//! handler that was there before.

mod bounce;
mod control;
mod entry;
mod error;
mod identity;
mod iotlb;
mod log;
mod message;
mod port;
mod requests;
mod service;
mod shared;
mod sys;
pub mod vdpa;
mod worker;

pub use bounce::{BounceBuffer, SETTINGS, set_bounce_size};
pub use control::{CONTROL_REQUESTS, Control, DeviceConfig, Groups, available, check_name};
pub use error::Error;
pub use identity::Identity;
pub use ioregion_devices::virtio::{Health, Status, StatusError, Step};
pub use iotlb::{Iotlb, Region, Session, Source, StillPinned};
pub use log::{Log, LogFileError, Logged};
pub use message::{Answer, BadRequest, Request, decode, encode};
pub use port::{DEVICE_REQUESTS, DeviceFile, Port};
pub use service::{Service, ServiceOptions, offered};
