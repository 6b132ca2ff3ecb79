//! Every size of access, on both buses, reaches the device with the same bytes.

use anyhow::{Result, bail};
use ioregion_conformance::{Kind, Recorder, Rig, Told, kinds, run_to_halt};
use ioregion_dispatch::{Access, Bus, BusAccess, Doorbell, Exit, Region, Ring, Size};
use ioregion_microguest::{MMIO_BASE, Program};

const PORT: u64 = 0x300;
const PATTERN: u64 = 0xfedc_ba98_7654_3211;
const USER_DATA: u64 = 7;

/// A region of two pages, or of 256 ports.
fn region(bus: Bus) -> Region {
    let region = match bus {
        Bus::Mmio => Region::mmio(MMIO_BASE, 0x2000),
        Bus::Pio => Region::pio(PORT as u16, 0x100),
    };
    region.user_data(USER_DATA)
}

fn sizes(bus: Bus) -> &'static [Size] {
    match bus {
        Bus::Mmio => &Size::ALL,
        Bus::Pio => &Size::ALL[..3],
    }
}

fn access(offset: u64, size: Size) -> Access {
    Access {
        user_data: USER_DATA,
        offset,
        size,
    }
}

fn write(offset: u64, size: Size, data: u64) -> Told {
    Told::Write(access(offset, size), data & size.mask())
}

/// A device whose bytes are all different, so that an access cut in pieces reads as a whole one.
fn registers() -> Recorder {
    Recorder::answering(|_, access| bytes_at(access.offset, 8))
}

fn bytes_at(offset: u64, bytes: u64) -> u64 {
    let byte = |at: u64| (at * 7 + (at >> 8)) & 0xff;
    (0..bytes).fold(0, |value, n| value | byte(offset + n) << (8 * n))
}

fn reads(told: &[Told]) -> Vec<(u64, u8)> {
    let read = |told: &Told| match told {
        Told::Read(access, _) => Some((access.offset, access.size.bytes())),
        _ => None,
    };
    told.iter().filter_map(read).collect()
}

/// Runs `program` against a device of registers, by each mechanism.
fn against_all(bus: Bus, program: &Program, check: impl Fn(&[Told], &[u64])) -> Result<()> {
    for kind in kinds() {
        println!("{kind:?} {bus:?}");
        let rig = Rig::new()?;
        let device = registers();
        let task = rig.serve(kind, &region(bus), device.clone())?;
        let (log, vcpu) = rig.run(program)?;
        check(&device.told(), &log);
        assert_eq!(vcpu.stats().already_captured, 0);
        rig.vm.remove(&region(bus))?;
        if let Some(task) = task {
            let stats = task.finish()?;
            assert_eq!(stats.commands, device.told().len() as u64);
        }
    }
    Ok(())
}

#[test]
fn each_size_is_written_and_read_with_its_exact_value() -> Result<()> {
    for (bus, base) in [(Bus::Mmio, MMIO_BASE), (Bus::Pio, PORT)] {
        let mut program = Program::new();
        let (mut told, mut log) = (Vec::new(), Vec::new());
        for (at, &size) in (0..).zip(sizes(bus)) {
            let offset = 0x10 * at;
            program.write(bus, base + offset, size.bytes(), PATTERN);
            program.read(bus, base + offset, size.bytes());
            told.push(write(offset, size, PATTERN));
            log.push(bytes_at(offset, size.bytes().into()));
        }
        against_all(bus, &program, |seen, values| {
            let writes: Vec<_> = seen
                .iter()
                .copied()
                .filter(|told| matches!(told, Told::Write(..)))
                .collect();
            assert_eq!(writes, told);
            assert_eq!(values, log);
            let expected: Vec<_> = (0..)
                .zip(sizes(bus))
                .map(|(at, size)| (0x10 * at, size.bytes()))
                .collect();
            assert_eq!(reads(seen), expected);
        })?;
    }
    Ok(())
}

