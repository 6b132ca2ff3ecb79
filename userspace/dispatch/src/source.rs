//! Where a region's doorbells arrive on the device side.

use std::io;
use std::mem::offset_of;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use ioregion_abi::Size;
use ioregion_abi::bpf::{BLOCK_SLOTS, CONTROL_ARM, CONTROL_WORDS, Slot, SlotBlock};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

use crate::arm;
use crate::device::Ring;
use crate::sys::mmap::{MapKind, Mapping};

/// Most doorbells of one source.
pub const MAX_DOORBELLS: usize = 1 << 20;

/// The doorbells of one region, as they arrive.
#[derive(Debug)]
pub enum DoorbellSource {
    /// Plain eventfds.
    Eventfds(Eventfds),
    /// Slots that the eBPF program fills.
    Port(Port),
}

impl DoorbellSource {
    /// The descriptors that become readable when a doorbell rings (for a [`Port`] without
    /// eventfd: only while armed). They stay open and the same as long as the source lives.
    #[must_use]
    pub fn poll_fds(&self) -> Vec<BorrowedFd<'_>> {
        match self {
            Self::Eventfds(eventfds) => vec![eventfds.poll_fd()],
            Self::Port(port) => port.wakers().collect(),
        }
    }

    /// Consumes the wake-up after one of [`poll_fds`](Self::poll_fds) became readable.
    ///
    /// # Errors
    ///
    /// The system's.
    pub fn acknowledge(&mut self) -> io::Result<()> {
        match self {
            // Draining does it.
            Self::Eventfds(_) => Ok(()),
            Self::Port(port) => port.acknowledge(),
        }
    }

    /// Hands over each doorbell that rang since the last call; returns how many.
    ///
    /// A [`Port`] is drained without system calls.
    ///
    /// # Errors
    ///
    /// The system's.
    pub fn drain(&mut self, ring: &mut dyn FnMut(Ring)) -> io::Result<u64> {
        match self {
            Self::Eventfds(eventfds) => eventfds.drain(ring),
            Self::Port(port) => Ok(port.drain(ring)),
        }
    }

    /// Announces that the task is about to sleep; false if there is news already.
    pub fn arm(&mut self) -> bool {
        match self {
            Self::Eventfds(_) => true,
            Self::Port(port) => port.arm(),
        }
    }

    /// Says that the task is awake.
    pub fn disarm(&mut self) {
        if let Self::Port(port) = self {
            port.disarm();
        }
    }

    /// Whether [`drain`](Self::drain) may find something. Looks at shared memory only; for
    /// eventfds it cannot know, and says yes.
    #[must_use]
    pub fn has_news(&self) -> bool {
        match self {
            Self::Eventfds(_) => true,
            Self::Port(port) => port.has_news(),
        }
    }

    /// Writes that KVM signalled but the program missed; their values are lost.
    #[must_use]
    pub fn lost(&self) -> u64 {
        match self {
            Self::Eventfds(_) => 0,
            Self::Port(port) => port.lost(),
        }
    }
}

/// What the VMM adds to a port's eventfd to wake its task for a doorbell that no sink has signalled.
/// KVM adds 1 for each that one has; the two are told apart by their size.
pub(crate) const NUDGE: u64 = 1 << 32;

/// An eventfd that KVM signals for one doorbell.
#[derive(Debug)]
pub struct EventDoorbell {
    /// The eventfd, whose descriptor the VMM may share.
    pub eventfd: Arc<OwnedFd>,
    /// Index of the doorbell in its region's list.
    pub index: u32,
    /// Byte offset in the region.
    pub offset: u64,
    /// Size of the write.
    pub size: Size,
    /// The value, where only one value rings the doorbell.
    pub value: Option<u64>,
}

/// The doorbells of one region under the plain `ioeventfd` mechanism: values are lost, except
/// where a datamatch says what they were.
#[derive(Debug)]
pub struct Eventfds {
    pub(crate) user_data: u64,
    pub(crate) doorbells: Vec<EventDoorbell>,
    /// Watches them all, if there is more than one.
    epoll: Option<Epoll>,
}

/// Eventfds looked at in one system call.
const BATCH: usize = 64;

