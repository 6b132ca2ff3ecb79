//! A run of the benchmark: every row once per round, forwards and backwards in turn.

mod entry;
mod fifo;
mod figures;
mod hold;
mod meter;
mod pace;
pub(crate) mod post_write;
mod rig;
mod served;
mod task;

use std::collections::HashSet;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use indicatif::{ProgressBar, ProgressStyle};
use ioregion_bench::results::{
    Boot, Host, Mechanism, Mode, Pinning, Provenance, Results, SCHEMA, Scenario,
};
use ioregion_bench::{claims, plot};
use ioregion_dispatch::Program;
use nix::sched::{CpuSet, sched_getaffinity};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, sigaction};
use nix::unistd::Pid;

use self::entry::Entry;
use self::figures::Figures;
use self::pace::Pace;
use crate::doctor;
use crate::scenarios::{Carrier, Operation, Placement, ROWS, Row};

pub(crate) use rig::Run;
pub use task::device_process;
pub(crate) use task::{Cost, pin};

/// Descriptors for 10,000 plain ioeventfds and for all else.
pub(crate) const DESCRIPTORS: u64 = 12_000;
/// How long to wait after the program was attached or detached: the kernel tidies up in the
/// background, which the next row would pay for.
const SETTLE: Duration = Duration::from_millis(400);
/// The nice value that comes before all others.
const HIGHEST_PRIORITY: i32 = -20;

/// What to run and where to put it.
#[derive(Debug)]
pub struct Options {
    /// How thorough.
    pub mode: Mode,
    /// Only rows of these names, or whose names contain them; empty: all.
    pub filter: Vec<String>,
    /// Seed of the statistics.
    pub seed: u64,
    /// Rounds; by mode where not given.
    pub rounds: Option<usize>,
    /// Folder of the results.
    pub out: PathBuf,
    /// The kind of boot, in a VM: which rows, and how many accesses of each.
    pub boot: Option<Boot>,
}

impl Options {
    fn rounds(&self) -> usize {
        self.rounds.unwrap_or(match (self.boot, self.mode) {
            (Some(Boot::Counted), _) | (None, Mode::Smoke) => 6,
            (Some(Boot::Parallel), _) => 12,
            (None, Mode::Quick) => 10,
            (None, Mode::Full) => 30,
        })
    }
}

