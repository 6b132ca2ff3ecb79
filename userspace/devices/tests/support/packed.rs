//! A driver of packed queues.

use ioregion_devices::virtio::{Layout, Memory, Setup};

use super::{Driver, Range, TABLES, descriptor, u16_at, u32_at};

pub struct Packed {
    layout: Layout,
    event_idx: bool,
    names: Vec<u16>,
    /// Descriptors that each request in flight takes.
    held: Vec<u16>,
    free: u16,
    avail: (u16, bool),
    used: (u16, bool),
    /// Descriptors that were added since the last look at whether to kick.
    added: u16,
}

impl Packed {
    pub fn new(setup: &Setup) -> Self {
        let layout = setup.layout;
        Self {
            layout,
            event_idx: setup.event_idx,
            names: (0..layout.size).collect(),
            held: vec![0; layout.size.into()],
            free: layout.size,
            avail: (0, true),
            used: (0, true),
            added: 0,
        }
    }

    fn forward(&self, place: (u16, bool), by: u16) -> (u16, bool) {
        let next = place.0 + by;
        match next >= self.layout.size {
            true => (next - self.layout.size, !place.1),
            false => (next, place.1),
        }
    }

    fn event(place: (u16, bool)) -> u16 {
        place.0 | u16::from(place.1) << 15
    }
}

impl Driver for Packed {
    fn add(&mut self, memory: &dyn Memory, ranges: &[Range], indirect: bool) -> Option<u16> {
        let count = u16::try_from(ranges.len()).unwrap();
        let slots = if indirect { 1 } else { count };
        if self.free < slots {
            return None;
        }
        let id = self.names.pop().unwrap();
        let place = |place: (u16, bool)| self.layout.descriptors + u64::from(place.0) * 16;
        let turn = |wrap: bool| if wrap { 1 << 7 } else { 1 << 15 };
        let first = self.avail;
        let mut written = Vec::new();
        if indirect {
            let table = TABLES + u64::from(id) * 256;
            for (number, range) in ranges.iter().enumerate() {
                let at = table + 16 * number as u64;
                // The flags that say whose turn it is mean nothing here.
                let flags = if range.2 { 1 << 7 | 2 } else { 1 << 15 };
                descriptor(memory, at, range.0, range.1, 77, flags);
            }
            written.push((first, table, 16 * u32::from(count), 4 | turn(first.1)));
        } else {
            let mut at = first;
            for (number, range) in ranges.iter().enumerate() {
                let next = u16::from(number + 1 < ranges.len());
                let flags = next | if range.2 { 2 } else { 0 } | turn(at.1);
                written.push((at, range.0, range.1, flags));
                at = self.forward(at, 1);
            }
        }
        // The first descriptor becomes available last; the name stands in the last one.
        let last = written.len() - 1;
        for (number, &(at, addr, len, flags)) in written.iter().enumerate().rev() {
            let name = if number == last { id } else { 0xdead };
            descriptor(memory, place(at), addr, len, name, flags);
        }
        self.avail = self.forward(self.avail, slots);
        self.free -= slots;
        self.added += slots;
        self.held[usize::from(id)] = slots;
        Some(id)
    }

    fn collect(&mut self, memory: &dyn Memory) -> Vec<(u16, u32)> {
        let mut all = Vec::new();
        loop {
            let at = self.layout.descriptors + u64::from(self.used.0) * 16;
            let flags = u16_at(memory, at + 14);
            let (avail, used) = (flags & 1 << 7 != 0, flags & 1 << 15 != 0);
            if avail != used || used != self.used.1 {
                return all;
            }
            let id = u16_at(memory, at + 12);
            let slots = std::mem::take(&mut self.held[usize::from(id)]);
            assert!(slots > 0, "request {id} came back twice");
            let written = if flags & 2 != 0 {
                u32_at(memory, at + 8)
            } else {
                0
            };
            all.push((id, written));
            self.names.push(id);
            self.free += slots;
            self.used = self.forward(self.used, slots);
        }
    }

    fn arm(&mut self, memory: &dyn Memory, armed: bool) {
        let at = self.layout.driver;
        match (armed, self.event_idx) {
            (false, _) => memory.store(at + 2, 1).unwrap(),
            (true, false) => memory.store(at + 2, 0).unwrap(),
            (true, true) => {
                memory.store(at, Self::event(self.used)).unwrap();
                memory.store(at + 2, 2).unwrap();
            }
        }
    }

    fn must_kick(&mut self, memory: &dyn Memory) -> bool {
        let added = std::mem::take(&mut self.added);
        let flags = u16_at(memory, self.layout.device + 2);
        let event = u16_at(memory, self.layout.device);
        match flags {
            _ if added == 0 => false,
            0 => true,
            2 => (1..=added).any(|back| {
                let size = self.layout.size;
                let index = self.avail.0;
                let place = match index >= back {
                    true => (index - back, self.avail.1),
                    false => (index + size - back, !self.avail.1),
                };
                event == Self::event(place)
            }),
            _ => false,
        }
    }
}
