//! Attaching the program and emptying its tables, where that goes wrong or happens again and again.

mod support;

use std::os::fd::AsRawFd as _;

use anyhow::{Context as _, Result};
use aya::maps::{Array, Map, MapData, MapInfo};
use aya::programs::loaded_programs;
use ioregion_abi::bpf::MatchKey;
use ioregion_abi::bucket::DoorbellBucket;
use ioregion_conformance::{
    Kind, Recorder, Rig, TRACEPOINTS, channel, maps, mechanism, run_to_halt,
};
use ioregion_dispatch::mechanism::Ebpf;
use ioregion_dispatch::{
    Answered, Bus, Channel, Doorbell, LoadError, Region, RegionErrorKind, Size, Transport, Via,
};
use ioregion_microguest::{MMIO_BASE, Program};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

use support::{alone, bpf, hooked};

/// Does something while this process has room for so many more descriptors.
fn with_room_for<T>(descriptors: u64, what: impl FnOnce() -> T) -> Result<T> {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    let mut held = Vec::new();
    for _ in 0..=descriptors {
        held.push(std::fs::File::open("/dev/null")?);
    }
    let past = held.last().context("a file")?.as_raw_fd();
    drop(held);
    setrlimit(Resource::RLIMIT_NOFILE, u64::try_from(past)?, hard)?;
    let done = what();
    setrlimit(Resource::RLIMIT_NOFILE, soft, hard)?;
    Ok(done)
}

#[test]
fn an_attachment_that_fails_half_way_is_taken_back() -> Result<()> {
    let _alone = alone();
    let rig = Rig::with(Some(bpf()?))?;
    let (plain, _wire) = Channel::pair(Transport::Stream)?;
    let region = Region::mmio(MMIO_BASE, 0x1000).doorbell(Doorbell::new(0x10, Size::B4));
    let ebpf = Ebpf::new(&plain).via(Via::Tracepoints);
    for _ in 0..3 {
        let refused = with_room_for(1, || rig.vm.assign(&region, &ebpf))?;
        let error = refused.err().context("two links with one descriptor")?;
        let RegionErrorKind::Tracepoints(LoadError::Io(cause)) = &error.kind else {
            panic!("{error:?}");
        };
        assert_eq!(cause.raw_os_error(), Some(libc::EMFILE), "{error}");
    }
    let traced = Kind {
        name: TRACEPOINTS,
        transport: Transport::Stream,
    };
    let device = Recorder::default();
    let _task = rig.serve(traced, &region, device.clone())?;
    let mut program = Program::new();
    program.write(Bus::Mmio, MMIO_BASE + 0x10, 4, 7);
    let mut vcpu = rig.vcpu(0, &program)?;
    let mut matched = || -> Result<u64> {
        run_to_halt(&mut vcpu)?;
        rig.guest.reload(vcpu.fd(), 0, &program)?;
        Ok(rig.vm.program_counters().context("counters")?.matched)
    };
    assert_eq!(matched()?, 1, "each program is attached once");
    device.wait(|told| !told.is_empty())?;
    // Taking it off takes all of it off.
    let bpf = rig.bpf.as_ref().context("a program")?;
    for attached in [false, false, true, true] {
        bpf.set_attached(attached)?;
    }
    assert_eq!(matched()?, 2);
    bpf.set_attached(false)?;
    assert_eq!(matched()?, 2);
    Ok(())
}

/// The `BUCKETS` of the program that this process has loaded last.
fn buckets() -> Result<Array<MapData, [u64; 4]>> {
    let mut newest = None;
    for (fd, _) in maps::open_fds()? {
        let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{fd}")).unwrap_or_default();
        let id = info.lines().find_map(|line| line.strip_prefix("prog_id:"));
        newest = newest.max(id.and_then(|id| id.trim().parse::<u32>().ok()));
    }
    let newest = newest.context("no program")?;
    let program = loaded_programs()
        .filter_map(Result::ok)
        .find(|program| program.id() == newest)
        .context("the program is gone")?;
    for id in program.map_ids()?.context("the ids of its maps")? {
        if MapInfo::from_id(id)?.name_as_str() == Some("BUCKETS") {
            return Ok(Array::try_from(Map::Array(MapData::from_id(id)?))?);
        }
    }
    anyhow::bail!("no buckets")
}

#[test]
fn answered_registers_are_found_at_once_however_often_they_come_and_go() -> Result<()> {
    let _alone = alone();
    for kind in hooked()? {
        println!("{kind:?}");
        let rig = Rig::with(Some(bpf()?))?;
        let buckets = buckets()?;
        let registers = rig.vm.registers(1)?;
        let region = Region::mmio(MMIO_BASE, 0x1000)
            .registers(&registers)
            .answered(Answered::new(0x20, Size::B4, 0));
        // The first VM of its program.
        let key = MatchKey::first(1, Bus::Mmio, MMIO_BASE + 0x20, 4).hooked(false);
        let state = || buckets.get(&DoorbellBucket::of(&key), 0);
        for round in 0..3 {
            let (channel, _wire) = channel(&rig, kind)?;
            let _ = rig.vm.assign(&region, &*mechanism(kind, &channel)?)?;
            let [held, ..] = state()?;
            assert_ne!(held, DoorbellBucket::EMPTY, "round {round}");
            assert_ne!(held, DoorbellBucket::CROWDED, "round {round}");
            rig.vm.remove(&region)?;
            assert_eq!(state()?[0], DoorbellBucket::EMPTY, "round {round}");
        }
    }
    Ok(())
}
