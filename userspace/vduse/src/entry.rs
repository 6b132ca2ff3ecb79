//! The three forms in which kernels give out regions of the driver's memory.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};

use ioregion_abi::vduse::{
    IotlbEntry, IotlbEntryV2, IotlbEntryV2Early, VDUSE_ACCESS_RO, VDUSE_ACCESS_WO,
    VDUSE_API_VERSION, VDUSE_API_VERSION_1, VDUSE_IOTLB_GET_FD, VDUSE_IOTLB_GET_FD2,
    VDUSE_IOTLB_GET_FD2_EARLY,
};

use crate::iotlb::Region;
use crate::sys;

/// How the kernel is asked for regions of a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Interface {
    /// API version 0: one address space.
    First,
    /// API version 1.
    Second,
    /// API version 1 in kernels before its layout was settled.
    SecondEarly,
}

impl Interface {
    /// That of the device. The kernel tells its version nowhere else: it knows the later requests
    /// only for devices of the later version.
    pub(crate) fn of(fd: BorrowedFd<'_>) -> Self {
        let later = [Self::Second, Self::SecondEarly];
        let knows = |form: &Self| match form.entry(fd, 0, 0) {
            Ok(_) => true,
            // There is no such region.
            Err(error) => error.raw_os_error() == Some(libc::EINVAL),
        };
        later.into_iter().find(knows).unwrap_or(Self::First)
    }

    pub(crate) fn version(self) -> u64 {
        match self {
            Self::First => VDUSE_API_VERSION,
            Self::Second | Self::SecondEarly => VDUSE_API_VERSION_1,
        }
    }

    /// The region that an address lies in.
    pub(crate) fn region(
        self,
        fd: BorrowedFd<'_>,
        space: u32,
        addr: u64,
    ) -> io::Result<Option<Region>> {
        if self == Self::First && space != 0 {
            return Ok(None);
        }
        let (entry, file) = match self.entry(fd, space, addr) {
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => return Ok(None),
            received => received?,
        };
        Ok(Some(Region {
            first: entry.start,
            last: entry.last,
            read: entry.perm & VDUSE_ACCESS_RO != 0,
            write: entry.perm & VDUSE_ACCESS_WO != 0,
            file,
            offset: entry.offset,
        }))
    }

    fn entry(self, fd: BorrowedFd<'_>, asid: u32, addr: u64) -> io::Result<(IotlbEntry, OwnedFd)> {
        let mut v1 = IotlbEntry {
            start: addr,
            last: addr,
            ..IotlbEntry::default()
        };
        Ok(match self {
            Self::First => {
                let file = sys::receive_fd(fd, VDUSE_IOTLB_GET_FD, &mut v1)?;
                (v1, file)
            }
            Self::Second => {
                let mut entry = IotlbEntryV2 {
                    v1,
                    asid,
                    ..IotlbEntryV2::default()
                };
                let file = sys::receive_fd(fd, VDUSE_IOTLB_GET_FD2, &mut entry)?;
                (entry.v1, file)
            }
            Self::SecondEarly => {
                let mut entry = IotlbEntryV2Early {
                    v1,
                    asid,
                    ..IotlbEntryV2Early::default()
                };
                let file = sys::receive_fd(fd, VDUSE_IOTLB_GET_FD2_EARLY, &mut entry)?;
                (entry.v1, file)
            }
        })
    }
}
