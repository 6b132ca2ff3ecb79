//! Drivers that write whatever they like: the queue breaks, for the right reason, and nothing
//! else happens.

mod support;

use ioregion_devices::virtio::{
    Broken, Format, Layout, MAX_SEGMENTS, Memory as _, MemoryError, Position, Queue, Setup,
};
use proptest::prelude::*;
use support::{BYTES, DATA, Flat, TABLES, descriptor, driver, setup};

const SIZE: u16 = 8;

/// A queue of 8 descriptors in which one request of one readable byte waits.
fn with_one(format: Format) -> (Flat, Setup, Queue) {
    let memory = Flat::new(BYTES);
    let setup = setup(format, SIZE, false);
    driver(&setup).add(&memory, &[(DATA, 1, false)], false);
    let queue = Queue::new(&memory, &setup, Position::start(format)).unwrap();
    (memory, setup, queue)
}

/// What becomes of the waiting request where its descriptor is another.
fn with_descriptor(format: Format, addr: u64, len: u32, flags: u16) -> Result<(), Broken> {
    let (memory, setup, mut queue) = with_one(format);
    let at = setup.layout.descriptors;
    match format {
        Format::Split => descriptor(&memory, at, addr, len, flags, 0),
        Format::Packed => descriptor(&memory, at, addr, len, 0, flags | 1 << 7),
    }
    queue.pop(&memory).map(drop)
}

const BOTH: [Format; 2] = [Format::Split, Format::Packed];

#[test]
fn ranges_that_cannot_be_break_the_queue() {
    for format in BOTH {
        assert_eq!(with_descriptor(format, DATA, 0, 0), Err(Broken::Empty));
        let (addr, len) = (u64::MAX, 2);
        let outside = Err(Broken::Range { addr, len });
        assert_eq!(with_descriptor(format, addr, len, 2), outside);
        // The last byte of the address space is a place like any other.
        assert_eq!(with_descriptor(format, u64::MAX, 1, 2), Ok(()));
    }
}

#[test]
fn indirect_tables_that_cannot_be_break_the_queue() {
    for format in BOTH {
        for len in [0, 8, 17, 16 * (MAX_SEGMENTS as u32 + 1), u32::MAX] {
            let expected = Err(Broken::IndirectLength(len));
            assert_eq!(with_descriptor(format, TABLES, len, 4), expected);
        }
        let misplaced = Err(Broken::IndirectMisplaced);
        assert_eq!(with_descriptor(format, TABLES, 16, 4 | 1), misplaced);
        let gone = Err(MemoryError::Unmapped { addr: 16 }.into());
        assert_eq!(with_descriptor(format, 16, 16, 4), gone);
        let end = u64::MAX - 8;
        let outside = Err(Broken::Range { addr: end, len: 16 });
        assert_eq!(with_descriptor(format, end, 16, 4), outside);
    }
}

#[test]
fn indirect_tables_within_tables_or_without_negotiation_break_the_queue() {
    for format in BOTH {
        for (negotiated, flags, expected) in [
            (true, 4, Broken::IndirectMisplaced),
            (false, 0, Broken::IndirectNotNegotiated),
        ] {
            let (memory, mut setup, _) = with_one(format);
            setup.indirect = negotiated;
            let mut queue = Queue::new(&memory, &setup, Position::start(format)).unwrap();
            let at = setup.layout.descriptors;
            match format {
                Format::Split => {
                    descriptor(&memory, at, TABLES, 16, 4, 0);
                    descriptor(&memory, TABLES, DATA, 16, flags, 0);
                }
                Format::Packed => {
                    descriptor(&memory, at, TABLES, 16, 0, 4 | 1 << 7);
                    descriptor(&memory, TABLES, DATA, 16, 0, flags);
                }
            }
            assert_eq!(queue.pop(&memory), Err(expected));
        }
    }
}

#[test]
fn links_in_circles_break_the_queue() {
    for flags in [1, 1 | 2] {
        // Split: the descriptor links to itself. Packed: every descriptor goes on.
        let (memory, setup, mut queue) = with_one(Format::Split);
        descriptor(&memory, setup.layout.descriptors, DATA, 1, flags, 0);
        assert_eq!(queue.pop(&memory), Err(Broken::Loop));

        let (memory, setup, mut queue) = with_one(Format::Packed);
        for index in 0..u64::from(SIZE) {
            let at = setup.layout.descriptors + 16 * index;
            descriptor(&memory, at, DATA, 1, 0, flags | 1 << 7);
        }
        assert_eq!(queue.pop(&memory), Err(Broken::Loop));
    }
    // The same within a table.
    let (memory, setup, mut queue) = with_one(Format::Split);
    descriptor(&memory, setup.layout.descriptors, TABLES, 32, 4, 0);
    descriptor(&memory, TABLES, DATA, 1, 1, 1);
    descriptor(&memory, TABLES + 16, DATA, 1, 1, 0);
    assert_eq!(queue.pop(&memory), Err(Broken::Loop));
}