/// Measures, and writes the results and their plots.
///
/// # Errors
///
/// Only if nothing can be measured at all, or nothing written: a row that fails is listed among
/// what is unavailable.
pub fn run(options: &Options) -> Result<(Results, Vec<PathBuf>)> {
    prepare()?;
    let (rounds, pace) = (options.rounds(), Pace::of(options.mode, options.boot));
    let mut results = Results {
        schema: SCHEMA,
        host: Host::gather(),
        provenance: Provenance::gather(options.mode, options.seed, rounds),
        mechanisms: doctor::mechanisms(),
        scenarios: Vec::new(),
        ratios: Vec::new(),
        claims: Vec::new(),
    };
    let cpus = Cpus::find()?;
    pin(cpus.device)?;
    let mut entries: Vec<Entry> = ROWS
        .iter()
        .filter(|row| row.is_in(options.mode, options.boot))
        .filter(|row| {
            let parts = &options.filter;
            parts.is_empty() || parts.iter().any(|part| picks(part, row.name))
        })
        .filter(|row| available(row, &results.mechanisms))
        .map(Entry::new)
        .collect();
    let names: HashSet<&str> = entries.iter().map(|entry| entry.row.name).collect();
    let compared = claims::compared(&names);
    for entry in &mut entries {
        // In a VM the machine does not change under the guest, or not in a way that shows there.
        entry.compared = options.boot.is_none() && compared.contains(entry.row.name);
    }
    let bar = ProgressBar::new((rounds * entries.len()) as u64).with_style(
        ProgressStyle::with_template("{bar:30} {pos}/{len} {eta} {msg}")?,
    );
    // Loaded once, since that keeps the kernel busy for a while; attached for its own rows only.
    let mut program: Option<Arc<Program>> = None;
    let mut attached = false;
    for round in 0..rounds {
        if options.boot.is_some() {
            eprintln!("round {} of {rounds}, {} rows", round + 1, entries.len());
        }
        let mut order: Vec<usize> = (0..entries.len()).collect();
        if round % 2 == 1 {
            order.reverse();
        }
        for at in order {
            let row = entries[at].row;
            if !pace.measures(row, round, rounds) {
                continue;
            }
            if row.needs_program() && program.is_none() {
                let loaded = Program::load_default().context("loading the eBPF program")?;
                // Before anything is attached to tracepoints.
                loaded.set_attached(false)?;
                program = Some(loaded);
            }
            if let Some(program) = program.as_ref().filter(|_| row.attaches() != attached) {
                if attached {
                    let with = entries.iter_mut().filter(|entry| entry.row.attaches());
                    with.for_each(Entry::take_down);
                }
                attached = row.attaches();
                program.set_attached(attached)?;
                std::thread::sleep(SETTLE);
            }
            let entry = &mut entries[at];
            bar.set_message(entry.row.name);
            let had_failed = entry.failed.is_some();
            entry.measure(program.as_ref(), &cpus, pace);
            if let Some(error) = entry.failed.as_ref().filter(|_| !had_failed) {
                bar.suspend(|| eprintln!("{}: {}", entry.row.name, reason(error)));
            }
            bar.inc(1);
        }
    }
    bar.finish_and_clear();
    for mut entry in entries {
        entry.take_down();
        match entry.failed {
            None => {
                let measured = (0..rounds).filter(|round| pace.measures(entry.row, *round, rounds));
                let measured = measured.count();
                let mut scenario = scenario(entry.row, &cpus, entry.figures, measured);
                scenario.boot = options.boot;
                results.scenarios.push(scenario);
            }
            Some(error) => results.mechanisms.push(Mechanism {
                name: entry.row.name.to_owned(),
                available: false,
                reason: reason(&error),
            }),
        }
    }
    drop(program);
    claims::complete(&mut results);
    let files = write(&results, options)?;
    Ok((results, files))
}

/// Whether a filter picks a row: the one of that name if there is one, else all that contain it.
fn picks(part: &str, name: &str) -> bool {
    name == part || (name.contains(part) && ROWS.iter().all(|row| row.name != part))
}

/// The chain of causes, without those that the one before tells already, and what would help.
fn reason(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if !text.contains(&cause) {
            text += if text.is_empty() { "" } else { ": " };
            text += &cause;
        }
    }
    if text.contains("os error 24") {
        let limit = getrlimit(Resource::RLIMIT_NOFILE).map_or(0, |(_, hard)| hard);
        text += &format!("; to enable: `ulimit -Hn {DESCRIPTORS}` (it is {limit})");
    }
    text
}

fn write(results: &Results, options: &Options) -> Result<Vec<PathBuf>> {
    if let Some(boot) = options.boot {
        // The rest is done where the VM was booted.
        let path = options.out.join(format!("{}.json", boot.name()));
        results.save(&path)?;
        return Ok(vec![path]);
    }
    let date = results.provenance.date.replace(':', "");
    let mut files = Vec::new();
    for name in ["latest", &date] {
        let path = options.out.join(format!("{name}.json"));
        results.save(&path)?;
        files.push(path);
    }
    let plots = plot::write_all(std::slice::from_ref(results), &options.out);
    files.extend(plots.context("plots not written")?);
    Ok(files)
}

/// Whether the row's mechanisms are there; if not, the list says so by name.
fn available(row: &Row, mechanisms: &[Mechanism]) -> bool {
    let missing = |name: &str| mechanisms.iter().any(|m| m.name == name && !m.available);
    !row.mechanisms().any(missing)
}

