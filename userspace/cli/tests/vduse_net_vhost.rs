//! `ioregion vduse net` as a VMM uses it: through `/dev/vhost-vdpa-N`, by rust-vmm's `vhost`.
//!
//! Runs where the modules are loaded and `/dev` belongs to the test: in the VM of
//! `cargo xtask vm --test vduse_net_vhost`.

#[path = "../../devices/tests/support/mod.rs"]
mod rings;
mod support;

use std::fs::{self, File};
use std::net::{Ipv4Addr, UdpSocket};
use std::os::fd::FromRawFd as _;
use std::path::Path;
use std::process::Child;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ioregion_devices::net::{HEADER_BYTES, RECEIVE, SEND};
use ioregion_devices::virtio::{Format, Layout, Memory as _, Setup};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rings::{BYTES, DATA, Driver, Flat, OnFile, Range, put};
use support::net::{command, interface_of, ip};
use support::{LONG, driver, wait};
use vhost::vdpa::VhostVdpa as _;
use vhost::vhost_kern::VhostKernFeatures as _;
use vhost::vhost_kern::vdpa::VhostKernVdpa;
use vhost::{VhostBackend as _, VringConfigData};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryBackend as _, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

const SIZE: u16 = 64;
/// `VIRTIO_F_VERSION_1` and `VIRTIO_F_ACCESS_PLATFORM`.
const NEEDED: u64 = 1 << 32 | 1 << 33;
const CSUM: u64 = 1 << 0;
const MTU: u64 = 1 << 3;
const GUEST_CSUM: u64 = 1 << 1;
const GUEST_TSO4: u64 = 1 << 7;
const HOST_TSO4: u64 = 1 << 11;
const MERGEABLE: u64 = 1 << 15;
/// `VHOST_BACKEND_F_IOTLB_MSG_V2`.
const IOTLB_V2: u64 = 1 << 1;

/// Bytes of each buffer for packets.
const ROOM: u32 = 256;
/// Where the packets lie that are sent, behind all buffers.
const OUT: u64 = DATA + 0x8000;

/// A queue of the guest's driver, which keeps to the specification.
struct Ring {
    setup: Setup,
    driver: Box<dyn Driver>,
    kick: EventFd,
    call: EventFd,
}

/// A running service with a TAP device that was made for it, and a VMM that has its device.
struct Vmm {
    vdpa: VhostKernVdpa<Arc<GuestMemoryMmap>>,
    memory: File,
    rings: [Ring; 2],
    /// The buffers that were offered, in order.
    offered: Vec<u64>,
    /// Bytes in the first of them, which came back.
    filled: Vec<u32>,
    offers: u64,
    tap: String,
    service: Child,
}

impl Vmm {
    fn start(number: u8) -> Self {
        let (name, tap) = (format!("guest{number}"), format!("gtap{number}"));
        let mut service = command(&name, &tap).spawn().unwrap();
        interface_of(&name, || {
            let ended = service.try_wait().unwrap();
            assert!(ended.is_none(), "the service ended: {ended:?}");
        });
        driver("unbind", &name);
        let device = Path::new("/sys/bus/vdpa/devices").join(&name);
        fs::write(device.join("driver_override"), "vhost_vdpa").unwrap();
        fs::write("/sys/bus/vdpa/drivers/vhost_vdpa/bind", &name).unwrap();
        let node = fs::read_dir(device).unwrap().find_map(|entry| {
            let node = entry.unwrap().file_name().into_string().unwrap();
            node.starts_with("vhost-vdpa-").then_some(node)
        });
        let node = format!("/dev/{}", node.unwrap());
        // No packets but ours.
        let _ = fs::write(format!("/proc/sys/net/ipv6/conf/{tap}/disable_ipv6"), "1");
        ip(&format!("address add 10.2.{number}.1/24 dev {tap}"));
        ip(&format!("link set {tap} up"));
        ip(&format!(
            "neighbour add 10.2.{number}.2 lladdr 02:00:00:00:00:02 dev {tap}"
        ));

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
        let mut vdpa = VhostKernVdpa::new(&node, Arc::clone(&mapped)).unwrap();
        vdpa.set_owner().unwrap();
        let has = vdpa.get_backend_features().unwrap();
        vdpa.set_backend_features(has & IOTLB_V2).unwrap();
        let at = mapped.get_host_address(GuestAddress(Flat::BASE)).unwrap();
        vdpa.dma_map(Flat::BASE, BYTES as u64, at, false).unwrap();
        let ring = |queue: u16| {
            let mut setup = rings::setup(Format::Split, SIZE, false);
            let Layout {
                descriptors,
                driver,
                device,
                ..
            } = &mut setup.layout;
            for part in [descriptors, driver, device] {
                *part += u64::from(queue) * 0x1000;
            }
            let eventfd = || EventFd::new(EFD_NONBLOCK).unwrap();
            Ring {
                driver: rings::driver(&setup),
                setup,
                kick: eventfd(),
                call: eventfd(),
            }
        };
        Self {
            vdpa,
            memory,
            rings: [RECEIVE, SEND].map(ring),
            offered: Vec::new(),
            filled: Vec::new(),
            offers: 0,
            tap,
            service,
        }
    }

