//! Queues of both formats against a driver that keeps to the specification.

mod support;

use std::collections::BTreeMap;
use std::sync::Mutex;

use ioregion_devices::virtio::{Chain, Done, Format, Memory, MemoryError, Position, Queue};
use proptest::prelude::*;
use support::{BYTES, DATA, Flat, Range, driver, setup};

/// What happens next.
#[derive(Debug, Clone)]
enum Step {
    Add {
        readable: Vec<u32>,
        writable: Vec<u32>,
        indirect: bool,
    },
    Pop,
    /// Gives back one of those in flight, as far as it was filled.
    Push(usize, u32),
    Collect,
    Arm(bool),
    /// The device goes to sleep; whether it is told.
    Sleep,
    /// The device is replaced by one that takes up where it stood.
    Replace,
}

fn step() -> impl Strategy<Value = Step> {
    let lens = || proptest::collection::vec(1..5000u32, 0..4);
    prop_oneof![
        4 => (lens(), lens(), any::<bool>())
            .prop_filter("a request of nothing", |(one, two, _)| one.len() + two.len() > 0)
            .prop_map(|(readable, writable, indirect)| Step::Add { readable, writable, indirect }),
        4 => Just(Step::Pop),
        4 => (any::<usize>(), any::<u32>()).prop_map(|(which, len)| Step::Push(which, len)),
        2 => Just(Step::Collect),
        2 => any::<bool>().prop_map(Step::Arm),
        1 => Just(Step::Sleep),
        1 => Just(Step::Replace),
    ]
}

fn ranges_of(chain: &Chain) -> Vec<Range> {
    let list = |segments: &[ioregion_devices::virtio::Segment], writable| -> Vec<Range> {
        segments
            .iter()
            .map(|segment| (segment.addr, segment.len, writable))
            .collect()
    };
    let mut all = list(chain.readable(), false);
    all.extend(list(chain.writable(), true));
    all
}

