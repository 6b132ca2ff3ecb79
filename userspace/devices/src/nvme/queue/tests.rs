use std::collections::VecDeque;
use std::sync::Mutex;

use proptest::prelude::*;

use super::*;

/// Bytes from address 0 on.
struct Bytes(Mutex<Vec<u8>>);

impl Bytes {
    fn new() -> Self {
        Self(Mutex::new(vec![0; 0x4000]))
    }

    fn with<T>(
        &self,
        addr: u64,
        len: usize,
        act: impl FnOnce(&mut [u8]) -> T,
    ) -> Result<T, MemoryError> {
        let unmapped = MemoryError::Unmapped { addr };
        let start = usize::try_from(addr).map_err(|_| unmapped)?;
        let end = start.checked_add(len).ok_or(unmapped)?;
        let mut bytes = self.0.lock().unwrap();
        bytes.get_mut(start..end).map(act).ok_or(unmapped)
    }
}

impl Memory for Bytes {
    fn read(&self, addr: u64, into: &mut [u8]) -> Result<(), MemoryError> {
        self.with(addr, into.len(), |bytes| into.copy_from_slice(bytes))
    }

    fn write(&self, addr: u64, from: &[u8]) -> Result<(), MemoryError> {
        self.with(addr, from.len(), |bytes| bytes.copy_from_slice(from))
    }

    fn load(&self, addr: u64) -> Result<u16, MemoryError> {
        self.with(addr, 2, |bytes| u16::from_le_bytes([bytes[0], bytes[1]]))
    }

    fn store(&self, addr: u64, value: u16) -> Result<(), MemoryError> {
        self.with(addr, 2, |bytes| bytes.copy_from_slice(&value.to_le_bytes()))
    }
}

const CQ: u64 = 0x1000;
const SHADOW: Shadow = Shadow {
    doorbell: 0x2008,
    event: 0x3008,
};

fn entry(command: u16) -> Entry {
    Entry {
        result: 0x1234_5678,
        sq_head: 3,
        sq: 7,
        command,
        status: Status::INVALID_FIELD,
    }
}

#[test]
fn answer_is_as_the_specification_has_it() {
    let memory = Bytes::new();
    let mut cq = Cq::new(Place { base: CQ, size: 2 }, Some(5));
    // Two rounds and a half: the phase bit changes with each round.
    for (number, phase) in [1, 1, 0, 0, 1].into_iter().enumerate() {
        assert_eq!(cq.reserve(&memory), Ok(Ok(true)));
        assert_eq!(cq.post(&memory, entry(0x0a0b)), Ok(Some(5)));
        // Of two entries one is always free.
        assert_eq!(cq.reserve(&memory), Ok(Ok(false)));
        let mut bytes = [0; 16];
        let at = CQ + 16 * (number as u64 % 2);
        memory.read(at, &mut bytes).unwrap();
        let expected = [0x78, 0x56, 0x34, 0x12, 0, 0, 0, 0, 3, 0, 7, 0, 0x0b, 0x0a];
        assert_eq!(bytes[..14], expected);
        let status = u16::from_le_bytes([bytes[14], bytes[15]]);
        assert_eq!(status, 0x4002 << 1 | phase);
        let next = (number as u64 + 1) % 2;
        assert_eq!(cq.ring(&memory, Some(next)), Ok(Ok(true)));
    }
}

#[test]
fn room_that_is_kept_is_nobody_elses() {
    let memory = Bytes::new();
    let mut cq = Cq::new(Place { base: CQ, size: 4 }, None);
    for _ in 0..3 {
        assert_eq!(cq.reserve(&memory), Ok(Ok(true)));
    }
    assert_eq!(cq.reserve(&memory), Ok(Ok(false)));
    cq.release();
    assert_eq!(cq.reserve(&memory), Ok(Ok(true)));
    assert_eq!(cq.post(&memory, entry(1)), Ok(None));
    // Not past what was posted.
    assert_eq!(cq.ring(&memory, Some(2)), Ok(Err(BadValue(2))));
    assert_eq!(cq.ring(&memory, Some(1)), Ok(Ok(true)));
    assert_eq!(cq.ring(&memory, Some(1)), Ok(Ok(false)));
    assert_eq!(cq.ring(&memory, None), Err(Broken::NoValue));
}

