//! The results file: one JSON document per run, self-contained.
//!
//! Times are nanoseconds unless a name says otherwise. A fact that could not be
//! read is `null`, never a guess.

use std::collections::{BTreeMap, HashSet};
use std::fs::File;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};
use thiserror::Error;

mod provenance;

pub use provenance::{Boot, BootFacts, Mode, Provenance, VmFacts};

/// Version of the file format that this crate writes and reads.
pub const SCHEMA: u64 = 1;
/// Largest results file that is read, in bytes.
pub const MAX_FILE_BYTES: u64 = 64 << 20;
/// What the names of rows of a VM's boot with two CPUs end in: rows of the same names were measured
/// with one.
pub const PARALLEL_SUFFIX: &str = "/2cpu";
/// Largest figure that is believed, in whatever unit: eleven days in nanoseconds.
const MAX_FIGURE: f64 = 1e15;
const MAX_SCENARIOS: usize = 1_000;
const MAX_ROUNDS: usize = 4_096;

/// Why a results file could not be read or written. Every variant names the file.
#[derive(Debug, Error)]
pub enum ResultsError {
    /// The file could not be opened, read or written.
    #[error("{}: {source}", .path.display())]
    Io {
        /// The results file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The file is larger than [`MAX_FILE_BYTES`].
    #[error("{}: larger than {MAX_FILE_BYTES} bytes, so not a results file", .path.display())]
    TooLarge {
        /// The results file.
        path: PathBuf,
    },
    /// The file is not JSON, or not a results document.
    #[error("{}: not a results file: {source}", .path.display())]
    Parse {
        /// The results file.
        path: PathBuf,
        /// Where and why parsing stopped.
        source: serde_json::Error,
    },
    /// The file is of another format version.
    #[error("{}: schema {found} is not supported (this build reads schema {SCHEMA})", .path.display())]
    Schema {
        /// The results file.
        path: PathBuf,
        /// The version that the file declares.
        found: u64,
    },
    /// The document contradicts itself.
    #[error("{}: {what}", .path.display())]
    Invalid {
        /// The results file.
        path: PathBuf,
        /// The contradiction.
        what: String,
    },
}

/// One run: what was measured, where, how, and what follows from it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Results {
    /// Format version, [`SCHEMA`].
    pub schema: u64,
    /// The machine.
    pub host: Host,
    /// What made the file.
    pub provenance: Provenance,
    /// Each mechanism and whether this host offers it.
    pub mechanisms: Vec<Mechanism>,
    /// One entry per measured scenario, in the order of the scenario table.
    pub scenarios: Vec<Scenario>,
    /// Paired ratios, see [`crate::claims::ratios`].
    #[serde(default)]
    pub ratios: Vec<Ratio>,
    /// The claims table, see [`crate::claims::evaluate`].
    #[serde(default)]
    pub claims: Vec<Claim>,
}

/// Facts about the machine; `None` where the machine did not tell.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Host {
    /// Kernel release and version.
    pub kernel: Option<String>,
    /// Which kind of KVM runs the guests.
    pub kvm: Kvm,
    /// CPU model name.
    pub cpu_model: Option<String>,
    /// Logical CPUs online.
    pub cores: Option<usize>,
    /// CPU vulnerability name to the kernel's line about it.
    pub mitigations: BTreeMap<String, String>,
    /// CPU frequency governor of CPU 0.
    pub governor: Option<String>,
    /// The kernel's current clock source.
    pub clocksource: Option<String>,
    /// Installed memory in bytes.
    pub memory_bytes: Option<u64>,
    /// Whether the CPU says that a hypervisor is below.
    pub hypervisor: Option<bool>,
    /// That hypervisor's CPUID signature.
    pub hypervisor_signature: Option<String>,
    /// Kernel lockdown mode.
    pub lockdown: Option<String>,
}

/// The kind of KVM, and how it was told.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Kvm {
    /// The kind.
    pub kind: KvmKind,
    /// The facts that the kind was concluded from.
    pub told_by: String,
}

