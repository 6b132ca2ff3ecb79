//! Delivery and wake-ups: queues lose nothing, nobody is woken who does not want it, and full
//! tables refuse without leaving anything behind.

mod support;

use std::time::Duration;

use anyhow::{Context as _, Result};
use ioregion_abi::wire::Layout;
use ioregion_conformance::pace::amount;
use ioregion_conformance::{Kind, Recorder, Rig, Task, Told, ebpf_kinds, mechanism, run_to_halt};
use ioregion_dispatch::mechanism::Ebpf;
use ioregion_dispatch::server::{DeviceEnd, WaitPolicy};
use ioregion_dispatch::{
    Access, Bus, Channel, Delivery, Device, Doorbell, Program as Bpf, Region, RegionErrorKind,
    Ring, Sink, Size, Transport, Wake,
};
use ioregion_microguest::{MMIO_BASE, Program};

use support::writes;

fn region(doorbell: Doorbell) -> Region {
    Region::mmio(MMIO_BASE, 0x1000).doorbell(doorbell)
}

fn at_0x10() -> Doorbell {
    Doorbell::new(0x10, Size::B4)
}

fn rung(told: &[Told]) -> u64 {
    support::rung(told).0
}

/// A device that takes its time for each doorbell.
#[derive(Clone)]
struct Slow(Recorder, Duration);

impl Device for Slow {
    fn read(&mut self, access: Access) -> u64 {
        self.0.read(access)
    }

    fn write(&mut self, access: Access, data: u64) {
        self.0.write(access, data);
    }

    fn doorbell(&mut self, ring: Ring) {
        std::thread::sleep(self.1);
        self.0.doorbell(ring);
    }
}

#[test]
fn a_queue_delivers_ten_thousand_writes_in_order() -> Result<()> {
    let count = amount("writes", 10_000, 1000);
    for transport in [
        Transport::Stream,
        Transport::Seqpacket,
        Transport::Pipes,
        Transport::Mailbox,
    ] {
        for wait in [WaitPolicy::Sleep, WaitPolicy::Poll] {
            println!("{transport:?} {wait:?}");
            let rig = Rig::new()?;
            let device = Recorder::default();
            let kind = Kind {
                name: Ebpf::NAME,
                transport,
            };
            let fifo = region(at_0x10().delivery(Delivery::Fifo));
            let _task = rig.serve_waiting(kind, &fifo, device.clone(), wait)?;
            let (_, vcpu) = rig.run(&writes(count))?;
            let told = device.wait(|told| told.len() >= count as usize)?;
            let values = told.iter().map(|told| match told {
                Told::Ring(Ring {
                    value: Some(value),
                    writes: 1,
                    ..
                }) => *value,
                other => panic!("{other:?}"),
            });
            assert!(values.eq(1..=count.into()));
            println!("{} exits", vcpu.stats().exits);
            assert_eq!(rig.vm.program_counters().unwrap_or_default().lost, 0);
        }
    }
    Ok(())
}

#[test]
fn an_overflowing_ring_holds_the_guest_back_and_loses_nothing() -> Result<()> {
    const WRITES: u32 = 3000;
    let rig = Rig::new()?;
    let device = Recorder::default();
    let slow = Slow(device.clone(), Duration::from_micros(200));
    let fifo = region(at_0x10().delivery(Delivery::Fifo));
    let _task = rig.serve(Kind::EBPF, &fifo, slow)?;
    // Faster than one task drains: two vCPUs at once.
    let mut vcpus = [rig.vcpu(0, &writes(WRITES))?, rig.vcpu(1, &writes(WRITES))?];
    std::thread::scope(|scope| {
        let runs = vcpus
            .each_mut()
            .map(|vcpu| scope.spawn(|| run_to_halt(vcpu)));
        runs.into_iter()
            .try_for_each(|run| run.join().expect("a vCPU thread"))
    })?;
    let told = device.wait(|told| told.len() >= 2 * WRITES as usize)?;
    assert_eq!(rung(&told), 2 * u64::from(WRITES));
    let exits: u64 = vcpus.iter().map(|vcpu| vcpu.stats().exits).sum();
    println!("{exits} exits");
    // Both wrote 1, 2, 3, …: each value comes twice, and each vCPU's in order.
    let mut seen = vec![0; WRITES as usize + 1];
    for told in told {
        let Told::Ring(Ring {
            value: Some(value), ..
        }) = told
        else {
            panic!("{told:?}")
        };
        seen[value as usize] += 1;
        assert!(value == 1 || seen[value as usize - 1] >= seen[value as usize]);
    }
    assert!(seen[1..].iter().all(|times| *times == 2));
    Ok(())
}

