//! What the fuzz targets do with an input, and what must hold whatever the input is.
//!
//! A target panics where something is wrong. `cargo xtask fuzz` runs the targets;
//! `tests/corpus.rs` plays what they have found worth keeping.

mod message;
mod nvme;
mod ring;

pub use message::message;
pub use nvme::nvme;
pub use ring::{packed, split};

/// A target: its name and what it does with an input.
pub type Target = (&'static str, fn(&[u8]));

/// All targets; each has a program and a folder of `corpus` of its name.
pub const TARGETS: [Target; 4] = [
    ("message", message),
    ("nvme", nvme),
    ("packed", packed),
    ("split", split),
];
