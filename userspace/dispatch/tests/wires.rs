//! Each transport over real descriptors.

mod common;

use std::io::{Read as _, Write as _};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use common::{Random, numbered, recv, send};
use ioregion_abi::wire::Layout;
use ioregion_dispatch::handoff;
use ioregion_dispatch::server::{DeviceEnd, Stop, WaitPolicy, serve};
use ioregion_dispatch::wire::{Socket, Transport, Try, Wire, WireError, from_fds, mailbox, pair};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, socketpair};
use proptest::prelude::*;

const MESSAGES: u64 = 10_000;

#[test]
fn messages_arrive_in_order_both_ways() {
    for transport in Transport::ALL {
        let (vmm, device) = pair(transport).unwrap();
        // Each side sends and receives; pauses at random make both queues run full and empty.
        let run = |mut wire: Box<dyn Wire>, seed| {
            thread::spawn(move || {
                let mut random = Random(seed);
                let (mut sent, mut received) = (0, 0);
                while sent < MESSAGES || received < MESSAGES {
                    for _ in 0..random.below(100) {
                        if sent < MESSAGES
                            && wire.try_send(&numbered(sent)).unwrap() == Try::Done(())
                        {
                            sent += 1;
                        }
                    }
                    for _ in 0..random.below(100) {
                        if let Try::Done(message) = wire.try_recv().unwrap() {
                            assert_eq!(message, numbered(received), "{transport}");
                            received += 1;
                        }
                    }
                    let done = wire.try_flush().unwrap() == Try::Done(());
                    if received < MESSAGES && random.below(4) == 0 {
                        common::sleep(&mut *wire, sent < MESSAGES || !done);
                    }
                }
                while wire.try_flush().unwrap() == Try::WouldBlock {
                    common::sleep(&mut *wire, true);
                }
                // Stays open until the peer has everything.
                wire
            })
        };
        let sides = [run(vmm, 1), run(device, 2)];
        drop(sides.map(|side| side.join().unwrap()));
    }
}

#[test]
fn messages_that_come_and_go_in_pieces_are_put_together() {
    let (raw, end) = UnixStream::pair().unwrap();
    let socket: Box<dyn Wire> =
        Box::new(Socket::from_fds(Transport::Stream, vec![end.into()]).unwrap());
    let (out, fifo_in) = nix::unistd::pipe().unwrap();
    let (fifo_out, into) = nix::unistd::pipe().unwrap();
    let pipes = from_fds(Transport::Pipes, vec![out, into]).unwrap();
    let raw_in = std::fs::File::from(OwnedFd::from(raw.try_clone().unwrap()));
    let ends: [(Box<dyn Wire>, std::fs::File, std::fs::File); 2] = [
        (socket, raw_in, OwnedFd::from(raw).into()),
        (pipes, fifo_in.into(), fifo_out.into()),
    ];
    for (mut wire, mut raw_in, mut raw_out) in ends {
        let writer = thread::spawn(move || {
            let mut random = Random(3);
            let all: Vec<u8> = (0..MESSAGES).flat_map(numbered).collect();
            let mut rest = &all[..];
            while !rest.is_empty() {
                let (piece, tail) = rest.split_at(rest.len().min(1 + random.below(70) as usize));
                raw_in.write_all(piece).unwrap();
                rest = tail;
            }
        });
        let reader = thread::spawn(move || {
            let mut random = Random(4);
            let mut all = vec![0; 32 * MESSAGES as usize];
            let mut at = 0;
            while at < all.len() {
                let end = all.len().min(at + 1 + random.below(70) as usize);
                at += raw_out.read(&mut all[at..end]).unwrap();
            }
            all
        });
        for n in 0..MESSAGES {
            assert_eq!(recv(&mut *wire).unwrap(), numbered(n));
            send(&mut *wire, &numbered(n)).unwrap();
        }
        writer.join().unwrap();
        let expected: Vec<u8> = (0..MESSAGES).flat_map(numbered).collect();
        assert!(reader.join().unwrap() == expected);
    }
}

