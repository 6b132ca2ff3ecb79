//! Logs of queues that say what cannot be.

mod support;

use std::sync::Arc;
use std::sync::atomic::Ordering;

use ioregion_devices::virtio::{
    Broken, Format, LogError, Memory as _, Position, Queue, QueueLog, Setup, Words as _,
};
use proptest::prelude::*;
use support::mortal::{Paper, paper};
use support::{BYTES, DATA, Flat, driver, put, setup};

/// A queue of eight with two requests in flight, one of three descriptors, and its log.
fn record(format: Format) -> (Setup, Flat, Arc<Paper>) {
    let setup = setup(format, 8, false);
    let memory = Flat::new(BYTES);
    let mut driver = driver(&setup);
    let (words, _) = paper(8);
    let log = QueueLog::new(Arc::clone(&words) as _, 0, 8);
    let start = Position::start(format);
    let mut queue = Queue::begin(&memory, &setup, start, log).unwrap();
    let ranges = [(DATA, 1, false), (DATA, 2, true), (DATA, 3, true)];
    for ranges in [&ranges[..1], &ranges] {
        driver.add(&memory, ranges, false).unwrap();
        let _in_flight = queue.pop(&memory).unwrap().unwrap();
    }
    (setup, memory, words)
}

fn resume(setup: &Setup, memory: &Flat, words: &Arc<Paper>, room: u16) -> Result<Queue, Broken> {
    let log = QueueLog::new(Arc::clone(words) as _, 0, room);
    Queue::resume(memory, setup, log)
}

#[test]
fn log_of_another_queue_is_refused() {
    for format in [Format::Split, Format::Packed] {
        let (setup, memory, words) = record(format);
        assert!(resume(&setup, &memory, &words, 8).is_ok());
        let refused = |setup: &Setup, why| {
            let error = resume(setup, &memory, &words, 8).unwrap_err();
            assert_eq!(error, Broken::Log(why), "{setup:?}");
        };
        let mut other = setup;
        other.layout.size = 4;
        refused(&other, LogError::OtherQueue);
        other.layout.size = 16;
        refused(&other, LogError::Room { room: 8, size: 16 });
        for part in 0..3 {
            let mut other = setup;
            let layout = &mut other.layout;
            let parts = [
                &mut layout.descriptors,
                &mut layout.driver,
                &mut layout.device,
            ];
            *parts.into_iter().nth(part).unwrap() += 0x100;
            refused(&other, LogError::OtherQueue);
        }
        let mut other = setup;
        other.format = match format {
            Format::Split => Format::Packed,
            Format::Packed => Format::Split,
        };
        refused(&other, LogError::OtherQueue);
        if format == Format::Split {
            // Somebody else has served the queue since.
            memory.store(setup.layout.device + 2, 1).unwrap();
            refused(&setup, LogError::Place(0));
        }
        words.words[0].store(2, Ordering::Relaxed);
        refused(&setup, LogError::State(2));
        words.words[0].store(0, Ordering::Relaxed);
        refused(&setup, LogError::State(0));
    }
}

#[test]
fn any_change_of_a_log_is_refused_or_harmless() {
    for format in [Format::Split, Format::Packed] {
        let (setup, memory, words) = record(format);
        let saved: Vec<u64> = (0..words.words.len()).map(|at| words.load(at)).collect();
        let mut refused = 0;
        for at in 0..saved.len() {
            for bit in 0..64 {
                for (saved, word) in saved.iter().zip(&words.words) {
                    word.store(*saved, Ordering::Relaxed);
                }
                words.words[at].fetch_xor(1 << bit, Ordering::Relaxed);
                let Ok(mut queue) = resume(&setup, &memory, &words, 8) else {
                    refused += 1;
                    continue;
                };
                assert!(queue.in_flight() <= 8);
                // Whatever it says: no panic, and an end.
                for _ in 0..16 {
                    match queue.pop(&memory) {
                        Ok(Some(chain)) => {
                            if queue.push(&memory, chain, 0).is_err() {
                                break;
                            }
                        }
                        Ok(None) | Err(_) => break,
                    }
                }
                let (_, fresh, _) = record(format);
                let mut bytes = vec![0; BYTES];
                fresh.read(Flat::BASE, &mut bytes).unwrap();
                put(&memory, Flat::BASE, &bytes);
            }
        }
        assert!(refused > 300, "{format:?}: {refused}");
    }
}

proptest! {
    #[test]
    fn log_of_noise_never_panics(
        packed: bool,
        noise in proptest::collection::vec((0..47usize, any::<u64>()), 0..20),
        small in proptest::collection::vec((5..47usize, 0..20u64, 0..4u64), 0..20),
    ) {
        let format = if packed { Format::Packed } else { Format::Split };
        let (setup, memory, words) = record(format);
        for (at, word) in noise {
            words.words[at].store(word, Ordering::Relaxed);
        }
        for (at, low, high) in small {
            words.words[at].store(low | high << 62, Ordering::Relaxed);
        }
        words.words[0].store(1, Ordering::Relaxed);
        if let Ok(mut queue) = resume(&setup, &memory, &words, 8) {
            prop_assert!(queue.in_flight() <= 8);
            while let Ok(Some(chain)) = queue.pop(&memory) {
                if queue.push(&memory, chain, 0).is_err() {
                    break;
                }
            }
        }
    }
}
