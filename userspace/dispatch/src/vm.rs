//! The regions of one virtual machine.

use std::collections::BTreeMap;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use ioregion_abi::bpf::MAX_REGISTERS;
use ioregion_abi::{Bus, Size};
use kvm_ioctls::VmFd;

use crate::ebpf::{Program, ProgramCounters, VmProgram};
use crate::error::{RegionError, RegionErrorKind};
use crate::mechanism::{Carrier, Mechanism, Native, Placed, RegionId, Via};
use crate::region::{Doorbell, Region};
use crate::registers::RegisterFile;
use crate::server::DeviceEnd;
use crate::source::DoorbellSource;

/// Something that the VMM should know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// The device task of a region is gone or broke the protocol. Its reads return all-ones and
    /// its writes are dropped and counted, until it is assigned anew with [`Vm::modify`].
    Broken {
        /// The region.
        region: RegionId,
        /// What happened, in words.
        cause: String,
    },
    /// The eBPF loader went away. The region's doorbells have been taken out of the kernel and
    /// travel over its channel from now on.
    ProgramGone {
        /// The region.
        region: RegionId,
    },
}

/// The regions of one virtual machine, and what carries each of them.
///
/// Cheap to clone: clones are the same VM.
#[derive(Debug, Clone)]
pub struct Vm {
    shared: Arc<VmShared>,
}

/// The part that mechanisms see.
#[derive(Debug)]
pub struct VmShared {
    vm: Arc<VmFd>,
    tables: RwLock<[BTreeMap<u64, Arc<Entry>>; 2]>,
    next_id: AtomicU64,
    events: EventSender,
    received: Mutex<Receiver<Event>>,
    program: Option<Arc<VmProgram>>,
    native: Native,
}

#[derive(Debug)]
pub(crate) struct Entry {
    pub(crate) placed: Arc<Placed>,
    pub(crate) carrier: Box<dyn Carrier>,
}

#[derive(Debug, Clone)]
pub(crate) struct EventSender(Sender<Event>);

impl EventSender {
    pub(crate) fn broken(&self, region: RegionId, cause: &str) {
        // Fails only when the VM is gone, and with it whoever would listen.
        let _ = self.0.send(Event::Broken {
            region,
            cause: cause.to_owned(),
        });
    }

    pub(crate) fn program_gone(&self, region: RegionId) {
        let _ = self.0.send(Event::ProgramGone { region });
    }
}

/// An assigned region, as its maker sees it.
#[derive(Debug)]
#[must_use = "the device task needs the doorbell sources: call `attach`"]
pub struct Assigned {
    /// Names the region in events and for [`Vm::remove`].
    pub id: RegionId,
    /// The mechanism that carries its doorbells.
    pub mechanism: &'static str,
    /// How the program of the mechanism [`Ebpf`](crate::mechanism::Ebpf) sees the accesses;
    /// `None` under other mechanisms.
    pub via: Option<Via>,
    /// Why it was chosen; empty where there was no choice.
    pub reason: String,
    user_data: u64,
    doorbells: Vec<Doorbell>,
    registers: Option<RegisterFile>,
    sources: Vec<DoorbellSource>,
}

impl Assigned {
    /// Gives the device task what it needs to know about the region: its doorbells, where
    /// those arrive that do not come over the wire, and its register file.
    #[must_use]
    pub fn attach(self, end: DeviceEnd) -> DeviceEnd {
        let mut end = end.region(self.user_data, self.doorbells);
        if let Some(registers) = self.registers {
            end = end.with_registers(self.user_data, registers);
        }
        self.sources.into_iter().fold(end, DeviceEnd::source)
    }
}

impl Vm {
    /// Dispatches for `vm`. At most one `Vm` should exist for one KVM virtual machine: two
    /// would not see each other's regions.
    #[must_use]
    pub fn new(vm: Arc<VmFd>) -> Self {
        Self {
            shared: Arc::new(VmShared::new(vm, None)),
        }
    }

    /// The same with an eBPF program, for the mechanism [`Ebpf`](crate::mechanism::Ebpf).
    ///
    /// The program must be there before the first vCPU runs, since it knows vCPUs by the
    /// threads that run them.
    ///
    /// # Errors
    ///
    /// The loader's, or the operating system's if the draining thread cannot be started.
    pub fn with_program(vm: Arc<VmFd>, program: &Arc<Program>) -> io::Result<Self> {
        let program = Arc::new(VmProgram::new(program)?);
        let shared = Arc::new(VmShared::new(vm, Some(Arc::clone(&program))));
        program.start(&shared)?;
        Ok(Self { shared })
    }

