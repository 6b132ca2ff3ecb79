//! Random programs, and what each device must be told when they have run.
//!
//! Every byte that a vCPU writes names the vCPU in its top bit and carries seven bits of a
//! sequence number, so that each piece of a write tells whose it is. Reads tell by their place
//! ([`reader`]), doorbells by their index ([`ringer`]).

use ioregion_dispatch::{Access, Bus, Delivery, Region, Size};
use ioregion_microguest::Program;
use rand::Rng;

use crate::Kind;

/// A region of the model.
#[derive(Debug, Clone)]
pub struct Place {
    /// The region; its `user_data` is its index.
    pub region: Region,
    /// What carries it.
    pub kind: Kind,
}

/// One thing that a device must be told on account of one vCPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Event {
    /// A read.
    Read(Access),
    /// A write.
    Write(Access, u64),
    /// A write to the doorbell of this index, which keeps its place in the order.
    Queued(u32, u64),
    /// A write to the doorbell of this index, which later ones may overwrite.
    Latest(u32, u64),
}

/// What one vCPU does.
#[derive(Debug, Default)]
pub struct Plan {
    /// The program.
    pub program: Program,
    /// What the device of each region must be told.
    pub events: Vec<Vec<Event>>,
    /// For each entry of the vCPU's log the pieces that it is made of: region, size, and place
    /// in the value, in bytes.
    pub reads: Vec<Vec<(usize, Size, u32)>>,
    /// Accesses, where a string output counts as many as its elements.
    pub accesses: u64,
}

/// Doorbells 0 to 3 belong to vCPU 0 and 1 in turn; further ones to both.
#[must_use]
pub fn ringer(index: u32) -> Option<usize> {
    (index < 4).then_some(index as usize % 2)
}

/// The vCPU that reads at an offset.
#[must_use]
pub fn reader(offset: u64) -> usize {
    // The other side of a page's end belongs to vCPU 1 too: it alone reads across.
    if offset & 0xfff < 0x20 {
        1
    } else {
        (offset >> 5) as usize & 1
    }
}

/// The vCPU that wrote a value.
#[must_use]
pub fn writer(value: u64) -> usize {
    (value >> 7) as usize & 1
}

/// What vCPU `vcpu` writes the `sequence`th time, 16 bytes of it.
#[must_use]
pub fn value(vcpu: usize, sequence: u64) -> u128 {
    (0..16).fold(0, |value, byte| {
        let part = sequence.checked_shr(7 * byte).unwrap_or(0) & 0x7f | (vcpu as u64) << 7;
        value | u128::from(part) << (8 * byte)
    })
}

/// How KVM cuts an access: at page ends, then into pieces of at most eight bytes that a bus has.
fn pieces(addr: u64, bytes: u64) -> Vec<(u64, Size)> {
    let mut pieces = Vec::new();
    let mut at = addr;
    while at < addr + bytes {
        let left = (addr + bytes - at).min(0x1000 - (at & 0xfff));
        let size = Size::from_bytes(1 << left.min(8).ilog2()).unwrap_or(Size::B8);
        pieces.push((at, size));
        at += u64::from(size.bytes());
    }
    pieces
}

struct Author<'a> {
    places: &'a [Place],
    vcpu: usize,
    sequence: u64,
    plan: Plan,
}

impl Plan {
    /// Draws `steps` steps for a vCPU (0 or 1) and ends with a read of each region.
    ///
    /// The regions on the memory bus must be whole pages, one behind the other.
    pub fn draw(rng: &mut impl Rng, places: &[Place], vcpu: usize, steps: usize) -> Self {
        let events = vec![Vec::new(); places.len()];
        let mut author = Author {
            places,
            vcpu,
            sequence: 0,
            plan: Self {
                events,
                ..Self::default()
            },
        };
        for _ in 0..steps {
            author.step(rng);
        }
        for place in places {
            author.read(
                place.region.bus,
                place.region.base + 0x20 * (2 + vcpu as u64),
                Size::B4,
            );
        }
        author.plan
    }
}

