//! The network device with a real TAP device, and a driver that does what it wants.
//!
//! Needs the right to make TAP devices; runs in the VM of `cargo xtask vm --test net_tap`.

#[path = "../../devices/tests/support/mod.rs"]
mod rings;
mod support;

use std::fs;
use std::io;
use std::net::{Ipv4Addr, UdpSocket};
use std::sync::Arc;
use std::time::Instant;

use ioregion_devices::net::{HEADER_BYTES, Net, Options, RECEIVE, SEND, Tap};
use ioregion_devices::virtio::{Device as _, Format, Lane, Memory as _, Position, Queue};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rings::{BYTES, DATA, Driver, Flat, driver, put, setup};
use support::LONG;
use support::net::ip;

const CSUM: u64 = 1 << 0;
const GUEST_CSUM: u64 = 1 << 1;
const HOST_TSO4: u64 = 1 << 11;

/// One queue of a device with a TAP device, and its driver.
struct Rig {
    name: String,
    net: Arc<Net>,
    lane: Box<dyn Lane>,
    memory: Flat,
    driver: Box<dyn Driver>,
    queue: Queue,
}

impl Rig {
    fn new(name: &str, queue: u16, features: u64) -> Self {
        let net = Net::new(Tap::open(name).unwrap(), &Options::default());
        let net = Arc::new(net);
        let memory = Flat::new(4 * BYTES);
        let setup = setup(Format::Split, 16, false);
        Self {
            name: name.into(),
            lane: Arc::clone(&net).lane(queue, features).unwrap(),
            net,
            driver: driver(&setup),
            queue: Queue::new(&memory, &setup, Position::start(Format::Split)).unwrap(),
            memory,
        }
    }

    /// Has the driver send a packet with its header.
    fn send(&mut self, bytes: &[u8]) {
        put(&self.memory, DATA, bytes);
        let len = u32::try_from(bytes.len()).unwrap();
        self.driver.add(&self.memory, &[(DATA, len, false)], false);
        let chain = self.queue.pop(&self.memory).unwrap().unwrap();
        let done = self.lane.submit(chain, &self.memory).unwrap().unwrap();
        self.queue.push_all(&self.memory, [done]).unwrap();
        self.lane.flush().unwrap();
        assert_eq!(self.driver.collect(&self.memory).len(), 1);
    }

    /// The next packet, in one buffer.
    fn receive(&mut self) -> Vec<u8> {
        self.driver.add(&self.memory, &[(DATA, 2048, true)], false);
        let until = Instant::now() + LONG;
        while !self.lane.wants() {
            assert!(Instant::now() < until, "no packet came");
            let event = self.lane.event().unwrap();
            let mut fds = [PollFd::new(event, PollFlags::POLLIN)];
            poll(&mut fds, PollTimeout::from(1000u16)).unwrap();
        }
        let chain = self.queue.pop(&self.memory).unwrap().unwrap();
        let done = self.lane.submit(chain, &self.memory).unwrap().unwrap();
        self.queue.push_all(&self.memory, [done]).unwrap();
        let len = self.driver.collect(&self.memory)[0].1;
        let mut bytes = vec![0; len as usize];
        self.memory.read(DATA, &mut bytes).unwrap();
        bytes
    }

    fn says(&self, what: &str) -> u64 {
        let path = format!("/sys/class/net/{}/statistics/{what}", self.name);
        fs::read_to_string(path).unwrap().trim().parse().unwrap()
    }
}

/// An Ethernet packet to everybody with something in it.
fn packet(head: &[u8], len: usize) -> Vec<u8> {
    let mut bytes = head.to_vec();
    bytes.resize(HEADER_BYTES, 0);
    bytes.extend([0xff; 6]);
    bytes.extend([2, 0, 0, 0, 0, 9]);
    // An experimental type: the kernel counts the packet and looks no further.
    bytes.extend([0x88, 0xb5]);
    bytes.resize(HEADER_BYTES + len, 0x5a);
    bytes
}

