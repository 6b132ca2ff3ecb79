//! `cargo xtask vm`: a kernel, an initramfs made here, QEMU, and a verdict.

mod accelerator;
mod console;
mod cpio;
mod initramfs;
mod modules;
mod options;
mod qemu;
mod stock;
mod suite;

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use ioregion_init::Report;

use crate::apt::{self, Package};
use crate::kernel::{KernelArgs, Variant};
use crate::lock::Lock;
use crate::sh::{Cmd, table, which};
use crate::toolchain::Missing;
use crate::{ebpf, kernel, setup};
use accelerator::Choice;
use console::Ran;
use initramfs::Initramfs;
pub use options::{KernelChoice, VmArgs};
use qemu::{Accelerator, Logs, Machine, Run};

/// Packages whose tests run guests, and so run in the VM.
pub const GUEST_PACKAGES: [&str; 3] = [
    "ioregion-conformance",
    "ioregion-loader",
    "ioregion-microguest",
];

/// Modules of a kernel that has KVM and network devices as modules; of the two makes of CPU one
/// refuses to load.
const MODULES: [&str; 4] = ["kvm_amd", "kvm_intel", "veth", "tun"];

/// Programs of this machine that tests start.
const HOST_PROGRAMS: [&str; 1] = ["unshare"];

/// Where the eBPF program lies in the VM; the object that logs lies beside it, as here.
const OBJECT: &str = "/ioregion/ioregion.bpf.o";
const LOGGING_OBJECT: &str = "/ioregion/ioregion-log.bpf.o";

/// What unpacks a kernel's modules.
const PACKAGES: [Package; 2] = [
    Package::new("xz", "xz-utils", "unpacking kernel modules"),
    Package::new("ldd", "libc-bin", "finding the libraries of programs"),
];

/// A kernel to boot.
#[derive(Debug)]
pub struct Kernel {
    /// For people.
    pub what: String,
    /// bzImage.
    pub image: PathBuf,
    /// The folder `lib/modules/VERSION`, unless everything is built in.
    pub modules: Option<PathBuf>,
}

/// Installs what starts VMs.
pub fn setup() -> Result<()> {
    apt::ensure(&PACKAGES)?;
    if which(qemu::PROGRAM).is_none() {
        println!("{} is missing (the test VM)", qemu::PROGRAM);
        apt::install_qemu()?;
    }
    Ok(())
}

/// Whether a VM with this kernel can run here, perhaps after set-up.
pub fn check(kernel: KernelChoice) -> Result<(), Missing> {
    if !apt::can_install() {
        apt::check(&PACKAGES)?;
        emulator()?;
    }
    match kernel {
        KernelChoice::Stock => stock::check(),
        KernelChoice::Patched | KernelChoice::Debug => kernel::check(),
    }
}

/// QEMU's version.
pub fn emulator() -> Result<String, Missing> {
    let missing = |why| {
        let enable = "`cargo xtask setup`, or the package qemu-system-x86 or the like";
        Missing::new(format!("{} {why}", qemu::PROGRAM), enable)
    };
    if which(qemu::PROGRAM).is_none() {
        return Err(missing("is not in PATH"));
    }
    let printed = Cmd::new(qemu::PROGRAM).arg("--version").probe();
    let printed = printed.ok_or_else(|| missing("does not start"))?;
    Ok(printed.lines().next().unwrap_or_default().to_owned())
}

/// The stock kernel in the cache, or why there is none yet.
pub fn stock_kernel() -> Result<String, Missing> {
    stock::check()?;
    Ok("in the cache, or fetched when it is needed".into())
}

