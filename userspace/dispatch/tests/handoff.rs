//! Handing device ends to other processes.

mod common;

use std::collections::BTreeSet;
use std::io::Write as _;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use common::{FakeMaps, command, read, recv, send};
use ioregion_abi::wire::{Layout, Operation};
use ioregion_dispatch::FrameError;
use ioregion_dispatch::handoff::{self, HandoffError};
use ioregion_dispatch::server::{DeviceEnd, Stop, WaitPolicy, serve};
use ioregion_dispatch::source::{
    DoorbellSource, EventDoorbell, Eventfds, Port, PortParts, SlotDoorbell,
};
use ioregion_dispatch::wire::{Transport, pair};
use ioregion_dispatch::{Access, Device, Doorbell, RegisterFile, Ring, Size};
use nix::fcntl::{FcntlArg, fcntl};
use nix::sys::eventfd::EventFd;
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use proptest::prelude::*;

/// Tests that count descriptors and those that make them take turns.
static DESCRIPTORS: Mutex<()> = Mutex::new(());

fn turn() -> MutexGuard<'static, ()> {
    DESCRIPTORS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Sums up what rings: index × 1000 + value × writes; a read returns the sum.
#[derive(Default)]
struct Sum(u64);

impl Device for Sum {
    fn read(&mut self, _: Access) -> u64 {
        self.0
    }
    fn write(&mut self, _: Access, data: u64) {
        self.0 += data;
    }
    fn doorbell(&mut self, ring: Ring) {
        self.0 += u64::from(ring.index) * 1000 + ring.value.unwrap_or(0) * ring.writes;
    }
}

struct Vmm {
    eventfds: Vec<EventFd>,
    maps: FakeMaps,
    signal: EventFd,
}

fn end(
    transport: Transport,
    count: u32,
) -> (Box<dyn ioregion_dispatch::wire::Wire>, Vmm, DeviceEnd) {
    let (wire, device) = pair(transport).unwrap();
    let theirs = |eventfd: &EventFd| eventfd.as_fd().try_clone_to_owned().unwrap();
    let eventfds: Vec<_> = (0..count).map(|_| EventFd::new().unwrap()).collect();
    let doorbells = (0..).zip(&eventfds).map(|(index, eventfd)| EventDoorbell {
        eventfd: Arc::new(theirs(eventfd)),
        index,
        offset: u64::from(index) * 4,
        size: Size::B4,
        value: Some(5),
    });
    let maps = FakeMaps::new(2);
    let signal = EventFd::new().unwrap();
    let port = Port::new(PortParts {
        user_data: 7,
        doorbells: [2000, 3000]
            .map(|index| SlotDoorbell {
                index,
                offset: 0,
                size: Size::B2,
            })
            .into(),
        slots: maps.slots.try_clone().unwrap(),
        controls: maps.controls.try_clone().unwrap(),
        eventfd: Some(theirs(&signal)),
        ringbuf: None,
    });
    let end = DeviceEnd::new(device, Layout::Info)
        .source(DoorbellSource::Eventfds(
            Eventfds::new(7, doorbells.collect()).unwrap(),
        ))
        .source(DoorbellSource::Port(port.unwrap()))
        .region(
            7,
            vec![
                Doorbell::new(0, Size::B8),
                Doorbell::new(16, Size::B4).matching(77),
            ],
        );
    (
        wire,
        Vmm {
            eventfds,
            maps,
            signal,
        },
        end,
    )
}

#[test]
fn a_device_end_works_in_another_process() {
    let _turn = turn();
    for transport in Transport::ALL {
        // More descriptors than one message carries.
        let (mut wire, vmm, end) = end(transport, 450);
        let (here, there) = UnixStream::pair().unwrap();
        let mut child = common::process("device_process", there);
        handoff::send(&here, end).unwrap();
        let wire = &mut *wire;
        let mut sum = 0;
        for n in [0, 1, 199, 200, 449] {
            vmm.eventfds[n].write(2).unwrap();
            sum += n as u64 * 1000 + 10;
            assert_eq!(read(wire, 64), sum, "{transport}");
        }
        vmm.maps.ring(1, 42);
        vmm.signal.write(1).unwrap();
        sum += 3_000_042;
        assert_eq!(read(wire, 64), sum, "{transport}");
        // A declared doorbell, and a write that rings none.
        for data in [77, 78] {
            send(wire, &command(Operation::Write, 16, data, true)).unwrap();
            recv(wire).unwrap();
        }
        sum += 1077 + 78;
        assert_eq!(read(wire, 64), sum, "{transport}");
        child.kill().unwrap();
        child.wait().unwrap();
    }
}

