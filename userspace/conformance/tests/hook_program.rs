//! The program that KVM shows accesses to: what it says, who may have it, and what it costs those
//! who do not need it.

mod support;

use std::collections::BTreeSet;
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, RawFd};
use std::os::unix::net::UnixListener;
use std::process::{Command, Stdio};
use std::sync::{Arc, mpsc};

use anyhow::{Context as _, Result, ensure};
use aya::maps::MapInfo;
use aya::programs::{ProgramFd, ProgramInfo};
use ioregion_abi::bpf::{BPF_PROG_TEST_RUN, MatchEntry, MatchKey, TestRun};
use ioregion_abi::bucket::DoorbellBucket;
use ioregion_abi::kvm::{prog_arg, verdict};
use ioregion_conformance::{Kind, Recorder, Rig, Told, channel, maps, mechanism, run_to_halt};
use ioregion_dispatch::mechanism::Ebpf;
use ioregion_dispatch::{
    Answered, Bus, Channel, Doorbell, Event, Program as Bpf, Region, Ring, Sink, Size, Transport,
    Via,
};
use ioregion_microguest::{MMIO_BASE, Program};

use support::{alone, hooked, wait_until};

/// What `/proc` says of a descriptor under a name.
fn field(fd: RawFd, name: &str) -> Option<u32> {
    let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{fd}")).ok()?;
    let value = info.lines().find_map(|line| line.strip_prefix(name))?;
    value.trim().parse().ok()
}

/// The ids that `/proc` gives of this process's descriptors under a name.
fn ids(name: &str) -> Result<BTreeSet<u32>> {
    let fds = maps::open_fds()?.into_iter();
    Ok(fds.filter_map(|(fd, _)| field(fd, name)).collect())
}

/// The tracepoints that programs of this process are attached to.
fn links() -> Result<BTreeSet<u32>> {
    ids("link_id:")
}

/// A program, and the part of it that KVM shows accesses to.
fn load() -> Result<(Arc<Bpf>, ProgramInfo)> {
    // Not the descriptors themselves: a loader's thread may still be closing some.
    let before = ids("prog_id:")?;
    let bpf = Bpf::load_default()?;
    let new: BTreeSet<_> = ids("prog_id:")?.difference(&before).copied().collect();
    let mut all = aya::programs::loaded_programs().filter_map(Result::ok);
    let hook = all.find(|program| {
        new.contains(&program.id()) && program.name_as_str() == Some("kvm_ioregion")
    });
    Ok((bpf, hook.context("no kvm_ioregion")?))
}

#[test]
fn tracepoints_are_attached_when_the_first_region_needs_them() -> Result<()> {
    let _alone = alone();
    let hooked = hooked()?;
    let before = links()?;
    let new = || -> Result<usize> { Ok(links()?.difference(&before).count()) };
    let rig = Rig::with(Some(Bpf::load_default()?))?;
    assert_eq!(new()?, 0, "loaded");
    let registers = rig.vm.registers(1)?;
    let (plain, _wire) = Channel::pair(Transport::Stream)?;
    let region = |n: u64| Region::mmio(MMIO_BASE + n * 0x1000, 0x1000);
    let ebpf = Ebpf::new(&plain).via(Via::Tracepoints);
    let _ = rig.vm.assign(&region(0), &ebpf)?;
    assert_eq!(new()?, 0, "a region without doorbells");
    let with = |n| {
        region(n)
            .doorbell(Doorbell::new(0x10, Size::B4))
            .registers(&registers)
            .answered(Answered::new(0, Size::B4, 0))
    };
    let mut wires = Vec::new();
    for (n, kind) in (1..).zip(hooked) {
        let (channel, wire) = channel(&rig, kind)?;
        let assigned = rig.vm.assign(&with(n), &*mechanism(kind, &channel)?)?;
        assert_eq!(assigned.via, Some(Via::Hook));
        assert_eq!(new()?, 0, "a region that KVM shows the program");
        wires.push((channel, wire));
    }
    let assigned = rig.vm.assign(&with(8), &ebpf)?;
    assert_eq!(assigned.via, Some(Via::Tracepoints));
    assert_eq!(new()?, 2);
    let _ = rig.vm.assign(&with(9), &ebpf)?;
    assert_eq!(new()?, 2, "once");
    drop(rig);
    Ok(())
}

