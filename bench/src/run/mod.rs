//! A run of the benchmark: every row once per round, forwards and backwards in turn.

mod figures;
mod hold;
mod meter;
mod rig;
mod task;

use std::collections::HashSet;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use indicatif::{ProgressBar, ProgressStyle};
use ioregion_bench::results::{
    Host, Mechanism, Mode, Pinning, Provenance, Results, SCHEMA, Scenario,
};
use ioregion_bench::{claims, plot};
use ioregion_dispatch::Program;
use nix::sched::{CpuSet, sched_getaffinity};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, sigaction};
use nix::unistd::Pid;

use self::figures::{Figures, iterations};
use self::rig::Rig;
use crate::payload::Measure;
use crate::scenarios::{Carrier, Operation, Placement, ROWS, Row};
use crate::{doctor, floors};

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
const FEWEST_BURSTS: usize = 4;
/// Iterations that tell roughly what one costs.
const SAMPLE: u32 = 64;
/// Bursts of accesses and of references alternate this fast.
const BURST: Duration = Duration::from_millis(4);
/// Iterations that a timing buffer holds.
const MOST: u32 = 200_000;

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
}

impl Options {
    fn rounds(&self) -> usize {
        self.rounds.unwrap_or(match self.mode {
            Mode::Smoke => 6,
            Mode::Quick => 10,
            Mode::Full => 30,
        })
    }

    /// Time for one row in one round.
    fn slot(&self) -> Slot {
        let (timed, compared, plain) = match self.mode {
            Mode::Smoke => (4, 4, 4),
            Mode::Quick => (26, 200, 26),
            Mode::Full => (350, 600, 350),
        };
        Slot {
            timed: Duration::from_millis(timed),
            compared: Duration::from_millis(compared),
            plain: Duration::from_millis(plain),
        }
    }
}

/// How long a row is measured in one round.
#[derive(Debug, Clone, Copy)]
struct Slot {
    /// With each access timed.
    timed: Duration,
    /// The same for rows that claims compare, references included.
    compared: Duration,
    /// Untimed, for throughput.
    plain: Duration,
}

impl Slot {
    /// The slot of one of the row's VMs.
    fn of(self, entry: &Entry) -> Self {
        let row = entry.row;
        let timed = if entry.compared {
            self.compared
        } else {
            self.timed
        };
        Self {
            timed: timed / row.vms,
            plain: self.plain / row.vms,
            ..self
        }
    }
}

/// A row and what has been measured of it.
struct Entry {
    row: &'static Row,
    /// A claim compares it with another row of this run.
    compared: bool,
    figures: Figures,
    /// Kept from round to round, where that disturbs nobody.
    rigs: Vec<Rig>,
    failed: Option<anyhow::Error>,
}

