//! Device tasks that break the protocol hurt nothing but their own region.

mod support;

use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd};
use std::time::Duration;

use anyhow::Result;
use ioregion_abi::wire::{Layout, Response};
use ioregion_conformance::pace::amount;
use ioregion_conformance::{Kind, Rig, Task, maps};
use ioregion_dispatch::mechanism::Forward;
use ioregion_dispatch::server::{DeviceEnd, WaitPolicy};
use ioregion_dispatch::source::{Port, PortParts, SlotDoorbell};
use ioregion_dispatch::wire::{Try, Wire};
use ioregion_dispatch::{Bus, Channel, Exit, RegionId, Size, Transport};
use ioregion_microguest::{MMIO_BASE, Program};
use nix::sys::signal::Signal;
use rand::{Rng as _, SeedableRng as _};

use support::{
    OTHER, Runner, broken, handle_sigusr1, other_region, plain, recv, region, serve, watchdog,
};

/// Regions that broke, and why.
type Broken = Vec<(RegionId, String)>;

/// Runs a guest that reads, writes and reads again at a device that is given as what it does
/// with its wire, and that uses a well-behaved device in between. What the device returns is
/// kept until the guest has halted. A new device revives the region then. Returns which regions
/// broke and why, and what the guest read, the well-behaved device's values at odd places.
fn with_raw_device<T: Send + 'static>(
    transport: Transport,
    device: impl FnOnce(Box<dyn Wire>) -> T + Send + 'static,
) -> Result<(Broken, Vec<u64>)> {
    handle_sigusr1()?;
    let kind = Kind {
        name: Forward::NAME,
        transport,
    };
    let rig = Rig::with(None)?;
    let (channel, wire) = Channel::pair(transport)?;
    let assigned = rig.vm.assign(&region(), &Forward::new(&channel))?;
    let other = serve(&rig, kind, &other_region(), false, plain())?;
    let mut program = Program::new();
    for _ in 0..20 {
        program.read(Bus::Mmio, MMIO_BASE + 0x20, 4);
        program.read(Bus::Mmio, OTHER + 0x20, 4);
        program.write(Bus::Mmio, MMIO_BASE + 0x30, 4, 1);
        program.write(Bus::Mmio, OTHER + 0x30, 4, 1);
    }
    let device = std::thread::spawn(move || device(wire));
    let runner = Runner::new(rig.vcpu(0, &program)?);
    runner.start();
    let kept = device
        .join()
        .map_err(|_| anyhow::anyhow!("the device panicked"));
    assert_eq!(runner.exit()?, Exit::Halt);
    drop(kept);
    let vcpu = runner.finish()?;
    drop(assigned);
    let log = rig.guest.log(0)?;
    let told = broken(&rig.vm);

    let revived = serve(&rig, kind, &region(), true, plain())?;
    rig.guest.reload(vcpu.fd(), 0, &program)?;
    let again = Runner::new(vcpu);
    again.start();
    assert_eq!(again.exit()?, Exit::Halt);
    again.finish()?;
    assert_eq!(rig.guest.log(0)?, [0x5520; 40], "{transport}");
    revived.task.finish()?;
    assert!(
        log.iter().skip(1).step_by(2).all(|value| *value == 0x5520),
        "{transport}: {log:x?}"
    );
    assert_eq!(other.channel.cause(), None, "{transport}");
    other.task.finish()?;
    Ok((told, log))
}

/// The descriptor that a device's responses go into.
fn response_fd(transport: Transport, fds: &[OwnedFd]) -> &OwnedFd {
    match transport {
        Transport::Pipes => &fds[1],
        _ => &fds[0],
    }
}

