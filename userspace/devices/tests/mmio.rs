//! Devices behind registers, by what Linux's driver does with them, and by what none should do.

mod guest;
mod support;

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use guest::{ACKNOWLEDGE, DRIVER, Guest, NEEDS_RESET, PACKED, VERSION_1, eventfd, until};
use ioregion_devices::blk::{self, Blk};
use ioregion_devices::mmio::{Interrupt, Mmio, MmioError, Options, at};
use ioregion_devices::rng::{self, Rng};
use ioregion_devices::virtio::{
    AtOnce, Broken, Chain, Device, Format, Health, Lane, Layout, Memory, Refusal,
};
use ioregion_dispatch::{Access, Device as _, Size};
use proptest::prelude::*;
use support::{DATA, Flat, get, put};

const FORMATS: [Format; 2] = [Format::Split, Format::Packed];
const SECTORS: u64 = 64;

struct Disk {
    _dir: tempfile::TempDir,
    path: PathBuf,
    disk: Arc<Blk>,
}

fn disk(io_uring: bool) -> Disk {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    let bytes: Vec<u8> = (0..SECTORS * 512).map(|at| (at % 251) as u8).collect();
    std::fs::write(&path, bytes).unwrap();
    let options = blk::Options {
        io_uring,
        ..blk::Options::default()
    };
    let disk = Arc::new(Blk::open(&path, &options).unwrap());
    Disk {
        _dir: dir,
        path,
        disk,
    }
}

/// The header of a request to a disk, at the start of the data.
fn header(guest: &Guest, kind: u32, sector: u64) {
    let mut bytes = kind.to_le_bytes().to_vec();
    bytes.extend([0; 4]);
    bytes.extend(sector.to_le_bytes());
    put(&guest.memory, DATA, &bytes);
    put(&guest.memory, DATA + 16, &[0xff]);
}

#[test]
fn disk_is_brought_up_read_and_written() {
    for (format, io_uring) in FORMATS.into_iter().flat_map(|f| [(f, false), (f, true)]) {
        let disk = disk(io_uring);
        let mut guest = Guest::new(Arc::clone(&disk.disk) as _);
        assert_eq!(guest.read(at::DEVICE_ID), 2);
        guest.bring_up(format);
        assert_eq!(guest.config(0, Size::B4), SECTORS);
        assert_eq!(guest.config(4, Size::B4), 0);
        assert_eq!(guest.config(20, Size::B4), 512);
        // More than the queue has descriptors, so that it turns.
        for round in 0..40u64 {
            let sector = round % SECTORS;
            header(&guest, 0, sector);
            let read = [
                (DATA, 16, false),
                (DATA + 1024, 512, true),
                (DATA + 16, 1, true),
            ];
            let id = guest.request(0, &read);
            assert_eq!(guest.collect(0), [(id, 513)]);
            assert_eq!(get(&guest.memory, DATA + 16, 1), [0]);
            let wanted = File::open(&disk.path).unwrap();
            let mut bytes = [0; 512];
            wanted.read_exact_at(&mut bytes, sector * 512).unwrap();
            assert_eq!(get(&guest.memory, DATA + 1024, 512), bytes);
            header(&guest, 1, sector);
            put(&guest.memory, DATA + 1024, &[round as u8; 512]);
            let write = [
                (DATA, 16, false),
                (DATA + 1024, 512, false),
                (DATA + 16, 1, true),
            ];
            let id = guest.request(0, &write);
            assert_eq!(guest.collect(0), [(id, 1)]);
            assert_eq!(get(&guest.memory, DATA + 16, 1), [0]);
            wanted.read_exact_at(&mut bytes, sector * 512).unwrap();
            assert_eq!(bytes, [round as u8; 512]);
        }
        assert_eq!(guest.handle.health(), [Health::Running]);
    }
}

