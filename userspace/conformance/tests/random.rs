//! Random accesses of two vCPUs to regions of every mechanism at once, against a model; and the
//! proof that the checker sees what it is there for.

use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context as _, Result, ensure};
use ioregion_conformance::checker::{Fault, check, check_log};
use ioregion_conformance::model::{Event, Place, Plan, reader, ringer};
use ioregion_conformance::pace::amount;
use ioregion_conformance::{KINDS, Kind, Recorder, Rig, Told, kinds, run_to_halt};
use ioregion_dispatch::{Access, Delivery, Device, Doorbell, Region, Ring, Sink, Size, Transport};
use ioregion_microguest::MMIO_BASE;
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};

/// Regions of all mechanisms, next to each other; each has a doorbell of every flavour.
fn places() -> Vec<Place> {
    let flavours = |doorbell: Doorbell| {
        [
            doorbell,
            doorbell.sink(Sink::Coalesced),
            doorbell.delivery(Delivery::Fifo),
        ]
    };
    let ebpf = Kind::EBPF;
    let mailbox = Kind {
        transport: Transport::Mailbox,
        ..ebpf
    };
    let native = kinds().filter(|kind| kind.is_native());
    let pio = [KINDS[0], KINDS[1], KINDS[5], ebpf, mailbox].into_iter();
    let pio = pio.chain(native);
    let kinds = kinds().chain([ebpf, mailbox]);
    let mmio = (0..)
        .zip(kinds)
        .map(|(n, kind)| (kind, n, Region::mmio(MMIO_BASE + n * 0x1000, 0x1000)));
    let pio = (0..)
        .zip(pio)
        .map(|(n, kind)| (kind, n, Region::pio(0x400 + n as u16 * 0x100, 0x100)));
    let region = |(user_data, (kind, n, region)): (u64, (Kind, u64, Region))| {
        let region = region.user_data(user_data);
        let region = (0..5).fold(region, |region, index| {
            let size = [Size::B4, Size::B2, Size::B4, Size::B4, Size::B2][index as usize];
            let doorbell = Doorbell::new(0x40 + 8 * index, size);
            region.doorbell(flavours(doorbell)[(index / 2 + n) as usize % 3])
        });
        Place { region, kind }
    };
    (0..).zip(mmio.chain(pio)).map(region).collect()
}

/// What a round left behind.
struct Round {
    plans: [Plan; 2],
    told: Vec<Vec<Told>>,
    faults: Vec<(usize, Fault)>,
}

impl Round {
    fn accesses(&self) -> u64 {
        self.plans.iter().map(|plan| plan.accesses).sum()
    }

    fn expected(&self, region: usize) -> [&[Event]; 2] {
        self.plans.each_ref().map(|plan| &plan.events[region][..])
    }
}

