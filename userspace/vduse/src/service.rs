//! A device that is served: a thread for the kernel's requests, and one for each queue.
//!
//! The thread for requests does nothing that can take long, so that each is answered in time:
//! what the device does with its files happens on the queues' threads. When the driver resets the
//! device, its memory is closed at once ([`Iotlb::close`]); the queues' threads get some time to
//! finish, and one that does not (a file that hangs) is left behind. It reaches neither the
//! driver's memory nor the driver, and the threads of the next driver wait until it has ended.
//! Where the kernel may still access the driver's memory for such a file, the reset, or the
//! request that took memory back, is refused: see [`crate::StillPinned`].
//!
//! # Standing still
//!
//! A driver can stop a queue (`VDUSE_F_QUEUE_READY`) or suspend the device (`VDUSE_F_SUSPEND`). The
//! queue's thread then takes no request any more; once nothing is in flight the kernel gets its
//! answer, and where the queue stands is noted, also in the log. What is not done in time is
//! refused: a device that cannot be suspended goes on, one whose queue does not stop the kernel
//! gives up. A queue that is started again goes on from where it stood, unless its driver has set
//! it up anew; a device that is suspended waits for its reset.
//!
//! # Taking over
//!
//! A service that dies, in whatever way, leaves its device to the next one. Of the driver it asks
//! the kernel: its features, its queues, and whether it is ready, which VDUSE tells nobody who did
//! not hear it, but which interrupts need ([`Port::is_driven`]). Of what is in flight the [`Log`]
//! tells. Requests of the kernel's that the dead service had read but not answered are asked again,
//! and before all others; their time runs on. Kicks that nobody heard cost nothing: whoever takes
//! up a queue looks into it, and interrupts its driver once.
//!
//! The log says that a driver is ready before the kernel is told so, and nothing is served before
//! that: so what the log says of queues is always of the driver that the kernel has.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::thread::JoinHandle;
use std::time::Duration;

use ioregion_devices::virtio::{Device, Health, Offer, Status};
use nix::sys::eventfd::{EfdFlags, EventFd};
use virtio_bindings::virtio_config::{VIRTIO_F_ACCESS_PLATFORM, VIRTIO_F_VERSION_1};

use crate::error::Error;
use crate::log::Log;
use crate::port::Port;
use crate::requests::Requests;
use crate::shared::Shared;

/// Features without which nothing here works.
const NEEDED: u64 = 1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_F_ACCESS_PLATFORM;

/// How a device is served.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ServiceOptions {
    /// Offer packed queues, too.
    pub packed: bool,
    /// How long a reset waits for the queues' threads, and whoever takes memory back for requests
    /// that use it. Twice that is far below the kernel's message timeout (30 s unless it was
    /// changed).
    pub grace: Duration,
}

impl Default for ServiceOptions {
    fn default() -> Self {
        Self {
            packed: false,
            grace: Duration::from_secs(5),
        }
    }
}

/// All features that a device offers over VDUSE.
#[must_use]
pub fn offered(device: &dyn Device, options: &ServiceOptions) -> u64 {
    offer(device, options).all()
}

fn offer(device: &dyn Device, options: &ServiceOptions) -> Offer {
    Offer::new(device, NEEDED, options.packed)
}

/// A device that is served, until it is stopped or the kernel gives it up.
pub struct Service {
    name: String,
    device: Arc<dyn Device>,
    port: Weak<dyn Port>,
    stop: Arc<EventFd>,
    ended: Arc<EventFd>,
    queues: Arc<Mutex<Vec<Arc<Shared>>>>,
    thread: Option<JoinHandle<Result<(), Error>>>,
}

