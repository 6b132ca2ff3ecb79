//! A server on io_uring.
//!
//! As the ioregionfd design discussion proposes for device emulation on io_uring: the server
//! keeps a read submitted on the wire and takes commands from the completion queue. A polling
//! server looks at that queue in shared memory, and the response and the next read are
//! submitted together, in one system call.

use std::os::fd::{AsRawFd, BorrowedFd, RawFd};

use io_uring::{IoUring, opcode, squeue, types};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::libc;

use super::{DeviceEnd, ServeError, Session, Stats, Step, Stop, WaitPolicy};
use crate::device::Device;
use crate::source::DoorbellSource;
use crate::wire::files::{Partial, broken, check_packet};
use crate::wire::{Message, Transport, WireError};

const STOP: u64 = 0;
const RECEIVED: u64 = 1;
const SENT: u64 = 2;
const CANCELLED: u64 = 3;
/// The descriptors of a wire that the ring only waits for are numbered from here.
const WIRE: u64 = 4;
/// The descriptors of the sources are numbered from here.
const SOURCES: u64 = 8;

/// Entries of the submission queue; a full one is submitted.
const ENTRIES: u32 = 64;

/// Serves the device until the VMM's end is closed or `stop` is triggered.
///
/// Sockets and pipes are read and written through the ring; for a mailbox, and for doorbells,
/// the ring waits for their descriptors. [`WaitPolicy::SpinThenSleep`] sleeps at once here.
///
/// # Errors
///
/// [`ServeError`]: no io_uring on this host, a bad command, or a wire or a source that failed;
/// [`ServeError::Event`] for a device with an event of its own, since what the guest did before
/// is not known to have been received then.
pub fn serve_uring(
    end: DeviceEnd,
    device: &mut dyn Device,
    policy: WaitPolicy,
    stop: &Stop,
) -> Result<Stats, ServeError> {
    if device.event().is_some() {
        return Err(ServeError::Event);
    }
    let mut session = Session::new(end, device);
    let served = run(&mut session, policy, stop);
    session.finish(served)
}

fn run(session: &mut Session<'_>, policy: WaitPolicy, stop: &Stop) -> Result<(), ServeError> {
    let mut server = Server {
        ring: Ring(IoUring::new(ENTRIES).map_err(ServeError::Wait)?),
        stream: None,
        polled: Vec::new(),
        wire_polled: false,
    };
    let served = server.run(session, policy, stop);
    if let Some(stream) = server.stream {
        stream.cancel(&mut server.ring);
    }
    served
}

struct Server {
    ring: Ring,
    /// Reads and writes of a wire that is made of files.
    stream: Option<Stream>,
    /// The sources' descriptors, in the order of their tokens.
    polled: Vec<(usize, RawFd)>,
    /// Whether the descriptors of another wire are being waited for.
    wire_polled: bool,
}

impl Server {
    fn run(
        &mut self,
        session: &mut Session<'_>,
        policy: WaitPolicy,
        stop: &Stop,
    ) -> Result<(), ServeError> {
        for (source, fds) in session
            .sources
            .iter()
            .map(DoorbellSource::poll_fds)
            .enumerate()
        {
            self.polled
                .extend(fds.iter().map(|fd| (source, fd.as_raw_fd())));
        }
        self.ring.poll(stop.fd().as_raw_fd(), libc::POLLIN, STOP)?;
        for (token, (_, fd)) in (SOURCES..).zip(&self.polled) {
            self.ring.poll(*fd, libc::POLLIN, token)?;
        }
        let transport = session.wire.transport();
        if !matches!(transport, Transport::Mailbox | Transport::Ioregionfd) {
            let stream = self.stream.insert(Stream::new(session)?);
            stream.receive(&mut self.ring)?;
        }
        let sleeps = policy != WaitPolicy::Poll;
        while !stop.is_triggered() {
            // Eventfds show up in the completion queue.
            let slots = |source: &DoorbellSource| {
                matches!(source, DoorbellSource::Port(_)) && source.has_news()
            };
            if session.sources.iter().any(slots) {
                session.drain()?;
            }
            let quiet = match &self.stream {
                Some(_) => true,
                None => self.attend(session, stop, sleeps)?,
            };
            if sleeps && quiet && session.arm() {
                session.stats.wakeups += 1;
                self.ring.enter(1)?;
            } else {
                std::hint::spin_loop();
                self.ring.enter(0)?;
            }
            session.disarm();
            while let Some((token, result)) = self.ring.completed() {
                self.complete(token, result, session)?;
            }
        }
        Ok(())
    }

