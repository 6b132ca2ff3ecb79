//! Memory that the kernel can be handed.

use std::num::NonZeroUsize;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use ioregion_devices::virtio::{Access, Hold, Memory, MemoryError, Pin};
use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous, munmap};

use super::Flat;

/// Pins that have not been dropped.
#[derive(Debug, Default)]
pub struct Pins(AtomicUsize);

impl Pins {
    pub fn count(&self) -> usize {
        self.0.load(Ordering::SeqCst)
    }
}

impl Hold for Pins {
    fn intact(&self) -> bool {
        true
    }

    fn release(&self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Bytes from address [`Flat::BASE`] on, in a mapping of their own.
pub struct Mapped {
    start: NonNull<u8>,
    bytes: usize,
    pub pins: Arc<Pins>,
}

// SAFETY: The mapping is owned, belongs to no thread, and is accessed by volatile copies only.
unsafe impl Sync for Mapped {}
// SAFETY: As above.
unsafe impl Send for Mapped {}

impl Mapped {
    pub fn new(bytes: usize) -> Self {
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        let len = NonZeroUsize::new(bytes).unwrap();
        // SAFETY: A new mapping touches no other memory.
        let start = unsafe { mmap_anonymous(None, len, protection, MapFlags::MAP_PRIVATE) };
        Self {
            start: start.unwrap().cast(),
            bytes,
            pins: Arc::default(),
        }
    }

    fn at(&self, addr: u64, len: usize) -> Result<*mut u8, MemoryError> {
        let unmapped = MemoryError::Unmapped { addr };
        let start = addr.checked_sub(Flat::BASE).ok_or(unmapped)?;
        let start = usize::try_from(start).map_err(|_| unmapped)?;
        let end = start.checked_add(len).ok_or(unmapped)?;
        match end <= self.bytes {
            // SAFETY: Within the mapping.
            true => Ok(unsafe { self.start.as_ptr().add(start) }),
            false => Err(unmapped),
        }
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        assert_eq!(self.pins.count(), 0, "somebody still has the memory");
        // SAFETY: The mapping is ours, and nobody has it.
        unsafe { munmap(self.start.cast(), self.bytes) }.unwrap();
    }
}

impl Memory for Mapped {
    fn read(&self, addr: u64, into: &mut [u8]) -> Result<(), MemoryError> {
        let start = self.at(addr, into.len())?;
        for (offset, byte) in into.iter_mut().enumerate() {
            // SAFETY: Within the mapping (checked).
            *byte = unsafe { start.add(offset).read_volatile() };
        }
        Ok(())
    }

    fn write(&self, addr: u64, from: &[u8]) -> Result<(), MemoryError> {
        let start = self.at(addr, from.len())?;
        for (offset, byte) in from.iter().enumerate() {
            // SAFETY: Within the mapping (checked).
            unsafe { start.add(offset).write_volatile(*byte) };
        }
        Ok(())
    }

    fn load(&self, addr: u64) -> Result<u16, MemoryError> {
        let mut bytes = [0; 2];
        self.read(addr, &mut bytes)?;
        Ok(u16::from_le_bytes(bytes))
    }

    fn store(&self, addr: u64, value: u16) -> Result<(), MemoryError> {
        self.write(addr, &value.to_le_bytes())
    }

    fn pin(
        &self,
        ranges: &mut dyn Iterator<Item = (u64, usize)>,
        _access: Access,
    ) -> Result<Option<Pin>, MemoryError> {
        let mut pin = Pin::new();
        for (addr, len) in ranges {
            let start = self.at(addr, len)?;
            self.pins.0.fetch_add(1, Ordering::SeqCst);
            pin.keep(Arc::clone(&self.pins) as _);
            // SAFETY: The mapping stays while it is pinned (`drop` checks that), and all access
            // is volatile.
            unsafe { pin.add(start, len) };
        }
        Ok(Some(pin))
    }
}
