//! The disk, by requests in a queue.

mod support;

use std::collections::HashMap;
use std::os::fd::AsFd as _;
use std::path::PathBuf;
use std::sync::Arc;

use ioregion_devices::blk::{Blk, BlkError, Options};
use ioregion_devices::virtio::{
    Broken, Device as _, Done, Format, Lane, Memory, Position, Queue, Refusal,
};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use proptest::prelude::*;
use support::mapped::Mapped;
use support::{BYTES, DATA, Driver, Flat, Range, driver, put, setup};

const SECTORS: u64 = 64;
/// Bit of `VIRTIO_BLK_F_FLUSH`.
const FLUSH: u64 = 1 << 9;

const IN: u32 = 0;
const OUT: u32 = 1;
const SYNC: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;

/// How requests are carried out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    AtOnce,
    AtOnceDirect,
    /// By io_uring, through memory of the device.
    Copied,
    CopiedDirect,
    /// By io_uring, straight from and to the driver's memory.
    Pinned,
    PinnedDirect,
}

const WAYS: [Way; 6] = [
    Way::AtOnce,
    Way::AtOnceDirect,
    Way::Copied,
    Way::CopiedDirect,
    Way::Pinned,
    Way::PinnedDirect,
];

impl Way {
    fn options(self) -> Options {
        Options {
            direct: matches!(
                self,
                Self::AtOnceDirect | Self::CopiedDirect | Self::PinnedDirect
            ),
            io_uring: !matches!(self, Self::AtOnce | Self::AtOnceDirect),
            ..Options::default()
        }
    }

    fn memory(self) -> Box<dyn Memory> {
        match self {
            Self::Pinned | Self::PinnedDirect => Box::new(Mapped::new(BYTES)),
            _ => Box::new(Flat::new(BYTES)),
        }
    }
}

/// Waits for something that a lane has finished.
fn finished(lane: &mut dyn Lane, memory: &dyn Memory) -> Result<Done, Broken> {
    loop {
        lane.flush().unwrap();
        if let Some(done) = lane.finished(memory)? {
            return Ok(done);
        }
        lane.flush().unwrap();
        let event = lane.event().unwrap();
        let mut fds = [PollFd::new(event.as_fd(), PollFlags::POLLIN)];
        assert_eq!(poll(&mut fds, PollTimeout::from(60_000u16)), Ok(1));
    }
}

struct Rig {
    _dir: tempfile::TempDir,
    path: PathBuf,
    disk: Arc<Blk>,
    lane: Box<dyn Lane>,
    // After the lane, which may have it.
    memory: Box<dyn Memory>,
    driver: Box<dyn Driver>,
    queue: Queue,
}

impl Rig {
    fn new(way: Way, read_only: bool) -> Self {
        Self::with(way, read_only, FLUSH)
    }