#[test]
fn unaligned_accesses_arrive_whole() -> Result<()> {
    for (bus, base) in [(Bus::Mmio, MMIO_BASE), (Bus::Pio, PORT)] {
        let mut program = Program::new();
        let (mut told, mut log) = (Vec::new(), Vec::new());
        for (offset, &size) in [(0x11, &Size::B1)]
            .into_iter()
            .chain([0x21, 0x33, 0x45].into_iter().zip(&sizes(bus)[1..]))
        {
            program.write(bus, base + offset, size.bytes(), PATTERN);
            program.read(bus, base + offset, size.bytes());
            told.push(write(offset, size, PATTERN));
            log.push(bytes_at(offset, size.bytes().into()));
        }
        against_all(bus, &program, |seen, values| {
            let writes: Vec<_> = seen
                .iter()
                .copied()
                .filter(|told| matches!(told, Told::Write(..)))
                .collect();
            assert_eq!(writes, told);
            assert_eq!(values, log);
        })?;
    }
    Ok(())
}

#[test]
fn elements_of_string_accesses_arrive_in_order() -> Result<()> {
    let bus = Bus::Pio;
    let values: Vec<u32> = (0..300)
        .map(|n| 0x8123_4500_u32.wrapping_add(0x0101_0101_u32.wrapping_mul(n)))
        .collect();
    let mut program = Program::new();
    let mut told = Vec::new();
    for (offset, size) in [(0, Size::B1), (8, Size::B2), (16, Size::B4)] {
        program.out_string(PORT + offset, size.bytes(), &values);
        told.extend(
            values
                .iter()
                .map(|&value| write(offset, size, value.into())),
        );
    }
    let inputs = [(0, 1, 5), (8, 2, 300), (16, 4, 2000)];
    for (offset, size, count) in inputs {
        program.in_string(PORT + offset, size, count);
    }
    for kind in kinds() {
        println!("{kind:?}");
        let rig = Rig::new()?;
        let device = Recorder::default();
        let _task = rig.serve(kind, &region(bus), device.clone())?;
        let (log, _) = rig.run(&program)?;
        let seen = device.told();
        assert_eq!(seen[..told.len()], told);
        // KVM may read ahead, but gives out no element twice and skips none.
        let answers = seen[told.len()..].iter().map(|told| match told {
            Told::Read(access, answer) => (access.offset, answer & access.size.mask()),
            other => panic!("{other:?}"),
        });
        let expected = inputs
            .iter()
            .flat_map(|&(offset, _, count)| std::iter::repeat_n(offset, count as usize));
        assert!(answers.eq(expected.zip(log)));
    }
    Ok(())
}

