//! Numbers of the NVM Express base specification 1.4.

/// Offsets of registers (section 3.1).
pub(super) mod register {
    pub(crate) const CAP: u64 = 0x00;
    pub(crate) const VS: u64 = 0x08;
    pub(crate) const INTMS: u64 = 0x0c;
    pub(crate) const INTMC: u64 = 0x10;
    pub(crate) const CC: u64 = 0x14;
    pub(crate) const CSTS: u64 = 0x1c;
    pub(crate) const AQA: u64 = 0x24;
    pub(crate) const ASQ: u64 = 0x28;
    pub(crate) const ACQ: u64 = 0x30;
    /// The first doorbell; what is before it are registers.
    pub(crate) const DOORBELLS: u64 = 0x1000;
}

/// The version that is implemented: 1.4.
pub(super) const VERSION: u32 = 0x0001_0400;

/// Bytes of a submission queue entry, of a completion queue entry, and of a page that all
/// controllers know.
pub(super) const SQE: u64 = 64;
pub(super) const CQE: u64 = 16;
pub(super) const PAGE: u64 = 4096;

/// Most entries of a queue.
pub(super) const MAX_ENTRIES: u32 = 1024;
/// Host pages are of `PAGE << n` bytes, up to this `n`.
pub(super) const MAX_PAGE_SHIFT: u32 = 4;
/// Most data of a command: `PAGE << n` bytes.
pub(super) const MAX_TRANSFER_SHIFT: u8 = 8;
/// The same in bytes.
pub(super) const MAX_TRANSFER: u32 = (PAGE as u32) << MAX_TRANSFER_SHIFT;
/// Asynchronous event requests that are kept.
pub(super) const MAX_EVENT_REQUESTS: usize = 4;
/// The namespace.
pub(super) const NSID: u32 = 1;
/// All namespaces.
pub(super) const ALL_NAMESPACES: u32 = 0xffff_ffff;

/// Admin commands (section 5).
pub(super) mod admin {
    pub(crate) const DELETE_SQ: u8 = 0x00;
    pub(crate) const CREATE_SQ: u8 = 0x01;
    pub(crate) const GET_LOG_PAGE: u8 = 0x02;
    pub(crate) const DELETE_CQ: u8 = 0x04;
    pub(crate) const CREATE_CQ: u8 = 0x05;
    pub(crate) const IDENTIFY: u8 = 0x06;
    pub(crate) const ABORT: u8 = 0x08;
    pub(crate) const SET_FEATURES: u8 = 0x09;
    pub(crate) const GET_FEATURES: u8 = 0x0a;
    pub(crate) const ASYNC_EVENT: u8 = 0x0c;
    pub(crate) const DOORBELL_BUFFERS: u8 = 0x7c;
    pub(crate) const ALL: [u8; 11] = [
        DELETE_SQ,
        CREATE_SQ,
        GET_LOG_PAGE,
        DELETE_CQ,
        CREATE_CQ,
        IDENTIFY,
        ABORT,
        SET_FEATURES,
        GET_FEATURES,
        ASYNC_EVENT,
        DOORBELL_BUFFERS,
    ];
}

/// Commands of I/O queues (section 6).
pub(super) mod io {
    pub(crate) const FLUSH: u8 = 0x00;
    pub(crate) const WRITE: u8 = 0x01;
    pub(crate) const READ: u8 = 0x02;
    pub(crate) const COMPARE: u8 = 0x05;
    pub(crate) const WRITE_ZEROES: u8 = 0x08;
    pub(crate) const DATASET: u8 = 0x09;
    /// Each, and whether it changes what the namespace has.
    pub(crate) const ALL: [(u8, bool); 6] = [
        (FLUSH, false),
        (WRITE, true),
        (READ, false),
        (COMPARE, false),
        (WRITE_ZEROES, true),
        (DATASET, true),
    ];
}

/// Log pages (section 5.14.1).
pub(super) mod log {
    pub(crate) const ERROR: u8 = 0x01;
    pub(crate) const HEALTH: u8 = 0x02;
    pub(crate) const FIRMWARE: u8 = 0x03;
    pub(crate) const CHANGED_NAMESPACES: u8 = 0x04;
    pub(crate) const EFFECTS: u8 = 0x05;
}

/// How a command ended: status code type, code, and whether trying again helps (section 4.6.1),
/// without the phase bit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Status(pub u16);

/// Trying again does not help.
const FINAL: u16 = 0x4000;

impl Status {
    /// It is done.
    pub const SUCCESS: Self = Self(0);
    /// No such command.
    pub const INVALID_OPCODE: Self = Self(0x001 | FINAL);
    /// A reserved or unsupported value.
    pub const INVALID_FIELD: Self = Self(0x002 | FINAL);
    /// The driver's memory could not be reached.
    pub const DATA_TRANSFER: Self = Self(0x004 | FINAL);
    /// The controller failed.
    pub const INTERNAL: Self = Self(0x006);
    /// An Abort command ended it.
    pub const ABORTED: Self = Self(0x007 | FINAL);
    /// No such namespace.
    pub const INVALID_NAMESPACE: Self = Self(0x00b | FINAL);
    /// Not now.
    pub const SEQUENCE: Self = Self(0x00c | FINAL);
    /// An address in a page that must be the page's, or an unaligned one.
    pub const PRP_OFFSET: Self = Self(0x013 | FINAL);
    /// Past the end of the namespace.
    pub const LBA_RANGE: Self = Self(0x080 | FINAL);
    /// The image's file system is full.
    pub const CAPACITY: Self = Self(0x081 | FINAL);
    /// No such completion queue.
    pub const CQ_INVALID: Self = Self(0x100 | FINAL);
    /// No such queue, or one that there is already.
    pub const QUEUE_ID: Self = Self(0x101 | FINAL);
    /// Too many or too few entries.
    pub const QUEUE_SIZE: Self = Self(0x102 | FINAL);
    /// Too many asynchronous event requests.
    pub const EVENT_LIMIT: Self = Self(0x105 | FINAL);
    /// No such interrupt vector.
    pub const VECTOR: Self = Self(0x108 | FINAL);
    /// No such log page.
    pub const LOG_PAGE: Self = Self(0x109 | FINAL);
    /// The completion queue has submission queues.
    pub const QUEUE_DELETION: Self = Self(0x10c | FINAL);
    /// Features do not survive a reset.
    pub const NOT_SAVEABLE: Self = Self(0x10d | FINAL);
    /// The feature has one value.
    pub const NOT_CHANGEABLE: Self = Self(0x10e | FINAL);
    /// The feature is the controller's, not a namespace's.
    pub const NOT_PER_NAMESPACE: Self = Self(0x10f | FINAL);
    /// The namespace is read-only.
    pub const READ_ONLY: Self = Self(0x182 | FINAL);
    /// The image could not be written.
    pub const WRITE_FAULT: Self = Self(0x280);
    /// Nor read.
    pub const READ_ERROR: Self = Self(0x281);
    /// The data differ.
    pub const COMPARE_FAILURE: Self = Self(0x285 | FINAL);

    /// Whether the image is to blame.
    pub(super) fn is_media(self) -> bool {
        self.0 & 0x700 == 0x200 && self != Self::COMPARE_FAILURE
    }
}
