//! Submission and completion queues (section 4.1), and doorbells in memory (section 7.13).

use std::sync::atomic::{Ordering, fence};

use super::spec::{CQE, SQE, Status};
use crate::memory::{Memory, MemoryError};

/// A doorbell was given a value that it cannot have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct BadValue(pub(super) u64);

/// Why a queue cannot be used further.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum Broken {
    /// It is not in memory.
    #[error("the queue's memory: {0}")]
    Memory(#[from] MemoryError),
    /// A doorbell without a value, and none in memory.
    #[error("a doorbell rang without its value, which this controller needs")]
    NoValue,
}

/// A doorbell in memory, and the value at which the driver rings the one in the register.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Shadow {
    pub(super) doorbell: u64,
    pub(super) event: u64,
}

impl Shadow {
    fn load(self, memory: &dyn Memory) -> Result<u64, MemoryError> {
        let low = memory.load(self.doorbell)?;
        let high = memory.load(self.doorbell + 2)?;
        Ok(u64::from(low) | u64::from(high) << 16)
    }

    fn ring_at(self, memory: &dyn Memory, value: u16) -> Result<(), MemoryError> {
        memory.store(self.event, value)
    }

    /// Both are where the register's doorbell stands, whatever was there before.
    fn begin(self, memory: &dyn Memory, value: u16) -> Result<(), MemoryError> {
        for at in [self.doorbell, self.event] {
            memory.store(at, value)?;
            memory.store(at + 2, 0)?;
        }
        Ok(())
    }
}

/// A queue's place: `size` entries, at most 65536 (2.. by the caller).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) base: u64,
    pub(super) size: u32,
}

impl Place {
    fn next(self, index: u32) -> u32 {
        if index + 1 == self.size { 0 } else { index + 1 }
    }

    /// Steps from one index to another.
    fn distance(self, from: u32, to: u32) -> u32 {
        if to >= from {
            to - from
        } else {
            self.size - from + to
        }
    }

    fn at(self, index: u32, bytes: u64) -> Result<u64, MemoryError> {
        let offset = u64::from(index) * bytes;
        let addr = self.base.checked_add(offset);
        addr.ok_or(MemoryError::Overflow {
            addr: self.base,
            len: offset,
        })
    }

    /// An index that the driver wrote.
    fn index(self, value: u64) -> Result<u32, BadValue> {
        match u32::try_from(value) {
            Ok(index) if index < self.size => Ok(index),
            _ => Err(BadValue(value)),
        }
    }
}

/// A submission queue.
#[derive(Debug)]
pub(super) struct Sq {
    place: Place,
    head: u32,
    tail: u32,
    /// Where its commands are answered.
    pub(super) cq: u16,
    /// Bytes of a page of its commands' data.
    pub(super) page: u64,
    shadow: Option<Shadow>,
    /// Commands that are not answered.
    pub(super) under_way: u32,
    /// Who waits for commands under way; then it takes no more.
    pub(super) ended: Vec<u64>,
    /// Commands are not answered any more.
    pub(super) silent: bool,
}

impl Sq {
    pub(super) fn new(place: Place, cq: u16, page: u64) -> Self {
        Self {
            place,
            head: 0,
            tail: 0,
            cq,
            page,
            shadow: None,
            under_way: 0,
            ended: Vec::new(),
            silent: false,
        }
    }

    /// The index of the entry that is taken next.
    pub(super) fn head(&self) -> u16 {
        // Sizes are of 16 bits.
        self.head as u16
    }

    /// Whether it takes commands.
    pub(super) fn is_open(&self) -> bool {
        self.ended.is_empty() && !self.silent
    }

    /// From now on its doorbell is in memory, too.
    pub(super) fn set_shadow(
        &mut self,
        memory: &dyn Memory,
        shadow: Shadow,
    ) -> Result<(), MemoryError> {
        shadow.begin(memory, self.tail as u16)?;
        self.shadow = Some(shadow);
        Ok(())
    }

    /// The driver rang. Of a queue with a doorbell in memory the value does not count: it may be
    /// older than what is there.
    pub(super) fn ring(&mut self, value: Option<u64>) -> Result<Result<(), BadValue>, Broken> {
        match (value, self.shadow) {
            (_, Some(_)) => Ok(Ok(())),
            (Some(value), None) => Ok(self.set_tail(value)),
            (None, None) => Err(Broken::NoValue),
        }
    }

    fn set_tail(&mut self, value: u64) -> Result<(), BadValue> {
        self.tail = self.place.index(value)?;
        Ok(())
    }

    /// Whether there is a command. Where there is none, the driver rings for the next one.
    pub(super) fn look(&mut self, memory: &dyn Memory) -> Result<Result<bool, BadValue>, Broken> {
        if self.head != self.tail {
            return Ok(Ok(true));
        }
        let Some(shadow) = self.shadow else {
            return Ok(Ok(false));
        };
        for last in [false, true] {
            if let Err(bad) = self.set_tail(shadow.load(memory)?) {
                return Ok(Err(bad));
            }
            if self.head != self.tail {
                return Ok(Ok(true));
            }
            if !last {
                shadow.ring_at(memory, self.head())?;
                // What the driver wrote before it could see this is seen in the second round.
                fence(Ordering::SeqCst);
            }
        }
        Ok(Ok(false))
    }

