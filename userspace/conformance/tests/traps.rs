//! The traps that careful reading of the kernel's sources found, each sprung on purpose.

mod support;

use std::collections::HashMap;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::{Arc, mpsc};
use std::time::Duration;

use anyhow::{Context as _, Result};
use ioregion_abi::bpf::SlotBlock;
use ioregion_abi::wire::Layout;
use ioregion_conformance::pace::amount;
use ioregion_conformance::{
    Kind, Recorder, Rig, Task, Told, ebpf_kinds, maps, mechanism, run_to_halt,
};
use ioregion_dispatch::server::{DeviceEnd, WaitPolicy};
use ioregion_dispatch::{
    Access, Bus, BusAccess, Channel, Delivery, Doorbell, Event, Exit, Program as Bpf, Region,
    RegionErrorKind, Ring, Sink, Size, Transport, Wake,
};
use ioregion_microguest::{MMIO_BASE, Program};

use support::{region_with, rung, writes};

const SINKS: [Sink; 2] = [Sink::Ioeventfd, Sink::Coalesced];

/// Each form of `ebpf` that this host offers, with each sink.
fn forms() -> impl Iterator<Item = (Kind, Sink)> {
    let forms = ebpf_kinds().flat_map(|kind| SINKS.map(|sink| (kind, sink)));
    forms.inspect(|(kind, sink)| println!("{kind:?} {sink:?}"))
}

#[test]
fn a_write_that_exits_although_its_slot_has_it_is_delivered_once() -> Result<()> {
    const WRITES: u32 = 2000;
    let rig = Rig::new()?;
    let device = Recorder::default();
    let _task = rig.serve(
        Kind::TRACEPOINTS,
        &region_with(Sink::Coalesced),
        device.clone(),
    )?;
    // Nobody drains the ring for coalesced doorbells until it is full and the write exits.
    let (_, vcpu) = rig.run(&writes(WRITES))?;
    let told = device.wait(|told| rung(told).0 >= u64::from(WRITES))?;
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(rung(&device.told()), (WRITES.into(), Some(WRITES.into())));
    assert!(told.iter().all(|told| matches!(told, Told::Ring(_))));
    let stats = vcpu.stats();
    assert!(stats.already_captured > 0);
    assert_eq!((stats.exits, stats.carried), (stats.already_captured, 0));
    Ok(())
}

#[test]
fn a_slot_is_never_older_than_its_sequence() -> Result<()> {
    for (kind, sink) in forms() {
        let writes_here = amount("writes", 60_000, 6_000);
        let rig = Rig::new()?;
        let device = Recorder::default();
        let _task =
            rig.serve_waiting(kind, &region_with(sink), device.clone(), WaitPolicy::Poll)?;
        rig.run(&writes(writes_here))?;
        let told = device.wait(|told| rung(told).0 >= u64::from(writes_here))?;
        let mut sequence = 0;
        for told in &told {
            let Told::Ring(ring) = told else {
                panic!("{told:?}")
            };
            sequence += ring.writes;
            assert!(
                ring.value.is_some_and(|value| value >= sequence),
                "{ring:?} at {sequence}"
            );
        }
        assert_eq!(rung(&told), (writes_here.into(), Some(writes_here.into())));
        println!("{} rings", told.len());
    }
    Ok(())
}

