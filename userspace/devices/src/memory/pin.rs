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

    /// A range that this was given for is no longer used.
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
        Self {
            ranges: Vec::new(),
            holds: Vec::new(),
        }
    }

    /// Adds a range of `len` bytes that begins at `start` in this process; `hold` is released once
    /// for each range.
    ///
    /// The address is handed to the kernel as it is: one that is wrong has it access other memory
    /// of this process. So only implementations of [`Memory`](super::Memory) have a use for this.
    ///
    /// # Safety
    ///
    /// The range belongs to a mapping that stays until `hold` is released, and no reference to
    /// the memory exists meanwhile.
    pub unsafe fn add(&mut self, start: *mut u8, len: usize, hold: Arc<dyn Hold>) {
        self.ranges.push(libc::iovec {
            iov_base: start.cast(),
            iov_len: len,
        });
        self.holds.push(hold);
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