    /// Takes the entry at the head; there is one.
    pub(super) fn take(&mut self, memory: &dyn Memory) -> Result<[u8; SQE as usize], Broken> {
        let mut entry = [0; SQE as usize];
        memory.read(self.place.at(self.head, SQE)?, &mut entry)?;
        self.head = self.place.next(self.head);
        self.under_way += 1;
        Ok(entry)
    }
}

/// An answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Entry {
    /// Dword 0.
    pub(super) result: u32,
    /// Head of the submission queue, and which it is.
    pub(super) sq_head: u16,
    pub(super) sq: u16,
    /// The command's name.
    pub(super) command: u16,
    pub(super) status: Status,
}

/// A completion queue.
#[derive(Debug)]
pub(super) struct Cq {
    place: Place,
    head: u32,
    tail: u32,
    phase: bool,
    /// The interrupt, if it has one.
    pub(super) vector: Option<u16>,
    shadow: Option<Shadow>,
    /// Entries that commands under way will take.
    reserved: u32,
    /// Submission queues that use it.
    pub(super) users: u32,
    /// A submission queue waits for room.
    stalled: bool,
}

impl Cq {
    pub(super) fn new(place: Place, vector: Option<u16>) -> Self {
        Self {
            place,
            head: 0,
            tail: 0,
            phase: true,
            vector,
            shadow: None,
            reserved: 0,
            users: 0,
            stalled: false,
        }
    }

    pub(super) fn head(&self) -> u16 {
        // Sizes are of 16 bits.
        self.head as u16
    }

    /// From now on its doorbell is in memory, too.
    pub(super) fn set_shadow(
        &mut self,
        memory: &dyn Memory,
        shadow: Shadow,
    ) -> Result<(), MemoryError> {
        shadow.begin(memory, self.head())?;
        self.shadow = Some(shadow);
        Ok(())
    }

    fn is_full(&self) -> bool {
        let used = self.place.distance(self.head, self.tail);
        used + self.reserved >= self.place.size - 1
    }

    /// The driver rang: whether somebody waited for that. As of [`Sq::ring`], memory counts.
    pub(super) fn ring(
        &mut self,
        memory: &dyn Memory,
        value: Option<u64>,
    ) -> Result<Result<bool, BadValue>, Broken> {
        let value = match (self.shadow, value) {
            (Some(shadow), _) => shadow.load(memory)?,
            (None, Some(value)) => value,
            (None, None) => return Err(Broken::NoValue),
        };
        Ok(self
            .set_head(value)
            .map(|()| std::mem::take(&mut self.stalled)))
    }

    fn set_head(&mut self, value: u64) -> Result<(), BadValue> {
        let head = self.place.index(value)?;
        let used = self.place.distance(self.head, self.tail);
        // Not past what was posted.
        if self.place.distance(self.head, head) > used {
            return Err(BadValue(value));
        }
        self.head = head;
        Ok(())
    }

    /// Keeps room for the answer of a command. Where there is none, [`ring`](Self::ring) says
    /// when to try again.
    pub(super) fn reserve(
        &mut self,
        memory: &dyn Memory,
    ) -> Result<Result<bool, BadValue>, Broken> {
        for last in [false, true] {
            if !self.is_full() {
                self.reserved += 1;
                return Ok(Ok(true));
            }
            let Some(shadow) = self.shadow else { break };
            if last {
                shadow.ring_at(memory, self.head())?;
                fence(Ordering::SeqCst);
            }
            if let Err(bad) = self.set_head(shadow.load(memory)?) {
                return Ok(Err(bad));
            }
        }
        if !self.is_full() {
            self.reserved += 1;
            return Ok(Ok(true));
        }
        self.stalled = true;
        Ok(Ok(false))
    }

    /// The command will not be answered.
    pub(super) fn release(&mut self) {
        self.reserved = self.reserved.saturating_sub(1);
    }

    /// Answers a command for which room was kept: the interrupt to raise.
    pub(super) fn post(
        &mut self,
        memory: &dyn Memory,
        entry: Entry,
    ) -> Result<Option<u16>, Broken> {
        let at = self.place.at(self.tail, CQE)?;
        let mut bytes = [0; 14];
        bytes[..4].copy_from_slice(&entry.result.to_le_bytes());
        bytes[8..10].copy_from_slice(&entry.sq_head.to_le_bytes());
        bytes[10..12].copy_from_slice(&entry.sq.to_le_bytes());
        bytes[12..].copy_from_slice(&entry.command.to_le_bytes());
        memory.write(at, &bytes)?;
        // Last and at once: the phase bit is what the driver looks at.
        memory.store(at + 14, entry.status.0 << 1 | u16::from(self.phase))?;
        self.release();
        self.tail = self.place.next(self.tail);
        self.phase ^= self.tail == 0;
        Ok(self.vector)
    }

    /// Where it has a doorbell in memory: looks how far the driver is, which need not ring until
    /// it has come round.
    pub(super) fn follow(&mut self, memory: &dyn Memory) -> Result<Result<(), BadValue>, Broken> {
        let Some(shadow) = self.shadow else {
            return Ok(Ok(()));
        };
        let before = self.head();
        if let Err(bad) = self.set_head(shadow.load(memory)?) {
            return Ok(Err(bad));
        }
        if self.head() != before && !self.stalled {
            shadow.ring_at(memory, before)?;
        }
        Ok(Ok(()))
    }
}

#[cfg(test)]
mod tests;
