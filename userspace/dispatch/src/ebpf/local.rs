//! The program held by this process, through aya.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};

use aya::maps::{Array, ArrayOfMaps, HashMap, Map, MapData, MapError};
use aya::programs::raw_trace_point::RawTracePointLinkId;
use aya::programs::{ProgramFd, RawTracePoint};
use aya::{Ebpf, EbpfLoader};
use aya_obj::generated::BPF_NOEXIST;
use aya_obj::generated::bpf_map_type::{BPF_MAP_TYPE_ARRAY, BPF_MAP_TYPE_RINGBUF};
use ioregion_abi::bpf::{
    CONTROL_WORDS, MAX_PORTS, MAX_VCPUS, MatchEntry, MatchKey, SlotBlock, VcpuRecord, ZoneKey,
};

use super::buckets;
use super::control::{Control, PortFds};
use super::program::LoadError;
use crate::sys::bpf;

const BPF_F_MMAPABLE: u32 = 1 << 10;
const BPF_F_INNER_MAP: u32 = 1 << 12;
/// The smallest ring buffer: one page.
const RINGBUF_LEN: u32 = 4096;
/// The last port, by which to wait for the program's runs: see [`Maps::wait_for_runs`].
const SPARE_PORT: u32 = MAX_PORTS - 1;
/// The programs that are attached, and the raw tracepoints that they are attached to.
const PROGRAMS: [&str; 2] = ["kvm_mmio", "kvm_pio"];

/// The program and its maps.
pub(crate) struct Local {
    maps: Mutex<Maps>,
    records: OwnedFd,
    whoami: ProgramFd,
    hook: ProgramFd,
    attached: Vec<ProgramFd>,
    #[cfg(feature = "log")]
    logger: Option<Mutex<aya_log::EbpfLogger<&'static dyn log::Log>>>,
    // Holds the links, of which there are none until they are needed: dropping it detaches the
    // programs.
    ebpf: Mutex<(Ebpf, Links)>,
}

/// The links that there are, one place for each of [`PROGRAMS`].
type Links = [Option<RawTracePointLinkId>; PROGRAMS.len()];

struct Maps {
    vcpus: HashMap<MapData, u32, u32>,
    threads: buckets::Threads,
    buckets: buckets::Doorbells,
    records: Array<MapData, VcpuRecord>,
    doorbells: HashMap<MapData, MatchKey, MatchEntry>,
    zones: HashMap<MapData, ZoneKey, u32>,
    slots: ArrayOfMaps<MapData>,
    controls: ArrayOfMaps<MapData>,
    wakers: ArrayOfMaps<MapData>,
    outer: [OwnedFd; 3],
    /// Stands in the place of a port that is never handed out.
    spare: MapData,
    ports: Numbers,
    free_records: Numbers,
    next_vm: u32,
}

impl std::fmt::Debug for Local {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Local").finish_non_exhaustive()
    }
}

