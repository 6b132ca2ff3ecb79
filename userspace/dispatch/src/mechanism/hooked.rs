//! `ebpf` where KVM itself shows a region's accesses to the program (`KVM_SET_IOREGION_PROG`).
//!
//! KVM has the region, as under `ioregionfd`, and sends to the device what the program passes. So
//! nothing can be lost on the way in or out: until the program is attached, and once it is
//! detached, doorbells and reads travel as commands.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex, PoisonError};

use ioregion_abi::bpf::{MatchEntry, MatchKey};
use kvm_ioctls::VmFd;

use super::ebpf::{Ebpf, bpf, create_port, port_source, stored, table};
use super::ioeventfd::eventfd;
use super::ioregionfd::{self, InKernel};
use super::{Assignment, Carried, Carrier, Placed};
use crate::channel::Channel;
use crate::device::BusAccess;
use crate::ebpf::{TableEntry, VmProgram};
use crate::error::{RegionError, RegionErrorKind as Kind};
use crate::region::{Answered, Delivery, Region, Sink};
use crate::registers::RegisterFile;
use crate::source::{DoorbellSource, Port};
use crate::sys::kvm;
use crate::vm::VmShared;
use crate::waiter::Waiter;

/// Why KVM cannot show accesses to a program here; `None` if it can.
fn missing_in_kernel(vm: &VmFd) -> Option<String> {
    ioregionfd::missing(vm).or_else(|| match kvm::has_ioregion_prog(vm) {
        Ok(true) => None,
        Ok(false) => Some("this kernel's KVM was built without BPF (CONFIG_BPF_EVENTS)".into()),
        Err(error) => Some(format!("KVM_SET_IOREGION_PROG cannot be probed: {error}")),
    })
}

/// Why this form cannot be used for a region on this channel; `None` if it can.
pub(super) fn missing(vm: &VmFd, channel: &Channel, region: &Region) -> Option<String> {
    let unreadable = || registers(region).err().map(|kind| kind.to_string());
    missing_in_kernel(vm)
        .or_else(|| channel.unfit_for_kernel().map(str::to_owned))
        .or_else(unreadable)
}

/// Assigns a region in this form.
pub(super) fn assign(
    vm: &Arc<VmShared>,
    placed: &Arc<Placed>,
    program: &Arc<VmProgram>,
    channel: &Channel,
) -> Result<Assignment, RegionError> {
    let region = &placed.region;
    if let Some(reason) = missing_in_kernel(vm.vm()) {
        return Err(region.error(Kind::Unavailable {
            mechanism: Ebpf::NAME,
            reason,
        }));
    }
    let registers = registers(region).map_err(|kind| region.error(kind))?;
    // What is captured would overtake a posted write that is still on its way.
    let posted = region.posted_writes && !captures(region);
    let mut parts = Parts::new(program);
    let built = parts.build(region).map_err(|kind| region.error(kind));
    // The channel last: once KVM has had it, a command may have been sent.
    let given = built.and_then(|source| {
        let kvm = InKernel::new(vm, placed, channel, posted)?;
        Ok((source, kvm))
    });
    let attached = given.and_then(|(source, kvm)| {
        let done = parts.attach(vm.vm(), region, registers, source.as_ref());
        done.inspect_err(|_| kvm.retire(true))
            .map_err(|kind| region.error(kind))?;
        Ok((source, kvm))
    });
    match attached {
        Ok((source, kvm)) => {
            let carrier = Hooked {
                kvm,
                placed: Arc::clone(placed),
                parts: Mutex::new(parts),
            };
            let mut assignment = Assignment::new(Ebpf::NAME, carrier);
            assignment.sources.extend(source.map(DoorbellSource::Port));
            Ok(assignment)
        }
        Err(error) => {
            parts.take_down(vm.vm(), region);
            Err(error)
        }
    }
}

/// The map that KVM answers reads from, if any are to be answered.
fn registers(region: &Region) -> Result<Option<BorrowedFd<'_>>, Kind> {
    if region.answered.is_empty() {
        return Ok(None);
    }
    let file = region.registers.as_ref();
    match file.and_then(RegisterFile::map) {
        Some(map) => Ok(Some(map)),
        None => Err(Kind::RegisterFileKind),
    }
}

/// Whether the program keeps any of the region's writes from the wire.
fn captures(region: &Region) -> bool {
    let mut doorbells = region.doorbells.iter();
    doorbells.any(|doorbell| doorbell.delivery == Delivery::Latest)
}

