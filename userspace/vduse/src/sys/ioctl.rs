//! VDUSE's requests.

use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd};

use ioregion_abi::vduse::{
    ConfigData, DevConfig, IotlbEntry, IotlbEntryV2, IotlbEntryV2Early, IovaInfo, IovaUmem,
    VDUSE_CREATE_DEV, VDUSE_DESTROY_DEV, VDUSE_DEV_SET_CONFIG, VDUSE_IOTLB_DEREG_UMEM,
    VDUSE_IOTLB_REG_UMEM, VDUSE_NAME_MAX, VqConfig, VqEventfd, VqInfo,
};

use super::Mapping;

/// Arguments that are nothing but integers, in the kernel's layout.
///
/// # Safety
///
/// Every byte pattern must be a value, and the kernel must read no pointer from it.
pub(crate) unsafe trait Argument: Copy {}

// SAFETY: An integer.
unsafe impl Argument for u32 {}
// SAFETY: An integer.
unsafe impl Argument for u64 {}
// SAFETY: Integers only.
unsafe impl Argument for VqConfig {}
// SAFETY: Integers only.
unsafe impl Argument for VqInfo {}
// SAFETY: Integers only; the descriptor in it is checked by the kernel.
unsafe impl Argument for VqEventfd {}
// SAFETY: Integers only.
unsafe impl Argument for IovaInfo {}
// SAFETY: Integers only.
unsafe impl Argument for IotlbEntry {}
// SAFETY: Integers only.
unsafe impl Argument for IotlbEntryV2 {}
// SAFETY: Integers only.
unsafe impl Argument for IotlbEntryV2Early {}

fn check(returned: libc::c_int) -> io::Result<libc::c_int> {
    match returned {
        ..0 => Err(io::Error::last_os_error()),
        _ => Ok(returned),
    }
}

/// Bytes of the argument, by the request's number.
fn argument_bytes(request: u64) -> usize {
    usize::try_from(request >> 16 & 0x3fff).unwrap_or(usize::MAX)
}

/// A request that reads its argument.
pub(crate) fn pass<T: Argument>(fd: BorrowedFd<'_>, request: u64, value: &T) -> io::Result<()> {
    update(fd, request, &mut { *value })
}

/// A request that reads or writes its argument.
pub(crate) fn update<T: Argument>(
    fd: BorrowedFd<'_>,
    request: u64,
    value: &mut T,
) -> io::Result<()> {
    assert_eq!(argument_bytes(request), size_of::<T>());
    // SAFETY: The number says how many bytes the kernel touches: those of `value`, which is
    // integers (`Argument`).
    check(unsafe { libc::ioctl(fd.as_raw_fd(), request, std::ptr::from_mut(value)) })?;
    Ok(())
}

/// A request without an argument.
pub(crate) fn number(fd: BorrowedFd<'_>, request: u64) -> io::Result<()> {
    assert_eq!(argument_bytes(request), 0);
    // SAFETY: The number says that there is no argument.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), request, 0) })?;
    Ok(())
}

/// A request whose argument is followed by bytes, as many as a field of it says, or is a name.
pub(crate) fn pass_bytes(fd: BorrowedFd<'_>, request: u64, bytes: &[u8]) -> io::Result<()> {
    let word = |at: usize| match bytes.get(at..).and_then(|rest| rest.first_chunk()) {
        Some(word) => u32::from_ne_bytes(*word) as usize,
        None => usize::MAX,
    };
    let read = match request {
        VDUSE_CREATE_DEV => {
            size_of::<DevConfig>().checked_add(word(std::mem::offset_of!(DevConfig, config_size)))
        }
        VDUSE_DEV_SET_CONFIG => {
            size_of::<ConfigData>().checked_add(word(std::mem::offset_of!(ConfigData, length)))
        }
        VDUSE_DESTROY_DEV => Some(VDUSE_NAME_MAX),
        _ => None,
    };
    assert!(read.is_some_and(|read| read <= bytes.len()));
    // SAFETY: The kernel reads no more than was checked to be there.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), request, bytes.as_ptr()) })?;
    Ok(())
}

/// A request that fills in its argument, an entry of the IOTLB, and makes a descriptor of the
/// region's file.
pub(crate) fn receive_fd<T: Argument>(
    fd: BorrowedFd<'_>,
    request: u64,
    entry: &mut T,
) -> io::Result<OwnedFd> {
    assert_eq!(argument_bytes(request), size_of::<T>());
    // SAFETY: The number says how many bytes the kernel touches: those of `entry`, which is
    // integers (`Argument`).
    let received = check(unsafe {
        let entry = std::ptr::from_mut(entry);
        libc::ioctl(fd.as_raw_fd(), request, entry)
    })?;
    // SAFETY: The kernel has just made it, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(received) })
}

/// Has the kernel bounce through a mapping that begins at a page. The kernel pins the pages: they
/// stay until [`deregister`] or until the device's file is closed, also where the mapping goes.
pub(crate) fn register(fd: BorrowedFd<'_>, memory: &Mapping, size: u64) -> io::Result<()> {
    let len = usize::try_from(size).map_err(|_| io::Error::from_raw_os_error(libc::ENOMEM))?;
    let umem = IovaUmem {
        uaddr: memory.address(0, len).expose_provenance() as u64,
        size,
        ..IovaUmem::default()
    };
    umem_request(fd, VDUSE_IOTLB_REG_UMEM, &umem)
}

/// Ends what [`register`] began.
pub(crate) fn deregister(fd: BorrowedFd<'_>, size: u64) -> io::Result<()> {
    let umem = IovaUmem {
        size,
        ..IovaUmem::default()
    };
    umem_request(fd, VDUSE_IOTLB_DEREG_UMEM, &umem)
}

fn umem_request(fd: BorrowedFd<'_>, request: u64, umem: &IovaUmem) -> io::Result<()> {
    assert_eq!(argument_bytes(request), size_of::<IovaUmem>());
    // SAFETY: The kernel reads the struct. What it does to the memory at the address, which is a
    // shared mapping's, others may do at any time: that is accessed by volatile copies only.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), request, std::ptr::from_ref(umem)) })?;
    Ok(())
}