/// Shows a program an access as KVM does.
fn show(hook: &ProgramFd, args: [u64; 12]) -> Result<u32> {
    let mut attr = TestRun {
        prog_fd: hook.as_fd().as_raw_fd().cast_unsigned(),
        ctx_size_in: size_of_val(&args) as u32,
        ctx_in: args.as_ptr() as u64,
        ..TestRun::default()
    };
    let (at, len) = (&raw mut attr, size_of::<TestRun>());
    // SAFETY: `attr` is laid out for the command, and `args` outlives the call.
    let ret = unsafe { libc::syscall(libc::SYS_bpf, BPF_PROG_TEST_RUN, at, len) };
    ensure!(ret == 0, "{}", io::Error::last_os_error());
    Ok(attr.retval)
}

fn access(write: bool, bus: Bus, addr: u64, bytes: u64, data: u64) -> [u64; 12] {
    let mut args = [0; 12];
    args[prog_arg::WHAT] = bytes
        | if write { prog_arg::WRITE } else { 0 }
        | if bus == Bus::Pio { prog_arg::PIO } else { 0 };
    args[prog_arg::DATA] = data;
    args[prog_arg::ADDR] = addr;
    args
}

/// The program needs no KVM that knows it, so that its verdicts can be seen on any kernel.
#[test]
fn the_program_says_what_the_match_table_says() -> Result<()> {
    let _alone = alone();
    let (bpf, hook) = load()?;
    let table = Tables::of(&hook)?;
    let hook = hook.fd()?;
    let rig = Rig::with(Some(bpf))?;
    // Makes this thread a vCPU's, and a port where there is something to store to: slot 0 of
    // port 1 (0 is the draining task's).
    let region = Region::mmio(MMIO_BASE, 0x1000)
        .doorbell(Doorbell::new(0x10, Size::B4).sink(Sink::Coalesced));
    let device = Recorder::default();
    let _task = rig.serve(Kind::TRACEPOINTS, &region, device.clone())?;
    let mut vcpu = rig.vcpu(0, &Program::new())?;
    run_to_halt(&mut vcpu)?;
    let (vm, at) = (1, 0xe000_0000);
    let insert = |key: MatchKey, entry: MatchEntry| table.insert(key, entry);
    let store = |flags| MatchEntry {
        port: 1,
        flags: MatchEntry::STORE | MatchEntry::WAKE_ALWAYS | flags,
        ..MatchEntry::default()
    };
    let answer = |index| MatchEntry {
        slot: index,
        flags: MatchEntry::ANSWER,
        ..MatchEntry::default()
    };
    let first = |bus, addr, bytes| MatchKey::first(vm, bus, addr, bytes);
    insert(first(Bus::Mmio, at, 4).hooked(true), store(0))?;
    insert(first(Bus::Mmio, at, 4).hooked(false), answer(0xab_cdef))?;
    insert(
        first(Bus::Pio, 0x60, 1).hooked(true),
        store(MatchEntry::SIGNAL),
    )?;
    insert(first(Bus::Mmio, at + 8, 4), store(0))?;
    let select = MatchEntry {
        mask: 0xf0,
        flags: MatchEntry::SELECT,
        ..MatchEntry::default()
    };
    let masked = first(Bus::Mmio, at + 16, 4).hooked(true);
    insert(masked, select)?;
    insert(masked.masked(0x50), store(0))?;
    let told = |n: usize| device.wait(|told| told.len() >= n);

    assert_eq!(
        show(&hook, access(true, Bus::Mmio, at, 4, 71))?,
        verdict::CONSUME
    );
    assert!(matches!(
        told(1)?[0],
        Told::Ring(Ring {
            value: Some(71),
            writes: 1,
            ..
        })
    ));
    let signal = show(&hook, access(true, Bus::Pio, 0x60, 1, 72))?;
    assert_eq!(signal, verdict::with(verdict::SIGNAL, 0));
    assert!(matches!(
        told(2)?[1],
        Told::Ring(Ring {
            value: Some(72),
            writes: 1,
            ..
        })
    ));
    let answered = show(&hook, access(false, Bus::Mmio, at, 4, 0))?;
    assert_eq!(answered, verdict::with(verdict::ANSWER, 0xab_cdef));
    assert_eq!(
        show(&hook, access(true, Bus::Mmio, at + 16, 4, 0x75f))?,
        verdict::CONSUME
    );
    assert!(matches!(
        told(3)?[2],
        Told::Ring(Ring {
            value: Some(0x75f),
            writes: 1,
            ..
        })
    ));

    let mut unknown = access(true, Bus::Mmio, at, 4, 1);
    unknown[prog_arg::LAST] = 1;
    let passed = [
        unknown,
        // Other value, size, bus, address, direction; a tracepoint's doorbell.
        access(true, Bus::Mmio, at + 16, 4, 0x76f),
        access(true, Bus::Mmio, at, 2, 1),
        access(true, Bus::Mmio, at, 0, 1),
        access(true, Bus::Pio, at, 4, 1),
        access(true, Bus::Mmio, at + 4, 4, 1),
        access(false, Bus::Pio, 0x60, 1, 0),
        access(false, Bus::Mmio, at + 16, 4, 0x50),
        access(true, Bus::Mmio, at + 8, 4, 1),
    ];
    for args in passed {
        assert_eq!(show(&hook, args)?, verdict::PASS, "{args:x?}");
    }
    // A thread that runs no vCPU.
    let hit = access(true, Bus::Mmio, at, 4, 1);
    let other = std::thread::scope(|scope| scope.spawn(|| show(&hook, hit)).join());
    assert_eq!(other.expect("a thread")?, verdict::PASS);
    std::thread::sleep(std::time::Duration::from_millis(20));
    assert_eq!(device.told().len(), 3);
    let counters = rig.vm.program_counters().context("counters")?;
    assert_eq!((counters.matched, counters.lost), (3, 0));
    Ok(())
}

