//! Admin commands (section 5): what they ask for, and what can be answered without touching
//! queues, the image or memory.

use super::command::Command;
use super::events::{Event, Events};
use super::features::{Features, Set};
use super::identify::{self, Identity};
use super::logs::{Logs, Totals, Wish};
use super::queue::Place;
use super::registers::Registers;
use super::spec::{MAX_ENTRIES, Status, admin};

/// All of the controller but its queues.
#[derive(Debug)]
pub(super) struct Admin {
    pub(super) registers: Registers,
    pub(super) features: Features,
    pub(super) events: Events,
    pub(super) logs: Logs,
    identity: Identity,
    /// I/O queues that there can be.
    queues: u16,
    vectors: u16,
    /// Doorbells in memory, and the values at which the driver rings.
    pub(super) shadows: Option<[u64; 2]>,
    /// Bytes of a page.
    pub(super) page: u64,
}

/// What the queues are like at the moment.
#[derive(Debug, Clone, Copy)]
pub(super) struct View {
    /// There are I/O queues.
    pub(super) has_queues: bool,
    /// Blocks of the namespace.
    pub(super) blocks: u64,
    pub(super) totals: Totals,
}

/// What is to be done for a command.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Task {
    /// Nothing any more: dword 0 of the answer.
    Done(u32),
    /// Data for the driver.
    Tell(Vec<u8>),
    /// The command waits for an event.
    Wait,
    CreateSq {
        id: u16,
        place: Place,
        cq: u16,
    },
    DeleteSq(u16),
    CreateCq {
        id: u16,
        place: Place,
        vector: Option<u16>,
    },
    DeleteCq(u16),
    /// The write cache is used, or not.
    WriteCache(bool),
    /// Doorbells in memory.
    Shadows([u64; 2]),
}

impl Admin {
    pub(super) fn new(identity: Identity, queues: u16, vectors: u16) -> Self {
        Self {
            registers: Registers::new(),
            features: Features::new(queues, vectors),
            events: Events::default(),
            logs: Logs::new(),
            identity,
            queues,
            vectors,
            shadows: None,
            page: super::spec::PAGE,
        }
    }

    /// The controller is reset: what the driver has told it is forgotten.
    pub(super) fn reset(&mut self) {
        self.features.reset();
        self.events.reset();
        self.shadows = None;
    }

    /// What a command asks for.
    ///
    /// # Errors
    ///
    /// Its status.
    pub(super) fn task(&mut self, command: &Command, view: View) -> Result<Task, Status> {
        command.check()?;
        match command.opcode {
            admin::IDENTIFY => self.identity.tell(command, view.blocks).map(Task::Tell),
            admin::GET_LOG_PAGE => self.log(command, view.totals).map(Task::Tell),
            admin::GET_FEATURES => self.features.get(command).map(Task::Done),
            admin::SET_FEATURES => match self.features.set(command, view.has_queues)? {
                Set::Done(result) => Ok(Task::Done(result)),
                Set::WriteCache(used) => Ok(Task::WriteCache(used)),
                Set::Temperature => {
                    if self.features.is_hot_or_cold() && self.features.tells_temperature() {
                        self.events.note(Event::Temperature);
                    }
                    Ok(Task::Done(0))
                }
            },
            admin::ASYNC_EVENT => {
                self.events.request(command.id)?;
                Ok(Task::Wait)
            }
            admin::ABORT => self.abort(command),
            admin::CREATE_CQ => self.create_cq(command),
            admin::CREATE_SQ => self.create_sq(command),
            admin::DELETE_CQ => self.queue_id(command).map(Task::DeleteCq),
            admin::DELETE_SQ => self.queue_id(command).map(Task::DeleteSq),
            admin::DOORBELL_BUFFERS if self.identity.memory_doorbells => {
                let aligned = |addr: &u64| addr.is_multiple_of(self.page);
                match command.prp.iter().all(aligned) {
                    true => Ok(Task::Shadows(command.prp)),
                    false => Err(Status::INVALID_FIELD),
                }
            }
            _ => Err(Status::INVALID_OPCODE),
        }
    }

    fn log(&mut self, command: &Command, totals: Totals) -> Result<Vec<u8>, Status> {
        let wish = Wish::new(command)?;
        let warns = self.features.is_hot_or_cold();
        let shadows = self.identity.memory_doorbells;
        let told = self.logs.tell(&wish, totals, warns, shadows)?;
        if !wish.retain {
            self.events.was_read(wish.page);
        }
        Ok(told)
    }

    /// Event requests can be aborted; what else there is under way ends by itself.
    fn abort(&mut self, command: &Command) -> Result<Task, Status> {
        let (sq, id) = (command.low(10), command.high(10));
        if sq > self.queues {
            return Err(Status::INVALID_FIELD);
        }
        // Bit 0: not aborted.
        let aborted = sq == 0 && self.events.abort(id);
        Ok(Task::Done(u32::from(!aborted)))
    }

    fn create_cq(&self, command: &Command) -> Result<Task, Status> {
        let id = command.low(10);
        if id == 0 || id > self.features.cqs() {
            return Err(Status::QUEUE_ID);
        }
        let (_, known) = self.registers.entry_sizes();
        let place = self.place(command, known)?;
        let vector = command.high(11);
        let interrupts = command.dword(11) >> 1 & 1 != 0;
        if vector >= self.vectors {
            return Err(Status::VECTOR);
        }
        Ok(Task::CreateCq {
            id,
            place,
            vector: interrupts.then_some(vector),
        })
    }

    fn create_sq(&self, command: &Command) -> Result<Task, Status> {
        let (id, cq) = (command.low(10), command.high(11));
        if cq == 0 || cq > self.features.cqs() {
            return Err(Status::CQ_INVALID);
        }
        if id == 0 || id > self.features.sqs() {
            return Err(Status::QUEUE_ID);
        }
        let (known, _) = self.registers.entry_sizes();
        let place = self.place(command, known)?;
        Ok(Task::CreateSq { id, place, cq })
    }

    /// Where a new queue lies.
    fn place(&self, command: &Command, known_entries: bool) -> Result<Place, Status> {
        let size = u32::from(command.high(10)) + 1;
        if !(2..=MAX_ENTRIES).contains(&size) || !known_entries {
            return Err(Status::QUEUE_SIZE);
        }
        // Contiguous, as CAP.CQR says.
        if command.dword(11) & 1 == 0 {
            return Err(Status::INVALID_FIELD);
        }
        let base = command.prp[0];
        match base.is_multiple_of(self.page) {
            true => Ok(Place { base, size }),
            false => Err(Status::PRP_OFFSET),
        }
    }

    fn queue_id(&self, command: &Command) -> Result<u16, Status> {
        match command.low(10) {
            id if id > 0 && id <= self.queues => Ok(id),
            _ => Err(Status::QUEUE_ID),
        }
    }

    /// The namespace is of another size.
    pub(super) fn namespace_changed(&mut self) {
        self.logs.namespace_changed();
        if self.features.tells_namespace() {
            self.events.note(Event::Namespace);
        }
    }
}

const _: () = assert!(identify::BYTES == super::spec::PAGE as usize);
