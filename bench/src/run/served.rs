//! A device with its regions, channel and task.

use std::sync::{Arc, Mutex};

use anyhow::{Result, bail};
use ioregion_abi::wire::Layout;
use ioregion_bench::results::Pinning;
use ioregion_dispatch::mechanism::{Ebpf, Forward, Ioeventfd, Ioregionfd, KvmRun};
use ioregion_dispatch::server::DeviceEnd;
use ioregion_dispatch::{
    Answered, Channel, Delivery, Device, Doorbell, Mechanism, Region, RegisterFile, Size,
    Transport, Via, Vm, wire,
};
use kvm_ioctls::VmFd;

use super::meter::{Check, Meter};
use super::task::Task;
use super::{fifo, post_write::PostWrite};
use crate::payload::{self, PORT, PORTS, REGION_BYTES, SMALL_REGION_BYTES, STATUS, STRIDE};
use crate::scenarios::{Carrier, Hook, Operation, Placement, Row, Wait};

/// One device and what it was sent.
pub struct Served {
    /// Its task, if it has one.
    pub task: Option<Task>,
    /// Where the device is in this process.
    pub meter: Option<Meter>,
    /// Doorbells that nobody takes care of until the end, and their device.
    pub unread: Option<(DeviceEnd, Box<dyn Device>)>,
    /// What it serves.
    pub regions: Vec<Region>,
    /// Where reads are answered from without the device.
    pub registers: Option<RegisterFile>,
    /// A doorbell that is not the library's.
    pub post_write: Option<PostWrite>,
    /// The VMM's end of a wire that no region uses.
    _idle: Option<Box<dyn wire::Wire>>,
    /// Last value to each doorbell, by vCPU.
    pub finals: Vec<[u32; 2]>,
}

/// Which values of the row can be checked.
pub fn check_of(row: &Row) -> Check {
    match (row.carrier, row.delivery) {
        (Carrier::Ioeventfd | Carrier::SinkWithoutReader, _) => Check::Count,
        (Carrier::Ebpf | Carrier::PostWrite, Delivery::Latest) => Check::Latest,
        _ => Check::Sequence,
    }
}

/// The regions of a vCPU's device.
fn regions(row: &Row, vcpu: u32) -> Vec<Region> {
    if matches!(row.operation, Operation::PioIn | Operation::PioOut) {
        return vec![Region::pio(PORT, PORTS)];
    }
    let (count, bytes) = match row.regions {
        Some(count) => (count, SMALL_REGION_BYTES.into()),
        None => (1, REGION_BYTES),
    };
    let region = |index: u32| {
        let base = payload::base(row, vcpu) + u64::from(index) * bytes;
        let mut region = Region::mmio(base, bytes).user_data((vcpu + index).into());
        if row.operation.rings() {
            let doorbell = |i: u32| {
                Doorbell::new(u64::from(i * STRIDE), Size::B4)
                    .delivery(row.delivery)
                    .sink(row.sink)
                    .wake(row.wake)
            };
            region.doorbells = (0..row.doorbells).map(doorbell).collect();
            // KVM does not know doorbells: for it a region posts all writes or none.
            region.posted_writes = row.carrier == Carrier::Ioregionfd;
        }
        region
    };
    (0..count).map(region).collect()
}

/// Both ends of a transport between VMM and device.
fn wire_pair(row: &Row) -> Result<(Box<dyn wire::Wire>, Box<dyn wire::Wire>)> {
    if row.fifos {
        return fifo::pair();
    }
    Ok(wire::pair(row.transport)?)
}

/// Where devices are to be served.
pub struct Site<'a> {
    /// The row.
    pub row: &'a Row,
    /// The VM, for mechanisms.
    pub vm: &'a Vm,
    /// The VM as KVM knows it.
    pub fd: &'a Arc<VmFd>,
    /// Which CPUs.
    pub pinning: &'a Pinning,
}

