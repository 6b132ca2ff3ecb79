//! What newer kernels add to VDUSE: API version 1 and its features, through `/dev/vhost-vdpa-N`;
//! and that nothing of it is missed where the kernel is older.
//!
//! Runs where the modules are loaded and `/dev` belongs to the test: in the VM of
//! `cargo xtask vm --kernel next --test vduse_next`, or with another kernel.

#[path = "../../devices/tests/support/mod.rs"]
mod rings;
mod support;

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd as _, FromRawFd as _};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use ioregion_devices::virtio::{
    AtOnce, Broken, Chain, Device, Format, Lane, Memory, Refusal, Setup,
};
use ioregion_vduse::{
    Control, DeviceConfig, DeviceFile, Error, Groups, Health, Identity, Log, Logged, Port as _,
    Service, ServiceOptions, offered, vdpa,
};
use rings::{BYTES, DATA, Driver, Flat, OnFile, put};
use support::{LONG, driver};
use vhost::vdpa::VhostVdpa as _;
use vhost::vhost_kern::VhostKernFeatures as _;
use vhost::vhost_kern::vdpa::VhostKernVdpa;
use vhost::{VhostBackend as _, VringConfigData};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryBackend as _, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

const SIZE: u16 = 16;
const GRACE: Duration = Duration::from_secs(2);
/// What nobody does takes at least so long.
const WHILE: Duration = Duration::from_millis(500);
/// `VIRTIO_F_VERSION_1` and `VIRTIO_F_ACCESS_PLATFORM`.
const NEEDED: u64 = 1 << 32 | 1 << 33;
/// `VIRTIO_F_RING_PACKED`.
const PACKED: u64 = 1 << 34;
/// `VHOST_BACKEND_F_*`.
const IOTLB_V2: u64 = 1 << 1;
const IOTLB_ASID: u64 = 1 << 3;
const SUSPEND: u64 = 1 << 4;

/// Whether the kernel has API version 1 and the features: Linux 7.3 does, 6.12 does not.
fn is_new() -> bool {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let major = release.split('.').next().unwrap();
    major.parse::<u32>().unwrap() >= 7
}

/// Where requests say that they have come, and wait until they are let through.
type Gate = (Mutex<Sender<u8>>, Mutex<Receiver<()>>);

/// Answers each request with the byte that it reads, plus one; where it has a gate, after saying
/// which and being let through.
struct Echo {
    queues: u16,
    gate: Option<Gate>,
}

impl Echo {
    fn new(queues: u16) -> Arc<Self> {
        let gate = None;
        Arc::new(Self { queues, gate })
    }

    fn gated() -> (Arc<Self>, Receiver<u8>, Sender<()>) {
        let (enter, entered) = channel();
        let (leave, left) = channel();
        let gate = Some((Mutex::new(enter), Mutex::new(left)));
        (Arc::new(Self { queues: 1, gate }), entered, leave)
    }

    fn serve(&self, chain: &Chain, memory: &dyn Memory) -> Result<u32, Broken> {
        let mut byte = [0];
        chain.read(memory, 0, &mut byte)?;
        if let Some((enter, leave)) = &self.gate {
            enter.lock().unwrap().send(byte[0]).unwrap();
            leave.lock().unwrap().recv().unwrap();
        }
        chain.write(memory, 0, &[byte[0].wrapping_add(1)])?;
        Ok(1)
    }
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
        // A disk without room, at which nobody looks.
        vec![0; 64]
    }

    fn queues(&self) -> u16 {
        self.queues
    }

    fn lane(self: Arc<Self>, _queue: u16, _features: u64) -> io::Result<Box<dyn Lane>> {
        let echo = move |chain: &Chain, memory: &dyn Memory| self.serve(chain, memory);
        Ok(Box::new(AtOnce(echo)))
    }
}