impl Author<'_> {
    fn step(&mut self, rng: &mut impl Rng) {
        let place = &self.places[rng.random_range(0..self.places.len())];
        let Region {
            bus,
            base,
            size: len,
            ref doorbells,
            ..
        } = place.region;
        let sizes = if bus == Bus::Mmio {
            &Size::ALL[..]
        } else {
            &Size::ALL[..3]
        };
        let size = sizes[rng.random_range(0..sizes.len())];
        let bytes = u64::from(size.bytes());
        match rng.random_range(0..100) {
            0..40 if !doorbells.is_empty() => {
                let mine: Vec<_> = (0_u32..)
                    .zip(doorbells)
                    .filter(|(index, _)| ringer(*index).is_none_or(|owner| owner == self.vcpu))
                    .collect();
                let (_, doorbell) = mine[rng.random_range(0..mine.len())];
                self.write(bus, base + doorbell.offset, doorbell.size.bytes().into());
            }
            40..60 => {
                // A block of 32 bytes that is this vCPU's to read.
                let block = 2 * rng.random_range(1..len / 64) + self.vcpu as u64;
                let offset = 32 * block + rng.random_range(0..=32 - bytes);
                if reader(offset) == self.vcpu {
                    self.read(bus, base + offset, size);
                }
            }
            60..66 if bus == Bus::Mmio && bytes > 1 && self.has_next(place) => {
                let addr = base + len - rng.random_range(1..bytes);
                if self.vcpu == 1 && rng.random_bool(0.3) {
                    self.read(bus, addr, size);
                } else {
                    self.write(bus, addr, bytes);
                }
            }
            66..69 if bus == Bus::Mmio => {
                self.write(bus, base + rng.random_range(0..=len - 16), 16)
            }
            66..69 => self.string(
                base + rng.random_range(0..=len - bytes),
                size,
                rng.random_range(1..20),
            ),
            _ => self.write(bus, base + rng.random_range(0..=len - bytes), bytes),
        }
    }

    fn has_next(&self, place: &Place) -> bool {
        self.find(Bus::Mmio, place.region.last() + 1).is_some()
    }

    fn find(&self, bus: Bus, addr: u64) -> Option<usize> {
        self.places
            .iter()
            .position(|place| place.region.bus == bus && place.region.contains(addr, Size::B1))
    }

    fn next_value(&mut self) -> u128 {
        self.sequence += 1;
        self.plan.accesses += 1;
        value(self.vcpu, self.sequence)
    }

    /// Whether such a write rings a doorbell that only the other vCPU may ring.
    fn trespasses(&self, bus: Bus, addr: u64, bytes: u64) -> bool {
        pieces(addr, bytes).into_iter().any(|(at, size)| {
            let Some(index) = self.find(bus, at) else {
                return false;
            };
            let region = &self.places[index].region;
            (0..).zip(&region.doorbells).any(|(index, doorbell)| {
                (doorbell.offset, doorbell.size) == (at - region.base, size)
                    && ringer(index).is_some_and(|owner| owner != self.vcpu)
            })
        })
    }

    fn write(&mut self, bus: Bus, addr: u64, bytes: u64) {
        if self.trespasses(bus, addr, bytes) {
            return;
        }
        let value = self.next_value();
        if bytes == 16 {
            self.plan.program.write16(addr, value);
        } else {
            self.plan
                .program
                .write(bus, addr, bytes as u8, value as u64);
        }
        for (at, size) in pieces(addr, bytes) {
            self.expect(
                bus,
                at,
                size,
                (value >> (8 * (at - addr))) as u64 & size.mask(),
            );
        }
    }

    fn string(&mut self, port: u64, size: Size, count: usize) {
        if self.trespasses(Bus::Pio, port, size.bytes().into()) {
            return;
        }
        let mut values = Vec::new();
        for _ in 0..count {
            let value = self.next_value() as u64 & size.mask();
            self.expect(Bus::Pio, port, size, value);
            values.push(value as u32);
        }
        self.plan.program.out_string(port, size.bytes(), &values);
    }

    fn expect(&mut self, bus: Bus, addr: u64, size: Size, value: u64) {
        let Some(index) = self.find(bus, addr) else {
            return;
        };
        let Place { region, kind } = &self.places[index];
        let offset = addr - region.base;
        let doorbell = (0..)
            .zip(&region.doorbells)
            .find(|(_, doorbell)| doorbell.rings(offset, size, value));
        let event = match doorbell {
            None => Event::Write(
                Access {
                    user_data: region.user_data,
                    offset,
                    size,
                },
                value,
            ),
            Some((index, doorbell))
                if doorbell.delivery == Delivery::Latest && kind.has_sinks() =>
            {
                Event::Latest(index, value)
            }
            Some((index, _)) => Event::Queued(index, value),
        };
        self.plan.events[index].push(event);
    }

    fn read(&mut self, bus: Bus, addr: u64, size: Size) {
        self.plan.program.read(bus, addr, size.bytes());
        self.plan.accesses += 1;
        let mut parts = Vec::new();
        for (at, piece) in pieces(addr, size.bytes().into()) {
            let Some(index) = self.find(bus, at) else {
                continue;
            };
            let region = &self.places[index].region;
            let access = Access {
                user_data: region.user_data,
                offset: at - region.base,
                size: piece,
            };
            self.plan.events[index].push(Event::Read(access));
            parts.push((index, piece, (at - addr) as u32));
        }
        self.plan.reads.push(parts);
    }
}
