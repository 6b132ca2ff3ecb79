//! `ioregion-bench`: measures and reports what carrying a guest access costs.

use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{ArgGroup, Args, Parser, Subcommand};
use ioregion_bench::assemble::assemble;
use ioregion_bench::compare;
use ioregion_bench::report::{self, Format};
use ioregion_bench::results::{Boot, Mode, Provenance, Results, VmFacts};
use ioregion_bench::vduse::Disks;
use ioregion_bench::{plot, report::update_readme};

mod doctor;
mod floors;
mod load;
mod payload;
mod run;
mod scenarios;

/// Measures what carrying one guest access costs, per mechanism.
#[derive(Debug, Parser)]
#[command(version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Measure this host; writes results and plots, and prints the tables.
    Run(RunArgs),
    /// Tables and plots of one or several results files.
    Report {
        /// Results files; absolute times of different files are never mixed.
        #[arg(required = true)]
        files: Vec<PathBuf>,
        /// Print Markdown instead of aligned text.
        #[arg(long)]
        markdown: bool,
        /// Replace the results section of this README.
        #[arg(long, value_name = "FILE")]
        readme: Option<PathBuf>,
        /// Write SVG and PNG plots into this folder.
        #[arg(long, value_name = "DIR")]
        plots: Option<PathBuf>,
    },
    /// Whether two runs gave the same figures; exit 1 where they did not.
    ///
    /// For runs in which time was counted: wall time never repeats that well.
    Compare {
        /// Results of one run.
        one: PathBuf,
        /// Results of another.
        other: PathBuf,
        /// Largest difference that is allowed, in percent.
        #[arg(long, value_name = "PERCENT", default_value_t = 0.1)]
        within: f64,
    },
    /// One results file of what the boots of a VM measured; prints its tables.
    #[command(hide = true)]
    Assemble(AssembleArgs),
    /// Measure disks over VDUSE: run by `cargo xtask bench --vduse` in a VM.
    #[command(hide = true)]
    Disks(load::LoadArgs),
    /// The table of disks that were measured in a VM.
    #[command(hide = true)]
    ReportDisks(ReportDisksArgs),
    /// What this host offers, with the reason for each "no".
    Doctor,
    /// Serve a device handed over standard input.
    #[command(hide = true)]
    Device,
}

#[derive(Debug, Args)]
#[command(group = ArgGroup::new("length"))]
struct RunArgs {
    /// Under two minutes (the default).
    #[arg(long, group = "length")]
    quick: bool,
    /// All scenarios, as long as it takes.
    #[arg(long, group = "length")]
    full: bool,
    /// Each mechanism for a moment; the figures mean nothing.
    #[arg(long, group = "length")]
    smoke: bool,
    /// Only the scenario of this name, else those that contain it; may be given more than once.
    #[arg(long, value_name = "TEXT")]
    filter: Vec<String>,
    /// Seed of the statistics.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Rounds; each measures every scenario once.
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..=4096))]
    rounds: Option<u16>,
    /// In a VM: measure what that kind of boot is good for (counted, parallel) and leave the figures
    /// in $IOREGION_RESULTS, for `ioregion-bench assemble`.
    #[arg(long, value_name = "KIND", hide = true)]
    boot: Option<Boot>,
    /// Exit with 1 where a claim does not hold or an access went wrong.
    #[arg(long)]
    check: bool,
    /// Folder of results and plots.
    #[arg(long, value_name = "DIR", default_value = "target/bench")]
    out: PathBuf,
}

#[derive(Debug, Args)]
struct AssembleArgs {
    /// Results of the counted boot.
    counted: PathBuf,
    /// Results of the parallel boot.
    parallel: Option<PathBuf>,
    /// Facts about the VM, as JSON.
    #[arg(long, value_name = "FILE")]
    facts: PathBuf,
    /// What the files are called.
    #[arg(long, value_name = "NAME")]
    name: String,
    /// Folder of results and plots.
    #[arg(long, value_name = "DIR", default_value = "target/bench")]
    out: PathBuf,
    /// Exit with 1 where a claim does not hold.
    #[arg(long)]
    check: bool,
}