/// The match table's entries for a region.
pub(crate) fn entries(region: &Region, vm: u32, port: u32) -> Vec<TableEntry> {
    let doorbells = table(region, vm, |slot, doorbell| {
        if doorbell.delivery != Delivery::Latest {
            // The wire is the queue.
            return None;
        }
        Some(stored(doorbell, port, slot, MatchEntry::SIGNAL))
    });
    let doorbells = doorbells
        .into_iter()
        .map(|(key, entry)| (key.hooked(true), entry));
    let answered = region.answered.iter().map(|answered| {
        let Answered {
            offset,
            size,
            index,
        } = *answered;
        let key = MatchKey::first(vm, region.bus, region.base + offset, size.bytes());
        let entry = MatchEntry {
            slot: index,
            flags: MatchEntry::ANSWER,
            ..Default::default()
        };
        (key.hooked(false), entry)
    });
    doorbells.chain(answered).collect()
}

/// What stands in the kernel for one region, besides the region.
#[derive(Debug)]
struct Parts {
    program: Arc<VmProgram>,
    port: Option<u32>,
    keys: Vec<MatchKey>,
    attached: bool,
}

impl Parts {
    fn new(program: &Arc<VmProgram>) -> Self {
        Self {
            program: Arc::clone(program),
            port: None,
            keys: Vec::new(),
            attached: false,
        }
    }

    /// Makes what the program needs: what it captures must have a reader.
    fn build(&mut self, region: &Region) -> Result<Option<Port>, Kind> {
        let source = self.make_port(region)?;
        let entries = entries(region, self.program.vm(), self.port.unwrap_or_default());
        if entries.is_empty() {
            return Ok(source);
        }
        let control = self.program.control();
        control
            .insert(&entries)
            .map_err(|error| bpf("filling the match table", error))?;
        self.keys = entries.iter().map(|(key, _)| *key).collect();
        Ok(source)
    }

    /// Has KVM show the accesses to the region, which it has, to the program.
    fn attach(
        &mut self,
        vm: &VmFd,
        region: &Region,
        registers: Option<BorrowedFd<'_>>,
        source: Option<&Port>,
    ) -> Result<(), Kind> {
        if self.keys.is_empty() {
            // The program would have nothing to do.
            return Ok(());
        }
        let eventfd = source.and_then(|port| port.parts.eventfd.as_ref());
        let prog = kvm::IoregionProg {
            program: self.program.control().hook(),
            registers,
            eventfd: eventfd.map(AsFd::as_fd),
        };
        set_prog(vm, region, Some(prog)).map_err(|error| Kind::Kvm {
            what: "KVM_SET_IOREGION_PROG",
            error,
        })?;
        self.attached = true;
        Ok(())
    }

    /// Makes the place where the captured doorbells arrive, if there are any.
    fn make_port(&mut self, region: &Region) -> Result<Option<Port>, Kind> {
        if !captures(region) {
            return Ok(None);
        }
        let fds = create_port(&self.program, region)?;
        self.port = Some(fds.port);
        let is_signalled = region.doorbells.iter().any(|doorbell| {
            doorbell.delivery == Delivery::Latest && doorbell.sink == Sink::Ioeventfd
        });
        let eventfd = is_signalled.then(eventfd).transpose();
        let eventfd = eventfd.map_err(Kind::BadDescriptor)?;
        port_source(region, fds, eventfd).map(Some)
    }

    /// Takes everything away, the program first: KVM sends what comes after that over the wire,
    /// and what came before is in its slot and signalled.
    fn take_down(&mut self, vm: &VmFd, region: &Region) -> bool {
        let any = std::mem::take(&mut self.attached);
        if any && let Err(error) = set_prog(vm, region, None) {
            tracing::error!(base = region.base, %error, "cannot detach a region's program");
        }
        let keys = std::mem::take(&mut self.keys);
        let port = self.port.take();
        if keys.is_empty() && port.is_none() {
            return any;
        }
        if let Err(error) = self.program.control().retire(&keys, port) {
            tracing::warn!(%error, "cannot take a region out of the program");
        }
        any
    }
}

fn set_prog(vm: &VmFd, region: &Region, prog: Option<kvm::IoregionProg<'_>>) -> io::Result<()> {
    kvm::set_ioregion_prog(vm, region.bus, region.base, region.size, prog)
}

#[derive(Debug)]
struct Hooked {
    kvm: InKernel,
    placed: Arc<Placed>,
    parts: Mutex<Parts>,
}

impl Carrier for Hooked {
    fn carry(&self, access: &BusAccess, waiter: &mut Waiter) -> io::Result<Carried> {
        self.kvm.carry(access, waiter)
    }

    fn replay(&self, access: &BusAccess) -> bool {
        self.kvm.replay(access)
    }

    fn retire(&self, abandon: bool) {
        self.kvm.retire(abandon);
    }

    fn replaced(&self) {
        self.kvm.replaced();
    }

    fn unsink(&self, vm: &VmFd) -> bool {
        let mut parts = self.parts.lock().unwrap_or_else(PoisonError::into_inner);
        parts.take_down(vm, &self.placed.region)
    }
}
