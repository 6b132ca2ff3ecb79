//! Queues whose server dies between any two writes, of memory and of the log, and is replaced.

mod support;

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use ioregion_devices::virtio::{Chain, Format, Position, Queue, QueueLog, Setup};
use proptest::prelude::*;
use support::mortal::{Life, Mortal, paper};
use support::{BYTES, DATA, Driver, Flat, Range, driver, setup};

/// What happens next.
#[derive(Debug, Clone)]
enum Step {
    Add {
        ranges: u32,
        indirect: bool,
    },
    Pop,
    /// One of those in flight is carried out and given back.
    Push(usize),
    Collect,
    /// The server dies after so many more writes; its successors after others, until one lives.
    Die(Vec<u64>),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (1..5u32, any::<bool>()).prop_map(|(ranges, indirect)| Step::Add { ranges, indirect }),
        4 => Just(Step::Pop),
        4 => any::<usize>().prop_map(Step::Push),
        2 => Just(Step::Collect),
        2 => proptest::collection::vec(0..20u64, 1..4).prop_map(Step::Die),
    ]
}

/// One request of the driver's.
#[derive(Debug)]
struct Asked {
    number: u64,
    ranges: Vec<Range>,
    carried_out: u32,
}

struct World {
    setup: Setup,
    memory: Flat,
    driver: Box<dyn Driver>,
    log: QueueLog,
    life: Arc<Life>,
    /// Lives of the servers to come.
    lives: VecDeque<u64>,
    queue: Queue,
    taken: BTreeMap<u16, Chain>,
    /// By name.
    asked: BTreeMap<u16, Asked>,
    added: u64,
    back: u64,
    /// The last that this server took.
    popped: Option<u64>,
    deaths: u32,
}

impl World {
    fn new(format: Format, size: u16) -> Self {
        let setup = setup(format, size, false);
        let memory = Flat::new(BYTES);
        let (words, life) = paper(size);
        let log = QueueLog::new(words, 0, size);
        let mut driver = driver(&setup);
        driver.arm(&memory, false);
        let start = Position::start(format);
        let queue = Queue::begin(&memory, &setup, start, log.clone()).unwrap();
        Self {
            setup,
            memory,
            driver,
            log,
            life,
            lives: VecDeque::new(),
            queue,
            taken: BTreeMap::new(),
            asked: BTreeMap::new(),
            added: 0,
            back: 0,
            popped: None,
            deaths: 0,
        }
    }

    /// Whether the server died; then another one has taken up the queue.
    fn died(&mut self) -> bool {
        if self.life.left() > 0 {
            return false;
        }
        while self.life.left() == 0 {
            self.deaths += 1;
            self.life.set(self.lives.pop_front().unwrap_or(Life::LONG));
            assert_eq!(self.log.is_active(), Ok(true));
            let memory = Mortal {
                memory: &self.memory,
                life: &self.life,
            };
            self.queue = Queue::resume(&memory, &self.setup, self.log.clone()).unwrap();
        }
        self.taken.clear();
        self.popped = None;
        true
    }

    fn step(&mut self, step: &Step) {
        match step {
            Step::Add { ranges, indirect } => self.add(*ranges, *indirect),
            // Between death and succession the driver goes on.
            Step::Pop => {
                self.died();
                self.pop();
            }
            Step::Push(which) => {
                self.died();
                self.push(*which);
            }
            Step::Collect => self.collect(),
            Step::Die(lives) => {
                self.died();
                self.lives = lives.iter().copied().collect();
                self.life.set(self.lives.pop_front().unwrap());
            }
        }
    }

    fn add(&mut self, count: u32, indirect: bool) {
        let ranges: Vec<Range> = (0..count)
            .map(|range| {
                let number = self.added * 4 + u64::from(range);
                (DATA + number % 0x1000, 1 + range, range > 0)
            })
            .collect();
        if let Some(id) = self.driver.add(&self.memory, &ranges, indirect) {
            let asked = Asked {
                number: self.added,
                ranges,
                carried_out: 0,
            };
            self.added += 1;
            assert!(self.asked.insert(id, asked).is_none());
        }
    }

    fn pop(&mut self) {
        let memory = Mortal {
            memory: &self.memory,
            life: &self.life,
        };
        let Some(chain) = self.queue.pop(&memory).unwrap() else {
            // Of all others it was said that they are done.
            let taken = |id| self.taken.contains_key(id);
            let done = |(id, asked): (_, &Asked)| taken(id) || asked.carried_out > 0;
            assert!(self.asked.iter().all(done), "a request was overlooked");
            assert_eq!(usize::from(self.queue.in_flight()), self.taken.len());
            return;
        };
        if self.life.left() == 0 {
            return;
        }
        let asked = &self.asked[&chain.id()];
        assert_eq!(ranges_of(&chain), asked.ranges);
        // In the order in which they were added; those that a dead server had taken come first.
        assert!(self.popped.is_none_or(|last| last < asked.number));
        self.popped = Some(asked.number);
        self.taken.insert(chain.id(), chain);
    }

    fn push(&mut self, which: usize) {
        let ids: Vec<u16> = self.taken.keys().copied().collect();
        if ids.is_empty() {
            return;
        }
        let chain = self.taken.remove(&ids[which % ids.len()]).unwrap();
        self.asked.get_mut(&chain.id()).unwrap().carried_out += 1;
        let memory = Mortal {
            memory: &self.memory,
            life: &self.life,
        };
        let written = chain.writable_len();
        self.queue.push(&memory, chain, written).unwrap();
    }

