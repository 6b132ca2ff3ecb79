//! Making a bare kernel into a machine that programs can run on.

use std::fs::{DirBuilder, File, OpenOptions, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _};

use anyhow::{Context as _, Result};
use ioregion_init::{REPORT_TTY, RESULTS};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::kmod::{ModuleInitFlags, finit_module};
use nix::mount::{MsFlags, mount};
use nix::sys::resource::{Resource, setrlimit};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
use nix::sys::termios::{ControlFlags, SetArg, cfmakeraw, tcgetattr, tcsetattr};

/// File systems: type, where, options, and whether the machine is of use without it.
const MOUNTS: &[(&str, &str, &str, bool)] = &[
    ("proc", "/proc", "", false),
    ("sysfs", "/sys", "", false),
    ("devtmpfs", "/dev", "mode=0755", false),
    ("devpts", "/dev/pts", "mode=0620,ptmxmode=0666", true),
    ("tmpfs", "/dev/shm", "mode=1777", true),
    ("bpf", "/sys/fs/bpf", "mode=0700", true),
    ("debugfs", "/sys/kernel/debug", "mode=0700", true),
    ("tracefs", "/sys/kernel/tracing", "mode=0700", true),
    ("cgroup2", "/sys/fs/cgroup", "", true),
];

/// Mounts what programs expect; a file system that the kernel lacks matters only where nothing
/// works without it.
///
/// `/tmp` and `/run` are plain folders of the initramfs, which is memory, too: packed programs
/// may lie in them.
pub fn mount_all() -> Result<()> {
    for (place, mode) in [("/tmp", 0o1777), ("/run", 0o755), (RESULTS, 0o755)] {
        let make = || -> io::Result<()> {
            DirBuilder::new().recursive(true).create(place)?;
            std::fs::set_permissions(place, Permissions::from_mode(mode))
        };
        make().with_context(|| format!("making {place}"))?;
    }
    for &(kind, place, options, optional) in MOUNTS {
        let made = DirBuilder::new().recursive(true).mode(0o755).create(place);
        let mounted = made.map_err(anyhow::Error::from).and_then(|()| {
            let options = (!options.is_empty()).then_some(options);
            match mount(Some(kind), place, Some(kind), MsFlags::empty(), options) {
                // The kernel may have put devtmpfs there itself.
                Ok(()) | Err(Errno::EBUSY) => Ok(()),
                Err(error) => Err(error.into()),
            }
        });
        match mounted {
            Err(error) if !optional => return Err(error).context(format!("mounting {place}")),
            _ => {}
        }
    }
    Ok(())
}

/// The second serial line, raw: what is written comes out byte for byte.
pub fn report_line() -> Result<File> {
    let open = || -> io::Result<File> {
        // Opening would otherwise wait for a carrier.
        let line = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NOCTTY | libc::O_NONBLOCK)
            .open(REPORT_TTY)?;
        let mut settings = tcgetattr(&line)?;
        cfmakeraw(&mut settings);
        settings.control_flags |= ControlFlags::CLOCAL;
        tcsetattr(&line, SetArg::TCSANOW, &settings)?;
        let flags = OFlag::from_bits_retain(fcntl(&line, FcntlArg::F_GETFL)?);
        fcntl(&line, FcntlArg::F_SETFL(flags - OFlag::O_NONBLOCK))?;
        Ok(line)
    };
    open().with_context(|| format!("opening {REPORT_TTY}"))
}

/// Loads modules in order and returns those that would not load, with the reason: the module of
/// another make of CPU is expected to refuse.
pub fn load_modules(paths: &[String]) -> Vec<String> {
    let load = |path: &String| -> io::Result<()> {
        match finit_module(File::open(path)?, c"", ModuleInitFlags::empty()) {
            Ok(()) | Err(Errno::EEXIST) => Ok(()),
            Err(error) => Err(error.into()),
        }
    };
    paths
        .iter()
        .filter_map(|path| Some(format!("{path}: {}", load(path).err()?)))
        .collect()
}

/// Limits, names and the loopback interface.
pub fn prepare() -> Result<()> {
    // As a service manager would set them; a benchmark needs a descriptor for each doorbell.
    const FILES: u64 = 1 << 19;
    setrlimit(Resource::RLIMIT_NOFILE, 1 << 16, FILES).context("raising the file limit")?;
    let memlock = Resource::RLIMIT_MEMLOCK;
    setrlimit(memlock, libc::RLIM_INFINITY, libc::RLIM_INFINITY)
        .context("raising the locked memory limit")?;
    nix::unistd::sethostname("ioregion-vm").context("naming the machine")?;
    match loopback_up() {
        // A kernel without networking has none.
        Ok(()) | Err(Errno::EAFNOSUPPORT) => Ok(()),
        Err(error) => Err(error).context("bringing up lo"),
    }
}

fn loopback_up() -> nix::Result<()> {
    use std::os::fd::AsRawFd as _;
    let socket = socket(
        AddressFamily::Inet,
        SockType::Datagram,
        SockFlag::SOCK_CLOEXEC,
        None,
    )?;
    // SAFETY: All-zero bytes are a valid `ifreq`: integers, and arrays and pointers that the
    // kernel reads as such.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"lo") {
        *to = from.cast_signed();
    }
    let flags = libc::IFF_UP | libc::IFF_RUNNING;
    request.ifr_ifru.ifru_flags = libc::c_short::try_from(flags).map_err(|_| Errno::EINVAL)?;
    // SAFETY: The request is a complete `ifreq` that lives across the call.
    let done = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) };
    Errno::result(done).map(drop)
}

/// A VM of ours with a vCPU, kept until the machine powers off.
///
/// With the first VM and without the last one, the kernel rewrites its own code in the scheduler
/// (the static key behind preemption notifiers; others of KVM's with the first vCPU that has no
/// interrupt controller). Programs that make and drop VMs all the time would have it do so
/// thousands of times, and emulators that run CPUs in parallel lose the race between one CPU that
/// rewrites an instruction and another one that translates it: the kernel then dies of a
/// breakpoint (`int3`) that nobody set any more.
#[derive(Debug)]
pub struct KeptVm {
    _vcpu: VcpuFd,
    _vm: VmFd,
}

/// Makes a VM, or says why none can be made here.
pub fn kvm(unloaded: &[String]) -> Result<KeptVm, String> {
    let make = || {
        let vm = Kvm::new()?.create_vm()?;
        let vcpu = vm.create_vcpu(0)?;
        Ok(KeptVm {
            _vcpu: vcpu,
            _vm: vm,
        })
    };
    make().map_err(|error: kvm_ioctls::Error| {
        let mut why = format!("{error}");
        for module in unloaded {
            why.push_str(&format!("; {module}"));
        }
        why
    })
}
