//! Device tasks that are slow or dead hurt nothing but their own region.

mod support;

use std::time::Duration;

use anyhow::Result;
use ioregion_conformance::pace::amount;
use ioregion_conformance::{Kind, Rig, Task, Told, kinds};
use ioregion_dispatch::mechanism::{Forward, Ioeventfd};
use ioregion_dispatch::server::WaitPolicy;
use ioregion_dispatch::{Bus, Delivery, Doorbell, Exit, Region, Size, Transport};
use ioregion_microguest::{MMIO_BASE, Program};
use nix::sys::signal::Signal;

use support::{
    Gated, OTHER, Runner, bpf, broken, channel_kinds, handle_sigusr1, other_region, place, plain,
    region, serve, wait_until, watchdog,
};

#[test]
fn slow_device_blocks_only_the_vcpus_that_wait_on_it() -> Result<()> {
    let reads = amount("rounds of the working vCPU", 500, 50);
    let bpf = bpf()?;
    for kind in kinds() {
        let _watchdog = watchdog(format!("{kind:?}"), Duration::from_secs(60));
        let rig = Rig::with(Some(bpf.clone()))?;
        let slow = Gated::default();
        let slow_task = rig.serve(kind, &region(), slow.clone())?;
        let other = plain();
        let other_task = rig.serve(kind, &other_region(), other.clone())?;
        let mut waits = Program::new();
        waits.read(Bus::Mmio, MMIO_BASE + 0x20, 4);
        let mut works = Program::new();
        works.repeat(reads, |p| {
            p.write_counter(Bus::Mmio, OTHER + 0x10, 4, 0, 1);
            p.write_counter(Bus::Mmio, OTHER + 0x30, 4, 0, 1);
            p.read(Bus::Mmio, OTHER + 0x20, 4);
        });
        let waiting = Runner::new(rig.vcpu(0, &waits)?);
        waiting.start();
        slow.gate.wait_for(1);
        let working = Runner::new(rig.vcpu(1, &works)?);
        working.start();
        assert_eq!(working.exit()?, Exit::Halt, "{kind:?}");
        assert_eq!(rig.guest.log(1)?, vec![0x5520; reads as usize], "{kind:?}");
        assert_eq!(other.told().len(), 3 * reads as usize, "{kind:?}");
        assert_eq!(waiting.exit_within(Duration::ZERO)?, None, "{kind:?}");
        slow.gate.open();
        assert_eq!(waiting.exit()?, Exit::Halt, "{kind:?}");
        waiting.finish()?;
        working.finish()?;
        assert_eq!(broken(&rig.vm), [], "{kind:?}");
        for task in [slow_task, other_task].into_iter().flatten() {
            task.finish()?;
        }
    }
    Ok(())
}

