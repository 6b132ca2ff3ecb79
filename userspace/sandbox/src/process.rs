//! A second process that keeps rights which the first one gives up.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};

use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use nix::unistd::{ForkResult, Pid};

use crate::error::{Error, system};

/// A process that [`fork`] made.
#[derive(Debug)]
pub struct Child {
    pid: Pid,
    socket: OwnedFd,
}

impl Child {
    /// Its number.
    #[must_use]
    pub fn pid(&self) -> Pid {
        self.pid
    }
}

impl AsFd for Child {
    /// A socket to it that keeps messages whole; it hangs up when the process ends.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// How many threads this process has.
pub(crate) fn threads() -> Result<usize, Error> {
    let tasks = std::fs::read_dir("/proc/self/task").map_err(system("counting threads"))?;
    Ok(tasks.count())
}

/// Makes a process of this program that does `work` with its end of a socket, and ends with the
/// status that this returns. It has everything that this one has open, so it is made early.
///
/// # Errors
///
/// [`Error::Threads`] where there are others, which may hold locks for ever in the copy; what
/// the system says.
pub fn fork(work: impl FnOnce(OwnedFd) -> u8) -> Result<Child, Error> {
    match threads()? {
        1 => {}
        more => return Err(Error::Threads(more)),
    }
    let (ours, theirs) = socketpair(
        AddressFamily::Unix,
        SockType::SeqPacket,
        None,
        SockFlag::SOCK_CLOEXEC,
    )
    .map_err(system("a pair of sockets"))?;
    // SAFETY: There is one thread, so nobody holds a lock, and all memory is as this thread left
    // it: the copy may do what this process may.
    match unsafe { nix::unistd::fork() }.map_err(system("forking"))? {
        ForkResult::Parent { child } => Ok(Child {
            pid: child,
            socket: ours,
        }),
        ForkResult::Child => {
            drop(ours);
            // What called this function must not go on here, whatever happens.
            let status = catch_unwind(AssertUnwindSafe(|| work(theirs))).unwrap_or(101);
            // SAFETY: Ends the process, without what the first one would do at its end.
            unsafe { libc::_exit(status.into()) }
        }
    }
}
