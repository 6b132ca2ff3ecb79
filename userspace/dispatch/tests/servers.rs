//! Each server on each transport.

mod common;

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use common::{FakeMaps, Recorder, Seen, command, numbered, read, recv, ring, send};
use ioregion_abi::wire::{Layout, Operation};
use ioregion_dispatch::server::{DeviceEnd, ServeError, Stats, Stop, WaitPolicy, serve};
use ioregion_dispatch::source::{
    DoorbellSource, EventDoorbell, Eventfds, Port, PortParts, SlotDoorbell,
};
use ioregion_dispatch::wire::{Transport, Wire, WireError, pair};
use ioregion_dispatch::{Access, Doorbell, Size};
use nix::sys::eventfd::{EfdFlags, EventFd};

/// A way to serve.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Server {
    Blocking(WaitPolicy),
    #[cfg(feature = "tokio")]
    Tokio,
    #[cfg(feature = "io-uring")]
    Uring(WaitPolicy),
}

const SPIN: WaitPolicy = WaitPolicy::SpinThenSleep(Duration::from_micros(50));
const SERVERS: &[Server] = &[
    Server::Blocking(WaitPolicy::Sleep),
    Server::Blocking(SPIN),
    Server::Blocking(WaitPolicy::Poll),
    #[cfg(feature = "tokio")]
    Server::Tokio,
    #[cfg(feature = "io-uring")]
    Server::Uring(WaitPolicy::Sleep),
    #[cfg(feature = "io-uring")]
    Server::Uring(WaitPolicy::Poll),
];

type Served = (Result<Stats, ServeError>, Vec<Seen>);

impl Server {
    fn start(self, end: DeviceEnd, stop: &Stop) -> JoinHandle<Served> {
        self.start_with(Recorder::default(), end, stop)
    }

    fn start_with(self, mut device: Recorder, end: DeviceEnd, stop: &Stop) -> JoinHandle<Served> {
        let stop = stop.clone();
        thread::spawn(move || {
            let result = match self {
                Self::Blocking(policy) => serve(end, &mut device, policy, &stop),
                #[cfg(feature = "tokio")]
                Self::Tokio => tokio::runtime::Builder::new_current_thread()
                    .enable_io()
                    .build()
                    .unwrap()
                    .block_on(ioregion_dispatch::server::serve_async(
                        end,
                        &mut device,
                        &stop,
                    )),
                #[cfg(feature = "io-uring")]
                Self::Uring(policy) => {
                    ioregion_dispatch::server::serve_uring(end, &mut device, policy, &stop)
                }
            };
            (result, device.0)
        })
    }
}

/// Runs `test` for every server on every transport.
fn everywhere(test: impl Fn(Server, Transport, Box<dyn Wire>, DeviceEnd, &Stop)) {
    for &server in SERVERS {
        for transport in Transport::ALL {
            let (vmm, device) = pair(transport).unwrap();
            let stop = Stop::new().unwrap();
            test(
                server,
                transport,
                vmm,
                DeviceEnd::new(device, Layout::Info),
                &stop,
            );
        }
    }
}

fn access(offset: u64) -> Access {
    Access {
        user_data: 7,
        offset,
        size: Size::B4,
    }
}

fn eventfd() -> (EventFd, OwnedFd) {
    let eventfd = EventFd::from_flags(EfdFlags::EFD_CLOEXEC).unwrap();
    let theirs = eventfd.as_fd().try_clone_to_owned().unwrap();
    (eventfd, theirs)
}

fn bell(eventfd: OwnedFd, index: u32, value: Option<u64>) -> EventDoorbell {
    EventDoorbell {
        eventfd: Arc::new(eventfd),
        index,
        offset: u64::from(index) * 4,
        size: Size::B4,
        value,
    }
}

fn slots(count: u32) -> Vec<SlotDoorbell> {
    (0..count)
        .map(|index| SlotDoorbell {
            index,
            offset: u64::from(index) * 4,
            size: Size::B4,
        })
        .collect()
}

