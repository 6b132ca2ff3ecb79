//! The test tiers: one table, run in order, each with what it needs and what it proves.

use std::path::Path;
use std::time::Instant;

use anyhow::{Result, bail};

use crate::outcome::{Outcome, summary, tests_in};
use crate::setup::BpfTools;
use crate::sh::{Cmd, which};
use crate::toolchain::{Missing, has_rust_src, sysroots};
use crate::vm::{self, GUEST_PACKAGES, KernelChoice, VM_PACKAGES};
use crate::{ebpf, fuzz, setup, space};

/// What the commands of a tier are made from.
struct Host<'a> {
    root: &'a Path,
    /// The eBPF tools, or why there are none.
    tools: Result<BpfTools, Missing>,
}

/// One row of the test table.
struct Tier {
    name: &'static str,
    what: &'static str,
    /// Only with `--full`.
    full: bool,
    /// Runs tests, of which there must be at least one.
    counts: bool,
    /// Whether it needs the eBPF tools and object, and so set-up.
    ebpf: bool,
    /// Skipped where it cannot run even when `CI=true`.
    optional: bool,
    needs: fn(&Host) -> Result<(), Missing>,
    commands: fn(&Host) -> Result<Vec<Cmd>, Missing>,
}

/// A quick tier that needs nothing but cargo: the base of each row.
const ROW: Tier = Tier {
    name: "",
    what: "",
    full: false,
    counts: false,
    ebpf: false,
    optional: false,
    needs: |_| Ok(()),
    commands: |_| Ok(Vec::new()),
};