#[derive(Debug, Args)]
struct ReportDisksArgs {
    /// Results.
    #[arg(required = true)]
    files: Vec<PathBuf>,
    /// Facts about the VM that they come from, as JSON: the results are kept in the folder of
    /// results, as of the revision here.
    #[arg(long, value_name = "FILE")]
    facts: Option<PathBuf>,
    /// Print Markdown instead of aligned text.
    #[arg(long)]
    markdown: bool,
    /// Replace the section about disks of this README.
    #[arg(long, value_name = "FILE")]
    readme: Option<PathBuf>,
    /// Folder of results.
    #[arg(long, value_name = "DIR", default_value = "target/bench")]
    out: PathBuf,
    /// Exit with 1 where a claim does not hold.
    #[arg(long)]
    check: bool,
}

fn main() -> ExitCode {
    tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::from_default_env())
        .with_writer(io::stderr)
        .init();
    match execute(Cli::parse().command) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn execute(command: Command) -> Result<ExitCode> {
    match command {
        Command::Run(args) => measure(args),
        Command::Report {
            files,
            markdown,
            readme,
            plots,
        } => {
            let runs = files
                .iter()
                .map(|path| Results::load(path))
                .collect::<Result<Vec<_>, _>>()?;
            let format = if markdown {
                Format::Markdown
            } else {
                Format::Text
            };
            print(&report::render(&runs, format))?;
            if let Some(readme) = readme {
                update_readme(&readme, &runs).context("README not updated")?;
            }
            if let Some(folder) = plots {
                for path in plot::write_all(&runs, &folder).context("plots not written")? {
                    eprintln!("wrote {}", path.display());
                }
            }
            Ok(ExitCode::SUCCESS)
        }
        Command::Compare { one, other, within } => {
            let comparison = compare::compare(&Results::load(&one)?, &Results::load(&other)?);
            print(&comparison.report())?;
            Ok(match comparison.is_within(within / 100.0) {
                true => ExitCode::SUCCESS,
                false => {
                    eprintln!("failed: the runs are not the same to within {within} %");
                    ExitCode::FAILURE
                }
            })
        }
        Command::Assemble(args) => put_together(args),
        Command::Disks(args) => load::run(&args).map(|()| ExitCode::SUCCESS),
        Command::ReportDisks(args) => report_disks(&args),
        Command::Doctor => {
            print(&doctor::table().text())?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Device => run::device_process().map(|()| ExitCode::SUCCESS),
    }
}

fn measure(args: RunArgs) -> Result<ExitCode> {
    let mode = match (args.smoke, args.full) {
        (true, _) => Mode::Smoke,
        (_, true) => Mode::Full,
        _ => Mode::Quick,
    };
    let out = match (args.boot, std::env::var_os("IOREGION_RESULTS")) {
        (Some(_), Some(folder)) => folder.into(),
        _ => args.out,
    };
    let options = run::Options {
        mode,
        filter: args.filter,
        seed: args.seed,
        rounds: args.rounds.map(usize::from),
        out,
        boot: args.boot,
    };
    let (results, files) = run::run(&options)?;
    if args.boot.is_some() {
        print(&format!("{} rows measured\n", results.scenarios.len()))?;
        let failed = failed_rows(&results);
        // A guest hangs now and then where CPUs run at the same time: another attempt, then. In
        // counted time it would fail again, and the report says why.
        let again = args.boot == Some(Boot::Parallel) && !failed.is_empty();
        return Ok(verdict(if again { &failed } else { &[] }));
    }
    print(&report::render(
        std::slice::from_ref(&results),
        Format::Text,
    ))?;
    let names: Vec<_> = files
        .iter()
        .map(|file| file.display().to_string())
        .collect();
    print(&format!("\nresults and plots: {}\n", names.join(" ")))?;
    if mode == Mode::Smoke {
        print("A smoke run shows that everything works; its figures mean nothing.\n")?;
    }
    Ok(verdict(&failures(&results, mode, args.check)))
}

/// Makes one run of what a VM's boots measured.
fn put_together(args: AssembleArgs) -> Result<ExitCode> {
    let facts =
        std::fs::read(&args.facts).with_context(|| format!("reading {}", args.facts.display()))?;
    let facts = serde_json::from_slice(&facts)
        .with_context(|| format!("{}: not facts about a VM", args.facts.display()))?;
    let counted = Results::load(&args.counted)?;
    let parallel = args.parallel.as_deref().map(Results::load).transpose()?;
    let (mode, seed, rounds) = {
        let measured = &counted.provenance;
        (measured.mode, measured.seed, measured.rounds)
    };
    let here = Provenance::gather(mode, seed, rounds);
    let results = assemble(counted, parallel, facts, here)?;
    print(&report::render(
        std::slice::from_ref(&results),
        Format::Text,
    ))?;
    let date = results.provenance.date.replace(':', "");
    let mut files = Vec::new();
    for name in [args.name.clone(), format!("{}-{date}", args.name)] {
        let path = args.out.join(format!("{name}.json"));
        results.save(&path)?;
        files.push(path);
    }
    let plots = plot::write_all(std::slice::from_ref(&results), &args.out.join(&args.name));
    files.extend(plots.context("plots not written")?);
    let names: Vec<_> = files
        .iter()
        .map(|file| file.display().to_string())
        .collect();
    print(&format!("\nresults and plots: {}\n", names.join(" ")))?;
    Ok(verdict(&failures(&results, mode, args.check)))
}

/// Prints, and where facts are given keeps, what was measured of disks.
fn report_disks(args: &ReportDisksArgs) -> Result<ExitCode> {
    let runs = args.files.iter().map(|file| Disks::load(file));
    let mut runs: Vec<Disks> = runs.collect::<Result<_, _>>()?;
    if let Some(path) = &args.facts {
        let facts = std::fs::read(path).with_context(|| format!("reading {}", path.display()))?;
        let facts: VmFacts = serde_json::from_slice(&facts)
            .with_context(|| format!("{}: not facts about a VM", path.display()))?;
        for disks in &mut runs {
            let measured = &disks.provenance;
            disks.provenance = Provenance {
                profile: measured.profile.clone(),
                vm: Some(facts.clone()),
                ..Provenance::gather(measured.mode, measured.seed, measured.rounds)
            };
        }
    }
    let format = match args.markdown {
        true => Format::Markdown,
        false => Format::Text,
    };
    for disks in &mut runs {
        disks.complete();
        print(&format!("{}\n", disks.render(format)))?;
        if args.facts.is_some() {
            let date = disks.provenance.date.replace(':', "");
            for file in ["disks.json".into(), format!("disks-{date}.json")] {
                let path = args.out.join(file);
                disks.save(&path)?;
                print(&format!("results: {}\n", path.display()))?;
            }
        }
    }
    if let Some(readme) = &args.readme {
        report::update_disks(readme, &runs).context("README not updated")?;
    }
    let claims = runs.iter().flat_map(|disks| &disks.claims);
    let failed: Vec<String> = claims
        .filter(|claim| args.check && claim.holds != Some(true))
        .map(|claim| format!("claim {} ({})", claim.id, claim.note))
        .collect();
    Ok(verdict(&failed))
}

/// The rows that could not be measured, with the reason.
fn failed_rows(results: &Results) -> Vec<String> {
    let is_row = |name: &str| scenarios::ROWS.iter().any(|row| row.name == name);
    let failed = results.mechanisms.iter();
    let failed = failed.filter(|m| !m.available && is_row(&m.name));
    failed
        .map(|m| format!("{}: {}", m.name, m.reason))
        .collect()
}

/// Prints the failures.
fn verdict(failures: &[String]) -> ExitCode {
    for failure in failures {
        eprintln!("failed: {failure}");
    }
    match failures.is_empty() {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    }
}

/// What makes the run a failure: with `check`, each claim that was not shown to hold; in a smoke
/// run, which shows that everything works, each row or mechanism that could
/// not be measured or went wrong.
fn failures(results: &Results, mode: Mode, check: bool) -> Vec<String> {
    let claims = results
        .claims
        .iter()
        .filter(|claim| check && claim.bar.is_some() && claim.holds != Some(true))
        .filter(|claim| !claim.not_applicable);
    let claims = claims.map(|claim| format!("claim {} ({})", claim.id, claim.note));
    // Rows, and mechanisms that have rows, but for what no released kernel has.
    let has_rows = |name: &str| {
        let rows = scenarios::ROWS.iter();
        let mut rows = rows.filter(|row| !row.needs_patches());
        rows.any(|row| row.name == name || row.carrier.name() == name)
    };
    let rows = results
        .mechanisms
        .iter()
        .filter(|m| mode == Mode::Smoke && !m.available && has_rows(&m.name));
    let rows = rows.map(|m| format!("{}: {}", m.name, m.reason));
    let wrong = results
        .scenarios
        .iter()
        .filter(|s| mode == Mode::Smoke && s.wrong() > 0);
    let wrong = wrong.map(|s| format!("{}: {} accesses went wrong", s.name, s.wrong()));
    claims.chain(rows).chain(wrong).collect()
}

fn print(text: &str) -> Result<()> {
    io::stdout()
        .write_all(text.as_bytes())
        .context("report not printed")
}
