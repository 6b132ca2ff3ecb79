//! Servers that sleep in their wire's `read`, and what ends that.

mod common;

use std::os::fd::OwnedFd;
use std::sync::mpsc::channel;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use common::{Recorder, read};
use ioregion_abi::wire::Layout;
use ioregion_dispatch::server::{DeviceEnd, ServeError, Stats, Stop, WaitPolicy, serve};
use ioregion_dispatch::wire::{Transport, Wire, from_fds, pair};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::pthread::{Pthread, pthread_kill, pthread_self};
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
use nix::sys::time::TimeValLike as _;

/// The transports that a server can sleep in.
const SLEEPABLE: [Transport; 3] = [Transport::Stream, Transport::Seqpacket, Transport::Pipes];

type Served = JoinHandle<Result<Stats, ServeError>>;

fn start(device: Box<dyn Wire>, stop: &Stop) -> (Served, Pthread) {
    let stop = stop.clone();
    let end = DeviceEnd::new(device, Layout::Info);
    let (started, id) = channel();
    let thread = thread::spawn(move || {
        started.send(pthread_self()).unwrap();
        serve(end, &mut Recorder::default(), WaitPolicy::Sleep, &stop)
    });
    (thread, id.recv().unwrap())
}

fn wires(transport: Transport) -> (Box<dyn Wire>, Box<dyn Wire>, OwnedFd) {
    let (vmm, device) = pair(transport).unwrap();
    let fds = device.into_fds();
    // The file that the device reads from; pipes have it first.
    let shared = fds[0].try_clone().unwrap();
    (vmm, from_fds(transport, fds).unwrap(), shared)
}

fn is_blocking(file: &OwnedFd) -> bool {
    let flags = fcntl(file, FcntlArg::F_GETFL).unwrap();
    !OFlag::from_bits_retain(flags).contains(OFlag::O_NONBLOCK)
}

#[test]
fn stop_ends_a_sleep_that_is_just_beginning() {
    for transport in SLEEPABLE {
        for round in 0..400_u32 {
            let (mut vmm, device, _) = wires(transport);
            let stop = Stop::new().unwrap();
            let (served, _) = start(device, &stop);
            read(&mut *vmm, 1);
            // The server is on its way into the next sleep.
            for _ in 0..round * 20 {
                std::hint::spin_loop();
            }
            stop.trigger();
            assert_eq!(served.join().unwrap().unwrap().commands, 1, "{transport}");
        }
    }
}

#[test]
fn one_switch_ends_all_sleeps() {
    let stop = Stop::new().unwrap();
    let mut servers = Vec::new();
    for transport in SLEEPABLE {
        let (mut vmm, device, _) = wires(transport);
        let (served, _) = start(device, &stop);
        read(&mut *vmm, 2);
        servers.push((vmm, served));
    }
    stop.trigger();
    for (_vmm, served) in servers {
        served.join().unwrap().unwrap();
    }
    // And those that nobody has begun yet.
    let (_vmm, device, _) = wires(Transport::Stream);
    start(device, &stop).0.join().unwrap().unwrap();
}

#[test]
fn thread_that_blocks_all_signals_is_stopped_and_blocks_them_afterwards() {
    for transport in SLEEPABLE {
        let (mut vmm, device, _) = wires(transport);
        let stop = Stop::new().unwrap();
        let switch = stop.clone();
        let served = thread::spawn(move || {
            SigSet::all().thread_block().unwrap();
            let end = DeviceEnd::new(device, Layout::Info);
            let stats = serve(end, &mut Recorder::default(), WaitPolicy::Sleep, &switch);
            (stats, SigSet::thread_get_mask().unwrap())
        });
        read(&mut *vmm, 3);
        stop.trigger();
        let (stats, mask) = served.join().unwrap();
        stats.unwrap();
        // All that nix can name; KILL and STOP cannot be blocked.
        for signal in Signal::iterator() {
            let always_free = [Signal::SIGKILL, Signal::SIGSTOP].contains(&signal);
            assert_eq!(mask.contains(signal), !always_free, "{signal}");
        }
    }
}

#[test]
fn signals_of_others_do_not_end_a_server() {
    extern "C" fn nothing(_: nix::libc::c_int) {}
    let action = SigAction::new(
        SigHandler::Handler(nothing),
        SaFlags::empty(),
        SigSet::empty(),
    );
    // SAFETY: The handler does nothing.
    unsafe { sigaction(Signal::SIGUSR1, &action) }.unwrap();
    for transport in SLEEPABLE {
        let (mut vmm, device, _) = wires(transport);
        let stop = Stop::new().unwrap();
        let (served, thread) = start(device, &stop);
        for round in 0..200 {
            read(&mut *vmm, 4);
            pthread_kill(thread, Signal::SIGUSR1).unwrap();
            if round % 50 == 0 {
                thread::sleep(Duration::from_millis(1));
            }
        }
        stop.trigger();
        assert_eq!(served.join().unwrap().unwrap().commands, 200, "{transport}");
    }
}

#[test]
fn file_is_as_blocking_as_before() {
    for transport in SLEEPABLE {
        let (mut vmm, device, shared) = wires(transport);
        let before = is_blocking(&shared);
        let stop = Stop::new().unwrap();
        let (served, _) = start(device, &stop);
        read(&mut *vmm, 5);
        assert!(is_blocking(&shared), "{transport}: nobody sleeps");
        stop.trigger();
        served.join().unwrap().unwrap();
        assert_eq!(is_blocking(&shared), before, "{transport}");
    }
}

#[test]
fn peer_that_makes_the_file_non_blocking_is_served_and_costs_nothing_while_idle() {
    for transport in SLEEPABLE {
        let (mut vmm, device, shared) = wires(transport);
        let stop = Stop::new().unwrap();
        let (served, _) = start(device, &stop);
        read(&mut *vmm, 6);
        fcntl(&shared, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).unwrap();
        for _ in 0..10 {
            read(&mut *vmm, 6);
        }
        let used = || {
            let usage = getrusage(UsageWho::RUSAGE_SELF).unwrap();
            (usage.user_time() + usage.system_time()).num_milliseconds()
        };
        // Other tests run in this process: one quiet stretch will do.
        let quiet = (0..100).any(|_| {
            let before = used();
            thread::sleep(Duration::from_millis(100));
            used() - before < 50
        });
        assert!(quiet, "{transport}: the server never sleeps");
        read(&mut *vmm, 6);
        stop.trigger();
        assert_eq!(served.join().unwrap().unwrap().commands, 12, "{transport}");
    }
}

#[test]
fn server_sleeps_and_ends_with_the_other_end() {
    for transport in SLEEPABLE {
        let (mut vmm, device, _) = wires(transport);
        let stop = Stop::new().unwrap();
        let (served, _) = start(device, &stop);
        for _ in 0..20 {
            read(&mut *vmm, 7);
            thread::sleep(Duration::from_millis(2));
        }
        drop(vmm);
        let stats = served.join().unwrap().unwrap();
        assert!(stats.wakeups >= 10, "{transport}: {stats:?}");
    }
}
