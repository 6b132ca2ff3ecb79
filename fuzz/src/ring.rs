//! Rings that a driver fills with whatever it likes, at any moment, and a device that works on.

use std::ops::Range;
use std::sync::Mutex;

use arbitrary::{Arbitrary, Unstructured};
use ioregion_devices::virtio::{
    Broken, Chain, Format, Layout, MAX_SEGMENTS, Memory, MemoryError, Position, Queue, Segment,
    Setup,
};

/// The first address that is memory.
const BASE: u64 = 0x10_0000;
/// Bytes of memory.
const BYTES: u16 = 2048;
/// Steps of one input.
const STEPS: usize = 200;

/// Plays an input on a split ring.
pub fn split(data: &[u8]) {
    play(Format::Split, data);
}

/// Plays an input on a packed ring.
pub fn packed(data: &[u8]) {
    play(Format::Packed, data);
}

/// Where a ring is, and where it stands.
#[derive(Debug, Arbitrary)]
struct Start {
    /// The first ones are sizes that there are; then any.
    size: u8,
    any_size: u16,
    parts: [u16; 3],
    /// Bits: event indices, indirect tables, parts where they may not be.
    options: u8,
    position: [u8; 4],
}

/// What happens next, by the driver or by the device.
#[derive(Debug, Arbitrary)]
enum Step {
    /// The driver writes a descriptor, into the ring or anywhere (a table).
    Descriptor(u8, Wish),
    Table(u16, Wish),
    /// The driver makes the descriptor available, as far as it knows where it stands.
    Offer(u8),
    /// The driver writes anything anywhere.
    Bytes(u16, [u8; 4]),
    /// The driver's event index or flags.
    Event(u16, u16),
    Pop,
    PopAll,
    Push(u8, u32),
    MustNotify,
    DisableKicks,
    EnableKicks,
    /// The device copies from or into a request.
    Read(u8, u16, u8),
    Write(u8, u16, u8),
    /// Another device takes over where this one stands.
    Replace,
    /// The driver resets the device.
    Reset,
}

/// A descriptor, in either format.
#[derive(Debug, Arbitrary)]
struct Wish {
    addr: u16,
    len: u16,
    flags: u8,
    next: u8,
}

const NEXT: u16 = 1;
const AVAIL: u16 = 1 << 7;
const USED: u16 = 1 << 15;

/// Memory that knows where the device may write at the moment.
struct Guarded {
    bytes: Mutex<Vec<u8>>,
    may_write: Mutex<Vec<Range<u64>>>,
}

impl Guarded {
    fn with<T>(
        &self,
        addr: u64,
        len: usize,
        act: impl FnOnce(&mut [u8]) -> T,
    ) -> Result<T, MemoryError> {
        let unmapped = MemoryError::Unmapped { addr };
        let mut bytes = self.bytes.lock().unwrap();
        let start = addr.checked_sub(BASE).ok_or(unmapped)?;
        let start = usize::try_from(start).map_err(|_| unmapped)?;
        let end = start.checked_add(len).ok_or(unmapped)?;
        bytes.get_mut(start..end).map(act).ok_or(unmapped)
    }

    /// A write of the driver's, which goes nowhere where there is no memory.
    fn put(&self, addr: u64, bytes: &[u8]) {
        let _ = self.with(addr, bytes.len(), |to| to.copy_from_slice(bytes));
    }

    fn check(&self, addr: u64, len: usize) {
        let ranges = self.may_write.lock().unwrap();
        let end = addr.checked_add(len as u64);
        let inside =
            |range: &Range<u64>| range.start <= addr && end.is_some_and(|end| end <= range.end);
        assert!(
            len == 0 || ranges.iter().any(inside),
            "the device writes {len} bytes at {addr:#x}, where it has no business"
        );
    }
}

impl Memory for Guarded {
    fn read(&self, addr: u64, into: &mut [u8]) -> Result<(), MemoryError> {
        self.with(addr, into.len(), |bytes| into.copy_from_slice(bytes))
    }

