//! What serves the controller: a device for each channel.

use std::fmt;
use std::io;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::sync::Arc;

use ioregion_dispatch::{Access, Device, Ring, Size};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::bar::{BEYOND, REGISTERS};
use super::controller::Controller;
use super::events::Event;
use super::io::{Ask, Kind, Place};
use super::logs::Error;
use super::queues::Answer;
use super::spec::Status;
use crate::disk::{Data, Failure, Store};
use crate::memory::{Access as By, Memory, MemoryError, Pin};

/// Commands that a channel takes before it looks who else wants something.
const TURN: u32 = 1024;

/// Serves the registers and the admin queues, and what is beyond all doorbells.
#[derive(Debug)]
pub struct AdminChannel {
    controller: Arc<Controller>,
}

impl AdminChannel {
    /// The controller's admin channel. There should be one.
    #[must_use]
    pub fn new(controller: &Arc<Controller>) -> Self {
        Self {
            controller: Arc::clone(controller),
        }
    }

    fn ring(&mut self, user_data: u64, offset: u64, size: Size, value: Option<u64>) {
        let controller = &self.controller;
        match (user_data, offset, size) {
            (0, 0, Size::B4) => controller.ring_sq(0, value),
            (0, 4, Size::B4) => drop(controller.ring_cq(0, value)),
            (BEYOND, ..) => controller.note_doorbell(0, Event::NoSuchDoorbell),
            _ => controller.note_doorbell(0, Event::DoorbellValue),
        }
        controller.run_admin();
        controller.deliver();
    }
}

impl Device for AdminChannel {
    fn read(&mut self, access: Access) -> u64 {
        match access.user_data {
            REGISTERS => self
                .controller
                .read_register(access.offset, access.size.bytes()),
            // Doorbells return nothing of meaning.
            _ => 0,
        }
    }

    fn write(&mut self, access: Access, data: u64) {
        let Access {
            user_data,
            offset,
            size,
        } = access;
        match user_data {
            REGISTERS => {
                let bytes = size.bytes();
                self.controller.write_register(offset, bytes, data);
            }
            _ => self.ring(user_data, offset, size, Some(data)),
        }
    }

    fn doorbell(&mut self, ring: Ring) {
        self.ring(ring.user_data, ring.offset, ring.size, ring.value);
    }
}

/// Who calls a [`QueueChannel`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CalledBy {
    /// A server that waits for [`Device::event`]: many commands are under way, where there is
    /// io_uring.
    Server,
    /// vCPU threads, or a server that does not wait: each command is carried out at once.
    Anybody,
}

/// Serves an I/O queue number: the tail of its submission queue and the head of its completion
/// queue.
pub struct QueueChannel {
    controller: Arc<Controller>,
    id: u16,
    store: Store<Job>,
    wake: Option<Wake>,
    /// Submission queue and name of each command under way.
    under_way: Vec<(u16, u16)>,
    /// Submission queues of other numbers that wait for room in this completion queue.
    others: Vec<u16>,
    /// Fences that are passed when this is woken again.
    fences: Vec<u64>,
    /// Interrupts to raise.
    vectors: Vec<u16>,
}

struct Wake {
    /// Written to by whoever wants the channel to look.
    bell: Arc<EventFd>,
    /// It, and the store's event.
    any: Epoll,
}

/// A command under way.
struct Job {
    sq: u16,
    command: u16,
    place: Place,
    kind: Kind,
    lba: u64,
    nsid: u32,
}

impl Data for Job {
    fn read(&self, memory: &dyn Memory, offset: u32, into: &mut [u8]) -> Result<(), MemoryError> {
        self.place.read(memory, offset, into)
    }

    fn write(&self, memory: &dyn Memory, offset: u32, from: &[u8]) -> Result<(), MemoryError> {
        self.place.write(memory, offset, from)
    }

    fn pin(
        &self,
        memory: &dyn Memory,
        offset: u32,
        len: u32,
        access: By,
    ) -> Result<Option<Pin>, MemoryError> {
        self.place.pin(memory, offset, len, access)
    }
}

impl fmt::Debug for QueueChannel {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.debug_struct("QueueChannel")
            .field("id", &self.id)
            .field("under_way", &self.under_way)
            .finish_non_exhaustive()
    }
}

