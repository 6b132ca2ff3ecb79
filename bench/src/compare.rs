//! Whether two runs gave the same figures.
//!
//! Meant for runs in which time is counted: wall time never repeats to a fraction of a percent.

use crate::results::{Boot, Results, Scenario};
use crate::table::Table;

/// Rows of the table of differences.
const SHOWN: usize = 12;

/// What comparing two runs came to.
#[derive(Debug, Clone, PartialEq)]
pub struct Comparison {
    /// Scenarios that both runs have.
    pub scenarios: usize,
    /// Figures compared.
    pub figures: usize,
    /// Figures that differ, the largest relative difference first.
    pub differences: Vec<Difference>,
    /// Scenarios that only one of the runs has.
    pub unmatched: Vec<String>,
}

/// A figure that differs.
#[derive(Debug, Clone, PartialEq)]
pub struct Difference {
    /// The scenario.
    pub scenario: String,
    /// Which of its figures.
    pub figure: String,
    /// Its value in each run.
    pub values: [f64; 2],
}

impl Difference {
    /// The difference as a share of the larger value.
    pub fn relative(&self) -> f64 {
        let [a, b] = self.values;
        match a.abs().max(b.abs()) {
            0.0 => 0.0,
            larger => (a - b).abs() / larger,
        }
    }
}

/// Compares all figures of all scenarios but those of a boot whose time is the wall's.
pub fn compare(one: &Results, other: &Results) -> Comparison {
    let counted = |s: &&Scenario| s.boot != Some(Boot::Parallel);
    let mut comparison = Comparison {
        scenarios: 0,
        figures: 0,
        differences: Vec::new(),
        unmatched: Vec::new(),
    };
    for a in one.scenarios.iter().filter(counted) {
        let Some(b) = other.scenario(&a.name).filter(counted) else {
            comparison.unmatched.push(a.name.clone());
            continue;
        };
        comparison.scenarios += 1;
        comparison.add(a, b);
    }
    let others = other.scenarios.iter().filter(counted);
    let others = others.filter(|s| one.scenario(&s.name).is_none());
    comparison.unmatched.extend(others.map(|s| s.name.clone()));
    comparison
        .differences
        .sort_by(|a, b| b.relative().total_cmp(&a.relative()));
    comparison
}

impl Comparison {
    fn add(&mut self, a: &Scenario, b: &Scenario) {
        let (left, right) = (figures(a), figures(b));
        self.figures += left.len().max(right.len());
        for at in 0..left.len().max(right.len()) {
            let (name, values) = match (left.get(at), right.get(at)) {
                (Some((name, x)), Some((_, y))) => (name, [*x, *y]),
                (Some((name, x)), None) => (name, [*x, 0.0]),
                (None, Some((name, y))) => (name, [0.0, *y]),
                (None, None) => continue,
            };
            if values[0] != values[1] {
                self.differences.push(Difference {
                    scenario: a.name.clone(),
                    figure: name.clone(),
                    values,
                });
            }
        }
    }

    /// The largest relative difference; zero where all figures are the same.
    pub fn largest(&self) -> f64 {
        self.differences.first().map_or(0.0, Difference::relative)
    }

    /// Whether both runs have the same scenarios, at least one, and no figure differs by more than
    /// that share.
    pub fn is_within(&self, share: f64) -> bool {
        self.scenarios > 0 && self.unmatched.is_empty() && self.largest() <= share
    }

    /// The largest differences, and what there is to say about all of them.
    pub fn report(&self) -> String {
        let mut table = Table::new(
            "Largest differences",
            ["scenario", "figure", ">first", ">second", ">difference"],
        );
        for difference in self.differences.iter().take(SHOWN) {
            let [first, second] = difference.values.map(|value| format!("{value:.3}"));
            table.push([
                difference.scenario.clone(),
                difference.figure.clone(),
                first,
                second,
                percent(difference.relative()),
            ]);
        }
        let table = match table.is_empty() {
            true => String::new(),
            false => format!("{}\n", table.text()),
        };
        let unmatched = match self.unmatched.len() {
            0 => String::new(),
            _ => format!("only in one of the runs: {}\n", self.unmatched.join(", ")),
        };
        format!(
            "{table}{unmatched}{} scenarios, {} figures, {} of which differ; largest difference {}\n",
            self.scenarios,
            self.figures,
            self.differences.len(),
            percent(self.largest()),
        )
    }
}

