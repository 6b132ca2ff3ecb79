//! The device side: serving a device model from a thread, a tokio task or an io_uring.
//!
//! All servers do the same with a command: they deliver every doorbell that rang before it,
//! then the command itself, then they respond if the sender waits. They differ in how they wait.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use ioregion_abi::Size;
use ioregion_abi::wire::{Command, DecodeError, Layout, Operation, Response};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::device::{Access, Device, Ring};
use crate::region::Doorbell;
use crate::registers::RegisterFile;
use crate::source::DoorbellSource;
use crate::wire::{Message, Try, Wire, WireError};

mod asleep;
mod blocking;
#[cfg(feature = "tokio")]
mod tokio;
#[cfg(feature = "io-uring")]
mod uring;
mod watch;

#[cfg(feature = "tokio")]
pub use self::tokio::serve_async;
#[cfg(feature = "io-uring")]
pub use self::uring::serve_uring;
use asleep::Sleeper;
pub use blocking::serve;

/// Everything that a device task needs besides its device: it never holds a KVM descriptor.
///
/// Dropping it tells the VMM that the task is gone.
#[derive(Debug)]
pub struct DeviceEnd {
    pub(crate) wire: Box<dyn Wire>,
    pub(crate) layout: Layout,
    pub(crate) sources: Vec<DoorbellSource>,
    pub(crate) regions: Vec<(u64, Vec<Doorbell>)>,
    pub(crate) registers: Vec<(u64, RegisterFile)>,
}

impl DeviceEnd {
    /// An end without doorbells. `layout` is that of the commands on `wire`.
    #[must_use]
    pub fn new(wire: Box<dyn Wire>, layout: Layout) -> Self {
        Self {
            wire,
            layout,
            sources: Vec::new(),
            regions: Vec::new(),
            registers: Vec::new(),
        }
    }

    /// Adds a place where doorbells arrive.
    #[must_use]
    pub fn source(mut self, source: DoorbellSource) -> Self {
        self.sources.push(source);
        self
    }

    /// Declares the doorbells of the region that `user_data` names: a write command that rings
    /// one of them is delivered as a [`Ring`].
    #[must_use]
    pub fn region(mut self, user_data: u64, doorbells: Vec<Doorbell>) -> Self {
        self.regions.push((user_data, doorbells));
        self
    }

    /// Adds the register file of the region that `user_data` names.
    #[must_use]
    pub fn with_registers(mut self, user_data: u64, registers: RegisterFile) -> Self {
        self.registers.push((user_data, registers));
        self
    }

    /// The register file of the region that `user_data` names, for its device to store to.
    #[must_use]
    pub fn registers(&self, user_data: u64) -> Option<RegisterFile> {
        let mut files = self.registers.iter();
        let found = files.find(|(other, _)| *other == user_data);
        found.map(|(_, file)| file.clone())
    }
}

/// How a server waits when there is nothing to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum WaitPolicy {
    /// Sleeps at once.
    #[default]
    Sleep,
    /// Looks for work for this long, then sleeps.
    SpinThenSleep(Duration),
    /// Never sleeps.
    Poll,
}

/// What a server did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Stats {
    /// Commands received.
    pub commands: u64,
    /// Responses sent.
    pub responses: u64,
    /// Doorbell deliveries ([`Ring`]s).
    pub doorbells: u64,
    /// Writes that those stand for.
    pub writes: u64,
    /// Times the server slept. One that sleeps in its wire's `read` counts the sleeps of its
    /// thread, with those of the device.
    pub wakeups: u64,
    /// Doorbell writes that were signalled but whose value was missed.
    pub lost: u64,
}

impl Stats {
    /// Writes that were overwritten before the task looked: all but the last of each delivery.
    #[must_use]
    pub fn overrun(&self) -> u64 {
        self.writes.saturating_sub(self.doorbells)
    }
}

