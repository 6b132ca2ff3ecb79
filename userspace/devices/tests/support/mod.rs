//! Memory and a driver for tests: the other side of the queues, written from the specification.
#![allow(dead_code, reason = "each test program uses a part")]

pub mod mapped;
pub mod mortal;
pub mod packed;
pub mod split;

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::sync::Mutex;

use ioregion_devices::virtio::{Format, Layout, Memory, MemoryError, Setup};

/// Bytes from address [`Flat::BASE`] on.
#[derive(Debug)]
pub struct Flat(Mutex<Vec<u8>>);

impl Flat {
    pub const BASE: u64 = 0x10_0000;

    pub fn new(bytes: usize) -> Self {
        Self(Mutex::new(vec![0; bytes]))
    }

    pub fn from_bytes(bytes: Vec<u8>) -> Self {
        Self(Mutex::new(bytes))
    }

    fn with<T>(
        &self,
        addr: u64,
        len: usize,
        act: impl FnOnce(&mut [u8]) -> T,
    ) -> Result<T, MemoryError> {
        let unmapped = MemoryError::Unmapped { addr };
        let mut bytes = self.0.lock().unwrap();
        let start = addr.checked_sub(Self::BASE).ok_or(unmapped)?;
        let start = usize::try_from(start).map_err(|_| unmapped)?;
        let end = start.checked_add(len).ok_or(unmapped)?;
        bytes.get_mut(start..end).map(act).ok_or(unmapped)
    }
}

/// The same in a file that driver and device share.
pub struct OnFile<'a>(pub &'a File);

impl Memory for OnFile<'_> {
    fn read(&self, addr: u64, into: &mut [u8]) -> Result<(), MemoryError> {
        self.0.read_exact_at(into, addr - Flat::BASE).unwrap();
        Ok(())
    }

    fn write(&self, addr: u64, from: &[u8]) -> Result<(), MemoryError> {
        self.0.write_all_at(from, addr - Flat::BASE).unwrap();
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
}

/// What drivers do with memory that is there.
pub fn u16_at(memory: &dyn Memory, addr: u64) -> u16 {
    memory.load(addr).unwrap()
}

pub fn u32_at(memory: &dyn Memory, addr: u64) -> u32 {
    let mut bytes = [0; 4];
    memory.read(addr, &mut bytes).unwrap();
    u32::from_le_bytes(bytes)
}

pub fn put(memory: &dyn Memory, addr: u64, bytes: &[u8]) {
    memory.write(addr, bytes).unwrap();
}

pub fn get(memory: &dyn Memory, addr: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    memory.read(addr, &mut bytes).unwrap();
    bytes
}

/// A descriptor of either format.
pub fn descriptor(memory: &dyn Memory, at: u64, addr: u64, len: u32, at12: u16, at14: u16) {
    let mut bytes = addr.to_le_bytes().to_vec();
    bytes.extend(len.to_le_bytes());
    bytes.extend(at12.to_le_bytes());
    put(memory, at, &bytes);
    // Last and at once: in packed rings it makes the descriptor available.
    memory.store(at + 14, at14).unwrap();
}

impl Memory for Flat {
    fn read(&self, addr: u64, into: &mut [u8]) -> Result<(), MemoryError> {
        self.with(addr, into.len(), |bytes| into.copy_from_slice(bytes))
    }

    fn write(&self, addr: u64, from: &[u8]) -> Result<(), MemoryError> {
        self.with(addr, from.len(), |bytes| bytes.copy_from_slice(from))
    }

    fn load(&self, addr: u64) -> Result<u16, MemoryError> {
        if !addr.is_multiple_of(2) {
            return Err(MemoryError::Misaligned { addr });
        }
        self.with(addr, 2, |bytes| u16::from_le_bytes([bytes[0], bytes[1]]))
    }

    fn store(&self, addr: u64, value: u16) -> Result<(), MemoryError> {
        if !addr.is_multiple_of(2) {
            return Err(MemoryError::Misaligned { addr });
        }
        self.with(addr, 2, |bytes| bytes.copy_from_slice(&value.to_le_bytes()))
    }
}

/// A range that a request describes; whether the device writes it.
pub type Range = (u64, u32, bool);

/// The driver's side of a queue.
pub trait Driver {
    /// Makes a request available: its name, or nothing where there is no room.
    fn add(&mut self, memory: &dyn Memory, ranges: &[Range], indirect: bool) -> Option<u16>;
    /// Takes what the device gave back: name and bytes written.
    fn collect(&mut self, memory: &dyn Memory) -> Vec<(u16, u32)>;
    /// Asks for a notification of what the device gives back next; or of nothing.
    fn arm(&mut self, memory: &dyn Memory, armed: bool);
    /// Whether the device wants to hear of what was added since the last call.
    fn must_kick(&mut self, memory: &dyn Memory) -> bool;
}

/// The driver of a queue at the start of memory.
pub fn driver(setup: &Setup) -> Box<dyn Driver> {
    match setup.format {
        Format::Split => Box::new(split::Split::new(setup)),
        Format::Packed => Box::new(packed::Packed::new(setup)),
    }
}

/// Where indirect tables lie: one of 16 descriptors for each request.
pub const TABLES: u64 = Flat::BASE + 0x8000;
/// Where requests' data lie.
pub const DATA: u64 = Flat::BASE + 0x10000;
/// Bytes of memory.
pub const BYTES: usize = 0x20000;

pub fn setup(format: Format, size: u16, event_idx: bool) -> Setup {
    Setup {
        format,
        layout: Layout {
            size,
            descriptors: Flat::BASE,
            driver: Flat::BASE + 0x4000,
            device: Flat::BASE + 0x6000,
        },
        indirect: true,
        event_idx,
    }
}
