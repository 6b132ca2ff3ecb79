//! Tables of one or several results files, and the README's copy of them.
//!
//! Everything is evaluated anew from the scenarios; ratios and claims that a
//! file carries are not trusted.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use thiserror::Error;

use crate::claims;
use crate::results::{Claim, Latency, Results, Scenario};
use crate::table::{Table, escape};

const BEGIN: &str = "<!-- results:begin -->";
const END: &str = "<!-- results:end -->";

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
    let tables = tables
        .iter()
        .filter(|t| !t.is_empty())
        .map(|table| match format {
            Format::Text => format!("\n{}", table.text()),
            // Long ones are folded.
            Format::Markdown if table.rows() > FOLDED => {
                let title = escape(table.title());
                let table = table.markdown();
                format!("<details><summary>{title}</summary>\n\n{table}\n</details>\n\n")
            }
            Format::Markdown => format!("{}\n", table.markdown()),
        });
    let notes = match format {
        Format::Text => notes(runs),
        Format::Markdown => String::new(),
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

/// `[1] ` before the columns of the first of several files; nothing for a single one.
fn label(runs: &[Results], index: usize) -> String {
    if runs.len() == 1 {
        String::new()
    } else {
        format!("[{}] ", index + 1)
    }
}

/// Columns of the scenario table that a terminal has no room for: the name says some of it.
const WIDE: [usize; 6] = [1, 3, 4, 8, 11, 17];

fn scenario_table(run: &Results, format: Format) -> Table {
    let kept = |column: &usize| format == Format::Markdown || !WIDE.contains(column);
    let header = [
        "scenario",
        "mechanism",
        "sink/transport/wait",
        "operation",
        "device",
        ">vCPUs",
        ">doorbells",
        ">p50",
        ">p90",
        ">p99",
        ">p99.9",
        ">max",
        ">mean",
        ">notify p50",
        ">CPU vCPU",
        ">CPU device",
        ">exits",
        ">switches",
        ">lost/dup/reord",
    ];
    let mut table = Table::new(
        "Scenarios (times in ns per access)",
        (0..)
            .zip(header)
            .filter(|(i, _)| kept(i))
            .map(|(_, name)| name),
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
        if s.wrong() > 0 {
            times.fill("withheld".into());
        }
        let what = [
            s.name.clone(),
            s.mechanism.clone(),
            via.join("/"),
            s.operation.clone(),
            s.placement.clone(),
        ];
        let counts = [count(s.vcpus.into()), count(s.doorbells.into())];
        let integrity = [s.lost, s.duplicated, s.reordered].map(count).join("/");
        let cells = what.into_iter().chain(counts).chain(times);
        let cells = (0..).zip(cells.chain([integrity]));
        table.push(cells.filter(|(i, _)| kept(i)).map(|(_, cell)| cell));
    }
    table
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

/// Without texts and notes on a terminal: they do not fit.
fn claim_table(runs: &[Results], format: Format) -> Table {
    let wide = format == Format::Markdown;
    let of_run = |i| {
        let names = [">measured", "verdict", "note"].into_iter();
        names.take(if wide { 3 } else { 2 }).map(move |name| {
            let (right, name) = name.split_at(usize::from(name.starts_with('>')));
            format!("{right}{}{name}", label(runs, i))
        })
    };
    let first = ["id", "claim", ">bar"].into_iter();
    let first = first
        .filter(|name| wide || *name != "claim")
        .map(str::to_owned);
    let mut table = Table::new("Claims", first.chain((0..runs.len()).flat_map(of_run)));
    let all: Vec<Vec<Claim>> = runs.iter().map(claims::evaluate).collect();
    for def in claims::applicable(runs) {
        let mut cells = vec![def.id.to_owned()];
        cells.extend(wide.then(|| def.text.to_owned()));
        cells.push(def.bar.to_string());
        for claims in &all {
            let c = claims.iter().find(|claim| claim.id == def.id);
            let measured = c.and_then(|c| Some(figure(c.value?, c.ci95)));
            cells.push(measured.unwrap_or("–".into()));
            cells.push(c.map_or("–", verdict).to_owned());
            cells.extend(wide.then(|| c.map_or(String::new(), |c| c.note.clone())));
        }
        table.push(cells);
    }
    table
}

fn verdict(claim: &Claim) -> &'static str {
    match (claim.holds, claim.value) {
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

/// Why the README was left as it was.
#[derive(Debug, Error)]
pub enum ReadmeError {
    /// The file could not be read or written.
    #[error("{}: {source}", .path.display())]
    Io {
        /// The README.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The results have no place to go.
    #[error("{}: needs one `{BEGIN}` line and, after it, one `{END}` line", .path.display())]
    Markers {
        /// The README.
        path: PathBuf,
    },
}

/// Replaces what stands between the markers `<!-- results:begin -->` and
/// `<!-- results:end -->` of a README by the Markdown report.
///
/// # Errors
/// The file cannot be read or written, or does not have each marker once, in order.
pub fn update_readme(path: &Path, runs: &[Results]) -> Result<(), ReadmeError> {
    let io = |source| ReadmeError::Io {
        path: path.into(),
        source,
    };
    let before = fs::read_to_string(path).map_err(io)?;
    let after = with_results(&before, &render(runs, Format::Markdown))
        .ok_or_else(|| ReadmeError::Markers { path: path.into() })?;
    if after != before {
        fs::write(path, after).map_err(io)?;
    }
    Ok(())
}

fn with_results(readme: &str, report: &str) -> Option<String> {
    let (head, rest) = readme.split_once(BEGIN)?;
    let (old, tail) = rest.split_once(END)?;
    let again = |text: &str| text.contains(BEGIN) || text.contains(END);
    if again(head) || again(old) || again(tail) {
        return None;
    }
    Some(format!("{head}{BEGIN}\n\n{}\n\n{END}{tail}", report.trim()))
}

#[cfg(test)]
mod tests;