#[test]
fn a_doorbell_that_never_wakes_is_found_by_the_next_read() -> Result<()> {
    let rig = Rig::new()?;
    let device = Recorder::default();
    let silent = region(at_0x10().sink(Sink::Coalesced).wake(Wake::Never));
    let _task = rig.serve(Kind::EBPF, &silent, device.clone())?;
    let mut vcpu = rig.vcpu(0, &writes(50))?;
    // Time to go to sleep.
    std::thread::sleep(Duration::from_millis(50));
    run_to_halt(&mut vcpu)?;
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(device.told(), []);
    assert_eq!(rig.vm.program_counters().unwrap_or_default().wakeups, 0);
    let mut program = Program::new();
    program.read(Bus::Mmio, MMIO_BASE, 4);
    rig.guest.reload(vcpu.fd(), 0, &program)?;
    run_to_halt(&mut vcpu)?;
    assert!(matches!(
        device.told()[..],
        [
            Told::Ring(Ring {
                value: Some(50),
                writes: 50,
                ..
            }),
            Told::Read(..)
        ]
    ));
    Ok(())
}

#[test]
fn an_armed_task_is_woken_once_for_each_sleep() -> Result<()> {
    let rig = Rig::new()?;
    let device = Recorder::default();
    let armed = region(at_0x10().sink(Sink::Coalesced));
    let task = rig
        .serve(Kind::EBPF, &armed, device.clone())?
        .context("a task")?;
    let mut vcpu = rig.vcpu(0, &writes(1))?;
    for round in 1..=20 {
        // Time to go to sleep.
        std::thread::sleep(Duration::from_millis(5));
        run_to_halt(&mut vcpu)?;
        rig.guest.reload(vcpu.fd(), 0, &writes(1))?;
        device.wait(|told| rung(told) == round)?;
    }
    let counters = rig.vm.program_counters().unwrap_or_default();
    assert_eq!((counters.wakeups, counters.wakeups_refused), (20, 0));
    rig.vm.remove(&armed)?;
    let stats = task.finish()?;
    assert_eq!((stats.doorbells, stats.overrun()), (20, 0));
    Ok(())
}

#[test]
fn a_burst_wakes_an_armed_task_less_often_than_it_writes() -> Result<()> {
    const WRITES: u32 = 5000;
    let mut wakeups = Vec::new();
    for wake in [Wake::WhenArmed, Wake::Always] {
        let rig = Rig::new()?;
        let device = Recorder::default();
        let _task = rig.serve(
            Kind::EBPF,
            &region(at_0x10().sink(Sink::Coalesced).wake(wake)),
            device.clone(),
        )?;
        let (_, vcpu) = rig.run(&writes(WRITES))?;
        device.wait(|told| rung(told) == u64::from(WRITES))?;
        // Of the vCPUs that there are.
        let counters = rig.vm.program_counters().unwrap_or_default();
        println!("{wake:?} {counters:?}");
        wakeups.push(counters.wakeups + counters.wakeups_refused);
        drop(vcpu);
    }
    assert!(
        wakeups[0] >= 1 && wakeups[0] < u64::from(WRITES),
        "{wakeups:?}"
    );
    assert_eq!(wakeups[1], u64::from(WRITES));
    Ok(())
}