#[test]
fn accesses_arrive_in_order_and_are_answered() {
    everywhere(|server, transport, mut vmm, end, stop| {
        let what = format!("{server:?} on {transport}");
        let served = server.start(
            end.region(7, vec![Doorbell::new(8, Size::B4).matching(5)]),
            stop,
        );
        let vmm = &mut *vmm;
        for round in 0..500_u64 {
            let seen = round * 5;
            send(vmm, &command(Operation::Write, 0, round, false)).unwrap();
            assert_eq!(read(vmm, 4), 1000 + seen + 1, "{what}");
            send(vmm, &command(Operation::Write, 8, 5, false)).unwrap();
            send(vmm, &command(Operation::Write, 8, 6, false)).unwrap();
            send(vmm, &command(Operation::Write, 12, round, true)).unwrap();
            recv(vmm).unwrap();
        }
        stop.trigger();
        let (stats, seen) = served.join().unwrap();
        let stats = stats.unwrap();
        assert_eq!((stats.commands, stats.responses), (2500, 1000), "{what}");
        assert_eq!((stats.doorbells, stats.writes), (500, 500), "{what}");
        let expected: Vec<_> = (0..500)
            .flat_map(|round| {
                [
                    Seen::Write(access(0), round),
                    Seen::Read(access(4)),
                    Seen::Doorbell(ring(0, 8, Some(5), 1)),
                    Seen::Write(access(8), 6),
                    Seen::Write(access(12), round),
                ]
            })
            .collect();
        assert!(seen == expected, "{what}");
    });
}

#[test]
fn a_burst_of_posted_writes_arrives_whole() {
    everywhere(|server, transport, mut vmm, end, stop| {
        let served = server.start(end, stop);
        for n in 0..5000 {
            send(&mut *vmm, &command(Operation::Write, 0, n, false)).unwrap();
        }
        drop(vmm);
        let (stats, seen) = served.join().unwrap();
        assert_eq!(stats.unwrap().commands, 5000, "{server:?} on {transport}");
        let expected: Vec<_> = (0..5000).map(|n| Seen::Write(access(0), n)).collect();
        assert!(seen == expected, "{server:?} on {transport}");
    });
}

#[test]
fn read_after_doorbell_observes_it() {
    everywhere(|server, transport, mut vmm, end, stop| {
        let what = format!("{server:?} on {transport}");
        let (first, theirs) = eventfd();
        let (second, also_theirs) = eventfd();
        let doorbells = vec![bell(theirs, 0, Some(9)), bell(also_theirs, 1, None)];
        let source = DoorbellSource::Eventfds(Eventfds::new(7, doorbells).unwrap());
        let served = server.start(end.source(source), stop);
        for round in 0..200 {
            first.write(1).unwrap();
            read(&mut *vmm, 64);
            second.write(2).unwrap();
            assert_eq!(read(&mut *vmm, 64), 1000 + round * 4 + 3, "{what}");
        }
        drop(vmm);
        let (stats, seen) = served.join().unwrap();
        assert_eq!(stats.unwrap().writes, 600, "{what}");
        let round = [
            Seen::Doorbell(ring(0, 0, Some(9), 1)),
            Seen::Read(access(64)),
            Seen::Doorbell(ring(1, 4, None, 2)),
            Seen::Read(access(64)),
        ];
        assert!(seen == round.repeat(200), "{what}");
    });
}

#[test]
fn read_after_captured_doorbell_observes_its_value() {
    everywhere(|server, transport, mut vmm, end, stop| {
        let what = format!("{server:?} on {transport}");
        let maps = FakeMaps::new(100);
        let (eventfd, theirs) = eventfd();
        let source = Port::new(PortParts {
            user_data: 7,
            doorbells: slots(100),
            slots: maps.slots.try_clone().unwrap(),
            controls: maps.controls.try_clone().unwrap(),
            eventfd: Some(theirs),
            ringbuf: None,
        });
        let served = server.start(end.source(DoorbellSource::Port(source.unwrap())), stop);
        for round in 0..200 {
            maps.ring(70, round);
            eventfd.write(1).unwrap();
            assert_eq!(read(&mut *vmm, 400), 1000 + round * 2 + 1, "{what}");
        }
        drop(vmm);
        let (stats, seen) = served.join().unwrap();
        let stats = stats.unwrap();
        assert_eq!(
            (stats.doorbells, stats.writes, stats.lost),
            (200, 200, 0),
            "{what}"
        );
        for (round, pair) in (0..).zip(seen.chunks(2)) {
            let expected = [
                Seen::Doorbell(ring(70, 280, Some(round), 1)),
                Seen::Read(access(400)),
            ];
            assert_eq!(pair, expected, "{what}");
        }
    });
}

