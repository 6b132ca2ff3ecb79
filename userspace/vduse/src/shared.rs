//! What the thread for the kernel's requests and the queues' threads share.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use ioregion_devices::virtio::{Control, Position};

/// The driver has stopped the queue.
pub(crate) const STOPPED: u8 = 1 << 0;
/// The driver has suspended the device.
pub(crate) const SUSPENDED: u8 = 1 << 1;

/// Whether a queue may be served.
#[derive(Debug, Default)]
struct Rest {
    /// Why not: `STOPPED`, `SUSPENDED`.
    held: u8,
    /// Its worker does something with it.
    busy: bool,
}

/// What the message thread and a worker share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) control: Control,
    rest: Mutex<Rest>,
    rested: Condvar,
    /// [`Rest::held`] is not zero: for looking often.
    held: AtomicBool,
    /// The kernel said that the queue is about to be ready.
    due: AtomicBool,
    /// The worker may begin.
    begin: AtomicBool,
    /// Where the queue stood when nothing was in flight last.
    pub(crate) position: Mutex<Option<Position>>,
}

impl Shared {
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self {
            control: Control::new()?,
            rest: Mutex::default(),
            rested: Condvar::new(),
            held: AtomicBool::new(false),
            due: AtomicBool::new(false),
            begin: AtomicBool::new(false),
            position: Mutex::new(None),
        })
    }

    /// Lets the worker begin.
    pub(crate) fn release(&self) {
        self.begin.store(true, Ordering::Release);
        self.control.kick();
    }

    pub(crate) fn may_begin(&self) -> bool {
        self.begin.load(Ordering::Acquire)
    }

    fn rest(&self) -> MutexGuard<'_, Rest> {
        // Nothing panics halfway through a change.
        self.rest.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has the worker stand still as soon as nothing is in flight; see [`rests`](Self::rests).
    pub(crate) fn hold(&self, why: u8) {
        let mut rest = self.rest();
        rest.held |= why;
        self.held.store(true, Ordering::Release);
        drop(rest);
        self.control.kick();
    }

    /// Waits until the worker stands still; whether that came in time.
    pub(crate) fn rests(&self, until: Instant) -> bool {
        let left = until.saturating_duration_since(Instant::now());
        let waited = self
            .rested
            .wait_timeout_while(self.rest(), left, |rest| rest.busy);
        !waited.unwrap_or_else(PoisonError::into_inner).0.busy
    }

    /// Lets the worker go on, unless there is another reason why not.
    pub(crate) fn resume(&self, why: u8) {
        let mut rest = self.rest();
        rest.held &= !why;
        self.held.store(rest.held != 0, Ordering::Release);
        drop(rest);
        self.control.kick();
    }

    pub(crate) fn is_held(&self) -> bool {
        self.held.load(Ordering::Acquire)
    }

    /// The queue is about to be ready.
    pub(crate) fn make_due(&self) {
        self.due.store(true, Ordering::Release);
    }

    /// Whether that was said since this was asked last.
    pub(crate) fn is_due(&self) -> bool {
        self.due.swap(false, Ordering::AcqRel)
    }

    /// The worker does something with the queue.
    pub(crate) fn enter(&self) {
        self.rest().busy = true;
    }

    /// The same, unless it has to stand still; whether it does.
    pub(crate) fn enter_unless_held(&self) -> bool {
        let mut rest = self.rest();
        rest.busy = rest.held == 0;
        rest.busy
    }

    /// The worker does nothing with the queue.
    pub(crate) fn leave(&self) {
        self.rest().busy = false;
        self.rested.notify_all();
    }
}
