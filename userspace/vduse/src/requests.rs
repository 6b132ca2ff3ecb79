//! The thread that answers the kernel's requests: see `service` for what it may do.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::io;
use std::os::fd::AsFd as _;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use ioregion_abi::vduse::MESSAGE_BYTES;
use ioregion_devices::virtio::{Device, Format, Offer, Position, Refusal, Running, Status, Step};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::EventFd;
use virtio_bindings::virtio_config::VIRTIO_F_RING_PACKED;

use crate::error::Error;
use crate::iotlb::{Iotlb, Region, Source, StillPinned};
use crate::log::{Log, Session};
use crate::message::{Answer, Request, decode, encode};
use crate::port::Port;
use crate::service::ServiceOptions;
use crate::shared::{STOPPED, SUSPENDED, Shared};
use crate::worker::Worker;

/// How long the kernel may take to note that a driver is ready, once it has the answer.
const NOTING: Duration = Duration::from_secs(5);

/// An address space of a device.
#[derive(Debug)]
pub(crate) struct Space<P> {
    port: Arc<P>,
    number: u32,
}

impl<P: Port> Source for Space<P> {
    fn region(&self, addr: u64) -> io::Result<Option<Region>> {
        self.port.region_in(self.number, addr)
    }
}

/// The thread for the kernel's requests.
pub(crate) struct Requests<P: Port> {
    pub(crate) name: String,
    pub(crate) port: Arc<P>,
    /// By address space: those that queues have used.
    pub(crate) spaces: BTreeMap<u32, Arc<Iotlb<Space<P>>>>,
    pub(crate) device: Arc<dyn Device>,
    pub(crate) offer: Offer,
    pub(crate) options: ServiceOptions,
    pub(crate) status: Status,
    pub(crate) stop: Arc<EventFd>,
    /// The queues' threads, of the driver that is ready.
    pub(crate) queues: Arc<Mutex<Vec<Arc<Shared>>>>,
    /// Threads that may not have ended, by driver; those of the last one come last.
    pub(crate) running: Vec<Arc<Running>>,
    pub(crate) log: Option<Arc<Log>>,
    /// The address space of each queue.
    pub(crate) space_of: Vec<u32>,
    /// The queues' threads wait for the kernel to get its answer.
    pub(crate) starting: bool,
    /// All queues stand still until the driver resets the device.
    pub(crate) suspended: bool,
    /// The kernel says when a queue becomes ready.
    pub(crate) told: bool,
}