#[test]
fn a_polling_task_is_never_woken() -> Result<()> {
    let deliveries = [Delivery::Latest, Delivery::Fifo];
    for (kind, delivery) in ebpf_kinds().flat_map(|kind| deliveries.map(|d| (kind, d))) {
        println!("{kind:?} {delivery:?}");
        let rig = Rig::new()?;
        let device = Recorder::default();
        let polled = region(at_0x10().sink(Sink::Coalesced).delivery(delivery));
        let task = rig.serve_waiting(kind, &polled, device.clone(), WaitPolicy::Poll)?;
        let (_, vcpu) = rig.run(&writes(2000))?;
        device.wait(|told| rung(told) == 2000)?;
        let counters = rig.vm.program_counters().unwrap_or_default();
        // Where KVM has the region the wire is the queue, of which the program knows nothing.
        let is_queued_by_kvm = kind.is_hooked() && delivery == Delivery::Fifo;
        assert_eq!(counters.matched, if is_queued_by_kvm { 0 } else { 2000 });
        if delivery == Delivery::Latest {
            assert_eq!((counters.wakeups, counters.wakeups_refused), (0, 0));
        }
        drop(vcpu);
        rig.vm.remove(&polled)?;
        assert_eq!(task.context("a task")?.finish()?.wakeups, 0);
    }
    Ok(())
}

#[test]
fn overwritten_values_are_counted() -> Result<()> {
    for sink in [Sink::Ioeventfd, Sink::Coalesced] {
        let rig = Rig::new()?;
        let (channel, wire) = Channel::pair(Transport::Stream)?;
        let region = region(at_0x10().sink(sink));
        let assigned = rig.vm.assign(&region, &*mechanism(Kind::EBPF, &channel)?)?;
        // No task yet: of 100 writes, 99 overwrite a value that nobody has seen.
        let (_, vcpu) = rig.run(&writes(100))?;
        drop(vcpu);
        let device = Recorder::default();
        let end = assigned.attach(DeviceEnd::new(wire, Layout::default()));
        let task = Task::spawn(end, device.clone(), WaitPolicy::Sleep)?;
        device.wait(|told| rung(told) == 100)?;
        assert_eq!(task.finish()?.overrun(), 99);
    }
    Ok(())
}

/// Writes to each of `count` doorbells once; each must arrive at its own index.
fn each_arrives_at_its_own(count: u32, sink: Sink) -> Result<()> {
    let rig = Rig::new()?;
    let bytes = u64::from(count) * 4 + 0x1000;
    let doorbell = |n: u64| Doorbell::new(0x1000 + 4 * n, Size::B4).sink(sink);
    let region = (0..count.into())
        .map(doorbell)
        .fold(Region::mmio(MMIO_BASE, bytes), Region::doorbell);
    let device = Recorder::default();
    let start = std::time::Instant::now();
    let task = rig.serve(Kind::EBPF, &region, device.clone())?;
    println!("{count} {sink:?}: assigned in {:?}", start.elapsed());
    let mut program = Program::new();
    program.repeat(count, |p| {
        p.write_counter_strided(Bus::Mmio, MMIO_BASE + 0x1000, 4, 0x100, count, 4);
    });
    program.read(Bus::Mmio, MMIO_BASE, 4);
    let (_, vcpu) = rig.run(&program)?;
    let mut told = device.told();
    assert!(matches!(told.pop(), Some(Told::Read(..))));
    told.sort_by_key(|told| {
        if let Told::Ring(ring) = told {
            ring.index
        } else {
            u32::MAX
        }
    });
    let expected = (0..count).map(|index| {
        Told::Ring(Ring {
            user_data: 0,
            index,
            offset: 0x1000 + 4 * u64::from(index),
            size: Size::B4,
            value: Some(0x100 + u64::from(index)),
            writes: 1,
        })
    });
    assert!(told.into_iter().eq(expected));
    let stats = vcpu.stats();
    // The read, and a full coalesced ring now and then.
    assert!(stats.exits <= 1 + u64::from(count) / 100, "{stats:?}");
    let start = std::time::Instant::now();
    rig.vm.remove(&region)?;
    println!("removed in {:?}", start.elapsed());
    assert_eq!(task.context("a task")?.finish()?.lost, 0);
    Ok(())
}

#[test]
fn each_of_65536_coalesced_doorbells_arrives_at_its_own_index() -> Result<()> {
    each_arrives_at_its_own(amount("doorbells", 65_536, 8192), Sink::Coalesced)
}

#[test]
fn each_of_thousands_of_ioeventfd_doorbells_arrives_at_its_own_index() -> Result<()> {
    // All share one eventfd, so that the limit on descriptors does not matter; KVM takes them
    // one by one, each time copying its table.
    each_arrives_at_its_own(amount("doorbells", 16_384, 2048), Sink::Ioeventfd)
}

