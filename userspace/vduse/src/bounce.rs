//! The kernel's bounce buffer, in memory of this process.
//!
//! Drivers of this machine's kernel (virtio_vdpa) have their data copied to and from a buffer, the
//! one region of their memory that a device sees apart from the rings. The kernel makes the region
//! with the driver's first request. From then on it can be told to use other memory for it, which
//! it pins: all of the region, and only that ([`IovaInfo::capability`]). What is in flight it
//! copies, into that memory and back out of it, so that both may happen at any time.
//!
//! The memory is a file, so that the IOTLB maps it like any other region. A mapping of its own
//! stays for as long as the kernel uses it.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::fd::{AsFd as _, BorrowedFd};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ioregion_abi::vduse::{IovaInfo, VDUSE_IOTLB_GET_INFO, VDUSE_IOVA_CAP_UMEM};
use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

use crate::control::check_name;
use crate::error::Error;
use crate::iotlb::Region;
use crate::sys::{self, Mapping};

/// Where the system keeps the settings of devices, in a folder for each.
pub const SETTINGS: &str = "/sys/devices/virtual/vduse";

/// Sets the size of a device's bounce buffer in bytes, from 1 MiB to 1 GiB, which takes the right
/// to write `bounce_size` in the device's folder in [`SETTINGS`]. It can be changed until the
/// device is on the bus.
///
/// # Errors
///
/// [`Error::Bounce`], where it is not the device's size already.
pub fn set_bounce_size(name: &str, size: u64) -> Result<(), Error> {
    check_name(name)?;
    let failed = |what| {
        let name = name.to_owned();
        move |error: io::Error| Error::Bounce { name, what, error }
    };
    let path = Path::new(SETTINGS).join(name).join("bounce_size");
    let read = || -> io::Result<u64> {
        let text = fs::read_to_string(&path)?;
        text.trim().parse().map_err(io::Error::other)
    };
    if read().map_err(failed("reading /sys/class/vduse/NAME/bounce_size"))? == size {
        return Ok(());
    }
    let written = OpenOptions::new()
        .write(true)
        .open(&path)
        .and_then(|mut file| file.write_all(size.to_string().as_bytes()));
    let checked = written.and_then(|()| match read()? {
        is if is == size => Ok(()),
        is => Err(io::Error::other(format!("it is {is}"))),
    });
    checked.map_err(failed(
        "setting /sys/class/vduse/NAME/bounce_size, which takes from 1 MiB to 1 GiB until the \
         device is on the bus",
    ))
}

/// Memory of this process for a bounce buffer.
#[derive(Debug)]
pub struct BounceBuffer {
    size: u64,
    memory: Arc<File>,
}

impl BounceBuffer {
    /// Memory of so many bytes for the device of this name. It will count against
    /// `RLIMIT_MEMLOCK`, which this raises where it may.
    ///
    /// # Errors
    ///
    /// [`Error::Bounce`]: the limit is too low, or there is no memory.
    pub fn new(name: &str, size: u64) -> Result<Self, Error> {
        let failed = |what| {
            let name = name.to_owned();
            move |error: io::Error| Error::Bounce { name, what, error }
        };
        allow_pinning(size).map_err(failed(
            "pinning memory of its size: raise RLIMIT_MEMLOCK (`ulimit -l`), or have a smaller one",
        ))?;
        let memory = memfd_create("vduse-bounce", MFdFlags::MFD_CLOEXEC);
        let memory = File::from(memory.map_err(|errno| failed("making memory")(errno.into()))?);
        memory.set_len(size).map_err(failed("making memory"))?;
        Ok(Self {
            size,
            memory: Arc::new(memory),
        })
    }

    /// Bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }
}

/// The bounce buffer of a device.
#[derive(Debug)]
pub(crate) struct Bounce {
    name: String,
    size: u64,
    memory: Arc<File>,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// What the kernel uses.
    registered: Option<Mapping>,
    /// The kernel has refused the memory: it is not asked again before the next driver comes.
    refused: bool,
}

impl Bounce {
    pub(crate) fn new(name: &str, buffer: &BounceBuffer) -> Self {
        Self {
            name: name.into(),
            size: buffer.size,
            memory: Arc::clone(&buffer.memory),
            state: Mutex::default(),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing panics halfway through a change.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The region that an address lies in, if that is the bounce buffer, which is in our memory
    /// from here on.
    pub(crate) fn region(&self, fd: BorrowedFd<'_>, addr: u64) -> io::Result<Option<Region>> {
        let mut info = IovaInfo {
            start: addr,
            last: addr,
            ..IovaInfo::default()
        };
        match sys::update(fd, VDUSE_IOTLB_GET_INFO, &mut info) {
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => return Ok(None),
            done => done?,
        }
        if info.capability & VDUSE_IOVA_CAP_UMEM == 0 {
            return Ok(None);
        }
        let mut state = self.state();
        if state.registered.is_none() && !state.refused {
            match self.register(fd, &info) {
                Ok(mapping) => state.registered = Some(mapping),
                Err(error) => {
                    let device = &self.name;
                    tracing::error!(device, %error, "the bounce buffer stays in the kernel");
                    state.refused = true;
                }
            }
        }
        if state.registered.is_none() {
            return Ok(None);
        }
        Ok(Some(Region {
            first: info.start,
            last: info.last,
            read: true,
            write: true,
            file: self.memory.as_fd().try_clone_to_owned()?,
            offset: 0,
        }))
    }

    fn register(&self, fd: BorrowedFd<'_>, info: &IovaInfo) -> io::Result<Mapping> {
        if info.start != 0 || info.last.checked_add(1) != Some(self.size) {
            return Err(io::Error::other(format!(
                "it has the addresses {:#x} to {:#x}, not {:#x} bytes from 0 on",
                info.start, info.last, self.size
            )));
        }
        let mapping = Mapping::new(&*self.memory, 0, self.size, true, true)?;
        sys::register(fd, &mapping, self.size)?;
        Ok(mapping)
    }

    /// Gives the buffer back to the kernel, and the memory to the system.
    pub(crate) fn release(&self, fd: BorrowedFd<'_>) {
        let mut state = self.state();
        state.refused = false;
        let Some(mapping) = state.registered.take() else {
            return;
        };
        // First, so that nobody but the IOTLB uses the memory while it goes.
        let done = sys::deregister(fd, self.size);
        drop(mapping);
        let size = libc::off_t::try_from(self.size).unwrap_or(libc::off_t::MAX);
        let all = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        let freed = || fallocate(&*self.memory, all, 0, size).map_err(io::Error::from);
        if let Err(error) = done.and_then(|()| freed()) {
            // The kernel has its own hold on the pages, until the device's file is closed.
            let device = &self.name;
            tracing::warn!(device, %error, "memory of the bounce buffer is freed later");
        }
    }
}

/// Raises the limit of pinned memory where it is too low for `size` bytes more, with as much for
/// others. It holds for whoever pins, with any privilege.
fn allow_pinning(size: u64) -> io::Result<()> {
    let wanted = size.saturating_mul(2);
    let (soft, hard) = getrlimit(Resource::RLIMIT_MEMLOCK)?;
    if soft >= wanted {
        return Ok(());
    }
    // More than the hard limit only with privileges.
    match setrlimit(Resource::RLIMIT_MEMLOCK, wanted, hard.max(wanted)) {
        Ok(()) => Ok(()),
        Err(error) if hard < size => Err(error.into()),
        Err(_) => Ok(setrlimit(Resource::RLIMIT_MEMLOCK, hard, hard)?),
    }
}