impl Local {
    /// Loads the programs of an object file, for the threads of one process or of all, and makes
    /// sure that they can be attached.
    pub(crate) fn load(
        object: &[u8],
        max_doorbells: u32,
        process: Option<u32>,
    ) -> Result<Self, LoadError> {
        let process = process.unwrap_or(0);
        let mut ebpf = EbpfLoader::new()
            .map_max_entries("DOORBELLS", max_doorbells)
            .override_global("PROCESS", &process, true)
            .load(object)
            .map_err(LoadError::load)?;
        #[cfg(feature = "log")]
        let logger = aya_log::EbpfLogger::init(&mut ebpf)
            .inspect_err(|error| tracing::debug!(%error, "the program was built without logging"))
            .ok()
            .map(Mutex::new);
        let mut load = |name| {
            let program = program(&mut ebpf, name)?;
            program.load().map_err(LoadError::verify)?;
            program.fd()?.try_clone().map_err(LoadError::Io)
        };
        let whoami = load("whoami")?;
        let hook = load("kvm_ioregion")?;
        let attached = PROGRAMS.into_iter().map(load).collect::<Result<_, _>>()?;
        // What is missing is told now; whoever never needs the tracepoints does not pay for them.
        let mut links = Links::default();
        attach(&mut ebpf, &mut links)?;
        detach(&mut ebpf, &mut links)?;
        let mut outer = Vec::new();
        let mut take = |name: &'static str| {
            let map = ebpf
                .take_map(name)
                .ok_or(LoadError::Object { missing: name })?;
            if let Map::ArrayOfMaps(data) = &map {
                outer.push(
                    data.fd()
                        .as_fd()
                        .try_clone_to_owned()
                        .map_err(LoadError::Io)?,
                );
            }
            Ok::<_, LoadError>(map)
        };
        let records = take("RECORDS")?;
        let records_fd = match &records {
            Map::Array(data) => data
                .fd()
                .as_fd()
                .try_clone_to_owned()
                .map_err(LoadError::Io)?,
            _ => return Err(LoadError::Object { missing: "RECORDS" }),
        };
        let mut array = |missing| match take(missing)? {
            Map::Array(data) => Ok(data),
            _ => Err(LoadError::Object { missing }),
        };
        let (threads, buckets) = (array("THREADS")?, array("BUCKETS")?);
        let maps = Maps {
            threads: buckets::Threads::new(threads.fd().as_fd()).map_err(LoadError::Io)?,
            buckets: buckets::Doorbells::new(buckets.fd().as_fd()).map_err(LoadError::Io)?,
            vcpus: take("VCPUS")?.try_into()?,
            records: records.try_into()?,
            doorbells: take("DOORBELLS")?.try_into()?,
            zones: take("ZONES")?.try_into()?,
            slots: take("SLOTS")?.try_into()?,
            controls: take("CONTROLS")?.try_into()?,
            wakers: take("WAKERS")?.try_into()?,
            outer: outer.try_into().map_err(|_| LoadError::Object {
                missing: "arrays of maps",
            })?,
            spare: words(1, BPF_F_INNER_MAP, "ioregion_spare").map_err(LoadError::from)?,
            ports: Numbers::new(SPARE_PORT),
            free_records: Numbers::new(MAX_VCPUS),
            next_vm: 0,
        };
        Ok(Self {
            maps: Mutex::new(maps),
            records: records_fd,
            whoami,
            hook,
            attached,
            #[cfg(feature = "log")]
            logger,
            ebpf: Mutex::new((ebpf, links)),
        })
    }

    fn maps(&self) -> MutexGuard<'_, Maps> {
        self.maps.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn program<'a>(ebpf: &'a mut Ebpf, name: &'static str) -> Result<&'a mut RawTracePoint, LoadError> {
    let program = ebpf
        .program_mut(name)
        .ok_or(LoadError::Object { missing: name })?;
    Ok(program.try_into()?)
}

/// Attaches what is not attached. If that fails, nothing is: a program that is attached twice counts
/// everything twice.
fn attach(ebpf: &mut Ebpf, links: &mut Links) -> Result<(), LoadError> {
    let attached = attach_missing(ebpf, links);
    if attached.is_err()
        && let Err(error) = detach(ebpf, links)
    {
        tracing::warn!(%error, "cannot detach a program");
    }
    attached
}

fn attach_missing(ebpf: &mut Ebpf, links: &mut Links) -> Result<(), LoadError> {
    for (name, link) in PROGRAMS.into_iter().zip(links) {
        if link.is_none() {
            let made = program(ebpf, name)?.attach(name);
            *link = Some(made.map_err(|error| LoadError::attach(name, error))?);
        }
    }
    Ok(())
}

/// Detaches what is attached, all of it even if something fails.
fn detach(ebpf: &mut Ebpf, links: &mut Links) -> Result<(), LoadError> {
    let mut result = Ok(());
    for (name, link) in PROGRAMS.into_iter().zip(links) {
        if let Some(link) = link.take() {
            let detached = program(ebpf, name).and_then(|program| Ok(program.detach(link)?));
            result = result.and(detached);
        }
    }
    result
}

impl Maps {
    /// Waits until all runs of the program that have begun have ended: the kernel does so when it
    /// changes an array of maps, since a run may still use what stood there.
    fn wait_for_runs(&mut self) -> io::Result<()> {
        let set = self.controls.set(SPARE_PORT, &self.spare, 0);
        set.map_err(to_io)
    }
}

