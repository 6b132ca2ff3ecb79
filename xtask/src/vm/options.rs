//! The command line of `cargo xtask vm`.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::{Args, Parser, ValueEnum};

use super::VM_PACKAGES;
use super::accelerator::Choice;
use super::plants::Plant;
use crate::kernel::Variant;

/// Test programs that take minutes and are about the guest itself, not about the kernel: only by
/// name or with `--full`.
const SELDOM: [&str; 1] = ["accesses"];

/// Tests, by a part of their names, that spoil traces to prove the suite's checker, which is the
/// same on every kernel.
const OF_THE_CHECKER: [&str; 2] = ["the_checker_reports_each", "is_found_out"];

/// Which kernel to boot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum KernelChoice {
    /// Debian's packaged 6.12 cloud kernel, fetched once into the cache
    Stock,
    /// The patched kernel, built where it is not in the cache
    Patched,
    /// The patched kernel with lock and memory checkers
    Debug,
    /// A newer kernel (7.3), without patches: what VDUSE has there
    Next,
}

impl KernelChoice {
    /// The word on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Stock => "stock",
            Self::Patched => "patched",
            Self::Debug => "debug",
            Self::Next => "next",
        }
    }

    /// How it is built; `None` where it is fetched as it is.
    pub fn variant(self) -> Option<Variant> {
        match self {
            Self::Stock => None,
            Self::Patched => Some(Variant::Patched),
            Self::Debug => Some(Variant::Debug),
            Self::Next => Some(Variant::Next),
        }
    }

    /// Whether it has our patches.
    pub fn has_patches(self) -> bool {
        matches!(self, Self::Patched | Self::Debug)
    }
}

/// What to boot and what to run in it.
#[derive(Debug, Clone, Args)]
pub struct VmArgs {
    /// Which kernel
    #[arg(long, value_enum, default_value = "stock")]
    pub kernel: KernelChoice,
    /// Another kernel: a bzImage with everything built in that an initramfs needs
    #[arg(long, value_name = "FILE", conflicts_with = "kernel")]
    pub image: Option<PathBuf>,
    /// Only this test program (repeatable; default: all of the conformance suite, the loader's
    /// and the guests')
    #[arg(long = "test", value_name = "NAME")]
    pub tests: Vec<String>,
    /// Run no test programs: boot, report and power off
    #[arg(long, conflicts_with = "tests")]
    pub empty: bool,
    /// Run this static program instead of the test programs (repeatable; with --test: after
    /// them). Words behind the file are its own arguments; those after -- go to every program
    #[arg(long, value_name = "FILE ARGUMENTS")]
    pub exec: Vec<String>,
    /// Do all that the long tests do; otherwise an emulated VM does a part of it
    #[arg(long)]
    pub full: bool,
    /// Instead of running programs, plant this fault and show that it is noticed (repeatable)
    #[arg(long, value_enum, value_name = "FAULT", conflicts_with_all = ["tests", "exec", "empty"])]
    plant: Vec<Plant>,
    /// Plant every fault that the kernel can have, each in a VM of its own
    #[arg(long, conflicts_with_all = ["plant", "tests", "exec", "empty"])]
    plants: bool,
    /// Where to put the files that programs leave in $IOREGION_RESULTS (default: the folder
    /// results beside the logs)
    #[arg(long, value_name = "FOLDER")]
    pub results: Option<PathBuf>,
    /// Pack a program of this machine with its libraries, for tests that start it (repeatable)
    #[arg(long = "tool", value_name = "NAME")]
    pub tools: Vec<String>,
    /// Put a file of this machine at a path of the VM (repeatable)
    #[arg(long = "file", value_name = "FILE=PATH")]
    pub files: Vec<String>,
    /// Load a further module of the stock kernel (repeatable)
    #[arg(long = "module", value_name = "NAME")]
    pub modules: Vec<String>,
    /// Set a variable for all programs (repeatable)
    #[arg(long, value_name = "NAME=VALUE")]
    pub env: Vec<String>,
    /// Virtual CPUs (default: 2; with --icount 1)
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=8))]
    pub cpus: Option<u32>,
    /// Emulated VMs that share the programs (default: one for each CPU and the memory of this
    /// machine)
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=16))]
    pub vms: Option<u8>,
    /// Memory of a VM in MiB
    #[arg(long, value_name = "MIB", default_value = "2048", value_parser = clap::value_parser!(u32).range(256..))]
    pub mem: u32,
    /// Seconds until the whole run fails
    #[arg(long, value_name = "SECONDS", default_value = "3600")]
    pub timeout: u64,
    /// Seconds until one program is killed
    #[arg(long, value_name = "SECONDS", default_value = "900")]
    pub job_timeout: u32,
    /// Time is the count of instructions, each 2^SHIFT ns: the same run takes the same time on
    /// every machine
    #[arg(long, value_name = "SHIFT", num_args = 0..=1, default_missing_value = "3", value_parser = clap::value_parser!(u8).range(0..=10))]
    pub icount: Option<u8>,
    /// What runs the VM's instructions
    #[arg(long, value_enum, default_value = "auto", conflicts_with = "icount")]
    pub accel: Choice,
    /// A further kernel parameter (repeatable)
    #[arg(long, value_name = "PARAMETER", allow_hyphen_values = true)]
    pub append: Vec<String>,
    /// Keep the initramfs and print the command that boots it again
    #[arg(long)]
    pub keep: bool,
    /// The VM's first process, where it is built already
    #[arg(skip)]
    pub init: Option<PathBuf>,
    /// Arguments for the programs, for example a test's name or --nocapture
    #[arg(last = true)]
    pub args: Vec<String>,
}

