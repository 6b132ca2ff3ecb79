//! The controller's queues, shared by the threads that serve it.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use nix::sys::eventfd::EventFd;

use super::command::Command;
use super::commands::Outcome;
use super::controller::{Controller, FATAL, RUNNING, lock};
use super::events::Event;
use super::io::Kind;
use super::logs::Totals;
use super::queue::{Cq, Entry, Place, Shadow, Sq};
use super::spec::Status;
use super::wait::Then;

/// What there is for a queue number.
#[derive(Debug, Default)]
pub(super) struct Slot {
    pub(super) sq: Mutex<Option<Sq>>,
    pub(super) cq: Mutex<Option<Cq>>,
    channel: Mutex<Channel>,
    reads: AtomicU64,
    writes: AtomicU64,
    sectors_read: AtomicU64,
    sectors_written: AtomicU64,
}

/// The channel with the doorbells of a queue number, where a server waits for it.
#[derive(Debug, Default)]
struct Channel {
    wake: Option<Arc<EventFd>>,
    /// Who waits until doorbells that are on their way have arrived.
    fences: Vec<u64>,
    /// There were such, and they may not all have arrived.
    late: usize,
}

impl Slot {
    pub(super) fn totals(&self) -> Totals {
        Totals {
            reads: self.reads.load(Ordering::Relaxed),
            writes: self.writes.load(Ordering::Relaxed),
            sectors_read: self.sectors_read.load(Ordering::Relaxed),
            sectors_written: self.sectors_written.load(Ordering::Relaxed),
        }
    }

    pub(super) fn count(&self, kind: Kind) {
        let (commands, all, sectors) = match kind {
            Kind::Read(sectors) => (&self.reads, &self.sectors_read, sectors),
            Kind::Write(sectors) => (&self.writes, &self.sectors_written, sectors),
            Kind::Other => return,
        };
        commands.fetch_add(1, Ordering::Relaxed);
        all.fetch_add(sectors.into(), Ordering::Relaxed);
    }
}

/// What the driver is told about a command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Answer {
    pub(super) command: u16,
    pub(super) result: u32,
    pub(super) status: Status,
}

impl Controller {
    /// Takes a command of a submission queue, if there is one and its answer has room; with the
    /// size of its pages.
    pub(super) fn take(&self, id: u16) -> Option<(Command, u64)> {
        let slot = self.slots.get(usize::from(id))?;
        if self.is(FATAL) || id > 0 && !self.is(RUNNING) {
            return None;
        }
        let memory = &*self.memory;
        let mut guard = lock(&slot.sq);
        let sq = guard.as_mut().filter(|sq| sq.is_open())?;
        let looked = sq.look(memory);
        let taken = match looked {
            Ok(Ok(false)) => return None,
            Ok(Ok(true)) => {
                let mut cq = lock(&self.slots.get(usize::from(sq.cq))?.cq);
                let cq = cq.as_mut()?;
                match cq.reserve(memory) {
                    Ok(Ok(false)) => return None,
                    Ok(Ok(true)) => sq.take(memory).map(Ok).inspect_err(|_| cq.release()),
                    Ok(Err(bad)) => Ok(Err(bad)),
                    Err(broken) => Err(broken),
                }
            }
            Ok(Err(bad)) => Ok(Err(bad)),
            Err(broken) => Err(broken),
        };
        let page = sq.page;
        drop(guard);
        match taken {
            Ok(Ok(entry)) => Some((Command::decode(&entry), page)),
            Ok(Err(bad)) => {
                tracing::debug!(queue = id, value = bad.0, "NVMe: a doorbell in memory");
                self.note_doorbell(id, Event::DoorbellValue);
                None
            }
            Err(broken) => {
                self.fatal(&format!("submission queue {id}: {broken}"));
                None
            }
        }
    }

    /// A command of a submission queue is over, with an answer or without: the interrupt to
    /// raise.
    pub(super) fn answer(&self, id: u16, answer: Option<Answer>) -> Option<u16> {
        let slot = self.slots.get(usize::from(id))?;
        let memory = &*self.memory;
        let mut guard = lock(&slot.sq);
        let sq = guard.as_mut()?;
        sq.under_way = sq.under_way.saturating_sub(1);
        let over = sq.under_way == 0 && !sq.is_open();
        let mut posted = Ok(None);
        let mut followed = Ok(Ok(()));
        if !sq.silent
            && let Some(cq_slot) = self.slots.get(usize::from(sq.cq))
            && let Some(cq) = lock(&cq_slot.cq).as_mut()
        {
            match answer {
                Some(answer) => {
                    let entry = Entry {
                        result: answer.result,
                        sq_head: sq.head(),
                        sq: id,
                        command: answer.command,
                        status: answer.status,
                    };
                    posted = cq.post(memory, entry);
                    followed = cq.follow(memory);
                }
                None => cq.release(),
            }
            if over {
                cq.users = cq.users.saturating_sub(1);
            }
        }
        let cq = sq.cq;
        let ended = match over {
            true => guard.take().map(|sq| sq.ended).unwrap_or_default(),
            false => Vec::new(),
        };
        drop(guard);
        for wait in ended {
            self.done(wait);
        }
        if let Ok(Err(_)) = followed {
            self.note_doorbell(cq, Event::DoorbellValue);
        }
        match followed.and(posted) {
            Ok(vector) => vector,
            Err(broken) => {
                self.fatal(&format!("completion queue {cq}: {broken}"));
                None
            }
        }
    }

