//! The floor: ioctls, mappings, and what happens where memory vanishes under an access.

mod guard;
mod ioctl;
mod mapping;

pub(crate) use ioctl::{number, pass, pass_bytes, receive_fd, update};
pub(crate) use mapping::Mapping;
