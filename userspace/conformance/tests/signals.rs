//! Signals and kicks: a vCPU that waits for a device can be interrupted at any time; nothing is
//! sent twice, nothing is lost, and a late response is never taken for another one.

mod support;

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Result, bail};
use ioregion_conformance::pace::amount;
use ioregion_conformance::{Kind, Recorder, Rig, Told, kinds};
use ioregion_dispatch::mechanism::Ioeventfd;
use ioregion_dispatch::{Access, Bus, Doorbell, Exit, Region, Ring, Size};
use ioregion_microguest::{MMIO_BASE, Program};
use nix::sys::signal::{SigSet, SigmaskHow, Signal, pthread_sigmask};

use support::{Gated, Runner, bpf, channel_kinds, handle_sigusr1, serve, wait_until, watchdog};

const READ: u64 = 0x20;
const WRITE: u64 = 0x30;

fn region() -> Region {
    Region::mmio(MMIO_BASE, 0x1000).user_data(7)
}

fn at(offset: u64, size: Size) -> Access {
    Access {
        user_data: 7,
        offset,
        size,
    }
}

/// Interrupts a read that the device is working on, and a write, by `interrupt`; both go on.
fn interrupted_access_resumes(
    prepare: fn(&Runner),
    interrupt: fn(&Runner) -> Result<Exit>,
) -> Result<()> {
    handle_sigusr1()?;
    let bpf = bpf()?;
    for kind in channel_kinds() {
        let _watchdog = watchdog(format!("{kind:?}"), Duration::from_secs(60));
        let rig = Rig::with(Some(bpf.clone()))?;
        for first in [READ, WRITE] {
            let device = Gated::default();
            let served = serve(&rig, kind, &region(), false, device.clone())?;
            let mut program = Program::new();
            match first {
                READ => _ = program.read(Bus::Mmio, MMIO_BASE + READ, 4),
                _ => _ = program.write(Bus::Mmio, MMIO_BASE + WRITE, 4, 5),
            }
            program.read(Bus::Mmio, MMIO_BASE + READ, 8);
            let index = u64::from(first == WRITE);
            let runner = Runner::new(rig.vcpu(index, &program)?);
            prepare(&runner);
            runner.start();
            device.gate.wait_for(1);
            for _ in 0..3 {
                assert_eq!(
                    runner.exit_within(Duration::from_millis(5))?,
                    None,
                    "{kind:?}"
                );
                assert_eq!(interrupt(&runner)?, Exit::Interrupted, "{kind:?}");
                consume_signal(&runner);
                runner.start();
            }
            assert_eq!(
                device.gate.arrived(),
                1,
                "{kind:?}: the command was repeated"
            );
            device.gate.open();
            assert_eq!(runner.exit()?, Exit::Halt, "{kind:?}");
            let vcpu = runner.finish()?;
            assert!(vcpu.stats().interruptions >= 3, "{kind:?}");
            let (told, log) = match first {
                READ => (Told::Read(at(READ, Size::B4), 0), vec![0, 1]),
                _ => (Told::Write(at(WRITE, Size::B4), 5), vec![1]),
            };
            let expected = [told, Told::Read(at(READ, Size::B8), 1)];
            assert_eq!(device.recorder.told(), expected, "{kind:?}");
            assert_eq!(rig.guest.log(index)?, log, "{kind:?}");
            rig.vm.remove(&region())?;
            let stats = served.task.finish()?;
            assert_eq!((stats.commands, stats.responses), (2, 2), "{kind:?}");
        }
    }
    Ok(())
}

fn kick(runner: &Runner) -> Result<Exit> {
    runner.kicker.kick(Signal::SIGUSR1);
    runner.exit()
}