#[test]
fn random_bytes_fill_what_there_is_room_for() {
    for format in FORMATS {
        let mut guest = Guest::new(Arc::new(Rng));
        assert_eq!(guest.read(at::DEVICE_ID), 4);
        guest.bring_up(format);
        let mut seen = Vec::new();
        for _ in 0..40 {
            let id = guest.request(0, &[(DATA, 40, true), (DATA + 100, 24, true)]);
            assert_eq!(guest.collect(0), [(id, 64)]);
            let mut bytes = get(&guest.memory, DATA, 40);
            bytes.extend(get(&guest.memory, DATA + 100, 24));
            assert!(!seen.contains(&bytes), "the same 64 bytes twice");
            // 64 bytes of one value are not random.
            assert!(bytes.iter().any(|byte| *byte != bytes[0]));
            seen.push(bytes);
        }
        // Ones and zeroes are about as many: 20,480 bits, seven standard deviations.
        let ones: u32 = seen.concat().iter().map(|byte| byte.count_ones()).sum();
        assert!((9740..=10740).contains(&ones), "{ones} of 20480 bits");
        assert_eq!(get(&guest.memory, DATA + 40, 60), [0; 60]);
        let most = u32::try_from(rng::MAX_BYTES).unwrap();
        let room = 0xf000;
        let id = guest.request(0, &[(DATA, room, true), (DATA, room, true)]);
        assert_eq!(guest.collect(0), [(id, most)]);
    }
}

#[test]
fn features_that_do_not_suit_are_not_confirmed() {
    let disk = disk(false);
    let mut guest = Guest::new(disk.disk);
    let offered = guest.offered();
    for features in [
        0,
        offered & !VERSION_1,
        offered | 1 << 63,
        VERSION_1 | 1 << 33,
    ] {
        assert!(!guest.negotiate(features), "{features:#x}");
        // As it was before.
        assert_eq!(guest.status(), ACKNOWLEDGE | DRIVER);
        guest.write(at::STATUS, ACKNOWLEDGE | DRIVER | 4);
        assert_eq!(guest.status(), ACKNOWLEDGE | DRIVER);
    }
    assert!(guest.negotiate(offered & !PACKED));
}

/// A queue that cannot be: the device says so, by the status and an interrupt, and works again
/// after a reset.
#[test]
fn broken_queues_need_a_reset_and_nothing_more() {
    let good = |guest: &Guest| guest.setup(0, Format::Split).layout;
    type Break = fn(&mut Layout);
    let ways: [Break; 5] = [
        |layout| layout.size = 0,
        |layout| layout.size = 12,
        |layout| layout.descriptors += 1,
        |layout| layout.device = u64::MAX - 3,
        // No memory there, which shows with the first look.
        |layout| layout.driver = 0x4000_0000,
    ];
    let mut guest = Guest::new(Arc::new(Rng));
    for way in ways {
        let features = guest.offered() & !PACKED;
        assert!(guest.negotiate(features));
        let mut layout = good(&guest);
        way(&mut layout);
        guest.set_up_queue(0, &layout);
        guest.write(at::STATUS, 0xf);
        // An interrupt of the round before may come first.
        while guest.interrupted() & 2 == 0 {}
        assert_eq!(guest.status(), 0xf | NEEDS_RESET);
        assert!(matches!(guest.handle.health()[..], [Health::Broken(_)]));
        // Drivers read, change and write.
        guest.write(at::STATUS, 0xf | NEEDS_RESET | 0x80);
        assert_eq!(guest.status(), 0x8f | NEEDS_RESET);
        guest.ring(Some(0));
        guest.bring_up(Format::Packed);
        let id = guest.request(0, &[(DATA, 8, true)]);
        assert_eq!(guest.collect(0), [(id, 8)]);
    }
}

#[test]
fn queue_that_a_request_breaks_needs_a_reset() {
    for format in FORMATS {
        let mut guest = Guest::new(Arc::new(Rng));
        guest.bring_up(format);
        guest.request(0, &[(DATA, 8, false)]);
        assert_eq!(guest.interrupted(), 2);
        assert_eq!(guest.status(), 0xf | NEEDS_RESET);
        let broken = Broken::Request("a buffer for random bytes with something to read");
        assert_eq!(guest.handle.health(), [Health::Broken(broken)]);
    }
}

