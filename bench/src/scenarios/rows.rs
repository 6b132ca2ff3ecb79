//! All rows.

use ioregion_bench::results::Mode;
use ioregion_dispatch::{Delivery, Sink, Transport, Wake};

use super::{Carrier, Hook, Operation, Placement, Queues, Row, Wait};
use Operation::{Mixed, PioIn, PioOut, Posted, Read, RoundTrip, Write};

const FLOOR: Row = Row {
    name: "",
    carrier: Carrier::RamStore,
    sink: Sink::Ioeventfd,
    hook: None,
    delivery: Delivery::Latest,
    wake: Wake::WhenArmed,
    transport: Transport::Stream,
    fifos: false,
    wait: Wait::Sleep,
    operation: Posted,
    placement: Placement::Vcpu,
    vcpus: 1,
    queues: Queues::Shared,
    doorbells: 1,
    regions: None,
    in_turn: false,
    burst: None,
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
const FIFOS: Row = Row {
    fifos: true,
    ..PIPES
};
const MAILBOX: Row = STREAM.transport(Transport::Mailbox);
const SPINNING: Row = MAILBOX.wait(Wait::Spin);
const NATIVE_STREAM: Row = Row {
    carrier: Carrier::Ioregionfd,
    ..STREAM
};
const NATIVE_SEQPACKET: Row = NATIVE_STREAM.transport(Transport::Seqpacket);
const NATIVE_PIPES: Row = NATIVE_STREAM.transport(Transport::Pipes);
const NATIVE_FIFOS: Row = Row {
    fifos: true,
    ..NATIVE_PIPES
};
const NATIVE_MAILBOX: Row = NATIVE_STREAM.transport(Transport::Ioregionfd);
/// Nobody looks until the channel is nearly full; it has room for 64.
const NATIVE_UNREAD: Row = Row {
    placement: Placement::Vcpu,
    burst: Some(60),
    ..NATIVE_MAILBOX
};
const NATIVE_POLLED: Row = NATIVE_MAILBOX.wait(Wait::Poll);
const IOEVENTFD: Row = Row {
    carrier: Carrier::Ioeventfd,
    ..STREAM
};
const POST_WRITE: Row = Row {
    carrier: Carrier::PostWrite,
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

const SIGNAL: Row = Row {
    hook: Some(Hook::Signal),
    transport: Transport::Ioregionfd,
    ..EBPF
};
const SIGNAL_UNREAD: Row = Row {
    placement: Placement::Vcpu,
    ..SIGNAL
};
const CONSUME: Row = Row {
    hook: Some(Hook::Consume),
    transport: Transport::Ioregionfd,
    ..ARMED
};
const CONSUME_POLLED: Row = CONSUME
    .coalesced(Delivery::Latest, Wake::Never)
    .wait(Wait::Poll);
const ANSWER: Row = Row {
    hook: Some(Hook::Answer),
    ..SIGNAL
};

/// What is measured where both sides run at the same time: few, since wall time needs many rounds.
pub(super) const PARALLEL: &[&str] = &[
    "forward-stream/read",
    "forward-mailbox-spin/read",
    "ioregionfd-mailbox/read",
    "ioregionfd-mailbox-polled/read",
];

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
    FIFOS.named("forward-fifo/write", Write).tier(Mode::Full),
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
    FIFOS.named("forward-fifo/read", Read).tier(Mode::Full),
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
    NATIVE_FIFOS.named("ioregionfd-fifo/read", Read),
    NATIVE_FIFOS.named("ioregionfd-fifo/write", Write),
    NATIVE_FIFOS.posted("ioregionfd-fifo/posted"),
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
    NATIVE_UNREAD.posted("ioregionfd-mailbox-unread/posted"),
    NATIVE_MAILBOX
        .named("ioregionfd-regions/write@1", Write)
        .regions(1),
    NATIVE_MAILBOX
        .named("ioregionfd-regions/write@1000", Write)
        .regions(1_000),
    NATIVE_MAILBOX
        .posted("ioregionfd-regions/posted@1")
        .regions(1),
    NATIVE_MAILBOX
        .posted("ioregionfd-regions/posted@1000")
        .regions(1_000),
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
    FIFOS.posted("forward-fifo/posted").tier(Mode::Full),
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
    POST_WRITE.posted("ioeventfd-post-write/posted"),
    Row {
        placement: Placement::Vcpu,
        ..POST_WRITE
    }
    .posted("ioeventfd-post-write-unread/posted"),
    SINK.posted("floor-sink-no-reader").tier(Mode::Smoke),
    // From here on the program is loaded.
    SIGNAL.posted("ebpf-signal/posted"),
    SIGNAL_UNREAD.posted("ebpf-signal-unread/posted"),
    SIGNAL.wait(Wait::Poll).posted("ebpf-signal-polled/posted"),
    CONSUME.posted("ebpf-consume/posted"),
    CONSUME_POLLED.posted("ebpf-consume-polled/posted"),
    ANSWER.named("ebpf-answer/read", Read),
    // From here on it is attached.
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
