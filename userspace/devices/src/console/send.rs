//! What the driver has written, on its way out.

use std::io::{self, ErrorKind, Write as _};
use std::os::fd::{AsFd as _, BorrowedFd};
use std::sync::Arc;

use nix::errno::Errno;
use nix::poll::PollFlags;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};

use super::{Console, is_ready};
use crate::virtio::{Broken, Chain, Done, Lane, Memory};

/// Bytes that are written at a time: what everything that is writable takes without blocking
/// (`_POSIX_PIPE_BUF`).
const CHUNK: u32 = 512;
/// Bytes that are written before others get a turn.
const TURN: u32 = 1 << 16;

pub(super) struct Sender {
    console: Arc<Console>,
    /// Readable when the output is writable; nothing where it always is, and readable.
    writable: Option<Epoll>,
    /// What is being written, and how much of it was.
    busy: Option<(Chain, u32)>,
}

impl Sender {
    pub(super) fn new(console: Arc<Console>) -> io::Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let writable = match epoll.add(&console.output, EpollEvent::new(EpollFlags::EPOLLOUT, 0)) {
            Ok(()) => Some(epoll),
            // A file.
            Err(Errno::EPERM) => None,
            Err(error) => return Err(error.into()),
        };
        Ok(Self {
            console,
            writable,
            busy: None,
        })
    }

    /// Writes as much as the output takes; what was written whole is done.
    fn advance(&mut self, memory: &dyn Memory) -> Result<Option<Done>, Broken> {
        let Some((chain, mut at)) = self.busy.take() else {
            return Ok(None);
        };
        let mut output = &self.console.output;
        let mut bytes = [0; CHUNK as usize];
        let until = at.saturating_add(TURN);
        while at < chain.readable_len() {
            if at >= until || !is_ready(output, PollFlags::POLLOUT) {
                self.busy = Some((chain, at));
                return Ok(None);
            }
            let left = chain.readable_len() - at;
            let piece = &mut bytes[..left.min(CHUNK) as usize];
            chain.read(memory, at, piece)?;
            match output.write(piece) {
                // At most a chunk.
                Ok(len) if len > 0 => at += u32::try_from(len).unwrap_or(left),
                Err(error)
                    if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) =>
                {
                    self.busy = Some((chain, at));
                    return Ok(None);
                }
                failed => {
                    // The driver is not told: consoles that nobody watches are none of its
                    // business.
                    let error = failed.err().unwrap_or(ErrorKind::WriteZero.into());
                    self.console.lose(left.into(), &error);
                    break;
                }
            }
        }
        Ok(Some(Done { chain, written: 0 }))
    }
}

impl Lane for Sender {
    fn wants(&mut self) -> bool {
        self.busy.is_none()
    }

    fn submit(&mut self, chain: Chain, memory: &dyn Memory) -> Result<Option<Done>, Broken> {
        if chain.writable_len() > 0 {
            return Err(Broken::Request("output with room to be written"));
        }
        self.busy = Some((chain, 0));
        self.advance(memory)
    }

    fn finished(&mut self, memory: &dyn Memory) -> Result<Option<Done>, Broken> {
        self.advance(memory)
    }

    fn event(&self) -> Option<BorrowedFd<'_>> {
        self.busy.as_ref().map(|_| match &self.writable {
            Some(epoll) => epoll.0.as_fd(),
            None => self.console.output.as_fd(),
        })
    }
}

impl Drop for Sender {
    fn drop(&mut self) {
        if let Some((chain, at)) = self.busy.take() {
            let left = chain.readable_len() - at;
            let error = io::Error::other("the driver has given the device up");
            self.console.lose(left.into(), &error);
        }
    }
}
