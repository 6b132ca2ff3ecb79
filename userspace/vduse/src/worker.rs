//! A thread that serves one queue.

use std::cell::Cell;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ioregion_abi::vduse::VqInfo;
use ioregion_devices::virtio::{
    Broken, Device, End, Format, Health, Layout, Memory, Position, Queue, Running, Setup, Transport,
};
use nix::poll::PollTimeout;

use crate::iotlb::Session;
use crate::log::Log;
use crate::port::Port;
use crate::requests::Space;
use crate::shared::Shared;

/// How long an interrupt is tried while the kernel has not noted that the driver is ready: it
/// does so after the answer to the request that made the queues run.
const INTERRUPT_TRIES: Duration = Duration::from_secs(5);

/// How long the kernel may take to note that a queue is ready, once it has the answer.
const NOTING: Duration = Duration::from_secs(5);

/// A thread's errand.
pub(crate) struct Worker<P: Port> {
    pub(crate) name: String,
    pub(crate) index: u16,
    pub(crate) features: u64,
    pub(crate) device: Arc<dyn Device>,
    pub(crate) port: Arc<P>,
    pub(crate) session: Session<Space<P>>,
    pub(crate) shared: Arc<Shared>,
    /// Threads of drivers before this one: what they still write must not come after what this
    /// one writes.
    pub(crate) before: Vec<Arc<Running>>,
    pub(crate) log: Option<Arc<Log>>,
    /// The kernel tells when the queue becomes ready: nobody needs to look.
    pub(crate) told: bool,
    /// What the driver had set up when the queue was taken up last.
    pub(crate) info: Cell<VqInfo>,
}

/// A worker that does nothing any more, once this goes.
struct Rested<'a>(&'a Shared);

impl Drop for Rested<'_> {
    fn drop(&mut self) {
        self.0.leave();
    }
}

impl<P: Port> Worker<P> {
    /// Serves the queue until it is stopped or breaks. Nothing of the worker is left then.
    pub(crate) fn run(self) {
        let Err(end) = self.serve();
        // Nobody waits for it in vain.
        let _rested = Rested(&self.shared);
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
        while !self.shared.may_begin() {
            control.check_stopped()?;
            control.wait(None, PollTimeout::NONE)?;
        }
        self.info.set(self.wait_for_queue()?);
        let mut lane = Arc::clone(&self.device).lane(self.index, self.features)?;
        self.shared.enter();
        let (mut queue, resumed) = self.take_up()?;
        // One that has to stand still gets there in the loop, and is interrupted after that.
        if !self.shared.is_held() {
            control.set_health(Health::Running);
            if resumed {
                // Whoever served it before may not have done so.
                self.interrupt()?;
            }
        }
        control.serve(self, &mut queue, &mut *lane)
    }

    /// The queue as the driver set it up, or as whoever served it before left it, which is told.
    fn take_up(&self) -> Result<(Queue, bool), Broken> {
        let (setup, at) = self.setup(&self.info.get());
        let log = self.log.as_ref().and_then(|log| log.queue(self.index));
        let (queue, resumed) = match log {
            None => (Queue::new(&self.session, &setup, at)?, false),
            Some(log) if !log.is_active()? => {
                (Queue::begin(&self.session, &setup, at, log)?, false)
            }
            Some(log) => {
                let queue = Queue::resume(&self.session, &setup, log)?;
                let (device, queue_index) = (&self.name, self.index);
                let in_flight = queue.in_flight();
                tracing::info!(device, queue = queue_index, in_flight, "taken over");
                (queue, true)
            }
        };
        self.note_position(queue.position());
        Ok((queue, resumed))
    }

    fn note_position(&self, at: Position) {
        let mut position = self.shared.position.lock();
        let position = position.as_mut().unwrap_or_else(|error| error.get_mut());
        **position = Some(at);
    }

    /// Waits until the driver has set the queue up, which may be after it is ready, or never.
    fn wait_for_queue(&self) -> Result<VqInfo, End> {
        let mut pause: u16 = 1;
        let mut soon = None;
        loop {
            self.shared.control.check_stopped()?;
            let info = self.port.queue(self.index.into())?;
            if info.ready != 0 {
                return Ok(info);
            }
            if self.shared.is_due() {
                (pause, soon) = (1, Some(Instant::now() + NOTING));
            }
            // Where the kernel says when it happens it has yet to note it. Otherwise, soon after
            // the driver is ready it is likely, later less and less.
            let is_soon = soon.is_some_and(|soon| Instant::now() < soon);
            let limit = match self.told && !is_soon {
                true => PollTimeout::NONE,
                false => PollTimeout::from(pause),
            };
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

    fn is_held(&self) -> bool {
        self.shared.is_held()
    }

    /// Stands still until the queue may be served again, from where it stood unless the driver has
    /// set it up anew.
    fn rest(&self, queue: &mut Queue) -> Result<(), End> {
        let control = &self.shared.control;
        self.note_position(queue.position());
        if let Some(log) = &self.log {
            log.set_position(self.index, Some(queue.position()));
        }
        control.set_health(Health::Waiting);
        self.shared.leave();
        let again = loop {
            let again = self.wait_for_queue()?;
            if self.shared.enter_unless_held() {
                break again;
            }
            control.wait(None, PollTimeout::NONE)?;
        };
        let of = |info: &VqInfo| (info.num, info.desc_addr, info.driver_addr, info.device_addr);
        let before = self.info.replace(again);
        let is_same = (of(&again), again.state) == (of(&before), before.state);
        if let Some(log) = &self.log {
            match is_same {
                true => log.set_position(self.index, None),
                false => log.clear_queue(self.index),
            }
        }
        if !is_same {
            (*queue, _) = self.take_up()?;
        }
        control.set_health(Health::Running);
        // The kernel drops interrupts that it has not delivered when a queue stops.
        self.interrupt()
    }

    fn settled(&self) {
        if let Some(log) = &self.log {
            log.check();
        }
    }
}
