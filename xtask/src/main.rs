//! `cargo xtask`: set-up, builds, tests and benchmarks of ioregion as one command.

mod apt;
mod bench;
mod doctor;
mod ebpf;
mod fuzz;
mod kernel;
mod lock;
mod outcome;
mod progress;
mod setup;
mod sh;
mod space;
mod tiers;
mod toolchain;
mod vm;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Args, Parser, Subcommand};

use sh::Cmd;

/// Set-up, builds, tests and benchmarks of ioregion.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// Find or install everything that building, testing and measuring need
    ///
    /// Prints each command before it runs, changes nothing where nothing is missing, and needs
    /// root only for missing system packages. bpf-linker is built once into $IOREGION_CACHE
    /// (default: ioregion in the user's cache folder).
    #[command(after_help = "Example:\n  cargo xtask setup")]
    Setup,
    /// Build the eBPF program into target/bpf
    ///
    /// Says what is missing where it cannot; `cargo xtask setup` installs it.
    #[command(
        after_help = "Example:\n  cargo xtask build-ebpf --log    # target/bpf/ioregion-log.bpf.o"
    )]
    BuildEbpf {
        /// With log messages from inside the program, as target/bpf/ioregion-log.bpf.o
        #[arg(long)]
        log: bool,
    },
    /// Set up, build the eBPF program and run the test tiers
    ///
    /// A tier that cannot run is skipped with its reason and what would enable it; with CI=true
    /// in the environment it fails.
    #[command(after_help = "Example:\n  cargo xtask test --tier unit")]
    Test(TestArgs),
    /// What a CI job runs: the same as `test`
    #[command(after_help = "Example:\n  CI=true cargo xtask ci")]
    Ci(TestArgs),
    /// Set up, build the eBPF program and run the benchmark
    ///
    /// On this machine, or with --vm the same table in a VM on the patched kernel, where KVM has
    /// ioregionfd. There time is the count of instructions: --repeat 2 shows that the same commit
    /// gives the same figures. Results go to target/bench.
    #[command(after_help = "Examples:
  cargo xtask bench --check                  # exit 1 where a claim does not hold
  cargo xtask bench --vm                     # target/bench/vm-patched.json
  cargo xtask bench --vm --repeat 2          # twice from nothing: are the figures the same?
  cargo xtask bench --vm --kernel stock      # what the kernel without patches can do
  cargo xtask bench --vm -- --filter mailbox # some rows
  cargo xtask bench --vduse                  # disks over VDUSE: target/bench/disks.json")]
    Bench(bench::BenchArgs),
    /// Build the patched kernel of the test VM
    ///
    /// Fetches Debian's linux-source-6.12, applies kernel/patches/6.12, configures it from
    /// kernel/config (failing if an option is lost) and builds it. The kernel is kept in
    /// target/kernel under a name made of the source's version, the patches, the configuration
    /// and the compiler; a change of patches rebuilds only what they touch. The first build
    /// takes 5 to 10 minutes on two CPUs and 4 GB.
    #[command(after_help = "Examples:
  cargo xtask kernel            # for `cargo xtask vm --kernel patched`
  cargo xtask kernel --debug    # for `cargo xtask vm --kernel debug`
  cargo xtask kernel --deb      # target/kernel/deb/linux-image-*.deb")]
    Kernel(kernel::KernelArgs),
    /// Boot a kernel in a VM, run the conformance suite in it and print the verdict
    ///
    /// The VM is QEMU's emulation of an AMD machine with nested virtualization (or this
    /// machine's KVM, where that boots it), a kernel, and an initramfs made of static programs;
    /// it has no disk and no network. Logs go to target/vm/KERNEL. The exit status is 1 where a
    /// program fails, the kernel complains (panic, oops, BUG, warning, lockup, stall, KASAN,
    /// lockdep) or time is over; --plants shows that such things are noticed. Patched kernels
    /// also run the kernel's own tests (`--test kernel-selftests` only these). The stock kernel
    /// is fetched once into the cache; remove its folder there to have a newer one.
    #[command(after_help = "Examples:
  cargo xtask vm                                     # the whole suite on the stock kernel
  cargo xtask vm --empty                             # boot and power off
  cargo xtask vm --test order --test sizes           # two test programs
  cargo xtask vm --test order -- --nocapture mmio    # some tests of one, with their output
  cargo xtask vm --icount --exec target/x/program    # a program of your own, counted time
  cargo xtask vm --exec 'a/one --fast' --exec a/two --results out    # two, with result files
  cargo xtask vm --kernel debug --plants             # are the kernel's checkers awake?
  cargo xtask vm --image bzImage --keep              # another kernel; keep the initramfs")]
    Vm(Box<vm::VmArgs>),
    /// Fuzz what drivers and the kernel send: requests and rings
    ///
    /// Builds the targets in fuzz/ for libFuzzer and runs each for some time, from the inputs in
    /// fuzz/corpus on. What they find further lies in target/fuzz/corpus, and an input that
    /// breaks something in fuzz/artifacts, with an exit status of 1.
    #[command(after_help = "Examples:
  cargo xtask fuzz --seconds 600
  cargo xtask fuzz --target packed --seed 5    # again as it was
  cargo xtask fuzz --seconds 600 --keep        # renew fuzz/corpus")]
    Fuzz(fuzz::FuzzArgs),
    /// Tables and plots from one or many result files
    #[command(
        after_help = "Example:\n  cargo xtask report target/bench/latest.json -- --plots target/bench"
    )]
    Report {
        /// Result files (JSON)
        #[arg(required = true)]
        files: Vec<PathBuf>,
        /// Further arguments for `ioregion-bench report`: --markdown, --plots DIR, --readme FILE
        #[arg(last = true)]
        args: Vec<String>,
    },
    /// What this host offers, with the reason for each "no"; installs nothing
    #[command(after_help = "Example:\n  cargo xtask doctor")]
    Doctor,
}

