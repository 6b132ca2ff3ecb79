//! What all virtio devices share.

mod chain;
mod device;
mod memory;
mod packed;
mod queue;
mod split;

pub use chain::{Chain, MAX_SEGMENTS, Segment};
pub use device::{Device, Refusal};
pub use memory::{Memory, MemoryError};
pub use queue::{Broken, Format, Layout, Position, Queue, Setup};