    fn write(&self, addr: u64, from: &[u8]) -> Result<(), MemoryError> {
        self.check(addr, from.len());
        self.with(addr, from.len(), |bytes| bytes.copy_from_slice(from))
    }

    fn load(&self, addr: u64) -> Result<u16, MemoryError> {
        if !addr.is_multiple_of(2) {
            return Err(MemoryError::Misaligned { addr });
        }
        self.with(addr, 2, |bytes| u16::from_le_bytes([bytes[0], bytes[1]]))
    }

    fn store(&self, addr: u64, value: u16) -> Result<(), MemoryError> {
        self.check(addr, 2);
        if !addr.is_multiple_of(2) {
            return Err(MemoryError::Misaligned { addr });
        }
        self.with(addr, 2, |bytes| bytes.copy_from_slice(&value.to_le_bytes()))
    }
}

/// Most addresses are memory; the last ones are the end of the address space.
fn address(wish: u16) -> u64 {
    match wish {
        0xfff0.. => u64::MAX - u64::from(0xffff - wish),
        wish => BASE + u64::from(wish % (BYTES + BYTES / 8)),
    }
}

fn setup(format: Format, start: &Start) -> Setup {
    let size = match (start.size, format) {
        (0xf8.., _) => start.any_size,
        (size, Format::Split) => 1 << (size % 5),
        (size, Format::Packed) => u16::from(size % 20) + 1,
    };
    let misplaced = start.options & 0x1c == 0x1c;
    let part = |wish: u16| match misplaced {
        true => address(wish),
        false => BASE + u64::from((wish % BYTES) & !15),
    };
    let [descriptors, driver, device] = start.parts.map(part);
    Setup {
        format,
        layout: Layout {
            size,
            descriptors,
            driver,
            device,
        },
        event_idx: start.options & 1 != 0,
        indirect: start.options & 2 != 0,
    }
}

fn position(format: Format, start: &Start) -> Position {
    let [one, two, three, four] = start.position;
    match format {
        Format::Split => Position::Split {
            avail: u16::from_le_bytes([one, two]),
        },
        Format::Packed if one & 2 == 0 => Position::start(format),
        Format::Packed => Position::Packed {
            avail_wrap: one & 1 != 0,
            avail: two.into(),
            used_wrap: three & 1 != 0,
            used: four.into(),
        },
    }
}

/// Device and driver at work.
struct Game {
    memory: Guarded,
    setup: Setup,
    /// Nothing once it is broken.
    queue: Option<Queue>,
    held: Vec<Chain>,
    /// What the driver offers next, as it thinks.
    next: u16,
}

fn play(format: Format, data: &[u8]) {
    let mut input = Unstructured::new(data);
    let Ok(start) = Start::arbitrary(&mut input) else {
        return;
    };
    let setup = setup(format, &start);
    let Position::Split { avail: next } = position(format, &start) else {
        return Game::new(setup, 0).run(&mut input, position(format, &start));
    };
    // Both indices of a split ring that has been in use.
    let game = Game::new(setup, next);
    for ring in [setup.layout.driver, setup.layout.device] {
        game.memory.put(ring.wrapping_add(2), &next.to_le_bytes());
    }
    game.run(&mut input, position(format, &start));
}

impl Game {
    fn new(setup: Setup, next: u16) -> Self {
        Self {
            memory: Guarded {
                bytes: Mutex::new(vec![0; BYTES.into()]),
                may_write: Mutex::new(Vec::new()),
            },
            setup,
            queue: None,
            held: Vec::new(),
            next,
        }
    }

    fn run(mut self, input: &mut Unstructured<'_>, at: Position) {
        self.queue = Queue::new(&self.memory, &self.setup, at).ok();
        self.own_part();
        for _ in 0..STEPS {
            if input.is_empty() {
                break;
            }
            let Ok(step) = Step::arbitrary(input) else {
                break;
            };
            self.step(&step);
            if let Some(queue) = &self.queue {
                assert_eq!(usize::from(queue.in_flight()), self.held.len());
            }
        }
    }

