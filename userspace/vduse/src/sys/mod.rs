//! The floor: ioctls, mappings, and what happens where memory vanishes under an access.

mod guard;
mod ioctl;
mod mapping;

pub(crate) use ioctl::{deregister, number, pass, pass_bytes, receive_fd, register, update};
pub(crate) use mapping::Mapping;
