use super::*;
use crate::synthetic::{results, scenario, set};

fn claim_of(results: &Results, id: &str) -> Claim {
    evaluate(results).into_iter().find(|c| c.id == id).unwrap()
}

#[test]
fn claim_at_or_below_its_bar_holds() {
    let c = claim_of(&results(), "ebpf-ioeventfd-sink-vs-ioeventfd-unread");
    assert_eq!((c.holds, c.bar), (Some(true), Some(1.10)));
    assert!((c.value.unwrap() - 1.05).abs() < 1e-9);
    assert!(c.ci95.is_some());
    assert!(evaluate(&results()).iter().all(|c| c.holds != Some(false)));
}

#[test]
fn missed_bar_does_not_hold_and_keeps_its_figure() {
    let mut r = results();
    set(&mut r, "ebpf-coalesced-polled/posted", |s| {
        s.round_means_ns.iter_mut().for_each(|ns| *ns *= 1.2);
    });
    let c = claim_of(&r, "ebpf-coalesced-polled-vs-ioeventfd");
    assert_eq!(c.holds, Some(false));
    assert!((c.value.unwrap() - 1.08).abs() < 1e-9);
    assert!(c.note.contains("notification p50"), "{}", c.note);
}

#[test]
fn noisy_claim_has_no_figure_and_no_verdict() {
    let mut r = results();
    set(&mut r, "ebpf-ioeventfd-unread/posted", |s| {
        (0..)
            .zip(&mut s.round_means_ns)
            .for_each(|(i, ns)| *ns *= [0.4, 1.0, 2.5][i % 3]);
    });
    let c = claim_of(&r, "ebpf-ioeventfd-sink-vs-ioeventfd-unread");
    assert_eq!((c.value, c.ci95, c.holds), (None, None, None));
    assert!(
        c.note.starts_with("noisy") && c.note.contains("rounds would do"),
        "{}",
        c.note
    );
}

#[test]
fn absent_scenario_is_not_measured_and_says_why() {
    let mut r = results();
    r.scenarios.retain(|s| s.mechanism != "ebpf");
    r.mechanisms.push(Mechanism {
        name: "ebpf".into(),
        available: false,
        reason: "lockdown".into(),
    });
    let c = claim_of(&r, "ebpf-vs-forward");
    assert_eq!((c.value, c.holds), (None, None));
    assert_eq!(
        c.note,
        "not measured: ebpf-ioeventfd/posted (ebpf: lockdown)"
    );
    r.scenarios.clear();
    for c in evaluate(&r) {
        assert_eq!((c.value, c.holds), (None, None), "{}", c.id);
    }
}

#[test]
fn figures_of_scenarios_with_wrong_values_are_withheld() {
    let mut r = results();
    set(&mut r, "floor-sink-no-reader", |s| s.duplicated = 2);
    let c = claim_of(&r, "ebpf-ioeventfd-sink-vs-ioeventfd-unread");
    assert!(
        c.value.is_none() && c.note.starts_with("withheld: 2 accesses"),
        "{}",
        c.note
    );
    let c = claim_of(&r, "integrity");
    assert_eq!((c.value, c.holds), (Some(2.0), Some(false)));
    assert_eq!(c.note, "in floor-sink-no-reader");
}

#[test]
fn best_forward_is_the_transport_with_the_smallest_median() {
    let c = claim_of(&results(), "ebpf-vs-forward-best");
    assert_eq!(c.note, "best transport: forward-mailbox-spin/posted");
    assert_eq!((c.bar, c.holds), (None, None));
    let mut r = results();
    set(&mut r, "forward-mailbox-spin/posted", |s| s.reordered = 1);
    assert_eq!(
        claim_of(&r, "ebpf-vs-forward-best").note,
        "best transport: forward-mailbox/posted"
    );
}

#[test]
fn exits_are_judged_by_the_worst_scenario_of_each_sink() {
    let mut r = results();
    set(&mut r, "ebpf-coalesced-armed/posted", |s| {
        s.exits_per_access = 0.009
    });
    assert_eq!(claim_of(&r, "ebpf-exits").holds, Some(true));
    assert_eq!(claim_of(&r, "ebpf-exits").value, Some(0.009));
    set(&mut r, "ebpf-ioeventfd-polled/posted@1000", |s| {
        s.exits_per_access = 1e-6
    });
    let c = claim_of(&r, "ebpf-exits-ioeventfd-sink");
    assert_eq!(c.holds, Some(false));
    assert_eq!(c.note, "most: ebpf-ioeventfd-polled/posted@1000");
    assert_eq!(claim_of(&r, "ebpf-exits-coalesced").holds, Some(true));
    assert_eq!(claim_of(&r, "ebpf-exits").holds, Some(false));
}