    fn collect(&mut self) {
        // The driver asserts that it waits for each.
        for (id, written) in self.driver.collect(&self.memory) {
            let asked = self.asked.remove(&id).unwrap();
            assert!(asked.carried_out > 0, "given back without being done");
            let expected = asked
                .ranges
                .iter()
                .skip(1)
                .map(|range| range.1)
                .sum::<u32>();
            assert_eq!(written, expected);
            self.back += 1;
        }
    }

    /// The last server lives long enough.
    fn finish(&mut self) {
        self.lives.clear();
        self.died();
        self.life.set(Life::LONG);
        loop {
            while let Some(chain) = self.queue.pop(&self.memory).unwrap() {
                self.taken.insert(chain.id(), chain);
            }
            let Some((id, chain)) = self.taken.pop_last() else {
                break;
            };
            self.asked.get_mut(&id).unwrap().carried_out += 1;
            let written = chain.writable_len();
            self.queue.push(&self.memory, chain, written).unwrap();
        }
        self.collect();
        assert!(self.asked.is_empty(), "lost: {:?}", self.asked);
        assert_eq!(self.back, self.added);
        assert_eq!(self.queue.in_flight(), 0);
        // And the queue goes on: as much as it has room for, twice.
        for _ in 0..2 * self.setup.layout.size {
            self.add(1, false);
            self.pop();
            self.push(0);
            self.collect();
            assert!(self.asked.is_empty());
        }
    }
}

fn ranges_of(chain: &Chain) -> Vec<Range> {
    let readable = chain
        .readable()
        .iter()
        .map(|part| (part.addr, part.len, false));
    let writable = chain
        .writable()
        .iter()
        .map(|part| (part.addr, part.len, true));
    readable.chain(writable).collect()
}

fn play(format: Format, size: u16, steps: &[Step]) -> u32 {
    let mut world = World::new(format, size);
    for step in steps {
        world.step(step);
    }
    world.finish();
    world.deaths
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1024))]

    #[test]
    fn requests_survive_their_servers(
        packed: bool,
        exponent in 0..5u32,
        steps in proptest::collection::vec(step(), 1..200),
    ) {
        let format = if packed { Format::Packed } else { Format::Split };
        play(format, 1 << exponent, &steps);
    }
}

/// Requests of all sizes, given back in another order than they came, over several turns.
fn long_story() -> Vec<Step> {
    let mut steps = Vec::new();
    for turn in 0..6 {
        for number in 0..3 {
            steps.push(Step::Add {
                ranges: 1 + (number + turn) % 3,
                indirect: (number + turn) % 4 == 3,
            });
            steps.push(Step::Pop);
        }
        // The last first, and one stays for the next turn.
        steps.extend([Step::Push(2), Step::Push(1), Step::Collect, Step::Pop]);
    }
    steps
}

#[test]
fn server_may_die_before_any_write_and_its_successor_too() {
    for format in [Format::Split, Format::Packed] {
        let steps = long_story();
        let with_deaths = |lives: Vec<u64>| {
            let die = Step::Die(lives);
            let steps: Vec<Step> = std::iter::once(die).chain(steps.iter().cloned()).collect();
            play(format, 8, &steps)
        };
        let mut world = World::new(format, 8);
        world.life.set(Life::LONG);
        steps.iter().for_each(|step| world.step(step));
        let writes = Life::LONG - world.life.left();
        assert!(writes > 100, "{writes}");
        for first in 0..writes {
            for second in 0..6 {
                assert!(with_deaths(vec![first, second]) > 0, "{first} {second}");
            }
        }
    }
}

#[test]
fn log_that_begins_in_the_middle_of_a_queue_forgets_nothing() {
    // The known bug of such logs: what they say before anything was given back ("last given back:
    // request 0, at index 0") clears a request that is in flight.
    for format in [Format::Split, Format::Packed] {
        let setup = setup(format, 4, false);
        let memory = Flat::new(BYTES);
        let mut driver = driver(&setup);
        let mut queue = Queue::new(&memory, &setup, Position::start(format)).unwrap();
        for _ in 0..3 {
            driver.add(&memory, &[(DATA, 1, false)], false).unwrap();
            let chain = queue.pop(&memory).unwrap().unwrap();
            queue.push(&memory, chain, 0).unwrap();
            driver.collect(&memory);
        }
        let (words, _) = paper(4);
        let log = QueueLog::new(words, 0, 4);
        let position = queue.position();
        let mut queue = Queue::begin(&memory, &setup, position, log.clone()).unwrap();
        let ids: Vec<u16> = (0..4)
            .map(|number| {
                driver
                    .add(&memory, &[(DATA + number, 1, false)], false)
                    .unwrap()
            })
            .collect();
        for id in &ids {
            assert_eq!(queue.pop(&memory).unwrap().unwrap().id(), *id);
        }
        let mut queue = Queue::resume(&memory, &setup, log).unwrap();
        for id in &ids {
            let chain = queue.pop(&memory).unwrap().unwrap();
            assert_eq!(chain.id(), *id);
            queue.push(&memory, chain, 0).unwrap();
        }
        assert_eq!(driver.collect(&memory).len(), 4);
    }
}