    /// Keeps room for an answer to a command of the admin queue that is not under way any more.
    pub(super) fn keep_room(&self) -> bool {
        let Some(slot) = self.slots.first() else {
            return false;
        };
        let mut sq = lock(&slot.sq);
        let Some(sq) = sq.as_mut().filter(|sq| sq.is_open()) else {
            return false;
        };
        let mut cq = lock(&slot.cq);
        let room = cq.as_mut().map(|cq| cq.reserve(&*self.memory));
        let room = matches!(room, Some(Ok(Ok(true))));
        sq.under_way += u32::from(room);
        room
    }

    /// The doorbell of a submission queue rang.
    pub(super) fn ring_sq(&self, id: u16, value: Option<u64>) {
        let Some(slot) = self.slots.get(usize::from(id)) else {
            return self.note_doorbell(id, Event::NoSuchDoorbell);
        };
        let rung = match lock(&slot.sq).as_mut() {
            Some(sq) if !sq.is_open() => return,
            Some(sq) => Some(sq.ring(value)),
            None => None,
        };
        match rung {
            None => self.no_queue(id, slot),
            Some(Ok(Ok(()))) => {}
            Some(Ok(Err(_))) => self.note_doorbell(id, Event::DoorbellValue),
            Some(Err(broken)) => self.fatal(&format!("submission queue {id}: {broken}")),
        }
    }

    /// The doorbell of a completion queue rang: the submission queues that waited for that.
    pub(super) fn ring_cq(&self, id: u16, value: Option<u64>) -> Vec<u16> {
        let Some(slot) = self.slots.get(usize::from(id)) else {
            self.note_doorbell(id, Event::NoSuchDoorbell);
            return Vec::new();
        };
        let rung = lock(&slot.cq)
            .as_mut()
            .map(|cq| cq.ring(&*self.memory, value));
        match rung {
            None => self.no_queue(id, slot),
            Some(Ok(Ok(false))) => {}
            Some(Ok(Ok(true))) => {
                let uses = |slot: &Slot| lock(&slot.sq).as_ref().is_some_and(|sq| sq.cq == id);
                let numbered = (0..).zip(&self.slots);
                let users = numbered.filter(|(_, slot)| uses(slot));
                return users.map(|(id, _)| id).collect();
            }
            Some(Ok(Err(_))) => self.note_doorbell(id, Event::DoorbellValue),
            Some(Err(broken)) => self.fatal(&format!("completion queue {id}: {broken}")),
        }
        Vec::new()
    }

    /// A doorbell of no queue rang. What was on its way when the queue went is no error.
    fn no_queue(&self, id: u16, slot: &Slot) {
        if lock(&slot.channel).late == 0 {
            self.note_doorbell(id, Event::NoSuchDoorbell);
        }
    }

    pub(super) fn has_queues(&self) -> bool {
        let mut slots = self.slots.iter().skip(1);
        slots.any(|slot| lock(&slot.sq).is_some() || lock(&slot.cq).is_some())
    }

    pub(super) fn create_cq(
        &self,
        id: u16,
        place: Place,
        vector: Option<u16>,
    ) -> Result<Outcome, Status> {
        let slot = self.slots.get(usize::from(id)).ok_or(Status::QUEUE_ID)?;
        let shadow = shadow(self.shadows(), id, 4);
        let mut guard = lock(&slot.cq);
        if guard.is_some() {
            return Err(Status::QUEUE_ID);
        }
        let mut cq = Cq::new(place, vector);
        if let Some(shadow) = shadow {
            let set = cq.set_shadow(&*self.memory, shadow);
            set.map_err(|_| Status::INTERNAL)?;
        }
        *guard = Some(cq);
        Ok(Outcome::Answer(0))
    }

    pub(super) fn create_sq(
        &self,
        id: u16,
        place: Place,
        cq: u16,
        page: u64,
    ) -> Result<Outcome, Status> {
        let slot = self.slots.get(usize::from(id)).ok_or(Status::QUEUE_ID)?;
        let cq_slot = self.slots.get(usize::from(cq)).ok_or(Status::CQ_INVALID)?;
        let shadow = shadow(self.shadows(), id, 0);
        let mut guard = lock(&slot.sq);
        let mut cq_guard = lock(&cq_slot.cq);
        let users = cq_guard.as_mut().ok_or(Status::CQ_INVALID)?;
        if guard.is_some() {
            return Err(Status::QUEUE_ID);
        }
        let mut sq = Sq::new(place, cq, page);
        if let Some(shadow) = shadow {
            let set = sq.set_shadow(&*self.memory, shadow);
            set.map_err(|_| Status::INTERNAL)?;
        }
        users.users += 1;
        *guard = Some(sq);
        Ok(Outcome::Answer(0))
    }

