//! One vCPU's accesses to one region arrive in program order.

use anyhow::Result;
use ioregion_conformance::pace::amount;
use ioregion_conformance::{Recorder, Rig, Told, kinds};
use ioregion_dispatch::{Access, Bus, Delivery, Doorbell, Region, Ring, Sink, Size, Wake};
use ioregion_microguest::{MMIO_BASE, Program};

const PORT: u64 = 0x300;

fn place(bus: Bus) -> (u64, Region) {
    match bus {
        Bus::Mmio => (MMIO_BASE, Region::mmio(MMIO_BASE, 0x1000)),
        Bus::Pio => (PORT, Region::pio(PORT as u16, 0x100)),
    }
}

/// The deliveries and sinks that a doorbell can ask for.
fn flavours(offset: u64) -> [Doorbell; 6] {
    let doorbell = Doorbell::new(offset, Size::B4);
    [
        doorbell,
        doorbell.wake(Wake::Never),
        doorbell.sink(Sink::Coalesced),
        doorbell.sink(Sink::Coalesced).wake(Wake::Never),
        doorbell.sink(Sink::Coalesced).wake(Wake::Always),
        doorbell.delivery(Delivery::Fifo),
    ]
}

/// Writes and rings up to each read: number of writes, last value.
fn before_reads(told: &[Told]) -> Vec<(u64, Option<u64>)> {
    let (mut writes, mut last) = (0, None);
    let mut seen = Vec::new();
    for told in told {
        match *told {
            Told::Write(_, data) => (writes, last) = (writes + 1, Some(data)),
            Told::Ring(Ring {
                writes: more,
                value,
                ..
            }) => (writes, last) = (writes + more, value),
            Told::Read(..) => seen.push((writes, last)),
        }
    }
    seen
}

#[test]
fn read_after_posted_doorbell_observes_it() -> Result<()> {
    const ROUNDS: u32 = 50;
    for (kind, bus) in kinds().flat_map(|kind| [(kind, Bus::Mmio), (kind, Bus::Pio)]) {
        for doorbell in flavours(0x10) {
            println!("{kind:?} {bus:?} {doorbell:?}");
            let rig = Rig::new()?;
            let (base, region) = place(bus);
            let region = region.doorbell(doorbell);
            let device = Recorder::default();
            let task = rig.serve(kind, &region, device.clone())?;
            let mut program = Program::new();
            program.repeat(ROUNDS, |p| {
                p.write_counter(bus, base + 0x10, 4, 1, 1)
                    .read(bus, base, 4);
            });
            let (_, vcpu) = rig.run(&program)?;
            let valued = kind.carries_values() || doorbell.delivery == Delivery::Fifo;
            let expected: Vec<_> = (1..=u64::from(ROUNDS))
                .map(|n| (n, valued.then_some(n)))
                .collect();
            assert_eq!(before_reads(&device.told()), expected);
            let stays_inside = match kind.name {
                _ if kind.is_ebpf() => true,
                // An ioeventfd keeps no queue: the doorbell is forwarded.
                "ioeventfd" => doorbell.delivery == Delivery::Latest,
                _ => false,
            };
            let exits = u64::from(ROUNDS)
                * match (kind.is_native(), stays_inside) {
                    (true, _) => 0,
                    (false, true) => 1,
                    (false, false) => 2,
                };
            assert_eq!(vcpu.stats().exits, exits);
            rig.vm.remove(&region)?;
            if let Some(task) = task {
                assert_eq!(task.finish()?.lost, 0);
            }
        }
    }
    Ok(())
}

/// `rounds` times an ordinary write, two writes to the doorbell and another ordinary write; a
/// read every tenth time.
fn mixed(bus: Bus, base: u64, rounds: u64) -> (Program, Vec<Told>) {
    let mut program = Program::new();
    let mut expected = Vec::new();
    let access = |offset| Access {
        user_data: 0,
        offset,
        size: Size::B4,
    };
    for n in 0..rounds {
        for (offset, value) in [
            (0x20, 4 * n),
            (0x10, 4 * n + 1),
            (0x10, 4 * n + 2),
            (0x24, 4 * n + 3),
        ] {
            program.write(bus, base + offset, 4, value);
            expected.push(match offset {
                0x10 => Told::Ring(Ring {
                    user_data: 0,
                    index: 0,
                    offset,
                    size: Size::B4,
                    value: Some(value),
                    writes: 1,
                }),
                _ => Told::Write(access(offset), value),
            });
        }
        if n % 10 == 9 {
            program.read(bus, base, 4);
            expected.push(Told::Read(access(0), expected.len() as u64));
        }
    }
    (program, expected)
}

#[test]
fn everything_on_the_wire_arrives_in_program_order() -> Result<()> {
    let rounds = u64::from(amount("rounds", 200, 20));
    for (kind, bus) in kinds().flat_map(|kind| [(kind, Bus::Mmio), (kind, Bus::Pio)]) {
        for posted in [false, true] {
            println!("{kind:?} {bus:?} posted: {posted}");
            let rig = Rig::new()?;
            let (base, region) = place(bus);
            let mut region =
                region.doorbell(Doorbell::new(0x10, Size::B4).delivery(Delivery::Fifo));
            region.posted_writes = posted;
            let device = Recorder::default();
            let _task = rig.serve(kind, &region, device.clone())?;
            let (program, expected) = mixed(bus, base, rounds);
            let (log, _) = rig.run(&program)?;
            assert_eq!(device.told(), expected);
            assert_eq!(log.len() as u64, rounds / 10);
        }
    }
    Ok(())
}

