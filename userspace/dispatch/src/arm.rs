//! Sleeping without losing a wake-up: arm, look once more, sleep.
//!
//! A task that is about to sleep *arms* a word in shared memory, looks once more whether there
//! is news, and sleeps only if there is none. Whoever brings news publishes it first, then looks
//! at the word, and wakes the task only if it takes the word armed. A full fence on each side
//! between the store and the look makes it impossible that both miss each other.
//!
//! The producer's half runs in the eBPF program too (`ebpf/src/deliver.rs`); [`publish`] and
//! [`take`] are its twin. `tests/loom_arm.rs` checks the algorithm over all interleavings; the
//! [`Word`] trait is there so that it can.

use std::sync::atomic::{AtomicU64, Ordering, fence};

/// A shared word.
pub trait Word {
    /// Loads it.
    fn load(&self, order: Ordering) -> u64;
    /// Stores to it.
    fn store(&self, value: u64, order: Ordering);
    /// Exchanges it; returns the old value.
    fn swap(&self, value: u64, order: Ordering) -> u64;
    /// Adds to it; returns the old value.
    fn fetch_add(&self, value: u64, order: Ordering) -> u64;
    /// A fence among all words of this kind.
    fn fence(order: Ordering);
}

impl Word for AtomicU64 {
    fn load(&self, order: Ordering) -> u64 {
        self.load(order)
    }
    fn store(&self, value: u64, order: Ordering) {
        self.store(value, order);
    }
    fn swap(&self, value: u64, order: Ordering) -> u64 {
        self.swap(value, order)
    }
    fn fetch_add(&self, value: u64, order: Ordering) -> u64 {
        self.fetch_add(value, order)
    }
    fn fence(order: Ordering) {
        fence(order);
    }
}

/// The sleeper arms the word with `reasons` (not zero), then looks once more.
///
/// Returns true if there is no news and it may sleep; otherwise the word is disarmed again.
/// A wake-up can still be on its way then, so sleepers must bear spurious ones.
pub fn arm<W: Word>(word: &W, reasons: u64, news: impl FnOnce() -> bool) -> bool {
    word.store(reasons, Ordering::Relaxed);
    W::fence(Ordering::SeqCst);
    if news() {
        disarm(word);
        return false;
    }
    true
}

/// The sleeper is awake and wants no wake-up.
pub fn disarm<W: Word>(word: &W) {
    word.store(0, Ordering::Relaxed);
}

/// Whoever has published news asks whether the sleeper must be woken for one of `reasons`.
///
/// True for one caller only per armed sleep.
pub fn take<W: Word>(word: &W, reasons: u64) -> bool {
    W::fence(Ordering::SeqCst);
    // Once taken, the sleeper is woken whatever its reasons are now: nobody else will.
    word.load(Ordering::Relaxed) & reasons != 0 && word.swap(0, Ordering::AcqRel) != 0
}

/// A doorbell writes its slot: the eBPF program's half, for tests and stand-ins.
///
/// The value comes first, then the slot's sequence, then the count of changes in the slot's
/// block; [`take`] is next.
pub fn publish<W: Word>(value: &W, sequence: &W, changes: &W, data: u64) {
    value.store(data, Ordering::Relaxed);
    sequence.fetch_add(1, Ordering::AcqRel);
    changes.fetch_add(1, Ordering::AcqRel);
}

/// Whether a block has changed since its changes were `seen`; if so, each of its slots is to be
/// [`observe`]d now.
///
/// The reader writes nothing, so doorbells and reader share no cache line that both change.
pub fn collect<W: Word>(changes: &W, seen: &mut u64) -> bool {
    let now = changes.load(Ordering::Relaxed);
    if now == *seen {
        return false;
    }
    // Whatever sequence was counted before that change is found by the loads that follow.
    W::fence(Ordering::Acquire);
    *seen = now;
    true
}

/// Reads a slot: sequence and value. The value may be newer than the sequence, never older.
pub fn observe<W: Word>(value: &W, sequence: &W) -> (u64, u64) {
    let sequence = sequence.load(Ordering::Relaxed);
    W::fence(Ordering::Acquire);
    (sequence, value.load(Ordering::Relaxed))
}
