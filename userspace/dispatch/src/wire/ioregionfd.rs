//! The purpose-made file of `KVM_CREATE_IOREGIONFD`.
//!
//! KVM has the VMM's end. The device's end is a file with a page in front of it
//! ([`ioregion_abi::kvm::Mailbox`]): commands are taken from the page and answers put there, and a
//! system call is only made to wake KVM or to sleep.

use std::io;
use std::mem::offset_of;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{Ordering, fence};

use ioregion_abi::kvm::{MAILBOX_CMDS, Mailbox};
use kvm_ioctls::VmFd;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::PollFlags;

use super::{MESSAGE_LEN, Message, Transport, Try, Wire, WireError};
use crate::sys::kvm;
use crate::sys::mmap::Mapping;

/// Length of the page.
const PAGE: usize = 4096;
const HEAD: usize = offset_of!(Mailbox, head);
/// `sleeping` in the low half, `closed` in the high one.
const STATE: usize = offset_of!(Mailbox, sleeping);
const TAIL: usize = offset_of!(Mailbox, tail);
const ANSWERED: usize = offset_of!(Mailbox, answered);
const DATA: usize = offset_of!(Mailbox, data);
const CMDS: usize = offset_of!(Mailbox, cmds);
/// Bit of a command's first byte: KVM waits for a response.
const RESPONSE: u8 = 1 << 6;

/// The device's end.
#[derive(Debug)]
pub struct Ioregionfd {
    fd: OwnedFd,
    page: Mapping,
    /// Commands taken out.
    taken: u64,
    /// Position of the command that waits for its response.
    owed: Option<u64>,
}

/// KVM's end, as the VMM holds it: good for regions and for `poll`.
#[derive(Debug)]
pub(crate) struct KernelEnd(OwnedFd);

/// Makes both ends.
///
/// # Errors
///
/// KVM's: `ENOTTY` where it does not know the request.
pub(crate) fn pair(vm: &VmFd) -> io::Result<(KernelEnd, Ioregionfd)> {
    let (kvm, device) = kvm::create_ioregionfd(vm)?;
    Ok((KernelEnd(kvm), Ioregionfd::new(device)?))
}

impl Ioregionfd {
    /// Takes the device's end.
    ///
    /// # Errors
    ///
    /// `InvalidInput` if it is not one descriptor of KVM's making; the system's if it cannot be
    /// mapped, or if there is no `/proc` to tell what it is.
    pub fn from_fds(fds: Vec<OwnedFd>) -> io::Result<Self> {
        let [fd] = <[OwnedFd; 1]>::try_from(fds).map_err(|_| {
            io::Error::new(
                io::ErrorKind::InvalidInput,
                "a purpose-made channel is one descriptor",
            )
        })?;
        Self::new(fd)
    }

    fn new(fd: OwnedFd) -> io::Result<Self> {
        let flags = OFlag::from_bits_retain(fcntl(&fd, FcntlArg::F_GETFL)?);
        fcntl(&fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
        let page = Mapping::of_channel(fd.as_fd(), PAGE)?;
        Ok(Self::on(fd, page))
    }

    fn on(fd: OwnedFd, page: Mapping) -> Self {
        // An end that was used before goes on where it stopped. Whoever had it can have put any
        // number there.
        let taken = page.word(TAIL).load(Ordering::Acquire);
        Self {
            fd,
            page,
            taken,
            owed: None,
        }
    }

    /// Wakes KVM if it sleeps, after a store to `tail` or `answered`.
    fn wake(&self) -> Result<(), WireError> {
        fence(Ordering::SeqCst);
        if self.page.word(STATE).load(Ordering::Relaxed) as u32 == 0 {
            return Ok(());
        }
        match nix::unistd::write(&self.fd, &[]) {
            Ok(_) | Err(Errno::EINTR | Errno::EAGAIN) => Ok(()),
            Err(errno) => Err(super::files::broken(errno)),
        }
    }

    /// What follows from having taken a command.
    fn took(&mut self, message: &Message) {
        if message[0] & RESPONSE != 0 {
            self.owed = Some(self.taken);
        }
        self.taken = self.taken.wrapping_add(1);
    }

    fn is_empty(&self) -> bool {
        self.page.word(HEAD).load(Ordering::Acquire) == self.taken
    }

    fn is_closed(&self) -> bool {
        self.page.word(STATE).load(Ordering::Acquire) >> 32 != 0
    }
}

impl Wire for Ioregionfd {
    fn transport(&self) -> Transport {
        Transport::Ioregionfd
    }

    fn try_send(&mut self, message: &Message) -> Result<Try<()>, WireError> {
        let position = self
            .owed
            .take()
            .ok_or(WireError::Protocol("a response that no command asked for"))?;
        let [data, ..] = words(message);
        self.page.word(DATA).store(data, Ordering::Relaxed);
        self.page
            .word(ANSWERED)
            .store(position.wrapping_add(1), Ordering::Release);
        self.wake()?;
        Ok(Try::Done(()))
    }

    fn try_flush(&mut self) -> Result<Try<()>, WireError> {
        Ok(Try::Done(()))
    }

