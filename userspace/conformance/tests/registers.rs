//! Register files: answered by KVM where it can, by the device elsewhere; the guest sees the same.

use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context as _, Result};
use ioregion_abi::bpf::MAX_REGISTERS;
use ioregion_abi::wire::Layout;
use ioregion_conformance::{Kind, Recorder, Rig, Task, Told, channel, kinds, mechanism};
use ioregion_dispatch::mechanism::{Auto, Ebpf, Forward};
use ioregion_dispatch::server::{DeviceEnd, WaitPolicy};
use ioregion_dispatch::{
    Access, Answered, Bus, Channel, Device, Doorbell, Program as Bpf, Region, RegionErrorKind,
    RegisterFile, Ring, Size, Transport, Via, handoff,
};
use ioregion_microguest::{MMIO_BASE, Program};
use nix::errno::Errno;

/// Where the register stands that a write to 0x40 changes.
const ANSWERED: u64 = 0x20;

fn region(bus: Bus, registers: &RegisterFile) -> Region {
    let region = match bus {
        Bus::Mmio => Region::mmio(MMIO_BASE, 0x100).answered(Answered::new(0x28, Size::B8, 5)),
        Bus::Pio => Region::pio(0x400, 0x100),
    };
    region
        .user_data(3)
        .registers(registers)
        .answered(Answered::new(ANSWERED, Size::B4, 4))
        .answered(Answered::new(0x30, Size::B1, 5))
        .doorbell(Doorbell::new(0x50, Size::B4))
}

/// A device that keeps its registers in a file, as a device should: it does not know who reads it.
#[derive(Clone)]
struct Model {
    registers: RegisterFile,
    recorder: Recorder,
}

impl Device for Model {
    fn read(&mut self, access: Access) -> u64 {
        self.recorder.read(access);
        match access.offset {
            ANSWERED if access.size == Size::B4 => self.registers.load(4),
            0x28 if access.size == Size::B8 => self.registers.load(5),
            0x30 if access.size == Size::B1 => self.registers.load(5),
            _ => 0x1111,
        }
    }

    fn write(&mut self, access: Access, data: u64) {
        self.recorder.write(access, data);
        self.registers.store(4, data);
        self.registers.store(5, data << 32 | data ^ 0xff);
    }

    fn doorbell(&mut self, ring: Ring) {
        self.recorder.doorbell(ring);
    }
}

#[test]
fn an_answered_read_returns_what_the_device_stored_last() -> Result<()> {
    const ROUNDS: u64 = 50;
    for (kind, bus) in kinds().flat_map(|kind| [(kind, Bus::Mmio), (kind, Bus::Pio)]) {
        println!("{kind:?} {bus:?}");
        let rig = Rig::new()?;
        let registers = rig.vm.registers(6)?;
        let region = region(bus, &registers);
        registers.store(4, 0x8000_0001);
        let recorder = Recorder::default();
        let device = Model {
            registers: registers.clone(),
            recorder: recorder.clone(),
        };
        let task = rig.serve(kind, &region, device)?;
        let mut program = Program::new();
        program.read(bus, region.base + ANSWERED, 4);
        let mut expected = vec![0x8000_0001];
        for n in 1..=ROUNDS {
            // The write waits, so the device has stored the new values when it returns.
            program.write(bus, region.base + 0x40, 4, n);
            program.read(bus, region.base + ANSWERED, 4);
            program.read(bus, region.base + 0x30, 1);
            expected.extend([n, n ^ 0xff]);
            if bus == Bus::Mmio {
                program.read(bus, region.base + 0x28, 8);
                expected.push(n << 32 | n ^ 0xff);
            }
        }
        let (log, mut vcpu) = rig.run(&program)?;
        assert_eq!(log, expected);
        // Stored by somebody else meanwhile.
        registers.store(4, 0xffff_0000_0000_0042);
        let mut program = Program::new();
        program.read(bus, region.base + ANSWERED, 4);
        rig.guest.reload(vcpu.fd(), 0, &program)?;
        ioregion_conformance::run_to_halt(&mut vcpu)?;
        assert_eq!(rig.guest.log(0)?, [0x42]);
        let reads = recorder
            .told()
            .iter()
            .any(|told| matches!(told, Told::Read(..)));
        assert_eq!(reads, !kind.is_hooked(), "whether the device was asked");
        if kind.is_hooked() {
            // No exit, no command.
            assert_eq!(vcpu.stats().exits, 0);
            rig.vm.remove(&region)?;
            let stats = task.context("a task")?.finish()?;
            assert_eq!((stats.commands, stats.lost), (ROUNDS, 0));
        }
    }
    Ok(())
}