    /// Takes commands from a wire that the ring cannot read; true if it may sleep then.
    fn attend(
        &mut self,
        session: &mut Session<'_>,
        stop: &Stop,
        sleeps: bool,
    ) -> Result<bool, ServeError> {
        let blocked = session.attend(stop)? == Step::Blocked;
        if !sleeps {
            return Ok(false);
        }
        if !self.wire_polled {
            for place in 0..3 {
                self.poll_wire(session, place)?;
            }
            self.wire_polled = true;
        }
        Ok(session.wire.prepare_sleep(blocked))
    }

    fn poll_wire(&mut self, session: &Session<'_>, place: usize) -> Result<(), ServeError> {
        match session.wire.poll_fds(false)[place] {
            Some((fd, events)) => {
                let token = WIRE + place as u64;
                self.ring.poll(fd.as_raw_fd(), events.bits(), token)
            }
            None => Ok(()),
        }
    }

    fn complete(
        &mut self,
        token: u64,
        result: i32,
        session: &mut Session<'_>,
    ) -> Result<(), ServeError> {
        match (token, &mut self.stream) {
            (RECEIVED, Some(stream)) => stream.received(result, &mut self.ring, session),
            (SENT, Some(stream)) => stream.sent(result, &mut self.ring),
            (WIRE..SOURCES, _) => {
                session.wire.finish_sleep();
                self.poll_wire(session, (token - WIRE) as usize)
            }
            (SOURCES.., _) => {
                let Some(&(source, fd)) = self.polled.get((token - SOURCES) as usize) else {
                    return Ok(());
                };
                session.sources[source]
                    .acknowledge()
                    .map_err(ServeError::Source)?;
                session.drain()?;
                self.ring.poll(fd, libc::POLLIN, token)
            }
            _ => Ok(()),
        }
    }
}

/// Reads and writes of a socket or a pair of pipes, at most one of each in flight.
struct Stream {
    read: RawFd,
    write: RawFd,
    transport: Transport,
    inbound: Box<Partial>,
    outbound: Box<Partial>,
    receiving: bool,
    sending: bool,
    /// A response that waits for the one before it; nothing is received meanwhile.
    next: Option<Message>,
}

impl Stream {
    fn new(session: &Session<'_>) -> Result<Self, ServeError> {
        let fds = session.wire.poll_fds(true);
        let [Some((read, _)), write, _] = fds else {
            return Err(ServeError::Wait(Errno::EBADF.into()));
        };
        let write = write.map_or(read, |(write, _)| write);
        let transport = session.wire.transport();
        if transport == Transport::Pipes {
            // io_uring waits only for files that are not set non-blocking.
            for fd in [read, write] {
                let block = || {
                    let flags = OFlag::from_bits_retain(fcntl(fd, FcntlArg::F_GETFL)?);
                    fcntl(fd, FcntlArg::F_SETFL(flags - OFlag::O_NONBLOCK))
                };
                block().map_err(|errno: Errno| ServeError::Wait(errno.into()))?;
            }
        }
        Ok(Self {
            read: read.as_raw_fd(),
            write: write.as_raw_fd(),
            transport,
            inbound: Box::default(),
            outbound: Box::default(),
            receiving: false,
            sending: false,
            next: None,
        })
    }

    fn receive(&mut self, ring: &mut Ring) -> Result<(), ServeError> {
        let fd = types::Fd(self.read);
        let rest = self.inbound.rest();
        let (start, len) = (rest.as_mut_ptr(), rest.len() as u32);
        let entry = match self.transport {
            Transport::Stream => opcode::Recv::new(fd, start, len).build(),
            // With MSG_TRUNC the result is the message's length, even where that is longer.
            Transport::Seqpacket => opcode::Recv::new(fd, start, len)
                .flags(libc::MSG_TRUNC)
                .build(),
            _ => opcode::Read::new(fd, start, len).offset(u64::MAX).build(),
        };
        // SAFETY: The buffer is boxed, and neither touched nor freed while `receiving`.
        unsafe { ring.push(entry.user_data(RECEIVED))? };
        self.receiving = true;
        Ok(())
    }