#[test]
fn short_response_breaks_only_its_region() -> Result<()> {
    for transport in [Transport::Stream, Transport::Seqpacket, Transport::Pipes] {
        let _watchdog = watchdog(format!("{transport}"), Duration::from_secs(60));
        let (told, log) = with_raw_device(transport, move |mut wire| {
            recv(&mut *wire);
            let fds = wire.into_fds();
            let _ = nix::unistd::write(response_fd(transport, &fds), &[1; 8]);
            // Where there are no boundaries, only the end shows that the rest will not come.
            (transport == Transport::Seqpacket).then_some(fds)
        })?;
        assert!(
            log.iter().step_by(2).all(|value| *value == 0xffff_ffff),
            "{transport}: {log:x?}"
        );
        assert_eq!(told.len(), 1, "{transport}: {told:?}");
        println!("{transport}: {}", told[0].1);
    }
    Ok(())
}

#[test]
fn empty_response_breaks_only_its_region() -> Result<()> {
    let _watchdog = watchdog("empty", Duration::from_secs(60));
    let (told, log) = with_raw_device(Transport::Seqpacket, |mut wire| {
        recv(&mut *wire);
        let fds = wire.into_fds();
        let _ = nix::unistd::write(&fds[0], &[]);
        // An empty write may be nothing at all; an empty packet is one.
        use std::os::fd::AsRawFd as _;
        let _ = nix::sys::socket::send(
            fds[0].as_raw_fd(),
            &[],
            nix::sys::socket::MsgFlags::MSG_NOSIGNAL,
        );
        fds
    })?;
    assert!(
        log.iter().step_by(2).all(|value| *value == 0xffff_ffff),
        "{log:x?}"
    );
    assert_eq!(told.len(), 1, "{told:?}");
    assert!(told[0].1.contains("empty"), "{told:?}");
    Ok(())
}

#[test]
fn oversized_response_breaks_only_its_region() -> Result<()> {
    for transport in [Transport::Stream, Transport::Seqpacket, Transport::Pipes] {
        let _watchdog = watchdog(format!("{transport}"), Duration::from_secs(60));
        let (told, _) = with_raw_device(transport, move |mut wire| {
            recv(&mut *wire);
            let fds = wire.into_fds();
            let _ = nix::unistd::write(response_fd(transport, &fds), &[0; 100]);
            // Where there are no boundaries, it is three responses and the start of another.
            (transport == Transport::Seqpacket).then_some(fds)
        })?;
        assert_eq!(told.len(), 1, "{transport}: {told:?}");
        if transport == Transport::Seqpacket {
            assert!(told[0].1.contains("protocol"), "{transport}: {told:?}");
        }
    }
    Ok(())
}

#[test]
fn unsolicited_responses_hurt_only_their_region() -> Result<()> {
    for transport in Transport::ALL {
        let _watchdog = watchdog(format!("{transport}"), Duration::from_secs(60));
        let (told, log) = with_raw_device(transport, |mut wire| {
            recv(&mut *wire);
            let mut accepted = 0;
            for data in 0..64 {
                if wire
                    .try_send(&Response { data }.encode())
                    .is_ok_and(|tried| tried == Try::Done(()))
                {
                    accepted += 1;
                }
            }
            assert_eq!(accepted, 64);
            wire
        })?;
        // Those that are there before the guest's next access cannot be told from answers to
        // it: the guest reads this device's values, and no other's.
        assert!(
            log.iter()
                .step_by(2)
                .all(|value| *value < 64 || *value == 0xffff_ffff),
            "{transport}: {log:x?}"
        );
        assert!(told.len() <= 1, "{transport}: {told:?}");
    }
    Ok(())
}