impl Eventfds {
    /// Takes the eventfds of the region that `user_data` names, and sets them non-blocking.
    ///
    /// # Errors
    ///
    /// The system's; `InvalidInput` if there is none or more than [`MAX_DOORBELLS`].
    pub fn new(user_data: u64, doorbells: Vec<EventDoorbell>) -> io::Result<Self> {
        check_count(doorbells.len())?;
        for doorbell in &doorbells {
            let flags = OFlag::from_bits_retain(fcntl(&doorbell.eventfd, FcntlArg::F_GETFL)?);
            fcntl(
                &doorbell.eventfd,
                FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK),
            )?;
        }
        let epoll = if doorbells.len() > 1 {
            let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
            for (place, doorbell) in (0..).zip(&doorbells) {
                epoll.add(
                    &doorbell.eventfd,
                    EpollEvent::new(EpollFlags::EPOLLIN, place),
                )?;
            }
            Some(epoll)
        } else {
            None
        };
        Ok(Self {
            user_data,
            doorbells,
            epoll,
        })
    }

    fn poll_fd(&self) -> BorrowedFd<'_> {
        match &self.epoll {
            Some(epoll) => epoll.0.as_fd(),
            None => self.doorbells[0].eventfd.as_fd(),
        }
    }

    fn drain(&mut self, ring: &mut dyn FnMut(Ring)) -> io::Result<u64> {
        let Some(epoll) = &self.epoll else {
            return self.read(0, ring);
        };
        let mut rings = 0;
        // The ready list goes round, so this many looks see all that rang before the first; a
        // guest that goes on ringing does not hold the task here.
        for _ in 0..self.doorbells.len().div_ceil(BATCH) {
            let mut ready = [EpollEvent::empty(); BATCH];
            let n = match epoll.wait(&mut ready, EpollTimeout::ZERO) {
                Err(Errno::EINTR) => continue,
                n => n?,
            };
            for event in &ready[..n] {
                rings += self.read(event.data() as usize, ring)?;
            }
            if n < BATCH {
                break;
            }
        }
        Ok(rings)
    }

    fn read(&self, place: usize, ring: &mut dyn FnMut(Ring)) -> io::Result<u64> {
        let doorbell = &self.doorbells[place];
        let mut counter = [0; 8];
        loop {
            match nix::unistd::read(&doorbell.eventfd, &mut counter) {
                Ok(_) => break,
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => return Ok(0),
                Err(errno) => return Err(errno.into()),
            }
        }
        let writes = u64::from_ne_bytes(counter);
        if writes == 0 {
            return Ok(0);
        }
        ring(Ring {
            user_data: self.user_data,
            index: doorbell.index,
            offset: doorbell.offset,
            size: doorbell.size,
            value: doorbell.value,
            writes,
        });
        Ok(1)
    }
}

/// A doorbell whose value the eBPF program stores in a slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SlotDoorbell {
    /// Index of the doorbell in its region's list.
    pub index: u32,
    /// Byte offset in the region.
    pub offset: u64,
    /// Size of the write.
    pub size: Size,
}

/// What a [`Port`] is made of. Descriptors of BPF maps are those of [`ioregion_abi::bpf`].
#[derive(Debug)]
pub struct PortParts {
    /// The region's opaque value.
    pub user_data: u64,
    /// The doorbells; the place of each is the number of its slot.
    pub doorbells: Vec<SlotDoorbell>,
    /// Map of [`SlotBlock`]s, mapped read-only.
    pub slots: OwnedFd,
    /// Map of control words, mapped writable.
    pub controls: OwnedFd,
    /// The eventfd that KVM signals for each doorbell (ioeventfd sink).
    pub eventfd: Option<OwnedFd>,
    /// The BPF ring buffer that wakes the task (coalesced sink).
    pub ringbuf: Option<OwnedFd>,
}

/// The doorbells of one region under the `ebpf` mechanism.
#[derive(Debug)]
pub struct Port {
    pub(crate) parts: PortParts,
    slots: Mapping,
    controls: Mapping,
    ring: Option<WakeRing>,
    /// The sequence last seen of each slot.
    seen: Vec<u64>,
    /// The changes last seen of each block.
    blocks: Vec<u64>,
    captured: u64,
    signals: u64,
}

