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
//!
//! Memory that is pinned ([`Memory::pin`]) is in the kernel's hands until the pin is dropped, so
//! taking it back waits for that, for as long as it is told. Storage that hangs can take longer.
//! Then ([`StillPinned`]) inaccessible memory is put in the place of the mapping, so that no copy
//! which the kernel makes later can reach the driver's memory. What remains is storage that was
//! given the pages themselves (direct I/O) and has not answered: whoever took the memory back has
//! to be told that it is not free, as with any disk that does not stop.

mod pinned;

use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::{Duration, Instant};

use ioregion_devices::virtio::{Access, MAX_RANGES, Memory, MemoryError, Pin};

use crate::sys::Mapping;
use pinned::Pinned;

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
    pinned: Arc<Pinned>,
}

/// A mapping that is no longer found, but was pinned when it was removed.
#[derive(Debug)]
struct Retired {
    first: u64,
    last: u64,
    pinned: Arc<Pinned>,
}

#[derive(Debug, Default)]
struct Table {
    /// By first address; they do not overlap.
    regions: BTreeMap<u64, Cached>,
    retired: Vec<Retired>,
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

    /// Removes the regions that overlap these addresses. Those that are pinned retire: nobody
    /// can find and pin them any more.
    fn remove(&mut self, first: u64, last: u64) {
        let retired = &mut self.retired;
        retired.retain(|retired| retired.pinned.is_pinned());
        self.regions.retain(|&start, cached| {
            let stays = cached.last < first || last < start;
            if !stays && cached.pinned.is_pinned() {
                retired.push(Retired {
                    first: start,
                    last: cached.last,
                    pinned: Arc::clone(&cached.pinned),
                });
            }
            stays
        });
    }

    /// What is still pinned at these addresses although it was removed.
    fn held(&self, first: u64, last: u64) -> Vec<Arc<Pinned>> {
        let held = self.retired.iter();
        let held = held.filter(|held| first <= held.last && held.first <= last);
        held.map(|held| Arc::clone(&held.pinned)).collect()
    }
}

/// Memory that was taken back while the kernel uses it, for longer than could be waited.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "requests to the device's files that have not ended hold {mappings} regions of the driver's \
     memory; the storage below hangs"
)]
pub struct StillPinned {
    /// How many regions.
    pub mappings: usize,
}

/// The mapped part of the driver's memory.
#[derive(Debug)]
pub struct Iotlb<S> {
    source: S,
    table: RwLock<Table>,
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
    ///
    /// # Errors
    ///
    /// What is still pinned after `limit`. No copy reaches it any more; direct I/O may.
    pub fn update(&self, first: u64, last: u64, limit: Duration) -> Result<(), StillPinned> {
        let until = Instant::now() + limit;
        let held = {
            let mut table = self.alone();
            table.epoch += 1;
            table.remove(first, last);
            table.held(first, last)
        };
        wait(&held, until)
    }

    /// Forgets everything and ends all sessions.
    ///
    /// # Errors
    ///
    /// As [`update`](Self::update). Sessions have ended in any case.
    pub fn close(&self, limit: Duration) -> Result<(), StillPinned> {
        let until = Instant::now() + limit;
        let held = {
            let mut table = self.alone();
            table.generation += 1;
            table.epoch += 1;
            table.remove(0, u64::MAX);
            table.held(0, u64::MAX)
        };
        wait(&held, until)
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
        act: &mut dyn FnMut(&Arc<Pinned>, u64, u64),
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
                act(&cached.pinned, addr - first, here);
                if !cached.pinned.mapping.vanished() {
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
            table.remove(first, last);
            let cached = Cached {
                last,
                read,
                write,
                pinned: Pinned::new(mapping),
            };
            table.regions.insert(first, cached);
        }
        Ok(())
    }

    /// Unmaps the region at an address, whose memory has vanished.
    fn forget(&self, addr: u64, epoch: u64) {
        let mut table = self.alone();
        if table.epoch == epoch {
            table.epoch += 1;
            table.remove(addr, addr);
        }
    }

