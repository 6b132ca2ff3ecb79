//! `cargo xtask bench`: the benchmark on this machine, or in a VM whose time is counted.

mod disks;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::Args;
use serde_json::{Value, json};

use crate::vm::{self, KernelChoice, Passed, VmArgs, suite};
use crate::{bench_program, ebpf, setup};

/// What to measure.
#[derive(Debug, Args)]
pub struct BenchArgs {
    /// All scenarios at their full lengths (default: under two minutes); with --vm also on the
    /// kernel with mitigations of CPU vulnerabilities on
    #[arg(long)]
    pub full: bool,
    /// Exit 1 where a claim does not hold
    #[arg(long)]
    pub check: bool,
    /// In a VM of one emulated CPU in which each instruction takes a nanosecond, so that the same
    /// commit gives the same figures everywhere; what needs two CPUs in one with two, in wall time
    #[arg(long)]
    pub vm: bool,
    /// Disks over VDUSE instead of guest accesses: ours against qemu-storage-daemon's, in a VM of
    /// one emulated CPU with counted time, on the stock kernel
    #[arg(long, conflicts_with_all = ["vm", "full"])]
    pub vduse: bool,
    /// The VM's kernel: patched or stock
    #[arg(long, value_enum, default_value = "patched", requires = "vm")]
    pub kernel: KernelChoice,
    /// Build and measure so many times from nothing, and exit 1 where a figure differs by more
    /// than 0.1 %
    #[arg(long, value_name = "N", requires = "vm", value_parser = clap::value_parser!(u8).range(2..=9))]
    pub repeat: Option<u8>,
    /// Further arguments for `ioregion-bench run`
    #[arg(last = true)]
    pub args: Vec<String>,
}

/// Time is the count of instructions, each 2^SHIFT ns.
const SHIFT: u8 = 0;
/// What turns all mitigations off, and what leaves them to the kernel.
const MITIGATIONS: [&str; 2] = ["mitigations=off", "mitigations=auto"];
/// Until a boot with counted time is given up; rows of it may take minutes of a slow machine.
const COUNTED_LIMIT: Duration = Duration::from_secs(3600);
/// Until a boot with CPUs that run at the same time is given up: it takes half a minute, or hangs.
const PARALLEL_LIMIT: Duration = Duration::from_secs(300);
/// Attempts at that.
const ATTEMPTS: usize = 5;
/// Largest difference between two runs of the same commit, in percent.
const WITHIN: &str = "0.1";

/// Measures.
pub fn run(root: &Path, args: &BenchArgs) -> Result<()> {
    if args.vduse {
        return disks::run(root, args);
    }
    if args.vm {
        return Bench::new(root, args)?.run();
    }
    ebpf::build(&setup::setup()?, root, false)?;
    let flags = [(args.full, "--full"), (args.check, "--check")];
    bench_program(root, "run")
        .args(flags.iter().filter(|(on, _)| *on).map(|(_, flag)| flag))
        .args(&args.args)
        .run()
}

/// A measurement in VMs.
struct Bench<'a> {
    root: &'a Path,
    args: &'a BenchArgs,
    /// For what the VMs leave behind.
    dir: PathBuf,
}

/// What runs in the VMs.
struct Programs {
    init: PathBuf,
    bench: PathBuf,
}

/// Which kind of boot.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Counted,
    Parallel,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::Counted => "counted",
            Self::Parallel => "parallel",
        }
    }

    fn facts(self, parameter: &str, retries: &[String]) -> Value {
        let (cpus, ns) = match self {
            Self::Counted => (1, json!(1_u32 << SHIFT)),
            Self::Parallel => (2, Value::Null),
        };
        json!({
            "boot": self.name(),
            "cpus": cpus,
            "ns_per_instruction": ns,
            "parameters": [parameter],
            "retries": retries,
        })
    }
}

/// How long the VM takes without a program.
struct Empty {
    seconds: f64,
    verdict: f64,
}

impl<'a> Bench<'a> {
    fn new(root: &'a Path, args: &'a BenchArgs) -> Result<Self> {
        if args.kernel == KernelChoice::Debug {
            bail!("the debug kernel's checkers cost more than what is measured; --kernel patched");
        }
        let dir = root.join("target/vm/bench").join(args.kernel.name());
        Ok(Self { root, args, dir })
    }

