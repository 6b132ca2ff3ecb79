//! Asleep in the wire's own `read`: the cheapest sleep, for an end that waits for nothing else.
//!
//! The eventfd of the [`Stop`] switch does not end such a sleep. Whoever triggers the switch makes
//! the file non-blocking and then sends the thread a signal: a thread that is in `read` is
//! interrupted, and one that was about to call it finds a file that does not block.

use std::os::fd::{AsFd, OwnedFd};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::libc;
use nix::sys::resource::{UsageWho, getrusage};
use nix::unistd::gettid;

use super::{ServeError, Session, Step, Stop};
use crate::sys::signal;

/// Sleeps in a row that may end without a message. A peer that shares the file can make it
/// non-blocking at any time, and then nobody sleeps.
const IDLE_LIMIT: u32 = 64;

/// A thread that sleeps in a `read`.
#[derive(Debug)]
pub(super) struct Sleeper {
    thread: libc::pid_t,
    signal: libc::c_int,
    file: OwnedFd,
}

impl Sleeper {
    /// Ends its sleep, or the one that it is about to begin.
    pub(super) fn wake(&self) {
        if let Err(error) = set_blocking(&self.file, false) {
            tracing::debug!(%error, "a sleep cannot be ended for good");
        }
        signal::interrupt(self.thread, self.signal);
    }
}

fn set_blocking(file: impl AsFd, blocking: bool) -> Result<bool, Errno> {
    let flags = OFlag::from_bits_retain(fcntl(&file, FcntlArg::F_GETFL)?);
    let mut wanted = flags;
    wanted.set(OFlag::O_NONBLOCK, !blocking);
    fcntl(file, FcntlArg::F_SETFL(wanted))?;
    Ok(!flags.contains(OFlag::O_NONBLOCK))
}

/// The right to sleep in a wire's `read`: `stop` knows this thread.
struct Bed<'s> {
    stop: &'s Stop,
    thread: libc::pid_t,
    signal: libc::c_int,
    /// What was so before.
    blocking: bool,
    blocked: bool,
    sleeps: i64,
}

impl<'s> Bed<'s> {
    /// Nothing where this wire or this process does not allow it.
    fn take(session: &Session<'_>, stop: &'s Stop) -> Option<Self> {
        let file = session.wire.sleeps_in()?;
        let signal = signal::nudge()?;
        let thread = gettid().as_raw();
        let sleeper = Sleeper {
            thread,
            signal,
            file: file.try_clone_to_owned().ok()?,
        };
        let blocking = set_blocking(file, true).ok()?;
        stop.sleepers().push(sleeper);
        Some(Self {
            stop,
            thread,
            signal,
            blocking,
            blocked: signal::unblock(signal),
            sleeps: sleeps(),
        })
    }
}

impl Drop for Bed<'_> {
    fn drop(&mut self) {
        let mut sleepers = self.stop.sleepers();
        let own = sleepers
            .iter()
            .position(|sleeper| sleeper.thread == self.thread);
        if let Some(own) = own {
            let sleeper = sleepers.swap_remove(own);
            // The file may be somebody else's next.
            let _ = set_blocking(&sleeper.file, self.blocking);
        }
        drop(sleepers);
        if self.blocked {
            signal::block(self.signal);
        }
    }
}

/// How often this thread slept.
fn sleeps() -> i64 {
    getrusage(UsageWho::RUSAGE_THREAD).map_or(0, |usage| usage.voluntary_context_switches())
}

/// Serves as long as the wire is all that there is to wait for: returns when `stop` is triggered,
/// when a response waits for space, or at once where this end cannot sleep so.
pub(super) fn run(session: &mut Session<'_>, stop: &Stop) -> Result<(), ServeError> {
    if !session.sources.is_empty() || session.device.event().is_some() {
        return Ok(());
    }
    let Some(bed) = Bed::take(session, stop) else {
        return Ok(());
    };
    let mut idle = 0;
    let served = loop {
        // A switch that was thrown before it knew of this thread is seen here.
        if stop.is_triggered() || idle == IDLE_LIMIT {
            break Ok(());
        }
        match session.step_with(|wire| wire.recv()) {
            Ok(Step::Posted | Step::Answered) => idle = 0,
            Ok(Step::Idle) => idle += 1,
            Ok(Step::Blocked) => break Ok(()),
            Err(error) => break Err(error),
        }
    };
    let slept = sleeps().saturating_sub(bed.sleeps);
    session.stats.wakeups += u64::try_from(slept).unwrap_or(0);
    served
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;
    use std::time::Duration;

    use ioregion_abi::wire::Layout;

    use super::*;
    use crate::device::{Access, Device, Ring};
    use crate::server::DeviceEnd;
    use crate::wire::{Transport, pair};

    struct Nothing;

    impl Device for Nothing {
        fn read(&mut self, _: Access) -> u64 {
            0
        }
        fn write(&mut self, _: Access, _: u64) {}
        fn doorbell(&mut self, _: Ring) {}
    }

    /// The signal comes after the look at the switch, and before the `read`.
    #[test]
    fn sleep_that_is_about_to_begin_does_not() {
        for transport in [Transport::Stream, Transport::Seqpacket, Transport::Pipes] {
            let (_vmm, device) = pair(transport).unwrap();
            let (ended, end) = channel();
            std::thread::spawn(move || {
                let stop = Stop::new().unwrap();
                let mut device_model = Nothing;
                let end = DeviceEnd::new(device, Layout::Info);
                let mut session = Session::new(end, &mut device_model);
                let bed = Bed::take(&session, &stop).unwrap();
                stop.trigger();
                let step = session.step_with(|wire| wire.recv()).unwrap();
                drop(bed);
                ended.send(step).unwrap();
            });
            let step = end.recv_timeout(Duration::from_secs(20));
            assert_eq!(step, Ok(Step::Idle), "{transport}");
        }
    }
}
