//! What the host's KVM offers, for those who choose or report.

use std::io;

use kvm_ioctls::VmFd;

/// Whether this kernel has `KVM_SET_IOREGION` (the mechanism `ioregionfd`). Changes nothing.
///
/// # Errors
///
/// KVM's, if it answers in a way that says neither yes nor no.
pub fn ioregionfd(vm: &VmFd) -> io::Result<bool> {
    crate::sys::kvm::has_ioregion(vm)
}
