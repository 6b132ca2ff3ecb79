//! `ioregion vduse blk` as a VMM uses it: through `/dev/vhost-vdpa-N`, by rust-vmm's `vhost`.
//!
//! Runs where the modules are loaded and `/dev` belongs to the test: in the VM of
//! `cargo xtask vm --test vduse_vhost`.

#[path = "../../devices/tests/support/mod.rs"]
mod rings;
mod support;

use std::fs::{self, File};
use std::os::fd::FromRawFd as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use ioregion_devices::virtio::{Format, Memory as _, Setup};
use rings::{BYTES, DATA, Driver, Flat, OnFile, put};
use support::{LONG, MIB, Service, buffer, driver, fill, image};
use vhost::vdpa::VhostVdpa as _;
use vhost::vhost_kern::VhostKernFeatures as _;
use vhost::vhost_kern::vdpa::VhostKernVdpa;
use vhost::{VhostBackend as _, VringConfigData};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryBackend as _, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

const SIZE: u16 = 16;
/// `VIRTIO_F_VERSION_1` and `VIRTIO_F_ACCESS_PLATFORM`.
const NEEDED: u64 = 1 << 32 | 1 << 33;
/// `VHOST_BACKEND_F_IOTLB_MSG_V2`.
const IOTLB_V2: u64 = 1 << 1;

const IN: u32 = 0;
const OUT: u32 = 1;
const OK: u8 = 0;
const IOERR: u8 = 1;

/// A service whose device vhost_vdpa has.
fn start(name: &str, image: &Path) -> (Service, PathBuf) {
    let service = Service::start(name, image, &[]);
    driver("unbind", name);
    let device = Path::new("/sys/bus/vdpa/devices").join(name);
    fs::write(device.join("driver_override"), "vhost_vdpa").unwrap();
    fs::write("/sys/bus/vdpa/drivers/vhost_vdpa/bind", name).unwrap();
    let node = fs::read_dir(device).unwrap().find_map(|entry| {
        let node = entry.unwrap().file_name().into_string().unwrap();
        node.starts_with("vhost-vdpa-").then_some(node)
    });
    (service, Path::new("/dev").join(node.unwrap()))
}

/// A VMM with a guest whose driver keeps to the specification.
struct Vmm {
    vdpa: VhostKernVdpa<Arc<GuestMemoryMmap>>,
    memory: File,
    mapped: Arc<GuestMemoryMmap>,
    setup: Setup,
    driver: Box<dyn Driver>,
    kick: EventFd,
    call: EventFd,
}

impl Vmm {
    fn connect(node: &Path) -> Self {
        // SAFETY: A name that ends with a zero; what comes back is nobody else's.
        let memory = unsafe {
            let fd = libc::memfd_create(c"guest".as_ptr(), libc::MFD_CLOEXEC);
            assert!(fd >= 0);
            File::from_raw_fd(fd)
        };
        memory.set_len(BYTES as u64).unwrap();
        let whole = FileOffset::new(memory.try_clone().unwrap(), 0);
        let range = (GuestAddress(Flat::BASE), BYTES, Some(whole));
        let mapped = Arc::new(GuestMemoryMmap::from_ranges_with_files([range]).unwrap());
        let node = node.to_str().unwrap();
        let mut vdpa = VhostKernVdpa::new(node, Arc::clone(&mapped)).unwrap();
        vdpa.set_owner().unwrap();
        let has = vdpa.get_backend_features().unwrap();
        vdpa.set_backend_features(has & IOTLB_V2).unwrap();
        let setup = rings::setup(Format::Split, SIZE, false);
        let eventfd = || EventFd::new(EFD_NONBLOCK).unwrap();
        Self {
            vdpa,
            memory,
            mapped,
            driver: rings::driver(&setup),
            setup,
            kick: eventfd(),
            call: eventfd(),
        }
    }

    /// Resets the device and settles features: the status that follows.
    fn settle(&mut self, features: u64) -> u8 {
        self.vdpa.set_status(0).unwrap();
        for bits in [1, 3] {
            self.vdpa.set_status(bits).unwrap();
        }
        self.vdpa.set_features(features).unwrap();
        self.vdpa.set_status(11).unwrap();
        self.vdpa.get_status().unwrap()
    }

    fn map(&self, size: u64) {
        let at = self
            .mapped
            .get_host_address(GuestAddress(Flat::BASE))
            .unwrap();
        self.vdpa.dma_map(Flat::BASE, size, at, false).unwrap();
    }

    fn unmap(&self, size: u64) {
        self.vdpa.dma_unmap(Flat::BASE, size).unwrap();
    }

