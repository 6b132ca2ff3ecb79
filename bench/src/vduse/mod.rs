//! Disks over VDUSE: ours against `qemu-storage-daemon`'s, on the same file in the same run.
//!
//! Both are driven through virtio_vdpa by the same load, in bursts that take turns in random order,
//! so that figures pair within a round. The load is our own: what a process uses of the CPU is
//! read right before and after each burst, of which starting a program would be the larger part.
//!
//! # Time
//!
//! Time is the count of instructions of the VM's one CPU, so that rates are of load, kernel and
//! service together: `1 / rate` is the instructions of one request from the load's system call to
//! its completion. In wall time two emulated CPUs would measure what else their machine does, too;
//! counted, runs of the same programs differ by a percent or two, and however loaded the machine
//! is. What counting does not see: caches, what a mode switch or an interrupt between CPUs costs beyond its
//! instructions, and service and load at the same time on two CPUs. It is fair to neither side in
//! particular: both have the same driver, kernel and file.
//!
//! # CPU time
//!
//! That of the process that was started and of all that descend from it: all of their threads,
//! io_uring's workers among them, and what the kernel does in their system calls. Ours is two
//! processes, the service and its keeper; the peer is one. Not the kernel's own threads, which
//! deliver the interrupts of VDUSE devices; rates have those.
//!
//! # Memory
//!
//! The sum of what is resident of the same processes. Pages that two of them have count twice,
//! which makes ours larger than it is.

mod report;

use std::fs::File;
use std::io::{self, BufReader, BufWriter, Write as _};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::results::{Claim, Host, Provenance};
use crate::stats::{estimate, paired_ratios};

/// Version of the file format.
pub const SCHEMA: u64 = 1;
/// The most memory that the service may have, in MiB.
pub const MOST_MIB: f64 = 16.0;
/// The least ratio of rates, and what the lower end of its interval must reach.
const LEAST_RATE: [f64; 2] = [1.0, 0.95];
/// The largest ratio of CPU times.
const MOST_CPU: f64 = 1.0;

/// What a burst does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Load {
    /// Writes instead of reads.
    pub write: bool,
    /// One request after the other in the file, else anywhere.
    pub sequential: bool,
    /// Bytes of a request.
    pub bytes: u32,
    /// Requests under way.
    pub depth: u32,
    /// Requests of a burst.
    pub requests: u32,
}

impl Load {
    /// All that are measured.
    pub const ALL: [Self; 8] = {
        const fn random(write: bool, depth: u32, requests: u32) -> Load {
            Load {
                write,
                sequential: false,
                bytes: 4096,
                depth,
                requests,
            }
        }
        const fn sequential(write: bool, depth: u32, requests: u32) -> Load {
            Load {
                write,
                sequential: true,
                bytes: 128 << 10,
                depth,
                requests,
            }
        }
        [
            random(false, 1, 500),
            random(false, 32, 2000),
            random(true, 1, 500),
            random(true, 32, 2000),
            sequential(false, 1, 96),
            sequential(false, 32, 384),
            sequential(true, 1, 96),
            sequential(true, 32, 384),
        ]
    };

    /// As in the claims' names.
    #[must_use]
    pub fn name(&self) -> String {
        let order = if self.sequential { "seq" } else { "rand" };
        let what = if self.write { "write" } else { "read" };
        format!("{order}{what}-qd{}", self.depth)
    }
}

/// One burst of one side.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Burst {
    /// Requests per second.
    pub rate: f64,
    /// CPU time of the service's processes per request, in nanoseconds.
    pub cpu_ns: f64,
}

/// What a load measured; bursts of both sides with the same index are of the same round.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Row {
    /// The load.
    pub load: Load,
    /// `ioregion vduse blk`.
    pub ours: Vec<Burst>,
    /// `qemu-storage-daemon`.
    pub theirs: Vec<Burst>,
}

/// Resident memory of a service's processes, in KiB.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Memory {
    /// With its disk there, before the first burst.
    pub before: u64,
    /// At rest after all bursts.
    pub after: u64,
}

/// What is the same on both sides.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// Cache mode, queues, queue size, io_uring.
    pub both: Vec<String>,
    /// Command line of our service.
    pub ours: String,
    /// And of the peer.
    pub theirs: String,
}

/// A run.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Disks {
    /// Format version, [`SCHEMA`].
    pub schema: u64,
    /// The machine.
    pub host: Host,
    /// What made the file.
    pub provenance: Provenance,
    /// What is the same on both sides.
    pub settings: Settings,
    /// In the order of [`Load::ALL`].
    pub rows: Vec<Row>,
    /// Our service's memory.
    pub ours: Memory,
    /// The peer's.
    pub theirs: Memory,
    /// What follows; see [`Disks::complete`].
    #[serde(default)]
    pub claims: Vec<Claim>,
}

/// Why a file of disks cannot be read or written. Each names the file.
#[derive(Debug, thiserror::Error)]
pub enum DisksError {
    /// It cannot be opened, read or written.
    #[error("{}: {source}", .path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// It is something else.
    #[error("{}: no figures of disks: {source}", .path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// Where and why parsing stopped.
        source: serde_json::Error,
    },
    /// It is of another version, or contradicts itself.
    #[error("{}: {what}", .path.display())]
    Invalid {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
}

