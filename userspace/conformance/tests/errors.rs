//! Every refusal names the region and the cause, has the errno of `KVM_SET_IOREGION`, and leaves
//! nothing behind.

mod support;

use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt as _;
use std::process::Command;
use std::sync::{Arc, Mutex};

use anyhow::Result;
use ioregion_abi::wire::Layout;
use ioregion_conformance::{KINDS, Kind, Recorder, Rig, channel, kinds, mechanism};
use ioregion_dispatch::mechanism::{Auto, Ebpf, Forward, Ioeventfd, Ioregionfd, KvmRun};
use ioregion_dispatch::{
    Bus, Channel, Delivery, Doorbell, LoadError, Mechanism, Patience, Program as Bpf, Region,
    RegionError, RegionErrorKind, Sink, Size, Transport,
};
use ioregion_microguest::{MMIO_BASE, Program};
use nix::errno::Errno;

use support::{bpf, channel_kinds};

fn any_mechanism(rig: &Rig, kind: Kind) -> Result<Box<dyn Mechanism>> {
    if kind.name == KvmRun::NAME {
        return Ok(Box::new(KvmRun::new(Arc::new(Mutex::new(
            Recorder::default(),
        )))));
    }
    let (channel, wire) = channel(rig, kind)?;
    // The device's end stays open for the rest of the process.
    std::mem::forget(wire);
    mechanism(kind, &channel)
}

fn refused(result: Result<ioregion_dispatch::Assigned, RegionError>, what: &str) -> RegionError {
    match result {
        Ok(_) => panic!("{what}: accepted"),
        Err(error) => error,
    }
}

#[test]
fn regions_that_meet_others_are_refused() -> Result<()> {
    let bpf = bpf()?;
    for kind in kinds() {
        let rig = Rig::with(Some(bpf.clone()))?;
        let mechanism = any_mechanism(&rig, kind)?;
        let base = MMIO_BASE + 0x1000;
        let first = Region::mmio(base, 0x1000).doorbell(Doorbell::new(0x10, Size::B4));
        let _ = rig.vm.assign(&first, &*mechanism)?;
        for (at, size, errno) in [
            (base, 0x1000, Errno::EEXIST),
            (base - 0x800, 0x1000, Errno::EEXIST),
            (base + 0x800, 0x1000, Errno::EEXIST),
            (base - 0x800, 0x2000, Errno::EEXIST),
            (base, 0x2000, Errno::EEXIST),
            (base - 1, 2, Errno::EEXIST),
            (base + 0xfff, 2, Errno::EEXIST),
            (base, 0x800, Errno::EINVAL),
            (base + 0x800, 0x800, Errno::EINVAL),
            (base + 0x400, 0x10, Errno::EINVAL),
            (base + 0xfff, 1, Errno::EINVAL),
        ] {
            let what = format!("{kind:?} {at:#x}+{size:#x}");
            let error = refused(rig.vm.assign(&Region::mmio(at, size), &*mechanism), &what);
            assert_eq!(error.errno(), errno, "{what}: {error}");
            let text = error.to_string();
            assert!(
                text.contains(&format!("{at:#x}")) && text.contains(&format!("{base:#x}")),
                "{text}"
            );
        }
        for region in [
            Region::mmio(base - 0x1000, 0x1000),
            Region::mmio(base + 0x1000, 0x1000),
            Region::pio(0x1000, 16),
        ] {
            let _ = rig.vm.assign(&region, &*mechanism)?;
        }
        rig.vm.remove(&first)?;
        let _ = rig.vm.assign(&first, &*mechanism)?;
    }
    Ok(())
}

#[test]
fn unknown_regions_are_refused() -> Result<()> {
    let bpf = bpf()?;
    for kind in kinds() {
        let rig = Rig::with(Some(bpf.clone()))?;
        let mechanism = any_mechanism(&rig, kind)?;
        let known = Region::mmio(MMIO_BASE, 0x1000);
        let _ = rig.vm.assign(&known, &*mechanism)?;
        for region in [
            Region::mmio(MMIO_BASE, 0x800),
            Region::mmio(MMIO_BASE + 1, 0xfff),
            Region::mmio(MMIO_BASE + 0x1000, 0x1000),
            Region::pio(0x100, 8),
        ] {
            let error = refused(rig.vm.modify(&region, &*mechanism), "modify");
            assert_eq!(error.errno(), Errno::ENOENT, "{kind:?}: {error}");
            let error = rig.vm.remove(&region).expect_err("removed");
            assert_eq!(error.errno(), Errno::ENOENT, "{kind:?}: {error}");
        }
        rig.vm.remove(&known)?;
        assert_eq!(
            rig.vm.remove(&known).map_err(|error| error.errno()),
            Err(Errno::ENOENT)
        );
    }
    Ok(())
}

