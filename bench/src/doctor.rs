//! What this host offers, with the reason for each "no" and what would enable it.

mod bpf;

use std::fs;
use std::path::Path;
use std::sync::Arc;

use ioregion_bench::results::{Host, Mechanism};
use ioregion_bench::table::Table;
use ioregion_dispatch::mechanism::Ioeventfd;
use ioregion_dispatch::{Channel, Doorbell, Program, Region, Size, Transport, Vm, probe};
use ioregion_microguest::{DEFAULT_RAM, MMIO_BASE, MicroVm, TscClock};
use kvm_ioctls::{Cap, Kvm};
use nix::sys::resource::{Resource, getrlimit};

use self::bpf::Attach;
use crate::run::post_write;
use crate::scenarios::EBPF_HOOK;

/// Why something is missing, and what would enable it.
#[derive(Debug, Clone)]
pub struct Missing {
    /// What the host said.
    pub reason: String,
    /// What to do.
    pub enable: String,
}

impl Missing {
    fn new(reason: impl ToString, enable: impl Into<String>) -> Self {
        Self {
            reason: reason.to_string(),
            enable: enable.into(),
        }
    }
}

/// A detail worth knowing, or why there is nothing.
type Finding = Result<String, Missing>;

const NEED_KVM: &str =
    "run on a host with KVM (modprobe kvm_intel or kvm_amd) as a user who may open /dev/kvm";
const NEED_PRIVILEGE: &str =
    "root, or CAP_BPF and CAP_PERFMON; kernel lockdown not `confidentiality`";

/// Each mechanism and whether this host offers it.
pub fn mechanisms() -> Vec<Mechanism> {
    let kvm = guest().map(drop);
    let rows = [
        ("kvm-run", kvm.clone()),
        ("forward", kvm.clone()),
        (
            "ioeventfd",
            kvm.clone().and_then(|()| ioeventfd().map(drop)),
        ),
        ("ebpf", kvm.and_then(|()| program().map(drop))),
        ("ioregionfd", ioregionfd().map(drop)),
        (EBPF_HOOK, hook().map(drop)),
        ("ioeventfd-post-write", post_write().map(drop)),
    ];
    rows.into_iter()
        .map(|(name, here)| Mechanism {
            name: name.to_owned(),
            available: here.is_ok(),
            reason: here.err().map_or_else(String::new, |m| {
                format!("{}; to enable: {}", m.reason, m.enable)
            }),
        })
        .collect()
}

/// The table of findings.
pub fn table() -> Table {
    let host = Host::gather();
    let rows: Vec<(&str, Finding)> = vec![
        ("/dev/kvm", kvm(&host)),
        (
            "guests run",
            guest().map(|_| "a 32-bit guest ran to its end".into()),
        ),
        ("coalesced MMIO", capability(Cap::CoalescedMmio)),
        ("coalesced PIO", capability(Cap::CoalescedPio)),
        ("ioeventfd, explicit length", ioeventfd()),
        ("KVM_SET_IOREGION (ioregionfd)", ioregionfd()),
        ("KVM_SET_IOREGION_PROG (ebpf without tracepoints)", hook()),
        ("ioeventfd POST_WRITE", post_write()),
        ("guest clock offset", clock_offset()),
        ("kernel lockdown", lockdown(&host)),
        ("unprivileged BPF", unprivileged_bpf()),
        ("/sys/kernel/btf/vmlinux", btf()),
        (
            "tracepoint kvm:kvm_mmio (raw)",
            attached(Attach::RawTracepoint("kvm_mmio")),
        ),
        (
            "tracepoint kvm:kvm_pio (raw)",
            attached(Attach::RawTracepoint("kvm_pio")),
        ),
        (
            "tp_btf on kvm_mmio",
            attached(Attach::TypedTracepoint("kvm_mmio")),
        ),
        (
            "fentry on kvm_io_bus_write",
            attached(Attach::Fentry("kvm_io_bus_write")),
        ),
        ("kprobe programs", attached(Attach::Kprobe)),
        ("eBPF object", object()),
        ("eBPF program loads and attaches", program()),
        ("io_uring", io_uring()),
        ("two CPUs", cpus(&host)),
        ("descriptors for 10,000 ioeventfds", descriptors()),
    ];
    let mut table = Table::new(
        "What this host offers",
        ["what", "here", "detail or reason", "to enable"],
    );
    for (what, finding) in rows {
        let (here, detail, enable) = match finding {
            Ok(detail) => ("yes", detail, String::new()),
            Err(Missing { reason, enable }) => ("no", reason, enable),
        };
        table.push([what.to_owned(), here.to_owned(), detail, enable]);
    }
    table
}