/// Measures, and writes the results and their plots.
///
/// # Errors
///
/// Only if nothing can be measured at all, or nothing written: a row that fails is listed among
/// what is unavailable.
pub fn run(options: &Options) -> Result<(Results, Vec<PathBuf>)> {
    prepare()?;
    let (rounds, slot) = (options.rounds(), options.slot());
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
        .filter(|row| row.is_in(options.mode))
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
        entry.compared = compared.contains(entry.row.name);
    }
    let bar = ProgressBar::new((rounds * entries.len()) as u64).with_style(
        ProgressStyle::with_template("{bar:30} {pos}/{len} {eta} {msg}")?,
    );
    // Loaded once, since that keeps the kernel busy for a while; attached for its own rows only.
    let mut program: Option<Arc<Program>> = None;
    let mut attached = false;
    for round in 0..rounds {
        let mut order: Vec<usize> = (0..entries.len()).collect();
        if round % 2 == 1 {
            order.reverse();
        }
        for at in order {
            let with = entries[at].row.needs_program();
            if with != attached {
                if with {
                    match &program {
                        Some(program) => program.set_attached(true)?,
                        None => {
                            program =
                                Some(Program::load_default().context("loading the eBPF program")?)
                        }
                    }
                } else {
                    let with = entries.iter_mut().filter(|entry| entry.row.needs_program());
                    with.for_each(Entry::take_down);
                    program
                        .as_ref()
                        .map_or(Ok(()), |program| program.set_attached(false))?;
                }
                attached = with;
                std::thread::sleep(SETTLE);
            }
            let entry = &mut entries[at];
            bar.set_message(entry.row.name);
            let had_failed = entry.failed.is_some();
            entry.measure(program.as_ref(), &cpus, slot.of(entry));
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
            None => results
                .scenarios
                .push(scenario(entry.row, &cpus, entry.figures, rounds)),
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

/// Whether the row's mechanism is there; if not, the list says so by name.
fn available(row: &Row, mechanisms: &[Mechanism]) -> bool {
    let wanted = if row.needs_program() {
        "ebpf"
    } else {
        row.carrier.name()
    };
    let found = mechanisms.iter().find(|mechanism| mechanism.name == wanted);
    found.is_none_or(|mechanism| mechanism.available)
}

/// Where the threads run.
struct Cpus {
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

impl Entry {
    fn new(row: &'static Row) -> Self {
        Self {
            row,
            compared: false,
            figures: Figures::default(),
            rigs: Vec::new(),
            failed: None,
        }
    }

    /// Takes down what stands.
    fn take_down(&mut self) {
        for rig in self.rigs.drain(..) {
            if let Err(error) = rig.finish() {
                self.failed.get_or_insert(error);
            }
        }
    }

    /// Measures the row once, unless that has failed before.
    fn measure(&mut self, program: Option<&Arc<Program>>, cpus: &Cpus, slot: Slot) {
        if self.failed.is_some() {
            return;
        }
        let measured = if self.row.operation == Operation::RoundTrip {
            self.measure_floor(cpus, slot)
        } else {
            self.measure_rigs(program, cpus, slot)
        };
        if let Err(error) = measured {
            self.failed = Some(error);
        }
        if self.failed.is_some() || self.row.is_transient() {
            self.take_down();
        }
    }

    fn measure_floor(&mut self, cpus: &Cpus, slot: Slot) -> Result<()> {
        let mut trips = floors::ping_pong(
            self.row.carrier,
            cpus.vcpus[0],
            cpus.vcpus[1],
            slot.timed + slot.plain,
        )?;
        self.figures.add_plain(&trips);
        trips.accesses = 0;
        self.figures.add_round(&[trips]);
        Ok(())
    }

    fn measure_rigs(
        &mut self,
        program: Option<&Arc<Program>>,
        cpus: &Cpus,
        slot: Slot,
    ) -> Result<()> {
        if self.rigs.is_empty() {
            let began = Instant::now();
            let pinning = cpus.pinning(self.row);
            for _ in 0..self.row.vms {
                self.rigs.push(Rig::new(self.row, &pinning, program)?);
            }
            tracing::debug!(row = self.row.name, took = ?began.elapsed(), "set up");
        }
        let mut timed = Vec::new();
        for rig in &mut self.rigs {
            if self.figures.cost_ns.is_none() {
                let run = rig.run(Measure::Timed, SAMPLE)?;
                self.figures.cost_ns = Some(run.wall.as_nanos() as f64 / f64::from(SAMPLE));
            }
            // Warm up again: caches, and the scheduler's idea of who runs where.
            rig.run(
                Measure::Plain,
                self.figures.iterations(slot.plain / 7, MOST),
            )?;
            if self.compared {
                timed.extend(referenced(rig, &mut self.figures, slot.timed)?);
            } else {
                let n = self
                    .figures
                    .iterations(slot.timed, MOST)
                    .max(self.row.doorbells);
                let run = rig.run(Measure::Timed, n)?;
                self.figures.cost_ns = Some(run.wall.as_nanos() as f64 / f64::from(n));
                timed.push(run);
            }
            let n = self
                .figures
                .iterations(slot.plain, MOST)
                .max(self.row.doorbells);
            self.figures.add_plain(&rig.run(Measure::Plain, n)?);
            if paces(self.row) {
                let n = self.figures.iterations(slot.plain / 14, 400);
                self.figures.add_latencies(&rig.latencies(n)?);
            }
            self.figures.add_wrong(rig.wrong()?);
        }
        self.figures.add_round(&timed);
        Ok(())
    }
}

/// Bursts of accesses in turn with bursts of references.
fn referenced(rig: &mut Rig, figures: &mut Figures, time: Duration) -> Result<Vec<Run>> {
    let ns = |run: &Run, n: u32| run.wall.as_nanos() as f64 / f64::from(n);
    let n = figures.iterations(BURST, MOST).max(rig.doorbells());
    let reference = ns(&rig.reference(SAMPLE)?, SAMPLE);
    let of_references = iterations(BURST, reference, MOST);
    let mut references = vec![rig.reference(of_references)?];
    let mut runs = Vec::new();
    let began = Instant::now();
    while runs.len() < FEWEST_BURSTS || began.elapsed() < time {
        runs.push(rig.run(Measure::Timed, n)?);
        references.push(rig.reference(of_references)?);
    }
    figures.cost_ns = runs.last().map(|run| ns(run, n));
    figures.add_references(&runs, &references);
    Ok(runs)
}

/// Whether the time until the device sees a ring is measured.
fn paces(row: &Row) -> bool {
    row.operation == Operation::Posted
        && row.vcpus == 1
        && row.vms == 1
        && !row.in_turn
        && row.placement != Placement::Process
        && !matches!(row.carrier, Carrier::RamStore | Carrier::SinkWithoutReader)
}

fn scenario(row: &Row, cpus: &Cpus, figures: Figures, rounds: usize) -> Scenario {
    let guest = row.operation != Operation::RoundTrip;
    let own_task = row.placement != Placement::Vcpu;
    let ebpf = row.carrier == Carrier::Ebpf;
    let sink = match row.sink {
        ioregion_dispatch::Sink::Ioeventfd => "ioeventfd",
        ioregion_dispatch::Sink::Coalesced => "coalesced",
    };
    let delivery = match row.delivery {
        ioregion_dispatch::Delivery::Latest => "latest",
        ioregion_dispatch::Delivery::Fifo => "fifo",
    };
    let transport = match row.carrier {
        Carrier::Forward | Carrier::Ioregionfd => Some(row.transport.name()),
        Carrier::SocketpairPingPong => Some("stream"),
        Carrier::EventfdPingPong | Carrier::Ioeventfd | Carrier::SinkWithoutReader => {
            Some("eventfd")
        }
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
    scenario.doorbells = if row.operation.rings() {
        row.doorbells
    } else {
        0
    };
    scenario.delivery = ebpf.then(|| delivery.to_owned());
    scenario.pinning = pinning;
    scenario
}