    fn with(way: Way, read_only: bool, features: u64) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        let bytes: Vec<u8> = (0..SECTORS * 512).map(|at| (at % 251) as u8).collect();
        std::fs::write(&path, bytes).unwrap();
        let options = Options {
            read_only,
            serial: "abc".into(),
            ..way.options()
        };
        let disk = Arc::new(Blk::open(&path, &options).unwrap());
        let memory = way.memory();
        let setup = setup(Format::Split, 16, false);
        Self {
            _dir: dir,
            path,
            lane: Arc::clone(&disk).lane(0, features).unwrap(),
            disk,
            driver: driver(&setup),
            queue: Queue::new(&*memory, &setup, Position::start(Format::Split)).unwrap(),
            memory,
        }
    }

    fn content(&self) -> Vec<u8> {
        std::fs::read(&self.path).unwrap()
    }

    /// One request: status and bytes written.
    fn ask(&mut self, kind: u32, sector: u64, data: Data<'_>) -> (u8, u32) {
        let mut header = [0; 16];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[8..].copy_from_slice(&sector.to_le_bytes());
        let (head, status, room) = (DATA, DATA + 0x20, DATA + 0x100);
        put(&*self.memory, head, &header);
        put(&*self.memory, status, &[0xff]);
        let mut ranges = vec![(head, 16, false)];
        match data {
            Data::None => {}
            Data::Out(bytes) => {
                put(&*self.memory, room, bytes);
                ranges.push((room, bytes.len() as u32, false));
            }
            Data::In(len) => ranges.push((room, len, true)),
        }
        ranges.push((status, 1, true));
        let written = self.serve(&ranges).unwrap();
        let mut bytes = [0];
        self.memory.read(status, &mut bytes).unwrap();
        (bytes[0], written)
    }

    fn serve(&mut self, ranges: &[Range]) -> Result<u32, Broken> {
        self.driver.add(&*self.memory, ranges, true).unwrap();
        let chain = self.queue.pop(&*self.memory)?.unwrap();
        let done = match self.lane.submit(chain, &*self.memory)? {
            Some(done) => done,
            None => finished(&mut *self.lane, &*self.memory)?,
        };
        self.queue.push(&*self.memory, done.chain, done.written)?;
        let done = self.driver.collect(&*self.memory);
        assert_eq!(done.len(), 1);
        Ok(done[0].1)
    }

    fn got(&self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.read(DATA + 0x100, &mut bytes).unwrap();
        bytes
    }
}

enum Data<'a> {
    None,
    Out(&'a [u8]),
    In(u32),
}

fn range(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    let mut bytes = sector.to_le_bytes().to_vec();
    bytes.extend(sectors.to_le_bytes());
    bytes.extend(flags.to_le_bytes());
    bytes
}

#[test]
fn what_is_written_is_read_and_lies_in_the_image() {
    for way in WAYS {
        let mut rig = Rig::new(way, false);
        let before = rig.content();
        assert_eq!(rig.ask(IN, 3, Data::In(1024)), (OK, 1025));
        assert_eq!(rig.got(1024), before[3 * 512..5 * 512]);
        assert_eq!(rig.ask(OUT, 62, Data::Out(&[7; 1024])), (OK, 1));
        assert_eq!(rig.ask(SYNC, 0, Data::None), (OK, 1));
        assert_eq!(rig.ask(IN, 61, Data::In(1536)), (OK, 1537));
        let after = rig.content();
        assert_eq!(rig.got(1536), after[61 * 512..]);
        assert_eq!(after[..62 * 512], before[..62 * 512]);
        assert_eq!(after[62 * 512..], [7; 1024]);
    }
}

#[test]
fn requests_past_the_end_or_of_half_sectors_fail_and_change_nothing() {
    for way in WAYS {
        let mut rig = Rig::new(way, false);
        let before = rig.content();
        for sector in [63, 64, u64::MAX / 512, u64::MAX - 1, u64::MAX] {
            assert_eq!(rig.ask(IN, sector, Data::In(1024)), (IOERR, 0));
            assert_eq!(rig.ask(OUT, sector, Data::Out(&[7; 1024])), (IOERR, 1));
            for kind in [DISCARD, WRITE_ZEROES] {
                let list = [range(0, 1, 0), range(sector, 2, 0)].concat();
                assert_eq!(rig.ask(kind, 0, Data::Out(&list)), (IOERR, 1));
            }
        }
        assert_eq!(rig.ask(IN, 0, Data::In(511)), (IOERR, 0));
        assert_eq!(rig.ask(OUT, 0, Data::Out(&[7; 513])), (IOERR, 1));
        assert_eq!(rig.content(), before);
    }
}