/// Regions that are wrong by themselves, with a word of the reason.
fn bad_regions() -> Vec<(Region, &'static str)> {
    let mmio = || Region::mmio(MMIO_BASE, 0x1000);
    let pio = || Region::pio(0x1000, 0x10);
    let bell = |offset| Doorbell::new(offset, Size::B4);
    let pio_at = |base, size| Region {
        bus: Bus::Pio,
        ..Region::mmio(base, size)
    };
    vec![
        (Region::mmio(MMIO_BASE, 0), "empty"),
        (Region::pio(0, 0), "empty"),
        (Region::mmio(u64::MAX, 2), "outside the address space"),
        (
            Region::mmio(u64::MAX - 0xfff, 0x1001),
            "outside the address space",
        ),
        (Region::mmio(1, u64::MAX), "accepted or refused alike"),
        (pio_at(0xffff, 2), "outside the address space"),
        (pio_at(0x1_0000, 1), "outside the address space"),
        (pio_at(0, 0x1_0001), "outside the address space"),
        (mmio().doorbell(bell(0x1000)), "outside the region"),
        (mmio().doorbell(bell(0xffd)), "outside the region"),
        (mmio().doorbell(bell(u64::MAX - 1)), "outside the region"),
        (pio().doorbell(Doorbell::new(0, Size::B8)), "size"),
        (mmio().doorbell(bell(0).matching(0x1_0000_0000)), "bits"),
        (
            mmio().doorbell(bell(0).matching_masked(0x1_0000_0000, 0)),
            "bits",
        ),
        (mmio().doorbell(bell(0).matching_masked(0xf0, 0xff)), "bits"),
        (
            mmio()
                .doorbell(bell(0).matching_masked(0xff, 1).sink(Sink::Coalesced))
                .doorbell(bell(0).matching_masked(0xff00, 0x100).sink(Sink::Coalesced)),
            "masks",
        ),
        (mmio().doorbell(bell(0)).doorbell(bell(0)), "two doorbells"),
        (
            mmio()
                .doorbell(bell(0).matching(1))
                .doorbell(bell(0).matching(1)),
            "two doorbells",
        ),
    ]
}

#[test]
fn bad_regions_are_refused_alike_by_every_mechanism() -> Result<()> {
    let bpf = bpf()?;
    for kind in kinds() {
        let rig = Rig::with(Some(bpf.clone()))?;
        let mechanism = any_mechanism(&rig, kind)?;
        for (region, word) in bad_regions() {
            if region.base == 1 {
                // All but the first byte of the bus: large, but no more than that.
                continue;
            }
            let error = refused(rig.vm.assign(&region, &*mechanism), &format!("{region:?}"));
            assert_eq!(error.errno(), Errno::EINVAL, "{kind:?}: {error}");
            let text = error.to_string();
            assert!(
                text.contains(word),
                "{kind:?}: {text:?} instead of {word:?}"
            );
            assert!(text.contains(&format!("{:#x}", region.base)), "{text}");
            let error = refused(rig.vm.modify(&region, &*mechanism), &format!("{region:?}"));
            assert_eq!(error.errno(), Errno::EINVAL, "{kind:?}: {error}");
        }
    }
    Ok(())
}

#[test]
fn regions_that_fill_their_bus_are_accepted() -> Result<()> {
    let rig = Rig::with(None)?;
    let mechanism = any_mechanism(&rig, KINDS[1])?;
    for region in [
        Region::mmio(0, u64::MAX),
        Region::mmio(1, u64::MAX),
        Region::mmio(u64::MAX, 1),
        Region {
            bus: Bus::Pio,
            ..Region::mmio(0, 0x1_0000)
        },
    ] {
        let _ = rig.vm.assign(&region, &*mechanism)?;
        rig.vm.remove(&region)?;
    }
    Ok(())
}