const TIERS: &[Tier] = &[
    Tier {
        name: "fmt",
        what: "rustfmt changes nothing",
        commands: |_| Ok(vec![Cmd::line("cargo fmt --all --check")]),
        ..ROW
    },
    Tier {
        name: "clippy",
        what: "no warnings in any host target",
        commands: |_| {
            let clippy = "cargo clippy --workspace --exclude ioregion-ebpf --all-targets";
            Ok(vec![Cmd::line(clippy).args(["--", "-D", "warnings"])])
        },
        ..ROW
    },
    Tier {
        name: "clippy-ebpf",
        what: "no warnings in the eBPF program",
        ebpf: true,
        commands: |host| Ok(ebpf::lint(host.tools()?, host.root)),
        ..ROW
    },
    Tier {
        name: "rustdoc",
        what: "documentation builds without warnings",
        commands: |_| {
            let doc = "cargo doc --workspace --exclude ioregion-ebpf --no-deps";
            Ok(vec![Cmd::line(doc).env("RUSTDOCFLAGS", "-D warnings")])
        },
        ..ROW
    },
    Tier {
        name: "unit",
        what: "unit and integration tests that need no guest",
        counts: true,
        commands: |_| {
            let runner = match which("cargo-nextest") {
                Some(_) => "cargo nextest run",
                None => "cargo test",
            };
            let exclude = GUEST_PACKAGES
                .iter()
                .chain(&VM_PACKAGES)
                .chain([&fuzz::PACKAGE])
                .flat_map(|package| ["--exclude", package]);
            let only = VM_PACKAGES
                .iter()
                .flat_map(|package| ["--package", package]);
            let tests = "--workspace --exclude ioregion-ebpf --lib --bins --examples --tests";
            Ok(vec![
                Cmd::line(runner)
                    .args(tests.split_whitespace())
                    .args(exclude),
                // Of these only what needs no device.
                Cmd::line(runner).arg("--bins").args(only),
                // Its programs need a fuzzer's flags.
                Cmd::line(runner).args(["--tests", "--package", fuzz::PACKAGE]),
            ])
        },
        ..ROW
    },
    Tier {
        name: "doc",
        what: "examples in the documentation",
        counts: true,
        commands: |_| {
            let doc = "cargo test --doc --workspace --exclude ioregion-ebpf";
            Ok(vec![Cmd::line(doc)])
        },
        ..ROW
    },
    Tier {
        name: "model",
        what: "wake-up arming under every interleaving (loom)",
        counts: true,
        commands: |_| {
            let test = "cargo test -p ioregion-dispatch --no-default-features --release --test loom_* \
                        --target-dir target/loom";
            Ok(vec![Cmd::line(test).env("RUSTFLAGS", "--cfg loom")])
        },
        ..ROW
    },
    Tier {
        name: "fuzz",
        what: "fuzz targets find nothing in a short time",
        commands: |_| Ok(vec![Cmd::line("cargo xtask fuzz --seconds 10")]),
        ..ROW
    },
    Tier {
        name: "fuzz-long",
        what: "fuzz targets find nothing in ten minutes each",
        full: true,
        commands: |_| Ok(vec![Cmd::line("cargo xtask fuzz --seconds 600")]),
        ..ROW
    },
    Tier {
        name: "miri",
        what: "byte layouts under Miri",
        counts: true,
        optional: true,
        needs: |_| miri().map(drop),
        commands: |_| {
            let test = "cargo +nightly miri test -p ioregion-abi --target-dir target/miri";
            Ok(vec![Cmd::line(test).scrubbed()])
        },
        ..ROW
    },
    Tier {
        name: "conformance",
        what: "every mechanism against real guests",
        counts: true,
        ebpf: true,
        needs: guests,
        commands: |_| Ok(vec![conformance()]),
        ..ROW
    },
    Tier {
        name: "conformance-soak",
        what: "the conformance suite at its full lengths",
        full: true,
        counts: true,
        ebpf: true,
        needs: guests,
        commands: |_| Ok(vec![conformance().env("IOREGION_FULL", "1")]),
        ..ROW
    },
    Tier {
        name: "vm-stock",
        what: "the conformance suite in a VM, on Debian's packaged kernel; what fails is noticed",
        counts: true,
        ebpf: true,
        needs: |host| vm_with(host, KernelChoice::Stock),
        commands: |_| {
            let stock = "cargo xtask vm --kernel stock";
            Ok(vec![Cmd::line(stock), Cmd::line(stock).arg("--plants")])
        },
        ..ROW
    },
    Tier {
        name: "vm-kills",
        what: "disks over VDUSE whose services are killed a hundred times under load",
        full: true,
        counts: true,
        ebpf: true,
        needs: |host| vm_with(host, KernelChoice::Stock),
        commands: |_| {
            let stock = "cargo xtask vm --kernel stock --full";
            Ok(vec![Cmd::line(stock).args([
                "--test",
                "vduse_crash",
                "--test",
                "vduse_fio",
            ])])
        },
        ..ROW
    },
    Tier {
        name: "vm-patched",
        what: "the conformance suite and the kernel's own tests in a VM, on the patched kernel",
        counts: true,
        ebpf: true,
        needs: |host| vm_with(host, KernelChoice::Patched),
        commands: |_| Ok(vec![Cmd::line("cargo xtask vm --kernel patched")]),
        ..ROW
    },
    Tier {
        name: "vm-debug",
        what: "the same with lock and memory checkers, which notice planted faults",
        full: true,
        counts: true,
        ebpf: true,
        needs: |host| vm_with(host, KernelChoice::Debug),
        commands: |_| {
            let debug = "cargo xtask vm --kernel debug --timeout 14400 --job-timeout 3600";
            Ok(vec![
                Cmd::line(debug).arg("--plants"),
                Cmd::line(debug),
                // Made-up ioctls for minutes.
                Cmd::line(debug).args(["--full", "--test", "kernel-selftests"]),
            ])
        },
        ..ROW
    },
    Tier {
        name: "vm-next",
        what: "VDUSE devices on a newer kernel, which has more of the interface",
        full: true,
        counts: true,
        ebpf: true,
        needs: |host| vm_with(host, KernelChoice::Next),
        commands: |_| {
            let next = "cargo xtask vm --kernel next --timeout 14400 --job-timeout 3600";
            let tests = VDUSE_TESTS.iter().flat_map(|test| ["--test", test]);
            Ok(vec![Cmd::line(next).args(tests)])
        },
        ..ROW
    },
    Tier {
        name: "bench-smoke",
        what: "every scenario of the benchmark measures",
        ebpf: true,
        needs: guests,
        commands: |_| {
            let run = "cargo run --release -p ioregion-bench -- run --smoke";
            Ok(vec![Cmd::line(run)])
        },
        ..ROW
    },
];

