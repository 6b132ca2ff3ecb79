//! The split format: descriptors, available ring and used ring.

use std::collections::VecDeque;
use std::sync::atomic::{Ordering, fence};

use super::chain::{Builder, Chain};
use super::log::{Journal, LogError, Place, QueueLog, Ring};
use super::queue::{Broken, Descriptor, InFlight, Layout, Position, Setup, check_part, read_table};
use crate::memory::Memory;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// Available ring: the driver wants no interrupts.
const NO_INTERRUPT: u16 = 1;
/// Used ring: the device wants no notifications.
const NO_NOTIFY: u16 = 1;

/// Offset of the index in both rings, behind the flags.
const INDEX: u64 = 2;
/// Offset of the entries in both rings.
const ENTRIES: u64 = 4;

#[derive(Debug)]
pub(super) struct Split {
    layout: Layout,
    indirect: bool,
    event_idx: bool,
    next_avail: u16,
    next_used: u16,
    /// Whether the driver cannot see `next_used` yet.
    is_staged: bool,
    /// The used index when the driver was last looked at.
    notified: u16,
    pub(super) in_flight: InFlight,
    /// Requests in flight that nobody has taken since the queue was taken up.
    again: VecDeque<u16>,
}

/// The used ring; its places are its indices.
struct Used(u16);

impl Ring for Used {
    fn behind(&self, place: Place, _descriptors: u16) -> Place {
        place.wrapping_add(1)
    }

    fn is_used(&self, place: Place) -> Result<bool, Broken> {
        Ok(self.0 == place.wrapping_add(1))
    }

    fn has(&self, _place: Place) -> bool {
        true
    }
}

impl Split {
    pub(super) fn new(memory: &dyn Memory, setup: &Setup, at: Position) -> Result<Self, Broken> {
        let layout = setup.layout;
        check_layout(&layout)?;
        let Position::Split { avail } = at else {
            return Err(Broken::Position(at));
        };
        let used = memory.load(layout.device + INDEX)?;
        // Requests between the two were taken before and never given back.
        if avail.wrapping_sub(used) > layout.size {
            return Err(Broken::Position(at));
        }
        Ok(Self::at(setup, avail, used, InFlight::new(layout.size)))
    }

    /// A queue that stands between two indices.
    fn at(setup: &Setup, next_avail: u16, next_used: u16, in_flight: InFlight) -> Self {
        Self {
            layout: setup.layout,
            indirect: setup.indirect,
            event_idx: setup.event_idx,
            next_avail,
            next_used,
            is_staged: false,
            notified: next_used,
            in_flight,
            again: VecDeque::new(),
        }
    }

    pub(super) fn record(&mut self, log: QueueLog, setup: &Setup) -> Result<(), Broken> {
        let gone = self.next_avail.wrapping_sub(self.next_used);
        self.in_flight.journal = Some(Journal::begin(log, setup, self.next_used, gone)?);
        Ok(())
    }

    pub(super) fn resume(
        memory: &dyn Memory,
        setup: &Setup,
        log: QueueLog,
    ) -> Result<Self, Broken> {
        let layout = setup.layout;
        check_layout(&layout)?;
        let used = memory.load(layout.device + INDEX)?;
        let (journal, record) = Journal::resume(log, setup, &Used(used))?;
        if record.place != used {
            return Err(LogError::Place(record.place.into()).into());
        }
        let again: VecDeque<u16> = record.lost.iter().map(|lost| lost.id).collect();
        let in_flight = InFlight::with(layout.size, again.iter().copied(), journal);
        // All that were taken were given back, are in flight, or are gone.
        let next_avail = used.wrapping_add(in_flight.count).wrapping_add(record.gone);
        Ok(Self {
            again,
            ..Self::at(setup, next_avail, used, in_flight)
        })
    }

    pub(super) fn position(&self) -> Position {
        Position::Split {
            avail: self.next_avail,
        }
    }

    /// How many requests wait.
    fn waiting(&self, memory: &dyn Memory) -> Result<u16, Broken> {
        let to = memory.load(self.layout.driver + INDEX)?;
        let waiting = to.wrapping_sub(self.next_avail);
        if waiting > self.layout.size {
            return Err(Broken::IndexJump {
                from: self.next_avail,
                to,
                size: self.layout.size,
            });
        }
        Ok(waiting)
    }

    pub(super) fn pop(&mut self, memory: &dyn Memory) -> Result<Option<Chain>, Broken> {
        if let Some(&head) = self.again.front() {
            let chain = self.walk(memory, head)?;
            self.again.pop_front();
            return Ok(Some(chain));
        }
        if self.waiting(memory)? == 0 {
            return Ok(None);
        }
        let slot = u64::from(self.next_avail % self.layout.size);
        let head = memory.load(self.layout.driver + ENTRIES + 2 * slot)?;
        self.in_flight.check(head)?;
        let chain = self.walk(memory, head)?;
        self.in_flight.take(head, &[]);
        self.next_avail = self.next_avail.wrapping_add(1);
        Ok(Some(chain))
    }