    /// Resets the device and settles features: the status that follows.
    fn settle(&mut self, features: u64) -> u8 {
        self.vdpa.set_status(0).unwrap();
        for bits in [1, 3] {
            self.vdpa.set_status(bits).unwrap();
        }
        self.vdpa.set_features(features | NEEDED).unwrap();
        self.vdpa.set_status(11).unwrap();
        self.vdpa.get_status().unwrap()
    }

    /// Everything up to `DRIVER_OK`, with new queues.
    fn run(&mut self, features: u64) {
        assert_eq!(self.settle(features), 11);
        put(&OnFile(&self.memory), Flat::BASE, &vec![0; BYTES]);
        self.offered.clear();
        self.filled.clear();
        for (queue, ring) in self.rings.iter_mut().enumerate() {
            ring.driver = rings::driver(&ring.setup);
            let layout = ring.setup.layout;
            self.vdpa.set_vring_num(queue, SIZE).unwrap();
            self.vdpa.set_vring_base(queue, 0).unwrap();
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
            self.vdpa.set_vring_kick(queue, &ring.kick).unwrap();
            self.vdpa.set_vring_call(queue, &ring.call).unwrap();
            self.vdpa.set_vring_enable(queue, true).unwrap();
        }
        self.vdpa.set_status(15).unwrap();
        assert_eq!(self.vdpa.get_status().unwrap(), 15);
    }

    fn add(&mut self, queue: u16, ranges: &[Range]) {
        let memory = OnFile(&self.memory);
        let ring = &mut self.rings[usize::from(queue)];
        ring.driver.add(&memory, ranges, false).unwrap();
        ring.kick.write(1).unwrap();
    }

