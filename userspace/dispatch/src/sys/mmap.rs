//! Shared mappings, reached through atomics only.

use std::io;
use std::num::NonZeroUsize;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use aya_obj::generated::bpf_map_type::{BPF_MAP_TYPE_ARRAY, BPF_MAP_TYPE_RINGBUF};
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::libc;
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use nix::sys::stat::fstat;
use nix::sys::statfs::{TMPFS_MAGIC, fstatfs};

use super::bpf::{self, MapInfo};

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

/// The BPF map that a descriptor must lead to.
#[derive(Debug, Clone, Copy)]
pub(crate) enum MapKind {
    /// An array with values of this many bytes, a multiple of 8.
    Array(u32),
    /// A ring buffer.
    Ring,
}

impl MapKind {
    /// Why a map of this kind must not be mapped so far; `None` if it may.
    fn objection(self, info: &MapInfo, end: usize) -> Option<&'static str> {
        let kind = match self {
            Self::Array(_) => BPF_MAP_TYPE_ARRAY,
            Self::Ring => BPF_MAP_TYPE_RINGBUF,
        };
        if info.kind != kind as u32 {
            return Some("a BPF map of another type");
        }
        let Self::Array(value) = self else {
            // Its head has the same length for all sizes.
            return None;
        };
        if info.value_size != value {
            return Some("a BPF array of other values");
        }
        let len = u64::from(info.max_entries) * u64::from(value);
        (len < end as u64).then_some("a BPF array that is too short")
    }
}

/// What the device's end of a purpose-made channel is called.
const PURPOSE_MADE: &str = "anon_inode:[ioregionfd]";

impl Mapping {
    /// Maps `len` bytes at `offset` (a multiple of the page size); read-only unless `writable`.
    ///
    /// **Nothing is checked**: `fd` must be one that this process has from the kernel itself, or
    /// from a loader that it trusts. Of what a peer sends, a page may be missing when it is touched,
    /// which ends the process (SIGBUS).
    ///
    /// # Errors
    ///
    /// The system's.
    pub(crate) fn of_kernel(
        fd: BorrowedFd<'_>,
        offset: usize,
        len: usize,
        writable: bool,
    ) -> io::Result<Self> {
        let length = NonZeroUsize::new(len).ok_or_else(|| invalid("a mapping of no length"))?;
        let position = libc::off_t::try_from(offset).ok();
        let position = position.ok_or_else(|| invalid("a mapping past the end"))?;
        let mut protection = ProtFlags::PROT_READ;
        protection.set(ProtFlags::PROT_WRITE, writable);
        // SAFETY: A new mapping at an address of the kernel's choice touches no other memory.
        let start = unsafe { mmap(None, length, protection, MapFlags::MAP_SHARED, fd, position)? };
        Ok(Self { start, len })
    }

    /// Maps the start of a peer's shared memory.
    ///
    /// # Errors
    ///
    /// `InvalidInput` if it is anything but memory (`memfd_create`) of ordinary pages that is long
    /// enough and sealed against shrinking; the system's.
    pub(crate) fn of_memory(fd: BorrowedFd<'_>, len: usize, writable: bool) -> io::Result<Self> {
        Self::of_memory_at(fd, 0, len, writable)
    }

    fn of_memory_at(
        fd: BorrowedFd<'_>,
        offset: usize,
        len: usize,
        writable: bool,
    ) -> io::Result<Self> {
        let end = end_of(offset, len)?;
        let stat = fstat(fd)?;
        // Pages of hugetlbfs can run out.
        if !is_regular(&stat) || fstatfs(fd)?.filesystem_type() != TMPFS_MAGIC {
            return Err(invalid("no shared memory of ordinary pages"));
        }
        let seals = SealFlag::from_bits_retain(fcntl(fd, FcntlArg::F_GET_SEALS)?);
        if !seals.contains(SealFlag::F_SEAL_SHRINK) {
            return Err(invalid(
                "shared memory that is not sealed against shrinking",
            ));
        }
        if u64::try_from(stat.st_size).unwrap_or(0) < end as u64 {
            return Err(invalid("shared memory that is too short"));
        }
        Self::of_kernel(fd, offset, len, writable)
    }

    /// Maps a peer's BPF map, or sealed memory in the place of one.
    ///
    /// # Errors
    ///
    /// `InvalidInput` if it is neither of that kind and length; the system's.
    pub(crate) fn of_map(
        fd: BorrowedFd<'_>,
        kind: MapKind,
        offset: usize,
        len: usize,
        writable: bool,
    ) -> io::Result<Self> {
        if is_regular(&fstat(fd)?) {
            return Self::of_memory_at(fd, offset, len, writable);
        }
        match kind.objection(&bpf::map_info(fd)?, end_of(offset, len)?) {
            Some(objection) => Err(invalid(objection)),
            None => Self::of_kernel(fd, offset, len, writable),
        }
    }

