//! The floor on which all unsafe code stands: system calls and shared memory.

pub(crate) mod bpf;
pub(crate) mod kvm;
pub(crate) mod mmap;
pub(crate) mod pidfd;
pub(crate) mod signal;
