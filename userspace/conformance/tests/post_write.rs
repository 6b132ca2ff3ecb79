//! What the kernel's selftest for posted writes checks, for `ebpf` in each of its forms.

use std::time::Duration;

use anyhow::Result;
use ioregion_abi::wire::Layout;
use ioregion_conformance::{
    Kind, Recorder, Rig, Task, Told, channel, ebpf_kinds, mechanism, run_to_halt,
};
use ioregion_dispatch::server::{DeviceEnd, WaitPolicy};
use ioregion_dispatch::{
    Access, Bus, BusAccess, Delivery, Doorbell, Exit, Region, Ring, Sink, Size,
};
use ioregion_microguest::{MMIO_BASE, Program};

const PORT: u64 = 0x300;
const SINKS: [Sink; 2] = [Sink::Ioeventfd, Sink::Coalesced];

fn region(bus: Bus) -> Region {
    match bus {
        Bus::Mmio => Region::mmio(MMIO_BASE, 0x1000),
        Bus::Pio => Region::pio(PORT as u16, 0x100),
    }
}

fn ring(index: u32, offset: u64, size: Size, value: u64, writes: u64) -> Told {
    Told::Ring(Ring {
        user_data: 0,
        index,
        offset,
        size,
        value: Some(value),
        writes,
    })
}

/// Each form of `ebpf` that this host offers, on each bus.
fn each_bus() -> impl Iterator<Item = (Kind, Bus)> {
    let each = ebpf_kinds().flat_map(|kind| [Bus::Mmio, Bus::Pio].map(|bus| (kind, bus)));
    each.inspect(|(kind, bus)| println!("{kind:?} {bus:?}"))
}

fn each_bus_and_sink() -> impl Iterator<Item = (Kind, Bus, Sink)> {
    each_bus()
        .flat_map(|(kind, bus)| SINKS.map(|sink| (kind, bus, sink)))
        .inspect(|(_, _, sink)| println!("{sink:?}"))
}

#[test]
fn every_width_delivers_its_value_without_an_exit() -> Result<()> {
    for (kind, bus, sink) in each_bus_and_sink() {
        let sizes = if bus == Bus::Mmio {
            &Size::ALL[..]
        } else {
            &Size::ALL[..3]
        };
        // Apart, and all at one address.
        for stride in [0x10, 0] {
            println!("{stride:#x}");
            let rig = Rig::new()?;
            let offsets = (0..).map(|n| 0x20 + n * stride);
            let region = sizes
                .iter()
                .zip(offsets.clone())
                .fold(region(bus), |region, (&size, offset)| {
                    region.doorbell(Doorbell::new(offset, size).sink(sink))
                });
            let device = Recorder::default();
            let task = rig.serve(kind, &region, device.clone())?;
            let mut program = Program::new();
            let value = 0xf1e2_d3c4_b5a6_9788_u64;
            let mut expected = Vec::new();
            for ((index, &size), offset) in (0..).zip(sizes).zip(offsets) {
                program.write(bus, region.base + offset, size.bytes(), value);
                expected.push(ring(index, offset, size, value & size.mask(), 1));
            }
            let (_, vcpu) = rig.run(&program)?;
            let mut told = device.wait(|told| told.len() == sizes.len())?;
            told.sort_by_key(|told| match told {
                Told::Ring(ring) => ring.index,
                _ => u32::MAX,
            });
            assert_eq!(told, expected);
            assert_eq!(vcpu.stats().exits, 0);
            let counters = rig.vm.program_counters().unwrap_or_default();
            assert_eq!((counters.matched, counters.lost), (sizes.len() as u64, 0));
            // Both count it where the tracepoints see what KVM shows the program anyway.
            assert!(counters.unmatched == 0 || kind.is_hooked(), "{counters:?}");
            if let Some(task) = task {
                assert_eq!(task.finish()?.lost, 0);
            }
        }
    }
    Ok(())
}

