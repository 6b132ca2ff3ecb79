//! `cargo xtask bench --vduse`: disks over VDUSE in a VM, against a peer.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::json;

use super::{BenchArgs, COUNTED_LIMIT, MITIGATIONS, SHIFT};
use crate::apt::{self, Package};
use crate::sh::Cmd;
use crate::vm::{self, KernelChoice, VmArgs, suite};

/// The peer.
const PEER: &str = "qemu-storage-daemon";
const PACKAGES: [Package; 1] = [Package::new(PEER, "qemu-utils", "the peer of the disks")];
/// What the file lies on.
const MODULE: &str = "brd";

/// Measures.
pub fn run(root: &Path, args: &BenchArgs) -> Result<()> {
    apt::ensure(&PACKAGES)?;
    let program = |package, name| suite::program(root, suite::BENCH_DIR, package, name);
    let programs = Programs {
        init: program("ioregion-init", "init")?,
        bench: program("ioregion-bench", "ioregion-bench")?,
        service: program("ioregion", "ioregion")?,
    };
    let folder = root.join("target/vm/bench/disks");
    let measured = folder.join("disks.json");
    remove(&measured)?;
    let vm = machine(&programs, &folder, &args.args);
    let passed = vm::run(root, &vm)?;
    if !measured.exists() {
        println!("\nnothing is kept of a part of the loads");
        return Ok(());
    }
    let facts = json!({
        "kernel": KernelChoice::Stock.name(),
        "what": passed.kernel,
        "patches": [],
        "emulator": vm::emulator().unwrap_or_else(|missing| missing.reason),
        "boots": [{
            "boot": "counted",
            "cpus": 1,
            "ns_per_instruction": 1_u32 << SHIFT,
            "parameters": [MITIGATIONS[0]],
            "retries": [],
        }],
        "empty_seconds": null,
        "empty_verdict_seconds": null,
    });
    let file = folder.join("facts.json");
    std::fs::write(&file, facts.to_string())
        .with_context(|| format!("writing {}", file.display()))?;
    // What was built for the VM, which needs nothing of the system there or here.
    Cmd::new(&programs.bench)
        .arg("report-disks")
        .dir(root)
        .arg(measured)
        .arg("--facts")
        .arg(file)
        .args(args.check.then_some("--check"))
        .run()
}

/// Removes what an earlier run left.
fn remove(file: &Path) -> Result<()> {
    match std::fs::remove_file(file) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("removing {}", file.display()))
        }
        _ => Ok(()),
    }
}

/// What runs in the VM.
struct Programs {
    init: PathBuf,
    bench: PathBuf,
    service: PathBuf,
}

fn machine(programs: &Programs, results: &Path, args: &[String]) -> VmArgs {
    let mut vm = VmArgs::plain(KernelChoice::Stock);
    let service = programs.service.display().to_string();
    vm.init = Some(programs.init.clone());
    vm.exec = vec![programs.bench.display().to_string()];
    // By its whole path, where it is found in the VM, too.
    vm.tools = vec![PEER.into(), service.clone()];
    vm.modules = vec![MODULE.into()];
    vm.append = vec![MITIGATIONS[0].into()];
    vm.icount = Some(SHIFT);
    vm.results = Some(results.into());
    vm.timeout = COUNTED_LIMIT.as_secs();
    vm.job_timeout = u32::try_from(COUNTED_LIMIT.as_secs()).unwrap_or(u32::MAX);
    vm.args = ["disks".into(), "--program".into(), service].into();
    vm.args.extend_from_slice(args);
    vm
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_services_are_in_the_vm_and_time_is_counted() {
        let programs = Programs {
            init: "/p/init".into(),
            bench: "/p/bench".into(),
            service: "/p/ioregion".into(),
        };
        let vm = machine(&programs, Path::new("/o"), &["--rounds".into(), "3".into()]);
        assert_eq!(vm.tools, [PEER, "/p/ioregion"]);
        assert_eq!((vm.icount, vm.cpus()), (Some(SHIFT), 1));
        assert_eq!(vm.args.join(" "), "disks --program /p/ioregion --rounds 3");
        assert!(!vm.has_patches());
        assert_eq!(vm.modules, [MODULE]);
    }
}