/// The options by themselves.
#[derive(Debug, Parser)]
struct Alone {
    #[command(flatten)]
    args: VmArgs,
}

impl VmArgs {
    /// What is the case where only a kernel is named.
    pub fn plain(kernel: KernelChoice) -> Self {
        let Alone { mut args } = Alone::parse_from(["vm"]);
        args.kernel = kernel;
        args
    }

    /// The name of the working folder.
    pub fn kernel_name(&self) -> &'static str {
        match self.image {
            Some(_) => "image",
            None => self.kernel.name(),
        }
    }

    /// Virtual CPUs: counted time repeats best with one.
    pub fn cpus(&self) -> u32 {
        self.cpus
            .unwrap_or(if self.icount.is_some() { 1 } else { 2 })
    }

    /// Whether test programs are built and run.
    pub fn runs_suite(&self) -> bool {
        !self.empty && (self.exec.is_empty() || !self.tests.is_empty())
    }

    /// Whether the kernel may have our patches, so that their own tests can run.
    pub fn has_patches(&self) -> bool {
        self.image.is_some() || self.kernel.has_patches()
    }

    /// Whether a test program of a package runs. Devices of the machine under test have nothing to
    /// do with our patches: unless they are asked for they are tested on the packaged kernel only.
    pub fn chooses(&self, package: &str, test: &str) -> bool {
        let elsewhere = self.has_patches() && VM_PACKAGES.contains(&package);
        match self.tests.is_empty() {
            true => self.full || !(elsewhere || SELDOM.contains(&test)),
            false => self.tests.iter().any(|name| name == test),
        }
    }

    /// The faults to plant; none in an ordinary run.
    pub fn plants(&self) -> Vec<Plant> {
        match self.plants {
            true => Plant::all(self.kernel == KernelChoice::Debug && self.image.is_none()),
            false => self.plant.clone(),
        }
    }

    /// Arguments of test programs: one test at a time unless asked otherwise.
    pub fn test_args(&self) -> Vec<String> {
        let mut args = self.args.clone();
        if args.is_empty() && self.tests.is_empty() && !self.full {
            let skip = OF_THE_CHECKER.iter().flat_map(|test| ["--skip", test]);
            args.extend(skip.map(String::from));
        }
        if !args.iter().any(|arg| arg.starts_with("--test-threads")) {
            args.push("--test-threads=1".into());
        }
        args
    }
}

