//! What all virtio devices share.

mod chain;
mod device;
mod log;
mod offer;
mod packed;
mod queue;
mod serve;
mod shared;
mod split;
mod status;

pub use crate::memory::{Access, Hold, MAX_RANGES, Memory, MemoryError, Pin, Segment};
pub use chain::{Chain, MAX_SEGMENTS};
pub use device::{AtOnce, Device, Done, Lane, Refusal};
pub use log::{LogError, QueueLog, Words};
pub use offer::Offer;
pub use queue::{Broken, Format, Layout, Position, Queue, Setup};
pub use serve::{Control, End, Entered, Health, Running, Transport};
pub use shared::{SharedMemory, SharedMemoryError, SharedRegion};
pub use status::{Status, StatusError, Step};
