//! The file behind a disk.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek as _, SeekFrom};
use std::os::fd::{AsRawFd as _, RawFd};
use std::os::unix::fs::{FileExt as _, FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, Flock, FlockArg, fallocate};

use super::SECTOR;

/// A file or block device with whole sectors, locked against other services.
#[derive(Debug)]
pub struct Image {
    path: PathBuf,
    file: Flock<File>,
    direct: Option<Direct>,
    sectors: AtomicU64,
    physical_block: u32,
    inode: (u64, u64),
}

/// The same file past the page cache.
#[derive(Debug)]
struct Direct {
    file: File,
    /// What addresses in memory must be multiples of: a power of two.
    memory: u32,
    /// And what places in the file and lengths must be.
    offset: u32,
}

impl Direct {
    fn open(file: &File, read_only: bool) -> io::Result<Self> {
        // The same file, whatever its path names by now.
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        let mut options = OpenOptions::new();
        options.read(true).write(!read_only);
        let file = options.custom_flags(libc::O_DIRECT).open(path)?;
        let (memory, offset) = super::statx::direct_alignment(&file).unwrap_or(UNKNOWN_ALIGNMENT);
        Ok(Self {
            file,
            memory,
            offset,
        })
    }
}

/// What any file system is content with.
const UNKNOWN_ALIGNMENT: (u32, u32) = (4096, 4096);

/// Why an image cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ImageError {
    /// It cannot be opened or looked at.
    #[error("the image {}: {error}", .path.display())]
    Open {
        /// Its path.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// Neither a file nor a block device.
    #[error("the image {} is neither a regular file nor a block device", .0.display())]
    Kind(PathBuf),
    /// No whole sectors.
    #[error(
        "the image {} has {bytes} bytes, which is no whole number of sectors of 512 bytes; \
         `truncate --size=%512 FILE` rounds it up",
        .path.display()
    )]
    Size {
        /// Its path.
        path: PathBuf,
        /// Its length.
        bytes: u64,
    },
    /// Somebody else has it.
    #[error("the image {} is in use by another process, which holds a lock on it", .0.display())]
    Locked(PathBuf),
}

