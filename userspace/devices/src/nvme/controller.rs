//! The shell around the state machines: locks, the image, and what happens in what order.
//!
//! Locks are taken in this order, and never two of a kind: the admin state, a submission queue, a
//! completion queue. None is held during I/O.

use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::admin::Admin;
use super::bar::{self, Bar};
use super::events::Event;
use super::identify::Identity;
use super::io::Namespace;
use super::logs::{Error, Totals};
use super::queue::{Cq, Place, Sq};
use super::queues::{Answer, Slot};
use super::registers::{AdminQueues, Effect};
use super::spec::Status;
use super::vectors::{Interrupts, Vectors};
use super::wait::{Then, Waits};
use super::{Options, SharedMemory};
use crate::disk::{Image, ImageError};

/// Commands are taken; only those of the admin queue; none.
pub(super) const RUNNING: u8 = 0;
pub(super) const SHUT_DOWN: u8 = 1;
pub(super) const FATAL: u8 = 2;

/// An NVMe controller. Shared by the channels that serve it.
pub struct Controller {
    pub(super) image: Image,
    pub(super) io_uring: bool,
    read_only: bool,
    pub(super) memory: SharedMemory,
    pub(super) vectors: Vectors,
    pub(super) admin: Mutex<Admin>,
    waits: Mutex<Waits>,
    /// By queue number.
    pub(super) slots: Vec<Slot>,
    pub(super) state: AtomicU8,
    pub(super) write_cache: AtomicBool,
}

impl std::fmt::Debug for Controller {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.debug_struct("Controller")
            .field("image", &self.image)
            .field("queues", &self.queues())
            .finish_non_exhaustive()
    }
}

