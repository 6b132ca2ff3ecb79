//! The scenario table: what is measured, and how each row differs from its neighbours.
//!
//! Mechanism, transport, waiting policy, operation and placement vary independently, so that a
//! difference between two rows has one cause.

use std::time::Duration;

use ioregion_bench::results::Mode;
use ioregion_dispatch::server::WaitPolicy;
use ioregion_dispatch::{Delivery, Patience, Sink, Transport, Wake};

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
            Self::Ebpf => "ebpf",
            Self::Ioregionfd => "ioregionfd",
            _ => "floor",
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
    /// Delivery of doorbells.
    pub delivery: Delivery,
    /// Who wakes the device task.
    pub wake: Wake,
    /// Transport of what goes over the wire.
    pub transport: Transport,
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
    /// Whether the guest rings them in turn, which takes it a few more instructions.
    pub in_turn: bool,
    /// VMs that run one after another, each a share of the accesses.
    pub vms: u32,
    /// Whether the eBPF program is attached, although the VM has nothing to do with it.
    pub attached: bool,
    /// Shortest kind of run that has it.
    pub tier: Mode,
}

impl Row {
    /// Whether the eBPF program is attached while the row is measured.
    pub fn needs_program(&self) -> bool {
        self.attached || self.carrier == Carrier::Ebpf
    }

    /// Whether everything is taken down after each round: nobody may poll, nor fill the program's
    /// table, while other rows are measured.
    pub fn is_transient(&self) -> bool {
        self.wait == Wait::Poll
            || self.carrier == Carrier::SinkWithoutReader
            || (self.carrier == Carrier::Ebpf
                && (self.doorbells > 1 || self.placement == Placement::Vcpu))
    }

