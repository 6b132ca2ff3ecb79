//! The packed format: one ring in which both sides turn.

use std::collections::VecDeque;
use std::sync::atomic::{Ordering, fence};

use super::chain::{Builder, Chain};
use super::log::{self, Journal, LogError, Lost, QueueLog, Ring};
use super::queue::{Broken, Descriptor, InFlight, Layout, Position, Setup, check_part, read_table};
use crate::memory::Memory;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
const AVAIL: u16 = 1 << 7;
const USED: u16 = 1 << 15;

/// What a side wants to hear of: everything, nothing, or one descriptor.
const ENABLE: u16 = 0;
const DISABLE: u16 = 1;
const ONE: u16 = 2;

/// Offset of the flags in a descriptor.
const FLAGS: u64 = 14;
/// Offset of the flags in both event structures, behind the descriptor with its wrap counter.
const EVENT_FLAGS: u64 = 2;
/// The wrap counter in an event structure's descriptor.
const EVENT_WRAP: u16 = 1 << 15;

/// A place in the ring and the wrap counter that goes with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Place {
    index: u16,
    wrap: bool,
}

impl Place {
    fn from_word(word: u16) -> Self {
        Self {
            index: word & !EVENT_WRAP,
            wrap: word & EVENT_WRAP != 0,
        }
    }

    /// As in event structures: the wrap counter in bit 15.
    fn word(self) -> u16 {
        self.index | if self.wrap { EVENT_WRAP } else { 0 }
    }

    fn advance(&mut self, by: u16, size: u16) {
        // Sizes are at most 2^15 and steps at most a size.
        let next = self.index + by;
        if next >= size {
            self.index = next - size;
            self.wrap = !self.wrap;
        } else {
            self.index = next;
        }
    }

    /// Steps from one place to another, over the two turns after which places repeat.
    fn steps_to(self, to: Self, size: u16) -> u32 {
        let turn = u32::from(size);
        let number = |place: Self| u32::from(place.index) + if place.wrap { 0 } else { turn };
        (number(to) + 2 * turn - number(self)) % (2 * turn)
    }
}

#[derive(Debug)]
pub(super) struct Packed {
    layout: Layout,
    indirect: bool,
    event_idx: bool,
    avail: Place,
    used: Place,
    /// Where the flags of the first used descriptor that the driver cannot see yet belong, and
    /// they: the driver looks no further than there.
    staged: Option<(u64, u16)>,
    /// Descriptors that were used since the driver was last looked at.
    unnotified: u32,
    /// Descriptors of requests in flight.
    slots: u16,
    pub(super) in_flight: InFlight,
    /// Requests in flight that nobody has taken since the queue was taken up.
    again: VecDeque<Lost>,
}

/// The ring as its log knows it.
struct Turning<'a> {
    memory: &'a dyn Memory,
    layout: Layout,
}

impl Ring for Turning<'_> {
    fn behind(&self, place: log::Place, descriptors: u16) -> log::Place {
        let mut place = Place::from_word(place);
        place.advance(descriptors.min(self.layout.size), self.layout.size);
        place.word()
    }

    fn is_used(&self, place: log::Place) -> Result<bool, Broken> {
        // The driver has made the descriptor available in this turn. Once it is used, the driver
        // may have made it available again, for the next turn: that leaves this flag alone.
        let place = Place::from_word(place);
        let flags = self
            .memory
            .load(descriptor(&self.layout, place.index) + FLAGS)?;
        Ok((flags & USED != 0) == place.wrap)
    }

    fn has(&self, place: log::Place) -> bool {
        Place::from_word(place).index < self.layout.size
    }
}

impl Packed {
    pub(super) fn new(setup: &Setup, at: Position) -> Result<Self, Broken> {
        let layout = setup.layout;
        let size = layout.size;
        check_layout(&layout)?;
        let Position::Packed {
            avail_wrap,
            avail,
            used_wrap,
            used,
        } = at
        else {
            return Err(Broken::Position(at));
        };
        let place = |index, wrap| Place { index, wrap };
        let (avail, used) = (place(avail, avail_wrap), place(used, used_wrap));
        // Descriptors between the two were taken before and never given back.
        if avail.index >= size || used.index >= size || used.steps_to(avail, size) > u32::from(size)
        {
            return Err(Broken::Position(at));
        }
        let slots = u16::try_from(used.steps_to(avail, size)).unwrap_or(size);
        Ok(Self::at(setup, avail, used, slots, InFlight::new(size)))
    }

