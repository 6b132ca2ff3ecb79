//! `cargo xtask fuzz`: the targets of `fuzz/`, built for libFuzzer and run.
//!
//! The same flags as cargo-fuzz's without a sanitizer, which any toolchain has: what is fuzzed is
//! safe code, so that there is nothing for a sanitizer to find. `cargo fuzz run NAME` works, too.

use std::path::{Path, PathBuf};
use std::process::Child;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};
use clap::Args;

use crate::progress::Progress;
use crate::sh::Cmd;

/// The package, its folder, and its targets.
pub const PACKAGE: &str = "ioregion-fuzz";
const FOLDER: &str = "fuzz";
const TARGETS: [&str; 4] = ["message", "nvme", "packed", "split"];

/// Named, so that build scripts and procedural macros do not get the flags.
const HOST: &str = "x86_64-unknown-linux-gnu";
/// Apart from other builds, whose flags differ.
const TARGET_DIR: &str = "target/fuzz";

/// Coverage of edges and of comparisons, and every check that a debug build has.
const FLAGS: [&str; 8] = [
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
    "-Cdebug-assertions",
    "-Coverflow-checks",
    "--cfg=fuzzing",
];

/// How long, and what.
#[derive(Debug, Args)]
pub struct FuzzArgs {
    /// Seconds for each target
    #[arg(long, value_name = "N", default_value = "60", value_parser = clap::value_parser!(u32).range(1..))]
    seconds: u32,
    /// Only this target (repeatable)
    #[arg(long = "target", value_name = "NAME", value_parser = TARGETS)]
    targets: Vec<String>,
    /// Seed of the first target's random numbers; others count on (default: the time)
    #[arg(long, value_name = "SEED", value_parser = clap::value_parser!(u32).range(1..))]
    seed: Option<u32>,
    /// Then put the smallest set of inputs that covers as much into the repository's corpus
    #[arg(long)]
    keep: bool,
}

/// Builds the targets and runs them, one on each CPU at a time; an error where one finds something.
pub fn run(root: &Path, args: &FuzzArgs) -> Result<()> {
    build(root)?;
    let chosen = |name: &&str| args.targets.is_empty() || args.targets.iter().any(|t| t == name);
    let seed = args.seed.unwrap_or_else(|| {
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        now.map_or(1, |now| now.subsec_nanos() | 1)
    });
    let chosen: Vec<(&str, u32)> = TARGETS.into_iter().filter(chosen).zip(seed..).collect();
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    let mut wrong = Vec::new();
    for some in chosen.chunks(cpus) {
        let fuzzers: Result<Vec<Fuzzer>> = some
            .iter()
            .map(|&(name, seed)| Fuzzer::start(root, name, args.seconds, seed))
            .collect();
        let mut fuzzers = fuzzers?;
        wait(&mut fuzzers)?;
        for fuzzer in &mut fuzzers {
            wrong.extend(fuzzer.finding(root)?);
        }
    }
    if !wrong.is_empty() {
        bail!("{}", wrong.join("\n"));
    }
    if args.keep {
        for (name, _) in chosen {
            keep(root, name)?;
        }
    }
    Ok(())
}

fn build(root: &Path) -> Result<()> {
    Cmd::line("cargo build --release --bins --package")
        .arg(PACKAGE)
        .args(["--target", HOST, "--target-dir", TARGET_DIR])
        .env("RUSTFLAGS", FLAGS.join(" "))
        // Which line it was.
        .env("CARGO_PROFILE_RELEASE_DEBUG", "line-tables-only")
        .dir(root)
        .run()
}

/// The program of a target; it works in the repository's root.
fn program(root: &Path, name: &str) -> Cmd {
    let program = Path::new(TARGET_DIR).join(HOST).join("release").join(name);
    Cmd::new(root.join(program)).dir(root)
}

/// The inputs in the repository, and those found here, of which the first ones are kept.
fn corpora(name: &str) -> [String; 2] {
    [
        format!("{FOLDER}/corpus/{name}"),
        format!("{TARGET_DIR}/corpus/{name}"),
    ]
}

fn make(root: &Path, folder: &str) -> Result<()> {
    let folder = root.join(folder);
    std::fs::create_dir_all(&folder).with_context(|| format!("making {}", folder.display()))
}