    /// Everything up to `DRIVER_OK`; the queue counts before or after that.
    fn start(&mut self, enable_late: bool) {
        assert_eq!(self.settle(NEEDED), 11);
        put(&OnFile(&self.memory), Flat::BASE, &vec![0; BYTES]);
        self.driver = rings::driver(&self.setup);
        let layout = self.setup.layout;
        self.vdpa.set_vring_num(0, SIZE).unwrap();
        self.vdpa.set_vring_base(0, 0).unwrap();
        let config = VringConfigData {
            queue_max_size: SIZE,
            queue_size: SIZE,
            flags: 0,
            desc_table_addr: layout.descriptors,
            used_ring_addr: layout.device,
            avail_ring_addr: layout.driver,
            log_addr: None,
        };
        self.vdpa.set_vring_addr(0, &config).unwrap();
        self.vdpa.set_vring_kick(0, &self.kick).unwrap();
        self.vdpa.set_vring_call(0, &self.call).unwrap();
        if !enable_late {
            self.vdpa.set_vring_enable(0, true).unwrap();
        }
        self.vdpa.set_status(15).unwrap();
        assert_eq!(self.vdpa.get_status().unwrap(), 15);
        if enable_late {
            self.vdpa.set_vring_enable(0, true).unwrap();
        }
    }

    /// One request with its data at `at`, answered or not.
    fn ask(&mut self, kind: u32, sector: u64, at: u64, len: u32) -> Option<u8> {
        let memory = OnFile(&self.memory);
        let status = DATA + 0x20;
        put(&memory, DATA, &kind.to_le_bytes());
        put(&memory, DATA + 8, &sector.to_le_bytes());
        put(&memory, status, &[0xff]);
        let ranges = [(DATA, 16, false), (at, len, kind == IN), (status, 1, true)];
        self.driver.add(&memory, &ranges, false).unwrap();
        self.kick.write(1).unwrap();
        let until = Instant::now() + LONG;
        let mut done = Vec::new();
        while done.is_empty() {
            if Instant::now() > until {
                return None;
            }
            std::thread::sleep(Duration::from_millis(1));
            let _ = self.call.read();
            done = self.driver.collect(&memory);
        }
        assert_eq!(done.len(), 1);
        let mut answer = [0];
        memory.read(status, &mut answer).unwrap();
        Some(answer[0])
    }

    fn put(&self, at: u64, bytes: &[u8]) {
        put(&OnFile(&self.memory), at, bytes);
    }

    fn get(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        OnFile(&self.memory).read(at, &mut bytes).unwrap();
        bytes
    }
}

#[test]
fn vmm_reads_and_writes_and_takes_memory_back() {
    let dir = tempfile::tempdir().unwrap();
    let path = image(&dir, MIB);
    let mut content = buffer();
    fill(&mut content, 9);
    fs::write(&path, content.0).unwrap();
    let (service, node) = start("vmm", &path);
    let mut vmm = Vmm::connect(&node);
    assert_eq!(vmm.vdpa.get_device_id().unwrap(), 2);
    let mut capacity = [0; 8];
    vmm.vdpa.get_config(0, &mut capacity).unwrap();
    assert_eq!(u64::from_le_bytes(capacity), MIB / 512);
    vmm.map(BYTES as u64);
    let at = DATA + 0x1000;
    for round in 0..4u8 {
        vmm.start(round % 2 == 1);
        for sector in [1, 100, 2040] {
            assert_eq!(vmm.ask(IN, sector, at, 4096), Some(OK));
            let from = sector as usize * 512;
            assert!(vmm.get(at, 4096) == content.0[from..from + 4096]);
            let bytes = vec![round ^ 0x5a; 4096];
            vmm.put(at, &bytes);
            assert_eq!(vmm.ask(OUT, sector, at, 4096), Some(OK));
            content.0[from..from + 4096].copy_from_slice(&bytes);
            // Gone and there again: the service must not use what it had mapped.
            vmm.unmap(BYTES as u64);
            vmm.map(BYTES as u64);
        }
        assert_eq!(vmm.vdpa.get_vring_base(0).unwrap(), 6);
    }
    drop(vmm);
    service.end();
    assert!(fs::read(&path).unwrap() == content.0);
}

#[test]
fn features_that_do_not_do_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (service, node) = start("features", &image(&dir, MIB));
    let mut vmm = Vmm::connect(&node);
    for features in [1 << 33, NEEDED & 1 << 33 | 1 << 9] {
        assert_eq!(vmm.settle(features), 3, "{features:#x}");
    }
    assert_eq!(vmm.settle(NEEDED), 11);
    drop(vmm);
    service.end();
}

