//! What the host's KVM offers, for those who choose or report.

use std::io;

use ioregion_abi::kvm::KVM_IOREGION_ABI_VERSION;
use kvm_ioctls::VmFd;

use crate::sys::kvm;

/// Whether the mechanism `ioregionfd` can be used: this kernel has `KVM_SET_IOREGION`, in the
/// revision that this library knows. Changes nothing.
///
/// # Errors
///
/// KVM's, if it answers in a way that says neither yes nor no.
pub fn ioregionfd(vm: &VmFd) -> io::Result<bool> {
    Ok(kvm::ioregion_revision(vm)? == Some(KVM_IOREGION_ABI_VERSION))
}