/// A target that runs.
struct Fuzzer {
    name: &'static str,
    seed: u32,
    child: Child,
    log: PathBuf,
}

impl Fuzzer {
    fn start(root: &Path, name: &'static str, seconds: u32, seed: u32) -> Result<Self> {
        println!("fuzzing {name} for {seconds} s, seed {seed}");
        let [kept, found] = corpora(name);
        for folder in [&found, &artifacts(name)] {
            make(root, folder)?;
        }
        let log = root.join(TARGET_DIR).join(format!("{name}.log"));
        let child = program(root, name)
            // New inputs go to the first folder.
            .args([&found, &kept])
            .arg(format!("-max_total_time={seconds}"))
            .arg(format!("-seed={seed}"))
            .arg(format!("-artifact_prefix={}", artifacts(name)))
            .args(["-timeout=20", "-rss_limit_mb=1024", "-print_final_stats=1"])
            .tied_to_us()
            .spawn(&log)?;
        Ok(Self {
            name,
            seed,
            child,
            log,
        })
    }

    fn runs(&mut self) -> Result<bool> {
        let ended = self.child.try_wait().context("waiting for a fuzzer")?;
        Ok(ended.is_none())
    }

    /// Prints how it ended, and returns what it has found.
    fn finding(&mut self, root: &Path) -> Result<Option<String>> {
        const LINES: usize = 12;
        let Self {
            name, seed, log, ..
        } = self;
        let status = self.child.wait().context("waiting for a fuzzer")?;
        let text = std::fs::read(&log).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let lines: Vec<&str> = text.lines().collect();
        println!("\n{name}: {status}; {}", log.display());
        for line in lines.iter().skip(lines.len().saturating_sub(LINES)) {
            println!("| {line}");
        }
        Ok((!status.success()).then(|| {
            format!(
                "{name} has found something (seed {seed}); the input lies in {}: `{} FILE` plays \
                 it again",
                artifacts(name),
                program(root, name)
            )
        }))
    }
}

/// Where inputs with findings go.
fn artifacts(name: &str) -> String {
    format!("{FOLDER}/artifacts/{name}/")
}

/// Waits until all have ended.
fn wait(fuzzers: &mut [Fuzzer]) -> Result<()> {
    let names: Vec<&str> = fuzzers.iter().map(|fuzzer| fuzzer.name).collect();
    let mut progress = Progress::new(&names.join(" and "));
    for fuzzer in fuzzers {
        while fuzzer.runs()? {
            progress.tick(String::new);
            std::thread::sleep(Duration::from_millis(100));
        }
    }
    Ok(())
}

/// Replaces a target's corpus in the repository.
fn keep(root: &Path, name: &str) -> Result<()> {
    let [kept, found] = corpora(name);
    let merged = format!("{TARGET_DIR}/merged/{name}");
    let fresh = root.join(&merged);
    if fresh.exists() {
        std::fs::remove_dir_all(&fresh).with_context(|| format!("emptying {merged}"))?;
    }
    make(root, &merged)?;
    program(root, name)
        .arg("-set_cover_merge=1")
        .args([&merged, &kept, &found])
        .run()?;
    let kept = root.join(kept);
    let replace = || -> std::io::Result<usize> {
        for entry in std::fs::read_dir(&kept)? {
            std::fs::remove_file(entry?.path())?;
        }
        let mut inputs = 0;
        for entry in std::fs::read_dir(&fresh)? {
            let entry = entry?;
            std::fs::copy(entry.path(), kept.join(entry.file_name()))?;
            inputs += 1;
        }
        Ok(inputs)
    };
    match replace().with_context(|| format!("filling {}", kept.display()))? {
        0 => bail!("nothing was kept of {name}"),
        inputs => println!("{}: {inputs} inputs", kept.display()),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_target_has_a_program_and_a_corpus() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("..")
            .join(FOLDER);
        let names = |part: &str| {
            let mut names: Vec<String> = std::fs::read_dir(folder.join(part))
                .unwrap()
                .map(|entry| entry.unwrap().path())
                .map(|path| path.file_stem().unwrap().to_string_lossy().into_owned())
                .collect();
            names.sort();
            names
        };
        assert_eq!(names("fuzz_targets"), TARGETS);
        assert_eq!(names("corpus"), TARGETS);
    }
}
