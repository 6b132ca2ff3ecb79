//! A row and its figures, round by round.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Result;
use ioregion_dispatch::Program;

use super::Cpus;
use super::figures::{Figures, Summary, iterations};
use super::pace::{Counts, Pace, Slot};
use super::rig::{Rig, Run};
use crate::floors::{self, Enough};
use crate::payload::Measure;
use crate::scenarios::{Carrier, Operation, Placement, Row};

const FEWEST_BURSTS: usize = 4;
/// Iterations that tell roughly what one costs.
const SAMPLE: u32 = 64;
/// Bursts of accesses and of references alternate this fast.
const BURST: Duration = Duration::from_millis(4);
/// Iterations that a timing buffer holds.
const MOST: u32 = 200_000;

/// A row and what has been measured of it.
pub struct Entry {
    /// The row.
    pub row: &'static Row,
    /// A claim compares it with another row of this run.
    pub compared: bool,
    /// What has been measured.
    pub figures: Figures,
    /// Kept from round to round, where that disturbs nobody.
    rigs: Vec<Rig>,
    /// Why it is no longer measured.
    pub failed: Option<anyhow::Error>,
}

impl Entry {
    /// A row that has not been measured.
    pub fn new(row: &'static Row) -> Self {
        Self {
            row,
            compared: false,
            figures: Figures::default(),
            rigs: Vec::new(),
            failed: None,
        }
    }

    /// Takes down what stands.
    pub fn take_down(&mut self) {
        for rig in self.rigs.drain(..) {
            if let Err(error) = rig.finish() {
                self.failed.get_or_insert(error);
            }
        }
    }

    /// Measures the row once, unless that has failed before.
    pub fn measure(&mut self, program: Option<&Arc<Program>>, cpus: &Cpus, pace: Pace) {
        if self.failed.is_some() {
            return;
        }
        let measured = if self.row.operation == Operation::RoundTrip {
            self.measure_floor(cpus, pace)
        } else {
            self.set_up(program, cpus).and_then(|()| match pace {
                Pace::Timed(slot) => self.measure_rigs(cpus, slot.of(self)),
                Pace::Counted(counts) => self.count_rigs(counts.of(self)),
            })
        };
        if let Err(error) = measured {
            self.failed = Some(error);
        }
        if self.failed.is_some() || self.row.is_transient() {
            self.take_down();
        }
    }

    fn measure_floor(&mut self, cpus: &Cpus, pace: Pace) -> Result<()> {
        let (enough, summary) = match pace {
            Pace::Timed(slot) => (Enough::Time(slot.timed + slot.plain), slot.summary),
            Pace::Counted(counts) => {
                let trips = counts.of(self).timed.into();
                (Enough::Trips(trips), Summary::Mean)
            }
        };
        let mut trips = floors::ping_pong(self.row.carrier, cpus.vcpus[0], cpus.vcpus[1], enough)?;
        self.figures.add_plain(&trips);
        trips.accesses = 0;
        self.figures.add_round(&[trips], summary);
        Ok(())
    }

    /// Sets up what does not stand yet.
    fn set_up(&mut self, program: Option<&Arc<Program>>, cpus: &Cpus) -> Result<()> {
        if !self.rigs.is_empty() {
            return Ok(());
        }
        let began = Instant::now();
        let pinning = cpus.pinning(self.row);
        for _ in 0..self.row.vms {
            self.rigs.push(Rig::new(self.row, &pinning, program)?);
        }
        tracing::debug!(row = self.row.name, took = ?began.elapsed(), "set up");
        Ok(())
    }

    fn count_rigs(&mut self, counts: Counts) -> Result<()> {
        let mut timed = Vec::new();
        for rig in &mut self.rigs {
            rig.run(Measure::Plain, counts.warm)?;
            // Looking at the clock takes an instruction: the same accesses tell what else they cost.
            let mut run = rig.run(Measure::Timed, counts.timed)?;
            self.figures.add_plain(&run);
            (run.accesses, run.exits) = (0, 0);
            timed.push(run);
            self.figures.add_wrong(rig.wrong()?);
        }
        self.figures.add_round(&timed, Summary::Mean);
        Ok(())
    }

    fn measure_rigs(&mut self, cpus: &Cpus, slot: Slot) -> Result<()> {
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
                    .max(self.row.cycle());
                let run = rig.run(Measure::Timed, n)?;
                self.figures.cost_ns = Some(run.wall.as_nanos() as f64 / f64::from(n));
                timed.push(run);
            }
            let n = self
                .figures
                .iterations(slot.plain, MOST)
                .max(self.row.cycle());
            self.figures.add_plain(&rig.run(Measure::Plain, n)?);
            if paces(self.row, cpus) {
                let n = self.figures.iterations(slot.plain / 14, 400);
                self.figures.add_latencies(&rig.latencies(n)?);
            }
            self.figures.add_wrong(rig.wrong()?);
        }
        self.figures.add_round(&timed, slot.summary);
        Ok(())
    }
}

/// Bursts of accesses in turn with bursts of references.
fn referenced(rig: &mut Rig, figures: &mut Figures, time: Duration) -> Result<Vec<Run>> {
    let ns = |run: &Run, n: u32| run.wall.as_nanos() as f64 / f64::from(n);
    let n = figures.iterations(BURST, MOST).max(rig.cycle());
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

/// Whether the time until the device sees a ring is measured. The guest waits for that without
/// exits: the device needs a CPU of its own.
fn paces(row: &Row, cpus: &Cpus) -> bool {
    cpus.vcpus.first() != cpus.device.as_ref()
        && row.operation == Operation::Posted
        && row.vcpus == 1
        && row.vms == 1
        && !row.in_turn
        && row.placement != Placement::Process
        && !matches!(row.carrier, Carrier::RamStore | Carrier::SinkWithoutReader)
}
