//! The registers against a model that was written from the specification (virtio 1.2, 4.2.2).

use std::io;
use std::sync::Arc;

use ioregion_devices::mmio::{Effect, Misuse, Registers, at};
use ioregion_devices::virtio::{Device, Format, Lane, Refusal, Setup};
use ioregion_dispatch::Size;
use proptest::prelude::*;

const QUEUES: u16 = 3;
const MAX: u16 = 64;
const KIND: u32 = 42;
/// What the device offers of its own; it does not work with the second alone.
const OWN: u64 = 0b11;
const INDIRECT: u64 = 1 << 28;
const EVENT_IDX: u64 = 1 << 29;
const VERSION_1: u64 = 1 << 32;
const PACKED: u64 = 1 << 34;
const OFFERED: u64 = OWN | INDIRECT | EVENT_IDX | VERSION_1 | PACKED;

const CONFIG: [u8; 6] = [1, 2, 3, 4, 5, 6];

struct Picky;

impl Device for Picky {
    fn kind(&self) -> u32 {
        KIND
    }

    fn features(&self) -> u64 {
        OWN
    }

    fn check_features(&self, features: u64) -> Result<(), Refusal> {
        match features & OWN {
            0b10 => Err(Refusal::Missing(1)),
            _ => Ok(()),
        }
    }

    fn config(&self) -> Vec<u8> {
        CONFIG.to_vec()
    }

    fn queues(&self) -> u16 {
        QUEUES
    }

    fn lane(self: Arc<Self>, _queue: u16, _features: u64) -> io::Result<Box<dyn Lane>> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

fn registers() -> Registers {
    Registers::new(Arc::new(Picky), MAX, true)
}

/// What a driver, or the one who serves the queues, does.
#[derive(Debug, Clone, Copy)]
enum Act {
    Write(u64, Size, u64),
    Used,
    Fail,
    ConfigChanged,
    WasReset,
    QueueStopped(u16),
}

#[derive(Debug, Clone, Copy, Default, PartialEq)]
struct Queue {
    size: u32,
    /// Low and high halves of the three addresses.
    parts: [u32; 6],
    ready: bool,
    stopping: bool,
}

/// All that there is to know, in the plainest form.
#[derive(Debug, Clone, Default)]
struct Model {
    device_sel: u32,
    driver_sel: u32,
    low: u32,
    high: u32,
    queue_sel: u32,
    queues: [Queue; QUEUES as usize],
    status: u32,
    interrupts: u32,
    generation: u32,
    broken: bool,
    resetting: bool,
}

impl Model {
    fn features(&self) -> u64 {
        u64::from(self.high) << 32 | u64::from(self.low)
    }

    fn suits(&self) -> bool {
        let features = self.features();
        let known = features & !OFFERED == 0;
        known && features & VERSION_1 != 0 && features & OWN != 0b10
    }

    fn driven(&self) -> bool {
        self.status & 4 != 0 && !self.resetting
    }

    fn setup(&self, queue: Queue) -> (Format, u16, [u64; 3], bool, bool) {
        let features = self.features();
        let format = match features & PACKED {
            0 => Format::Split,
            _ => Format::Packed,
        };
        let pair = |at: usize| u64::from(queue.parts[at + 1]) << 32 | u64::from(queue.parts[at]);
        (
            format,
            queue.size.try_into().unwrap(),
            [pair(0), pair(2), pair(4)],
            features & INDIRECT != 0,
            features & EVENT_IDX != 0,
        )
    }

