//! A thread that serves one queue.

use std::io;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use ioregion_abi::vduse::VqInfo;
use ioregion_devices::virtio::{
    Broken, Device, Done, Format, Lane, Layout, MemoryError, Position, Queue, Setup,
};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::EventFd;
use virtio_bindings::virtio_config::VIRTIO_F_RING_PACKED;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use crate::iotlb::Session;
use crate::log::Log;
use crate::port::Port;

/// How long an interrupt is tried while the kernel has not noted that the driver is ready: it
/// does so after the answer to the request that made the queues run.
const INTERRUPT_TRIES: Duration = Duration::from_secs(5);

/// How a queue is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Health {
    /// No driver is ready.
    Idle,
    /// A driver is ready, but has not set up this queue.
    Waiting,
    /// It is served.
    Running,
    /// The driver broke it; nothing of it is served until the next reset.
    Broken(Broken),
    /// The kernel failed the device; nothing of it is served until the next reset.
    Failed(io::ErrorKind),
}

/// Counts threads that have not ended.
#[derive(Debug, Default)]
pub(crate) struct Running {
    count: Mutex<usize>,
    ended: Condvar,
}

impl Running {
    pub(crate) fn enter(self: &Arc<Self>) -> Entered {
        *self.count.lock().unwrap_or_else(PoisonError::into_inner) += 1;
        Entered(Arc::clone(self))
    }

    /// Waits until all have ended; whether they have.
    pub(crate) fn wait(&self, limit: Duration) -> bool {
        let count = self.count.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self
            .ended
            .wait_timeout_while(count, limit, |count| *count > 0);
        *waited.unwrap_or_else(PoisonError::into_inner).0 == 0
    }
}

/// A thread that counts as running.
#[derive(Debug)]
pub(crate) struct Entered(Arc<Running>);

impl Drop for Entered {
    fn drop(&mut self) {
        *self.0.count.lock().unwrap_or_else(PoisonError::into_inner) -= 1;
        self.0.ended.notify_all();
    }
}

/// What the message thread and a worker share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) stop: AtomicBool,
    /// The worker may begin.
    begin: AtomicBool,
    pub(crate) kick: EventFd,
    /// Where the queue stood when nothing was in flight last.
    pub(crate) position: Mutex<Option<Position>>,
    pub(crate) health: Mutex<Health>,
}

impl Shared {
    pub(crate) fn new() -> nix::Result<Self> {
        use nix::sys::eventfd::EfdFlags;
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        Ok(Self {
            stop: AtomicBool::new(false),
            begin: AtomicBool::new(false),
            kick: EventFd::from_value_and_flags(0, flags)?,
            position: Mutex::new(None),
            health: Mutex::new(Health::Waiting),
        })
    }

    /// Lets the worker begin.
    pub(crate) fn release(&self) {
        self.begin.store(true, Ordering::Release);
        // Full is as good.
        let _ = self.kick.write(1);
    }

    /// Has the worker end as soon as it can.
    pub(crate) fn end(&self) {
        self.stop.store(true, Ordering::Release);
        // Full is as good.
        let _ = self.kick.write(1);
    }

    fn set_health(&self, health: Health) {
        *self.health.lock().unwrap_or_else(PoisonError::into_inner) = health;
    }
}

/// A thread's errand.
pub(crate) struct Worker<P: Port> {
    pub(crate) name: String,
    pub(crate) index: u16,
    pub(crate) features: u64,
    pub(crate) device: Arc<dyn Device>,
    pub(crate) port: Arc<P>,
    pub(crate) session: Session<Arc<P>>,
    pub(crate) shared: Arc<Shared>,
    /// Threads of drivers before this one: what they still write must not come after what this
    /// one writes.
    pub(crate) before: Vec<Arc<Running>>,
    pub(crate) log: Option<Arc<Log>>,
}

/// Why a worker ends.
enum End {
    /// The driver has reset the device, or the service ends.
    Stopped,
    Broken(Broken),
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

impl<P: Port> Worker<P> {
    /// Serves the queue until it is stopped or breaks. Nothing of the worker is left then.
    pub(crate) fn run(self) {
        let Err(end) = self.serve();
        let (device, queue) = (&self.name, self.index);
        match end {
            End::Stopped => self.shared.set_health(Health::Idle),
            End::Broken(broken) => {
                // The driver cannot be told: VDUSE has no way to set DEVICE_NEEDS_RESET.
                tracing::error!(device, queue, %broken, "the driver broke a queue");
                self.shared.set_health(Health::Broken(broken));
            }
            End::Failed(error) => {
                tracing::error!(device, queue, %error, "a queue cannot be served");
                self.shared.set_health(Health::Failed(error.kind()));
            }
        }
    }

    fn serve(&self) -> Result<std::convert::Infallible, End> {
        for before in &self.before {
            while !before.wait(Duration::from_millis(50)) {
                self.check_stopped()?;
            }
        }
        while !self.shared.begin.load(Ordering::Acquire) {
            self.check_stopped()?;
            self.wait(None, PollTimeout::NONE)?;
        }
        let info = self.wait_for_queue()?;
        let (setup, position) = self.setup(&info)?;
        let mut lane = Arc::clone(&self.device).lane(self.index, self.features)?;
        let (mut queue, resumed) = self.take_up(&setup, position)?;
        self.note_position(queue.position());
        self.shared.set_health(Health::Running);
        if resumed {
            // Whoever served it before may not have done so.
            self.interrupt()?;
        }
        loop {
            queue.disable_kicks(&self.session)?;
            while self.turn(&mut queue, &mut *lane)? {}
            // Of requests that the lane has no use for nobody needs to tell.
            if !(lane.wants() && queue.enable_kicks(&self.session)?) {
                self.wait(lane.event(), PollTimeout::NONE)?;
            }
            self.check_stopped()?;
        }
    }

