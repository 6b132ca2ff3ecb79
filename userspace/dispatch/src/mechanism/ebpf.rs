//! `ebpf`: the program stores a doorbell's value in a slot, and the device task is woken or sees
//! it by polling. Everything else is forwarded.
//!
//! Here is the form that needs nothing of the kernel but its tracepoints, where an in-kernel sink
//! swallows the write; the other one is in `hooked`.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};

use ioregion_abi::bpf::{MatchEntry, MatchKey, SlotBlock};
use kvm_ioctls::VmFd;

use super::forward::{WirePath, check_channel};
use super::ioeventfd::{EventfdSinks, eventfd, nudge, sink_error};
use super::{Assignment, Carried, Carrier, Mechanism, Placed};
use crate::channel::Channel;
use crate::device::BusAccess;
use crate::ebpf::{PortFds, TableEntry, VmProgram};
use crate::error::{RegionError, RegionErrorKind as Kind};
use crate::region::{Delivery, Doorbell, Region, Sink, Wake};
use crate::source::{DoorbellSource, Port, PortParts, SlotDoorbell};
use crate::sys::kvm;
use crate::vm::VmShared;
use crate::waiter::Waiter;

/// How the program of the mechanism [`Ebpf`] sees a region's accesses, and what becomes of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Via {
    /// It is attached to KVM's tracepoints, which any kernel has: it sees the writes of all VMs,
    /// and a [`Sink`](crate::Sink) has to swallow those to doorbells. The rest exits, and the vCPU
    /// thread forwards it.
    Tracepoints,
    /// KVM shows the region's accesses to it and does what it says (`KVM_SET_IOREGION_PROG` of a
    /// kernel with the ioregionfd series), so that other VMs pay nothing, no sink is needed, and
    /// [`Answered`](crate::Answered) registers are read without the device. The rest is sent
    /// to the device by KVM, as under [`Ioregionfd`](super::Ioregionfd), and so are doorbells
    /// delivered as [`Delivery::Fifo`](crate::Delivery::Fifo): posted if the region is
    /// [`posted_writes`](crate::Region::posted_writes) and has no doorbells of the other kind,
    /// which would overtake them.
    ///
    /// [`Sink::Ioeventfd`](crate::Sink::Ioeventfd) has KVM signal an eventfd for each
    /// doorbell, [`Sink::Coalesced`](crate::Sink::Coalesced) has the program wake the device
    /// task where [`Wake`](crate::Wake) says so. Both match any mask.
    Hook,
}

/// The mechanism `ebpf`. The VM must have been made with
/// [`Vm::with_program`](crate::Vm::with_program).
#[derive(Debug, Clone)]
pub struct Ebpf {
    channel: Arc<Channel>,
    via: Option<Via>,
}

impl Ebpf {
    /// Name of the mechanism.
    pub const NAME: &'static str = "ebpf";

    /// Reads, writes that wait, and doorbells delivered as
    /// [`Delivery::Fifo`](crate::Delivery::Fifo) go over `channel`.
    ///
    /// Uses [`Via::Hook`] where the kernel has it and KVM can use the channel and the region's
    /// register file, else [`Via::Tracepoints`]; [`Assigned`](crate::Assigned) says which, and why.
    #[must_use]
    pub fn new(channel: &Arc<Channel>) -> Self {
        Self {
            channel: Arc::clone(channel),
            via: None,
        }
    }

    /// Uses this, or refuses the region where it is not available.
    #[must_use]
    pub fn via(mut self, via: Via) -> Self {
        self.via = Some(via);
        self
    }

    /// What is used, and why.
    fn choose(&self, vm: &VmFd, region: &Region) -> (Via, String) {
        let missing = || super::hooked::missing(vm, &self.channel, region);
        match self.via {
            Some(via) => (via, "it was asked for".into()),
            None => match missing() {
                None => (
                    Via::Hook,
                    "KVM itself shows the accesses to the program".into(),
                ),
                Some(missing) => (
                    Via::Tracepoints,
                    format!("the program is attached to tracepoints, since {missing}"),
                ),
            },
        }
    }
}

