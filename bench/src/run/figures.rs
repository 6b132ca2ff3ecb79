//! Adds up what the runs of one row gave.

use std::time::Duration;

use hdrhistogram::Histogram;
use ioregion_bench::results::{CpuTime, Latency, Pinning, Scenario, sparse};

use super::meter::Wrong;
use super::rig::Run;

/// Fewest iterations of a run.
const FEWEST: u32 = 16;

/// Longest time that is told from longer ones, in nanoseconds.
const LONGEST_NS: u64 = 1_000_000_000_000;

/// The figures of one row so far.
pub struct Figures {
    times: Histogram<u64>,
    notify: Histogram<u64>,
    round_means: Vec<f64>,
    round_references: Vec<f64>,
    accesses: u64,
    wrong: Wrong,
    plain: Run,
    /// Wall time of one iteration in nanoseconds, as last seen.
    pub cost_ns: Option<f64>,
}

impl Default for Figures {
    fn default() -> Self {
        let histogram = || {
            Histogram::new_with_bounds(1, LONGEST_NS, 3)
                .unwrap_or_else(|_| unreachable!("constant bounds"))
        };
        Self {
            times: histogram(),
            notify: histogram(),
            round_means: Vec::new(),
            round_references: Vec::new(),
            accesses: 0,
            wrong: Wrong::default(),
            plain: Run::default(),
            cost_ns: None,
        }
    }
}

/// Batches that a round's times are cut into.
const BATCHES: usize = 64;

/// The mean of the middle half of the means of consecutive batches: a mean (wake-ups that some of
/// the accesses pay for count in it, and so do both speeds of a core whose sibling comes and goes),
/// but one that a few moments without the CPU, of milliseconds each, do not move.
fn midmean_of_batches(times: &[f64]) -> f64 {
    let batch = times.len().div_ceil(BATCHES).max(1);
    midmean(times.chunks(batch).map(mean).collect())
}

fn mean(figures: &[f64]) -> f64 {
    figures.iter().sum::<f64>() / figures.len().max(1) as f64
}

/// The mean of the middle half.
fn midmean(mut figures: Vec<f64>) -> f64 {
    figures.sort_unstable_by(f64::total_cmp);
    let quarter = figures.len() / 4;
    mean(&figures[quarter..figures.len() - quarter])
}

/// How the times of a round become one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Summary {
    /// Their mean, but for moments without the CPU.
    Midmean,
    /// Their mean: where time is counted there is nothing to leave out.
    Mean,
    /// Their first decile: emulated CPUs are threads of a machine that takes them away for
    /// milliseconds at a time, which is longer than many accesses.
    FirstDecile,
}

impl Summary {
    fn of(self, times: &[f64]) -> f64 {
        match self {
            Self::Midmean => midmean_of_batches(times),
            Self::Mean => mean(times),
            Self::FirstDecile => {
                let mut sorted = times.to_vec();
                sorted.sort_unstable_by(f64::total_cmp);
                sorted.get(sorted.len() / 10).copied().unwrap_or(0.0)
            }
        }
    }
}

/// How many iterations of `cost_ns` each fill `time`.
pub fn iterations(time: Duration, cost_ns: f64, most: u32) -> u32 {
    ((time.as_nanos() as f64 / cost_ns.max(1.0)) as u32).clamp(FEWEST, most)
}

impl Figures {
    /// How many iterations fill `time`.
    pub fn iterations(&self, time: Duration, most: u32) -> u32 {
        iterations(time, self.cost_ns.unwrap_or(f64::INFINITY), most)
    }

    /// A round's timed runs.
    pub fn add_round(&mut self, runs: &[Run], summary: Summary) {
        let times: Vec<f64> = runs.iter().flat_map(|run| &run.timings).copied().collect();
        for time in &times {
            self.times.saturating_record(time.round() as u64);
        }
        self.round_means.push(summary.of(&times));
        for run in runs {
            self.accesses += run.accesses;
            self.plain.exits += run.exits;
        }
    }

