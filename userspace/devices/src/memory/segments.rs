//! Data that lies in several ranges of memory.

use super::{Access, Memory, MemoryError, Pin};

/// A range of the driver's memory, of at least one byte.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// First address.
    pub addr: u64,
    /// Bytes.
    pub len: u32,
}

/// Copies out of segments, `offset` bytes into them.
///
/// # Errors
///
/// [`MemoryError::Overflow`] where they are shorter; the memory's own.
pub(crate) fn read(
    segments: &[Segment],
    memory: &dyn Memory,
    offset: u32,
    into: &mut [u8],
) -> Result<(), MemoryError> {
    let mut rest = into;
    for (addr, len) in pieces(segments, offset, rest.len())? {
        let (piece, tail) = rest.split_at_mut(len);
        memory.read(addr, piece)?;
        rest = tail;
    }
    Ok(())
}

/// Copies into segments, `offset` bytes into them.
///
/// # Errors
///
/// As [`read`].
pub(crate) fn write(
    segments: &[Segment],
    memory: &dyn Memory,
    offset: u32,
    from: &[u8],
) -> Result<(), MemoryError> {
    let mut rest = from;
    for (addr, len) in pieces(segments, offset, rest.len())? {
        let (piece, tail) = rest.split_at(len);
        memory.write(addr, piece)?;
        rest = tail;
    }
    Ok(())
}

/// Pins `len` bytes of segments, `offset` bytes into them.
///
/// # Errors
///
/// As [`read`].
pub(crate) fn pin(
    segments: &[Segment],
    memory: &dyn Memory,
    offset: u32,
    len: u32,
    access: Access,
) -> Result<Option<Pin>, MemoryError> {
    let mut ranges = pieces(segments, offset, len as usize)?;
    memory.pin(&mut ranges, access)
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
