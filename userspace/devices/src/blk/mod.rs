//! A disk: virtio-blk over a file or a block device.

mod config;
mod lane;
mod request;

use std::io;
use std::path::Path;
use std::sync::Arc;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ,
    VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;

use crate::disk;
pub use crate::disk::{Image, ImageError, SECTOR};
use crate::virtio::{Device, Lane, Refusal};
use lane::BlkLane;

/// Bytes of a serial number.
pub const SERIAL_BYTES: usize = 20;

/// What a disk is besides its image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    /// The driver cannot write.
    pub read_only: bool,
    /// Queues, at least one.
    pub queues: u16,
    /// At most [`SERIAL_BYTES`] bytes.
    pub serial: String,
    /// Go past the page cache (`O_DIRECT`), as far as the file system and each request allow it.
    pub direct: bool,
    /// Leave requests to io_uring where the system has it, so that many are under way at a time;
    /// else each is carried out before the next one is looked at.
    pub io_uring: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            read_only: false,
            queues: 1,
            serial: String::new(),
            direct: false,
            io_uring: true,
        }
    }
}

/// A disk.
#[derive(Debug)]
pub struct Blk {
    image: Image,
    read_only: bool,
    queues: u16,
    serial: [u8; SERIAL_BYTES],
    io_uring: bool,
}

/// Why there is no disk.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BlkError {
    /// The image cannot be used.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// A disk without queues.
    #[error("a disk needs at least one queue")]
    NoQueues,
    /// A serial number that does not fit.
    #[error("the serial number {0:?} is longer than {SERIAL_BYTES} bytes")]
    Serial(String),
}

impl Blk {
    /// Opens the image, which nobody else may write meanwhile.
    ///
    /// # Errors
    ///
    /// Names the image and what is wrong with it, or the option.
    pub fn open(image: &Path, options: &Options) -> Result<Self, BlkError> {
        if options.queues == 0 {
            return Err(BlkError::NoQueues);
        }
        let mut serial = [0; SERIAL_BYTES];
        match serial.get_mut(..options.serial.len()) {
            Some(start) => start.copy_from_slice(options.serial.as_bytes()),
            None => return Err(BlkError::Serial(options.serial.clone())),
        }
        let opened = Image::open(image, options.read_only, options.direct)?;
        let io_uring = options.io_uring && disk::has_io_uring(&opened);
        tracing::info!(
            image = %image.display(),
            io_uring,
            direct = opened.has_direct(),
            "requests are carried out"
        );
        Ok(Self {
            image: opened,
            read_only: options.read_only,
            queues: options.queues,
            serial,
            io_uring,
        })
    }

    /// Takes the size over that the image has now: whether it is another. The driver does not
    /// know until it is told that the configuration has changed.
    ///
    /// # Errors
    ///
    /// An image without whole sectors; the size stays as it was.
    pub fn refresh(&self) -> Result<bool, ImageError> {
        self.image.refresh()
    }

    /// Sectors.
    #[must_use]
    pub fn capacity(&self) -> u64 {
        self.image.sectors()
    }
}

impl Device for Blk {
    fn kind(&self) -> u32 {
        VIRTIO_ID_BLOCK
    }

    fn features(&self) -> u64 {
        let mut bits = vec![
            VIRTIO_BLK_F_SEG_MAX,
            VIRTIO_BLK_F_BLK_SIZE,
            VIRTIO_BLK_F_TOPOLOGY,
            VIRTIO_BLK_F_FLUSH,
        ];
        if self.queues > 1 {
            bits.push(VIRTIO_BLK_F_MQ);
        }
        if self.read_only {
            bits.push(VIRTIO_BLK_F_RO);
        } else {
            bits.extend([VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_WRITE_ZEROES]);
        }
        bits.into_iter().fold(0, |all, bit| all | 1 << bit)
    }

    fn check_features(&self, features: u64) -> Result<(), Refusal> {
        // A driver that cannot tell a read-only disk would lose what it writes, one request
        // after the other.
        let needed = self.features() & 1 << VIRTIO_BLK_F_RO;
        match needed & !features {
            0 => Ok(()),
            missing => Err(Refusal::Missing(missing)),
        }
    }

    fn config(&self) -> Vec<u8> {
        config::space(&self.image, self.queues)
    }

    fn queues(&self) -> u16 {
        self.queues
    }

    fn lane(self: Arc<Self>, queue: u16, features: u64) -> io::Result<Box<dyn Lane>> {
        Ok(Box::new(BlkLane::new(self, queue, features)))
    }
}