impl Image {
    /// Opens and locks an image: shared to read only, else exclusively. `direct`: past the page
    /// cache, as far as the file system and each request allow it.
    ///
    /// # Errors
    ///
    /// Names the image and what is wrong with it.
    pub fn open(path: &Path, read_only: bool, direct: bool) -> Result<Self, ImageError> {
        let failed = |error| ImageError::Open {
            path: path.into(),
            error,
        };
        let mut options = OpenOptions::new();
        options.read(true).write(!read_only);
        let file = options.open(path).map_err(failed)?;
        let metadata = file.metadata().map_err(failed)?;
        let kind = metadata.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(ImageError::Kind(path.into()));
        }
        let how = match read_only {
            true => FlockArg::LockSharedNonblock,
            false => FlockArg::LockExclusiveNonblock,
        };
        let file = Flock::lock(file, how).map_err(|(_, errno)| match errno {
            Errno::EWOULDBLOCK => ImageError::Locked(path.into()),
            errno => failed(errno.into()),
        })?;
        let sectors = measure(path, &file)?;
        let block = u32::try_from(metadata.blksize()).unwrap_or(0);
        let usable = block.is_power_of_two() && (512..=1 << 16).contains(&block);
        let direct = match direct.then(|| Direct::open(&file, read_only)).transpose() {
            Ok(direct) => direct,
            Err(error) => {
                let image = path.display();
                tracing::warn!(%image, %error, "no direct I/O here: the page cache is used");
                None
            }
        };
        Ok(Self {
            path: path.into(),
            file,
            direct,
            sectors: AtomicU64::new(sectors),
            physical_block: if usable { block } else { 4096 },
            inode: (metadata.dev(), metadata.ino()),
        })
    }

    pub(crate) fn sectors(&self) -> u64 {
        self.sectors.load(Ordering::Relaxed)
    }

    /// Looks at the size again: whether it has changed.
    pub(crate) fn refresh(&self) -> Result<bool, ImageError> {
        let sectors = measure(&self.path, &self.file)?;
        Ok(self.sectors.swap(sectors, Ordering::Relaxed) != sectors)
    }

    /// Bytes that drivers read and write at least: requests here are buffered, so any sector can
    /// be written alone.
    pub(crate) fn logical_block(&self) -> u32 {
        512
    }

    /// The file's device and inode numbers.
    pub(crate) fn inode(&self) -> (u64, u64) {
        self.inode
    }

    /// Bytes that are best written at once.
    pub(crate) fn physical_block(&self) -> u32 {
        self.physical_block
    }

    /// The file's descriptors, with page cache and, where there is one, without.
    pub(crate) fn descriptors(&self) -> [RawFd; 2] {
        let cached = self.file.as_raw_fd();
        let direct = self.direct.as_ref();
        [
            cached,
            direct.map_or(cached, |direct| direct.file.as_raw_fd()),
        ]
    }

    /// Whether bytes can be reached past the page cache, from memory that is aligned.
    pub(crate) fn is_direct(&self, at: u64, len: u64) -> bool {
        self.direct.as_ref().is_some_and(|direct| {
            at.is_multiple_of(direct.offset.into()) && len.is_multiple_of(direct.offset.into())
        })
    }

    /// Whether memory is aligned for that.
    pub(crate) fn takes(&self, ranges: &[libc::iovec]) -> bool {
        self.direct.as_ref().is_some_and(|direct| {
            ranges.iter().all(|range| {
                let start = range.iov_base.addr();
                start.is_multiple_of(direct.memory as usize)
                    && range.iov_len.is_multiple_of(direct.offset as usize)
            })
        })
    }

    /// What memory for requests must be aligned to: a power of two.
    pub(crate) fn memory_align(&self) -> usize {
        self.direct
            .as_ref()
            .map_or(1, |direct| direct.memory as usize)
    }

    /// Whether requests go past the page cache where they can.
    pub(crate) fn has_direct(&self) -> bool {
        self.direct.is_some()
    }

    /// By which descriptor these bytes are reached; memory is aligned.
    fn by(&self, at: u64, len: usize) -> &File {
        match &self.direct {
            Some(direct) if self.is_direct(at, len as u64) => &direct.file,
            _ => &self.file,
        }
    }

    pub(crate) fn read(&self, at: u64, into: &mut [u8]) -> io::Result<()> {
        self.by(at, into.len()).read_exact_at(into, at)
    }

    pub(crate) fn write(&self, at: u64, from: &[u8]) -> io::Result<()> {
        self.by(at, from.len()).write_all_at(from, at)
    }

    /// Returns when everything written before is safe.
    pub(crate) fn flush(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    /// Gives the space of a range back, if the file system can; what it reads as is not said.
    pub(crate) fn discard(&self, at: u64, len: u64) -> io::Result<()> {
        match self.fallocate(Self::allocation(false, true), at, len) {
            // Advice that cannot be followed.
            Err(Errno::EOPNOTSUPP | Errno::ENOSYS) => Ok(()),
            done => Ok(done?),
        }
    }

    /// Makes a range read as zeroes, without its space where `unmap` allows it.
    pub(crate) fn zero(&self, at: u64, len: u64, unmap: bool) -> io::Result<()> {
        match self.fallocate(Self::allocation(true, unmap), at, len) {
            Err(Errno::EOPNOTSUPP | Errno::ENOSYS) => self.write_zeroes(at, len),
            done => Ok(done?),
        }
    }

    /// The mode of `fallocate` that zeroes or discards a range.
    pub(crate) fn allocation(zero: bool, unmap: bool) -> i32 {
        let how = match zero && !unmap {
            true => FallocateFlags::FALLOC_FL_ZERO_RANGE,
            false => FallocateFlags::FALLOC_FL_PUNCH_HOLE,
        };
        (how | FallocateFlags::FALLOC_FL_KEEP_SIZE).bits()
    }

    fn fallocate(&self, mode: i32, at: u64, len: u64) -> nix::Result<()> {
        let offset = |value: u64| i64::try_from(value).map_err(|_| Errno::EINVAL);
        let mode = FallocateFlags::from_bits_truncate(mode);
        fallocate(&*self.file, mode, offset(at)?, offset(len)?)
    }

    /// Writes zeroes through the page cache, whose memory need not be aligned.
    pub(crate) fn write_zeroes(&self, at: u64, len: u64) -> io::Result<()> {
        let zeroes = [0; 1 << 16];
        let (mut at, mut left) = (at, len);
        while left > 0 {
            let step = left.min(zeroes.len() as u64);
            let step_bytes = usize::try_from(step).unwrap_or(zeroes.len());
            self.file.write_all_at(&zeroes[..step_bytes], at)?;
            at += step;
            left -= step;
        }
        Ok(())
    }
}