    /// From now on the device writes its part of the ring only.
    fn own_part(&self) {
        let Layout {
            size,
            descriptors,
            device,
            ..
        } = self.setup.layout;
        let size = u64::from(size);
        // Lengths wrap only for rings that are refused.
        let part = |start: u64, len: u64| start..start.saturating_add(len);
        *self.memory.may_write.lock().unwrap() = match self.setup.format {
            Format::Split => vec![part(device, 4 + 8 * size + 2)],
            Format::Packed => vec![part(descriptors, 16 * size), part(device, 4)],
        };
    }

    fn step(&mut self, step: &Step) {
        let layout = self.setup.layout;
        let split = self.setup.format == Format::Split;
        match step {
            Step::Descriptor(index, wish) => {
                let index = u64::from(*index) % (u64::from(layout.size) + 1);
                self.descriptor(layout.descriptors.wrapping_add(16 * index), wish);
            }
            Step::Table(at, wish) => self.descriptor(address(*at), wish),
            Step::Offer(head) => self.offer((*head).into()),
            Step::Bytes(at, bytes) => self.memory.put(address(*at), bytes),
            Step::Event(flags, event) => {
                let event_at = match split {
                    true => 4 + 2 * u64::from(layout.size),
                    false => 2,
                };
                let put = |at: u64, value: u16| {
                    self.memory
                        .put(layout.driver.wrapping_add(at), &value.to_le_bytes());
                };
                put(0, *flags);
                put(event_at, *event);
            }
            Step::Pop => drop(self.pop()),
            Step::PopAll => while self.pop() {},
            Step::Push(which, written) => self.push(*which, *written),
            Step::MustNotify => self.on_queue(Queue::must_notify),
            Step::DisableKicks => self.on_queue(Queue::disable_kicks),
            Step::EnableKicks => self.on_queue(Queue::enable_kicks),
            Step::Read(which, offset, len) => self.copy(*which, *offset, *len, false),
            Step::Write(which, offset, len) => self.copy(*which, *offset, *len, true),
            Step::Replace if self.held.is_empty() => {
                let Some(at) = self.queue.as_ref().map(Queue::position) else {
                    return;
                };
                let queue = Queue::new(&self.memory, &self.setup, at);
                // Of a split ring the driver has a say: the used index lies in its memory.
                assert!(split || queue.is_ok(), "{at:?}: {queue:?}");
                self.queue = queue.ok();
            }
            Step::Replace => {}
            Step::Reset => {
                self.held.clear();
                let at = Position::start(self.setup.format);
                self.next = 0;
                if split {
                    for ring in [layout.driver, layout.device] {
                        self.memory.put(ring.wrapping_add(2), &[0; 2]);
                    }
                }
                self.queue = Queue::new(&self.memory, &self.setup, at).ok();
            }
        }
    }

    /// Writes a descriptor as the format has it: flags and next, or name and flags.
    fn descriptor(&self, at: u64, wish: &Wish) {
        let (flags, next) = (u16::from(wish.flags), u16::from(wish.next));
        let (at12, at14) = match self.setup.format {
            Format::Split => (flags, next),
            // The upper bits make it available, in one turn or the other.
            Format::Packed => (next, flags & 7 | (flags & 0x40) << 1 | (flags & 0x80) << 8),
        };
        let len = match wish.len {
            0xfff0.. => u32::MAX - u32::from(0xffff - wish.len),
            len => u32::from(len % 512),
        };
        let mut bytes = address(wish.addr).to_le_bytes().to_vec();
        bytes.extend(len.to_le_bytes());
        bytes.extend(at12.to_le_bytes());
        bytes.extend(at14.to_le_bytes());
        self.memory.put(at, &bytes);
    }

