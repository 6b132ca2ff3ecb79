//! Device tasks in other processes, and what is left when a process is killed.

mod support;

use std::collections::BTreeSet;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result};
use ioregion_abi::wire::Layout;
use ioregion_conformance::pace::amount;
use ioregion_conformance::{Kind, Recorder, Rig, has_hook, kinds, mechanism};
use ioregion_dispatch::mechanism::Ebpf;
use ioregion_dispatch::server::{DeviceEnd, Stop, WaitPolicy, serve};
use ioregion_dispatch::{
    Bus, Channel, Delivery, Doorbell, Exit, Region, Sink, Size, Transport, Via, handoff,
};
use ioregion_microguest::{MMIO_BASE, Program};
use rand::{Rng as _, SeedableRng as _};

use support::{Runner, bpf, broken, channel_kinds, wait_until, watchdog};

fn region() -> Region {
    Region::mmio(MMIO_BASE, 0x1000)
        .user_data(7)
        .doorbell(Doorbell::new(0x10, Size::B4))
        .doorbell(Doorbell::new(0x18, Size::B4).sink(Sink::Coalesced))
        .doorbell(Doorbell::new(0x20, Size::B4).delivery(Delivery::Fifo))
}

/// A device process; killed and reaped when dropped.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Assigns the region (or modifies it) and has a new process serve it.
fn serve_in_process(rig: &Rig, kind: Kind, modify: bool) -> Result<(Arc<Channel>, Process)> {
    let (channel, wire) = ioregion_conformance::channel(rig, kind)?;
    let mechanism = mechanism(kind, &channel)?;
    let assigned = match modify {
        true => rig.vm.modify(&region(), &*mechanism)?,
        false => rig.vm.assign(&region(), &*mechanism)?,
    };
    let end = assigned.attach(DeviceEnd::new(wire, Layout::default()));
    let (ours, theirs) = UnixStream::pair()?;
    let child = Command::new(env!("CARGO_BIN_EXE_ioregion-device-task"))
        .stdin(OwnedFd::from(theirs))
        .stdout(Stdio::null())
        .spawn()
        .context("starting the device process")?;
    let process = Process(child);
    handoff::send(&ours, end)?;
    Ok((channel, process))
}

/// Writes registers, rings doorbells and reads what was written.
fn program(rounds: u32) -> Program {
    let mut program = Program::new();
    program.repeat(rounds, |p| {
        p.write_counter(Bus::Mmio, MMIO_BASE + 0x10, 4, 0, 1);
        p.write_counter(Bus::Mmio, MMIO_BASE + 0x18, 4, 0, 1);
        p.write_counter(Bus::Mmio, MMIO_BASE + 0x20, 4, 0, 1);
        p.write_counter(Bus::Mmio, MMIO_BASE + 0x30, 4, 0, 1);
        p.read(Bus::Mmio, MMIO_BASE + 0x30, 4);
        p.read(Bus::Mmio, MMIO_BASE + 0x20, 4);
    });
    program
}

fn descriptors(process: &str) -> Result<Vec<String>> {
    let mut targets = Vec::new();
    for entry in std::fs::read_dir(format!("/proc/{process}/fd"))? {
        // The descriptor of the listing itself is gone by now.
        if let Ok(target) = std::fs::read_link(entry?.path()) {
            targets.push(target.to_string_lossy().into_owned());
        }
    }
    targets.sort();
    Ok(targets)
}

#[test]
fn device_in_another_process_serves_and_holds_no_kvm_descriptor() -> Result<()> {
    const ROUNDS: u32 = 300;
    let bpf = bpf()?;
    for kind in channel_kinds() {
        let _watchdog = watchdog(format!("{kind:?}"), Duration::from_secs(60));
        let rig = Rig::with(Some(bpf.clone()))?;
        let (channel, mut process) = serve_in_process(&rig, kind, false)?;
        let (log, vcpu) = rig.run(&program(ROUNDS))?;
        let expected: Vec<_> = (0..u64::from(ROUNDS)).flat_map(|i| [i, i]).collect();
        assert_eq!(log, expected, "{kind:?}");
        let held = descriptors(&process.0.id().to_string())?;
        assert!(
            !held.iter().any(|target| target.contains("kvm")),
            "{kind:?}: {held:?}"
        );
        if kind.is_ebpf() {
            assert!(
                held.iter().any(|target| target.contains("bpf-map")),
                "{kind:?}: {held:?}"
            );
        }
        assert!(
            !held.iter().any(|target| target.contains("bpf-prog")),
            "{kind:?}: {held:?}"
        );
        drop(vcpu);
        rig.vm.remove(&region())?;
        drop(channel);
        assert!(
            process.0.wait()?.success(),
            "{kind:?}: the device ends with its channel"
        );
    }
    Ok(())
}