#[test]
fn links_out_of_the_table_break_the_queue() {
    let (memory, setup, mut queue) = with_one(Format::Split);
    descriptor(&memory, setup.layout.descriptors, DATA, 1, 1, SIZE);
    let outside = |index, size| Err(Broken::NoSuchDescriptor { index, size });
    assert_eq!(queue.pop(&memory), outside(SIZE, SIZE));

    let (memory, setup, mut queue) = with_one(Format::Split);
    memory.store(setup.layout.driver + 4, u16::MAX).unwrap();
    assert_eq!(queue.pop(&memory), outside(u16::MAX, SIZE));

    let (memory, setup, mut queue) = with_one(Format::Split);
    descriptor(&memory, setup.layout.descriptors, TABLES, 32, 4, 0);
    descriptor(&memory, TABLES, DATA, 1, 1, 2);
    assert_eq!(queue.pop(&memory), outside(2, 2));

    let (memory, setup, mut queue) = with_one(Format::Packed);
    descriptor(&memory, setup.layout.descriptors, DATA, 1, SIZE, 1 << 7);
    assert_eq!(queue.pop(&memory), outside(SIZE, SIZE));
}

#[test]
fn order_and_length_of_ranges_are_checked() {
    for format in BOTH {
        for (first, second, expected) in [
            ((1, 2), (1, 0), Broken::ReadableBehindWritable),
            ((u32::MAX, 0), (1, 0), Broken::TooLong),
            ((u32::MAX, 2), (u32::MAX, 2), Broken::TooLong),
        ] {
            let (memory, setup, mut queue) = with_one(format);
            let at = setup.layout.descriptors;
            match format {
                Format::Split => {
                    descriptor(&memory, at, DATA, first.0, first.1 | 1, 1);
                    descriptor(&memory, at + 16, DATA, second.0, second.1, 0);
                }
                Format::Packed => {
                    descriptor(&memory, at, DATA, first.0, 0, first.1 | 1 | 1 << 7);
                    descriptor(&memory, at + 16, DATA, second.0, 0, second.1 | 1 << 7);
                }
            }
            assert_eq!(queue.pop(&memory), Err(expected), "{format:?}");
        }
    }
}

#[test]
fn index_that_jumps_breaks_the_queue() {
    for to in [SIZE + 1, u16::MAX] {
        let (memory, setup, mut queue) = with_one(Format::Split);
        memory.store(setup.layout.driver + 2, to).unwrap();
        let from = 0;
        let jump = Broken::IndexJump {
            from,
            to,
            size: SIZE,
        };
        assert_eq!(queue.pop(&memory), Err(jump));
        assert_eq!(queue.enable_kicks(&memory), Err(jump));
    }
}

#[test]
fn requests_in_flight_cannot_be_made_available_again() {
    let (memory, setup, mut queue) = with_one(Format::Split);
    let first = queue.pop(&memory).unwrap().unwrap();
    memory.store(setup.layout.driver + 6, 0).unwrap();
    memory.store(setup.layout.driver + 2, 2).unwrap();
    assert_eq!(queue.pop(&memory), Err(Broken::InFlight(0)));
    drop(first);

    let (memory, setup, mut queue) = with_one(Format::Packed);
    let first = queue.pop(&memory).unwrap().unwrap();
    let at = setup.layout.descriptors + 16;
    descriptor(&memory, at, DATA, 1, first.id(), 1 << 7);
    assert_eq!(queue.pop(&memory), Err(Broken::InFlight(first.id())));
}

#[test]
fn packed_ring_has_no_more_descriptors_than_its_size() {
    // All in flight, and the driver turns on.
    let (memory, setup, mut queue) = with_one(Format::Packed);
    let mut held = Vec::new();
    for index in 0..SIZE {
        let at = setup.layout.descriptors + 16 * u64::from(index);
        descriptor(&memory, at, DATA, 1, index, 1 << 7);
        held.push(queue.pop(&memory).unwrap().unwrap());
    }
    descriptor(&memory, setup.layout.descriptors, DATA, 1, 0, 1 << 15);
    assert_eq!(queue.pop(&memory), Err(Broken::Loop));
}