    /// What the eBPF program has counted for this VM's vCPUs; `None` without a program.
    #[must_use]
    pub fn program_counters(&self) -> Option<ProgramCounters> {
        self.shared
            .program
            .as_ref()
            .map(|program| program.counters())
    }

    /// Makes a register file for regions of this VM: of a kind that KVM can answer reads from, if
    /// the VM has a program.
    ///
    /// # Errors
    ///
    /// `InvalidInput` unless `len`, the number of registers, is 1 to
    /// [`MAX_REGISTERS`](ioregion_abi::bpf::MAX_REGISTERS). The system's, or the loader's, which
    /// bounds what one VMM can have.
    pub fn registers(&self, len: u32) -> io::Result<RegisterFile> {
        match &self.shared.program {
            Some(program) if (1..=MAX_REGISTERS).contains(&len) => {
                RegisterFile::of_map(program.control().create_registers(len)?, len)
            }
            _ => RegisterFile::new(len),
        }
    }

    pub(crate) fn shared(&self) -> &Arc<VmShared> {
        &self.shared
    }

    /// Takes the oldest event that nobody has taken.
    #[must_use]
    pub fn next_event(&self) -> Option<Event> {
        let received = self
            .shared
            .received
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        received.try_recv().ok()
    }

    /// Assigns a region to a mechanism.
    ///
    /// # Errors
    ///
    /// [`RegionError`], with the errno of `KVM_SET_IOREGION`: `EINVAL` for a bad region or one
    /// that lies within another, `EEXIST` for an overlap, `EBADF` for a broken channel. Nothing
    /// is left half-assigned; only where KVM has taken a region and then refuses the program for it
    /// ([`Via::Hook`]) is the channel good for nobody but KVM from then on, since a command may have
    /// been sent.
    pub fn assign(
        &self,
        region: &Region,
        mechanism: &dyn Mechanism,
    ) -> Result<Assigned, RegionError> {
        region.check()?;
        let mut tables = self.shared.tables_mut();
        let table = &mut tables[region.bus as usize];
        check_room(table, region)?;
        let (entry, assigned) = self.place(region, mechanism)?;
        table.insert(region.base, entry);
        Ok(assigned)
    }

    /// Replaces the mechanism (channel, device, flags, doorbells) of the region that has the
    /// same bus, address and size. Accesses wait meanwhile; none is lost, except that between
    /// [`Ioregionfd`](crate::mechanism::Ioregionfd) (or [`Via::Hook`]) and the mechanisms outside
    /// of KVM the access under way returns all-ones or comes back as unclaimed.
    ///
    /// # Errors
    ///
    /// `ENOENT` if there is no such region; else as for [`assign`](Self::assign). If the new
    /// mechanism cannot be assigned, the region is gone: its accesses come back as
    /// [`Exit::Unclaimed`](crate::Exit::Unclaimed).
    pub fn modify(
        &self,
        region: &Region,
        mechanism: &dyn Mechanism,
    ) -> Result<Assigned, RegionError> {
        region.check()?;
        let mut tables = self.shared.tables_mut();
        // KVM refuses a second ioeventfd with the same match, so the old one goes first.
        let old = self.shared.take_out(&mut tables, region, false)?;
        let placed = self.place(region, mechanism);
        old.carrier.replaced();
        let (entry, assigned) = placed?;
        tables[region.bus as usize].insert(region.base, entry);
        Ok(assigned)
    }

    /// Removes the region with this bus, address and size. Accesses that its device has not
    /// answered return all-ones.
    ///
    /// # Errors
    ///
    /// `ENOENT` if there is no such region.
    pub fn remove(&self, region: &Region) -> Result<(), RegionError> {
        let mut tables = self.shared.tables_mut();
        self.shared.take_out(&mut tables, region, true).map(drop)
    }

    fn place(
        &self,
        region: &Region,
        mechanism: &dyn Mechanism,
    ) -> Result<(Arc<Entry>, Assigned), RegionError> {
        let id = RegionId(self.shared.next_id.fetch_add(1, Ordering::Relaxed));
        let placed = Arc::new(Placed::new(id, region.clone()));
        let assignment = mechanism.assign(&self.shared, &placed)?;
        let assigned = Assigned {
            id,
            mechanism: assignment.mechanism,
            via: assignment.via,
            reason: assignment.reason,
            user_data: region.user_data,
            doorbells: region.doorbells.clone(),
            registers: region.registers.clone(),
            sources: assignment.sources,
        };
        Ok((
            Arc::new(Entry {
                placed,
                carrier: assignment.carrier,
            }),
            assigned,
        ))
    }
}