#[test]
fn killed_device_process_reads_all_ones_and_is_replaced() -> Result<()> {
    const ROUNDS: u32 = 400;
    let kills = amount("kills", 105, 21) as usize;
    let seed: u64 = rand::random();
    println!("seed {seed:#x}");
    let mut random = rand::rngs::StdRng::seed_from_u64(seed);
    let bpf = bpf()?;
    let kinds: Vec<_> = channel_kinds().collect();
    let mut hit = 0;
    for &kind in &kinds {
        let _watchdog = watchdog(format!("{kind:?}"), Duration::from_secs(100));
        let rig = Rig::with(Some(bpf.clone()))?;
        let (mut channel, mut process) = serve_in_process(&rig, kind, false)?;
        let mut vcpu = rig.vcpu(0, &program(ROUNDS))?;
        let start = std::time::Instant::now();
        assert_eq!(vcpu.run()?, Exit::Halt, "{kind:?}");
        let whole = start.elapsed();
        let mut held = None;
        for kill in 0..kills / kinds.len() {
            let what = format!("{kind:?}, kill {kill}");
            rig.guest.reload(vcpu.fd(), 0, &program(ROUNDS))?;
            let runner = Runner::new(vcpu);
            runner.start();
            std::thread::sleep(whole.mul_f64(random.random_range(0.0..1.0)));
            process.0.kill()?;
            process.0.wait()?;
            assert_eq!(runner.exit()?, Exit::Halt, "{what}");
            vcpu = runner.finish()?;
            let log = rig.guest.log(0)?;
            let dead = log
                .iter()
                .position(|value| *value == 0xffff_ffff)
                .unwrap_or(log.len());
            hit += usize::from(dead < log.len());
            let good: Vec<_> = (0..dead as u64).map(|i| i / 2).collect();
            assert_eq!(log[..dead], good, "{what}");
            assert!(
                log[dead..].iter().all(|value| *value == 0xffff_ffff),
                "{what}: {:x?}",
                &log[dead..]
            );
            // Whatever the kill hit: from now on every read returns all-ones.
            rig.guest.reload(vcpu.fd(), 0, &program(3))?;
            assert_eq!(vcpu.run()?, Exit::Halt, "{what}");
            assert_eq!(rig.guest.log(0)?, [0xffff_ffff; 6], "{what}");
            assert_eq!(channel.cause().is_some(), !kind.is_native(), "{what}");
            let mut told = broken(&rig.vm);
            // Where KVM has the region, another thread notices.
            wait_until("the report", || {
                told.extend(broken(&rig.vm));
                !told.is_empty()
            });
            assert_eq!(told.len(), 1, "{what}: {told:?}");

            (channel, process) = serve_in_process(&rig, kind, true)?;
            rig.guest.reload(vcpu.fd(), 0, &program(2))?;
            assert_eq!(vcpu.run()?, Exit::Halt, "{what}");
            assert_eq!(rig.guest.log(0)?, [0, 0, 1, 1], "{what}");
            let now = descriptors("self")?.len();
            assert_eq!(
                *held.get_or_insert(now),
                now,
                "{what}: {:?}",
                descriptors("self")?
            );
        }
        drop(channel);
    }
    println!("{hit} of {kills} kills hit the guest in the middle");
    assert!(hit > kills / 4);
    Ok(())
}

#[test]
fn no_descriptor_is_left_of_a_virtual_machine() -> Result<()> {
    let bpf = bpf()?;
    for kind in kinds() {
        let mut before = Vec::new();
        for round in 0..3 {
            let rig = Rig::with(Some(bpf.clone()))?;
            let task = rig.serve(kind, &region(), Recorder::default())?;
            drop(rig.run(&program(10))?);
            drop(rig);
            task.map(ioregion_conformance::Task::finish).transpose()?;
            // The draining task may be the last to let go of the VM, a moment later.
            std::thread::sleep(Duration::from_millis(100));
            // The first round may open what the process keeps for good.
            if round == 1 {
                before = descriptors("self")?;
            } else if round > 1 {
                wait_until("the end of all descriptors", || {
                    descriptors("self").is_ok_and(|now| now.len() <= before.len())
                });
            }
        }
    }
    Ok(())
}

