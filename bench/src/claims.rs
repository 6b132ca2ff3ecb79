//! The claims: which figure of a run is held against which bar.
//!
//! [`CLAIMS`], [`NATIVE_CLAIMS`] and [`VM_CLAIMS`] are the only places that know them; everything is
//! evaluated from the scenarios of one results file.

mod figures;
mod native;
mod table;

use std::cmp::Ordering;
use std::collections::HashSet;
use std::fmt;

use crate::results::{Boot, Claim, Mechanism, PARALLEL_SUFFIX, Ratio, Results, Scenario};
use crate::stats;

pub use figures::{TRANSPORT_CELLS, transport_cell};
pub use native::{NATIVE_CLAIMS, VM_CLAIMS};
pub use table::CLAIMS;

/// A row of the claims table before it is measured.
#[derive(Debug)]
pub struct ClaimDef {
    /// Stable id.
    pub id: &'static str,
    /// What is claimed, in words.
    pub text: &'static str,
    /// What the figure is held against.
    pub bar: Bar,
    /// How the figure is made.
    pub how: How,
}

/// What a figure is held against.
#[derive(Debug, Clone, Copy)]
pub enum Bar {
    /// Holds at or below.
    AtMost(f64),
    /// Holds at or above.
    AtLeast(f64),
    /// Only printed.
    None,
}

impl Bar {
    fn value(self) -> Option<f64> {
        match self {
            Self::AtMost(bar) | Self::AtLeast(bar) => Some(bar),
            Self::None => None,
        }
    }

    fn met_by(self, value: f64) -> Option<bool> {
        match self {
            Self::AtMost(bar) => Some(value <= bar),
            Self::AtLeast(bar) => Some(value >= bar),
            Self::None => None,
        }
    }
}

impl fmt::Display for Bar {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AtMost(bar) => write!(f, "≤ {bar}"),
            Self::AtLeast(bar) => write!(f, "≥ {bar}"),
            Self::None => write!(f, "–"),
        }
    }
}

/// How a claim's figure is made. Scenarios go by name.
#[derive(Debug)]
pub enum How {
    /// vCPU time per access of the first over the second, paired within rounds, and where both have
    /// them against reference accesses of the same moments.
    Ratio(&'static str, &'static str),
    /// The same, with CPU time and notification latency of both printed beside it, so that polling
    /// hides nothing.
    RatioWithCost(&'static str, &'static str),
    /// The same, with context switches and wake-ups of both printed beside it.
    RatioWithSwitches(&'static str, &'static str),
    /// Needs two CPUs that run at the same time: in a VM, from the boot that has them.
    Parallel(&'static str, &'static str),
    /// What `with` costs more than `without`, as a share of `without`, like a ratio.
    Added {
        /// The dearer scenario.
        with: &'static str,
        /// The same without the thing whose cost is asked.
        without: &'static str,
    },
    /// Anything else.
    Figure(fn(&Results) -> Outcome),
    /// Holds where all of these (earlier) claims hold; its figure is the largest of theirs.
    AllOf(&'static [&'static str]),
}

impl How {
    /// The two scenarios that are compared, where there are just two.
    pub fn scenarios(&self) -> Option<[&'static str; 2]> {
        match *self {
            Self::Ratio(of, over)
            | Self::RatioWithCost(of, over)
            | Self::RatioWithSwitches(of, over)
            | Self::Parallel(of, over) => Some([of, over]),
            Self::Added { with, without } => Some([with, without]),
            Self::Figure(_) | Self::AllOf(_) => None,
        }
    }
}

/// A figure, or the words that say why there is none.
pub type Outcome = Result<Figure, String>;

/// A measured figure.
#[derive(Debug)]
pub struct Figure {
    /// Its value.
    pub value: f64,
    /// Its 95 % interval, where it is an estimate.
    pub ci95: Option<[f64; 2]>,
    /// What to read beside it.
    pub note: String,
}

/// Those of the scenarios that claims compare with others of them, so that they are measured in turn
/// with references.
pub fn compared<'a>(scenarios: &HashSet<&'a str>) -> HashSet<&'a str> {
    let all = CLAIMS.iter().chain(NATIVE_CLAIMS).chain(VM_CLAIMS);
    let pairs = all.filter_map(|def| def.how.scenarios());
    let measured = pairs.filter_map(|[a, b]| Some([*scenarios.get(a)?, *scenarios.get(b)?]));
    measured.flatten().collect()
}

/// Fills in the ratios and the claims of a finished run.
pub fn complete(results: &mut Results) {
    results.ratios = ratios(results);
    results.claims = evaluate(results);
}