/// Takes a signal that is still pending because the thread blocks it. When this returns it is
/// done: the next signal is not taken.
fn consume_signal(runner: &Runner) {
    let (done, is_done) = std::sync::mpsc::channel();
    runner.with(move |_| {
        let mut set = SigSet::empty();
        set.add(Signal::SIGUSR1);
        let none = libc::timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        // SAFETY: Set and time outlive the call; no information is asked for.
        unsafe { libc::sigtimedwait(set.as_ref(), std::ptr::null_mut(), &raw const none) };
        let _ = done.send(());
        Ok(())
    });
    let _ = is_done.recv();
}

/// SIGUSR1 blocked in the thread and not in the vCPU's mask, as VMMs do it.
fn mask(runner: &Runner) {
    runner.with(|vcpu| {
        let mut usr1 = SigSet::empty();
        usr1.add(Signal::SIGUSR1);
        let mut inside = SigSet::empty();
        pthread_sigmask(SigmaskHow::SIG_BLOCK, Some(&usr1), Some(&mut inside))?;
        inside.remove(Signal::SIGUSR1);
        Ok(vcpu.set_signal_mask(inside)?)
    });
}

#[test]
fn signal_during_a_wait_interrupts_and_the_next_run_resumes() -> Result<()> {
    interrupted_access_resumes(|_| (), Runner::signal_out)
}

#[test]
fn signal_by_the_vcpu_s_mask_interrupts_a_wait() -> Result<()> {
    let once = |runner: &Runner| {
        runner.signal();
        runner.exit()
    };
    interrupted_access_resumes(mask, once)
}

#[test]
fn kick_interrupts_a_wait() -> Result<()> {
    interrupted_access_resumes(|_| (), kick)
}

#[test]
fn kick_interrupts_a_wait_with_a_signal_mask() -> Result<()> {
    interrupted_access_resumes(mask, kick)
}

#[test]
fn signal_before_the_run_is_not_missed() -> Result<()> {
    handle_sigusr1()?;
    let bpf = bpf()?;
    for kind in kinds() {
        let rig = Rig::with(Some(bpf.clone()))?;
        let recorder = Recorder::default();
        let task = rig.serve(kind, &region(), recorder.clone())?;
        let mut program = Program::new();
        program.read(Bus::Mmio, MMIO_BASE + READ, 4);
        let runner = Runner::new(rig.vcpu(0, &program)?);
        mask(&runner);
        runner.with(|_| Ok(nix::sys::signal::raise(Signal::SIGUSR1)?));
        runner.start();
        assert_eq!(runner.exit()?, Exit::Interrupted, "{kind:?}");
        assert_eq!(recorder.told(), [], "{kind:?}");
        consume_signal(&runner);
        runner.start();
        assert_eq!(runner.exit()?, Exit::Halt, "{kind:?}");
        assert_eq!(recorder.told().len(), 1, "{kind:?}");
        runner.finish()?;
        task.map(ioregion_conformance::Task::finish).transpose()?;
    }
    Ok(())
}

#[test]
fn immediate_exit_returns_before_and_during_an_access() -> Result<()> {
    handle_sigusr1()?;
    let bpf = bpf()?;
    for kind in channel_kinds() {
        let rig = Rig::with(Some(bpf.clone()))?;
        let device = Gated::default();
        let served = serve(&rig, kind, &region(), false, device.clone())?;
        let mut program = Program::new();
        program.read(Bus::Mmio, MMIO_BASE + READ, 4);
        let runner = Runner::new(rig.vcpu(0, &program)?);
        let immediate = |value| {
            runner.with(move |vcpu| {
                vcpu.run_page().immediate_exit = value;
                Ok(())
            });
        };
        immediate(1);
        for _ in 0..3 {
            runner.start();
            assert_eq!(
                runner.exit()?,
                Exit::Interrupted,
                "{kind:?}: before the guest ran"
            );
        }
        assert_eq!(device.gate.arrived(), 0, "{kind:?}");
        immediate(0);
        runner.start();
        device.gate.wait_for(1);
        assert_eq!(runner.signal_out()?, Exit::Interrupted, "{kind:?}");
        immediate(1);
        for _ in 0..3 {
            runner.start();
            assert_eq!(runner.exit()?, Exit::Interrupted, "{kind:?}: in mid-access");
        }
        immediate(0);
        device.gate.open();
        runner.start();
        assert_eq!(runner.exit()?, Exit::Halt, "{kind:?}");
        runner.finish()?;
        assert_eq!(
            device.recorder.told(),
            [Told::Read(at(READ, Size::B4), 0)],
            "{kind:?}"
        );
        assert_eq!(served.task.finish()?.commands, 1, "{kind:?}");
    }
    Ok(())
}

