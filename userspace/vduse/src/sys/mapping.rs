//! A region of the driver's memory, mapped.

use std::io;
use std::num::NonZeroUsize;
use std::os::fd::AsFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU16, AtomicU64, Ordering, fence};

use nix::sys::mman::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};
use vm_memory::VolatileSlice;

use super::guard::Guard;

/// A shared mapping, accessed by copying only. Its pages may vanish: see [`Mapping::vanished`].
#[derive(Debug)]
pub(crate) struct Mapping {
    start: NonNull<libc::c_void>,
    /// Bytes that are mapped.
    mapped: usize,
    /// Where the region begins in them.
    skipped: usize,
    guard: Option<Guard>,
}

// SAFETY: The mapping is owned, belongs to no thread, and is accessed by volatile and atomic
// copies only.
unsafe impl Send for Mapping {}
// SAFETY: As above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `len` bytes at any `offset` of a file.
    ///
    /// # Errors
    ///
    /// The system's; `ENOMEM` where the region is larger than the address space, `ENFILE` where
    /// too many are mapped.
    pub(crate) fn new(
        file: impl AsFd,
        offset: u64,
        len: u64,
        read: bool,
        write: bool,
    ) -> io::Result<Self> {
        let page = 4096;
        let out = || io::Error::from_raw_os_error(libc::ENOMEM);
        let skipped = usize::try_from(offset % page).map_err(|_| out())?;
        let mapped = usize::try_from(len).map_err(|_| out())?;
        let mapped = mapped.checked_add(skipped).ok_or_else(out)?;
        let length = NonZeroUsize::new(mapped).ok_or_else(out)?;
        let position = libc::off_t::try_from(offset - offset % page).map_err(|_| out())?;
        let mut protection = ProtFlags::PROT_NONE;
        protection.set(ProtFlags::PROT_READ, read);
        protection.set(ProtFlags::PROT_WRITE, write);
        // SAFETY: A new mapping at an address of the kernel's choice touches no other memory.
        let start = unsafe {
            mmap(
                None,
                length,
                protection,
                MapFlags::MAP_SHARED,
                file,
                position,
            )?
        };
        let mut mapping = Self {
            start,
            mapped,
            skipped,
            guard: None,
        };
        // SAFETY: A whole mapping, which stays until `drop` has dropped the guard.
        mapping.guard = unsafe { Guard::new(start.as_ptr().expose_provenance(), mapped) };
        match mapping.guard {
            Some(_) => Ok(mapping),
            None => Err(io::Error::from_raw_os_error(libc::ENFILE)),
        }
    }

    /// Whether pages were not there when they were touched: what was read is worth nothing.
    pub(crate) fn vanished(&self) -> bool {
        self.guard.as_ref().is_none_or(Guard::vanished)
    }

    /// The bytes from `offset` on.
    ///
    /// # Panics
    ///
    /// Where the region is shorter: callers have looked into its bounds.
    fn slice(&self, offset: u64, len: usize) -> VolatileSlice<'_> {
        let at = usize::try_from(offset)
            .ok()
            .and_then(|at| at.checked_add(self.skipped));
        let end = at.and_then(|at| at.checked_add(len));
        assert!(end.is_some_and(|end| end <= self.mapped));
        let at = at.unwrap_or_default();
        // SAFETY: In bounds, and alive as long as `self`. Others write the memory, but nothing is
        // borrowed from it; all accesses are volatile.
        unsafe { VolatileSlice::new(self.start.as_ptr().cast::<u8>().add(at), len) }
    }

    /// The two bytes at `offset`; nothing where they are not aligned. Panics where `slice` does.
    fn word(&self, offset: u64) -> Option<&AtomicU16> {
        let pointer = self.slice(offset, 2).ptr_guard_mut().as_ptr();
        // SAFETY: In bounds and aligned (checked), alive as long as `self`, and no other access
        // within this process needs to be told apart: all are volatile or atomic.
        let word = || unsafe { AtomicU16::from_ptr(pointer.cast()) };
        pointer.addr().is_multiple_of(2).then(word)
    }

    /// Whether the region has these bytes.
    pub(crate) fn has(&self, offset: u64, len: usize) -> bool {
        let end = offset.checked_add(len as u64);
        end.is_some_and(|end| end <= (self.mapped - self.skipped) as u64)
    }

    /// Where the bytes from `offset` on are, for the kernel alone. Panics where `slice` does.
    pub(crate) fn address(&self, offset: u64, len: usize) -> *mut u8 {
        self.slice(offset, len).ptr_guard_mut().as_ptr()
    }

    /// Puts memory that nobody can access in the place of the mapping: from now on no copy by
    /// its addresses, the kernel's included, reaches what was mapped.
    pub(crate) fn cut(&self) -> io::Result<()> {
        let length = NonZeroUsize::new(self.mapped).ok_or(io::ErrorKind::InvalidInput)?;
        let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_FIXED | MapFlags::MAP_NORESERVE;
        let address = self.start.as_ptr().expose_provenance();
        // SAFETY: Replaces a whole mapping of ours, from which nothing is borrowed.
        unsafe {
            mmap_anonymous(
                NonZeroUsize::new(address),
                length,
                ProtFlags::PROT_NONE,
                flags,
            )?
        };
        Ok(())
    }

    /// The eight bytes at `offset`; nothing where they are not aligned. Panics where `slice` does.
    fn long(&self, offset: u64) -> Option<&AtomicU64> {
        let pointer = self.slice(offset, 8).ptr_guard_mut().as_ptr();
        // SAFETY: As in `word`.
        let long = || unsafe { AtomicU64::from_ptr(pointer.cast()) };
        pointer.addr().is_multiple_of(8).then(long)
    }

    /// Copies out of a readable mapping; panics where `slice` does.
    pub(crate) fn read(&self, offset: u64, into: &mut [u8]) {
        self.slice(offset, into.len()).copy_to(into);
    }

    /// Copies into a writable mapping; panics where `slice` does.
    pub(crate) fn write(&self, offset: u64, from: &[u8]) {
        self.slice(offset, from.len()).copy_from(from);
    }

    /// Reads two bytes of a readable mapping; nothing where they are not aligned. Panics where
    /// `slice` does.
    pub(crate) fn load(&self, offset: u64) -> Option<u16> {
        // No more than a relaxed load may be made from memory that cannot be written.
        let value = self.word(offset)?.load(Ordering::Relaxed);
        fence(Ordering::Acquire);
        Some(u16::from_le(value))
    }

    /// Writes two bytes of a writable mapping; nothing where they are not aligned. Panics where
    /// `slice` does.
    pub(crate) fn store(&self, offset: u64, value: u16) -> Option<()> {
        self.word(offset)?.store(value.to_le(), Ordering::Release);
        Some(())
    }

    /// Reads eight bytes of a mapping that can be read and written, in host byte order; nothing
    /// where they are not aligned. Panics where `slice` does.
    pub(crate) fn load_long(&self, offset: u64) -> Option<u64> {
        Some(self.long(offset)?.load(Ordering::Acquire))
    }

    /// Writes eight bytes at once. The rest as [`load_long`](Self::load_long).
    pub(crate) fn store_long(&self, offset: u64, value: u64) -> Option<()> {
        self.long(offset)?.store(value, Ordering::Release);
        Some(())
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        self.guard = None;
        // SAFETY: `new` made this mapping, and nothing borrows from it.
        let unmapped = unsafe { munmap(self.start, self.mapped) };
        debug_assert!(unmapped.is_ok());
    }
}
