//! Building the eBPF program with a toolchain called by path.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::setup::BpfTools;
use crate::sh::Cmd;
use crate::toolchain::{BPF_TARGET, Core};

/// Package and binary name of the eBPF program.
const PACKAGE: &str = "ioregion-ebpf";
/// Apart from the host programs' target folder, so that neither build waits for the other.
const TARGET_DIR: &str = "target/bpf-build";
/// Crates that use unstable features, for compilers that are not nightly.
const UNSTABLE_CRATES: &str = "aya_ebpf,ioregion_ebpf";

/// The object that `build` writes.
pub fn object(root: &Path, log: bool) -> PathBuf {
    let suffix = if log { "-log" } else { "" };
    root.join(format!("target/bpf/ioregion{suffix}.bpf.o"))
}

/// The toolchain's cargo (or another program that speaks its command line) on the eBPF package.
fn cargo(tools: &BpfTools, root: &Path, program: &str, command: &str, log: bool) -> Cmd {
    let toolchain = &tools.toolchain;
    let mut cmd = Cmd::new(toolchain.bin(program))
        .scrubbed()
        .dir(root)
        .env("CARGO", toolchain.bin("cargo"))
        .env("RUSTC", toolchain.bin("rustc"))
        .env("CARGO_TARGET_BPFEL_UNKNOWN_NONE_LINKER", &tools.linker);
    if !toolchain.nightly {
        let crates = match toolchain.core {
            Some(Core::Precompiled) => UNSTABLE_CRATES,
            _ => "1",
        };
        cmd = cmd.env("RUSTC_BOOTSTRAP", crates);
    }
    cmd = cmd
        .arg(command)
        .args(["--package", PACKAGE, "--bin", PACKAGE])
        .args(["--release", "--target", BPF_TARGET])
        .args(["--target-dir", TARGET_DIR]);
    if toolchain.core == Some(Core::Source) {
        cmd = cmd.args(["-Z", "build-std=core"]);
    }
    if log {
        cmd = cmd.args(["--features", "log"]);
    }
    cmd
}

/// Compiler flags of every eBPF build.
fn rustflags() -> String {
    let arch = std::env::consts::ARCH;
    format!("--cfg=bpf_target_arch=\"{arch}\" -Cdebuginfo=2 -Clink-arg=--btf")
}

/// Builds the program and puts the object where loaders look for it.
pub fn build(tools: &BpfTools, root: &Path, log: bool) -> Result<()> {
    cargo(tools, root, "cargo", "build", log)
        .env("RUSTFLAGS", rustflags())
        .run()?;
    let built = root
        .join(TARGET_DIR)
        .join(BPF_TARGET)
        .join("release")
        .join(PACKAGE);
    let object = object(root, log);
    let place = || -> std::io::Result<()> {
        std::fs::create_dir_all(object.with_file_name(""))?;
        // A loader may read the old object meanwhile: replace it in one step.
        let fresh = object.with_extension("o.new");
        std::fs::copy(&built, &fresh)?;
        std::fs::rename(&fresh, &object)
    };
    place().with_context(|| format!("cannot copy {} to {}", built.display(), object.display()))?;
    println!("{}", object.display());
    Ok(())
}

/// The commands that lint the program with and without its `log` feature, warnings denied:
/// clippy where the toolchain has it, else the compiler's own warnings.
pub fn lint(tools: &BpfTools, root: &Path) -> Vec<Cmd> {
    let clippy = tools.toolchain.bin("cargo-clippy").exists();
    let (program, command) = if clippy {
        ("cargo-clippy", "clippy")
    } else {
        println!(
            "{} has no clippy (Debian: package rust-web-clippy): checking {PACKAGE} with the \
             compiler's warnings denied instead",
            tools.toolchain.sysroot.display()
        );
        ("cargo", "check")
    };
    [false, true]
        .map(|log| {
            cargo(tools, root, program, command, log).env("RUSTFLAGS", rustflags() + " -Dwarnings")
        })
        .into()
}