fn config(name: &str, device: &Echo) -> DeviceConfig {
    DeviceConfig {
        name: name.into(),
        device_id: device.kind(),
        vendor_id: 0,
        features: offered(device, &options()),
        queues: device.queues(),
        config: device.config(),
    }
}

fn options() -> ServiceOptions {
    ServiceOptions {
        packed: true,
        grace: GRACE,
    }
}

/// A device that vhost_vdpa has, and its service.
struct Served {
    name: &'static str,
    control: Control,
    log: PathBuf,
    groups: Vec<u16>,
    service: Option<Service>,
}

impl Served {
    /// Makes a device whose queues are each of a group and an address space, or all of one.
    fn new(name: &'static str, device: &Arc<Echo>, grouped: bool) -> Self {
        let control = Control::newest().unwrap();
        let groups: Vec<u16> = match grouped {
            true => (0..device.queues).collect(),
            false => Vec::new(),
        };
        let config = config(name, device);
        if grouped {
            let (groups, spaces) = (device.queues, device.queues);
            let groups = Groups { groups, spaces };
            control.create_grouped(&config, groups).unwrap();
        } else {
            control.create(&config).unwrap();
        }
        let mut served = Self {
            name,
            control,
            log: std::env::temp_dir().join(format!("{name}.log")),
            groups,
            service: None,
        };
        served.serve(device);
        vdpa::attach(name).unwrap();
        let place = Path::new("/sys/bus/vdpa/devices").join(name);
        if place.join("driver").exists() {
            driver("unbind", name);
        }
        fs::write(place.join("driver_override"), "vhost_vdpa").unwrap();
        fs::write("/sys/bus/vdpa/drivers/vhost_vdpa/bind", name).unwrap();
        served
    }

    /// Starts a service, or another one.
    fn serve(&mut self, device: &Arc<Echo>) {
        let mut file = DeviceFile::open(self.name).unwrap();
        assert_eq!(file.version(), u64::from(is_new()));
        file.group_queues(&self.groups).unwrap();
        let logged = Logged {
            name: self.name.into(),
            identity: Identity::of(self.name).unwrap(),
            kind: device.kind(),
            features: offered(&**device, &options()),
            queues: device.queues,
            queue_size: SIZE,
        };
        let log = Arc::new(Log::open(&self.log, &logged).unwrap());
        if !vdpa::is_attached(self.name) {
            for queue in 0..device.queues {
                file.set_up_queue(queue, SIZE).unwrap();
            }
        }
        let device = Arc::clone(device) as Arc<dyn Device>;
        let service = Service::start_logged(self.name, file, device, options(), log);
        self.service = Some(service.unwrap());
    }

    fn health(&self) -> Vec<Health> {
        self.service.as_ref().unwrap().health()
    }