impl Service {
    /// Starts to serve a device. Queues must have been set up; it should get on the bus only
    /// now, because its driver waits for answers.
    ///
    /// # Errors
    ///
    /// Where a thread cannot be started; [`Error::NoRecord`] where a driver uses the device
    /// already; [`Error::Broken`] where the kernel has given it up.
    pub fn start<P: Port + 'static>(
        name: &str,
        port: P,
        device: Arc<dyn Device>,
        options: ServiceOptions,
    ) -> Result<Self, Error> {
        Self::launch(name, port, device, options, None)
    }

    /// Starts to serve a device such that another process can go on where this one dies, or goes
    /// on where another one died. A driver that uses the device already notices nothing, but that
    /// it is told to look at the configuration space.
    ///
    /// # Errors
    ///
    /// As [`start`](Self::start); [`Error::NoRecord`] where the log is not of the driver that
    /// uses the device, [`Error::Refused`] where that driver has features that are not offered.
    pub fn start_logged<P: Port + 'static>(
        name: &str,
        port: P,
        device: Arc<dyn Device>,
        options: ServiceOptions,
        log: Arc<Log>,
    ) -> Result<Self, Error> {
        Self::launch(name, port, device, options, Some(log))
    }

    fn launch<P: Port + 'static>(
        name: &str,
        port: P,
        device: Arc<dyn Device>,
        options: ServiceOptions,
        log: Option<Arc<Log>>,
    ) -> Result<Self, Error> {
        let failed = |what: &str, error: io::Error| Error::Thread {
            name: name.into(),
            what: format!("{what}: {error}"),
        };
        let eventfd = || {
            let made = EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC);
            let made = made.map_err(|error| failed("no eventfd", error.into()))?;
            Ok::<_, Error>(Arc::new(made))
        };
        let (stop, ended) = (eventfd()?, eventfd()?);
        let queues = Arc::new(Mutex::new(Vec::new()));
        let port = Arc::new(port);
        let weak: Weak<P> = Arc::downgrade(&port);
        let served = Arc::clone(&device);
        let mut requests = Requests {
            name: name.into(),
            spaces: BTreeMap::new(),
            port,
            offer: offer(&*device, &options),
            device,
            options,
            status: Status::default(),
            stop: Arc::clone(&stop),
            queues: Arc::clone(&queues),
            running: Vec::new(),
            log,
            space_of: Vec::new(),
            starting: false,
            suspended: false,
            told: false,
        };
        if let Err(error) = requests.take_over() {
            let _ = requests.quiesce();
            return Err(error);
        }
        let tell = Arc::clone(&ended);
        let thread = std::thread::Builder::new()
            .name(format!("{name}-messages"))
            .spawn(move || {
                let result = requests.run();
                // The kernel asks nothing any more, and the worker that has the memory stays.
                let _ = requests.quiesce();
                // Full is as good.
                let _ = tell.write(1);
                result
            })
            .map_err(|error| failed("no thread", error))?;
        Ok(Self {
            name: name.into(),
            device: served,
            port: weak,
            stop,
            ended,
            queues,
            thread: Some(thread),
        })
    }

    /// Readable once the device is no longer served, because the kernel gave it up; why,
    /// [`stop`](Self::stop) tells.
    #[must_use]
    pub fn ended(&self) -> &EventFd {
        &self.ended
    }

    /// Has the driver look at the device's configuration space, which has changed.
    ///
    /// # Errors
    ///
    /// What the kernel says; [`Error::Broken`] where the device is no longer served.
    pub fn config_changed(&self) -> Result<(), Error> {
        let port = self.port.upgrade();
        let port = port.ok_or_else(|| Error::Broken(self.name.clone()))?;
        port.change_config(0, &self.device.config())
            .map_err(|error| Error::Kernel {
                name: self.name.clone(),
                what: "changing its configuration space",
                error,
            })
    }

    /// How the queues are doing; nothing while no driver is ready.
    #[must_use]
    pub fn health(&self) -> Vec<Health> {
        let queues = self.queues.lock().unwrap_or_else(PoisonError::into_inner);
        let health = |shared: &Arc<Shared>| shared.control.health();
        queues.iter().map(health).collect()
    }

    /// Ends the service: the device must be off the bus.
    ///
    /// # Errors
    ///
    /// [`Error::Broken`] where the kernel gave the device up, or why it could not be served.
    pub fn stop(mut self) -> Result<(), Error> {
        self.finish()
    }

    fn finish(&mut self) -> Result<(), Error> {
        let Some(thread) = self.thread.take() else {
            return Ok(());
        };
        // Full is as good.
        let _ = self.stop.write(1);
        thread.join().unwrap_or_else(|_| {
            Err(Error::Thread {
                name: self.name.clone(),
                what: "the thread for the kernel's requests has panicked".into(),
            })
        })
    }
}

impl std::fmt::Debug for Service {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.debug_struct("Service")
            .field("name", &self.name)
            .field("health", &self.health())
            .finish_non_exhaustive()
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        if let Err(error) = self.finish() {
            tracing::error!(%error, "a device was dropped");
        }
    }
}
