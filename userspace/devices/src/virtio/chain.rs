//! Requests as drivers describe them: lists of memory ranges.

use super::memory::{Memory, MemoryError};
use super::pin::{Access, Pin};
use super::queue::Broken;

/// The most ranges of one request. Far more than drivers use (Linux: 128 for a disk), and few
/// enough that a hostile request costs little.
pub const MAX_SEGMENTS: usize = 1024;

/// A range of the driver's memory, of at least one byte.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// First address.
    pub addr: u64,
    /// Bytes.
    pub len: u32,
}

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
        let mut rest = into;
        for (addr, len) in pieces(self.readable(), offset, rest.len())? {
            let (piece, tail) = rest.split_at_mut(len);
            memory.read(addr, piece)?;
            rest = tail;
        }
        Ok(())
    }

    /// Copies into the writable part, `offset` bytes into it.
    ///
    /// # Errors
    ///
    /// [`MemoryError::Overflow`] where the part is shorter; the memory's own.
    pub fn write(&self, memory: &dyn Memory, offset: u32, from: &[u8]) -> Result<(), MemoryError> {
        let mut rest = from;
        for (addr, len) in pieces(self.writable(), offset, rest.len())? {
            let (piece, tail) = rest.split_at(len);
            memory.write(addr, piece)?;
            rest = tail;
        }
        Ok(())
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
        let mut ranges = pieces(self.readable(), offset, len as usize)?;
        memory.pin(&mut ranges, Access::Read)
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
        let mut ranges = pieces(self.writable(), offset, len as usize)?;
        memory.pin(&mut ranges, Access::Write)
    }
}

/// The ranges of `len` bytes that begin `offset` bytes into the segments.
fn pieces(
    segments: &[Segment],
    offset: u32,
    len: usize,
) -> Result<impl Iterator<Item = (u64, usize)>, MemoryError> {
    let total: u64 = segments.iter().map(|segment| u64::from(segment.len)).sum();
    if u64::from(offset) + len as u64 > total {
        return Err(MemoryError::Overflow {
            addr: offset.into(),
            len: len as u64,
        });
    }
    let (mut skip, mut left) = (u64::from(offset), len as u64);
    Ok(segments.iter().filter_map(move |segment| {
        let skipped = skip.min(segment.len.into());
        skip -= skipped;
        let taken = left.min(u64::from(segment.len) - skipped);
        left -= taken;
        // At most a segment's length, which fits.
        let taken_bytes = usize::try_from(taken).ok()?;
        (taken > 0).then_some((segment.addr + skipped, taken_bytes))
    }))
}

/// Collects a request, refusing what no driver may send.
#[derive(Debug, Default)]
pub(super) struct Builder {
    segments: Vec<Segment>,
    readable: usize,
    lens: [u64; 2],
}

impl Builder {
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