impl Mechanism for Ebpf {
    fn name(&self) -> &'static str {
        Self::NAME
    }

    fn assign(&self, vm: &Arc<VmShared>, placed: &Arc<Placed>) -> Result<Assignment, RegionError> {
        let region = &placed.region;
        let Some(program) = vm.program() else {
            let what = "a VM with a program (Vm::with_program)";
            return Err(region.error(Kind::Missing {
                mechanism: Self::NAME,
                what,
            }));
        };
        let (via, reason) = self.choose(vm.vm(), region);
        let mut assignment = match via {
            Via::Hook => super::hooked::assign(vm, placed, program, &self.channel)?,
            Via::Tracepoints => self.assign_traced(vm, placed, program)?,
        };
        assignment.via = Some(via);
        assignment.reason = reason;
        Ok(assignment)
    }
}

impl Ebpf {
    fn assign_traced(
        &self,
        vm: &Arc<VmShared>,
        placed: &Arc<Placed>,
        program: &Arc<VmProgram>,
    ) -> Result<Assignment, RegionError> {
        let region = &placed.region;
        let fail = |kind| region.error(kind);
        check_sinks(region).map_err(fail)?;
        check_channel(&self.channel, region)?;
        let zones = zones(region);
        let plan = Plan {
            region,
            zones: &zones,
        };
        let mut parts = Parts::new(program);
        let source = match parts.build(vm, &plan) {
            Ok(source) => source,
            Err(kind) => {
                parts.take_down(vm.vm());
                return Err(fail(kind));
            }
        };
        if !zones.is_empty() {
            program.serve_backlog(&self.channel);
        }
        let posted = region.posted_writes && region.doorbells.is_empty();
        let carrier = WithProgram {
            wire: WirePath::new(vm, &self.channel, placed, posted),
            placed: Arc::clone(placed),
            parts: Mutex::new(parts),
        };
        let mut assignment = Assignment::new(Self::NAME, carrier);
        assignment.sources.extend(source);
        Ok(assignment)
    }
}

/// A range for a coalesced zone: first address and length in bytes.
type Zone = (u64, u32);

/// Zones over the doorbells that want one; neighbours share a zone, because KVM has room for
/// few of them.
fn zones(region: &Region) -> Vec<Zone> {
    let mut ranges: Vec<_> = region
        .doorbells
        .iter()
        .filter(|doorbell| doorbell.sink == Sink::Coalesced)
        .map(|doorbell| {
            (
                doorbell.offset,
                doorbell.offset + u64::from(doorbell.size.bytes()),
            )
        })
        .collect();
    ranges.sort_unstable();
    let mut zones: Vec<(u64, u64)> = Vec::new();
    for (start, end) in ranges {
        match zones.last_mut() {
            Some(last) if start <= last.1 && end - last.0 <= u64::from(u32::MAX) => {
                last.1 = last.1.max(end);
            }
            _ => zones.push((start, end)),
        }
    }
    let zone = |(start, end): (u64, u64)| (region.base + start, (end - start) as u32);
    zones.into_iter().map(zone).collect()
}

/// Which sink can carry what, and that no two meet: KVM's bus finds a consumer by binary search
/// over ranges that must not overlap.
fn check_sinks(region: &Region) -> Result<(), Kind> {
    let zones = zones(region);
    for doorbell in &region.doorbells {
        if doorbell.sink == Sink::Coalesced {
            continue;
        }
        let at = doorbell.offset;
        if !doorbell.is_full_match() {
            return Err(Kind::DoorbellSink(at, "KVM matches whole values only"));
        }
        if doorbell.delivery == Delivery::Fifo {
            return Err(Kind::DoorbellSink(at, "an ioeventfd keeps no queue"));
        }
        let start = region.base + at;
        let end = start + u64::from(doorbell.size.bytes());
        if zones
            .iter()
            .any(|&(zone, len)| start < zone + u64::from(len) && zone < end)
        {
            return Err(Kind::DoorbellSink(at, "another doorbell there uses it"));
        }
    }
    Ok(())
}

struct Plan<'a> {
    region: &'a Region,
    zones: &'a [Zone],
}

/// What stands in the kernel for one region.
#[derive(Debug)]
struct Parts {
    program: Arc<VmProgram>,
    port: Option<u32>,
    keys: Vec<MatchKey>,
    eventfds: EventfdSinks,
    announced: Vec<(ioregion_abi::Bus, Zone)>,
    zones: Vec<(ioregion_abi::Bus, Zone)>,
}

impl Parts {
    fn new(program: &Arc<VmProgram>) -> Self {
        Self {
            program: Arc::clone(program),
            port: None,
            keys: Vec::new(),
            eventfds: EventfdSinks::default(),
            announced: Vec::new(),
            zones: Vec::new(),
        }
    }