#[test]
fn two_vcpus_on_one_doorbell_lose_no_update() -> Result<()> {
    let waits = [WaitPolicy::Poll, WaitPolicy::Sleep];
    for ((kind, sink), wait) in forms().flat_map(|form| waits.map(|wait| (form, wait))) {
        let count = amount("writes of each vCPU", 60_000, 6_000);
        let all = u64::from(count);
        println!("{wait:?}");
        let rig = Rig::new()?;
        let device = Recorder::default();
        let region = region_with(sink);
        let task = rig.serve_waiting(kind, &region, device.clone(), wait)?;
        let mut vcpus = [0, 1].map(|vcpu| {
            let mut program = Program::new();
            program.repeat(count, |p| {
                p.write_counter(Bus::Mmio, MMIO_BASE + 0x10, 4, vcpu << 31 | 1, 1);
            });
            rig.vcpu(vcpu, &program)
        });
        std::thread::scope(|scope| {
            let runs = vcpus.each_mut().map(|vcpu| {
                scope.spawn(|| {
                    run_to_halt(vcpu.as_mut().map_err(|error| anyhow::anyhow!("{error}"))?)
                })
            });
            runs.into_iter()
                .try_for_each(|run| run.join().expect("a vCPU thread"))
        })?;
        let told = device.wait(|told| rung(told).0 >= 2 * all)?;
        let (mut sequence, mut newest) = (0, [0; 2]);
        for told in &told {
            let Told::Ring(ring) = told else {
                panic!("{told:?}")
            };
            let value = ring.value.context("a value")?;
            let (vcpu, count) = ((value >> 31) as usize, value & 0x7fff_ffff);
            sequence += ring.writes;
            // What the other vCPU has contributed to the sequence is at most all that it writes.
            assert!(count + all >= sequence);
            assert!(
                count >= newest[vcpu],
                "vCPU {vcpu} went back from {} to {count}",
                newest[vcpu]
            );
            newest[vcpu] = count;
        }
        assert_eq!(sequence, 2 * all);
        assert!(
            newest.contains(&all),
            "the last write's value is the last one seen"
        );
        assert_eq!(
            rig.vm.program_counters().unwrap_or_default().matched,
            2 * all
        );
        rig.vm.remove(&region)?;
        if let Some(task) = task {
            assert_eq!(task.finish()?.lost, 0);
        }
    }
    Ok(())
}

#[test]
fn a_device_process_can_write_no_slot_and_reach_no_other_ports() -> Result<()> {
    let rig = Rig::new()?;
    let (channel, wire) = Channel::pair(Transport::Stream)?;
    let region = region_with(Sink::Coalesced);
    let assigned = rig
        .vm
        .assign(&region, &*mechanism(Kind::TRACEPOINTS, &channel)?)?;
    let end = assigned.attach(DeviceEnd::new(wire, Layout::default()));
    let (here, there) = UnixStream::pair()?;
    ioregion_dispatch::handoff::send(&here, end)?;
    let before = maps::open_fds()?;
    let end = ioregion_dispatch::handoff::recv(&there)?;
    let held: Vec<_> = maps::open_fds()?
        .into_iter()
        .filter(|fd| !before.contains(fd))
        .collect();
    let (mut kinds, mut slots) = (Vec::new(), 0);
    for (fd, target) in held {
        assert!(!target.contains("kvm"), "a device task holds {target}");
        assert!(
            !target.contains("bpf-prog") && !target.contains("bpf_link"),
            "a device task holds {target}"
        );
        if target != "anon_inode:bpf-map" {
            continue;
        }
        let map = maps::Map::open(fd)?;
        kinds.push(map.kind);
        if map.kind == maps::ARRAY && map.value_size as usize == size_of::<SlotBlock>() {
            slots += 1;
            assert_eq!(map.map(false).map_err(|e| e.raw_os_error()), Ok(()));
            assert_eq!(
                map.map(true).map_err(|e| e.raw_os_error()),
                Err(Some(libc::EPERM))
            );
            assert_eq!(
                map.update(0, &[0; size_of::<SlotBlock>()])
                    .map_err(|e| e.raw_os_error()),
                Err(Some(libc::EPERM))
            );
        }
    }
    assert_eq!(slots, 1, "{kinds:?}");
    // Slots, control words, ring buffer, all of this port; no array of maps leads to others.
    kinds.sort_unstable();
    assert_eq!(kinds, [maps::ARRAY, maps::ARRAY, maps::RINGBUF]);
    drop(end);
    Ok(())
}

#[test]
fn sinks_that_would_overlap_are_refused() -> Result<()> {
    let rig = Rig::new()?;
    let coalesced = |at, size| Doorbell::new(at, size).sink(Sink::Coalesced);
    let (channel, _wire) = Channel::pair(Transport::Stream)?;
    let ebpf = mechanism(Kind::TRACEPOINTS, &channel)?;
    let plain = Region::mmio(MMIO_BASE, 0x1000);
    for (zone, eventfd) in [
        (coalesced(0x10, Size::B8), Doorbell::new(0x14, Size::B4)),
        (coalesced(0x14, Size::B4), Doorbell::new(0x10, Size::B8)),
        (coalesced(0x10, Size::B4), Doorbell::new(0x10, Size::B2)),
        (coalesced(0x10, Size::B4), Doorbell::new(0x12, Size::B8)),
    ] {
        for region in [
            plain.clone().doorbell(zone).doorbell(eventfd),
            plain.clone().doorbell(eventfd).doorbell(zone),
        ] {
            let error = rig.vm.assign(&region, &*ebpf).expect_err("an overlap");
            let (RegionErrorKind::DoorbellSink(at, _) | RegionErrorKind::DoorbellOverlap(at)) =
                error.kind
            else {
                panic!("{error}");
            };
            assert!(at == eventfd.offset || at == zone.offset, "{error}");
        }
    }
    // Side by side is well.
    let region = plain
        .doorbell(coalesced(0x10, Size::B4))
        .doorbell(Doorbell::new(0x14, Size::B4));
    let device = Recorder::default();
    let _task = rig.serve(Kind::TRACEPOINTS, &region, device.clone())?;
    let mut program = Program::new();
    program
        .write(Bus::Mmio, MMIO_BASE + 0x10, 4, 1)
        .write(Bus::Mmio, MMIO_BASE + 0x14, 4, 2);
    let (_, vcpu) = rig.run(&program)?;
    assert_eq!(rung(&device.wait(|told| told.len() == 2)?).0, 2);
    assert_eq!(vcpu.stats().exits, 0);
    Ok(())
}

