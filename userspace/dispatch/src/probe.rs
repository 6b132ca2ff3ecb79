//! What the host's KVM offers, for those who choose or report.

use std::io;

use ioregion_abi::kvm::KVM_IOREGION_ABI_VERSION;
use kvm_ioctls::VmFd;

use crate::sys::kvm;

/// Whether the mechanism `ebpf` can have KVM itself show accesses to its program
/// ([`Via::Hook`](crate::Via::Hook)). Changes nothing.
///
/// # Errors
///
/// KVM's, if it answers in a way that says neither yes nor no.
pub fn ebpf_hook(vm: &VmFd) -> io::Result<bool> {
    Ok(ioregionfd(vm)? && kvm::has_ioregion_prog(vm)?)
}

/// Whether the mechanism `ioregionfd` can be used: this kernel has `KVM_SET_IOREGION`, in the
/// revision that this library knows. Changes nothing.
///
/// # Errors
///
/// KVM's, if it answers in a way that says neither yes nor no.
pub fn ioregionfd(vm: &VmFd) -> io::Result<bool> {
    Ok(kvm::ioregion_revision(vm)? == Some(KVM_IOREGION_ABI_VERSION))
}
