//! The VMM's end of a device task: a wire, and the requests that are on their way over it.
//!
//! Any number of vCPUs and regions share a channel. One of the vCPU threads that wait drives
//! the wire; it finishes requests for the others, also for a vCPU that has gone back to its
//! caller in the middle of an access. Nobody holds a lock while the device thinks.

mod kernel;
pub mod state;

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use ioregion_abi::wire::{Layout, Response};
use nix::poll::PollFlags;

use self::state::{New, Outcome, Queue, Ticket};
use crate::waiter::{Bell, Pending, Waiter, Woken};
use crate::wire::{self, Message, Transport, Try, Wire, WireError};

/// How a vCPU waits for a response.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Patience {
    /// Sleeps at once.
    #[default]
    Sleep,
    /// Looks for the response for so long, then sleeps.
    SpinThenSleep(Duration),
}

/// What is told when a channel breaks: the cause, in words.
pub(crate) type OnBreak = Box<dyn Fn(&str) + Send + Sync>;

/// The VMM's end of a device task.
pub struct Channel {
    inner: Mutex<Inner>,
    transport: Transport,
    layout: Layout,
    patience: Patience,
    receive: Vec<(RawFd, PollFlags)>,
    receive_or_send: Vec<(RawFd, PollFlags)>,
}

struct Inner {
    wire: Box<dyn Wire>,
    queue: Queue,
    /// The request whose thread drives the wire.
    driver: Option<Ticket>,
    /// Requests whose threads are in [`Channel::finish`], oldest first.
    present: VecDeque<(Ticket, Arc<Bell>)>,
    /// Rung when requests that nobody waits for could go on.
    helper: Option<Arc<Bell>>,
    /// The helper has announced to the wire that it is about to sleep.
    helper_sleeps: bool,
    on_break: Vec<(u64, OnBreak)>,
    cause: Option<String>,
    /// The wire keeps a part of a message that it has accepted.
    unflushed: bool,
    /// KVM speaks over the wire: nothing else may.
    kernel: bool,
}

impl std::fmt::Debug for Channel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Channel")
            .field("transport", &self.transport)
            .field("layout", &self.layout)
            .field("broken", &self.cause())
            .finish_non_exhaustive()
    }
}

/// How an access over a channel went on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Progress {
    /// It has ended.
    Ended(Outcome),
    /// The vCPU must return to its caller; the request goes on.
    Interrupted,
}

impl Channel {
    /// Makes a channel and the wire that the device task serves, connected by `transport`.
    ///
    /// # Errors
    ///
    /// The operating system's, when it has no descriptor or memory left.
    pub fn pair(transport: Transport) -> io::Result<(Arc<Self>, Box<dyn Wire>)> {
        let (vmm, device) = wire::pair(transport)?;
        Ok((
            Arc::new(Self::new(vmm, Layout::default(), Patience::default())),
            device,
        ))
    }

    /// A channel over an existing wire.
    #[must_use]
    pub fn new(wire: Box<dyn Wire>, layout: Layout, patience: Patience) -> Self {
        let fds = |to_send| {
            let fds = wire.poll_fds(to_send);
            fds.iter()
                .flatten()
                .map(|(fd, flags)| (fd.as_raw_fd(), *flags))
                .collect()
        };
        Self {
            transport: wire.transport(),
            layout,
            patience,
            receive: fds(false),
            receive_or_send: fds(true),
            inner: Mutex::new(Inner {
                wire,
                queue: Queue::default(),
                driver: None,
                present: VecDeque::new(),
                helper: None,
                helper_sleeps: false,
                on_break: Vec::new(),
                cause: None,
                unflushed: false,
                kernel: false,
            }),
        }
    }

    /// The transport.
    #[must_use]
    pub fn transport(&self) -> Transport {
        self.transport
    }

    /// The layout of the commands.
    #[must_use]
    pub fn layout(&self) -> Layout {
        self.layout
    }

    /// Why the channel carries nothing more; `None` while it works.
    #[must_use]
    pub fn cause(&self) -> Option<String> {
        self.lock().cause.clone()
    }

    /// Writes that were accepted but that the device never got, because it went away.
    #[must_use]
    pub fn undelivered_writes(&self) -> u64 {
        self.lock().queue.undelivered()
    }

    /// Whether a region can be assigned to this channel.
    ///
    /// # Errors
    ///
    /// Why it is broken, or that the device's end is closed.
    pub(crate) fn check(&self) -> io::Result<()> {
        if self.lock().kernel || self.transport == Transport::Ioregionfd {
            let what = "the channel is for the mechanism ioregionfd, whose end KVM has";
            return Err(io::Error::new(io::ErrorKind::InvalidInput, what));
        }
        self.check_open()
    }

