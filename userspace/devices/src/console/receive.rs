//! What was typed, on its way to the driver.

use std::io::{ErrorKind, Read as _};
use std::os::fd::{AsFd as _, BorrowedFd};
use std::sync::Arc;

use nix::poll::PollFlags;

use super::{Console, is_ready};
use crate::virtio::{Broken, Chain, Done, Lane, Memory};

/// Bytes that are read at a time.
const CHUNK: usize = 4096;

pub(super) struct Receiver {
    console: Arc<Console>,
    /// What was read and waits for a buffer.
    waiting: Vec<u8>,
    /// Nothing can be read any more.
    ended: bool,
}

impl Receiver {
    pub(super) fn new(console: Arc<Console>) -> Self {
        let waiting = std::mem::take(&mut *console.unread());
        Self {
            console,
            waiting,
            ended: false,
        }
    }

    fn read(&mut self) {
        let mut input = &self.console.input;
        if !is_ready(input, PollFlags::POLLIN) {
            return;
        }
        let mut bytes = [0; CHUNK];
        match input.read(&mut bytes) {
            Ok(0) => {
                tracing::info!("the console's input has ended");
                self.ended = true;
            }
            Ok(len) => self.waiting.extend_from_slice(&bytes[..len]),
            // Somebody else has read it.
            Err(error)
                if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
            Err(error) => {
                tracing::warn!(%error, "the console has no input any more");
                self.ended = true;
            }
        }
    }
}

impl Lane for Receiver {
    fn wants(&mut self) -> bool {
        if self.waiting.is_empty() && !self.ended {
            self.read();
        }
        !self.waiting.is_empty()
    }

    fn submit(&mut self, chain: Chain, memory: &dyn Memory) -> Result<Option<Done>, Broken> {
        if chain.readable_len() > 0 {
            return Err(Broken::Request("a buffer for input with something to read"));
        }
        let len = self.waiting.len().min(chain.writable_len() as usize);
        chain.write(memory, 0, &self.waiting[..len])?;
        self.waiting.drain(..len);
        // A part of a chain's length, which is 32 bits.
        let written = u32::try_from(len).unwrap_or(u32::MAX);
        Ok(Some(Done { chain, written }))
    }

    fn event(&self) -> Option<BorrowedFd<'_>> {
        // What waits for a buffer waits for the driver.
        (self.waiting.is_empty() && !self.ended).then(|| self.console.input.as_fd())
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        // The next driver gets it.
        *self.console.unread() = std::mem::take(&mut self.waiting);
    }
}
