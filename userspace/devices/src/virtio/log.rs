//! What a queue has in flight, on record: whoever serves it after a crash goes on from there.
//!
//! The idea is that of vhost-user's in-flight region; the layout is this project's. For each
//! request that can be in flight there is one word, which is written at once: a crash between any
//! two writes leaves a record that says what to do. With *place* for where the used ring stands:
//!
//! | step | in the log | in the driver's memory |
//! |---|---|---|
//! | a request is taken | its descriptors (packed), then its word: *taken*, in which order | |
//! | it is given back | | the used entry, which nobody sees yet |
//! | | its word: *giving* at this place | |
//! | | | the used index (split) or the entry's flags (packed): the driver sees it |
//! | | the place behind it | |
//! | | its word: nothing | |
//!
//! A request whose word says *giving* at the recorded place was given back if the driver's memory
//! says so, and else is still in flight; at the place before the recorded one it was given back.
//! So no request is lost, and none comes back twice. One that was carried out and not given back is
//! carried out again.
//!
//! In a packed ring used descriptors overwrite those of requests that are still in flight, so the
//! log holds copies. Of split rings and of indirect tables the driver's memory still holds all.
//!
//! What the log of a queue says is checked before any of it counts ([`LogError`]).

use std::sync::Arc;
use std::sync::atomic::{Ordering, compiler_fence};

use super::queue::{Descriptor, Format, Setup};

/// Words that outlive the process. Only one queue's thread writes those of a queue.
pub trait Words: Send + Sync {
    /// Reads one.
    fn load(&self, at: usize) -> u64;

    /// Writes one at once.
    fn store(&self, at: usize, value: u64);
}

/// Whether the rest means anything.
const STATE: usize = 0;
/// Format and size.
const SHAPE: usize = 1;
/// Addresses of the queue's parts.
const PARTS: usize = 2;
/// Descriptors (packed) or requests (split) that were in flight before the log began: whoever had
/// them never gives them back.
const GONE: usize = 5;
/// The place of the next used entry.
const PLACE: usize = 6;
/// The word of each request, by its name.
const REQUESTS: usize = 7;

const INACTIVE: u64 = 0;
const ACTIVE: u64 = 1;

const TAKEN: u64 = 1 << 63;
const GIVING: u64 = 1 << 62;
const PLACE_SHIFT: u32 = 46;
const ORDER: u64 = (1 << PLACE_SHIFT) - 1;

/// Words of a descriptor: its address; its length, its flags, and where the next one lies.
const CELL: usize = 2;
/// No further descriptor.
const END: u16 = u16::MAX;

/// Why a log says nothing that could be true.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LogError {
    /// A state that there is not.
    #[error("the log's state is {0:#x}")]
    State(u64),
    /// The log is that of a queue with other addresses, or of another size or format.
    #[error("the log is that of a queue which lies elsewhere or has another size or format")]
    OtherQueue,
    /// The queue has more descriptors than the log has room for.
    #[error("the log has room for {room} descriptors, the queue has {size}")]
    Room {
        /// Those of the log.
        room: u16,
        /// Those of the queue.
        size: u16,
    },
    /// A place outside of the queue, or not where the driver's memory says.
    #[error("by the log {0:#x} requests were given back, by the driver's memory others")]
    Place(u64),
    /// The word of a request that cannot be one.
    #[error("the log says {word:#x} of request {id}")]
    Request {
        /// Its name.
        id: u16,
        /// What it says.
        word: u64,
    },
    /// Descriptors of a request that are not there, or belong to another one, too.
    #[error("the log has no descriptors of request {0}")]
    Descriptors(u16),
    /// More in flight than the queue has room for.
    #[error("by the log more is in flight than the queue has room for")]
    TooMany,
}

/// The log of one queue.
#[derive(Clone)]
pub struct QueueLog {
    words: Arc<dyn Words>,
    first: usize,
    room: u16,
}

impl std::fmt::Debug for QueueLog {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.debug_struct("QueueLog")
            .field("first", &self.first)
            .field("room", &self.room)
            .finish_non_exhaustive()
    }
}

impl QueueLog {
    /// The log in [`words`](Self::words_for) words from `first` on, of a queue of at most `room`
    /// descriptors.
    #[must_use]
    pub fn new(words: Arc<dyn Words>, first: usize, room: u16) -> Self {
        Self { words, first, room }
    }

    /// Words that the log of a queue of at most `room` descriptors needs.
    #[must_use]
    pub fn words_for(room: u16) -> usize {
        REQUESTS + usize::from(room) * (1 + 2 * CELL)
    }

    /// Whether a queue is on record, which [`Queue::resume`](super::Queue::resume) takes up; if
    /// not, [`Queue::begin`](super::Queue::begin) is for it.
    ///
    /// # Errors
    ///
    /// [`LogError::State`].
    pub fn is_active(&self) -> Result<bool, LogError> {
        match self.load(STATE) {
            INACTIVE => Ok(false),
            ACTIVE => Ok(true),
            other => Err(LogError::State(other)),
        }
    }

