//! What one client of a loader may have of the kernel's memory.

use std::io;
use std::os::fd::AsFd;

use crate::sys::bpf;

const PAGE: u64 = 4096;

/// Limits of one kind of maps, and those that there are.
///
/// A map counts as long as anybody has it: giving back its number frees nothing where the client
/// keeps a descriptor or a mapping.
#[derive(Debug)]
pub(super) struct Quota {
    max_bytes: u64,
    max_maps: usize,
    /// Ids, with the bytes of each.
    maps: Vec<(u32, u64)>,
}

impl Quota {
    /// For the maps of ports: 256 MiB, more than as many ports with some hundred doorbells as a
    /// program has room for.
    pub(super) const fn ports() -> Self {
        Self::new(256 << 20, 1 << 14)
    }

    /// For register files: 64 MiB, 4096 files.
    pub(super) const fn registers() -> Self {
        Self::new(64 << 20, 1 << 12)
    }

    const fn new(max_bytes: u64, max_maps: usize) -> Self {
        Self {
            max_bytes,
            max_maps,
            maps: Vec::new(),
        }
    }

    fn has_room(&self, maps: usize, bytes: u64) -> bool {
        let held: u64 = self.maps.iter().map(|(_, bytes)| bytes).sum();
        self.maps.len() + maps <= self.max_maps && held.saturating_add(bytes) <= self.max_bytes
    }

    /// Whether there is room for so many more maps with so many bytes in all.
    ///
    /// # Errors
    ///
    /// `ENOSPC`.
    pub(super) fn check(&mut self, maps: usize, bytes: u64) -> io::Result<()> {
        if !self.has_room(maps, bytes) {
            self.maps.retain(|(id, _)| bpf::map_exists(*id));
        }
        if self.has_room(maps, bytes) {
            Ok(())
        } else {
            Err(io::Error::from_raw_os_error(libc::ENOSPC))
        }
    }

    /// Counts a new map.
    pub(super) fn charge(&mut self, map: &impl AsFd, bytes: u64) -> io::Result<()> {
        let id = bpf::map_info(map.as_fd())?.id;
        self.maps.push((id, bytes));
        Ok(())
    }
}

/// Bytes of an array map that can be mapped: its head has a page of its own.
pub(super) fn array(value: usize, entries: u32) -> u64 {
    let bytes = u64::from(entries).saturating_mul(value as u64);
    bytes.div_ceil(PAGE).saturating_add(1).saturating_mul(PAGE)
}

/// Bytes of a ring buffer with one page of data: head and positions besides.
pub(super) const RING: u64 = 5 * PAGE;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_smallest_map_takes_two_pages_and_no_size_overflows() {
        assert_eq!(array(8, 1), 2 * PAGE);
        assert_eq!(array(8, 512), 2 * PAGE);
        assert_eq!(array(8, 513), 3 * PAGE);
        assert!(array(1024, u32::MAX) > 1 << 41);
        let mut quota = Quota::new(10 * PAGE, 3);
        assert!(quota.check(3, 10 * PAGE).is_ok());
        assert!(quota.check(4, 1).is_err());
        assert!(quota.check(1, u64::MAX).is_err());
    }
}
