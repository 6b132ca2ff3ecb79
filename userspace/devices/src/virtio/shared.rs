//! A guest's memory, shared by its VMM.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use vm_memory::guest_memory::Error as GuestError;
use vm_memory::{
    Address as _, Bytes as _, FileOffset, GuestAddress, GuestMemoryBackend as _, GuestMemoryMmap,
    GuestMemoryRegion as _,
};

use crate::memory::{Access, Hold, MAX_RANGES, Memory, MemoryError, Pin};

/// A part of a guest's memory: a memfd that the VMM has given this process.
#[derive(Debug)]
pub struct SharedRegion {
    /// First guest physical address.
    pub base: u64,
    /// Bytes.
    pub len: u64,
    /// The memfd, which must be sealed against shrinking.
    pub file: OwnedFd,
    /// Where in the memfd it begins.
    pub offset: u64,
}

/// Why memory cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SharedMemoryError {
    /// The file could be cut while it is mapped, and accesses would end this process (SIGBUS).
    #[error(
        "guest memory at {base:#x}: its file can shrink; make it by memfd_create with \
         MFD_ALLOW_SEALING and add F_SEAL_SHRINK before it is shared"
    )]
    Shrinks {
        /// Its first guest physical address.
        base: u64,
    },
    /// The file ends before the memory does.
    #[error("guest memory at {base:#x}: {len:#x} bytes from {offset:#x} on in a file of {size:#x}")]
    TooShort {
        /// Its first guest physical address.
        base: u64,
        /// Bytes.
        len: u64,
        /// Where in the file it begins.
        offset: u64,
        /// Bytes of the file.
        size: u64,
    },
    /// The file cannot be asked.
    #[error("guest memory at {base:#x}: {what}: {error}")]
    File {
        /// Its first guest physical address.
        base: u64,
        /// What was asked.
        what: &'static str,
        /// What the system said.
        error: io::Error,
    },
    /// Parts overlap, are empty, or cannot be mapped.
    #[error("guest memory cannot be mapped: {0}")]
    Map(String),
}

/// A guest's memory by guest physical addresses. It stays mapped as long as anybody has it, and
/// the kernel reads and writes it in place ([`Memory::pin`]).
#[derive(Debug, Clone)]
pub struct SharedMemory(Arc<GuestMemoryMmap>);

impl SharedMemory {
    /// Maps memory that another process owns.
    ///
    /// # Errors
    ///
    /// Names the part of the memory, what is wrong with it and the remedy.
    pub fn map(regions: Vec<SharedRegion>) -> Result<Self, SharedMemoryError> {
        let mut ranges = Vec::new();
        for SharedRegion {
            base,
            len,
            file,
            offset,
        } in regions
        {
            let file = File::from(file);
            let failed = |what| move |error| SharedMemoryError::File { base, what, error };
            let seals = fcntl(&file, FcntlArg::F_GET_SEALS)
                .map_err(|error| failed("asking for its seals")(error.into()))?;
            if !SealFlag::from_bits_retain(seals).contains(SealFlag::F_SEAL_SHRINK) {
                return Err(SharedMemoryError::Shrinks { base });
            }
            let size = file
                .metadata()
                .map_err(failed("asking for its size"))?
                .len();
            let end = offset.checked_add(len);
            let (true, Ok(bytes)) = (end.is_some_and(|end| end <= size), usize::try_from(len))
            else {
                return Err(SharedMemoryError::TooShort {
                    base,
                    len,
                    offset,
                    size,
                });
            };
            let from = Some(FileOffset::new(file, offset));
            ranges.push((GuestAddress(base), bytes, from));
        }
        ranges.sort_by_key(|(base, ..)| *base);
        let mapped = GuestMemoryMmap::from_ranges_with_files(ranges);
        let mapped = mapped.map_err(|error| SharedMemoryError::Map(error.to_string()))?;
        Ok(Self(Arc::new(mapped)))
    }
}