    /// Commands under way are carried out and answered; others are forgotten.
    pub(super) fn delete_sq(&self, id: u16, command: u16) -> Result<Outcome, Status> {
        let slot = self.slots.get(usize::from(id)).ok_or(Status::QUEUE_ID)?;
        if !lock(&slot.sq).as_ref().is_some_and(Sq::is_open) {
            return Err(Status::QUEUE_ID);
        }
        // Nobody else deletes it meanwhile: admin commands come one after the other.
        let wait = self.wait_for_queue(Then::Answer(command));
        let idle = {
            let mut guard = lock(&slot.sq);
            match guard.as_mut() {
                Some(sq) if sq.under_way > 0 => {
                    sq.ended.push(wait);
                    false
                }
                Some(sq) => {
                    if let Some(cq_slot) = self.slots.get(usize::from(sq.cq))
                        && let Some(cq) = lock(&cq_slot.cq).as_mut()
                    {
                        cq.users = cq.users.saturating_sub(1);
                    }
                    *guard = None;
                    true
                }
                None => true,
            }
        };
        if idle {
            self.done(wait);
        }
        self.fence(slot, wait);
        Ok(Outcome::Later)
    }

    pub(super) fn delete_cq(&self, id: u16, command: u16) -> Result<Outcome, Status> {
        let slot = self.slots.get(usize::from(id)).ok_or(Status::QUEUE_ID)?;
        {
            let mut guard = lock(&slot.cq);
            match guard.as_ref() {
                None => return Err(Status::QUEUE_ID),
                Some(cq) if cq.users > 0 => return Err(Status::QUEUE_DELETION),
                Some(_) => *guard = None,
            }
        }
        let wait = self.wait_for_channel(Then::Answer(command));
        self.fence(slot, wait);
        Ok(Outcome::Later)
    }

    /// Doorbells of the I/O queues are in memory from now on.
    pub(super) fn set_shadows(&self, at: [u64; 2]) -> Result<Outcome, Status> {
        let memory = &*self.memory;
        for (id, slot) in (0..).zip(&self.slots).skip(1) {
            if let Some(sq) = lock(&slot.sq).as_mut()
                && let Some(shadow) = shadow(Some(at), id, 0)
            {
                let set = sq.set_shadow(memory, shadow);
                set.map_err(|_| Status::INVALID_FIELD)?;
            }
            if let Some(cq) = lock(&slot.cq).as_mut()
                && let Some(shadow) = shadow(Some(at), id, 4)
            {
                let set = cq.set_shadow(memory, shadow);
                set.map_err(|_| Status::INVALID_FIELD)?;
            }
        }
        self.keep_shadows(Some(at));
        Ok(Outcome::Answer(0))
    }

    /// A wait goes on until the doorbells that were rung before have arrived: a doorbell of a
    /// queue that has gone must not be taken for one of the next queue of its number.
    pub(super) fn fence(&self, slot: &Slot, wait: u64) {
        {
            let mut channel = lock(&slot.channel);
            if let Some(wake) = channel.wake.clone() {
                channel.fences.push(wait);
                channel.late += 1;
                // A full counter, which alone refuses, wakes as well.
                let _ = wake.write(1);
                return;
            }
        }
        self.done(wait);
    }

    /// From now on a server waits for the channel of a queue, and is woken so; or none does.
    pub(super) fn attach(&self, id: u16, wake: Option<Arc<EventFd>>) {
        let Some(slot) = self.slots.get(usize::from(id)) else {
            return;
        };
        let waits = {
            let mut channel = lock(&slot.channel);
            channel.wake = wake;
            std::mem::take(&mut channel.fences)
        };
        self.passed(id, waits);
    }

    /// The fences that a channel is to pass.
    pub(super) fn fences(&self, id: u16) -> Vec<u64> {
        let slot = self.slots.get(usize::from(id));
        slot.map_or_else(Vec::new, |slot| {
            std::mem::take(&mut lock(&slot.channel).fences)
        })
    }

    /// It has passed them.
    pub(super) fn passed(&self, id: u16, waits: Vec<u64>) {
        if let Some(slot) = self.slots.get(usize::from(id)) {
            let mut channel = lock(&slot.channel);
            channel.late = channel.late.saturating_sub(waits.len());
        }
        for wait in waits {
            self.done(wait);
        }
    }
}

/// Where a doorbell is in memory: `offset` 0 for a submission queue, 4 for a completion queue.
fn shadow(at: Option<[u64; 2]>, id: u16, offset: u64) -> Option<Shadow> {
    let [doorbells, events] = at?;
    let offset = 8 * u64::from(id) + offset;
    Some(Shadow {
        doorbell: doorbells.checked_add(offset)?,
        event: events.checked_add(offset)?,
    })
}
