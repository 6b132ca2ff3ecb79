//! A server that dies between any two writes, of memory and of the log.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use ioregion_devices::virtio::{Memory, MemoryError, QueueLog, Words};

use super::Flat;

/// How many more writes the server makes; it dies before the next one.
#[derive(Debug)]
pub struct Life(AtomicU64);

impl Life {
    pub const LONG: u64 = 1 << 40;

    pub fn set(&self, writes: u64) {
        self.0.store(writes, Ordering::Relaxed);
    }

    /// Whether a write is still made.
    fn write(&self) -> bool {
        let less = |left: u64| left.checked_sub(1);
        let relaxed = Ordering::Relaxed;
        self.0.fetch_update(relaxed, relaxed, less).is_ok()
    }

    pub fn left(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// The driver's memory as the server writes it: byte by byte, as long as it lives.
pub struct Mortal<'a> {
    pub memory: &'a Flat,
    pub life: &'a Life,
}

impl Memory for Mortal<'_> {
    fn read(&self, addr: u64, into: &mut [u8]) -> Result<(), MemoryError> {
        self.memory.read(addr, into)
    }

    fn write(&self, addr: u64, from: &[u8]) -> Result<(), MemoryError> {
        for (at, byte) in (addr..).zip(from) {
            if self.life.write() {
                self.memory.write(at, &[*byte])?;
            }
        }
        Ok(())
    }

    fn load(&self, addr: u64) -> Result<u16, MemoryError> {
        self.memory.load(addr)
    }

    fn store(&self, addr: u64, value: u16) -> Result<(), MemoryError> {
        match self.life.write() {
            true => self.memory.store(addr, value),
            false => Ok(()),
        }
    }
}

/// The log's file.
pub struct Paper {
    pub words: Vec<AtomicU64>,
    life: Arc<Life>,
}

impl Words for Paper {
    fn load(&self, at: usize) -> u64 {
        self.words[at].load(Ordering::Relaxed)
    }

    fn store(&self, at: usize, value: u64) {
        if self.life.write() {
            self.words[at].store(value, Ordering::Relaxed);
        }
    }
}

/// A log that has room for a queue of `room` descriptors.
pub fn paper(room: u16) -> (Arc<Paper>, Arc<Life>) {
    let life = Arc::new(Life(AtomicU64::new(Life::LONG)));
    // What was there before means nothing: not zeroes. The first word says that nothing counts.
    let mut words: Vec<_> = (0..QueueLog::words_for(room))
        .map(|_| AtomicU64::new(u64::MAX))
        .collect();
    words[0] = AtomicU64::new(0);
    let life_too = Arc::clone(&life);
    (
        Arc::new(Paper {
            words,
            life: life_too,
        }),
        life,
    )
}