/// Boots the VM that the arguments describe; an error where it fails.
pub fn run(root: &Path, args: &VmArgs) -> Result<()> {
    setup()?;
    let kernel = kernel(root, args)?;
    println!("{}: {}", kernel.what, kernel.image.display());
    let init = suite::init(root)?;
    let mut initramfs = Initramfs::new(&init)?;
    if let Some(folder) = &kernel.modules {
        let mut wanted = MODULES.to_vec();
        wanted.extend(args.modules.iter().map(String::as_str));
        initramfs.modules(modules::read(folder, &wanted)?)?;
    }
    fill(&mut initramfs, root, args)?;

    let (dir, _lock) = working_folder(&root.join("target/vm"), args.kernel_name())?;
    let accelerator = match (args.icount, args.accel) {
        (Some(shift), _) => Accelerator::Counted { shift },
        (None, Choice::Tcg) => Accelerator::Emulation,
        (None, Choice::Kvm) => Accelerator::Kvm,
        (None, Choice::Auto) => accelerator::choose(&kernel, &init, &dir.join("probe"))?,
    };
    let machine = Machine {
        image: kernel.image,
        initrd: dir.join("initramfs.cpio"),
        cpus: args.cpus(),
        memory_mib: args.mem,
        accelerator,
        append: args.append.clone(),
    };
    let jobs = initramfs.jobs();
    let size = initramfs.write(&machine.initrd)?;
    println!("initramfs: {jobs} programs, {} MiB", size >> 20);

    let logs = Logs::new(&dir);
    let limit = Duration::from_secs(args.timeout);
    let run = machine.run(&logs, limit, print_line)?;
    let failures = run.failures(jobs, limit);
    print!("\n{}", summary(&run));
    println!("logs: {}", dir.display());
    if args.keep {
        println!("again by hand: {}", machine.command(&logs));
    } else {
        // Large, and made anew each time.
        let _ = std::fs::remove_file(&machine.initrd);
    }
    if !failures.is_empty() {
        for tail in [&logs.qemu, &logs.kernel] {
            print_tail(tail, &run);
        }
        bail!("the VM run failed:\n  {}", failures.join("\n  "));
    }
    println!(
        "VM passed: {jobs} programs, verdict {:.1} s after power on",
        run.time.as_secs_f64()
    );
    Ok(())
}

fn kernel(root: &Path, args: &VmArgs) -> Result<Kernel> {
    if let Some(image) = &args.image {
        if !image.is_file() {
            bail!("--image: no file {}", image.display());
        }
        return Ok(Kernel {
            what: "given kernel".into(),
            image: std::path::absolute(image)?,
            modules: None,
        });
    }
    let variant = match args.kernel {
        KernelChoice::Stock => return stock::kernel(),
        KernelChoice::Patched => Variant::Patched,
        KernelChoice::Debug => Variant::Debug,
    };
    let built = kernel::build(root, variant, &KernelArgs::default())?;
    Ok(Kernel {
        what: built.what,
        image: built.image,
        modules: None,
    })
}

/// Adds the programs that the arguments name, and what they need.
fn fill(initramfs: &mut Initramfs, root: &Path, args: &VmArgs) -> Result<()> {
    for pair in &args.env {
        let (name, value) = pair.split_once('=').context("--env takes NAME=VALUE")?;
        initramfs.env(name, value);
    }
    for name in HOST_PROGRAMS
        .iter()
        .copied()
        .chain(args.tools.iter().map(String::as_str))
    {
        initramfs.host_program(name)?;
    }
    if args.runs_suite() {
        let tools = setup::setup()?;
        for (log, path) in [(false, OBJECT), (true, LOGGING_OBJECT)] {
            ebpf::build(&tools, root, log)?;
            initramfs.file(&ebpf::object(root, log), path)?;
        }
        initramfs.env("IOREGION_BPF_OBJECT", OBJECT);
        let suite = suite::build(root, &GUEST_PACKAGES)?;
        for helper in &suite.helpers {
            let path = helper.to_str().context("a path that is no text")?;
            initramfs.program(helper, path)?;
        }
        let known: Vec<&str> = suite.tests.iter().map(|test| test.name.as_str()).collect();
        if let Some(unknown) = args
            .tests
            .iter()
            .find(|test| !known.contains(&test.as_str()))
        {
            bail!("no test program {unknown}; there are: {}", known.join(", "));
        }
        let chosen = |name: &String| args.tests.is_empty() || args.tests.contains(name);
        for test in suite.tests.iter().filter(|test| chosen(&test.name)) {
            initramfs.job(&test.name, &test.file, &args.test_args(), args.job_timeout)?;
        }
    }
    for file in &args.exec {
        initramfs::is_static_program(file)?;
        let name = file.file_name().unwrap_or_default().to_string_lossy();
        initramfs.job(&name, file, &args.args, args.job_timeout)?;
    }
    Ok(())
}