    /// A queue that stands between two places, with so many descriptors of requests in flight.
    fn at(setup: &Setup, avail: Place, used: Place, slots: u16, in_flight: InFlight) -> Self {
        Self {
            layout: setup.layout,
            indirect: setup.indirect,
            event_idx: setup.event_idx,
            avail,
            used,
            staged: None,
            unnotified: 0,
            slots,
            in_flight,
            again: VecDeque::new(),
        }
    }

    pub(super) fn record(&mut self, log: QueueLog, setup: &Setup) -> Result<(), Broken> {
        let journal = Journal::begin(log, setup, self.used.word(), self.slots)?;
        self.in_flight.journal = Some(journal);
        Ok(())
    }

    pub(super) fn resume(
        memory: &dyn Memory,
        setup: &Setup,
        log: QueueLog,
    ) -> Result<Self, Broken> {
        let layout = setup.layout;
        check_layout(&layout)?;
        let ring = Turning { memory, layout };
        let (journal, record) = Journal::resume(log, setup, &ring)?;
        // The log has checked that all fit.
        let taken: usize = record.lost.iter().map(|lost| lost.descriptors.len()).sum();
        let slots = record.gone + u16::try_from(taken).unwrap_or(layout.size);
        let used = Place::from_word(record.place);
        let mut avail = used;
        avail.advance(slots, layout.size);
        let ids = record.lost.iter().map(|lost| lost.id);
        let in_flight = InFlight::with(layout.size, ids, journal);
        Ok(Self {
            again: record.lost.into(),
            ..Self::at(setup, avail, used, slots, in_flight)
        })
    }

    pub(super) fn position(&self) -> Position {
        Position::Packed {
            avail_wrap: self.avail.wrap,
            avail: self.avail.index,
            used_wrap: self.used.wrap,
            used: self.used.index,
        }
    }

    /// Whether the next descriptor is available.
    fn is_available(&self, memory: &dyn Memory) -> Result<bool, Broken> {
        let flags = memory.load(descriptor(&self.layout, self.avail.index) + FLAGS)?;
        let (avail, used) = (flags & AVAIL != 0, flags & USED != 0);
        Ok(avail == self.avail.wrap && used != self.avail.wrap)
    }

    pub(super) fn pop(&mut self, memory: &dyn Memory) -> Result<Option<Chain>, Broken> {
        if let Some(lost) = self.again.front() {
            let chain = self.recall(memory, lost)?;
            self.again.pop_front();
            return Ok(Some(chain));
        }
        if !self.is_available(memory)? {
            return Ok(None);
        }
        let mut chain = Builder::default();
        let mut at = self.avail;
        let mut descriptors = Vec::new();
        // The driver makes the first descriptor of a request available after all others.
        for slots in 1..=self.layout.size - self.slots.min(self.layout.size) {
            let descriptor = Descriptor::read(memory, descriptor(&self.layout, at.index))?;
            at.advance(1, self.layout.size);
            if self.in_flight.journal.is_some() {
                descriptors.push(descriptor);
            }
            if self.add(memory, &mut chain, descriptor, slots)? {
                let id = descriptor.at12;
                self.in_flight.check(id)?;
                self.in_flight.take(id, &descriptors);
                self.avail = at;
                self.slots += slots;
                return Ok(Some(chain.finish(id, slots)));
            }
        }
        Err(Broken::Loop)
    }

    /// A request again, of whose descriptors the ring may hold nothing any more.
    fn recall(&self, memory: &dyn Memory, lost: &Lost) -> Result<Chain, Broken> {
        let mut chain = Builder::default();
        for (slots, &descriptor) in (1..).zip(&lost.descriptors) {
            let ends = self.add(memory, &mut chain, descriptor, slots)?;
            if ends != (usize::from(slots) == lost.descriptors.len()) {
                break;
            }
            if ends {
                return Ok(chain.finish(lost.id, slots));
            }
        }
        Err(LogError::Descriptors(lost.id).into())
    }