    fn run(&self) -> Result<()> {
        ebpf::build(&setup::setup()?, self.root, false)?;
        let [off, on] = MITIGATIONS;
        let mut failures = Vec::new();
        let runs = self.args.repeat.unwrap_or(1);
        let mut programs = self.build(self.args.repeat.is_some())?;
        let (first, kernel) = self.counted(&programs, off, "1")?;
        for run in 2..=runs {
            println!("\nrun {run} of {runs}, from nothing");
            programs = self.build(true)?;
            let (next, _) = self.counted(&programs, off, &run.to_string())?;
            let same = bench_program(self.root, "compare")
                .args([&first, &next])
                .args(["--within", WITHIN])
                .run();
            failures.extend(same.err().map(|error| format!("{error:#}")));
        }
        let empty = self.empty()?;
        let (parallel, retries) = self.parallel(&programs, off)?;
        let boots = [
            Kind::Counted.facts(off, &[]),
            Kind::Parallel.facts(off, &retries),
        ];
        let facts = self.facts(&kernel, &boots, Some(&empty));
        let name = format!("vm-{}", self.args.kernel.name());
        let made = self.assemble(&name, &facts, &[first, parallel]);
        failures.extend(made.err().map(|error| format!("{error:#}")));
        if self.args.full {
            println!("\nthe same with mitigations on");
            let (counted, kernel) = self.counted(&programs, on, "mitigations")?;
            let facts = self.facts(&kernel, &[Kind::Counted.facts(on, &[])], None);
            // Bars are about the kernel without them.
            let name = format!("{name}-mitigations");
            self.assemble_unchecked(&name, &facts, &[counted])?;
        }
        match failures.is_empty() {
            true => Ok(()),
            false => bail!("{}", failures.join("\n")),
        }
    }

    /// Builds what runs in the VMs; `clean`: from nothing.
    fn build(&self, clean: bool) -> Result<Programs> {
        let program = |package, name| suite::program(self.root, suite::BENCH_DIR, package, name);
        if clean {
            suite::clean(self.root, suite::BENCH_DIR)?;
        }
        Ok(Programs {
            init: program("ioregion-init", "init")?,
            bench: program("ioregion-bench", "ioregion-bench")?,
        })
    }

    /// What all boots have in common.
    fn vm(&self, programs: &Programs, kind: Kind, parameter: &str, results: &Path) -> VmArgs {
        let mut vm = VmArgs::plain(self.args.kernel);
        let object = ebpf::object(self.root, false);
        vm.files = vec![format!("{}={}", object.display(), vm::OBJECT)];
        vm.env = vec![format!("IOREGION_BPF_OBJECT={}", vm::OBJECT)];
        vm.append = vec![parameter.into()];
        vm.exec = vec![programs.bench.display().to_string()];
        vm.init = Some(programs.init.clone());
        vm.results = Some(results.into());
        vm.args = ["run", "--full", "--boot", kind.name()]
            .map(String::from)
            .into();
        vm.args.extend_from_slice(&self.args.args);
        let limit = match kind {
            Kind::Counted => {
                vm.icount = Some(SHIFT);
                COUNTED_LIMIT
            }
            Kind::Parallel => {
                vm.accel = vm::Choice::TcgParallel;
                PARALLEL_LIMIT
            }
        };
        vm.timeout = limit.as_secs();
        vm.job_timeout = u32::try_from(limit.as_secs()).unwrap_or(u32::MAX);
        vm
    }

    /// Measures in counted time; the results file, and the kernel in words.
    fn counted(
        &self,
        programs: &Programs,
        parameter: &str,
        name: &str,
    ) -> Result<(PathBuf, String)> {
        let folder = self.dir.join(name);
        let vm = self.vm(programs, Kind::Counted, parameter, &folder);
        let Passed { kernel, .. } = vm::run(self.root, &vm)?;
        Ok((folder.join("counted.json"), kernel))
    }

    /// Measures what needs two CPUs; the results file, and why earlier attempts failed.
    fn parallel(&self, programs: &Programs, parameter: &str) -> Result<(PathBuf, Vec<String>)> {
        let folder = self.dir.join("parallel");
        let vm = self.vm(programs, Kind::Parallel, parameter, &folder);
        let mut retries: Vec<String> = Vec::new();
        loop {
            println!(
                "\nwhat needs two CPUs, attempt {} of {ATTEMPTS}",
                retries.len() + 1
            );
            let error = match vm::run(self.root, &vm) {
                Ok(_) => return Ok((folder.join("parallel.json"), retries)),
                Err(error) => format!("{error:#}").replace('\n', " "),
            };
            println!("attempt failed: {error}");
            retries.push(error);
            if retries.len() == ATTEMPTS {
                bail!(
                    "{ATTEMPTS} boots with two CPUs failed: {}",
                    retries.join("; ")
                );
            }
        }
    }

    /// How long the VM takes without a program, with everything built.
    fn empty(&self) -> Result<Empty> {
        println!("\nthe empty VM");
        let mut vm = VmArgs::plain(self.args.kernel);
        vm.empty = true;
        // Once without looking at the clock: something may have to be built, or be tried.
        vm::run(self.root, &vm)?;
        let started = Instant::now();
        let passed = vm::run(self.root, &vm)?;
        Ok(Empty {
            seconds: started.elapsed().as_secs_f64(),
            verdict: passed.verdict.as_secs_f64(),
        })
    }

