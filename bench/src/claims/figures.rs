//! How the figures of claims are made that are not just a ratio.

use super::{Figure, Outcome, ratio, usable};
use crate::results::{Results, Scenario};

pub(super) fn ratio_with_cost(results: &Results, of: &str, over: &str) -> Outcome {
    let mut figure = ratio(results, of, over)?;
    let cost = |name| {
        let scenario = usable(results, name)?;
        let notify = scenario
            .notify_ns
            .map_or("not measured".into(), |n| format!("{} ns", n.p50));
        let cpu = scenario.cpu_ns_per_access.total();
        Ok::<_, String>(format!(
            "{name}: CPU {cpu:.0} ns per access, notification p50 {notify}"
        ))
    };
    figure.note = format!("{}; {}", cost(of)?, cost(over)?);
    Ok(figure)
}

pub(super) fn vs_best_forward(results: &Results, of: &str, operation: &str) -> Outcome {
    let forwarded = results.scenarios.iter().filter(|s| {
        s.name.starts_with("forward-") && s.name.ends_with(operation) && s.wrong() == 0
    });
    let best = forwarded.min_by_key(|s| s.vcpu_ns.p50);
    let best = best.ok_or_else(|| format!("not measured: forward-*{operation}"))?;
    let mut figure = ratio(results, of, &best.name)?;
    figure.note = format!("best transport: {}", best.name);
    Ok(figure)
}

pub(super) fn most_exits(results: &Results, sink: &str) -> Outcome {
    let doorbells = results.scenarios.iter().filter(|s| {
        s.mechanism == "ebpf" && s.sink.as_deref() == Some(sink) && s.operation == "posted"
    });
    let most = doorbells.max_by(|a, b| a.exits_per_access.total_cmp(&b.exits_per_access));
    let most = most.ok_or_else(|| format!("not measured: ebpf with {sink} sink"))?;
    Ok(Figure {
        value: most.exits_per_access,
        ci95: None,
        note: format!("most: {}", most.name),
    })
}

pub(super) fn wrong_accesses(results: &Results) -> Outcome {
    if results.scenarios.is_empty() {
        return Err("not measured: no scenarios".into());
    }
    let wrong: Vec<&Scenario> = results.scenarios.iter().filter(|s| s.wrong() > 0).collect();
    let names: Vec<&str> = wrong.iter().map(|s| s.name.as_str()).collect();
    let note = match names.len() {
        0 => format!("{} scenarios", results.scenarios.len()),
        _ => format!("in {}", names.join(", ")),
    };
    let value = wrong
        .iter()
        .fold(0u64, |sum, s| sum.saturating_add(s.wrong())) as f64;
    Ok(Figure {
        value,
        ci95: None,
        note,
    })
}

pub(super) fn ratio_with_switches(results: &Results, of: &str, over: &str) -> Outcome {
    let mut figure = ratio(results, of, over)?;
    figure.note = format!(
        "{}; {}",
        switches(usable(results, of)?),
        switches(usable(results, over)?)
    );
    Ok(figure)
}

/// What a scenario pays for going to sleep and waking up.
fn switches(scenario: &Scenario) -> String {
    let voluntary = scenario.voluntary_switches_per_access;
    let preempted = scenario.preemptions_per_access.unwrap_or(0.0);
    let wakeups = match scenario.wakeups_per_access {
        Some(wakeups) => format!("{wakeups:.2}"),
        None => "unknown".into(),
    };
    format!(
        "{}: per access {:.2} context switches ({preempted:.2} of them preemptions), {wakeups} \
         wake-ups of the device",
        scenario.name,
        voluntary + preempted,
    )
}

/// Wake-up counts that differ by no more than this share count as equal.
const EQUAL: f64 = 0.01;

/// A doorbell whose value the program keeps, against a plain ioeventfd, at equal wake-up counts:
/// with sleeping readers where those wake up equally often, else with none.
pub(super) fn signal_at_equal_wakeups(results: &Results) -> Outcome {
    let asleep = ["ebpf-signal/posted", "ioeventfd/posted"];
    let nobody = ["ebpf-signal-unread/posted", "floor-sink-no-reader"];
    let wakeups = |name| {
        let scenario = usable(results, name)?;
        let wakeups = scenario.wakeups_per_access;
        wakeups.ok_or_else(|| format!("wake-ups of {name} were not counted"))
    };
    let [of, over] = [wakeups(asleep[0])?, wakeups(asleep[1])?];
    let equal = (of - over).abs() <= EQUAL * of.max(over);
    let mut worst = ratio(results, nobody[0], nobody[1])?;
    let sleeping = ratio(results, asleep[0], asleep[1]);
    let words = match &sleeping {
        Ok(figure) => format!("{:.3}", figure.value),
        Err(why) => why.clone(),
    };
    worst.note = format!(
        "nobody asleep (0 wake-ups on both sides): {:.3}; readers asleep: {words}, at {of:.3} and \
         {over:.3} wake-ups per access",
        worst.value
    );
    match sleeping {
        Ok(figure) if equal && figure.value > worst.value => Ok(Figure {
            note: worst.note,
            ..figure
        }),
        _ => Ok(worst),
    }
}

/// Mechanisms, transports and operations of the table that the design discussion asked for.
pub const TRANSPORT_CELLS: (&[&str], &[&str], &[&str]) = (
    &["forward", "ioregionfd"],
    &["stream", "seqpacket", "pipes", "fifo", "mailbox"],
    &["read", "write", "posted"],
);

/// The scenario of one of [`TRANSPORT_CELLS`].
pub fn transport_cell(mechanism: &str, transport: &str, operation: &str) -> String {
    format!("{mechanism}-{transport}/{operation}")
}

/// How many cells of the table were measured.
pub(super) fn transport_cells(results: &Results) -> Outcome {
    let (mechanisms, transports, operations) = TRANSPORT_CELLS;
    let (mut filled, mut missing) = (0_u32, Vec::new());
    for mechanism in mechanisms {
        for transport in transports {
            for operation in operations {
                let name = transport_cell(mechanism, transport, operation);
                match usable(results, &name) {
                    Ok(_) => filled += 1,
                    Err(_) => missing.push(name),
                }
            }
        }
    }
    let note = match missing.len() {
        0 => "every cell".into(),
        _ => format!("not measured: {}", missing.join(", ")),
    };
    Ok(Figure {
        value: filled.into(),
        ci95: None,
        note,
    })
}

/// How long the empty VM took.
pub(super) fn empty_vm(results: &Results) -> Outcome {
    let vm = results.provenance.vm.as_ref();
    let seconds = vm.and_then(|vm| vm.empty_seconds);
    let value = seconds.ok_or_else(|| "not measured: the empty VM".to_owned())?;
    let note = match vm.and_then(|vm| vm.empty_verdict_seconds) {
        Some(verdict) => format!("seconds; verdict {verdict:.1} s after power on"),
        None => "seconds".into(),
    };
    Ok(Figure {
        value,
        ci95: None,
        note,
    })
}