#[test]
fn garbage_hurts_only_its_region() -> Result<()> {
    let seed: u64 = rand::random();
    println!("seed {seed:#x}");
    let mut random = rand::rngs::StdRng::seed_from_u64(seed);
    for round in 0..amount("rounds of garbage", 40, 4) {
        for transport in Transport::ALL {
            let _watchdog = watchdog(format!("{transport} {round}"), Duration::from_secs(60));
            let mut garbage = vec![0; random.random_range(1..9000)];
            random.fill(&mut garbage[..]);
            with_raw_device(transport, move |mut wire| {
                recv(&mut *wire);
                let fds = wire.into_fds();
                match transport {
                    Transport::Mailbox => {
                        let _ = nix::sys::uio::pwrite(fds[0].as_fd(), &garbage, 0);
                        let _ = nix::unistd::write(&fds[2], &1_u64.to_ne_bytes());
                    }
                    _ => _ = nix::unistd::write(response_fd(transport, &fds), &garbage),
                }
                // Gone after a while: a device that sends nothing more is a slow one.
                std::thread::sleep(Duration::from_millis(2));
            })?;
        }
    }
    Ok(())
}

#[test]
fn mailbox_with_impossible_positions_breaks_only_its_region() -> Result<()> {
    let _watchdog = watchdog("mailbox", Duration::from_secs(60));
    let (told, log) = with_raw_device(Transport::Mailbox, |mut wire| {
        recv(&mut *wire);
        let fds = wire.into_fds();
        let _ = nix::sys::uio::pwrite(fds[0].as_fd(), &[0x77; 8192], 0);
        let _ = nix::unistd::write(&fds[2], &1_u64.to_ne_bytes());
        fds
    })?;
    assert!(
        log.iter().step_by(2).all(|value| *value == 0xffff_ffff),
        "{log:x?}"
    );
    assert_eq!(told.len(), 1, "{told:?}");
    assert!(told[0].1.contains("protocol"), "{told:?}");
    Ok(())
}

#[test]
fn mailbox_whose_eventfds_block_cannot_stop_a_kick() -> Result<()> {
    handle_sigusr1()?;
    let _watchdog = watchdog("mailbox", Duration::from_secs(60));
    let rig = Rig::with(None)?;
    let (channel, wire) = Channel::pair(Transport::Mailbox)?;
    let _assigned = rig.vm.assign(&region(), &Forward::new(&channel))?;
    let fds = wire.into_fds();
    for bell in &fds[1..3] {
        // Both processes share the flags of the open file.
        nix::fcntl::fcntl(
            bell,
            nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::empty()),
        )?;
    }
    let mut program = Program::new();
    program.read(Bus::Mmio, MMIO_BASE + 0x20, 4);
    let runner = Runner::new(rig.vcpu(0, &program)?);
    for _ in 0..3 {
        runner.start();
        assert_eq!(runner.exit_within(Duration::from_millis(20))?, None);
        runner.kicker.kick(Signal::SIGUSR1);
        assert_eq!(runner.exit()?, Exit::Interrupted);
    }
    rig.vm.remove(&region())?;
    runner.start();
    assert_eq!(runner.exit()?, Exit::Halt);
    assert_eq!(rig.guest.log(0)?, [0xffff_ffff]);
    runner.finish().map(drop)
}

/// The layout is part of the agreement: a device that expects another one gives up.
#[test]
fn device_with_another_layout_breaks_only_its_region() -> Result<()> {
    let rig = Rig::with(None)?;
    let _watchdog = watchdog("layout", Duration::from_secs(60));
    let (channel, wire) = Channel::pair(Transport::Stream)?;
    let assigned = rig.vm.assign(&region(), &Forward::new(&channel))?;
    let end = assigned.attach(DeviceEnd::new(wire, Layout::V3));
    let task = Task::spawn(end, plain(), WaitPolicy::Sleep)?;
    let mut program = Program::new();
    program.write(Bus::Mmio, MMIO_BASE + 0x30, 8, u64::MAX);
    program.read(Bus::Mmio, MMIO_BASE + 0x20, 4);
    let mut vcpu = rig.vcpu(0, &program)?;
    assert_eq!(vcpu.run()?, Exit::Halt);
    assert_eq!(rig.guest.log(0)?, [0xffff_ffff]);
    assert_eq!(broken(&rig.vm).len(), 1);
    assert!(
        task.finish()
            .is_err_and(|error| format!("{error:#}").contains("bad command"))
    );
    Ok(())
}