/// Test programs of VDUSE with a kernel's own drivers.
const VDUSE_TESTS: [&str; 10] = [
    "vduse_blk",
    "vduse_confined",
    "vduse_crash",
    "vduse_example",
    "vduse_fio",
    "vduse_net",
    "vduse_net_vhost",
    "vduse_next",
    "vduse_umem",
    "vduse_vhost",
];

impl Host<'_> {
    fn tools(&self) -> Result<&BpfTools, Missing> {
        self.tools.as_ref().map_err(Clone::clone)
    }
}

fn conformance() -> Cmd {
    let packages = GUEST_PACKAGES
        .iter()
        .flat_map(|package| ["--package", package]);
    Cmd::line("cargo test --release")
        .args(packages)
        .args(["--", "--test-threads=1"])
}

/// A usable `/dev/kvm`, the right to load eBPF programs, and the built object.
fn guests(host: &Host) -> Result<(), Missing> {
    kvm()?;
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    bpf_privileges(&status)?;
    host.tools()?;
    let object = ebpf::object(host.root, false);
    if !object.exists() {
        let reason = format!("{} was not built", object.display());
        return Err(Missing::new(reason, "`cargo xtask build-ebpf`"));
    }
    Ok(())
}

/// The eBPF tools, and a VM with this kernel.
fn vm_with(host: &Host, kernel: KernelChoice) -> Result<(), Missing> {
    host.tools()?;
    vm::check(kernel)
}

/// Whether guests can be run.
fn kvm() -> Result<(), Missing> {
    let open = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/kvm");
    open.map(drop).map_err(|error| {
        Missing::new(
            format!("/dev/kvm cannot be opened for reading and writing: {error}"),
            "load the kvm module of this CPU, or give this user access to /dev/kvm",
        )
    })
}

/// Whether the effective capabilities in `/proc/self/status` allow tracing programs.
fn bpf_privileges(status: &str) -> Result<(), Missing> {
    const SYS_ADMIN: u64 = 1 << 21;
    const PERFMON_AND_BPF: u64 = 1 << 38 | 1 << 39;
    let capabilities = status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))
        .and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok())
        .unwrap_or(0);
    if capabilities & SYS_ADMIN != 0 || capabilities & PERFMON_AND_BPF == PERFMON_AND_BPF {
        return Ok(());
    }
    Err(Missing::new(
        "this process may not load eBPF programs (neither CAP_SYS_ADMIN nor CAP_BPF with CAP_PERFMON)",
        "run as root",
    ))
}

/// Where Miri can run: a nightly toolchain with Miri and the sources it interprets.
pub fn miri() -> Result<String, Missing> {
    let nightly = sysroots().into_iter().find(|sysroot| {
        let name = sysroot.file_name().unwrap_or_default();
        name.to_string_lossy().starts_with("nightly")
    });
    let enable = "`rustup toolchain install nightly --component miri rust-src`";
    let Some(sysroot) = nightly else {
        return Err(Missing::new("rustup has no nightly toolchain", enable));
    };
    for (present, part) in [
        (sysroot.join("bin/cargo-miri").exists(), "Miri"),
        (has_rust_src(&sysroot), "rust-src"),
    ] {
        if !present {
            let reason = format!("{} has no {part}", sysroot.display());
            return Err(Missing::new(reason, enable));
        }
    }
    Ok(sysroot.display().to_string())
}

