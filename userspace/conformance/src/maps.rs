//! Looking at BPF maps from outside the library, through this process's descriptors.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use anyhow::{Context as _, Result};
use ioregion_abi::bpf::MAX_VCPUS;

/// `BPF_MAP_TYPE_HASH`
pub const HASH: u32 = 1;
/// `BPF_MAP_TYPE_ARRAY`
pub const ARRAY: u32 = 2;
/// `BPF_MAP_TYPE_RINGBUF`
pub const RINGBUF: u32 = 27;

const BPF_MAP_UPDATE_ELEM: libc::c_long = 2;
const BPF_MAP_GET_NEXT_KEY: libc::c_long = 4;

/// Open descriptors and what they lead to.
///
/// # Errors
///
/// That of `/proc`.
pub fn open_fds() -> Result<Vec<(RawFd, String)>> {
    let mut fds = Vec::new();
    for entry in std::fs::read_dir("/proc/self/fd")? {
        let entry = entry?;
        // The directory's own descriptor is closed by now.
        let Ok(target) = std::fs::read_link(entry.path()) else {
            continue;
        };
        let fd = entry.file_name().to_string_lossy().parse()?;
        if !target.starts_with("/proc") {
            fds.push((fd, target.to_string_lossy().into_owned()));
        }
    }
    Ok(fds)
}

/// A map behind one of this process's descriptors.
#[derive(Debug)]
pub struct Map {
    fd: OwnedFd,
    /// `BPF_MAP_TYPE_*`.
    pub kind: u32,
    /// Bytes of a key.
    pub key_size: u32,
    /// Bytes of a value.
    pub value_size: u32,
    /// Room for elements.
    pub entries: u32,
}

/// `union bpf_attr` for operations on elements.
#[repr(C)]
struct Element {
    map_fd: u32,
    pad: u32,
    key: u64,
    value: u64,
    flags: u64,
}

impl Map {
    /// Takes a copy of a descriptor.
    ///
    /// # Errors
    ///
    /// If it leads to no map.
    pub fn open(fd: RawFd) -> Result<Self> {
        let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{fd}"))?;
        let field = |name: &str| -> Result<u32> {
            let value = info
                .lines()
                .find_map(|line| line.strip_prefix(name))
                .context("no such field")?;
            Ok(value.trim().parse()?)
        };
        // SAFETY: The descriptor was listed as open, and the copy is owned here.
        let copy = unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 3) };
        anyhow::ensure!(copy >= 0, "{}", io::Error::last_os_error());
        Ok(Self {
            // SAFETY: As above.
            fd: unsafe { OwnedFd::from_raw_fd(copy) },
            kind: field("map_type:")?,
            key_size: field("key_size:")?,
            value_size: field("value_size:")?,
            entries: field("max_entries:")?,
        })
    }

    /// Tries to map its first page.
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub fn map(&self, writable: bool) -> io::Result<()> {
        let protection = libc::PROT_READ | if writable { libc::PROT_WRITE } else { 0 };
        // SAFETY: A new mapping at an address of the kernel's choice, taken away again.
        unsafe {
            let at = libc::mmap(
                std::ptr::null_mut(),
                4096,
                protection,
                libc::MAP_SHARED,
                self.fd.as_raw_fd(),
                0,
            );
            if at == libc::MAP_FAILED {
                return Err(io::Error::last_os_error());
            }
            libc::munmap(at, 4096);
        }
        Ok(())
    }

    /// Tries to change an element.
    ///
    /// # Errors
    ///
    /// The kernel's.
    ///
    /// # Panics
    ///
    /// If key or value do not have the map's size.
    pub fn update(&self, key: u32, value: &[u8]) -> io::Result<()> {
        self.update_at(&key.to_ne_bytes(), value)
    }

    /// The same for keys of any size.
    ///
    /// # Errors
    ///
    /// The kernel's.
    ///
    /// # Panics
    ///
    /// If key or value do not have the map's size.
    pub fn update_at(&self, key: &[u8], value: &[u8]) -> io::Result<()> {
        let sizes = (key.len() as u32, value.len() as u32);
        assert_eq!((self.key_size, self.value_size), sizes);
        self.element(
            BPF_MAP_UPDATE_ELEM,
            key.as_ptr() as u64,
            value.as_ptr() as u64,
        )
    }

    /// The keys of a map with keys of four bytes.
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub fn keys(&self) -> io::Result<Vec<u32>> {
        let mut keys = Vec::new();
        let mut next = 0_u32;
        let mut before = None;
        loop {
            let key = before
                .as_ref()
                .map_or(0, |key: &u32| std::ptr::from_ref(key) as u64);
            match self.element(BPF_MAP_GET_NEXT_KEY, key, &raw mut next as u64) {
                Ok(()) => keys.push(next),
                Err(error) if error.raw_os_error() == Some(libc::ENOENT) => return Ok(keys),
                Err(error) => return Err(error),
            }
            before = Some(next);
        }
    }

    fn element(&self, command: libc::c_long, key: u64, value: u64) -> io::Result<()> {
        let map_fd = self.fd.as_raw_fd().cast_unsigned();
        let attr = Element {
            map_fd,
            pad: 0,
            key,
            value,
            flags: 0,
        };
        // SAFETY: `attr` is laid out for these commands, its pointers lead to live memory of the
        // sizes that the callers have checked.
        let ret = unsafe {
            libc::syscall(
                libc::SYS_bpf,
                command,
                &raw const attr,
                size_of::<Element>(),
            )
        };
        if ret < 0 {
            Err(io::Error::last_os_error())
        } else {
            Ok(())
        }
    }
}

/// The threads that the programs loaded by this process know as vCPUs', sorted.
///
/// # Errors
///
/// The kernel's.
pub fn registered_threads() -> Result<Vec<u32>> {
    let mut threads = Vec::new();
    for (fd, target) in open_fds()? {
        if target != "anon_inode:bpf-map" {
            continue;
        }
        let map = Map::open(fd)?;
        if (map.kind, map.key_size, map.value_size, map.entries) == (HASH, 4, 4, MAX_VCPUS) {
            threads.extend(map.keys()?);
        }
    }
    threads.sort_unstable();
    threads.dedup();
    Ok(threads)
}
