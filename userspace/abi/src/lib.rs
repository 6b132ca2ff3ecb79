//! Every byte layout that crosses a boundary of the ioregion project.
//!
//! * [`access`]: what one guest access is (bus, address, size, data) and how the kernel cuts it up.
//! * [`wire`]: the ioregionfd wire protocol, commands and responses.
//! * [`kvm`]: the `KVM_SET_IOREGION` interface of the ioregionfd design.
//! * [`vduse`]: the VDUSE interface, by which a virtio device lives in user space.
//! * [`bpf`]: keys and values of the eBPF program's maps.
//! * [`bucket`]: what it looks at before it looks into its hash maps.
//! * [`matching`]: the match rule, shared by the eBPF program and its user-space twin.
//!
//! The crate has no I/O and no `std`; the eBPF program is built from the same source.
#![no_std]

#[cfg(test)]
extern crate std;

pub mod access;
pub mod bpf;
pub mod bucket;
mod ioctl;
pub mod kvm;
pub mod matching;
pub mod vduse;
pub mod wire;

pub use access::{Bus, Direction, Size};