#[test]
fn doorbells_alone_wake_a_sleeping_server() {
    everywhere(|server, transport, vmm, end, stop| {
        let maps = FakeMaps::new(1);
        let (plain, theirs) = eventfd();
        let (signal, port_eventfd) = eventfd();
        let port = Port::new(PortParts {
            user_data: 7,
            doorbells: slots(1),
            slots: maps.slots.try_clone().unwrap(),
            controls: maps.controls.try_clone().unwrap(),
            eventfd: Some(port_eventfd),
            ringbuf: None,
        });
        let eventfds = Eventfds::new(7, vec![bell(theirs, 1, None)]).unwrap();
        let end = end
            .source(DoorbellSource::Port(port.unwrap()))
            .source(DoorbellSource::Eventfds(eventfds));
        let device = Recorder::default();
        let writes = Arc::clone(&device.1);
        let served = server.start_with(device, end, stop);
        for n in 0..50 {
            plain.write(1).unwrap();
            maps.ring(0, n);
            signal.write(1).unwrap();
            thread::sleep(Duration::from_micros(200));
        }
        // Nothing but the doorbells themselves may be what delivers them.
        let until = Instant::now() + Duration::from_secs(10);
        while writes.load(Ordering::SeqCst) < 100 {
            assert!(Instant::now() < until, "{server:?} on {transport}");
            thread::sleep(Duration::from_millis(1));
        }
        drop(vmm);
        let (stats, seen) = served.join().unwrap();
        assert_eq!(stats.unwrap().writes, 100, "{server:?} on {transport}");
        let last = seen.iter().rev().find_map(|seen| match seen {
            Seen::Doorbell(ring) if ring.index == 0 => ring.value,
            _ => None,
        });
        assert_eq!(last, Some(49), "{server:?} on {transport}");
    });
}

#[test]
fn rings_of_one_slot_coalesce_into_the_last_value_and_a_count() {
    let maps = FakeMaps::new(130);
    let port = Port::new(PortParts {
        user_data: 7,
        doorbells: slots(130),
        slots: maps.slots.try_clone().unwrap(),
        controls: maps.controls.try_clone().unwrap(),
        eventfd: None,
        ringbuf: None,
    });
    let mut source = DoorbellSource::Port(port.unwrap());
    assert!(source.arm());
    source.disarm();
    for value in [1, 2, 3] {
        maps.ring(129, value);
    }
    maps.ring(0, 8);
    assert!(source.has_news());
    assert!(!source.arm());
    let mut rings = Vec::new();
    assert_eq!(source.drain(&mut |ring| rings.push(ring)).unwrap(), 2);
    assert_eq!(rings, [ring(0, 0, Some(8), 1), ring(129, 516, Some(3), 3)]);
    assert_eq!(source.drain(&mut |_| panic!("nothing rang")).unwrap(), 0);
}

#[test]
fn an_armed_port_is_woken_once_and_consumes_its_wake_ups() {
    let maps = FakeMaps::new(1);
    let page = nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE)
        .unwrap()
        .unwrap() as usize;
    let ringbuf = common::memory(2 * page);
    let ring_words = common::words(&ringbuf, 2 * page);
    let port = Port::new(PortParts {
        user_data: 7,
        doorbells: slots(1),
        slots: maps.slots.try_clone().unwrap(),
        controls: maps.controls.try_clone().unwrap(),
        eventfd: None,
        ringbuf: Some(ringbuf),
    });
    let mut source = DoorbellSource::Port(port.unwrap());
    assert!(!maps.ring(0, 1), "not armed");
    assert!(!source.arm(), "news");
    source.drain(&mut drop).unwrap();
    assert!(source.arm());
    assert!(maps.ring(0, 2), "armed");
    assert!(!maps.ring(0, 3), "woken already");
    ring_words[page / 8].store(16, Ordering::SeqCst);
    source.acknowledge().unwrap();
    assert_eq!(ring_words[0].load(Ordering::SeqCst), 16);
    let mut rings = Vec::new();
    source.drain(&mut |ring| rings.push(ring)).unwrap();
    assert_eq!(rings, [ring(0, 0, Some(3), 2)]);
    assert!(source.arm());
    source.disarm();
    assert!(!maps.ring(0, 4), "disarmed");
}

