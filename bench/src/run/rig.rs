//! Everything that stands while a row is measured: guest, regions, vCPUs, device tasks.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Barrier, mpsc};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use ioregion_bench::results::Pinning;
use ioregion_dispatch::{Exit, Program as Bpf, Vcpu, Vm};
use ioregion_microguest::{DEFAULT_RAM, MicroVm, Program, TscClock};
use nix::sys::signal::Signal;
use nix::unistd::{Pid, gettid};

use super::meter::{Seen, Sequence, Wrong};
use super::served::{Served, Site};
use super::task::{Cost, Task, pin, serve_once, threads_named};
use crate::payload::{self, Measure};
use crate::scenarios::{Carrier, Hook, Operation, Queues, Row, Wait};

/// How long a run may take before it is broken off.
const LIMIT: Duration = Duration::from_secs(20);
/// How long the device may take to see the last write.
const PATIENCE: Duration = Duration::from_secs(2);
/// Interrupts a vCPU that does not come to its end.
pub const KICK: Signal = Signal::SIGUSR1;

/// What one run of the payload cost.
#[derive(Debug, Default)]
pub struct Run {
    /// Accesses, over all vCPUs.
    pub accesses: u64,
    /// Until the last vCPU was done.
    pub wall: Duration,
    /// Of the vCPU threads.
    pub vcpu: Cost,
    /// Of the device task and of the library's threads.
    pub device: Cost,
    /// Returns of `KVM_RUN` for an access.
    pub exits: u64,
    /// Time of each access in nanoseconds, where measured.
    pub timings: Vec<f64>,
}

/// A row set up.
pub struct Rig {
    row: Row,
    pinning: Pinning,
    vcpus: Vec<Vcpu>,
    vm: Vm,
    guest: Arc<MicroVm>,
    clock: TscClock,
    served: Vec<Served>,
    helpers: Vec<Pid>,
    /// Next value of each vCPU.
    next: [u32; 2],
    /// Reads that were answered.
    reads: u64,
    wrong_reads: Wrong,
    reported: Wrong,
    // Last: detached when everything else is gone.
    _program: Option<Arc<Bpf>>,
}

impl Rig {
    /// Sets a row up. `program` is there if the row wants it attached.
    pub fn new(row: &Row, pinning: &Pinning, program: Option<&Arc<Bpf>>) -> Result<Self> {
        let guest = Arc::new(MicroVm::new(DEFAULT_RAM)?);
        let before = threads_named("ioregion-drain");
        let vm = match program {
            Some(program) if row.carrier == Carrier::Ebpf => {
                Vm::with_program(Arc::clone(guest.vm()), program)?
            }
            None if row.needs_program() => bail!("the eBPF program is not loaded"),
            _ => Vm::new(Arc::clone(guest.vm())),
        };
        let helpers = threads_named("ioregion-drain")
            .into_iter()
            .filter(|thread| !before.contains(thread))
            .collect();
        let mut vcpus = Vec::new();
        for index in 0..row.vcpus {
            let fd = guest.vcpu(index.into(), &Program::new())?;
            vcpus.push(Vcpu::new(&vm, fd)?);
        }
        let clock = TscClock::of(vcpus.first().context("a row has at least one vCPU")?.fd());
        let mut rig = Self {
            row: *row,
            pinning: pinning.clone(),
            vcpus,
            vm,
            guest,
            clock,
            served: Vec::new(),
            helpers,
            next: [1, 1],
            reads: 0,
            wrong_reads: Wrong::default(),
            reported: Wrong::default(),
            _program: program.map(Arc::clone),
        };
        let devices = match (row.carrier, row.queues) {
            (Carrier::RamStore, _) => 0,
            (_, Queues::Shared) => 1,
            (_, Queues::PerVcpu) => row.vcpus,
        };
        for device in 0..devices {
            let site = Site {
                row: &rig.row,
                vm: &rig.vm,
                fd: rig.guest.vm(),
                pinning: &rig.pinning,
            };
            let served = site.serve(device)?;
            rig.served.push(served);
        }
        Ok(rig)
    }

    /// Times `n` reference accesses on each vCPU: `CPUID`, which has nothing to do with devices.
    /// Device tasks stand still meanwhile, since polling slows a CPU of the same core.
    pub fn reference(&mut self, n: u32) -> Result<Run> {
        self.load(Measure::Reference, n)?;
        let tasks = self.served.iter().filter_map(|served| served.task.as_ref());
        let _held: Vec<_> = tasks.map(Task::hold).collect::<Result<_>>()?;
        let (wall, _) = self.drive()?;
        Ok(Run {
            wall,
            timings: self.timings()?,
            ..Run::default()
        })
    }

