//! The driver's memory, mapped when it is first touched.
//!
//! # How memory is taken back
//!
//! Every access happens under a shared lock that it holds for one copy; taking memory back
//! ([`Iotlb::update`], [`Iotlb::close`]) holds the same lock alone while it unmaps. So when either
//! returns, no access to what was taken back is under way, and none can begin: the mapping is gone
//! from the table. A mapping that was fetched from the kernel before memory was taken back, but
//! arrives after, is found out by the table's epoch, which every taking back moves, and thrown
//! away. Whoever works for a driver that has reset the device holds a [`Session`] of a generation
//! that has passed, and reaches nothing any more.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use ioregion_devices::virtio::{Memory, MemoryError};

use crate::sys::Mapping;

/// How often an access looks again after memory was taken back between fetching and using it.
const TRIES: u32 = 16;

/// A region of the driver's memory as the kernel describes it.
#[derive(Debug)]
pub struct Region {
    /// First address.
    pub first: u64,
    /// Last address.
    pub last: u64,
    /// The device may read it.
    pub read: bool,
    /// The device may write it.
    pub write: bool,
    /// What holds it.
    pub file: OwnedFd,
    /// Where it begins in the file, in bytes.
    pub offset: u64,
}

/// Where regions come from: the kernel.
pub trait Source: Send + Sync {
    /// The region that an address lies in.
    ///
    /// # Errors
    ///
    /// The system's.
    fn region(&self, addr: u64) -> io::Result<Option<Region>>;
}

#[derive(Debug)]
struct Cached {
    last: u64,
    read: bool,
    write: bool,
    mapping: Mapping,
}

#[derive(Debug, Default)]
struct Table {
    /// By first address; they do not overlap.
    regions: BTreeMap<u64, Cached>,
    /// Moves whenever memory is taken back.
    epoch: u64,
    /// Moves whenever the driver resets the device.
    generation: u64,
}

impl Table {
    fn find(&self, addr: u64) -> Option<(u64, &Cached)> {
        let (&first, cached) = self.regions.range(..=addr).next_back()?;
        (addr <= cached.last).then_some((first, cached))
    }

    fn remove(&mut self, first: u64, last: u64) {
        self.epoch += 1;
        self.regions
            .retain(|&start, cached| cached.last < first || last < start);
    }
}

/// The mapped part of the driver's memory.
#[derive(Debug)]
pub struct Iotlb<S> {
    source: S,
    table: RwLock<Table>,
}

/// What an access does with a piece of memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Access {
    Read,
    Write,
}

impl<S: Source> Iotlb<S> {
    /// Nothing is mapped yet.
    pub fn new(source: S) -> Self {
        Self {
            source,
            table: RwLock::default(),
        }
    }

    /// Where regions come from.
    pub fn source(&self) -> &S {
        &self.source
    }

    /// Access until the next [`close`](Self::close).
    pub fn session(self: &Arc<Self>) -> Session<S> {
        Session {
            generation: self.shared().generation,
            iotlb: Arc::clone(self),
        }
    }

    /// Forgets the regions that overlap these addresses. When this returns, nobody touches them.
    pub fn update(&self, first: u64, last: u64) {
        self.alone().remove(first, last);
    }

    /// Forgets everything and ends all sessions.
    pub fn close(&self) {
        let mut table = self.alone();
        table.remove(0, u64::MAX);
        table.generation += 1;
    }

    /// How many regions are mapped.
    #[must_use]
    pub fn regions(&self) -> usize {
        self.shared().regions.len()
    }

    fn shared(&self) -> RwLockReadGuard<'_, Table> {
        // Nothing panics halfway through a change of the table.
        self.table.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn alone(&self) -> RwLockWriteGuard<'_, Table> {
        self.table.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Does something with the memory at `addr`: `act` gets a mapping, where in it, and how much
    /// of `len` lies there, which is returned.
    fn piece(
        &self,
        generation: u64,
        addr: u64,
        len: u64,
        access: Access,
        act: &mut dyn FnMut(&Mapping, u64, u64),
    ) -> Result<u64, MemoryError> {
        for _ in 0..TRIES {
            let table = self.shared();
            if table.generation != generation {
                return Err(MemoryError::Closed);
            }
            let epoch = table.epoch;
            if let Some((first, cached)) = table.find(addr) {
                match access {
                    Access::Read if !cached.read => {
                        return Err(MemoryError::NotReadable { addr });
                    }
                    Access::Write if !cached.write => {
                        return Err(MemoryError::NotWritable { addr });
                    }
                    _ => {}
                }
                // One less than the bytes up to the region's end, which may be 2^64.
                let here = (len - 1).min(cached.last - addr) + 1;
                act(&cached.mapping, addr - first, here);
                if !cached.mapping.vanished() {
                    return Ok(here);
                }
                drop(table);
                self.forget(addr, epoch);
                return Err(MemoryError::Vanished { addr });
            }
            drop(table);
            self.fetch(addr, epoch)?;
        }
        // The driver does nothing but taking memory back.
        Err(MemoryError::Vanished { addr })
    }

