//! What a service needs of the kernel, and the device file that gives it.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt as _;
use std::sync::OnceLock;

use ioregion_abi::vduse::{
    ConfigData, VDUSE_API_VERSION_1, VDUSE_DEV_GET_FEATURES, VDUSE_DEV_INJECT_CONFIG_IRQ,
    VDUSE_DEV_SET_CONFIG, VDUSE_IOTLB_DEREG_UMEM, VDUSE_IOTLB_GET_FD, VDUSE_IOTLB_GET_FD2,
    VDUSE_IOTLB_GET_FD2_EARLY, VDUSE_IOTLB_GET_INFO, VDUSE_IOTLB_REG_UMEM, VDUSE_VQ_GET_INFO,
    VDUSE_VQ_INJECT_IRQ, VDUSE_VQ_SETUP, VDUSE_VQ_SETUP_KICKFD, VqConfig, VqEventfd, VqInfo,
};

use crate::bounce::{Bounce, BounceBuffer};
use crate::control::{check_name, path_of};
use crate::entry::Interface;
use crate::error::Error;
use crate::iotlb::{Region, Source};
use crate::sys;

/// The kernel's side of one device. The descriptor carries requests and answers, each read and
/// written whole, and does not block; the other requests go by methods.
pub trait Port: AsFd + Source {
    /// The features that the driver took.
    ///
    /// # Errors
    ///
    /// The system's.
    fn driver_features(&self) -> io::Result<u64>;

    /// Whether a driver uses the device: the kernel has noted that it is ready. Such a driver is
    /// told that the configuration space has changed, which does no harm: no other request asks
    /// the kernel for the status.
    ///
    /// # Errors
    ///
    /// The system's; `EPERM` where the kernel has given the device up.
    fn is_driven(&self) -> io::Result<bool>;

    /// What the driver set up of a queue.
    ///
    /// # Errors
    ///
    /// The system's; `EINVAL` where there is no such queue.
    fn queue(&self, index: u32) -> io::Result<VqInfo>;

    /// Sets the eventfd by which the driver notifies about a queue, until the next reset.
    ///
    /// # Errors
    ///
    /// The system's.
    fn set_kick(&self, index: u32, eventfd: BorrowedFd<'_>) -> io::Result<()>;

    /// Interrupts the driver for a queue.
    ///
    /// # Errors
    ///
    /// The system's; `EINVAL` as long as the kernel has not noted that the driver is ready.
    fn interrupt(&self, index: u32) -> io::Result<()>;

    /// Changes the configuration space, from `offset` on, and tells the driver, where there is
    /// one that is ready.
    ///
    /// # Errors
    ///
    /// The system's.
    fn change_config(&self, offset: u32, bytes: &[u8]) -> io::Result<()>;

    /// The API version that the device was made with, which says how requests are to be read.
    fn version(&self) -> u64 {
        0
    }

    /// The group of a queue. Version 0 has only one.
    fn group(&self, _queue: u16) -> u32 {
        0
    }

    /// [`Source::region`] in an address space. Version 0 has only one.
    ///
    /// # Errors
    ///
    /// The system's.
    fn region_in(&self, space: u32, addr: u64) -> io::Result<Option<Region>> {
        match space {
            0 => self.region(addr),
            _ => Ok(None),
        }
    }

    /// Lets go of what the port itself holds of the driver's memory, which nobody accesses any
    /// more: the driver has reset the device, or the service ends.
    fn release_memory(&self) {}
}

/// The requests (`ioctl`) that a [`DeviceFile`] makes: what a filter of system calls has to let
/// through for a process that serves it.
pub const DEVICE_REQUESTS: [u64; 13] = [
    VDUSE_IOTLB_GET_FD,
    VDUSE_IOTLB_GET_FD2,
    VDUSE_IOTLB_GET_FD2_EARLY,
    VDUSE_IOTLB_GET_INFO,
    VDUSE_IOTLB_REG_UMEM,
    VDUSE_IOTLB_DEREG_UMEM,
    VDUSE_DEV_GET_FEATURES,
    VDUSE_DEV_SET_CONFIG,
    VDUSE_DEV_INJECT_CONFIG_IRQ,
    VDUSE_VQ_SETUP,
    VDUSE_VQ_GET_INFO,
    VDUSE_VQ_SETUP_KICKFD,
    VDUSE_VQ_INJECT_IRQ,
];

/// The file of a device, `/dev/vduse/NAME`.
#[derive(Debug)]
pub struct DeviceFile {
    name: String,
    /// Before the memory that the kernel may use until the file is closed.
    file: File,
    /// Once it was asked for, which takes requests.
    interface: OnceLock<Interface>,
    /// The groups of the first queues.
    groups: Vec<u16>,
    bounce: Option<Bounce>,
}

impl DeviceFile {
    /// Opens the file of a device that was made with
    /// [`Control::create`](crate::Control::create); one process can have it open.
    ///
    /// # Errors
    ///
    /// Where there is none, it may not be opened, or (`EBUSY`) somebody has it.
    pub fn open(name: &str) -> Result<Self, Error> {
        let path = path_of(name)?;
        let mut options = File::options();
        options
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK);
        match options.open(&path) {
            Ok(file) => Ok(Self {
                name: name.into(),
                interface: OnceLock::new(),
                file,
                groups: Vec::new(),
                bounce: None,
            }),
            Err(error) => Err(Error::Open { path, error }),
        }
    }