#[derive(Debug, Args)]
struct TestArgs {
    /// Also the long tiers (soaks)
    #[arg(long)]
    full: bool,
    /// Only this tier
    #[arg(long, value_name = "NAME")]
    tier: Option<String>,
}

/// The workspace's folder: where cargo says it is, else where this program was built.
fn workspace_root() -> Result<PathBuf> {
    let manifest = std::env::var_os("CARGO_MANIFEST_DIR").map(PathBuf::from);
    let manifest = manifest.unwrap_or_else(|| env!("CARGO_MANIFEST_DIR").into());
    let root = manifest.parent().context("xtask lies in no workspace")?;
    Ok(root.to_owned())
}

/// The benchmark program, run in `root`.
fn bench_program(root: &Path, subcommand: &str) -> Cmd {
    Cmd::line("cargo run --release -p ioregion-bench --")
        .arg(subcommand)
        .dir(root)
}

fn main() -> ExitCode {
    match run(Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: Cli) -> Result<()> {
    let root = workspace_root()?;
    match cli.task {
        Task::Setup => setup::setup()
            .and_then(|_| vm::setup())
            .and_then(|()| kernel::setup()),
        Task::BuildEbpf { log } => ebpf::build(&setup::find()?, &root, log),
        Task::Test(TestArgs { full, tier }) | Task::Ci(TestArgs { full, tier }) => {
            tiers::run(&root, full, tier.as_deref())
        }
        Task::Bench(args) => bench::run(&root, &args),
        Task::Kernel(args) => kernel::run(&root, &args),
        Task::Fuzz(args) => fuzz::run(&root, &args),
        Task::Vm(args) => vm::run(&root, &args).map(drop),
        Task::Report { files, args } => {
            // The benchmark program runs in the workspace: name the files from the root.
            let files: Vec<PathBuf> = files
                .iter()
                .map(std::path::absolute)
                .collect::<std::io::Result<_>>()?;
            bench_program(&root, "report").args(files).args(args).run()
        }
        Task::Doctor => {
            let host = Cmd::line("cargo run -q -p ioregion-bench -- doctor")
                .dir(&root)
                .run();
            print!("\n{}", doctor::toolchain_table(&root));
            host
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn every_subcommand_has_an_example_in_its_help() {
        Cli::command().debug_assert();
        for task in Cli::command().get_subcommands() {
            let help = task.get_after_help().map(ToString::to_string);
            let example = help.unwrap_or_default();
            assert!(example.contains("cargo xtask"), "{}", task.get_name());
        }
    }

    #[test]
    fn bench_takes_further_arguments_after_two_dashes() {
        let cli = Cli::try_parse_from(["x", "bench", "--full", "--", "--only", "ebpf"]).unwrap();
        let Task::Bench(bench) = cli.task else {
            panic!("not bench")
        };
        assert!(bench.full);
        assert_eq!(bench.args, ["--only", "ebpf"]);
    }
}
