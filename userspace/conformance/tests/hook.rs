//! `ebpf` where KVM itself shows the accesses to the program; and that it says so where KVM cannot.

mod support;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, Result};
use ioregion_abi::wire::Layout;
use ioregion_conformance::pace::amount;
use ioregion_conformance::pace::patience;
use ioregion_conformance::{Kind, Recorder, Rig, Task, Told, channel, mechanism, run_to_halt};
use ioregion_dispatch::mechanism::{Auto, Ebpf, Forward};
use ioregion_dispatch::server::{DeviceEnd, WaitPolicy};
use ioregion_dispatch::{
    Access, Answered, Bus, Channel, Delivery, Doorbell, Region, Ring, Sink, Size, Transport, Via,
};
use ioregion_microguest::{MMIO_BASE, Program};
use nix::errno::Errno;

use support::{hooked, run_until_halt, watchdog};

const SINKS: [Sink; 2] = [Sink::Ioeventfd, Sink::Coalesced];
const BUSES: [Bus; 2] = [Bus::Mmio, Bus::Pio];

fn region(bus: Bus) -> Region {
    match bus {
        Bus::Mmio => Region::mmio(MMIO_BASE, 0x1000),
        Bus::Pio => Region::pio(0x400, 0x100),
    }
}

fn ring(index: u32, offset: u64, value: u64, writes: u64) -> Told {
    Told::Ring(Ring {
        user_data: 0,
        index,
        offset,
        size: Size::B4,
        value: Some(value),
        writes,
    })
}

/// Number of writes that rang a doorbell, and the last value.
fn rung(told: &[Told], at: u64) -> (u64, Option<u64>) {
    let here = |told: &&Told| matches!(told, Told::Ring(ring) if ring.offset == at);
    support::rung(told.iter().filter(here))
}

#[test]
fn a_doorbell_with_signal_carries_its_value_and_signals() -> Result<()> {
    for kind in hooked()? {
        for (bus, sink) in BUSES.into_iter().flat_map(|bus| SINKS.map(|s| (bus, s))) {
            println!("{kind:?} {bus:?} {sink:?}");
            let rig = Rig::new()?;
            let region = region(bus)
                .doorbell(Doorbell::new(0x10, Size::B4).sink(sink))
                .doorbell(Doorbell::new(0x20, Size::B4).sink(sink));
            let device = Recorder::default();
            let task = rig
                .serve(kind, &region, device.clone())?
                .context("a task")?;
            let mut program = Program::new();
            program.write(bus, region.base + 0x20, 4, 0xfeed_0001);
            let mut vcpu = rig.vcpu(0, &program)?;
            for round in 1..=10 {
                // Time to go to sleep.
                std::thread::sleep(patience(Duration::from_millis(5)));
                run_to_halt(&mut vcpu)?;
                rig.guest.reload(vcpu.fd(), 0, &program)?;
                let told = device.wait(|told| rung(told, 0x20).0 == round)?;
                assert_eq!(told.len() as u64, round);
                assert_eq!(told.last(), Some(&ring(1, 0x20, 0xfeed_0001, 1)));
            }
            let counters = rig.vm.program_counters().context("counters")?;
            // With the one KVM signals, with the other the program wakes a task that has gone to
            // sleep in time.
            let wakeups = if sink == Sink::Coalesced {
                1..=10
            } else {
                0..=0
            };
            assert_eq!(counters.matched, 10);
            assert!(wakeups.contains(&counters.wakeups), "{counters:?}");
            assert_eq!((counters.lost, vcpu.stats().exits), (0, 0));
            rig.vm.remove(&region)?;
            let stats = task.finish()?;
            assert_eq!((stats.commands, stats.doorbells, stats.lost), (0, 10, 0));
            assert!(stats.wakeups >= *wakeups.start(), "{stats:?}");
        }
    }
    Ok(())
}