    /// Maps the region at an address, unless memory was taken back meanwhile.
    fn fetch(&self, addr: u64, epoch: u64) -> Result<(), MemoryError> {
        let failed = |error: io::Error| MemoryError::Map {
            addr,
            errno: error.raw_os_error().unwrap_or(libc::EIO),
        };
        let region = self.source.region(addr).map_err(failed)?;
        let region = region.ok_or(MemoryError::Unmapped { addr })?;
        let Region {
            first,
            last,
            read,
            write,
            ..
        } = region;
        let inside = first <= addr && addr <= last;
        let len = (last.wrapping_sub(first)).checked_add(1);
        let (true, Some(len)) = (inside, len) else {
            return Err(MemoryError::Unmapped { addr });
        };
        let mapping =
            Mapping::new(&region.file, region.offset, len, read, write).map_err(failed)?;
        let mut table = self.alone();
        // Another thread may have been faster, with the same region.
        if table.epoch == epoch && table.find(addr).is_none() {
            // What overlaps without covering the address is from before the kernel changed it.
            table
                .regions
                .retain(|&start, cached| cached.last < first || last < start);
            let cached = Cached {
                last,
                read,
                write,
                mapping,
            };
            table.regions.insert(first, cached);
        }
        Ok(())
    }

    /// Unmaps the region at an address, whose memory has vanished.
    fn forget(&self, addr: u64, epoch: u64) {
        let mut table = self.alone();
        if table.epoch == epoch {
            table.remove(addr, addr);
        }
    }

    fn pieces(
        &self,
        generation: u64,
        addr: u64,
        len: usize,
        access: Access,
        mut act: impl FnMut(&Mapping, u64, std::ops::Range<usize>),
    ) -> Result<(), MemoryError> {
        let len = len as u64;
        if len > 0 && addr.checked_add(len - 1).is_none() {
            return Err(MemoryError::Overflow { addr, len });
        }
        let mut done = 0;
        while done < len {
            let mut copy = |mapping: &Mapping, offset, here: u64| {
                // Parts of `len`, which came from a usize.
                act(mapping, offset, done as usize..(done + here) as usize);
            };
            done += self.piece(generation, addr + done, len - done, access, &mut copy)?;
        }
        Ok(())
    }
}

/// Access to the driver's memory until the driver resets the device.
#[derive(Debug)]
pub struct Session<S> {
    iotlb: Arc<Iotlb<S>>,
    generation: u64,
}

impl<S: Source> Session<S> {
    /// Whether the driver has not reset the device since.
    #[must_use]
    pub fn is_open(&self) -> bool {
        self.iotlb.shared().generation == self.generation
    }
}

impl<S> Clone for Session<S> {
    fn clone(&self) -> Self {
        Self {
            iotlb: Arc::clone(&self.iotlb),
            generation: self.generation,
        }
    }
}

impl<S: Source> Memory for Session<S> {
    fn read(&self, addr: u64, into: &mut [u8]) -> Result<(), MemoryError> {
        let (generation, len) = (self.generation, into.len());
        let copy = |mapping: &Mapping, offset, part| mapping.read(offset, &mut into[part]);
        self.iotlb.pieces(generation, addr, len, Access::Read, copy)
    }

    fn write(&self, addr: u64, from: &[u8]) -> Result<(), MemoryError> {
        let (generation, len) = (self.generation, from.len());
        let copy = |mapping: &Mapping, offset, part| mapping.write(offset, &from[part]);
        self.iotlb
            .pieces(generation, addr, len, Access::Write, copy)
    }

    fn load(&self, addr: u64) -> Result<u16, MemoryError> {
        let mut value = None;
        let act = &mut |mapping: &Mapping, offset, here| {
            value = (here == 2).then(|| mapping.load(offset)).flatten();
        };
        self.iotlb
            .piece(self.generation, addr, 2, Access::Read, act)?;
        value.ok_or(MemoryError::Misaligned { addr })
    }

    fn store(&self, addr: u64, value: u16) -> Result<(), MemoryError> {
        let mut done = None;
        let act = &mut |mapping: &Mapping, offset, here| {
            done = (here == 2).then(|| mapping.store(offset, value)).flatten();
        };
        self.iotlb
            .piece(self.generation, addr, 2, Access::Write, act)?;
        done.ok_or(MemoryError::Misaligned { addr })
    }
}

#[cfg(test)]
mod tests;
