//! Everything that stands while a row is measured: guest, regions, vCPUs, device tasks.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Barrier, Mutex, mpsc};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use ioregion_abi::wire::Layout;
use ioregion_bench::results::Pinning;
use ioregion_dispatch::mechanism::{Ebpf, Forward, Ioeventfd, Ioregionfd, KvmRun};
use ioregion_dispatch::server::DeviceEnd;
use ioregion_dispatch::{
    Channel, Delivery, Doorbell, Exit, Mechanism, Program as Bpf, Region, Size, Transport, Vcpu,
    Vm, wire,
};
use ioregion_microguest::{DEFAULT_RAM, MicroVm, Program, TscClock};
use nix::sys::signal::Signal;
use nix::unistd::{Pid, gettid};

use super::meter::{Check, Meter, Seen, Sequence, Wrong};
use super::task::{Cost, Task, pin, serve_once, threads_named};
use crate::payload::{self, Measure, PORT, PORTS, REGION_BYTES, STRIDE};
use crate::scenarios::{Carrier, Operation, Placement, Queues, Row};

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

/// One device and what it was sent.
#[derive(Debug)]
struct Served {
    task: Option<Task>,
    /// Where the device is in this process.
    meter: Option<Meter>,
    /// Doorbells that nobody takes care of until the end.
    unread: Option<DeviceEnd>,
    /// Last value to each doorbell, by vCPU.
    finals: Vec<[u32; 2]>,
}

/// A row set up.
#[derive(Debug)]
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

/// Which values of the row can be checked.
pub fn check_of(row: &Row) -> Check {
    match (row.carrier, row.delivery) {
        (Carrier::Ioeventfd | Carrier::SinkWithoutReader, _) => Check::Count,
        (Carrier::Ebpf, Delivery::Latest) => Check::Latest,
        _ => Check::Sequence,
    }
}

fn region(row: &Row, vcpu: u32) -> Region {
    if matches!(row.operation, Operation::PioIn | Operation::PioOut) {
        return Region::pio(PORT, PORTS);
    }
    let mut region = Region::mmio(payload::base(row, vcpu), REGION_BYTES).user_data(vcpu.into());
    if row.operation.rings() {
        let doorbell = |i: u32| {
            Doorbell::new(u64::from(i * STRIDE), Size::B4)
                .delivery(row.delivery)
                .sink(row.sink)
                .wake(row.wake)
        };
        region.doorbells = (0..row.doorbells).map(doorbell).collect();
        // KVM does not know doorbells: for it a region posts all writes or none.
        region.posted_writes = row.carrier == Carrier::Ioregionfd;
    }
    region
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
            let served = rig.serve(device)?;
            rig.served.push(served);
        }
        Ok(rig)
    }

    fn serve(&self, device: u32) -> Result<Served> {
        let row = &self.row;
        let region = region(row, device);
        let meter = Meter::new(check_of(row), row.operation, row.doorbells);
        let finals = vec![[0; 2]; row.doorbells as usize];
        let mut served = Served {
            task: None,
            meter: None,
            unread: None,
            finals,
        };
        if row.carrier == Carrier::KvmRun {
            let mechanism = KvmRun::new(Arc::new(Mutex::new(meter.clone())));
            let _ = self.vm.assign(&region, &mechanism)?;
            served.meter = Some(meter);
            return Ok(served);
        }
        let (channel, theirs) = if row.transport == Transport::Ioregionfd {
            Channel::purpose_made(self.guest.vm())?
        } else {
            let (ours, theirs) = wire::pair(row.transport)?;
            let channel = Channel::new(ours, Layout::default(), row.wait.patience());
            (Arc::new(channel), theirs)
        };
        let mechanism: Box<dyn Mechanism> = match row.carrier {
            Carrier::Forward => Box::new(Forward::new(&channel)),
            Carrier::Ebpf => Box::new(Ebpf::new(&channel)),
            Carrier::Ioregionfd => Box::new(Ioregionfd::new(&channel)),
            _ => Box::new(Ioeventfd::new(&channel)),
        };
        let assigned = self.vm.assign(&region, &*mechanism)?;
        if assigned.mechanism != mechanism.name() {
            bail!("carried by {} ({})", assigned.mechanism, assigned.reason);
        }
        let end = assigned.attach(DeviceEnd::new(theirs, Layout::default()));
        let cpu = self.pinning.device;
        match row.placement {
            Placement::Process => {
                let task = Task::process(end, check_of(row), row.operation, row.doorbells, cpu)?;
                served.task = Some(task);
            }
            Placement::Thread => {
                served.task = Some(Task::thread(end, meter.clone(), row.wait, cpu)?);
                served.meter = Some(meter);
            }
            Placement::Vcpu => {
                served.unread = Some(end);
                served.meter = Some(meter);
            }
        }
        Ok(served)
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

    /// Doorbells registered; each shall be rung once at least.
    pub fn doorbells(&self) -> u32 {
        self.row.doorbells
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
            if let (Some(end), Some(meter)) = (served.unread.take(), &served.meter) {
                serve_once(end, meter.clone())?;
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
            row,
            vcpus,
            vm,
            served,
            ..
        } = self;
        for (device, served) in (0..).zip(served) {
            vm.remove(&region(&row, device))?;
            served.task.map_or(Ok(()), Task::finish)?;
        }
        drop(vcpus);
        Ok(())
    }
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