    /// Whether the row is part of a run of `mode`.
    pub fn is_in(&self, mode: Mode) -> bool {
        let rank = |mode| match mode {
            Mode::Smoke => 0,
            Mode::Quick => 1,
            Mode::Full => 2,
        };
        rank(self.tier) <= rank(mode)
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

use Operation::{Mixed, PioIn, PioOut, Posted, Read, RoundTrip, Write};

const FLOOR: Row = Row {
    name: "",
    carrier: Carrier::RamStore,
    sink: Sink::Ioeventfd,
    delivery: Delivery::Latest,
    wake: Wake::WhenArmed,
    transport: Transport::Stream,
    wait: Wait::Sleep,
    operation: Posted,
    placement: Placement::Vcpu,
    vcpus: 1,
    queues: Queues::Shared,
    doorbells: 1,
    in_turn: false,
    vms: 1,
    attached: false,
    tier: Mode::Quick,
};
const SINK: Row = Row {
    carrier: Carrier::SinkWithoutReader,
    ..FLOOR
};
const EVENTFDS: Row = Row {
    carrier: Carrier::EventfdPingPong,
    placement: Placement::Thread,
    ..FLOOR
};
const SOCKETS: Row = Row {
    carrier: Carrier::SocketpairPingPong,
    placement: Placement::Thread,
    ..FLOOR
};
const KVM_RUN: Row = Row {
    carrier: Carrier::KvmRun,
    ..FLOOR
};
const STREAM: Row = Row {
    carrier: Carrier::Forward,
    placement: Placement::Thread,
    ..FLOOR
};
const SEQPACKET: Row = STREAM.transport(Transport::Seqpacket);
const PIPES: Row = STREAM.transport(Transport::Pipes);
const MAILBOX: Row = STREAM.transport(Transport::Mailbox);
const SPINNING: Row = MAILBOX.wait(Wait::Spin);
const NATIVE_STREAM: Row = Row {
    carrier: Carrier::Ioregionfd,
    ..STREAM
};
const NATIVE_SEQPACKET: Row = NATIVE_STREAM.transport(Transport::Seqpacket);
const NATIVE_PIPES: Row = NATIVE_STREAM.transport(Transport::Pipes);
const NATIVE_MAILBOX: Row = NATIVE_STREAM.transport(Transport::Ioregionfd);
const NATIVE_POLLED: Row = NATIVE_MAILBOX.wait(Wait::Poll);
const IOEVENTFD: Row = Row {
    carrier: Carrier::Ioeventfd,
    ..STREAM
};
const EBPF: Row = Row {
    carrier: Carrier::Ebpf,
    ..STREAM
};
const POLLED: Row = EBPF
    .coalesced(Delivery::Latest, Wake::Never)
    .wait(Wait::Poll);
const SLOT_POLLED: Row = EBPF.wait(Wait::Poll);
/// Nobody looks until the run is over.
const UNREAD: Row = Row {
    placement: Placement::Vcpu,
    ..EBPF
};
const ARMED: Row = EBPF.coalesced(Delivery::Latest, Wake::WhenArmed);
const FIFO: Row = EBPF.coalesced(Delivery::Fifo, Wake::WhenArmed);

/// All rows, first those without the eBPF program, then those with it. What claims compare stands
/// next to each other, or on both sides of that border: rounds go forwards and backwards in turn.
pub const ROWS: &[Row] = &[
    FLOOR.posted("floor-ram-store").tier(Mode::Smoke),
    EVENTFDS
        .named("floor-eventfd-pingpong", RoundTrip)
        .tier(Mode::Smoke),
    SOCKETS
        .named("floor-socketpair-pingpong", RoundTrip)
        .tier(Mode::Smoke),
    KVM_RUN.posted("kvm-run/posted").tier(Mode::Smoke),
    KVM_RUN.named("kvm-run/write", Write),
    KVM_RUN.named("kvm-run/read", Read).tier(Mode::Smoke),
    KVM_RUN.named("kvm-run/pio-out", PioOut).tier(Mode::Full),
    KVM_RUN.named("kvm-run/pio-in", PioIn).tier(Mode::Full),
    STREAM.named("forward-stream/write", Write),
    SEQPACKET
        .named("forward-seqpacket/write", Write)
        .tier(Mode::Full),
    PIPES.named("forward-pipes/write", Write).tier(Mode::Full),
    MAILBOX
        .named("forward-mailbox/write", Write)
        .tier(Mode::Full),
    SPINNING
        .named("forward-mailbox-spin/write", Write)
        .tier(Mode::Full),
    STREAM.named("forward-stream/read", Read).tier(Mode::Smoke),
    STREAM
        .named("forward-stream/read/process", Read)
        .in_process(),
    SEQPACKET
        .named("forward-seqpacket/read", Read)
        .tier(Mode::Full),
    PIPES.named("forward-pipes/read", Read).tier(Mode::Full),
    MAILBOX.named("forward-mailbox/read", Read),
    SPINNING.named("forward-mailbox-spin/read", Read),
    NATIVE_STREAM.named("ioregionfd-stream/read", Read),
    NATIVE_STREAM.named("ioregionfd-stream/write", Write),
    NATIVE_STREAM.posted("ioregionfd-stream/posted"),
    NATIVE_SEQPACKET.named("ioregionfd-seqpacket/read", Read),
    NATIVE_SEQPACKET.named("ioregionfd-seqpacket/write", Write),
    NATIVE_SEQPACKET.posted("ioregionfd-seqpacket/posted"),
    NATIVE_PIPES.named("ioregionfd-pipes/read", Read),
    NATIVE_PIPES.named("ioregionfd-pipes/write", Write),
    NATIVE_PIPES.posted("ioregionfd-pipes/posted"),
    NATIVE_MAILBOX
        .named("ioregionfd-mailbox/read", Read)
        .tier(Mode::Smoke),
    NATIVE_MAILBOX
        .named("ioregionfd-mailbox/write", Write)
        .tier(Mode::Smoke),
    NATIVE_MAILBOX
        .posted("ioregionfd-mailbox/posted")
        .tier(Mode::Smoke),
    NATIVE_POLLED.named("ioregionfd-mailbox-polled/read", Read),
    NATIVE_POLLED.named("ioregionfd-mailbox-polled/write", Write),
    NATIVE_POLLED.posted("ioregionfd-mailbox-polled/posted"),
    STREAM.named("forward-stream/mixed", Mixed).tier(Mode::Full),
    IOEVENTFD.named("ioeventfd/mixed", Mixed).tier(Mode::Full),
    IOEVENTFD.posted("ioeventfd/posted@1").doorbells(1),
    IOEVENTFD
        .posted("ioeventfd/posted@10")
        .doorbells(10)
        .tier(Mode::Full),
    IOEVENTFD
        .posted("ioeventfd/posted@100")
        .doorbells(100)
        .tier(Mode::Full),
    IOEVENTFD.posted("ioeventfd/posted@1000").doorbells(1_000),
    IOEVENTFD.posted("ioeventfd/posted@10000").doorbells(10_000),
    STREAM
        .posted("forward-stream/posted/2vcpu-shared")
        .two_vcpus(Queues::Shared),
    STREAM
        .posted("forward-stream/posted/2vcpu-perqueue")
        .two_vcpus(Queues::PerVcpu)
        .tier(Mode::Full),
    IOEVENTFD
        .posted("ioeventfd/posted/2vcpu-shared")
        .two_vcpus(Queues::Shared),
    IOEVENTFD
        .posted("ioeventfd/posted/2vcpu-perqueue")
        .two_vcpus(Queues::PerVcpu),
    SEQPACKET.posted("forward-seqpacket/posted"),
    PIPES.posted("forward-pipes/posted"),
    MAILBOX.posted("forward-mailbox/posted").tier(Mode::Smoke),
    SPINNING.posted("forward-mailbox-spin/posted"),
    STREAM.posted("forward-stream/posted").tier(Mode::Smoke),
    KVM_RUN.posted("bystander-64/exit").vms(64).tier(Mode::Full),
    KVM_RUN.posted("bystander/exit"),
    IOEVENTFD.posted("bystander/ioeventfd"),
    IOEVENTFD.posted("ioeventfd/posted").tier(Mode::Smoke),
    IOEVENTFD
        .wait(Wait::Poll)
        .posted("ioeventfd-polled/posted")
        .tier(Mode::Smoke),
    SINK.posted("floor-sink-no-reader").tier(Mode::Smoke),
    // From here on the program is attached.
    UNREAD
        .posted("ebpf-ioeventfd-unread/posted")
        .tier(Mode::Smoke),
    EBPF.posted("ebpf-ioeventfd/posted").tier(Mode::Smoke),
    SLOT_POLLED
        .posted("ebpf-ioeventfd-polled/posted")
        .tier(Mode::Smoke),
    POLLED
        .posted("ebpf-coalesced-polled/posted")
        .tier(Mode::Smoke),
    IOEVENTFD.posted("bystander/ioeventfd+attached").attached(),
    KVM_RUN.posted("bystander/exit+attached").attached(),
    KVM_RUN
        .posted("bystander-64/exit+attached")
        .vms(64)
        .attached()
        .tier(Mode::Full),
    ARMED
        .posted("ebpf-coalesced-armed/posted")
        .tier(Mode::Smoke),
    FIFO.posted("ebpf-fifo/posted").tier(Mode::Smoke),
    EBPF.named("ebpf-ioeventfd/mixed", Mixed).tier(Mode::Smoke),
    EBPF.posted("ebpf-ioeventfd/posted/process").in_process(),
    EBPF.posted("ebpf-ioeventfd/posted/2vcpu-shared")
        .two_vcpus(Queues::Shared),
    EBPF.posted("ebpf-ioeventfd/posted/2vcpu-perqueue")
        .two_vcpus(Queues::PerVcpu),
    SLOT_POLLED
        .posted("ebpf-ioeventfd-polled/posted@10")
        .doorbells(10)
        .tier(Mode::Full),
    SLOT_POLLED
        .posted("ebpf-ioeventfd-polled/posted@100")
        .doorbells(100)
        .tier(Mode::Full),
    SLOT_POLLED
        .posted("ebpf-ioeventfd-polled/posted@1000")
        .doorbells(1_000),
    SLOT_POLLED
        .posted("ebpf-ioeventfd-polled/posted@1")
        .doorbells(1),
    SLOT_POLLED
        .posted("ebpf-ioeventfd-polled/posted@10000")
        .doorbells(10_000),
    POLLED
        .posted("ebpf-coalesced-polled/posted@10")
        .doorbells(10)
        .tier(Mode::Full),
    POLLED
        .posted("ebpf-coalesced-polled/posted@100")
        .doorbells(100)
        .tier(Mode::Full),
    POLLED
        .posted("ebpf-coalesced-polled/posted@1000")
        .doorbells(1_000)
        .tier(Mode::Full),
    POLLED
        .posted("ebpf-coalesced-polled/posted@1")
        .doorbells(1)
        .tier(Mode::Full),
    POLLED
        .posted("ebpf-coalesced-polled/posted@10000")
        .doorbells(10_000)
        .tier(Mode::Full),
];

#[cfg(test)]
mod tests {
    use super::*;
    use ioregion_bench::claims::{CLAIMS, NATIVE_CLAIMS};

    #[test]
    fn names_are_unique_and_claims_find_theirs() {
        let names: std::collections::HashSet<_> = ROWS.iter().map(|row| row.name).collect();
        assert_eq!(names.len(), ROWS.len());
        for claim in CLAIMS.iter().chain(NATIVE_CLAIMS) {
            let mut wanted = claim.how.scenarios().into_iter().flatten();
            assert!(wanted.all(|name| names.contains(name)), "{}", claim.id);
        }
    }

    #[test]
    fn rows_with_the_program_come_last() {
        assert!(ROWS.iter().is_sorted_by_key(|row| row.needs_program()));
    }

    #[test]
    fn every_mechanism_is_in_the_shortest_run() {
        for name in ["floor", "kvm-run", "forward", "ioeventfd", "ebpf"] {
            let smoke = |row: &&Row| row.carrier.name() == name && row.is_in(Mode::Smoke);
            assert!(ROWS.iter().any(|row| smoke(&row)), "{name}");
        }
    }
}
