//! The driver's memory as a device sees it.

mod pin;
pub(crate) mod segments;

pub use pin::{Access, Hold, MAX_RANGES, Pin};
pub use segments::Segment;

/// Memory that a driver shares with a device, by the addresses that the driver uses.
///
/// The driver writes it at any time and may take parts of it away at any time: nothing is ever
/// borrowed from it, every access copies, and every access can fail. Only the kernel gets at it
/// without a copy, by what [`pin`](Self::pin) hands out.
pub trait Memory: Sync {
    /// Copies out of the driver's memory.
    ///
    /// # Errors
    ///
    /// Where a byte cannot be read; `into` may then have been filled in part.
    fn read(&self, addr: u64, into: &mut [u8]) -> Result<(), MemoryError>;

    /// Copies into the driver's memory.
    ///
    /// # Errors
    ///
    /// Where a byte cannot be written; others may then have been.
    fn write(&self, addr: u64, from: &[u8]) -> Result<(), MemoryError>;

    /// Reads two bytes (little-endian) at once; later accesses stay behind it.
    ///
    /// # Errors
    ///
    /// As [`read`](Self::read), and for an odd address.
    fn load(&self, addr: u64) -> Result<u16, MemoryError>;

    /// Writes two bytes (little-endian) at once; earlier accesses stay before it.
    ///
    /// # Errors
    ///
    /// As [`write`](Self::write), and for an odd address.
    fn store(&self, addr: u64, value: u16) -> Result<(), MemoryError>;

    /// Keeps ranges (addresses and bytes) mapped for the kernel. Nothing where that is not
    /// possible with this memory or with so many ranges: then there is copying.
    ///
    /// # Errors
    ///
    /// As [`read`](Self::read) and [`write`](Self::write).
    fn pin(
        &self,
        ranges: &mut dyn Iterator<Item = (u64, usize)>,
        access: Access,
    ) -> Result<Option<Pin>, MemoryError> {
        let _ = (ranges, access);
        Ok(None)
    }
}

/// Why memory cannot be reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum MemoryError {
    /// Part of the range is no memory.
    #[error("there is no memory at {addr:#x}")]
    Unmapped {
        /// The first address that is none.
        addr: u64,
    },
    /// The range reaches past the end of the address space.
    #[error("{addr:#x}+{len:#x} reaches past the end of the address space")]
    Overflow {
        /// First address.
        addr: u64,
        /// Bytes.
        len: u64,
    },
    /// The memory may not be read.
    #[error("the device may not read the memory at {addr:#x}")]
    NotReadable {
        /// Where.
        addr: u64,
    },
    /// The memory may not be written.
    #[error("the device may not write the memory at {addr:#x}")]
    NotWritable {
        /// Where.
        addr: u64,
    },
    /// An address that does not suit the access.
    #[error("{addr:#x} is not aligned")]
    Misaligned {
        /// Where.
        addr: u64,
    },
    /// The memory vanished under the access.
    #[error("the memory around {addr:#x} vanished")]
    Vanished {
        /// Where the access began.
        addr: u64,
    },
    /// The driver has reset the device: its memory is no longer the device's.
    #[error("the driver has taken its memory back")]
    Closed,
    /// The system would not map the memory.
    #[error("the memory at {addr:#x} cannot be mapped: errno {errno}")]
    Map {
        /// Where.
        addr: u64,
        /// Why.
        errno: i32,
    },
}
