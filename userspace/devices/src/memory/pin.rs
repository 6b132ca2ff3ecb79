//! The driver's memory in the hands of the kernel.

use std::fmt;
use std::sync::Arc;

/// The most ranges of a [`Pin`]: what one system call takes (`UIO_MAXIOV`).
pub const MAX_RANGES: usize = 1024;

/// What the kernel does with pinned memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// It reads it.
    Read,
    /// It writes it.
    Write,
}

/// What keeps a part of pinned memory mapped.
pub trait Hold: Send + Sync {
    /// Whether what was pinned is still what the driver sees.
    fn intact(&self) -> bool;

    /// A pin that this was given to is gone. Once for each time that it was.
    fn release(&self);
}

/// Ranges of the driver's memory that stay mapped until this is dropped, for the kernel to read or
/// write by their addresses in this process.
///
/// Nothing in this process ever dereferences them: the driver writes the memory at any time, and
/// its pages may be gone, which the kernel finds out (`EFAULT`) where a copy here would raise
/// SIGBUS.
///
/// Whoever takes the memory back waits until this is dropped, so it must be kept no longer than
/// the kernel uses it.
pub struct Pin {
    ranges: Vec<libc::iovec>,
    holds: Vec<Arc<dyn Hold>>,
}

// SAFETY: The addresses are never dereferenced in this process, and the kernel takes them from
// any thread; what keeps them mapped is `Send` and `Sync`.
unsafe impl Send for Pin {}

impl Pin {
    /// Nothing.
    #[must_use]
    pub fn new() -> Self {
        Self::with_room(0)
    }

    /// Nothing, with room for a number of ranges.
    #[must_use]
    pub fn with_room(ranges: usize) -> Self {
        Self {
            ranges: Vec::with_capacity(ranges.min(MAX_RANGES)),
            holds: Vec::new(),
        }
    }

    /// Keeps `hold`, which is released when this is dropped. One is enough for all ranges of what
    /// it keeps mapped.
    pub fn keep(&mut self, hold: Arc<dyn Hold>) {
        self.holds.push(hold);
    }

    /// Adds a range of `len` bytes that begins at `start` in this process. One that begins where
    /// the one before ends becomes part of it: the kernel has work with each.
    ///
    /// The address is handed to the kernel as it is: one that is wrong has it access other memory
    /// of this process. So only implementations of [`Memory`](super::Memory) have a use for this.
    ///
    /// # Safety
    ///
    /// The range belongs to a mapping that stays until a hold which this [keeps](Self::keep) is
    /// released, and no reference to the memory exists meanwhile.
    pub unsafe fn add(&mut self, start: *mut u8, len: usize) {
        if let Some(last) = self.ranges.last_mut()
            && last.iov_base.addr().checked_add(last.iov_len) == Some(start.addr())
        {
            last.iov_len += len;
            return;
        }
        self.ranges.push(libc::iovec {
            iov_base: start.cast(),
            iov_len: len,
        });
    }

    /// The ranges, in order.
    #[must_use]
    pub fn ranges(&self) -> &[libc::iovec] {
        &self.ranges
    }

    /// Whether all of it is still what the driver sees. Where it is not, what the kernel wrote
    /// has not reached the driver.
    #[must_use]
    pub fn intact(&self) -> bool {
        self.holds.iter().all(|hold| hold.intact())
    }
}

impl Default for Pin {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Pin {
    fn drop(&mut self) {
        for hold in &self.holds {
            hold.release();
        }
    }
}

impl fmt::Debug for Pin {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ranges = self.ranges.iter().map(|range| range.iov_len);
        out.debug_list().entries(ranges).finish()
    }
}