#[test]
fn other_sizes_and_offsets_go_to_the_device() -> Result<()> {
    for kind in kinds() {
        println!("{kind:?}");
        let rig = Rig::new()?;
        let registers = rig.vm.registers(6)?;
        let region = region(Bus::Mmio, &registers);
        let recorder = Recorder::answering(|_, access| 0x40 + access.offset);
        let _task = rig.serve(kind, &region, recorder.clone())?;
        let others = [
            (ANSWERED, Size::B1),
            (ANSWERED, Size::B2),
            (ANSWERED, Size::B8),
            (ANSWERED + 1, Size::B1),
            (ANSWERED + 4, Size::B4),
            (ANSWERED - 4, Size::B4),
            (0x28, Size::B4),
            (0x2c, Size::B4),
            // A doorbell is not read.
            (0x50, Size::B4),
        ];
        let mut program = Program::new();
        for (offset, size) in others {
            program.read(Bus::Mmio, MMIO_BASE + offset, size.bytes());
        }
        let (log, _vcpu) = rig.run(&program)?;
        let told = others.map(|(offset, size)| {
            let access = Access {
                user_data: 3,
                offset,
                size,
            };
            Told::Read(access, 0x40 + offset)
        });
        assert_eq!(recorder.told(), told);
        assert_eq!(log, others.map(|(offset, _)| 0x40 + offset));
    }
    Ok(())
}

#[test]
fn a_register_and_a_doorbell_at_one_address_are_two_things() -> Result<()> {
    for kind in kinds().filter(|kind| kind.is_ebpf()) {
        println!("{kind:?}");
        let rig = Rig::new()?;
        let registers = rig.vm.registers(1)?;
        registers.store(0, 9);
        let region = Region::mmio(MMIO_BASE, 0x100)
            .registers(&registers)
            .answered(Answered::new(0x50, Size::B4, 0))
            .doorbell(
                Doorbell::new(0x50, Size::B4)
                    .matching_masked(0xf, 1)
                    .sink(ioregion_dispatch::Sink::Coalesced),
            );
        let recorder = Recorder::answering(|_, _| 9);
        let _task = rig.serve(kind, &region, recorder.clone())?;
        let mut program = Program::new();
        for value in [0x11, 0x22] {
            program.write(Bus::Mmio, MMIO_BASE + 0x50, 4, value);
            program.read(Bus::Mmio, MMIO_BASE + 0x50, 4);
        }
        let (log, _vcpu) = rig.run(&program)?;
        assert_eq!(log, [9, 9]);
        let both = |told: &[Told]| {
            let rang = |told: &Told| matches!(told, Told::Ring(ring) if ring.value == Some(0x11));
            told.iter().any(rang) && told.iter().any(|told| matches!(told, Told::Write(_, 0x22)))
        };
        recorder.wait(both)?;
    }
    Ok(())
}

#[test]
fn a_device_process_gets_its_file_with_its_end() -> Result<()> {
    for kind in kinds().filter(|kind| kind.name != "kvm-run") {
        println!("{kind:?}");
        let rig = Rig::new()?;
        let registers = rig.vm.registers(6)?;
        let region = region(Bus::Mmio, &registers);
        let (channel, wire) = channel(&rig, kind)?;
        let assigned = rig.vm.assign(&region, &*mechanism(kind, &channel)?)?;
        let end = assigned.attach(DeviceEnd::new(wire, Layout::default()));
        assert_eq!(end.registers(3), Some(registers.clone()));
        let (here, there) = UnixStream::pair()?;
        handoff::send(&here, end)?;
        let end = handoff::recv(&there)?;
        assert_eq!(end.registers(4), None);
        let received = end.registers(3).context("a register file")?;
        assert_eq!(received.len(), 6);
        let device = Model {
            registers: received.clone(),
            recorder: Recorder::default(),
        };
        let _task = Task::spawn(end, device, WaitPolicy::Sleep)?;
        received.store(4, 0xabc);
        let mut program = Program::new();
        program.read(Bus::Mmio, MMIO_BASE + ANSWERED, 4);
        program.write(Bus::Mmio, MMIO_BASE + 0x40, 4, 0xdef);
        program.read(Bus::Mmio, MMIO_BASE + ANSWERED, 4);
        let (log, _vcpu) = rig.run(&program)?;
        assert_eq!(log, [0xabc, 0xdef]);
        assert_eq!(registers.load(4), 0xdef);
    }
    Ok(())
}