    /// The file of a device that another process has opened in this way, and does not have any
    /// more.
    ///
    /// # Errors
    ///
    /// A name that no device can have.
    pub fn received(name: &str, file: OwnedFd) -> Result<Self, Error> {
        check_name(name)?;
        Ok(Self {
            name: name.into(),
            file: file.into(),
            interface: OnceLock::new(),
            groups: Vec::new(),
            bounce: None,
        })
    }

    fn interface(&self) -> Interface {
        *(self.interface).get_or_init(|| Interface::of(self.file.as_fd()))
    }

    /// Whether a device of this name was made.
    #[must_use]
    pub fn exists(name: &str) -> bool {
        path_of(name).is_ok_and(|path| path.exists())
    }

    /// The device's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    fn kernel(&self, what: &'static str) -> impl FnOnce(io::Error) -> Error {
        let name = self.name.clone();
        move |error| Error::Kernel { name, what, error }
    }

    /// Says which group each queue is of, from the first on; those that are not named are of
    /// group 0. To be said before [`set_up_queue`](Self::set_up_queue), and again by whoever takes
    /// the device over.
    ///
    /// # Errors
    ///
    /// [`Error::Config`] where a group is not 0 and the device was made with API version 0.
    pub fn group_queues(&mut self, groups: &[u16]) -> Result<(), Error> {
        if self.version() < VDUSE_API_VERSION_1 && groups.iter().any(|&group| group != 0) {
            return Err(Error::Config {
                name: self.name.clone(),
                what: "its queues cannot be grouped: it was made with API version 0",
            });
        }
        self.groups = groups.to_vec();
        Ok(())
    }

    /// Has the kernel's own drivers bounce their data through memory of this process
    /// (`VDUSE_IOTLB_REG_UMEM`), from the next time on that it touches the bounce buffer until the
    /// driver resets the device, and so for each driver. All of the memory is pinned meanwhile.
    ///
    /// What a driver has bounced already moves with the buffer, both ways. Where the kernel
    /// refuses the memory, for one because its buffer has another size ([`set_bounce_size`]), it
    /// keeps its own, which is logged. Drivers of a VMM (vhost_vdpa) have no bounce buffer.
    ///
    /// [`set_bounce_size`]: crate::set_bounce_size
    pub fn own_bounce_buffer(&mut self, buffer: &BounceBuffer) {
        self.bounce = Some(Bounce::new(&self.name, buffer));
    }

    /// Sets the largest size of a queue; each needs one before the device can get on the bus.
    ///
    /// # Errors
    ///
    /// What the kernel says.
    pub fn set_up_queue(&self, index: u16, max_size: u16) -> Result<(), Error> {
        let request = VqConfig {
            index: index.into(),
            max_size,
            group: self.group(index),
            ..VqConfig::default()
        };
        sys::pass(self.as_fd(), VDUSE_VQ_SETUP, &request).map_err(self.kernel("setting up a queue"))
    }

    /// Checks that the device has so many queues, of one that was there before.
    ///
    /// # Errors
    ///
    /// [`Error::Queues`]; [`Error::Broken`] where the kernel has given the device up.
    pub fn check_queues(&self, queues: u16) -> Result<(), Error> {
        let has = |index: u32| match self.queue(index) {
            Ok(_) => Ok(true),
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(false),
            Err(error) if error.raw_os_error() == Some(libc::EPERM) => {
                Err(Error::Broken(self.name.clone()))
            }
            Err(error) => Err(self.kernel("asking for a queue")(error)),
        };
        let queues_are = u32::from(queues);
        match queues > 0 && has(queues_are - 1)? && !has(queues_are)? {
            true => Ok(()),
            false => Err(Error::Queues {
                name: self.name.clone(),
                queues,
            }),
        }
    }
}

