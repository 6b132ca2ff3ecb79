//! Features (section 5.21).

use super::command::Command;
use super::spec::{ALL_NAMESPACES, Status};

/// The temperature that is reported, and the one that the driver is warned at, in kelvins.
pub(super) const TEMPERATURE: u16 = 313;
pub(super) const WARNING: u16 = 343;

mod id {
    pub(super) const ARBITRATION: u8 = 0x01;
    pub(super) const POWER: u8 = 0x02;
    pub(super) const TEMPERATURE: u8 = 0x04;
    pub(super) const ERROR_RECOVERY: u8 = 0x05;
    pub(super) const WRITE_CACHE: u8 = 0x06;
    pub(super) const QUEUES: u8 = 0x07;
    pub(super) const COALESCING: u8 = 0x08;
    pub(super) const VECTOR: u8 = 0x09;
    pub(super) const ATOMICITY: u8 = 0x0a;
    pub(super) const EVENTS: u8 = 0x0b;
}

/// What the controller was told to do in what way.
#[derive(Debug, Clone)]
pub(super) struct Features {
    arbitration: u32,
    over: u16,
    under: u16,
    error_recovery: u32,
    write_cache: bool,
    /// I/O queues that there can be, and that the driver asked for, each less one.
    max_queues: u16,
    queues: [u16; 2],
    coalescing: u32,
    /// Interrupt vectors that are not coalesced.
    at_once: Vec<bool>,
    atomicity: u32,
    events: u32,
}

/// What remains to be done about a feature that was set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Set {
    /// Nothing: dword 0 of the answer.
    Done(u32),
    /// The write cache is used, or not.
    WriteCache(bool),
    /// The temperature may have passed a threshold.
    Temperature,
}

impl Features {
    pub(super) fn new(queues: u16, vectors: u16) -> Self {
        let most = queues.saturating_sub(1);
        Self {
            arbitration: 0,
            over: WARNING,
            under: 0,
            error_recovery: 0,
            write_cache: true,
            max_queues: most,
            queues: [most; 2],
            coalescing: 0,
            at_once: vec![false; vectors.into()],
            atomicity: 0,
            events: 0,
        }
    }

    /// A reset: all are as they were at first.
    pub(super) fn reset(&mut self) {
        let vectors = u16::try_from(self.at_once.len()).unwrap_or(u16::MAX);
        *self = Self::new(self.max_queues.saturating_add(1), vectors);
    }

    /// Get Features: dword 0 of the answer.
    pub(super) fn get(&self, command: &Command) -> Result<u32, Status> {
        let (feature, dword) = ((command.dword(10) & 0xff) as u8, command.dword(11));
        match command.dword(10) >> 8 & 7 {
            0 => self.value(feature, dword),
            // Default; saved, which is the same.
            1 | 2 => {
                let mut fresh = self.clone();
                fresh.reset();
                fresh.value(feature, dword)
            }
            // Capabilities: changeable, but neither saved nor the namespace's.
            3 => {
                self.value(feature, dword)?;
                Ok(4)
            }
            _ => Err(Status::INVALID_FIELD),
        }
    }

    fn value(&self, feature: u8, dword: u32) -> Result<u32, Status> {
        Ok(match feature {
            id::ARBITRATION => self.arbitration,
            id::POWER => 0,
            id::TEMPERATURE => match threshold(dword)? {
                Threshold::Over => self.over.into(),
                Threshold::Under => self.under.into(),
            },
            id::ERROR_RECOVERY => self.error_recovery,
            id::WRITE_CACHE => self.write_cache.into(),
            id::QUEUES => self.queues_result(),
            id::COALESCING => self.coalescing,
            id::VECTOR => {
                let vector = (dword & 0xffff) as usize;
                let at_once = self.at_once.get(vector).ok_or(Status::INVALID_FIELD)?;
                vector as u32 | u32::from(*at_once) << 16
            }
            id::ATOMICITY => self.atomicity,
            id::EVENTS => self.events,
            _ => return Err(Status::INVALID_FIELD),
        })
    }

