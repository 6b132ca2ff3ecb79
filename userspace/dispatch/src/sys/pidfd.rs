//! Descriptors of processes, whose ids are reused.

use std::io;
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// Opens a process that is there now.
pub(crate) fn open(pid: libc::pid_t) -> io::Result<OwnedFd> {
    // SAFETY: A system call without pointers.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    let fd = i32::try_from(fd).map_err(io::Error::other)?;
    // SAFETY: The kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Whether the process has ended.
pub(crate) fn has_ended(process: &OwnedFd) -> io::Result<bool> {
    await_end(process, Duration::ZERO)
}

/// Waits for the end of the process, all its files closed; false if it has not come by then.
pub(crate) fn await_end(process: &OwnedFd, time: Duration) -> io::Result<bool> {
    let mut fds = [PollFd::new(process.as_fd(), PollFlags::POLLIN)];
    let time = PollTimeout::try_from(time).map_err(io::Error::other)?;
    loop {
        match poll(&mut fds, time) {
            Err(Errno::EINTR) => {}
            ready => return Ok(ready? > 0),
        }
    }
}
