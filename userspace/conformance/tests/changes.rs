//! A region that goes to and fro between KVM and the VMM while a guest rings its doorbell: no write
//! is seen twice, whoever carries it.

mod support;

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, Result};
use ioregion_conformance::pace::amount;
use ioregion_conformance::{Kind, Recorder, Rig, TRACEPOINTS, Told, kinds};
use ioregion_dispatch::mechanism::{Forward, Ioregionfd};
use ioregion_dispatch::{Doorbell, Region, Sink, Size, Transport};
use ioregion_microguest::{MMIO_BASE, Program};

use support::{Served, run_until_halt, serve, watchdog};

const BELL: u64 = 0x10;

/// What KVM carries; where it can do that with nothing, what the VMM sends.
fn others() -> Vec<Kind> {
    let native: Vec<_> = kinds()
        .filter(|kind| kind.is_hooked() || kind.name == Ioregionfd::NAME)
        .filter(|kind| matches!(kind.transport, Transport::Stream | Transport::Ioregionfd))
        .collect();
    if native.is_empty() {
        return vec![Kind {
            name: Forward::NAME,
            transport: Transport::Stream,
        }];
    }
    native
}

/// Changes between the two while the guest writes 0, 1, 2, … to the doorbell.
fn alternate(kinds: [Kind; 2], region: &Region) -> Result<()> {
    let _watchdog = watchdog(format!("{kinds:?}"), Duration::from_secs(120));
    let rounds = amount("rounds", 20_000, 2000);
    let limit = amount("changes", 200, 40);
    let rig = Rig::new()?;
    let mut program = Program::new();
    program.repeat(rounds, |p| {
        p.write_counter(region.bus, region.base + BELL, 4, 0, 1);
    });
    let running = AtomicBool::new(true);
    let unclaimed = Mutex::new(Vec::new());
    let mut lives: Vec<(Recorder, Served)> = Vec::new();
    std::thread::scope(|scope| -> Result<()> {
        let mut change = |modify: bool| -> Result<()> {
            let device = Recorder::default();
            let kind = kinds[lives.len() % 2];
            let served = serve(&rig, kind, region, modify, device.clone())?;
            lives.push((device, served));
            Ok(())
        };
        change(false)?;
        let thread = scope.spawn(|| -> Result<()> {
            let ran = rig.vcpu(0, &program).and_then(|mut vcpu| {
                run_until_halt(&mut vcpu, |access| {
                    let mut unclaimed = unclaimed.lock().unwrap_or_else(PoisonError::into_inner);
                    unclaimed.push(access.write);
                })
            });
            running.store(false, Ordering::SeqCst);
            ran
        });
        for _ in 1..limit {
            if running.load(Ordering::SeqCst) {
                change(true)?;
                // Some writes between the changes.
                std::thread::sleep(Duration::from_micros(200));
            }
        }
        thread
            .join()
            .map_err(|_| anyhow::anyhow!("the vCPU thread panicked"))?
    })?;
    rig.vm.remove(region)?;
    let changes = lives.len() as u64;
    // By whom each value was seen.
    let mut seen = HashMap::new();
    let (mut total, mut excused) = (0, changes);
    for (life, (device, served)) in lives.into_iter().enumerate() {
        excused += served.channel.undelivered_writes();
        drop(served.channel);
        excused += served.task.join()?.lost;
        for told in device.told() {
            let (value, writes) = match told {
                Told::Ring(ring) => (ring.value.context("a value")?, ring.writes),
                Told::Write(_, value) => (value, 1),
                Told::Read(..) => anyhow::bail!("nothing was read"),
            };
            total += writes;
            let first = *seen.entry(value).or_insert(life);
            assert_eq!(first, life, "{value} was seen by two devices");
        }
    }
    for write in unclaimed
        .into_inner()
        .unwrap_or_else(PoisonError::into_inner)
    {
        let value = write.context("nothing was read")?;
        total += 1;
        assert_eq!(seen.get(&value), None, "{value} came back and was seen");
    }
    let rounds = u64::from(rounds);
    println!("{kinds:?}: {changes} changes, {total} of {rounds}, {excused} excused");
    assert!(total <= rounds, "{total} writes of {rounds}");
    // The one under way at each change may have been the old device's, which is gone.
    assert!(total + excused >= rounds, "{total} writes of {rounds}");
    Ok(())
}

#[test]
fn a_doorbell_rings_at_most_once_while_its_region_enters_and_leaves_kvm() -> Result<()> {
    let traced = Kind {
        name: TRACEPOINTS,
        transport: Transport::Stream,
    };
    for other in others() {
        for sink in [Sink::Ioeventfd, Sink::Coalesced] {
            let region = Region::mmio(MMIO_BASE, 0x1000);
            let bell = Doorbell::new(BELL, Size::B4).sink(sink);
            alternate([other, traced], &region.doorbell(bell))?;
        }
        let region = Region::pio(0x400, 0x100);
        alternate(
            [other, traced],
            &region.doorbell(Doorbell::new(BELL, Size::B4)),
        )?;
    }
    Ok(())
}