fn play(format: Format, size: u16, event_idx: bool, steps: &[Step]) {
    let memory = Flat::new(BYTES);
    let setup = setup(format, size, event_idx);
    let mut driver = driver(&setup);
    let mut queue = Queue::new(&memory, &setup, Position::start(format)).unwrap();
    // What the driver waits for, by name, in the order of adding.
    let mut waiting: Vec<(u16, Vec<Range>)> = Vec::new();
    let mut taken: BTreeMap<u16, Chain> = BTreeMap::new();
    let mut given: Vec<(u16, u32)> = Vec::new();
    let mut armed = false;
    driver.arm(&memory, armed);
    // The device starts asleep.
    let mut asleep = !queue.enable_kicks(&memory).unwrap();
    for step in steps {
        match step {
            Step::Add {
                readable,
                writable,
                indirect,
            } => {
                let all = readable.iter().map(|len| (len, false));
                let all = all.chain(writable.iter().map(|len| (len, true)));
                let ranges: Vec<Range> = all
                    .enumerate()
                    .map(|(number, (&len, writable))| (DATA + 8192 * number as u64, len, writable))
                    .collect();
                let Some(id) = driver.add(&memory, &ranges, *indirect) else {
                    continue;
                };
                waiting.push((id, ranges));
                let kicked = driver.must_kick(&memory);
                assert!(kicked || !asleep, "nobody woke the device");
                if asleep {
                    queue.disable_kicks(&memory).unwrap();
                    asleep = false;
                }
            }
            Step::Pop => match queue.pop(&memory).unwrap() {
                Some(chain) => {
                    let (id, ranges) = waiting.remove(0);
                    assert_eq!(chain.id(), id);
                    assert_eq!(ranges_of(&chain), ranges);
                    taken.insert(id, chain);
                }
                None => assert!(waiting.is_empty(), "a request was overlooked"),
            },
            Step::Push(which, written) => {
                let ids: Vec<u16> = taken.keys().copied().collect();
                if ids.is_empty() {
                    continue;
                }
                let chain = taken.remove(&ids[which % ids.len()]).unwrap();
                let written = written % (chain.writable_len() + 1);
                given.push((chain.id(), written));
                queue.push(&memory, chain, written).unwrap();
                let notified = queue.must_notify(&memory).unwrap();
                assert!(notified || !armed, "nobody told the driver");
                if notified && event_idx {
                    // Once is enough until the driver asks again.
                    armed = false;
                }
            }
            Step::Collect => assert_eq!(driver.collect(&memory), std::mem::take(&mut given)),
            Step::Arm(wish) => {
                assert_eq!(driver.collect(&memory), std::mem::take(&mut given));
                driver.arm(&memory, *wish);
                armed = *wish;
            }
            Step::Sleep => {
                asleep = !queue.enable_kicks(&memory).unwrap();
                assert_eq!(asleep, waiting.is_empty());
                if !asleep {
                    queue.disable_kicks(&memory).unwrap();
                }
            }
            Step::Replace if taken.is_empty() && !asleep => {
                queue = Queue::new(&memory, &setup, queue.position()).unwrap();
            }
            Step::Replace => {}
        }
        assert_eq!(usize::from(queue.in_flight()), taken.len());
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn every_request_arrives_once_and_comes_back_once(
        packed: bool,
        exponent in 0..6u32,
        event_idx: bool,
        steps in proptest::collection::vec(step(), 1..200),
    ) {
        let format = if packed { Format::Packed } else { Format::Split };
        play(format, 1 << exponent, event_idx, &steps);
    }

    #[test]
    fn packed_queues_of_any_size_do_the_same(
        size in 1..40u16,
        event_idx: bool,
        steps in proptest::collection::vec(step(), 1..200),
    ) {
        play(Format::Packed, size, event_idx, &steps);
    }
}

#[test]
fn indices_wrap() {
    for format in [Format::Split, Format::Packed] {
        for event_idx in [false, true] {
            let steps: Vec<Step> = (0..70_000)
                .flat_map(|_| {
                    let add = Step::Add {
                        readable: vec![1],
                        writable: vec![2, 3],
                        indirect: false,
                    };
                    [
                        Step::Arm(true),
                        add,
                        Step::Pop,
                        Step::Push(0, 5),
                        Step::Collect,
                    ]
                })
                .collect();
            play(format, 4, event_idx, &steps);
        }
    }
}

/// Keeps what memory looks like after every write of the device.
struct Watched {
    memory: Flat,
    seen: Mutex<Vec<Vec<u8>>>,
}

impl Watched {
    fn look(&self) {
        let mut bytes = vec![0; BYTES];
        self.memory.read(Flat::BASE, &mut bytes).unwrap();
        self.seen.lock().unwrap().push(bytes);
    }
}

impl Memory for Watched {
    fn read(&self, addr: u64, into: &mut [u8]) -> Result<(), MemoryError> {
        self.memory.read(addr, into)
    }

    fn write(&self, addr: u64, from: &[u8]) -> Result<(), MemoryError> {
        self.memory.write(addr, from).map(|()| self.look())
    }

    fn load(&self, addr: u64) -> Result<u16, MemoryError> {
        self.memory.load(addr)
    }

    fn store(&self, addr: u64, value: u16) -> Result<(), MemoryError> {
        self.memory.store(addr, value).map(|()| self.look())
    }
}

#[test]
fn driver_sees_all_or_none_of_what_is_given_back_together() {
    const GROUP: usize = 3;
    for format in [Format::Split, Format::Packed] {
        let setup = setup(format, 4, false);
        let watched = Watched {
            memory: Flat::new(BYTES),
            seen: Mutex::default(),
        };
        let ranges = [(DATA, 8, true)];
        let mut queue = Queue::new(&watched, &setup, Position::start(format)).unwrap();
        let mut real = driver(&setup);
        // Several turns of the ring.
        for round in 0..8 {
            let group: Vec<Done> = (0..GROUP)
                .map(|_| {
                    real.add(&watched.memory, &ranges, false).unwrap();
                    let chain = queue.pop(&watched).unwrap().unwrap();
                    Done { chain, written: 8 }
                })
                .collect();
            watched.seen.lock().unwrap().clear();
            queue.push_all(&watched, group).unwrap();
            let seen: Vec<usize> = (watched.seen.lock().unwrap().iter())
                .map(|bytes| {
                    // A driver of the same history looks at this moment's memory.
                    let history = Flat::new(BYTES);
                    let mut queue = Queue::new(&history, &setup, Position::start(format)).unwrap();
                    let mut other = driver(&setup);
                    for past in 0..=round {
                        for _ in 0..GROUP {
                            other.add(&history, &ranges, false).unwrap();
                            let chain = queue.pop(&history).unwrap().unwrap();
                            if past < round {
                                queue.push(&history, chain, 8).unwrap();
                                assert_eq!(other.collect(&history).len(), 1);
                            }
                        }
                    }
                    other.collect(&Flat::from_bytes(bytes.clone())).len()
                })
                .collect();
            let (last, before) = seen.split_last().unwrap();
            assert_eq!(*last, GROUP);
            assert!(before.len() >= GROUP && before.iter().all(|&count| count == 0));
            assert_eq!(real.collect(&watched.memory).len(), GROUP);
        }
    }
}
