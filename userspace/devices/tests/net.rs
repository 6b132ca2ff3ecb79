//! The network device, by requests in queues. A pair of sockets stands in for a TAP device: both
//! carry packets whole, one by one, with a header in front.

mod support;

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixDatagram;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use ioregion_devices::net::{HEADER_BYTES, Link, Net, Options, RECEIVE, SEND, Traffic};
use ioregion_devices::virtio::{
    Broken, Device as _, Format, Lane, Memory as _, Position, Queue, Refusal,
};
use support::{BYTES, DATA, Driver, Flat, Range, driver, put, setup};

const CSUM: u64 = 1 << 0;
const GUEST_CSUM: u64 = 1 << 1;
const MTU: u64 = 1 << 3;
const MAC: u64 = 1 << 5;
const GUEST_TSO4: u64 = 1 << 7;
const GUEST_ECN: u64 = 1 << 9;
const HOST_TSO4: u64 = 1 << 11;
const HOST_UFO: u64 = 1 << 14;
const MERGEABLE: u64 = 1 << 15;
/// Of both directions and versions of IP.
const USO: u64 = 0b111 << 54;
const CTRL_VQ: u64 = 1 << 17;

const SIZE: u16 = 16;

/// One end of a pair of sockets.
struct Socket {
    end: UnixDatagram,
    offloads: Arc<AtomicU64>,
    /// What happens instead of sending.
    fails: Arc<Mutex<Option<io::ErrorKind>>>,
    uso: bool,
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.end.as_fd()
    }
}

impl Link for Socket {
    fn receive(&self, into: &mut [u8]) -> io::Result<usize> {
        self.end.recv(into)
    }

    fn send(&self, packet: &[u8]) -> io::Result<()> {
        match *self.fails.lock().unwrap() {
            Some(kind) => Err(kind.into()),
            None => self.end.send(packet).map(drop),
        }
    }

    fn set_offloads(&self, features: u64) -> io::Result<()> {
        self.offloads.store(features, Ordering::Relaxed);
        Ok(())
    }

    fn mtu(&self) -> u16 {
        1500
    }

    fn has_uso(&self) -> bool {
        self.uso
    }
}

struct Rig {
    net: Arc<Net>,
    outside: UnixDatagram,
    offloads: Arc<AtomicU64>,
    fails: Arc<Mutex<Option<io::ErrorKind>>>,
    lane: Box<dyn Lane>,
    memory: Flat,
    driver: Box<dyn Driver>,
    queue: Queue,
}

impl Rig {
    fn new(format: Format, queue: u16, features: u64) -> Self {
        let (end, outside) = UnixDatagram::pair().unwrap();
        for socket in [&end, &outside] {
            socket.set_nonblocking(true).unwrap();
        }
        let (offloads, fails) = <(Arc<AtomicU64>, Arc<Mutex<_>>)>::default();
        let link = Socket {
            end,
            offloads: Arc::clone(&offloads),
            fails: Arc::clone(&fails),
            uso: false,
        };
        let net = Arc::new(Net::new(link, &Options::default()));
        let memory = Flat::new(2 * BYTES);
        let setup = setup(format, SIZE, false);
        Self {
            lane: Arc::clone(&net).lane(queue, features).unwrap(),
            net,
            outside,
            offloads,
            fails,
            driver: driver(&setup),
            queue: Queue::new(&memory, &setup, Position::start(format)).unwrap(),
            memory,
        }
    }

    /// One buffer for packets, number `number` of those that are there, in two pieces.
    fn offer(&mut self, number: u64, len: u32) {
        let at = DATA + 0x1000 * number;
        let half = len / 2;
        let ranges = [(at, half, true), (at + u64::from(half), len - half, true)];
        self.driver.add(&self.memory, &ranges, false).unwrap();
    }

    fn buffer(&self, number: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory
            .read(DATA + 0x1000 * number, &mut bytes)
            .unwrap();
        bytes
    }

    /// What whoever serves the queue does, until nothing happens any more.
    fn run(&mut self) -> Result<(), Broken> {
        loop {
            let mut progress = false;
            while self.lane.wants()
                && let Some(chain) = self.queue.pop(&self.memory)?
            {
                progress = true;
                if let Some(done) = self.lane.submit(chain, &self.memory)? {
                    self.queue.push_all(&self.memory, [done])?;
                }
            }
            self.lane.flush().unwrap();
            let mut finished = Vec::new();
            while let Some(done) = self.lane.finished(&self.memory)? {
                finished.push(done);
            }
            if !progress && finished.is_empty() {
                return Ok(());
            }
            self.queue.push_all(&self.memory, finished)?;
        }
    }

