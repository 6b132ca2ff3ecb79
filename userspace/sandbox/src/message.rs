//! Messages between a process and its [`Child`](crate::Child).

use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};

/// Sends a message, and a descriptor with it.
///
/// # Errors
///
/// The system's; `EPIPE` where the other process has ended.
pub fn send(socket: impl AsFd, bytes: &[u8], file: Option<BorrowedFd<'_>>) -> nix::Result<()> {
    let files = file.map(|file| [file.as_raw_fd()]);
    let rights = files.as_ref().map(|files| ControlMessage::ScmRights(files));
    loop {
        match sendmsg::<()>(
            socket.as_fd().as_raw_fd(),
            &[IoSlice::new(bytes)],
            rights.as_slice(),
            MsgFlags::MSG_NOSIGNAL,
            None,
        ) {
            Err(Errno::EINTR) => {}
            sent => return sent.map(drop),
        }
    }
}

/// Waits for a message: how many bytes it has, none at the other process's end, and the descriptor
/// that came with it. What does not fit is cut off.
///
/// # Errors
///
/// The system's.
pub fn receive(socket: impl AsFd, into: &mut [u8]) -> nix::Result<(usize, Option<OwnedFd>)> {
    loop {
        let mut room = nix::cmsg_space!(RawFd);
        let mut into = [IoSliceMut::new(into)];
        let received = recvmsg::<()>(
            socket.as_fd().as_raw_fd(),
            &mut into,
            Some(&mut room),
            MsgFlags::MSG_CMSG_CLOEXEC,
        );
        let message = match received {
            Err(Errno::EINTR) => continue,
            received => received?,
        };
        let mut files = Vec::new();
        for control in message.cmsgs()? {
            if let ControlMessageOwned::ScmRights(received) = control {
                // SAFETY: The kernel has just made them for this process, and nobody else has them.
                let owned = |file| unsafe { OwnedFd::from_raw_fd(file) };
                files.extend(received.into_iter().map(owned));
            }
        }
        return Ok((message.bytes, files.pop()));
    }
}