fn percent(share: f64) -> String {
    format!("{:.4} %", share * 100.0)
}

/// Everything in a scenario that was measured.
fn figures(s: &Scenario) -> Vec<(String, f64)> {
    let mut figures = Vec::new();
    for (what, latency) in [("vCPU", Some(s.vcpu_ns)), ("notify", s.notify_ns)] {
        let Some(latency) = latency else { continue };
        let quantiles = [
            ("p50", latency.p50),
            ("p90", latency.p90),
            ("p99", latency.p99),
            ("p99.9", latency.p999),
            ("max", latency.max),
        ];
        figures.extend(quantiles.map(|(name, ns)| (format!("{what} {name}"), ns as f64)));
        figures.push((format!("{what} mean"), latency.mean));
    }
    let rates = [
        ("iterations", s.iterations as f64),
        ("CPU vCPU", s.cpu_ns_per_access.vcpu),
        ("CPU device", s.cpu_ns_per_access.device),
        ("accesses per second", s.accesses_per_second),
        ("exits", s.exits_per_access),
        ("switches", s.voluntary_switches_per_access),
        ("preemptions", s.preemptions_per_access.unwrap_or(0.0)),
        ("wake-ups", s.wakeups_per_access.unwrap_or(0.0)),
        ("lost", s.lost as f64),
        ("duplicated", s.duplicated as f64),
        ("reordered", s.reordered as f64),
    ];
    figures.extend(rates.map(|(name, value)| (name.to_owned(), value)));
    let rounds = s.round_means_ns.iter().zip(1..);
    figures.extend(rounds.map(|(mean, round)| (format!("mean of round {round}"), *mean)));
    figures
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::synthetic::{results, set};

    #[test]
    fn equal_runs_differ_by_nothing() {
        let comparison = compare(&results(), &results());
        assert_eq!(comparison.largest(), 0.0);
        assert_eq!(comparison.scenarios, results().scenarios.len());
        assert!(comparison.figures > 10 * comparison.scenarios);
        assert!(comparison.is_within(0.0));
        assert!(comparison.report().contains("0 of which differ"));
    }

    #[test]
    fn largest_difference_is_found_and_judged() {
        let mut other = results();
        set(&mut other, "kvm-run/read", |s| s.round_means_ns[3] *= 1.002);
        set(&mut other, "kvm-run/write", |s| s.vcpu_ns.mean *= 1.0005);
        let comparison = compare(&results(), &other);
        assert_eq!(comparison.differences.len(), 2);
        assert_eq!(comparison.differences[0].figure, "mean of round 4");
        assert!((comparison.largest() - 0.002 / 1.002).abs() < 1e-9);
        assert!(comparison.is_within(0.002) && !comparison.is_within(0.001));
        assert!(comparison.report().contains("0.1996 %"));
    }

    #[test]
    fn other_scenarios_or_rounds_are_no_repetition() {
        let mut other = results();
        other.scenarios.remove(0);
        assert!(!compare(&results(), &other).is_within(1.0));
        assert!(!compare(&other, &results()).is_within(1.0));
        let mut other = results();
        set(&mut other, "kvm-run/read", |s| s.round_means_ns.truncate(8));
        assert_eq!(compare(&results(), &other).largest(), 1.0);
        let mut nothing = results();
        nothing.scenarios.clear();
        assert!(!compare(&nothing, &nothing).is_within(1.0));
    }

    #[test]
    fn wall_time_is_left_out() {
        let parallel = |mean: f64| {
            let mut run = results();
            set(&mut run, "kvm-run/read", |s| {
                s.boot = Some(Boot::Parallel);
                s.vcpu_ns.mean = mean;
            });
            run
        };
        assert!(compare(&parallel(1.0), &parallel(2.0)).is_within(0.0));
    }
}