/// Runs `steps` random steps on each of two vCPUs; each device is `device(…)`.
fn round<D: Device + Clone + 'static>(
    seed: u64,
    steps: usize,
    device: impl Fn(Recorder) -> D,
) -> Result<Round> {
    println!("seed {seed:#x}");
    let mut rng = StdRng::seed_from_u64(seed);
    let places = places();
    let plans = [0, 1].map(|vcpu| Plan::draw(&mut rng, &places, vcpu, steps));
    let rig = Rig::new()?;
    let missed = rig.bpf.as_ref().context("a program")?.recursion_misses()?;
    let recorders: Vec<_> = places.iter().map(|_| Recorder::default()).collect();
    let mut tasks = Vec::new();
    for (place, recorder) in places.iter().zip(&recorders) {
        tasks.extend(rig.serve(place.kind, &place.region, device(recorder.clone()))?);
    }
    let mut vcpus = [
        rig.vcpu(0, &plans[0].program)?,
        rig.vcpu(1, &plans[1].program)?,
    ];
    std::thread::scope(|scope| {
        let runs = vcpus
            .each_mut()
            .map(|vcpu| scope.spawn(|| run_to_halt(vcpu)));
        runs.into_iter()
            .try_for_each(|run| run.join().expect("a vCPU thread"))
    })?;
    let counters = rig.vm.program_counters().context("counters")?;
    println!(
        "{counters:?} {:?}",
        vcpus.each_ref().map(|vcpu| vcpu.stats())
    );
    ensure!(
        rig.bpf.as_ref().context("a program")?.recursion_misses()? == missed,
        "the kernel skipped the program"
    );
    let told: Vec<_> = recorders.iter().map(Recorder::told).collect();
    let mut faults = Vec::new();
    for (n, told) in told.iter().enumerate() {
        let expected = plans.each_ref().map(|plan| &plan.events[n][..]);
        faults.extend(check(expected, told).into_iter().map(|fault| (n, fault)));
    }
    for (vcpu, plan) in plans.iter().enumerate() {
        let log = rig.guest.log(vcpu as u64)?;
        ensure!(log.len() == plan.reads.len());
        faults.extend(
            check_log(plan, vcpu, &log, &told)
                .into_iter()
                .map(|fault| (usize::MAX, fault)),
        );
    }
    for place in &places {
        rig.vm.remove(&place.region)?;
    }
    for task in tasks {
        ensure!(task.finish()?.lost == 0, "values were lost");
    }
    Ok(Round {
        plans,
        told,
        faults,
    })
}

#[test]
fn two_vcpus_against_the_model_lose_double_and_reorder_nothing() -> Result<()> {
    let full = std::env::var_os("IOREGION_FULL").is_some_and(|full| full == "1");
    let wanted = if full { 1_000_000 } else { 100_000 };
    let wanted = u64::from(amount("accesses", wanted, 10_000));
    let steps = amount("steps of each vCPU in a round", 12_500, 2_500) as usize;
    let mut accesses = 0;
    while accesses < wanted {
        let round = round(rand::rng().random(), steps, |recorder| recorder)?;
        accesses += round.accesses();
        assert!(
            round.faults.is_empty(),
            "{} faults, first {:x?}",
            round.faults.len(),
            &round.faults[..round.faults.len().min(5)]
        );
    }
    println!("{accesses} accesses");
    Ok(())
}

/// A clean trace to spoil.
fn clean() -> Result<Round> {
    let round = round(0x0104_e910, 1500, |recorder| recorder)?;
    assert_eq!(round.faults, []);
    Ok(round)
}

#[test]
fn the_checker_reports_each_event_that_is_dropped_from_a_trace() -> Result<()> {
    let round = clean()?;
    for (n, told) in round.told.iter().enumerate() {
        for at in 0..told.len() {
            let mut spoilt = told.clone();
            spoilt.remove(at);
            let faults = check(round.expected(n), &spoilt);
            assert!(
                faults.iter().any(|fault| matches!(fault, Fault::Lost(_))),
                "{:?}: {faults:?}",
                told[at]
            );
        }
    }
    Ok(())
}

#[test]
fn the_checker_reports_each_event_that_is_doubled_in_a_trace() -> Result<()> {
    let round = clean()?;
    for (n, told) in round.told.iter().enumerate() {
        for at in 0..told.len() {
            let mut spoilt = told.clone();
            spoilt.insert(at, told[at]);
            let faults = check(round.expected(n), &spoilt);
            assert!(
                faults
                    .iter()
                    .any(|fault| matches!(fault, Fault::Doubled(_))),
                "{:?}: {faults:?}",
                told[at]
            );
        }
    }
    Ok(())
}