#[test]
fn dead_device_reads_all_ones_and_is_revived_by_a_new_one() -> Result<()> {
    let bpf = bpf()?;
    for kind in channel_kinds() {
        let _watchdog = watchdog(format!("{kind:?}"), Duration::from_secs(60));
        let rig = Rig::with(Some(bpf.clone()))?;
        let served = serve(&rig, kind, &region(), false, plain())?;
        let other = serve(&rig, kind, &other_region(), false, plain())?;
        let mut program = Program::new();
        for bytes in [1, 2, 4, 8] {
            program.read(Bus::Mmio, MMIO_BASE + 0x20, bytes);
        }
        program.write(Bus::Mmio, MMIO_BASE + 0x30, 4, 1);
        program.write(Bus::Mmio, MMIO_BASE + 0x10, 4, 2);
        program.write(Bus::Mmio, MMIO_BASE + 0x38, 8, 3);
        program.read(Bus::Mmio, MMIO_BASE + 0x20, 4);
        program.read(Bus::Mmio, OTHER + 0x20, 4);

        let mut vcpu = rig.vcpu(0, &program)?;
        let well = [0x20, 0x5520, 0x5520, 0x5520, 0x5520, 0x5520];
        assert_eq!(vcpu.run()?, Exit::Halt, "{kind:?}");
        assert_eq!(rig.guest.log(0)?, well, "{kind:?}");

        served.task.finish()?;
        rig.guest.reload(vcpu.fd(), 0, &program)?;
        assert_eq!(vcpu.run()?, Exit::Halt, "{kind:?}");
        let dead = [0xff, 0xffff, 0xffff_ffff, u64::MAX, 0xffff_ffff, 0x5520];
        assert_eq!(rig.guest.log(0)?, dead, "{kind:?}");
        let mut told = broken(&rig.vm);
        // Where KVM has the region, another thread notices and KVM counts.
        wait_until("the report", || {
            told.extend(broken(&rig.vm));
            !told.is_empty()
        });
        assert_eq!(told.len(), 1, "{kind:?}: {told:?}");
        assert_eq!(told[0].0, served.id, "{kind:?}");
        assert_eq!(
            served.channel.cause().is_some(),
            !kind.is_native(),
            "{kind:?}"
        );
        // Doorbells that never reach the wire are none of its business.
        let writes = match kind.name {
            _ if kind.is_native() => 0,
            Forward::NAME => 3,
            _ => 2,
        };
        assert_eq!(served.channel.undelivered_writes(), writes, "{kind:?}");

        let recorder = plain();
        let revived = serve(&rig, kind, &region(), true, recorder.clone())?;
        rig.guest.reload(vcpu.fd(), 0, &program)?;
        assert_eq!(vcpu.run()?, Exit::Halt, "{kind:?}");
        assert_eq!(rig.guest.log(0)?, well, "{kind:?}");
        assert_eq!(recorder.told().len(), 8, "{kind:?}: {:?}", recorder.told());
        assert_eq!(broken(&rig.vm), [], "{kind:?}");
        assert_eq!(other.channel.undelivered_writes(), 0, "{kind:?}");
        for task in [revived.task, other.task] {
            task.finish()?;
        }
    }
    Ok(())
}

#[test]
fn device_that_never_reads_posted_writes_blocks_interruptibly() -> Result<()> {
    // Enough for every wire to fill up.
    let writes = amount("posted writes", 20_000, 5_000);
    handle_sigusr1()?;
    for kind in channel_kinds().filter(|kind| kind.name == Forward::NAME) {
        let _watchdog = watchdog(format!("{kind:?}"), Duration::from_secs(60));
        let rig = Rig::with(None)?;
        let posted = Region::mmio(MMIO_BASE, 0x1000).user_data(7).posted_writes();
        let (channel, id, end) = place(&rig, kind, &posted, false)?;
        let other = serve(&rig, kind, &other_region(), false, plain())?;
        let mut program = Program::new();
        program.repeat(writes, |p| {
            _ = p.write_counter(Bus::Mmio, MMIO_BASE + 0x30, 4, 0, 1)
        });
        program.read(Bus::Mmio, OTHER + 0x20, 4);
        program.read(Bus::Mmio, MMIO_BASE + 0x20, 4);
        let runner = Runner::new(rig.vcpu(0, &program)?);
        runner.start();
        let mut blocked = None;
        wait_until("the block", || {
            // It blocks when its count of exits stands still; a kick shows where it is.
            std::thread::sleep(Duration::from_millis(50));
            runner.kicker.kick(Signal::SIGUSR1);
            assert_eq!(runner.exit().ok(), Some(Exit::Interrupted), "{kind:?}");
            let (tell, count) = std::sync::mpsc::channel();
            runner.with(move |vcpu| Ok(tell.send(vcpu.stats().carried)?));
            let count = count.recv().ok();
            let stands = blocked == count;
            blocked = count;
            runner.start();
            stands
        });
        let accepted = blocked.unwrap_or_default();
        println!("{kind:?}: {accepted} writes until it blocked");
        assert!(
            accepted > 0 && accepted < u64::from(writes),
            "{kind:?}: {accepted}"
        );
        assert_eq!(channel.undelivered_writes(), 0, "{kind:?}");
        drop(end);
        assert_eq!(runner.exit()?, Exit::Halt, "{kind:?}");
        assert_eq!(rig.guest.log(0)?, [0x5520, 0xffff_ffff], "{kind:?}");
        assert_eq!(
            channel.undelivered_writes(),
            u64::from(writes) - accepted,
            "{kind:?}"
        );
        let told = broken(&rig.vm);
        assert_eq!(
            told.iter().map(|(id, _)| *id).collect::<Vec<_>>(),
            [id],
            "{kind:?}: {told:?}"
        );
        runner.finish()?;
        other.task.finish()?;
    }
    Ok(())
}