/// An array of words that can be mapped; `flags`: what else it is to be.
fn words(len: u32, flags: u32, name: &str) -> Result<MapData, MapError> {
    let (kind, value) = (BPF_MAP_TYPE_ARRAY as u32, size_of::<u64>() as u32);
    create(kind, value, len, BPF_F_MMAPABLE | flags, name)
}

fn create(
    kind: u32,
    value: u32,
    entries: u32,
    flags: u32,
    name: &str,
) -> Result<MapData, MapError> {
    let key = if kind == BPF_MAP_TYPE_RINGBUF as u32 {
        0
    } else {
        4
    };
    MapData::create(
        aya_obj::Map::new_from_params(kind, key, value, entries, flags),
        name,
        None,
    )
}

impl Control for Local {
    fn create_port(&self, slots: u32) -> io::Result<PortFds> {
        let blocks = SlotBlock::count(slots.max(1));
        let slots_map = create(
            BPF_MAP_TYPE_ARRAY as u32,
            size_of::<SlotBlock>() as u32,
            blocks,
            BPF_F_MMAPABLE | BPF_F_INNER_MAP,
            "ioregion_slots",
        )
        .map_err(to_io)?;
        let controls = words(CONTROL_WORDS, BPF_F_INNER_MAP, "ioregion_ctl").map_err(to_io)?;
        let ringbuf = create(
            BPF_MAP_TYPE_RINGBUF as u32,
            0,
            RINGBUF_LEN,
            0,
            "ioregion_wake",
        )
        .map_err(to_io)?;
        bpf::map_freeze(slots_map.fd().as_fd())?;
        let fds = PortFds {
            port: 0,
            slots: slots_map.fd().as_fd().try_clone_to_owned()?,
            controls: controls.fd().as_fd().try_clone_to_owned()?,
            ringbuf: ringbuf.fd().as_fd().try_clone_to_owned()?,
        };
        let mut maps = self.maps();
        let port = maps.ports.take()?;
        let set = maps
            .slots
            .set(port, &slots_map, 0)
            .and_then(|()| maps.controls.set(port, &controls, 0))
            .and_then(|()| maps.wakers.set(port, &ringbuf, 0));
        if let Err(error) = set {
            maps.ports.give(port);
            return Err(to_io(error));
        }
        Ok(PortFds { port, ..fds })
    }

    fn insert(&self, entries: &[(MatchKey, MatchEntry)]) -> io::Result<()> {
        let mut maps = self.maps();
        for (at, (key, entry)) in entries.iter().enumerate() {
            if let Err(error) = maps.doorbells.insert(key, entry, BPF_NOEXIST.into()) {
                for (key, _) in &entries[..at] {
                    let _ = maps.doorbells.remove(key);
                    maps.buckets.remove(key);
                }
                return Err(to_io(error));
            }
            maps.buckets.add(key, entry);
        }
        Ok(())
    }

    fn retire(&self, keys: &[MatchKey], port: Option<u32>) -> io::Result<()> {
        // Under the lock: the kernel reuses an entry's memory for the next one at once, and a run
        // of the program may still be looking at it. Deleting from an array of maps waits for all
        // runs, as does changing one.
        let mut maps = self.maps();
        for key in keys {
            match maps.doorbells.remove(key) {
                Ok(()) => maps.buckets.remove(key),
                Err(error) => absent(error).map_err(to_io)?,
            }
        }
        match port {
            Some(port) => {
                for outer in &maps.outer {
                    bpf::map_delete(outer.as_fd(), port)?;
                }
                maps.ports.give(port);
            }
            None if keys.is_empty() => return Ok(()),
            None => maps.wait_for_runs()?,
        }
        maps.buckets.settle();
        Ok(())
    }

    fn set_zone(&self, granule: ZoneKey, port: Option<u32>) -> io::Result<()> {
        let mut maps = self.maps();
        match port {
            Some(port) => maps.zones.insert(granule, port, 0),
            None => maps.zones.remove(&granule).or_else(absent),
        }
        .map_err(to_io)
    }