impl Port {
    /// Maps the port's memory. Made once for a set of maps: counts start at sequence 0.
    ///
    /// # Errors
    ///
    /// The system's; `InvalidInput` if there is no doorbell or more than [`MAX_DOORBELLS`], or if
    /// a descriptor leads to no such map, or to one that is smaller than the number of doorbells
    /// demands. (That takes `/proc` and the `bpf` system call.)
    pub fn new(parts: PortParts) -> io::Result<Self> {
        let count = parts.doorbells.len();
        check_count(count)?;
        let blocks = SlotBlock::count(count as u32) as usize;
        let len = blocks * size_of::<SlotBlock>();
        let kind = MapKind::Array(size_of::<SlotBlock>() as u32);
        let slots = Mapping::of_map(parts.slots.as_fd(), kind, 0, len, false)?;
        let (kind, len) = (MapKind::Array(8), CONTROL_WORDS as usize * 8);
        let controls = Mapping::of_map(parts.controls.as_fd(), kind, 0, len, true)?;
        let ring = parts
            .ringbuf
            .as_ref()
            .map(|fd| WakeRing::new(fd.as_fd()))
            .transpose()?;
        if let Some(eventfd) = &parts.eventfd {
            let flags = OFlag::from_bits_retain(fcntl(eventfd, FcntlArg::F_GETFL)?);
            fcntl(eventfd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
        }
        Ok(Self {
            slots,
            controls,
            ring,
            seen: vec![0; count],
            blocks: vec![0; blocks],
            captured: 0,
            signals: 0,
            parts,
        })
    }

    /// Writes whose value the program stored, as far as drained.
    #[must_use]
    pub fn captured(&self) -> u64 {
        self.captured
    }

    /// Writes that KVM signalled (ioeventfd sink), as far as acknowledged.
    #[must_use]
    pub fn signals(&self) -> u64 {
        self.signals
    }

    /// Writes that KVM signalled but the program missed.
    ///
    /// Exact after [`acknowledge`](DoorbellSource::acknowledge) and
    /// [`drain`](DoorbellSource::drain), in this order: the program stores before KVM signals.
    #[must_use]
    pub fn lost(&self) -> u64 {
        self.signals.saturating_sub(self.captured)
    }

    fn wakers(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        [&self.parts.eventfd, &self.parts.ringbuf]
            .into_iter()
            .flatten()
            .map(AsFd::as_fd)
    }

    fn control(&self, word: u32) -> &AtomicU64 {
        self.controls.word(word as usize * 8)
    }

    fn has_news(&self) -> bool {
        (0..).zip(&self.blocks).any(|(block, seen)| {
            let changes = self.slots.word(block * size_of::<SlotBlock>());
            changes.load(Ordering::Relaxed) != *seen
        })
    }

    fn arm(&self) -> bool {
        if self.ring.is_none() {
            // KVM signals the eventfd each time.
            return !self.has_news();
        }
        arm::arm(self.control(CONTROL_ARM), 1, || self.has_news())
    }

    fn disarm(&self) {
        if self.ring.is_some() {
            arm::disarm(self.control(CONTROL_ARM));
        }
    }

    fn acknowledge(&mut self) -> io::Result<()> {
        if let Some(ring) = &self.ring {
            ring.consume();
        }
        if let Some(eventfd) = &self.parts.eventfd {
            let mut counter = [0; 8];
            match nix::unistd::read(eventfd, &mut counter) {
                Ok(_) => {
                    let signals = u64::from_ne_bytes(counter) % NUDGE;
                    self.signals = self.signals.wrapping_add(signals);
                }
                Err(Errno::EAGAIN | Errno::EINTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(())
    }

    fn drain(&mut self, ring: &mut dyn FnMut(Ring)) -> u64 {
        let Self {
            parts,
            slots,
            seen,
            blocks,
            captured,
            ..
        } = self;
        let places = seen
            .chunks_mut(BLOCK_SLOTS as usize)
            .zip(parts.doorbells.chunks(BLOCK_SLOTS as usize));
        let mut rings = 0;
        for (block, (changes, (seen, doorbells))) in blocks.iter_mut().zip(places).enumerate() {
            let base = block * size_of::<SlotBlock>();
            if !arm::collect(slots.word(base), changes) {
                continue;
            }
            let first = base + offset_of!(SlotBlock, slots);
            for (place, (seen, doorbell)) in seen.iter_mut().zip(doorbells).enumerate() {
                let at = first + place * size_of::<Slot>();
                let (sequence, value) = arm::observe(slots.word(at), slots.word(at + 8));
                let writes = sequence.wrapping_sub(*seen);
                if writes == 0 {
                    continue;
                }
                *seen = sequence;
                *captured = captured.wrapping_add(writes);
                rings += 1;
                ring(Ring {
                    user_data: parts.user_data,
                    index: doorbell.index,
                    offset: doorbell.offset,
                    size: doorbell.size,
                    value: Some(value),
                    writes,
                });
            }
        }
        rings
    }
}

/// A BPF ring buffer whose records mean nothing but "wake up".
///
/// Its first page holds the reader's position, the second the writer's (`kernel/bpf/ringbuf.c`).
#[derive(Debug)]
pub(crate) struct WakeRing {
    reader: Mapping,
    writer: Mapping,
}

impl WakeRing {
    pub(crate) fn new(fd: BorrowedFd<'_>) -> io::Result<Self> {
        let page = nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE)?
            .and_then(|size| usize::try_from(size).ok())
            .ok_or(Errno::EINVAL)?;
        Ok(Self {
            reader: Mapping::of_map(fd, MapKind::Ring, 0, page, true)?,
            writer: Mapping::of_map(fd, MapKind::Ring, page, page, false)?,
        })
    }

    /// Consumes all records. What they announce was published before, so a drain that follows
    /// finds it.
    pub(crate) fn consume(&self) {
        let end = self.writer.word(0).load(Ordering::Relaxed);
        std::sync::atomic::fence(Ordering::Acquire);
        self.reader.word(0).store(end, Ordering::Release);
    }
}

fn check_count(doorbells: usize) -> io::Result<()> {
    match doorbells {
        1..=MAX_DOORBELLS => Ok(()),
        _ => Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "a source has at least one doorbell and at most 2^20",
        )),
    }
}
