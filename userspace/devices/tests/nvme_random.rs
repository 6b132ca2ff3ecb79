//! Admin commands in any order, against a model of what the specification says about them.

mod nvme_rig;
mod support;

use std::collections::HashMap;

use ioregion_devices::nvme::Options;
use nvme_rig::{CSTS, PAGE, RDY, Rig, Way, sqe};
use proptest::prelude::*;

const QUEUES: u16 = 3;
const VECTORS: u16 = 4;

const OK: u16 = 0;
const OPCODE: u16 = 0x01;
const FIELD: u16 = 0x02;
const NAMESPACE: u16 = 0x0b;
const SEQUENCE: u16 = 0x0c;
const OFFSET: u16 = 0x13;
const CQ_INVALID: u16 = 0x100;
const QUEUE_ID: u16 = 0x101;
const QUEUE_SIZE: u16 = 0x102;
const EVENT_LIMIT: u16 = 0x105;
const VECTOR: u16 = 0x108;
const DELETION: u16 = 0x10c;

#[derive(Debug, Clone)]
enum Step {
    CreateCq {
        id: u16,
        size: u32,
        contiguous: bool,
        vector: u16,
        aligned: bool,
    },
    CreateSq {
        id: u16,
        size: u32,
        contiguous: bool,
        cq: u16,
        aligned: bool,
    },
    DeleteSq(u16),
    DeleteCq(u16),
    SetQueues(u16, u16),
    GetQueues,
    Identify(u32, u32),
    WriteCache(bool),
    Event,
    Abort(u16),
    Unknown(u8),
    /// A flush on a queue.
    Io(u16),
    Doorbell(u16, bool, u64),
    Reset,
}

fn step() -> impl Strategy<Value = Step> {
    let id = || 0u16..QUEUES + 2;
    let size = || {
        prop_oneof![
            2u32..16,
            2u32..16,
            Just(1),
            Just(1024),
            Just(1025),
            Just(65536)
        ]
    };
    let mostly = || prop_oneof![Just(true), Just(true), Just(true), any::<bool>()];
    prop_oneof![
        3 => (id(), size(), mostly(), 0u16..VECTORS + 1, mostly()).prop_map(
            |(id, size, contiguous, vector, aligned)| Step::CreateCq { id, size, contiguous, vector, aligned }
        ),
        3 => (id(), size(), mostly(), id(), mostly()).prop_map(
            |(id, size, contiguous, cq, aligned)| Step::CreateSq { id, size, contiguous, cq, aligned }
        ),
        2 => id().prop_map(Step::DeleteSq),
        2 => id().prop_map(Step::DeleteCq),
        1 => (any::<u16>(), 0u16..5).prop_map(|(one, two)| Step::SetQueues(one, two)),
        1 => (0u16..5, 0u16..5).prop_map(|(one, two)| Step::SetQueues(one, two)),
        1 => Just(Step::GetQueues),
        1 => (0u32..5, 0u32..3).prop_map(|(cns, nsid)| Step::Identify(cns, nsid)),
        1 => any::<bool>().prop_map(Step::WriteCache),
        1 => Just(Step::Event),
        1 => (0u16..6).prop_map(Step::Abort),
        1 => any::<u8>().prop_map(Step::Unknown),
        3 => id().prop_map(Step::Io),
        2 => (1u16..QUEUES + 1, any::<bool>(), prop_oneof![0u64..20, any::<u64>()])
            .prop_map(|(id, head, value)| Step::Doorbell(id, head, value)),
        1 => Just(Step::Reset),
    ]
}

/// What there should be.
#[derive(Debug, Default)]
struct Model {
    cqs: HashMap<u16, u32>,
    /// Size and completion queue.
    sqs: HashMap<u16, (u32, u16)>,
    queues: [u16; 2],
    events: Vec<u16>,
    write_cache: bool,
}

impl Model {
    fn new() -> Self {
        Self {
            queues: [QUEUES - 1; 2],
            write_cache: true,
            ..Self::default()
        }
    }

    fn place(size: u32, contiguous: bool, aligned: bool) -> u16 {
        match (size, contiguous, aligned) {
            (..2 | 1025.., ..) => QUEUE_SIZE,
            (_, false, _) => FIELD,
            (_, _, false) => OFFSET,
            _ => OK,
        }
    }