#[test]
fn a_file_that_kvm_cannot_read_is_refused_where_it_would_have_to() -> Result<()> {
    for kind in kinds().filter(|kind| kind.name != "kvm-run") {
        println!("{kind:?}");
        let rig = Rig::new()?;
        // Of a VM without a program, so in plain memory.
        let registers = Rig::with(None)?.vm.registers(6)?;
        let region = region(Bus::Mmio, &registers);
        let (channel, wire) = channel(&rig, kind)?;
        if kind.is_hooked() {
            let forced = Ebpf::new(&channel).via(Via::Hook);
            let error = rig.vm.assign(&region, &forced).expect_err("a forced hook");
            assert!(error.to_string().contains("Vm::registers"), "{error}");
            assert_eq!(error.errno(), Errno::EINVAL);
            assert!(matches!(error.kind, RegionErrorKind::RegisterFileKind));
            // Nothing is left of it, and KVM has not had the channel.
            let forward = Forward::new(&channel);
            if kind.transport == Transport::Stream {
                let _ = rig.vm.assign(&region, &forward)?;
                rig.vm.remove(&region)?;
            }
            let registers = rig.vm.registers(6)?;
            let readable = self::region(Bus::Mmio, &registers);
            let _ = rig.vm.assign(&readable, &forced)?;
            rig.vm.remove(&readable)?;
            drop(wire);
            if kind.transport == Transport::Ioregionfd {
                // Good for KVM only.
                continue;
            }
        }
        // Whoever is not asked for the hook does without, and says why.
        let device = Recorder::answering(|_, _| 0x77);
        let (channel, wire) = self::channel(&rig, kind)?;
        let assigned = rig.vm.assign(&region, &*mechanism(kind, &channel)?)?;
        if kind.is_ebpf() {
            assert_eq!(assigned.via, Some(Via::Tracepoints));
        }
        if kind.is_hooked() {
            let reason = &assigned.reason;
            assert!(reason.contains("Vm::registers"), "{reason}");
        }
        let end = assigned.attach(DeviceEnd::new(wire, Layout::default()));
        let _task = Task::spawn(end, device, WaitPolicy::Sleep)?;
        let mut program = Program::new();
        program.read(Bus::Mmio, MMIO_BASE + ANSWERED, 4);
        assert_eq!(rig.run(&program)?.0, [0x77]);
    }
    Ok(())
}

#[test]
fn auto_carries_a_region_whose_file_kvm_cannot_read() -> Result<()> {
    let rig = Rig::new()?;
    let registers = Rig::with(None)?.vm.registers(6)?;
    let region = region(Bus::Mmio, &registers);
    let (channel, wire) = Channel::pair(Transport::Stream)?;
    let assigned = rig.vm.assign(&region, &Auto::new(&channel))?;
    assert_ne!(assigned.via, Some(Via::Hook));
    let end = assigned.attach(DeviceEnd::new(wire, Layout::default()));
    let device = Recorder::answering(|_, _| 0x77);
    let _task = Task::spawn(end, device, WaitPolicy::Sleep)?;
    let mut program = Program::new();
    program.read(Bus::Mmio, MMIO_BASE + ANSWERED, 4);
    assert_eq!(rig.run(&program)?.0, [0x77]);
    Ok(())
}

fn through_a_loader(path: &Path) -> Result<Arc<Bpf>> {
    let listener = UnixListener::bind(path)?;
    let object = std::fs::read(Bpf::find()?)?;
    std::thread::spawn(move || {
        let (client, _) = listener.accept().expect("a client");
        let served = ioregion_dispatch::ebpf::serve_vmm(&client, &object);
        served.expect("a client that keeps to the protocol");
    });
    Ok(Bpf::connect(path)?)
}

#[test]
fn a_loader_bounds_the_files_of_a_vmm() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let rig = Rig::with(Some(through_a_loader(&dir.path().join("loader"))?))?;
    for len in [0, MAX_REGISTERS + 1] {
        let error = rig.vm.registers(len).expect_err("a bad length");
        assert_eq!(error.kind(), std::io::ErrorKind::InvalidInput);
    }
    let mut files = Vec::new();
    let full = loop {
        match rig.vm.registers(MAX_REGISTERS) {
            Ok(file) => files.push(file),
            Err(error) => break error,
        }
        assert!(files.len() < 1000, "there is no bound");
    };
    assert_eq!(full.raw_os_error(), Some(libc::ENOSPC));
    // It serves on, and the files are there.
    for (n, file) in (1..).zip(&files) {
        file.store(MAX_REGISTERS - 1, n);
    }
    for (n, file) in (1..).zip(&files) {
        assert_eq!((file.load(0), file.load(MAX_REGISTERS - 1)), (0, n));
    }
    let device = Recorder::default();
    let bell = Region::mmio(MMIO_BASE, 0x100).doorbell(Doorbell::new(0x50, Size::B4));
    let _task = rig.serve(Kind::EBPF, &bell, device.clone())?;
    let mut program = Program::new();
    program.write(Bus::Mmio, MMIO_BASE + 0x50, 4, 5);
    rig.run(&program)?;
    device.wait(|told| told.len() == 1)?;
    Ok(())
}