/// Assigns what does not fit, then what does.
fn a_full_table_refuses(rig: &Rig, kind: Kind, too_many: &Region, fits: &Region) -> Result<()> {
    let (channel, _wire) = Channel::pair(Transport::Stream)?;
    for _ in 0..3 {
        let error = rig
            .vm
            .assign(too_many, &*mechanism(kind, &channel)?)
            .expect_err("a full table");
        println!("{error}");
        assert!(
            matches!(error.kind, RegionErrorKind::TableFull(_)),
            "{error:?}"
        );
        assert_eq!(error.errno(), nix::errno::Errno::ENOSPC);
    }
    let device = Recorder::default();
    let _task = rig.serve(kind, fits, device.clone())?;
    let mut program = Program::new();
    for (doorbell, n) in fits.doorbells.iter().zip(1..) {
        program.write(Bus::Mmio, fits.base + doorbell.offset, 4, n);
    }
    let (_, vcpu) = rig.run(&program)?;
    device.wait(|told| rung(told) == fits.doorbells.len() as u64)?;
    assert_eq!(vcpu.stats().exits, vcpu.stats().already_captured);
    Ok(())
}

#[test]
fn a_full_match_table_refuses_and_keeps_nothing() -> Result<()> {
    let object = std::fs::read(Bpf::find()?)?;
    let rig = Rig::with(Some(Bpf::load_sized(&object, 16)?))?;
    for sink in [Sink::Ioeventfd, Sink::Coalesced] {
        let with = |count: u64| {
            let doorbell = |n| Doorbell::new(4 * n, Size::B4).sink(sink);
            (0..count)
                .map(doorbell)
                .fold(Region::mmio(MMIO_BASE, 0x1000), Region::doorbell)
        };
        if sink == Sink::Ioeventfd {
            a_full_table_refuses(&rig, Kind::EBPF, &with(17), &with(16))?;
            rig.vm.remove(&with(16))?;
        } else {
            let (channel, _wire) = Channel::pair(Transport::Stream)?;
            let error = rig
                .vm
                .assign(&with(17), &*mechanism(Kind::EBPF, &channel)?)
                .expect_err("a full table");
            assert!(
                matches!(error.kind, RegionErrorKind::TableFull(_)),
                "{error:?}"
            );
        }
    }
    Ok(())
}

#[test]
fn a_full_bus_refuses_and_keeps_nothing() -> Result<()> {
    // KVM has room for 1000 devices on a bus; each zone is one, unless it touches its neighbour.
    let rig = Rig::new()?;
    let with = |count: u64, stride: u64| {
        let doorbell = |n| Doorbell::new(stride * n, Size::B4).sink(Sink::Coalesced);
        (0..count)
            .map(doorbell)
            .fold(Region::mmio(MMIO_BASE, 0x4000), Region::doorbell)
    };
    let (too_many, fits) = (with(1100, 8), with(1100, 4));
    a_full_table_refuses(&rig, Kind::TRACEPOINTS, &too_many, &fits)?;
    rig.vm.remove(&with(1100, 4))?;
    Ok(())
}

#[test]
fn more_zones_than_the_program_can_watch_are_refused_and_keep_nothing() -> Result<()> {
    let rig = Rig::new()?;
    let with = |count: u64| {
        let doorbell = |n| Doorbell::new(8 * n, Size::B8).sink(Sink::Coalesced);
        (0..count)
            .map(doorbell)
            .fold(Region::mmio(MMIO_BASE, 0x10_0000), Region::doorbell)
    };
    let (channel, _wire) = Channel::pair(Transport::Stream)?;
    let error = rig
        .vm
        .assign(&with(65_537), &*mechanism(Kind::TRACEPOINTS, &channel)?)
        .expect_err("a full table");
    assert!(
        matches!(error.kind, RegionErrorKind::TableFull(_)),
        "{error:?}"
    );
    // All of it is free again.
    let assigned = rig
        .vm
        .assign(&with(65_536), &*mechanism(Kind::TRACEPOINTS, &channel)?)?;
    rig.vm.remove(&with(65_536))?;
    drop(assigned);
    Ok(())
}
