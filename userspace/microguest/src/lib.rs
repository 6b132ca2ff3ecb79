//! A tiny KVM guest, assembled at run time, whose I/O accesses are known exactly.
//!
//! A [`Program`] lists what one vCPU does; [`MicroVm`] makes a VM, loads programs on vCPUs and
//! reads back what they saw and how long it took. The caller runs the vCPUs and answers their
//! exits: that is what the tests and benchmarks of this project are about.
//!
//! The guest runs in 32-bit flat protected mode without paging, so that it works on every KVM
//! for x86-64, software-nested ones included.
//!
//! ```no_run
//! use ioregion_microguest::{Bus, DEFAULT_RAM, MMIO_BASE, MicroVm, Program};
//! use kvm_ioctls::VcpuExit;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let mut program = Program::new();
//! program.write(Bus::Mmio, MMIO_BASE, 4, 42);
//! let vm = MicroVm::new(DEFAULT_RAM)?;
//! let mut vcpu = vm.vcpu(0, &program)?;
//! assert!(matches!(vcpu.run()?, VcpuExit::MmioWrite(MMIO_BASE, [42, 0, 0, 0])));
//! assert!(matches!(vcpu.run()?, VcpuExit::Hlt));
//! # Ok(())
//! # }
//! ```

mod assemble;
mod error;
mod layout;
mod program;
mod tsc;
mod vm;

pub use error::{Error, Result};
pub use ioregion_abi::Bus;
pub use layout::{AREA_BYTES, CELLS, DEFAULT_RAM, MAX_NESTING, MMIO_BASE, MMIO_END};
pub use program::Program;
pub use tsc::{TscClock, tsc_khz};
pub use vm::MicroVm;