/// A folder for logs that no other run uses at the moment: `base/name`, or with a number.
fn working_folder(base: &Path, name: &str) -> Result<(PathBuf, Lock)> {
    for number in 1..100 {
        let dir = match number {
            1 => base.join(name),
            _ => base.join(format!("{name}-{number}")),
        };
        if let Some(lock) = Lock::try_take(&dir)? {
            return Ok((dir, lock));
        }
    }
    bail!("{} is full of running VMs", base.display())
}

/// Prints what programs say as it comes, and reports in words.
fn print_line(line: &str, report: Option<&Report>) {
    match report {
        // The empty line before a report is the first process's.
        None => println!("{line}"),
        Some(Report::Start { name }) => println!("-- {name}"),
        Some(Report::End {
            name,
            millis,
            ending,
        }) => println!("-- {name}: {ending}, {:.1} s", seconds(*millis)),
        Some(Report::Kvm(Ok(()))) => println!("-- KVM is usable in the VM"),
        Some(Report::Kvm(Err(why))) => println!("-- KVM is not usable in the VM: {why}"),
        Some(Report::Broken(why)) => println!("-- gave up: {why}"),
        Some(Report::Verdict { passed, total }) => println!("-- {passed} of {total} passed"),
    }
}

fn seconds(millis: u64) -> f64 {
    Duration::from_millis(millis).as_secs_f64()
}

/// The programs with their results and times.
fn summary(run: &Run) -> String {
    let mut rows = vec![["program", "result", "seconds", "tests"].map(String::from)];
    for Ran {
        name,
        ending,
        millis,
        tests,
        ..
    } in &run.console.ran
    {
        let (result, time) = match ending {
            Some(ending) if ending.passed() => ("passed".into(), seconds(*millis)),
            Some(ending) => (format!("FAILED: {ending}"), seconds(*millis)),
            None => ("FAILED: did not end".into(), 0.0),
        };
        rows.push([
            name.clone(),
            result,
            format!("{time:.1}"),
            tests.to_string(),
        ]);
    }
    let mut text = if rows.len() > 1 {
        table(&rows)
    } else {
        String::new()
    };
    if !run.stopped.is_zero() {
        text.push_str(&format!(
            "the VM stood still for {:.0} s, stopped from outside\n",
            run.stopped.as_secs_f64()
        ));
    }
    text
}

/// Prints the end of a log: around the first fault where there is one.
fn print_tail(log: &Path, run: &Run) {
    const LINES: usize = 40;
    let text = std::fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<&str> = text.lines().collect();
    let first = run.console.faults.first().map(|fault| fault.number - 1);
    let is_kernel = log.ends_with("kernel.log");
    let start = match first.filter(|_| is_kernel) {
        Some(fault) => fault.saturating_sub(5),
        None => lines.len().saturating_sub(LINES),
    };
    if lines.is_empty() {
        return;
    }
    println!("\n{} from line {}:", log.display(), start + 1);
    for line in lines.iter().skip(start).take(LINES) {
        println!("| {}", line.trim_end());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folder_of_a_running_vm_is_left_alone() {
        let base = tempfile::tempdir().unwrap();
        let (first, lock) = working_folder(base.path(), "stock").unwrap();
        assert_eq!(first, base.path().join("stock"));
        let (second, _second) = working_folder(base.path(), "stock").unwrap();
        assert_eq!(second, base.path().join("stock-2"));
        drop(lock);
        assert_eq!(working_folder(base.path(), "stock").unwrap().0, first);
    }
}
