//! Requests to TAP devices, which nix has not.

use std::ffi::c_int;
use std::io;
use std::os::fd::{AsFd, AsRawFd as _};

mod raw {
    nix::ioctl_write_ptr_bad!(
        /// Attaches a file to a device.
        set_device,
        libc::TUNSETIFF,
        libc::ifreq
    );
    nix::ioctl_write_ptr_bad!(
        /// Sets the length of the header in front of packets.
        set_header,
        libc::TUNSETVNETHDRSZ,
        std::ffi::c_int
    );
    nix::ioctl_write_ptr_bad!(
        /// Makes the header little-endian.
        set_little_endian,
        libc::TUNSETVNETLE,
        std::ffi::c_int
    );
    nix::ioctl_write_int_bad!(
        /// Sets the offloads with which packets may be read. The argument is a value.
        set_offloads,
        libc::TUNSETOFFLOAD
    );
    nix::ioctl_read_bad!(
        /// Fills in the MTU of the device that is named.
        mtu,
        libc::SIOCGIFMTU,
        libc::ifreq
    );
}

/// A request about the device of this name, which is cut off where there is no room.
fn request(name: &str) -> libc::ifreq {
    // SAFETY: It is integers, a union of integers and a pointer, for which zero is a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // The last byte stays zero.
    let room = request.ifr_name.len() - 1;
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes().take(room)) {
        *to = from.cast_signed();
    }
    request
}

/// Attaches `/dev/net/tun` to a device, which is made where there is none.
pub(super) fn set_device(tun: impl AsFd, name: &str, flags: c_int) -> io::Result<()> {
    let mut request = request(name);
    request.ifr_ifru.ifru_flags =
        i16::try_from(flags).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
    // SAFETY: The kernel reads and writes one `ifreq`, of which it follows no pointer.
    unsafe { raw::set_device(tun.as_fd().as_raw_fd(), &raw const request) }?;
    Ok(())
}

/// Sets the length of the header in front of packets.
pub(super) fn set_header(tun: impl AsFd, bytes: c_int) -> io::Result<()> {
    // SAFETY: The kernel reads one integer.
    unsafe { raw::set_header(tun.as_fd().as_raw_fd(), &raw const bytes) }?;
    Ok(())
}

/// Makes the header little-endian, as virtio 1 has it.
pub(super) fn set_little_endian(tun: impl AsFd) -> io::Result<()> {
    let yes: c_int = 1;
    // SAFETY: The kernel reads one integer.
    unsafe { raw::set_little_endian(tun.as_fd().as_raw_fd(), &raw const yes) }?;
    Ok(())
}

/// Sets the offloads (`TUN_F_*`) with which packets may be read.
pub(super) fn set_offloads(tun: impl AsFd, offloads: u32) -> io::Result<()> {
    // The flags are the lowest bits.
    let offloads = offloads.cast_signed();
    // SAFETY: The argument is a value; the kernel follows no pointer.
    unsafe { raw::set_offloads(tun.as_fd().as_raw_fd(), offloads) }?;
    Ok(())
}

/// The MTU of a device in the network namespace of `socket`.
pub(super) fn mtu(socket: impl AsFd, name: &str) -> io::Result<c_int> {
    let mut request = request(name);
    // SAFETY: The kernel reads and writes one `ifreq`, of which it follows no pointer.
    unsafe { raw::mtu(socket.as_fd().as_raw_fd(), &raw mut request) }?;
    // SAFETY: The kernel has filled in the MTU; any bytes are an integer.
    Ok(unsafe { request.ifr_ifru.ifru_mtu })
}
