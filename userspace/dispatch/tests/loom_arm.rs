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
    fn fetch_or(&self, value: u64, order: Ordering) -> u64 {
        self.0.fetch_or(value, order)
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
    dirty: Shared<FENCED>,
    arm: Shared<FENCED>,
    /// Stands for the eventfd.
    signals: AtomicU64,
}

impl<const FENCED: bool> Port<FENCED> {
    fn ring(&self, value: u64) {
        arm::publish(&self.value, &self.sequence, &self.dirty, 1, value);
        if arm::take(&self.arm, 1) {
            self.signals.fetch_add(1, Ordering::AcqRel);
        }
    }

    fn drain(&self, seen: &mut u64) -> Option<u64> {
        if arm::collect(&self.dirty) == 0 {
            return None;
        }
        let (sequence, value) = arm::observe(&self.value, &self.sequence);
        *seen = sequence;
        Some(value)
    }

    fn prepare_sleep(&self) -> bool {
        arm::arm(&self.arm, 1, || self.dirty.load(Ordering::Relaxed) != 0)
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
        let mut seen = 0;
        port.drain(&mut seen);
        let asleep = if recheck {
            port.prepare_sleep()
        } else {
            port.arm.store(1, Ordering::Relaxed);
            Shared::<FENCED>::fence(Ordering::SeqCst);
            true
        };
        for thread in threads {
            thread.join().unwrap();
        }
        let news = port.dirty.load(Ordering::Relaxed) != 0;
        if asleep && news {
            assert!(port.signals.load(Ordering::Acquire) > 0, "lost wake-up");
        }
        port.drain(&mut seen);
        assert_eq!(seen, producers, "lost write");
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
                        port.dirty.fetch_or(1, Ordering::AcqRel);
                        port.value.store(value, Ordering::Relaxed);
                    }
                }
            })
        };
        let mut seen = 0;
        for _ in 0..2 {
            if let Some(value) = port.drain(&mut seen) {
                assert!(value >= seen, "old value");
            }
        }
        producer.join().unwrap();
        let mut last = seen;
        if let Some(value) = port.drain(&mut last) {
            assert_eq!(value, 2);
        }
        assert_eq!(last, 2, "lost write");
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
                port.dirty.fetch_or(reason, Ordering::AcqRel);
                if arm::take(&port.arm, reason) {
                    port.signals.fetch_add(1, Ordering::AcqRel);
                }
            })
        });
        let asleep = arm::arm(&port.arm, 3, || port.dirty.load(Ordering::Relaxed) != 0);
        for thread in threads {
            thread.join().unwrap();
        }
        assert!(
            !asleep || port.signals.load(Ordering::Acquire) > 0,
            "lost wake-up"
        );
    });
}
