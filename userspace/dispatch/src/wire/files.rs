//! Transports over file descriptors: socket pairs, pipes, FIFOs.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockType, getsockopt, recv, send, socketpair, sockopt,
};

use super::{MESSAGE_LEN, Message, Transport, Try, Wire, WireError};

/// A message under way: its bytes, and how many of them have arrived or are gone.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Partial {
    bytes: Message,
    done: usize,
}

impl Partial {
    /// A message of which nothing is sent yet.
    pub(crate) const fn full(bytes: Message) -> Self {
        Self { bytes, done: 0 }
    }

    /// Nothing left to send.
    const SENT: Self = Self {
        bytes: [0; MESSAGE_LEN],
        done: MESSAGE_LEN,
    };

    /// The bytes that are still to come or to go.
    pub(crate) fn rest(&mut self) -> &mut [u8] {
        &mut self.bytes[self.done..]
    }

    /// Counts bytes that came or went; true when the message is complete.
    pub(crate) fn advance(&mut self, bytes: usize) -> bool {
        self.done = (self.done + bytes).min(MESSAGE_LEN);
        self.done == MESSAGE_LEN
    }

    /// Takes the complete message and starts the next one.
    pub(crate) fn take(&mut self) -> Message {
        std::mem::take(self).bytes
    }

    fn is_pending(&self) -> bool {
        self.done < MESSAGE_LEN
    }

    /// Reads until the message is complete. `read` returns 0 at the end of the file.
    fn fill(
        &mut self,
        mut read: impl FnMut(&mut [u8]) -> nix::Result<usize>,
    ) -> Result<Try<Message>, WireError> {
        loop {
            match read(self.rest()) {
                Ok(0) => return Err(WireError::Closed),
                Ok(n) if self.advance(n) => return Ok(Try::Done(self.take())),
                Ok(_) => {}
                Err(Errno::EAGAIN) => return Ok(Try::WouldBlock),
                Err(errno) => return Err(broken(errno)),
            }
        }
    }

    /// Writes until nothing is left.
    fn empty(
        &mut self,
        mut write: impl FnMut(&[u8]) -> nix::Result<usize>,
    ) -> Result<Try<()>, WireError> {
        while self.is_pending() {
            match write(self.rest()) {
                Ok(n) => _ = self.advance(n),
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => return Ok(Try::WouldBlock),
                Err(errno) => return Err(broken(errno)),
            }
        }
        Ok(Try::Done(()))
    }

    /// Sends a message after what is left of the one before it.
    fn send(
        &mut self,
        message: &Message,
        mut write: impl FnMut(&[u8]) -> nix::Result<usize>,
    ) -> Result<Try<()>, WireError> {
        if self.empty(&mut write)? == Try::WouldBlock {
            return Ok(Try::WouldBlock);
        }
        let mut next = Self::full(*message);
        let tried = next.empty(&mut write)?;
        if next.done == 0 {
            return Ok(tried);
        }
        // Accepted, if only in part: the rest is ours to send.
        *self = next;
        Ok(Try::Done(()))
    }
}

/// What an errno says about the wire.
pub(crate) fn broken(errno: Errno) -> WireError {
    match errno {
        Errno::EPIPE | Errno::ECONNRESET => WireError::Closed,
        errno => WireError::Io(errno.into()),
    }
}

fn invalid(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, what)
}

/// What a message of `len` bytes means where the transport keeps boundaries.
///
/// # Errors
///
/// `Closed` at the end of the file, `Protocol` for any length but [`MESSAGE_LEN`].
pub(crate) fn check_packet(fd: BorrowedFd<'_>, len: usize) -> Result<(), WireError> {
    match len {
        MESSAGE_LEN => Ok(()),
        // The end of the file, or an empty message?
        0 => {
            let hangup = PollFlags::from_bits_retain(nix::libc::POLLRDHUP);
            match poll(&mut [PollFd::new(fd, hangup)], PollTimeout::ZERO).map_err(broken)? {
                0 => Err(WireError::Protocol("an empty message")),
                _ => Err(WireError::Closed),
            }
        }
        _ => Err(WireError::Protocol("a message of the wrong length")),
    }
}

/// One end of a Unix socket pair, `SOCK_STREAM` or `SOCK_SEQPACKET`.
#[derive(Debug)]
pub struct Socket {
    fd: OwnedFd,
    seqpacket: bool,
    inbound: Partial,
    outbound: Partial,
}

