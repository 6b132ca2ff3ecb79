//! The store behind a disk of any kind: an image, and work on it.
//!
//! A device says what is to be done and where the driver's data lie; a store does it, at once or
//! through io_uring.

mod buffer;
mod engine;
mod image;
mod ring;
mod statx;

use std::io;
use std::os::fd::BorrowedFd;

use crate::memory::{Access, Memory, MemoryError, Pin};
use buffer::Buffer;
use engine::Engine;
pub use image::{Image, ImageError};

/// The unit of images, in bytes.
pub const SECTOR: u64 = 512;

/// Bytes that are copied between the driver's memory and the image at a time.
const CHUNK: u32 = 1 << 17;

/// What is to be done, checked: places lie on the disk.
#[derive(Debug)]
pub(crate) enum Work {
    /// Bytes of the image into the driver's memory.
    Read {
        /// First byte.
        at: u64,
        /// Bytes.
        len: u32,
    },
    /// And from there.
    Write {
        /// First byte.
        at: u64,
        /// Bytes.
        len: u32,
        /// It is done when the data is on the medium.
        safe: bool,
    },
    /// Everything written before is on the medium.
    Flush,
    /// Ranges to zero or to discard.
    Ranges {
        zero: bool,
        list: Vec<Range>,
        /// As of a write.
        safe: bool,
    },
}

/// A range to discard or to zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Range {
    /// First byte.
    pub(crate) at: u64,
    /// Bytes.
    pub(crate) len: u64,
    /// The space may be given back.
    pub(crate) unmap: bool,
}

/// Where the data of a piece of work are in the driver's memory.
pub(crate) trait Data {
    /// Copies out of them, `offset` bytes into them.
    fn read(&self, memory: &dyn Memory, offset: u32, into: &mut [u8]) -> Result<(), MemoryError>;

    /// Copies into them.
    fn write(&self, memory: &dyn Memory, offset: u32, from: &[u8]) -> Result<(), MemoryError>;

    /// Hands them to the kernel, where that is possible.
    fn pin(
        &self,
        memory: &dyn Memory,
        offset: u32,
        len: u32,
        access: Access,
    ) -> Result<Option<Pin>, MemoryError>;
}

/// Why work was not done.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Failure {
    /// The driver's memory is not there.
    #[error("{0}")]
    Memory(#[from] MemoryError),
    /// The image failed.
    #[error("{0}")]
    Image(#[from] io::Error),
}

/// Work that is over.
pub(crate) type Finished<D> = (D, Result<(), Failure>);

/// Whether the system has io_uring; says why not.
pub(crate) fn has_io_uring(image: &Image) -> bool {
    match engine::check(image) {
        Ok(()) => true,
        Err(error) => {
            let why = engine::remedy(&error);
            tracing::warn!(%error, why, "no io_uring: one request of a queue at a time");
            false
        }
    }
}

/// What does the work of one queue.
pub(crate) enum Store<D> {
    /// Each piece is done while it is submitted.
    AtOnce,
    /// Many are under way.
    Ring(Box<Engine<D>>),
}

impl<D: Data> Store<D> {
    /// By io_uring, where that is wanted and the system gives a ring. To be used by the thread
    /// that calls this.
    pub(crate) fn new(image: &Image, io_uring: bool, queue: u16) -> Self {
        if io_uring {
            match Engine::new(image) {
                Ok(engine) => return Self::Ring(Box::new(engine)),
                // There may be too many rings for the limit on locked memory.
                Err(error) => {
                    let why = engine::remedy(&error);
                    tracing::warn!(queue, %error, why, "no ring: one request at a time");
                }
            }
        }
        Self::AtOnce
    }

    /// Whether there is room for more work.
    pub(crate) fn wants(&self) -> bool {
        match self {
            Self::AtOnce => true,
            Self::Ring(engine) => engine.wants(),
        }
    }

    /// Takes work, and gives it back where it is over at once.
    pub(crate) fn submit(
        &mut self,
        image: &Image,
        work: Work,
        data: D,
        memory: &dyn Memory,
    ) -> Option<Finished<D>> {
        match self {
            Self::AtOnce => {
                let done = carry_out(image, &work, &data, memory);
                Some((data, done))
            }
            Self::Ring(engine) => engine.submit(image, work, data, memory),
        }
    }

    /// Sets about what was submitted.
    ///
    /// # Errors
    ///
    /// The system's, where trying again does not help.
    pub(crate) fn flush(&mut self) -> io::Result<()> {
        match self {
            Self::AtOnce => Ok(()),
            Self::Ring(engine) => engine.flush(),
        }
    }

    /// Work that was over since it was submitted.
    pub(crate) fn finished(&mut self, image: &Image, memory: &dyn Memory) -> Option<Finished<D>> {
        match self {
            Self::AtOnce => None,
            Self::Ring(engine) => engine.finished(image, memory),
        }
    }

    /// Readable when there may be something [`finished`](Self::finished).
    pub(crate) fn event(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Self::AtOnce => None,
            Self::Ring(engine) => Some(engine.event()),
        }
    }
}

/// Does a piece of work before it returns.
fn carry_out(
    image: &Image,
    work: &Work,
    data: &impl Data,
    memory: &dyn Memory,
) -> Result<(), Failure> {
    let buffer = |len: u32| Buffer::new(len.min(CHUNK) as usize, image.memory_align());
    match work {
        &Work::Read { at, len } => {
            let mut buffer = buffer(len);
            for (offset, piece) in chunks(len) {
                let piece = &mut buffer.bytes()[..piece];
                image.read(at + u64::from(offset), piece)?;
                data.write(memory, offset, piece)?;
            }
        }
        &Work::Write { at, len, safe } => {
            let mut buffer = buffer(len);
            for (offset, piece) in chunks(len) {
                let piece = &mut buffer.bytes()[..piece];
                data.read(memory, offset, piece)?;
                image.write(at + u64::from(offset), piece)?;
            }
            if safe {
                image.flush()?;
            }
        }
        Work::Flush => image.flush()?,
        Work::Ranges { zero, list, safe } => {
            for &Range { at, len, unmap } in list {
                match zero {
                    true => image.zero(at, len, unmap)?,
                    false => image.discard(at, len)?,
                }
            }
            if *safe {
                image.flush()?;
            }
        }
    }
    Ok(())
}

/// Offset and length of each piece of at most [`CHUNK`] bytes.
fn chunks(bytes: u32) -> impl Iterator<Item = (u32, usize)> {
    (0..bytes.div_ceil(CHUNK)).map(move |number| {
        // Below `bytes`, so within 32 bits.
        let offset = number * CHUNK;
        (offset, (bytes - offset).min(CHUNK) as usize)
    })
}
