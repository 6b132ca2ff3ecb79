//! Tables about kernels with the ioregionfd series: what the design discussion asked for.

use super::{count, label};
use crate::claims::{TRANSPORT_CELLS, transport_cell};
use crate::results::{Results, Scenario};
use crate::table::Table;

/// The tables of each run that has something to show in them.
pub(super) fn tables(runs: &[Results]) -> Vec<Table> {
    let native = |run: &Results| {
        let mut rows = run.scenarios.iter();
        run.provenance.vm.is_some() || rows.any(|s| s.mechanism == "ioregionfd")
    };
    let shown = runs.iter().enumerate().filter(|(_, run)| native(run));
    shown
        .flat_map(|(index, run)| {
            let label = label(runs, index);
            [transports(run, &label), doorbells(run, &label)]
        })
        .collect()
}

fn usable<'a>(run: &'a Results, name: &str) -> Option<&'a Scenario> {
    run.scenario(name).filter(|s| s.wrong() == 0)
}

/// Mean vCPU time of each mechanism over each transport.
fn transports(run: &Results, label: &str) -> Table {
    let (mechanisms, transports, operations) = TRANSPORT_CELLS;
    let title = format!(
        "{label}Mechanism × transport × operation (mean vCPU time in ns per access; in brackets over \
         forward on the same transport)"
    );
    let header = [
        "mechanism",
        "transport",
        ">read",
        ">write that waits",
        ">posted write",
    ];
    let mut table = Table::new(&title, header);
    for mechanism in mechanisms {
        for transport in transports {
            let words = match (*transport, *mechanism) {
                ("mailbox", "ioregionfd") => "purpose-made file",
                ("mailbox", _) => "eventfd + shared memory",
                ("pipes", _) => "two pipes",
                ("fifo", _) => "two FIFOs",
                (other, _) => other,
            };
            let cells: Vec<Option<String>> = operations
                .iter()
                .map(|operation| {
                    let name = transport_cell(mechanism, transport, operation);
                    let mean = usable(run, &name)?.vcpu_ns.mean;
                    let text = count(mean.round() as u64);
                    // The two mailboxes are different transports.
                    let equal = *mechanism != "forward" && *transport != "mailbox";
                    let forward = transport_cell("forward", transport, operation);
                    let forward = usable(run, &forward).filter(|_| equal);
                    Some(match forward.map(|f| mean / f.vcpu_ns.mean) {
                        Some(ratio) => format!("{text} ({ratio:.2})"),
                        None => text,
                    })
                })
                .collect();
            if cells.iter().any(Option::is_some) {
                let cells = cells.into_iter().map(|cell| cell.unwrap_or("–".into()));
                table.push([(*mechanism).into(), words.into()].into_iter().chain(cells));
            }
        }
    }
    table
}

/// A way for doorbells, and its rows: nobody looks, the reader sleeps, the reader polls.
type Doorbells = (&'static str, [Option<&'static str>; 3]);

const DOORBELLS: &[Doorbells] = &[
    (
        "ioeventfd, the value is lost",
        [
            Some("floor-sink-no-reader"),
            Some("ioeventfd/posted"),
            Some("ioeventfd-polled/posted"),
        ],
    ),
    (
        "ioeventfd with POST_WRITE",
        [
            Some("ioeventfd-post-write-unread/posted"),
            Some("ioeventfd-post-write/posted"),
            None,
        ],
    ),
    (
        "ebpf on a tracepoint, ioeventfd as sink",
        [
            Some("ebpf-ioeventfd-unread/posted"),
            Some("ebpf-ioeventfd/posted"),
            Some("ebpf-ioeventfd-polled/posted"),
        ],
    ),
    (
        "ebpf asked by KVM, SIGNAL",
        [
            Some("ebpf-signal-unread/posted"),
            Some("ebpf-signal/posted"),
            Some("ebpf-signal-polled/posted"),
        ],
    ),
    (
        "ebpf asked by KVM, CONSUME",
        [
            None,
            Some("ebpf-consume/posted"),
            Some("ebpf-consume-polled/posted"),
        ],
    ),
    (
        "ioregionfd, purpose-made file",
        [
            Some("ioregionfd-mailbox-unread/posted"),
            Some("ioregionfd-mailbox/posted"),
            Some("ioregionfd-mailbox-polled/posted"),
        ],
    ),
    (
        "forward, stream",
        [None, Some("forward-stream/posted"), None],
    ),
];

/// What a doorbell costs, by what becomes of its value and who looks for it.
fn doorbells(run: &Results, label: &str) -> Table {
    let title = format!(
        "{label}Posted doorbells (mean vCPU time in ns, wake-ups and context switches each)"
    );
    let header = [
        "mechanism",
        ">nobody asleep",
        ">reader asleep",
        ">its wake-ups",
        ">switches",
        ">reader polls",
    ];
    let mut table = Table::new(&title, header);
    for (words, names) in DOORBELLS {
        let found = names.map(|name| usable(run, name?));
        if found.iter().all(Option::is_none) {
            continue;
        }
        let mean =
            |s: Option<&Scenario>| s.map_or("–".into(), |s| count(s.vcpu_ns.mean.round() as u64));
        let rate = |rate: Option<f64>| rate.map_or("–".into(), |rate| format!("{rate:.2}"));
        let [unread, asleep, polled] = found;
        let switches = asleep.and_then(|s| {
            let preempted = s.preemptions_per_access?;
            Some(s.voluntary_switches_per_access + preempted)
        });
        table.push([
            (*words).to_owned(),
            mean(unread),
            mean(asleep),
            rate(asleep.and_then(|s| s.wakeups_per_access)),
            rate(switches),
            mean(polled),
        ]);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::results::Boot;
    use crate::synthetic::{facts, in_boot, results, scenario};

    #[test]
    fn tables_are_for_runs_with_the_series_or_in_a_vm() {
        assert!(tables(&[results()]).is_empty());
        let mut native = results();
        native
            .scenarios
            .push(scenario("ioregionfd-stream/read", 1_000.0));
        assert_eq!(tables(&[native, results()]).len(), 2);
        let mut vm = in_boot(Boot::Counted);
        vm.provenance.vm = Some(facts(&[Boot::Counted]));
        assert_eq!(tables(&[vm]).len(), 2);
    }

    #[test]
    fn cell_is_compared_with_forward_on_the_same_transport_only() {
        let mut run = results();
        for name in ["ioregionfd-stream/read", "ioregionfd-mailbox/read"] {
            run.scenarios.push(scenario(name, 24_300.0));
        }
        let text = transports(&run, "").text();
        let line = |starts: &str| text.lines().find(|l| l.starts_with(starts)).unwrap();
        assert!(
            line("ioregionfd  stream ").contains("24,300 (0.50)"),
            "{text}"
        );
        let own = line("ioregionfd  purpose-made");
        assert!(own.contains("24,300 ") && !own.contains('('), "{text}");
    }

    #[test]
    fn wrong_rows_are_left_out() {
        let mut run = results();
        assert!(doorbells(&run, "").text().contains("value is lost"));
        for s in &mut run.scenarios {
            s.lost = 1;
        }
        assert!(doorbells(&run, "").is_empty() && transports(&run, "").is_empty());
    }
}
