//! Mappings that the kernel may be using.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use ioregion_devices::virtio::Hold;

use crate::sys::Mapping;

/// A mapping, and how many ranges of it are pinned.
#[derive(Debug)]
pub(super) struct Pinned {
    pub(super) mapping: Mapping,
    pins: Mutex<usize>,
    released: Condvar,
}

impl Pinned {
    pub(super) fn new(mapping: Mapping) -> Arc<Self> {
        Arc::new(Self {
            mapping,
            pins: Mutex::new(0),
            released: Condvar::new(),
        })
    }

    fn pins(&self) -> MutexGuard<'_, usize> {
        // A count is never halfway changed.
        self.pins.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts a range; [`Hold::release`] ends that.
    pub(super) fn pin(&self) {
        *self.pins() += 1;
    }

    pub(super) fn is_pinned(&self) -> bool {
        *self.pins() > 0
    }

    /// Waits until nothing is pinned; whether that came in time.
    pub(super) fn wait(&self, until: Instant) -> bool {
        let left = until.saturating_duration_since(Instant::now());
        let waited = self
            .released
            .wait_timeout_while(self.pins(), left, |pins| *pins > 0);
        *waited.unwrap_or_else(PoisonError::into_inner).0 == 0
    }
}

impl Hold for Pinned {
    fn intact(&self) -> bool {
        !self.mapping.vanished()
    }

    fn release(&self) {
        let mut pins = self.pins();
        *pins = pins.saturating_sub(1);
        if *pins == 0 {
            self.released.notify_all();
        }
    }
}
