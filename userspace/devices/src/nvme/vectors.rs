//! Interrupts.

use std::sync::atomic::{AtomicU32, Ordering};

/// Who raises interrupts: the VMM, which owns the MSI-X table.
pub trait Interrupts: Send + Sync {
    /// Raises the interrupt of a vector. Called by any thread that serves the controller.
    fn raise(&self, vector: u16);
}

impl<F: Fn(u16) + Send + Sync> Interrupts for F {
    fn raise(&self, vector: u16) {
        self(vector);
    }
}

/// The vectors, of which the first 32 can be masked (`INTMS`, `INTMC`).
pub(super) struct Vectors {
    to: Box<dyn Interrupts>,
    masked: AtomicU32,
    /// Raised while they were masked.
    held: AtomicU32,
}

impl Vectors {
    pub(super) fn new(to: Box<dyn Interrupts>) -> Self {
        Self {
            to,
            masked: AtomicU32::new(0),
            held: AtomicU32::new(0),
        }
    }

    pub(super) fn raise(&self, vector: u16) {
        let bit = 1u32.checked_shl(vector.into()).unwrap_or(0);
        if self.masked.load(Ordering::SeqCst) & bit != 0 {
            self.held.fetch_or(bit, Ordering::SeqCst);
            // It may have been unmasked just now, by somebody who did not see it held.
            let unmasked = self.masked.load(Ordering::SeqCst) & bit == 0;
            if !(unmasked && self.held.fetch_and(!bit, Ordering::SeqCst) & bit != 0) {
                return;
            }
        }
        self.to.raise(vector);
    }

    /// These are masked now, and no others.
    pub(super) fn mask(&self, masked: u32) {
        self.masked.store(masked, Ordering::SeqCst);
        let held = self.held.fetch_and(masked, Ordering::SeqCst) & !masked;
        for vector in (0..32).filter(|vector| held >> vector & 1 != 0) {
            self.to.raise(vector);
        }
    }

    /// Nothing is masked or held.
    pub(super) fn reset(&self) {
        self.held.store(0, Ordering::SeqCst);
        self.masked.store(0, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Arc, Mutex};

    #[test]
    fn masked_interrupts_come_when_they_are_unmasked() {
        let raised = Arc::new(Mutex::new(Vec::new()));
        let sink = Arc::clone(&raised);
        let vectors = Vectors::new(Box::new(move |vector| sink.lock().unwrap().push(vector)));
        vectors.mask(0b11);
        for vector in [0, 1, 1, 2, 40] {
            vectors.raise(vector);
        }
        assert_eq!(*raised.lock().unwrap(), [2, 40]);
        vectors.mask(0b01);
        assert_eq!(*raised.lock().unwrap(), [2, 40, 1]);
        vectors.reset();
        vectors.mask(0);
        assert_eq!(*raised.lock().unwrap(), [2, 40, 1]);
    }
}