    fn create_cq(&self, id: u16, size: u32, contiguous: bool, vector: u16, aligned: bool) -> u16 {
        if id == 0 || id > self.queues[1] + 1 {
            return QUEUE_ID;
        }
        match Self::place(size, contiguous, aligned) {
            OK if vector >= VECTORS => VECTOR,
            OK if self.cqs.contains_key(&id) => QUEUE_ID,
            status => status,
        }
    }

    fn create_sq(&self, id: u16, size: u32, contiguous: bool, cq: u16, aligned: bool) -> u16 {
        if cq == 0 || cq > self.queues[1] + 1 {
            return CQ_INVALID;
        }
        if id == 0 || id > self.queues[0] + 1 {
            return QUEUE_ID;
        }
        match Self::place(size, contiguous, aligned) {
            OK if !self.cqs.contains_key(&cq) => CQ_INVALID,
            OK if self.sqs.contains_key(&id) => QUEUE_ID,
            status => status,
        }
    }

    fn delete_cq(&self, id: u16) -> u16 {
        match self.cqs.contains_key(&id) {
            false => QUEUE_ID,
            true if self.sqs.values().any(|(_, cq)| *cq == id) => DELETION,
            true => OK,
        }
    }
}

struct Game {
    rig: Rig,
    model: Model,
    page: u64,
}

impl Game {
    fn create(
        &mut self,
        opcode: u8,
        id: u16,
        size: u32,
        low: u32,
        high: u16,
        aligned: bool,
    ) -> u16 {
        let base = self.page_of(opcode, id) + if aligned { 0 } else { 64 };
        let dwords = [
            (10, u32::from(id) | (size - 1) << 16),
            (11, low | u32::from(high) << 16),
        ];
        self.rig.ask(sqe(opcode, 0, [base, 0], &dwords)).status
    }

    /// Sixteen pages for each queue.
    fn page_of(&self, opcode: u8, id: u16) -> u64 {
        self.page + PAGE * 16 * (u64::from(id) * 2 + u64::from(opcode == 1))
    }

