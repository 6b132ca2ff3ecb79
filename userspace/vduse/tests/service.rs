//! A service against a kernel made of a socket and a file, with a driver that keeps to the
//! specification.

#[path = "../../devices/tests/support/mod.rs"]
mod support;

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt as _;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use ioregion_abi::vduse::{MESSAGE_BYTES, VqInfo, VqStatePacked};
use ioregion_devices::virtio::{
    AtOnce, Broken, Chain, Device, Format, Lane, Memory, Refusal, Setup,
};
use ioregion_vduse::{Error, Health, Port, Region, Service, ServiceOptions, Source};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use support::{BYTES, DATA, Driver, Flat, OnFile, driver, put, setup};

const GET_VQ_STATE: u32 = 0;
const SET_STATUS: u32 = 1;
const UPDATE_IOTLB: u32 = 2;
const SET_VQ_GROUP_ASID: u32 = 3;
const SET_VQ_READY: u32 = 4;
const SUSPEND: u32 = 5;
const SIZE: u16 = 8;
/// `VIRTIO_F_VERSION_1` and `VIRTIO_F_ACCESS_PLATFORM`.
const NEEDED: u64 = 1 << 32 | 1 << 33;
/// `VIRTIO_F_RING_PACKED`.
const PACKED: u64 = 1 << 34;
const GRACE: Duration = Duration::from_millis(200);
/// Far more than anything here takes.
const LONG: Duration = Duration::from_secs(60);

/// What the kernel would keep.
struct Kernel {
    memory: File,
    features: AtomicU64,
    ready: AtomicBool,
    /// The driver was ready before the service.
    driven: AtomicBool,
    kick: Mutex<Option<OwnedFd>>,
    setup: Setup,
    interrupts: Mutex<Sender<()>>,
    config: Mutex<Vec<u8>>,
    /// The address space that has the memory.
    space: AtomicU32,
    /// Interrupts that are refused because the driver does not count as ready yet.
    early: AtomicU32,
}

/// The service's end.
struct Fake {
    socket: OwnedFd,
    kernel: Arc<Kernel>,
}

impl AsFd for Fake {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Source for Fake {
    fn region(&self, addr: u64) -> io::Result<Option<Region>> {
        let last = Flat::BASE + (BYTES as u64 - 1);
        Ok((Flat::BASE..=last).contains(&addr).then_some(Region {
            first: Flat::BASE,
            last,
            read: true,
            write: true,
            file: self.kernel.memory.try_clone()?.into(),
            offset: 0,
        }))
    }
}

impl Port for Fake {
    fn driver_features(&self) -> io::Result<u64> {
        Ok(self.kernel.features.load(Ordering::SeqCst))
    }

    fn is_driven(&self) -> io::Result<bool> {
        Ok(self.kernel.driven.load(Ordering::SeqCst))
    }

    fn queue(&self, index: u32) -> io::Result<VqInfo> {
        let layout = self.kernel.setup.layout;
        let wraps = u16::from(self.kernel.setup.format == Format::Packed);
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
            ready: self.kernel.ready.load(Ordering::SeqCst).into(),
            ..VqInfo::default()
        })
    }

    fn set_kick(&self, _index: u32, eventfd: BorrowedFd<'_>) -> io::Result<()> {
        *self.kernel.kick.lock().unwrap() = Some(eventfd.try_clone_to_owned()?);
        Ok(())
    }

    fn interrupt(&self, _index: u32) -> io::Result<()> {
        let early = &self.kernel.early;
        if early.load(Ordering::SeqCst) > 0 {
            early.fetch_sub(1, Ordering::SeqCst);
            return Err(io::Error::from_raw_os_error(nix::libc::EINVAL));
        }
        let _ = self.kernel.interrupts.lock().unwrap().send(());
        Ok(())
    }

    fn change_config(&self, offset: u32, bytes: &[u8]) -> io::Result<()> {
        assert_eq!(offset, 0);
        *self.kernel.config.lock().unwrap() = bytes.to_vec();
        Ok(())
    }

    fn version(&self) -> u64 {
        1
    }

    fn group(&self, queue: u16) -> u32 {
        u32::from(queue) + 7
    }

    fn region_in(&self, space: u32, addr: u64) -> io::Result<Option<Region>> {
        match space == self.kernel.space.load(Ordering::SeqCst) {
            true => self.region(addr),
            false => Ok(None),
        }
    }
}

