//! The device that every row measures: it checks each value that arrives.

use std::arch::x86_64::_rdtsc;
use std::collections::HashSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ioregion_dispatch::{Access, Device, Ring};
use ioregion_microguest::{MicroVm, TscClock};
use serde::{Deserialize, Serialize};

use crate::payload::{CELL_SEEN, CELL_STAMP, LANE_BIT};
use crate::scenarios::Operation;

/// Accesses that did not arrive exactly once and in order.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Wrong {
    /// Never arrived.
    pub lost: u64,
    /// Arrived more than once.
    pub duplicated: u64,
    /// Arrived out of order.
    pub reordered: u64,
}

impl std::ops::AddAssign for Wrong {
    fn add_assign(&mut self, other: Self) {
        self.lost += other.lost;
        self.duplicated += other.duplicated;
        self.reordered += other.reordered;
    }
}

impl Wrong {
    /// Accounts `arrived` accesses where `sent` were made.
    pub fn count(&mut self, sent: u64, arrived: u64) {
        self.lost += sent.saturating_sub(arrived);
        self.duplicated += arrived.saturating_sub(sent);
    }
}

/// Checks that numbers count up by one.
#[derive(Debug, Default)]
pub struct Sequence {
    next: u32,
    missing: HashSet<u32>,
    wrong: Wrong,
}

impl Sequence {
    /// A sequence that starts with `next`.
    pub fn from(next: u32) -> Self {
        Self {
            next,
            ..Self::default()
        }
    }

    /// Takes the next number.
    pub fn take(&mut self, number: u32) {
        if number == self.next {
            self.next += 1;
        } else if number > self.next {
            // Not remembered one by one if the number is nonsense.
            self.missing.extend((self.next..number).take(1 << 16));
            self.wrong.lost += u64::from(number - self.next);
            self.next = number + 1;
        } else if self.missing.remove(&number) {
            self.wrong.lost -= 1;
            self.wrong.reordered += 1;
        } else {
            self.wrong.duplicated += 1;
        }
    }

    /// The verdict, if `end` was to come next.
    pub fn finish(&self, end: u32) -> Wrong {
        let mut wrong = self.wrong;
        wrong.count(end.into(), self.next.into());
        wrong
    }
}

/// How the values of doorbells and writes are checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Check {
    /// Each value, in order.
    Sequence,
    /// The writes add up, values never go back, the last one stays.
    Latest,
    /// The writes add up.
    Count,
}

/// What a device task has seen so far.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Seen {
    /// Writes and doorbell writes.
    pub writes: u64,
    /// Reads.
    pub reads: u64,
    /// Wrong ones among what arrived, if each vCPU has sent the numbers below its `ends` entry.
    pub wrong: Wrong,
}

/// A doorbell's values so far.
#[derive(Debug, Clone, Copy, Default)]
struct Last {
    value: u32,
    of_lane: [u32; 2],
}

#[derive(Debug)]
struct State {
    check: Check,
    operation: Operation,
    writes: u64,
    reads: u64,
    lanes: [Sequence; 2],
    last: Vec<Last>,
    reordered: u64,
    paced: Option<Paced>,
    latencies: Vec<u64>,
}

/// Where the device tells the guest that it has seen a ring.
#[derive(Debug)]
struct Paced {
    guest: Arc<MicroVm>,
    clock: TscClock,
}

/// The device, and the view of those who ask what it has seen.
#[derive(Debug, Clone)]
pub struct Meter(Arc<Mutex<State>>);

fn split(value: u32) -> (usize, u32) {
    ((value >> LANE_BIT) as usize, value & !(1 << LANE_BIT))
}

