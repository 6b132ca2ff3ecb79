//! What can go wrong with a device as a whole.

use std::io;
use std::path::PathBuf;

use ioregion_devices::virtio::Refusal;

use crate::log::LogFileError;

/// Why a device cannot be made, served or removed. Each names the device or the file.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A device file cannot be opened.
    #[error("{}: {error}{}", .path.display(), remedy(.error))]
    Open {
        /// Which.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// A name that no device can have.
    #[error(
        "{0:?} cannot be a device's name: 1 to 255 bytes, no slash, no zero, and neither `.`, \
         `..` nor `control`"
    )]
    Name(String),
    /// A configuration that no device can have.
    #[error("device {name}: {what}")]
    Config {
        /// Which device.
        name: String,
        /// What is wrong.
        what: &'static str,
    },
    /// The kernel refused a request.
    #[error("device {name}: {what}: {error}")]
    Kernel {
        /// Which device.
        name: String,
        /// What was asked for.
        what: &'static str,
        /// Why not.
        error: io::Error,
    },
    /// The bounce buffer cannot be in this process.
    #[error("device {name}: its bounce buffer: {what}: {error}")]
    Bounce {
        /// Which device.
        name: String,
        /// What was asked for.
        what: &'static str,
        /// Why not.
        error: io::Error,
    },
    /// The kernel has neither version of the interface.
    #[error("this kernel's VDUSE has API version {0}, which this library does not know")]
    Version(u64),
    /// The vDPA bus refused, by netlink.
    #[error("device {name}: {what} the vDPA bus: {why}")]
    Bus {
        /// Which device.
        name: String,
        /// What was asked for.
        what: &'static str,
        /// Why not.
        why: String,
    },
    /// The kernel has given the device up: a request was not answered in time.
    ///
    /// Nothing reaches the device any more. It has to be removed and made anew.
    #[error(
        "device {0}: the kernel has marked it broken, because a request was not answered within \
         the message timeout; remove it and make it anew"
    )]
    Broken(String),
    /// A driver uses the device, and what it waits for is on no record.
    #[error(
        "device {0}: a driver is using it, and this log does not say what it waits for; start the \
         service with the log of the one before"
    )]
    NoRecord(String),
    /// A driver uses the device with features that it would not have.
    #[error(
        "device {name}: a driver is using it, but {refusal}; start the service with the options \
         of the one before"
    )]
    Refused {
        /// Which device.
        name: String,
        /// Why not.
        refusal: Refusal,
    },
    /// The device has other queues than were asked for.
    #[error(
        "device {name}: it has not the {queues} queues that were asked for; start the service \
         with the options of the one before"
    )]
    Queues {
        /// Which device.
        name: String,
        /// How many were asked for.
        queues: u16,
    },
    /// The log cannot be used.
    #[error(transparent)]
    Log(#[from] LogFileError),
    /// A thread cannot be started or has panicked.
    #[error("device {name}: {what}")]
    Thread {
        /// Which device.
        name: String,
        /// What happened.
        what: String,
    },
}

fn remedy(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::NotFound => "; is the module vduse loaded (`modprobe vduse`)?",
        io::ErrorKind::ResourceBusy => "; another process serves the device",
        io::ErrorKind::PermissionDenied => "; run as root, or have the file given to this user",
        _ => "",
    }
}
