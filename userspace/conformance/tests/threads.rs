//! Whose vCPU is it? The program knows vCPUs by their threads; machines never meet in it.

mod support;

use std::time::Duration;

use anyhow::{Result, ensure};
use ioregion_conformance::{Kind, Recorder, Rig, Told, maps, run_to_halt};
use ioregion_dispatch::{Bus, Ring, Sink, Transport, Vcpu};
use ioregion_microguest::{MMIO_BASE, MicroVm, Program};

use support::{region_with, rung, writes};

const SINKS: [Sink; 2] = [Sink::Ioeventfd, Sink::Coalesced];

#[test]
fn one_address_in_two_machines_rings_two_devices() -> Result<()> {
    for sink in SINKS {
        println!("{sink:?}");
        let rigs = [Rig::new()?, Rig::new()?];
        let devices = [Recorder::default(), Recorder::default()];
        let mut tasks = Vec::new();
        let mut vcpus = Vec::new();
        for (n, (rig, device)) in (1..).zip(rigs.iter().zip(&devices)) {
            tasks.push(rig.serve(Kind::EBPF, &region_with(sink), device.clone())?);
            let mut program = Program::new();
            program.repeat(100, |p| {
                p.write_counter(Bus::Mmio, MMIO_BASE + 0x10, 4, n << 16, 1);
            });
            vcpus.push((rig.vcpu(0, &program)?, rig, program));
        }
        // By turns on this thread, then at the same time on two.
        for (vcpu, ..) in &mut vcpus {
            run_to_halt(vcpu)?;
        }
        for (vcpu, rig, program) in &vcpus {
            rig.guest.reload(vcpu.fd(), 0, program)?;
        }
        std::thread::scope(|scope| {
            let runs: Vec<_> = vcpus
                .iter_mut()
                .map(|(vcpu, ..)| scope.spawn(|| run_to_halt(vcpu)))
                .collect();
            runs.into_iter()
                .try_for_each(|run| run.join().expect("a vCPU thread"))
        })?;
        for (n, device) in (1_u64..).zip(&devices) {
            let told = device.wait(|told| rung(told).0 >= 200)?;
            assert_eq!(rung(&told), (200, Some(n << 16 | 99)));
            for told in told {
                assert!(
                    matches!(told, Told::Ring(Ring { value: Some(value), .. }) if value >> 16 == n),
                    "{told:?}"
                );
            }
        }
    }
    Ok(())
}

#[test]
fn a_thread_that_goes_on_with_a_machine_without_program_rings_no_doorbell() -> Result<()> {
    let with = Rig::new()?;
    let without = Rig::with(None)?;
    let devices = [Recorder::default(), Recorder::default()];
    let _with = with.serve(
        Kind::EBPF,
        &region_with(Sink::Ioeventfd),
        devices[0].clone(),
    )?;
    let forward = Kind {
        name: "forward",
        transport: Transport::Stream,
    };
    let _without = without.serve(forward, &region_with(Sink::Ioeventfd), devices[1].clone())?;
    let (_, first) = with.run(&writes(3))?;
    let (_, second) = without.run(&writes(5))?;
    assert_eq!(rung(&devices[0].wait(|told| rung(told).0 >= 3)?).0, 3);
    assert_eq!(rung(&devices[1].wait(|told| rung(told).0 >= 5)?).0, 5);
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(
        rung(&devices[0].told()).0,
        3,
        "the other machine's writes rang here"
    );
    assert_eq!(with.vm.program_counters().unwrap_or_default().matched, 3);
    drop((first, second));
    Ok(())
}

/// A guest outside the library writes to the doorbell's address on the calling thread.
fn stranger_writes() -> Result<()> {
    let guest = MicroVm::new(ioregion_microguest::DEFAULT_RAM)?;
    let mut vcpu = guest.vcpu(0, &writes(1))?;
    let exit = vcpu.run()?;
    ensure!(
        matches!(exit, kvm_ioctls::VcpuExit::MmioWrite(..)),
        "{exit:?}"
    );
    Ok(())
}

#[test]
fn a_vcpu_that_moves_to_another_thread_keeps_capturing_there_only() -> Result<()> {
    let rig = Rig::new()?;
    let device = Recorder::default();
    let _task = rig.serve(Kind::EBPF, &region_with(Sink::Ioeventfd), device.clone())?;
    let mut vcpu = rig.vcpu(0, &writes(10))?;
    let again = |vcpu: &mut Vcpu| -> Result<u32> {
        run_to_halt(vcpu)?;
        rig.guest.reload(vcpu.fd(), 0, &writes(10))?;
        Ok(nix::unistd::gettid().as_raw().cast_unsigned())
    };
    let here = again(&mut vcpu)?;
    assert!(maps::registered_threads()?.contains(&here));
    let there = std::thread::scope(|scope| {
        scope
            .spawn(|| {
                let there = again(&mut vcpu)?;
                let registered = maps::registered_threads()?;
                assert!(registered.contains(&there) && !registered.contains(&here));
                anyhow::Ok(there)
            })
            .join()
            .expect("the second thread")
    })?;
    // This thread is nobody's now.
    stranger_writes()?;
    assert!(
        !maps::registered_threads()?.contains(&there),
        "its thread has ended"
    );
    // And back again.
    again(&mut vcpu)?;
    assert!(maps::registered_threads()?.contains(&here));
    let told = device.wait(|told| rung(told).0 >= 30)?;
    assert_eq!(rung(&told).0, 30);
    assert_eq!(
        (
            vcpu.stats().exits,
            rig.vm.program_counters().unwrap_or_default().matched
        ),
        (0, 30)
    );
    drop(vcpu);
    assert!(!maps::registered_threads()?.contains(&here));
    stranger_writes()?;
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(rung(&device.told()).0, 30);
    Ok(())
}

#[test]
fn a_thread_that_ended_leaves_no_key_for_the_next_one_with_its_number() -> Result<()> {
    let rig = Rig::new()?;
    let device = Recorder::default();
    let _task = rig.serve(Kind::EBPF, &region_with(Sink::Coalesced), device.clone())?;
    let mut vcpu = rig.vcpu(0, &writes(1))?;
    let before = maps::registered_threads()?;
    for _ in 0..50 {
        std::thread::scope(|scope| {
            scope
                .spawn(|| run_to_halt(&mut vcpu))
                .join()
                .expect("a thread")
        })?;
        rig.guest.reload(vcpu.fd(), 0, &writes(1))?;
        // `scope` waits for the closure; the thread's last acts may come a little later.
        for _ in 0..200 {
            if maps::registered_threads()? == before {
                break;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(maps::registered_threads()?, before);
    }
    std::thread::scope(|scope| scope.spawn(stranger_writes).join().expect("a thread"))?;
    assert_eq!(rung(&device.wait(|told| rung(told).0 >= 50)?).0, 50);
    Ok(())
}
