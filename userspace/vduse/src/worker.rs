//! A thread that serves one queue.

use std::convert::Infallible;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use ioregion_abi::vduse::VqInfo;
use ioregion_devices::virtio::{
    Broken, Control, Device, End, Format, Health, Layout, Memory, Position, Queue, Running, Setup,
    Transport,
};
use nix::poll::PollTimeout;

use crate::iotlb::Session;
use crate::log::Log;
use crate::port::Port;

/// How long an interrupt is tried while the kernel has not noted that the driver is ready: it
/// does so after the answer to the request that made the queues run.
const INTERRUPT_TRIES: Duration = Duration::from_secs(5);

/// What the message thread and a worker share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) control: Control,
    /// The worker may begin.
    begin: AtomicBool,
    /// Where the queue stood when nothing was in flight last.
    pub(crate) position: Mutex<Option<Position>>,
}

impl Shared {
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self {
            control: Control::new()?,
            begin: AtomicBool::new(false),
            position: Mutex::new(None),
        })
    }

    /// Lets the worker begin.
    pub(crate) fn release(&self) {
        self.begin.store(true, Ordering::Release);
        self.control.kick();
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

impl<P: Port> Worker<P> {
    /// Serves the queue until it is stopped or breaks. Nothing of the worker is left then.
    pub(crate) fn run(self) {
        let Err(end) = self.serve();
        // Where the driver broke the queue it cannot be told: VDUSE has no way to set
        // DEVICE_NEEDS_RESET.
        self.shared.control.note_end(&self.name, self.index, end);
    }

    fn serve(&self) -> Result<Infallible, End> {
        let control = &self.shared.control;
        for before in &self.before {
            while !before.wait(Duration::from_millis(50)) {
                control.check_stopped()?;
            }
        }
        while !self.shared.begin.load(Ordering::Acquire) {
            control.check_stopped()?;
            control.wait(None, PollTimeout::NONE)?;
        }
        let info = self.wait_for_queue()?;
        let (setup, position) = self.setup(&info);
        let mut lane = Arc::clone(&self.device).lane(self.index, self.features)?;
        let (mut queue, resumed) = self.take_up(&setup, position)?;
        self.note_position(queue.position());
        control.set_health(Health::Running);
        if resumed {
            // Whoever served it before may not have done so.
            self.interrupt()?;
        }
        control.serve(self, &mut queue, &mut *lane)
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

    fn note_position(&self, at: Position) {
        let mut position = self.shared.position.lock();
        let position = position.as_mut().unwrap_or_else(|error| error.get_mut());
        **position = Some(at);
    }

    /// Waits until the driver has set the queue up, which may be after it is ready, or never.
    fn wait_for_queue(&self) -> Result<VqInfo, End> {
        let mut pause: u16 = 1;
        loop {
            self.shared.control.check_stopped()?;
            let info = self.port.queue(self.index.into())?;
            if info.ready != 0 {
                return Ok(info);
            }
            // The kernel says nothing when it happens. Soon after the driver is ready it is
            // likely, later less and less.
            let limit = PollTimeout::from(pause);
            self.shared.control.wait(None, limit)?;
            pause = (pause + pause.div_ceil(16)).min(1000);
        }
    }

    fn setup(&self, info: &VqInfo) -> (Setup, Position) {
        let layout = Layout {
            // A size that is none breaks the queue in `Queue::new`.
            size: u16::try_from(info.num).unwrap_or(0),
            descriptors: info.desc_addr,
            driver: info.driver_addr,
            device: info.device_addr,
        };
        let setup = Setup::new(self.features, layout);
        let position = match setup.format {
            Format::Split => Position::Split {
                avail: info.avail_index(),
            },
            Format::Packed => Position::Packed {
                avail_wrap: info.state.last_avail_counter & 1 != 0,
                avail: info.state.last_avail_idx,
                used_wrap: info.state.last_used_counter & 1 != 0,
                used: info.state.last_used_idx,
            },
        };
        (setup, position)
    }
}

impl<P: Port> Transport for Worker<P> {
    fn memory(&self) -> &dyn Memory {
        &self.session
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
                    self.shared.control.check_stopped()?;
                }
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn gave_back(&self, queue: &Queue) {
        if queue.in_flight() == 0 {
            self.note_position(queue.position());
        }
    }

    fn settled(&self) {
        if let Some(log) = &self.log {
            log.check();
        }
    }
}