/// Kinds of KVM whose costs differ enough never to be compared in absolute time.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum KvmKind {
    /// Intel VMX on bare hardware.
    Vmx,
    /// AMD SVM on bare hardware.
    Svm,
    /// Software-nested KVM without VMX or SVM.
    Pvm,
    /// VMX or SVM offered by a hypervisor below.
    Nested,
    /// VMX or SVM offered by an instruction emulator.
    Emulated,
    /// Could not be told.
    #[default]
    Unknown,
}

impl KvmKind {
    /// The word used in files and tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::Vmx => "vmx",
            Self::Svm => "svm",
            Self::Pvm => "pvm",
            Self::Nested => "nested",
            Self::Emulated => "emulated",
            Self::Unknown => "unknown",
        }
    }
}

/// A mechanism and whether the host offers it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Mechanism {
    /// `kvm-run`, `forward`, `ioeventfd`, `ioregionfd` or `ebpf`.
    pub name: String,
    /// Whether it was measured.
    pub available: bool,
    /// Why not and what would enable it; empty where available.
    #[serde(default)]
    pub reason: String,
}

/// One measured scenario.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Scenario {
    /// Unique name: `mechanism/operation`, then `@doorbells` or `/variant`.
    pub name: String,
    /// The mechanism, or `floor`.
    pub mechanism: String,
    /// The boot of a VM that it was measured in; `None` on a machine.
    #[serde(default)]
    pub boot: Option<Boot>,
    /// In-kernel sink of an `ebpf` doorbell: `ioeventfd` or `coalesced`; `signal`, `consume` or
    /// `answer` where KVM asks the program, which then does that.
    pub sink: Option<String>,
    /// Transport between vCPU thread and device task, where there is one.
    pub transport: Option<String>,
    /// How the device task waits: `sleep`, `spin` or `poll`.
    pub wait: Option<String>,
    /// `posted`, `write` (waits for its response), `read`, …
    pub operation: String,
    /// Where the device runs: `vcpu`, `thread` or `process`.
    pub placement: String,
    /// vCPUs that access at the same time.
    pub vcpus: u32,
    /// Doorbells that were registered.
    pub doorbells: u32,
    /// `latest` or `fifo`, where values are delivered in memory.
    pub delivery: Option<String>,
    /// CPUs that the threads were pinned to.
    pub pinning: Pinning,
    /// Accesses over all rounds and vCPUs.
    pub iterations: u64,
    /// Rounds measured.
    pub rounds: usize,
    /// vCPU time per access.
    pub vcpu_ns: Latency,
    /// From the access in the guest to the device task that sees it.
    pub notify_ns: Option<Latency>,
    /// CPU time per access.
    pub cpu_ns_per_access: CpuTime,
    /// Throughput over all vCPUs, per second of wall time.
    pub accesses_per_second: f64,
    /// Returns of `KVM_RUN` to user space per access.
    pub exits_per_access: f64,
    /// Voluntary context switches per access, vCPU and device together.
    pub voluntary_switches_per_access: f64,
    /// Involuntary ones; `None` where not counted.
    #[serde(default)]
    pub preemptions_per_access: Option<f64>,
    /// How often the device task was woken per access; `None` where not counted.
    #[serde(default)]
    pub wakeups_per_access: Option<f64>,
    /// Accesses that never arrived.
    pub lost: u64,
    /// Accesses that arrived more than once.
    pub duplicated: u64,
    /// Accesses that arrived out of order.
    pub reordered: u64,
    /// Mean vCPU time per access of each round; the index is the round, so that
    /// ratios pair within rounds.
    pub round_means_ns: Vec<f64>,
    /// Per round the time of an access over that of a reference access of the same moments (the
    /// guest's `CPUID`), which cancels how fast the machine just was; empty where not measured.
    #[serde(default)]
    pub round_references: Vec<f64>,
    /// Raw vCPU time histogram: `[lowest ns of the bucket, count]`, no empty buckets.
    pub histogram: Vec<(u64, u64)>,
}

