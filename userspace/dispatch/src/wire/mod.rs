//! Transports of the wire protocol: how 32-byte messages get from one task to another.
//!
//! Each end is a [`Wire`]; a pair of ends is made by [`pair`]. The same trait serves the VMM's
//! end (sends commands, receives responses) and the device's end (the other way round).

use std::fmt;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};

use nix::poll::PollFlags;

pub(crate) mod files;
pub mod ioregionfd;
pub mod mailbox;

pub use files::{Files, Socket};
pub use ioregionfd::Ioregionfd;
pub use mailbox::Mailbox;

/// Length of each message, in bytes; commands and responses have the same.
pub const MESSAGE_LEN: usize = 32;

/// A message as it travels.
pub type Message = [u8; MESSAGE_LEN];

/// How the two ends are connected.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Transport {
    /// A `SOCK_STREAM` socket pair.
    Stream,
    /// A `SOCK_SEQPACKET` socket pair.
    Seqpacket,
    /// Two pipes, one for each direction.
    Pipes,
    /// Messages in shared memory, an eventfd for each side to sleep on, and a pipe whose only
    /// purpose is to show that the other side is gone.
    Mailbox,
    /// The purpose-made file of `KVM_CREATE_IOREGIONFD`: KVM has the VMM's end. See
    /// [`Channel::purpose_made`](crate::Channel::purpose_made).
    Ioregionfd,
}

impl Transport {
    /// The transports that [`pair`] can make.
    pub const ALL: [Self; 4] = [Self::Stream, Self::Seqpacket, Self::Pipes, Self::Mailbox];

    /// The name used on command lines and in results.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Stream => "stream",
            Self::Seqpacket => "seqpacket",
            Self::Pipes => "pipes",
            Self::Mailbox => "mailbox",
            Self::Ioregionfd => "ioregionfd",
        }
    }

    /// The transport of that [`name`](Self::name).
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        let all = Self::ALL.into_iter().chain([Self::Ioregionfd]);
        all.into_iter().find(|transport| transport.name() == name)
    }
}

impl fmt::Display for Transport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Why a wire can carry nothing more.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    /// The other end is gone (end of file, broken pipe, hangup).
    #[error("the other end is gone")]
    Closed,
    /// The other end broke the protocol.
    #[error("protocol violation: {0}")]
    Protocol(&'static str),
    /// The descriptor failed.
    #[error("{0}")]
    Io(#[from] io::Error),
}

/// What came of a non-blocking try.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Try<T> {
    /// It is done.
    Done(T),
    /// It would block; see [`Wire::prepare_sleep`].
    WouldBlock,
}

/// One end of a transport.
///
/// Nothing here blocks but [`recv`](Self::recv). To wait, call [`prepare_sleep`](Self::prepare_sleep); if it returns
/// true, `poll` the descriptors of [`poll_fds`](Self::poll_fds), then call
/// [`finish_sleep`](Self::finish_sleep) and try again. One task at a time uses an end.
pub trait Wire: Send + fmt::Debug {
    /// Which transport this is.
    fn transport(&self) -> Transport;

    /// Sends one message whole, or starts to: a stream can take a part, which the end keeps and
    /// finishes before the next message. `Done` means that the message is accepted: the
    /// caller must not send it again.
    ///
    /// # Errors
    ///
    /// [`WireError`]: the wire is broken for good.
    fn try_send(&mut self, message: &Message) -> Result<Try<()>, WireError>;

    /// Tries to write out the part of an accepted message that is still kept; `Done` when there
    /// is none left.
    ///
    /// # Errors
    ///
    /// [`WireError`]: the wire is broken for good.
    fn try_flush(&mut self) -> Result<Try<()>, WireError>;

    /// Receives one whole message; parts of a stream's message are kept.
    ///
    /// # Errors
    ///
    /// [`WireError`]: the wire is broken for good. A message of another length than
    /// [`MESSAGE_LEN`] is a protocol violation where the transport keeps boundaries.
    fn try_recv(&mut self) -> Result<Try<Message>, WireError>;

    /// Announces that this side is about to sleep until it can receive (and also until it can
    /// send, if `to_send`). Returns false if there is something to do right now.
    fn prepare_sleep(&mut self, to_send: bool) -> bool;

    /// The descriptors to sleep on, with the events of interest. They stay open and the same as
    /// long as the end lives.
    fn poll_fds(&self, to_send: bool) -> [Option<(BorrowedFd<'_>, PollFlags)>; 3];

    /// Says that this side is awake again (consumes the wake-up).
    fn finish_sleep(&mut self);

    /// The file in whose `read` this end can sleep, which costs less than a sleep on
    /// [`poll_fds`](Self::poll_fds) and a try; `None` where it must wait for several.
    fn sleeps_in(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    /// Receives one whole message, asleep in [`sleeps_in`](Self::sleeps_in) until there is one.
    /// `WouldBlock` where a signal ended the sleep, or where the file is non-blocking.
    ///
    /// # Errors
    ///
    /// As [`try_recv`](Self::try_recv).
    fn recv(&mut self) -> Result<Try<Message>, WireError> {
        self.try_recv()
    }

    /// The files that KVM reads responses from and writes commands to, if it can use the VMM's end
    /// in the VMM's place.
    fn kernel_files(&self) -> Option<[BorrowedFd<'_>; 2]> {
        None
    }

    /// The descriptors by which this end can be rebuilt in another process, see [`from_fds`].
    fn into_fds(self: Box<Self>) -> Vec<OwnedFd>;
}

/// Makes both ends of a transport: the VMM's and the device's.
///
/// # Errors
///
/// The operating system's, when it has no descriptor or memory left; `InvalidInput` for
/// [`Transport::Ioregionfd`], which only KVM makes.
pub fn pair(transport: Transport) -> io::Result<(Box<dyn Wire>, Box<dyn Wire>)> {
    Ok(match transport {
        Transport::Stream | Transport::Seqpacket => {
            let (vmm, device) = Socket::pair(transport)?;
            (Box::new(vmm), Box::new(device))
        }
        Transport::Pipes => {
            let (vmm, device) = Files::pipes()?;
            (Box::new(vmm), Box::new(device))
        }
        Transport::Mailbox => {
            let (vmm, device) = Mailbox::pair()?;
            (Box::new(vmm), Box::new(device))
        }
        Transport::Ioregionfd => {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "a purpose-made channel comes from KVM",
            ));
        }
    })
}

/// Rebuilds a device's end from its descriptors, in the order of [`Wire::into_fds`].
///
/// # Errors
///
/// `InvalidInput` if number or kind of the descriptors do not fit the transport.
pub fn from_fds(transport: Transport, fds: Vec<OwnedFd>) -> io::Result<Box<dyn Wire>> {
    Ok(match transport {
        Transport::Stream | Transport::Seqpacket => Box::new(Socket::from_fds(transport, fds)?),
        Transport::Pipes => Box::new(Files::from_fds(fds)?),
        Transport::Mailbox => Box::new(Mailbox::from_fds(fds)?),
        Transport::Ioregionfd => Box::new(Ioregionfd::from_fds(fds)?),
    })
}