    /// What the driver gets back: bytes written, in order.
    fn collect(&mut self) -> Vec<u32> {
        let done = self.driver.collect(&self.memory);
        done.into_iter().map(|(_, written)| written).collect()
    }

    /// Has the driver send: the packet with its header lies in pieces of these lengths.
    fn send(&mut self, bytes: &[u8], pieces: &[u32]) -> Result<(), Broken> {
        put(&self.memory, DATA, bytes);
        let mut at = DATA;
        let mut ranges: Vec<Range> = Vec::new();
        for &len in pieces {
            ranges.push((at, len, false));
            at += u64::from(len);
        }
        assert_eq!(at - DATA, bytes.len() as u64);
        self.driver.add(&self.memory, &ranges, true).unwrap();
        self.run()
    }

    /// What came out.
    fn came(&self) -> Option<Vec<u8>> {
        let mut bytes = vec![0; 1 << 17];
        match self.outside.recv(&mut bytes) {
            Ok(len) => {
                bytes.truncate(len);
                Some(bytes)
            }
            Err(error) => {
                assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
                None
            }
        }
    }

    fn traffic(&self) -> Traffic {
        self.net.traffic()
    }
}

/// A packet with a header that says nothing.
fn packet(len: usize) -> Vec<u8> {
    let mut bytes = vec![0; HEADER_BYTES];
    // Nothing that could be a VLAN's tag.
    bytes.extend((0..len).map(|at| (at % 119) as u8));
    bytes
}

#[test]
fn features_are_those_that_can_be_served() {
    let (end, _outside) = UnixDatagram::pair().unwrap();
    let link = |end: &UnixDatagram, uso| Socket {
        end: end.try_clone().unwrap(),
        offloads: Arc::default(),
        fails: Arc::default(),
        uso,
    };
    let net = Net::new(link(&end, true), &Options::default());
    let features = net.features();
    let old = Net::new(link(&end, false), &Options::default()).features();
    assert_eq!(features ^ old, USO);
    assert_eq!(features & (MAC | HOST_UFO | CTRL_VQ), 0);
    let expected = CSUM | GUEST_CSUM | GUEST_TSO4 | HOST_TSO4 | MERGEABLE | MTU;
    assert_eq!(features & expected, expected);
    assert_eq!(net.check_features(features), Ok(()));
    assert_eq!(net.check_features(0), Ok(()));
    for (without, needed) in [
        (GUEST_TSO4, GUEST_CSUM),
        (HOST_TSO4, CSUM),
        (USO & 1 << 56, CSUM),
        (GUEST_ECN | GUEST_CSUM, GUEST_TSO4 | GUEST_TSO4 << 1),
    ] {
        let refused = net.check_features(without);
        assert_eq!(refused, Err(Refusal::Missing(needed)));
    }
    let plain = Options {
        mac: Some("02:00:00:00:00:01".parse().unwrap()),
        offloads: false,
        mergeable: false,
    };
    let net = Net::new(link(&end, true), &plain);
    assert_eq!(net.features() & !MTU, MAC | 1 << 16);
    assert_eq!(net.config()[..6], [2, 0, 0, 0, 0, 1]);
    let net = Arc::new(net);
    assert!(net.lane(2, 0).is_err());
}

#[test]
fn packets_of_the_driver_go_out_as_they_are() {
    for format in [Format::Split, Format::Packed] {
        let mut rig = Rig::new(format, SEND, 0);
        for (len, pieces) in [
            (14, &[12, 14][..]),
            (60, &[72]),
            (1514, &[5, 7, 1, 1513]),
            (1514, &[1000, 526]),
        ] {
            let bytes = packet(len);
            rig.send(&bytes, pieces).unwrap();
            assert_eq!(rig.came(), Some(bytes));
            assert_eq!(rig.collect(), [0]);
        }
        let sent = Traffic::default();
        assert_eq!(rig.traffic().sent, 4);
        assert_eq!(rig.traffic().malformed, sent.malformed);
        assert!(!rig.lane.event().is_some_and(|_| true));
    }
}