#[test]
fn device_that_dies_with_a_command_in_its_hands_reads_all_ones() -> Result<()> {
    for transport in Transport::ALL {
        let _watchdog = watchdog(format!("{transport}"), Duration::from_secs(60));
        let (told, mut log) = with_raw_device(transport, |mut wire| {
            recv(&mut *wire);
        })?;
        assert_eq!(log.remove(0), 0xffff_ffff, "{transport}");
        assert_eq!(log[0], 0x5520, "{transport}");
        assert_eq!(told.len(), 1, "{transport}: {told:?}");
    }
    Ok(())
}

/// Makes a BPF map that user space can map, as far as its type allows.
fn bpf_map(kind: u32, [key, value, entries, flags]: [u32; 4]) -> Result<OwnedFd> {
    // The start of `union bpf_attr` for `BPF_MAP_CREATE`.
    let attr = [kind, key, value, entries, flags];
    // SAFETY: The kernel reads as many bytes as there are.
    let fd = unsafe { libc::syscall(libc::SYS_bpf, 0, attr.as_ptr(), size_of_val(&attr)) };
    anyhow::ensure!(fd >= 0, "{}", std::io::Error::last_os_error());
    // SAFETY: The kernel has just made it, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(i32::try_from(fd)?) })
}

#[test]
fn descriptors_that_are_not_the_maps_of_a_port_are_refused_before_they_are_touched() -> Result<()> {
    const MMAPABLE: u32 = 1 << 10;
    let array = |value, entries| bpf_map(maps::ARRAY, [4, value, entries, MMAPABLE]);
    let ring = || bpf_map(maps::RINGBUF, [0, 0, 4096, 0]);
    let rig = Rig::with(None)?;
    let vcpu = rig.guest.vcpu(0, &Program::new())?;
    let vcpu = || -> Result<OwnedFd> {
        // SAFETY: `vcpu` is open as long as the closure.
        Ok(unsafe { BorrowedFd::borrow_raw(vcpu.as_raw_fd()) }.try_clone_to_owned()?)
    };
    let listener = std::net::TcpListener::bind("127.0.0.1:0")?;
    let socket =
        || -> Result<OwnedFd> { Ok(std::net::TcpStream::connect(listener.local_addr()?)?.into()) };
    let eventfd = || -> Result<OwnedFd> { Ok(nix::sys::eventfd::EventFd::new()?.into()) };
    // Two blocks of slots.
    let doorbells: Vec<_> = (0..64)
        .map(|index| SlotDoorbell {
            index,
            offset: u64::from(index) * 4,
            size: Size::B4,
        })
        .collect();
    let port = |slots, controls, ringbuf| {
        Port::new(PortParts {
            user_data: 0,
            doorbells: doorbells.clone(),
            slots,
            controls,
            eventfd: None,
            ringbuf: Some(ringbuf),
        })
    };
    port(array(1024, 2)?, array(8, 1)?, ring()?)?;
    let refused = |what: &str, port: std::io::Result<Port>| {
        let error = port.expect_err(what);
        assert_eq!(
            error.kind(),
            std::io::ErrorKind::InvalidInput,
            "{what}: {error}"
        );
    };
    let strangers = [
        ("a socket", socket()?, socket()?, socket()?),
        ("an eventfd", eventfd()?, eventfd()?, eventfd()?),
        ("a vCPU", vcpu()?, vcpu()?, vcpu()?),
        ("another map", ring()?, array(1024, 2)?, array(8, 512)?),
        (
            "another array",
            array(8, 256)?,
            array(16, 1)?,
            array(8, 4096)?,
        ),
    ];
    for (what, first, second, third) in strangers {
        refused(what, port(first, array(8, 1)?, ring()?));
        refused(what, port(array(1024, 2)?, second, ring()?));
        refused(what, port(array(1024, 2)?, array(8, 1)?, third));
    }
    refused("one block", port(array(1024, 1)?, array(8, 1)?, ring()?));
    Ok(())
}
