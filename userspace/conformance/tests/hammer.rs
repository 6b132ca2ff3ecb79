//! Regions that come, change and go while vCPUs use them: each access is seen by exactly one
//! device or comes back unclaimed, and nothing hangs.

mod support;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::Result;
use ioregion_abi::wire::Layout;
use ioregion_conformance::pace::amount;
use ioregion_conformance::{KINDS, Kind, Recorder, Rig, Task, Told, kinds, mechanism};
use ioregion_dispatch::mechanism::KvmRun;
use ioregion_dispatch::server::{DeviceEnd, WaitPolicy};
use ioregion_dispatch::{Bus, BusAccess, Channel, Delivery, Doorbell, Region, Sink, Size};
use ioregion_microguest::{MMIO_BASE, Program};
use rand::seq::IndexedRandom as _;
use rand::{Rng as _, SeedableRng as _};

use support::{bpf, run_until_halt, watchdog};

/// What each vCPU does to each region in turn; each vCPU has its own addresses, [`LANE`] apart.
const LATEST: u64 = 0x10;
const COALESCED: u64 = 0x18;
const FIFO: u64 = 0x20;
const WRITE: u64 = 0x30;
const READ: u64 = 0x40;
const LANE: u64 = 0x100;
const REGIONS: [(Bus, u64); 3] = [
    (Bus::Mmio, MMIO_BASE),
    (Bus::Mmio, MMIO_BASE + 0x1000),
    (Bus::Pio, 0x1000),
];
const VCPUS: u64 = 2;

/// A region whose doorbells are drawn by lot.
fn region(at: (Bus, u64), random: &mut impl rand::Rng) -> Region {
    let mut region = Region {
        bus: at.0,
        user_data: at.1,
        ..Region::mmio(at.1, 0x1000)
    };
    for vcpu in 0..VCPUS {
        for (offset, delivery, sink) in [
            (LATEST, Delivery::Latest, Sink::Ioeventfd),
            (COALESCED, Delivery::Latest, Sink::Coalesced),
            (FIFO, Delivery::Fifo, Sink::Coalesced),
        ] {
            if random.random_bool(0.8) {
                let doorbell = Doorbell::new(offset + vcpu * LANE, Size::B4).sink(sink);
                region = region.doorbell(doorbell.delivery(delivery).sink(sink));
            }
        }
    }
    region
}

fn program(vcpu: u64, rounds: u32) -> Program {
    let mut program = Program::new();
    program.repeat(rounds, |p| {
        for (bus, base) in REGIONS {
            for offset in [LATEST, COALESCED, FIFO, WRITE] {
                p.write_counter(bus, base + offset + vcpu * LANE, 4, 0, 1);
            }
            p.read(bus, base + READ + vcpu * LANE, 4);
        }
    });
    program
}

/// One device of a region's life.
struct Life {
    recorder: Recorder,
    task: Option<Task>,
    channel: Option<Arc<Channel>>,
}

fn begin(rig: &Rig, kind: Kind, region: &Region, modify: bool) -> Result<Life> {
    let recorder = Recorder::answering(|_, _| 1);
    let (mechanism, channel, wire) = if kind.name == KvmRun::NAME {
        let device = Arc::new(Mutex::new(recorder.clone()));
        (
            Box::new(KvmRun::new(device)) as Box<dyn ioregion_dispatch::Mechanism>,
            None,
            None,
        )
    } else {
        let (channel, wire) = ioregion_conformance::channel(rig, kind)?;
        (mechanism(kind, &channel)?, Some(channel), Some(wire))
    };
    let assigned = match modify {
        true => rig.vm.modify(region, &*mechanism)?,
        false => rig.vm.assign(region, &*mechanism)?,
    };
    let task = match wire {
        Some(wire) => {
            let end = assigned.attach(DeviceEnd::new(wire, Layout::default()));
            Some(Task::spawn(end, recorder.clone(), WaitPolicy::Sleep)?)
        }
        None => None,
    };
    Ok(Life {
        recorder,
        task,
        channel,
    })
}

/// Counts by what was accessed.
#[derive(Debug, Default)]
struct Tally {
    /// Values written, in the order in which they were seen.
    values: Vec<u64>,
    /// Writes whose value was merged with a later one's or is not known.
    merged: u64,
    reads: u64,
}

type Tallies = BTreeMap<(u64, u64), Tally>;

fn tally(tallies: &mut Tallies, base: u64, told: &[Told]) {
    for told in told {
        let (offset, write) = match told {
            Told::Read(access, _) => (access.offset, None),
            Told::Write(access, value) => (access.offset, Some((Some(*value), 1))),
            Told::Ring(ring) => (ring.offset, Some((ring.value, ring.writes))),
        };
        let tally = tallies.entry((base, offset)).or_default();
        match write {
            None => tally.reads += 1,
            Some((value, writes)) => {
                tally.values.extend(value);
                tally.merged += writes - u64::from(value.is_some());
            }
        }
    }
}