    /// Forgets the queue, which nobody serves: its driver has reset the device.
    pub fn clear(&self) {
        self.store(STATE, INACTIVE);
    }

    fn load(&self, at: usize) -> u64 {
        self.words.load(self.first + at)
    }

    /// All other writes keep their place: those before this one are made before it, and those
    /// behind it after it, for whoever looks once this process has died.
    fn store(&self, at: usize, value: u64) {
        compiler_fence(Ordering::SeqCst);
        self.words.store(self.first + at, value);
        compiler_fence(Ordering::SeqCst);
    }

    fn shape(setup: &Setup) -> [u64; 4] {
        let layout = &setup.layout;
        let packed = u64::from(setup.format == Format::Packed);
        [
            packed << 32 | u64::from(layout.size),
            layout.descriptors,
            layout.driver,
            layout.device,
        ]
    }

    /// Where the descriptor of a request lies: the first by its name, others anywhere behind.
    fn cell(&self, number: usize) -> usize {
        REQUESTS + usize::from(self.room) + number * CELL
    }
}

/// A place in a used ring: an index, or a descriptor with its wrap counter in bit 15.
pub(super) type Place = u16;

/// A request that was in flight when the queue's server died.
#[derive(Debug)]
pub(super) struct Lost {
    pub(super) id: u16,
    order: u64,
    /// Its descriptors in the ring; nothing of a split ring.
    pub(super) descriptors: Vec<Descriptor>,
}

/// A queue on record.
#[derive(Debug)]
pub(super) struct Record {
    pub(super) place: Place,
    pub(super) gone: u16,
    /// In the order in which they were taken.
    pub(super) lost: Vec<Lost>,
}

/// What the ring's format says about places.
pub(super) trait Ring {
    /// The place behind a request of so many descriptors.
    fn behind(&self, place: Place, descriptors: u16) -> Place;

    /// Whether the driver sees a used entry at a place.
    fn is_used(&self, place: Place) -> Result<bool, super::queue::Broken>;

    /// Whether there is such a place.
    fn has(&self, place: Place) -> bool;
}

/// The log of a queue that is served.
#[derive(Debug)]
pub(super) struct Journal {
    log: QueueLog,
    packed: bool,
    next: u64,
    /// Room for descriptors behind the first ones of requests.
    free: Vec<u16>,
    /// What each request takes of it.
    held: Vec<Vec<u16>>,
}

impl Journal {
    /// Starts the record of a queue with nothing in flight but what is `gone`.
    pub(super) fn begin(
        log: QueueLog,
        setup: &Setup,
        place: Place,
        gone: u16,
    ) -> Result<Self, LogError> {
        let journal = Self::new(log, setup)?;
        let log = &journal.log;
        log.clear();
        for id in 0..usize::from(log.room) {
            log.store(REQUESTS + id, 0);
        }
        for (number, word) in QueueLog::shape(setup).into_iter().enumerate() {
            log.store(SHAPE + number, word);
        }
        log.store(GONE, gone.into());
        log.store(PLACE, place.into());
        log.store(STATE, ACTIVE);
        Ok(journal)
    }

    fn new(log: QueueLog, setup: &Setup) -> Result<Self, LogError> {
        let (room, size) = (log.room, setup.layout.size);
        if size > room {
            return Err(LogError::Room { room, size });
        }
        let packed = setup.format == Format::Packed;
        let cells = if packed { size } else { 0 };
        Ok(Self {
            log,
            packed,
            next: 1,
            free: (0..cells).rev().collect(),
            held: vec![Vec::new(); size.into()],
        })
    }