#[test]
fn a_split_access_reaches_doorbell_and_register_once_each() -> Result<()> {
    let value = 0x8877_6655_4433_2211_u64;
    let wide = u128::from(value) << 64 | 0x0123_4567_89ab_cdef;
    // Doorbell's offset and size, register's offset, address written, whether by 16 bytes.
    let cases = [
        (0x18, Size::B8, 0x10, 0x10, true),
        (0x10, Size::B8, 0x18, 0x10, true),
        (0x1000, Size::B4, 0xffc, 0xffc, false),
        (0xffc, Size::B4, 0x1000, 0xffc, false),
        (0x1000, Size::B8, 0xff8, 0xff8, true),
        (0xff8, Size::B8, 0x1000, 0xff8, true),
    ];
    for (kind, sink) in forms() {
        for (doorbell, size, register, at, by_16) in cases {
            println!("doorbell {doorbell:#x}, write at {at:#x}");
            let rig = Rig::new()?;
            let region =
                Region::mmio(MMIO_BASE, 0x2000).doorbell(Doorbell::new(doorbell, size).sink(sink));
            let device = Recorder::default();
            let _task = rig.serve(kind, &region, device.clone())?;
            let mut program = Program::new();
            if by_16 {
                program.write16(MMIO_BASE + at, wide);
            } else {
                program.write(Bus::Mmio, MMIO_BASE + at, 8, value);
            }
            program.read(Bus::Mmio, MMIO_BASE, 4);
            rig.run(&program)?;
            let part = |offset: u64| {
                let all = if by_16 { wide } else { value.into() };
                (all >> (8 * (offset - at))) as u64 & size.mask()
            };
            let mut told = device.told();
            assert_eq!(told.len(), 3, "{told:?}");
            assert!(matches!(told.pop(), Some(Told::Read(..))));
            let ring = Ring {
                user_data: 0,
                index: 0,
                offset: doorbell,
                size,
                value: Some(part(doorbell)),
                writes: 1,
            };
            assert!(told.contains(&Told::Ring(ring)), "{told:?}");
            let access = Access {
                user_data: 0,
                offset: register,
                size,
            };
            assert!(
                told.contains(&Told::Write(access, part(register))),
                "{told:?}"
            );
        }
    }
    Ok(())
}

#[test]
fn a_doorbell_that_exits_with_the_access_before_it_still_wakes_its_task() -> Result<()> {
    // KVM offers the second half of a write to no sink once the first has to exit.
    for sink in SINKS {
        println!("{sink:?}");
        let rig = Rig::new()?;
        let registers = Region::mmio(MMIO_BASE, 8);
        let bells = Region::mmio(MMIO_BASE + 8, 8).doorbell(Doorbell::new(0, Size::B8).sink(sink));
        let (left, right) = (Recorder::default(), Recorder::default());
        let _left = rig.serve(Kind::TRACEPOINTS, &registers, left.clone())?;
        let task = rig.serve(Kind::TRACEPOINTS, &bells, right.clone())?;
        std::thread::sleep(Duration::from_millis(10));
        let mut program = Program::new();
        program.write16(MMIO_BASE, 5 << 64 | 4);
        let (_, vcpu) = rig.run(&program)?;
        assert_eq!(
            left.told(),
            [Told::Write(
                Access {
                    user_data: 0,
                    offset: 0,
                    size: Size::B8
                },
                4
            )]
        );
        assert_eq!(vcpu.stats().already_captured, 1);
        assert_eq!(rung(&right.wait(|told| !told.is_empty())?), (1, Some(5)));
        rig.vm.remove(&bells)?;
        if let Some(task) = task {
            assert_eq!(task.finish()?.lost, 0);
        }
    }
    Ok(())
}

