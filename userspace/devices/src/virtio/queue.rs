//! A queue in either format, and why one is broken.

use virtio_bindings::virtio_config::VIRTIO_F_RING_PACKED;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use super::chain::Chain;
use super::device::Done;
use super::log::{Journal, LogError, Place, QueueLog};
use super::packed::Packed;
use super::split::Split;
use crate::memory::{Memory, MemoryError};

/// The largest queue, by the specification.
const MAX_SIZE: u16 = 1 << 15;

/// How requests stand in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// Descriptors, available ring and used ring apart.
    Split,
    /// All in one ring (`VIRTIO_F_RING_PACKED`).
    Packed,
}

/// Where a queue lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layout {
    /// Descriptors.
    pub size: u16,
    /// The descriptors.
    pub descriptors: u64,
    /// The driver's part: the available ring, or when the driver wants to hear.
    pub driver: u64,
    /// The device's part: the used ring, or when the device wants to hear.
    pub device: u64,
}

/// Everything that makes a queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Setup {
    /// The format that was negotiated.
    pub format: Format,
    /// Where it lies.
    pub layout: Layout,
    /// `VIRTIO_F_INDIRECT_DESC` was negotiated.
    pub indirect: bool,
    /// `VIRTIO_F_EVENT_IDX` was negotiated.
    pub event_idx: bool,
}

impl Setup {
    /// A queue of a driver that took these features.
    #[must_use]
    pub fn new(features: u64, layout: Layout) -> Self {
        let has = |bit: u32| features & 1 << bit != 0;
        Self {
            format: match has(VIRTIO_F_RING_PACKED) {
                true => Format::Packed,
                false => Format::Split,
            },
            layout,
            indirect: has(VIRTIO_RING_F_INDIRECT_DESC),
            event_idx: has(VIRTIO_RING_F_EVENT_IDX),
        }
    }
}

/// Where a queue stands between requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Position {
    /// Of a split queue.
    Split {
        /// Requests that the device has taken, modulo 2^16.
        avail: u16,
    },
    /// Of a packed queue.
    Packed {
        /// The driver's wrap counter as the device expects it.
        avail_wrap: bool,
        /// The descriptor that becomes available next.
        avail: u16,
        /// The device's wrap counter.
        used_wrap: bool,
        /// The descriptor that is used next.
        used: u16,
    },
}

impl Position {
    /// Where a new queue stands.
    #[must_use]
    pub fn start(format: Format) -> Self {
        match format {
            Format::Split => Self::Split { avail: 0 },
            Format::Packed => Self::Packed {
                avail_wrap: true,
                avail: 0,
                used_wrap: true,
                used: 0,
            },
        }
    }
}