#[test]
fn bystander_cost_is_a_share_of_the_access_and_may_be_below_zero() {
    let mut r = results();
    set(&mut r, "bystander/exit+attached", |s| {
        s.round_means_ns.iter_mut().for_each(|ns| *ns *= 0.97)
    });
    let c = claim_of(&r, "ebpf-bystander");
    assert!(
        (c.value.unwrap() - (1.02 * 0.97 - 1.0)).abs() < 1e-9,
        "{c:?}"
    );
    assert_eq!(c.holds, Some(true));
}

#[test]
fn interval_that_crosses_the_bar_is_said() {
    let mut r = results();
    set(&mut r, "ebpf-ioeventfd-unread/posted", |s| {
        (0..)
            .zip(&mut s.round_means_ns)
            .for_each(|(i, ns)| *ns *= [1.0, 1.02, 1.08][i % 3]);
    });
    let c = claim_of(&r, "ebpf-ioeventfd-sink-vs-ioeventfd-unread");
    assert_eq!(
        (c.holds, c.note.as_str()),
        (Some(true), "the interval crosses the bar")
    );
}

#[test]
fn bars_bind_in_their_direction() {
    assert_eq!(Bar::AtMost(1.0).met_by(1.0), Some(true));
    assert_eq!(Bar::AtMost(1.0).met_by(1.1), Some(false));
    assert_eq!(Bar::AtLeast(1.0).met_by(1.1), Some(true));
    assert_eq!(Bar::AtLeast(1.0).met_by(0.9), Some(false));
    assert_eq!(Bar::None.met_by(1.0), None);
}

#[test]
fn unequal_rounds_are_not_paired() {
    let mut r = results();
    set(&mut r, "floor-sink-no-reader", |s| {
        s.round_means_ns.truncate(3)
    });
    assert!(
        claim_of(&r, "ebpf-ioeventfd-sink-vs-ioeventfd-unread")
            .note
            .starts_with("not paired")
    );
}

#[test]
fn every_scenario_is_compared_with_its_natural_baseline() {
    let cases = [
        ("ebpf-fifo/posted", Some("ioeventfd/posted")),
        ("ioeventfd/posted", None),
        ("forward-pipes/read", Some("kvm-run/read")),
        ("forward-stream/write/process", Some("forward-stream/write")),
        ("ioeventfd/posted@100", Some("ioeventfd/posted@1")),
        ("ioeventfd/posted@1", None),
        ("bystander/exit+attached", Some("bystander/exit")),
        ("bystander/exit", None),
        ("floor-ram-store", None),
    ];
    for (name, expected) in cases {
        assert_eq!(baseline(name).as_deref(), expected, "{name}");
    }
    let mut r = results();
    r.scenarios
        .push(scenario("forward-stream/write/process", 40.0));
    let all = ratios(&r);
    let last = all.last().unwrap();
    assert_eq!(
        (last.numerator.as_str(), last.denominator.as_str()),
        ("forward-stream/write/process", "forward-stream/write")
    );
    assert!(last.value.is_some());
}

#[test]
fn claim_of_several_is_as_good_as_the_worst_of_them() {
    let whole = "ebpf-ioeventfd-sink-vs-ioeventfd";
    let held = claim_of(&results(), whole);
    assert_eq!((held.holds, held.bar), (Some(true), Some(1.1)));
    let mut r = results();
    set(&mut r, "ebpf-ioeventfd-polled/posted", |s| {
        s.round_means_ns.iter_mut().for_each(|ns| *ns *= 1.1);
    });
    let missed = claim_of(&r, whole);
    assert_eq!(missed.holds, Some(false));
    assert!(missed.value > held.value && missed.ci95.is_some());
}

#[test]
fn references_cancel_what_slows_one_side_only_for_a_while() {
    let mut r = results();
    let before = claim_of(&r, "ebpf-ioeventfd-sink-vs-ioeventfd-unread")
        .value
        .unwrap();
    for name in ["ebpf-ioeventfd-unread/posted", "floor-sink-no-reader"] {
        set(&mut r, name, |s| {
            s.round_references = s.round_means_ns.iter().map(|ns| ns / 500.0).collect();
        });
    }
    set(&mut r, "ebpf-ioeventfd-unread/posted", |s| {
        (0..)
            .zip(&mut s.round_means_ns)
            .for_each(|(i, ns)| *ns *= [1.0, 3.0][i % 2]);
    });
    let after = claim_of(&r, "ebpf-ioeventfd-sink-vs-ioeventfd-unread")
        .value
        .unwrap();
    assert!((after - before).abs() < 1e-9, "{before} {after}");
}