    fn try_recv(&mut self) -> Result<Try<Message>, WireError> {
        // Before `head`: what was put in before the end is still taken.
        let closed = self.is_closed();
        if self.is_empty() {
            return if closed {
                Err(WireError::Closed)
            } else {
                Ok(Try::WouldBlock)
            };
        }
        let start = CMDS + (self.taken as usize % MAILBOX_CMDS) * MESSAGE_LEN;
        let mut message = [0; MESSAGE_LEN];
        for (i, bytes) in message.chunks_exact_mut(8).enumerate() {
            let word = self.page.word(start + 8 * i).load(Ordering::Relaxed);
            bytes.copy_from_slice(&word.to_ne_bytes());
        }
        self.took(&message);
        self.page.word(TAIL).store(self.taken, Ordering::Release);
        self.wake()?;
        Ok(Try::Done(message))
    }

    fn prepare_sleep(&mut self, _to_send: bool) -> bool {
        // KVM wakes whoever polls; nothing has to be announced.
        self.is_empty() && !self.is_closed()
    }

    fn poll_fds(&self, _to_send: bool) -> [Option<(BorrowedFd<'_>, PollFlags)>; 3] {
        [Some((self.fd.as_fd(), PollFlags::POLLIN)), None, None]
    }

    fn finish_sleep(&mut self) {}

    fn sleeps_in(&self) -> Option<BorrowedFd<'_>> {
        Some(self.fd.as_fd())
    }

    fn recv(&mut self) -> Result<Try<Message>, WireError> {
        match self.try_recv()? {
            Try::WouldBlock => {}
            done => return Ok(done),
        }
        let mut message = [0; MESSAGE_LEN];
        // KVM moves the tail, and wakes itself.
        match nix::unistd::read(&self.fd, &mut message) {
            Ok(MESSAGE_LEN) => {
                self.took(&message);
                Ok(Try::Done(message))
            }
            Ok(_) => Err(WireError::Closed),
            Err(Errno::EINTR | Errno::EAGAIN) => Ok(Try::WouldBlock),
            Err(errno) => Err(super::files::broken(errno)),
        }
    }

    fn into_fds(self: Box<Self>) -> Vec<OwnedFd> {
        vec![self.fd]
    }
}

fn words(message: &Message) -> [u64; MESSAGE_LEN / 8] {
    let mut words = [0; MESSAGE_LEN / 8];
    for (word, bytes) in words.iter_mut().zip(message.chunks_exact(8)) {
        let mut copy = [0; 8];
        copy.copy_from_slice(bytes);
        *word = u64::from_ne_bytes(copy);
    }
    words
}

const KVM_ONLY: WireError = WireError::Protocol("only KVM speaks at this end");

impl Wire for KernelEnd {
    fn transport(&self) -> Transport {
        Transport::Ioregionfd
    }

    fn try_send(&mut self, _: &Message) -> Result<Try<()>, WireError> {
        Err(KVM_ONLY)
    }

    fn try_flush(&mut self) -> Result<Try<()>, WireError> {
        Ok(Try::Done(()))
    }

    fn try_recv(&mut self) -> Result<Try<Message>, WireError> {
        Err(KVM_ONLY)
    }

    fn prepare_sleep(&mut self, _to_send: bool) -> bool {
        true
    }

    fn poll_fds(&self, _to_send: bool) -> [Option<(BorrowedFd<'_>, PollFlags)>; 3] {
        [Some((self.0.as_fd(), PollFlags::empty())), None, None]
    }

    fn finish_sleep(&mut self) {}

    fn kernel_files(&self) -> Option<[BorrowedFd<'_>; 2]> {
        Some([self.0.as_fd(), self.0.as_fd()])
    }

    fn into_fds(self: Box<Self>) -> Vec<OwnedFd> {
        vec![self.0]
    }
}

#[cfg(test)]
mod tests {
    use nix::fcntl::SealFlag;
    use nix::sys::memfd::{MFdFlags, memfd_create};

    use super::*;

    #[test]
    fn a_page_with_impossible_positions_stops_nobody() {
        let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
        let fd = memfd_create(c"page", flags).unwrap();
        nix::unistd::ftruncate(&fd, PAGE as i64).unwrap();
        fcntl(&fd, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_SHRINK)).unwrap();
        let page = Mapping::of_memory(fd.as_fd(), PAGE, true).unwrap();
        let last = CMDS + (MAILBOX_CMDS - 1) * MESSAGE_LEN;
        page.word(last).store(RESPONSE.into(), Ordering::Relaxed);
        page.word(TAIL).store(u64::MAX, Ordering::Relaxed);
        let mut end = Ioregionfd::on(fd, page);
        let Try::Done(message) = end.try_recv().unwrap() else {
            panic!("a command is there");
        };
        assert_eq!(message[0], RESPONSE);
        assert_eq!(end.try_send(&message).unwrap(), Try::Done(()));
        assert_eq!(end.page.word(ANSWERED).load(Ordering::Relaxed), 0);
        assert_eq!(end.try_recv().unwrap(), Try::WouldBlock);
    }

    #[test]
    fn a_file_that_kvm_has_not_made_is_refused() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let socket = std::net::TcpStream::connect(address).unwrap();
        let error = Ioregionfd::from_fds(vec![socket.into()]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
    }
}
