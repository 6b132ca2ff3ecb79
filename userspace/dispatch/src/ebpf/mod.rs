//! The user-space half of the eBPF program: loading it, telling it what to match, emptying the
//! coalesced ring.

mod binding;
mod buckets;
mod control;
mod loader;
mod local;
mod program;
mod protocol;
mod quota;
mod remote;
mod ring;
mod vm_program;

pub(crate) use binding::Binding;
pub(crate) use control::PortFds;
pub use loader::serve_vmm;
pub use program::{LoadError, Program, ProgramCounters};
pub(crate) use vm_program::{TableEntry, VmProgram};