    /// Takes up the record of a queue whose server died.
    pub(super) fn resume(
        log: QueueLog,
        setup: &Setup,
        ring: &dyn Ring,
    ) -> Result<(Self, Record), super::queue::Broken> {
        let mut journal = Self::new(log, setup)?;
        let log = journal.log.clone();
        if !log.is_active()? {
            return Err(LogError::State(INACTIVE).into());
        }
        let matches = |(number, word)| log.load(SHAPE + number) == word;
        debug_assert_eq!(PARTS, SHAPE + 1);
        if !QueueLog::shape(setup).into_iter().enumerate().all(matches) {
            return Err(LogError::OtherQueue.into());
        }
        let size = setup.layout.size;
        let word = log.load(PLACE);
        let place = u16::try_from(word).map_err(|_| LogError::Place(word))?;
        let gone = u16::try_from(log.load(GONE)).unwrap_or(u16::MAX);
        if !ring.has(place) {
            return Err(LogError::Place(word).into());
        }
        let mut record = Record {
            place,
            gone,
            lost: Vec::new(),
        };
        let mut giving = None;
        for id in 0..size {
            let word = log.load(REQUESTS + usize::from(id));
            if word == 0 {
                continue;
            }
            let order = word & ORDER;
            // One at a time is given back.
            let bad = word & TAKEN == 0 || order == 0 || word & GIVING != 0 && giving.is_some();
            if bad {
                return Err(LogError::Request { id, word }.into());
            }
            let descriptors = journal.copies(id)?;
            if word & GIVING != 0 {
                giving = Some((id, word, u16::try_from(descriptors.len()).unwrap_or(size)));
            }
            record.lost.push(Lost {
                id,
                order,
                descriptors,
            });
        }
        if let Some((id, word, descriptors)) = giving {
            let at = u16::try_from(word >> PLACE_SHIFT & 0xffff).unwrap_or(0);
            let behind = ring.behind(at, descriptors);
            let was_given = match place {
                _ if !ring.has(at) => return Err(LogError::Request { id, word }.into()),
                place if place == at => ring.is_used(at)?,
                place if place == behind => true,
                _ => return Err(LogError::Request { id, word }.into()),
            };
            if was_given {
                record.place = behind;
                record.lost.retain(|lost| lost.id != id);
                journal.given(id, behind);
            } else {
                log.store(REQUESTS + usize::from(id), TAKEN | word & ORDER);
            }
        }
        record.lost.sort_by_key(|lost| lost.order);
        for pair in record.lost.windows(2) {
            if pair[0].order == pair[1].order {
                let id = pair[1].id;
                let word = log.load(REQUESTS + usize::from(id));
                return Err(LogError::Request { id, word }.into());
            }
        }
        journal.next = record.lost.last().map_or(1, |lost| lost.order + 1);
        let taken: u64 = record.lost.iter().map(|lost| lost.slots()).sum();
        if taken + u64::from(gone) > size.into() {
            return Err(LogError::TooMany.into());
        }
        Ok((journal, record))
    }

    /// The copies of a request's descriptors, whose room is taken from now on.
    fn copies(&mut self, id: u16) -> Result<Vec<Descriptor>, LogError> {
        let mut all = Vec::new();
        if !self.packed {
            return Ok(all);
        }
        let size = self.held.len();
        let mut number = usize::from(id);
        loop {
            let at = self.log.cell(number);
            let (addr, rest) = (self.log.load(at), self.log.load(at + 1));
            let [l0, l1, l2, l3, f0, f1, n0, n1] = rest.to_le_bytes();
            all.push(Descriptor {
                addr,
                len: u32::from_le_bytes([l0, l1, l2, l3]),
                at12: id,
                at14: u16::from_le_bytes([f0, f1]),
            });
            let next = u16::from_le_bytes([n0, n1]);
            if next == END {
                return Ok(all);
            }
            let Some(free) = self.free.iter().position(|&cell| cell == next) else {
                return Err(LogError::Descriptors(id));
            };
            self.free.swap_remove(free);
            self.held[usize::from(id)].push(next);
            number = size + usize::from(next);
        }
    }

    /// A request was taken; `descriptors` are those in the ring, of a packed one.
    pub(super) fn taken(&mut self, id: u16, descriptors: &[Descriptor]) {
        let size = self.held.len();
        let mut number = usize::from(id);
        for (index, descriptor) in descriptors.iter().enumerate() {
            // All requests together have no more descriptors than the queue.
            let next = match index + 1 < descriptors.len() {
                true => self.free.pop().unwrap_or(END),
                false => END,
            };
            let mut rest = [0; 8];
            rest[..4].copy_from_slice(&descriptor.len.to_le_bytes());
            rest[4..6].copy_from_slice(&descriptor.at14.to_le_bytes());
            rest[6..].copy_from_slice(&next.to_le_bytes());
            let at = self.log.cell(number);
            self.log.store(at, descriptor.addr);
            self.log.store(at + 1, u64::from_le_bytes(rest));
            if next != END {
                self.held[usize::from(id)].push(next);
                number = size + usize::from(next);
            }
        }
        let order = self.next.min(ORDER);
        self.next = order + 1;
        self.log.store(REQUESTS + usize::from(id), TAKEN | order);
    }

    /// A request is about to be given back at a place.
    pub(super) fn giving(&mut self, id: u16, place: Place) {
        let at = REQUESTS + usize::from(id);
        let order = self.log.load(at) & ORDER;
        let word = TAKEN | GIVING | u64::from(place) << PLACE_SHIFT | order;
        self.log.store(at, word);
    }

    /// A request was given back; the next one will be at `place`.
    pub(super) fn given(&mut self, id: u16, place: Place) {
        self.log.store(PLACE, place.into());
        self.log.store(REQUESTS + usize::from(id), 0);
        if let Some(held) = self.held.get_mut(usize::from(id)) {
            self.free.append(held);
        }
    }

    /// Nothing is in flight: orders may start again.
    pub(super) fn idle(&mut self) {
        self.next = 1;
    }
}

impl Lost {
    /// What it takes of the queue's room.
    fn slots(&self) -> u64 {
        self.descriptors.len().max(1) as u64
    }
}
