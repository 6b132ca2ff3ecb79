//! The configuration space of a disk.

use crate::disk::Image;

/// Most ranges of data in a request; two more descriptors carry its header and its status.
const SEG_MAX: u32 = 126;
/// Most sectors of one range to discard or to zero: 2 GiB.
pub(super) const MAX_RANGE_SECTORS: u32 = 1 << 22;
/// Most ranges of one request to discard or to zero.
pub(super) const MAX_RANGES: u32 = 16;

/// Offsets in `struct virtio_blk_config`.
mod at {
    pub(super) const CAPACITY: usize = 0;
    pub(super) const SEG_MAX: usize = 12;
    pub(super) const BLK_SIZE: usize = 20;
    pub(super) const PHYSICAL_BLOCK_EXP: usize = 24;
    pub(super) const MIN_IO_SIZE: usize = 26;
    pub(super) const NUM_QUEUES: usize = 34;
    pub(super) const MAX_DISCARD_SECTORS: usize = 36;
    pub(super) const MAX_DISCARD_SEG: usize = 40;
    pub(super) const DISCARD_SECTOR_ALIGNMENT: usize = 44;
    pub(super) const MAX_WRITE_ZEROES_SECTORS: usize = 48;
    pub(super) const MAX_WRITE_ZEROES_SEG: usize = 52;
    pub(super) const WRITE_ZEROES_MAY_UNMAP: usize = 56;
    /// Up to the end of what the features here need.
    pub(super) const END: usize = 60;
}

/// The configuration space.
pub(super) fn space(image: &Image, queues: u16) -> Vec<u8> {
    let mut space = vec![0; at::END];
    let mut put = |at: usize, bytes: &[u8]| space[at..at + bytes.len()].copy_from_slice(bytes);
    put(at::CAPACITY, &image.sectors().to_le_bytes());
    put(at::SEG_MAX, &SEG_MAX.to_le_bytes());
    put(at::BLK_SIZE, &image.logical_block().to_le_bytes());
    // Blocks of 2^n logical ones: the file system's, which it writes whole.
    let (logical, physical) = (image.logical_block(), image.physical_block());
    let exponent = (physical / logical).max(1).ilog2();
    put(at::PHYSICAL_BLOCK_EXP, &exponent.to_le_bytes()[..1]);
    let min_io = u16::try_from(physical / logical).unwrap_or(1);
    put(at::MIN_IO_SIZE, &min_io.to_le_bytes());
    put(at::NUM_QUEUES, &queues.to_le_bytes());
    put(at::MAX_DISCARD_SECTORS, &MAX_RANGE_SECTORS.to_le_bytes());
    put(at::MAX_DISCARD_SEG, &MAX_RANGES.to_le_bytes());
    let alignment = physical / 512;
    put(at::DISCARD_SECTOR_ALIGNMENT, &alignment.to_le_bytes());
    put(
        at::MAX_WRITE_ZEROES_SECTORS,
        &MAX_RANGE_SECTORS.to_le_bytes(),
    );
    put(at::MAX_WRITE_ZEROES_SEG, &MAX_RANGES.to_le_bytes());
    put(at::WRITE_ZEROES_MAY_UNMAP, &[1]);
    space
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::mem::offset_of;
    use virtio_bindings::virtio_blk::virtio_blk_config as C;

    #[test]
    fn offsets_are_those_of_the_kernel_header() {
        assert_eq!(at::CAPACITY, offset_of!(C, capacity));
        assert_eq!(at::SEG_MAX, offset_of!(C, seg_max));
        assert_eq!(at::BLK_SIZE, offset_of!(C, blk_size));
        assert_eq!(at::PHYSICAL_BLOCK_EXP, offset_of!(C, physical_block_exp));
        assert_eq!(at::MIN_IO_SIZE, offset_of!(C, min_io_size));
        assert_eq!(at::NUM_QUEUES, offset_of!(C, num_queues));
        assert_eq!(at::MAX_DISCARD_SECTORS, offset_of!(C, max_discard_sectors));
        assert_eq!(at::MAX_DISCARD_SEG, offset_of!(C, max_discard_seg));
        let alignment = offset_of!(C, discard_sector_alignment);
        assert_eq!(at::DISCARD_SECTOR_ALIGNMENT, alignment);
        let sectors = offset_of!(C, max_write_zeroes_sectors);
        assert_eq!(at::MAX_WRITE_ZEROES_SECTORS, sectors);
        assert_eq!(
            at::MAX_WRITE_ZEROES_SEG,
            offset_of!(C, max_write_zeroes_seg)
        );
        let unmap = offset_of!(C, write_zeroes_may_unmap);
        assert_eq!(at::WRITE_ZEROES_MAY_UNMAP, unmap);
    }
}