    fn load(&self, measure: Measure, n: u32) -> Result<()> {
        for (index, vcpu) in (0..).zip(&self.vcpus) {
            let first = self.next[index as usize];
            let program = payload::program(&self.row, measure, index, first, n);
            self.guest.reload(vcpu.fd(), index.into(), &program)?;
        }
        Ok(())
    }

    fn timings(&self) -> Result<Vec<f64>> {
        let mut timings = Vec::new();
        for index in 0..self.vcpus.len() as u64 {
            let ticks = self.guest.timings(index)?;
            timings.extend(ticks.into_iter().map(|ticks| self.clock.ns(ticks.into())));
        }
        Ok(timings)
    }

    /// Runs `n` iterations on each vCPU and waits until the devices have seen them.
    pub fn run(&mut self, measure: Measure, n: u32) -> Result<Run> {
        let first = self.next[0];
        self.load(measure, n)?;
        for served in &self.served {
            if let Some(registers) = &served.registers {
                registers.store(0, answer(self.reads).into());
            }
        }
        let exits = |vcpus: &[Vcpu]| vcpus.iter().map(|vcpu| vcpu.stats().exits).sum::<u64>();
        let exits_before = exits(&self.vcpus);
        let device_before = self.device_cost()?;
        let (wall, vcpu) = self.drive()?;
        self.note_sent(n);
        self.settle()?;
        let timings = self.timings()?;
        self.check_log(first, n)?;
        Ok(Run {
            accesses: u64::from(n) * self.vcpus.len() as u64,
            wall,
            vcpu,
            device: self.device_cost()?.since(device_before),
            exits: exits(&self.vcpus) - exits_before,
            timings,
        })
    }

    /// Accesses after which each doorbell or region has been used; shall be made once at least.
    pub fn cycle(&self) -> u32 {
        self.row.cycle()
    }

    /// Rings `n` times, each after the one before has been seen; returns how long the device
    /// took to see each, in nanoseconds. Empty where KVM does not tell the guest's clock.
    pub fn latencies(&mut self, n: u32) -> Result<Vec<u64>> {
        let [
            Served {
                meter: Some(meter),
                unread: None,
                ..
            },
        ] = &self.served[..]
        else {
            return Ok(Vec::new());
        };
        if self.clock.offset.is_none() {
            return Ok(Vec::new());
        }
        let meter = meter.clone();
        meter.pace(&self.guest, self.clock);
        let run = self.run(Measure::Paced, n);
        let latencies = meter.unpace();
        run.map(|_| latencies)
    }

    /// Runs all vCPUs to their ends.
    fn drive(&mut self) -> Result<(Duration, Cost)> {
        let stop = AtomicBool::new(false);
        let start = Barrier::new(self.vcpus.len());
        let (done, ended) = mpsc::channel();
        let kickers: Vec<_> = self.vcpus.iter().map(Vcpu::kicker).collect();
        let cpus = self
            .pinning
            .vcpus
            .iter()
            .copied()
            .map(Some)
            .chain(std::iter::repeat(None));
        std::thread::scope(|scope| {
            let (stop, start) = (&stop, &start);
            let mut threads = Vec::new();
            for (vcpu, cpu) in self.vcpus.iter_mut().zip(cpus) {
                let done = done.clone();
                let thread = move || {
                    let result = pin(cpu).and_then(|()| to_halt(vcpu, start, stop));
                    let _ = done.send(());
                    result
                };
                threads.push(scope.spawn(thread));
            }
            for _ in 0..threads.len() {
                if ended.recv_timeout(LIMIT).is_err() {
                    stop.store(true, Ordering::SeqCst);
                    kickers.iter().for_each(|kicker| kicker.kick(KICK));
                }
            }
            let (mut wall, mut cost) = (Duration::ZERO, Cost::default());
            for thread in threads {
                let (time, spent) = thread
                    .join()
                    .map_err(|_| anyhow!("a vCPU thread panicked"))??;
                wall = wall.max(time);
                cost += spent;
            }
            Ok((wall, cost))
        })
    }

    fn note_sent(&mut self, n: u32) {
        if !(self.row.operation.rings()
            || matches!(self.row.operation, Operation::Write | Operation::PioOut))
        {
            return;
        }
        for vcpu in 0..self.vcpus.len() {
            let first = self.next[vcpu];
            let device = if self.served.len() > 1 { vcpu } else { 0 };
            if let Some(served) = self.served.get_mut(device) {
                let doorbells = served.finals.len() as u32;
                for i in n.saturating_sub(doorbells)..n {
                    served.finals[(i % doorbells) as usize][vcpu] = first + i;
                }
            }
            self.next[vcpu] += n;
        }
    }

    /// The end of the values that a device was sent, by vCPU.
    fn ends(&self, device: usize) -> [u32; 2] {
        let mut ends = self.next;
        if self.served.len() > 1 {
            ends[1 - device] = 1;
        }
        ends
    }

