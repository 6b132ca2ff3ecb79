//! Services that go on where another one ended, against a kernel made of a socket and a file.

#[path = "../../devices/tests/support/mod.rs"]
mod support;

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use ioregion_abi::vduse::{MESSAGE_BYTES, VqInfo, VqStatePacked};
use ioregion_devices::virtio::{Broken, Chain, Device, Done, Format, Lane, Memory, Refusal, Setup};
use ioregion_vduse::{
    Error, Health, Identity, Log, Logged, Port, Region, Service, ServiceOptions, Source,
};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use support::{BYTES, DATA, Driver, Flat, OnFile, driver, put, setup};

const GET_VQ_STATE: u32 = 0;
const SET_STATUS: u32 = 1;
const SUSPEND: u32 = 5;
const SIZE: u16 = 8;
/// `VIRTIO_F_VERSION_1`, `VIRTIO_F_ACCESS_PLATFORM`, `VIRTIO_F_INDIRECT_DESC`.
const NEEDED: u64 = 1 << 32 | 1 << 33 | 1 << 28;
/// `VIRTIO_F_RING_PACKED`.
const PACKED: u64 = 1 << 34;
const LONG: Duration = Duration::from_secs(60);

/// What the kernel would keep.
struct Kernel {
    memory: File,
    setup: Setup,
    socket: OwnedFd,
    /// The status has `DRIVER_OK`.
    driven: AtomicBool,
    kick: Mutex<Option<OwnedFd>>,
    interrupts: Mutex<Sender<()>>,
    config: Mutex<Vec<u8>>,
}

#[derive(Clone)]
struct Fake(Arc<Kernel>);

impl AsFd for Fake {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.socket.as_fd()
    }
}

impl Source for Fake {
    fn region(&self, _addr: u64) -> io::Result<Option<Region>> {
        Ok(Some(Region {
            first: Flat::BASE,
            last: Flat::BASE + (BYTES as u64 - 1),
            read: true,
            write: true,
            file: self.0.memory.try_clone()?.into(),
            offset: 0,
        }))
    }
}

impl Port for Fake {
    fn driver_features(&self) -> io::Result<u64> {
        let packed = self.0.setup.format == Format::Packed;
        Ok(NEEDED | if packed { PACKED } else { 0 })
    }

    fn is_driven(&self) -> io::Result<bool> {
        Ok(self.0.driven.load(Ordering::SeqCst))
    }

    fn queue(&self, index: u32) -> io::Result<VqInfo> {
        let layout = self.0.setup.layout;
        let wraps = u16::from(self.0.setup.format == Format::Packed);
        Ok(VqInfo {
            index,
            num: layout.size.into(),
            desc_addr: layout.descriptors,
            driver_addr: layout.driver,
            device_addr: layout.device,
            state: VqStatePacked {
                last_avail_counter: wraps,
                last_used_counter: wraps,
                ..VqStatePacked::default()
            },
            ready: 1,
            ..VqInfo::default()
        })
    }

    fn set_kick(&self, _index: u32, eventfd: BorrowedFd<'_>) -> io::Result<()> {
        *self.0.kick.lock().unwrap() = Some(eventfd.try_clone_to_owned()?);
        Ok(())
    }

    fn interrupt(&self, _index: u32) -> io::Result<()> {
        self.0.interrupts.lock().unwrap().send(()).unwrap();
        Ok(())
    }

    fn change_config(&self, _offset: u32, bytes: &[u8]) -> io::Result<()> {
        *self.0.config.lock().unwrap() = bytes.to_vec();
        Ok(())
    }
}

/// Tells which requests it gets, and keeps them or answers with their byte, plus one, the last one
/// first.
struct Echo {
    keeps: bool,
    tell: Mutex<Sender<u8>>,
}

struct Held {
    echo: Arc<Echo>,
    chains: Vec<Chain>,
}

impl Device for Echo {
    fn kind(&self) -> u32 {
        2
    }

    fn features(&self) -> u64 {
        0
    }

    fn check_features(&self, _features: u64) -> Result<(), Refusal> {
        Ok(())
    }

    fn config(&self) -> Vec<u8> {
        vec![u8::from(self.keeps)]
    }

