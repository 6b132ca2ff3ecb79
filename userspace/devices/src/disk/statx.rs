//! What the file system says about direct I/O.

use std::fs::File;
use std::os::fd::AsRawFd as _;

/// What memory, and what places and lengths, must be multiples of (`STATX_DIOALIGN`): powers of
/// two. Nothing where the file system does not say, as before Linux 6.1.
pub(super) fn direct_alignment(file: &File) -> Option<(u32, u32)> {
    // SAFETY: All-zero bytes are a valid `statx`: it has nothing but integers.
    let mut told: libc::statx = unsafe { std::mem::zeroed() };
    // SAFETY: The descriptor is open, the path is empty and ends with a zero, and the struct is
    // complete.
    let done = unsafe {
        libc::statx(
            file.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            libc::STATX_DIOALIGN,
            &raw mut told,
        )
    };
    if done != 0 || told.stx_mask & libc::STATX_DIOALIGN == 0 {
        return None;
    }
    let (memory, offset) = (told.stx_dio_mem_align, told.stx_dio_offset_align);
    (memory.is_power_of_two() && offset.is_power_of_two()).then_some((memory, offset))
}