    fn check_open(&self) -> io::Result<()> {
        if let Some(cause) = self.cause() {
            return Err(io::Error::other(cause));
        }
        for &(fd, flags) in &self.receive {
            let mut set = libc::pollfd {
                fd,
                events: flags.bits(),
                revents: 0,
            };
            // SAFETY: One entry, which outlives the call.
            let ready = unsafe { libc::poll(&raw mut set, 1, 0) };
            if ready > 0 && set.revents & (libc::POLLHUP | libc::POLLERR | libc::POLLNVAL) != 0 {
                return Err(io::Error::new(
                    io::ErrorKind::BrokenPipe,
                    "the device's end is closed",
                ));
            }
        }
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Calls `on_break` once if the channel breaks (at once if it is broken), for `region`.
    pub(crate) fn watch(&self, region: u64, on_break: OnBreak) {
        let mut inner = self.lock();
        match &inner.cause {
            Some(cause) => on_break(cause),
            None => inner.on_break.push((region, on_break)),
        }
    }

    /// The bell that is rung when detached requests can go on.
    pub(crate) fn set_helper(&self, helper: Arc<Bell>) {
        self.lock().helper = Some(helper);
    }

    /// Queues a request unless `live` says that its region has gone (looked at under the lock
    /// that [`settle`](Self::settle) takes).
    pub(crate) fn request(&self, new: New, live: impl FnOnce() -> bool) -> Option<Ticket> {
        let mut inner = self.lock();
        live().then(|| inner.queue.push(new))
    }

    /// Sends what can be sent without waiting. Returns how many requests are left to be sent, and
    /// the descriptors that tell when this can go on: none while a vCPU drives the wire, which
    /// rings the helper when it leaves.
    pub(crate) fn advance(&self) -> (usize, &[(RawFd, PollFlags)]) {
        let mut inner = self.lock();
        if inner.kernel {
            // What arrives is KVM's.
            return (0, &[]);
        }
        loop {
            // Where no vCPU drives the wire, a response that nobody fetches holds up the rest.
            let alone = inner.driver.is_none();
            if alone && std::mem::take(&mut inner.helper_sleeps) {
                inner.wire.finish_sleep();
            }
            inner.step_or_break(alone, None);
            let backlog = inner.queue.backlog();
            if backlog == 0 || !alone {
                return (backlog, &[]);
            }
            let to_send = inner.wants_to_send();
            inner.helper_sleeps = true;
            if inner.wire.prepare_sleep(to_send) {
                return (backlog, self.fds(to_send));
            }
        }
    }

    /// Has the helper look at what is left to be sent.
    pub(crate) fn call_helper(&self) {
        if let Some(helper) = &self.lock().helper {
            helper.ring();
        }
    }

    fn fds(&self, to_send: bool) -> &[(RawFd, PollFlags)] {
        if to_send {
            &self.receive_or_send
        } else {
            &self.receive
        }
    }

    /// Ends the requests of a region that goes away; see [`Queue::settle`].
    pub(crate) fn settle(&self, region: u64, abandon: bool, and: impl FnOnce()) {
        let mut inner = self.lock();
        and();
        inner.queue.settle(region, abandon);
        inner.on_break.retain(|(id, _)| *id != region);
        inner.ring_all();
    }

    /// Breaks the channel from this side.
    pub(crate) fn break_with(&self, cause: &str) {
        self.lock().break_off(cause);
    }

    /// Gives a request up.
    pub(crate) fn abandon(&self, ticket: Ticket) {
        let mut inner = self.lock();
        inner.queue.abandon(ticket);
        inner.ring_all();
    }

    /// Waits until a request has ended, driving the wire if nobody else does.
    pub(crate) fn finish(
        self: &Arc<Self>,
        ticket: Ticket,
        waiter: &mut Waiter,
    ) -> io::Result<Progress> {
        let mut inner = self.lock();
        let mut spin_until = match self.patience {
            Patience::Sleep => None,
            Patience::SpinThenSleep(time) => Some(Instant::now() + time),
        };
        // A response right after the command is not worth a system call.
        let mut receive = self.transport == Transport::Mailbox || spin_until.is_some();
        loop {
            if let Some(outcome) = inner.queue.take(ticket) {
                inner.leave(ticket);
                return Ok(Progress::Ended(outcome));
            }
            if waiter.is_interrupted() {
                inner.leave(ticket);
                return Ok(self.interrupted(ticket, waiter));
            }
            let drives = *inner.driver.get_or_insert(ticket) == ticket;
            let mut fds = &[][..];
            if drives {
                if inner.step_or_break(receive, Some(ticket)) {
                    continue;
                }
                receive = true;
                if let Some(end) = spin_until {
                    if Instant::now() < end {
                        drop(inner);
                        std::hint::spin_loop();
                        inner = self.lock();
                        continue;
                    }
                    spin_until = None;
                }
                let to_send = inner.wants_to_send();
                if !inner.wire.prepare_sleep(to_send) {
                    inner.wire.finish_sleep();
                    continue;
                }
                fds = self.fds(to_send);
            }
            inner.arrive(ticket, &waiter.bell);
            drop(inner);
            let woken = waiter.sleep(fds);
            inner = self.lock();
            if drives {
                inner.wire.finish_sleep();
            }
            match woken {
                Ok(Woken::Ready) => {}
                Ok(Woken::Interrupted) => {
                    inner.leave(ticket);
                    return Ok(self.interrupted(ticket, waiter));
                }
                Err(error) => {
                    // The request goes on all the same: making it anew would double it.
                    inner.leave(ticket);
                    self.interrupted(ticket, waiter);
                    return Err(error);
                }
            }
        }
    }

    fn interrupted(self: &Arc<Self>, ticket: Ticket, waiter: &mut Waiter) -> Progress {
        waiter.pending = Some(Pending {
            channel: Arc::clone(self),
            ticket,
        });
        Progress::Interrupted
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        let lost = self.queue.backlog();
        if lost > 0 {
            tracing::error!(lost, "a channel was dropped with writes that were not sent");
        }
    }
}

impl Inner {
    /// Does what can be done without waiting; returns whether a request ended. All threads
    /// whose requests ended are told, but not the one that works here (`by`).
    fn step(&mut self, receive: bool, by: Option<Ticket>) -> Result<bool, WireError> {
        let mut ended = false;
        let mut blocked = self.wire.try_flush()? == Try::WouldBlock;
        self.unflushed = blocked;
        loop {
            while !blocked && let Some(message) = self.queue.to_send() {
                blocked = self.wire.try_send(message)? == Try::WouldBlock;
                if !blocked {
                    if let Some(ticket) = self.queue.sent() {
                        self.ring(ticket, by);
                        ended = true;
                    }
                    // A stream may have taken a part only.
                    blocked = self.wire.try_flush()? == Try::WouldBlock;
                    self.unflushed = blocked;
                }
            }
            if ended || !receive {
                return Ok(ended);
            }
            let Try::Done(message) = self.wire.try_recv()? else {
                return Ok(ended);
            };
            ended |= self.receive(&message, by)?;
        }
    }

