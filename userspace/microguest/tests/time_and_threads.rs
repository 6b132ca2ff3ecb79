//! Timed sections, and vCPUs that wait for each other and for the host.

mod common;

use std::sync::atomic::Ordering::SeqCst;
use std::thread;

use common::run;
use ioregion_microguest::Bus::Mmio;
use ioregion_microguest::{DEFAULT_RAM, MMIO_BASE, MicroVm, Program, TscClock};
use kvm_ioctls::VcpuExit;

fn median(mut ticks: Vec<u32>) -> u32 {
    ticks.sort_unstable();
    ticks[ticks.len() / 2]
}

#[test]
fn store_to_ram_takes_less_time_than_an_exit() {
    const N: u32 = 500;
    let vm = MicroVm::new(DEFAULT_RAM).unwrap();
    let timed = |body: fn(&mut Program)| {
        let mut program = Program::new();
        program.repeat(N, |p| {
            p.timed(body);
        });
        program
    };
    let mut vcpu = vm.vcpu(0, &Program::new()).unwrap();
    let mut measure = |program: Program| {
        vm.reload(&vcpu, 0, &program).unwrap();
        run(&mut vcpu);
        let ticks = vm.timings(0).unwrap();
        assert_eq!(ticks.len(), N as usize);
        assert!(ticks.iter().all(|&t| t > 0));
        median(ticks)
    };
    let store = measure(timed(|p| {
        p.ram_store_counter(0, 0, 1);
    }));
    let exit = measure(timed(|p| {
        p.write_counter(Mmio, MMIO_BASE, 4, 0, 1);
    }));
    assert!(store < exit, "store {store}, exit {exit} ticks");
}

#[test]
fn nested_timed_sections_contain_each_other() {
    let vm = MicroVm::new(DEFAULT_RAM).unwrap();
    let mut program = Program::new();
    program.timed(|p| {
        p.timed(|p| {
            p.write(Mmio, MMIO_BASE, 4, 0);
        });
        p.timed(|p| {
            p.write(Mmio, MMIO_BASE, 4, 0);
        });
    });
    let mut vcpu = vm.vcpu(0, &program).unwrap();
    run(&mut vcpu);
    let ticks = vm.timings(0).unwrap();
    assert_eq!(ticks.len(), 3);
    assert!(ticks[2] > ticks[0] + ticks[1], "{ticks:?}");
}

#[test]
fn guest_time_stamps_lie_between_host_time_stamps() {
    let vm = MicroVm::new(DEFAULT_RAM).unwrap();
    let mut program = Program::new();
    program
        .write_tsc(Mmio, MMIO_BASE, 8)
        .write_tsc(Mmio, MMIO_BASE, 4);
    let mut vcpu = vm.vcpu(0, &program).unwrap();
    let clock = TscClock::of(&vcpu);
    assert!((100_000..10_000_000).contains(&clock.khz), "{clock:?}");
    assert!((clock.ns(u64::from(clock.khz)) - 1e6).abs() < 1e-3);
    // SAFETY: every x86-64 CPU has RDTSC.
    let now = || unsafe { std::arch::x86_64::_rdtsc() };
    let before = now();
    let exits = run(&mut vcpu);
    let after = now();
    let guest = u64::from_le_bytes(exits[0].data[..].try_into().unwrap());
    let low = u32::from_le_bytes(exits[1].data[..].try_into().unwrap());
    assert!(
        low.wrapping_sub(guest as u32) < clock.khz * 1000,
        "second stamp is not just later"
    );
    let host = clock.host_ticks(guest).expect("KVM tells the TSC offset");
    // Where the kernel has found the TSC unstable, KVM moves the guest's whenever a vCPU comes to a
    // CPU: then no offset holds for a run.
    let source = "/sys/devices/system/clocksource/clocksource0/current_clocksource";
    match std::fs::read_to_string(source).unwrap().trim() {
        "tsc" => assert!((before..after).contains(&host), "{before} {host} {after}"),
        other => println!("the kernel's clock is {other}, not the TSC: stamps are not compared"),
    }
}

#[test]
fn two_vcpus_and_the_host_hand_over_through_cells() {
    const N: u32 = 200;
    let vm = MicroVm::new(DEFAULT_RAM).unwrap();
    // vCPU 0 waits for 1, 2, … in cell 0 and answers in cell 1; vCPU 1 the other way round.
    let mut first = Program::new();
    first.ram_wait(9, 1).repeat(N, |p| {
        p.ram_store_counter(1, 1, 1).ram_wait_counter(0, 1, 1);
        p.write_counter(Mmio, MMIO_BASE, 4, 0, 1);
    });
    let mut second = Program::new();
    second.repeat(N, |p| {
        p.ram_wait_counter(1, 1, 1).ram_store_counter(0, 1, 1);
        p.write_counter(Mmio, MMIO_BASE, 4, 0, 1);
    });
    second.ram_store(2, 77);
    let mut vcpus = [vm.vcpu(0, &first).unwrap(), vm.vcpu(1, &second).unwrap()];
    thread::scope(|scope| {
        for vcpu in &mut vcpus {
            scope.spawn(move || {
                let exits = run(vcpu);
                for (i, exit) in exits.iter().enumerate() {
                    assert_eq!(exit.data, (i as u32).to_le_bytes());
                }
                assert_eq!(exits.len(), N as usize);
            });
        }
        vm.cell(9).unwrap().store(1, SeqCst);
    });
    assert_eq!(vm.cell(0).unwrap().load(SeqCst), N);
    assert_eq!(vm.cell(1).unwrap().load(SeqCst), N);
    assert_eq!(vm.cell(2).unwrap().load(SeqCst), 77);
}

#[test]
fn a_vcpu_that_outlives_its_vm_reaches_no_memory() {
    let vm = MicroVm::new(DEFAULT_RAM).unwrap();
    let mut program = Program::new();
    program.repeat(10, |p| {
        p.ram_store(0, 1);
    });
    let mut vcpu = vm.vcpu(0, &program).unwrap();
    drop(vm);
    assert!(!matches!(vcpu.run(), Ok(VcpuExit::Hlt)));
}