#[test]
fn packets_that_break_the_rules_are_dropped_and_the_next_one_goes_out() {
    let mut rig = Rig::new(Format::Split, SEND, CSUM | HOST_TSO4 | MTU);
    let with = |change: &dyn Fn(&mut [u8]), len| {
        let mut bytes = packet(len);
        change(&mut bytes);
        bytes
    };
    let hostile = [
        packet(0),
        packet(13),
        // More than the MTU allows, and more than any packet has.
        packet(1515),
        packet(65_598),
        // Segmentation without a checksum, of a kind nobody agreed upon, into nothing.
        with(&|bytes| bytes[1] = 1, 3000),
        with(&|bytes| bytes[..2].copy_from_slice(&[1, 4]), 3000),
        with(
            &|bytes| bytes[..10].copy_from_slice(&[1, 1, 0, 0, 0, 0, 34, 0, 16, 0]),
            3000,
        ),
        // Checksums outside.
        with(
            &|bytes| bytes[..10].copy_from_slice(&[1, 0, 0, 0, 0, 0, 255, 255, 255, 255]),
            100,
        ),
        with(
            &|bytes| bytes[..10].copy_from_slice(&[1, 0, 0, 0, 0, 0, 98, 0, 1, 0]),
            100,
        ),
    ];
    for (number, bytes) in hostile.iter().enumerate() {
        let len = bytes.len() as u32;
        let pieces = if len > 12 { &[12, len - 12][..] } else { &[12] };
        rig.send(bytes, pieces).unwrap();
        assert_eq!(rig.came(), None, "packet {number}");
        assert_eq!(rig.collect(), [0]);
        let good = packet(1514);
        rig.send(&good, &[1526]).unwrap();
        assert_eq!(rig.came(), Some(good));
        assert_eq!(rig.collect(), [0]);
    }
    let traffic = rig.traffic();
    assert_eq!(traffic.malformed, hostile.len() as u64);
    assert_eq!((traffic.sent, traffic.refused), (traffic.malformed, 0));
}

#[test]
fn requests_of_impossible_lengths_break_the_queue_or_are_dropped_unread() {
    for ranges in [
        vec![(DATA, 11, false)],
        vec![(DATA, 4, false), (DATA, 100, true)],
        vec![(DATA, 72, false), (DATA + 0x1000, 4, true)],
        vec![(DATA, 72, true)],
    ] {
        let mut rig = Rig::new(Format::Split, SEND, 0);
        rig.driver.add(&rig.memory, &ranges, false).unwrap();
        assert!(matches!(rig.run(), Err(Broken::Request(_))), "{ranges:?}");
        assert_eq!(rig.came(), None);
    }
    // Gigabytes, of the same memory or of none.
    let mut rig = Rig::new(Format::Split, SEND, 0);
    let ranges = [(DATA, 12, false), (0, 1 << 31, false), (0, 1 << 30, false)];
    rig.driver.add(&rig.memory, &ranges, false).unwrap();
    rig.run().unwrap();
    assert_eq!(rig.collect(), [0]);
    assert_eq!(rig.traffic().malformed, 1);
    // Memory that is not there.
    let ranges = [(DATA, 12, false), (0x10, 100, false)];
    rig.driver.add(&rig.memory, &ranges, false).unwrap();
    assert!(matches!(rig.run(), Err(Broken::Memory(_))));
}

#[test]
fn link_that_takes_nothing_loses_packets_and_one_that_is_gone_ends_the_queue() {
    let mut rig = Rig::new(Format::Split, SEND, 0);
    for kind in [io::ErrorKind::WouldBlock, io::ErrorKind::Other] {
        *rig.fails.lock().unwrap() = Some(kind);
        rig.send(&packet(60), &[72]).unwrap();
        assert_eq!(rig.collect(), [0]);
    }
    assert_eq!(rig.traffic().refused, 2);
    *rig.fails.lock().unwrap() = Some(io::ErrorKind::NotConnected);
    put(&rig.memory, DATA, &packet(60));
    rig.driver.add(&rig.memory, &[(DATA, 72, false)], false);
    let chain = rig.queue.pop(&rig.memory).unwrap().unwrap();
    assert!(rig.lane.submit(chain, &rig.memory).unwrap().is_some());
    let error = rig.lane.flush().unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::NotConnected);

    let mut rig = Rig::new(Format::Split, RECEIVE, 0);
    // A link that does not keep to headers is none.
    rig.outside.send(&[0; HEADER_BYTES - 1]).unwrap();
    rig.offer(0, 200);
    assert!(!rig.lane.wants());
    rig.lane.flush().unwrap_err();
}

#[test]
fn packets_from_outside_reach_the_driver_one_buffer_each() {
    for format in [Format::Split, Format::Packed] {
        let mut rig = Rig::new(format, RECEIVE, 0);
        rig.offer(0, 1526);
        rig.offer(1, 1526);
        rig.run().unwrap();
        // Without a packet there is no use for buffers, and the link says when there is one.
        assert!(rig.collect().is_empty());
        assert!(rig.lane.event().is_some());
        for len in [60, 1514] {
            rig.outside.send(&packet(len)).unwrap();
        }
        rig.run().unwrap();
        assert_eq!(rig.collect(), [72, 1526]);
        for (number, len) in [(0, 60), (1, 1514)] {
            let mut expected = packet(len);
            expected[10] = 1;
            assert_eq!(rig.buffer(number, len + HEADER_BYTES), expected);
        }
        // With a packet that waits only a buffer helps.
        rig.outside.send(&packet(61)).unwrap();
        rig.run().unwrap();
        assert!(rig.lane.event().is_none());
        rig.offer(0, 100);
        rig.run().unwrap();
        assert_eq!(rig.collect(), [73]);
        assert!(rig.lane.event().is_some());
        assert_eq!(rig.traffic().received, 3);
    }
}