    fn walk(&self, memory: &dyn Memory, head: u16) -> Result<Chain, Broken> {
        let mut chain = Builder::default();
        let mut index = head;
        for _ in 0..self.layout.size {
            if index >= self.layout.size {
                return Err(Broken::NoSuchDescriptor {
                    index,
                    size: self.layout.size,
                });
            }
            let addr = self.layout.descriptors + u64::from(index) * Descriptor::BYTES;
            let descriptor = Descriptor::read(memory, addr)?;
            let flags = descriptor.at12;
            if flags & INDIRECT != 0 {
                if !self.indirect {
                    return Err(Broken::IndirectNotNegotiated);
                }
                if flags & NEXT != 0 {
                    return Err(Broken::IndirectMisplaced);
                }
                let table = read_table(memory, descriptor.addr, descriptor.len)?;
                walk_table(&mut chain, &table)?;
                return Ok(chain.finish(head, 1));
            }
            chain.add(descriptor.addr, descriptor.len, flags & WRITE != 0)?;
            if flags & NEXT == 0 {
                return Ok(chain.finish(head, 1));
            }
            index = descriptor.at14;
        }
        Err(Broken::Loop)
    }

    /// Gives a request back, which the driver sees after [`publish`](Self::publish).
    pub(super) fn stage(
        &mut self,
        memory: &dyn Memory,
        chain: &Chain,
        written: u32,
    ) -> Result<(), Broken> {
        let slot = u64::from(self.next_used % self.layout.size);
        let mut entry = [0; 8];
        entry[..4].copy_from_slice(&u32::from(chain.id).to_le_bytes());
        entry[4..].copy_from_slice(&written.to_le_bytes());
        memory.write(self.layout.device + ENTRIES + 8 * slot, &entry)?;
        self.in_flight.giving(chain.id, self.next_used);
        self.next_used = self.next_used.wrapping_add(1);
        self.is_staged = true;
        // A record knows of one request that is being given back.
        if self.in_flight.journal.is_some() {
            self.publish(memory)?;
        }
        self.in_flight.given(chain.id, self.next_used);
        Ok(())
    }

    pub(super) fn publish(&mut self, memory: &dyn Memory) -> Result<(), Broken> {
        if std::mem::take(&mut self.is_staged) {
            // From here on the driver may use the names again.
            memory.store(self.layout.device + INDEX, self.next_used)?;
        }
        Ok(())
    }

    pub(super) fn must_notify(&mut self, memory: &dyn Memory) -> Result<bool, Broken> {
        let (old, new) = (self.notified, self.next_used);
        self.notified = new;
        if old == new {
            return Ok(false);
        }
        // The driver first says what it waits for and then looks at the used index.
        fence(Ordering::SeqCst);
        if !self.event_idx {
            return Ok(memory.load(self.layout.driver)? & NO_INTERRUPT == 0);
        }
        let event = memory.load(self.used_event())?;
        Ok(new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old))
    }

    pub(super) fn disable_kicks(&mut self, memory: &dyn Memory) -> Result<(), Broken> {
        // With event indices it is enough not to move the one that the driver has passed.
        if !self.event_idx {
            memory.store(self.layout.device, NO_NOTIFY)?;
        }
        Ok(())
    }

    pub(super) fn enable_kicks(&mut self, memory: &dyn Memory) -> Result<bool, Broken> {
        if self.event_idx {
            memory.store(self.avail_event(), self.next_avail)?;
        } else {
            memory.store(self.layout.device, 0)?;
        }
        // The driver first makes requests available and then looks at what the device waits for.
        fence(Ordering::SeqCst);
        Ok(!self.again.is_empty() || self.waiting(memory)? > 0)
    }

    fn used_event(&self) -> u64 {
        self.layout.driver + ENTRIES + 2 * u64::from(self.layout.size)
    }

    fn avail_event(&self) -> u64 {
        self.layout.device + ENTRIES + 8 * u64::from(self.layout.size)
    }
}

fn check_layout(layout: &Layout) -> Result<(), Broken> {
    let size = u64::from(layout.size);
    if !layout.size.is_power_of_two() {
        return Err(Broken::Size(layout.size));
    }
    check_part(layout.descriptors, size * Descriptor::BYTES, 16)?;
    // Both rings end with the index of the event that the other side waits for.
    check_part(layout.driver, ENTRIES + 2 * size + 2, 2)?;
    check_part(layout.device, ENTRIES + 8 * size + 2, 4)
}

/// Follows the links within an indirect table.
fn walk_table(chain: &mut Builder, table: &[Descriptor]) -> Result<(), Broken> {
    chain.reserve(table.len());
    let mut index = 0;
    for _ in 0..table.len() {
        let Some(descriptor) = table.get(usize::from(index)) else {
            return Err(Broken::NoSuchDescriptor {
                index,
                size: u16::try_from(table.len()).unwrap_or(u16::MAX),
            });
        };
        let flags = descriptor.at12;
        if flags & INDIRECT != 0 {
            return Err(Broken::IndirectMisplaced);
        }
        chain.add(descriptor.addr, descriptor.len, flags & WRITE != 0)?;
        if flags & NEXT == 0 {
            return Ok(());
        }
        index = descriptor.at14;
    }
    Err(Broken::Loop)
}