#[test]
fn ranges_are_zeroed_and_discarded() {
    for way in WAYS {
        let mut rig = Rig::new(way, false);
        let before = rig.content();
        let list = [range(1, 2, 0), range(8, 16, 1)].concat();
        assert_eq!(rig.ask(WRITE_ZEROES, 0, Data::Out(&list)), (OK, 1));
        assert_eq!(rig.ask(DISCARD, 0, Data::Out(&range(40, 8, 0))), (OK, 1));
        let after = rig.content();
        for (sector, (old, new)) in before.chunks(512).zip(after.chunks(512)).enumerate() {
            match sector {
                1..3 | 8..24 => assert_eq!(new, [0; 512], "sector {sector}"),
                // What discarded sectors read as is not said.
                40..48 => {}
                _ => assert_eq!(new, old, "sector {sector}"),
            }
        }
        for (kind, list, status) in [
            (DISCARD, range(0, 1, 1), UNSUPP),
            (WRITE_ZEROES, range(0, 1, 2), UNSUPP),
            (DISCARD, range(0, 0, 0), IOERR),
            (DISCARD, range(0, 1, 0)[..15].to_vec(), IOERR),
            (WRITE_ZEROES, range(0, 1, 0).repeat(17), IOERR),
        ] {
            assert_eq!(rig.ask(kind, 0, Data::Out(&list)), (status, 1));
        }
        assert_eq!(rig.content(), after);
    }
}

#[test]
fn serial_number_is_told() {
    for way in WAYS {
        let mut rig = Rig::new(way, false);
        assert_eq!(rig.ask(GET_ID, 0, Data::In(20)), (OK, 21));
        assert_eq!(rig.got(20), *b"abc\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0");
        // Shorter and longer room than the specification's.
        assert_eq!(rig.ask(GET_ID, 0, Data::In(2)), (OK, 3));
        assert_eq!(rig.ask(GET_ID, 0, Data::In(64)), (OK, 20));
    }
}

#[test]
fn read_only_disk_is_never_written() {
    for way in WAYS {
        let mut rig = Rig::new(way, true);
        let before = rig.content();
        assert_eq!(rig.ask(IN, 0, Data::In(512)).0, OK);
        assert_eq!(rig.ask(OUT, 0, Data::Out(&[7; 512])).0, IOERR);
        for kind in [DISCARD, WRITE_ZEROES] {
            assert_eq!(rig.ask(kind, 0, Data::Out(&range(0, 1, 0))).0, IOERR);
        }
        assert_eq!(rig.content(), before);
        let ro = 1 << 5;
        assert_eq!(rig.disk.features() & (1 << 13 | 1 << 14 | ro), ro);
        assert_eq!(rig.disk.check_features(0), Err(Refusal::Missing(ro)));
        assert_eq!(rig.disk.check_features(ro), Ok(()));
    }
}

#[test]
fn requests_that_cannot_be_answered_break_the_queue() {
    for way in WAYS {
        for ranges in [
            // No room for a status; half a header.
            vec![(DATA, 16, false)],
            vec![(DATA, 15, false), (DATA, 1, true)],
            vec![(DATA, 1, true)],
            // A header, or a status, where there is no memory.
            vec![(8, 16, false), (DATA, 1, true)],
            vec![(DATA, 16, false), (8, 1, true)],
        ] {
            let mut rig = Rig::new(way, false);
            assert!(rig.serve(&ranges).is_err(), "{ranges:?}");
        }
    }
}

#[test]
fn data_that_is_nowhere_fails_the_request_alone() {
    for way in WAYS {
        let mut rig = Rig::new(way, false);
        let before = rig.content();
        for kind in [IN, OUT] {
            put(&*rig.memory, DATA, &kind.to_le_bytes());
            let data = (8, 512, kind == IN);
            let ranges = [(DATA, 16, false), data, (DATA + 0x20, 1, true)];
            rig.serve(&ranges).unwrap();
            let mut status = [0];
            rig.memory.read(DATA + 0x20, &mut status).unwrap();
            assert_eq!(status, [IOERR]);
        }
        assert_eq!(rig.content(), before);
    }
}