    fn queues(&self) -> u16 {
        1
    }

    fn lane(self: Arc<Self>, _queue: u16, _features: u64) -> io::Result<Box<dyn Lane>> {
        Ok(Box::new(Held {
            echo: self,
            chains: Vec::new(),
        }))
    }
}

impl Lane for Held {
    fn submit(&mut self, chain: Chain, memory: &dyn Memory) -> Result<Option<Done>, Broken> {
        let mut byte = [0];
        chain.read(memory, 0, &mut byte)?;
        self.echo.tell.lock().unwrap().send(byte[0]).unwrap();
        self.chains.push(chain);
        Ok(None)
    }

    fn finished(&mut self, memory: &dyn Memory) -> Result<Option<Done>, Broken> {
        if self.echo.keeps {
            return Ok(None);
        }
        let Some(chain) = self.chains.pop() else {
            return Ok(None);
        };
        let mut byte = [0];
        chain.read(memory, 0, &mut byte)?;
        chain.write(memory, 0, &[byte[0] + 1])?;
        Ok(Some(Done { chain, written: 1 }))
    }
}

struct Rig {
    kernel: Arc<Kernel>,
    socket: OwnedFd,
    driver: Box<dyn Driver>,
    interrupts: Receiver<()>,
    folder: tempfile::TempDir,
    got: Receiver<u8>,
    tell: Sender<u8>,
}

impl Rig {
    fn new(format: Format) -> Self {
        let flags = nix::sys::memfd::MFdFlags::MFD_CLOEXEC;
        let memory = File::from(nix::sys::memfd::memfd_create("driver", flags).unwrap());
        memory.set_len(BYTES as u64).unwrap();
        let flags = SockFlag::SOCK_CLOEXEC;
        let (socket, theirs) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags).unwrap();
        let (sender, interrupts) = channel();
        let (tell, got) = channel();
        let setup = setup(format, SIZE, false);
        let kernel = Kernel {
            memory,
            setup,
            socket: theirs,
            driven: AtomicBool::new(false),
            kick: Mutex::new(None),
            interrupts: Mutex::new(sender),
            config: Mutex::new(Vec::new()),
        };
        Self {
            kernel: Arc::new(kernel),
            socket,
            driver: driver(&setup),
            interrupts,
            folder: tempfile::tempdir().unwrap(),
            got,
            tell,
        }
    }

    fn log(&self) -> PathBuf {
        self.folder.path().join("log")
    }

    fn serve(&self, log: Option<&Path>, packed: bool, keeps: bool) -> Result<Service, Error> {
        let tell = Mutex::new(self.tell.clone());
        let device = Arc::new(Echo { keeps, tell });
        let options = ServiceOptions {
            packed,
            ..ServiceOptions::default()
        };
        let port = Fake(Arc::clone(&self.kernel));
        let Some(path) = log else {
            return Service::start("test", port, device, options);
        };
        let logged = Logged {
            name: "test".into(),
            identity: Identity { boot: 1, inode: 2 },
            kind: 2,
            features: 3,
            queues: 1,
            queue_size: SIZE,
        };
        let log = Arc::new(Log::open(path, &logged).unwrap());
        Service::start_logged("test", port, device, options, log)
    }

    fn start(&self, keeps: bool) -> Service {
        self.serve(Some(&self.log()), true, keeps).unwrap()
    }

    fn send(&self, bits: u8) {
        self.request(SET_STATUS, bits);
    }

    fn request(&self, kind: u32, first: u8) {
        let mut bytes = [0; MESSAGE_BYTES];
        bytes[..4].copy_from_slice(&kind.to_ne_bytes());
        bytes[24] = first;
        nix::unistd::write(&self.socket, &bytes).unwrap();
    }

    fn answer(&self) -> [u8; MESSAGE_BYTES] {
        let mut answer = [0; MESSAGE_BYTES];
        let read = nix::unistd::read(&self.socket, &mut answer);
        assert_eq!(read, Ok(MESSAGE_BYTES));
        answer
    }

    fn answered(&self) -> bool {
        self.answer()[4..8] == [0; 4]
    }

    /// Where the queue stands.
    fn position(&self) -> Vec<u8> {
        self.request(GET_VQ_STATE, 0);
        let answer = self.answer();
        assert_eq!(answer[4..8], [0; 4]);
        answer[28..36].to_vec()
    }

    fn status(&self, bits: u8) {
        self.send(bits);
        assert!(self.answered(), "status {bits}");
        let driven = bits & 4 != 0;
        self.kernel.driven.store(driven, Ordering::SeqCst);
    }

    fn drive(&self) {
        for bits in [0, 1, 3, 11, 15] {
            self.status(bits);
        }
    }

    /// Makes a request available, and kicks, which nobody may hear.
    fn add(&mut self, byte: u8) {
        let view = OnFile(&self.kernel.memory);
        let at = DATA + 64 * u64::from(byte);
        put(&view, at, &[byte]);
        let ranges = [(at, 1, false), (at + 1, 1, true)];
        self.driver.add(&view, &ranges, true).unwrap();
        if let Some(kick) = &*self.kernel.kick.lock().unwrap() {
            nix::unistd::write(kick, &1u64.to_ne_bytes()).unwrap();
        }
    }

    fn expect(&self, bytes: impl IntoIterator<Item = u8>) {
        for byte in bytes {
            assert_eq!(self.got.recv_timeout(LONG), Ok(byte));
        }
    }

    /// Waits until so many requests came back, each with its answer.
    fn collect(&mut self, bytes: std::ops::Range<u8>) {
        let mut done = 0;
        while done < bytes.len() {
            self.interrupts.recv_timeout(LONG).unwrap();
            done += self.driver.collect(&OnFile(&self.kernel.memory)).len();
        }
        assert_eq!(done, bytes.len());
        for byte in bytes {
            let mut answer = [0];
            let at = DATA + 64 * u64::from(byte) + 1;
            OnFile(&self.kernel.memory).read(at, &mut answer).unwrap();
            assert_eq!(answer[0], byte + 1);
        }
    }
}

