//! The scenario table: what is measured, and how each row differs from its neighbours.
//!
//! Mechanism, transport, waiting policy, operation and placement vary independently, so that a
//! difference between two rows has one cause.

mod rows;

use std::time::Duration;

use ioregion_bench::results::{Boot, Mode};
use ioregion_dispatch::server::WaitPolicy;
use ioregion_dispatch::{Delivery, Patience, Sink, Transport, Wake};

pub use rows::ROWS;

/// The name of the program hook among the mechanisms.
pub const EBPF_HOOK: &str = "ebpf-hook";

/// How long a spinning side looks for work before it sleeps.
const SPIN: Duration = Duration::from_micros(200);

/// What carries the accesses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Carrier {
    /// The guest stores to its RAM: what measuring itself costs.
    RamStore,
    /// An in-kernel sink that nobody reads.
    SinkWithoutReader,
    /// Two host threads wake each other through eventfds.
    EventfdPingPong,
    /// Two host threads wake each other through a socket pair.
    SocketpairPingPong,
    /// The device runs on the vCPU thread.
    KvmRun,
    /// The vCPU thread forwards to the device task.
    Forward,
    /// KVM signals an eventfd.
    Ioeventfd,
    /// KVM stores the value, then signals an eventfd: the `POST_WRITE` that was proposed.
    PostWrite,
    /// The eBPF program captures the value.
    Ebpf,
    /// KVM sends the command.
    Ioregionfd,
}

impl Carrier {
    /// The name in results.
    pub fn name(self) -> &'static str {
        match self {
            Self::KvmRun => "kvm-run",
            Self::Forward => "forward",
            Self::Ioeventfd => "ioeventfd",
            Self::PostWrite => "ioeventfd-post-write",
            Self::Ebpf => "ebpf",
            Self::Ioregionfd => "ioregionfd",
            _ => "floor",
        }
    }

    /// Whether doorbells end in the kernel, so that nobody has to look for them at once.
    fn has_sink(self) -> bool {
        matches!(self, Self::Ioeventfd | Self::PostWrite | Self::Ebpf)
    }
}

/// What the eBPF program does with an access where KVM asks it (`KVM_SET_IOREGION_PROG`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hook {
    /// Keeps the value and has an eventfd signalled.
    Signal,
    /// Keeps the value.
    Consume,
    /// Answers a read from the register file.
    Answer,
}

impl Hook {
    /// The name in results.
    pub fn name(self) -> &'static str {
        match self {
            Self::Signal => "signal",
            Self::Consume => "consume",
            Self::Answer => "answer",
        }
    }
}

/// What the guest does in each iteration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// Rings a doorbell.
    Posted,
    /// Writes and waits for the response.
    Write,
    /// Reads.
    Read,
    /// Rings a doorbell, then reads a status register; one iteration counts as one access.
    Mixed,
    /// Writes to a port.
    PioOut,
    /// Reads from a port.
    PioIn,
    /// No guest: a message and its answer.
    RoundTrip,
}

impl Operation {
    /// The name in results.
    pub fn name(self) -> &'static str {
        match self {
            Self::Posted => "posted",
            Self::Write => "write",
            Self::Read => "read",
            Self::Mixed => "mixed",
            Self::PioOut => "pio-out",
            Self::PioIn => "pio-in",
            Self::RoundTrip => "round-trip",
        }
    }

    /// Whether the guest rings a doorbell.
    pub fn rings(self) -> bool {
        matches!(self, Self::Posted | Self::Mixed)
    }

    /// Whether the guest reads.
    pub fn reads(self) -> bool {
        matches!(self, Self::Read | Self::Mixed | Self::PioIn)
    }
}

/// How both sides wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wait {
    /// Sleep at once.
    Sleep,
    /// Look for work for a while, then sleep.
    Spin,
    /// The device task never sleeps.
    Poll,
}

impl Wait {
    /// The name in results.
    pub fn name(self) -> &'static str {
        match self {
            Self::Sleep => "sleep",
            Self::Spin => "spin",
            Self::Poll => "poll",
        }
    }

    /// The vCPU's side.
    pub fn patience(self) -> Patience {
        match self {
            Self::Spin => Patience::SpinThenSleep(SPIN),
            Self::Sleep | Self::Poll => Patience::Sleep,
        }
    }

    /// The device's side.
    pub fn policy(self) -> WaitPolicy {
        match self {
            Self::Sleep => WaitPolicy::Sleep,
            Self::Spin => WaitPolicy::SpinThenSleep(SPIN),
            Self::Poll => WaitPolicy::Poll,
        }
    }
}

/// Where the device runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Placement {
    /// On the vCPU's thread, or nowhere.
    Vcpu,
    /// On a thread of its own.
    Thread,
    /// In a process of its own.
    Process,
}

impl Placement {
    /// The name in results.
    pub fn name(self) -> &'static str {
        match self {
            Self::Vcpu => "vcpu",
            Self::Thread => "thread",
            Self::Process => "process",
        }
    }
}

/// Which vCPUs ring which doorbells, and who serves them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Queues {
    /// All vCPUs ring the same doorbells of one device task.
    Shared,
    /// Each vCPU has a region, a channel and a device task of its own.
    PerVcpu,
}