#[test]
fn large_packets_fill_several_buffers_that_the_driver_gets_at_once() {
    for format in [Format::Split, Format::Packed] {
        let mut rig = Rig::new(format, RECEIVE, MERGEABLE);
        let large = packet(5000);
        rig.outside.send(&large).unwrap();
        rig.outside.send(&packet(60)).unwrap();
        for number in 0..2 {
            rig.offer(number, 2000);
        }
        rig.run().unwrap();
        assert!(rig.collect().is_empty());
        assert!(rig.lane.event().is_none());
        for number in 2..4 {
            rig.offer(number, 2000);
        }
        rig.run().unwrap();
        assert_eq!(rig.collect(), [2000, 2000, 1012, 72]);
        let mut got = rig.buffer(0, 2000);
        got.extend(rig.buffer(1, 2000));
        got.extend(rig.buffer(2, 1012));
        let mut expected = large;
        expected[10] = 3;
        assert!(got == expected);
        assert_eq!(rig.buffer(3, 12)[10], 1);
        assert_eq!(rig.traffic().received, 2);
    }
}

#[test]
fn packets_that_the_driver_cannot_take_are_dropped_and_the_next_one_arrives() {
    let mut rig = Rig::new(Format::Split, RECEIVE, GUEST_CSUM);
    for number in 0..2 {
        rig.offer(number, 300);
    }
    let mut segments = packet(3000);
    segments[..10].copy_from_slice(&[1, 1, 66, 0, 0xa8, 5, 34, 0, 16, 0]);
    let mut partial = packet(100);
    partial[..10].copy_from_slice(&[1, 0, 0, 0, 0, 0, 34, 0, 16, 0]);
    // Left over from a driver that took segmentation; too large; fine.
    for bytes in [&segments, &packet(289), &partial] {
        rig.outside.send(bytes).unwrap();
    }
    rig.run().unwrap();
    // The buffer that was too small comes back without a packet.
    assert_eq!(rig.collect(), [0, 112]);
    assert_eq!(rig.buffer(1, 10), partial[..10]);
    let traffic = rig.traffic();
    assert_eq!((traffic.unsuited, traffic.too_large), (1, 1));
    assert_eq!(traffic.received, 1);
}

#[test]
fn flood_of_packets_that_the_driver_cannot_take_does_not_hold_the_queue() {
    let mut rig = Rig::new(Format::Split, RECEIVE, 0);
    let mut partial = packet(100);
    partial[0] = 1;
    let mut sent = 0;
    while rig.outside.send(&partial).is_ok() {
        sent += 1;
    }
    assert!(sent > 2);
    assert!(!rig.lane.wants());
    assert!(rig.lane.event().is_some());
    while rig.traffic().unsuited < sent {
        assert!(!rig.lane.wants());
    }
}

#[test]
fn buffers_that_cannot_be_break_the_queue() {
    for ranges in [
        vec![(DATA, 11, true)],
        vec![(DATA, 2000, false)],
        vec![(DATA, 12, false), (DATA + 0x100, 2000, true)],
    ] {
        let mut rig = Rig::new(Format::Split, RECEIVE, MERGEABLE);
        rig.outside.send(&packet(60)).unwrap();
        rig.driver.add(&rig.memory, &ranges, false).unwrap();
        assert!(matches!(rig.run(), Err(Broken::Request(_))), "{ranges:?}");
    }
    let mut rig = Rig::new(Format::Split, RECEIVE, MERGEABLE);
    rig.outside.send(&packet(60)).unwrap();
    rig.driver.add(&rig.memory, &[(0x10, 2000, true)], false);
    assert!(matches!(rig.run(), Err(Broken::Memory(_))));
}

#[test]
fn offloads_of_the_link_are_the_drivers_as_long_as_there_is_one() {
    let features = GUEST_CSUM | GUEST_TSO4;
    let Rig { lane, offloads, .. } = Rig::new(Format::Split, RECEIVE, features);
    assert_eq!(offloads.load(Ordering::Relaxed), features);
    drop(lane);
    assert_eq!(offloads.load(Ordering::Relaxed), 0);
}