    fn receive(&mut self, message: &Message, by: Option<Ticket>) -> Result<bool, WireError> {
        let data = Response::decode(message).data;
        match self.queue.received(data) {
            Ok(Some(ticket)) => {
                self.ring(ticket, by);
                Ok(true)
            }
            Ok(None) => Ok(false),
            Err(_) => Err(WireError::Protocol("a response that no command asked for")),
        }
    }

    fn step_or_break(&mut self, receive: bool, by: Option<Ticket>) -> bool {
        if self.cause.is_some() {
            return true;
        }
        match self.step(receive, by) {
            Ok(ended) => ended,
            Err(error) => {
                self.break_off(&error.to_string());
                true
            }
        }
    }

    fn break_off(&mut self, cause: &str) {
        if self.cause.is_some() {
            return;
        }
        tracing::warn!(%cause, "a device channel broke");
        self.queue.break_off();
        for (_, on_break) in self.on_break.drain(..) {
            on_break(cause);
        }
        self.cause = Some(cause.to_owned());
        self.ring_all();
    }

    /// Tells the thread of a request that it has ended, unless it is the one that works here.
    fn ring(&self, ticket: Ticket, by: Option<Ticket>) {
        if by == Some(ticket) {
            return;
        }
        if let Some((_, bell)) = self.present.iter().find(|(present, _)| *present == ticket) {
            bell.ring();
        }
    }

    fn ring_all(&self) {
        for (_, bell) in &self.present {
            bell.ring();
        }
        if let Some(helper) = &self.helper {
            helper.ring();
        }
    }

    fn arrive(&mut self, ticket: Ticket, bell: &Arc<Bell>) {
        if !self.present.iter().any(|(present, _)| *present == ticket) {
            self.present.push_back((ticket, Arc::clone(bell)));
        }
    }

    /// Hands the wire to the next thread, unless another one has it. That it has been offered to
    /// this one, which may not even know, does not matter: the next in line is told again.
    fn leave(&mut self, ticket: Ticket) {
        self.present.retain(|(present, _)| *present != ticket);
        if self.driver.is_some_and(|driver| driver != ticket) {
            return;
        }
        self.driver = None;
        if let Some((_, bell)) = self.present.front() {
            bell.ring();
            return;
        }
        if self.queue.to_send().is_some() {
            self.step_or_break(false, Some(ticket));
        }
        if self.queue.backlog() > 0
            && let Some(helper) = &self.helper
        {
            helper.ring();
        }
    }

    /// Whether something waits for space on the wire: a request, or the rest of one.
    fn wants_to_send(&self) -> bool {
        self.unflushed || self.queue.to_send().is_some()
    }
}