impl Drop for VmShared {
    fn drop(&mut self) {
        let tables = std::mem::take(
            self.tables
                .get_mut()
                .unwrap_or_else(PoisonError::into_inner),
        );
        for entry in tables.iter().flat_map(BTreeMap::values) {
            entry.carrier.unsink(&self.vm);
            entry.carrier.retire(true);
        }
        if let Some(program) = &self.program {
            program.stop();
        }
    }
}

pub(crate) type Tables = [BTreeMap<u64, Arc<Entry>>; 2];

impl VmShared {
    fn new(vm: Arc<VmFd>, program: Option<Arc<VmProgram>>) -> Self {
        let (sender, receiver) = channel();
        Self {
            vm,
            tables: RwLock::default(),
            next_id: AtomicU64::new(1),
            events: EventSender(sender),
            received: Mutex::new(receiver),
            program,
            native: Native::default(),
        }
    }

    pub(crate) fn vm(&self) -> &Arc<VmFd> {
        &self.vm
    }

    pub(crate) fn events(&self) -> EventSender {
        self.events.clone()
    }

    pub(crate) fn program(&self) -> Option<&Arc<VmProgram>> {
        self.program.as_ref()
    }

    /// The regions that KVM carries itself.
    pub(crate) fn native(&self) -> &Native {
        &self.native
    }

    pub(crate) fn tables(&self) -> RwLockReadGuard<'_, Tables> {
        self.tables.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn tables_mut(&self) -> RwLockWriteGuard<'_, Tables> {
        self.tables.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a region out of the kernel, then out of the tables, and retires it.
    fn take_out(
        &self,
        tables: &mut Tables,
        region: &Region,
        abandon: bool,
    ) -> Result<Arc<Entry>, RegionError> {
        let old = find_exact(&tables[region.bus as usize], region)?;
        self.unsink(&old);
        // What the ring still holds was written to the old region, which must be there for it.
        self.drain_ring(tables);
        tables[region.bus as usize].remove(&region.base);
        old.carrier.retire(abandon);
        Ok(old)
    }

    /// The region that holds the whole access.
    pub(crate) fn find(tables: &Tables, bus: Bus, addr: u64, size: Size) -> Option<&Arc<Entry>> {
        let (_, entry) = tables[bus as usize].range(..=addr).next_back()?;
        entry.placed.region.contains(addr, size).then_some(entry)
    }

    /// Empties the coalesced ring, if there is one, into the channels.
    pub(crate) fn drain_ring(&self, tables: &Tables) {
        if let Some(program) = &self.program {
            program.drain(tables);
        }
    }

    fn unsink(&self, entry: &Entry) -> bool {
        entry.carrier.unsink(&self.vm)
    }

    /// Takes all doorbells out of the kernel, because the program no longer sees them.
    pub(crate) fn unsink_all(&self) {
        let tables = self.tables();
        for entry in tables.iter().flat_map(BTreeMap::values) {
            if self.unsink(entry) {
                self.events.program_gone(entry.placed.id);
            }
        }
        self.drain_ring(&tables);
    }
}

fn check_room(table: &BTreeMap<u64, Arc<Entry>>, region: &Region) -> Result<(), RegionError> {
    let before = table.range(..=region.last()).next_back();
    let Some(other) = before.map(|(_, entry)| &entry.placed.region) else {
        return Ok(());
    };
    if other.last() < region.base {
        return Ok(());
    }
    let (base, size) = (other.base, other.size);
    let splits = other.base <= region.base
        && region.last() <= other.last()
        && (other.base, other.size) != (region.base, region.size);
    Err(region.error(if splits {
        RegionErrorKind::Split { base, size }
    } else {
        RegionErrorKind::Overlap { base, size }
    }))
}

fn find_exact(
    table: &BTreeMap<u64, Arc<Entry>>,
    region: &Region,
) -> Result<Arc<Entry>, RegionError> {
    table
        .get(&region.base)
        .filter(|entry| entry.placed.region.size == region.size)
        .cloned()
        .ok_or_else(|| region.error(RegionErrorKind::Unknown))
}
