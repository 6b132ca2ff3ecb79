//! A server as a tokio task.

use nix::sys::epoll::EpollTimeout;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::watch::{Ready, Watch};
use super::{DeviceEnd, ServeError, Session, Stats, Step, Stop};
use crate::device::Device;

/// Serves the device until the VMM's end is closed or `stop` is triggered.
///
/// The device's methods run on the runtime's thread: they must not block.
///
/// # Errors
///
/// [`ServeError`]: a bad command, or a wire or a source that failed.
///
/// # Panics
///
/// Outside a runtime whose I/O is enabled.
pub async fn serve_async(
    end: DeviceEnd,
    device: &mut dyn Device,
    stop: &Stop,
) -> Result<Stats, ServeError> {
    let mut session = Session::new(end, device);
    let served = run(&mut session, stop).await;
    session.finish(served)
}

async fn run(session: &mut Session<'_>, stop: &Stop) -> Result<(), ServeError> {
    // One descriptor in the runtime's reactor, whatever the number of doorbells.
    let watch = Watch::new(session, stop)?;
    // SAFETY: The watch's epoll is open as long as the watch, which is never replaced.
    let watch = unsafe { AsyncFd::register_with_interest(watch, Interest::READABLE) };
    let mut watch = watch.map_err(|error| ServeError::Wait(error.into()))?;
    let mut ready = Ready::WORK;
    while !stop.is_triggered() {
        let mut blocked = false;
        if ready.sources {
            session.drain()?;
        }
        if ready.wire {
            blocked = session.attend(stop)? == Step::Blocked;
        }
        if ready.device {
            blocked |= session.wake_device(stop)?;
        }
        ready = if watch.get_mut().prepare(session, blocked)? {
            session.stats.wakeups += 1;
            sleep(&watch, session).await?
        } else {
            Ready {
                device: session.device_is_ready()?,
                ..Ready::WORK
            }
        };
        session.disarm();
        // A busy peer must not keep the runtime from its other tasks.
        tokio::task::coop::consume_budget().await;
    }
    Ok(())
}

async fn sleep(watch: &AsyncFd<Watch>, session: &mut Session<'_>) -> Result<Ready, ServeError> {
    loop {
        let mut guard = watch.readable().await.map_err(ServeError::Wait)?;
        let ready = watch.get_ref().wait(session, EpollTimeout::ZERO)?;
        if ready.any() {
            guard.retain_ready();
            return Ok(ready);
        }
        guard.clear_ready();
    }
}