#[test]
fn driver_that_writes_to_memory_alone_is_seen_before_the_controller_looks_away() {
    /// A driver that submits at the very moment at which the controller says when to ring.
    struct Late(Bytes);
    impl Memory for Late {
        fn read(&self, addr: u64, into: &mut [u8]) -> Result<(), MemoryError> {
            self.0.read(addr, into)
        }
        fn write(&self, addr: u64, from: &[u8]) -> Result<(), MemoryError> {
            self.0.write(addr, from)
        }
        fn load(&self, addr: u64) -> Result<u16, MemoryError> {
            self.0.load(addr)
        }
        fn store(&self, addr: u64, value: u16) -> Result<(), MemoryError> {
            if addr == SHADOW.event {
                // It has not seen the new event index: it does not ring.
                self.0.store(SHADOW.doorbell, 1)?;
            }
            self.0.store(addr, value)
        }
    }
    let memory = Late(Bytes::new());
    let mut sq = Sq::new(Place { base: 0, size: 8 }, 1, 4096);
    sq.shadow = Some(SHADOW);
    assert_eq!(sq.look(&memory), Ok(Ok(true)));
    sq.take(&memory).unwrap();
    assert_eq!(sq.look(&memory), Ok(Ok(false)));
    assert_eq!(memory.load(SHADOW.event), Ok(1));
}

#[derive(Debug, Clone)]
enum Step {
    Submit(u32),
    Kick,
    Take,
    Post,
    Consume,
    Head,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        (1u32..6).prop_map(Step::Submit),
        Just(Step::Kick),
        Just(Step::Take),
        Just(Step::Take),
        Just(Step::Post),
        Just(Step::Post),
        Just(Step::Consume),
        Just(Step::Head),
    ];
    proptest::collection::vec(step, 1..300)
}