impl Site<'_> {
    /// Sets up a device.
    pub fn serve(&self, device: u32) -> Result<Served> {
        let row = self.row;
        let meter = Meter::new(check_of(row), row.operation, row.doorbells);
        let mut served = Served {
            task: None,
            meter: None,
            unread: None,
            regions: regions(row, device),
            registers: None,
            post_write: None,
            _idle: None,
            finals: vec![[0; 2]; row.doorbells as usize],
        };
        if row.carrier == Carrier::KvmRun {
            let mechanism = KvmRun::new(Arc::new(Mutex::new(meter.clone())));
            for region in &served.regions {
                let _ = self.vm.assign(region, &mechanism)?;
            }
            served.meter = Some(meter);
            return Ok(served);
        }
        if row.carrier == Carrier::PostWrite {
            let (ours, theirs) = wire_pair(row)?;
            let doorbell = PostWrite::new(self.fd, payload::base(row, device))?;
            let (source, counted) = doorbell.device(meter.clone())?;
            let end = DeviceEnd::new(theirs, Layout::default()).source(source);
            served.regions.clear();
            served.post_write = Some(doorbell);
            served._idle = Some(ours);
            return self.place(served, end, Box::new(counted), meter);
        }
        let (channel, theirs) = if row.transport == Transport::Ioregionfd {
            Channel::purpose_made(self.fd)?
        } else {
            let (ours, theirs) = wire_pair(row)?;
            let channel = Channel::new(ours, Layout::default(), row.wait.patience());
            (Arc::new(channel), theirs)
        };
        let mechanism: Box<dyn Mechanism> = match row.carrier {
            Carrier::Forward => Box::new(Forward::new(&channel)),
            Carrier::Ebpf => {
                let via = row.hook.map_or(Via::Tracepoints, |_| Via::Hook);
                Box::new(Ebpf::new(&channel).via(via))
            }
            Carrier::Ioregionfd => Box::new(Ioregionfd::new(&channel)),
            _ => Box::new(Ioeventfd::new(&channel)),
        };
        if row.hook == Some(Hook::Answer) {
            let registers = self.vm.registers(1)?;
            let answered = Answered::new(STATUS, Size::B4, 0);
            let plain = std::mem::take(&mut served.regions).into_iter();
            let with = plain.map(|region| region.registers(&registers).answered(answered));
            served.regions = with.collect();
            served.registers = Some(registers);
        }
        let mut assigned = Vec::new();
        for region in &served.regions {
            let made = self.vm.assign(region, &*mechanism)?;
            if made.mechanism != mechanism.name() {
                bail!("carried by {} ({})", made.mechanism, made.reason);
            }
            assigned.push(made);
        }
        let end = DeviceEnd::new(theirs, Layout::default());
        let end = assigned
            .into_iter()
            .fold(end, |end, assigned| assigned.attach(end));
        self.place(served, end, Box::new(meter.clone()), meter)
    }

    /// Puts the device where it belongs.
    fn place(
        &self,
        mut served: Served,
        end: DeviceEnd,
        device: Box<dyn Device>,
        meter: Meter,
    ) -> Result<Served> {
        let row = self.row;
        let cpu = self.pinning.device;
        match row.placement {
            Placement::Process => {
                let task = Task::process(end, check_of(row), row.operation, row.doorbells, cpu)?;
                served.task = Some(task);
                return Ok(served);
            }
            Placement::Thread => {
                // A task that polls a CPU which it shares with the vCPU would only be in its way.
                let shared = cpu.is_some() && self.pinning.vcpus.first() == cpu.as_ref();
                let in_gaps = shared && row.wait == Wait::Poll;
                let task = Task::thread(end, device, meter.clone(), row.wait, cpu, in_gaps)?;
                served.task = Some(task);
            }
            Placement::Vcpu => served.unread = Some((end, device)),
        }
        served.meter = Some(meter);
        Ok(served)
    }
}