    /// Puts everything in place, the sinks last: what they swallow must be captured.
    fn build(&mut self, vm: &VmShared, plan: &Plan<'_>) -> Result<Option<DoorbellSource>, Kind> {
        let region = plan.region;
        if region.doorbells.is_empty() {
            return Ok(None);
        }
        let control = self.program.control();
        control.set_attached(true).map_err(Kind::Tracepoints)?;
        let fds = create_port(&self.program, region)?;
        let port = fds.port;
        self.port = Some(port);
        // What the program captures from now on must not be sent by KVM as well: a region that KVM
        // carried until now leaves it first, and its accesses exit and wait for this one.
        vm.native().evict(vm.vm(), region);
        let entries = entries(region, self.program.vm(), port, self.program.port());
        control
            .insert(&entries)
            .map_err(|error| bpf("filling the match table", error))?;
        self.keys = entries.iter().map(|(key, _)| *key).collect();
        for &zone in plan.zones {
            let added = self.program.add_zone(region.bus, zone.0, zone.1.into());
            added.map_err(|error| bpf("announcing a zone", error))?;
            self.announced.push((region.bus, zone));
        }
        // A vCPU may be between the program, which did not know the doorbells yet, and the bus: it
        // must not find a sink there.
        kvm::synchronize(vm.vm()).map_err(|error| sink_error("KVM_IOEVENTFD", error))?;
        for &zone in plan.zones {
            let added = kvm::coalesced_zone(vm.vm(), region.bus, zone.0, zone.1, false);
            added.map_err(|error| sink_error("KVM_REGISTER_COALESCED_MMIO", error))?;
            self.zones.push((region.bus, zone));
        }
        let shared = Arc::new(eventfd().map_err(Kind::BadDescriptor)?);
        for doorbell in &region.doorbells {
            if doorbell.sink == Sink::Ioeventfd {
                let added = self
                    .eventfds
                    .add(vm.vm(), region, doorbell, Arc::clone(&shared));
                added.map_err(|error| sink_error("KVM_IOEVENTFD", error))?;
            }
        }
        let eventfd = (!self.eventfds.is_empty()).then(|| shared.as_fd().try_clone_to_owned());
        let eventfd = eventfd.transpose().map_err(Kind::BadDescriptor)?;
        let source = port_source(region, fds, eventfd)?;
        Ok(Some(DoorbellSource::Port(source)))
    }

    /// Takes everything away, the sinks first: what is still captured then exits, and the exit
    /// finds it in the vCPU's record.
    fn take_down(&mut self, vm: &VmFd) -> bool {
        let any = self.port.is_some();
        let eventfd = self.eventfds.shared();
        self.eventfds.remove(vm);
        for (bus, (addr, len)) in self.zones.drain(..) {
            if let Err(error) = kvm::coalesced_zone(vm, bus, addr, len, true) {
                tracing::error!(addr, len, %error, "cannot remove a coalesced zone");
            }
        }
        for (bus, (addr, len)) in self.announced.drain(..) {
            self.program.remove_zone(bus, addr, len.into());
        }
        let keys = std::mem::take(&mut self.keys);
        let control = self.program.control();
        if let Err(error) = control.retire(&keys, self.port.take()) {
            tracing::warn!(%error, "cannot take a region out of the program");
        }
        // A vCPU may be between the program, which has captured, and the bus: it must not find what
        // KVM carries there next.
        if any && let Err(error) = kvm::synchronize(vm) {
            tracing::warn!(%error, "cannot wait for the vCPUs");
        }
        if let Some(eventfd) = eventfd {
            // What was captured since the sinks went has woken nobody.
            nudge(&eventfd);
        }
        any
    }
}

/// Makes the place where a region's doorbells arrive.
pub(super) fn create_port(program: &VmProgram, region: &Region) -> Result<PortFds, Kind> {
    let slots = u32::try_from(region.doorbells.len()).map_err(|_| Kind::TableFull("the port"))?;
    let created = program.control().create_port(slots);
    created.map_err(|error| bpf("creating a port", error))
}