/// What a driver did that ends its queue: nothing in it can be trusted from then on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Broken {
    /// Memory of the queue or of a request cannot be reached.
    #[error("{0}")]
    Memory(#[from] MemoryError),
    /// No power of two (split), nothing, or more than 32768.
    #[error("{0} descriptors make no queue")]
    Size(u16),
    /// A part of the queue at an address that its format does not allow.
    #[error("a part of the queue lies at {0:#x}, which is not aligned")]
    Alignment(u64),
    /// A part of the queue that reaches past the end of the address space.
    #[error("the part of the queue at {0:#x} reaches past the end of the address space")]
    Outside(u64),
    /// A position that is not one of this queue's.
    #[error("the queue cannot stand at {0:?}")]
    Position(Position),
    /// More requests became available than there are descriptors.
    #[error("the available index went from {from} to {to}, past the queue's {size} descriptors")]
    IndexJump {
        /// What the device had taken.
        from: u16,
        /// What the driver wrote.
        to: u16,
        /// Descriptors.
        size: u16,
    },
    /// A descriptor, or the name of a request, that the queue does not have.
    #[error("descriptor {index} of {size}")]
    NoSuchDescriptor {
        /// What the driver wrote.
        index: u16,
        /// Descriptors in the table.
        size: u16,
    },
    /// A request that is in flight already.
    #[error("request {0} was made available again while the device has it")]
    InFlight(u16),
    /// More descriptors in one request, or in all that are in flight, than there are.
    #[error("a request is longer than the queue or links back into itself")]
    Loop,
    /// A range of no bytes.
    #[error("a descriptor of no bytes")]
    Empty,
    /// A range that reaches past the end of the address space.
    #[error("the range {addr:#x}+{len:#x} reaches past the end of the address space")]
    Range {
        /// First address.
        addr: u64,
        /// Bytes.
        len: u32,
    },
    /// More than [`MAX_SEGMENTS`](super::MAX_SEGMENTS) ranges.
    #[error("a request of too many ranges")]
    TooManySegments,
    /// A request of more than 2^32 - 1 bytes.
    #[error("a request of more than 4 GiB")]
    TooLong,
    /// What the device reads must come first.
    #[error("a range to read behind one to write")]
    ReadableBehindWritable,
    /// A descriptor table without `VIRTIO_F_INDIRECT_DESC`.
    #[error("an indirect descriptor, which was not negotiated")]
    IndirectNotNegotiated,
    /// An indirect descriptor that links to another, or flags that a table's entries cannot have.
    #[error("an indirect descriptor where none is allowed")]
    IndirectMisplaced,
    /// An indirect table whose length is no whole number of descriptors, or too many.
    #[error("an indirect table of {0} bytes")]
    IndirectLength(u32),
    /// A request that the device cannot even answer.
    #[error("a malformed request: {0}")]
    Request(&'static str),
    /// What is on record of the queue cannot be true.
    #[error("{0}; what was in flight is not known")]
    Log(#[from] LogError),
}

/// A queue. Not shared: whoever serves it owns it.
#[derive(Debug)]
pub struct Queue(Inner);

#[derive(Debug)]
enum Inner {
    Split(Split),
    Packed(Packed),
}

impl Queue {
    /// Takes up a queue where it stands.
    ///
    /// # Errors
    ///
    /// A layout or position that no queue can have, or memory that is not there.
    pub fn new(memory: &dyn Memory, setup: &Setup, at: Position) -> Result<Self, Broken> {
        check_size(setup)?;
        Ok(Self(match setup.format {
            Format::Split => Inner::Split(Split::new(memory, setup, at)?),
            Format::Packed => Inner::Packed(Packed::new(setup, at)?),
        }))
    }

    /// The same, and keeps a record from now on with which [`resume`](Self::resume) takes the
    /// queue up wherever this process dies.
    ///
    /// # Errors
    ///
    /// As [`new`](Self::new), and where the queue has more descriptors than the log.
    pub fn begin(
        memory: &dyn Memory,
        setup: &Setup,
        at: Position,
        log: QueueLog,
    ) -> Result<Self, Broken> {
        let mut queue = Self::new(memory, setup, at)?;
        match &mut queue.0 {
            Inner::Split(queue) => queue.record(log, setup)?,
            Inner::Packed(queue) => queue.record(log, setup)?,
        }
        Ok(queue)
    }

    /// Takes up a queue whose server died. Requests that it had in flight are taken again first,
    /// in the same order. The driver may not have been notified of those given back last.
    ///
    /// # Errors
    ///
    /// As [`new`](Self::new); [`Broken::Log`] where the record cannot be that of this queue.
    pub fn resume(memory: &dyn Memory, setup: &Setup, log: QueueLog) -> Result<Self, Broken> {
        check_size(setup)?;
        Ok(Self(match setup.format {
            Format::Split => Inner::Split(Split::resume(memory, setup, log)?),
            Format::Packed => Inner::Packed(Packed::resume(memory, setup, log)?),
        }))
    }

    /// Takes the next request, if there is one.
    ///
    /// # Errors
    ///
    /// What the driver did wrong; nothing can be taken from the queue from then on.
    pub fn pop(&mut self, memory: &dyn Memory) -> Result<Option<Chain>, Broken> {
        match &mut self.0 {
            Inner::Split(queue) => queue.pop(memory),
            Inner::Packed(queue) => queue.pop(memory),
        }
    }

    /// Gives a request back, of whose writable part `written` bytes from the start were written.
    /// The driver sees it from now on; see [`must_notify`](Self::must_notify).
    ///
    /// # Errors
    ///
    /// Where the queue's memory is gone.
    pub fn push(&mut self, memory: &dyn Memory, chain: Chain, written: u32) -> Result<(), Broken> {
        self.push_all(memory, [Done { chain, written }])
    }

    /// Gives requests back in this order. The driver sees all of them at once: of buffers that
    /// hold parts of one packet it must never see only some. A queue with a
    /// record gives them back one after the other, since the record knows of one at a time.
    ///
    /// # Errors
    ///
    /// As [`push`](Self::push).
    pub fn push_all(
        &mut self,
        memory: &dyn Memory,
        all: impl IntoIterator<Item = Done>,
    ) -> Result<(), Broken> {
        for Done { chain, written } in all {
            let written = written.min(chain.writable_len());
            match &mut self.0 {
                Inner::Split(queue) => queue.stage(memory, &chain, written)?,
                Inner::Packed(queue) => queue.stage(memory, &chain, written)?,
            }
        }
        match &mut self.0 {
            Inner::Split(queue) => queue.publish(memory),
            Inner::Packed(queue) => queue.publish(memory),
        }
    }

    /// Whether the driver wants to hear of what was given back since the last call.
    ///
    /// # Errors
    ///
    /// Where the queue's memory is gone.
    pub fn must_notify(&mut self, memory: &dyn Memory) -> Result<bool, Broken> {
        match &mut self.0 {
            Inner::Split(queue) => queue.must_notify(memory),
            Inner::Packed(queue) => queue.must_notify(memory),
        }
    }

    /// Tells the driver that the device looks by itself.
    ///
    /// # Errors
    ///
    /// Where the queue's memory is gone.
    pub fn disable_kicks(&mut self, memory: &dyn Memory) -> Result<(), Broken> {
        match &mut self.0 {
            Inner::Split(queue) => queue.disable_kicks(memory),
            Inner::Packed(queue) => queue.disable_kicks(memory),
        }
    }

    /// Asks the driver to notify of new requests; whether there are some already, of which it
    /// may not notify.
    ///
    /// # Errors
    ///
    /// Where the queue's memory is gone.
    pub fn enable_kicks(&mut self, memory: &dyn Memory) -> Result<bool, Broken> {
        match &mut self.0 {
            Inner::Split(queue) => queue.enable_kicks(memory),
            Inner::Packed(queue) => queue.enable_kicks(memory),
        }
    }

    /// Requests that were taken and not given back, before it was taken up, too.
    #[must_use]
    pub fn in_flight(&self) -> u16 {
        match &self.0 {
            Inner::Split(queue) => queue.in_flight.count,
            Inner::Packed(queue) => queue.in_flight.count,
        }
    }

    /// Where the queue stands.
    #[must_use]
    pub fn position(&self) -> Position {
        match &self.0 {
            Inner::Split(queue) => queue.position(),
            Inner::Packed(queue) => queue.position(),
        }
    }
}

fn check_size(setup: &Setup) -> Result<(), Broken> {
    match setup.layout.size {
        1..=MAX_SIZE => Ok(()),
        size => Err(Broken::Size(size)),
    }
}

/// Names of requests that the device has.
#[derive(Debug)]
pub(super) struct InFlight {
    taken: Vec<bool>,
    pub(super) count: u16,
    pub(super) journal: Option<Journal>,
}

impl InFlight {
    pub(super) fn new(size: u16) -> Self {
        Self {
            taken: vec![false; size.into()],
            count: 0,
            journal: None,
        }
    }

    /// With requests that were taken before.
    pub(super) fn with(size: u16, ids: impl Iterator<Item = u16>, journal: Journal) -> Self {
        let mut all = Self::new(size);
        ids.for_each(|id| all.set(id, true));
        all.journal = Some(journal);
        all
    }

    /// Whether a request can be taken.
    pub(super) fn check(&self, id: u16) -> Result<(), Broken> {
        match self.taken.get(usize::from(id)) {
            Some(false) => Ok(()),
            Some(true) => Err(Broken::InFlight(id)),
            None => Err(Broken::NoSuchDescriptor {
                index: id,
                size: u16::try_from(self.taken.len()).unwrap_or(u16::MAX),
            }),
        }
    }

    /// A request is taken; `descriptors` are those in the ring, of a packed one.
    pub(super) fn take(&mut self, id: u16, descriptors: &[Descriptor]) {
        self.set(id, true);
        if let Some(journal) = &mut self.journal {
            journal.taken(id, descriptors);
        }
    }

    /// The driver will see next that a request was given back, at this place.
    pub(super) fn giving(&mut self, id: u16, place: Place) {
        if let Some(journal) = &mut self.journal {
            journal.giving(id, place);
        }
    }

    /// It sees it; the next place is this one.
    pub(super) fn given(&mut self, id: u16, place: Place) {
        self.set(id, false);
        if let Some(journal) = &mut self.journal {
            journal.given(id, place);
            if self.count == 0 {
                journal.idle();
            }
        }
    }

    fn set(&mut self, id: u16, taken: bool) {
        if let Some(slot) = self.taken.get_mut(usize::from(id))
            && *slot != taken
        {
            *slot = taken;
            self.count = match taken {
                true => self.count.saturating_add(1),
                false => self.count.saturating_sub(1),
            };
        }
    }
}

/// Checks that `bytes` at `addr` exist as addresses and begin at a multiple of `align`.
pub(super) fn check_part(addr: u64, bytes: u64, align: u64) -> Result<(), Broken> {
    if !addr.is_multiple_of(align) {
        return Err(Broken::Alignment(addr));
    }
    match addr.checked_add(bytes) {
        Some(_) => Ok(()),
        None => Err(Broken::Outside(addr)),
    }
}

/// A descriptor of either format as 16 bytes: address, length, and two halves that differ.
#[derive(Debug, Clone, Copy)]
pub(super) struct Descriptor {
    pub(super) addr: u64,
    pub(super) len: u32,
    pub(super) at12: u16,
    pub(super) at14: u16,
}

impl Descriptor {
    pub(super) const BYTES: u64 = 16;

    pub(super) fn read(memory: &dyn Memory, addr: u64) -> Result<Self, MemoryError> {
        let mut bytes = [0; 16];
        memory.read(addr, &mut bytes)?;
        Ok(Self::from_bytes(&bytes))
    }

    pub(super) fn from_bytes(bytes: &[u8; 16]) -> Self {
        let [
            a0,
            a1,
            a2,
            a3,
            a4,
            a5,
            a6,
            a7,
            l0,
            l1,
            l2,
            l3,
            x0,
            x1,
            y0,
            y1,
        ] = *bytes;
        Self {
            addr: u64::from_le_bytes([a0, a1, a2, a3, a4, a5, a6, a7]),
            len: u32::from_le_bytes([l0, l1, l2, l3]),
            at12: u16::from_le_bytes([x0, x1]),
            at14: u16::from_le_bytes([y0, y1]),
        }
    }
}

/// Reads the table behind an indirect descriptor at once: the driver cannot change it halfway.
pub(super) fn read_table(
    memory: &dyn Memory,
    addr: u64,
    len: u32,
) -> Result<Vec<Descriptor>, Broken> {
    let bytes = usize::try_from(len).map_err(|_| Broken::IndirectLength(len))?;
    if bytes == 0 || !bytes.is_multiple_of(16) || bytes / 16 > super::chain::MAX_SEGMENTS {
        return Err(Broken::IndirectLength(len));
    }
    if addr.checked_add(u64::from(len)).is_none() {
        return Err(Broken::Range { addr, len });
    }
    let mut table = vec![0; bytes];
    memory.read(addr, &mut table)?;
    let (descriptors, _) = table.as_chunks::<16>();
    Ok(descriptors.iter().map(Descriptor::from_bytes).collect())
}