#[test]
fn a_partial_mask_matches_with_any_sink_and_misses_are_commands() -> Result<()> {
    for kind in hooked()? {
        for (bus, sink) in BUSES.into_iter().flat_map(|bus| SINKS.map(|s| (bus, s))) {
            println!("{kind:?} {bus:?} {sink:?}");
            let rig = Rig::new()?;
            let bell = |value| {
                let bell = Doorbell::new(0x10, Size::B4).sink(sink);
                bell.matching_masked(0xff, value)
            };
            let region = region(bus).doorbell(bell(0x42)).doorbell(bell(0x43));
            let device = Recorder::default();
            let _task = rig.serve(kind, &region, device.clone())?;
            let mut program = Program::new();
            let values = [0x142, 0x241, 0x343, 0, 0x542];
            for value in values {
                program.write(bus, region.base + 0x10, 4, value);
                program.read(bus, region.base, 4);
            }
            let (_, vcpu) = rig.run(&program)?;
            let told = device.told();
            let writes: Vec<_> = told
                .into_iter()
                .filter(|told| !matches!(told, Told::Read(..)))
                .collect();
            let access = Access {
                user_data: 0,
                offset: 0x10,
                size: Size::B4,
            };
            let expected = [
                ring(0, 0x10, 0x142, 1),
                Told::Write(access, 0x241),
                ring(1, 0x10, 0x343, 1),
                Told::Write(access, 0),
                ring(0, 0x10, 0x542, 1),
            ];
            assert_eq!(writes, expected);
            assert_eq!(vcpu.stats().exits, 0);
        }
    }
    Ok(())
}

#[test]
fn queued_doorbells_are_commands_in_their_order() -> Result<()> {
    let count = amount("writes", 2000, 200);
    for kind in hooked()? {
        for (bus, posted) in BUSES
            .into_iter()
            .flat_map(|bus| [(bus, false), (bus, true)])
        {
            println!("{kind:?} {bus:?} posted {posted}");
            let rig = Rig::new()?;
            let mut region =
                region(bus).doorbell(Doorbell::new(0x10, Size::B4).delivery(Delivery::Fifo));
            region.posted_writes = posted;
            let device = Recorder::default();
            let task = rig
                .serve(kind, &region, device.clone())?
                .context("a task")?;
            let mut program = Program::new();
            let base = region.base;
            program.repeat(count, |p| {
                p.write_counter(bus, base + 0x10, 4, 1, 1);
                p.write_counter(bus, base + 0x20, 4, 1, 1);
            });
            program.read(bus, base, 4);
            let (_, vcpu) = rig.run(&program)?;
            let access = Access {
                user_data: 0,
                offset: 0x20,
                size: Size::B4,
            };
            let mut told = device.told();
            assert!(matches!(told.pop(), Some(Told::Read(..))));
            let expected =
                (1..=u64::from(count)).flat_map(|n| [ring(0, 0x10, n, 1), Told::Write(access, n)]);
            assert!(told.into_iter().eq(expected));
            assert_eq!(vcpu.stats().exits, 0);
            rig.vm.remove(&region)?;
            let stats = task.finish()?;
            assert_eq!(stats.commands, 2 * u64::from(count) + 1);
            let responses = if posted { 1 } else { stats.commands };
            assert_eq!(stats.responses, responses);
        }
    }
    Ok(())
}

#[test]
fn what_is_captured_never_overtakes_an_ordinary_write_even_if_posted() -> Result<()> {
    const ROUNDS: u32 = 300;
    for kind in hooked()? {
        for sink in SINKS {
            println!("{kind:?} {sink:?}");
            let rig = Rig::new()?;
            let region = region(Bus::Mmio)
                .posted_writes()
                .doorbell(Doorbell::new(0x10, Size::B4).sink(sink));
            let device = Recorder::default();
            let _task = rig.serve(kind, &region, device.clone())?;
            let mut program = Program::new();
            program.repeat(ROUNDS, |p| {
                p.write_counter(Bus::Mmio, MMIO_BASE + 0x20, 4, 1, 1);
                p.write_counter(Bus::Mmio, MMIO_BASE + 0x10, 4, 1, 1);
            });
            program.read(Bus::Mmio, MMIO_BASE, 4);
            rig.run(&program)?;
            let (mut written, mut rung) = (0, 0);
            for told in device.told() {
                match told {
                    Told::Write(_, data) => {
                        assert_eq!(data, written + 1);
                        // The doorbells before it have been delivered.
                        assert_eq!(rung, written);
                        written = data;
                    }
                    Told::Ring(ring) => {
                        rung += ring.writes;
                        assert!(rung <= written, "{ring:?} came before the write before it");
                    }
                    Told::Read(..) => {}
                }
            }
            assert_eq!((written, rung), (ROUNDS.into(), ROUNDS.into()));
        }
    }
    Ok(())
}