/// Where the threads run.
pub(crate) struct Cpus {
    vcpus: Vec<usize>,
    device: Option<usize>,
}

impl Cpus {
    /// The first CPU for the vCPU, the second for the device; a second vCPU shares the latter.
    fn find() -> Result<Self> {
        let set = sched_getaffinity(Pid::from_raw(0))?;
        let mut cpus = (0..CpuSet::count()).filter(|cpu| set.is_set(*cpu).unwrap_or(false));
        let first = cpus.next().context("no CPU")?;
        let second = cpus.next().unwrap_or(first);
        Ok(Self {
            vcpus: vec![first, second],
            device: Some(second),
        })
    }

    fn pinning(&self, row: &Row) -> Pinning {
        Pinning {
            vcpus: self
                .vcpus
                .iter()
                .copied()
                .take(row.vcpus as usize)
                .collect(),
            device: self.device,
        }
    }
}

/// Descriptors enough, a signal that interrupts without killing, and precedence over whatever else
/// the machine does, so that it disturbs less; threads and processes started later inherit it.
fn prepare() -> Result<()> {
    // SAFETY: It takes no pointers.
    if unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, HIGHEST_PRIORITY) } != 0 {
        let error = std::io::Error::last_os_error();
        tracing::warn!(%error, "measuring at ordinary priority, so expect more noise");
    }
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    if soft < DESCRIPTORS
        && setrlimit(Resource::RLIMIT_NOFILE, DESCRIPTORS, hard.max(DESCRIPTORS)).is_err()
    {
        // Not privileged: what there is, then; rows that need more say so.
        setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    }
    extern "C" fn nothing(_: i32) {}
    let action = SigAction::new(
        SigHandler::Handler(nothing),
        SaFlags::empty(),
        SigSet::empty(),
    );
    // SAFETY: The handler does nothing.
    unsafe { sigaction(rig::KICK, &action) }?;
    Ok(())
}

fn scenario(row: &Row, cpus: &Cpus, figures: Figures, rounds: usize) -> Scenario {
    let guest = row.operation != Operation::RoundTrip;
    let own_task = row.placement != Placement::Vcpu;
    let ebpf = row.carrier == Carrier::Ebpf;
    let sink = match (row.hook, row.sink) {
        (Some(hook), _) => hook.name(),
        (None, ioregion_dispatch::Sink::Ioeventfd) => "ioeventfd",
        (None, ioregion_dispatch::Sink::Coalesced) => "coalesced",
    };
    let delivery = match row.delivery {
        ioregion_dispatch::Delivery::Latest => "latest",
        ioregion_dispatch::Delivery::Fifo => "fifo",
    };
    let transport = match row.carrier {
        Carrier::Forward | Carrier::Ioregionfd => Some(row.transport_name()),
        Carrier::SocketpairPingPong => Some("stream"),
        Carrier::EventfdPingPong
        | Carrier::Ioeventfd
        | Carrier::PostWrite
        | Carrier::SinkWithoutReader => Some("eventfd"),
        _ => None,
    };
    let mut pinning = cpus.pinning(row);
    if !own_task {
        pinning.device = None;
    }
    let mut scenario = figures.finish(rounds);
    scenario.name = row.name.to_owned();
    scenario.mechanism = row.carrier.name().to_owned();
    scenario.sink = ebpf.then(|| sink.to_owned());
    scenario.transport = transport.map(str::to_owned);
    scenario.wait = own_task.then(|| row.wait.name().to_owned());
    scenario.operation = row.operation.name().to_owned();
    scenario.placement = row.placement.name().to_owned();
    scenario.vcpus = if guest { row.vcpus } else { 0 };
    scenario.doorbells = if row.operation.rings() || row.regions.is_some() {
        row.cycle()
    } else {
        0
    };
    scenario.delivery = ebpf.then(|| delivery.to_owned());
    scenario.pinning = pinning;
    scenario
}