#[test]
fn layouts_and_positions_that_cannot_be_are_refused() {
    let memory = Flat::new(BYTES);
    let build = |format, change: &dyn Fn(&mut Layout)| {
        let mut setup = setup(format, SIZE, false);
        change(&mut setup.layout);
        Queue::new(&memory, &setup, Position::start(format)).map(drop)
    };
    for format in BOTH {
        for size in [0, 1 << 15 | 1, u16::MAX] {
            let refused = Err(Broken::Size(size));
            assert_eq!(build(format, &|layout| layout.size = size), refused);
        }
        let odd = build(format, &|layout| layout.descriptors += 8);
        assert!(matches!(odd, Err(Broken::Alignment(_))));
        let odd = build(format, &|layout| layout.driver += 1);
        assert!(matches!(odd, Err(Broken::Alignment(_))));
        let odd = build(format, &|layout| layout.device += 2);
        assert!(matches!(odd, Err(Broken::Alignment(_))));
        let end = u64::MAX - 15;
        let outside = Err(Broken::Outside(end));
        assert_eq!(build(format, &|layout| layout.descriptors = end), outside);
    }
    assert_eq!(
        build(Format::Split, &|layout| layout.size = 6),
        Err(Broken::Size(6))
    );
    let gone = build(Format::Split, &|layout| layout.device = 0);
    assert!(matches!(gone, Err(Broken::Memory(_))));

    let packed = |avail, used| Position::Packed {
        avail_wrap: true,
        avail,
        used_wrap: true,
        used,
    };
    for (format, position) in [
        (Format::Split, packed(0, 0)),
        (Format::Packed, Position::Split { avail: 0 }),
        (Format::Split, Position::Split { avail: SIZE + 1 }),
        (Format::Split, Position::Split { avail: u16::MAX }),
        (Format::Packed, packed(SIZE, 0)),
        (Format::Packed, packed(0, u16::MAX)),
        (Format::Packed, packed(0, 1)),
    ] {
        let setup = setup(format, SIZE, false);
        let refused = Queue::new(&memory, &setup, position).map(drop);
        assert_eq!(refused, Err(Broken::Position(position)));
    }
}

#[test]
fn event_of_a_packed_ring_that_makes_no_sense_notifies() {
    let memory = Flat::new(BYTES);
    let setup = setup(Format::Packed, SIZE, true);
    driver(&setup).add(&memory, &[(DATA, 1, false)], false);
    let mut queue = Queue::new(&memory, &setup, Position::start(Format::Packed)).unwrap();
    memory.store(setup.layout.driver, 0x7fff).unwrap();
    memory.store(setup.layout.driver + 2, 2).unwrap();
    let chain = queue.pop(&memory).unwrap().unwrap();
    queue.push(&memory, chain, 0).unwrap();
    assert_eq!(queue.must_notify(&memory), Ok(true));
}

/// Bytes that often are what a queue looks for.
fn byte() -> impl Strategy<Value = u8> {
    prop_oneof![3 => Just(0u8), 2 => 0..8u8, 1 => Just(0x80u8), 1 => any::<u8>()]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1024))]

    #[test]
    fn whatever_stands_in_memory_nothing_panics_or_goes_on_for_ever(
        packed: bool,
        exponent in 0..4u32,
        event_idx: bool,
        indirect: bool,
        layout in proptest::array::uniform3(0..384u64),
        aligned in proptest::bool::weighted(0.9),
        bytes in proptest::collection::vec(byte(), 512),
        position in (any::<bool>(), 0..20u16, any::<bool>(), 0..20u16),
    ) {
        let format = if packed { Format::Packed } else { Format::Split };
        let align = |at: u64| Flat::BASE + if aligned { at & !15 } else { at };
        let setup = Setup {
            format,
            layout: Layout {
                size: 1 << exponent,
                descriptors: align(layout[0]),
                driver: align(layout[1]),
                device: align(layout[2]),
            },
            indirect,
            event_idx,
        };
        let at = match format {
            Format::Split => Position::Split { avail: position.1 },
            Format::Packed => Position::Packed {
                avail_wrap: position.0,
                avail: position.1,
                used_wrap: position.2,
                used: position.3,
            },
        };
        let memory = Flat::from_bytes(bytes);
        if let Ok(mut queue) = Queue::new(&memory, &setup, at) {
            // Nothing given back: no more requests than descriptors can be in flight.
            let mut taken = 0;
            while let Ok(Some(chain)) = queue.pop(&memory) {
                prop_assert!(chain.readable().len() + chain.writable().len() > 0);
                taken += 1;
                prop_assert!(taken <= 1 << exponent);
                prop_assert_eq!(usize::from(queue.in_flight()), taken);
            }
            let _ = queue.enable_kicks(&memory);
        }
        if let Ok(mut queue) = Queue::new(&memory, &setup, at) {
            // Given back at once, over rings that the device itself overwrites.
            for _ in 0..64 {
                let Ok(Some(chain)) = queue.pop(&memory) else { break };
                let written = chain.writable_len();
                if queue.push(&memory, chain, written).is_err() { break }
                let _ = queue.must_notify(&memory);
            }
        }
    }
}