impl<P: Port + 'static> Requests<P> {
    pub(crate) fn run(&mut self) -> Result<(), Error> {
        loop {
            let mut fds = [
                PollFd::new(self.port.as_fd(), PollFlags::POLLIN),
                PollFd::new(self.stop.as_fd(), PollFlags::POLLIN),
            ];
            match poll(&mut fds, PollTimeout::NONE) {
                Err(Errno::EINTR) => continue,
                Err(error) => return Err(self.failed("waiting for requests", error.into())),
                Ok(_) => {}
            }
            let events = fds.map(|fd| fd.revents().unwrap_or(PollFlags::empty()));
            if !events[1].is_empty() {
                return Ok(());
            }
            if events[0].contains(PollFlags::POLLIN) {
                self.one()?;
            } else if events[0].intersects(PollFlags::POLLERR | PollFlags::POLLHUP) {
                return Err(Error::Broken(self.name.clone()));
            }
        }
    }

    /// Goes on where another service died, if a driver uses the device.
    pub(crate) fn take_over(&mut self) -> Result<(), Error> {
        self.space_of = (0..self.device.queues())
            .map(|queue| self.log.as_ref().map_or(0, |log| log.space(queue)))
            .collect();
        let session = self.log.as_ref().map_or(Session::None, |log| log.session());
        // Of a device that is suspended the kernel says that nobody uses it.
        if !self.is_driven()? && session != Session::Suspended {
            return Ok(());
        }
        if session == Session::None {
            return Err(Error::NoRecord(self.name.clone()));
        }
        let features = self.port.driver_features();
        let features = features.map_err(|error| self.failed("asking for features", error))?;
        self.check(features).map_err(|refusal| Error::Refused {
            name: self.name.clone(),
            refusal,
        })?;
        self.status = Status::ready(features);
        if session == Session::Ending {
            // The driver asks for its reset again, and for nothing else.
            return Ok(());
        }
        let device = &self.name;
        tracing::info!(device, "going on where another service died");
        self.suspended = session == Session::Suspended;
        self.start_queues(features)
            .map_err(|error| self.failed("serving its queues", error))?;
        self.release();
        // It may have changed while nobody looked.
        let config = self.device.config();
        let changed = self.port.change_config(0, &config);
        changed.map_err(|error| self.failed("changing its configuration space", error))
    }

    /// Whether a driver uses the device.
    fn is_driven(&self) -> Result<bool, Error> {
        let until = Instant::now() + NOTING;
        let driver_answered =
            (self.log.as_ref()).is_some_and(|log| log.session() == Session::Driver);
        loop {
            // Before the kernel is asked: it notes what was answered before it asks again.
            let mut fds = [PollFd::new(self.port.as_fd(), PollFlags::POLLIN)];
            let asks = poll(&mut fds, PollTimeout::ZERO).is_ok_and(|count| count > 0);
            match self.port.is_driven() {
                Ok(true) => return Ok(true),
                Ok(false) if asks || !driver_answered || Instant::now() > until => {
                    return Ok(false);
                }
                Ok(false) => std::thread::sleep(Duration::from_millis(5)),
                Err(error) if error.raw_os_error() == Some(libc::EPERM) => {
                    return Err(Error::Broken(self.name.clone()));
                }
                Err(error) => return Err(self.failed("asking for the driver", error)),
            }
        }
    }

    /// One request and its answer.
    fn one(&mut self) -> Result<(), Error> {
        let mut bytes = [0; MESSAGE_BYTES];
        match nix::unistd::read(self.port.as_fd(), &mut bytes) {
            Ok(MESSAGE_BYTES) => {}
            // Somebody took it back.
            Err(Errno::EAGAIN | Errno::EINTR) => return Ok(()),
            // Only where the kernel's side has gone.
            Ok(0) => return Err(Error::Broken(self.name.clone())),
            Ok(_) => return Err(self.failed("reading a request", io::Error::other("half a one"))),
            Err(error) => return Err(self.failed("reading a request", error.into())),
        }
        let (id, request) = decode(&bytes, self.port.version());
        let device = &self.name;
        tracing::trace!(device, id, ?request, "request");
        let spaces = self.space_of.clone();
        let answer = match request {
            Ok(request) => self.handle(request),
            Err(error) => {
                tracing::warn!(device, %error, "a request is refused");
                Answer::Refused
            }
        };
        let written = nix::unistd::write(self.port.as_fd(), &encode(id, &answer));
        if std::mem::take(&mut self.starting) {
            self.release();
        }
        match written {
            Ok(MESSAGE_BYTES) => Ok(()),
            // Too late, or whoever asked was killed: if it matters, the device is now broken,
            // which the next look at it tells.
            Err(Errno::ENOENT) => {
                match request {
                    // These hold beyond the next reset, or nothing says when they end.
                    Ok(Request::SetVqGroupAsid { .. }) => self.set_spaces(spaces),
                    Ok(Request::Suspend) if answer == Answer::Done => self.resume(),
                    _ => {}
                }
                Ok(())
            }
            Ok(_) => Err(self.failed("answering", io::Error::other("half an answer was taken"))),
            Err(error) => Err(self.failed("answering", error.into())),
        }
    }

    fn failed(&self, what: &'static str, error: io::Error) -> Error {
        Error::Kernel {
            name: self.name.clone(),
            what,
            error,
        }
    }

    fn handle(&mut self, request: Request) -> Answer {
        match request {
            Request::UpdateIotlb { first, last, asid } => {
                let space = self.spaces.get(&asid);
                let taken = space.map(|iotlb| iotlb.update(first, last, self.options.grace));
                self.taken_back(taken.unwrap_or(Ok(())))
            }
            Request::SetStatus { status } => self.set_status(status),
            Request::GetVqState { queue } => match self.position(queue) {
                Some(position) => Answer::State { queue, position },
                None => Answer::Refused,
            },
            Request::SetVqGroupAsid { group, asid } => self.move_group(group, asid),
            Request::SetVqReady { queue, ready } => self.set_ready(queue, ready),
            Request::Suspend => self.suspend(),
        }
    }

    /// Moves the queues of a group to another address space, which no kernel asks for while a
    /// driver is ready.
    fn move_group(&mut self, group: u32, space: u32) -> Answer {
        if !self.lock_queues().is_empty() {
            tracing::warn!(device = self.name, group, "its queues are in use");
            return Answer::Refused;
        }
        let of_group = |queue: u16| self.port.group(queue) == group;
        let spaces = (0..).zip(&self.space_of);
        let spaces = spaces.map(|(queue, &now)| if of_group(queue) { space } else { now });
        self.set_spaces(spaces.collect());
        Answer::Done
    }

    fn set_spaces(&mut self, spaces: Vec<u32>) {
        if let Some(log) = &self.log {
            for (queue, &space) in (0..).zip(&spaces) {
                log.set_space(queue, space);
            }
        }
        self.space_of = spaces;
    }

    /// Starts or stops a queue. One that is stopped has nothing in flight once this is answered.
    fn set_ready(&mut self, queue: u32, ready: bool) -> Answer {
        if queue >= self.device.queues().into() {
            return Answer::Refused;
        }
        self.told = true;
        let index = usize::try_from(queue).unwrap_or(usize::MAX);
        // Before the driver is ready none has a thread.
        let Some(shared) = self.lock_queues().get(index).cloned() else {
            return Answer::Done;
        };
        if ready {
            shared.make_due();
            shared.resume(STOPPED);
            return Answer::Done;
        }
        shared.hold(STOPPED);
        if shared.rests(Instant::now() + self.options.grace) {
            return Answer::Done;
        }
        let device = &self.name;
        tracing::error!(
            device,
            queue,
            "a queue does not stop: a request to a file goes on"
        );
        // The kernel takes that for the end of the device.
        Answer::Refused
    }

    /// Has all queues stand still, with nothing in flight, until the driver resets the device.
    fn suspend(&mut self) -> Answer {
        let queues = self.lock_queues().clone();
        queues.iter().for_each(|shared| shared.hold(SUSPENDED));
        let until = Instant::now() + self.options.grace;
        self.suspended = queues.iter().all(|shared| shared.rests(until));
        if !self.suspended {
            self.resume();
            let device = &self.name;
            tracing::warn!(device, "it is not suspended: a request to a file goes on");
            return Answer::Refused;
        }
        if let Some(log) = &self.log
            && !queues.is_empty()
        {
            log.suspend(true);
        }
        Answer::Done
    }

    /// Lets all queues go on: the device is not suspended.
    fn resume(&mut self) {
        self.suspended = false;
        let queues = self.lock_queues().clone();
        if let Some(log) = &self.log
            && !queues.is_empty()
        {
            log.suspend(false);
        }
        queues.iter().for_each(|shared| shared.resume(SUSPENDED));
    }

    fn lock_queues(&self) -> MutexGuard<'_, Vec<Arc<Shared>>> {
        // Nothing panics halfway through a change.
        self.queues.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where a queue stands; nothing where there is none or the kernel does not say.
    fn position(&self, queue: u32) -> Option<Position> {
        if queue >= self.device.queues().into() {
            return None;
        }
        let queues = self.lock_queues();
        let shared = queues.get(usize::try_from(queue).ok()?);
        let noted = shared.and_then(|shared| {
            *shared
                .position
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
        });
        // Of whoever served it before.
        let logged = || self.log.as_ref()?.position(u16::try_from(queue).ok()?);
        if let Some(position) = noted.or_else(logged) {
            return Some(position);
        }
        let packed = self.port.driver_features().ok()? & 1 << VIRTIO_F_RING_PACKED != 0;
        Some(Position::start(match packed {
            true => Format::Packed,
            false => Format::Split,
        }))
    }

    fn set_status(&mut self, bits: u8) -> Answer {
        let before = self.status;
        // Asked for where it matters only; the kernel has them before the driver settles them.
        let features = match self.port.driver_features() {
            Ok(features) => features,
            // A reset needs none.
            Err(_) if bits == 0 => 0,
            Err(error) => {
                tracing::error!(device = self.name, %error, "no features of the driver");
                return Answer::Refused;
            }
        };
        let mut status = before;
        let step = status.write(bits, features, |features| self.check(features));
        self.status = status;
        match step {
            Ok(Step::Noted) => Answer::Done,
            Ok(Step::Reset) => {
                let taken = self.quiesce();
                self.end_session();
                self.taken_back(taken)
            }
            Ok(Step::Start(features)) => {
                if let Some(log) = &self.log {
                    log.begin_session();
                }
                match self.start_queues(features) {
                    Ok(()) => {
                        self.starting = true;
                        Answer::Done
                    }
                    Err(error) => {
                        tracing::error!(device = self.name, %error, "queues cannot be served");
                        // No queue has begun a request.
                        let _ = self.quiesce();
                        self.end_session();
                        self.status.undo(before);
                        Answer::Refused
                    }
                }
            }
            Err(error) => {
                tracing::warn!(device = self.name, %error, "a status is refused");
                Answer::Refused
            }
        }
    }

    /// Whether the device works with features that a driver took.
    fn check(&self, features: u64) -> Result<(), Refusal> {
        self.offer.check(&*self.device, features)
    }

    fn end_session(&self) {
        if let Some(log) = &self.log {
            log.end_session();
        }
    }

    /// Lets the queues' threads begin: the kernel knows that the driver is ready.
    fn release(&self) {
        let queues = self.lock_queues();
        queues.iter().for_each(|shared| shared.release());
    }

    /// Starts the queues' threads, which wait for their release.
    fn start_queues(&mut self, features: u64) -> io::Result<()> {
        self.running.retain(|running| !running.wait(Duration::ZERO));
        let before = self.running.clone();
        let running = Arc::new(Running::default());
        self.running.push(Arc::clone(&running));
        for index in 0..self.device.queues() {
            let shared = Arc::new(Shared::new()?);
            if self.suspended {
                shared.hold(SUSPENDED);
            }
            let kick = shared.control.eventfd().as_fd();
            self.port.set_kick(index.into(), kick)?;
            let worker = Worker {
                name: self.name.clone(),
                index,
                features,
                device: Arc::clone(&self.device),
                port: Arc::clone(&self.port),
                session: self.space(index).session(),
                shared: Arc::clone(&shared),
                before: before.clone(),
                log: self.log.clone(),
                told: self.told,
                info: Cell::default(),
            };
            let entered = running.enter();
            std::thread::Builder::new()
                .name(format!("{}-queue{index}", self.name))
                .spawn(move || {
                    worker.run();
                    // Only now: whoever waits for this wants to remove the device, whose file
                    // the worker had.
                    drop(entered);
                })?;
            self.lock_queues().push(shared);
        }
        Ok(())
    }

    /// The address space of a queue.
    fn space(&mut self, queue: u16) -> Arc<Iotlb<Space<P>>> {
        let number = self.space_of.get(usize::from(queue)).copied();
        let number = number.unwrap_or_default();
        let iotlb = self.spaces.entry(number).or_insert_with(|| {
            let port = Arc::clone(&self.port);
            Arc::new(Iotlb::new(Space { port, number }))
        });
        Arc::clone(iotlb)
    }

    /// The answer where memory was taken back: refused while it is not free.
    fn taken_back(&self, taken: Result<(), StillPinned>) -> Answer {
        match taken {
            Ok(()) => Answer::Done,
            Err(error) => {
                tracing::error!(device = self.name, %error, "memory is not given back");
                Answer::Refused
            }
        }
    }

    /// Ends the queues' threads and takes the driver's memory away from them.
    pub(crate) fn quiesce(&mut self) -> Result<(), StillPinned> {
        self.suspended = false;
        let queues = std::mem::take(&mut *self.lock_queues());
        for shared in &queues {
            shared.control.end();
        }
        // They have been told: requests that are under way are cancelled.
        let mut taken = Ok(());
        let until = Instant::now() + self.options.grace;
        for iotlb in self.spaces.values() {
            let left = until.saturating_duration_since(Instant::now());
            taken = taken.and(iotlb.close(left));
        }
        if let Some(running) = self.running.last()
            && !running.wait(self.options.grace)
        {
            // They keep the count that the next threads wait for.
            let device = &self.name;
            tracing::warn!(
                device,
                "a request to a file goes on after the driver's reset"
            );
        }
        // Nobody is about to map it.
        self.port.release_memory();
        taken
    }
}