impl AsFd for DeviceFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl Source for DeviceFile {
    fn region(&self, addr: u64) -> io::Result<Option<Region>> {
        self.region_in(0, addr)
    }
}

impl Port for DeviceFile {
    fn driver_features(&self) -> io::Result<u64> {
        let mut features = 0;
        sys::update(self.as_fd(), VDUSE_DEV_GET_FEATURES, &mut features)?;
        Ok(features)
    }

    fn is_driven(&self) -> io::Result<bool> {
        match sys::number(self.as_fd(), VDUSE_DEV_INJECT_CONFIG_IRQ) {
            Ok(()) => Ok(true),
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(false),
            Err(error) => Err(error),
        }
    }

    fn queue(&self, index: u32) -> io::Result<VqInfo> {
        let mut info = VqInfo {
            index,
            ..VqInfo::default()
        };
        sys::update(self.as_fd(), VDUSE_VQ_GET_INFO, &mut info)?;
        Ok(info)
    }

    fn set_kick(&self, index: u32, eventfd: BorrowedFd<'_>) -> io::Result<()> {
        let fd = eventfd.as_raw_fd();
        sys::pass(
            self.as_fd(),
            VDUSE_VQ_SETUP_KICKFD,
            &VqEventfd { index, fd },
        )
    }

    fn interrupt(&self, index: u32) -> io::Result<()> {
        sys::pass(self.as_fd(), VDUSE_VQ_INJECT_IRQ, &index)
    }

    fn change_config(&self, offset: u32, bytes: &[u8]) -> io::Result<()> {
        let length = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
        let mut request = [0; size_of::<ConfigData>()];
        request[..4].copy_from_slice(&offset.to_ne_bytes());
        request[4..].copy_from_slice(&length.to_ne_bytes());
        let request = [&request, bytes].concat();
        sys::pass_bytes(self.as_fd(), VDUSE_DEV_SET_CONFIG, &request)?;
        // Where no driver is there to be told, it reads the space when it comes.
        self.is_driven().map(drop)
    }

    fn version(&self) -> u64 {
        self.interface().version()
    }

    fn group(&self, queue: u16) -> u32 {
        let group = self.groups.get(usize::from(queue));
        group.copied().unwrap_or_default().into()
    }

    fn region_in(&self, space: u32, addr: u64) -> io::Result<Option<Region>> {
        let bounced = match (&self.bounce, space) {
            (Some(bounce), 0) => bounce.region(self.as_fd(), addr)?,
            _ => None,
        };
        match bounced {
            Some(region) => Ok(Some(region)),
            None => self.interface().region(self.as_fd(), space, addr),
        }
    }

    fn release_memory(&self) {
        if let Some(bounce) = &self.bounce {
            bounce.release(self.as_fd());
        }
    }
}