#[test]
fn a_read_flushes_a_thousand_doorbells() -> Result<()> {
    const DOORBELLS: u32 = 1000;
    for (kind, sink) in forms() {
        let rig = Rig::new()?;
        let doorbell = |n: u64| {
            Doorbell::new(0x100 + 4 * n, Size::B4)
                .sink(sink)
                .wake(Wake::Never)
        };
        let region = (0..u64::from(DOORBELLS))
            .map(doorbell)
            .fold(Region::mmio(MMIO_BASE, 0x2000), Region::doorbell);
        let device = Recorder::default();
        let _task = rig.serve(kind, &region, device.clone())?;
        let mut program = Program::new();
        program.repeat(2 * DOORBELLS, |p| {
            p.write_counter_strided(Bus::Mmio, MMIO_BASE + 0x100, 4, 0, DOORBELLS, 4);
        });
        program.read(Bus::Mmio, MMIO_BASE, 4);
        rig.run(&program)?;
        let mut told = device.told();
        assert!(matches!(told.pop(), Some(Told::Read(..))));
        let mut seen = HashMap::new();
        for told in told {
            let Told::Ring(ring) = told else {
                panic!("{told:?}")
            };
            let (writes, value) = seen.entry(ring.index).or_insert((0, None));
            *writes += ring.writes;
            *value = ring.value;
        }
        let expected = (0..DOORBELLS)
            .map(|n| (n, (2, Some(u64::from(DOORBELLS + n)))))
            .collect();
        assert_eq!(seen, expected);
    }
    Ok(())
}

/// A loader on another thread, and its end of the connection.
struct Loader(std::thread::JoinHandle<()>, UnixStream);

impl Loader {
    /// As loaders do: first detaches the program, then hangs up.
    fn end(self) -> Result<()> {
        self.1.shutdown(std::net::Shutdown::Read)?;
        self.0.join().expect("the loader's thread");
        Ok(())
    }
}

/// A program that a loader on another thread holds.
fn from_a_loader(dir: &Path) -> Result<(Arc<Bpf>, Loader)> {
    let path = dir.join("loader");
    let listener = UnixListener::bind(&path)?;
    let object = std::fs::read(Bpf::find()?)?;
    let (sender, receiver) = mpsc::channel();
    let thread = std::thread::spawn(move || {
        let (socket, _) = listener.accept().expect("a client");
        sender.send(socket.try_clone()).expect("somebody waits");
        ioregion_dispatch::ebpf::serve_vmm(&socket, &object).expect("a loader");
    });
    let bpf = Bpf::connect(&path)?;
    Ok((bpf, Loader(thread, receiver.recv()??)))
}

#[test]
fn what_was_captured_once_is_not_taken_for_a_later_write_that_nobody_saw() -> Result<()> {
    for sink in SINKS {
        println!("{sink:?}");
        let dir = tempfile::tempdir()?;
        let (bpf, loader) = from_a_loader(dir.path())?;
        let rig = Rig::with(Some(bpf))?;
        let device = Recorder::default();
        let region = region_with(sink);
        let _task = rig.serve(Kind::TRACEPOINTS, &region, device.clone())?;
        let mut vcpu = rig.vcpu(0, &writes(1))?;
        run_to_halt(&mut vcpu)?;
        device.wait(|told| rung(told).0 == 1)?;
        assert_eq!(vcpu.stats().exits, 0);
        loader.end()?;
        let gone = (0..20_000).find_map(|_| {
            std::thread::sleep(Duration::from_millis(1));
            rig.vm.next_event()
        });
        assert!(matches!(gone, Some(Event::ProgramGone { .. })), "{gone:?}");
        // What the ring still held cannot be told from what nobody captured: it comes again.
        let again = u64::from(sink == Sink::Coalesced);
        device.wait(|told| rung(told).0 == 1 + again)?;
        for round in 2..5 {
            rig.guest.reload(vcpu.fd(), 0, &writes(1))?;
            run_to_halt(&mut vcpu)?;
            let told = device.wait(|told| rung(told).0 >= round + again)?;
            assert_eq!(rung(&told).0, round + again);
        }
        assert_eq!((vcpu.stats().exits, vcpu.stats().already_captured), (3, 0));
    }
    Ok(())
}