/// Sectors of an image.
fn measure(path: &Path, mut file: &File) -> Result<u64, ImageError> {
    // Of a block device the metadata say nothing.
    let bytes = file
        .seek(SeekFrom::End(0))
        .map_err(|error| ImageError::Open {
            path: path.into(),
            error,
        })?;
    if bytes == 0 || bytes % SECTOR != 0 {
        return Err(ImageError::Size {
            path: path.into(),
            bytes,
        });
    }
    Ok(bytes / SECTOR)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(bytes: u64) -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        File::create(&path).unwrap().set_len(bytes).unwrap();
        (dir, path)
    }

    #[test]
    fn images_without_whole_sectors_are_refused_with_the_remedy() {
        for bytes in [0, 511, 513] {
            let (_dir, path) = image(bytes);
            let error = Image::open(&path, false, false).unwrap_err();
            assert!(matches!(error, ImageError::Size { .. }), "{error}");
            assert!(error.to_string().contains("truncate"), "{error}");
        }
        let error = Image::open(Path::new("/dev/null"), false, false).unwrap_err();
        assert!(matches!(error, ImageError::Kind(_)), "{error}");
        let error = Image::open(Path::new("/nonexistent"), false, false).unwrap_err();
        assert!(error.to_string().contains("/nonexistent"), "{error}");
    }

    #[test]
    fn writers_are_alone_and_readers_among_themselves() {
        let (_dir, path) = image(4096);
        let writer = Image::open(&path, false, false).unwrap();
        assert_eq!(writer.sectors(), 8);
        for read_only in [false, true] {
            let error = Image::open(&path, read_only, false).unwrap_err();
            assert!(matches!(error, ImageError::Locked(_)), "{error}");
        }
        drop(writer);
        let _one = Image::open(&path, true, false).unwrap();
        let _two = Image::open(&path, true, false).unwrap();
        assert!(Image::open(&path, false, false).is_err());
    }

    #[test]
    fn zeroed_ranges_read_as_zeroes() {
        for unmap in [false, true] {
            let (_dir, path) = image(1 << 17);
            let image = Image::open(&path, false, false).unwrap();
            image.write(0, &[0xab; 1 << 17]).unwrap();
            image.zero(512, 1 << 16, unmap).unwrap();
            let mut bytes = vec![1; 1 << 17];
            image.read(0, &mut bytes).unwrap();
            let zeroes = 512..512 + (1 << 16);
            for (at, byte) in bytes.iter().enumerate() {
                let expected = if zeroes.contains(&at) { 0 } else { 0xab };
                assert_eq!(*byte, expected, "at {at}");
            }
        }
        let (_dir, path) = image(1 << 17);
        let image = Image::open(&path, false, false).unwrap();
        image.write(0, &[1; 1 << 17]).unwrap();
        image.write_zeroes(512, (1 << 16) + 512).unwrap();
        let mut bytes = vec![1; 1 << 17];
        image.read(0, &mut bytes).unwrap();
        assert_eq!(
            bytes.iter().filter(|&&byte| byte == 0).count(),
            (1 << 16) + 512
        );
    }
}