#[test]
fn ratio_never_mixes_references_and_times() {
    let mut r = results();
    let before = claim_of(&r, "ebpf-bystander").value.unwrap();
    set(&mut r, "bystander/exit", |s| {
        s.round_references = vec![1.0; s.round_means_ns.len()];
    });
    assert_eq!(claim_of(&r, "ebpf-bystander").value.unwrap(), before);
}

/// The run of a VM, as if its kernel had the series.
fn vm() -> Results {
    let mut r = crate::synthetic::in_boot(Boot::Counted);
    r.provenance.vm = Some(crate::synthetic::facts(&[Boot::Counted, Boot::Parallel]));
    r.mechanisms.retain(|m| m.name != "ioregionfd");
    r.mechanisms.push(Mechanism {
        name: "ioregionfd".into(),
        available: true,
        reason: String::new(),
    });
    r
}

#[test]
fn vm_without_the_series_shows_its_claims_as_not_applicable() {
    let mut r = vm();
    r.mechanisms.retain(|m| m.name != "ioregionfd");
    for def in NATIVE_CLAIMS {
        let c = claim_of(&r, def.id);
        assert!(c.not_applicable && c.holds.is_none(), "{}", c.id);
    }
    assert_eq!(claim_of(&r, "vm-boot").holds, Some(true));
    assert!(!evaluate(&results()).iter().any(|c| c.not_applicable));
}

#[test]
fn claim_that_needs_two_cpus_takes_the_rows_of_that_boot() {
    let mut r = vm();
    let id = "mailbox-spin-read-vs-forward";
    r.scenarios
        .push(scenario("ioregionfd-mailbox-polled/read", 1.0));
    assert!(claim_of(&r, id).note.contains("read/2cpu"));
    for (name, ns) in [
        ("ioregionfd-mailbox-polled/read/2cpu", 300.0),
        ("forward-stream/read/2cpu", 1_000.0),
    ] {
        let mut s = scenario(name, ns);
        s.boot = Some(Boot::Parallel);
        r.scenarios.push(s);
    }
    let c = claim_of(&r, id);
    assert!((c.value.unwrap() - 0.3).abs() < 1e-9, "{c:?}");
    assert_eq!((c.holds, c.boot), (Some(true), Some(Boot::Parallel)));
    assert_eq!(claim_of(&r, "ebpf-vs-forward").boot, Some(Boot::Counted));
}

#[test]
fn counted_rounds_pair_as_far_as_both_go() {
    let mut r = vm();
    let name = "ebpf-ioeventfd-polled/posted@10000";
    set(&mut r, name, |s| s.round_means_ns.truncate(2));
    let c = claim_of(&r, "ebpf-10k-doorbells-vs-1");
    assert_eq!(c.holds, Some(true), "{c:?}");
    set(&mut r, name, |s| s.boot = None);
    let c = claim_of(&r, "ebpf-10k-doorbells-vs-1");
    assert!(c.note.starts_with("not paired"), "{c:?}");
}

#[test]
fn signal_is_judged_at_equal_wakeups() {
    let mut r = vm();
    for (name, ns) in [
        ("ebpf-signal/posted", 4_500.0),
        ("ebpf-signal-unread/posted", 3_300.0),
    ] {
        r.scenarios.push(scenario(name, ns));
    }
    let id = "ebpf-signal-vs-ioeventfd";
    // Equally many wake-ups: the larger one counts.
    let c = claim_of(&r, id);
    assert_eq!((c.value, c.holds), (Some(1.5), Some(false)));
    set(&mut r, "ioeventfd/posted", |s| {
        s.wakeups_per_access = Some(0.1);
    });
    let c = claim_of(&r, id);
    assert!((c.value.unwrap() - 1.1).abs() < 1e-9);
    assert_eq!(c.holds, Some(true));
    assert!(
        c.note.contains("0.250") && c.note.contains("0.100"),
        "{}",
        c.note
    );
}

#[test]
fn cells_of_the_transport_table_are_counted() {
    let mut r = vm();
    let c = claim_of(&r, "transport-table");
    assert_eq!((c.value, c.holds), (Some(12.0), Some(false)));
    assert!(c.note.contains("forward-fifo/read"), "{}", c.note);
    let (mechanisms, transports, operations) = TRANSPORT_CELLS;
    for mechanism in mechanisms {
        for transport in transports {
            for operation in operations {
                let name = transport_cell(mechanism, transport, operation);
                if r.scenario(&name).is_none() {
                    r.scenarios.push(scenario(&name, 1_000.0));
                }
            }
        }
    }
    assert_eq!(claim_of(&r, "transport-table").holds, Some(true));
}
