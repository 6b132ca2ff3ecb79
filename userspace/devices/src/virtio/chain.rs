//! Requests as drivers describe them: lists of memory ranges.

use super::queue::Broken;
use crate::memory::{Access, Memory, MemoryError, Pin, Segment, segments};

/// The most ranges of one request. Far more than drivers use (Linux: 128 for a disk), and few
/// enough that a hostile request costs little.
pub const MAX_SEGMENTS: usize = 1024;

/// One request: memory that the device reads, and memory that it writes.
///
/// Whoever took it off a queue gives it back to the same queue.
#[derive(Debug, PartialEq, Eq)]
#[must_use = "a request that is not given back to its queue is lost"]
pub struct Chain {
    /// By which the driver knows it.
    pub(super) id: u16,
    /// Descriptors that it takes in a packed ring.
    pub(super) slots: u16,
    segments: Vec<Segment>,
    /// How many of the segments the device reads; it writes the others.
    readable: usize,
    readable_len: u32,
    writable_len: u32,
}

impl Chain {
    /// By which the driver knows it while it is in flight.
    #[must_use]
    pub fn id(&self) -> u16 {
        self.id
    }

    /// The ranges that the device reads.
    #[must_use]
    pub fn readable(&self) -> &[Segment] {
        &self.segments[..self.readable]
    }

    /// The ranges that the device writes.
    #[must_use]
    pub fn writable(&self) -> &[Segment] {
        &self.segments[self.readable..]
    }

    /// Bytes that the device reads.
    #[must_use]
    pub fn readable_len(&self) -> u32 {
        self.readable_len
    }

    /// Bytes that the device writes.
    #[must_use]
    pub fn writable_len(&self) -> u32 {
        self.writable_len
    }

    /// Copies from the readable part, `offset` bytes into it.
    ///
    /// # Errors
    ///
    /// [`MemoryError::Overflow`] where the part is shorter; the memory's own.
    pub fn read(
        &self,
        memory: &dyn Memory,
        offset: u32,
        into: &mut [u8],
    ) -> Result<(), MemoryError> {
        segments::read(self.readable(), memory, offset, into)
    }

    /// Copies into the writable part, `offset` bytes into it.
    ///
    /// # Errors
    ///
    /// [`MemoryError::Overflow`] where the part is shorter; the memory's own.
    pub fn write(&self, memory: &dyn Memory, offset: u32, from: &[u8]) -> Result<(), MemoryError> {
        segments::write(self.writable(), memory, offset, from)
    }

    /// Pins `len` bytes of the readable part, `offset` bytes into it, for the kernel to read.
    ///
    /// # Errors
    ///
    /// As [`read`](Self::read).
    pub fn pin_readable(
        &self,
        memory: &dyn Memory,
        offset: u32,
        len: u32,
    ) -> Result<Option<Pin>, MemoryError> {
        segments::pin(self.readable(), memory, offset, len, Access::Read)
    }

    /// Pins `len` bytes of the writable part, `offset` bytes into it, for the kernel to write.
    ///
    /// # Errors
    ///
    /// As [`write`](Self::write).
    pub fn pin_writable(
        &self,
        memory: &dyn Memory,
        offset: u32,
        len: u32,
    ) -> Result<Option<Pin>, MemoryError> {
        segments::pin(self.writable(), memory, offset, len, Access::Write)
    }
}

/// Collects a request, refusing what no driver may send.
#[derive(Debug, Default)]
pub(super) struct Builder {
    segments: Vec<Segment>,
    readable: usize,
    lens: [u64; 2],
}

impl Builder {
    /// Makes room for so many ranges at once.
    pub(super) fn reserve(&mut self, ranges: usize) {
        self.segments.reserve(ranges.min(MAX_SEGMENTS));
    }

    pub(super) fn add(&mut self, addr: u64, len: u32, writable: bool) -> Result<(), Broken> {
        if len == 0 {
            return Err(Broken::Empty);
        }
        if addr.checked_add(u64::from(len) - 1).is_none() {
            return Err(Broken::Range { addr, len });
        }
        if self.segments.len() == MAX_SEGMENTS {
            return Err(Broken::TooManySegments);
        }
        if !writable {
            if self.readable < self.segments.len() {
                return Err(Broken::ReadableBehindWritable);
            }
            self.readable += 1;
        }
        self.lens[usize::from(writable)] += u64::from(len);
        if self.lens[0] + self.lens[1] > u32::MAX.into() {
            return Err(Broken::TooLong);
        }
        self.segments.push(Segment { addr, len });
        Ok(())
    }

    pub(super) fn finish(self, id: u16, slots: u16) -> Chain {
        // `add` keeps the sum within 32 bits.
        let [readable_len, writable_len] =
            self.lens.map(|len| u32::try_from(len).unwrap_or(u32::MAX));
        Chain {
            id,
            slots,
            segments: self.segments,
            readable: self.readable,
            readable_len,
            writable_len,
        }
    }
}