#[test]
fn packets_with_hostile_headers_never_reach_the_tap() {
    let mut rig = Rig::new("hostile0", SEND, CSUM | HOST_TSO4);
    ip("link set hostile0 up");
    let before = ["rx_packets", "rx_errors", "rx_dropped"].map(|what| rig.says(what));
    let hostile = [
        packet(&[1, 0, 0, 0, 0, 0, 255, 255, 255, 255], 100),
        packet(&[1, 0, 0, 0, 0, 0, 99, 0, 0, 0], 100),
        packet(&[0, 1, 66, 0, 0, 5, 34, 0, 16, 0], 3000),
        packet(&[1, 1, 66, 0, 0, 0, 34, 0, 16, 0], 3000),
        packet(&[1, 1, 66, 0, 255, 255, 34, 0, 16, 0], 3000),
        packet(&[1, 3, 42, 0, 0, 5, 34, 0, 6, 0], 3000),
        packet(&[1, 4, 66, 0, 0, 5, 54, 0, 16, 0], 3000),
        packet(&[1, 0xff, 66, 0, 0, 5, 34, 0, 16, 0], 3000),
        packet(&[], 13),
        packet(&[], 70_000),
    ];
    for bytes in &hostile {
        rig.send(bytes);
    }
    let after = ["rx_packets", "rx_errors", "rx_dropped"].map(|what| rig.says(what));
    assert_eq!(after, before);
    assert_eq!(rig.net.traffic().malformed, hostile.len() as u64);
    // A hint that is too long and flags that mean nothing are put right.
    for head in [
        &[][..],
        &[0xfe, 0, 255, 255],
        &[1, 0, 0, 0, 0, 0, 34, 0, 16, 0],
    ] {
        rig.send(&packet(head, 100));
    }
    assert_eq!(rig.says("rx_packets"), before[0] + 3);
    let traffic = rig.net.traffic();
    assert_eq!((traffic.sent, traffic.refused), (3, 0));
}

#[test]
fn packets_that_a_tap_refuses_are_counted() {
    // Down, it takes none.
    let mut rig = Rig::new("down0", SEND, 0);
    rig.send(&packet(&[], 60));
    let traffic = rig.net.traffic();
    assert_eq!((traffic.sent, traffic.refused), (0, 1));
    ip("link set down0 up");
    rig.send(&packet(&[], 60));
    assert_eq!(rig.net.traffic().sent, 1);
}

#[test]
fn checksums_are_left_undone_for_drivers_that_take_that_and_for_no_others() {
    let partial = |name: &str, net: u8, features| {
        let mut rig = Rig::new(name, RECEIVE, features);
        // No packets but ours.
        let _ = fs::write(format!("/proc/sys/net/ipv6/conf/{name}/disable_ipv6"), "1");
        ip(&format!("address add 10.1.{net}.1/24 dev {name}"));
        ip(&format!("link set {name} up"));
        ip(&format!(
            "neighbour add 10.1.{net}.2 lladdr 02:00:00:00:00:02 dev {name}"
        ));
        let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
        let to = (Ipv4Addr::new(10, 1, net, 2), 9);
        socket.send_to(b"some text", to).unwrap();
        loop {
            let bytes = rig.receive();
            let (head, packet) = bytes.split_at(HEADER_BYTES);
            // UDP.
            if packet.get(23) == Some(&17) {
                assert!(packet.ends_with(b"some text"));
                assert_eq!(head[10], 1);
                return head[0] & 1 != 0;
            }
        }
    };
    assert!(partial("undone0", 1, GUEST_CSUM));
    assert!(!partial("done0", 2, 0));
}

#[test]
fn tap_that_is_removed_ends_its_queues() {
    let mut rig = Rig::new("gone0", RECEIVE, 0);
    ip("link delete gone0");
    assert!(!rig.lane.wants());
    let error = rig.lane.flush().unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::NotConnected);
    assert!(error.to_string().contains("gone0"), "{error}");
}

#[test]
fn names_that_no_interface_has_are_refused() {
    for name in ["", "a b", "a/b", "a:b", "tap%d", "sixteen-letters-", "a\0b"] {
        let error = Tap::open(name).unwrap_err().to_string();
        assert!(error.contains("cannot be a network interface"), "{error}");
    }
    let error = Tap::open(".").unwrap_err().to_string();
    assert!(error.contains("Invalid argument"), "{error}");
}