impl Scenario {
    /// Whether its times are counts of instructions.
    pub fn is_counted(&self) -> bool {
        self.boot == Some(Boot::Counted)
    }

    /// Accesses that arrived wrongly or not at all. A scenario that has any
    /// yields no figure.
    pub fn wrong(&self) -> u64 {
        self.lost
            .saturating_add(self.duplicated)
            .saturating_add(self.reordered)
    }
}

/// Where the threads of a scenario ran.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Pinning {
    /// CPU of each vCPU thread; empty where not pinned.
    pub vcpus: Vec<usize>,
    /// CPU of the device task, where it is a task of its own and pinned.
    pub device: Option<usize>,
}

/// Distribution of a time, in nanoseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Latency {
    /// Median.
    pub p50: u64,
    /// 90th percentile.
    pub p90: u64,
    /// 99th percentile.
    pub p99: u64,
    /// 99.9th percentile.
    pub p999: u64,
    /// Largest.
    pub max: u64,
    /// Arithmetic mean.
    pub mean: f64,
}

impl Latency {
    fn is_consistent(&self) -> bool {
        let ordered = [self.p50, self.p90, self.p99, self.p999, self.max].is_sorted();
        ordered && self.max as f64 <= MAX_FIGURE && (0.0..=MAX_FIGURE).contains(&self.mean)
    }
}

impl From<&Histogram<u64>> for Latency {
    /// Summarises recorded nanoseconds; all zero for an empty histogram.
    fn from(histogram: &Histogram<u64>) -> Self {
        let at = |q| histogram.value_at_quantile(q);
        Self {
            p50: at(0.50),
            p90: at(0.90),
            p99: at(0.99),
            p999: at(0.999),
            max: histogram.max(),
            mean: histogram.mean(),
        }
    }
}

/// The raw form of a histogram that [`Scenario::histogram`] keeps.
pub fn sparse(histogram: &Histogram<u64>) -> Vec<(u64, u64)> {
    histogram
        .iter_recorded()
        .map(|bucket| {
            let low = histogram.lowest_equivalent(bucket.value_iterated_to());
            (low, bucket.count_at_value())
        })
        .collect()
}

/// CPU time per access, in nanoseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct CpuTime {
    /// Of the vCPU threads.
    pub vcpu: f64,
    /// Of the device task.
    pub device: f64,
}

impl CpuTime {
    /// vCPU and device task together.
    pub fn total(&self) -> f64 {
        self.vcpu + self.device
    }
}

/// A ratio of two scenarios of the same run, paired within rounds.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Ratio {
    /// Scenario above the line.
    pub numerator: String,
    /// Scenario below the line.
    pub denominator: String,
    /// Median ratio; `None` where it is too noisy or its values were wrong.
    pub value: Option<f64>,
    /// Bootstrap 95 % interval of the median.
    pub ci95: Option<[f64; 2]>,
    /// Why there is no value.
    #[serde(default)]
    pub note: String,
}

/// A row of the claims table.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Claim {
    /// Stable id.
    pub id: String,
    /// What is claimed, in words.
    pub text: String,
    /// The measured figure; `None` where there is none that can be trusted.
    pub value: Option<f64>,
    /// Bootstrap 95 % interval, for ratios.
    pub ci95: Option<[f64; 2]>,
    /// What the figure is held against; `None` for a figure that is only printed.
    pub bar: Option<f64>,
    /// Whether the bar is met; `None` without a bar or without a figure.
    pub holds: Option<bool>,
    /// Whether the kernel lacks what the claim is about.
    #[serde(default)]
    pub not_applicable: bool,
    /// The boot of a VM that the figure comes from; `None` on a machine.
    #[serde(default)]
    pub boot: Option<Boot>,
    /// Why there is no figure, or what to read beside it.
    #[serde(default)]
    pub note: String,
}

#[derive(Deserialize)]
struct SchemaOnly {
    schema: u64,
}

