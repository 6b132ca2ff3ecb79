//! Register files: values that a device keeps current, so that reads need not ask it.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use ioregion_abi::bpf::MAX_REGISTERS;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};

use crate::sys::mmap::{MapKind, Mapping};

/// An array of registers in shared memory, from which reads are answered without the device
/// where that is possible: see [`Answered`](crate::Answered).
///
/// The device stores a register's value whenever it changes; the guest's next read sees it. All
/// registers are 0 at first. Clones, and what another process received through
/// [`handoff`](crate::handoff), are the same file.
///
/// [`Vm::registers`](crate::Vm::registers) makes one that suits whatever mechanism carries the
/// region.
#[derive(Clone)]
pub struct RegisterFile(Arc<Inner>);

struct Inner {
    words: Mapping,
    fd: OwnedFd,
    len: u32,
    /// The descriptor is one of a BPF map, which KVM can read.
    is_map: bool,
}

impl RegisterFile {
    /// A file in memory that only the processes that have it can read.
    ///
    /// # Errors
    ///
    /// `InvalidInput` unless `len`, the number of registers, is 1 to
    /// [`MAX_REGISTERS`]; the system's.
    pub fn new(len: u32) -> io::Result<Self> {
        let bytes = check_len(len)?;
        let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
        let fd = memfd_create(c"ioregion-registers", flags)?;
        nix::unistd::ftruncate(&fd, bytes as i64)?;
        let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
        fcntl(&fd, FcntlArg::F_ADD_SEALS(seals))?;
        Self::mapped(fd, len, false)
    }

    /// The file whose array map this is.
    pub(crate) fn of_map(fd: OwnedFd, len: u32) -> io::Result<Self> {
        Self::mapped(fd, len, true)
    }

    /// A file that another process says this is.
    pub(crate) fn received(fd: OwnedFd, len: u32, is_map: bool) -> io::Result<Self> {
        Self::mapped(fd, len, is_map)
    }

    fn mapped(fd: OwnedFd, len: u32, is_map: bool) -> io::Result<Self> {
        let bytes = check_len(len)?;
        let words = if is_map {
            Mapping::of_map(fd.as_fd(), MapKind::Array(8), 0, bytes, true)?
        } else {
            Mapping::of_memory(fd.as_fd(), bytes, true)?
        };
        Ok(Self(Arc::new(Inner {
            words,
            fd,
            len,
            is_map,
        })))
    }

    /// Number of registers, at least 1.
    #[must_use]
    #[expect(clippy::len_without_is_empty, reason = "it never is")]
    pub fn len(&self) -> u32 {
        self.0.len
    }

    /// Stores a register. The guest's reads return it from now on, as far as their size goes;
    /// what this thread stored before is visible to whoever sees it.
    ///
    /// # Panics
    ///
    /// If there is no register with this index.
    pub fn store(&self, index: u32, value: u64) {
        self.check_index(index);
        self.0
            .words
            .word(index as usize * 8)
            .store(value, Ordering::Release);
    }

    /// Loads a register.
    ///
    /// # Panics
    ///
    /// If there is no register with this index.
    #[must_use]
    pub fn load(&self, index: u32) -> u64 {
        self.check_index(index);
        self.0
            .words
            .word(index as usize * 8)
            .load(Ordering::Acquire)
    }

    fn check_index(&self, index: u32) {
        assert!(
            index < self.0.len,
            "register {index} of a file of {}",
            self.0.len
        );
    }

    /// The BPF map, if it is one.
    pub(crate) fn map(&self) -> Option<BorrowedFd<'_>> {
        self.0.is_map.then(|| self.0.fd.as_fd())
    }

    pub(crate) fn is_map(&self) -> bool {
        self.0.is_map
    }

    /// Another descriptor of it.
    pub(crate) fn descriptor(&self) -> io::Result<OwnedFd> {
        self.0.fd.try_clone()
    }
}

/// The length in bytes.
fn check_len(len: u32) -> io::Result<usize> {
    match len {
        1..=MAX_REGISTERS => Ok(len as usize * 8),
        _ => Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("a register file has 1 to {MAX_REGISTERS} registers, not {len}"),
        )),
    }
}

/// Equal if they are the same file, held by the same handle.
impl PartialEq for RegisterFile {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Eq for RegisterFile {}

impl fmt::Debug for RegisterFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RegisterFile")
            .field("len", &self.0.len)
            .field("is_map", &self.0.is_map)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registers_keep_what_was_stored_for_every_handle() {
        let file = RegisterFile::new(3).unwrap();
        let received = RegisterFile::received(file.descriptor().unwrap(), 3, false).unwrap();
        assert_eq!([0, 1, 2].map(|index| file.load(index)), [0; 3]);
        file.store(1, u64::MAX);
        received.store(2, 7);
        assert_eq!(received.load(1), u64::MAX);
        assert_eq!([0, 1, 2].map(|index| file.load(index)), [0, u64::MAX, 7]);
    }

    #[test]
    fn files_of_no_or_too_great_length_are_refused() {
        for len in [0, MAX_REGISTERS + 1, u32::MAX] {
            let error = RegisterFile::new(len).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
        }
        assert_eq!(
            RegisterFile::new(MAX_REGISTERS).unwrap().len(),
            MAX_REGISTERS
        );
        // A sender that says there is more than there is.
        let file = RegisterFile::new(1).unwrap();
        let error = RegisterFile::received(file.descriptor().unwrap(), 1024, false).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
    }

    #[test]
    #[should_panic(expected = "register 3 of a file of 3")]
    fn a_register_past_the_end_is_not_there() {
        let _ = RegisterFile::new(3).unwrap().load(3);
    }
}
