//! KVM requests that kvm-ioctls cannot express.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use ioregion_abi::Bus;
use ioregion_abi::kvm::{
    KVM_CAP_IOREGIONFD, KVM_CHECK_EXTENSION, KVM_CREATE_IOREGIONFD, KVM_IOEVENTFD,
    KVM_IOREGION_PIO, KVM_SET_IOREGION, KVM_SET_IOREGION_PROG, KvmIoregion, KvmIoregionProg,
    KvmIoregionfd,
};
use kvm_bindings::{
    kvm_coalesced_mmio_zone, kvm_coalesced_mmio_zone__bindgen_ty_1 as ZoneBus, kvm_ioeventfd,
    kvm_ioeventfd_flag_nr_datamatch as FLAG_DATAMATCH,
    kvm_ioeventfd_flag_nr_deassign as FLAG_DEASSIGN, kvm_ioeventfd_flag_nr_pio as FLAG_PIO,
};
use kvm_ioctls::{VcpuFd, VmFd};
use nix::sys::signal::SigSet;

/// `_IOW(KVMIO, 0x67, struct kvm_coalesced_mmio_zone)`
const KVM_REGISTER_COALESCED_MMIO: u64 = 0x4010_ae67;
/// `_IOW(KVMIO, 0x68, struct kvm_coalesced_mmio_zone)`
const KVM_UNREGISTER_COALESCED_MMIO: u64 = 0x4010_ae68;
/// `_IOW(KVMIO, 0x8b, struct kvm_signal_mask)`; the size is that of the `len` field alone.
const KVM_SET_SIGNAL_MASK: u64 = 0x4004_ae8b;

/// What an ioeventfd matches.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Ioeventfd {
    pub bus: Bus,
    pub addr: u64,
    /// Never 0: that would take the fast path, which bypasses the tracepoint.
    pub bytes: u8,
    pub datamatch: Option<u64>,
}

/// Assigns (or removes) an ioeventfd.
pub(crate) fn ioeventfd(
    vm: &VmFd,
    what: &Ioeventfd,
    eventfd: BorrowedFd<'_>,
    deassign: bool,
) -> io::Result<()> {
    let mut flags = 0;
    if what.bus == Bus::Pio {
        flags |= 1 << FLAG_PIO;
    }
    if what.datamatch.is_some() {
        flags |= 1 << FLAG_DATAMATCH;
    }
    if deassign {
        flags |= 1 << FLAG_DEASSIGN;
    }
    let request = kvm_ioeventfd {
        datamatch: what.datamatch.unwrap_or(0),
        addr: what.addr,
        len: what.bytes.into(),
        fd: eventfd.as_raw_fd(),
        flags,
        ..Default::default()
    };
    // SAFETY: The request number belongs to this struct, which KVM only reads.
    check(unsafe { libc::ioctl(vm.as_raw_fd(), KVM_IOEVENTFD, &raw const request) })
}

/// Waits until the vCPUs have finished what they are handling, or are in the guest: whatever
/// access they handle next comes after everything that was done before this call.
///
/// KVM waits so when it takes something off its I/O bus; here that is an ioeventfd at an address
/// that no guest reaches.
pub(crate) fn synchronize(vm: &VmFd) -> io::Result<()> {
    let eventfd = nix::sys::eventfd::EventFd::from_value_and_flags(
        0,
        nix::sys::eventfd::EfdFlags::EFD_CLOEXEC,
    )?;
    let what = Ioeventfd {
        bus: Bus::Mmio,
        addr: u64::MAX - 15,
        bytes: 8,
        datamatch: Some(!0),
    };
    ioeventfd(vm, &what, eventfd.as_fd(), false)?;
    ioeventfd(vm, &what, eventfd.as_fd(), true)
}

/// Registers (or removes) a coalesced zone. Removal takes whole zones: pass the same range.
pub(crate) fn coalesced_zone(
    vm: &VmFd,
    bus: Bus,
    addr: u64,
    size: u32,
    remove: bool,
) -> io::Result<()> {
    let zone = kvm_coalesced_mmio_zone {
        addr,
        size,
        __bindgen_anon_1: ZoneBus {
            pio: u32::from(bus == Bus::Pio),
        },
    };
    let request = if remove {
        KVM_UNREGISTER_COALESCED_MMIO
    } else {
        KVM_REGISTER_COALESCED_MMIO
    };
    // SAFETY: Both request numbers belong to this struct, which KVM only reads.
    check(unsafe { libc::ioctl(vm.as_raw_fd(), request, &raw const zone) })
}

/// Sets the signals that are blocked while the vCPU is in `KVM_RUN`.
pub(crate) fn set_signal_mask(vcpu: &VcpuFd, mask: &SigSet) -> io::Result<()> {
    #[repr(C)]
    struct SignalMask {
        len: u32,
        bits: [u8; 8],
    }
    let mut request = SignalMask {
        len: 8,
        bits: [0; 8],
    };
    // SAFETY: The kernel's signal set is the first 8 bytes of libc's.
    let bits = unsafe { std::ptr::from_ref(mask.as_ref()).cast::<[u8; 8]>().read() };
    request.bits = bits;
    // SAFETY: The struct is that of the request, with as many bytes as `len` says.
    check(unsafe { libc::ioctl(vcpu.as_raw_fd(), KVM_SET_SIGNAL_MASK, &raw const request) })
}