#[test]
fn ioeventfd_sink_refuses_what_it_cannot_carry() -> Result<()> {
    let rig = Rig::new()?;
    let mechanism = any_mechanism(&rig, KINDS[6])?;
    let bell = Doorbell::new(0, Size::B4);
    for doorbell in [
        bell.matching_masked(0xff, 1),
        bell.delivery(Delivery::Fifo).sink(Sink::Ioeventfd),
    ] {
        let region = Region::mmio(MMIO_BASE, 0x1000).doorbell(doorbell);
        let error = refused(rig.vm.assign(&region, &*mechanism), "ioeventfd sink");
        assert!(
            matches!(error.kind, RegionErrorKind::DoorbellSink(0, _)),
            "{error:?}"
        );
        assert_eq!(error.errno(), Errno::EINVAL);
    }
    Ok(())
}

#[test]
fn broken_channels_and_closed_peers_are_bad_descriptors() -> Result<()> {
    let bpf = bpf()?;
    for kind in channel_kinds() {
        let rig = Rig::with(Some(bpf.clone()))?;
        let region = Region::mmio(MMIO_BASE, 0x1000).doorbell(Doorbell::new(0x10, Size::B4));
        let (channel, wire) = channel(&rig, kind)?;
        drop(wire);
        for attempt in 0..2 {
            let error = refused(
                rig.vm.assign(&region, &*mechanism(kind, &channel)?),
                &format!("{kind:?} {attempt}"),
            );
            assert_eq!(error.errno(), Errno::EBADF, "{kind:?}: {error}");
            assert!(
                matches!(error.kind, RegionErrorKind::BadDescriptor(_)),
                "{kind:?}: {error:?}"
            );
            assert!(error.to_string().contains("0xd0000000"), "{error}");
        }
        assert_eq!(
            rig.vm.next_event(),
            None,
            "{kind:?}: there is no such region"
        );
        // Nothing stays behind: neither in the table nor in KVM.
        let task = rig.serve(kind, &region, Recorder::answering(|_, _| 5))?;
        let mut program = Program::new();
        program.write(Bus::Mmio, MMIO_BASE + 0x10, 4, 1);
        program.read(Bus::Mmio, MMIO_BASE, 4);
        let (log, _vcpu) = rig.run(&program)?;
        assert_eq!(log, [5], "{kind:?}");
        task.map(ioregion_conformance::Task::finish).transpose()?;
    }
    Ok(())
}

#[test]
fn descriptors_of_the_wrong_kind_make_no_wire() -> Result<()> {
    let null = || -> Result<OwnedFd> { Ok(std::fs::File::open("/dev/null")?.into()) };
    for transport in Transport::ALL {
        for count in 0..5 {
            let fds = (0..count).map(|_| null()).collect::<Result<_>>()?;
            let error = ioregion_dispatch::wire::from_fds(transport, fds);
            assert!(error.is_err(), "{transport}: {count} times /dev/null");
        }
    }
    // A socket of the other kind is none of this kind.
    let (a, _b) = std::os::unix::net::UnixStream::pair()?;
    assert!(ioregion_dispatch::wire::from_fds(Transport::Seqpacket, vec![a.into()]).is_err());
    // A socket that is connected to nobody is one, but it is as good as closed.
    let lone = nix::sys::socket::socket(
        nix::sys::socket::AddressFamily::Unix,
        nix::sys::socket::SockType::Stream,
        nix::sys::socket::SockFlag::SOCK_CLOEXEC,
        None,
    )?;
    let rig = Rig::with(None)?;
    let wire = ioregion_dispatch::wire::from_fds(Transport::Stream, vec![lone])?;
    let channel = Arc::new(Channel::new(wire, Layout::default(), Patience::default()));
    let region = Region::mmio(MMIO_BASE, 0x1000);
    let error = refused(
        rig.vm.assign(&region, &Forward::new(&channel)),
        "lone socket",
    );
    assert_eq!(error.errno(), Errno::EBADF, "{error}");
    Ok(())
}

