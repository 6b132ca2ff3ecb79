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
            accesses: 0,
            wrong: Wrong::default(),
            plain: Run::default(),
            cost_ns: None,
        }
    }
}

/// Batches that a round's times are cut into.
const BATCHES: usize = 16;

/// The median of the means of consecutive batches: a mean (wake-ups that some of the accesses pay
/// for count in it), but one that a few moments without the CPU, of milliseconds each, do not move.
fn median_of_means(times: &[f64]) -> f64 {
    let batch = times.len().div_ceil(BATCHES).max(1);
    let means: Vec<f64> = times
        .chunks(batch)
        .map(|batch| batch.iter().sum::<f64>() / batch.len() as f64)
        .collect();
    ioregion_bench::stats::median(&means).unwrap_or(0.0)
}

impl Figures {
    /// How many iterations fill `time`.
    pub fn iterations(&self, time: Duration, most: u32) -> u32 {
        let cost = self.cost_ns.unwrap_or(f64::INFINITY).max(1.0);
        ((time.as_nanos() as f64 / cost) as u32).clamp(FEWEST, most)
    }

    /// A round's timed runs.
    pub fn add_round(&mut self, runs: &[Run]) {
        let times: Vec<f64> = runs.iter().flat_map(|run| &run.timings).copied().collect();
        for time in &times {
            self.times.saturating_record(time.round() as u64);
        }
        self.round_means.push(median_of_means(&times));
        for run in runs {
            self.accesses += run.accesses;
            self.plain.exits += run.exits;
        }
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
            lost: self.wrong.lost,
            duplicated: self.wrong.duplicated,
            reordered: self.wrong.reordered,
            round_means_ns: self.round_means,
            histogram: sparse(&self.times),
        }
    }
}