/// A file and the arguments behind it. A file whose name contains spaces can have none.
pub fn program_and_arguments(words: &str) -> Result<(PathBuf, Vec<String>)> {
    if Path::new(words).is_file() {
        return Ok((words.into(), Vec::new()));
    }
    let mut words = words.split_whitespace().map(String::from);
    let file = words.next().context("--exec takes a file, not nothing")?;
    Ok((file.into(), words.collect()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> std::result::Result<VmArgs, clap::Error> {
        let words = std::iter::once("vm").chain(line.split_whitespace());
        Alone::try_parse_from(words).map(|alone| alone.args)
    }

    #[test]
    fn suite_runs_unless_something_else_is_asked_for() {
        for (line, runs) in [
            ("", true),
            ("--empty", false),
            ("--exec /x", false),
            ("--exec /x --test order", true),
        ] {
            assert_eq!(parse(line).unwrap().runs_suite(), runs, "{line}");
        }
        assert!(parse("--empty --test order").is_err());
    }

    #[test]
    fn counted_time_takes_a_shift_and_one_cpu() {
        let plain = parse("").unwrap();
        assert_eq!((plain.icount, plain.cpus()), (None, 2));
        let counted = parse("--icount -- filter").unwrap();
        assert_eq!((counted.icount, counted.cpus()), (Some(3), 1));
        let both = parse("--icount 0 --cpus 2").unwrap();
        assert_eq!((both.icount, both.cpus()), (Some(0), 2));
        assert!(parse("--icount --accel kvm").is_err());
        assert!(parse("--icount 11").is_err());
    }

    #[test]
    fn tests_run_one_at_a_time_unless_told_otherwise() {
        let args = |line| parse(line).unwrap().test_args();
        assert_eq!(args("-- name"), ["name", "--test-threads=1"]);
        assert_eq!(args("--full"), ["--test-threads=1"]);
        assert_eq!(args("--test random"), ["--test-threads=1"]);
        let all = args("").join(" ");
        assert!(all.starts_with("--skip the_checker_reports_each --skip is_found_out"));
        assert_eq!(args("-- --test-threads=2"), ["--test-threads=2"]);
    }

    #[test]
    fn programs_have_arguments_of_their_own() {
        let taken = |words| {
            let (file, args) = program_and_arguments(words).unwrap();
            (file.to_str().unwrap().to_owned(), args.join("|"))
        };
        assert_eq!(taken("/x"), ("/x".into(), String::new()));
        assert_eq!(taken("/x --a  b"), ("/x".into(), "--a|b".into()));
        let dir = tempfile::tempdir().unwrap();
        let spaced = dir.path().join("a b");
        std::fs::write(&spaced, "").unwrap();
        let spaced = spaced.to_str().unwrap();
        assert_eq!(taken(spaced), (spaced.into(), String::new()));
        assert!(program_and_arguments(" ").is_err());
    }

    #[test]
    fn seldom_tests_run_only_when_asked_for() {
        let chooses = |line, test| parse(line).unwrap().chooses("ioregion-conformance", test);
        assert!(chooses("", "order") && !chooses("", "accesses"));
        assert!(chooses("--full", "accesses") && chooses("--test accesses", "accesses"));
        assert!(!chooses("--test accesses", "order"));
    }

    #[test]
    fn faults_depend_on_the_kernel() {
        let plants = |line| parse(line).unwrap().plants();
        assert!(plants("").is_empty());
        assert_eq!(plants("--plants").len(), 4);
        assert_eq!(plants("--plants --kernel debug").len(), 8);
        assert_eq!(plants("--plant panic"), [Plant::Panic]);
        assert!(parse("--plant panic --test order").is_err());
    }

    #[test]
    fn devices_are_tested_on_the_packaged_kernel_or_when_they_are_asked_for() {
        let devices = |line| parse(line).unwrap().chooses("ioregion", "vduse_blk");
        assert!(devices("") && devices("--kernel patched --test vduse_blk"));
        assert!(devices("--kernel patched --full") && !devices("--kernel patched"));
    }

    #[test]
    fn stock_kernel_has_no_patches() {
        let has = |line| parse(line).unwrap().has_patches();
        assert!(!has("--kernel next"));
        assert!(!has("") && has("--kernel patched") && has("--kernel debug"));
        assert!(has("--image /x"));
    }
}