/// KVM's I/O bus has room for 1,000 devices; ioeventfds do not count.
#[test]
fn full_bus_refuses_a_region_whole() -> Result<()> {
    const MANY: u64 = 1100;
    let bpf = bpf()?;
    let rig = Rig::with(Some(bpf))?;
    let bells = |count| {
        // With gaps, because neighbours would share a zone.
        let bell = |n| Doorbell::new(n * 16, Size::B4).sink(Sink::Coalesced);
        (0..count).fold(Region::mmio(MMIO_BASE, 16 * MANY), |region, n| {
            region.doorbell(bell(n))
        })
    };
    let mechanism = any_mechanism(&rig, KINDS[6])?;
    for _ in 0..2 {
        let error = refused(rig.vm.assign(&bells(MANY), &*mechanism), "a full bus");
        assert_eq!(error.errno(), Errno::ENOSPC, "{error}");
        assert!(
            matches!(error.kind, RegionErrorKind::TableFull(_)),
            "{error:?}"
        );
        assert!(error.to_string().contains("is full"), "{error}");
    }
    // Nearly as many fit: nothing was left of the attempts.
    let _ = rig.vm.assign(&bells(990), &*mechanism)?;
    rig.vm.remove(&bells(990))?;
    let _ = rig.vm.assign(&bells(990), &*mechanism)?;
    Ok(())
}

#[test]
fn thousands_of_ioeventfds_fit() -> Result<()> {
    const MANY: u64 = 3000;
    let bpf = bpf()?;
    for kind in [KINDS[5], KINDS[6]] {
        let rig = Rig::with(Some(bpf.clone()))?;
        let bell = |n| Doorbell::new(n * 4, Size::B4);
        let region = (0..MANY).fold(Region::mmio(MMIO_BASE, 4 * MANY), |region, n| {
            region.doorbell(bell(n))
        });
        let mechanism = any_mechanism(&rig, kind)?;
        let _ = rig.vm.assign(&region, &*mechanism)?;
        rig.vm.remove(&region)?;
    }
    Ok(())
}

#[test]
fn full_match_table_refuses_a_region_whole() -> Result<()> {
    let object = std::fs::read(Bpf::find()?)?;
    let rig = Rig::with(Some(Bpf::load_sized(&object, 64)?))?;
    let bells = |count| {
        let bell = |n: u64| Doorbell::new(n * 4, Size::B4).sink(Sink::Coalesced);
        (0..count).fold(Region::mmio(MMIO_BASE, 0x1000), |region, n| {
            region.doorbell(bell(n))
        })
    };
    let mechanism = any_mechanism(&rig, KINDS[6])?;
    for _ in 0..3 {
        let error = refused(rig.vm.assign(&bells(200), &*mechanism), "a full table");
        assert_eq!(error.errno(), Errno::ENOSPC, "{error}");
        assert!(
            matches!(error.kind, RegionErrorKind::TableFull(_)),
            "{error:?}"
        );
    }
    let _ = rig.vm.assign(&bells(60), &*mechanism)?;
    Ok(())
}

#[test]
fn ebpf_without_a_program_is_refused_and_auto_does_without() -> Result<()> {
    let rig = Rig::with(None)?;
    let region = Region::mmio(MMIO_BASE, 0x1000).doorbell(Doorbell::new(0x10, Size::B4));
    let (channel, _wire) = Channel::pair(Transport::Stream)?;
    let error = refused(rig.vm.assign(&region, &Ebpf::new(&channel)), "no program");
    assert!(
        matches!(
            error.kind,
            RegionErrorKind::Missing {
                mechanism: Ebpf::NAME,
                ..
            }
        ),
        "{error:?}"
    );
    assert!(error.to_string().contains("Vm::with_program"), "{error}");
    let assigned = rig.vm.assign(&region, &Auto::new(&channel))?;
    let native = kinds().any(|kind| kind.name == Ioregionfd::NAME);
    let (name, reason) = if native {
        (Ioregionfd::NAME, "KVM speaks to the device task itself")
    } else {
        (Forward::NAME, "no eBPF program")
    };
    assert_eq!(assigned.mechanism, name);
    assert!(assigned.reason.contains(reason), "{}", assigned.reason);
    rig.vm.remove(&region)?;
    // KVM keeps the other one.
    let (channel, _wire) = Channel::pair(Transport::Stream)?;
    let matching =
        Region::mmio(MMIO_BASE, 0x1000).doorbell(Doorbell::new(0x10, Size::B4).matching(1));
    assert_eq!(
        rig.vm.assign(&matching, &Auto::new(&channel))?.mechanism,
        Ioeventfd::NAME
    );
    Ok(())
}