    /// The queue as the driver set it up, or as whoever served it before left it, which is told.
    fn take_up(&self, setup: &Setup, at: Position) -> Result<(Queue, bool), Broken> {
        let log = self.log.as_ref().and_then(|log| log.queue(self.index));
        let Some(log) = log else {
            return Ok((Queue::new(&self.session, setup, at)?, false));
        };
        if !log.is_active()? {
            return Ok((Queue::begin(&self.session, setup, at, log)?, false));
        }
        let queue = Queue::resume(&self.session, setup, log)?;
        let (device, queue_index) = (&self.name, self.index);
        let in_flight = queue.in_flight();
        tracing::info!(device, queue = queue_index, in_flight, "taken over");
        Ok((queue, true))
    }

    /// Hands the lane what it takes and gives back what is done; whether there was anything.
    fn turn(&self, queue: &mut Queue, lane: &mut dyn Lane) -> Result<bool, End> {
        let mut progress = false;
        while lane.wants()
            && let Some(chain) = queue.pop(&self.session)?
        {
            progress = true;
            self.check_stopped()?;
            if let Some(done) = lane.submit(chain, &self.session)? {
                self.give_back(queue, [done])?;
            }
        }
        lane.flush()?;
        let mut finished = Vec::new();
        while let Some(done) = lane.finished(&self.session)? {
            finished.push(done);
        }
        if !finished.is_empty() {
            progress = true;
            self.give_back(queue, finished)?;
        }
        // What finished in part goes on.
        lane.flush()?;
        if let Some(log) = &self.log {
            log.check();
        }
        Ok(progress)
    }

    /// Gives requests back, all at once, and tells the driver where it wants to hear of it.
    fn give_back(
        &self,
        queue: &mut Queue,
        done: impl IntoIterator<Item = Done>,
    ) -> Result<(), End> {
        queue.push_all(&self.session, done)?;
        self.note(queue);
        if queue.must_notify(&self.session)? {
            self.interrupt()?;
        }
        self.check_stopped()
    }

    fn check_stopped(&self) -> Result<(), End> {
        match self.shared.stop.load(Ordering::Acquire) {
            true => Err(End::Stopped),
            false => Ok(()),
        }
    }

    fn note(&self, queue: &Queue) {
        if queue.in_flight() == 0 {
            self.note_position(queue.position());
        }
    }

    fn note_position(&self, at: Position) {
        let mut position = self.shared.position.lock();
        let position = position.as_mut().unwrap_or_else(|error| error.get_mut());
        **position = Some(at);
    }

    /// Waits for a notification, from the driver, of the end, or of the lane.
    fn wait(&self, event: Option<BorrowedFd<'_>>, limit: PollTimeout) -> io::Result<()> {
        let kick = self.shared.kick.as_fd();
        let mut fds = [kick, event.unwrap_or(kick)].map(|fd| PollFd::new(fd, PollFlags::POLLIN));
        match poll(&mut fds, limit) {
            Ok(0) | Err(nix::errno::Errno::EINTR) => {}
            Ok(_) => {
                // Who reads it is alone with it. It does not block.
                let _ = self.shared.kick.read();
            }
            Err(error) => return Err(error.into()),
        }
        Ok(())
    }

    /// Waits until the driver has set the queue up, which may be after it is ready, or never.
    fn wait_for_queue(&self) -> Result<VqInfo, End> {
        let mut pause: u16 = 1;
        loop {
            self.check_stopped()?;
            let info = self.port.queue(self.index.into())?;
            if info.ready != 0 {
                return Ok(info);
            }
            // The kernel says nothing when it happens. Soon after the driver is ready it is
            // likely, later less and less.
            self.wait(None, PollTimeout::from(pause))?;
            pause = (pause + pause.div_ceil(16)).min(1000);
        }
    }

    fn setup(&self, info: &VqInfo) -> Result<(Setup, Position), End> {
        let has = |bit: u32| self.features & 1 << bit != 0;
        // A size that is none breaks the queue in `Queue::new`.
        let size = u16::try_from(info.num).unwrap_or(0);
        let (format, position) = match has(VIRTIO_F_RING_PACKED) {
            false => (
                Format::Split,
                Position::Split {
                    avail: info.avail_index(),
                },
            ),
            true => (
                Format::Packed,
                Position::Packed {
                    avail_wrap: info.state.last_avail_counter & 1 != 0,
                    avail: info.state.last_avail_idx,
                    used_wrap: info.state.last_used_counter & 1 != 0,
                    used: info.state.last_used_idx,
                },
            ),
        };
        let layout = Layout {
            size,
            descriptors: info.desc_addr,
            driver: info.driver_addr,
            device: info.device_addr,
        };
        let setup = Setup {
            format,
            layout,
            indirect: has(VIRTIO_RING_F_INDIRECT_DESC),
            event_idx: has(VIRTIO_RING_F_EVENT_IDX),
        };
        Ok((setup, position))
    }

    fn interrupt(&self) -> Result<(), End> {
        let until = Instant::now() + INTERRUPT_TRIES;
        loop {
            if !self.session.is_open() {
                return Err(End::Stopped);
            }
            match self.port.interrupt(self.index.into()) {
                Ok(()) => return Ok(()),
                Err(error)
                    if error.raw_os_error() == Some(libc::EINVAL) && Instant::now() < until =>
                {
                    std::thread::sleep(Duration::from_millis(1));
                    self.check_stopped()?;
                }
                Err(error) => return Err(error.into()),
            }
        }
    }
}