    fn send(&mut self, ring: &mut Ring) -> Result<(), ServeError> {
        let fd = types::Fd(self.write);
        let rest = self.outbound.rest();
        let (start, len) = (rest.as_ptr(), rest.len() as u32);
        let entry = match self.transport {
            Transport::Pipes => opcode::Write::new(fd, start, len).offset(u64::MAX).build(),
            _ => opcode::Send::new(fd, start, len)
                .flags(libc::MSG_NOSIGNAL)
                .build(),
        };
        // SAFETY: The buffer is boxed, and neither touched nor freed while `sending`.
        unsafe { ring.push(entry.user_data(SENT))? };
        self.sending = true;
        Ok(())
    }

    fn received(
        &mut self,
        result: i32,
        ring: &mut Ring,
        session: &mut Session<'_>,
    ) -> Result<(), ServeError> {
        self.receiving = false;
        let len = match count(result)? {
            None => return self.receive(ring),
            Some(len) => len,
        };
        if self.transport == Transport::Seqpacket {
            // SAFETY: The session owns the descriptor.
            check_packet(unsafe { BorrowedFd::borrow_raw(self.read) }, len)?;
        } else if len == 0 {
            return Err(WireError::Closed.into());
        }
        if self.inbound.advance(len) {
            let message = self.inbound.take();
            if let Some(response) = session.handle(&message)? {
                if self.sending {
                    self.next = Some(response);
                    return Ok(());
                }
                *self.outbound = Partial::full(response);
                self.send(ring)?;
            }
        }
        self.receive(ring)
    }

    fn sent(&mut self, result: i32, ring: &mut Ring) -> Result<(), ServeError> {
        self.sending = false;
        if !self.outbound.advance(count(result)?.unwrap_or(0)) {
            return self.send(ring);
        }
        if let Some(response) = self.next.take() {
            *self.outbound = Partial::full(response);
            self.send(ring)?;
            self.receive(ring)?;
        }
        Ok(())
    }

    /// Waits until the kernel has let go of the buffers.
    fn cancel(mut self, ring: &mut Ring) {
        for (flag, token) in [(self.receiving, RECEIVED), (self.sending, SENT)] {
            let cancel = opcode::AsyncCancel::new(token).build().user_data(CANCELLED);
            // SAFETY: No memory is involved.
            if flag && unsafe { ring.push(cancel) }.is_err() {
                break;
            }
        }
        while self.receiving || self.sending {
            if let Err(error) = ring.enter(1) {
                tracing::error!(%error, "an io_uring request cannot be cancelled: its buffer is leaked");
                std::mem::forget(self);
                return;
            }
            while let Some((token, _)) = ring.completed() {
                self.receiving &= token != RECEIVED;
                self.sending &= token != SENT;
            }
        }
    }
}

/// A completion's number of bytes; `None`: try again.
fn count(result: i32) -> Result<Option<usize>, WireError> {
    match usize::try_from(result) {
        Ok(len) => Ok(Some(len)),
        Err(_) => match Errno::from_raw(-result) {
            Errno::EINTR | Errno::EAGAIN => Ok(None),
            errno => Err(broken(errno)),
        },
    }
}

struct Ring(IoUring);

impl Ring {
    /// # Safety
    ///
    /// The entry's memory must stay valid, and untouched, until it completes.
    unsafe fn push(&mut self, entry: squeue::Entry) -> Result<(), ServeError> {
        loop {
            // SAFETY: The caller vouches for the entry.
            if unsafe { self.0.submission().push(&entry) }.is_ok() {
                return Ok(());
            }
            self.enter(0)?;
        }
    }

    /// Waits once for a descriptor.
    fn poll(&mut self, fd: RawFd, events: i16, token: u64) -> Result<(), ServeError> {
        let entry = opcode::PollAdd::new(types::Fd(fd), events as u32).build();
        // SAFETY: No memory is involved.
        unsafe { self.push(entry.user_data(token)) }
    }

    /// Submits what is queued and waits for `want` completions. Without either, makes no system
    /// call.
    fn enter(&mut self, want: usize) -> Result<(), ServeError> {
        let submission = self.0.submission();
        if want == 0 && submission.is_empty() && !submission.cq_overflow() {
            return Ok(());
        }
        drop(submission);
        match self.0.submit_and_wait(want) {
            Ok(_) => Ok(()),
            // Interrupted, or completions must be taken first.
            Err(error)
                if matches!(
                    error.raw_os_error(),
                    Some(libc::EINTR | libc::EBUSY | libc::EAGAIN)
                ) =>
            {
                Ok(())
            }
            Err(error) => Err(ServeError::Wait(error)),
        }
    }

    fn completed(&mut self) -> Option<(u64, i32)> {
        let entry = self.0.completion().next()?;
        Some((entry.user_data(), entry.result()))
    }
}