/// Memory that this process has mapped itself, and that nobody can cut.
impl From<GuestMemoryMmap> for SharedMemory {
    fn from(memory: GuestMemoryMmap) -> Self {
        Self(Arc::new(memory))
    }
}

/// What an access that began at `addr` ran into.
fn unmapped(addr: u64) -> impl FnOnce(GuestError) -> MemoryError {
    move |error| match error {
        GuestError::InvalidGuestAddress(addr) => MemoryError::Unmapped {
            addr: addr.raw_value(),
        },
        GuestError::PartialBuffer { completed, .. } => MemoryError::Unmapped {
            addr: addr.saturating_add(completed as u64),
        },
        _ => MemoryError::Unmapped { addr },
    }
}

impl Memory for SharedMemory {
    fn read(&self, addr: u64, into: &mut [u8]) -> Result<(), MemoryError> {
        let read = self.0.read_slice(into, GuestAddress(addr));
        read.map_err(unmapped(addr))
    }

    fn write(&self, addr: u64, from: &[u8]) -> Result<(), MemoryError> {
        let written = self.0.write_slice(from, GuestAddress(addr));
        written.map_err(unmapped(addr))
    }

    fn load(&self, addr: u64) -> Result<u16, MemoryError> {
        if !addr.is_multiple_of(2) {
            return Err(MemoryError::Misaligned { addr });
        }
        let loaded = self.0.load(GuestAddress(addr), Ordering::Acquire);
        loaded.map(u16::from_le).map_err(unmapped(addr))
    }

    fn store(&self, addr: u64, value: u16) -> Result<(), MemoryError> {
        if !addr.is_multiple_of(2) {
            return Err(MemoryError::Misaligned { addr });
        }
        let stored = (self.0).store(value.to_le(), GuestAddress(addr), Ordering::Release);
        stored.map_err(unmapped(addr))
    }

    fn pin(
        &self,
        ranges: &mut dyn Iterator<Item = (u64, usize)>,
        _access: Access,
    ) -> Result<Option<Pin>, MemoryError> {
        let mut pin = Pin::with_room(ranges.size_hint().1.unwrap_or(0));
        pin.keep(Arc::new(Mapped(self.clone())));
        for (mut addr, mut len) in ranges {
            // A range may reach from one region into the next.
            while len > 0 {
                if pin.ranges().len() == MAX_RANGES {
                    return Ok(None);
                }
                let found = self.0.to_region_addr(GuestAddress(addr));
                let (region, inside) = found.ok_or(MemoryError::Unmapped { addr })?;
                let left = region.len() - inside.raw_value();
                let here = usize::try_from(left).unwrap_or(usize::MAX).min(len);
                let start = region.get_host_address(inside);
                let start = start.map_err(unmapped(addr))?;
                // SAFETY: `here` bytes from `start` on lie in the mapping of `region`, which the
                // pin's hold keeps; nobody borrows guest memory as ordinary Rust memory.
                unsafe { pin.add(start, here) };
                // Within a region, so that it does not wrap but at the very end.
                addr = addr.wrapping_add(here as u64);
                len -= here;
            }
        }
        Ok(Some(pin))
    }
}