/// The device task's view of it; `eventfd` is signalled by KVM.
pub(super) fn port_source(
    region: &Region,
    fds: PortFds,
    eventfd: Option<OwnedFd>,
) -> Result<Port, Kind> {
    let doorbells = (0..).zip(&region.doorbells);
    let doorbells = doorbells.map(|(index, doorbell)| SlotDoorbell {
        index,
        offset: doorbell.offset,
        size: doorbell.size,
    });
    let port = Port::new(PortParts {
        user_data: region.user_data,
        doorbells: doorbells.collect(),
        slots: fds.slots,
        controls: fds.controls,
        eventfd,
        ringbuf: Some(fds.ringbuf),
    });
    port.map_err(Kind::BadDescriptor)
}

pub(super) fn bpf(what: &'static str, error: io::Error) -> Kind {
    match error.raw_os_error() {
        Some(libc::E2BIG | libc::ENOSPC) => Kind::TableFull("a table of the eBPF program"),
        _ => Kind::Bpf { what, error },
    }
}

/// The match table's entries for a region.
pub(crate) fn entries(region: &Region, vm: u32, port: u32, drain_port: u32) -> Vec<TableEntry> {
    table(region, vm, |slot, doorbell| {
        Some(entry(doorbell, port, slot, drain_port))
    })
}

/// The match table's entries for the doorbells that have one, by their number in the region.
pub(super) fn table(
    region: &Region,
    vm: u32,
    entry: impl Fn(u32, &Doorbell) -> Option<MatchEntry>,
) -> Vec<TableEntry> {
    let mut entries = Vec::new();
    let mut selected = std::collections::HashSet::new();
    for (slot, doorbell) in (0..).zip(&region.doorbells) {
        let addr = region.base + doorbell.offset;
        let first = MatchKey::first(vm, region.bus, addr, doorbell.size.bytes());
        let Some(entry) = entry(slot, doorbell) else {
            continue;
        };
        match doorbell.datamatch {
            None => entries.push((first, entry)),
            Some(m) => {
                if selected.insert(first) {
                    let flags = MatchEntry::SELECT;
                    entries.push((
                        first,
                        MatchEntry {
                            mask: m.mask,
                            flags,
                            ..Default::default()
                        },
                    ));
                }
                entries.push((first.masked(m.value), entry));
            }
        }
    }
    entries
}

/// The entry of a doorbell whose value goes to a slot; `signal` is the flag that has its eventfd
/// signalled, where it has one.
pub(super) fn stored(doorbell: &Doorbell, port: u32, slot: u32, signal: u32) -> MatchEntry {
    let wake = match (doorbell.sink, doorbell.wake) {
        (Sink::Ioeventfd, _) => signal,
        (_, Wake::Never) => 0,
        (_, Wake::WhenArmed) => MatchEntry::WAKE_ARMED,
        (_, Wake::Always) => MatchEntry::WAKE_ALWAYS,
    };
    let (block, slot) = SlotBlock::place(slot);
    MatchEntry {
        port,
        block,
        slot,
        flags: MatchEntry::STORE | wake,
        ..Default::default()
    }
}

fn entry(doorbell: &Doorbell, port: u32, slot: u32, drain_port: u32) -> MatchEntry {
    match doorbell.delivery {
        // KVM signals the eventfd by itself.
        Delivery::Latest => stored(doorbell, port, slot, 0),
        // The ring is the queue: its drainer is told, not the device.
        Delivery::Fifo => MatchEntry {
            port: drain_port,
            flags: MatchEntry::WAKE_ARMED,
            ..Default::default()
        },
    }
}

#[derive(Debug)]
struct WithProgram {
    wire: WirePath,
    placed: Arc<Placed>,
    parts: Mutex<Parts>,
}

impl Carrier for WithProgram {
    fn carry(&self, access: &BusAccess, waiter: &mut Waiter) -> io::Result<Carried> {
        self.wire.carry(access, waiter)
    }

    fn captured(&self, access: &BusAccess) {
        let Some(data) = access.write else { return };
        let doorbell = self.placed.doorbell(access.addr, access.size, data);
        // The program itself has woken the task of a coalesced doorbell.
        if let Some((
            _,
            Doorbell {
                sink: Sink::Ioeventfd,
                ..
            },
        )) = doorbell
        {
            self.parts
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .eventfds
                .nudge();
        }
    }

    fn replay(&self, access: &BusAccess) -> bool {
        self.wire.replay(access)
    }

    fn retire(&self, abandon: bool) {
        self.wire.retire(abandon);
    }

    fn unsink(&self, vm: &VmFd) -> bool {
        self.parts
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take_down(vm)
    }
}