/// What is guarded is never left halfway changed.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Controller {
    pub(super) fn new(
        image: Image,
        options: &Options,
        id: u128,
        io_uring: bool,
        memory: SharedMemory,
        interrupts: Box<dyn Interrupts>,
    ) -> Self {
        let identity = Identity {
            serial: options.serial.clone(),
            id,
            read_only: options.read_only,
            memory_doorbells: options.memory_doorbells,
            block: image.logical_block(),
            physical: image.physical_block(),
        };
        let admin = Admin::new(identity, options.queues, options.vectors);
        Self {
            image,
            io_uring,
            read_only: options.read_only,
            memory,
            vectors: Vectors::new(interrupts),
            admin: Mutex::new(admin),
            waits: Mutex::default(),
            slots: (0..=options.queues).map(|_| Slot::default()).collect(),
            state: AtomicU8::new(RUNNING),
            write_cache: AtomicBool::new(true),
        }
    }

    /// Pairs of I/O queues.
    #[must_use]
    pub fn queues(&self) -> u16 {
        u16::try_from(self.slots.len().saturating_sub(1)).unwrap_or(u16::MAX)
    }

    /// Bytes of base address register 0.
    #[must_use]
    pub fn bar_size(&self) -> u64 {
        bar::size(self.queues())
    }

    /// The regions of base address register 0, when it says `base`. `values`: the mechanism
    /// carries a doorbell's value; see [`Bar`].
    #[must_use]
    pub fn bar(&self, base: u64, values: bool) -> Bar {
        Bar::new(base, self.queues(), values)
    }

    /// What was done so far.
    #[must_use]
    pub fn totals(&self) -> Totals {
        let all = self.slots.iter().map(Slot::totals);
        all.fold(Totals::default(), |sum, one| Totals {
            reads: sum.reads.wrapping_add(one.reads),
            writes: sum.writes.wrapping_add(one.writes),
            sectors_read: sum.sectors_read.wrapping_add(one.sectors_read),
            sectors_written: sum.sectors_written.wrapping_add(one.sectors_written),
        })
    }

    /// Takes the size over that the image has now, and tells the driver if it is another one and
    /// the driver wants to hear of it: whether it is.
    ///
    /// # Errors
    ///
    /// An image without whole sectors; the size stays as it was.
    pub fn refresh(&self) -> Result<bool, ImageError> {
        let changed = self.image.refresh()?;
        if changed {
            lock(&self.admin).namespace_changed();
            self.deliver();
        }
        Ok(changed)
    }

    /// The namespace, for a command of a queue with such pages.
    pub(super) fn namespace(&self, page: u64) -> Namespace {
        Namespace {
            blocks: self.image.sectors(),
            read_only: self.read_only,
            write_cache: self.write_cache.load(Ordering::Acquire),
            page,
        }
    }

    pub(super) fn read_register(&self, offset: u64, bytes: u8) -> u64 {
        lock(&self.admin).registers.read(offset, bytes)
    }

    pub(super) fn write_register(&self, offset: u64, bytes: u8, value: u64) {
        let effects = lock(&self.admin).registers.write(offset, bytes, value);
        for effect in effects {
            match effect {
                Effect::Enable(queues) => self.enable(queues),
                Effect::Reset => self.reset(),
                Effect::Shutdown => self.shut_down(),
                Effect::Mask(masked) => self.vectors.mask(masked),
                Effect::Refused(why) => tracing::warn!(why, "NVMe: not enabled"),
            }
        }
    }

    fn enable(&self, queues: AdminQueues) {
        lock(&self.admin).page = queues.page;
        let Some(slot) = self.slots.first() else {
            return;
        };
        let place = |base, size| Place { base, size };
        let mut cq = Cq::new(place(queues.cq, queues.cq_size), Some(0));
        cq.users = 1;
        *lock(&slot.sq) = Some(Sq::new(place(queues.sq, queues.sq_size), 0, queues.page));
        *lock(&slot.cq) = Some(cq);
        self.state.store(RUNNING, Ordering::Release);
        tracing::debug!("NVMe: enabled");
    }

    /// The driver takes its memory back: when nothing uses it any more, the register says so.
    fn reset(&self) {
        lock(&self.admin).reset();
        self.vectors.reset();
        self.write_cache.store(true, Ordering::Release);
        // Each queue's commands, and each channel.
        let wait = lock(&self.waits).begin(2 * self.slots.len(), Then::Reset);
        for slot in &self.slots {
            let idle = {
                let mut queue = lock(&slot.sq);
                match queue.as_mut() {
                    Some(sq) if sq.under_way > 0 => {
                        sq.silent = true;
                        sq.ended.push(wait);
                        false
                    }
                    _ => {
                        *queue = None;
                        true
                    }
                }
            };
            *lock(&slot.cq) = None;
            if idle {
                self.done(wait);
            }
            self.fence(slot, wait);
        }
        tracing::debug!("NVMe: reset");
    }

    fn shut_down(&self) {
        let running = Ordering::AcqRel;
        let _ = self
            .state
            .compare_exchange(RUNNING, SHUT_DOWN, running, Ordering::Acquire);
        let wait = lock(&self.waits).begin(self.slots.len(), Then::Shutdown);
        // The admin queue has nothing to make safe.
        self.done(wait);
        for slot in self.slots.iter().skip(1) {
            let idle = match lock(&slot.sq).as_mut() {
                Some(sq) if sq.under_way > 0 => {
                    sq.ended.push(wait);
                    false
                }
                _ => true,
            };
            if idle {
                self.done(wait);
            }
        }
    }

    /// One of several things is over.
    pub(super) fn done(&self, wait: u64) {
        let then = lock(&self.waits).done(wait);
        match then {
            None => {}
            Some(Then::Answer(command)) => {
                let answer = Answer {
                    command,
                    result: 0,
                    status: Status::SUCCESS,
                };
                if let Some(vector) = self.answer(0, Some(answer)) {
                    self.vectors.raise(vector);
                }
            }
            Some(Then::Reset) => lock(&self.admin).registers.stopped(),
            Some(Then::Shutdown) => match self.image.flush() {
                Ok(()) => lock(&self.admin).registers.shut_down(),
                Err(error) => {
                    tracing::error!(%error, "NVMe: the image cannot be made safe");
                    self.fatal("the image cannot be made safe");
                }
            },
        }
    }

    /// Something waits for two things: a queue's commands and its channel.
    pub(super) fn wait_for_queue(&self, then: Then) -> u64 {
        lock(&self.waits).begin(2, then)
    }

    pub(super) fn wait_for_channel(&self, then: Then) -> u64 {
        lock(&self.waits).begin(1, then)
    }

    /// Nothing but a reset helps any more.
    pub(super) fn fatal(&self, why: &str) {
        if self.state.swap(FATAL, Ordering::AcqRel) == FATAL {
            return;
        }
        tracing::warn!(why, "NVMe: fatal");
        let mut admin = lock(&self.admin);
        admin.registers.fatal();
        admin.events.note(Event::Persistent);
        drop(admin);
        self.deliver();
    }

    /// An error that the log page shows.
    pub(super) fn note_error(&self, error: Error) {
        lock(&self.admin).logs.note(error);
    }

    /// A doorbell that was misused.
    pub(super) fn note_doorbell(&self, queue: u16, event: Event) {
        let mut admin = lock(&self.admin);
        if !admin.registers.is_enabled() {
            return;
        }
        tracing::debug!(queue, ?event, "NVMe doorbell");
        admin.logs.note(Error {
            sq: queue,
            command: None,
            status: Status::INVALID_FIELD,
            lba: 0,
            nsid: 0,
        });
        admin.events.note(event);
        drop(admin);
        self.deliver();
    }

    /// Where doorbells in memory are.
    pub(super) fn shadows(&self) -> Option<[u64; 2]> {
        lock(&self.admin).shadows
    }

    pub(super) fn keep_shadows(&self, at: Option<[u64; 2]>) {
        lock(&self.admin).shadows = at;
    }

    pub(super) fn is(&self, state: u8) -> bool {
        self.state.load(Ordering::Acquire) == state
    }
}