#[test]
fn queues_are_served_only_while_the_driver_is_ready() {
    let mut guest = Guest::new(Arc::new(Rng));
    let features = guest.offered() & !PACKED;
    assert!(guest.negotiate(features));
    // Ready before it has addresses, and taken back.
    guest.write(at::QUEUE_SEL, 0);
    guest.write(at::QUEUE_READY, 1);
    guest.write(at::QUEUE_SIZE, 8);
    assert_eq!(guest.read(at::QUEUE_READY), 1);
    guest.write(at::QUEUE_READY, 0);
    assert_eq!(guest.read(at::QUEUE_READY), 0);
    let setup = guest.setup(0, Format::Split);
    guest.set_up_queue(0, &setup.layout);
    guest.queues = vec![support::driver(&setup)];
    guest.queues[0].arm(&guest.memory, true);
    let id = guest.request(0, &[(DATA, 8, true)]);
    // Of queues that are not served, or are none.
    for value in [0, 1, 77, u64::from(u32::MAX)] {
        guest.ring(Some(value));
    }
    guest.ring(None);
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(guest.queues[0].collect(&guest.memory), []);
    guest.write(at::STATUS, 0xf);
    // Nobody rings: the device looks by itself.
    assert_eq!(guest.collect(0), [(id, 8)]);
    // Stopped, and set up anew.
    guest.write(at::QUEUE_READY, 0);
    assert_eq!(guest.read(at::QUEUE_READY), 0);
    assert_eq!(guest.handle.health(), [Health::Idle]);
    let setup = guest.setup(0, Format::Split);
    guest.set_up_queue(0, &setup.layout);
    guest.queues = vec![support::driver(&setup)];
    guest.queues[0].arm(&guest.memory, true);
    let id = guest.request(0, &[(DATA, 9, true)]);
    assert_eq!(guest.collect(0), [(id, 9)]);
}

/// A device of several queues that counts its requests; each waits for a message where it has a
/// gate, after saying that it has begun.
struct Counter {
    queues: u16,
    gate: Option<Gate>,
}

type Gate = (Mutex<Sender<u16>>, Mutex<Receiver<()>>);

impl Device for Counter {
    fn kind(&self) -> u32 {
        42
    }

    fn features(&self) -> u64 {
        0
    }

    fn check_features(&self, _features: u64) -> Result<(), Refusal> {
        Ok(())
    }

    fn config(&self) -> Vec<u8> {
        Vec::new()
    }

    fn queues(&self) -> u16 {
        self.queues
    }

    fn lane(self: Arc<Self>, queue: u16, _features: u64) -> io::Result<Box<dyn Lane>> {
        let mut count = 0u8;
        Ok(Box::new(AtOnce(
            move |chain: &Chain, memory: &dyn Memory| {
                if let Some((enter, leave)) = &self.gate {
                    enter.lock().unwrap().send(queue).unwrap();
                    leave.lock().unwrap().recv().unwrap();
                }
                count += 1;
                chain.write(memory, 0, &[count])?;
                Ok(1)
            },
        )))
    }
}

#[test]
fn doorbell_without_a_value_is_one_of_every_queue() {
    let gate = None;
    let mut guest = Guest::new(Arc::new(Counter { queues: 3, gate }));
    guest.bring_up(Format::Split);
    for round in 1..10 {
        for queue in 0..3u16 {
            let range = (DATA + u64::from(queue), 1, true);
            let side = &mut guest.queues[usize::from(queue)];
            side.add(&guest.memory, &[range], false).unwrap();
        }
        guest.ring(None);
        for queue in 0..3 {
            assert_eq!(guest.collect(queue).len(), 1);
        }
        assert_eq!(get(&guest.memory, DATA, 3), [round; 3]);
    }
}

/// What a driver finds while a request of the one before it does not end.
#[test]
fn reset_in_flight_is_over_when_nothing_is_in_flight() {
    for by_queue in [false, true] {
        let (enter, entered) = channel();
        let (leave, left) = channel();
        let gate = Some((Mutex::new(enter), Mutex::new(left)));
        let (irq, other) = eventfd();
        let options = Options {
            grace: Duration::from_millis(20),
            ..Options::default()
        };
        let device = Arc::new(Counter { queues: 1, gate });
        let mut guest = Guest::with(device, irq, Interrupt::edge(other), &options);
        guest.bring_up(Format::Split);
        guest.request(0, &[(DATA, 1, true)]);
        let limit = Duration::from_secs(60);
        assert_eq!(entered.recv_timeout(limit), Ok(0));
        if by_queue {
            guest.write(at::QUEUE_SEL, 0);
            guest.write(at::QUEUE_READY, 0);
            assert_eq!(guest.read(at::QUEUE_READY), 1);
            guest.write(at::QUEUE_READY, 1);
            leave.send(()).unwrap();
            until("the queue stops", || guest.read(at::QUEUE_READY) == 0);
            assert_eq!(guest.status(), 0xf);
        } else {
            guest.write(at::STATUS, 0);
            for _ in 0..3 {
                assert_eq!(guest.status(), NEEDS_RESET);
                // Nothing but a reset is heard.
                assert!(!guest.negotiate(VERSION_1));
                guest.write(at::QUEUE_READY, 1);
                guest.ring(Some(0));
            }
            leave.send(()).unwrap();
            until("the reset ends", || guest.status() == 0);
            assert_eq!(guest.read(at::INTERRUPT_STATUS), 0);
        }
        assert_eq!(guest.handle.health(), [Health::Idle]);
        guest.bring_up(Format::Split);
        leave.send(()).unwrap();
        let id = guest.request(0, &[(DATA, 1, true)]);
        assert_eq!(guest.collect(0), [(id, 1)]);
    }
}