/// Set where this test program runs itself to see what a child of it finds.
const CHILD: &str = "IOREGION_TEST_CHILD";

/// Runs this program's test `child_loads_the_program` and returns what it printed.
fn in_child(prepare: impl FnOnce(&mut Command)) -> Result<String> {
    let mut command = Command::new(std::env::current_exe()?);
    command
        .args(["--exact", "child_loads_the_program", "--nocapture"])
        .env(CHILD, "1");
    prepare(&mut command);
    let output = command.output()?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned()
        + &String::from_utf8_lossy(&output.stderr))
}

#[test]
fn child_loads_the_program() {
    if std::env::var_os(CHILD).is_none() {
        return;
    }
    match Bpf::load_default() {
        Ok(_) => println!("loaded"),
        Err(error) => println!("{error:?}\n{error}"),
    }
}

#[test]
fn object_that_is_not_there_names_the_remedy() -> Result<()> {
    let path = "/nonexistent/ioregion.bpf.o";
    let text = in_child(|child| _ = child.env("IOREGION_BPF_OBJECT", path))?;
    assert!(text.contains("Unreadable") && text.contains(path), "{text}");
    assert!(text.contains("build-ebpf"), "{text}");

    // A copy of this program in a place without an object.
    let place = tempfile::tempdir()?;
    let copy = place.path().join("elsewhere");
    std::fs::copy(std::env::current_exe()?, &copy)?;
    let output = Command::new(&copy)
        .args(["--exact", "child_loads_the_program", "--nocapture"])
        .env(CHILD, "1")
        .env_remove("IOREGION_BPF_OBJECT")
        .output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        text.contains("NotBuilt") && text.contains("build-ebpf"),
        "{text}"
    );
    Ok(())
}

#[test]
fn damaged_objects_are_refused_with_the_remedy() -> Result<()> {
    let object = std::fs::read(Bpf::find()?)?;
    let mut damaged = vec![
        ("empty", Vec::new()),
        ("no ELF", b"#!/bin/sh\n".repeat(100)),
        ("half", object[..object.len() / 2].to_vec()),
        ("its header", object[..64].to_vec()),
    ];
    let mut flipped = object.clone();
    flipped
        .iter_mut()
        .skip(64)
        .step_by(7)
        .for_each(|byte| *byte = !*byte);
    damaged.push(("flipped", flipped));
    for (what, bytes) in damaged {
        let error = Bpf::load(&bytes).expect_err(what);
        println!("{what}: {error}");
        assert!(
            matches!(error, LoadError::Damaged(_) | LoadError::Object { .. }),
            "{what}: {error:?}"
        );
        assert!(error.to_string().contains("build"), "{what}: {error}");
    }
    Ok(())
}

#[test]
fn process_without_privileges_is_told_what_it_lacks() -> Result<()> {
    // Readable for everybody, wherever the checkout is.
    let place = tempfile::tempdir()?;
    let (copy, object) = (place.path().join("child"), place.path().join("object"));
    std::fs::copy(std::env::current_exe()?, &copy)?;
    std::fs::copy(Bpf::find()?, &object)?;
    for (path, mode) in [(place.path(), 0o755), (&copy, 0o755), (&object, 0o644)] {
        use std::os::unix::fs::PermissionsExt as _;
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode))?;
    }
    let output = Command::new(&copy)
        .args(["--exact", "child_loads_the_program", "--nocapture"])
        .env(CHILD, "1")
        .env("IOREGION_BPF_OBJECT", &object)
        .current_dir("/")
        .gid(65534)
        .uid(65534)
        .output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    println!("{text}");
    assert!(
        text.contains("NotPermitted"),
        "{text} {}",
        String::from_utf8_lossy(&output.stderr)
    );
    assert!(text.contains("CAP_BPF") && text.contains("root"), "{text}");
    Ok(())
}