    fn becomes(&self, queue: usize, wanted: impl Fn(Health) -> bool) {
        let until = Instant::now() + LONG;
        while !self
            .health()
            .get(queue)
            .is_some_and(|&health| wanted(health))
        {
            assert!(Instant::now() < until, "{:?}", self.health());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn node(&self) -> String {
        let device = Path::new("/sys/bus/vdpa/devices").join(self.name);
        let node = fs::read_dir(device).unwrap().find_map(|entry| {
            let node = entry.unwrap().file_name().into_string().unwrap();
            node.starts_with("vhost-vdpa-").then_some(node)
        });
        format!("/dev/{}", node.unwrap())
    }

    fn end(mut self) {
        vdpa::detach(self.name).unwrap();
        self.service.take().unwrap().stop().unwrap();
        self.control.destroy(self.name).unwrap();
        fs::remove_file(&self.log).unwrap();
    }
}

/// A queue of a guest, in memory of its own.
struct Lines {
    memory: File,
    mapped: Arc<GuestMemoryMmap>,
    setup: Setup,
    driver: Box<dyn Driver>,
    kick: EventFd,
    call: EventFd,
}

impl Lines {
    fn new(format: Format) -> Self {
        // SAFETY: A name that ends with a zero; what comes back is nobody else's.
        let memory = unsafe {
            let fd = libc::memfd_create(c"guest".as_ptr(), libc::MFD_CLOEXEC);
            assert!(fd >= 0);
            File::from_raw_fd(fd)
        };
        memory.set_len(BYTES as u64).unwrap();
        let whole = FileOffset::new(memory.try_clone().unwrap(), 0);
        let range = (GuestAddress(Flat::BASE), BYTES, Some(whole));
        let setup = rings::setup(format, SIZE, false);
        let eventfd = || EventFd::new(EFD_NONBLOCK).unwrap();
        Self {
            memory,
            mapped: Arc::new(GuestMemoryMmap::from_ranges_with_files([range]).unwrap()),
            driver: rings::driver(&setup),
            setup,
            kick: eventfd(),
            call: eventfd(),
        }
    }

    /// Makes a request available, and kicks.
    fn add(&mut self, byte: u8) {
        let memory = OnFile(&self.memory);
        let at = DATA + 64 * u64::from(byte);
        put(&memory, at, &[byte, 0]);
        let ranges = [(at, 1, false), (at + 1, 1, true)];
        self.driver.add(&memory, &ranges, false).unwrap();
        self.kick.write(1).unwrap();
    }

    /// Whether a request comes back within a time, with the right answer.
    fn comes(&mut self, byte: u8, limit: Duration) -> bool {
        let until = Instant::now() + limit;
        while Instant::now() < until {
            // After the interrupt, and not before.
            if self.call.read().is_ok() {
                let done = self.driver.collect(&OnFile(&self.memory));
                if !done.is_empty() {
                    assert_eq!(done.len(), 1);
                    assert_eq!(self.answer(byte), byte + 1);
                    return true;
                }
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        false
    }

    fn answer(&self, byte: u8) -> u8 {
        let mut answer = [0];
        let at = DATA + 64 * u64::from(byte) + 1;
        OnFile(&self.memory).read(at, &mut answer).unwrap();
        answer[0]
    }
}

/// A VMM with a queue in each address space, or one in the only one.
struct Vmm {
    vdpa: VhostKernVdpa<Arc<GuestMemoryMmap>>,
    format: Format,
    lines: Vec<Lines>,
}

/// `struct vhost_msg_v2` with its IOTLB part.
#[repr(C)]
struct Message {
    kind: u32,
    space: u32,
    first: u64,
    size: u64,
    at: u64,
    access: u8,
    what: u8,
    rest: [u8; 38],
}

impl Vmm {
    fn connect(served: &Served, format: Format, queues: usize, features: u64) -> Self {
        let lines: Vec<Lines> = (0..queues).map(|_| Lines::new(format)).collect();
        let memory = Arc::clone(&lines[0].mapped);
        let mut vdpa = VhostKernVdpa::new(&served.node(), memory).unwrap();
        vdpa.set_owner().unwrap();
        let has = vdpa.get_backend_features().unwrap();
        assert_eq!(has & SUSPEND != 0, is_new(), "{has:#x}");
        assert_eq!(has & features, features, "{has:#x}");
        vdpa.set_backend_features(features).unwrap();
        Self {
            vdpa,
            format,
            lines,
        }
    }

    /// Maps a queue's memory in an address space, or takes it away.
    fn map(&self, queue: usize, space: u32, present: bool) {
        let at = self.lines[queue]
            .mapped
            .get_host_address(GuestAddress(Flat::BASE));
        let message = Message {
            // VHOST_IOTLB_MSG_V2; VHOST_ACCESS_RW; VHOST_IOTLB_UPDATE and _INVALIDATE.
            kind: 2,
            space,
            first: Flat::BASE,
            size: BYTES as u64,
            at: at.unwrap() as u64,
            access: 3,
            what: if present { 2 } else { 3 },
            rest: [0; 38],
        };
        // SAFETY: The struct is as long as is said, and integers.
        let written = unsafe {
            let bytes = (&raw const message).cast();
            libc::write(self.vdpa.as_raw_fd(), bytes, size_of::<Message>())
        };
        let error = io::Error::last_os_error();
        assert_eq!(written, size_of::<Message>() as isize, "{error}");
    }

    /// Resets the device, and everything up to `DRIVER_OK`, with empty rings.
    fn start(&mut self) {
        self.vdpa.set_status(0).unwrap();
        for bits in [1, 3] {
            self.vdpa.set_status(bits).unwrap();
        }
        let packed = self.format == Format::Packed;
        let features = NEEDED | if packed { PACKED } else { 0 };
        self.vdpa.set_features(features).unwrap();
        self.vdpa.set_status(11).unwrap();
        assert_eq!(self.vdpa.get_status().unwrap(), 11);
        for (queue, lines) in self.lines.iter_mut().enumerate() {
            put(&OnFile(&lines.memory), Flat::BASE, &vec![0; BYTES]);
            lines.driver = rings::driver(&lines.setup);
            let _ = lines.call.read();
            let layout = lines.setup.layout;
            self.vdpa.set_vring_num(queue, SIZE).unwrap();
            // Of packed queues, both wrap counters.
            let base = if packed { 0x8000_8000u32 } else { 0 };
            let index = u32::try_from(queue).unwrap();
            request(&self.vdpa, SET_VRING_BASE, index, base).unwrap();
            let config = VringConfigData {
                queue_max_size: SIZE,
                queue_size: SIZE,
                flags: 0,
                desc_table_addr: layout.descriptors,
                used_ring_addr: layout.device,
                avail_ring_addr: layout.driver,
                log_addr: None,
            };
            self.vdpa.set_vring_addr(queue, &config).unwrap();
            self.vdpa.set_vring_kick(queue, &lines.kick).unwrap();
            self.vdpa.set_vring_call(queue, &lines.call).unwrap();
            self.vdpa.set_vring_enable(queue, true).unwrap();
        }
        self.vdpa.set_status(15).unwrap();
        assert_eq!(self.vdpa.get_status().unwrap(), 15);
    }

    /// One request that is answered.
    fn ask(&mut self, queue: usize, byte: u8) {
        self.lines[queue].add(byte);
        assert!(self.lines[queue].comes(byte, LONG), "request {byte}");
    }

    fn base(&self) -> u32 {
        self.vdpa.get_vring_base(0).unwrap()
    }
}

/// `VHOST_SET_VRING_BASE`: where a queue starts. The library has it for split queues only.
const SET_VRING_BASE: u64 = 0x4008_af12;
/// `VHOST_VDPA_SET_GROUP_ASID`: for this the library (0.18) asks which group a queue is of.
const SET_GROUP_ASID: u64 = 0x4008_af7c;

/// A request with a `struct vhost_vring_state`.
fn request(
    vdpa: &VhostKernVdpa<Arc<GuestMemoryMmap>>,
    request: u64,
    index: u32,
    value: u32,
) -> io::Result<()> {
    let state = [index, value];
    // SAFETY: Both requests read two integers.
    match unsafe { libc::ioctl(vdpa.as_raw_fd(), request, state.as_ptr()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[test]
fn library_and_kernel_agree_on_the_newest_that_both_have() {
    let wanted = if is_new() { (1, 0b11) } else { (0, 0) };
    let control = Control::newest().unwrap();
    assert_eq!((control.version(), control.features()), wanted);
    // Less than the kernel has, where less is asked for.
    let oldest = Control::open().unwrap();
    assert_eq!((oldest.version(), oldest.features()), (0, 0));
    for (control, version) in [(oldest, 0), (control, wanted.0)] {
        let device = Echo::new(2);
        control.create(&config("agreed", &device)).unwrap();
        let mut file = DeviceFile::open("agreed").unwrap();
        assert_eq!(file.version(), version);
        assert_eq!(file.group_queues(&[0, 1]).is_ok(), version == 1);
        drop(file);
        control.destroy("agreed").unwrap();
    }
}

#[test]
fn queues_of_groups_use_the_memory_of_their_address_spaces() {
    let device = Echo::new(2);
    if !is_new() {
        let control = Control::newest().unwrap();
        let (groups, spaces) = (2, 2);
        let refused = control.create_grouped(&config("groups", &device), Groups { groups, spaces });
        let error = refused.unwrap_err();
        assert!(matches!(error, Error::Config { .. }), "{error}");
        assert!(error.to_string().contains("API version 1"), "{error}");
        return;
    }
    let mut served = Served::new("groups", &device, true);
    let mut vmm = Vmm::connect(&served, Format::Split, 2, IOTLB_V2 | IOTLB_ASID);
    assert_eq!(vmm.vdpa.get_group_num().unwrap(), 2);
    assert_eq!(vmm.vdpa.get_as_num().unwrap(), 2);
    for queue in 0..2 {
        assert_eq!(vmm.vdpa.get_vring_group(queue).unwrap(), queue);
    }
    request(&vmm.vdpa, SET_GROUP_ASID, 1, 1).unwrap();
    for round in 0..3u8 {
        // The same addresses, but other memory.
        vmm.map(0, 0, true);
        vmm.map(1, 1, true);
        vmm.start();
        for byte in 10 * round..10 * round + 10 {
            vmm.ask(0, byte);
            assert_eq!(vmm.lines[1].answer(byte), 0, "the other queue's memory");
            vmm.ask(1, byte + 100);
            assert_eq!(
                vmm.lines[0].answer(byte + 100),
                0,
                "the other queue's memory"
            );
        }
        // Not while a driver is ready.
        let refused = request(&vmm.vdpa, SET_GROUP_ASID, 0, 1).unwrap_err();
        assert_eq!(refused.raw_os_error(), Some(libc::EBUSY), "{refused}");
        // Taken back from one of them only.
        let (with, without) = match round {
            0 => (1, 0),
            1 => (0, 1),
            _ => break,
        };
        vmm.map(without, without.try_into().unwrap(), false);
        vmm.ask(with, 200);
        vmm.lines[without].add(200);
        served.becomes(without, |health| matches!(health, Health::Broken(_)));
        // The next service knows which space is whose, which the kernel tells nobody again.
        served.service.take().unwrap().stop().unwrap();
        served.serve(&device);
        vmm.ask(with, 201);
        vmm.map(with, with.try_into().unwrap(), false);
    }
    drop(vmm);
    served.end();
}

#[test]
fn suspended_device_stands_still_until_its_reset() {
    for format in [Format::Split, Format::Packed] {
        let (device, entered, leave) = Echo::gated();
        let mut served = Served::new("suspend", &device, false);
        let features = if is_new() { SUSPEND } else { 0 };
        let mut vmm = Vmm::connect(&served, format, 1, IOTLB_V2 | features);
        vmm.map(0, 0, true);
        vmm.start();
        for _ in 0..2 {
            leave.send(()).unwrap();
        }
        vmm.ask(0, 1);
        vmm.ask(0, 2);
        assert_eq!((entered.recv(), entered.recv()), (Ok(1), Ok(2)));
        if !is_new() {
            assert!(vmm.vdpa.suspend().is_err());
            leave.send(()).unwrap();
            vmm.ask(0, 3);
            drop(vmm);
            served.end();
            continue;
        }

        // A request that hangs for too long: no, and the device goes on.
        vmm.lines[0].add(3);
        assert_eq!(entered.recv_timeout(LONG), Ok(3));
        let started = Instant::now();
        assert!(vmm.vdpa.suspend().is_err());
        assert!(started.elapsed() >= GRACE);
        leave.send(()).unwrap();
        assert!(vmm.lines[0].comes(3, LONG));

        // One that ends in time: only then is the device suspended.
        vmm.lines[0].add(4);
        assert_eq!(entered.recv_timeout(LONG), Ok(4));
        std::thread::scope(|scope| {
            let vdpa = &vmm.vdpa;
            let suspending = scope.spawn(|| vdpa.suspend().is_ok());
            std::thread::sleep(GRACE / 4);
            assert!(!suspending.is_finished());
            leave.send(()).unwrap();
            assert!(suspending.join().unwrap());
        });
        // The kernel drops what comes too late for it.
        let lines = &mut vmm.lines[0];
        assert_eq!(lines.driver.collect(&OnFile(&lines.memory)).len(), 1);
        let _ = vmm.lines[0].call.read();
        let base = vmm.base();
        let taken = match format {
            Format::Split => 4,
            // Eight descriptors in the first turn of both.
            Format::Packed => 0x8008_8008,
        };
        assert_eq!(base, taken);
        vmm.lines[0].add(5);
        assert!(!vmm.lines[0].comes(5, WHILE));
        assert!(entered.try_recv().is_err());

        // The next service leaves it as it is, and knows where it stands.
        served.service.take().unwrap().stop().unwrap();
        served.serve(&device);
        assert_eq!(vmm.base(), base);
        served.becomes(0, |health| health == Health::Waiting);
        vmm.lines[0].kick.write(1).unwrap();
        assert!(!vmm.lines[0].comes(5, WHILE));
        assert!(entered.try_recv().is_err());
        assert_eq!(vmm.base(), base);

        for byte in [6, 7] {
            vmm.start();
            leave.send(()).unwrap();
            vmm.ask(0, byte);
            assert_eq!(entered.recv(), Ok(byte));
        }
        drop(vmm);
        served.end();
    }
}

#[test]
fn stopped_queue_stands_still_and_goes_on_from_there() {
    let (device, entered, leave) = Echo::gated();
    let served = Served::new("stopped", &device, false);
    let mut vmm = Vmm::connect(&served, Format::Split, 1, IOTLB_V2);
    vmm.map(0, 0, true);
    vmm.start();
    for byte in 1..4 {
        leave.send(()).unwrap();
        vmm.ask(0, byte);
        assert_eq!(entered.recv(), Ok(byte));
        vmm.vdpa.set_vring_enable(0, false).unwrap();
        // An older kernel tells nobody but its own driver's kicks.
        let health = if is_new() {
            Health::Waiting
        } else {
            Health::Running
        };
        served.becomes(0, |now| now == health);
        assert_eq!(vmm.base(), u32::from(2 * byte - 1));
        vmm.lines[0].add(100 + byte);
        assert!(!vmm.lines[0].comes(100 + byte, WHILE));
        assert!(entered.try_recv().is_err());
        vmm.vdpa.set_vring_enable(0, true).unwrap();
        // The kernel has dropped the kick.
        vmm.lines[0].kick.write(1).unwrap();
        leave.send(()).unwrap();
        assert!(vmm.lines[0].comes(100 + byte, LONG));
        assert_eq!(entered.recv(), Ok(100 + byte));
    }
    if is_new() {
        // A request that hangs keeps the queue from being stopped: the kernel gives the device up,
        // and its service says so.
        vmm.lines[0].add(50);
        assert_eq!(entered.recv_timeout(LONG), Ok(50));
        vmm.vdpa.set_vring_enable(0, false).unwrap();
        let mut served = served;
        let service = served.service.take().unwrap();
        service.ended().read().unwrap();
        leave.send(()).unwrap();
        let error = service.stop().unwrap_err();
        assert!(matches!(error, Error::Broken(_)), "{error}");
        drop(vmm);
        vdpa::detach("stopped").unwrap();
        served.control.destroy("stopped").unwrap();
        fs::remove_file(&served.log).unwrap();
    } else {
        drop(vmm);
        served.end();
    }
}