    /// A round's bursts: of accesses, each between two bursts of references.
    pub fn add_references(&mut self, bursts: &[Run], references: &[Run]) {
        let around = references
            .windows(2)
            .map(|pair| pair.iter().map(|run| mean(&run.timings)).sum::<f64>() / pair.len() as f64);
        let quotients = bursts.iter().zip(around);
        let quotients = quotients.map(|(burst, reference)| mean(&burst.timings) / reference);
        self.round_references.push(midmean(quotients.collect()));
    }

    /// An untimed run: throughput, CPU time, context switches.
    pub fn add_plain(&mut self, run: &Run) {
        self.accesses += run.accesses;
        self.plain.exits += run.exits;
        self.plain.accesses += run.accesses;
        self.plain.wall += run.wall;
        self.plain.vcpu += run.vcpu;
        self.plain.device += run.device;
    }

    /// Times until the device saw a ring, in nanoseconds.
    pub fn add_latencies(&mut self, latencies: &[u64]) {
        latencies
            .iter()
            .for_each(|ns| self.notify.saturating_record(*ns));
    }

    /// What went wrong.
    pub fn add_wrong(&mut self, wrong: Wrong) {
        self.wrong += wrong;
    }

    /// The figures as results; what names and describes the row is left to the caller.
    pub fn finish(self, rounds: usize) -> Scenario {
        let per = |sum: u64, accesses: u64| sum as f64 / accesses.max(1) as f64;
        let Run {
            accesses,
            wall,
            vcpu,
            device,
            exits,
            ..
        } = self.plain;
        let seconds = wall.as_secs_f64();
        Scenario {
            name: String::new(),
            mechanism: String::new(),
            boot: None,
            sink: None,
            transport: None,
            wait: None,
            operation: String::new(),
            placement: String::new(),
            vcpus: 0,
            doorbells: 0,
            delivery: None,
            pinning: Pinning::default(),
            iterations: self.accesses,
            rounds,
            vcpu_ns: Latency::from(&self.times),
            notify_ns: (!self.notify.is_empty()).then(|| Latency::from(&self.notify)),
            cpu_ns_per_access: CpuTime {
                vcpu: per(vcpu.cpu_ns, accesses),
                device: per(device.cpu_ns, accesses),
            },
            accesses_per_second: if seconds > 0.0 {
                accesses as f64 / seconds
            } else {
                0.0
            },
            exits_per_access: per(exits, self.accesses),
            voluntary_switches_per_access: per(vcpu.switches + device.switches, accesses),
            preemptions_per_access: Some(per(vcpu.preemptions + device.preemptions, accesses)),
            wakeups_per_access: Some(per(device.switches, accesses)),
            lost: self.wrong.lost,
            duplicated: self.wrong.duplicated,
            reordered: self.wrong.reordered,
            round_means_ns: self.round_means,
            round_references: self.round_references,
            histogram: sparse(&self.times),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(ns: f64) -> Run {
        Run {
            timings: vec![ns; 8],
            ..Run::default()
        }
    }

    #[test]
    fn quotients_take_the_references_before_and_after_a_burst() {
        let mut figures = Figures::default();
        // The machine slows down by half during the burst.
        figures.add_references(&[run(300.0)], &[run(100.0), run(200.0)]);
        assert_eq!(figures.round_references, [2.0]);
    }

    #[test]
    fn first_decile_does_not_see_what_happens_to_most() {
        let mut times = vec![5e6; 80];
        times.extend((1..=20).map(f64::from));
        assert_eq!(Summary::FirstDecile.of(&times), 11.0);
        assert_eq!(Summary::FirstDecile.of(&[]), 0.0);
        assert_eq!(Summary::Mean.of(&[1.0, 3.0]), 2.0);
    }

    #[test]
    fn midmean_follows_both_speeds_but_not_a_pause() {
        let two_speeds = [2.0, 4.0].repeat(32);
        assert_eq!(midmean_of_batches(&two_speeds), 3.0);
        let mut paused = vec![2.0; 64];
        paused[10] = 1e6;
        assert_eq!(midmean_of_batches(&paused), 2.0);
    }
}
