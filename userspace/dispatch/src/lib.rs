//! Carry a guest's register accesses to the code that emulates the device.
//!
//! * A [`Device`] is a model with registers and doorbells. It never knows what delivered an access.
//! * A [`Region`] is an address range with a device behind it; its [`Doorbell`]s are the writes
//!   that only have to be noticed.
//! * A [`mechanism`] is how accesses travel. [`Vm::assign`] puts a region on one of them,
//!   [`Vcpu::run`] runs the guest and carries what exits.
//! * A [`Channel`] is the VMM's end of a device task, [`server::DeviceEnd`] the task's own, which
//!   a thread, a tokio task or an io_uring serves, or which [`handoff`] gives to another process.
//! * A [`RegisterFile`] has the values of registers that may be read without asking the device.
//! * A [`Program`] is the eBPF program of the mechanism [`Ebpf`](mechanism::Ebpf).
//!
//! The semantics are those of the ioregionfd design discussion (2020–21); the README shows a
//! complete example and says what is promised.

pub mod arm;
pub mod channel;
pub mod device;
pub mod ebpf;
pub mod error;
mod frame;
pub mod handoff;
pub mod mechanism;
pub mod probe;
pub mod region;
mod registers;
pub mod server;
pub mod source;
mod sys;
mod vcpu;
mod vm;
mod waiter;
pub mod wire;

pub use channel::{Channel, Patience};
pub use device::{Access, BusAccess, Device, Ring};
pub use ebpf::{LoadError, Program, ProgramCounters};
pub use error::{RegionError, RegionErrorKind};
pub use frame::FrameError;
pub use ioregion_abi::{Bus, Size};
pub use mechanism::{Mechanism, RegionId, Via};
pub use region::{Answered, DataMatch, Delivery, Doorbell, Region, Sink, Wake};
pub use registers::RegisterFile;
pub use vcpu::{Exit, Vcpu, VcpuStats};
pub use vm::{Assigned, Event, Vm};
pub use waiter::Kicker;
pub use wire::Transport;

#[cfg(doctest)]
#[doc = include_str!("../../../README.md")]
struct Readme;