#[test]
fn requests_in_flight_come_to_the_next_service_first_and_in_order() {
    for format in [Format::Split, Format::Packed] {
        let mut rig = Rig::new(format);
        let first = rig.start(true);
        rig.drive();
        (0..4).for_each(|byte| rig.add(byte));
        rig.expect(0..4);
        first.stop().unwrap();
        // While nobody serves, too.
        rig.add(4);
        let second = rig.start(true);
        rig.expect(0..5);
        assert_eq!(*rig.kernel.config.lock().unwrap(), [1]);
        second.stop().unwrap();
        let third = rig.start(false);
        rig.expect(0..5);
        rig.collect(0..5);
        assert_eq!(*rig.kernel.config.lock().unwrap(), [0]);
        for byte in 5..100 {
            rig.add(byte);
            rig.expect([byte]);
            rig.collect(byte..byte + 1);
        }
        assert_eq!(third.health(), [Health::Running]);
        third.stop().unwrap();
    }
}

#[test]
fn driver_that_was_answered_but_is_not_noted_yet_is_waited_for() {
    let mut rig = Rig::new(Format::Split);
    let first = rig.start(true);
    rig.drive();
    rig.add(1);
    rig.expect([1]);
    first.stop().unwrap();
    rig.kernel.driven.store(false, Ordering::SeqCst);
    let kernel = Arc::clone(&rig.kernel);
    let later = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(300));
        kernel.driven.store(true, Ordering::SeqCst);
    });
    let _second = rig.start(false);
    rig.expect([1]);
    rig.collect(1..2);
    later.join().unwrap();
}

#[test]
fn driver_that_asks_anew_gets_nothing_of_the_one_before() {
    let mut rig = Rig::new(Format::Split);
    let first = rig.start(true);
    rig.drive();
    rig.add(1);
    rig.expect([1]);
    first.stop().unwrap();
    // It reset the device with nobody there, which the kernel does not wait for for ever.
    rig.kernel.driven.store(false, Ordering::SeqCst);
    rig.send(1);
    let started = Instant::now();
    let second = rig.start(false);
    assert!(started.elapsed() < Duration::from_secs(4));
    assert!(rig.answered());
    assert_eq!(second.health(), []);
    rig.kernel.memory.write_all_at(&vec![0; BYTES], 0).unwrap();
    rig.driver = driver(&rig.kernel.setup);
    rig.drive();
    rig.add(2);
    rig.expect([2]);
    rig.collect(2..3);
}