/// The match table of a program.
struct Tables {
    doorbells: maps::Map,
    buckets: maps::Map,
}

impl Tables {
    fn of(program: &ProgramInfo) -> Result<Self> {
        let (mut doorbells, mut buckets) = (None, None);
        for id in program.map_ids()?.context("the ids of its maps")? {
            let info = MapInfo::from_id(id)?;
            let map = maps::Map::open(info.fd()?.as_fd().as_raw_fd())?;
            match info.name_as_str() {
                Some("DOORBELLS") => doorbells = Some(map),
                Some("BUCKETS") => buckets = Some(map),
                _ => {}
            }
        }
        Ok(Self {
            doorbells: doorbells.context("no match table")?,
            buckets: buckets.context("no buckets")?,
        })
    }

    /// Adds an entry behind the library's back.
    fn insert(&self, key: MatchKey, entry: MatchEntry) -> Result<()> {
        let mut bytes = Vec::new();
        bytes.extend(key.addr.to_ne_bytes());
        bytes.extend(key.value.to_ne_bytes());
        bytes.extend(key.vm.to_ne_bytes());
        bytes.extend(key.what.to_ne_bytes());
        let mut value = Vec::from(entry.mask.to_ne_bytes());
        for word in [entry.port, entry.block, entry.slot, entry.flags] {
            value.extend(word.to_ne_bytes());
        }
        self.doorbells.update_at(&bytes, &value)?;
        let mut crowded = [0; 32];
        crowded[..8].copy_from_slice(&DoorbellBucket::CROWDED.to_ne_bytes());
        self.buckets.update(DoorbellBucket::of(&key), &crowded)?;
        Ok(())
    }
}