    /// What a write does: the effect, or nothing where it means nothing.
    fn write(&mut self, offset: u64, size: Size, value: u64) -> Option<Expected> {
        if offset >= 0x100 || size != Size::B4 {
            return None;
        }
        let value = (value & 0xffff_ffff) as u32;
        if offset == 0x70 {
            return self.write_status(value & !0x40);
        }
        if self.resetting {
            return None;
        }
        let selected = self.queue_sel;
        match offset {
            0x14 => self.device_sel = value,
            0x24 => self.driver_sel = value,
            0x20 => match self.driver_sel {
                _ if self.status & 8 != 0 => return None,
                0 => self.low = value,
                1 => self.high = value,
                _ if value == 0 => {}
                _ => return None,
            },
            0x30 => self.queue_sel = value,
            0x64 => {
                self.interrupts &= !value;
                if self.interrupts != 0 {
                    return Some(Expected::Interrupt);
                }
            }
            0xac => {}
            0x50 => {
                let queue = self.queues.get(value as usize)?;
                let served = queue.ready && !queue.stopping && self.driven();
                return served.then_some(Expected::Notify(value));
            }
            0x44 => {
                let driven = self.driven();
                let queue = self.queues.get_mut(selected as usize)?;
                match (queue.ready, value) {
                    (false, 1) => {
                        queue.ready = true;
                        if driven && !self.broken {
                            return Some(Expected::Start(vec![selected]));
                        }
                    }
                    (true, 0) if driven => {
                        queue.stopping = true;
                        return Some(Expected::Stop(selected));
                    }
                    (true, 0) => queue.ready = false,
                    (false, 0) => {}
                    (true, 1) if !queue.stopping => {}
                    _ => return None,
                }
            }
            0x38 | 0x80 | 0x84 | 0x90 | 0x94 | 0xa0 | 0xa4 => {
                let queue = self.queues.get_mut(selected as usize)?;
                if queue.ready {
                    return None;
                }
                match offset {
                    0x38 if value > MAX.into() => return None,
                    0x38 => queue.size = value,
                    _ => {
                        let part = (offset - 0x80) / 0x10 * 2 + (offset % 0x10) / 4;
                        queue.parts[part as usize] = value;
                    }
                }
            }
            _ => return None,
        }
        Some(Expected::Nothing)
    }

    fn write_status(&mut self, value: u32) -> Option<Expected> {
        if value == 0 {
            self.resetting = true;
            self.status = 0;
            return Some(Expected::Reset);
        }
        let new = value & !self.status;
        let bad = self.resetting
            || value & !0x8f != 0
            || self.status & !value != 0
            || new & 4 != 0 && value & 8 == 0
            || new & 8 != 0 && !self.suits();
        if bad {
            return None;
        }
        self.status = value;
        if new & 4 == 0 || self.broken {
            return Some(Expected::Nothing);
        }
        let ready = (0..).zip(&self.queues).filter(|(_, queue)| queue.ready);
        Some(Expected::Start(ready.map(|(index, _)| index).collect()))
    }

    fn act(&mut self, act: Act) {
        match act {
            Act::Write(..) => {}
            Act::Used => self.interrupts |= 1,
            Act::Fail => {
                self.broken = true;
                if self.driven() {
                    self.interrupts |= 2;
                }
            }
            Act::ConfigChanged => {
                self.generation += 1;
                if self.driven() {
                    self.interrupts |= 2;
                }
            }
            Act::WasReset if self.resetting => {
                *self = Self {
                    generation: self.generation,
                    ..Self::default()
                };
            }
            Act::WasReset => {}
            Act::QueueStopped(queue) => {
                let queue = &mut self.queues[usize::from(queue)];
                if queue.stopping {
                    queue.ready = false;
                    queue.stopping = false;
                }
            }
        }
    }

