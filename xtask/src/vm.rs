//! `cargo xtask vm`: a kernel, an initramfs made here, QEMU, and a verdict.

mod accelerator;
mod console;
mod cpio;
mod initramfs;
mod modules;
mod options;
mod pace;
mod plants;
mod qemu;
mod results;
mod share;
mod show;
mod stock;
pub mod suite;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::apt::{self, Package};
use crate::kernel::KernelArgs;
use crate::lock::Lock;
use crate::sh::{Cmd, table, which};
use crate::toolchain::Missing;
use crate::{ebpf, kernel, setup};
pub use accelerator::Choice;
use initramfs::Initramfs;
pub use options::{KernelChoice, VmArgs};
use plants::Plant;
use qemu::{Accelerator, Logs, Machine};
use share::Dealer;

/// Packages whose tests run guests, and so run in the VM.
pub const GUEST_PACKAGES: [&str; 3] = [
    "ioregion-conformance",
    "ioregion-loader",
    "ioregion-microguest",
];

/// Packages whose tests use devices of the machine under test, and so run nowhere but in the VM.
pub const VM_PACKAGES: [&str; 1] = ["ioregion"];

/// Modules of a kernel that has KVM, network devices and vDPA as modules; of the two makes of CPU
/// one refuses to load.
const MODULES: [&str; 9] = [
    "kvm_amd",
    "kvm_intel",
    "veth",
    "tun",
    "vduse",
    // Before vhost_vdpa: it is the first to look at a device.
    "virtio_vdpa",
    "vhost_vdpa",
    "virtio_blk",
    "virtio_net",
];

/// Programs of this machine that tests start.
const HOST_PROGRAMS: [&str; 5] = ["ip", "unshare", "mkfs.ext4", "e2fsck", "resize2fs"];

/// Where the eBPF program lies in the VM; the object that logs lies beside it, as here.
pub const OBJECT: &str = "/ioregion/ioregion.bpf.o";
const LOGGING_OBJECT: &str = "/ioregion/ioregion-log.bpf.o";