/// Why a server gave up.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The sender sent something that is no command.
    #[error("bad command: {0}")]
    Command(#[from] DecodeError),
    /// The wire failed.
    #[error("wire: {0}")]
    Wire(#[from] WireError),
    /// A doorbell source failed.
    #[error("doorbell source: {0}")]
    Source(#[source] io::Error),
    /// Waiting failed.
    #[error("cannot wait: {0}")]
    Wait(#[source] io::Error),
    /// The device waits for something of its own, which this server cannot.
    #[error("the device has an event of its own: serve it by `serve` or `serve_async`")]
    Event,
}

/// Ends a server from another thread. Clones are the same switch.
#[derive(Debug, Clone)]
pub struct Stop(Arc<Switch>);

#[derive(Debug)]
struct Switch {
    thrown: AtomicBool,
    eventfd: EventFd,
    /// Threads that sleep where the eventfd does not wake them.
    sleepers: Mutex<Vec<Sleeper>>,
}

impl Stop {
    /// Makes a switch.
    ///
    /// # Errors
    ///
    /// The system's, when there is no descriptor left.
    pub fn new() -> io::Result<Self> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        Ok(Self(Arc::new(Switch {
            thrown: AtomicBool::new(false),
            eventfd: EventFd::from_value_and_flags(0, flags)?,
            sleepers: Mutex::default(),
        })))
    }

    /// Makes the servers that use this switch return, for good. Not for signal handlers: it takes
    /// a lock.
    pub fn trigger(&self) {
        self.0.thrown.store(true, Ordering::Release);
        if let Err(error) = self.0.eventfd.write(1) {
            // Only a full counter refuses, and that wakes as well.
            tracing::debug!(%error, "stop switch");
        }
        self.sleepers().iter().for_each(Sleeper::wake);
    }

    fn sleepers(&self) -> MutexGuard<'_, Vec<Sleeper>> {
        let sleepers = self.0.sleepers.lock();
        sleepers.unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether it was triggered.
    #[must_use]
    pub fn is_triggered(&self) -> bool {
        self.0.thrown.load(Ordering::Acquire)
    }

    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.0.eventfd.as_fd()
    }
}

/// Declared doorbells by region, offset and size.
type Declared = HashMap<(u64, u64, Size), Vec<(u32, Doorbell)>>;

/// What one look at the wire came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    /// There was nothing to receive.
    Idle,
    /// A command that nobody waits for; more may follow at once.
    Posted,
    /// A command was answered; its sender needs a while to send the next.
    Answered,
    /// The response cannot be sent yet.
    Blocked,
}

/// A device being served.
struct Session<'d> {
    wire: Box<dyn Wire>,
    layout: Layout,
    sources: Vec<DoorbellSource>,
    declared: Declared,
    device: &'d mut dyn Device,
    unsent: Option<Message>,
    stats: Stats,
}

impl<'d> Session<'d> {
    fn new(end: DeviceEnd, device: &'d mut dyn Device) -> Self {
        let mut declared = Declared::new();
        for (user_data, doorbells) in end.regions {
            for (index, doorbell) in (0..).zip(doorbells) {
                let key = (user_data, doorbell.offset, doorbell.size);
                declared.entry(key).or_default().push((index, doorbell));
            }
        }
        Self {
            wire: end.wire,
            layout: end.layout,
            sources: end.sources,
            declared,
            device,
            unsent: None,
            stats: Stats::default(),
        }
    }

    /// Delivers every doorbell that rang.
    fn drain(&mut self) -> Result<(), ServeError> {
        let Self {
            sources,
            device,
            stats,
            ..
        } = self;
        for source in sources {
            source
                .drain(&mut |ring| {
                    stats.doorbells += 1;
                    stats.writes = stats.writes.wrapping_add(ring.writes);
                    device.doorbell(ring);
                })
                .map_err(ServeError::Source)?;
        }
        Ok(())
    }

    /// Handles one command, after the doorbells that came before it.
    fn handle(&mut self, message: &Message) -> Result<Option<Message>, ServeError> {
        let command = Command::decode(message, self.layout)?;
        self.stats.commands += 1;
        self.drain()?;
        let access = Access {
            user_data: command.user_data,
            offset: command.offset,
            size: command.size,
        };
        let mut data = 0;
        match (command.operation, self.declared_doorbell(&command)) {
            (Operation::Read, _) => data = self.device.read(access),
            (Operation::Write, None) => self.device.write(access, command.data),
            (Operation::Write, Some(ring)) => {
                self.stats.doorbells += 1;
                self.stats.writes = self.stats.writes.wrapping_add(1);
                self.device.doorbell(ring);
            }
        }
        Ok(command.response.then(|| {
            self.stats.responses += 1;
            Response { data }.encode()
        }))
    }