impl QueueChannel {
    /// The channel of an I/O queue number, 1 to [`Controller::queues`]. Called by the thread that
    /// will serve it, which a ring of io_uring belongs to. There should be one of each number.
    ///
    /// # Errors
    ///
    /// No such number; the system's, when there is no descriptor left.
    pub fn new(controller: &Arc<Controller>, id: u16, by: CalledBy) -> io::Result<Self> {
        if !(1..=controller.queues()).contains(&id) {
            let what = format!("the controller has no I/O queue {id}");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, what));
        }
        let (store, wake) = match by {
            CalledBy::Anybody => (Store::AtOnce, None),
            CalledBy::Server => {
                let store = Store::new(&controller.image, controller.io_uring, id);
                let wake = Wake::new(store.event())?;
                (store, Some(wake))
            }
        };
        controller.attach(id, wake.as_ref().map(|wake| Arc::clone(&wake.bell)));
        Ok(Self {
            controller: Arc::clone(controller),
            id,
            store,
            wake,
            under_way: Vec::new(),
            others: Vec::new(),
            fences: Vec::new(),
            vectors: Vec::new(),
        })
    }

    /// Takes commands and answers those that are done, as long as there are any.
    fn run(&mut self) {
        let mut left = TURN;
        loop {
            let mut progress = self.take_all(self.id, &mut left);
            let mut others = std::mem::take(&mut self.others);
            others.retain(|sq| {
                progress |= self.take_all(*sq, &mut left);
                // Where the store has no room, the queue may still have commands.
                !self.store.wants() || left == 0
            });
            self.others.extend(others);
            progress |= self.collect();
            if !progress {
                return;
            }
            if left == 0 {
                match &self.wake {
                    Some(wake) => {
                        // A full counter, which alone refuses, wakes as well.
                        let _ = wake.bell.write(1);
                        return;
                    }
                    None => left = TURN,
                }
            }
        }
    }

    fn take_all(&mut self, sq: u16, left: &mut u32) -> bool {
        let mut progress = false;
        while *left > 0 && self.store.wants() {
            let Some((command, page)) = self.controller.take(sq) else {
                break;
            };
            progress = true;
            *left -= 1;
            let controller = &*self.controller;
            let namespace = controller.namespace(page);
            let (lba, nsid, command_id) = (command.long(10), command.nsid, command.id);
            let job = |place, kind| Job {
                sq,
                command: command_id,
                place,
                kind,
                lba,
                nsid,
            };
            match Ask::new(&command, &namespace, &*controller.memory) {
                Ok(Ask::Work(work, place, kind)) => {
                    self.under_way.push((sq, command_id));
                    let job = job(place, kind);
                    let memory = &*controller.memory;
                    let done = self.store.submit(&controller.image, work, job, memory);
                    if let Some((job, done)) = done {
                        self.finish(&job, done);
                    }
                }
                Ok(Ask::Nothing) => self.tell(&job(Place::default(), Kind::Other), Status::SUCCESS),
                Err(status) => self.tell(&job(Place::default(), Kind::Other), status),
            }
        }
        progress
    }

    /// Sets about what was taken, and answers what is done.
    fn collect(&mut self) -> bool {
        let mut progress = false;
        let controller = Arc::clone(&self.controller);
        let mut flushed = self.store.flush();
        while let Some((job, done)) = self.store.finished(&controller.image, &*controller.memory) {
            progress = true;
            self.finish(&job, done);
        }
        // What finished in part goes on.
        flushed = flushed.and_then(|()| self.store.flush());
        if let Err(error) = flushed {
            tracing::error!(queue = self.id, %error, "NVMe: the ring fails: one command at a time");
            self.give_up();
            progress = true;
        }
        self.raise();
        progress
    }

    fn finish(&mut self, job: &Job, done: Result<(), Failure>) {
        let at = (job.sq, job.command);
        if let Some(index) = self.under_way.iter().position(|other| *other == at) {
            self.under_way.swap_remove(index);
        }
        let status = match done {
            Ok(()) if job.place.differs() => Status::COMPARE_FAILURE,
            Ok(()) => Status::SUCCESS,
            Err(failure) => {
                // What a driver does wrong is of no concern here, and there can be much of it.
                match &failure {
                    Failure::Image(error) => tracing::warn!(lba = job.lba, %error, "image"),
                    failure => tracing::debug!(lba = job.lba, %failure, "NVMe command"),
                }
                job.kind.status(&failure)
            }
        };
        if let Some(slot) = self.controller.slots.get(usize::from(self.id))
            && (status == Status::SUCCESS || status == Status::COMPARE_FAILURE)
        {
            slot.count(job.kind);
        }
        self.tell(job, status);
    }

    /// Answers a command.
    fn tell(&mut self, job: &Job, status: Status) {
        if status != Status::SUCCESS {
            self.controller.note_error(Error {
                sq: job.sq,
                command: Some(job.command),
                status,
                lba: job.lba,
                nsid: job.nsid,
            });
        }
        let answer = Answer {
            command: job.command,
            result: 0,
            status,
        };
        if let Some(vector) = self.controller.answer(job.sq, Some(answer))
            && !self.vectors.contains(&vector)
        {
            self.vectors.push(vector);
        }
    }

    fn raise(&mut self) {
        for vector in self.vectors.drain(..) {
            self.controller.vectors.raise(vector);
        }
    }

    /// Commands under way are waited for and fail; nothing of them touches memory afterwards.
    fn give_up(&mut self) {
        if let (Some(wake), Some(event)) = (&self.wake, self.store.event()) {
            // It goes with the ring.
            let _ = wake.any.delete(event);
        }
        self.store = Store::AtOnce;
        for (sq, command) in std::mem::take(&mut self.under_way) {
            let job = Job {
                sq,
                command,
                place: Place::default(),
                kind: Kind::Other,
                lba: 0,
                nsid: 0,
            };
            self.tell(&job, Status::INTERNAL);
        }
    }

    fn ring(&mut self, offset: u64, size: Size, value: Option<u64>) {
        match (offset, size) {
            (0, Size::B4) => self.controller.ring_sq(self.id, value),
            (4, Size::B4) => {
                for sq in self.controller.ring_cq(self.id, value) {
                    if sq != self.id && !self.others.contains(&sq) {
                        self.others.push(sq);
                    }
                }
            }
            _ => self.controller.note_doorbell(self.id, Event::DoorbellValue),
        }
        self.run();
    }
}