    /// Adds a descriptor to a request, its `slots`-th; whether it is the last one.
    fn add(
        &self,
        memory: &dyn Memory,
        chain: &mut Builder,
        descriptor: Descriptor,
        slots: u16,
    ) -> Result<bool, Broken> {
        let flags = descriptor.at14;
        if flags & INDIRECT == 0 {
            chain.add(descriptor.addr, descriptor.len, flags & WRITE != 0)?;
            return Ok(flags & NEXT == 0);
        }
        if !self.indirect {
            return Err(Broken::IndirectNotNegotiated);
        }
        if flags & NEXT != 0 || slots > 1 {
            return Err(Broken::IndirectMisplaced);
        }
        for entry in read_table(memory, descriptor.addr, descriptor.len)? {
            // Of the flags only `WRITE` may stand here; those that say whose turn it is mean
            // nothing.
            if entry.at14 & (INDIRECT | NEXT) != 0 {
                return Err(Broken::IndirectMisplaced);
            }
            chain.add(entry.addr, entry.len, entry.at14 & WRITE != 0)?;
        }
        Ok(true)
    }

    /// Gives a request back, which the driver sees after [`publish`](Self::publish).
    pub(super) fn stage(
        &mut self,
        memory: &dyn Memory,
        chain: &Chain,
        written: u32,
    ) -> Result<(), Broken> {
        let at = descriptor(&self.layout, self.used.index);
        let mut entry = [0; 6];
        entry[..4].copy_from_slice(&written.to_le_bytes());
        entry[4..].copy_from_slice(&chain.id.to_le_bytes());
        // Behind the address, which means nothing in a used descriptor.
        memory.write(at + 8, &entry)?;
        let mut flags = if written > 0 { WRITE } else { 0 };
        if self.used.wrap {
            flags |= AVAIL | USED;
        }
        self.in_flight.giving(chain.id, self.used.word());
        self.used.advance(chain.slots, self.layout.size);
        self.unnotified = self.unnotified.saturating_add(chain.slots.into());
        self.slots = self.slots.saturating_sub(chain.slots);
        match self.staged {
            None => self.staged = Some((at + FLAGS, flags)),
            Some(_) => memory.store(at + FLAGS, flags)?,
        }
        // A record knows of one request that is being given back.
        if self.in_flight.journal.is_some() {
            self.publish(memory)?;
        }
        self.in_flight.given(chain.id, self.used.word());
        Ok(())
    }

    pub(super) fn publish(&mut self, memory: &dyn Memory) -> Result<(), Broken> {
        if let Some((at, flags)) = self.staged.take() {
            // From here on the driver may use the names again.
            memory.store(at, flags)?;
        }
        Ok(())
    }

    pub(super) fn must_notify(&mut self, memory: &dyn Memory) -> Result<bool, Broken> {
        let passed = std::mem::take(&mut self.unnotified);
        if passed == 0 {
            return Ok(false);
        }
        // The driver first says what it waits for and then looks at the ring.
        fence(Ordering::SeqCst);
        let flags = memory.load(self.layout.driver + EVENT_FLAGS)? & 3;
        match flags {
            DISABLE => return Ok(false),
            ONE if self.event_idx => {}
            _ => return Ok(true),
        }
        let event = Place::from_word(memory.load(self.layout.driver)?);
        // A notification too many does no harm, one too few does: what makes no sense gets one.
        if event.index >= self.layout.size || passed >= 2 * u32::from(self.layout.size) {
            return Ok(true);
        }
        // Whether the event is one of the descriptors passed: how far behind it lies.
        let behind = event.steps_to(self.used, self.layout.size);
        Ok((1..=passed).contains(&behind))
    }

    pub(super) fn disable_kicks(&mut self, memory: &dyn Memory) -> Result<(), Broken> {
        memory.store(self.layout.device + EVENT_FLAGS, DISABLE)?;
        Ok(())
    }

    pub(super) fn enable_kicks(&mut self, memory: &dyn Memory) -> Result<bool, Broken> {
        if self.event_idx {
            memory.store(self.layout.device, self.avail.word())?;
            memory.store(self.layout.device + EVENT_FLAGS, ONE)?;
        } else {
            memory.store(self.layout.device + EVENT_FLAGS, ENABLE)?;
        }
        // The driver first makes requests available and then looks at what the device waits for.
        fence(Ordering::SeqCst);
        Ok(!self.again.is_empty() || self.is_available(memory)?)
    }
}

fn descriptor(layout: &Layout, index: u16) -> u64 {
    layout.descriptors + u64::from(index) * Descriptor::BYTES
}

fn check_layout(layout: &Layout) -> Result<(), Broken> {
    let bytes = u64::from(layout.size) * Descriptor::BYTES;
    check_part(layout.descriptors, bytes, 16)?;
    check_part(layout.driver, 4, 4)?;
    check_part(layout.device, 4, 4)
}