proptest! {
    /// A driver that follows the rules: each command is taken once, in order, and answered once,
    /// with doorbells in registers or in memory (where it rings as they say).
    #[test]
    fn commands_are_taken_and_answered_once(
        steps in steps(),
        sq_size in 2u32..9,
        cq_size in 2u32..9,
        shadowed in any::<bool>(),
    ) {
        let memory = Bytes::new();
        let mut sq = Sq::new(Place { base: 0, size: sq_size }, 1, 4096);
        let mut cq = Cq::new(Place { base: CQ, size: cq_size }, None);
        let cq_shadow = Shadow { doorbell: SHADOW.doorbell + 4, event: SHADOW.event + 4 };
        if shadowed {
            sq.set_shadow(&memory, SHADOW).unwrap();
            cq.set_shadow(&memory, cq_shadow).unwrap();
        }
        // The driver's rule: whether the register is to be written.
        let ring = |shadow: Shadow, value: u32| {
            if !shadowed {
                return true;
            }
            let old = memory.load(shadow.doorbell).unwrap();
            memory.store(shadow.doorbell, value as u16).unwrap();
            let event = memory.load(shadow.event).unwrap();
            (value as u16).wrapping_sub(event).wrapping_sub(1) < (value as u16).wrapping_sub(old)
        };
        let (mut tail, mut next) = (0u32, 0u16);
        // What the driver knows to be free.
        let mut used = 0;
        let (mut head, mut phase) = (0u32, 1u16);
        let mut taken: VecDeque<u16> = VecDeque::new();
        let (mut expected, mut answered) = (0u16, 0u16);
        let mut asleep = false;
        for step in steps {
            match step {
                Step::Submit(count) => {
                    for _ in 0..count {
                        if used + 1 >= sq_size {
                            break;
                        }
                        memory.store(u64::from(tail) * 64 + 2, next).unwrap();
                        tail = (tail + 1) % sq_size;
                        next = next.wrapping_add(1);
                        used += 1;
                    }
                }
                Step::Kick => {
                    if ring(SHADOW, tail) {
                        prop_assert_eq!(sq.ring(Some(tail.into())), Ok(Ok(())));
                        asleep = false;
                    }
                }
                Step::Take => {
                    // As a channel does: only where it was woken.
                    if asleep {
                        continue;
                    }
                    match sq.look(&memory) {
                        Ok(Ok(true)) => match cq.reserve(&memory) {
                            Ok(Ok(true)) => {
                                let entry = sq.take(&memory).unwrap();
                                let command = u16::from_le_bytes([entry[2], entry[3]]);
                                prop_assert_eq!(command, expected);
                                expected = expected.wrapping_add(1);
                                taken.push_back(command);
                            }
                            Ok(Ok(false)) => asleep = true,
                            other => prop_assert!(false, "{:?}", other),
                        },
                        Ok(Ok(false)) => asleep = true,
                        other => prop_assert!(false, "{:?}", other),
                    }
                }
                Step::Post => {
                    if let Some(command) = taken.pop_front() {
                        let entry = Entry { sq_head: sq.head(), ..entry(command) };
                        cq.post(&memory, entry).unwrap();
                        prop_assert_eq!(cq.follow(&memory), Ok(Ok(())));
                        sq.under_way -= 1;
                    }
                }
                Step::Consume => {
                    let at = CQ + u64::from(head) * 16;
                    if memory.load(at + 14).unwrap() & 1 == phase {
                        prop_assert_eq!(memory.load(at + 12).unwrap(), answered);
                        answered = answered.wrapping_add(1);
                        let sq_head = u32::from(memory.load(at + 8).unwrap());
                        used = (tail + sq_size - sq_head) % sq_size;
                        head = (head + 1) % cq_size;
                        phase ^= u16::from(head == 0);
                    }
                }
                Step::Head => {
                    if ring(cq_shadow, head) {
                        match cq.ring(&memory, Some(head.into())) {
                            Ok(Ok(waited)) => asleep &= !waited,
                            other => prop_assert!(false, "{:?}", other),
                        }
                    }
                }
            }
        }
        // In the end all are answered: nobody sleeps for good.
        for _ in 0..200 {
            if ring(SHADOW, tail) {
                prop_assert_eq!(sq.ring(Some(tail.into())), Ok(Ok(())));
                asleep = false;
            }
            while !asleep && sq.look(&memory) == Ok(Ok(true)) {
                if cq.reserve(&memory) != Ok(Ok(true)) {
                    asleep = true;
                    break;
                }
                let entry = sq.take(&memory).unwrap();
                taken.push_back(u16::from_le_bytes([entry[2], entry[3]]));
            }
            while let Some(command) = taken.pop_front() {
                cq.post(&memory, Entry { sq_head: sq.head(), ..entry(command) }).unwrap();
                prop_assert_eq!(cq.follow(&memory), Ok(Ok(())));
            }
            loop {
                let at = CQ + u64::from(head) * 16;
                if memory.load(at + 14).unwrap() & 1 != phase {
                    break;
                }
                prop_assert_eq!(memory.load(at + 12).unwrap(), answered);
                answered = answered.wrapping_add(1);
                head = (head + 1) % cq_size;
                phase ^= u16::from(head == 0);
            }
            if ring(cq_shadow, head) && cq.ring(&memory, Some(head.into())) == Ok(Ok(true)) {
                asleep = false;
            }
        }
        prop_assert_eq!(answered, next);
    }

    /// Whatever value a doorbell gets: it is taken or refused, and the queue stays in its bounds.
    #[test]
    fn any_value_is_taken_or_refused(values in proptest::collection::vec(
        prop_oneof![0u64..12, any::<u64>()], 1..50), size in 2u32..9) {
        let memory = Bytes::new();
        let mut sq = Sq::new(Place { base: 0, size }, 1, 4096);
        let mut cq = Cq::new(Place { base: CQ, size }, None);
        for value in values {
            let fits = value < u64::from(size);
            prop_assert_eq!(sq.ring(Some(value)), Ok(if fits { Ok(()) } else { Err(BadValue(value)) }));
            while sq.look(&memory) == Ok(Ok(true)) {
                sq.take(&memory).unwrap();
                if cq.reserve(&memory) == Ok(Ok(true)) {
                    cq.post(&memory, entry(0)).unwrap();
                }
            }
            let posted = cq.place.distance(cq.head, cq.tail);
            let inside = fits && cq.place.distance(cq.head, value as u32) <= posted;
            prop_assert_eq!(matches!(cq.ring(&memory, Some(value)), Ok(Ok(_))), inside);
            prop_assert!(cq.head < size && cq.tail < size && cq.reserved == 0);
        }
    }
}