/// Answers each request with the bytes it reads, plus one; where it has a gate, one request per
/// message through it, after saying which one it has.
#[derive(Default)]
struct Echo {
    gate: Option<Gate>,
}

type Gate = (Mutex<Sender<u8>>, Mutex<Receiver<()>>);

impl Device for Echo {
    fn kind(&self) -> u32 {
        2
    }

    fn features(&self) -> u64 {
        1
    }

    fn check_features(&self, _features: u64) -> Result<(), Refusal> {
        Ok(())
    }

    fn config(&self) -> Vec<u8> {
        b"config".to_vec()
    }

    fn queues(&self) -> u16 {
        1
    }

    fn lane(self: Arc<Self>, _queue: u16, _features: u64) -> io::Result<Box<dyn Lane>> {
        let echo = move |chain: &Chain, memory: &dyn Memory| self.serve(chain, memory);
        Ok(Box::new(AtOnce(echo)))
    }
}

impl Echo {
    fn serve(&self, chain: &Chain, memory: &dyn Memory) -> Result<u32, Broken> {
        let mut byte = [0];
        chain.read(memory, 0, &mut byte)?;
        if let Some((enter, leave)) = &self.gate {
            enter.lock().unwrap().send(byte[0]).unwrap();
            leave.lock().unwrap().recv().unwrap();
        }
        chain.write(memory, 0, &[byte[0] + 1])?;
        Ok(1)
    }
}

struct Rig {
    kernel: Arc<Kernel>,
    socket: OwnedFd,
    service: Service,
    driver: Box<dyn Driver>,
    interrupts: Receiver<()>,
    id: u32,
}

