//! Tables of one or several results files, and the README's copy of them.
//!
//! Everything is evaluated anew from the scenarios; ratios and claims that a
//! file carries are not trusted.

mod native;
mod readme;

use crate::claims;
use crate::results::{Boot, Claim, Latency, Results, Scenario};
use crate::table::{Table, escape};

pub use readme::{ReadmeError, update_disks, update_readme};

/// Rows of a Markdown table that is shown unfolded.
const FOLDED: usize = 20;

/// How a report is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// Aligned columns for a terminal.
    Text,
    /// GitHub's Markdown.
    Markdown,
}

/// The whole report: where the figures come from, scenarios, ratios, claims.
/// Absolute times of several files stand in columns of their own and are never
/// set against each other.
pub fn render(runs: &[Results], format: Format) -> String {
    let tables = [
        claim_table(runs, format),
        match runs {
            [run] => scenario_table(run, format),
            runs => scenario_blocks(runs),
        },
        ratio_table(runs),
        mechanism_table(runs),
    ];
    let native = native::tables(runs);
    let [claims, rest @ ..] = &tables;
    let tables = std::iter::once(claims).chain(&native).chain(rest);
    let sources = runs.iter().enumerate().map(|(index, run)| {
        let line = format!("{}: {}", run.provenance.line(), run.host.line());
        match format {
            Format::Text => format!(
                "{}{}\n",
                label(runs, index),
                line.replace(char::is_control, "?")
            ),
            Format::Markdown => format!("{}{}\n\n", escape(&label(runs, index)), escape(&line)),
        }
    });
    let tables = tables.filter(|t| !t.is_empty()).map(|table| match format {
        Format::Text => format!("\n{}", table.text()),
        // Long ones are folded.
        Format::Markdown if table.rows() > FOLDED => {
            let title = escape(table.title());
            let table = table.markdown();
            format!("<details><summary>{title}</summary>\n\n{table}\n</details>\n\n")
        }
        Format::Markdown => format!("{}\n", table.markdown()),
    });
    let notes = match (format, runs) {
        (Format::Text, _) => notes(runs),
        // They stand in the table.
        (Format::Markdown, [_]) => String::new(),
        (Format::Markdown, _) => folded_notes(runs),
    };
    sources.chain(tables).chain([notes]).collect()
}

/// What to read beside the claims: lines, where a column would not fit.
fn notes(runs: &[Results]) -> String {
    let mut lines = String::new();
    for (index, run) in runs.iter().enumerate() {
        for claim in claims::evaluate(run).iter().filter(|c| !c.note.is_empty()) {
            let line = format!("  {}{}: {}", label(runs, index), claim.id, claim.note);
            lines += &format!("{}\n", line.replace(char::is_control, "?"));
        }
    }
    if !lines.is_empty() {
        lines.insert_str(0, "\nNotes on the claims\n");
    }
    lines
}

/// The same, in Markdown and out of the way.
fn folded_notes(runs: &[Results]) -> String {
    let notes = notes(runs);
    let lines = notes.lines().filter_map(|line| line.strip_prefix("  "));
    let lines: Vec<String> = lines.map(|line| format!("- {}\n", escape(line))).collect();
    if lines.is_empty() {
        return String::new();
    }
    let lines = lines.concat();
    format!("<details><summary>Notes on the claims</summary>\n\n{lines}\n</details>\n")
}

/// `[1] ` before the columns of the first of several files; nothing for a single one.
fn label(runs: &[Results], index: usize) -> String {
    if runs.len() == 1 {
        String::new()
    } else {
        format!("[{}] ", index + 1)
    }
}

/// Where a column of the scenario table is shown.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Shown {
    Always,
    /// Not on a terminal, which has no room for it: the name says some of it.
    Wide,
    /// Only in runs in a VM.
    Vm,
}

const COLUMNS: [(&str, Shown); 22] = [
    ("scenario", Shown::Always),
    ("mechanism", Shown::Wide),
    ("boot", Shown::Vm),
    ("sink/transport/wait", Shown::Always),
    ("operation", Shown::Wide),
    ("device", Shown::Wide),
    (">vCPUs", Shown::Always),
    (">doorbells", Shown::Always),
    (">p50", Shown::Always),
    (">p90", Shown::Wide),
    (">p99", Shown::Always),
    (">p99.9", Shown::Always),
    (">max", Shown::Wide),
    (">mean", Shown::Always),
    (">notify p50", Shown::Always),
    (">CPU vCPU", Shown::Always),
    (">CPU device", Shown::Always),
    (">exits", Shown::Always),
    (">switches", Shown::Wide),
    (">preempted", Shown::Wide),
    (">wake-ups", Shown::Wide),
    (">lost/dup/reord", Shown::Always),
];