#[test]
fn each_kick_is_noticed() -> Result<()> {
    handle_sigusr1()?;
    let rig = Rig::with(None)?;
    let mut program = Program::new();
    program.ram_wait(0, 1);
    let runner = Runner::new(rig.vcpu(0, &program)?);
    let _watchdog = watchdog("kicks", Duration::from_secs(60));
    let rounds = amount("kicks", 2000, 200);
    for round in 0..rounds {
        // Now before the vCPU enters, now while it is inside, now while it leaves.
        if round % 3 == 0 {
            runner.kicker.kick(Signal::SIGUSR1);
        }
        runner.start();
        if round % 3 != 0 {
            for _ in 0..round * (2000 / rounds) {
                std::hint::spin_loop();
            }
            runner.kicker.kick(Signal::SIGUSR1);
        }
        assert_eq!(runner.exit()?, Exit::Interrupted, "kick {round}");
    }
    // A kick is taken back: the guest goes on.
    rig.guest.cell(0)?.store(1, Ordering::SeqCst);
    runner.start();
    while runner.exit()? == Exit::Interrupted {
        runner.start();
    }
    runner.finish().map(drop)
}

#[test]
fn storm_of_signals_loses_doubles_and_reorders_nothing() -> Result<()> {
    let rounds = amount("rounds in the storm", 1500, 150);
    handle_sigusr1()?;
    let bpf = bpf()?;
    for kind in kinds() {
        let _watchdog = watchdog(format!("{kind:?}"), Duration::from_secs(100));
        let rig = Rig::with(Some(bpf.clone()))?;
        let recorder = Recorder::default();
        let region = region().doorbell(Doorbell::new(0x10, Size::B4));
        let task = rig.serve(kind, &region, recorder.clone())?;
        let mut program = Program::new();
        program.repeat(rounds, |p| {
            p.write_counter(Bus::Mmio, MMIO_BASE + 0x10, 4, 0, 1);
            p.read(Bus::Mmio, MMIO_BASE + READ, 4);
            p.write_counter(Bus::Mmio, MMIO_BASE + WRITE, 8, 0, 1);
        });
        let mut vcpu = rig.vcpu(0, &program)?;
        // SAFETY: No memory is involved.
        let thread = unsafe { libc::pthread_self() };
        let over = AtomicBool::new(false);
        let sent = std::thread::scope(|scope| -> Result<u64> {
            let storm = scope.spawn(|| {
                let mut sent = 0;
                while !over.load(Ordering::Relaxed) {
                    // SAFETY: The thread is the one that waits for this one.
                    unsafe { libc::pthread_kill(thread, libc::SIGUSR1) };
                    sent += 1;
                    // Some ten thousand a second. Without a pause a slow machine handles signals
                    // and does nothing else.
                    std::thread::sleep(Duration::from_micros(30));
                }
                sent
            });
            let ran = ioregion_conformance::run_to_halt(&mut vcpu);
            over.store(true, Ordering::Relaxed);
            ran?;
            storm
                .join()
                .map_err(|_| anyhow::anyhow!("the storm panicked"))
        })?;
        let mut expected = Vec::new();
        for i in 0..u64::from(rounds) {
            expected.push(Told::Ring(Ring {
                user_data: 7,
                index: 0,
                offset: 0x10,
                size: Size::B4,
                value: (kind.name != Ioeventfd::NAME).then_some(i),
                writes: 1,
            }));
            expected.push(Told::Read(at(READ, Size::B4), 3 * i + 1));
            expected.push(Told::Write(at(WRITE, Size::B8), i));
        }
        assert_told(kind, &recorder.told(), &expected);
        let log: Vec<_> = (0..u64::from(rounds)).map(|i| 3 * i + 1).collect();
        assert_eq!(rig.guest.log(0)?, log, "{kind:?}");
        let interruptions = vcpu.stats().interruptions;
        println!("{kind:?}: {sent} signals, {interruptions} interruptions");
        assert!(interruptions > 0, "{kind:?}: the storm never hit");
        drop(vcpu);
        task.map(ioregion_conformance::Task::finish).transpose()?;
    }
    Ok(())
}

