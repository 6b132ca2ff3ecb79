//! The arm–recheck–sleep algorithm over all interleavings, with loom:
//! `RUSTFLAGS="--cfg loom" cargo test -p ioregion-dispatch --no-default-features --release --test loom_arm`
#![allow(unexpected_cfgs, reason = "loom is set by hand")]
#![cfg(loom)]

use ioregion_dispatch::arm::{self, Word};
use loom::sync::Arc;
use loom::sync::atomic::{AtomicU64, Ordering, fence};
use loom::thread;

/// A word of loom's; without `FENCED`, its fences do nothing.
#[derive(Default)]
struct Shared<const FENCED: bool>(AtomicU64);

impl<const FENCED: bool> Word for Shared<FENCED> {
    fn load(&self, order: Ordering) -> u64 {
        self.0.load(order)
    }
    fn store(&self, value: u64, order: Ordering) {
        self.0.store(value, order);
    }
    fn swap(&self, value: u64, order: Ordering) -> u64 {
        self.0.swap(value, order)
    }
    fn fetch_add(&self, value: u64, order: Ordering) -> u64 {
        self.0.fetch_add(value, order)
    }
    fn fence(order: Ordering) {
        if FENCED {
            fence(order);
        }
    }
}

#[derive(Default)]
struct Port<const FENCED: bool> {
    value: Shared<FENCED>,
    sequence: Shared<FENCED>,
    changes: Shared<FENCED>,
    arm: Shared<FENCED>,
    /// Stands for the eventfd.
    signals: AtomicU64,
}

/// What the reader remembers.
#[derive(Default)]
struct Seen {
    sequence: u64,
    changes: u64,
}

impl<const FENCED: bool> Port<FENCED> {
    fn ring(&self, value: u64) {
        arm::publish(&self.value, &self.sequence, &self.changes, value);
        if arm::take(&self.arm, 1) {
            self.signals.fetch_add(1, Ordering::AcqRel);
        }
    }

    fn drain(&self, seen: &mut Seen) -> Option<u64> {
        if !arm::collect(&self.changes, &mut seen.changes) {
            return None;
        }
        let (sequence, value) = arm::observe(&self.value, &self.sequence);
        seen.sequence = sequence;
        Some(value)
    }

    fn has_news(&self, seen: &Seen) -> bool {
        self.changes.load(Ordering::Relaxed) != seen.changes
    }

    fn prepare_sleep(&self, seen: &Seen) -> bool {
        arm::arm(&self.arm, 1, || self.has_news(seen))
    }
}

/// `producers` threads ring once each while a consumer drains and goes to sleep; whatever the
/// sleeper has not seen must have woken it.
fn sleeper<const FENCED: bool>(producers: u64, recheck: bool) {
    let mut model = loom::model::Builder::new();
    // Three threads have too many interleavings; few preemptions suffice for known errors.
    model.preemption_bound = (producers > 1).then_some(2);
    model.check(move || {
        let port = Arc::new(Port::<FENCED>::default());
        let threads: Vec<_> = (1..=producers)
            .map(|value| {
                let port = Arc::clone(&port);
                thread::spawn(move || port.ring(value))
            })
            .collect();
        let mut seen = Seen::default();
        port.drain(&mut seen);
        let asleep = if recheck {
            port.prepare_sleep(&seen)
        } else {
            port.arm.store(1, Ordering::Relaxed);
            Shared::<FENCED>::fence(Ordering::SeqCst);
            true
        };
        for thread in threads {
            thread.join().unwrap();
        }
        if asleep && port.has_news(&seen) {
            assert!(port.signals.load(Ordering::Acquire) > 0, "lost wake-up");
        }
        port.drain(&mut seen);
        assert_eq!(seen.sequence, producers, "lost write");
    });
}

#[test]
fn a_sleeper_is_woken_for_what_it_has_not_seen() {
    sleeper::<true>(1, true);
}

#[test]
fn two_producers_on_one_slot_lose_neither_a_write_nor_the_wake() {
    sleeper::<true>(2, true);
}

#[test]
#[should_panic(expected = "lost wake-up")]
fn the_model_catches_a_sleeper_that_does_not_look_again() {
    sleeper::<true>(1, false);
}

#[test]
#[should_panic(expected = "lost wake-up")]
fn the_model_catches_missing_fences() {
    sleeper::<false>(1, true);
}

/// A doorbell rings twice, its value counting; a reader looks at any time.
fn reader(ordered: bool) {
    loom::model(move || {
        let port = Arc::new(Port::<true>::default());
        let producer = {
            let port = Arc::clone(&port);
            thread::spawn(move || {
                for value in 1..=2 {
                    if ordered {
                        port.ring(value);
                    } else {
                        port.sequence.fetch_add(1, Ordering::AcqRel);
                        port.changes.fetch_add(1, Ordering::AcqRel);
                        port.value.store(value, Ordering::Relaxed);
                    }
                }
            })
        };
        let mut seen = Seen::default();
        for _ in 0..2 {
            if let Some(value) = port.drain(&mut seen) {
                assert!(value >= seen.sequence, "old value");
            }
        }
        producer.join().unwrap();
        if let Some(value) = port.drain(&mut seen) {
            assert_eq!(value, 2);
        }
        assert_eq!(seen.sequence, 2, "lost write");
    });
}

#[test]
fn a_value_is_never_older_than_its_sequence() {
    reader(true);
}

#[test]
#[should_panic(expected = "old value")]
fn the_model_catches_a_value_that_is_stored_late() {
    reader(false);
}

#[test]
fn a_sleeper_with_two_reasons_is_woken_for_either() {
    loom::model(|| {
        let port = Arc::new(Port::<true>::default());
        let threads = [1, 2].map(|reason| {
            let port = Arc::clone(&port);
            thread::spawn(move || {
                port.changes.fetch_add(1, Ordering::AcqRel);
                if arm::take(&port.arm, reason) {
                    port.signals.fetch_add(1, Ordering::AcqRel);
                }
            })
        });
        let asleep = arm::arm(&port.arm, 3, || port.has_news(&Seen::default()));
        for thread in threads {
            thread.join().unwrap();
        }
        assert!(
            !asleep || port.signals.load(Ordering::Acquire) > 0,
            "lost wake-up"
        );
    });
}