#[test]
fn the_program_can_be_attached_to_no_tracepoint() -> Result<()> {
    #[repr(C)]
    struct Open {
        name: u64,
        prog_fd: u32,
        pad: u32,
    }
    const BPF_RAW_TRACEPOINT_OPEN: libc::c_long = 17;
    let _alone = alone();
    let (_bpf, hook) = load()?;
    let hook = hook.fd()?;
    for name in [c"kvm_mmio", c"kvm_pio", c"sys_enter", c"sched_switch"] {
        let attr = Open {
            name: name.as_ptr() as u64,
            prog_fd: hook.as_fd().as_raw_fd().cast_unsigned(),
            pad: 0,
        };
        let (at, len) = (&raw const attr, size_of::<Open>());
        // SAFETY: `attr` is laid out for the command, and the name outlives the call.
        let fd = unsafe { libc::syscall(libc::SYS_bpf, BPF_RAW_TRACEPOINT_OPEN, at, len) };
        let error = io::Error::last_os_error();
        assert!(fd < 0, "attached to {name:?}");
        assert_eq!(
            error.raw_os_error(),
            Some(libc::EINVAL),
            "{name:?}: {error}"
        );
    }
    Ok(())
}

#[test]
fn when_the_loader_goes_doorbells_and_answered_reads_become_commands() -> Result<()> {
    let _alone = alone();
    for kind in hooked()? {
        println!("{kind:?}");
        let dir = tempfile::tempdir()?;
        let path = dir.path().join("loader");
        let listener = UnixListener::bind(&path)?;
        let object = std::fs::read(Bpf::find()?)?;
        let (sender, receiver) = mpsc::channel();
        let loader = std::thread::spawn(move || {
            let (socket, _) = listener.accept().expect("a client");
            sender.send(socket.try_clone()).expect("somebody waits");
            ioregion_dispatch::ebpf::serve_vmm(&socket, &object).expect("a loader");
        });
        let rig = Rig::with(Some(Bpf::connect(&path)?))?;
        let socket = receiver.recv()??;
        let registers = rig.vm.registers(1)?;
        registers.store(0, 5);
        let region = Region::mmio(MMIO_BASE, 0x1000)
            .registers(&registers)
            .answered(Answered::new(0x20, Size::B4, 0))
            .doorbell(Doorbell::new(0x10, Size::B4));
        let device = Recorder::answering(|_, _| 6);
        let task = rig.serve(kind, &region, device.clone())?;
        let mut program = Program::new();
        program.write(Bus::Mmio, MMIO_BASE + 0x10, 4, 0x77);
        program.read(Bus::Mmio, MMIO_BASE + 0x20, 4);
        let mut vcpu = rig.vcpu(0, &program)?;
        run_to_halt(&mut vcpu)?;
        assert_eq!(rig.guest.log(0)?, [5]);
        device.wait(|told| told.len() == 1)?;
        // As loaders do: first detaches the program, then hangs up.
        socket.shutdown(std::net::Shutdown::Read)?;
        loader.join().expect("the loader's thread");
        drop(socket);
        wait_until("the report", || {
            matches!(rig.vm.next_event(), Some(Event::ProgramGone { .. }))
        });
        rig.guest.reload(vcpu.fd(), 0, &program)?;
        run_to_halt(&mut vcpu)?;
        assert_eq!((rig.guest.log(0)?, vcpu.stats().exits), (vec![6], 0));
        let told = device.told();
        let rings = told.iter().filter(
            |told| matches!(told, Told::Ring(ring) if ring.value == Some(0x77) && ring.writes == 1),
        );
        assert_eq!((rings.count(), told.len()), (2, 3), "{told:?}");
        rig.vm.remove(&region)?;
        assert_eq!(task.context("a task")?.finish()?.commands, 2);
    }
    Ok(())
}