#[test]
fn hostile_vmm_breaks_its_queue_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let (service, node) = start("hostile", &image(&dir, MIB));
    let mut vmm = Vmm::connect(&node);
    vmm.map(BYTES as u64);
    let at = DATA + 0x1000;

    // Data, then a header, where the memory was cut short: touching it raises SIGBUS.
    vmm.start(false);
    assert_eq!(vmm.ask(IN, 0, at, 512), Some(OK));
    let last = Flat::BASE + BYTES as u64 - 4096;
    vmm.memory.set_len(BYTES as u64 - 4096).unwrap();
    assert_eq!(vmm.ask(IN, 0, last, 512), Some(IOERR));
    assert_eq!(vmm.ask(OUT, 0, last, 512), Some(IOERR));
    assert_eq!(vmm.ask(IN, 0, at, 512), Some(OK));
    vmm.memory.set_len(BYTES as u64).unwrap();

    // An index that jumps: no answer any more, until a reset.
    let index = vmm.setup.layout.driver + 2;
    vmm.start(false);
    vmm.put(index, &5000u16.to_le_bytes());
    vmm.kick.write(1).unwrap();
    std::thread::sleep(Duration::from_secs(1));
    assert_eq!(vmm.get(vmm.setup.layout.device + 2, 2), [0; 2]);
    vmm.start(false);
    assert_eq!(vmm.ask(IN, 0, at, 512), Some(OK));

    // Everything gone under the queue.
    vmm.unmap(BYTES as u64);
    vmm.kick.write(1).unwrap();
    std::thread::sleep(Duration::from_secs(1));
    vmm.map(BYTES as u64);
    vmm.start(false);
    assert_eq!(vmm.ask(IN, 0, at, 512), Some(OK));
    drop(vmm);
    service.end();
}

#[test]
fn memory_that_comes_and_goes_under_load_loses_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let path = image(&dir, MIB);
    let (service, node) = start("moving", &path);
    let mut vmm = Vmm::connect(&node);
    vmm.map(BYTES as u64);
    vmm.start(false);
    // Each time anything is mapped or unmapped, the kernel takes all mappings back.
    let spare = Flat::BASE + (1 << 30);
    let at = vmm
        .mapped
        .get_host_address(GuestAddress(Flat::BASE))
        .unwrap();
    for round in 0..200u64 {
        // Two sectors are written, and two others are read that were written the round before.
        let memory = OnFile(&vmm.memory);
        let byte = |round: u64, sector: u64| (round * 7 + sector) as u8;
        let places: Vec<(u32, u64, u64)> = (0..4u64)
            .map(|number| {
                let kind = if number < 2 { OUT } else { IN };
                let sector = 2 * ((round + u64::from(number >= 2)) % 2) + number % 2;
                (kind, sector, DATA + 0x1000 * (1 + number))
            })
            .collect();
        for &(kind, sector, at) in &places {
            put(&memory, at, &kind.to_le_bytes());
            put(&memory, at + 8, &sector.to_le_bytes());
            put(&memory, at + 16, &[0xff]);
            let content = if kind == OUT {
                byte(round, sector)
            } else {
                0xee
            };
            put(&memory, at + 512, &[content; 512]);
            let ranges = [
                (at, 16, false),
                (at + 512, 512, kind == IN),
                (at + 16, 1, true),
            ];
            vmm.driver.add(&memory, &ranges, false).unwrap();
        }
        vmm.kick.write(1).unwrap();
        let until = Instant::now() + LONG;
        let mut done = 0;
        let mut changes = 0;
        while done < places.len() || changes == 0 {
            assert!(Instant::now() < until, "{done} of {}", places.len());
            vmm.vdpa.dma_map(spare, 4096, at, false).unwrap();
            vmm.vdpa.dma_unmap(spare, 4096).unwrap();
            changes += 1;
            done += vmm.driver.collect(&OnFile(&vmm.memory)).len();
        }
        assert_eq!(done, places.len());
        for &(kind, sector, at) in &places {
            assert_eq!(vmm.get(at + 16, 1), [OK], "round {round}");
            if kind == IN && round > 0 {
                let expected = vec![byte(round - 1, sector); 512];
                assert!(vmm.get(at + 512, 512) == expected, "round {round}");
            }
        }
    }
    drop(vmm);
    service.end();
}

#[test]
fn service_that_was_killed_is_followed_by_another_under_a_vmm() {
    let dir = tempfile::tempdir().unwrap();
    let path = image(&dir, MIB);
    let (mut service, node) = start("vmm-killed", &path);
    let mut vmm = Vmm::connect(&node);
    vmm.map(BYTES as u64);
    vmm.start(false);
    let at = DATA + 0x1000;
    for round in 0..5u8 {
        vmm.put(at, &[round; 4096]);
        assert_eq!(vmm.ask(OUT, u64::from(round), at, 512), Some(OK));
        service.signal(nix::sys::signal::Signal::SIGKILL);
        support::wait(&mut service.child);
        let mut command = support::command("vmm-killed", &path);
        let serial = ["--serial", "serial-vmm-killed"];
        service.child = command.args(serial).spawn().unwrap();
        if round % 2 == 0 {
            // The kernel asks before anybody serves, and is answered. Meanwhile it holds a lock on
            // this process's memory, without which it starts no other process: that came first.
            let spare = Flat::BASE + (1 << 30);
            let host = vmm.mapped.get_host_address(GuestAddress(Flat::BASE));
            let host = host.unwrap();
            vmm.vdpa.dma_map(spare, 4096, host, false).unwrap();
            vmm.vdpa.dma_unmap(spare, 4096).unwrap();
        }
        assert_eq!(vmm.ask(IN, u64::from(round), at + 4096, 512), Some(OK));
        assert_eq!(vmm.get(at + 4096, 512), [round; 512]);
    }
    drop(vmm);
    service.end();
}
