//! A console: virtio-console with one port, between two descriptors.
//!
//! The descriptors may be anything: terminals, pipes, sockets, files; both may be the same. They
//! are used as they are, blocking or not, since others may have them, too: each is asked before
//! it is read or written, and never for more than it takes at once.

mod receive;
mod send;

use std::fs::File;
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use virtio_bindings::virtio_ids::VIRTIO_ID_CONSOLE;

use crate::virtio::{Device, Lane, Refusal};

/// The queue of buffers for what was typed.
pub const RECEIVE: u16 = 0;
/// The queue of what is to be shown.
pub const SEND: u16 = 1;

/// Bit of `VIRTIO_CONSOLE_F_SIZE`: the configuration space has the size.
const F_SIZE: u32 = 0;

/// Bytes of `struct virtio_console_config` as far as these features need it: columns, rows.
const CONFIG_BYTES: usize = 4;

/// How large a console is, in characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Characters in a row.
    pub columns: u16,
    /// Rows.
    pub rows: u16,
}

/// A console.
#[derive(Debug)]
pub struct Console {
    input: File,
    output: File,
    extent: Mutex<Option<Extent>>,
    sized: bool,
    /// What was read and no driver has taken yet.
    unread: Mutex<Vec<u8>>,
    lost: AtomicU64,
}

impl Console {
    /// A console whose driver gets what is read from `input` and whose output goes to `output`.
    /// Without an extent the driver hears of none, ever.
    #[must_use]
    pub fn new(input: OwnedFd, output: OwnedFd, extent: Option<Extent>) -> Self {
        Self {
            input: input.into(),
            output: output.into(),
            sized: extent.is_some(),
            extent: Mutex::new(extent),
            unread: Mutex::default(),
            lost: AtomicU64::new(0),
        }
    }

    /// Gives it another size, of which the driver hears when it is told that the configuration
    /// has changed. Whether it is another: not where it had none.
    pub fn resize(&self, extent: Extent) -> bool {
        let mut now = self.extent.lock().unwrap_or_else(PoisonError::into_inner);
        let changes = self.sized && *now != Some(extent);
        if changes {
            *now = Some(extent);
        }
        changes
    }

    /// Bytes of output that nobody took: whoever had the other end has closed it.
    #[must_use]
    pub fn lost(&self) -> u64 {
        self.lost.load(Ordering::Relaxed)
    }

    /// Counts output that nobody takes, and says so: of a flood ever less.
    fn lose(&self, bytes: u64, error: &io::Error) {
        let before = self.lost.fetch_add(bytes, Ordering::Relaxed);
        let after = before.saturating_add(bytes);
        if before.checked_ilog2() != after.checked_ilog2() {
            tracing::warn!(bytes = after, %error, "output of the console is lost");
        }
    }

    fn unread(&self) -> MutexGuard<'_, Vec<u8>> {
        self.unread.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Device for Console {
    fn kind(&self) -> u32 {
        VIRTIO_ID_CONSOLE
    }

    fn features(&self) -> u64 {
        u64::from(self.sized) << F_SIZE
    }

    fn check_features(&self, _features: u64) -> Result<(), Refusal> {
        Ok(())
    }

    fn config(&self) -> Vec<u8> {
        let extent = *self.extent.lock().unwrap_or_else(PoisonError::into_inner);
        let mut space = vec![0; CONFIG_BYTES];
        if let Some(Extent { columns, rows }) = extent {
            space[..2].copy_from_slice(&columns.to_le_bytes());
            space[2..].copy_from_slice(&rows.to_le_bytes());
        }
        space
    }

    fn queues(&self) -> u16 {
        2
    }

    fn lane(self: Arc<Self>, queue: u16, _features: u64) -> io::Result<Box<dyn Lane>> {
        match queue {
            RECEIVE => Ok(Box::new(receive::Receiver::new(self))),
            SEND => Ok(Box::new(send::Sender::new(self)?)),
            _ => Err(io::ErrorKind::InvalidInput.into()),
        }
    }
}

/// Whether a descriptor has something to say about `events` now, be it an error.
fn is_ready(file: &File, events: PollFlags) -> bool {
    let mut fds = [PollFd::new(file.as_fd(), events)];
    matches!(poll(&mut fds, PollTimeout::ZERO), Ok(1..))
}