impl Device for QueueChannel {
    fn read(&mut self, _: Access) -> u64 {
        // Doorbells return nothing of meaning.
        0
    }

    fn write(&mut self, access: Access, data: u64) {
        self.ring(access.offset, access.size, Some(data));
    }

    fn doorbell(&mut self, ring: Ring) {
        self.ring(ring.offset, ring.size, ring.value);
    }

    fn event(&self) -> Option<BorrowedFd<'_>> {
        self.wake.as_ref().map(|wake| wake.any.0.as_fd())
    }

    fn woken(&mut self) {
        if let Some(wake) = &self.wake {
            // Nobody else reads it, and it does not block.
            let _ = wake.bell.read();
        }
        // Doorbells that were on their way when these fences were put up, at the last call, have
        // arrived by now: all that came before this call has. New ones wait for the next call.
        let passed = std::mem::take(&mut self.fences);
        self.controller.passed(self.id, passed);
        self.fences = self.controller.fences(self.id);
        if let (Some(wake), false) = (&self.wake, self.fences.is_empty()) {
            let _ = wake.bell.write(1);
        }
        self.run();
    }
}

impl Drop for QueueChannel {
    fn drop(&mut self) {
        self.give_up();
        self.raise();
        self.controller.attach(self.id, None);
        let passed = std::mem::take(&mut self.fences);
        self.controller.passed(self.id, passed);
    }
}

impl Wake {
    fn new(event: Option<BorrowedFd<'_>>) -> io::Result<Self> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let bell = EventFd::from_value_and_flags(0, flags)?;
        let any = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        for fd in [Some(bell.as_fd()), event].into_iter().flatten() {
            any.add(fd, EpollEvent::new(EpollFlags::EPOLLIN, 0))?;
        }
        let bell = Arc::new(bell);
        Ok(Self { bell, any })
    }
}