#[test]
#[ignore = "the other process of a_device_end_works_in_another_process"]
fn device_process() {
    let Some(socket) = common::process_socket() else {
        return;
    };
    let end = handoff::recv(&socket).unwrap();
    let stop = Stop::new().unwrap();
    serve(end, &mut Sum::default(), WaitPolicy::Sleep, &stop).unwrap();
}

fn open_descriptors() -> BTreeSet<i32> {
    let listed: Vec<String> = std::fs::read_dir("/proc/self/fd")
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    // Without the descriptor of the listing itself.
    let open = |fd: &&String| std::fs::read_link(format!("/proc/self/fd/{fd}")).is_ok();
    listed
        .iter()
        .filter(open)
        .map(|fd| fd.parse().unwrap())
        .collect()
}

fn fd_message(socket: &UnixStream, fds: &[impl AsRawFd]) {
    let raw: Vec<_> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    let data = [std::io::IoSlice::new(&[0])];
    sendmsg::<()>(
        socket.as_raw_fd(),
        &data,
        &[ControlMessage::ScmRights(&raw)],
        MsgFlags::empty(),
        None,
    )
    .unwrap();
}

fn header(text: u32, fds: u32) -> Vec<u8> {
    [u32::from_le_bytes(*b"iorg"), text, fds]
        .into_iter()
        .flat_map(u32::to_le_bytes)
        .collect()
}

/// What a receiver says to a description and descriptors.
fn received(text: &str, announced: u32, fds: &[OwnedFd]) -> Result<DeviceEnd, HandoffError> {
    let (mut here, there) = UnixStream::pair().unwrap();
    here.write_all(&header(text.len() as u32, announced))
        .unwrap();
    here.write_all(text.as_bytes()).unwrap();
    for batch in fds.chunks(200) {
        fd_message(&here, batch);
    }
    drop(here);
    handoff::recv(&there)
}

const PIPES: &str = r#"{"transport":"pipes","v3":false,"wire_fds":2,"sources":[],"regions":[]}"#;

fn pipe_fds() -> Vec<OwnedFd> {
    let (read, write) = nix::unistd::pipe().unwrap();
    vec![read, write]
}

#[test]
fn descriptors_close_on_exec_and_when_the_end_is_dropped() {
    let _turn = turn();
    let fds = pipe_fds();
    let before = open_descriptors();
    let end = received(PIPES, 2, &fds).unwrap();
    let new: Vec<i32> = open_descriptors().difference(&before).copied().collect();
    assert_eq!(new.len(), 2);
    for number in new {
        // SAFETY: Open as long as `end`.
        let fd = unsafe { BorrowedFd::borrow_raw(number) };
        assert_ne!(
            fcntl(fd, FcntlArg::F_GETFD).unwrap() & nix::libc::FD_CLOEXEC,
            0
        );
    }
    drop(end);
    assert_eq!(open_descriptors(), before);
}