impl Socket {
    /// Makes both ends. The descriptors are closed on `exec`.
    ///
    /// # Errors
    ///
    /// The system's; `InvalidInput` if the transport is no socket.
    pub fn pair(transport: Transport) -> io::Result<(Self, Self)> {
        let kind = match transport {
            Transport::Stream => SockType::Stream,
            Transport::Seqpacket => SockType::SeqPacket,
            _ => return Err(invalid("not a socket transport")),
        };
        let (a, b) = socketpair(AddressFamily::Unix, kind, None, SockFlag::SOCK_CLOEXEC)?;
        let end = |fd| Self::new(fd, transport == Transport::Seqpacket);
        Ok((end(a), end(b)))
    }

    /// Takes one connected socket.
    ///
    /// # Errors
    ///
    /// `InvalidInput` if it is not one descriptor, or not a socket of that kind.
    pub fn from_fds(transport: Transport, fds: Vec<OwnedFd>) -> io::Result<Self> {
        let [fd] =
            <[OwnedFd; 1]>::try_from(fds).map_err(|_| invalid("a socket is one descriptor"))?;
        let kind = getsockopt(&fd, sockopt::SockType).map_err(|_| invalid("not a socket"))?;
        match (transport, kind) {
            (Transport::Stream, SockType::Stream) => Ok(Self::new(fd, false)),
            (Transport::Seqpacket, SockType::SeqPacket) => Ok(Self::new(fd, true)),
            _ => Err(invalid("a socket of another kind")),
        }
    }

    fn new(fd: OwnedFd, seqpacket: bool) -> Self {
        Self {
            fd,
            seqpacket,
            inbound: Partial::default(),
            outbound: Partial::SENT,
        }
    }

    /// Receives one message, with these flags for the socket.
    fn take(&mut self, flags: MsgFlags) -> Result<Try<Message>, WireError> {
        let fd = self.fd.as_raw_fd();
        if !self.seqpacket {
            return self
                .inbound
                .fill(|rest| interruptible(recv(fd, rest, flags)));
        }
        let mut message = [0; MESSAGE_LEN];
        // With MSG_TRUNC the length is the message's, even where that is longer.
        match interruptible(recv(fd, &mut message, flags | MsgFlags::MSG_TRUNC)) {
            Ok(len) => {
                check_packet(self.fd.as_fd(), len)?;
                Ok(Try::Done(message))
            }
            Err(Errno::EAGAIN) => Ok(Try::WouldBlock),
            Err(errno) => Err(broken(errno)),
        }
    }
}

/// A sleep that a signal ended is one without a message.
fn interruptible(read: nix::Result<usize>) -> nix::Result<usize> {
    read.map_err(|errno| match errno {
        Errno::EINTR => Errno::EAGAIN,
        errno => errno,
    })
}

const SEND: MsgFlags = MsgFlags::MSG_DONTWAIT.union(MsgFlags::MSG_NOSIGNAL);

impl Wire for Socket {
    fn transport(&self) -> Transport {
        if self.seqpacket {
            Transport::Seqpacket
        } else {
            Transport::Stream
        }
    }

    fn try_send(&mut self, message: &Message) -> Result<Try<()>, WireError> {
        let fd = self.fd.as_raw_fd();
        self.outbound.send(message, |rest| send(fd, rest, SEND))
    }

    fn try_flush(&mut self) -> Result<Try<()>, WireError> {
        let fd = self.fd.as_raw_fd();
        self.outbound.empty(|rest| send(fd, rest, SEND))
    }

    fn try_recv(&mut self) -> Result<Try<Message>, WireError> {
        self.take(MsgFlags::MSG_DONTWAIT)
    }

    fn prepare_sleep(&mut self, _to_send: bool) -> bool {
        true
    }

    fn poll_fds(&self, to_send: bool) -> [Option<(BorrowedFd<'_>, PollFlags)>; 3] {
        let mut events = PollFlags::POLLIN;
        events.set(PollFlags::POLLOUT, to_send);
        [Some((self.fd.as_fd(), events)), None, None]
    }

    fn finish_sleep(&mut self) {}

    fn sleeps_in(&self) -> Option<BorrowedFd<'_>> {
        Some(self.fd.as_fd())
    }