/// Whoever is nobody.
const NOBODY: u32 = 65534;
/// Makes this test binary play the unprivileged VMM.
const SOCKET: &str = "IOREGION_TEST_HOOK_SOCKET";

#[test]
fn an_unprivileged_vmm_has_the_hook_through_a_loader() -> Result<()> {
    if let Some(socket) = std::env::var_os(SOCKET) {
        return unprivileged(std::path::Path::new(&socket));
    }
    let _alone = alone();
    let kinds = hooked()?.len();
    let dir = tempfile::tempdir()?;
    let everybody = std::os::unix::fs::PermissionsExt::from_mode(0o777);
    std::fs::set_permissions(dir.path(), everybody)?;
    let path = dir.path().join("loader");
    let listener = UnixListener::bind(&path)?;
    let everybody = std::os::unix::fs::PermissionsExt::from_mode(0o777);
    std::fs::set_permissions(&path, everybody)?;
    let object = std::fs::read(Bpf::find()?)?;
    // Lives as long as the process: whether somebody comes is the child's affair.
    std::thread::spawn(move || {
        for client in listener.incoming().flatten() {
            if let Err(error) = ioregion_dispatch::ebpf::serve_vmm(&client, &object) {
                eprintln!("the loader: {error}");
            }
        }
    });
    let child = Command::new(std::env::current_exe()?)
        .args([
            "--exact",
            "an_unprivileged_vmm_has_the_hook_through_a_loader",
        ])
        .arg("--nocapture")
        .env(SOCKET, &path)
        .stderr(Stdio::inherit())
        .output()?;
    let text = String::from_utf8_lossy(&child.stdout);
    ensure!(child.status.success(), "{text}");
    ensure!(
        text.contains(&format!("{kinds} kinds, unprivileged")),
        "{text}"
    );
    Ok(())
}

fn unprivileged(socket: &std::path::Path) -> Result<()> {
    let kinds = hooked()?;
    // Only root may open /dev/kvm on many machines; the VMs' descriptors stay usable.
    let guests: Vec<_> = kinds
        .iter()
        .map(|_| Rig::with(None).map(|rig| rig.guest))
        .collect::<Result<_>>()?;
    nix::unistd::setgroups(&[])?;
    nix::unistd::setgid(NOBODY.into())?;
    nix::unistd::setuid(NOBODY.into())?;
    ensure!(Bpf::load_default().is_err(), "this process has privileges");
    let bpf = Bpf::connect(socket)?;
    for (kind, guest) in kinds.iter().zip(guests) {
        let vm = ioregion_dispatch::Vm::with_program(guest.vm().clone(), &bpf)?;
        let rig = Rig {
            vm,
            guest,
            bpf: Some(bpf.clone()),
        };
        let registers = rig.vm.registers(16)?;
        registers.store(9, 0x1234_5678);
        let region = Region::mmio(MMIO_BASE, 0x1000)
            .registers(&registers)
            .answered(Answered::new(0x20, Size::B4, 9))
            .doorbell(Doorbell::new(0x10, Size::B4));
        let device = Recorder::default();
        let _task = rig.serve(*kind, &region, device.clone())?;
        let mut program = Program::new();
        program.write(Bus::Mmio, MMIO_BASE + 0x10, 4, 0x77);
        program.read(Bus::Mmio, MMIO_BASE + 0x20, 4);
        let (log, vcpu) = rig.run(&program)?;
        assert_eq!((log, vcpu.stats().exits), (vec![0x1234_5678], 0));
        let told = device.wait(|told| !told.is_empty())?;
        let rang = Told::Ring(Ring {
            user_data: 0,
            index: 0,
            offset: 0x10,
            size: Size::B4,
            value: Some(0x77),
            writes: 1,
        });
        assert_eq!(told, [rang]);
    }
    println!("{} kinds, unprivileged", kinds.len());
    Ok(())
}