impl Meter {
    /// A device with that many doorbells. The first value of each vCPU is 1.
    pub fn new(check: Check, operation: Operation, doorbells: u32) -> Self {
        Self(Arc::new(Mutex::new(State {
            check,
            operation,
            writes: 0,
            reads: 0,
            lanes: [1, 1].map(Sequence::from),
            last: vec![Last::default(); doorbells as usize],
            reordered: 0,
            paced: None,
            latencies: Vec::new(),
        })))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on answers each ring through a cell of the guest, and notes when it came.
    pub fn pace(&self, guest: &Arc<MicroVm>, clock: TscClock) {
        self.lock().paced = Some(Paced {
            guest: Arc::clone(guest),
            clock,
        });
    }

    /// Back to normal; returns the latencies in nanoseconds.
    pub fn unpace(&self) -> Vec<u64> {
        let mut state = self.lock();
        state.paced = None;
        std::mem::take(&mut state.latencies)
    }

    /// Writes and reads so far.
    pub fn counts(&self) -> (u64, u64) {
        let state = self.lock();
        (state.writes, state.reads)
    }

    /// What it has seen, judged by what was sent: vCPU `i` the values 1 to `ends[i]` (exclusive),
    /// and `finals[d]` last to doorbell `d`, by each vCPU.
    pub fn seen(&self, ends: [u32; 2], finals: &[[u32; 2]]) -> Seen {
        let state = self.lock();
        let mut wrong = Wrong {
            reordered: state.reordered,
            ..Wrong::default()
        };
        let sent: u64 = ends.iter().map(|end| u64::from(*end) - 1).sum();
        match state.check {
            Check::Sequence => {
                for (lane, end) in state.lanes.iter().zip(ends) {
                    wrong += lane.finish(end);
                }
            }
            Check::Count => wrong.count(sent, state.writes),
            Check::Latest => {
                wrong.count(sent, state.writes);
                for (last, sent) in state.last.iter().zip(finals) {
                    let (lane, number) = split(last.value);
                    // Which of two vCPUs was last, nobody knows.
                    wrong.reordered += u64::from(sent[lane] != number);
                }
            }
        }
        Seen {
            writes: state.writes,
            reads: state.reads,
            wrong,
        }
    }
}

impl State {
    fn value(&mut self, index: u32, value: u64) {
        let (lane, number) = split(value as u32);
        match self.check {
            Check::Count => {}
            Check::Sequence => self.lanes[lane].take(number),
            Check::Latest => {
                if let Some(last) = self.last.get_mut(index as usize) {
                    self.reordered += u64::from(number < last.of_lane[lane]);
                    last.of_lane[lane] = number;
                    last.value = value as u32;
                }
            }
        }
    }
}

impl Device for Meter {
    fn read(&mut self, _: Access) -> u64 {
        let mut state = self.lock();
        state.reads += 1;
        match state.operation {
            // The status register tells how often the doorbell rang: a read that overtakes it
            // shows.
            Operation::Mixed => state.writes,
            _ => state.reads,
        }
    }

    fn write(&mut self, _: Access, data: u64) {
        let mut state = self.lock();
        state.writes += 1;
        state.value(0, data);
    }

    fn doorbell(&mut self, ring: Ring) {
        // SAFETY: Every x86-64 CPU has RDTSC, and Linux does not forbid it to user space.
        let now = unsafe { _rdtsc() };
        let mut state = self.lock();
        state.writes += ring.writes;
        if let Some(value) = ring.value {
            state.value(ring.index, value);
        }
        let writes = state.writes;
        let Some(Paced { guest, clock }) = &state.paced else {
            return;
        };
        let (Ok(stamp), Ok(seen)) = (guest.cell(CELL_STAMP), guest.cell(CELL_SEEN)) else {
            return;
        };
        let stamp = u64::from(stamp.load(std::sync::atomic::Ordering::Acquire));
        let latency = clock.host_ticks(stamp).map(|then| {
            // Both counters in their low halves: a latency is below a second.
            let ticks = (now as u32).wrapping_sub(then as u32);
            clock.ns(ticks.into()) as u64
        });
        seen.store(writes as u32, std::sync::atomic::Ordering::Release);
        state.latencies.extend(latency);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn verdict(numbers: &[u32], end: u32) -> [u64; 3] {
        let mut sequence = Sequence::from(1);
        numbers.iter().for_each(|n| sequence.take(*n));
        let Wrong {
            lost,
            duplicated,
            reordered,
        } = sequence.finish(end);
        [lost, duplicated, reordered]
    }

    #[test]
    fn sequence_reports_drops_duplicates_and_swaps() {
        assert_eq!(verdict(&[1, 2, 3], 4), [0, 0, 0]);
        assert_eq!(verdict(&[1, 3], 4), [1, 0, 0]);
        assert_eq!(verdict(&[1, 2], 4), [1, 0, 0]);
        assert_eq!(verdict(&[1, 2, 2, 3], 4), [0, 1, 0]);
        assert_eq!(verdict(&[1, 3, 2], 4), [0, 0, 1]);
    }

    #[test]
    fn latest_reports_a_lost_write_and_a_stale_last_value() {
        let ring = |value, writes| Ring {
            user_data: 0,
            index: 0,
            offset: 0,
            size: ioregion_dispatch::Size::B4,
            value: Some(value),
            writes,
        };
        let mut meter = Meter::new(Check::Latest, Operation::Posted, 1);
        meter.doorbell(ring(3, 3));
        meter.doorbell(ring(5, 2));
        assert_eq!(meter.seen([6, 1], &[[5, 0]]).wrong, Wrong::default());
        let lost = meter.seen([7, 1], &[[6, 0]]).wrong;
        assert_eq!((lost.lost, lost.reordered), (1, 1));
        meter.doorbell(ring(4, 1));
        assert!(meter.seen([7, 1], &[[5, 0]]).wrong.reordered > 0);
    }
}