    fn step(&mut self, step: &Step) -> Result<(), TestCaseError> {
        match *step {
            Step::CreateCq {
                id,
                size,
                contiguous,
                vector,
                aligned,
            } => {
                let expected = self.model.create_cq(id, size, contiguous, vector, aligned);
                let base = self.page_of(5, id);
                if expected == OK {
                    self.rig.add_cq(id, base, size);
                    self.model.cqs.insert(id, size);
                }
                let low = 2 | u32::from(contiguous);
                let status = self.create(5, id, size, low, vector, aligned);
                prop_assert_eq!(status, expected);
            }
            Step::CreateSq {
                id,
                size,
                contiguous,
                cq,
                aligned,
            } => {
                let expected = self.model.create_sq(id, size, contiguous, cq, aligned);
                let base = self.page_of(1, id);
                if expected == OK {
                    self.rig.add_sq(id, base, size);
                    self.model.sqs.insert(id, (size, cq));
                }
                let status = self.create(1, id, size, contiguous.into(), cq, aligned);
                prop_assert_eq!(status, expected);
            }
            Step::DeleteSq(id) => {
                let there = self.model.sqs.remove(&id).is_some();
                let expected = if there { OK } else { QUEUE_ID };
                prop_assert_eq!(self.rig.delete_sq(id), expected);
            }
            Step::DeleteCq(id) => {
                let expected = self.model.delete_cq(id);
                if expected == OK {
                    self.model.cqs.remove(&id);
                }
                prop_assert_eq!(self.rig.delete_cq(id), expected);
            }
            Step::SetQueues(sqs, cqs) => {
                let busy = !self.model.cqs.is_empty() || !self.model.sqs.is_empty();
                let expected = if sqs == 0xffff || cqs == 0xffff {
                    Err(FIELD)
                } else if busy {
                    Err(SEQUENCE)
                } else {
                    self.model.queues = [sqs, cqs].map(|asked| asked.min(QUEUES - 1));
                    Ok(self.queues())
                };
                let dword = u32::from(sqs) | u32::from(cqs) << 16;
                prop_assert_eq!(self.rig.set_feature(7, dword), expected);
            }
            Step::GetQueues => {
                prop_assert_eq!(self.rig.get_feature(7, 0), Ok(self.queues()));
            }
            Step::Identify(cns, nsid) => {
                let expected = match (cns, nsid) {
                    (0 | 3, 1) | (1 | 2, _) => OK,
                    (0 | 3, _) => NAMESPACE,
                    _ => FIELD,
                };
                let page = self.page;
                let status = self.rig.ask(sqe(6, nsid, [page, 0], &[(10, cns)])).status;
                prop_assert_eq!(status, expected);
            }
            Step::WriteCache(used) => {
                let before = u32::from(self.model.write_cache);
                prop_assert_eq!(self.rig.get_feature(6, 0), Ok(before));
                prop_assert_eq!(self.rig.set_feature(6, used.into()), Ok(0));
                self.model.write_cache = used;
            }
            Step::Event => {
                let command = self.rig.push(0, sqe(0x0c, 0, [0; 2], &[]));
                self.rig.kick(0);
                if self.model.events.len() == 4 {
                    let answer = self.rig.answer(0);
                    prop_assert_eq!((answer.command, answer.status), (command, EVENT_LIMIT));
                } else {
                    self.model.events.push(command);
                }
            }
            Step::Abort(which) => {
                let which = usize::from(which);
                let known =
                    (which < self.model.events.len()).then(|| self.model.events.remove(which));
                let name = u32::from(known.unwrap_or(0xfff0)) << 16;
                let abort = self.rig.push(0, sqe(8, 0, [0; 2], &[(10, name)]));
                self.rig.kick(0);
                let mut answers = vec![self.rig.answer(0)];
                if known.is_some() {
                    answers.push(self.rig.answer(0));
                }
                let find = |command: u16| answers.iter().find(|answer| answer.command == command);
                let answer = find(abort).expect("an answer to Abort");
                prop_assert_eq!(
                    (answer.status, answer.result),
                    (OK, u32::from(known.is_none()))
                );
                if let Some(known) = known {
                    prop_assert_eq!(find(known).map(|answer| answer.status), Some(0x07));
                }
            }
            Step::Unknown(opcode) => {
                if ![0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 0x7c].contains(&opcode) {
                    prop_assert_eq!(self.rig.ask(sqe(opcode, 0, [0; 2], &[])).status, OPCODE);
                }
            }
            Step::Io(id) => {
                if let Some((_, cq)) = self.model.sqs.get(&id).copied() {
                    let command = self.rig.push(id, sqe(0, 1, [0; 2], &[]));
                    self.rig.kick(id);
                    let answer = self.rig.answer(cq);
                    prop_assert_eq!(
                        (answer.sq, answer.command, answer.status),
                        (id, command, OK)
                    );
                }
            }
            Step::Doorbell(id, head, value) => {
                // None that is of use: those that are out of range, or of no queue.
                let size = match head {
                    true => self.model.cqs.get(&id).copied(),
                    false => self.model.sqs.get(&id).map(|(size, _)| *size),
                };
                if size.is_none_or(|size| value >= size.into()) {
                    self.rig
                        .ring_with(id, if head { 4 } else { 0 }, Some(value));
                    self.told(if size.is_some() {
                        0x0001_0100
                    } else {
                        0x0001_0000
                    })?;
                }
            }
            Step::Reset => {
                self.rig.disable();
                self.rig.enable(32);
                self.model = Model::new();
            }
        }
        prop_assert_eq!(self.rig.read(CSTS), RDY);
        Ok(())
    }

    fn queues(&self) -> u32 {
        u32::from(self.model.queues[0]) | u32::from(self.model.queues[1]) << 16
    }

    /// An event is told to the first that asked, or kept until somebody does.
    fn told(&mut self, result: u32) -> Result<(), TestCaseError> {
        if self.model.events.is_empty() {
            let command = self.rig.push(0, sqe(0x0c, 0, [0; 2], &[]));
            self.rig.kick(0);
            self.model.events.push(command);
        }
        let answer = self.rig.answer(0);
        prop_assert_eq!(
            (answer.command, answer.result),
            (self.model.events.remove(0), result)
        );
        // To hear of the next.
        let page = self.page;
        let log = sqe(2, 0, [page, 0], &[(10, 1 | 15 << 16)]);
        prop_assert_eq!(self.rig.ask(log).status, OK);
        Ok(())
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, ..ProptestConfig::default() })]

    #[test]
    fn admin_commands_in_any_order_end_as_the_model_says(
        steps in proptest::collection::vec(step(), 1..120),
        server in any::<bool>(),
    ) {
        let options = Options { queues: QUEUES, vectors: VECTORS, ..Options::default() };
        let way = if server { Way::AtOnce } else { Way::Anybody };
        let mut rig = Rig::new(way, &options);
        let page = rig.pages(16 * 2 * 6);
        rig.enable(32);
        let mut game = Game { rig, model: Model::new(), page };
        for step in &steps {
            game.step(step)?;
        }
    }
}