fn hammer(kinds: &[Kind], limit: u32) -> Result<()> {
    let start = std::time::Instant::now();
    let seed: u64 = rand::random();
    println!("seed {seed:#x}");
    let mut random = rand::rngs::StdRng::seed_from_u64(seed);
    let _watchdog = watchdog(format!("{kinds:?}"), Duration::from_secs(120));
    let rounds = amount("rounds of each vCPU", 1000, 100);
    let rig = Rig::with(Some(bpf()?))?;
    let unclaimed = Mutex::new(Vec::<BusAccess>::new());
    let running = AtomicU64::new(VCPUS);
    let mut over = Vec::new();
    std::thread::scope(|scope| -> Result<()> {
        let mut threads = Vec::new();
        for vcpu in 0..VCPUS {
            let (rig, unclaimed, running) = (&rig, &unclaimed, &running);
            threads.push(scope.spawn(move || -> Result<()> {
                let program = program(vcpu, rounds);
                let mut fd = rig.vcpu(vcpu, &program)?;
                let ran = run_until_halt(&mut fd, |access| {
                    unclaimed
                        .lock()
                        .unwrap_or_else(PoisonError::into_inner)
                        .push(access);
                });
                running.fetch_sub(1, Ordering::SeqCst);
                ran
            }));
        }
        let mut current: BTreeMap<u64, (Region, Life)> = BTreeMap::new();
        let mut made = 0;
        while running.load(Ordering::SeqCst) > 0 {
            made += 1;
            if made == limit {
                break;
            }
            let Some(&at) = REGIONS.choose(&mut random) else {
                break;
            };
            let Some(&kind) = kinds.choose(&mut random) else {
                break;
            };
            match current.remove(&at.1) {
                None => {
                    let region = region(at, &mut random);
                    let life = begin(&rig, kind, &region, false)?;
                    current.insert(at.1, (region, life));
                }
                Some((region, life)) if random.random_bool(0.3) => {
                    rig.vm.remove(&region)?;
                    over.push((at.1, life));
                }
                Some((_, life)) => {
                    let region = self::region(at, &mut random);
                    let new = begin(&rig, kind, &region, true)?;
                    over.push((at.1, life));
                    current.insert(at.1, (region, new));
                }
            }
        }
        for thread in threads {
            thread
                .join()
                .map_err(|_| anyhow::anyhow!("a vCPU thread panicked"))??;
        }
        for (base, (region, life)) in current {
            rig.vm.remove(&region)?;
            over.push((base, life));
        }
        println!("{made} changes, {} devices", over.len());
        Ok(())
    })?;
    let mut tallies = Tallies::new();
    let mut undelivered = 0;
    let mut lost = 0;
    for (base, life) in over {
        undelivered += life
            .channel
            .as_ref()
            .map_or(0, |channel| channel.undelivered_writes());
        // The device reads what is left, then finds its channel at an end.
        drop(life.channel);
        if let Some(task) = life.task {
            let stats = task.join()?;
            lost += stats.lost;
        }
        tally(&mut tallies, base, &life.recorder.told());
    }
    let unclaimed = unclaimed
        .into_inner()
        .unwrap_or_else(PoisonError::into_inner);
    println!("{} unclaimed, {undelivered} undelivered", unclaimed.len());
    let mut unclaimed_writes = BTreeMap::<(u64, u64), Vec<u64>>::new();
    for access in unclaimed {
        let base = if access.bus == Bus::Pio {
            0x1000
        } else {
            access.addr & !0xfff
        };
        let place = (base, access.addr - base);
        match access.write {
            Some(value) => unclaimed_writes.entry(place).or_default().push(value),
            None => tallies.entry(place).or_default().reads += 1,
        }
    }
    let counters = rig.vm.program_counters();
    let misses = rig
        .bpf
        .as_ref()
        .map(|bpf| bpf.recursion_misses())
        .transpose()?;
    println!(
        "{lost} lost, {misses:?} recursion misses, {counters:?}, {:?}",
        start.elapsed()
    );
    let mut missing = 0;
    for (_, base) in REGIONS {
        for vcpu in 0..VCPUS {
            for offset in [LATEST, COALESCED, FIFO, WRITE] {
                let place = (base, offset + vcpu * LANE);
                let tally = tallies.remove(&place).unwrap_or_default();
                // A slot's value can be newer than its count, and come with the next one again.
                let latest = matches!(offset, LATEST | COALESCED);
                let in_order = tally
                    .values
                    .is_sorted_by(|a, b| if latest { a <= b } else { a < b });
                assert!(in_order, "{place:x?}: {:?}", disorder(&tally.values));
                let mut values = tally.values;
                values.extend(unclaimed_writes.remove(&place).unwrap_or_default());
                values.sort_unstable();
                assert!(
                    latest || values.is_sorted_by(|a, b| a < b),
                    "{place:x?}: twice"
                );
                let seen = values.len() as u64 + tally.merged;
                assert!(seen <= u64::from(rounds), "{place:x?}: {seen} writes");
                if offset == WRITE {
                    assert_eq!((seen, tally.merged), (u64::from(rounds), 0), "{place:x?}");
                }
                missing += u64::from(rounds) - seen;
            }
            let place = (base, READ + vcpu * LANE);
            let reads = tallies.remove(&place).unwrap_or_default().reads;
            assert_eq!(reads, u64::from(rounds), "{place:x?}: reads");
        }
    }
    assert!(tallies.is_empty(), "{tallies:x?}");
    assert_eq!(missing, undelivered, "writes that nobody saw");
    assert_eq!(
        counters.map(|counters| counters.lost),
        Some(0),
        "all were seen"
    );
    Ok(())
}

fn disorder(values: &[u64]) -> Option<&[u64]> {
    let at = values.windows(2).position(|pair| pair[0] >= pair[1])?;
    Some(&values[at.saturating_sub(3)..values.len().min(at + 5)])
}

#[test]
fn no_access_is_lost_while_regions_come_change_and_go() -> Result<()> {
    for kind in kinds() {
        println!("{kind:?}");
        hammer(&[kind], amount("changes", 150, 50))?;
    }
    Ok(())
}

#[test]
fn no_access_is_lost_while_regions_change_their_mechanism() -> Result<()> {
    for _ in 0..2 {
        hammer(&KINDS, amount("changes", 500, 100))?;
    }
    Ok(())
}