    fn facts(&self, kernel: &str, boots: &[Value], empty: Option<&Empty>) -> Value {
        let patches = match self.args.kernel.has_patches() {
            false => Vec::new(),
            true => patches(&self.root.join("kernel/patches/6.12")),
        };
        json!({
            "kernel": self.args.kernel.name(),
            "what": kernel,
            "patches": patches,
            "emulator": vm::emulator().unwrap_or_else(|missing| missing.reason),
            "boots": boots,
            "empty_seconds": empty.map(|empty| empty.seconds),
            "empty_verdict_seconds": empty.map(|empty| empty.verdict),
        })
    }

    fn assemble(&self, name: &str, facts: &Value, files: &[PathBuf]) -> Result<()> {
        let command = self.assembling(name, facts, files)?;
        command.args(self.args.check.then_some("--check")).run()
    }

    fn assemble_unchecked(&self, name: &str, facts: &Value, files: &[PathBuf]) -> Result<()> {
        self.assembling(name, facts, files)?.run()
    }

    fn assembling(&self, name: &str, facts: &Value, files: &[PathBuf]) -> Result<crate::sh::Cmd> {
        let file = self.dir.join(format!("{name}.facts.json"));
        std::fs::write(&file, facts.to_string())
            .with_context(|| format!("writing {}", file.display()))?;
        Ok(bench_program(self.root, "assemble")
            .args(files)
            .arg("--facts")
            .arg(file)
            .args(["--name", name]))
    }
}

/// The names of the patches in a folder, in order.
fn patches(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
    let mut names: Vec<String> = names.filter(|name| name.ends_with(".patch")).collect();
    names.sort();
    names
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Debug, Parser)]
    struct Cli {
        #[command(flatten)]
        bench: BenchArgs,
    }

    fn parse(line: &str) -> Result<BenchArgs, clap::Error> {
        let words = std::iter::once("bench").chain(line.split_whitespace());
        Cli::try_parse_from(words).map(|cli| cli.bench)
    }

    #[test]
    fn options_of_the_vm_need_the_vm() {
        let args = parse("--vm --repeat 2 -- --filter forward").unwrap();
        assert!(args.vm && args.kernel == KernelChoice::Patched);
        assert_eq!((args.repeat, args.args.len()), (Some(2), 2));
        assert!(!parse("--full").unwrap().vm);
        assert!(parse("--vduse --check -- --rounds 3").unwrap().vduse);
        for wrong in [
            "--vduse --vm",
            "--repeat 2",
            "--kernel stock",
            "--vm --repeat 1",
        ] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn boots_differ_in_time_and_cpus_only() {
        let root = Path::new("/r");
        let args = parse("--vm --kernel stock -- --rounds 3").unwrap();
        let bench = Bench::new(root, &args).unwrap();
        let programs = Programs {
            init: "/p/init".into(),
            bench: "/p/bench".into(),
        };
        let of = |kind| bench.vm(&programs, kind, "mitigations=off", Path::new("/o"));
        let (counted, parallel) = (of(Kind::Counted), of(Kind::Parallel));
        assert_eq!((counted.icount, counted.cpus()), (Some(0), 1));
        assert_eq!((parallel.icount, parallel.cpus()), (None, 2));
        assert_eq!(
            counted.args.join(" "),
            "run --full --boot counted --rounds 3"
        );
        assert_eq!(
            (counted.append, counted.files),
            (parallel.append, parallel.files)
        );
        assert!(!counted.exec.is_empty() && !counted.empty);
    }

    #[test]
    fn debug_kernel_is_not_measured() {
        let args = parse("--vm --kernel debug").unwrap();
        assert!(Bench::new(Path::new("/r"), &args).is_err());
    }

    #[test]
    fn facts_name_the_boots_and_the_patches_in_order() {
        let root = tempfile::tempdir().unwrap();
        let folder = root.path().join("kernel/patches/6.12");
        std::fs::create_dir_all(&folder).unwrap();
        for name in ["0002-b.patch", "0001-a.patch", "README"] {
            std::fs::write(folder.join(name), "").unwrap();
        }
        let args = parse("--vm").unwrap();
        let bench = Bench::new(root.path(), &args).unwrap();
        let boots = [Kind::Parallel.facts("mitigations=off", &["hung".into()])];
        let facts = bench.facts("a kernel", &boots, None);
        assert_eq!(facts["patches"], json!(["0001-a.patch", "0002-b.patch"]));
        assert_eq!(facts["boots"][0]["retries"], json!(["hung"]));
        assert_eq!(facts["boots"][0]["ns_per_instruction"], Value::Null);
        assert_eq!(facts["empty_seconds"], Value::Null);
    }
}