fn scenario_table(run: &Results, format: Format) -> Table {
    let kept = |at: usize| match COLUMNS[at].1 {
        Shown::Always => true,
        Shown::Wide => format == Format::Markdown,
        Shown::Vm => run.provenance.vm.is_some(),
    };
    let shown = |cells: Vec<String>| (0..).zip(cells).filter(|(at, _)| kept(*at)).map(|(_, c)| c);
    let header = COLUMNS.iter().map(|(name, _)| (*name).to_owned());
    let mut table = Table::new(
        "Scenarios (times in ns per access)",
        shown(header.collect()),
    );
    for s in &run.scenarios {
        let via = [&s.sink, &s.transport, &s.wait].map(|part| part.as_deref().unwrap_or("–"));
        let Latency {
            p50,
            p90,
            p99,
            p999,
            max,
            mean,
        } = s.vcpu_ns;
        let mut times = [p50, p90, p99, p999, max].map(count).to_vec();
        times.push(count(mean.round() as u64));
        times.push(s.notify_ns.map_or("–".into(), |n| count(n.p50)));
        times.extend(
            [s.cpu_ns_per_access.vcpu, s.cpu_ns_per_access.device]
                .map(|ns| count(ns.round() as u64)),
        );
        times.extend([s.exits_per_access, s.voluntary_switches_per_access].map(per_access));
        let optional = [s.preemptions_per_access, s.wakeups_per_access];
        times.extend(optional.map(|rate| rate.map_or("–".into(), per_access)));
        if s.wrong() > 0 {
            times.fill("withheld".into());
        }
        let mut cells = vec![
            s.name.clone(),
            s.mechanism.clone(),
            boot_name(s.boot),
            via.join("/"),
            s.operation.clone(),
            s.placement.clone(),
        ];
        cells.extend([count(s.vcpus.into()), count(s.doorbells.into())]);
        cells.extend(times);
        cells.push([s.lost, s.duplicated, s.reordered].map(count).join("/"));
        table.push(shown(cells));
    }
    table
}

/// The boot of a VM that a figure comes from.
fn boot_name(boot: Option<Boot>) -> String {
    boot.map_or("–", Boot::name).into()
}

/// One block of columns per file, one row per scenario of any file.
fn scenario_blocks(runs: &[Results]) -> Table {
    let columns = ["p50", "p99", "mean", "notify p50", "CPU", "exits"];
    let header = (0..runs.len()).flat_map(|i| columns.map(|name| format!(">[{}] {name}", i + 1)));
    let mut table = Table::new(
        "Scenarios (times in ns per access; compare them within one block only)",
        std::iter::once("scenario".to_owned()).chain(header),
    );
    let names = distinct(
        runs.iter()
            .flat_map(|run| run.scenarios.iter().map(|s| s.name.as_str())),
    );
    for name in names {
        let cells = runs.iter().flat_map(|run| match run.scenario(name) {
            None => columns.map(|_| "–".to_owned()),
            Some(s) if s.wrong() > 0 => columns.map(|_| "withheld".to_owned()),
            Some(s) => block(s),
        });
        table.push(std::iter::once(name.to_owned()).chain(cells));
    }
    table
}

fn block(s: &Scenario) -> [String; 6] {
    [
        count(s.vcpu_ns.p50),
        count(s.vcpu_ns.p99),
        count(s.vcpu_ns.mean.round() as u64),
        s.notify_ns.map_or("–".into(), |n| count(n.p50)),
        count(s.cpu_ns_per_access.total().round() as u64),
        per_access(s.exits_per_access),
    ]
}

fn ratio_table(runs: &[Results]) -> Table {
    let all: Vec<_> = runs.iter().map(claims::ratios).collect();
    let header = (0..runs.len()).map(|i| format!(">{}ratio (95 % interval)", label(runs, i)));
    let mut table = Table::new(
        "Ratios of vCPU time per access, paired within rounds",
        ["scenario".to_owned(), "over".to_owned()]
            .into_iter()
            .chain(header),
    );
    let pairs = all
        .iter()
        .flatten()
        .map(|r| (r.numerator.as_str(), r.denominator.as_str()));
    for (of, over) in distinct(pairs) {
        let cells = all.iter().map(|ratios| {
            match ratios
                .iter()
                .find(|r| r.numerator == of && r.denominator == over)
            {
                Some(r) => r
                    .value
                    .map_or_else(|| r.note.clone(), |value| figure(value, r.ci95)),
                None => "–".into(),
            }
        });
        table.push([of.to_owned(), over.to_owned()].into_iter().chain(cells));
    }
    table
}