#[test]
fn image_that_shrinks_under_the_disk_fails_requests() {
    for way in WAYS {
        let mut rig = Rig::new(way, false);
        std::fs::File::options()
            .write(true)
            .open(&rig.path)
            .unwrap()
            .set_len(512)
            .unwrap();
        assert_eq!(rig.ask(IN, 0, Data::In(512)).0, OK);
        assert_eq!(rig.ask(IN, 1, Data::In(512)), (IOERR, 0));
    }
}

#[test]
fn disk_grows_and_shrinks_with_its_image_when_it_is_told() {
    for way in WAYS {
        let mut rig = Rig::new(way, false);
        let resize = |rig: &Rig, sectors: u64| {
            let image = std::fs::File::options()
                .write(true)
                .open(&rig.path)
                .unwrap();
            image.set_len(sectors * 512).unwrap();
        };
        resize(&rig, SECTORS + 1);
        assert_eq!(rig.ask(IN, SECTORS, Data::In(512)).0, IOERR);
        assert!(rig.disk.refresh().unwrap());
        assert!(!rig.disk.refresh().unwrap());
        assert_eq!(rig.disk.config()[..8], (SECTORS + 1).to_le_bytes());
        assert_eq!(rig.ask(OUT, SECTORS, Data::Out(&[7; 512])).0, OK);
        resize(&rig, 1);
        assert!(rig.disk.refresh().unwrap());
        assert_eq!(rig.ask(OUT, 1, Data::Out(&[7; 512])).0, IOERR);
        assert_eq!(rig.content().len(), 512);
        resize(&rig, 0);
        assert!(rig.disk.refresh().is_err());
        assert_eq!(rig.disk.capacity(), 1);
    }
}

#[test]
fn unknown_requests_are_not_supported() {
    for way in WAYS {
        let mut rig = Rig::new(way, false);
        for kind in [2, 3, 5, 14, u32::MAX] {
            assert_eq!(rig.ask(kind, 0, Data::None), (UNSUPP, 1));
        }
    }
}

#[test]
fn options_that_make_no_disk_are_refused() {
    let rig = Rig::new(Way::AtOnce, false);
    let open = |queues, serial: &str| {
        let options = Options {
            queues,
            serial: serial.into(),
            ..Options::default()
        };
        Blk::open(&rig.path, &options).map(drop)
    };
    assert!(matches!(open(0, ""), Err(BlkError::NoQueues)));
    let long = "x".repeat(21);
    assert!(matches!(open(1, &long), Err(BlkError::Serial(_))));
    // 20 bytes fit, but somebody has the image.
    let fits = "x".repeat(20);
    assert!(matches!(open(1, &fits), Err(BlkError::Image(_))));
}

#[test]
fn writes_are_safe_at_once_for_a_driver_without_flushes() {
    for way in WAYS {
        let mut rig = Rig::with(way, false, 0);
        assert_eq!(rig.ask(OUT, 2, Data::Out(&[7; 1024])), (OK, 1));
        assert_eq!(
            rig.ask(WRITE_ZEROES, 0, Data::Out(&range(2, 1, 0))),
            (OK, 1)
        );
        let after = rig.content();
        assert_eq!(after[2 * 512..3 * 512], [0; 512]);
        assert_eq!(after[3 * 512..4 * 512], [7; 512]);
    }
}

#[test]
fn image_that_cannot_be_written_fails_requests_and_stays() {
    use nix::fcntl::{FcntlArg, SealFlag, fcntl};
    use nix::sys::memfd::{MFdFlags, memfd_create};
    use std::os::fd::AsRawFd as _;
    for way in WAYS {
        let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
        let sealed = std::fs::File::from(memfd_create("sealed", flags).unwrap());
        sealed.set_len(SECTORS * 512).unwrap();
        let path = PathBuf::from(format!("/proc/self/fd/{}", sealed.as_raw_fd()));
        let disk = Arc::new(Blk::open(&path, &way.options()).unwrap());
        fcntl(&sealed, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_WRITE)).unwrap();
        let mut rig = Rig::new(way, false);
        rig.lane = disk.lane(0, FLUSH).unwrap();
        assert_eq!(rig.ask(OUT, 0, Data::Out(&[7; 4096])), (IOERR, 1));
        assert_eq!(
            rig.ask(WRITE_ZEROES, 0, Data::Out(&range(0, 8, 1))),
            (IOERR, 1)
        );
        assert_eq!(rig.ask(IN, 0, Data::In(4096)), (OK, 4097));
        assert_eq!(rig.got(4096), [0; 4096]);
    }
}