fn kvm(host: &Host) -> Finding {
    let kvm = Kvm::new().map_err(|error| Missing::new(format!("/dev/kvm: {error}"), NEED_KVM))?;
    let kind = &host.kvm;
    Ok(format!(
        "API version {}, kind {} ({})",
        kvm.get_api_version(),
        kind.kind.name(),
        kind.told_by
    ))
}

fn guest() -> Result<MicroVm, Missing> {
    let missing = |error: &dyn std::fmt::Display| Missing::new(error, NEED_KVM);
    let guest = MicroVm::new(DEFAULT_RAM).map_err(|error| missing(&error))?;
    let program = ioregion_microguest::Program::new();
    let mut vcpu = guest.vcpu(0, &program).map_err(|error| missing(&error))?;
    match vcpu.run() {
        Ok(kvm_ioctls::VcpuExit::Hlt) => {}
        Ok(exit) => return Err(missing(&format!("the guest stopped with {exit:?}"))),
        Err(error) => return Err(missing(&error)),
    }
    drop(vcpu);
    Ok(guest)
}

fn capability(cap: Cap) -> Finding {
    let kvm = Kvm::new().map_err(|error| Missing::new(error, NEED_KVM))?;
    match kvm.check_extension_int(cap) {
        n if n > 0 => Ok(String::new()),
        _ => Err(Missing::new(
            "KVM does not report the capability",
            "a kernel with CONFIG_KVM_MMIO, 4.20 or newer",
        )),
    }
}

/// Tried with a real doorbell.
fn ioeventfd() -> Finding {
    let guest = guest()?;
    let (channel, _wire) = Channel::pair(Transport::Stream)
        .map_err(|error| Missing::new(error, "more descriptors (ulimit -n)"))?;
    let region = Region::mmio(MMIO_BASE, 4096).doorbell(Doorbell::new(0, Size::B4));
    let vm = Vm::new(Arc::clone(guest.vm()));
    match vm.assign(&region, &Ioeventfd::new(&channel)) {
        Ok(_) => Ok(String::new()),
        Err(error) => Err(Missing::new(
            error,
            "a kernel with CONFIG_EVENTFD and KVM ioeventfds",
        )),
    }
}

fn ioregionfd() -> Finding {
    let enable = "a kernel with the ioregionfd patch series";
    match probe::ioregionfd(guest()?.vm()) {
        Ok(true) => Ok(String::new()),
        Ok(false) => Err(Missing::new("this kernel has no KVM_SET_IOREGION", enable)),
        Err(error) => Err(Missing::new(error, enable)),
    }
}

fn hook() -> Finding {
    let enable = "a kernel with the ioregionfd patch series and BPF";
    match probe::ebpf_hook(guest()?.vm()) {
        Ok(true) => Ok(String::new()),
        Ok(false) => Err(Missing::new(
            "this kernel has no KVM_SET_IOREGION_PROG",
            enable,
        )),
        Err(error) => Err(Missing::new(error, enable)),
    }
}

fn post_write() -> Finding {
    match post_write::is_supported(guest()?.vm()) {
        true => Ok(String::new()),
        false => Err(Missing::new(
            "this kernel has no ioeventfd POST_WRITE",
            "a kernel with the optional last patch of the ioregionfd series",
        )),
    }
}

fn clock_offset() -> Finding {
    let guest = MicroVm::new(DEFAULT_RAM).map_err(|error| Missing::new(error, NEED_KVM))?;
    let vcpu = guest
        .vcpu(0, &ioregion_microguest::Program::new())
        .map_err(|error| Missing::new(error, NEED_KVM))?;
    let clock = TscClock::of(&vcpu);
    match clock.offset {
        Some(_) => Ok(format!(
            "{} kHz; notification latency can be measured",
            clock.khz
        )),
        None => Err(Missing::new(
            "KVM does not tell the TSC offset, so there is no notification latency",
            "kernel 5.16 or newer (KVM_VCPU_TSC_OFFSET)",
        )),
    }
}