fn has_ioregionfd(run: &Results) -> bool {
    let mut found = run.mechanisms.iter();
    found.any(|mechanism| mechanism.name == "ioregionfd" && mechanism.available)
}

/// The claims that these runs can decide. Of a VM also those that its kernel cannot: there they are
/// what it is for.
pub fn applicable(runs: &[Results]) -> impl Iterator<Item = &'static ClaimDef> {
    let vm = runs.iter().any(|run| run.provenance.vm.is_some());
    let native = vm || runs.iter().any(has_ioregionfd);
    let native = NATIVE_CLAIMS.iter().filter(move |_| native);
    let of_vm = VM_CLAIMS.iter().filter(move |_| vm);
    CLAIMS.iter().chain(native).chain(of_vm)
}

/// Evaluates the claims over the scenarios of one run.
pub fn evaluate(results: &Results) -> Vec<Claim> {
    let mut claims: Vec<Claim> = Vec::new();
    let lacks_native = !has_ioregionfd(results);
    for def in applicable(std::slice::from_ref(results)) {
        let native = NATIVE_CLAIMS.iter().any(|native| native.id == def.id);
        let mut claim = if native && lacks_native {
            let note = "not applicable: needs a kernel with the ioregionfd series";
            let mut claim = claim(def, Err(note.into()));
            claim.not_applicable = true;
            claim
        } else {
            one(def, results, &claims)
        };
        claim.boot = boot(def, results);
        claims.push(claim);
    }
    claims
}

fn one(def: &ClaimDef, results: &Results, earlier: &[Claim]) -> Claim {
    let outcome = match def.how {
        How::Ratio(of, over) => ratio(results, of, over),
        How::RatioWithCost(of, over) => figures::ratio_with_cost(results, of, over),
        How::RatioWithSwitches(of, over) => figures::ratio_with_switches(results, of, over),
        How::Parallel(of, over) => match results.provenance.vm {
            Some(_) => {
                let [of, over] = [of, over].map(|name| format!("{name}{PARALLEL_SUFFIX}"));
                ratio(results, &of, &over)
            }
            None => ratio(results, of, over),
        },
        How::Added { with, without } => added(results, with, without),
        How::Figure(figure) => figure(results),
        How::AllOf(parts) => return all_of(def, earlier, parts),
    };
    claim(def, outcome)
}

/// The boot of a VM that a claim's figure comes from.
fn boot(def: &ClaimDef, results: &Results) -> Option<Boot> {
    results.provenance.vm.as_ref()?;
    match def.how {
        How::Parallel(..) => Some(Boot::Parallel),
        // From a boot of its own.
        _ if VM_CLAIMS.iter().any(|of_vm| of_vm.id == def.id) => None,
        _ => Some(Boot::Counted),
    }
}

fn claim(def: &ClaimDef, outcome: Outcome) -> Claim {
    let bar = def.bar.value();
    let (value, ci95, holds, note) = match outcome {
        Ok(Figure {
            value,
            ci95,
            mut note,
        }) => {
            let crosses = |[low, high]: [f64; 2]| bar.is_some_and(|bar| low < bar && bar < high);
            if ci95.is_some_and(crosses) {
                let separator = if note.is_empty() { "" } else { "; " };
                note += separator;
                note += "the interval crosses the bar";
            }
            (Some(value), ci95, def.bar.met_by(value), note)
        }
        Err(note) => (None, None, None, note),
    };
    Claim {
        id: def.id.into(),
        text: def.text.into(),
        value,
        ci95,
        bar,
        holds,
        not_applicable: false,
        boot: None,
        note,
    }
}

fn all_of(def: &ClaimDef, earlier: &[Claim], ids: &[&str]) -> Claim {
    let parts: Vec<&Claim> = earlier
        .iter()
        .filter(|c| ids.contains(&c.id.as_str()))
        .collect();
    let known = parts.iter().all(|c| c.value.is_some());
    let largest = parts
        .iter()
        .max_by(|a, b| a.value.partial_cmp(&b.value).unwrap_or(Ordering::Equal))
        .filter(|_| known);
    let holds = if parts.iter().any(|c| c.holds == Some(false)) {
        Some(false)
    } else {
        parts.iter().all(|c| c.holds == Some(true)).then_some(true)
    };
    Claim {
        id: def.id.into(),
        text: def.text.into(),
        value: largest.and_then(|c| c.value),
        ci95: largest.and_then(|c| c.ci95),
        bar: def.bar.value(),
        holds,
        not_applicable: false,
        boot: None,
        note: format!("the largest of {}", ids.join(", ")),
    }
}

