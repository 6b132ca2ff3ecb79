//! Whether this machine's KVM can run the VM: found out by booting it.
//!
//! `/dev/kvm` alone says little: there are kinds of KVM that run small guests but no Linux, and
//! hosts without nested virtualization, where the VM would have no KVM of its own.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::ValueEnum;

use super::initramfs::Initramfs;
use super::qemu::{Accelerator, Logs, Machine, Run};
use super::{Kernel, MODULES, emulator, modules};
use crate::sh::Cmd;
use crate::toolchain::cache_dir;

/// What the user wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Choice {
    /// KVM where it boots this kernel with KVM inside (tried once, then remembered)
    Auto,
    /// Emulation
    Tcg,
    /// Emulation with CPUs that run at the same time: a guest in the VM hangs now and then
    TcgParallel,
    /// KVM
    Kvm,
}

/// How long the trial boot may take.
const TRIAL: Duration = Duration::from_secs(15);

/// KVM where a trial boot shows that it works, else emulation.
pub fn choose(kernel: &Kernel, init: &Path, dir: &Path) -> Result<Accelerator> {
    let usable = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/kvm");
    if let Err(error) = usable {
        println!("emulated VM: /dev/kvm cannot be opened: {error}");
        return Ok(Accelerator::Emulation);
    }
    let memory = cache_dir().join("accelerators");
    let key = key(kernel);
    let known = std::fs::read_to_string(&memory).unwrap_or_default();
    let finding = match recall(&known, &key) {
        Some(finding) => finding.to_owned(),
        None => {
            println!("trying whether this machine's KVM boots the VM");
            let finding = trial(kernel, init, dir)?;
            std::fs::write(&memory, format!("{known}{key}\t{finding}\n"))
                .with_context(|| format!("writing {}", memory.display()))?;
            finding
        }
    };
    if finding == WORKS {
        println!("VM under KVM");
        return Ok(Accelerator::Kvm);
    }
    println!(
        "emulated VM: under KVM {finding} (remembered in {})",
        memory.display()
    );
    Ok(Accelerator::Emulation)
}

const WORKS: &str = "works";

/// What the finding depends on: this machine's kernel, KVM and CPU, QEMU, and the VM's kernel.
fn key(kernel: &Kernel) -> String {
    let host = Cmd::line("uname -rv").probe().unwrap_or_default();
    let cpus = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let cpu = cpus.lines().find(|line| line.starts_with("model name"));
    let nested = ["kvm_amd", "kvm_intel"].map(|module| {
        std::fs::read_to_string(format!("/sys/module/{module}/parameters/nested"))
            .map_or("-".into(), |nested| nested.trim().to_owned())
    });
    let parts = [
        host,
        cpu.unwrap_or_default().to_owned(),
        nested.concat(),
        emulator().unwrap_or_default(),
        kernel.what.clone(),
    ];
    parts.join("|").replace(['\t', '\n'], " ")
}

/// The last finding with this key.
fn recall<'a>(known: &'a str, key: &str) -> Option<&'a str> {
    let of_key = |line: &'a str| line.strip_prefix(key)?.strip_prefix('\t');
    known.lines().rev().find_map(of_key)
}

/// Boots the kernel with nothing to run.
fn trial(kernel: &Kernel, init: &Path, dir: &Path) -> Result<String> {
    std::fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
    let mut initramfs = Initramfs::new(init)?;
    if let Some(folder) = &kernel.modules {
        initramfs.modules(modules::read(folder, &MODULES)?)?;
    }
    let machine = Machine {
        image: kernel.image.clone(),
        initrd: dir.join("initramfs.cpio"),
        cpus: 2,
        memory_mib: 512,
        accelerator: Accelerator::Kvm,
        append: Vec::new(),
        dealer: None,
    };
    initramfs.write(&machine.initrd)?;
    let run = machine.run(&Logs::new(dir), TRIAL, |_, _| {})?;
    let _ = std::fs::remove_file(&machine.initrd);
    Ok(judge(&run))
}

/// What a trial showed, on one line.
fn judge(run: &Run) -> String {
    let failures = run.failures(0, TRIAL);
    match (failures.first(), &run.console.kvm) {
        (Some(why), _) => format!("it fails: {}", why.replace(['\t', '\n'], " ")),
        (None, Some(Err(why))) => {
            let why = why.replace(['\t', '\n'], " ");
            format!("it has no KVM of its own: {why}")
        }
        (None, _) => WORKS.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::super::console::Console;
    use super::super::qemu::Ended;
    use super::*;

    fn run(ended: Ended, kvm: Result<(), String>) -> Run {
        let mut console = Console::default();
        console.kvm = Some(kvm);
        console.verdict = Some((0, 0));
        Run {
            console,
            ended,
            time: Duration::ZERO,
            stopped: Duration::ZERO,
        }
    }

    #[test]
    fn kvm_is_used_only_where_the_vm_boots_and_has_kvm_itself() {
        assert_eq!(judge(&run(Ended::ByItself, Ok(()))), WORKS);
        let no_nesting = judge(&run(Ended::ByItself, Err("none\nhere".into())));
        assert_eq!(no_nesting, "it has no KVM of its own: none here");
        assert!(judge(&run(Ended::TimeLimit, Ok(()))).starts_with("it fails: not done"));
    }

    #[test]
    fn last_finding_counts() {
        let known = "a|b\tworks\nc\tit fails\na|b\tit fails: x\n";
        assert_eq!(recall(known, "a|b"), Some("it fails: x"));
        assert_eq!(recall(known, "c"), Some("it fails"));
        assert_eq!(recall(known, "a"), None);
    }
}
