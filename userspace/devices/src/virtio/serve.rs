//! Serving one queue, over whatever carries its requests: the loop of the queue's thread, and what
//! that thread shares with whoever runs it.

use std::convert::Infallible;
use std::io;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::device::{Done, Lane};
use super::queue::{Broken, Queue};
use crate::memory::{Memory, MemoryError};

/// How a queue is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Health {
    /// No driver is ready.
    Idle,
    /// A driver is ready, but has not set up this queue, or has it stand still.
    Waiting,
    /// It is served.
    Running,
    /// The driver broke it; nothing of it is served until the next reset.
    Broken(Broken),
    /// The system failed the device; nothing of it is served until the next reset.
    Failed(io::ErrorKind),
}

/// Why a queue is no longer served.
#[derive(Debug)]
pub enum End {
    /// Whoever runs it has said so.
    Stopped,
    /// The driver broke it.
    Broken(Broken),
    /// The system failed the device.
    Failed(io::Error),
}

impl From<Broken> for End {
    fn from(broken: Broken) -> Self {
        match broken {
            Broken::Memory(MemoryError::Closed) => Self::Stopped,
            broken => Self::Broken(broken),
        }
    }
}

impl From<io::Error> for End {
    fn from(error: io::Error) -> Self {
        Self::Failed(error)
    }
}

/// What carries the requests of one queue.
pub trait Transport {
    /// The driver's memory.
    fn memory(&self) -> &dyn Memory;

    /// Interrupts the driver for the queue.
    ///
    /// # Errors
    ///
    /// Why the queue is no longer served.
    fn interrupt(&self) -> Result<(), End>;

    /// Requests were given back; the driver may not have been interrupted yet.
    fn gave_back(&self, queue: &Queue) {
        let _ = queue;
    }

    /// All that was there to do is done.
    fn settled(&self) {}

    /// Whether the queue has to stand still: no request is taken from it any more. Whoever begins
    /// or ends that, [kicks](Control::kick).
    fn is_held(&self) -> bool {
        false
    }

    /// Nothing is in flight of a queue that has to stand still: waits until it may go on. By then
    /// the driver may have set up another one in its place.
    ///
    /// # Errors
    ///
    /// Why the queue is no longer served.
    fn rest(&self, queue: &mut Queue) -> Result<(), End> {
        let _ = queue;
        Ok(())
    }
}

/// What a queue's thread shares with whoever runs it.
#[derive(Debug)]
pub struct Control {
    stop: AtomicBool,
    kick: EventFd,
    health: Mutex<Health>,
}

