//! Descriptors on their way through a Unix socket.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::ptr;

use nix::errno::Errno;
use nix::libc;

/// Most descriptors of one message (`SCM_MAX_FD` of the kernel).
const LIMIT: usize = 253;

/// Room for the control message; its type gives it the alignment of `cmsghdr`.
type Control = [u64; 2 + LIMIT.div_ceil(2) + 1];

/// Sends one byte with descriptors.
pub(super) fn send(socket: &UnixStream, fds: &[RawFd]) -> io::Result<()> {
    use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
    loop {
        match sendmsg::<()>(
            socket.as_raw_fd(),
            &[io::IoSlice::new(&[0])],
            &[ControlMessage::ScmRights(fds)],
            MsgFlags::MSG_NOSIGNAL,
            None,
        ) {
            Ok(_) => return Ok(()),
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// Receives one byte and appends the descriptors that come with it; they are closed on `exec`.
///
/// Returns false at the end of the file. Written against libc because every descriptor must be
/// owned even where the control message was cut short.
pub(super) fn recv(socket: &UnixStream, fds: &mut Vec<OwnedFd>) -> io::Result<bool> {
    let mut byte = 0_u8;
    let mut control: Control = [0; _];
    let mut io = libc::iovec {
        iov_base: (&raw mut byte).cast(),
        iov_len: 1,
    };
    // SAFETY: All zeroes are a valid `msghdr`.
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    header.msg_iov = &raw mut io;
    header.msg_iovlen = 1;
    header.msg_control = control.as_mut_ptr().cast();
    header.msg_controllen = size_of::<Control>();
    let received = loop {
        // SAFETY: The header points to live buffers of the lengths that it says.
        let n =
            unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut header, libc::MSG_CMSG_CLOEXEC) };
        match Errno::result(n) {
            Ok(n) => break n,
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    };
    // SAFETY: The kernel has filled the header's control buffer.
    let mut message = unsafe { libc::CMSG_FIRSTHDR(&raw const header) };
    while !message.is_null() {
        // SAFETY: A control message of the kernel's, inside the buffer.
        let (head, data) = unsafe { (ptr::read_unaligned(message), libc::CMSG_DATA(message)) };
        if (head.cmsg_level, head.cmsg_type) == (libc::SOL_SOCKET, libc::SCM_RIGHTS) {
            // SAFETY: No memory is involved.
            let header_len = unsafe { libc::CMSG_LEN(0) } as usize;
            let count = head.cmsg_len.saturating_sub(header_len) / size_of::<RawFd>();
            for i in 0..count {
                // SAFETY: The kernel wrote `count` new descriptors, which nobody else owns.
                fds.push(unsafe {
                    OwnedFd::from_raw_fd(ptr::read_unaligned(data.cast::<RawFd>().add(i)))
                });
            }
        }
        // SAFETY: As for the first one.
        message = unsafe { libc::CMSG_NXTHDR(&raw const header, message) };
    }
    if header.msg_flags & libc::MSG_CTRUNC != 0 {
        return Err(io::Error::other(
            "descriptors were cut off; is the limit of open files reached?",
        ));
    }
    Ok(received != 0)
}