    fn look(&mut self, device: usize) -> Result<(Seen, Cost)> {
        let ends = self.ends(device);
        let served = &mut self.served[device];
        match (&mut served.task, &served.meter) {
            (Some(task), _) => task.look(ends, &served.finals),
            (None, Some(meter)) => Ok((meter.seen(ends, &served.finals), Cost::default())),
            (None, None) => bail!("a device without a place"),
        }
    }

    /// Waits until the devices have seen all that was sent.
    fn settle(&mut self) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        for device in 0..self.served.len() {
            if self.served[device].unread.is_some() {
                continue;
            }
            let sent: u64 = self
                .ends(device)
                .iter()
                .map(|end| u64::from(*end) - 1)
                .sum();
            loop {
                let served = &self.served[device];
                let writes = match (&served.meter, &served.task) {
                    (Some(meter), _) => meter.counts().0,
                    _ => self.look(device)?.0.writes,
                };
                if writes >= sent || Instant::now() > deadline {
                    break;
                }
                std::thread::sleep(Duration::from_micros(50));
            }
        }
        Ok(())
    }

    fn device_cost(&mut self) -> Result<Cost> {
        let mut cost = Cost::default();
        for device in 0..self.served.len() {
            cost += self.look(device)?.1;
        }
        for helper in &self.helpers {
            cost += Cost::of(*helper)?;
        }
        Ok(cost)
    }

    fn check_log(&mut self, first: u32, n: u32) -> Result<()> {
        if !self.row.operation.reads() {
            return Ok(());
        }
        if self.row.hook == Some(Hook::Answer) {
            let expected = u64::from(answer(self.reads));
            let log = self.guest.log(0)?;
            let right = log.into_iter().filter(|value| *value == expected).count();
            self.wrong_reads.count(n.into(), right as u64);
            self.reads += u64::from(n);
            return Ok(());
        }
        let start = match self.row.operation {
            // The status register counts the doorbells up to the one just before.
            Operation::Mixed => first,
            _ => self.reads as u32 + 1,
        };
        let mut sequence = Sequence::from(start);
        self.guest
            .log(0)?
            .into_iter()
            .for_each(|value| sequence.take(value as u32));
        self.wrong_reads += sequence.finish(start + n);
        self.reads += u64::from(n);
        Ok(())
    }

    /// What has gone wrong since the last call.
    pub fn wrong(&mut self) -> Result<Wrong> {
        let mut wrong = self.wrong_reads;
        for device in 0..self.served.len() {
            let served = &mut self.served[device];
            match (served.unread.take(), &served.meter) {
                (None, _) => {}
                // What came over the wire takes a task.
                (Some((end, device)), Some(meter)) if self.row.burst.is_some() => {
                    let (meter, cpu) = (meter.clone(), self.pinning.device);
                    let task = Task::thread(end, device, meter, Wait::Sleep, cpu, false)?;
                    served.task = Some(task);
                    self.settle()?;
                }
                (Some((end, device)), _) => serve_once(end, device)?,
            }
            wrong += self.look(device)?.0.wrong;
        }
        let new = Wrong {
            lost: wrong.lost.saturating_sub(self.reported.lost),
            duplicated: wrong.duplicated.saturating_sub(self.reported.duplicated),
            reordered: wrong.reordered.saturating_sub(self.reported.reordered),
        };
        self.reported = wrong;
        Ok(new)
    }

    /// Takes everything down.
    pub fn finish(self) -> Result<()> {
        let Self {
            vcpus, vm, served, ..
        } = self;
        let mut tasks = Vec::new();
        for served in served {
            for region in &served.regions {
                vm.remove(region)?;
            }
            tasks.extend(served.task);
        }
        // A task without a stop switch ends when nothing holds the other end of its wire any more.
        drop((vcpus, vm));
        tasks.into_iter().try_for_each(Task::finish)
    }
}

/// What the register file has during the run before which there were so many reads.
fn answer(reads: u64) -> u32 {
    reads as u32 + 1
}

/// Runs a vCPU to its `HLT`.
fn to_halt(vcpu: &mut Vcpu, start: &Barrier, stop: &AtomicBool) -> Result<(Duration, Cost)> {
    let thread = gettid();
    start.wait();
    let before = Cost::of(thread)?;
    let began = Instant::now();
    loop {
        match vcpu.run()? {
            Exit::Halt => break,
            Exit::Interrupted if stop.load(Ordering::SeqCst) => {
                bail!("the guest did not come to its end within {LIMIT:?}")
            }
            Exit::Interrupted => {}
            other => bail!("the guest stopped with {other:?}"),
        }
    }
    let wall = began.elapsed();
    Ok((wall, Cost::of(thread)?.since(before)))
}