/// Runs the tiers (only `only` where given) and prints their table; an error where one failed.
pub fn run(root: &Path, full: bool, only: Option<&str>) -> Result<()> {
    let ci = std::env::var("CI").is_ok_and(|value| value == "true");
    let chosen: Vec<&Tier> = TIERS
        .iter()
        .filter(|tier| match only {
            Some(name) => tier.name == name,
            None => full || !tier.full,
        })
        .collect();
    if chosen.is_empty() {
        let names: Vec<&str> = TIERS.iter().map(|tier| tier.name).collect();
        bail!(
            "no such tier: {}; there are: {}",
            only.unwrap_or_default(),
            names.join(", ")
        );
    }
    if only.is_none() {
        space::check(root)?;
    }
    let mut results = Vec::new();
    let mut host = Host {
        root,
        tools: Err(Missing::new("not looked for", "`cargo xtask setup`")),
    };
    if chosen.iter().any(|tier| tier.ebpf) {
        let started = Instant::now();
        let outcome = match prepare(&mut host) {
            Ok(()) => Outcome::Passed(String::new()),
            Err(error) => match error.downcast::<Missing>() {
                Ok(missing) => cannot_run(&missing, ci),
                Err(error) => Outcome::Failed(format!("{error:#}")),
            },
        };
        announce("build-ebpf", &outcome);
        results.push(("build-ebpf", outcome, started.elapsed().as_secs_f64()));
    }
    for tier in chosen {
        println!("\n== {}: {}", tier.name, tier.what);
        let started = Instant::now();
        let outcome = run_tier(tier, &host, ci);
        announce(tier.name, &outcome);
        results.push((tier.name, outcome, started.elapsed().as_secs_f64()));
    }
    let (text, failed) = summary(&results);
    print!("\n{text}");
    if failed > 0 {
        // The last line stays the sum of the tiers.
        std::process::exit(1);
    }
    Ok(())
}

/// Set-up, then the eBPF objects, without and with logging.
fn prepare(host: &mut Host) -> Result<()> {
    match setup::setup() {
        Ok(tools) => {
            let built = ebpf::build(&tools, host.root, false)
                .and_then(|()| ebpf::build(&tools, host.root, true));
            host.tools = Ok(tools);
            built
        }
        Err(error) => {
            host.tools = Err(match error.downcast_ref::<Missing>() {
                Some(missing) => missing.clone(),
                None => Missing::new(format!("set-up failed: {error:#}"), "`cargo xtask setup`"),
            });
            Err(error)
        }
    }
}

fn announce(name: &str, outcome: &Outcome) {
    match outcome {
        Outcome::Passed(_) => println!("== {name}: passed"),
        Outcome::Failed(why) => println!("== {name}: FAILED: {why}"),
        Outcome::Skipped(why) => println!("== {name}: skipped: {why}"),
    }
}

/// A tier that cannot run is skipped, but fails where everything is expected to be there.
fn cannot_run(missing: &Missing, must: bool) -> Outcome {
    let why = format!("{}; enable: {}", missing.reason, missing.enable);
    if must {
        Outcome::Failed(format!("cannot run: {why}"))
    } else {
        Outcome::Skipped(why)
    }
}

fn run_tier(tier: &Tier, host: &Host, ci: bool) -> Outcome {
    let must = ci && !tier.optional;
    let commands = match (tier.needs)(host).and_then(|()| (tier.commands)(host)) {
        Ok(commands) => commands,
        Err(missing) => return cannot_run(&missing, must),
    };
    let mut tests = 0;
    for cmd in commands {
        let mut cmd = cmd.dir(host.root);
        if ci {
            // Nobody builds there twice: gigabytes that help nobody.
            cmd = cmd.env("CARGO_INCREMENTAL", "0");
        }
        let outcome = if tier.counts {
            cmd.run_watched(|line| tests += tests_in(line).unwrap_or(0))
        } else {
            cmd.run().map(|()| true)
        };
        match outcome {
            Ok(true) => {}
            Ok(false) => return Outcome::Failed(format!("`{cmd}` failed")),
            Err(error) => return Outcome::Failed(format!("{error:#}")),
        }
    }
    match tests {
        0 if tier.counts => Outcome::Failed("no test ran".into()),
        0 => Outcome::Passed(String::new()),
        _ => Outcome::Passed(format!("tests: {tests}")),
    }
}

#[cfg(test)]
mod tests;
