//! Shared mappings, reached through atomics only.

use std::io;
use std::num::NonZeroUsize;
use std::os::fd::BorrowedFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::libc;
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use nix::sys::stat::fstat;

/// A shared mapping of a memfd, a BPF map or another of the kernel's pages.
///
/// Others write it at any time, so nothing but atomic words is ever borrowed from it.
#[derive(Debug)]
pub(crate) struct Mapping {
    start: NonNull<libc::c_void>,
    len: usize,
}

// SAFETY: The mapping is owned, belongs to no thread, and gives out nothing but atomics.
unsafe impl Send for Mapping {}
// SAFETY: As above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `len` bytes at `offset` (a multiple of the page size); read-only unless `writable`.
    ///
    /// # Errors
    ///
    /// The system's; `InvalidInput` for a regular file that is too short or could be cut short
    /// under the mapping (no `F_SEAL_SHRINK`), which would raise SIGBUS.
    pub(crate) fn new(
        fd: BorrowedFd<'_>,
        offset: usize,
        len: usize,
        writable: bool,
    ) -> io::Result<Self> {
        let invalid = |what| Err(io::Error::new(io::ErrorKind::InvalidInput, what));
        let (Some(length), Some(end)) = (NonZeroUsize::new(len), offset.checked_add(len)) else {
            return invalid("a mapping of no length");
        };
        let Ok(position) = libc::off_t::try_from(offset) else {
            return invalid("a mapping past the end");
        };
        let stat = fstat(fd)?;
        if stat.st_mode & libc::S_IFMT == libc::S_IFREG {
            let seals = SealFlag::from_bits_retain(fcntl(fd, FcntlArg::F_GET_SEALS)?);
            if !seals.contains(SealFlag::F_SEAL_SHRINK) {
                return invalid("shared memory that is not sealed against shrinking");
            }
            if u64::try_from(stat.st_size).unwrap_or(0) < end as u64 {
                return invalid("shared memory that is too short");
            }
        }
        let mut protection = ProtFlags::PROT_READ;
        protection.set(ProtFlags::PROT_WRITE, writable);
        // SAFETY: A new mapping at an address of the kernel's choice touches no other memory.
        let start = unsafe { mmap(None, length, protection, MapFlags::MAP_SHARED, fd, position)? };
        Ok(Self { start, len })
    }

    /// The word at a byte offset.
    ///
    /// Of a read-only mapping it may only be loaded, with [`Relaxed`].
    ///
    /// [`Relaxed`]: std::sync::atomic::Ordering::Relaxed
    ///
    /// # Panics
    ///
    /// If the offset is not aligned or outside: callers compute it from what they mapped.
    pub(crate) fn word(&self, offset: usize) -> &AtomicU64 {
        assert!(offset.is_multiple_of(8) && offset < self.len && self.len - offset >= 8);
        // SAFETY: In bounds and aligned (the mapping is page-aligned), alive as long as `self`;
        // whoever shares the memory is bound to atomic or volatile accesses as well, and a peer
        // that is not can only spoil the words' values.
        unsafe { AtomicU64::from_ptr(self.start.as_ptr().cast::<u8>().add(offset).cast()) }
    }

    /// Stores half a word, with release ordering; the other half may belong to somebody else.
    ///
    /// # Panics
    ///
    /// As for [`word`](Self::word).
    pub(crate) fn store_u32(&self, offset: usize, value: u32) {
        assert!(offset.is_multiple_of(4) && offset < self.len && self.len - offset >= 4);
        // SAFETY: As for `word`.
        let half =
            unsafe { AtomicU32::from_ptr(self.start.as_ptr().cast::<u8>().add(offset).cast()) };
        half.store(value, Ordering::Release);
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: `new` made this mapping; borrows of it have ended.
        let unmapped = unsafe { munmap(self.start, self.len) };
        debug_assert!(unmapped.is_ok());
    }
}