    fn queues_result(&self) -> u32 {
        u32::from(self.queues[0]) | u32::from(self.queues[1]) << 16
    }

    /// Set Features. `has_queues`: there are I/O queues.
    pub(super) fn set(&mut self, command: &Command, has_queues: bool) -> Result<Set, Status> {
        let (feature, dword) = ((command.dword(10) & 0xff) as u8, command.dword(11));
        // What there is not cannot be saved either.
        if !matches!(feature, id::VECTOR | id::TEMPERATURE) {
            self.value(feature, 0)?;
        }
        if command.dword(10) >> 31 != 0 {
            return Err(Status::NOT_SAVEABLE);
        }
        if !matches!(command.nsid, 0 | ALL_NAMESPACES) {
            return Err(Status::NOT_PER_NAMESPACE);
        }
        match feature {
            id::ARBITRATION => self.arbitration = dword & 0xffff_ff07,
            // One power state.
            id::POWER if dword & 0x1f != 0 => return Err(Status::INVALID_FIELD),
            id::POWER => {}
            id::TEMPERATURE => {
                let value = (dword & 0xffff) as u16;
                match threshold(dword)? {
                    Threshold::Over => self.over = value,
                    Threshold::Under => self.under = value,
                }
                return Ok(Set::Temperature);
            }
            id::ERROR_RECOVERY => {
                // Deallocated blocks are never reported as errors.
                if dword >> 16 & 1 != 0 {
                    return Err(Status::INVALID_FIELD);
                }
                self.error_recovery = dword & 0xffff;
            }
            id::WRITE_CACHE => {
                self.write_cache = dword & 1 != 0;
                return Ok(Set::WriteCache(self.write_cache));
            }
            id::QUEUES => {
                let asked = [(dword & 0xffff) as u16, (dword >> 16) as u16];
                if asked.contains(&0xffff) {
                    return Err(Status::INVALID_FIELD);
                }
                if has_queues {
                    return Err(Status::SEQUENCE);
                }
                self.queues = asked.map(|asked| asked.min(self.max_queues));
                return Ok(Set::Done(self.queues_result()));
            }
            id::COALESCING => self.coalescing = dword & 0xffff,
            id::VECTOR => {
                let vector = (dword & 0xffff) as usize;
                let at_once = self.at_once.get_mut(vector);
                *at_once.ok_or(Status::INVALID_FIELD)? = dword >> 16 & 1 != 0;
            }
            id::ATOMICITY => self.atomicity = dword & 1,
            id::EVENTS => self.events = dword & 0x11f,
            _ => return Err(Status::INVALID_FIELD),
        }
        Ok(Set::Done(0))
    }

    /// Most I/O submission, or completion, queues that the driver may make.
    pub(super) fn sqs(&self) -> u16 {
        self.queues[0].saturating_add(1)
    }

    pub(super) fn cqs(&self) -> u16 {
        self.queues[1].saturating_add(1)
    }

    /// Whether the temperature is beyond a threshold.
    pub(super) fn is_hot_or_cold(&self) -> bool {
        TEMPERATURE >= self.over || TEMPERATURE <= self.under
    }

    /// Whether the driver wants to hear of that, and of changes of the namespace.
    pub(super) fn tells_temperature(&self) -> bool {
        self.events & 1 << 1 != 0
    }

    pub(super) fn tells_namespace(&self) -> bool {
        self.events & 1 << 8 != 0
    }
}

enum Threshold {
    Over,
    Under,
}

/// Which threshold: of the one temperature that there is, or of all.
fn threshold(dword: u32) -> Result<Threshold, Status> {
    if !matches!(dword >> 16 & 0xf, 0 | 0xf) {
        return Err(Status::INVALID_FIELD);
    }
    match dword >> 20 & 3 {
        0 => Ok(Threshold::Over),
        1 => Ok(Threshold::Under),
        _ => Err(Status::INVALID_FIELD),
    }
}