#[test]
fn machines_and_forms_with_the_same_addresses_do_not_mix() -> Result<()> {
    const WRITES: u32 = 200;
    let Some(kind) = hooked()?.pop() else {
        return Ok(());
    };
    // Hooked, by tracepoints, hooked: all in one process, with one program.
    let forms = [kind, Kind::TRACEPOINTS, kind];
    let mut machines = Vec::new();
    for (n, form) in (1..).zip(forms) {
        let rig = Rig::new()?;
        let registers = rig.vm.registers(1)?;
        registers.store(0, n);
        let region = region(Bus::Mmio)
            .registers(&registers)
            .answered(Answered::new(0x10, Size::B4, 0))
            .doorbell(Doorbell::new(0x10, Size::B4))
            .doorbell(Doorbell::new(0x18, Size::B4).sink(Sink::Coalesced));
        // Right behind it, in the other form.
        let beside = Region::mmio(MMIO_BASE + 0x1000, 0x1000).doorbell(Doorbell::new(0, Size::B4));
        let other = if form == kind {
            Kind::TRACEPOINTS
        } else {
            kind
        };
        let devices = [(); 2].map(|()| Recorder::answering(move |_, _| n));
        let tasks = [
            rig.serve(form, &region, devices[0].clone())?,
            rig.serve(other, &beside, devices[1].clone())?,
        ];
        let mut program = Program::new();
        program.repeat(WRITES, |p| {
            for offset in [0x10, 0x18, 0x1000] {
                p.write_counter(Bus::Mmio, MMIO_BASE + offset, 4, n << 16, 1);
            }
            p.read(Bus::Mmio, MMIO_BASE + 0x10, 4);
        });
        let vcpu = rig.vcpu(0, &program)?;
        machines.push((n, rig, vcpu, devices, tasks));
    }
    std::thread::scope(|scope| {
        let runs: Vec<_> = machines
            .iter_mut()
            .map(|(_, _, vcpu, ..)| scope.spawn(|| run_to_halt(vcpu)))
            .collect();
        runs.into_iter()
            .try_for_each(|run| run.join().expect("a vCPU thread"))
    })?;
    for (n, rig, _, devices, _) in &machines {
        let last = (WRITES.into(), Some(n << 16 | u64::from(WRITES - 1)));
        devices[0].wait(|told| rung(told, 0x10) == last && rung(told, 0x18) == last)?;
        devices[1].wait(|told| rung(told, 0) == last)?;
        assert!(
            rig.guest.log(0)?.iter().all(|read| read == n),
            "machine {n}"
        );
        let counters = rig.vm.program_counters().context("counters")?;
        assert_eq!(
            (counters.matched, counters.lost),
            (3 * u64::from(WRITES), 0)
        );
    }
    // Nothing comes twice.
    std::thread::sleep(Duration::from_millis(20));
    for (_, _, _, devices, _) in &machines {
        let told = devices[0].told();
        let all = rung(&told, 0x10).0 + rung(&told, 0x18).0 + rung(&devices[1].told(), 0).0;
        assert_eq!(all, 3 * u64::from(WRITES));
    }
    Ok(())
}

/// What was seen of one vCPU's accesses, by offset.
#[derive(Default)]
struct Seen(BTreeMap<u64, u64>);

impl Seen {
    fn add(&mut self, offset: u64, times: u64) {
        *self.0.entry(offset).or_default() += times;
    }
}