/// Set where this test program runs itself to be killed.
const CHILD: &str = "IOREGION_TEST_CHILD";

/// The VMM that is killed: sends the device's end over its standard input, then runs for ever.
#[test]
fn child_runs_a_vmm() -> Result<()> {
    if std::env::var_os(CHILD).is_none() {
        return Ok(());
    }
    use std::os::fd::AsFd as _;
    let rig = Rig::new()?;
    let (channel, wire) = Channel::pair(Transport::Stream)?;
    let via = match std::env::var(CHILD)?.as_str() {
        "hook" => Via::Hook,
        _ => Via::Tracepoints,
    };
    let mechanism = Ebpf::new(&channel).via(via);
    let assigned = rig.vm.assign(&region(), &mechanism)?;
    let end = assigned.attach(DeviceEnd::new(wire, Layout::default()));
    let socket = UnixStream::from(std::io::stdin().as_fd().try_clone_to_owned()?);
    handoff::send(&socket, end)?;
    let mut endless = Program::new();
    endless.repeat(u32::MAX, |p| {
        p.write_counter(Bus::Mmio, MMIO_BASE + 0x10, 4, 0, 1);
        p.write_counter(Bus::Mmio, MMIO_BASE + 0x20, 4, 0, 1);
        p.write_counter(Bus::Mmio, MMIO_BASE + 0x30, 4, 0, 1);
    });
    let mut vcpu = rig.vcpu(0, &endless)?;
    loop {
        vcpu.run()?;
    }
}

/// Ids of one kind of BPF object that the descriptors of a process refer to.
fn bpf_ids(process: u32, what: &str) -> Result<BTreeSet<u32>> {
    let mut ids = BTreeSet::new();
    for entry in std::fs::read_dir(format!("/proc/{process}/fdinfo"))? {
        let info = std::fs::read_to_string(entry?.path()).unwrap_or_default();
        let id: Option<u32> = info.lines().find_map(|line| {
            line.strip_prefix(what)?
                .strip_prefix(':')?
                .trim()
                .parse()
                .ok()
        });
        ids.extend(id);
    }
    Ok(ids)
}

#[test]
fn killed_vmm_leaves_no_program_and_no_link_behind() -> Result<()> {
    let hook = if has_hook() { 5 } else { 0 };
    for (via, round) in (0..5)
        .map(|n| ("tracepoints", n))
        .chain((0..hook).map(|n| ("hook", n)))
    {
        let _watchdog = watchdog(format!("{via} {round}"), Duration::from_secs(60));
        let (ours, theirs) = UnixStream::pair()?;
        let child = Command::new(std::env::current_exe()?)
            .args(["--exact", "child_runs_a_vmm", "--nocapture"])
            .env(CHILD, via)
            .stdin(OwnedFd::from(theirs))
            .stdout(Stdio::null())
            .spawn()?;
        let mut child = Process(child);
        let end = handoff::recv(&ours)?;
        let recorder = Recorder::default();
        let mut device = recorder.clone();
        let stop = Stop::new()?;
        let task = std::thread::spawn(move || serve(end, &mut device, WaitPolicy::Sleep, &stop));
        wait_until("the guest", || recorder.told().len() > 1000);
        let vmm = child.0.id();
        let programs = bpf_ids(vmm, "prog_id")?;
        let links = bpf_ids(vmm, "link_id")?;
        let loaded = |ids: &BTreeSet<u32>| {
            let all = aya::programs::loaded_programs().filter_map(|info| Some(info.ok()?.id()));
            all.filter(|id| ids.contains(id)).count()
        };
        assert!(
            programs.len() >= 2 && loaded(&programs) >= 2,
            "{programs:?}"
        );
        let expected = if via == "hook" { 0 } else { 2 };
        assert_eq!(links.len(), expected, "{via}: {links:?}");

        child.0.kill()?;
        child.0.wait()?;
        wait_until("the end of the programs", || loaded(&programs) == 0);
        wait_until("the end of the links", || {
            let all = aya::programs::loaded_links().filter_map(|info| Some(info.ok()?.id()));
            all.filter(|id| links.contains(id)).count() == 0
        });
        // The device task finds the wire at its end.
        let stats = task
            .join()
            .map_err(|_| anyhow::anyhow!("the device panicked"))??;
        assert!(stats.doorbells > 0, "{stats:?}");
    }
    Ok(())
}
