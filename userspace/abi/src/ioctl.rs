//! Numbers of ioctls.

/// The caller writes the argument (`_IOW`).
pub(crate) const WRITE: u64 = 1;
/// The caller reads the argument (`_IOR`).
pub(crate) const READ: u64 = 2;
/// No argument, or one that is a number (`_IO`).
pub(crate) const NONE: u64 = 0;

/// Number of an ioctl, as `include/uapi/asm-generic/ioctl.h` makes it.
pub(crate) const fn number(direction: u64, kind: u32, nr: u64, size: usize) -> u64 {
    direction << 30 | (size as u64) << 16 | (kind as u64) << 8 | nr
}