#[test]
fn a_full_queue_would_block_and_recovers() {
    for transport in Transport::ALL {
        let (mut vmm, mut device) = pair(transport).unwrap();
        let mut sent = 0;
        while vmm.try_send(&numbered(sent)).unwrap() == Try::Done(()) {
            sent += 1;
            assert!(sent < 1_000_000, "{transport} never fills");
        }
        assert!(sent >= 32, "{transport} holds {sent}");
        for n in 0..sent {
            assert_eq!(recv(&mut *device).unwrap(), numbered(n));
        }
        assert_eq!(device.try_recv().unwrap(), Try::WouldBlock);
        send(&mut *vmm, &numbered(sent)).unwrap();
        assert_eq!(recv(&mut *device).unwrap(), numbered(sent));
    }
}

fn assert_closed(mut wire: Box<dyn Wire>, what: &str) {
    let mut sends = 0;
    let error = recv(&mut *wire).unwrap_err();
    assert!(matches!(error, WireError::Closed), "{what}: {error:?}");
    // What fits into a buffer of its own may still be accepted.
    let error = loop {
        match wire.try_send(&numbered(0)) {
            Ok(_) => sends += 1,
            Err(error) => break error,
        }
        assert!(sends < 10_000, "{what}: sends go on for ever");
    };
    assert!(matches!(error, WireError::Closed), "{what}: {error:?}");
}

#[test]
fn either_side_notices_that_the_other_is_closed() {
    for transport in Transport::ALL {
        for drop_vmm in [false, true] {
            let (vmm, device) = pair(transport).unwrap();
            let (gone, mut stays) = if drop_vmm {
                (vmm, device)
            } else {
                (device, vmm)
            };
            assert_eq!(stays.try_recv().unwrap(), Try::WouldBlock);
            drop(gone);
            assert_closed(stays, transport.name());
        }
    }
}

#[test]
fn what_was_sent_before_the_end_still_arrives() {
    for transport in Transport::ALL {
        let (mut vmm, mut device) = pair(transport).unwrap();
        send(&mut *vmm, &numbered(1)).unwrap();
        drop(vmm);
        assert_eq!(recv(&mut *device).unwrap(), numbered(1), "{transport}");
        assert!(
            matches!(recv(&mut *device), Err(WireError::Closed)),
            "{transport}"
        );
    }
}

#[test]
fn a_polling_side_notices_that_the_other_is_closed() {
    for transport in Transport::ALL {
        let (vmm, mut device) = pair(transport).unwrap();
        drop(vmm);
        let until = Instant::now() + Duration::from_secs(10);
        let error = loop {
            match device.try_recv() {
                Ok(tried) => assert_eq!(tried, Try::WouldBlock),
                Err(error) => break error,
            }
            assert!(Instant::now() < until, "{transport}");
        };
        assert!(matches!(error, WireError::Closed), "{transport}: {error:?}");
    }
}

#[test]
fn a_packet_of_another_length_is_a_violation() {
    for len in [0, 1, 31, 33, 64, 5000] {
        let (raw, end) = socketpair(
            AddressFamily::Unix,
            SockType::SeqPacket,
            None,
            SockFlag::SOCK_CLOEXEC,
        )
        .unwrap();
        let mut wire = Socket::from_fds(Transport::Seqpacket, vec![end]).unwrap();
        nix::sys::socket::send(raw.as_raw_fd(), &vec![1; len], MsgFlags::empty()).unwrap();
        let result = wire.try_recv();
        assert!(
            matches!(result, Err(WireError::Protocol(_))),
            "{len}: {result:?}"
        );
    }
}

