//! The claims about kernels with the ioregionfd series.

use super::figures::{empty_vm, signal_at_equal_wakeups, transport_cells, vs_best_forward};
use super::{Bar, ClaimDef, How};

/// The claims that need `ioregionfd`.
pub const NATIVE_CLAIMS: &[ClaimDef] = &[
    ClaimDef {
        id: "ioregionfd-vs-forward-stream-read",
        text: "vCPU time per read: ioregionfd / forward, both over a stream socket",
        bar: Bar::AtMost(1.00),
        how: How::Ratio("ioregionfd-stream/read", "forward-stream/read"),
    },
    ClaimDef {
        id: "ioregionfd-vs-forward-stream-write",
        text: "vCPU time per write that waits: ioregionfd / forward, both over a stream socket",
        bar: Bar::AtMost(1.00),
        how: How::Ratio("ioregionfd-stream/write", "forward-stream/write"),
    },
    ClaimDef {
        id: "ioregionfd-vs-forward-seqpacket-read",
        text: "vCPU time per read: ioregionfd / forward, both over a seqpacket socket",
        bar: Bar::AtMost(1.00),
        how: How::Ratio("ioregionfd-seqpacket/read", "forward-seqpacket/read"),
    },
    ClaimDef {
        id: "ioregionfd-vs-forward-seqpacket-write",
        text: "vCPU time per write that waits: ioregionfd / forward, both over a seqpacket socket",
        bar: Bar::AtMost(1.00),
        how: How::Ratio("ioregionfd-seqpacket/write", "forward-seqpacket/write"),
    },
    ClaimDef {
        id: "ioregionfd-vs-forward-pipes-read",
        text: "vCPU time per read: ioregionfd / forward, both over two pipes",
        bar: Bar::AtMost(1.00),
        how: How::Ratio("ioregionfd-pipes/read", "forward-pipes/read"),
    },
    ClaimDef {
        id: "ioregionfd-vs-forward-pipes-write",
        text: "vCPU time per write that waits: ioregionfd / forward, both over two pipes",
        bar: Bar::AtMost(1.00),
        how: How::Ratio("ioregionfd-pipes/write", "forward-pipes/write"),
    },
    ClaimDef {
        id: "ioregionfd-vs-forward-fifo-read",
        text: "vCPU time per read: ioregionfd / forward, both over two FIFOs",
        bar: Bar::AtMost(1.00),
        how: How::Ratio("ioregionfd-fifo/read", "forward-fifo/read"),
    },
    ClaimDef {
        id: "ioregionfd-vs-forward-fifo-write",
        text: "vCPU time per write that waits: ioregionfd / forward, both over two FIFOs",
        bar: Bar::AtMost(1.00),
        how: How::Ratio("ioregionfd-fifo/write", "forward-fifo/write"),
    },
    ClaimDef {
        id: "ioregionfd-vs-forward-equal-transport",
        text: "all of these",
        bar: Bar::AtMost(1.00),
        how: How::AllOf(&[
            "ioregionfd-vs-forward-stream-read",
            "ioregionfd-vs-forward-stream-write",
            "ioregionfd-vs-forward-seqpacket-read",
            "ioregionfd-vs-forward-seqpacket-write",
            "ioregionfd-vs-forward-pipes-read",
            "ioregionfd-vs-forward-pipes-write",
            "ioregionfd-vs-forward-fifo-read",
            "ioregionfd-vs-forward-fifo-write",
        ]),
    },
    ClaimDef {
        id: "mailbox-read-vs-forward-stream",
        text: "vCPU time per read: ioregionfd over the purpose-made file / forward over a stream socket, the traditional path",
        bar: Bar::AtMost(0.60),
        how: How::RatioWithSwitches("ioregionfd-mailbox/read", "forward-stream/read"),
    },
    ClaimDef {
        id: "mailbox-read-vs-forward-best",
        text: "vCPU time per read: ioregionfd over the purpose-made file / forward on its best transport",
        bar: Bar::AtMost(1.00),
        how: How::Figure(|results| vs_best_forward(results, "ioregionfd-mailbox/read", "/read")),
    },
    ClaimDef {
        id: "mailbox-posted-vs-forward",
        text: "vCPU time per posted write over the purpose-made file / per write that waits, forward over a stream socket",
        bar: Bar::AtMost(0.30),
        how: How::RatioWithSwitches("ioregionfd-mailbox/posted", "forward-stream/write"),
    },
    ClaimDef {
        id: "mailbox-posted-polled-vs-forward",
        text: "the same with a device task that polls; on one CPU, only while the vCPU waits for room",
        bar: Bar::None,
        how: How::RatioWithSwitches("ioregionfd-mailbox-polled/posted", "forward-stream/write"),
    },
    ClaimDef {
        id: "mailbox-posted-unread-vs-forward",
        text: "the same with a device task that does not look before the end, so that no doorbell wakes anybody",
        bar: Bar::None,
        how: How::RatioWithSwitches("ioregionfd-mailbox-unread/posted", "forward-stream/write"),
    },
    ClaimDef {
        id: "mailbox-spin-read-vs-forward",
        text: "vCPU time per read: ioregionfd with a polling device task and KVM spinning / forward over a stream socket; in a VM the first decile of wall time",
        bar: Bar::AtMost(0.40),
        how: How::Parallel("ioregionfd-mailbox-polled/read", "forward-stream/read"),
    },
    ClaimDef {
        id: "ebpf-signal-vs-ioeventfd-unread",
        text: "vCPU time per posted doorbell: hooked ebpf that keeps the value and signals / plain ioeventfd (value lost), nobody looking before the end on either side",
        bar: Bar::None,
        how: How::Ratio("ebpf-signal-unread/posted", "floor-sink-no-reader"),
    },
    ClaimDef {
        id: "ebpf-signal-vs-ioeventfd-sleeping",
        text: "the same with sleeping readers on both sides",
        bar: Bar::None,
        how: How::RatioWithSwitches("ebpf-signal/posted", "ioeventfd/posted"),
    },
    ClaimDef {
        id: "ebpf-signal-vs-ioeventfd",
        text: "the same at equal wake-up counts: the larger of the two where sleeping readers wake up equally often, else the first",
        bar: Bar::AtMost(1.15),
        how: How::Figure(signal_at_equal_wakeups),
    },
    ClaimDef {
        id: "post-write-vs-ioeventfd",
        text: "vCPU time per posted doorbell: ioeventfd with the proposed POST_WRITE / plain ioeventfd, nobody looking before the end on either side",
        bar: Bar::None,
        how: How::Ratio("ioeventfd-post-write-unread/posted", "floor-sink-no-reader"),
    },
    ClaimDef {
        id: "ebpf-signal-vs-post-write",
        text: "vCPU time per posted doorbell: hooked ebpf that keeps the value and signals / ioeventfd with POST_WRITE, nobody looking before the end on either side",
        bar: Bar::None,
        how: How::Ratio(
            "ebpf-signal-unread/posted",
            "ioeventfd-post-write-unread/posted",
        ),
    },
    ClaimDef {
        id: "ebpf-answer-vs-forward",
        text: "vCPU time per read: answered by the hooked ebpf program / forward over a stream socket",
        bar: Bar::AtMost(0.18),
        how: How::Ratio("ebpf-answer/read", "forward-stream/read"),
    },
    ClaimDef {
        id: "regions-1000-vs-1-write",
        text: "vCPU time per write that waits: ioregionfd with 1,000 regions, written to in turn / with 1",
        bar: Bar::AtMost(1.10),
        how: How::Ratio(
            "ioregionfd-regions/write@1000",
            "ioregionfd-regions/write@1",
        ),
    },
    ClaimDef {
        id: "regions-1000-vs-1-posted",
        text: "the same for posted writes",
        bar: Bar::AtMost(1.10),
        how: How::Ratio(
            "ioregionfd-regions/posted@1000",
            "ioregionfd-regions/posted@1",
        ),
    },
    ClaimDef {
        id: "regions-1000-vs-1",
        text: "both of these",
        bar: Bar::AtMost(1.10),
        how: How::AllOf(&["regions-1000-vs-1-write", "regions-1000-vs-1-posted"]),
    },
    ClaimDef {
        id: "transport-table",
        text: "cells of the table mechanism × transport × operation that were measured",
        bar: Bar::AtLeast(30.0),
        how: How::Figure(transport_cells),
    },
];

/// The claims about the VM itself.
pub const VM_CLAIMS: &[ClaimDef] = &[ClaimDef {
    id: "vm-boot",
    text: "wall time of `cargo xtask vm --empty` with everything built, in seconds",
    bar: Bar::AtMost(15.0),
    how: How::Figure(empty_vm),
}];
