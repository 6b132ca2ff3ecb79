//! One epoll over everything that a server waits for.

use std::io;
#[cfg(feature = "tokio")]
use std::os::fd::{AsRawFd, RawFd};

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

use super::{ServeError, Session, Stop};

const STOP: u64 = 0;
const WIRE: u64 = 1;
const DEVICE: u64 = 2;
/// Sources are numbered from here.
const SOURCES: u64 = 3;

/// What became ready.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Ready {
    pub(super) stop: bool,
    pub(super) wire: bool,
    pub(super) sources: bool,
    pub(super) device: bool,
}

impl Ready {
    /// There may be work everywhere.
    pub(super) const WORK: Self = Self {
        stop: false,
        wire: true,
        sources: true,
        device: false,
    };

    #[cfg(feature = "tokio")]
    pub(super) fn any(self) -> bool {
        self.stop || self.wire || self.sources || self.device
    }
}

#[derive(Debug)]
pub(super) struct Watch {
    epoll: Epoll,
    /// Whether the wire is watched for space, too.
    to_send: bool,
}

#[cfg(feature = "tokio")]
impl AsRawFd for Watch {
    fn as_raw_fd(&self) -> RawFd {
        self.epoll.0.as_raw_fd()
    }
}

impl Watch {
    pub(super) fn new(session: &Session<'_>, stop: &Stop) -> Result<Self, ServeError> {
        let wait = |errno: Errno| ServeError::Wait(errno.into());
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map_err(wait)?;
        epoll
            .add(stop.fd(), EpollEvent::new(EpollFlags::EPOLLIN, STOP))
            .map_err(wait)?;
        if let Some(event) = session.device.event() {
            epoll
                .add(event, EpollEvent::new(EpollFlags::EPOLLIN, DEVICE))
                .map_err(wait)?;
        }
        for (token, source) in (SOURCES..).zip(&session.sources) {
            for fd in source.poll_fds() {
                let event = EpollEvent::new(EpollFlags::EPOLLIN, token);
                epoll
                    .add(fd, event)
                    .map_err(|errno| ServeError::Source(errno.into()))?;
            }
        }
        let watch = Self {
            epoll,
            to_send: false,
        };
        watch.add_wire(session).map_err(ServeError::Wait)?;
        Ok(watch)
    }

    fn add_wire(&self, session: &Session<'_>) -> io::Result<()> {
        for (fd, events) in session.wire.poll_fds(self.to_send).into_iter().flatten() {
            // The kernel gives both the same numbers.
            let events = EpollFlags::from_bits_retain(events.bits().into());
            self.epoll.add(fd, EpollEvent::new(events, WIRE))?;
        }
        Ok(())
    }

    /// Arms everything; false if there is work already.
    pub(super) fn prepare(
        &mut self,
        session: &mut Session<'_>,
        to_send: bool,
    ) -> Result<bool, ServeError> {
        if to_send != self.to_send {
            for (fd, _) in session.wire.poll_fds(self.to_send).into_iter().flatten() {
                self.epoll
                    .delete(fd)
                    .map_err(|errno| ServeError::Wait(errno.into()))?;
            }
            self.to_send = to_send;
            self.add_wire(session).map_err(ServeError::Wait)?;
        }
        Ok(session.wire.prepare_sleep(to_send) && session.arm())
    }

    /// Sleeps, or looks only; consumes the wake-ups.
    pub(super) fn wait(
        &self,
        session: &mut Session<'_>,
        timeout: EpollTimeout,
    ) -> Result<Ready, ServeError> {
        let mut events = [EpollEvent::empty(); 64];
        let n = match self.epoll.wait(&mut events, timeout) {
            Ok(n) => n,
            Err(Errno::EINTR) => 0,
            Err(errno) => return Err(ServeError::Wait(errno.into())),
        };
        let mut ready = Ready::default();
        for event in &events[..n] {
            match event.data() {
                STOP => ready.stop = true,
                WIRE => ready.wire = true,
                DEVICE => ready.device = true,
                token => {
                    ready.sources = true;
                    let source = session.sources.get_mut((token - SOURCES) as usize);
                    source
                        .map_or(Ok(()), |s| s.acknowledge())
                        .map_err(ServeError::Source)?;
                }
            }
        }
        if ready.wire {
            session.wire.finish_sleep();
        }
        Ok(ready)
    }
}