/// Without texts and notes on a terminal: they do not fit. Nor do the notes of several runs.
fn claim_table(runs: &[Results], format: Format) -> Table {
    let wide = format == Format::Markdown;
    let noted = wide && runs.len() == 1;
    let of_run = |(i, run): (usize, &Results)| {
        let mut names = vec![format!(">{}{}", label(runs, i), measured_on(runs, run))];
        names.push(format!("{}verdict", label(runs, i)));
        if run.provenance.vm.is_some() {
            names.push(format!("{}boot", label(runs, i)));
        }
        names.extend(noted.then(|| "note".into()));
        names
    };
    let first = ["id", "claim", ">bar"].into_iter();
    let first = first
        .filter(|name| wide || *name != "claim")
        .map(str::to_owned);
    let header = first.chain(runs.iter().enumerate().flat_map(of_run));
    let mut table = Table::new("Claims", header);
    let all: Vec<Vec<Claim>> = runs.iter().map(claims::evaluate).collect();
    for def in claims::applicable(runs) {
        let mut cells = vec![def.id.to_owned()];
        cells.extend(wide.then(|| def.text.to_owned()));
        cells.push(def.bar.to_string());
        for (run, claims) in runs.iter().zip(&all) {
            let c = claims.iter().find(|claim| claim.id == def.id);
            let measured = c.and_then(|c| Some(figure(c.value?, c.ci95)));
            cells.push(measured.unwrap_or("–".into()));
            cells.push(c.map_or("–", verdict).to_owned());
            if run.provenance.vm.is_some() {
                cells.push(boot_name(c.and_then(|c| c.boot)));
            }
            cells.extend(noted.then(|| c.map_or(String::new(), |c| c.note.clone())));
        }
        table.push(cells);
    }
    table
}

/// The head of a run's column: of several, with what it was measured on.
fn measured_on(runs: &[Results], run: &Results) -> String {
    match (runs.len(), &run.provenance.vm) {
        (1, _) => "measured".into(),
        (_, Some(vm)) => format!("measured in a {}", vm.short()),
        (_, None) => format!("measured on a machine, KVM {}", run.host.kvm.kind.name()),
    }
}

fn verdict(claim: &Claim) -> &'static str {
    match (claim.holds, claim.value) {
        _ if claim.not_applicable => "not applicable",
        (Some(true), _) => "holds",
        (Some(false), _) => "MISS",
        (None, Some(_)) => "printed",
        (None, None) => "no verdict",
    }
}

/// Only what a host lacks, with its reason.
fn mechanism_table(runs: &[Results]) -> Table {
    let mut table = Table::new("Not available", ["mechanism", "reason"]);
    for (index, run) in runs.iter().enumerate() {
        for m in run.mechanisms.iter().filter(|m| !m.available) {
            table.push([
                format!("{}{}", label(runs, index), m.name),
                m.reason.clone(),
            ]);
        }
    }
    table
}

fn distinct<T: PartialEq>(items: impl Iterator<Item = T>) -> Vec<T> {
    items.fold(Vec::new(), |mut seen, item| {
        if !seen.contains(&item) {
            seen.push(item);
        }
        seen
    })
}

/// `1,234,567`.
fn count(n: u64) -> String {
    let digits = n.to_string();
    let groups: Vec<&str> = digits
        .as_bytes()
        .rchunks(3)
        .rev()
        .map(|g| std::str::from_utf8(g).unwrap_or_default())
        .collect();
    groups.join(",")
}

/// A rate that must not be rounded to zero unless it is.
fn per_access(rate: f64) -> String {
    if rate == 0.0 || rate >= 0.001 {
        format!("{rate:.3}")
    } else {
        format!("{rate:.0e}")
    }
}

fn figure(value: f64, ci95: Option<[f64; 2]>) -> String {
    let digits = |v: f64| {
        if v == v.trunc() && ci95.is_none() {
            format!("{v}")
        } else {
            format!("{v:.3}")
        }
    };
    match ci95 {
        Some([low, high]) => format!("{} ({} to {})", digits(value), digits(low), digits(high)),
        None if value != 0.0 && value.abs() < 0.001 => format!("{value:.0e}"),
        None => digits(value),
    }
}

#[cfg(test)]
mod tests;
