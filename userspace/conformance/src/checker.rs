//! Compares what a device was told with what the model says.

use std::collections::{HashMap, HashSet, VecDeque};

use ioregion_dispatch::Ring;

use crate::Told;
use crate::model::{Event, Plan, reader, ringer, writer};

/// What is wrong with a trace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// Something that the guest did never arrived.
    Lost(Event),
    /// Something arrived more often than the guest did it (or it never did).
    Doubled(Event),
    /// Everything arrived, but a vCPU's accesses not in their order: this one came when another
    /// was due.
    Reordered {
        /// What was due.
        due: Event,
        /// What came.
        came: Event,
    },
    /// A doorbell's value was older than its count, or not its last in the end.
    Stale(Ring),
    /// An access came before a doorbell that had been written earlier.
    Late {
        /// Index of the doorbell.
        doorbell: u32,
        /// What came before it.
        came: Event,
    },
    /// The guest read something else than the device answered.
    Answer {
        /// Index in the vCPU's log.
        entry: usize,
        /// What the device answered.
        answered: u64,
        /// What the guest read.
        read: u64,
    },
}

/// The doorbells of which only the last value counts.
fn latest(expected: [&[Event]; 2]) -> HashSet<u32> {
    let events = expected.iter().copied().flatten();
    events
        .filter_map(|event| match event {
            Event::Latest(index, _) => Some(*index),
            _ => None,
        })
        .collect()
}

/// Checks what the device of one region was told against what each vCPU did to it.
#[must_use]
pub fn check(expected: [&[Event]; 2], told: &[Told]) -> Vec<Fault> {
    let latest = latest(expected);
    let is_ordered = |event: &Event| !matches!(event, Event::Latest(..));
    let mut faults = Vec::new();
    for (vcpu, expected) in expected.into_iter().enumerate() {
        let due: Vec<_> = expected.iter().copied().filter(is_ordered).collect();
        let came: Vec<_> = told
            .iter()
            .filter_map(|told| ordered(told, &latest))
            .filter(|event| origin(event) == vcpu)
            .collect();
        compare(&due, &came, &mut faults);
    }
    for index in latest {
        doorbell(index, expected, told, &mut faults);
    }
    if faults.is_empty() {
        flushes(expected, told, &mut faults);
    }
    faults
}

/// The event behind something told, unless it is a doorbell that may be overwritten.
fn ordered(told: &Told, latest: &HashSet<u32>) -> Option<Event> {
    match *told {
        Told::Read(access, _) => Some(Event::Read(access)),
        Told::Write(access, data) => Some(Event::Write(access, data)),
        Told::Ring(ring) if latest.contains(&ring.index) => None,
        Told::Ring(ring) => Some(Event::Queued(ring.index, ring.value.unwrap_or(u64::MAX))),
    }
}

fn origin(event: &Event) -> usize {
    match *event {
        Event::Read(access) => reader(access.offset),
        Event::Write(_, value) | Event::Queued(_, value) | Event::Latest(_, value) => writer(value),
    }
}

fn compare(due: &[Event], came: &[Event], faults: &mut Vec<Fault>) {
    let Some(at) = (0..due.len().max(came.len())).find(|&at| due.get(at) != came.get(at)) else {
        return;
    };
    let mut balance: HashMap<Event, i64> = HashMap::new();
    for event in due {
        *balance.entry(*event).or_default() += 1;
    }
    for event in came {
        *balance.entry(*event).or_default() -= 1;
    }
    let before = faults.len();
    for (event, balance) in balance {
        if balance != 0 {
            faults.push(if balance > 0 {
                Fault::Lost(event)
            } else {
                Fault::Doubled(event)
            });
        }
    }
    if faults.len() == before {
        faults.push(Fault::Reordered {
            due: due[at],
            came: came[at],
        });
    }
}

/// One doorbell whose writes may be overwritten: their number, and no value older than that.
fn doorbell(index: u32, expected: [&[Event]; 2], told: &[Told], faults: &mut Vec<Fault>) {
    let values = expected.map(|events| {
        let value = |event: &Event| match *event {
            Event::Latest(other, value) if other == index => Some(value),
            _ => None,
        };
        events.iter().filter_map(value).collect::<Vec<_>>()
    });
    let written = (values[0].len() + values[1].len()) as u64;
    let mut rung = 0;
    let mut last = None;
    for told in told {
        let Told::Ring(ring) = told else { continue };
        if ring.index != index {
            continue;
        }
        rung += ring.writes;
        last = Some(ring);
        if let (Some(owner), Some(value)) = (ringer(index), ring.value)
            && rung <= written
            && !values[owner][rung as usize - 1..].contains(&value)
        {
            faults.push(Fault::Stale(*ring));
        }
    }
    let example = Event::Latest(index, last.and_then(|ring| ring.value).unwrap_or(0));
    match rung.cmp(&written) {
        std::cmp::Ordering::Less => faults.push(Fault::Lost(example)),
        std::cmp::Ordering::Greater => faults.push(Fault::Doubled(example)),
        std::cmp::Ordering::Equal => {}
    }
    if let Some(ring) = last
        && let Some(value) = ring.value
        && !values.iter().any(|values| values.last() == Some(&value))
    {
        faults.push(Fault::Stale(*ring));
    }
}

/// Whatever keeps its place comes after the doorbells that the same vCPU wrote before it.
fn flushes(expected: [&[Event]; 2], told: &[Told], faults: &mut Vec<Fault>) {
    let mut left = expected.map(|events| events.iter());
    let mut due = [HashMap::<u32, u64>::new(), HashMap::new()];
    let mut rung = HashMap::<u32, u64>::new();
    let latest = latest(expected);
    for told in told {
        let Some(came) = ordered(told, &latest) else {
            if let Told::Ring(ring) = told {
                *rung.entry(ring.index).or_default() += ring.writes;
            }
            continue;
        };
        let vcpu = origin(&came);
        for event in left[vcpu].by_ref() {
            let Event::Latest(index, _) = event else {
                break;
            };
            *due[vcpu].entry(*index).or_default() += 1;
        }
        for (&doorbell, &writes) in &due[vcpu] {
            if rung.get(&doorbell).is_none_or(|rung| *rung < writes) {
                faults.push(Fault::Late { doorbell, came });
            }
        }
    }
}

/// Checks that a vCPU read what the devices answered.
#[must_use]
pub fn check_log(plan: &Plan, vcpu: usize, log: &[u64], told: &[Vec<Told>]) -> Vec<Fault> {
    let mut answers: Vec<VecDeque<u64>> = told
        .iter()
        .map(|told| {
            told.iter()
                .filter_map(|told| match *told {
                    Told::Read(access, answer) if reader(access.offset) == vcpu => {
                        Some(answer & access.size.mask())
                    }
                    _ => None,
                })
                .collect()
        })
        .collect();
    let mut faults = Vec::new();
    for (entry, (pieces, read)) in plan.reads.iter().zip(log).enumerate() {
        let answered = pieces.iter().fold(0, |value, &(region, _, at)| {
            value | answers[region].pop_front().unwrap_or(u64::MAX) << (8 * at)
        });
        if answered != *read {
            faults.push(Fault::Answer {
                entry,
                answered,
                read: *read,
            });
        }
    }
    faults
}