fn assert_told(kind: Kind, told: &[Told], expected: &[Told]) {
    if told != expected {
        let at = told.iter().zip(expected).position(|(a, b)| a != b);
        let at = at.unwrap_or(told.len().min(expected.len()));
        panic!(
            "{kind:?}: {} told, {} expected; they differ from {at} on: {:?} instead of {:?}",
            told.len(),
            expected.len(),
            told.get(at..told.len().min(at + 4)),
            expected.get(at..expected.len().min(at + 4))
        );
    }
}

/// Two vCPUs on one channel, of which the first is stopped in the middle of a read.
fn first_of_two_stops(drop_it: bool, both_wait: bool) -> Result<()> {
    handle_sigusr1()?;
    let bpf = bpf()?;
    for kind in channel_kinds() {
        let what = format!("{kind:?}, dropped: {drop_it}, both wait: {both_wait}");
        let _watchdog = watchdog(what.clone(), Duration::from_secs(60));
        let rig = Rig::with(Some(bpf.clone()))?;
        let device = Gated {
            recorder: Recorder::answering(|_, access| 0x100 + access.offset),
            ..Gated::default()
        };
        let served = serve(&rig, kind, &region(), false, device.clone())?;
        let mut programs = [Program::new(), Program::new()];
        programs[0].read(Bus::Mmio, MMIO_BASE + 0x40, 4);
        for offset in [0x50, 0x58, 0x60] {
            programs[1].read(Bus::Mmio, MMIO_BASE + offset, 4);
        }
        let first = Runner::new(rig.vcpu(0, &programs[0])?);
        let second = Runner::new(rig.vcpu(1, &programs[1])?);
        first.start();
        device.gate.wait_for(1);
        if both_wait {
            second.start();
            assert_eq!(
                second.exit_within(Duration::from_millis(20))?,
                None,
                "{what}"
            );
        }
        assert_eq!(first.signal_out()?, Exit::Interrupted, "{what}");
        let kept = first.finish()?;
        let kept = (!drop_it).then_some(kept);
        if !both_wait {
            second.start();
            assert_eq!(
                second.exit_within(Duration::from_millis(20))?,
                None,
                "{what}"
            );
        }
        device.gate.open();
        assert_eq!(second.exit()?, Exit::Halt, "{what}");
        second.finish()?;
        assert_eq!(rig.guest.log(1)?, [0x150, 0x158, 0x160], "{what}");
        if let Some(mut vcpu) = kept {
            assert_eq!(vcpu.run()?, Exit::Halt, "{what}");
            assert_eq!(rig.guest.log(0)?, [0x140], "{what}");
        }
        let Told::Read(read, _) = device.recorder.told()[0] else {
            bail!("{what}: no read")
        };
        assert_eq!(read, at(0x40, Size::B4), "{what}");
        assert_eq!(device.recorder.told().len(), 4, "{what}");
        wait_until("the channel", || served.channel.cause().is_none());
        served.task.finish()?;
    }
    Ok(())
}

#[test]
fn late_response_of_a_dropped_vcpu_is_never_taken_for_the_next_one() -> Result<()> {
    first_of_two_stops(true, false)?;
    first_of_two_stops(true, true)
}

#[test]
fn vcpu_stopped_in_mid_access_does_not_block_another() -> Result<()> {
    first_of_two_stops(false, false)?;
    first_of_two_stops(false, true)
}