/// What unpacks a kernel's modules.
const PACKAGES: [Package; 4] = [
    Package::new("xz", "xz-utils", "unpacking kernel modules"),
    Package::new("ldd", "libc-bin", "finding the libraries of programs"),
    Package::new("mkfs.ext4", "e2fsprogs", "file systems on disks under test"),
    Package::new("fio", "fio", "verifying disks under test"),
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
    match kernel.variant() {
        None => stock::check(),
        Some(variant) => kernel::check(variant),
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

/// A run of the VM that passed.
#[derive(Debug)]
pub struct Passed {
    /// The kernel, for people.
    pub kernel: String,
    /// From power on to the verdict; nothing where faults were planted.
    pub verdict: Duration,
}

/// Boots the VM that the arguments describe; an error where it fails.
pub fn run(root: &Path, args: &VmArgs) -> Result<Passed> {
    setup()?;
    let kernel = kernel(root, args)?;
    println!("{}: {}", kernel.what, kernel.image.display());
    let init = match &args.init {
        Some(init) => init.clone(),
        None => suite::init(root)?,
    };
    let (dir, _lock) = working_folder(&root.join("target/vm"), args.kernel_name())?;
    let accelerator = match (args.icount, args.accel) {
        (Some(shift), _) => Accelerator::Counted { shift },
        (None, Choice::Tcg) => Accelerator::Emulation,
        (None, Choice::TcgParallel) => Accelerator::Parallel,
        (None, Choice::Kvm) => Accelerator::Kvm,
        (None, Choice::Auto) => accelerator::choose(&kernel, &init, &dir.join("probe"))?,
    };
    let vm = Prepared {
        root,
        args,
        kernel,
        init,
        dir,
        accelerator,
    };
    let plants = args.plants();
    let verdict = if plants.is_empty() {
        vm.run_programs()?
    } else {
        vm.run_plants(&plants)?;
        Duration::ZERO
    };
    Ok(Passed {
        kernel: vm.kernel.what,
        verdict,
    })
}

/// Everything but the contents of a VM.
struct Prepared<'a> {
    root: &'a Path,
    args: &'a VmArgs,
    kernel: Kernel,
    init: PathBuf,
    /// For the initramfs and logs.
    dir: PathBuf,
    accelerator: Accelerator,
}

impl Prepared<'_> {
    /// An initramfs that loads modules and runs nothing.
    fn initramfs(&self) -> Result<Initramfs> {
        let mut initramfs = Initramfs::new(&self.init)?;
        if let Some(folder) = &self.kernel.modules {
            let mut wanted = MODULES.to_vec();
            wanted.extend(self.args.modules.iter().map(String::as_str));
            initramfs.modules(modules::read(folder, &wanted)?)?;
        }
        Ok(initramfs)
    }

    fn machine(&self, append: &[&str]) -> Machine {
        let mut all = self.args.append.clone();
        all.extend(append.iter().map(ToString::to_string));
        Machine {
            image: self.kernel.image.clone(),
            initrd: self.dir.join("initramfs.cpio"),
            cpus: self.args.cpus(),
            memory_mib: self.args.mem,
            accelerator: self.accelerator,
            append: all,
            dealer: None,
        }
    }

    /// The ordinary run: all programs, in one VM or shared by several.
    fn run_programs(&self) -> Result<Duration> {
        let mut initramfs = self.initramfs()?;
        for (name, value) in pace::environment(self.accelerator, self.args) {
            initramfs.env(&name, &value);
        }
        fill(&mut initramfs, self.root, self.args)?;
        let mut machine = self.machine(&[]);
        let jobs = initramfs.jobs();
        let vms = share::vms(self.accelerator, self.args, jobs);
        if vms > 1 {
            initramfs.share();
            machine.dealer = Some(Arc::new(Dealer::default()));
        }
        let size = initramfs.write(&machine.initrd)?;
        println!(
            "initramfs: {jobs} programs for {vms} VMs, {} MiB",
            size >> 20
        );

        let base = self.root.join("target/vm");
        let mut folders = vec![(self.dir.clone(), None)];
        for _ in 1..vms {
            let (dir, lock) = working_folder(&base, self.args.kernel_name())?;
            folders.push((dir, Some(lock)));
        }
        let vms: Vec<(Machine, Logs)> = folders
            .iter()
            .map(|(dir, _)| (machine.clone(), Logs::new(dir)))
            .collect();
        let limit = Duration::from_secs(self.args.timeout);
        let runs = share::run(&vms, limit)?;
        print!("\n{}", show::summary(&runs));
        for (dir, _) in &folders {
            println!("logs: {}", dir.display());
        }
        if self.args.keep {
            println!("again by hand: {}", machine.command(&vms[0].1));
        } else {
            // Large, and made anew each time.
            let _ = std::fs::remove_file(&machine.initrd);
        }
        let failures = share::failures(&runs, jobs, limit);
        if !failures.is_empty() {
            for (run, (_, logs)) in runs.iter().zip(&vms) {
                for tail in [&logs.qemu, &logs.kernel] {
                    show::tail(tail, run);
                }
            }
            bail!("the VM run failed:\n  {}", failures.join("\n  "));
        }
        let folder = self.args.results.clone();
        let folder = folder.unwrap_or_else(|| self.dir.join("results"));
        for run in &runs {
            for file in run.console.results.write(&folder)? {
                println!("result: {}", file.display());
            }
        }
        let time = runs.iter().map(|run| run.time).max().unwrap_or_default();
        println!(
            "VM passed: {jobs} programs, verdict {:.1} s after power on",
            time.as_secs_f64()
        );
        Ok(time)
    }

    /// Each fault in a VM of its own: every one must be noticed.
    fn run_plants(&self, plants: &[Plant]) -> Result<()> {
        let program = suite::plant(self.root)?;
        let mut rows = vec![["planted fault", "noticed", "as"].map(String::from)];
        let mut unnoticed = Vec::new();
        let limit = Duration::from_secs(self.args.timeout);
        for some in plants.chunks(share::room(self.accelerator, self.args)) {
            let mut vms = Vec::new();
            for plant in some {
                let name = plant.name();
                println!("\nplanting: {name}");
                let dir = self.dir.join(&name);
                std::fs::create_dir_all(&dir).context("a folder for logs")?;
                let mut initramfs = self.initramfs()?;
                initramfs.job(&name, &program, &plant.args(), plant.limit_s())?;
                let machine = Machine {
                    initrd: dir.join("initramfs.cpio"),
                    ..self.machine(plant.append().as_slice())
                };
                initramfs.write(&machine.initrd)?;
                vms.push((machine, Logs::new(&dir)));
            }
            let runs = share::run(&vms, limit)?;
            for ((plant, run), (machine, logs)) in some.iter().zip(runs).zip(&vms) {
                let _ = std::fs::remove_file(&machine.initrd);
                let failures = run.failures(1, limit);
                let noticed = plant.is_noticed(&run) && !failures.is_empty();
                if !noticed {
                    show::tail(&logs.kernel, &run);
                    unnoticed.push(plant.name());
                }
                let how = failures.first().cloned().unwrap_or_default();
                rows.push([plant.name(), if noticed { "yes" } else { "NO" }.into(), how]);
            }
        }
        print!("\n{}", table(&rows));
        println!("logs: {}", self.dir.display());
        if !unnoticed.is_empty() {
            bail!("planted faults went unnoticed: {}", unnoticed.join(", "));
        }
        println!("all {} planted faults were noticed", plants.len());
        Ok(())
    }
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
    let Some(variant) = args.kernel.variant() else {
        return stock::kernel();
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
    for pair in &args.files {
        let (file, path) = pair.split_once('=').context("--file takes FILE=PATH")?;
        initramfs.file(Path::new(file), path)?;
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
        // All of them, for any kernel: what one of them needs differs from what all need, and
        // would be built again.
        let packages = [&GUEST_PACKAGES[..], &VM_PACKAGES].concat();
        let suite = suite::build(root, &packages)?;
        for helper in &suite.helpers {
            let path = helper.to_str().context("a path that is no text")?;
            initramfs.program(helper, path)?;
        }
        let mut suite = suite;
        if args.has_patches() {
            // The longest one first: nobody waits for it at the end.
            suite.tests.insert(0, suite::selftests(root)?);
        }
        let known: Vec<&str> = suite.tests.iter().map(|test| test.name.as_str()).collect();
        if let Some(unknown) = args
            .tests
            .iter()
            .find(|test| !known.contains(&test.as_str()))
        {
            bail!("no test program {unknown}; there are: {}", known.join(", "));
        }
        let tests = suite.tests.iter();
        for test in tests.filter(|test| args.chooses(&test.package, &test.name)) {
            let test_args = match test.name.as_str() {
                suite::SELFTESTS => args.args.clone(),
                _ => args.test_args(),
            };
            initramfs.job(&test.name, &test.file, &test_args, args.job_timeout)?;
            // Its libraries are larger than everything else.
            if test.name.ends_with("_fio") {
                initramfs.host_program("fio")?;
            }
        }
    }
    for (number, words) in args.exec.iter().enumerate() {
        let (file, mut own) = options::program_and_arguments(words)?;
        initramfs::is_static_program(&file)?;
        let name = file.file_name().unwrap_or_default().to_string_lossy();
        let name: String = name.split_whitespace().collect();
        own.extend_from_slice(&args.args);
        // Different programs may have the same name.
        let name = match number {
            0 => name,
            _ => format!("{name}-{}", number + 1),
        };
        initramfs.job(&name, &file, &own, args.job_timeout)?;
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