    fn pieces(
        &self,
        generation: u64,
        addr: u64,
        len: usize,
        access: Access,
        mut act: impl FnMut(&Arc<Pinned>, u64, std::ops::Range<usize>),
    ) -> Result<(), MemoryError> {
        let len = len as u64;
        if len > 0 && addr.checked_add(len - 1).is_none() {
            return Err(MemoryError::Overflow { addr, len });
        }
        let mut done = 0;
        while done < len {
            let mut copy = |pinned: &Arc<Pinned>, offset, here: u64| {
                // Parts of `len`, which came from a usize.
                act(pinned, offset, done as usize..(done + here) as usize);
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
        let copy = |pinned: &Arc<Pinned>, offset, part| {
            pinned.mapping.read(offset, &mut into[part]);
        };
        self.iotlb.pieces(generation, addr, len, Access::Read, copy)
    }

    fn write(&self, addr: u64, from: &[u8]) -> Result<(), MemoryError> {
        let (generation, len) = (self.generation, from.len());
        let copy = |pinned: &Arc<Pinned>, offset, part| {
            pinned.mapping.write(offset, &from[part]);
        };
        self.iotlb
            .pieces(generation, addr, len, Access::Write, copy)
    }

    fn load(&self, addr: u64) -> Result<u16, MemoryError> {
        let mut value = None;
        let act = &mut |pinned: &Arc<Pinned>, offset, here| {
            value = (here == 2).then(|| pinned.mapping.load(offset)).flatten();
        };
        self.iotlb
            .piece(self.generation, addr, 2, Access::Read, act)?;
        value.ok_or(MemoryError::Misaligned { addr })
    }

    fn store(&self, addr: u64, value: u16) -> Result<(), MemoryError> {
        let mut done = None;
        let act = &mut |pinned: &Arc<Pinned>, offset, here| {
            let store = || pinned.mapping.store(offset, value);
            done = (here == 2).then(store).flatten();
        };
        self.iotlb
            .piece(self.generation, addr, 2, Access::Write, act)?;
        done.ok_or(MemoryError::Misaligned { addr })
    }

    fn pin(
        &self,
        ranges: &mut dyn Iterator<Item = (u64, usize)>,
        access: Access,
    ) -> Result<Option<Pin>, MemoryError> {
        let mut pin = Pin::with_room(ranges.size_hint().1.unwrap_or(0));
        // The region of the range before, and its first address. It is pinned, so that whoever
        // takes it back waits for all ranges in it: no need to look into the table for each.
        let mut last: Option<(u64, Arc<Pinned>)> = None;
        for (addr, len) in ranges {
            if let Some((first, pinned)) = &last
                && let Some(offset) = addr.checked_sub(*first)
                && pinned.mapping.has(offset, len)
            {
                let start = pinned.mapping.address(offset, len);
                // SAFETY: As below.
                unsafe { pin.add(start, len) };
            } else {
                let add = |pinned: &Arc<Pinned>, offset, part: std::ops::Range<usize>| {
                    pinned.pin();
                    pin.keep(Arc::clone(pinned) as _);
                    let start = pinned.mapping.address(offset, part.len());
                    // SAFETY: The mapping stays as long as the pin's share of it, and all access
                    // to it is by volatile and atomic copies.
                    unsafe { pin.add(start, part.len()) };
                    last = Some((addr + part.start as u64 - offset, Arc::clone(pinned)));
                };
                self.iotlb.pieces(self.generation, addr, len, access, add)?;
            }
            if pin.ranges().len() > MAX_RANGES {
                return Ok(None);
            }
        }
        Ok(Some(pin))
    }
}

/// Waits for mappings that were removed, and cuts those off that are in use at the end.
fn wait(held: &[Arc<Pinned>], until: Instant) -> Result<(), StillPinned> {
    let still: Vec<_> = held.iter().filter(|held| !held.wait(until)).collect();
    for held in &still {
        if let Err(error) = held.mapping.cut() {
            tracing::error!(%error, "memory that was taken back stays mapped");
        }
    }
    match still.len() {
        0 => Ok(()),
        mappings => Err(StillPinned { mappings }),
    }
}

#[cfg(test)]
mod tests;