#[test]
fn a_datamatch_hit_stays_in_the_kernel_and_a_miss_reaches_the_device_once() -> Result<()> {
    for (kind, bus, sink) in each_bus_and_sink() {
        let rig = Rig::new()?;
        let doorbell = |value| Doorbell::new(0x10, Size::B4).matching(value).sink(sink);
        let region = region(bus)
            .doorbell(doorbell(0xaaaa))
            .doorbell(doorbell(0xbbbb_0000));
        let device = Recorder::default();
        let _task = rig.serve(kind, &region, device.clone())?;
        let at = region.base + 0x10;
        let mut program = Program::new();
        // A coalesced zone takes misses too, and hands them on in their order; one that is
        // overtaken by a hit may come after it. Here a read stands between them.
        program.write(bus, at, 4, 0xaaaa).read(bus, at, 4);
        program.write(bus, at, 4, 0xaaab).read(bus, at, 4);
        program.write(bus, at, 4, 0xbbbb_0000).read(bus, at, 4);
        program.write(bus, at, 4, 0).read(bus, at, 4);
        let (_, vcpu) = rig.run(&program)?;
        let access = Access {
            user_data: 0,
            offset: 0x10,
            size: Size::B4,
        };
        assert_eq!(
            device.told(),
            [
                ring(0, 0x10, Size::B4, 0xaaaa, 1),
                Told::Read(access, 1),
                Told::Write(access, 0xaaab),
                Told::Read(access, 3),
                ring(1, 0x10, Size::B4, 0xbbbb_0000, 1),
                Told::Read(access, 5),
                Told::Write(access, 0),
                Told::Read(access, 7),
            ]
        );
        let exits = match sink {
            _ if kind.is_native() => 0,
            // Misses exit.
            Sink::Ioeventfd => 6,
            Sink::Coalesced => 4,
        };
        assert_eq!(vcpu.stats().exits, exits);
        assert_eq!(vcpu.stats().already_captured, 0);
        let counters = rig.vm.program_counters().unwrap_or_default();
        assert_eq!((counters.matched, counters.lost), (2, 0));
        assert!(counters.unmatched == 2 || kind.is_hooked(), "{counters:?}");
    }
    Ok(())
}

#[test]
fn three_writes_without_a_wait_leave_the_last_value_and_a_count() -> Result<()> {
    for (kind, bus, sink) in each_bus_and_sink() {
        let rig = Rig::new()?;
        let region = region(bus).doorbell(Doorbell::new(0x10, Size::B4).sink(sink));
        let device = Recorder::default();
        let (channel, wire) = channel(&rig, kind)?;
        let assigned = rig.vm.assign(&region, &*mechanism(kind, &channel)?)?;
        let mut program = Program::new();
        for value in [11, 22, 33] {
            program.write(bus, region.base + 0x10, 4, value);
        }
        let (_, vcpu) = rig.run(&program)?;
        assert_eq!(vcpu.stats().exits, 0);
        let end = assigned.attach(DeviceEnd::new(wire, Layout::default()));
        let task = Task::spawn(end, device.clone(), WaitPolicy::Sleep)?;
        device.wait(|told| !told.is_empty())?;
        let stats = task.finish()?;
        assert_eq!(device.told(), [ring(0, 0x10, Size::B4, 33, 3)]);
        assert_eq!((stats.doorbells, stats.writes, stats.lost), (1, 3, 0));
        assert_eq!(stats.overrun(), 2);
    }
    Ok(())
}

#[test]
fn after_removal_the_access_comes_back_to_the_vmm() -> Result<()> {
    for (kind, bus, sink) in each_bus_and_sink() {
        let rig = Rig::new()?;
        let region = region(bus).doorbell(Doorbell::new(0x10, Size::B4).sink(sink));
        let device = Recorder::default();
        let task = rig.serve(kind, &region, device.clone())?;
        let addr = region.base + 0x10;
        let mut program = Program::new();
        program.write(bus, addr, 4, 0x77);
        let mut vcpu = rig.vcpu(0, &program)?;
        run_to_halt(&mut vcpu)?;
        let told = device.wait(|told| !told.is_empty())?;
        assert_eq!(told, [ring(0, 0x10, Size::B4, 0x77, 1)]);
        rig.vm.remove(&region)?;
        // The same value again: nothing remembers that it was captured once.
        rig.guest.reload(vcpu.fd(), 0, &program)?;
        let unclaimed = BusAccess {
            bus,
            addr,
            size: Size::B4,
            write: Some(0x77),
        };
        assert_eq!(vcpu.run()?, Exit::Unclaimed(unclaimed));
        run_to_halt(&mut vcpu)?;
        // And assigned anew it works as before.
        let again = Recorder::default();
        let _task = rig.serve(kind, &region, again.clone())?;
        rig.guest.reload(vcpu.fd(), 0, &program)?;
        run_to_halt(&mut vcpu)?;
        assert_eq!(
            again.wait(|told| !told.is_empty())?,
            [ring(0, 0x10, Size::B4, 0x77, 1)]
        );
        if let Some(task) = task {
            task.finish()?;
        }
        assert_eq!(device.told().len(), 1);
    }
    Ok(())
}