impl Results {
    /// Reads and checks a results file.
    ///
    /// # Errors
    /// Unreadable, larger than [`MAX_FILE_BYTES`], not JSON, another schema, or
    /// self-contradicting; each names the file.
    pub fn load(path: &Path) -> Result<Self, ResultsError> {
        let io = |source| ResultsError::Io {
            path: path.into(),
            source,
        };
        let parse = |source| ResultsError::Parse {
            path: path.into(),
            source,
        };
        let mut text = Vec::new();
        let file = File::open(path).map_err(io)?;
        file.take(MAX_FILE_BYTES + 1)
            .read_to_end(&mut text)
            .map_err(io)?;
        if text.len() as u64 > MAX_FILE_BYTES {
            return Err(ResultsError::TooLarge { path: path.into() });
        }
        // The version first: a later format deserves a better answer than "missing field".
        let SchemaOnly { schema: found } = serde_json::from_slice(&text).map_err(parse)?;
        if found != SCHEMA {
            return Err(ResultsError::Schema {
                path: path.into(),
                found,
            });
        }
        let results: Self = serde_json::from_slice(&text).map_err(parse)?;
        results.check(path)?;
        Ok(results)
    }

    /// Writes the file whole or not at all, making its folder if needed.
    ///
    /// # Errors
    /// The system's error, or a document that [`Results::load`] would refuse.
    pub fn save(&self, path: &Path) -> Result<(), ResultsError> {
        self.check(path)?;
        let io = |source| ResultsError::Io {
            path: path.into(),
            source,
        };
        let mut text = serde_json::to_vec(self).map_err(|e| io(e.into()))?;
        text.push(b'\n');
        if let Some(folder) = path.parent().filter(|p| !p.as_os_str().is_empty()) {
            std::fs::create_dir_all(folder).map_err(io)?;
        }
        let partial = path.with_extension("json.partial");
        File::create(&partial)
            .and_then(|mut file| file.write_all(&text))
            .and_then(|()| std::fs::rename(&partial, path))
            .map_err(io)
    }

    /// The scenario of that name.
    pub fn scenario(&self, name: &str) -> Option<&Scenario> {
        self.scenarios.iter().find(|s| s.name == name)
    }

    fn check(&self, path: &Path) -> Result<(), ResultsError> {
        self.contradiction().map_or(Ok(()), |what| {
            Err(ResultsError::Invalid {
                path: path.into(),
                what,
            })
        })
    }

    fn contradiction(&self) -> Option<String> {
        if self.scenarios.len() > MAX_SCENARIOS {
            return Some(format!("more than {MAX_SCENARIOS} scenarios"));
        }
        let mut names = HashSet::new();
        for s in &self.scenarios {
            let name = &s.name;
            let figures = [
                s.cpu_ns_per_access.vcpu,
                s.cpu_ns_per_access.device,
                s.accesses_per_second,
                s.exits_per_access,
                s.voluntary_switches_per_access,
            ];
            let counted = [s.preemptions_per_access, s.wakeups_per_access];
            if !names.insert(name) {
                return Some(format!("scenario {name:?} occurs twice"));
            }
            if s.round_means_ns.len().max(s.round_references.len()) > MAX_ROUNDS {
                return Some(format!(
                    "scenario {name:?} has more than {MAX_ROUNDS} rounds"
                ));
            }
            if !s.vcpu_ns.is_consistent() || s.notify_ns.is_some_and(|n| !n.is_consistent()) {
                return Some(format!(
                    "scenario {name:?}: percentiles out of order or range"
                ));
            }
            let all = figures
                .iter()
                .chain(counted.iter().flatten())
                .chain(&s.round_means_ns)
                .chain(&s.round_references);
            if let Some(bad) = all.into_iter().find(|f| !(0.0..=MAX_FIGURE).contains(*f)) {
                return Some(format!("scenario {name:?}: {bad} is not a figure"));
            }
        }
        None
    }
}

#[cfg(test)]
mod tests;
