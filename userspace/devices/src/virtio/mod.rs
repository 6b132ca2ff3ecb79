//! What all virtio devices share.

mod chain;
mod device;
mod log;
mod memory;
mod offer;
mod packed;
mod pin;
mod queue;
mod serve;
mod shared;
mod split;
mod status;

pub use chain::{Chain, MAX_SEGMENTS, Segment};
pub use device::{AtOnce, Device, Done, Lane, Refusal};
pub use log::{LogError, QueueLog, Words};
pub use memory::{Memory, MemoryError};
pub use offer::Offer;
pub use pin::{Access, Hold, MAX_RANGES, Pin};
pub use queue::{Broken, Format, Layout, Position, Queue, Setup};
pub use serve::{Control, End, Entered, Health, Running, Transport};
pub use shared::{SharedMemory, SharedMemoryError, SharedRegion};
pub use status::{Status, StatusError, Step};