/// Values of which every third rings: `mask` selects the low byte.
fn partly_matching(bus: Bus, delivery: Delivery) -> (Region, Program, Vec<(bool, u64)>) {
    let doorbell = Doorbell::new(0x10, Size::B4)
        .matching_masked(0xff, 0x42)
        .sink(Sink::Coalesced);
    let region = region(bus).doorbell(doorbell.delivery(delivery));
    let mut program = Program::new();
    let mut values = Vec::new();
    for n in 0..600 {
        let hit = n % 3 == 1;
        let value = n << 8 | if hit { 0x42 } else { n % 0x42 };
        program.write(bus, region.base + 0x10, 4, value);
        values.push((hit, value));
    }
    program.read(bus, region.base, 4);
    (region, program, values)
}

#[test]
fn a_partial_mask_uses_the_coalesced_sink_and_misses_are_replayed_in_order() -> Result<()> {
    for (kind, bus) in each_bus() {
        let rig = Rig::new()?;
        let (region, program, values) = partly_matching(bus, Delivery::Latest);
        let device = Recorder::default();
        let _task = rig.serve(kind, &region, device.clone())?;
        let (_, vcpu) = rig.run(&program)?;
        let told = device.told();
        let written: Vec<_> = told
            .iter()
            .filter_map(|told| match told {
                Told::Write(_, data) => Some(*data),
                _ => None,
            })
            .collect();
        let misses: Vec<_> = values
            .iter()
            .filter(|(hit, _)| !hit)
            .map(|(_, value)| *value)
            .collect();
        assert_eq!(written, misses);
        let rings: Vec<_> = told
            .iter()
            .filter_map(|told| match told {
                Told::Ring(ring) => Some((ring.writes, ring.value)),
                _ => None,
            })
            .collect();
        assert_eq!(rings.iter().map(|ring| ring.0).sum::<u64>(), 200);
        assert_eq!(rings.last().and_then(|ring| ring.1), Some(598 << 8 | 0x42));
        assert!(matches!(told.last(), Some(Told::Read(..))));
        println!("{} exits", vcpu.stats().exits);
    }
    Ok(())
}

#[test]
fn hits_of_a_queued_doorbell_and_misses_keep_one_order() -> Result<()> {
    for (kind, bus) in each_bus() {
        let rig = Rig::new()?;
        let (region, program, values) = partly_matching(bus, Delivery::Fifo);
        let device = Recorder::default();
        let _task = rig.serve(kind, &region, device.clone())?;
        rig.run(&program)?;
        let told: Vec<_> = device
            .told()
            .iter()
            .filter_map(|told| match *told {
                Told::Ring(ring) => Some((true, ring.value.unwrap_or(u64::MAX))),
                Told::Write(_, data) => Some((false, data)),
                Told::Read(..) => None,
            })
            .collect();
        assert_eq!(told, values);
    }
    Ok(())
}

#[test]
fn other_sizes_inside_a_zone_are_replayed_as_they_were() -> Result<()> {
    for (kind, bus) in each_bus() {
        let rig = Rig::new()?;
        let neighbours =
            [0x10, 0x14, 0x18].map(|at| Doorbell::new(at, Size::B4).sink(Sink::Coalesced));
        let region = neighbours.into_iter().fold(region(bus), Region::doorbell);
        let device = Recorder::default();
        let _task = rig.serve(kind, &region, device.clone())?;
        let mut program = Program::new();
        let mut odd = vec![
            (0x11, Size::B1, 0x11),
            (0x12, Size::B2, 0x2222),
            (0x13, Size::B4, 0x3333_3333),
        ];
        if bus == Bus::Mmio {
            odd.push((0x14, Size::B8, 0x4444_4444_4444_4444));
        }
        for &(offset, size, value) in &odd {
            program.write(bus, region.base + offset, size.bytes(), value);
        }
        let (_, vcpu) = rig.run(&program)?;
        let told = device.wait(|told| told.len() == odd.len())?;
        let expected: Vec<_> = odd
            .iter()
            .map(|&(offset, size, value)| {
                Told::Write(
                    Access {
                        user_data: 0,
                        offset,
                        size,
                    },
                    value,
                )
            })
            .collect();
        assert_eq!(told, expected);
        assert_eq!(vcpu.stats().exits, 0);
        std::thread::sleep(Duration::from_millis(20));
        assert_eq!(device.told().len(), odd.len());
    }
    Ok(())
}