    fn recv(&mut self) -> Result<Try<Message>, WireError> {
        self.take(MsgFlags::empty())
    }

    fn kernel_files(&self) -> Option<[BorrowedFd<'_>; 2]> {
        Some([self.fd.as_fd(), self.fd.as_fd()])
    }

    fn into_fds(self: Box<Self>) -> Vec<OwnedFd> {
        vec![self.fd]
    }
}

/// A descriptor to read from and one to write to: pipes, FIFOs, or any other pair of files that
/// can be polled.
///
/// Writing to a pipe that nobody reads raises SIGPIPE, which Rust programs ignore; other programs
/// that use this transport must do so too.
#[derive(Debug)]
pub struct Files {
    read: OwnedFd,
    write: OwnedFd,
    inbound: Partial,
    outbound: Partial,
}

impl Files {
    /// Makes two pipes. The descriptors are closed on `exec`.
    ///
    /// # Errors
    ///
    /// The system's.
    pub fn pipes() -> io::Result<(Self, Self)> {
        let flags = OFlag::O_CLOEXEC | OFlag::O_NONBLOCK;
        let (commands_out, commands_in) = nix::unistd::pipe2(flags)?;
        let (responses_out, responses_in) = nix::unistd::pipe2(flags)?;
        Ok((
            Self::new(responses_out, commands_in),
            Self::new(commands_out, responses_in),
        ))
    }

    /// Takes a descriptor to read from and one to write to, in this order; both files are set
    /// non-blocking.
    ///
    /// # Errors
    ///
    /// `InvalidInput` if there are not two, or not opened for this.
    pub fn from_fds(fds: Vec<OwnedFd>) -> io::Result<Self> {
        let [read, write] =
            <[OwnedFd; 2]>::try_from(fds).map_err(|_| invalid("pipes are two descriptors"))?;
        for (fd, unfit) in [(&read, OFlag::O_WRONLY), (&write, OFlag::O_RDONLY)] {
            let flags = OFlag::from_bits_retain(fcntl(fd, FcntlArg::F_GETFL)?);
            if flags & OFlag::O_ACCMODE == unfit || flags.contains(OFlag::O_PATH) {
                return Err(invalid("a descriptor that is not open in its direction"));
            }
            fcntl(fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
        }
        Ok(Self::new(read, write))
    }

    fn new(read: OwnedFd, write: OwnedFd) -> Self {
        Self {
            read,
            write,
            inbound: Partial::default(),
            outbound: Partial::SENT,
        }
    }
}

impl Wire for Files {
    fn transport(&self) -> Transport {
        Transport::Pipes
    }

    fn try_send(&mut self, message: &Message) -> Result<Try<()>, WireError> {
        let Self {
            write, outbound, ..
        } = self;
        outbound.send(message, |rest| nix::unistd::write(&*write, rest))
    }

    fn try_flush(&mut self) -> Result<Try<()>, WireError> {
        let Self {
            write, outbound, ..
        } = self;
        outbound.empty(|rest| nix::unistd::write(&*write, rest))
    }

    fn try_recv(&mut self) -> Result<Try<Message>, WireError> {
        let Self { read, inbound, .. } = self;
        inbound.fill(|rest| interruptible(nix::unistd::read(&*read, rest)))
    }

    fn prepare_sleep(&mut self, _to_send: bool) -> bool {
        true
    }

    fn poll_fds(&self, to_send: bool) -> [Option<(BorrowedFd<'_>, PollFlags)>; 3] {
        [
            Some((self.read.as_fd(), PollFlags::POLLIN)),
            to_send.then(|| (self.write.as_fd(), PollFlags::POLLOUT)),
            None,
        ]
    }

    fn finish_sleep(&mut self) {}

    fn sleeps_in(&self) -> Option<BorrowedFd<'_>> {
        Some(self.read.as_fd())
    }

    fn recv(&mut self) -> Result<Try<Message>, WireError> {
        let Self { read, inbound, .. } = self;
        inbound.fill(|rest| interruptible(nix::unistd::read(&*read, rest)))
    }

    fn kernel_files(&self) -> Option<[BorrowedFd<'_>; 2]> {
        Some([self.read.as_fd(), self.write.as_fd()])
    }

    fn into_fds(self: Box<Self>) -> Vec<OwnedFd> {
        vec![self.read, self.write]
    }
}
