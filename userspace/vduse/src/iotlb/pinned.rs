//! Mappings that the kernel may be using.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use ioregion_devices::virtio::Hold;

use crate::sys::Mapping;

/// A mapping, and how many ranges of it are pinned.
#[derive(Debug)]
pub(super) struct Pinned {
    pub(super) mapping: Mapping,
    pins: Mutex<Pins>,
    released: Condvar,
}

#[derive(Debug, Default)]
struct Pins {
    count: usize,
    /// Threads in [`Pinned::wait`]: mostly none, and to wake nobody costs a system call, too, with
    /// each request.
    waiting: usize,
}

impl Pinned {
    pub(super) fn new(mapping: Mapping) -> Arc<Self> {
        Arc::new(Self {
            mapping,
            pins: Mutex::default(),
            released: Condvar::new(),
        })
    }

    fn pins(&self) -> MutexGuard<'_, Pins> {
        // A count is never halfway changed.
        self.pins.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts a range; [`Hold::release`] ends that.
    pub(super) fn pin(&self) {
        self.pins().count += 1;
    }

    pub(super) fn is_pinned(&self) -> bool {
        self.pins().count > 0
    }

    /// Waits until nothing is pinned; whether that came in time.
    pub(super) fn wait(&self, until: Instant) -> bool {
        let left = until.saturating_duration_since(Instant::now());
        let mut pins = self.pins();
        pins.waiting += 1;
        let waited = self
            .released
            .wait_timeout_while(pins, left, |pins| pins.count > 0);
        let mut pins = waited.unwrap_or_else(PoisonError::into_inner).0;
        pins.waiting -= 1;
        pins.count == 0
    }
}

impl Hold for Pinned {
    fn intact(&self) -> bool {
        !self.mapping.vanished()
    }

    fn release(&self) {
        let mut pins = self.pins();
        pins.count = pins.count.saturating_sub(1);
        if pins.count == 0 && pins.waiting > 0 {
            self.released.notify_all();
        }
    }
}