#[test]
fn posted_writes_to_a_slow_device_all_arrive_in_order() -> Result<()> {
    // Enough for every wire to fill up.
    let writes = amount("posted writes", 20_000, 5_000);
    for kind in channel_kinds().filter(|kind| kind.name == Forward::NAME) {
        let _watchdog = watchdog(format!("{kind:?}"), Duration::from_secs(60));
        let rig = Rig::with(None)?;
        let posted = Region::mmio(MMIO_BASE, 0x1000).user_data(7).posted_writes();
        let device = Gated::default();
        let served = serve(&rig, kind, &posted, false, device.clone())?;
        let mut program = Program::new();
        program.repeat(writes, |p| {
            _ = p.write_counter(Bus::Mmio, MMIO_BASE + 0x30, 4, 0, 1)
        });
        program.read(Bus::Mmio, MMIO_BASE + 0x20, 4);
        let runner = Runner::new(rig.vcpu(0, &program)?);
        runner.start();
        assert_eq!(
            runner.exit_within(Duration::from_millis(100))?,
            None,
            "{kind:?}"
        );
        device.gate.open();
        assert_eq!(runner.exit()?, Exit::Halt, "{kind:?}");
        runner.finish()?;
        assert_eq!(rig.guest.log(0)?, [u64::from(writes)], "{kind:?}");
        let values: Vec<_> = device
            .recorder
            .told()
            .into_iter()
            .map_while(|told| match told {
                Told::Write(_, value) => Some(value),
                _ => None,
            })
            .collect();
        assert_eq!(
            values,
            (0..u64::from(writes)).collect::<Vec<_>>(),
            "{kind:?}"
        );
        served.task.finish()?;
    }
    Ok(())
}

/// The kinds that keep a queue for a doorbell in the kernel.
fn fifo_kinds() -> impl Iterator<Item = Kind> {
    channel_kinds().filter(|kind| kind.is_ebpf() && !kind.is_native())
}

fn fifo_region() -> Region {
    let doorbell = Doorbell::new(0x10, Size::B4).delivery(Delivery::Fifo);
    Region::mmio(MMIO_BASE, 0x1000)
        .user_data(7)
        .doorbell(doorbell)
}

#[test]
fn fifo_doorbells_of_a_dead_device_block_nobody_and_are_reported() -> Result<()> {
    const WRITES: u32 = 2000;
    let bpf = bpf()?;
    for kind in fifo_kinds() {
        let _watchdog = watchdog(format!("{kind:?}"), Duration::from_secs(60));
        let rig = Rig::with(Some(bpf.clone()))?;
        let (channel, id, end) = place(&rig, kind, &fifo_region(), false)?;
        let other = serve(&rig, kind, &other_region(), false, plain())?;
        drop(end);
        let mut program = Program::new();
        program.repeat(WRITES, |p| {
            _ = p.write_counter(Bus::Mmio, MMIO_BASE + 0x10, 4, 0, 1)
        });
        program.read(Bus::Mmio, OTHER + 0x20, 4);
        let (log, _vcpu) = rig.run(&program)?;
        assert_eq!(log, [0x5520], "{kind:?}");
        let mut told = Vec::new();
        wait_until("the report", || {
            told.extend(broken(&rig.vm));
            !told.is_empty()
        });
        assert_eq!(
            told.iter().map(|(id, _)| *id).collect::<Vec<_>>(),
            [id],
            "{kind:?}: {told:?}"
        );
        wait_until("the count", || {
            channel.undelivered_writes() >= u64::from(WRITES) - 64
        });
        other.task.finish()?;
    }
    Ok(())
}

