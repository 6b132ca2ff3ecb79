//! Processes that are confined and then try something.
#![allow(dead_code, reason = "each test program uses a part")]

use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};

use ioregion_sandbox::{Calls, Confinement, Error, User};
use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, fork, geteuid, pipe};

/// A request that is allowed in these tests.
pub const FIONREAD: u64 = libc::FIONREAD;

/// A service as it is confined where the tests have the right to.
pub fn service() -> Confinement {
    let confinement = Confinement::new(Calls::service().io_uring().requests(&[FIONREAD]));
    match is_root() {
        true => confinement.user(User::NOBODY).isolated(),
        false => confinement,
    }
}

/// A path as an argument.
pub fn path(text: &std::ffi::CStr) -> libc::c_long {
    text.as_ptr() as libc::c_long
}

/// The status of a process that could not be confined; larger than errors.
const UNCONFINED: i32 = 200;

/// How a process ended, and what it wrote to standard error.
#[derive(Debug)]
pub struct Ended {
    pub status: WaitStatus,
    pub errors: String,
}

/// A process that waits after it was confined, so that it can be looked at.
pub struct Held {
    pid: Option<Pid>,
    errors: File,
    go: File,
    ready: Option<File>,
}

static ALONE: Mutex<()> = Mutex::new(());

/// Has a test run alone: its processes would inherit others' pipes, and locks that they hold.
pub fn alone() -> MutexGuard<'static, ()> {
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Confines a process; `act` waits in it until it is let go.
///
/// Processes are made by forking a test; the copy has one thread.
pub fn hold(
    confine: impl FnOnce() -> Result<(), Error>,
    act: impl FnOnce() -> Result<(), Errno>,
) -> Held {
    assert!(ALONE.try_lock().is_err(), "the test does not run alone");
    let pair = || pipe().unwrap();
    let ((errors, to_errors), (wait, go), (ready, tell)) = (pair(), pair(), pair());
    // SAFETY: Other threads do nothing but wait ([`alone`]): no lock is held for ever in the copy.
    match unsafe { fork() }.unwrap() {
        ForkResult::Parent { child } => Held {
            pid: Some(child),
            errors: errors.into(),
            go: go.into(),
            ready: Some(ready.into()),
        },
        ForkResult::Child => {
            drop(go);
            // SAFETY: Both are descriptors.
            unsafe { libc::dup2(to_errors.as_raw_fd(), 2) };
            drop(to_errors);
            let code = run(confine, act, &wait, &tell);
            // SAFETY: Ends the process.
            unsafe { libc::_exit(code) }
        }
    }
}

fn run(
    confine: impl FnOnce() -> Result<(), Error>,
    act: impl FnOnce() -> Result<(), Errno>,
    wait: &OwnedFd,
    tell: &OwnedFd,
) -> i32 {
    if let Err(error) = confine() {
        let _ = nix::unistd::write(tell, b"-");
        let mut stderr = std::io::stderr().lock();
        let _ = stderr.write_all(format!("not confined: {error}").as_bytes());
        return UNCONFINED;
    }
    let _ = nix::unistd::write(tell, b"+");
    let _ = nix::unistd::read(wait, &mut [0]);
    match act() {
        Ok(()) => 0,
        Err(errno) => errno as i32,
    }
}

impl Held {
    /// A line of what the kernel says of the confined process.
    pub fn says(&mut self, name: &str) -> String {
        if let Some(mut ready) = self.ready.take() {
            let mut sign = [0];
            ready.read_exact(&mut sign).unwrap();
            assert_eq!(sign, *b"+", "it is not confined");
        }
        let text = fs::read_to_string(format!("/proc/{}/status", self.pid())).unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix(name));
        line.unwrap().trim_start_matches(':').trim().into()
    }

    pub fn pid(&self) -> Pid {
        self.pid.unwrap()
    }

    fn errors(&mut self) -> String {
        let mut text = String::new();
        self.errors.read_to_string(&mut text).unwrap();
        text
    }

    /// Lets it go on, to its end.
    pub fn end(mut self) -> Ended {
        // It may have ended.
        let _ = self.go.write_all(b".");
        let errors = self.errors();
        let status = waitpid(self.pid.take(), None).unwrap();
        Ended { status, errors }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        if let Some(pid) = self.pid.take() {
            let _ = kill(pid, Signal::SIGKILL);
            let _ = waitpid(pid, None);
        }
    }
}

/// Whether the tests may change users and namespaces. Others check that these are refused.
pub fn is_root() -> bool {
    geteuid().is_root()
}

pub fn attempt(confinement: Confinement, act: impl FnOnce() -> Result<(), Errno>) -> Ended {
    hold(|| confinement.apply(), act).end()
}

impl Ended {
    /// Did what it tried, and ended.
    #[track_caller]
    pub fn succeeded(&self) {
        assert!(matches!(self.status, WaitStatus::Exited(_, 0)), "{self:?}");
    }

    /// Could not be confined.
    #[track_caller]
    pub fn was_not_confined(&self, why: &str) {
        let ended = matches!(self.status, WaitStatus::Exited(_, UNCONFINED));
        assert!(ended && self.errors.contains(why), "{self:?}");
    }

    /// Got this error.
    #[track_caller]
    pub fn failed(&self, errno: Errno) {
        let code = errno as i32;
        let same = matches!(self.status, WaitStatus::Exited(_, other) if other == code);
        assert!(same, "{self:?} instead of {errno}");
    }

    /// Was ended by the system call of this name, and said so.
    #[track_caller]
    pub fn was_ended_by(&self, call: &str) {
        let by = Signal::SIGSYS;
        let killed = matches!(self.status, WaitStatus::Signaled(_, signal, _) if signal == by);
        let named = self.errors.contains(&format!("the system call {call} ("));
        assert!(killed && named, "{call}: {self:?}");
    }
}

/// A system call by number.
pub fn call(number: libc::c_long, arguments: [libc::c_long; 6]) -> Result<libc::c_long, Errno> {
    let [a, b, c, d, e, f] = arguments;
    // SAFETY: Tests pass numbers, or addresses of what lives across the call.
    Errno::result(unsafe { libc::syscall(number, a, b, c, d, e, f) })
}