/// One row of the table.
#[derive(Debug, Clone, Copy)]
pub struct Row {
    /// Unique name: `mechanism/operation`, then `@doorbells` or `/variant`.
    pub name: &'static str,
    /// What carries the accesses.
    pub carrier: Carrier,
    /// In-kernel sink of `ebpf` doorbells.
    pub sink: Sink,
    /// What the program does instead, where KVM asks it; `None`: it watches tracepoints.
    pub hook: Option<Hook>,
    /// Delivery of doorbells.
    pub delivery: Delivery,
    /// Who wakes the device task.
    pub wake: Wake,
    /// Transport of what goes over the wire.
    pub transport: Transport,
    /// Whether the pipes are FIFOs, opened by name.
    pub fifos: bool,
    /// How both sides wait.
    pub wait: Wait,
    /// What the guest does.
    pub operation: Operation,
    /// Where the device runs.
    pub placement: Placement,
    /// vCPUs that access at the same time.
    pub vcpus: u32,
    /// Which of them ring what.
    pub queues: Queues,
    /// Doorbells registered.
    pub doorbells: u32,
    /// Regions assigned to the device task, which the guest writes to in turn; `None`: one, with
    /// everything in it.
    pub regions: Option<u32>,
    /// Whether the guest goes through doorbells or regions in turn, which takes it a few more
    /// instructions.
    pub in_turn: bool,
    /// Accesses that are made before anybody looks for them; such a row is only in counted time,
    /// where so few tell enough.
    pub burst: Option<u32>,
    /// VMs that run one after another, each a share of the accesses.
    pub vms: u32,
    /// Whether the eBPF program is attached, although the VM has nothing to do with it.
    pub attached: bool,
    /// Shortest kind of run that has it.
    pub tier: Mode,
}

impl Row {
    /// Whether no released kernel has what it needs.
    pub fn needs_patches(&self) -> bool {
        self.hook.is_some() || matches!(self.carrier, Carrier::Ioregionfd | Carrier::PostWrite)
    }

    /// Whether the eBPF program is loaded while the row is measured.
    pub fn needs_program(&self) -> bool {
        self.attached || self.carrier == Carrier::Ebpf
    }

    /// Whether it is attached to tracepoints then.
    pub fn attaches(&self) -> bool {
        self.attached || (self.carrier == Carrier::Ebpf && self.hook.is_none())
    }

    /// The mechanisms that the row cannot do without.
    pub fn mechanisms(&self) -> impl Iterator<Item = &'static str> {
        let program = self.needs_program().then_some("ebpf");
        let hook = self.hook.map(|_| EBPF_HOOK);
        [Some(self.carrier.name()), program, hook]
            .into_iter()
            .flatten()
    }

    /// Whether everything is taken down after each round: nobody may poll, nor fill the program's
    /// table, while other rows are measured.
    pub fn is_transient(&self) -> bool {
        self.wait == Wait::Poll
            || self.carrier == Carrier::SinkWithoutReader
            || (self.carrier == Carrier::Ebpf && self.doorbells > 1)
            || self.burst.is_some()
            || (self.carrier.has_sink() && self.placement == Placement::Vcpu)
    }

    /// Whether setting it up takes much longer than measuring it, each time.
    pub fn is_heavy(&self) -> bool {
        self.vms > 1 || (self.is_transient() && self.cycle() >= 1_000)
    }

    /// Whether the row is part of a run of `mode`, in a VM or (`None`) on a machine.
    pub fn is_in(&self, mode: Mode, boot: Option<Boot>) -> bool {
        let rank = |mode| match mode {
            Mode::Smoke => 0,
            Mode::Quick => 1,
            Mode::Full => 2,
        };
        let here = match boot {
            None => self.burst.is_none(),
            // Counted time has one CPU: nobody can work while another spins.
            Some(Boot::Counted) => self.vcpus == 1 && self.wait != Wait::Spin,
            Some(Boot::Parallel) => rows::PARALLEL.contains(&self.name),
        };
        here && rank(self.tier) <= rank(mode)
    }

    /// The transport's name in results.
    pub fn transport_name(&self) -> &'static str {
        if self.fifos {
            return "fifo";
        }
        self.transport.name()
    }

    /// Accesses after which each doorbell or region has been used.
    pub fn cycle(&self) -> u32 {
        self.regions.unwrap_or(self.doorbells)
    }

    const fn named(self, name: &'static str, operation: Operation) -> Self {
        Self {
            name,
            operation,
            ..self
        }
    }

    const fn posted(self, name: &'static str) -> Self {
        self.named(name, Operation::Posted)
    }

    const fn transport(self, transport: Transport) -> Self {
        Self { transport, ..self }
    }

    const fn wait(self, wait: Wait) -> Self {
        Self { wait, ..self }
    }

    const fn coalesced(self, delivery: Delivery, wake: Wake) -> Self {
        let sink = Sink::Coalesced;
        Self {
            sink,
            delivery,
            wake,
            ..self
        }
    }

    const fn doorbells(self, doorbells: u32) -> Self {
        Self {
            doorbells,
            in_turn: true,
            ..self
        }
    }

    const fn regions(self, regions: u32) -> Self {
        Self {
            regions: Some(regions),
            in_turn: true,
            ..self
        }
    }

    const fn two_vcpus(self, queues: Queues) -> Self {
        Self {
            vcpus: 2,
            queues,
            ..self
        }
    }

    const fn in_process(self) -> Self {
        let placement = Placement::Process;
        Self { placement, ..self }
    }

    const fn attached(self) -> Self {
        Self {
            attached: true,
            ..self
        }
    }

    const fn vms(self, vms: u32) -> Self {
        Self { vms, ..self }
    }

    const fn tier(self, tier: Mode) -> Self {
        Self { tier, ..self }
    }
}

#[cfg(test)]
mod tests;