#[test]
fn nothing_is_lost_while_the_program_comes_changes_and_goes() -> Result<()> {
    const AT: [u64; 4] = [0x10, 0x18, 0x20, 0x30];
    let rounds = amount("rounds", 3000, 300);
    for kind in hooked()? {
        println!("{kind:?}");
        let _watchdog = watchdog(format!("{kind:?}"), Duration::from_secs(120));
        let rig = Rig::new()?;
        let registers = rig.vm.registers(1)?;
        registers.store(0, 7);
        let bare = Region::mmio(MMIO_BASE, 0x1000);
        let full = bare
            .clone()
            .doorbell(Doorbell::new(AT[0], Size::B4))
            .doorbell(Doorbell::new(AT[1], Size::B4).sink(Sink::Coalesced))
            .doorbell(Doorbell::new(AT[2], Size::B4).delivery(Delivery::Fifo))
            .registers(&registers)
            .answered(Answered::new(0x40, Size::B4, 0));
        let mut program = Program::new();
        program.repeat(rounds, |p| {
            for offset in AT {
                p.write_counter(Bus::Mmio, MMIO_BASE + offset, 4, 0, 1);
            }
            p.read(Bus::Mmio, MMIO_BASE + 0x40, 4);
        });
        let mut vcpu = rig.vcpu(0, &program)?;
        let seen = Mutex::new(Seen::default());
        let done = AtomicBool::new(false);
        let mut over = Vec::new();
        std::thread::scope(|scope| -> Result<()> {
            let run = scope.spawn(|| {
                let ran = run_until_halt(&mut vcpu, |access| {
                    let mut seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
                    if access.write.is_some() {
                        seen.add(access.addr - MMIO_BASE, 1);
                    }
                });
                done.store(true, Ordering::SeqCst);
                ran
            });
            let mut changes = 0_u32;
            let mut is_assigned = false;
            while !done.load(Ordering::SeqCst) && changes < 400 {
                changes += 1;
                // Program and doorbells, and neither; now and then there is no region at all.
                let region = if changes.is_multiple_of(3) {
                    &bare
                } else {
                    &full
                };
                if is_assigned && changes.is_multiple_of(7) {
                    rig.vm.remove(region)?;
                    is_assigned = false;
                    continue;
                }
                let (channel, wire) = channel(&rig, kind)?;
                let mechanism = mechanism(kind, &channel)?;
                let assigned = if is_assigned {
                    rig.vm.modify(region, &*mechanism)?
                } else {
                    rig.vm.assign(region, &*mechanism)?
                };
                is_assigned = true;
                assert_eq!(assigned.via, Some(Via::Hook));
                let recorder = Recorder::answering(|_, _| 7);
                let end = assigned.attach(DeviceEnd::new(wire, Layout::default()));
                over.push((
                    Task::spawn(end, recorder.clone(), WaitPolicy::Sleep)?,
                    recorder,
                ));
            }
            run.join().expect("a vCPU thread")?;
            if is_assigned {
                rig.vm.remove(&full)?;
            }
            println!("{changes} changes, {} devices", over.len());
            Ok(())
        })?;
        let mut seen = seen.into_inner().unwrap_or_else(PoisonError::into_inner);
        for (task, recorder) in over {
            // It reads what is left, then finds its channel at an end.
            assert_eq!(task.join()?.lost, 0);
            for told in recorder.told() {
                match told {
                    Told::Write(access, _) => seen.add(access.offset, 1),
                    Told::Ring(ring) => seen.add(ring.offset, ring.writes),
                    Told::Read(..) => {}
                }
            }
        }
        for offset in AT {
            assert_eq!(seen.0.get(&offset), Some(&rounds.into()), "{offset:#x}");
        }
        // A read is answered by whoever has the region, or all-ones where nobody has it.
        let log = rig.guest.log(0)?;
        assert_eq!(log.len(), rounds as usize);
        assert!(log.iter().all(|read| [7, 0xffff_ffff].contains(read)));
        assert!(log.contains(&7));
        assert_eq!(rig.vm.program_counters().context("counters")?.lost, 0);
    }
    Ok(())
}

#[test]
fn auto_has_the_hook_for_answered_registers_where_there_is_one() -> Result<()> {
    let is_there = !hooked()?.is_empty();
    let rig = Rig::new()?;
    let registers = rig.vm.registers(1)?;
    let answered = region(Bus::Mmio)
        .registers(&registers)
        .answered(Answered::new(0, Size::B4, 0));
    let (channel, _wire) = Channel::pair(Transport::Stream)?;
    let assigned = rig.vm.assign(&answered, &Auto::new(&channel))?;
    println!(
        "{} {:?}: {}",
        assigned.mechanism, assigned.via, assigned.reason
    );
    if is_there {
        assert_eq!(
            (assigned.mechanism, assigned.via),
            (Ebpf::NAME, Some(Via::Hook))
        );
        assert!(
            assigned.reason.contains("KVM itself"),
            "{}",
            assigned.reason
        );
    } else if assigned.mechanism == Forward::NAME {
        assert_eq!(assigned.via, None);
    }
    rig.vm.remove(&answered)?;
    let bell = region(Bus::Mmio).doorbell(Doorbell::new(0x10, Size::B4));
    let assigned = rig.vm.assign(&bell, &Auto::new(&channel))?;
    let via = if is_there {
        Via::Hook
    } else {
        Via::Tracepoints
    };
    assert_eq!((assigned.mechanism, assigned.via), (Ebpf::NAME, Some(via)));
    rig.vm.remove(&bell)?;
    // On a channel that KVM cannot use.
    let (channel, _wire) = Channel::pair(Transport::Mailbox)?;
    let assigned = rig.vm.assign(&bell, &Ebpf::new(&channel))?;
    assert_eq!(assigned.via, Some(Via::Tracepoints));
    rig.vm.remove(&bell)?;
    let forced = rig.vm.assign(&bell, &Ebpf::new(&channel).via(Via::Hook));
    let errno = forced.map(drop).expect_err("KVM cannot use it").errno();
    assert_eq!(
        errno,
        if is_there {
            Errno::EBADF
        } else {
            Errno::EOPNOTSUPP
        }
    );
    Ok(())
}