#[test]
fn unfit_descriptors_are_refused() {
    let file = || OwnedFd::from(tempfile::tempfile().unwrap());
    let pipe = || nix::unistd::pipe().unwrap();
    for transport in Transport::ALL {
        let kind = |fds| from_fds(transport, fds).unwrap_err().kind();
        for count in [0, 1, 3, 4, 5] {
            if (transport, count) != (Transport::Mailbox, 4) {
                assert_eq!(
                    kind((0..count).map(|_| file()).collect()),
                    std::io::ErrorKind::InvalidInput
                );
            }
        }
    }
    assert!(from_fds(Transport::Stream, vec![pipe().0]).is_err());
    assert!(
        from_fds(
            Transport::Seqpacket,
            vec![UnixStream::pair().unwrap().0.into()]
        )
        .is_err()
    );
    let (read, write) = pipe();
    assert!(from_fds(Transport::Pipes, vec![write, read]).is_err());
    // Memory that could be cut short under the mapping.
    let (_, device) = pair(Transport::Mailbox).unwrap();
    let mut fds = device.into_fds();
    fds[0] = file();
    nix::unistd::ftruncate(&fds[0], mailbox::SHARED_LEN as i64).unwrap();
    assert!(from_fds(Transport::Mailbox, fds).is_err());
}

#[test]
fn a_rebuilt_mailbox_goes_on_where_it_stopped() {
    let (mut vmm, mut device) = pair(Transport::Mailbox).unwrap();
    for n in 0..100 {
        send(&mut *vmm, &numbered(n)).unwrap();
        assert_eq!(recv(&mut *device).unwrap(), numbered(n));
    }
    send(&mut *vmm, &numbered(100)).unwrap();
    let mut device = from_fds(Transport::Mailbox, device.into_fds()).unwrap();
    assert_eq!(recv(&mut *device).unwrap(), numbered(100));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn garbage_in_the_shared_memory_hurts_nobody(
        writes in prop::collection::vec((0..mailbox::SHARED_LEN / 8, any::<u64>()), 1..200)
    ) {
        let (mut vmm, device) = pair(Transport::Mailbox).unwrap();
        let fds = device.into_fds();
        let memory = common::words(&fds[0], mailbox::SHARED_LEN);
        let mut device = from_fds(Transport::Mailbox, fds).unwrap();
        for (place, value) in writes {
            memory[place].store(value, Ordering::Relaxed);
            for end in [&mut vmm, &mut device] {
                for result in [end.try_recv().map(drop), end.try_send(&numbered(1)).map(drop)] {
                    prop_assert!(matches!(result, Ok(()) | Err(WireError::Protocol(_))), "{result:?}");
                }
                end.prepare_sleep(true);
                end.finish_sleep();
            }
        }
    }
}

#[test]
fn positions_that_the_peer_cannot_have_are_violations() {
    let (_vmm, device) = pair(Transport::Mailbox).unwrap();
    let fds = device.into_fds();
    let memory = common::words(&fds[0], mailbox::SHARED_LEN);
    let mut device = from_fds(Transport::Mailbox, fds).unwrap();
    for word in memory {
        word.store(mailbox::DEPTH + 1, Ordering::Relaxed);
    }
    assert!(matches!(device.try_recv(), Err(WireError::Protocol(_))));
    assert!(matches!(
        device.try_send(&numbered(0)),
        Err(WireError::Protocol(_))
    ));
    // A sleeper finds it at once.
    assert!(!device.prepare_sleep(false));
}

#[test]
fn a_killed_process_is_noticed_on_every_transport() {
    for transport in Transport::ALL {
        let (mut vmm, device) = pair(transport).unwrap();
        let (here, there) = UnixStream::pair().unwrap();
        let mut child = common::process("served_process", there);
        handoff::send(&here, DeviceEnd::new(device, Layout::Info)).unwrap();
        for n in 0..100 {
            assert_eq!(common::read(&mut *vmm, n), 1000 + n, "{transport}");
        }
        child.kill().unwrap();
        child.wait().unwrap();
        assert_closed(vmm, transport.name());
    }
}

#[test]
#[ignore = "the other process of a_killed_process_is_noticed_on_every_transport"]
fn served_process() {
    let Some(socket) = common::process_socket() else {
        return;
    };
    let end = handoff::recv(&socket).unwrap();
    let stop = Stop::new().unwrap();
    serve(
        end,
        &mut common::Recorder::default(),
        WaitPolicy::Sleep,
        &stop,
    )
    .unwrap();
}
