//! The in-kernel half of the `ebpf` mechanism.
//!
//! Attached to the raw tracepoints `kvm_mmio` and `kvm_pio`, which fire for each write before
//! KVM's I/O bus sees it. For writes of the vCPU threads that the loader registered, the program
//! finds the doorbell, stores the value in its slot and wakes the device task where that task
//! asks for it. It cannot keep an access from exiting: an in-kernel consumer (ioeventfd or
//! coalesced zone) that the loader has put at the same address does that.
//!
//! Where KVM has `KVM_SET_IOREGION_PROG`, `kvm_ioregion` is attached to single regions instead: it
//! matches and captures in the same way, and its verdict ends the access.
#![no_std]
#![no_main]
#![feature(asm_experimental_arch)]

mod deliver;
mod hook;
mod maps;
mod trace;
mod vcpu;

use core::ffi::c_void;

use aya_ebpf::{
    helpers::bpf_get_current_pid_tgid, macros::raw_tracepoint, programs::RawTracePointContext,
};
use ioregion_abi::kvm::verdict;

/// `KVM_TRACE_MMIO_WRITE` of `include/trace/events/kvm.h`.
const MMIO_WRITE: u32 = 2;
/// `KVM_PIO_OUT` of `arch/x86/kvm/trace.h`.
const PIO_OUT: u32 = 1;

/// `kvm_mmio(int type, int len, u64 gpa, void *val)`
#[raw_tracepoint(tracepoint = "kvm_mmio")]
pub fn kvm_mmio(ctx: RawTracePointContext) -> i32 {
    if ctx.arg::<u32>(0) == MMIO_WRITE {
        trace::mmio_write(ctx.arg(1), ctx.arg(2), ctx.arg(3));
    }
    0
}

/// `kvm_pio(unsigned int rw, unsigned int port, unsigned int size, unsigned int count, void *data)`
#[raw_tracepoint(tracepoint = "kvm_pio")]
pub fn kvm_pio(ctx: RawTracePointContext) -> i32 {
    if ctx.arg::<u32>(0) == PIO_OUT {
        trace::pio_out(ctx.arg(1), ctx.arg(2), ctx.arg(3), ctx.arg(4));
    }
    0
}

/// Answers the id by which the programs above know the calling thread.
///
/// Never attached: the loader runs it by `BPF_PROG_TEST_RUN` on the thread in question, so that
/// thread ids mean the same on both sides in any PID namespace.
///
/// Written without aya's macro, which drops the return value.
#[unsafe(no_mangle)]
#[unsafe(link_section = "raw_tracepoint/sys_enter")]
pub extern "C" fn whoami(_ctx: *mut c_void) -> u32 {
    bpf_get_current_pid_tgid() as u32
}

/// Called by KVM for each access to a region that it is attached to; returns the verdict.
///
/// Never attached to a tracepoint. Written without aya's macro, for the same reason.
#[unsafe(no_mangle)]
#[unsafe(link_section = "raw_tracepoint/kvm_ioregion")]
pub extern "C" fn kvm_ioregion(ctx: *mut c_void) -> u32 {
    let ctx = RawTracePointContext::new(ctx);
    if hook::is_shown_by_kvm(&ctx) {
        hook::access(&ctx)
    } else {
        verdict::PASS
    }
}

#[panic_handler]
fn panic(_info: &core::panic::PanicInfo) -> ! {
    loop {}
}

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