#[test]
fn fifo_doorbells_of_a_device_that_never_reads_block_only_who_writes_them() -> Result<()> {
    const WRITES: u32 = 80_000;
    const OTHER_WRITES: u32 = 2000;
    handle_sigusr1()?;
    let bpf = bpf()?;
    for kind in fifo_kinds() {
        let _watchdog = watchdog(format!("{kind:?}"), Duration::from_secs(60));
        let rig = Rig::with(Some(bpf.clone()))?;
        let (_channel, id, end) = place(&rig, kind, &fifo_region(), false)?;
        let mut other_region = Region {
            base: OTHER,
            user_data: 8,
            ..fifo_region()
        };
        other_region.doorbells.push(Doorbell::new(0x18, Size::B4));
        let other_device = plain();
        let other = serve(&rig, kind, &other_region, false, other_device.clone())?;
        let mut program = Program::new();
        program.repeat(WRITES, |p| {
            _ = p.write_counter(Bus::Mmio, MMIO_BASE + 0x10, 4, 0, 1)
        });
        program.read(Bus::Mmio, MMIO_BASE + 0x20, 4);
        let blocked = Runner::new(rig.vcpu(0, &program)?);
        blocked.start();
        assert_eq!(
            blocked.exit_within(Duration::from_millis(300))?,
            None,
            "{kind:?}"
        );

        let mut program = Program::new();
        program.repeat(OTHER_WRITES, |p| {
            _ = p.write_counter(Bus::Mmio, OTHER + 0x10, 4, 0, 1)
        });
        program.read(Bus::Mmio, OTHER + 0x20, 4);
        let goes_on = Runner::new(rig.vcpu(1, &program)?);
        goes_on.start();
        assert_eq!(goes_on.exit()?, Exit::Halt, "{kind:?}");
        goes_on.finish()?;
        assert_eq!(rig.guest.log(1)?, [0x5520], "{kind:?}");
        wait_until("the doorbells", || {
            other_device.told().len() == OTHER_WRITES as usize + 1
        });

        blocked.kicker.kick(Signal::SIGUSR1);
        assert_eq!(blocked.exit()?, Exit::Interrupted, "{kind:?}");
        blocked.start();
        drop(end);
        assert_eq!(blocked.exit()?, Exit::Halt, "{kind:?}");
        assert_eq!(rig.guest.log(0)?, [0xffff_ffff], "{kind:?}");
        let told = broken(&rig.vm);
        assert_eq!(
            told.iter().map(|(id, _)| *id).collect::<Vec<_>>(),
            [id],
            "{kind:?}: {told:?}"
        );
        println!("{kind:?}: {}", told[0].1);
        blocked.finish()?;
        other.task.finish()?;
    }
    Ok(())
}

#[test]
fn fifo_doorbells_of_a_slow_device_all_arrive_in_order() -> Result<()> {
    const WRITES: u32 = 20_000;
    let bpf = bpf()?;
    for kind in fifo_kinds() {
        let _watchdog = watchdog(format!("{kind:?}"), Duration::from_secs(60));
        let rig = Rig::with(Some(bpf.clone()))?;
        let device = plain();
        let (_channel, _, end) = place(&rig, kind, &fifo_region(), false)?;
        let mut program = Program::new();
        program.repeat(WRITES, |p| {
            _ = p.write_counter(Bus::Mmio, MMIO_BASE + 0x10, 4, 0, 1)
        });
        let runner = Runner::new(rig.vcpu(0, &program)?);
        runner.start();
        // The device begins late; the ring is full by then, and more than the wire holds waits.
        let halted = runner.exit_within(Duration::from_millis(200))?;
        let task = Task::spawn(end, device.clone(), WaitPolicy::Sleep)?;
        assert_eq!(
            halted.map_or_else(|| runner.exit(), Ok)?,
            Exit::Halt,
            "{kind:?}"
        );
        wait_until("the doorbells", || device.told().len() == WRITES as usize);
        for (i, told) in device.told().iter().enumerate() {
            assert!(
                matches!(told, Told::Ring(ring) if ring.value == Some(i as u64) && ring.writes == 1),
                "{kind:?}: {i}: {told:?}"
            );
        }
        assert_eq!(broken(&rig.vm), [], "{kind:?}");
        let vcpu = runner.finish()?;
        println!("{kind:?}: {:?}", vcpu.stats());
        drop(vcpu);
        task.finish()?;
    }
    Ok(())
}