#[test]
fn edge_comes_again_where_less_was_acknowledged_than_there_is() {
    let (irq, other) = eventfd();
    let interrupt = Interrupt::edge(other);
    let mut guest = Guest::with(Arc::new(Rng), irq, interrupt, &Options::default());
    guest.bring_up(Format::Split);
    guest.request(0, &[(DATA, 8, true)]);
    until("the request is done", || {
        guest.read(at::INTERRUPT_STATUS) == 1
    });
    guest.handle.config_changed();
    assert_eq!(guest.read(at::INTERRUPT_STATUS), 3);
    let _ = guest.interrupts();
    guest.write(at::INTERRUPT_ACK, 1);
    assert_eq!(guest.interrupts(), 1);
    guest.write(at::INTERRUPT_ACK, 2);
    assert_eq!(guest.interrupts(), 0);
}

#[test]
fn level_goes_up_again_until_all_is_acknowledged() {
    let (irq, other) = eventfd();
    let (resample, down) = eventfd();
    let interrupt = Interrupt::level(other, down);
    let mut guest = Guest::with(Arc::new(Rng), irq, interrupt, &Options::default());
    guest.bring_up(Format::Split);
    guest.request(0, &[(DATA, 8, true)]);
    until("the request is done", || {
        guest.read(at::INTERRUPT_STATUS) == 1
    });
    until("the line goes up", || guest.interrupts() > 0);
    for _ in 0..3 {
        // KVM has taken the line down; nothing was acknowledged.
        resample.write(1).unwrap();
        until("the line goes up again", || guest.interrupts() > 0);
    }
    guest.write(at::INTERRUPT_ACK, 1);
    resample.write(1).unwrap();
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(guest.interrupts(), 0);
}

#[test]
fn queues_of_impossible_sizes_are_refused() {
    for size in [0, 3, 0xffff] {
        let (_irq, other) = eventfd();
        let options = Options {
            queue_size: size,
            ..Options::default()
        };
        let memory = Arc::new(guest::memory());
        let made = Mmio::new("m", Arc::new(Rng), memory, Interrupt::edge(other), &options);
        assert!(matches!(made, Err(MmioError::QueueSize { .. })), "{size}");
    }
}

fn accesses() -> impl Strategy<Value = Vec<(bool, u64, Size, u64)>> {
    let offset = prop_oneof![
        8 => prop::sample::select(vec![
            0x70, 0x70, 0x24, 0x20, 0x30, 0x38, 0x80, 0x84, 0x90, 0x94, 0xa0, 0xa4, 0x44, 0x50, 0x64u64,
        ]),
        1 => 0..0x1000u64,
        1 => any::<u64>(),
    ];
    let size = prop_oneof![
        12 => Just(Size::B4),
        1 => prop_oneof![Just(Size::B1), Just(Size::B2), Just(Size::B8)],
    ];
    let value = prop_oneof![
        6 => 0..16u64,
        2 => Just(Flat::BASE),
        2 => (0..0x2000u64).prop_map(|at| Flat::BASE + 16 * at),
        1 => any::<u64>(),
    ];
    let access = (any::<bool>(), offset, size, value);
    prop::collection::vec(access, 0..40)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever a driver did, the next one finds a device that works.
    #[test]
    fn hostile_drivers_leave_a_device_that_a_reset_repairs(
        rounds in prop::collection::vec((any::<bool>(), accesses()), 1..4),
        garbage in prop::collection::vec(any::<u8>(), 1..4096),
    ) {
        let mut guest = Guest::new(Arc::new(Rng));
        for (started, accesses) in rounds {
            if started {
                guest.bring_up(Format::Packed);
            }
            put(&guest.memory, Flat::BASE, &garbage);
            for (write, offset, size, value) in accesses {
                let access = Access { user_data: 0, offset, size };
                match write {
                    true => guest.mmio.write(access, value),
                    false => {
                        guest.mmio.read(access);
                    }
                }
            }
        }
        guest.bring_up(Format::Split);
        let id = guest.request(0, &[(DATA, 8, true)]);
        prop_assert_eq!(guest.collect(0), [(id, 8)]);
        prop_assert_eq!(guest.handle.health(), [Health::Running]);
    }
}