    fn offer(&mut self, head: u16) {
        let layout = self.setup.layout;
        let size = layout.size.max(1);
        match self.setup.format {
            Format::Split => {
                let slot = u64::from(self.next % size);
                let entry = layout.driver.wrapping_add(4 + 2 * slot);
                self.memory.put(entry, &(head % size).to_le_bytes());
                self.next = self.next.wrapping_add(1);
                let index = layout.driver.wrapping_add(2);
                self.memory.put(index, &self.next.to_le_bytes());
            }
            Format::Packed => {
                // The descriptor that the device looks at next becomes available.
                let Some(Position::Packed {
                    avail, avail_wrap, ..
                }) = self.queue.as_ref().map(Queue::position)
                else {
                    return;
                };
                let at = layout.descriptors.wrapping_add(16 * u64::from(avail) + 14);
                let old = self.memory.load(at).unwrap_or(0);
                let turn = if avail_wrap { AVAIL } else { USED };
                let flags = old & !(AVAIL | USED | NEXT) | turn | head & NEXT;
                self.memory.put(at, &flags.to_le_bytes());
            }
        }
    }

    /// Whether there was a request.
    fn pop(&mut self) -> bool {
        let Some(queue) = &mut self.queue else {
            return false;
        };
        match queue.pop(&self.memory) {
            Ok(Some(chain)) => {
                let size = self.setup.layout.size;
                assert!(chain.id() < size, "a name that the queue does not have");
                let twice = self.held.iter().any(|held| held.id() == chain.id());
                assert!(!twice, "request {} is in flight twice", chain.id());
                check_chain(&chain);
                self.held.push(chain);
                assert!(
                    self.held.len() <= size.into(),
                    "more than there is room for"
                );
                true
            }
            Ok(None) => false,
            Err(broken) => {
                self.broke(broken);
                false
            }
        }
    }

    fn push(&mut self, which: u8, written: u32) {
        let Some(queue) = &mut self.queue else {
            return;
        };
        if self.held.is_empty() {
            return;
        }
        let chain = self.held.remove(usize::from(which) % self.held.len());
        if let Err(broken) = queue.push(&self.memory, chain, written) {
            self.broke(broken);
        }
    }

    fn on_queue<T>(&mut self, act: impl FnOnce(&mut Queue, &dyn Memory) -> Result<T, Broken>) {
        if let Some(queue) = &mut self.queue
            && let Err(broken) = act(queue, &self.memory)
        {
            self.broke(broken);
        }
    }

    /// Whoever serves the queue lets go of it, and of what is in flight.
    fn broke(&mut self, broken: Broken) {
        assert!(!broken.to_string().is_empty());
        self.queue = None;
        self.held.clear();
    }

    fn copy(&self, which: u8, offset: u16, len: u8, write: bool) {
        let count = self.held.len();
        let Some(chain) = which.checked_rem(u8::try_from(count).unwrap_or(u8::MAX)) else {
            return;
        };
        let chain = &self.held[usize::from(chain)];
        let mut bytes = vec![0x5a; len.into()];
        let (result, total) = match write {
            true => {
                let range = |part: &Segment| {
                    // As a request was checked when it was taken.
                    part.addr..part.addr.saturating_add(part.len.into())
                };
                let ranges = chain.writable().iter().map(range).collect();
                *self.memory.may_write.lock().unwrap() = ranges;
                let result = chain.write(&self.memory, offset.into(), &bytes);
                self.own_part();
                (result, chain.writable_len())
            }
            false => (
                chain.read(&self.memory, offset.into(), &mut bytes),
                chain.readable_len(),
            ),
        };
        let fits = u32::from(offset) + u32::from(len) <= total;
        let overflow = matches!(result, Err(MemoryError::Overflow { .. }));
        assert_eq!(overflow, !fits, "{result:?}");
    }
}

fn check_chain(chain: &Chain) {
    let (readable, writable) = (chain.readable(), chain.writable());
    assert!((1..=MAX_SEGMENTS).contains(&(readable.len() + writable.len())));
    for (part, total) in [
        (readable, chain.readable_len()),
        (writable, chain.writable_len()),
    ] {
        for segment in part {
            assert!(segment.len > 0);
            assert!(
                segment
                    .addr
                    .checked_add(u64::from(segment.len) - 1)
                    .is_some()
            );
        }
        let sum: u64 = part.iter().map(|segment| u64::from(segment.len)).sum();
        assert_eq!(sum, u64::from(total));
    }
}