#[test]
fn driver_whose_reset_was_under_way_is_answered_and_nothing_is_served() {
    let mut rig = Rig::new(Format::Split);
    let first = rig.start(true);
    rig.drive();
    rig.add(1);
    rig.expect([1]);
    first.stop().unwrap();
    // As the log says between a reset's begin and its end.
    let log = File::options().write(true).open(rig.log()).unwrap();
    log.write_all_at(&2u64.to_ne_bytes(), 72).unwrap();
    let second = rig.start(false);
    assert_eq!(second.health(), []);
    assert!(rig.got.recv_timeout(Duration::from_millis(300)).is_err());
    rig.kernel.memory.write_all_at(&vec![0; BYTES], 0).unwrap();
    rig.driver = driver(&rig.kernel.setup);
    rig.drive();
    rig.add(2);
    rig.expect([2]);
    rig.collect(2..3);
}

#[test]
fn driver_is_taken_over_with_its_log_and_features_only() {
    let rig = Rig::new(Format::Packed);
    let first = rig.start(true);
    rig.drive();
    first.stop().unwrap();
    let log = rig.log();
    let error = rig.serve(None, true, false).unwrap_err();
    assert!(matches!(error, Error::NoRecord(_)), "{error}");
    let other = rig.folder.path().join("other");
    let error = rig.serve(Some(&other), true, false).unwrap_err();
    assert!(matches!(error, Error::NoRecord(_)), "{error}");
    assert!(error.to_string().contains("log of the one before"));
    let error = rig.serve(Some(&log), false, false).unwrap_err();
    assert!(matches!(error, Error::Refused { .. }), "{error}");
    assert!(rig.serve(Some(&log), true, false).is_ok());
}

#[test]
fn log_that_does_not_fit_the_queue_breaks_it_until_the_next_reset() {
    let mut rig = Rig::new(Format::Split);
    let first = rig.start(true);
    rig.drive();
    rig.add(1);
    rig.expect([1]);
    first.stop().unwrap();
    // Somebody else gave a request back.
    let view = OnFile(&rig.kernel.memory);
    view.store(rig.kernel.setup.layout.device + 2, 1).unwrap();
    let second = rig.start(false);
    let until = Instant::now() + LONG;
    while !matches!(second.health()[..], [Health::Broken(Broken::Log(_))]) {
        assert!(Instant::now() < until, "{:?}", second.health());
        std::thread::sleep(Duration::from_millis(1));
    }
    rig.kernel.memory.write_all_at(&vec![0; BYTES], 0).unwrap();
    rig.driver = driver(&rig.kernel.setup);
    rig.drive();
    rig.add(2);
    rig.expect([2]);
    rig.collect(2..3);
}

#[test]
fn suspended_device_is_left_alone_by_the_next_service_too() {
    for format in [Format::Split, Format::Packed] {
        let mut rig = Rig::new(format);
        let mut service = rig.start(false);
        for _ in 0..2 {
            let zeroes = vec![0; BYTES];
            rig.kernel.memory.write_all_at(&zeroes, 0).unwrap();
            rig.driver = driver(&rig.kernel.setup);
            rig.drive();
            (0..3).for_each(|byte| rig.add(byte));
            rig.expect(0..3);
            rig.collect(0..3);
            rig.request(SUSPEND, 0);
            assert!(rig.answered());
            // The kernel takes no interrupt any more.
            rig.kernel.driven.store(false, Ordering::SeqCst);
            let position = rig.position();
            let expected = match format {
                Format::Split => [3, 0, 0, 0, 0, 0, 0, 0],
                Format::Packed => [1, 0, 3, 0, 1, 0, 3, 0],
            };
            assert_eq!(position, expected);
            rig.add(3);
            for _ in 0..2 {
                service.stop().unwrap();
                service = rig.start(false);
                assert_eq!(rig.position(), position);
                let while_ = Duration::from_millis(300);
                assert!(rig.got.recv_timeout(while_).is_err());
                assert_eq!(rig.position(), position);
            }
        }
        service.stop().unwrap();
    }
}