#[test]
fn a_signal_without_a_captured_value_counts_as_lost() {
    let maps = FakeMaps::new(1);
    let (signal, theirs) = eventfd();
    let port = Port::new(PortParts {
        user_data: 7,
        doorbells: slots(1),
        slots: maps.slots.try_clone().unwrap(),
        controls: maps.controls.try_clone().unwrap(),
        eventfd: Some(theirs),
        ringbuf: None,
    });
    let mut source = DoorbellSource::Port(port.unwrap());
    maps.ring(0, 1);
    signal.write(3).unwrap();
    source.acknowledge().unwrap();
    source.drain(&mut drop).unwrap();
    assert_eq!(source.lost(), 2);
}

#[test]
fn sources_that_do_not_fit_are_refused() {
    let maps = FakeMaps::new(1);
    let port = |count| {
        Port::new(PortParts {
            user_data: 7,
            doorbells: slots(count),
            slots: maps.slots.try_clone().unwrap(),
            controls: maps.controls.try_clone().unwrap(),
            eventfd: None,
            ringbuf: None,
        })
    };
    assert!(port(1).is_ok());
    assert!(port(63).is_ok(), "one block holds them");
    for count in [0, 64, 1000, (1 << 20) + 1] {
        assert!(port(count).is_err(), "{count}");
    }
    assert!(Eventfds::new(7, Vec::new()).is_err());
}

#[test]
fn many_eventfds_are_drained_at_once() {
    let (ours, theirs): (Vec<_>, Vec<_>) = (0..300).map(|_| eventfd()).unzip();
    let doorbells = (0..)
        .zip(theirs)
        .map(|(index, fd)| bell(fd, index, None))
        .collect();
    let mut source = DoorbellSource::Eventfds(Eventfds::new(7, doorbells).unwrap());
    for (n, eventfd) in (1..).zip(&ours) {
        eventfd.write(n).unwrap();
    }
    let mut rings = Vec::new();
    assert_eq!(source.drain(&mut |ring| rings.push(ring)).unwrap(), 300);
    rings.sort_by_key(|ring| ring.index);
    for (n, rung) in (0..).zip(&rings) {
        assert_eq!(*rung, ring(n, u64::from(n) * 4, None, u64::from(n) + 1));
    }
}

#[test]
fn something_that_is_no_command_ends_the_server() {
    everywhere(|server, transport, mut vmm, end, stop| {
        let served = server.start(end, stop);
        send(&mut *vmm, &numbered(u64::MAX - 1)).unwrap();
        let (result, _) = served.join().unwrap();
        assert!(
            matches!(result, Err(ServeError::Command(_))),
            "{server:?} on {transport}: {result:?}"
        );
        assert!(
            matches!(recv(&mut *vmm), Err(WireError::Closed)),
            "{server:?} on {transport}"
        );
    });
}

#[test]
fn stop_ends_an_idle_server() {
    everywhere(|server, transport, vmm, end, stop| {
        let served = server.start(end, stop);
        thread::sleep(Duration::from_millis(5));
        stop.trigger();
        assert!(
            served.join().unwrap().0.is_ok(),
            "{server:?} on {transport}"
        );
        drop(vmm);
    });
}

#[test]
fn a_peer_that_does_not_read_its_responses_gets_them_later() {
    everywhere(|server, transport, mut vmm, end, stop| {
        let what = format!("{server:?} on {transport}");
        let served = server.start(end, stop);
        let count = 120;
        let mut received = 0;
        for n in 0..count {
            // Takes responses only where nothing more can be sent.
            while vmm.try_send(&command(Operation::Read, n, 0, true)).unwrap()
                == ioregion_dispatch::wire::Try::WouldBlock
            {
                recv(&mut *vmm).unwrap();
                received += 1;
            }
        }
        while received < count {
            recv(&mut *vmm).unwrap();
            received += 1;
        }
        drop(vmm);
        assert_eq!(served.join().unwrap().0.unwrap().responses, count, "{what}");
    });
}
