//! Carry a guest's register accesses to the device that emulates them.
// The crate's documentation is completed by the engineer.

pub mod arm;
pub mod channel;
pub mod device;
pub mod ebpf;
pub mod error;
mod frame;
pub mod handoff;
pub mod mechanism;
pub mod region;
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
pub use frame::FrameError;
pub use error::{RegionError, RegionErrorKind};
pub use ioregion_abi::{Bus, Size};
pub use mechanism::{Mechanism, RegionId};
pub use region::{DataMatch, Delivery, Doorbell, Region, Sink, Wake};
pub use vcpu::{Exit, Vcpu, VcpuStats};
pub use vm::{Assigned, Event, Vm};
pub use waiter::Kicker;
pub use wire::Transport;
