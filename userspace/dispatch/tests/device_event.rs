//! Devices that wait for something of their own.

mod common;

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::Duration;

use common::{command, read, send};
use ioregion_abi::wire::{Layout, Operation};
#[cfg(feature = "io-uring")]
use ioregion_dispatch::server::ServeError;
use ioregion_dispatch::server::{DeviceEnd, Stats, Stop, WaitPolicy, serve};
use ioregion_dispatch::wire::{Transport, pair};
use ioregion_dispatch::{Access, Device};
use nix::sys::eventfd::{EfdFlags, EventFd};

/// Tells what it had seen whenever it is woken.
struct Waiter {
    event: Arc<EventFd>,
    seen: Vec<u64>,
    told: Sender<Vec<u64>>,
}

impl Device for Waiter {
    fn read(&mut self, _: Access) -> u64 {
        self.seen.len() as u64
    }

    fn write(&mut self, _: Access, data: u64) {
        self.seen.push(data);
    }

    fn event(&self) -> Option<BorrowedFd<'_>> {
        Some(self.event.as_fd())
    }

    fn woken(&mut self) {
        self.event.read().unwrap();
        self.told.send(self.seen.clone()).unwrap();
    }
}

#[derive(Debug, Clone, Copy)]
enum Server {
    Blocking(WaitPolicy),
    #[cfg(feature = "tokio")]
    Tokio,
}

const SERVERS: &[Server] = &[
    Server::Blocking(WaitPolicy::Sleep),
    Server::Blocking(WaitPolicy::SpinThenSleep(Duration::from_micros(50))),
    Server::Blocking(WaitPolicy::Poll),
    #[cfg(feature = "tokio")]
    Server::Tokio,
];

fn waiter() -> (Waiter, Arc<EventFd>, Receiver<Vec<u64>>) {
    let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
    let event = Arc::new(EventFd::from_value_and_flags(0, flags).unwrap());
    let (told, tells) = channel();
    let waiter = Waiter {
        event: Arc::clone(&event),
        seen: Vec::new(),
        told,
    };
    (waiter, event, tells)
}

fn run(server: Server, end: DeviceEnd, device: &mut Waiter, stop: &Stop) -> Stats {
    match server {
        Server::Blocking(policy) => serve(end, device, policy, stop).unwrap(),
        #[cfg(feature = "tokio")]
        Server::Tokio => tokio::runtime::Builder::new_current_thread()
            .enable_io()
            .build()
            .unwrap()
            .block_on(ioregion_dispatch::server::serve_async(end, device, stop))
            .unwrap(),
    }
}

#[test]
fn woken_device_has_seen_all_that_came_before() {
    for &server in SERVERS {
        for transport in Transport::ALL {
            let (mut vmm, wire) = pair(transport).unwrap();
            let (mut device, event, tells) = waiter();
            let stop = Stop::new().unwrap();
            let switch = stop.clone();
            let served = thread::spawn(move || {
                let end = DeviceEnd::new(wire, Layout::Info);
                run(server, end, &mut device, &switch)
            });
            for round in 1..=50u64 {
                // As many as every wire has room for.
                for number in 0..3 {
                    let posted = command(Operation::Write, 0, round * 3 + number, false);
                    send(&mut *vmm, &posted).unwrap();
                }
                event.write(1).unwrap();
                let seen = tells.recv_timeout(Duration::from_secs(60)).unwrap();
                assert_eq!(seen.len() as u64, 3 * round, "{server:?}, {transport}");
            }
            // The event alone, and the wire alone.
            event.write(1).unwrap();
            tells.recv_timeout(Duration::from_secs(60)).unwrap();
            assert_eq!(read(&mut *vmm, 0), 150);
            stop.trigger();
            assert_eq!(served.join().unwrap().commands, 151);
        }
    }
}

#[cfg(feature = "io-uring")]
#[test]
fn server_that_cannot_wait_for_a_device_refuses_it() {
    let (_vmm, wire) = pair(Transport::Stream).unwrap();
    let (mut device, _event, _tells) = waiter();
    let end = DeviceEnd::new(wire, Layout::Info);
    let stop = Stop::new().unwrap();
    let served = ioregion_dispatch::server::serve_uring(end, &mut device, WaitPolicy::Sleep, &stop);
    assert!(matches!(served, Err(ServeError::Event)), "{served:?}");
}