/// The scenario, if its figures may be used.
fn usable<'a>(results: &'a Results, name: &str) -> Result<&'a Scenario, String> {
    let Some(scenario) = results.scenario(name) else {
        let unavailable = |m: &&Mechanism| !m.available && name.starts_with(&m.name);
        let because = results.mechanisms.iter().find(unavailable);
        let because = because.map_or(String::new(), |m| format!(" ({}: {})", m.name, m.reason));
        return Err(format!("not measured: {name}{because}"));
    };
    match scenario.wrong() {
        0 => Ok(scenario),
        n => Err(format!(
            "withheld: {n} accesses of {name} were lost, doubled or reordered"
        )),
    }
}

/// A round's times against references, where both have them; else the times themselves.
fn paired(results: &Results, of: &str, over: &str) -> Result<Vec<f64>, String> {
    let (of, over) = (usable(results, of)?, usable(results, over)?);
    let ratios = if of.round_references.is_empty() || over.round_references.is_empty() {
        let rounds = of.round_means_ns.len().min(over.round_means_ns.len());
        // Counted rounds are alike, so that not every row is measured in each of them.
        let counted = of.is_counted() && over.is_counted();
        let rounds_of = |s: &Scenario| match counted {
            true => s.round_means_ns[..rounds].to_vec(),
            false => s.round_means_ns.clone(),
        };
        stats::paired_ratios(&rounds_of(of), &rounds_of(over))
    } else {
        stats::paired_ratios(&of.round_references, &over.round_references)
    };
    ratios.map_err(|e| format!("not paired: {} / {}: {e}", of.name, over.name))
}

/// The median of ratios with its interval, and the scale that it is judged by.
fn estimate(
    results: &Results,
    [of, over]: [&str; 2],
    ratios: &[f64],
    scale: impl FnOnce(f64) -> f64,
) -> Outcome {
    let estimate = stats::estimate(ratios, results.provenance.seed)
        .ok_or_else(|| "not measured: no rounds".to_owned())?;
    let counted = usable(results, of)?.is_counted() && usable(results, over)?.is_counted();
    let noise = match counted {
        true => estimate.width_noise(scale(estimate.median)),
        false => estimate.noise(scale(estimate.median)),
    };
    match noise {
        Some(noise) => Err(noise.to_string()),
        None => Ok(Figure {
            value: estimate.median,
            ci95: Some(estimate.ci95),
            note: String::new(),
        }),
    }
}

fn ratio(results: &Results, of: &str, over: &str) -> Outcome {
    let ratios = paired(results, of, over)?;
    estimate(results, [of, over], &ratios, |median| median)
}

/// `(with - without) / without` is `with / without - 1`; its interval is judged
/// against the whole access, not against the small share that it is.
fn added(results: &Results, with: &str, without: &str) -> Outcome {
    let ratios = paired(results, with, without)?;
    let shares: Vec<f64> = ratios.iter().map(|r| r - 1.0).collect();
    estimate(results, [with, without], &shares, |_| 1.0)
}

/// The ratio of every scenario to its natural baseline in the same run.
pub fn ratios(results: &Results) -> Vec<Ratio> {
    let with_baseline = |s: &Scenario| {
        let denominator = baseline(&s.name).filter(|b| results.scenario(b).is_some())?;
        let (value, ci95, note) = match ratio(results, &s.name, &denominator) {
            Ok(figure) => (Some(figure.value), figure.ci95, figure.note),
            Err(note) => (None, None, note),
        };
        Some(Ratio {
            numerator: s.name.clone(),
            denominator,
            value,
            ci95,
            note,
        })
    };
    results.scenarios.iter().filter_map(with_baseline).collect()
}

/// What a scenario is compared with: itself with one doorbell, without its
/// variant or without the attached program; else the plain mechanism of stock
/// KVM for that operation.
fn baseline(name: &str) -> Option<String> {
    if let Some((one, doorbells)) = name.split_once('@') {
        return (doorbells != "1").then(|| format!("{one}@1"));
    }
    if let Some(without) = name.strip_suffix("+attached") {
        return Some(without.into());
    }
    let mut parts = name.splitn(3, '/');
    let (mechanism, operation) = (parts.next()?, parts.next()?);
    if parts.next().is_some() {
        return Some(format!("{mechanism}/{operation}"));
    }
    let plain = match operation {
        "posted" => "ioeventfd/posted",
        "write" => "kvm-run/write",
        "read" => "kvm-run/read",
        _ => return None,
    };
    (name != plain).then(|| plain.into())
}

#[cfg(test)]
mod tests;
