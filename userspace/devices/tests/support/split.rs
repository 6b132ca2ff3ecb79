//! A driver of split queues.

use ioregion_devices::virtio::{Layout, Memory, Setup};

use super::{Driver, Range, TABLES, descriptor, put, u16_at, u32_at};

pub struct Split {
    layout: Layout,
    event_idx: bool,
    free: Vec<u16>,
    /// Descriptors of each request in flight.
    held: Vec<Vec<u16>>,
    avail: u16,
    used: u16,
    /// The available index at the last look at whether to kick.
    looked: u16,
}

impl Split {
    pub fn new(setup: &Setup) -> Self {
        let layout = setup.layout;
        Self {
            layout,
            event_idx: setup.event_idx,
            free: (0..layout.size).rev().collect(),
            held: vec![Vec::new(); layout.size.into()],
            avail: 0,
            used: 0,
            looked: 0,
        }
    }

    fn size(&self) -> u64 {
        self.layout.size.into()
    }
}

impl Driver for Split {
    fn add(&mut self, memory: &dyn Memory, ranges: &[Range], indirect: bool) -> Option<u16> {
        let needed = if indirect { 1 } else { ranges.len() };
        if self.free.len() < needed {
            return None;
        }
        let indices: Vec<u16> = (0..needed).filter_map(|_| self.free.pop()).collect();
        let head = indices[0];
        let link = |at: u64, names: &[u16]| {
            for (number, (range, name)) in ranges.iter().zip(names).enumerate() {
                let next = names.get(number + 1);
                let flags = u16::from(next.is_some()) | if range.2 { 2 } else { 0 };
                let at = at + u64::from(*name) * 16;
                descriptor(
                    memory,
                    at,
                    range.0,
                    range.1,
                    flags,
                    next.copied().unwrap_or(0),
                );
            }
        };
        if indirect {
            let table = TABLES + u64::from(head) * 256;
            let names: Vec<u16> = (0..16).take(ranges.len()).collect();
            link(table, &names);
            let len = 16 * u32::try_from(ranges.len()).unwrap();
            let at = self.layout.descriptors + u64::from(head) * 16;
            descriptor(memory, at, table, len, 4, 0);
        } else {
            link(self.layout.descriptors, &indices);
        }
        self.held[usize::from(head)] = indices;
        let slot = u64::from(self.avail) % self.size();
        put(
            memory,
            self.layout.driver + 4 + 2 * slot,
            &head.to_le_bytes(),
        );
        self.avail = self.avail.wrapping_add(1);
        memory.store(self.layout.driver + 2, self.avail).unwrap();
        Some(head)
    }

    fn collect(&mut self, memory: &dyn Memory) -> Vec<(u16, u32)> {
        let mut all = Vec::new();
        while self.used != u16_at(memory, self.layout.device + 2) {
            let slot = u64::from(self.used) % self.size();
            let at = self.layout.device + 4 + 8 * slot;
            let id = u16::try_from(u32_at(memory, at)).unwrap();
            let held = std::mem::take(&mut self.held[usize::from(id)]);
            assert!(!held.is_empty(), "request {id} came back twice");
            self.free.extend(held);
            all.push((id, u32_at(memory, at + 4)));
            self.used = self.used.wrapping_add(1);
        }
        all
    }

    fn arm(&mut self, memory: &dyn Memory, armed: bool) {
        if self.event_idx {
            // Disarmed: an event that has just passed.
            let event = if armed {
                self.used
            } else {
                self.used.wrapping_sub(1)
            };
            let at = self.layout.driver + 4 + 2 * self.size();
            memory.store(at, event).unwrap();
        } else {
            memory.store(self.layout.driver, u16::from(!armed)).unwrap();
        }
    }

    fn must_kick(&mut self, memory: &dyn Memory) -> bool {
        let (old, new) = (self.looked, self.avail);
        self.looked = new;
        if old == new {
            return false;
        }
        if !self.event_idx {
            return u16_at(memory, self.layout.device) & 1 == 0;
        }
        let event = u16_at(memory, self.layout.device + 4 + 8 * self.size());
        new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
    }
}