#[test]
fn the_checker_reports_each_swap_in_a_trace() -> Result<()> {
    let round = clean()?;
    let (mut swaps, mut late) = (0, 0);
    for (n, told) in round.told.iter().enumerate() {
        let ours = |told: &Told| matches!(told, Told::Write(_, data) if data & 0x80 == 0);
        let writes: Vec<_> = (0..told.len()).filter(|at| ours(&told[*at])).collect();
        for pair in writes
            .windows(2)
            .filter(|pair| told[pair[0]] != told[pair[1]])
        {
            let mut spoilt = told.clone();
            spoilt.swap(pair[0], pair[1]);
            let faults = check(round.expected(n), &spoilt);
            assert!(
                faults
                    .iter()
                    .any(|fault| matches!(fault, Fault::Reordered { .. })),
                "{faults:?}"
            );
            swaps += 1;
        }
        // A read that comes before a doorbell which it should have flushed.
        let expected = round.expected(n);
        let is_latest = |ring: &Ring| {
            expected.iter().any(|events| {
                events
                    .iter()
                    .any(|event| matches!(event, Event::Latest(index, _) if *index == ring.index))
            })
        };
        for at in 1..told.len() {
            let (Told::Ring(ring), Told::Read(access, _)) = (told[at - 1], told[at]) else {
                continue;
            };
            if ringer(ring.index) != Some(reader(access.offset)) || !is_latest(&ring) {
                continue;
            }
            let mut spoilt = told.clone();
            spoilt.swap(at - 1, at);
            let faults = check(expected, &spoilt);
            assert!(matches!(faults[..], [Fault::Late { .. }, ..]), "{faults:?}");
            late += 1;
        }
    }
    println!("{swaps} swaps, {late} late doorbells");
    assert!(late > 10);
    assert!(swaps > 100);
    Ok(())
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Spoil {
    Drop,
    Double,
    Swap,
}

/// Writes so far, and the one that is held back.
type State = (u64, Option<(Access, u64)>);

/// A device that mishandles one of the writes that it gets.
#[derive(Clone)]
struct Faulty {
    inner: Recorder,
    spoil: Spoil,
    state: Arc<Mutex<State>>,
}

impl Faulty {
    /// The write that is mishandled.
    const VICTIM: u64 = 20;
}

impl Device for Faulty {
    fn read(&mut self, access: Access) -> u64 {
        self.inner.read(access)
    }

    fn doorbell(&mut self, ring: Ring) {
        self.inner.doorbell(ring);
    }

    fn write(&mut self, access: Access, data: u64) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let (count, held) = &mut *state;
        *count += 1;
        if *count == Self::VICTIM {
            match self.spoil {
                Spoil::Drop => return,
                Spoil::Double => self.inner.write(access, data),
                Spoil::Swap => {
                    *held = Some((access, data));
                    return;
                }
            }
        }
        self.inner.write(access, data);
        // Swapped with the next write of the same vCPU.
        if let Some((access, data)) = held.take_if(|held| (held.1 ^ data) & 0x80 == 0) {
            self.inner.write(access, data);
        }
    }
}

fn spoilt_by_the_device(spoil: Spoil, reported: impl Fn(&Fault) -> bool) -> Result<()> {
    let spoilt = round(0x0005_9017, 3000, |inner| Faulty {
        inner,
        spoil,
        state: Arc::default(),
    })?;
    for n in 0..spoilt.told.len() {
        assert!(
            spoilt
                .faults
                .iter()
                .any(|(at, fault)| *at == n && reported(fault)),
            "region {n}: {:?}",
            spoilt.faults
        );
    }
    Ok(())
}

#[test]
fn a_device_that_drops_a_write_is_found_out() -> Result<()> {
    spoilt_by_the_device(Spoil::Drop, |fault| {
        matches!(fault, Fault::Lost(Event::Write(..)))
    })
}

#[test]
fn a_device_that_doubles_a_write_is_found_out() -> Result<()> {
    spoilt_by_the_device(Spoil::Double, |fault| {
        matches!(fault, Fault::Doubled(Event::Write(..)))
    })
}

#[test]
fn a_device_that_swaps_two_writes_is_found_out() -> Result<()> {
    spoilt_by_the_device(Spoil::Swap, |fault| {
        matches!(fault, Fault::Reordered { .. })
    })
}