    /// What comes back of a queue, if anything does in time: bytes written.
    fn collect(&mut self, queue: u16, limit: Duration) -> Vec<u32> {
        let ring = &mut self.rings[usize::from(queue)];
        let until = Instant::now() + limit;
        loop {
            let _ = ring.call.read();
            let done = ring.driver.collect(&OnFile(&self.memory));
            if !done.is_empty() || Instant::now() > until {
                return done.into_iter().map(|(_, written)| written).collect();
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Sends a packet with its header, whatever it says.
    fn send(&mut self, bytes: &[u8]) {
        put(&OnFile(&self.memory), OUT, bytes);
        let len = u32::try_from(bytes.len()).unwrap();
        self.add(SEND, &[(OUT, len, false)]);
        assert_eq!(self.collect(SEND, LONG), [0]);
    }

    /// Offers a buffer for packets.
    fn offer(&mut self) {
        let at = DATA + 0x400 * (self.offers % 32);
        self.offers += 1;
        self.offered.push(at);
        self.add(RECEIVE, &[(at, ROOM, true)]);
    }

    /// The next packet of IPv4: its header, and what came in all of its buffers. The kernel has
    /// packets of its own for a new interface.
    fn receive(&mut self) -> ([u8; HEADER_BYTES], Vec<u8>) {
        loop {
            let (head, packet) = self.receive_any();
            if packet[12..14] == [8, 0] {
                return (head, packet);
            }
            self.offer();
        }
    }

    fn receive_any(&mut self) -> ([u8; HEADER_BYTES], Vec<u8>) {
        if self.filled.is_empty() {
            self.filled = self.collect(RECEIVE, LONG);
        }
        let (mut bytes, mut left) = (Vec::new(), 1);
        while left > 0 {
            // The buffers of a packet come back at once.
            let mut part = vec![0; self.filled.remove(0) as usize];
            let at = self.offered.remove(0);
            OnFile(&self.memory).read(at, &mut part).unwrap();
            if bytes.is_empty() {
                left = part[10];
            }
            left -= 1;
            bytes.extend(part);
        }
        let (head, packet) = bytes.split_first_chunk().unwrap();
        (*head, packet.to_vec())
    }

    fn tap_received(&self) -> u64 {
        let path = format!("/sys/class/net/{}/statistics/rx_packets", self.tap);
        fs::read_to_string(path).unwrap().trim().parse().unwrap()
    }

    fn end(self) {
        drop(self.vdpa);
        let Self { mut service, .. } = self;
        kill(Pid::from_raw(service.id().cast_signed()), Signal::SIGTERM).unwrap();
        assert!(wait(&mut service).success());
    }
}

/// An Ethernet packet to everybody, of an experimental type.
fn packet(head: &[u8], len: usize) -> Vec<u8> {
    let mut bytes = head.to_vec();
    bytes.resize(HEADER_BYTES, 0);
    bytes.extend([0xff; 6]);
    bytes.extend([2, 0, 0, 0, 0, 9]);
    bytes.extend([0x88, 0xb5]);
    bytes.resize(HEADER_BYTES + len, 0x5a);
    bytes
}

#[test]
fn packets_reach_a_guest_and_leave_it() {
    let mut vmm = Vmm::start(1);
    assert_eq!(vmm.vdpa.get_device_id().unwrap(), 1);
    for (features, partial) in [(MERGEABLE, false), (MERGEABLE | GUEST_CSUM, true)] {
        vmm.run(features);
        for _ in 0..16 {
            vmm.offer();
        }
        let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
        // One buffer, and several.
        for len in [10usize, 200, 203, 1000, 1472] {
            let text: Vec<u8> = (0..len).map(|at| (at % 251) as u8).collect();
            socket
                .send_to(&text, (Ipv4Addr::new(10, 2, 1, 2), 9))
                .unwrap();
            let (head, packet) = vmm.receive();
            assert_eq!(packet.len(), 14 + 20 + 8 + len);
            assert!(packet.ends_with(&text));
            // The first one can have been sent before the TAP device heard of the features.
            if len > 10 {
                assert_eq!(head[0] & 1 != 0, partial);
            }
            let buffers = (HEADER_BYTES + packet.len()).div_ceil(ROOM as usize);
            for _ in 0..buffers {
                vmm.offer();
            }
        }
        let before = vmm.tap_received();
        for len in [14, 60, 1514] {
            vmm.send(&packet(&[], len));
        }
        assert_eq!(vmm.tap_received(), before + 3);
    }
    vmm.end();
}

#[test]
fn features_that_need_others_are_refused_without_them() {
    let mut vmm = Vmm::start(2);
    for features in [HOST_TSO4, GUEST_TSO4, GUEST_TSO4 | CSUM] {
        assert_eq!(vmm.settle(features), 3, "{features:#x}");
    }
    assert_eq!(vmm.settle(GUEST_TSO4 | GUEST_CSUM), 11);
    vmm.end();
}

#[test]
fn hostile_guest_sends_nothing_and_breaks_its_own_queue_alone() {
    let mut vmm = Vmm::start(3);
    vmm.run(CSUM | HOST_TSO4 | MTU | MERGEABLE);
    let before = vmm.tap_received();
    for bytes in [
        packet(&[1, 0, 0, 0, 0, 0, 255, 255, 255, 255], 100),
        packet(&[0, 1, 66, 0, 0, 5, 34, 0, 16, 0], 3000),
        packet(&[1, 1, 66, 0, 0, 0, 34, 0, 16, 0], 3000),
        packet(&[1, 4, 66, 0, 0, 5, 54, 0, 16, 0], 3000),
        packet(&[], 13),
        packet(&[], 4000),
    ] {
        vmm.send(&bytes);
    }
    // Longer than any packet, in memory that is there.
    let long: Vec<Range> = (0..4).map(|_| (OUT, 0x7000, false)).collect();
    vmm.add(SEND, &long);
    assert_eq!(vmm.collect(SEND, LONG), [0]);
    assert_eq!(vmm.tap_received(), before);
    vmm.send(&packet(&[], 60));
    assert_eq!(vmm.tap_received(), before + 1);

    // A buffer that cannot be breaks the queue of buffers when a packet comes.
    vmm.add(RECEIVE, &[(DATA, 11, true)]);
    let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
    let to = (Ipv4Addr::new(10, 2, 3, 2), 9);
    socket.send_to(b"some text", to).unwrap();
    let short = Duration::from_secs(1);
    assert!(vmm.collect(RECEIVE, short).is_empty());
    vmm.offer();
    socket.send_to(b"some text", to).unwrap();
    assert!(vmm.collect(RECEIVE, short).is_empty());
    // The other one goes on, until a request in it makes no sense.
    vmm.send(&packet(&[], 60));
    vmm.add(SEND, &[(OUT, HEADER_BYTES as u32 - 1, false)]);
    assert!(vmm.collect(SEND, short).is_empty());

    // A reset heals both.
    vmm.run(MERGEABLE);
    for _ in 0..4 {
        vmm.offer();
    }
    socket.send_to(b"some text", to).unwrap();
    assert!(vmm.receive().1.ends_with(b"some text"));
    vmm.send(&packet(&[], 60));
    assert_eq!(vmm.tap_received(), before + 3);
    vmm.end();
}