/// Revision of this kernel's `KVM_SET_IOREGION`; `None` if it has none.
///
/// The capability's number is an out-of-tree one that a later kernel may give to something else,
/// so the request itself must be known, too: flags that no revision defines are refused with
/// `EINVAL`, where other kernels answer `ENOTTY`.
pub(crate) fn ioregion_revision(vm: &VmFd) -> io::Result<Option<i32>> {
    // SAFETY: The request takes a number.
    let revision = unsafe { libc::ioctl(vm.as_raw_fd(), KVM_CHECK_EXTENSION, KVM_CAP_IOREGIONFD) };
    check(revision)?;
    if revision == 0 {
        return Ok(None);
    }
    let request = KvmIoregion {
        flags: u32::MAX,
        read_fd: -1,
        write_fd: -1,
        ..Default::default()
    };
    match set_ioregion(vm, &request) {
        Ok(()) => Err(io::Error::other("KVM_SET_IOREGION accepts undefined flags")),
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(Some(revision)),
        Err(error) if error.raw_os_error() == Some(libc::ENOTTY) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Assigns, modifies or removes a region.
pub(crate) fn set_ioregion(vm: &VmFd, request: &KvmIoregion) -> io::Result<()> {
    // SAFETY: The request number belongs to this struct, which KVM only reads.
    check(unsafe {
        libc::ioctl(
            vm.as_raw_fd(),
            KVM_SET_IOREGION,
            std::ptr::from_ref(request),
        )
    })
}

/// Whether `KVM_SET_IOREGION_PROG`, of a kernel that has `KVM_SET_IOREGION`, can attach programs:
/// it is there in any case, but does nothing where the kernel has no BPF.
pub(crate) fn has_ioregion_prog(vm: &VmFd) -> io::Result<bool> {
    let request = KvmIoregionProg {
        flags: u32::MAX,
        prog_fd: -1,
        regs_fd: -1,
        ..Default::default()
    };
    match set_prog(vm, &request) {
        Ok(()) => Err(io::Error::other(
            "KVM_SET_IOREGION_PROG accepts undefined flags",
        )),
        Err(error) => match error.raw_os_error() {
            Some(libc::EINVAL) => Ok(true),
            Some(libc::EOPNOTSUPP | libc::ENOTTY) => Ok(false),
            _ => Err(error),
        },
    }
}

/// What KVM shows the accesses to a region to.
#[derive(Debug, Clone, Copy)]
pub(crate) struct IoregionProg<'a> {
    pub program: BorrowedFd<'a>,
    pub registers: Option<BorrowedFd<'a>>,
    /// The eventfd with index 0, if there is one.
    pub eventfd: Option<BorrowedFd<'a>>,
}

/// Attaches a program to a region, or (`None`) detaches what is attached. When this returns, no
/// vCPU runs what was attached before.
pub(crate) fn set_ioregion_prog(
    vm: &VmFd,
    bus: Bus,
    addr: u64,
    size: u64,
    prog: Option<IoregionProg<'_>>,
) -> io::Result<()> {
    let raw = |fd: Option<BorrowedFd<'_>>| fd.map_or(-1, |fd| fd.as_raw_fd());
    let eventfd = prog.and_then(|prog| prog.eventfd);
    let eventfds = [raw(eventfd)];
    let request = KvmIoregionProg {
        guest_paddr: addr,
        memory_size: size,
        eventfds: eventfds.as_ptr() as u64,
        flags: if bus == Bus::Pio { KVM_IOREGION_PIO } else { 0 },
        prog_fd: raw(prog.map(|prog| prog.program)),
        regs_fd: raw(prog.and_then(|prog| prog.registers)),
        nr_eventfds: eventfd.is_some().into(),
        ..Default::default()
    };
    // `eventfds` outlives the call, which reads at most its one element.
    set_prog(vm, &request)
}

fn set_prog(vm: &VmFd, request: &KvmIoregionProg) -> io::Result<()> {
    // SAFETY: The request number belongs to this struct, which KVM only reads; callers keep what
    // it points to alive.
    check(unsafe {
        libc::ioctl(
            vm.as_raw_fd(),
            KVM_SET_IOREGION_PROG,
            std::ptr::from_ref(request),
        )
    })
}

/// Makes a purpose-made channel: KVM's end and the device's end.
pub(crate) fn create_ioregionfd(vm: &VmFd) -> io::Result<(OwnedFd, OwnedFd)> {
    let mut made = KvmIoregionfd {
        kvm_fd: -1,
        device_fd: -1,
    };
    // SAFETY: The request number belongs to this struct, which KVM fills in.
    check(unsafe { libc::ioctl(vm.as_raw_fd(), KVM_CREATE_IOREGIONFD, &raw mut made) })?;
    // SAFETY: KVM has just made both, and nobody else knows them.
    Ok(unsafe {
        (
            OwnedFd::from_raw_fd(made.kvm_fd),
            OwnedFd::from_raw_fd(made.device_fd),
        )
    })
}

fn check(ret: libc::c_int) -> io::Result<()> {
    if ret < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}