/// Keeps a guest's memory mapped.
struct Mapped(#[allow(dead_code, reason = "it is kept, not used")] SharedMemory);

impl Hold for Mapped {
    fn intact(&self) -> bool {
        true
    }

    fn release(&self) {}
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::memfd::{MFdFlags, memfd_create};

    const PAGE: u64 = 0x1000;

    fn region(base: u64, pages: u64, sealed: bool) -> SharedRegion {
        let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
        let file = File::from(memfd_create("guest", flags).unwrap());
        file.set_len(pages * PAGE).unwrap();
        if sealed {
            let seals = SealFlag::F_SEAL_SHRINK;
            fcntl(&file, FcntlArg::F_ADD_SEALS(seals)).unwrap();
        }
        SharedRegion {
            base,
            len: pages * PAGE,
            file: file.into(),
            offset: 0,
        }
    }

    #[test]
    fn accesses_reach_over_regions_and_end_where_memory_does() {
        let regions = vec![region(2 * PAGE, 1, true), region(PAGE, 1, true)];
        let memory = SharedMemory::map(regions).unwrap();
        memory.write(2 * PAGE - 2, &[1, 2, 3, 4]).unwrap();
        let mut bytes = [0; 4];
        memory.read(2 * PAGE - 2, &mut bytes).unwrap();
        assert_eq!(bytes, [1, 2, 3, 4]);
        assert_eq!(memory.load(2 * PAGE), Ok(0x403));
        memory.store(2 * PAGE, 0x506).unwrap();
        assert_eq!(memory.load(2 * PAGE), Ok(0x506));
        for addr in [0, PAGE - 1, 3 * PAGE, u64::MAX] {
            let error = memory.read(addr, &mut [0]);
            assert_eq!(error, Err(MemoryError::Unmapped { addr }));
        }
        let addr = 3 * PAGE;
        let refused = Err(MemoryError::Unmapped { addr });
        assert_eq!(memory.write(addr - 1, &[0; 2]), refused);
        assert_eq!(memory.load(addr).map(drop), refused);
        let odd = PAGE + 1;
        let refused = Err(MemoryError::Misaligned { addr: odd });
        assert_eq!(memory.load(odd).map(drop), refused);
        assert_eq!(memory.store(odd, 1), refused);
    }

    #[test]
    fn pinned_ranges_are_the_memory_and_outlive_it() {
        let regions = vec![region(PAGE, 1, true), region(2 * PAGE, 1, true)];
        let memory = SharedMemory::map(regions).unwrap();
        let ranges = [(PAGE, 16), (2 * PAGE - 8, 16)];
        let pinned = memory.pin(&mut ranges.into_iter(), Access::Write);
        let pin = pinned.unwrap().unwrap();
        let lens: Vec<_> = pin.ranges().iter().map(|range| range.iov_len).collect();
        assert_eq!(lens, [16, 8, 8]);
        assert!(pin.intact());
        let other = memory.clone();
        drop(memory);
        let zero = File::open("/dev/zero").unwrap();
        other.write(2 * PAGE - 8, &[7; 16]).unwrap();
        // SAFETY: The ranges stay mapped as long as the pin.
        let read = unsafe {
            use std::os::fd::AsRawFd as _;
            libc::readv(zero.as_raw_fd(), pin.ranges()[1..].as_ptr(), 2)
        };
        assert_eq!(read, 16);
        let mut bytes = [1; 16];
        other.read(2 * PAGE - 8, &mut bytes).unwrap();
        assert_eq!(bytes, [0; 16]);
        let gone = other.pin(&mut [(3 * PAGE - 1, 2)].into_iter(), Access::Read);
        let addr = 3 * PAGE;
        assert_eq!(gone.map(drop), Err(MemoryError::Unmapped { addr }));
        let many = other.pin(
            &mut vec![(PAGE, 1); MAX_RANGES + 1].into_iter(),
            Access::Read,
        );
        assert!(many.unwrap().is_none());
    }

    #[test]
    fn memory_that_could_vanish_is_refused() {
        let refused = SharedMemory::map(vec![region(0, 1, false)]);
        assert!(matches!(
            refused,
            Err(SharedMemoryError::Shrinks { base: 0 })
        ));
        let mut short = region(PAGE, 2, true);
        short.offset = PAGE;
        let refused = SharedMemory::map(vec![short]);
        assert!(matches!(refused, Err(SharedMemoryError::TooShort { .. })));
        let twice = vec![region(0, 2, true), region(PAGE, 1, true)];
        let refused = SharedMemory::map(twice);
        assert!(matches!(refused, Err(SharedMemoryError::Map(_))));
    }
}