impl Disks {
    /// Reads a file.
    ///
    /// # Errors
    ///
    /// [`DisksError`].
    pub fn load(path: &Path) -> Result<Self, DisksError> {
        let io = |source| DisksError::Io {
            path: path.into(),
            source,
        };
        let file = BufReader::new(File::open(path).map_err(io)?);
        let disks: Self = serde_json::from_reader(file).map_err(|source| DisksError::Parse {
            path: path.into(),
            source,
        })?;
        match disks.check() {
            Ok(()) => Ok(disks),
            Err(what) => Err(DisksError::Invalid {
                path: path.into(),
                what,
            }),
        }
    }

    fn check(&self) -> Result<(), String> {
        if self.schema != SCHEMA {
            return Err(format!(
                "schema {} (this build reads {SCHEMA})",
                self.schema
            ));
        }
        let loads: Vec<Load> = self.rows.iter().map(|row| row.load).collect();
        if loads != Load::ALL {
            return Err("other loads than this build knows".into());
        }
        let figures = |row: &Row| {
            let bursts = row.ours.iter().chain(&row.theirs);
            bursts.into_iter().all(|burst| {
                let figures = [burst.rate, burst.cpu_ns];
                figures.iter().all(|f| f.is_finite() && *f > 0.0)
            })
        };
        match self
            .rows
            .iter()
            .find(|row| row.ours.is_empty() || row.ours.len() != row.theirs.len() || !figures(row))
        {
            Some(row) => Err(format!("{}: bursts that cannot be", row.load.name())),
            None => Ok(()),
        }
    }

    /// Writes a file.
    ///
    /// # Errors
    ///
    /// [`DisksError::Io`] or [`DisksError::Parse`].
    pub fn save(&self, path: &Path) -> Result<(), DisksError> {
        let io = |source| DisksError::Io {
            path: path.into(),
            source,
        };
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder).map_err(io)?;
        }
        let mut file = BufWriter::new(File::create(path).map_err(io)?);
        serde_json::to_writer_pretty(&mut file, self).map_err(|source| DisksError::Parse {
            path: path.into(),
            source,
        })?;
        file.flush().map_err(io)
    }

    /// Works the claims out anew.
    pub fn complete(&mut self) {
        let seed = self.provenance.seed;
        let mut claims: Vec<Claim> = self
            .rows
            .iter()
            .flat_map(|row| [rate(row, seed), cpu(row, seed)])
            .collect();
        let mib = self.ours.before.max(self.ours.after) as f64 / 1024.0;
        claims.push(Claim {
            id: "vduse-rss".into(),
            text: "resident memory of the service at rest, the larger of before and after the load, in MiB".into(),
            value: Some(mib),
            ci95: None,
            bar: Some(MOST_MIB),
            holds: Some(mib <= MOST_MIB),
            not_applicable: false,
            boot: None,
            note: String::new(),
        });
        self.claims = claims;
    }
}

fn rate(row: &Row, seed: u64) -> Claim {
    let [bar, least] = LEAST_RATE;
    let name = row.load.name();
    let text = format!(
        "{name}: requests per second, ours / theirs; at least, with {least} for the lower end of the interval"
    );
    let holds = |value: f64, ci95: [f64; 2]| value >= bar && ci95[0] >= least;
    let id = format!("vduse-blk-{name}-iops");
    claim(id, text, row, |burst| burst.rate, bar, seed, holds)
}

fn cpu(row: &Row, seed: u64) -> Claim {
    let name = row.load.name();
    let text = format!("{name}: CPU time of the service per request, ours / theirs; at most");
    let holds = |value: f64, _| value <= MOST_CPU;
    let id = format!("vduse-blk-{name}-cpu");
    claim(id, text, row, |burst| burst.cpu_ns, MOST_CPU, seed, holds)
}

fn claim(
    id: String,
    text: String,
    row: &Row,
    figure: impl Fn(&Burst) -> f64,
    bar: f64,
    seed: u64,
    holds: impl FnOnce(f64, [f64; 2]) -> bool,
) -> Claim {
    let [ours, theirs] = [&row.ours, &row.theirs].map(|side| -> Vec<f64> {
        let figures = side.iter();
        figures.map(&figure).collect()
    });
    let estimated = paired_ratios(&ours, &theirs).map(|ratios| estimate(&ratios, seed));
    let (value, ci95, note) = match estimated {
        Ok(Some(estimate)) => match estimate.noise(estimate.median) {
            None => (Some(estimate.median), Some(estimate.ci95), String::new()),
            Some(noise) => (None, None, noise.to_string()),
        },
        Ok(None) => (None, None, "no rounds".into()),
        Err(error) => (None, None, error.to_string()),
    };
    Claim {
        id,
        text,
        value,
        ci95,
        bar: Some(bar),
        holds: value.zip(ci95).map(|(value, ci95)| holds(value, ci95)),
        not_applicable: false,
        boot: None,
        note,
    }
}

#[cfg(test)]
mod tests;