#[test]
fn what_contradicts_itself_is_refused_and_leaks_no_descriptor() {
    let _turn = turn();
    let edit = |from: &str, to: &str| PIPES.replacen(from, to, 1);
    let eventfds = |bells| {
        edit(
            "[]",
            &format!(r#"[{{"Eventfds":{{"user_data":0,"doorbells":{bells}}}}}]"#),
        )
    };
    let port = |bells| {
        let port = format!(
            r#"[{{"Port":{{"user_data":0,"doorbells":{bells},"eventfd":false,"ringbuf":true}}}}]"#
        );
        edit("[]", &port)
    };
    let registers = |files: &str| edit("]}", &format!(r#"],"registers":{files}}}"#));
    let cases: Vec<(String, u32, usize)> = vec![
        // A pipe is no register file; lengths that none has; a descriptor that is not there.
        (registers("[[0,1,true]]"), 3, 3),
        (registers("[[0,1,false]]"), 3, 3),
        (registers("[[0,0,false]]"), 3, 3),
        (registers("[[0,4294967295,true]]"), 3, 3),
        (registers("[[0,1,false]]"), 2, 2),
        (registers("[]"), 3, 3),
        (PIPES.into(), 2, 3),
        (PIPES.into(), 3, 3),
        (PIPES.into(), 2, 1),
        (PIPES.into(), 1, 1),
        (PIPES.into(), 2, 450),
        (PIPES.into(), 400, 450),
        (edit("pipes", "doves"), 2, 2),
        (edit("pipes", "stream"), 2, 2),
        (edit("pipes", "mailbox"), 2, 2),
        (edit(":2", ":4000000000"), 2, 2),
        (edit(":2", ":-1"), 2, 2),
        (edit("v3", "v4"), 2, 2),
        (eventfds("[]"), 2, 2),
        (eventfds("[[0,[0,3],null]]"), 3, 3),
        (port("[[0,[0,4]]]"), 5, 5),
        (port("[]"), 5, 5),
        (
            PIPES.replace(r#""regions":[]"#, r#""regions":[[0,[[[0,4],null,9,0,0]]]]"#),
            2,
            2,
        ),
        ("[".repeat(100_000), 2, 2),
        (String::new(), 0, 0),
    ];
    for (text, announced, sent) in cases {
        let mut fds = pipe_fds();
        while fds.len() < sent {
            fds.extend(pipe_fds());
        }
        fds.truncate(sent);
        let before = open_descriptors();
        let result = received(&text, announced, &fds);
        assert!(result.is_err(), "{text}, {announced}, {sent}");
        drop(result);
        assert_eq!(open_descriptors(), before, "{text}, {announced}, {sent}");
    }
}

#[test]
fn a_register_file_is_the_same_on_both_sides() {
    let _turn = turn();
    let file = RegisterFile::new(9).unwrap();
    let (_wire, device) = pair(Transport::Stream).unwrap();
    let end = DeviceEnd::new(device, Layout::Info).with_registers(7, file.clone());
    let (here, there) = UnixStream::pair().unwrap();
    handoff::send(&here, end).unwrap();
    let end = handoff::recv(&there).unwrap();
    assert_eq!(end.registers(6), None);
    let received = end.registers(7).unwrap();
    received.store(8, 5);
    assert_eq!((received.len(), file.load(8)), (9, 5));
    // And once more, as it came.
    handoff::send(&here, end).unwrap();
    let again = handoff::recv(&there).unwrap().registers(7).unwrap();
    assert_eq!(again.load(8), 5);
}

#[test]
fn lengths_beyond_the_limits_are_refused_at_once() {
    let _turn = turn();
    for (text, fds) in [
        (handoff::MAX_DESCRIPTION + 1, 0),
        (u32::MAX, 2),
        (8, u32::MAX),
    ] {
        let (mut here, there) = UnixStream::pair().unwrap();
        here.write_all(&header(text, fds)).unwrap();
        assert!(matches!(
            handoff::recv(&there),
            Err(HandoffError::Frame(FrameError::Limit { .. }))
        ));
    }
    let (mut here, there) = UnixStream::pair().unwrap();
    here.write_all(&[7; 12]).unwrap();
    assert!(matches!(
        handoff::recv(&there),
        Err(HandoffError::Frame(FrameError::Magic(0x0707_0707)))
    ));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn hostile_bytes_do_no_harm(
        good_header: bool, text in prop::collection::vec(any::<u8>(), 0..300), fds in 0..4_u32
    ) {
        let _turn = turn();
        let (mut here, there) = UnixStream::pair().unwrap();
        if good_header {
            here.write_all(&header(text.len() as u32, fds)).unwrap();
        }
        here.write_all(&text).unwrap();
        drop(here);
        prop_assert!(handoff::recv(&there).is_err());
    }

    #[test]
    fn a_description_with_one_wrong_byte_does_no_harm(place in 0..PIPES.len(), byte: u8) {
        let _turn = turn();
        let mut text = PIPES.as_bytes().to_vec();
        text[place] = byte;
        let (mut here, there) = UnixStream::pair().unwrap();
        here.write_all(&header(text.len() as u32, 2)).unwrap();
        here.write_all(&text).unwrap();
        let fds = pipe_fds();
        let sender = thread::spawn(move || {
            fd_message(&here, &fds);
        });
        drop(handoff::recv(&there));
        sender.join().unwrap();
    }
}
