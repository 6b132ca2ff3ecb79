//! The table of claims.

use super::figures::{most_exits, vs_best_forward, wrong_accesses};
use super::{Bar, ClaimDef, How};

/// The claims that a run on any kernel can decide.
pub const CLAIMS: &[ClaimDef] = &[
    ClaimDef {
        id: "ebpf-ioeventfd-sink-vs-ioeventfd-unread",
        text: "vCPU time per posted doorbell: ebpf with ioeventfd sink (value delivered) / plain ioeventfd (value lost), nobody looking before the end on either side",
        bar: Bar::AtMost(1.10),
        how: How::Ratio("ebpf-ioeventfd-unread/posted", "floor-sink-no-reader"),
    },
    ClaimDef {
        id: "ebpf-ioeventfd-sink-vs-ioeventfd-polled",
        text: "the same with polling readers on both sides: of slots / of the eventfd",
        bar: Bar::AtMost(1.10),
        how: How::Ratio("ebpf-ioeventfd-polled/posted", "ioeventfd-polled/posted"),
    },
    ClaimDef {
        id: "ebpf-ioeventfd-sink-vs-ioeventfd",
        text: "both of these, which compare at equal wake-ups (none)",
        bar: Bar::AtMost(1.10),
        how: How::AllOf(&[
            "ebpf-ioeventfd-sink-vs-ioeventfd-unread",
            "ebpf-ioeventfd-sink-vs-ioeventfd-polled",
        ]),
    },
    ClaimDef {
        id: "ebpf-ioeventfd-sink-vs-ioeventfd-worst",
        text: "a polled reader against no reader at all, which charges the readers' shared cache line to ebpf alone",
        bar: Bar::None,
        how: How::Ratio("ebpf-ioeventfd-polled/posted", "floor-sink-no-reader"),
    },
    ClaimDef {
        id: "ebpf-ioeventfd-sink-vs-ioeventfd-sleeping",
        text: "the same with sleeping readers on both sides; depends on how many wake-ups happen to merge",
        bar: Bar::None,
        how: How::Ratio("ebpf-ioeventfd/posted", "ioeventfd/posted"),
    },
    ClaimDef {
        id: "ebpf-coalesced-polled-vs-ioeventfd",
        text: "vCPU time per posted doorbell: ebpf with coalesced sink, device polling / plain ioeventfd with a reader",
        bar: Bar::AtMost(0.95),
        how: How::RatioWithCost("ebpf-coalesced-polled/posted", "ioeventfd/posted"),
    },
    ClaimDef {
        id: "ebpf-vs-forward",
        text: "vCPU time per posted doorbell: ebpf (ioeventfd sink) / forward over a stream socketpair",
        bar: Bar::AtMost(0.12),
        how: How::Ratio("ebpf-ioeventfd/posted", "forward-stream/posted"),
    },
    ClaimDef {
        id: "sink-vs-forward",
        text: "an in-kernel sink that nobody reads, without any program / forward over a stream socketpair: below this no ebpf-vs-forward is possible",
        bar: Bar::None,
        how: How::Ratio("floor-sink-no-reader", "forward-stream/posted"),
    },
    ClaimDef {
        id: "ebpf-vs-forward-response",
        text: "the same / forward with a write that waits for its response, the traditional path",
        bar: Bar::None,
        how: How::Ratio("ebpf-ioeventfd/posted", "forward-stream/write"),
    },
    ClaimDef {
        id: "ebpf-vs-forward-best",
        text: "the same / forward on its best transport",
        bar: Bar::None,
        how: How::Figure(|results| vs_best_forward(results, "ebpf-ioeventfd/posted", "/posted")),
    },
    ClaimDef {
        id: "ebpf-10k-doorbells-vs-1",
        text: "vCPU time per posted doorbell: ebpf with 10,000 doorbells / with 1",
        bar: Bar::AtMost(1.15),
        how: How::Ratio(
            "ebpf-ioeventfd-polled/posted@10000",
            "ebpf-ioeventfd-polled/posted@1",
        ),
    },
    ClaimDef {
        id: "ioeventfd-10k-doorbells-vs-1",
        text: "the same with plain ioeventfds: what KVM's own search among them adds",
        bar: Bar::None,
        how: How::Ratio("ioeventfd/posted@10000", "ioeventfd/posted@1"),
    },
    ClaimDef {
        id: "ebpf-bystander",
        text: "cost added to a userspace exit of another VM while the program is attached / a userspace exit",
        bar: Bar::AtMost(0.05),
        how: How::Added {
            with: "bystander/exit+attached",
            without: "bystander/exit",
        },
    },
    ClaimDef {
        id: "ebpf-bystander-own-access",
        text: "cost added to an in-kernel access of another VM while the program is attached / that access",
        bar: Bar::None,
        how: How::Added {
            with: "bystander/ioeventfd+attached",
            without: "bystander/ioeventfd",
        },
    },
    ClaimDef {
        id: "ebpf-exits-ioeventfd-sink",
        text: "userspace exits per ebpf doorbell, ioeventfd sink",
        bar: Bar::AtMost(0.0),
        how: How::Figure(|results| most_exits(results, "ioeventfd")),
    },
    ClaimDef {
        id: "ebpf-exits-coalesced",
        text: "userspace exits per ebpf doorbell, coalesced sink, drained",
        bar: Bar::AtMost(0.01),
        how: How::Figure(|results| most_exits(results, "coalesced")),
    },
    ClaimDef {
        id: "ebpf-exits",
        text: "userspace exits per ebpf doorbell, each sink within its bar",
        bar: Bar::None,
        how: How::AllOf(&["ebpf-exits-ioeventfd-sink", "ebpf-exits-coalesced"]),
    },
    ClaimDef {
        id: "integrity",
        text: "lost, doubled or reordered accesses over all scenarios",
        bar: Bar::AtMost(0.0),
        how: How::Figure(wrong_accesses),
    },
];
