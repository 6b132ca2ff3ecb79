//! A server on a thread of its own.
//!
//! Where it waits for nothing but the wire, it sleeps in the wire's `read` (`asleep`); else on an
//! epoll of everything.

use std::time::{Duration, Instant};

use nix::sys::epoll::EpollTimeout;

use super::watch::{Ready, Watch};
use super::{DeviceEnd, ServeError, Session, Stats, Step, Stop, WaitPolicy, asleep};
use crate::device::Device;

/// Looks between two at the clock, and at the device's own event.
const LOOKS_PER_CLOCK: u32 = 32;

/// Serves the device until the VMM's end is closed or `stop` is triggered.
///
/// Asleep, a command that is answered costs one receive and one send, with doorbell sources one
/// wait more. With [`WaitPolicy::Sleep`] and no doorbell source, this thread sleeps in the wire's
/// `read`; `stop` then ends the sleep by a signal that nobody handles, the last such real-time
/// signal that the process has.
///
/// # Errors
///
/// [`ServeError`]: a bad command, or a wire or a source that failed.
pub fn serve(
    end: DeviceEnd,
    device: &mut dyn Device,
    policy: WaitPolicy,
    stop: &Stop,
) -> Result<Stats, ServeError> {
    let mut session = Session::new(end, device);
    let served = run(&mut session, policy, stop);
    session.finish(served)
}

fn run(session: &mut Session<'_>, policy: WaitPolicy, stop: &Stop) -> Result<(), ServeError> {
    if policy == WaitPolicy::Sleep {
        asleep::run(session, stop)?;
    }
    let mut watch = Watch::new(session, stop)?;
    let mut ready = Ready::WORK;
    while !stop.is_triggered() {
        let mut blocked = false;
        if ready.device {
            blocked = session.wake_device(stop)?;
        }
        match policy {
            WaitPolicy::Sleep => {
                if ready.sources {
                    session.drain()?;
                }
                if ready.wire && !blocked {
                    blocked = session.attend(stop)? == Step::Blocked;
                }
            }
            WaitPolicy::SpinThenSleep(time) => blocked = spin(session, Some(time), stop)?,
            WaitPolicy::Poll => return spin(session, None, stop).map(drop),
        }
        ready = if watch.prepare(session, blocked)? {
            session.stats.wakeups += 1;
            watch.wait(session, EpollTimeout::NONE)?
        } else {
            Ready {
                device: session.device_is_ready()?,
                ..Ready::WORK
            }
        };
        session.disarm();
    }
    Ok(())
}

/// Works until there was nothing to do for `time` (`None`: until stopped). Returns whether a
/// response waits for space.
fn spin(
    session: &mut Session<'_>,
    time: Option<Duration>,
    stop: &Stop,
) -> Result<bool, ServeError> {
    let mut idle_since = None;
    let mut looks: u32 = 0;
    while !stop.is_triggered() {
        looks += 1;
        let look = looks.is_multiple_of(LOOKS_PER_CLOCK);
        if look && session.device_is_ready()? {
            session.wake_device(stop)?;
            idle_since = None;
        }
        let step = session.step()?;
        let news = session.has_news();
        if news {
            let before = session.stats.doorbells;
            session.drain()?;
            if session.stats.doorbells != before {
                idle_since = None;
            }
        }
        if matches!(step, Step::Posted | Step::Answered) {
            idle_since = None;
            continue;
        }
        std::hint::spin_loop();
        let Some(time) = time else { continue };
        if look && idle_since.get_or_insert_with(Instant::now).elapsed() >= time {
            return Ok(step == Step::Blocked);
        }
    }
    Ok(false)
}