    fn read(&self, offset: u64) -> u32 {
        let queue = self.queues.get(self.queue_sel as usize);
        match offset {
            0x0 => 0x7472_6976,
            0x4 => 2,
            0x8 => KIND,
            0x10 if self.device_sel > 1 => 0,
            0x10 => (OFFERED >> (32 * self.device_sel) & 0xffff_ffff) as u32,
            0x34 => queue.map_or(0, |_| MAX.into()),
            0x44 => queue.map_or(0, |queue| queue.ready.into()),
            0x60 => self.interrupts,
            0x70 if self.resetting => 0x40,
            0x70 => self.status | if self.broken { 0x40 } else { 0 },
            0xb0 | 0xb4 | 0xb8 | 0xbc => u32::MAX,
            0xfc => self.generation,
            0x100 => 0x0403_0201,
            0x104 => 0x0605,
            _ => 0,
        }
    }
}

#[derive(Debug, PartialEq)]
enum Expected {
    Nothing,
    Start(Vec<u32>),
    Stop(u32),
    Reset,
    Notify(u32),
    Interrupt,
}

fn size() -> impl Strategy<Value = Size> {
    prop_oneof![
        20 => Just(Size::B4),
        1 => prop_oneof![Just(Size::B1), Just(Size::B2), Just(Size::B8)],
    ]
}

fn write() -> impl Strategy<Value = Act> {
    let offset = prop_oneof![
        // In the order in which a driver has a use for them.
        10 => prop::sample::select(vec![
            0x70, 0x70, 0x70, 0x24, 0x20, 0x30, 0x38, 0x80, 0x84, 0x90, 0x94, 0xa0, 0xa4, 0x44, 0x44,
            0x50, 0x64, 0x14, 0xacu64,
        ]),
        1 => (0..0x44u64).prop_map(|word| word * 4),
        1 => 0..0x1000u64,
        1 => any::<u64>(),
    ];
    let value = prop_oneof![
        8 => 0..5u64,
        6 => prop::sample::select(vec![
            0xb, 0xf, 0x4b, 0x8f, 0x40, 0x80, u64::from(MAX), OFFERED >> 32, OFFERED & 0xffff_ffff,
        ]),
        1 => any::<u64>(),
        1 => any::<u32>().prop_map(u64::from),
    ];
    (offset, size(), value).prop_map(|(offset, size, value)| Act::Write(offset, size, value))
}

fn act() -> impl Strategy<Value = Act> {
    prop_oneof![
        30 => write(),
        1 => Just(Act::Used),
        1 => prop::option::weighted(0.3, Just(Act::Fail)).prop_map(|fail| fail.unwrap_or(Act::Used)),
        1 => Just(Act::ConfigChanged),
        6 => Just(Act::WasReset),
        2 => (0..QUEUES).prop_map(Act::QueueStopped),
    ]
}

/// What a driver does to start the device with all queues; mixed with everything else by chance.
fn bring_up() -> Vec<Act> {
    let write = |offset, value| Act::Write(offset, Size::B4, value);
    let mut all = vec![write(0x70, 0), Act::WasReset];
    all.extend([write(0x70, 1), write(0x70, 3), write(0x24, 1)]);
    all.extend([write(0x20, OFFERED >> 32), write(0x24, 0)]);
    all.extend([write(0x20, OFFERED & 0xffff_ffff), write(0x70, 0xb)]);
    for queue in 0..QUEUES {
        all.extend([write(0x30, queue.into()), write(0x38, MAX.into())]);
        all.extend([write(0x84, 7), write(0x44, 1)]);
    }
    all.push(write(0x70, 0xf));
    all
}

fn acts() -> impl Strategy<Value = Vec<Act>> {
    let piece = prop_oneof![
        3 => act().prop_map(|act| vec![act]),
        1 => Just(bring_up()),
        // A part of it.
        1 => (0..20usize).prop_map(|len| bring_up().into_iter().take(len).collect()),
    ];
    let pieces = prop::collection::vec(piece, 1..60);
    pieces.prop_map(|pieces| pieces.concat())
}

fn setup_of(setup: &Setup) -> (Format, u16, [u64; 3], bool, bool) {
    let layout = setup.layout;
    (
        setup.format,
        layout.size,
        [layout.descriptors, layout.driver, layout.device],
        setup.indirect,
        setup.event_idx,
    )
}

fn check(registers: &Registers, model: &Model) -> Result<(), TestCaseError> {
    for offset in (0..0x120).step_by(4) {
        let read = registers.read(offset, Size::B4);
        prop_assert_eq!(read, u64::from(model.read(offset)), "at {:#x}", offset);
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn registers_do_what_the_model_does(acts in acts()) {
        let mut registers = registers();
        let mut model = Model::default();
        for act in acts {
            match act {
                Act::Write(offset, size, value) => {
                    let written = registers.write(offset, size, value);
                    let expected = model.write(offset, size, value);
                    let did = match &written {
                        Err(_) => None,
                        Ok(Effect::Nothing) => Some(Expected::Nothing),
                        Ok(Effect::Start(features, queues)) => {
                            prop_assert_eq!(*features, model.features());
                            for (queue, setup) in queues {
                                let queue = model.queues[usize::from(*queue)];
                                prop_assert_eq!(setup_of(setup), model.setup(queue));
                            }
                            let queues = queues.iter().map(|(queue, _)| u32::from(*queue));
                            Some(Expected::Start(queues.collect()))
                        }
                        Ok(Effect::Stop(queue)) => Some(Expected::Stop((*queue).into())),
                        Ok(Effect::Reset) => Some(Expected::Reset),
                        Ok(Effect::Notify(queue)) => Some(Expected::Notify((*queue).into())),
                        Ok(Effect::Interrupt) => Some(Expected::Interrupt),
                    };
                    prop_assert_eq!(did, expected, "{:?} after {:?}", written, act);
                }
                Act::Used => registers.used(),
                Act::Fail => prop_assert_eq!(registers.fail(), model.driven()),
                Act::ConfigChanged => {
                    prop_assert_eq!(registers.config_changed(), model.driven());
                }
                Act::WasReset => registers.was_reset(),
                Act::QueueStopped(queue) => registers.queue_stopped(queue),
            }
            model.act(act);
            check(&registers, &model)?;
        }
    }

    #[test]
    fn configuration_space_can_be_read_at_any_place_in_any_size(at in 0..16u64, size in size()) {
        let read = registers().read(at::CONFIG + at, size);
        let mut bytes = [0; 32];
        bytes[..6].copy_from_slice(&CONFIG);
        let at = usize::try_from(at).unwrap();
        let mut wanted = [0; 8];
        let len = usize::from(size.bytes());
        wanted[..len].copy_from_slice(&bytes[at..at + len]);
        prop_assert_eq!(read, u64::from_le_bytes(wanted));
    }
}

fn write4(registers: &mut Registers, offset: u64, value: u32) -> Result<Effect, Misuse> {
    registers.write(offset, Size::B4, value.into())
}

#[test]
fn misuse_says_what_is_wrong() {
    let mut registers = registers();
    let mut refuse = |offset, value: u32| write4(&mut registers, offset, value).unwrap_err();
    assert_eq!(refuse(at::MAGIC, 1), Misuse::ReadOnly(at::MAGIC));
    assert_eq!(refuse(at::CONFIG, 1), Misuse::ReadOnly(at::CONFIG));
    assert_eq!(refuse(0x3c, 1), Misuse::ReadOnly(0x3c));
    assert_eq!(refuse(at::QUEUE_NOTIFY, 9), Misuse::NoQueue(9));
    assert_eq!(refuse(at::QUEUE_NOTIFY, 1 << 16), Misuse::NoQueue(1 << 16));
    assert_eq!(refuse(at::QUEUE_NOTIFY, 0), Misuse::NotServed(0));
    let (queue, size) = (0, 65);
    assert_eq!(
        refuse(at::QUEUE_SIZE, size),
        Misuse::QueueSize { queue, size }
    );
    write4(&mut registers, at::QUEUE_SEL, 3).unwrap();
    let refused = write4(&mut registers, at::QUEUE_READY, 1);
    assert_eq!(refused, Err(Misuse::NoQueue(3)));
    let (offset, size) = (at::STATUS, Size::B1);
    let refused = registers.write(offset, size, 1);
    assert_eq!(refused, Err(Misuse::Size { offset, size }));
    write4(&mut registers, at::STATUS, 0).unwrap();
    let refused = write4(&mut registers, at::STATUS, 1);
    assert_eq!(refused, Err(Misuse::Resetting));
}
