//! What KVM itself shows to the program: accesses to regions of `KVM_SET_IOREGION_PROG`.

use aya_ebpf::{EbpfContext as _, programs::RawTracePointContext};
use ioregion_abi::{
    Bus,
    bpf::{Fate, MatchEntry, MatchKey, VcpuRecord},
    kvm::{prog_arg, verdict},
    matching,
};

use crate::{deliver, maps::Doorbells, vcpu};

/// What becomes of an access: `KVM_IOREGION_PROG_*`.
///
/// Whatever is not known here goes to the device over the wire, so nothing can be lost.
#[inline(always)]
pub fn access(ctx: &RawTracePointContext) -> u32 {
    let Some(record) = vcpu::current().and_then(vcpu::record) else {
        return verdict::PASS;
    };
    let what = arg(ctx, prog_arg::WHAT);
    let bus = if what & prog_arg::PIO == 0 {
        Bus::Mmio
    } else {
        Bus::Pio
    };
    let write = what & prog_arg::WRITE != 0;
    let key = MatchKey::first(record.vm, bus, arg(ctx, prog_arg::ADDR), what as u8).hooked(write);
    if write {
        doorbell(&key, arg(ctx, prog_arg::DATA), record)
    } else {
        register(&key)
    }
}

#[inline(always)]
fn doorbell(key: &MatchKey, data: u64, record: &mut VcpuRecord) -> u32 {
    let Some(entry) = matching::find_from(&Doorbells, key, data) else {
        record.unmatched += 1;
        return verdict::PASS;
    };
    record.matched += 1;
    #[cfg(feature = "log")]
    aya_log_ebpf::debug!(&(), "doorbell {:x} <- {:x}", key.addr, data);
    match deliver::doorbell(&entry, data, record) {
        Fate::Captured if entry.flags & MatchEntry::SIGNAL != 0 => {
            verdict::with(verdict::SIGNAL, 0)
        }
        Fate::Captured => verdict::CONSUME,
        Fate::Announced | Fate::Unseen => verdict::PASS,
    }
}

#[inline(always)]
fn register(key: &MatchKey) -> u32 {
    match matching::find_from(&Doorbells, key, 0) {
        Some(entry) if entry.flags & MatchEntry::ANSWER != 0 => {
            verdict::with(verdict::ANSWER, entry.slot)
        }
        _ => verdict::PASS,
    }
}

/// Whether the arguments that no revision of the interface uses are as they should be.
///
/// What counts is that the last of them is read: the kernel attaches a program only to tracepoints
/// that have all arguments that it reads, so that whoever is handed this one for its regions
/// cannot have it look at anything else.
#[inline(always)]
pub fn is_shown_by_kvm(ctx: &RawTracePointContext) -> bool {
    arg(ctx, prog_arg::LAST) == 0
}

/// An argument. Volatile: none is left out because nothing depends on it.
#[inline(always)]
fn arg(ctx: &RawTracePointContext, number: usize) -> u64 {
    // SAFETY: The kernel passes twelve words; the verifier allows no others.
    unsafe { ctx.as_ptr().cast::<u64>().add(number).read_volatile() }
}
