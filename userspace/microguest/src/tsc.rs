//! From the guest's time stamps to the host's and to nanoseconds.

use std::arch::x86_64::_rdtsc;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use kvm_bindings::{KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, kvm_device_attr};
use kvm_ioctls::VcpuFd;

/// `_IOW(KVMIO, 0xe2, struct kvm_device_attr)`.
const KVM_GET_DEVICE_ATTR: libc::c_ulong = 0x4018_aee2;

/// A vCPU's time stamp counter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TscClock {
    /// Ticks per millisecond.
    pub khz: u32,
    /// Guest ticks minus host ticks at the same instant; `None` where KVM does not say.
    pub offset: Option<i64>,
}

impl TscClock {
    /// The clock of `vcpu`; read it before the vCPU runs elsewhere, it stays the same.
    pub fn of(vcpu: &VcpuFd) -> Self {
        Self {
            khz: tsc_khz(vcpu),
            offset: tsc_offset(vcpu),
        }
    }

    /// A number of ticks in nanoseconds.
    pub fn ns(&self, ticks: u64) -> f64 {
        ticks as f64 * 1e6 / f64::from(self.khz)
    }

    /// What the host's counter (`rdtsc`) showed when the guest's showed `guest`; `None` where the
    /// offset is unknown.
    pub fn host_ticks(&self, guest: u64) -> Option<u64> {
        Some(guest.wrapping_sub(self.offset? as u64))
    }
}

/// Frequency of the vCPU's TSC in kHz: KVM's word, else measured against the monotonic clock
/// over 20 ms.
pub fn tsc_khz(vcpu: &VcpuFd) -> u32 {
    match vcpu.get_tsc_khz() {
        Ok(khz) if khz > 0 => khz,
        _ => calibrate(),
    }
}

fn calibrate() -> u32 {
    // SAFETY: every x86-64 CPU has RDTSC, and Linux does not forbid it to user space.
    let rdtsc = || unsafe { _rdtsc() };
    let (start, ticks) = (Instant::now(), rdtsc());
    std::thread::sleep(Duration::from_millis(20));
    let (time, ticks) = (start.elapsed(), rdtsc().wrapping_sub(ticks));
    u32::try_from(u128::from(ticks) * 1_000_000 / time.as_nanos())
        .unwrap_or(u32::MAX)
        .max(1)
}

fn tsc_offset(vcpu: &VcpuFd) -> Option<i64> {
    let mut offset = 0_i64;
    let attr = kvm_device_attr {
        group: KVM_VCPU_TSC_CTRL,
        attr: KVM_VCPU_TSC_OFFSET.into(),
        addr: &raw mut offset as u64,
        flags: 0,
    };
    // SAFETY: `attr` is a valid structure, and KVM writes the 8 bytes that its `addr` points at.
    let result =
        unsafe { libc::ioctl(vcpu.as_raw_fd(), KVM_GET_DEVICE_ATTR as _, &raw const attr) };
    (result == 0).then_some(offset)
}