/// Bytes of a transfer in the driver's memory, in pieces: what O_DIRECT takes, and what not.
const SHAPES: [&[(u64, u32)]; 5] = [
    &[(0, 4096)],
    &[(512, 512), (2048, 3584)],
    &[(1, 4096)],
    &[(4096, 100), (0, 3996)],
    &[(8, 8), (64, 8), (128, 4080)],
];

#[test]
fn memory_of_any_shape_and_alignment_is_read_and_written() {
    for way in WAYS {
        for (number, shape) in SHAPES.into_iter().enumerate() {
            let mut rig = Rig::new(way, false);
            // Sectors that are aligned for the file system, and others.
            for sector in [0, 8, 3, 48] {
                let room = DATA + 0x1000;
                let ranges = |writable| {
                    let data = shape
                        .iter()
                        .map(move |&(at, len)| (room + at, len, writable));
                    let mut ranges = vec![(DATA, 16, false)];
                    ranges.extend(data);
                    ranges.push((DATA + 0x20, 1, true));
                    ranges
                };
                let fill = |rig: &Rig, byte: u8| {
                    put(&*rig.memory, room, &[byte; 0x3000]);
                };
                let mut header = [0; 16];
                header[8..].copy_from_slice(&u64::to_le_bytes(sector));
                header[..4].copy_from_slice(&OUT.to_le_bytes());
                put(&*rig.memory, DATA, &header);
                let byte = (10 * number as u8) + sector as u8 + 1;
                fill(&rig, byte);
                assert_eq!(rig.serve(&ranges(false)).unwrap(), 1);
                let place = sector as usize * 512..sector as usize * 512 + 4096;
                assert!(rig.content()[place].iter().all(|&found| found == byte));

                header[..4].copy_from_slice(&IN.to_le_bytes());
                put(&*rig.memory, DATA, &header);
                fill(&rig, 0);
                assert_eq!(rig.serve(&ranges(true)).unwrap(), 4097);
                let mut found = [0; 0x3000];
                rig.memory.read(room, &mut found).unwrap();
                for (at, found) in (0..).zip(found) {
                    let inside =
                        |&(start, len): &(u64, u32)| (start..start + u64::from(len)).contains(&at);
                    let expected = if shape.iter().any(inside) { byte } else { 0 };
                    assert_eq!(found, expected, "{way:?}, {shape:?}, byte {at}");
                }
            }
        }
    }
}