#[test]
fn coalesced_doorbells_keep_their_count_and_their_place_before_what_waits() -> Result<()> {
    const ROUNDS: u64 = 100;
    for sink in [Sink::Ioeventfd, Sink::Coalesced] {
        for kind in kinds().filter(|kind| kind.has_sinks()) {
            println!("{kind:?} {sink:?}");
            let rig = Rig::new()?;
            let (base, region) = place(Bus::Mmio);
            let region = region.doorbell(Doorbell::new(0x10, Size::B4).sink(sink));
            let device = Recorder::default();
            let _task = rig.serve(kind, &region, device.clone())?;
            let (program, _) = mixed(Bus::Mmio, base, ROUNDS);
            rig.run(&program)?;
            // Each ordinary write waits, so exactly the doorbells before it have been delivered.
            let mut rung = 0;
            let mut round = 0;
            for told in device.told() {
                match told {
                    Told::Ring(ring) => {
                        rung += ring.writes;
                        let newest = 4 * (rung.div_ceil(2) - 1) + 2 - rung % 2;
                        // A value may be newer than the count says, never older.
                        assert!(
                            ring.value
                                .is_none_or(|value| value == newest || value == newest + 1)
                        );
                    }
                    Told::Write(Access { offset: 0x20, .. }, data) => {
                        assert_eq!((rung, data), (2 * round, 4 * round));
                    }
                    Told::Write(_, data) => {
                        round += 1;
                        assert_eq!((rung, data), (2 * round, 4 * round - 1));
                    }
                    Told::Read(..) => {}
                }
            }
            assert_eq!(round, ROUNDS);
        }
    }
    Ok(())
}

#[test]
fn two_regions_on_one_channel_keep_their_order() -> Result<()> {
    use ioregion_abi::wire::Layout;
    use ioregion_conformance::{Task, mechanism};
    use ioregion_dispatch::server::{DeviceEnd, WaitPolicy};
    for kind in kinds().filter(|kind| kind.name != "kvm-run") {
        println!("{kind:?}");
        let rig = Rig::new()?;
        let (channel, wire) = ioregion_conformance::channel(&rig, kind)?;
        let mut end = DeviceEnd::new(wire, Layout::default());
        let fifo = Doorbell::new(0x10, Size::B4).delivery(Delivery::Fifo);
        for n in 0..2 {
            let region = Region::mmio(MMIO_BASE + n * 0x1000, 0x1000)
                .user_data(n)
                .doorbell(fifo);
            end = rig
                .vm
                .assign(&region, &*mechanism(kind, &channel)?)?
                .attach(end);
        }
        let device = Recorder::default();
        let _task = Task::spawn(end, device.clone(), WaitPolicy::Sleep)?;
        let mut program = Program::new();
        program.repeat(100, |p| {
            for region in [0, 0x1000] {
                p.write_counter(Bus::Mmio, MMIO_BASE + region + 0x10, 4, 0, 1);
                p.write_counter(Bus::Mmio, MMIO_BASE + region + 0x20, 4, 0, 1);
            }
        });
        program.read(Bus::Mmio, MMIO_BASE, 4);
        rig.run(&program)?;
        for region in 0..2 {
            let values: Vec<_> = device
                .told()
                .into_iter()
                .filter_map(|told| match told {
                    Told::Ring(ring) if ring.user_data == region => ring.value,
                    Told::Write(access, data) if access.user_data == region => Some(data),
                    _ => None,
                })
                .collect();
            let expected: Vec<_> = (0..100).flat_map(|n| [n, n]).collect();
            assert_eq!(values, expected);
        }
    }
    Ok(())
}

#[test]
fn writes_that_wait_have_been_handled_when_the_guest_goes_on() -> Result<()> {
    // What one vCPU has written, another sees: the first signals through guest memory.
    for kind in kinds() {
        println!("{kind:?}");
        let rig = Rig::new()?;
        let (base, region) = place(Bus::Mmio);
        let device = Recorder::answering(|told, _| {
            told.iter()
                .rev()
                .find_map(|told| match told {
                    Told::Write(_, data) => Some(*data),
                    _ => None,
                })
                .unwrap_or(0)
        });
        let _task = rig.serve(kind, &region, device.clone())?;
        let (mut writer, mut reader) = (Program::new(), Program::new());
        writer.repeat(200, |p| {
            p.write_counter(Bus::Mmio, base, 4, 1, 1)
                .ram_store_counter(0, 1, 1)
                .ram_wait_counter(1, 1, 1);
        });
        reader.repeat(200, |p| {
            p.ram_wait_counter(0, 1, 1).read(Bus::Mmio, base, 4);
            p.ram_store_counter(1, 1, 1);
        });
        let mut vcpus = [rig.vcpu(0, &writer)?, rig.vcpu(1, &reader)?];
        std::thread::scope(|scope| {
            let runs = vcpus
                .each_mut()
                .map(|vcpu| scope.spawn(|| ioregion_conformance::run_to_halt(vcpu)));
            runs.into_iter()
                .try_for_each(|run| run.join().expect("a vCPU thread"))
        })?;
        assert_eq!(rig.guest.log(1)?, (1..=200).collect::<Vec<_>>());
    }
    Ok(())
}
