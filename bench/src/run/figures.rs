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

impl Figures {
    /// How many iterations fill `time`.
    pub fn iterations(&self, time: Duration, most: u32) -> u32 {
        let cost = self.cost_ns.unwrap_or(f64::INFINITY).max(1.0);
        ((time.as_nanos() as f64 / cost) as u32).clamp(FEWEST, most)
    }

    /// A round's timed runs.
    pub fn add_round(&mut self, runs: &[Run]) {
        let times = runs.iter().flat_map(|run| &run.timings);
        let (mut sum, mut count) = (0.0, 0_u32);
        for time in times {
            self.times.saturating_record(time.round() as u64);
            sum += time;
            count += 1;
        }
        self.round_means.push(sum / f64::from(count.max(1)));
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