    fn bind(&self, thread: u32, record: Option<u32>) -> io::Result<()> {
        let mut maps = self.maps();
        match record {
            Some(record) => {
                maps.vcpus.insert(thread, record, 0).map_err(to_io)?;
                maps.threads.set(thread, Some(record));
                Ok(())
            }
            None => {
                maps.threads.set(thread, None);
                maps.vcpus.remove(&thread).or_else(absent).map_err(to_io)
            }
        }
    }

    fn new_vm(&self) -> io::Result<u32> {
        let mut maps = self.maps();
        maps.next_vm = maps
            .next_vm
            .checked_add(1)
            .ok_or_else(|| io::Error::from(io::ErrorKind::StorageFull))?;
        Ok(maps.next_vm)
    }

    fn new_record(&self, vm: u32) -> io::Result<u32> {
        let mut maps = self.maps();
        let record = maps.free_records.take()?;
        let fresh = VcpuRecord {
            vm,
            ..VcpuRecord::default()
        };
        if let Err(error) = maps.records.set(record, fresh, 0) {
            maps.free_records.give(record);
            return Err(to_io(error));
        }
        Ok(record)
    }

    fn free_record(&self, record: u32) -> io::Result<()> {
        self.maps().free_records.give(record);
        Ok(())
    }

    fn create_registers(&self, len: u32) -> io::Result<OwnedFd> {
        let map = words(len, 0, "ioregion_regs").map_err(to_io)?;
        map.fd().as_fd().try_clone_to_owned()
    }

    fn records(&self) -> BorrowedFd<'_> {
        self.records.as_fd()
    }

    fn whoami(&self) -> BorrowedFd<'_> {
        self.whoami.as_fd()
    }

    fn hook(&self) -> BorrowedFd<'_> {
        self.hook.as_fd()
    }

    fn recursion_misses(&self) -> io::Result<u64> {
        let mut sum = 0;
        for program in &self.attached {
            let fd = program.as_fd().as_raw_fd();
            let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{fd}"))?;
            let misses = info
                .lines()
                .find_map(|line| line.strip_prefix("recursion_misses:"));
            sum += misses
                .and_then(|n| n.trim().parse::<u64>().ok())
                .unwrap_or(0);
        }
        Ok(sum)
    }

    fn hangup(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn set_attached(&self, attached: bool) -> Result<(), LoadError> {
        let mut held = self.ebpf.lock().unwrap_or_else(PoisonError::into_inner);
        let (ebpf, links) = &mut *held;
        if attached {
            attach(ebpf, links)
        } else {
            detach(ebpf, links)
        }
    }

    #[cfg(feature = "log")]
    fn flush_log(&self) {
        if let Some(logger) = &self.logger {
            logger
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .flush();
        }
    }
}

fn absent(error: MapError) -> Result<(), MapError> {
    match error {
        MapError::KeyNotFound => Ok(()),
        MapError::SyscallError(error) if error.io_error.kind() == io::ErrorKind::NotFound => Ok(()),
        error => Err(error),
    }
}

/// The errno of a failed map operation.
fn to_io(error: MapError) -> io::Error {
    let code = match &error {
        MapError::SyscallError(error) => error.io_error.raw_os_error(),
        MapError::CreateError { io_error, .. } => io_error.raw_os_error(),
        _ => None,
    };
    code.map_or_else(|| io::Error::other(error), io::Error::from_raw_os_error)
}

/// Hands out numbers below a limit.
struct Numbers {
    next: u32,
    limit: u32,
    free: Vec<u32>,
}

impl Numbers {
    fn new(limit: u32) -> Self {
        Self {
            next: 0,
            limit,
            free: Vec::new(),
        }
    }

    fn take(&mut self) -> io::Result<u32> {
        if let Some(number) = self.free.pop() {
            return Ok(number);
        }
        if self.next == self.limit {
            return Err(io::Error::from_raw_os_error(libc::ENOSPC));
        }
        self.next += 1;
        Ok(self.next - 1)
    }

    fn give(&mut self, number: u32) {
        self.free.push(number);
    }
}
