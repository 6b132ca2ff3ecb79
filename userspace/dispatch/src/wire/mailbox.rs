//! Messages in shared memory.
//!
//! A sealed memfd holds two lanes, one for each direction, and a word for each side that says
//! what the side sleeps for. A side that finds its peer asleep rings the peer's eventfd; while
//! neither sleeps, messages travel without system calls. A pipe shows each side when the other
//! one is gone; nothing is ever written to it.
//!
//! The peer may be hostile: each side keeps the positions that are its own in private memory,
//! checks the peer's on each use, and copies each message once, word by word.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::atomic::Ordering;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, SealFlag, fcntl};
use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::memfd::{MFdFlags, memfd_create};

use super::{Message, Transport, Try, Wire, WireError};
use crate::arm;
use crate::sys::mmap::Mapping;

/// Messages that one lane holds.
pub const DEPTH: u64 = 64;
/// Length of the shared memory, in bytes.
pub const SHARED_LEN: usize = 8192;

/// Distance between words that different sides write, so that they share no cache line (nor the
/// pair of lines that x86 fetches together).
const APART: usize = 128;
/// Words of one message.
const WORDS: usize = size_of::<Message>() / 8;
/// Head, tail, messages.
const LANE_LEN: usize = 2 * APART + DEPTH as usize * size_of::<Message>();
/// Offset of lane 0; before it stands the sleep word of each side.
const LANES: usize = 2 * APART;
const _: () = assert!(LANES + 2 * LANE_LEN <= SHARED_LEN);

/// Reasons to sleep, in a side's sleep word.
const FOR_MESSAGES: u64 = 1;
const FOR_SPACE: u64 = 2;

/// Empty tries after which a polling side looks whether its peer is still there.
const TRIES_PER_LOOK: u32 = 4096;

/// The side of a mailbox; also the index of the lane that it receives from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Side {
    /// Receives commands.
    Device = 0,
    /// Receives responses.
    Vmm = 1,
}

/// One end of a mailbox.
#[derive(Debug)]
pub struct Mailbox {
    side: Side,
    shared: Mapping,
    memory: OwnedFd,
    /// Wakes this side.
    bell: OwnedFd,
    /// Wakes the peer.
    peer_bell: OwnedFd,
    /// The end of a pipe whose other end the peer holds.
    leash: OwnedFd,
    /// Messages received since the mailbox was made.
    received: u64,
    /// Messages sent since then.
    sent: u64,
    empty_tries: u32,
}

impl Mailbox {
    /// Makes both ends. The descriptors are closed on `exec`.
    ///
    /// # Errors
    ///
    /// The system's.
    pub fn pair() -> io::Result<(Self, Self)> {
        let memory = memfd_create(
            c"ioregion-mailbox",
            MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING,
        )?;
        nix::unistd::ftruncate(&memory, SHARED_LEN as i64)?;
        let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
        fcntl(&memory, FcntlArg::F_ADD_SEALS(seals))?;
        let bell =
            || EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK);
        let (bell, peer_bell) = (OwnedFd::from(bell()?), OwnedFd::from(bell()?));
        let (device_leash, vmm_leash) = nix::unistd::pipe2(OFlag::O_CLOEXEC)?;
        let device = Self::new(
            Side::Device,
            [
                memory.try_clone()?,
                peer_bell.try_clone()?,
                bell.try_clone()?,
                device_leash,
            ],
        )?;
        let vmm = Self::new(Side::Vmm, [memory, bell, peer_bell, vmm_leash])?;
        Ok((vmm, device))
    }

    /// Takes the device's end: shared memory, own eventfd, the peer's eventfd, leash.
    ///
    /// # Errors
    ///
    /// `InvalidInput` if there are not four, or the memory is too short or not sealed against
    /// shrinking.
    pub fn from_fds(fds: Vec<OwnedFd>) -> io::Result<Self> {
        let fds = fds.try_into().map_err(|_| {
            io::Error::new(io::ErrorKind::InvalidInput, "a mailbox is four descriptors")
        })?;
        Self::new(Side::Device, fds)
    }

    fn new(side: Side, [memory, bell, peer_bell, leash]: [OwnedFd; 4]) -> io::Result<Self> {
        let shared = Mapping::of_memory(memory.as_fd(), SHARED_LEN, true)?;
        for bell in [&bell, &peer_bell] {
            let flags = OFlag::from_bits_retain(fcntl(bell, FcntlArg::F_GETFL)?);
            fcntl(bell, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
        }
        let mut end = Self {
            side,
            shared,
            memory,
            bell,
            peer_bell,
            leash,
            received: 0,
            sent: 0,
            empty_tries: 0,
        };
        // An end that was used before goes on where it stopped.
        end.received = end.load(end.inbound() + APART, Ordering::Relaxed);
        end.sent = end.load(end.outbound(), Ordering::Relaxed);
        Ok(end)
    }

    /// Offset of the lane that this side receives from; its head comes first, then its tail.
    fn inbound(&self) -> usize {
        LANES + self.side as usize * LANE_LEN
    }

    /// Offset of the lane that this side sends to.
    fn outbound(&self) -> usize {
        LANES + (1 - self.side as usize) * LANE_LEN
    }

    fn load(&self, offset: usize, order: Ordering) -> u64 {
        self.shared.word(offset).load(order)
    }

    /// Messages that can be received.
    fn available(&self) -> Result<u64, WireError> {
        let head = self.load(self.inbound(), Ordering::Acquire);
        match head.wrapping_sub(self.received) {
            used @ ..=DEPTH => Ok(used),
            _ => Err(WireError::Protocol("the mailbox's head is out of range")),
        }
    }

    /// Messages that can be sent.
    fn space(&self) -> Result<u64, WireError> {
        let tail = self.load(self.outbound() + APART, Ordering::Acquire);
        match self.sent.wrapping_sub(tail) {
            used @ ..=DEPTH => Ok(DEPTH - used),
            _ => Err(WireError::Protocol("the mailbox's tail is out of range")),
        }
    }

    /// Where a message stands.
    fn message(lane: usize, position: u64) -> usize {
        lane + 2 * APART + (position % DEPTH) as usize * size_of::<Message>()
    }

    /// Rings the peer if it sleeps for this reason.
    fn ring(&self, reason: u64) -> Result<(), WireError> {
        let peer = 1 - self.side as usize;
        if !arm::take(self.shared.word(peer * APART), reason) {
            return Ok(());
        }
        match nix::unistd::write(&self.peer_bell, &1_u64.to_ne_bytes()) {
            // A counter that is full rings as well.
            // (It blocks only where the peer made it, and then a signal interrupts it.)
            Ok(_) | Err(Errno::EAGAIN | Errno::EINTR) => Ok(()),
            Err(errno) => Err(WireError::Io(errno.into())),
        }
    }

    /// Nothing could be done: now and then, looks whether that will ever change.
    fn idle<T>(&mut self, receiving: bool) -> Result<Try<T>, WireError> {
        self.empty_tries += 1;
        if self.empty_tries >= TRIES_PER_LOOK {
            self.empty_tries = 0;
            self.look(receiving)?;
        }
        Ok(Try::WouldBlock)
    }

    /// Whether the bell was rung. Never blocks: the peer can make the eventfd, whose flags it
    /// shares, a blocking one.
    fn consume_bell(&self) -> bool {
        let mut counter = 0_u64;
        let part = libc::iovec {
            iov_base: (&raw mut counter).cast(),
            iov_len: 8,
        };
        let fd = self.bell.as_raw_fd();
        // SAFETY: `part` describes `counter`, which outlives the call; an eventfd has no offset.
        unsafe { libc::preadv2(fd, &raw const part, 1, -1, libc::RWF_NOWAIT) == 8 }
    }

    fn look(&self, receiving: bool) -> Result<(), WireError> {
        let mut fds = [PollFd::new(self.leash.as_fd(), PollFlags::empty())];
        match poll(&mut fds, PollTimeout::ZERO) {
            // Looked at again later.
            Ok(0) | Err(Errno::EINTR) => Ok(()),
            // What was sent before the end is still received.
            Ok(_) if receiving && self.available()? > 0 => Ok(()),
            Ok(_) => Err(WireError::Closed),
            Err(errno) => Err(WireError::Io(errno.into())),
        }
    }
}