#[test]
fn many_requests_are_under_way_and_each_is_answered_once() {
    for way in WAYS {
        let mut rig = Rig::new(way, false);
        let mut expected = rig.content();
        for round in 0..50u64 {
            let mut asked = HashMap::new();
            // Reads and writes of different sectors, so that they may pass each other.
            for number in 0..16u64 {
                let base = DATA + 0x600 * number;
                let write = (round + number) % 3 == 0;
                let sector = (number * 4 + round % 4) % SECTORS;
                let mut header = [0; 16];
                header[..4].copy_from_slice(&(if write { OUT } else { IN }).to_le_bytes());
                header[8..].copy_from_slice(&sector.to_le_bytes());
                put(&*rig.memory, base, &header);
                put(&*rig.memory, base + 0x20, &[0xff]);
                put(&*rig.memory, base + 0x200, &[round as u8; 512]);
                let ranges = [
                    (base, 16, false),
                    (base + 0x200, 512, !write),
                    (base + 0x20, 1, true),
                ];
                let id = rig.driver.add(&*rig.memory, &ranges, true).unwrap();
                let place = sector as usize * 512;
                if write {
                    expected[place..place + 512].fill(round as u8);
                }
                let content = expected[place..place + 512].to_vec();
                assert!(asked.insert(id, (base, write, content)).is_none());
            }
            let mut left = 16;
            while let Some(chain) = rig.queue.pop(&*rig.memory).unwrap() {
                assert!(rig.lane.wants());
                if let Some(done) = rig.lane.submit(chain, &*rig.memory).unwrap() {
                    rig.queue
                        .push(&*rig.memory, done.chain, done.written)
                        .unwrap();
                    left -= 1;
                }
            }
            for _ in 0..left {
                let done = finished(&mut *rig.lane, &*rig.memory).unwrap();
                rig.queue
                    .push(&*rig.memory, done.chain, done.written)
                    .unwrap();
            }
            for (id, written) in rig.driver.collect(&*rig.memory) {
                let (base, write, content) = asked.remove(&id).unwrap();
                assert_eq!(written, if write { 1 } else { 513 });
                let mut status = [0];
                rig.memory.read(base + 0x20, &mut status).unwrap();
                assert_eq!(status, [OK]);
                let mut found = vec![0; 512];
                rig.memory.read(base + 0x200, &mut found).unwrap();
                assert_eq!(found, content, "{way:?}, round {round}");
            }
            assert!(asked.is_empty());
        }
        assert_eq!(rig.content(), expected);
    }
}

#[test]
fn lane_that_is_dropped_has_nothing_of_the_drivers_memory() {
    // `Mapped` looks when it is dropped.
    for way in [Way::Copied, Way::Pinned, Way::PinnedDirect] {
        for flush in [false, true] {
            let mut rig = Rig::new(way, false);
            for number in 0..8u64 {
                let base = DATA + 0x800 * number;
                let mut header = [0; 16];
                header[..4].copy_from_slice(&(number as u32 % 2).to_le_bytes());
                put(&*rig.memory, base, &header);
                let ranges = [
                    (base, 16, false),
                    (base + 0x200, 512, number % 2 == 0),
                    (base + 0x20, 1, true),
                ];
                rig.driver.add(&*rig.memory, &ranges, true).unwrap();
                let chain = rig.queue.pop(&*rig.memory).unwrap().unwrap();
                assert!(rig.lane.submit(chain, &*rig.memory).unwrap().is_none());
            }
            if flush {
                rig.lane.flush().unwrap();
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn hostile_requests_never_touch_bytes_outside_what_they_name(
        way in 0..WAYS.len(),
        kind in prop_oneof![Just(OUT), Just(DISCARD), Just(WRITE_ZEROES), 0..16u32],
        sector in 0..SECTORS + 2,
        lens in proptest::collection::vec((0..2000u32, any::<bool>()), 0..5),
        fill: u8,
    ) {
        let mut rig = Rig::new(WAYS[way], false);
        let before = rig.content();
        put(&*rig.memory, DATA + 0x100, &vec![fill; 16384]);
        put(&*rig.memory, DATA, &kind.to_le_bytes());
        put(&*rig.memory, DATA + 8, &sector.to_le_bytes());
        let mut ranges = vec![(DATA, 16, false)];
        let mut out = 0;
        for &(len, writable) in &lens {
            ranges.push((DATA + 0x100, len, writable));
            out += if writable { 0 } else { u64::from(len) };
        }
        let _ = rig.serve(&ranges);
        let after = rig.content();
        prop_assert_eq!(after.len(), before.len());
        if kind == OUT {
            let named = sector * 512..sector * 512 + out;
            for (at, (old, new)) in before.iter().zip(&after).enumerate() {
                prop_assert!(old == new || named.contains(&(at as u64)), "byte {}", at);
            }
        } else if kind != DISCARD && kind != WRITE_ZEROES {
            prop_assert_eq!(after, before);
        }
    }
}