fn lockdown(host: &Host) -> Finding {
    match host.lockdown.as_deref() {
        Some("confidentiality") => Err(Missing::new(
            "confidentiality: BPF may not read the kernel's data",
            "boot with lockdown=integrity or none",
        )),
        Some(mode) => Ok(format!("{mode}; BPF tracing is allowed")),
        None if securityfs_is_mounted() => Ok("the kernel has no lockdown".into()),
        None => Err(Missing::new(
            "unknown: securityfs is not mounted",
            "mount -t securityfs none /sys/kernel/security (only to know)",
        )),
    }
}

fn securityfs_is_mounted() -> bool {
    fs::read_to_string("/proc/self/mounts")
        .is_ok_and(|mounts| mounts.contains(" /sys/kernel/security securityfs "))
}

fn unprivileged_bpf() -> Finding {
    let enable = "not needed by a privileged VMM; others use a privileged loader, since tracing wants CAP_BPF and CAP_PERFMON anyway";
    match fs::read_to_string("/proc/sys/kernel/unprivileged_bpf_disabled") {
        Ok(text) if text.trim() == "0" => Ok("kernel.unprivileged_bpf_disabled = 0".into()),
        Ok(text) => Err(Missing::new(
            format!("kernel.unprivileged_bpf_disabled = {}", text.trim()),
            enable,
        )),
        Err(error) => Err(Missing::new(error, enable)),
    }
}

fn btf() -> Finding {
    match Path::new("/sys/kernel/btf/vmlinux").metadata() {
        Ok(file) => Ok(format!("{} KiB", file.len() / 1024)),
        Err(error) => Err(Missing::new(
            error,
            "a kernel with CONFIG_DEBUG_INFO_BTF (only tp_btf and fentry need it)",
        )),
    }
}

fn attached(how: Attach) -> Finding {
    let enable = match how {
        Attach::RawTracepoint(_) => NEED_PRIVILEGE.into(),
        Attach::TypedTracepoint(_) => {
            format!(
                "KVM built in, CONFIG_DEBUG_INFO_BTF, {NEED_PRIVILEGE} (not used: raw tracepoints do)"
            )
        }
        Attach::Fentry(_) => {
            format!(
                "CONFIG_FUNCTION_TRACER with BTF and no lockdown, {NEED_PRIVILEGE} (not used: raw tracepoints do)"
            )
        }
        Attach::Kprobe => {
            "CONFIG_KPROBES and CONFIG_KPROBE_EVENTS (not used: raw tracepoints do)".into()
        }
    };
    how.attempt()
        .map(|()| "loaded and attached".into())
        .map_err(|reason| Missing::new(reason, enable))
}

fn object() -> Finding {
    match Program::find() {
        Ok(path) if path.is_file() => Ok(path.display().to_string()),
        Ok(path) => Err(Missing::new(
            format!("no file {}", path.display()),
            "cargo xtask build-ebpf",
        )),
        Err(error) => Err(Missing::new(error, "cargo xtask build-ebpf")),
    }
}

fn program() -> Finding {
    match Program::load_default() {
        Ok(_) => Ok(String::new()),
        Err(error) => Err(Missing::new(error, NEED_PRIVILEGE)),
    }
}

fn io_uring() -> Finding {
    match io_uring::IoUring::new(2) {
        Ok(_) => Ok(String::new()),
        Err(error) => Err(Missing::new(
            format!("io_uring_setup: {error}"),
            "kernel 5.6 or newer with kernel.io_uring_disabled = 0 (the blocking and tokio servers do without)",
        )),
    }
}

fn cpus(host: &Host) -> Finding {
    match host.cores {
        Some(n) if n >= 2 => Ok(format!("{n}")),
        n => Err(Missing::new(
            format!("{} CPU", n.unwrap_or(1)),
            "a second CPU: vCPU and device task share one, so waking costs a context switch",
        )),
    }
}

fn descriptors() -> Finding {
    let needed = crate::run::DESCRIPTORS;
    let (_, hard) =
        getrlimit(Resource::RLIMIT_NOFILE).map_err(|error| Missing::new(error, "getrlimit"))?;
    if hard >= needed
        || nix::sys::resource::setrlimit(Resource::RLIMIT_NOFILE, needed, needed).is_ok()
    {
        return Ok(format!("limit {}", hard.max(needed)));
    }
    Err(Missing::new(
        format!("the hard limit of open files is {hard}, {needed} are needed"),
        format!("`ulimit -Hn {needed}` by whoever has CAP_SYS_RESOURCE"),
    ))
}