    /// The doorbell that a write command rings.
    fn declared_doorbell(&self, command: &Command) -> Option<Ring> {
        if self.declared.is_empty() || command.operation != Operation::Write {
            return None;
        }
        let Command {
            user_data,
            offset,
            size,
            data,
            ..
        } = *command;
        let (index, _) = *self
            .declared
            .get(&(user_data, offset, size))?
            .iter()
            .find(|(_, doorbell)| doorbell.rings(offset, size, data))?;
        Some(Ring {
            user_data,
            index,
            offset,
            size,
            value: Some(data & size.mask()),
            writes: 1,
        })
    }

    /// Sends what is not sent yet; false if it must wait.
    fn flush(&mut self) -> Result<bool, ServeError> {
        if let Some(message) = &self.unsent {
            if self.wire.try_send(message)? == Try::WouldBlock {
                return Ok(false);
            }
            self.unsent = None;
        }
        Ok(self.wire.try_flush()? == Try::Done(()))
    }

    /// Receives and answers at most one command.
    fn step(&mut self) -> Result<Step, ServeError> {
        self.step_with(|wire| wire.try_recv())
    }

    /// The same with a way to receive.
    fn step_with(
        &mut self,
        recv: impl FnOnce(&mut dyn Wire) -> Result<Try<Message>, WireError>,
    ) -> Result<Step, ServeError> {
        if !self.flush()? {
            return Ok(Step::Blocked);
        }
        let Try::Done(message) = recv(&mut *self.wire)? else {
            return Ok(Step::Idle);
        };
        self.unsent = self.handle(&message)?;
        Ok(if self.unsent.is_none() {
            Step::Posted
        } else if self.flush()? {
            Step::Answered
        } else {
            Step::Blocked
        })
    }

    /// Takes commands until the wire is empty or its sender has an answer to work on.
    fn attend(&mut self, stop: &Stop) -> Result<Step, ServeError> {
        loop {
            let step = self.step()?;
            if step != Step::Posted || stop.is_triggered() {
                return Ok(step);
            }
        }
    }

    /// Looks at the device's event.
    fn device_is_ready(&self) -> Result<bool, ServeError> {
        let Some(event) = self.device.event() else {
            return Ok(false);
        };
        let mut fds = [PollFd::new(event, PollFlags::POLLIN)];
        match poll(&mut fds, PollTimeout::ZERO) {
            Ok(ready) => Ok(ready > 0),
            Err(Errno::EINTR) => Ok(false),
            Err(errno) => Err(ServeError::Wait(errno.into())),
        }
    }

    /// The device's event was readable: delivers what came before, and tells the device. Where a
    /// response waits for space (true) that has to wait, too.
    fn wake_device(&mut self, stop: &Stop) -> Result<bool, ServeError> {
        self.drain()?;
        loop {
            match self.attend(stop)? {
                // What comes after a response that cannot be sent came before the event, too.
                Step::Blocked => return Ok(true),
                Step::Answered if !stop.is_triggered() => {}
                _ => break,
            }
        }
        self.device.woken();
        Ok(false)
    }

    /// Arms the doorbell sources; false if there is news.
    fn arm(&mut self) -> bool {
        self.sources.iter_mut().all(DoorbellSource::arm)
    }

    fn disarm(&mut self) {
        self.sources.iter_mut().for_each(DoorbellSource::disarm);
    }

    fn has_news(&self) -> bool {
        self.sources.iter().any(DoorbellSource::has_news)
    }

    /// Delivers the last doorbells and sums up; the end of the wire is no error.
    fn finish(mut self, served: Result<(), ServeError>) -> Result<Stats, ServeError> {
        match served {
            Ok(()) | Err(ServeError::Wire(WireError::Closed)) => {}
            Err(error) => return Err(error),
        }
        for source in &mut self.sources {
            source.acknowledge().map_err(ServeError::Source)?;
        }
        self.drain()?;
        self.stats.lost = self.sources.iter().map(DoorbellSource::lost).sum();
        Ok(self.stats)
    }
}