#[test]
fn waits_go_on_while_fifo_doorbells_pass_over_the_same_channel() -> Result<()> {
    let rounds = amount("doorbells", 20_000, 2_000);
    let bpf = bpf()?;
    for kind in fifo_kinds() {
        let _watchdog = watchdog(format!("{kind:?}"), Duration::from_secs(60));
        let rig = Rig::with(Some(bpf.clone()))?;
        let device = plain();
        let served = serve(&rig, kind, &fifo_region(), false, device.clone())?;
        let mut reads = Program::new();
        reads.repeat(rounds / 4, |p| _ = p.read(Bus::Mmio, MMIO_BASE + 0x20, 4));
        let mut rings = Program::new();
        rings.repeat(rounds, |p| {
            _ = p.write_counter(Bus::Mmio, MMIO_BASE + 0x10, 4, 0, 1)
        });
        let runners = [
            Runner::new(rig.vcpu(0, &reads)?),
            Runner::new(rig.vcpu(1, &rings)?),
        ];
        for runner in &runners {
            runner.start();
        }
        for runner in runners {
            assert_eq!(runner.exit()?, Exit::Halt, "{kind:?}");
            runner.finish()?;
        }
        let rung = || {
            device
                .told()
                .into_iter()
                .filter(|told| matches!(told, Told::Ring(_)))
                .count()
        };
        wait_until("the doorbells", || rung() == rounds as usize);
        served.task.finish()?;
    }
    Ok(())
}

#[test]
fn fifo_doorbells_pass_a_vcpu_that_stopped_in_mid_access() -> Result<()> {
    const WRITES: u32 = 500;
    handle_sigusr1()?;
    let bpf = bpf()?;
    for kind in fifo_kinds() {
        let _watchdog = watchdog(format!("{kind:?}"), Duration::from_secs(60));
        let rig = Rig::with(Some(bpf.clone()))?;
        let device = Gated::default();
        let served = serve(&rig, kind, &fifo_region(), false, device.clone())?;
        let mut program = Program::new();
        program.read(Bus::Mmio, MMIO_BASE + 0x20, 4);
        let stops = Runner::new(rig.vcpu(0, &program)?);
        stops.start();
        device.gate.wait_for(1);
        assert_eq!(stops.signal_out()?, Exit::Interrupted, "{kind:?}");
        let mut program = Program::new();
        program.repeat(WRITES, |p| {
            _ = p.write_counter(Bus::Mmio, MMIO_BASE + 0x10, 4, 0, 1)
        });
        let goes_on = Runner::new(rig.vcpu(1, &program)?);
        goes_on.start();
        assert_eq!(
            goes_on
                .exit_within(Duration::from_millis(50))?
                .filter(|exit| *exit != Exit::Halt),
            None
        );
        device.gate.open();
        wait_until("the doorbells", || {
            device.recorder.told().len() == WRITES as usize + 1
        });
        stops.start();
        assert_eq!(stops.exit()?, Exit::Halt, "{kind:?}");
        goes_on.finish()?;
        stops.finish()?;
        served.task.finish()?;
    }
    Ok(())
}

#[test]
fn ioeventfd_doorbells_of_a_dead_device_do_not_exit() -> Result<()> {
    let kind = Kind {
        name: Ioeventfd::NAME,
        transport: Transport::Stream,
    };
    let rig = Rig::with(None)?;
    let (_, _, end) = place(&rig, kind, &region(), false)?;
    drop(end);
    let mut program = Program::new();
    program.repeat(1000, |p| {
        _ = p.write_counter(Bus::Mmio, MMIO_BASE + 0x10, 4, 0, 1)
    });
    let (_, vcpu) = rig.run(&program)?;
    assert_eq!(vcpu.stats().exits, 0);
    Ok(())
}