impl Control {
    /// That of a thread which has not begun.
    ///
    /// # Errors
    ///
    /// The system's.
    pub fn new() -> io::Result<Self> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        Ok(Self {
            stop: AtomicBool::new(false),
            kick: EventFd::from_value_and_flags(0, flags)?,
            health: Mutex::new(Health::Waiting),
        })
    }

    /// The eventfd by which the driver notifies.
    #[must_use]
    pub fn eventfd(&self) -> &EventFd {
        &self.kick
    }

    /// Notifies in the driver's place.
    pub fn kick(&self) {
        // Full is as good.
        let _ = self.kick.write(1);
    }

    /// Has the thread end as soon as it can.
    pub fn end(&self) {
        self.stop.store(true, Ordering::Release);
        self.kick();
    }

    /// Whether the thread may go on.
    ///
    /// # Errors
    ///
    /// [`End::Stopped`].
    pub fn check_stopped(&self) -> Result<(), End> {
        match self.stop.load(Ordering::Acquire) {
            true => Err(End::Stopped),
            false => Ok(()),
        }
    }

    /// How the queue is doing.
    #[must_use]
    pub fn health(&self) -> Health {
        *self.health.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Says how the queue is doing.
    pub fn set_health(&self, health: Health) {
        *self.health.lock().unwrap_or_else(PoisonError::into_inner) = health;
    }

    /// Notes why the thread ends; says so, unless it was told to. Returns whether it was.
    pub fn note_end(&self, device: &str, queue: u16, end: End) -> bool {
        let health = match end {
            End::Stopped => Health::Idle,
            End::Broken(broken) => {
                tracing::error!(device, queue, %broken, "the driver broke a queue");
                Health::Broken(broken)
            }
            End::Failed(error) => {
                tracing::error!(device, queue, %error, "a queue cannot be served");
                Health::Failed(error.kind())
            }
        };
        self.set_health(health);
        health == Health::Idle
    }

    /// Waits for a notification: of the driver, of the end, or of the lane.
    ///
    /// # Errors
    ///
    /// The system's.
    pub fn wait(&self, event: Option<BorrowedFd<'_>>, limit: PollTimeout) -> io::Result<()> {
        let kick = self.kick.as_fd();
        let mut fds = [kick, event.unwrap_or(kick)].map(|fd| PollFd::new(fd, PollFlags::POLLIN));
        match poll(&mut fds, limit) {
            Ok(0) | Err(nix::errno::Errno::EINTR) => {}
            Ok(_) => {
                // Who reads it is alone with it. It does not block.
                let _ = self.kick.read();
            }
            Err(error) => return Err(error.into()),
        }
        Ok(())
    }

    /// Serves a queue until it is stopped or breaks: why.
    ///
    /// # Errors
    ///
    /// Always.
    pub fn serve(
        &self,
        transport: &dyn Transport,
        queue: &mut Queue,
        lane: &mut dyn Lane,
    ) -> Result<Infallible, End> {
        let memory = transport.memory();
        loop {
            queue.disable_kicks(memory)?;
            while self.turn(transport, queue, lane)? {}
            let is_held = transport.is_held();
            if is_held && queue.in_flight() == 0 {
                transport.rest(queue)?;
                continue;
            }
            // Of requests that the lane has no use for nobody needs to tell.
            if is_held || !(lane.wants() && queue.enable_kicks(memory)?) {
                self.wait(lane.event(), PollTimeout::NONE)?;
            }
            self.check_stopped()?;
        }
    }

    /// Hands the lane what it takes and gives back what is done; whether there was anything.
    fn turn(
        &self,
        transport: &dyn Transport,
        queue: &mut Queue,
        lane: &mut dyn Lane,
    ) -> Result<bool, End> {
        let memory = transport.memory();
        let mut progress = false;
        while lane.wants()
            && !transport.is_held()
            && let Some(chain) = queue.pop(memory)?
        {
            progress = true;
            self.check_stopped()?;
            if let Some(done) = lane.submit(chain, memory)? {
                self.give_back(transport, queue, [done])?;
            }
        }
        lane.flush()?;
        let mut finished = Vec::new();
        while let Some(done) = lane.finished(memory)? {
            finished.push(done);
        }
        if !finished.is_empty() {
            progress = true;
            self.give_back(transport, queue, finished)?;
        }
        // What finished in part goes on.
        lane.flush()?;
        transport.settled();
        Ok(progress)
    }

    /// Gives requests back, all at once, and tells the driver where it wants to hear of it.
    fn give_back(
        &self,
        transport: &dyn Transport,
        queue: &mut Queue,
        done: impl IntoIterator<Item = Done>,
    ) -> Result<(), End> {
        let memory = transport.memory();
        queue.push_all(memory, done)?;
        transport.gave_back(queue);
        if queue.must_notify(memory)? {
            transport.interrupt()?;
        }
        self.check_stopped()
    }
}

/// Counts threads that have not ended.
#[derive(Debug, Default)]
pub struct Running {
    count: Mutex<usize>,
    ended: Condvar,
}

impl Running {
    /// Counts a thread, until what is returned is dropped.
    #[must_use]
    pub fn enter(self: &Arc<Self>) -> Entered {
        *self.count.lock().unwrap_or_else(PoisonError::into_inner) += 1;
        Entered(Arc::clone(self))
    }

    /// Waits until all have ended; whether they have.
    pub fn wait(&self, limit: Duration) -> bool {
        let count = self.count.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self
            .ended
            .wait_timeout_while(count, limit, |count| *count > 0);
        *waited.unwrap_or_else(PoisonError::into_inner).0 == 0
    }
}

/// A thread that counts as running.
#[derive(Debug)]
pub struct Entered(Arc<Running>);

impl Drop for Entered {
    fn drop(&mut self) {
        *self.0.count.lock().unwrap_or_else(PoisonError::into_inner) -= 1;
        self.0.ended.notify_all();
    }
}