impl Wire for Mailbox {
    fn transport(&self) -> Transport {
        Transport::Mailbox
    }

    fn try_send(&mut self, message: &Message) -> Result<Try<()>, WireError> {
        if self.space()? == 0 {
            return self.idle(false);
        }
        let lane = self.outbound();
        let at = Self::message(lane, self.sent);
        let (words, _) = message.as_chunks::<8>();
        for (i, word) in words.iter().enumerate() {
            let word = u64::from_ne_bytes(*word);
            self.shared.word(at + 8 * i).store(word, Ordering::Relaxed);
        }
        self.sent = self.sent.wrapping_add(1);
        self.shared.word(lane).store(self.sent, Ordering::Release);
        self.ring(FOR_MESSAGES)?;
        Ok(Try::Done(()))
    }

    fn try_flush(&mut self) -> Result<Try<()>, WireError> {
        Ok(Try::Done(()))
    }

    fn try_recv(&mut self) -> Result<Try<Message>, WireError> {
        if self.available()? == 0 {
            return self.idle(true);
        }
        let lane = self.inbound();
        let at = Self::message(lane, self.received);
        let words: [u64; WORDS] = std::array::from_fn(|i| self.load(at + 8 * i, Ordering::Relaxed));
        let mut message = Message::default();
        for (bytes, word) in message.as_chunks_mut::<8>().0.iter_mut().zip(words) {
            *bytes = word.to_ne_bytes();
        }
        self.received = self.received.wrapping_add(1);
        self.empty_tries = 0;
        self.shared
            .word(lane + APART)
            .store(self.received, Ordering::Release);
        self.ring(FOR_SPACE)?;
        Ok(Try::Done(message))
    }

    fn prepare_sleep(&mut self, to_send: bool) -> bool {
        let mut reasons = FOR_MESSAGES;
        if to_send {
            reasons |= FOR_SPACE;
        }
        // A violation is something to do, too: the next try reports it.
        arm::arm(
            self.shared.word(self.side as usize * APART),
            reasons,
            || {
                self.available().map_or(true, |n| n > 0)
                    || (to_send && self.space().map_or(true, |n| n > 0))
            },
        )
    }

    fn poll_fds(&self, _to_send: bool) -> [Option<(BorrowedFd<'_>, PollFlags)>; 3] {
        [
            Some((self.bell.as_fd(), PollFlags::POLLIN)),
            // Hangup and error are always reported.
            Some((self.leash.as_fd(), PollFlags::empty())),
            None,
        ]
    }

    fn finish_sleep(&mut self) {
        arm::disarm(self.shared.word(self.side as usize * APART));
        // Fails where nobody rang (the leash, or another descriptor, ended the sleep).
        if !self.consume_bell() {
            // The next try that finds nothing looks at the leash.
            self.empty_tries = TRIES_PER_LOOK;
        }
    }

    fn into_fds(self: Box<Self>) -> Vec<OwnedFd> {
        vec![self.memory, self.bell, self.peer_bell, self.leash]
    }
}