#[test]
fn page_crossing_accesses_arrive_in_parts_with_all_their_bytes() -> Result<()> {
    use Size::{B1, B2, B4, B8};
    type Case = (u64, Size, &'static [(u64, Size)]);
    let accesses: [Case; 5] = [
        (0xfff, B2, &[(0xfff, B1), (0x1000, B1)]),
        (0xffe, B4, &[(0xffe, B2), (0x1000, B2)]),
        (0xffc, B8, &[(0xffc, B4), (0x1000, B4)]),
        (
            0xffd,
            B8,
            &[(0xffd, B2), (0xfff, B1), (0x1000, B4), (0x1004, B1)],
        ),
        (
            0xff9,
            B8,
            &[(0xff9, B4), (0xffd, B2), (0xfff, B1), (0x1000, B1)],
        ),
    ];
    let mut program = Program::new();
    let (mut writes, mut pieces, mut log) = (Vec::new(), Vec::new(), Vec::new());
    for (offset, size, parts) in accesses {
        program.write(Bus::Mmio, MMIO_BASE + offset, size.bytes(), PATTERN);
        program.read(Bus::Mmio, MMIO_BASE + offset, size.bytes());
        writes.extend(
            parts
                .iter()
                .map(|&(at, part)| write(at, part, PATTERN >> (8 * (at - offset)))),
        );
        pieces.extend(parts.iter().map(|&(at, part)| (at, part.bytes())));
        log.push(bytes_at(offset, size.bytes().into()));
    }
    against_all(Bus::Mmio, &program, |seen, values| {
        let written: Vec<_> = seen
            .iter()
            .copied()
            .filter(|told| matches!(told, Told::Write(..)))
            .collect();
        assert_eq!(written, writes);
        assert_eq!(reads(seen), pieces);
        assert_eq!(values, log);
    })
}

#[test]
fn sixteen_bytes_at_once_arrive_as_two_accesses() -> Result<()> {
    use Size::{B1, B2, B4, B8};
    let value = u128::from(PATTERN) << 64 | 0x0123_4567_89ab_cdef;
    let accesses: [(u64, &[(u64, Size)]); 4] = [
        (0x20, &[(0x20, B8), (0x28, B8)]),
        (0x43, &[(0x43, B8), (0x4b, B8)]),
        (0xff8, &[(0xff8, B8), (0x1000, B8)]),
        (
            0xffb,
            &[
                (0xffb, B4),
                (0xfff, B1),
                (0x1000, B8),
                (0x1008, B2),
                (0x100a, B1),
            ],
        ),
    ];
    let mut program = Program::new();
    let (mut writes, mut log) = (Vec::new(), Vec::new());
    for (offset, parts) in accesses {
        program.write16(MMIO_BASE + offset, value);
        program.read16(MMIO_BASE + offset);
        writes.extend(
            parts
                .iter()
                .map(|&(at, part)| write(at, part, (value >> (8 * (at - offset))) as u64)),
        );
        log.extend([bytes_at(offset, 8), bytes_at(offset + 8, 8)]);
    }
    against_all(Bus::Mmio, &program, |seen, values| {
        let written: Vec<_> = seen
            .iter()
            .copied()
            .filter(|told| matches!(told, Told::Write(..)))
            .collect();
        assert_eq!(written, writes);
        assert_eq!(values, log);
    })
}

#[test]
fn neighbouring_regions_of_different_mechanisms_do_not_leak() -> Result<()> {
    let kinds: Vec<Kind> = kinds().collect();
    for (at, left) in kinds.iter().copied().enumerate() {
        let right = kinds[(at + 3) % kinds.len()];
        println!("{left:?} | {right:?}");
        let rig = Rig::new()?;
        let middle = MMIO_BASE + 0x800;
        let doorbell = |offset| Doorbell::new(offset, Size::B4);
        let regions = [
            Region::mmio(MMIO_BASE, 0x800)
                .user_data(1)
                .doorbell(doorbell(0x7fc)),
            Region::mmio(middle, 0x10)
                .user_data(2)
                .doorbell(doorbell(0)),
        ];
        let devices = [Recorder::default(), Recorder::default()];
        let _tasks = [
            rig.serve(left, &regions[0], devices[0].clone())?,
            rig.serve(right, &regions[1], devices[1].clone())?,
        ];
        let mut program = Program::new();
        program
            .write(Bus::Mmio, middle - 4, 4, 0xa1)
            .write(Bus::Mmio, middle, 4, 0xb1);
        program
            .write(Bus::Mmio, middle - 1, 1, 0xa2)
            .write(Bus::Mmio, middle + 1, 1, 0xb2);
        program.write(Bus::Mmio, middle - 2, 4, 0x5555_5555); // neither region holds it
        program.write(Bus::Mmio, middle + 0xe, 4, 0x6666_6666);
        program.read(Bus::Mmio, middle - 8, 8);
        program.read(Bus::Mmio, middle + 8, 8);
        let mut vcpu = rig.vcpu(0, &program)?;
        for (addr, value) in [(middle - 2, 0x5555_5555), (middle + 0xe, 0x6666_6666)] {
            let unclaimed = BusAccess {
                bus: Bus::Mmio,
                addr,
                size: Size::B4,
                write: Some(value),
            };
            assert_eq!(vcpu.run()?, Exit::Unclaimed(unclaimed));
        }
        run_to_halt(&mut vcpu)?;
        assert_eq!(rig.guest.log(0)?, [2, 2]);
        let kinds = [left, right];
        for ((device, kind), (user_data, [rung, written], [at, then, last])) in
            devices.iter().zip(kinds).zip([
                (1, [0xa1, 0xa2], [0x7fc, 0x7ff, 0x7f8]),
                (2, [0xb1, 0xb2], [0, 1, 8]),
            ])
        {
            let access = |offset, size| Access {
                user_data,
                offset,
                size,
            };
            let value = kind.carries_values().then_some(rung);
            assert_eq!(
                device.told(),
                [
                    Told::Ring(Ring {
                        user_data,
                        index: 0,
                        offset: at,
                        size: Size::B4,
                        value,
                        writes: 1
                    }),
                    Told::Write(access(then, Size::B1), written),
                    Told::Read(access(last, Size::B8), 2),
                ]
            );
        }
    }
    Ok(())
}

#[test]
fn a_doorbell_wins_only_for_the_writes_that_it_matches() -> Result<()> {
    for (kind, bus, value) in kinds().flat_map(|kind| {
        [Bus::Mmio, Bus::Pio]
            .into_iter()
            .flat_map(move |bus| [None, Some(0x1234)].map(|value| (kind, bus, value)))
    }) {
        println!("{kind:?} {bus:?} {value:x?}");
        exactly_the_matching_writes_ring(kind, bus, value)?;
    }
    Ok(())
}

fn exactly_the_matching_writes_ring(kind: Kind, bus: Bus, value: Option<u64>) -> Result<()> {
    let rig = Rig::new()?;
    let doorbell = Doorbell::new(0x10, Size::B2);
    let region = region(bus).doorbell(value.map_or(doorbell, |value| doorbell.matching(value)));
    let device = Recorder::default();
    let task = rig.serve(kind, &region, device.clone())?;
    let mut program = Program::new();
    let writes = [
        (0x10, Size::B2, 0x1234, true),
        (0x10, Size::B2, 0x4321, value.is_none()),
        (0x10, Size::B4, 0x1234, false),
        (0x10, Size::B1, 0x34, false),
        (0x11, Size::B1, 0x12, false),
        (0x11, Size::B2, 0x1234, false),
        (0x0f, Size::B2, 0x1234, false),
        (0x0f, Size::B4, 0x12_3400, false),
        (0x12, Size::B2, 0x1234, false),
    ];
    for (offset, size, data, _) in writes {
        program.write(bus, region.base + offset, size.bytes(), data);
        program.read(bus, region.base, 4);
    }
    let (_, vcpu) = rig.run(&program)?;
    let told: Vec<_> = device
        .told()
        .into_iter()
        .filter(|told| !matches!(told, Told::Read(..)))
        .collect();
    assert_eq!(told.len(), writes.len());
    for (told, (offset, size, data, rings)) in told.into_iter().zip(writes) {
        let expected = if rings {
            let known = kind.carries_values() || value.is_some();
            let value = known.then_some(data);
            Told::Ring(Ring {
                user_data: USER_DATA,
                index: 0,
                offset,
                size,
                value,
                writes: 1,
            })
        } else {
            write(offset, size, data)
        };
        assert_eq!(told, expected);
    }
    let rings = writes.iter().filter(|write| write.3).count();
    let exits = match kind.is_native() {
        true => 0,
        false => 2 * writes.len() - if kind.has_sinks() { rings } else { 0 },
    };
    assert_eq!(vcpu.stats().exits, exits as u64);
    rig.vm.remove(&region)?;
    match task.map(ioregion_conformance::Task::finish).transpose()? {
        Some(stats) if stats.lost > 0 => bail!("{} values lost", stats.lost),
        _ => Ok(()),
    }
}
