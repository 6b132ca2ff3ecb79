//! An NVMe controller with one namespace, an image: the part of NVM Express 1.4 that drivers of
//! disks use.
//!
//! The registers, the queues, the commands and what they tell are state machines without I/O, a
//! file each. [`Controller`] is the shell around them: locks, the image and interrupts. It is
//! served through channels that do not know what carries accesses to them:
//!
//! * an [`AdminChannel`] has the registers and the admin queues;
//! * a [`QueueChannel`] has the doorbells of one I/O submission queue and one I/O completion
//!   queue, takes the commands of that submission queue, and answers them. Channels share no lock
//!   but that of a completion queue that the driver gives to several submission queues, so that
//!   none waits for the I/O of another one.
//!
//! The VMM places the regions of [`Controller::bar`] with whatever mechanism; it owns the PCI
//! configuration space and the MSI-X table.
//!
//! What the driver does wrong is answered with the status that the specification gives to it, told
//! as an asynchronous event (doorbells), or makes the controller fatal (`CSTS.CFS`: queues that
//! are no memory), until the driver resets it.

mod admin;
mod bar;
mod channel;
mod command;
mod commands;
mod controller;
mod events;
mod features;
mod identify;
mod io;
mod logs;
mod prp;
mod queue;
mod queues;
mod registers;
mod spec;
mod vectors;
mod wait;

use std::path::Path;
use std::sync::Arc;

use crate::disk::{self, Image, ImageError};
use crate::memory::Memory;
pub use bar::Bar;
pub use channel::{AdminChannel, CalledBy, QueueChannel};
pub use controller::Controller;
pub use logs::Totals;
pub use spec::Status;
pub use vectors::Interrupts;

/// Bytes of a serial number.
pub const SERIAL_BYTES: usize = 20;

/// Most I/O queues: as many doorbells as a page has room for.
pub const MAX_QUEUES: u16 = 511;

/// What a controller is besides its image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    /// The driver cannot write.
    pub read_only: bool,
    /// Pairs of I/O queues, 1 to [`MAX_QUEUES`].
    pub queues: u16,
    /// Interrupt vectors, at least one. With one more than queues each has its own.
    pub vectors: u16,
    /// At most [`SERIAL_BYTES`] of printable ASCII.
    pub serial: String,
    /// Offer doorbells in memory (Doorbell Buffer Config), which drivers then use: Linux's always.
    /// The register is written only where the controller has stopped looking.
    pub memory_doorbells: bool,
    /// What no other namespace that the driver sees is called. Nothing: made of the image's
    /// device and inode numbers.
    pub id: Option<u128>,
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
            vectors: 2,
            serial: "ioregion".into(),
            memory_doorbells: false,
            id: None,
            direct: false,
            io_uring: true,
        }
    }
}

/// Why there is no controller.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NvmeError {
    /// The image cannot be used.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// Too few queues, or too many.
    #[error("{0} I/O queues: from 1 to {MAX_QUEUES} are possible")]
    Queues(u16),
    /// No interrupts.
    #[error("{0} interrupt vectors: from 1 to 2048 are possible")]
    Vectors(u16),
    /// A serial number that does not fit.
    #[error("the serial number {0:?} is not printable ASCII of at most {SERIAL_BYTES} bytes")]
    Serial(String),
}

/// The driver's memory, for all that serve it.
pub type SharedMemory = Arc<dyn Memory + Send + Sync>;

impl Controller {
    /// Opens the image, which nobody else may write meanwhile.
    ///
    /// # Errors
    ///
    /// Names the image and what is wrong with it, or the option.
    pub fn open(
        image: &Path,
        options: &Options,
        memory: SharedMemory,
        interrupts: Box<dyn Interrupts>,
    ) -> Result<Arc<Self>, NvmeError> {
        if !(1..=MAX_QUEUES).contains(&options.queues) {
            return Err(NvmeError::Queues(options.queues));
        }
        if !(1..=2048).contains(&options.vectors) {
            return Err(NvmeError::Vectors(options.vectors));
        }
        let printable = options
            .serial
            .bytes()
            .all(|byte| matches!(byte, b' '..=b'~'));
        if !printable || options.serial.len() > SERIAL_BYTES {
            return Err(NvmeError::Serial(options.serial.clone()));
        }
        let opened = Image::open(image, options.read_only, options.direct)?;
        let (device, inode) = opened.inode();
        let own = as_uuid(u128::from(device) << 64 | u128::from(inode));
        let id = options.id.unwrap_or(own);
        let io_uring = options.io_uring && disk::has_io_uring(&opened);
        tracing::info!(
            image = %image.display(),
            queues = options.queues,
            io_uring,
            direct = opened.has_direct(),
            "NVMe controller"
        );
        Ok(Arc::new(Self::new(
            opened, options, id, io_uring, memory, interrupts,
        )))
    }
}

/// Marks a number as a UUID of a format of one's own (version 8).
fn as_uuid(number: u128) -> u128 {
    let version = number & !(0xf << 76) | 8 << 76;
    version & !(3 << 62) | 2 << 62
}