#[test]
fn modification_hands_on_what_is_still_in_the_coalesced_ring() -> Result<()> {
    const WRITES: u32 = 100;
    let rig = Rig::new()?;
    let region = Region::mmio(MMIO_BASE, 0x1000)
        .doorbell(Doorbell::new(0x10, Size::B4).delivery(Delivery::Fifo));
    let device = Recorder::default();
    let mut tasks = vec![rig.serve(Kind::TRACEPOINTS, &region, device.clone())?];
    let mut vcpu = rig.vcpu(0, &writes(WRITES))?;
    for round in 1..=50 {
        run_to_halt(&mut vcpu)?;
        let (channel, wire) = Channel::pair(Transport::Stream)?;
        let end = rig
            .vm
            .modify(&region, &*mechanism(Kind::TRACEPOINTS, &channel)?)?;
        let end = end.attach(DeviceEnd::new(wire, Layout::default()));
        tasks.push(Some(Task::spawn(end, device.clone(), WaitPolicy::Sleep)?));
        rig.guest.reload(vcpu.fd(), 0, &writes(WRITES))?;
        let told = device
            .wait(|told| rung(told).0 >= u64::from(round * WRITES))
            .with_context(|| format!("round {round}"))?;
        assert_eq!(
            rung(&told),
            (u64::from(round * WRITES), Some(WRITES.into()))
        );
    }
    assert_eq!(rig.vm.program_counters().unwrap_or_default().lost, 0);
    Ok(())
}

#[test]
fn a_write_that_another_sink_swallows_does_not_keep_the_drainer_awake() -> Result<()> {
    let rig = Rig::new()?;
    let zone = Region::mmio(MMIO_BASE, 0x100)
        .doorbell(Doorbell::new(0x10, Size::B4).sink(Sink::Coalesced));
    let plain = Region::mmio(MMIO_BASE + 0x100, 0x100).doorbell(Doorbell::new(0, Size::B4));
    let devices = [Recorder::default(), Recorder::default()];
    let _zone = rig.serve(Kind::TRACEPOINTS, &zone, devices[0].clone())?;
    let ioeventfd = Kind {
        name: "ioeventfd",
        transport: Transport::Stream,
    };
    let _plain = rig.serve(ioeventfd, &plain, devices[1].clone())?;
    let mut program = Program::new();
    program.repeat(10, |p| {
        p.write_counter(Bus::Mmio, MMIO_BASE + 0x100, 4, 1, 1);
    });
    let (_, vcpu) = rig.run(&program)?;
    devices[1].wait(|told| rung(told).0 == 10)?;
    assert_eq!(vcpu.stats().exits, 0);
    std::thread::sleep(Duration::from_millis(50));
    let before = sleeps_of_drainers()?;
    std::thread::sleep(Duration::from_millis(300));
    let slept = sleeps_of_drainers()? - before;
    assert!(
        slept < 5,
        "the drainer woke {slept} times with nothing to do"
    );
    Ok(())
}

/// How often the draining threads of this process went to sleep so far.
fn sleeps_of_drainers() -> Result<u64> {
    let mut sum = 0;
    for task in std::fs::read_dir("/proc/self/task")? {
        let status = std::fs::read_to_string(task?.path().join("status")).unwrap_or_default();
        let field = |name: &str| {
            status
                .lines()
                .find_map(|line| line.strip_prefix(name))
                .map(str::trim)
        };
        if field("Name:") == Some("ioregion-drain") {
            sum += field("voluntary_ctxt_switches:")
                .context("a count")?
                .parse::<u64>()?;
        }
    }
    Ok(sum)
}

#[test]
fn a_write_to_a_removed_region_is_not_taken_for_the_captured_one() -> Result<()> {
    for sink in SINKS {
        let rig = Rig::new()?;
        let device = Recorder::default();
        let region = region_with(sink);
        let _task = rig.serve(Kind::TRACEPOINTS, &region, device.clone())?;
        let (_, mut vcpu) = rig.run(&writes(7))?;
        rig.vm.remove(&region)?;
        rig.guest.reload(vcpu.fd(), 0, &writes(1))?;
        let access = BusAccess {
            bus: Bus::Mmio,
            addr: MMIO_BASE + 0x10,
            size: Size::B4,
            write: Some(1),
        };
        assert_eq!(vcpu.run()?, Exit::Unclaimed(access));
    }
    Ok(())
}