    /// Maps the page of a peer's end of a purpose-made channel.
    ///
    /// # Errors
    ///
    /// `InvalidInput` if it is none of KVM's; the system's, among others where there is no `/proc`
    /// to tell.
    pub(crate) fn of_channel(fd: BorrowedFd<'_>, len: usize) -> io::Result<Self> {
        // Only the kernel gives such names: those of files begin with a slash.
        let what = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()))?;
        if what.as_os_str() != PURPOSE_MADE {
            return Err(invalid("no purpose-made channel of KVM's"));
        }
        Self::of_kernel(fd, 0, len, true)
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
        // SAFETY: `of_kernel` made this mapping; borrows of it have ended.
        let unmapped = unsafe { munmap(self.start, self.len) };
        debug_assert!(unmapped.is_ok());
    }
}

fn end_of(offset: usize, len: usize) -> io::Result<usize> {
    let end = offset.checked_add(len);
    end.ok_or_else(|| invalid("a mapping past the end"))
}

fn is_regular(stat: &libc::stat) -> bool {
    stat.st_mode & libc::S_IFMT == libc::S_IFREG
}

fn invalid(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, what)
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::{AsFd, OwnedFd};

    use nix::sys::eventfd::EventFd;
    use nix::sys::memfd::{MFdFlags, memfd_create};

    use super::*;

    const PAGE: usize = 4096;

    /// Shared memory with these flags and seals, two pages of its kind long.
    fn memory(flags: MFdFlags, seals: SealFlag, page: i64) -> io::Result<OwnedFd> {
        let fd = memfd_create(c"test", flags | MFdFlags::MFD_ALLOW_SEALING)?;
        nix::unistd::ftruncate(&fd, 2 * page)?;
        fcntl(&fd, FcntlArg::F_ADD_SEALS(seals))?;
        Ok(fd)
    }

    fn refused(what: &str, fd: BorrowedFd<'_>) {
        let refusals = [
            Mapping::of_memory(fd, PAGE, true),
            Mapping::of_map(fd, MapKind::Array(8), 0, PAGE, true),
            Mapping::of_map(fd, MapKind::Array(8), PAGE, PAGE, true),
            Mapping::of_map(fd, MapKind::Ring, 0, PAGE, true),
            Mapping::of_channel(fd, PAGE),
        ];
        for refusal in refusals {
            let error = refusal.expect_err(what);
            assert_eq!(error.kind(), io::ErrorKind::InvalidInput, "{what}: {error}");
        }
    }

    #[test]
    fn what_can_be_mapped_but_not_touched_is_refused() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let socket = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        // The kernel maps it, which is why it has to be looked at.
        assert!(Mapping::of_kernel(socket.as_fd(), 0, PAGE, false).is_ok());
        refused("a TCP socket", socket.as_fd());
        refused("an eventfd", EventFd::new().unwrap().as_fd());
        let file = std::fs::File::open("/proc/self/exe").unwrap();
        refused("a file", file.as_fd());
    }

    #[test]
    fn memory_must_be_sealed_long_enough_and_of_ordinary_pages() {
        let none = MFdFlags::empty();
        let sealed = memory(none, SealFlag::F_SEAL_SHRINK, PAGE as i64).unwrap();
        let fd = sealed.as_fd();
        assert!(Mapping::of_memory(fd, 2 * PAGE, true).is_ok());
        assert!(Mapping::of_map(fd, MapKind::Array(8), 0, 2 * PAGE, true).is_ok());
        assert!(Mapping::of_map(fd, MapKind::Ring, PAGE, PAGE, false).is_ok());
        assert!(Mapping::of_memory(fd, 2 * PAGE + 1, true).is_err());
        assert!(Mapping::of_map(fd, MapKind::Ring, PAGE, PAGE + 1, false).is_err());
        assert!(Mapping::of_map(fd, MapKind::Ring, PAGE, usize::MAX, false).is_err());
        assert!(Mapping::of_channel(fd, PAGE).is_err());
        let unsealed = memory(none, SealFlag::F_SEAL_GROW, PAGE as i64).unwrap();
        refused("unsealed memory", unsealed.as_fd());
        match memory(MFdFlags::MFD_HUGETLB, SealFlag::F_SEAL_SHRINK, 2 << 20) {
            Ok(huge) => refused("huge pages", huge.as_fd()),
            Err(error) => println!("no huge pages here: {error}"),
        }
    }

    #[test]
    fn a_vcpu_is_no_peer_s_memory() {
        // Only root may open it on many machines; the conformance suite cannot do without.
        let Ok(kvm) = kvm_ioctls::Kvm::new() else {
            return println!("no /dev/kvm here");
        };
        let vcpu = kvm.create_vm().unwrap().create_vcpu(0).unwrap();
        // SAFETY: The vCPU owns the descriptor and outlives the borrow.
        let fd = unsafe { BorrowedFd::borrow_raw(vcpu.as_raw_fd()) };
        assert!(Mapping::of_kernel(fd, 0, PAGE, true).is_ok());
        refused("a vCPU", fd);
    }
}
