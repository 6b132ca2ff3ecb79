//! Invented results for unit tests. Compiled into tests only: nothing in here
//! was measured, and none of it may ever be written where results are kept.

use std::collections::BTreeMap;

use crate::results::*;

const ROUNDS: usize = 9;

/// A results file that meets every bar, with figures that no machine made.
pub(crate) fn results() -> Results {
    let mut scenarios: Vec<Scenario> = [
        ("floor-ram-store", 500.0),
        ("floor-sink-no-reader", 3_000.0),
        ("floor-eventfd-pingpong", 9_000.0),
        ("floor-socketpair-pingpong", 14_000.0),
        ("kvm-run/write", 9_000.0),
        ("kvm-run/read", 9_400.0),
        ("ioeventfd/posted", 3_000.0),
        ("ebpf-ioeventfd/posted", 3_150.0),
        ("ebpf-coalesced-polled/posted", 2_700.0),
        ("ebpf-coalesced-armed/posted", 3_600.0),
        ("ebpf-fifo/posted", 3_700.0),
        ("bystander/exit", 9_000.0),
        ("bystander/exit+attached", 9_180.0),
        ("bystander/ioeventfd", 3_000.0),
        ("bystander/ioeventfd+attached", 3_120.0),
        ("ebpf-ioeventfd-polled/posted", 3_150.0),
        ("ebpf-ioeventfd-unread/posted", 3_150.0),
        ("ioeventfd-polled/posted", 3_000.0),
    ]
    .map(|(name, ns)| scenario(name, ns))
    .into();
    for (transport, posted) in [
        ("stream", 36_000.0),
        ("seqpacket", 37_000.0),
        ("pipes", 34_000.0),
        ("mailbox", 30_000.0),
        ("mailbox-spin", 28_000.0),
    ] {
        for (operation, factor) in [("posted", 1.0), ("write", 1.3), ("read", 1.35)] {
            scenarios.push(scenario(
                &format!("forward-{transport}/{operation}"),
                posted * factor,
            ));
        }
    }
    for (n, factor) in [
        (1, 1.0),
        (10, 1.01),
        (100, 1.02),
        (1_000, 1.05),
        (10_000, 1.1),
    ] {
        scenarios.push(scenario(
            &format!("ioeventfd/posted@{n}"),
            3_000.0 * factor * factor,
        ));
        scenarios.push(scenario(
            &format!("ebpf-ioeventfd-polled/posted@{n}"),
            3_150.0 * factor,
        ));
    }
    Results {
        schema: SCHEMA,
        host: Host {
            kernel: Some("6.0.0-synthetic #1".into()),
            kvm: Kvm {
                kind: KvmKind::Pvm,
                told_by: "synthetic".into(),
            },
            cpu_model: Some("Synthetic | CPU".into()),
            cores: Some(2),
            mitigations: BTreeMap::from([(
                "spectre_v2".into(),
                "Mitigation: none | synthetic".into(),
            )]),
            ..Host::default()
        },
        provenance: Provenance {
            revision: Some("0123456789abcdef".into()),
            dirty: Some(false),
            date: "2000-01-01T00:00:00Z".into(),
            command: vec!["synthetic".into()],
            profile: "release".into(),
            mode: Mode::Quick,
            seed: 1,
            rounds: ROUNDS,
            vm: None,
        },
        mechanisms: vec![
            Mechanism {
                name: "kvm-run".into(),
                available: true,
                reason: String::new(),
            },
            Mechanism {
                name: "ioregionfd".into(),
                available: false,
                reason: "the kernel lacks it".into(),
            },
        ],
        scenarios,
        ratios: vec![],
        claims: vec![],
    }
}

/// A scenario whose fields follow from its name, around `ns` per access.
pub(crate) fn scenario(name: &str, ns: f64) -> Scenario {
    let mut parts = name.split(['/', '@']);
    let (prefix, operation) = (parts.next().unwrap(), parts.next().unwrap_or("floor"));
    let (mechanism, detail) = match prefix.split_once('-') {
        Some(("kvm", _)) | None => (prefix, None),
        Some((mechanism, detail)) => (mechanism, Some(detail)),
    };
    let sink = match detail {
        Some("ioeventfd") => Some("ioeventfd"),
        Some("fifo") => Some("coalesced"),
        Some(d) if d.starts_with("coalesced") => Some("coalesced"),
        Some(d) if d.starts_with("ioeventfd") => Some("ioeventfd"),
        _ => None,
    };
    let of = |factor: f64| (ns * factor) as u64;
    let vcpu_ns = Latency {
        p50: of(0.98),
        p90: of(1.1),
        p99: of(1.8),
        p999: of(4.0),
        max: of(30.0),
        mean: ns,
    };
    Scenario {
        name: name.into(),
        mechanism: mechanism.into(),
        boot: None,
        sink: sink.map(str::to_owned),
        transport: detail.filter(|_| mechanism == "forward").map(str::to_owned),
        wait: Some("sleep".into()),
        operation: operation.into(),
        placement: "thread".into(),
        vcpus: 1,
        doorbells: name.split_once('@').map_or(1, |(_, n)| n.parse().unwrap()),
        delivery: sink.map(|_| "latest".into()),
        pinning: Pinning {
            vcpus: vec![0],
            device: Some(1),
        },
        iterations: 10_000,
        rounds: ROUNDS,
        vcpu_ns,
        notify_ns: (operation == "posted").then_some(vcpu_ns),
        cpu_ns_per_access: CpuTime {
            vcpu: ns,
            device: ns * 0.6,
        },
        accesses_per_second: 1e9 / ns,
        exits_per_access: if matches!(mechanism, "kvm-run" | "forward") {
            1.0
        } else {
            0.0
        },
        voluntary_switches_per_access: 0.5,
        preemptions_per_access: None,
        wakeups_per_access: Some(0.25),
        lost: 0,
        duplicated: 0,
        reordered: 0,
        round_means_ns: (0..ROUNDS)
            .map(|round| ns * (1.0 + 0.03 * round as f64))
            .collect(),
        round_references: Vec::new(),
        histogram: vec![(of(0.98), 9_990), (of(30.0), 10)],
    }
}

/// Changes one scenario.
pub(crate) fn set(results: &mut Results, name: &str, change: impl FnOnce(&mut Scenario)) {
    change(
        results
            .scenarios
            .iter_mut()
            .find(|s| s.name == name)
            .unwrap(),
    );
}

/// Facts about a VM that never was.
pub(crate) fn facts(boots: &[Boot]) -> VmFacts {
    let boot = |boot: &Boot| BootFacts {
        boot: *boot,
        cpus: 1,
        ns_per_instruction: (*boot == Boot::Counted).then_some(1),
        parameters: vec!["mitigations=off".into()],
        retries: Vec::new(),
    };
    VmFacts {
        kernel: "patched".into(),
        what: "synthetic kernel".into(),
        patches: vec!["0001-Synthetic.patch".into()],
        emulator: "synthetic emulator".into(),
        boots: boots.iter().map(boot).collect(),
        empty_seconds: Some(9.0),
        empty_verdict_seconds: Some(6.0),
    }
}

/// [`results`] as if they had been measured in that boot.
pub(crate) fn in_boot(boot: Boot) -> Results {
    let mut results = results();
    for scenario in &mut results.scenarios {
        scenario.boot = Some(boot);
    }
    results
}
