//! What all virtio devices share.

mod chain;
mod device;
mod log;
mod memory;
mod packed;
mod pin;
mod queue;
mod split;

pub use chain::{Chain, MAX_SEGMENTS, Segment};
pub use device::{AtOnce, Device, Done, Lane, Refusal};
pub use log::{LogError, QueueLog, Words};
pub use memory::{Memory, MemoryError};
pub use pin::{Access, Hold, MAX_RANGES, Pin};
pub use queue::{Broken, Format, Layout, Position, Queue, Setup};