impl Rig {
    fn new(format: Format, device: Echo) -> Self {
        let name = nix::sys::memfd::MFdFlags::MFD_CLOEXEC;
        let memory = File::from(nix::sys::memfd::memfd_create("driver", name).unwrap());
        memory.set_len(BYTES as u64).unwrap();
        let packed = if format == Format::Packed { PACKED } else { 0 };
        let (sender, interrupts) = channel();
        let setup = setup(format, SIZE, false);
        let kernel = Arc::new(Kernel {
            memory,
            features: AtomicU64::new(NEEDED | packed | 1),
            ready: AtomicBool::new(true),
            driven: AtomicBool::new(false),
            kick: Mutex::new(None),
            setup,
            interrupts: Mutex::new(sender),
            config: Mutex::new(Vec::new()),
            space: AtomicU32::new(0),
            early: AtomicU32::new(0),
        });
        let flags = SockFlag::SOCK_CLOEXEC;
        let (socket, theirs) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags).unwrap();
        let port = Fake {
            socket: theirs,
            kernel: Arc::clone(&kernel),
        };
        let options = ServiceOptions {
            packed: true,
            grace: GRACE,
        };
        let service = Service::start("test", port, Arc::new(device), options).unwrap();
        Self {
            kernel,
            socket,
            service,
            driver: driver(&setup),
            interrupts,
            id: 0,
        }
    }

    /// Sends a request; the answer's result and own part.
    fn ask(&mut self, kind: u32, payload: &[u8]) -> (u32, Vec<u8>) {
        self.id += 1;
        let mut bytes = [0; MESSAGE_BYTES];
        bytes[..4].copy_from_slice(&kind.to_ne_bytes());
        bytes[4..8].copy_from_slice(&self.id.to_ne_bytes());
        bytes[24..24 + payload.len()].copy_from_slice(payload);
        self.ask_raw(&bytes)
    }

    fn ask_raw(&mut self, bytes: &[u8; MESSAGE_BYTES]) -> (u32, Vec<u8>) {
        nix::unistd::write(&self.socket, bytes).unwrap();
        let mut answer = [0; MESSAGE_BYTES];
        assert_eq!(
            nix::unistd::read(&self.socket, &mut answer),
            Ok(MESSAGE_BYTES)
        );
        assert_eq!(answer[..4], bytes[4..8], "the answer to another request");
        let result = u32::from_ne_bytes(*answer[4..].first_chunk().unwrap());
        (result, answer[24..].to_vec())
    }

    fn status(&mut self, bits: u8) -> bool {
        self.ask(SET_STATUS, &[bits]).0 == 0
    }

    /// Everything up to `DRIVER_OK`, with rings that are empty.
    fn start(&mut self) {
        assert!(self.status(0));
        let zeroes = vec![0; BYTES];
        self.kernel.memory.write_all_at(&zeroes, 0).unwrap();
        self.driver = driver(&self.kernel.setup);
        for bits in [1, 3, 11, 15] {
            assert!(self.status(bits), "status {bits}");
        }
    }

    /// Makes a request available, and kicks.
    fn add(&mut self, byte: u8) {
        let view = OnFile(&self.kernel.memory);
        let at = DATA + 64 * u64::from(byte);
        put(&view, at, &[byte]);
        let ranges = [(at, 1, false), (at + 1, 1, true)];
        self.driver.add(&view, &ranges, false).unwrap();
        if let Some(kick) = &*self.kernel.kick.lock().unwrap() {
            nix::unistd::write(kick, &1u64.to_ne_bytes()).unwrap();
        }
    }

    /// Waits until as many requests came back.
    fn collect(&mut self, count: usize) {
        let mut done = 0;
        while done < count {
            self.interrupts.recv_timeout(LONG).unwrap();
            done += self.driver.collect(&OnFile(&self.kernel.memory)).len();
        }
        assert_eq!(done, count);
    }

    /// No request comes back for a while; interrupts, which a queue that goes on may owe, mean
    /// nothing.
    fn gets_nothing(&mut self) {
        std::thread::sleep(GRACE);
        let memory = OnFile(&self.kernel.memory);
        assert!(self.driver.collect(&memory).is_empty());
        while self.interrupts.try_recv().is_ok() {}
    }

    fn answer(&self, byte: u8) -> u8 {
        let mut answer = [0];
        let at = DATA + 64 * u64::from(byte) + 1;
        OnFile(&self.kernel.memory).read(at, &mut answer).unwrap();
        answer[0]
    }

    fn wait_for(&self, wanted: impl Fn(&[Health]) -> bool) {
        let until = Instant::now() + LONG;
        while !wanted(&self.service.health()) {
            assert!(Instant::now() < until, "{:?}", self.service.health());
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

#[test]
fn requests_of_both_formats_are_served_from_start_to_reset() {
    for format in [Format::Split, Format::Packed] {
        let mut rig = Rig::new(format, Echo::default());
        for _ in 0..3 {
            rig.start();
            for byte in 0..101 {
                rig.add(byte);
                rig.collect(1);
                assert_eq!(rig.answer(byte), byte + 1);
            }
            let (result, state) = rig.ask(GET_VQ_STATE, &[0; 4]);
            let expected = match format {
                Format::Split => vec![101, 0],
                // 202 descriptors in turns of 8: the 26th has begun, whose counter is 0.
                Format::Packed => vec![0, 0, 2, 0, 0, 0, 2, 0],
            };
            assert_eq!((result, &state[4..4 + expected.len()]), (0, &expected[..]));
            assert!(rig.status(0));
            assert_eq!(rig.service.health(), []);
        }
        rig.service.stop().unwrap();
    }
}

#[test]
fn memory_may_be_taken_back_under_load() {
    let mut rig = Rig::new(Format::Split, Echo::default());
    rig.start();
    for round in 0..200u8 {
        rig.add(round);
        let range = [[0; 8], [0xff; 8]].concat();
        assert_eq!(rig.ask(UPDATE_IOTLB, &range).0, 0);
        rig.collect(1);
        assert_eq!(rig.answer(round), round + 1);
    }
}

#[test]
fn features_that_the_device_does_not_work_with_are_refused() {
    let mut rig = Rig::new(Format::Split, Echo::default());
    for features in [0, 1, NEEDED & 1 << 32, NEEDED | 2, NEEDED | 1 << 63] {
        rig.kernel.features.store(features, Ordering::SeqCst);
        assert!(rig.status(0) && rig.status(3));
        assert!(!rig.status(11), "features {features:#x}");
        assert!(!rig.status(7) && !rig.status(15));
        assert_eq!(rig.service.health(), []);
    }
    rig.kernel.features.store(NEEDED, Ordering::SeqCst);
    assert!(rig.status(11) && rig.status(15));
}

#[test]
fn requests_that_make_no_sense_are_refused_and_nothing_else_happens() {
    let mut rig = Rig::new(Format::Split, Echo::default());
    rig.start();
    for (kind, payload) in [
        (GET_VQ_STATE, vec![1, 0, 0, 0]),
        (GET_VQ_STATE, vec![0xff; 4]),
        (SET_STATUS, vec![0x40]),
        (SET_STATUS, vec![11]),
        (UPDATE_IOTLB, [[1; 8], [0; 8]].concat()),
        // While a driver is ready.
        (SET_VQ_GROUP_ASID, vec![]),
        (SET_VQ_READY, vec![1, 0, 0, 0, 1]),
        (6, vec![]),
        (u32::MAX, vec![0xff; 128]),
    ] {
        assert_eq!(rig.ask(kind, &payload).0, 1, "{kind} {payload:?}");
    }
    rig.add(1);
    rig.collect(1);
}

#[test]
fn queue_uses_the_address_space_of_its_group_and_keeps_it_over_resets() {
    let mut rig = Rig::new(Format::Split, Echo::default());
    let pair = |one: u32, other: u32| [one.to_ne_bytes(), other.to_ne_bytes()].concat();
    rig.kernel.space.store(5, Ordering::SeqCst);
    assert_eq!(rig.ask(SET_VQ_GROUP_ASID, &pair(0, 5)).0, 0);
    // Of another group.
    rig.start();
    rig.wait_for(|health| matches!(health, [Health::Broken(_)]));
    assert_eq!(rig.ask(SET_VQ_GROUP_ASID, &pair(7, 5)).0, 1);
    assert!(rig.status(0));
    assert_eq!(rig.ask(SET_VQ_GROUP_ASID, &pair(7, 5)).0, 0);
    for byte in 1..4 {
        rig.start();
        rig.add(byte);
        rig.collect(1);
        for space in [0, 5, 6, u32::MAX] {
            let all = [0, 0, u32::MAX, u32::MAX, space].map(u32::to_ne_bytes);
            assert_eq!(rig.ask(UPDATE_IOTLB, all.as_flattened()).0, 0);
        }
        rig.add(100 + byte);
        rig.collect(1);
    }
    // What was taken back is not touched again.
    rig.kernel.space.store(0, Ordering::SeqCst);
    let all = [0, 0, u32::MAX, u32::MAX, 5].map(u32::to_ne_bytes);
    assert_eq!(rig.ask(UPDATE_IOTLB, all.as_flattened()).0, 0);
    rig.add(50);
    rig.wait_for(|health| matches!(health, [Health::Broken(_)]));
}

#[test]
fn queue_that_is_stopped_or_suspended_is_left_alone() {
    let mut rig = Rig::new(Format::Split, Echo::default());
    let (stop, go) = ([0; 8], [0, 0, 0, 0, 1, 0, 0, 0]);
    for _ in 0..3 {
        rig.start();
        for times in 0..5 {
            rig.add(1);
            rig.collect(1);
            assert_eq!(rig.ask(SET_VQ_READY, &stop).0, 0);
            assert_eq!(rig.service.health(), [Health::Waiting]);
            rig.add(2);
            rig.gets_nothing();
            let (_, state) = rig.ask(GET_VQ_STATE, &[0; 4]);
            assert_eq!(state[4..6], [2 * times + 1, 0]);
            assert_eq!(rig.ask(SET_VQ_READY, &go).0, 0);
            rig.collect(1);
        }
        assert_eq!(rig.ask(SUSPEND, &[]).0, 0);
        rig.add(3);
        assert_eq!(rig.ask(SET_VQ_READY, &go).0, 0);
        rig.gets_nothing();
        let (_, state) = rig.ask(GET_VQ_STATE, &[0; 4]);
        assert_eq!(state[4..6], [10, 0]);
    }
}

#[test]
fn queue_that_becomes_ready_late_and_interrupts_that_come_early_lose_nothing() {
    let mut rig = Rig::new(Format::Split, Echo::default());
    rig.kernel.ready.store(false, Ordering::SeqCst);
    rig.kernel.early.store(5, Ordering::SeqCst);
    rig.start();
    rig.wait_for(|health| health == [Health::Waiting]);
    // Before the queue counts: the kernel drops this kick.
    *rig.kernel.kick.lock().unwrap() = None;
    rig.add(7);
    rig.kernel.ready.store(true, Ordering::SeqCst);
    rig.collect(1);
    assert_eq!(rig.answer(7), 8);
    assert_eq!(rig.kernel.early.load(Ordering::SeqCst), 0);
}

#[test]
fn broken_queue_is_told_and_works_again_after_a_reset() {
    let mut rig = Rig::new(Format::Split, Echo::default());
    rig.start();
    rig.wait_for(|health| health == [Health::Running]);
    let (from, to, size) = (0, 1000, SIZE);
    let index = rig.kernel.setup.layout.driver + 2;
    OnFile(&rig.kernel.memory).store(index, to).unwrap();
    let kick = rig.kernel.kick.lock().unwrap().take().unwrap();
    nix::unistd::write(&kick, &1u64.to_ne_bytes()).unwrap();
    let broken = Health::Broken(Broken::IndexJump { from, to, size });
    rig.wait_for(|health| health == [broken]);
    assert_eq!(rig.ask(UPDATE_IOTLB, &[0; 16]).0, 0);
    rig.start();
    rig.add(1);
    rig.collect(1);
}

#[test]
fn file_that_hangs_delays_no_answer_and_what_it_was_for_stays_untouched() {
    let (enter, entered) = channel();
    let (leave, left) = channel();
    let gate = Some((Mutex::new(enter), Mutex::new(left)));
    let mut rig = Rig::new(Format::Split, Echo { gate });
    rig.start();
    rig.add(10);
    assert_eq!(entered.recv_timeout(LONG), Ok(10));
    let started = Instant::now();
    assert_eq!(rig.ask(UPDATE_IOTLB, &[0; 16]).0, 0);
    assert!(started.elapsed() < GRACE, "{:?}", started.elapsed());
    assert!(rig.status(0));
    let taken = started.elapsed();
    assert!(
        taken >= GRACE && taken < GRACE + Duration::from_secs(10),
        "{taken:?}"
    );

    // Two drivers later the first one's request still hangs: nothing may overtake it.
    rig.start();
    rig.add(20);
    rig.start();
    rig.add(30);
    assert!(
        entered.recv_timeout(2 * GRACE).is_err(),
        "a request overtook another"
    );
    leave.send(()).unwrap();
    assert_eq!(entered.recv_timeout(LONG), Ok(30));
    assert_eq!(rig.answer(10), 0, "memory was written after the reset");
    leave.send(()).unwrap();
    rig.collect(1);
    assert_eq!((rig.answer(10), rig.answer(20), rig.answer(30)), (0, 0, 31));
}

#[test]
fn kernel_that_gives_the_device_up_ends_the_service() {
    let mut rig = Rig::new(Format::Split, Echo::default());
    rig.start();
    drop(rig.socket);
    rig.service.ended().read().unwrap();
    let error = rig.service.stop().unwrap_err();
    assert!(matches!(error, Error::Broken(_)), "{error}");
    assert!(error.to_string().contains("test"), "{error}");
}

#[test]
fn configuration_reaches_the_kernel_while_the_device_is_served() {
    let mut rig = Rig::new(Format::Split, Echo::default());
    rig.service.config_changed().unwrap();
    assert_eq!(*rig.kernel.config.lock().unwrap(), b"config");
    rig.start();
    drop(rig.socket);
    rig.service.ended().read().unwrap();
    // The thread that has ended lets go of the kernel's side at any moment now.
    while rig.service.config_changed().is_ok() {}
    let error = rig.service.config_changed().unwrap_err();
    assert!(matches!(error, Error::Broken(_)), "{error}");
}

#[test]
fn any_request_is_answered() {
    let mut rig = Rig::new(Format::Split, Echo::default());
    rig.start();
    let mut state = 1u64;
    for _ in 0..5000 {
        let mut bytes = [0; MESSAGE_BYTES];
        for chunk in bytes.chunks_mut(8) {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            chunk.copy_from_slice(&state.to_le_bytes());
        }
        let kind = u32::from(bytes[0] % 8);
        bytes[..4].copy_from_slice(&kind.to_ne_bytes());
        rig.ask_raw(&bytes);
    }
    rig.start();
    rig.add(1);
    rig.collect(1);
}
