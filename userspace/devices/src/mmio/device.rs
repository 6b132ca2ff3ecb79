//! A device behind the registers: what the dispatch library calls, and the queues' threads.

use std::convert::Infallible;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use ioregion_dispatch::{Access, Ring};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::at;
use super::interrupt::Interrupt;
use super::registers::{Effect, Misuse, Registers};
use crate::virtio::{
    Control, Device, End, Health, Memory, Position, Queue, Running, Setup, Transport,
};

/// How a device is served.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Options {
    /// Offer packed queues, too.
    pub packed: bool,
    /// The most descriptors of a queue, a power of two up to 32768.
    pub queue_size: u16,
    /// How long the guest is held up by a reset while requests do not end.
    pub grace: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            packed: true,
            queue_size: 256,
            grace: Duration::from_secs(5),
        }
    }
}

/// Why a device cannot be served.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MmioError {
    /// A size that queues cannot have.
    #[error("device {name}: queues of {size} descriptors; take a power of two up to 32768")]
    QueueSize {
        /// Which device.
        name: String,
        /// What was asked for.
        size: u16,
    },
    /// The system has no descriptor or no thread left.
    #[error("device {name}: {what}: {error}")]
    System {
        /// Which device.
        name: String,
        /// What was asked for.
        what: &'static str,
        /// Why not.
        error: io::Error,
    },
}

/// A device behind registers. Whoever serves its region calls it; its queues have threads of
/// their own, which end when it is dropped.
pub struct Mmio {
    shared: Arc<Shared>,
    grace: Duration,
    memory: Arc<dyn Memory + Send + Sync>,
    /// What serves each queue.
    workers: Vec<Option<Worker>>,
    /// Waits for KVM to take the line down.
    resampler: Option<(Arc<EventFd>, JoinHandle<()>)>,
    misuses: u64,
}

/// What watches a device while somebody else serves it. Clones are of the same device.
#[derive(Debug, Clone)]
pub struct Handle(Arc<Shared>);

struct Shared {
    name: String,
    device: Arc<dyn Device>,
    registers: Mutex<Registers>,
    interrupt: Interrupt,
    queues: Mutex<Vec<Option<Arc<Control>>>>,
}

#[derive(Debug)]
struct Worker {
    control: Arc<Control>,
    running: Arc<Running>,
}

impl Mmio {
    /// A device that no driver has found yet. `name` is for the log.
    ///
    /// # Errors
    ///
    /// A size that queues cannot have, or the system's.
    pub fn new(
        name: &str,
        device: Arc<dyn Device>,
        memory: Arc<dyn Memory + Send + Sync>,
        interrupt: Interrupt,
        options: &Options,
    ) -> Result<Self, MmioError> {
        let size = options.queue_size;
        if !size.is_power_of_two() {
            return Err(MmioError::QueueSize {
                name: name.into(),
                size,
            });
        }
        let queues = usize::from(device.queues());
        let registers = Registers::new(Arc::clone(&device), size, options.packed);
        let shared = Arc::new(Shared {
            name: name.into(),
            device,
            registers: Mutex::new(registers),
            interrupt,
            queues: Mutex::new(vec![None; queues]),
        });
        let resampler = shared.interrupt.is_level().then(|| resampler(&shared));
        let resampler = resampler.transpose().map_err(|error| MmioError::System {
            name: name.into(),
            what: "watching its interrupt",
            error,
        })?;
        Ok(Self {
            shared,
            grace: options.grace,
            memory,
            workers: (0..queues).map(|_| None).collect(),
            resampler,
            misuses: 0,
        })
    }

    /// What watches it.
    #[must_use]
    pub fn handle(&self) -> Handle {
        Handle(Arc::clone(&self.shared))
    }

    fn follow(&mut self, effect: Effect) {
        match effect {
            Effect::Nothing => {}
            Effect::Notify(queue) => {
                if let Some(Some(worker)) = self.workers.get(usize::from(queue)) {
                    worker.control.kick();
                }
            }
            Effect::Interrupt => self.shared.raise(),
            Effect::Start(features, queues) => {
                for (queue, setup) in queues {
                    if let Err(error) = self.start(queue, features, setup) {
                        let device = &self.shared.name;
                        tracing::error!(device, queue, %error, "a queue cannot be served");
                        self.shared.fail();
                    }
                }
            }
            Effect::Stop(queue) => self.stop(queue, self.grace),
            Effect::Reset => self.reset(self.grace),
        }
    }

    fn start(&mut self, queue: u16, features: u64, setup: Setup) -> io::Result<()> {
        let (control, running) = (Arc::new(Control::new()?), Arc::new(Running::default()));
        let server = Server {
            shared: Arc::clone(&self.shared),
            control: Arc::clone(&control),
            memory: Arc::clone(&self.memory),
            queue,
            features,
            setup,
        };
        let entered = running.enter();
        std::thread::Builder::new()
            .name(format!("{}-queue{queue}", self.shared.name))
            .spawn(move || {
                server.run();
                drop(entered);
            })?;
        let place = usize::from(queue);
        if let Some(known) = self.shared.queues().get_mut(place) {
            *known = Some(Arc::clone(&control));
        }
        if let Some(worker) = self.workers.get_mut(place) {
            *worker = Some(Worker { control, running });
        }
        Ok(())
    }

    /// Ends the thread of a queue. Where it does not end in time, this is called again when the
    /// driver looks at what it has written.
    fn stop(&mut self, queue: u16, limit: Duration) {
        let place = usize::from(queue);
        let Some(worker) = self.workers.get_mut(place) else {
            return;
        };
        if let Some(worker) = worker {
            worker.control.end();
            if !worker.running.wait(limit) {
                let device = &self.shared.name;
                tracing::warn!(device, queue, "requests go on after the queue was stopped");
                return;
            }
        }
        *worker = None;
        if let Some(known) = self.shared.queues().get_mut(place) {
            *known = None;
        }
        self.shared.registers().queue_stopped(queue);
    }

    /// Ends all threads. As for [`stop`](Self::stop).
    fn reset(&mut self, limit: Duration) {
        for worker in self.workers.iter().flatten() {
            worker.control.end();
        }
        let until = Instant::now() + limit;
        let left = || until.saturating_duration_since(Instant::now());
        let ended = |worker: &Worker| worker.running.wait(left());
        if !self.workers.iter().flatten().all(ended) {
            if !limit.is_zero() {
                let device = &self.shared.name;
                tracing::warn!(device, "requests go on after the driver's reset");
            }
            return;
        }
        self.workers.iter_mut().for_each(|worker| *worker = None);
        self.shared.queues().fill(None);
        self.shared.registers().was_reset();
    }

    /// Says what a driver does wrong, of a flood ever less.
    fn note(&mut self, misuse: Misuse) {
        self.misuses += 1;
        if self.misuses.is_power_of_two() {
            let (device, count) = (&self.shared.name, self.misuses);
            tracing::warn!(device, count, %misuse, "a write means nothing");
        }
    }
}

impl ioregion_dispatch::Device for Mmio {
    fn read(&mut self, access: Access) -> u64 {
        // What could not be ended in time may have ended since.
        if access.offset == at::STATUS && self.shared.registers().is_resetting() {
            self.reset(Duration::ZERO);
        }
        if access.offset == at::QUEUE_READY {
            let stopping = self.shared.registers().stopping();
            if let Some(queue) = stopping {
                self.stop(queue, Duration::ZERO);
            }
        }
        self.shared.registers().read(access.offset, access.size)
    }

    fn write(&mut self, access: Access, data: u64) {
        let written = self
            .shared
            .registers()
            .write(access.offset, access.size, data);
        match written {
            Ok(effect) => self.follow(effect),
            Err(misuse) => self.note(misuse),
        }
    }

    fn doorbell(&mut self, ring: Ring) {
        if let Some(value) = ring.value {
            let access = Access {
                user_data: ring.user_data,
                offset: ring.offset,
                size: ring.size,
            };
            return self.write(access, value);
        }
        // Of a region that has one doorbell for all queues: any of them may be meant.
        for worker in self.workers.iter().flatten() {
            worker.control.kick();
        }
    }
}

impl std::fmt::Debug for Mmio {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.debug_struct("Mmio")
            .field("shared", &self.shared)
            .field("workers", &self.workers)
            .finish_non_exhaustive()
    }
}

impl Drop for Mmio {
    fn drop(&mut self) {
        self.reset(self.grace);
        if let Some((stop, thread)) = self.resampler.take() {
            // Full is as good.
            let _ = stop.write(1);
            if thread.join().is_err() {
                tracing::error!(
                    device = self.shared.name,
                    "the interrupt's thread has panicked"
                );
            }
        }
    }
}

impl Handle {
    /// Takes the configuration space over that the device has now, and has the driver look at it.
    pub fn config_changed(&self) {
        let tell = self.0.registers().config_changed();
        if tell {
            self.0.raise();
        }
    }

    /// How the queues are doing.
    #[must_use]
    pub fn health(&self) -> Vec<Health> {
        let queues = self.0.queues();
        let health = |queue: &Option<Arc<Control>>| match queue {
            Some(control) => control.health(),
            None => Health::Idle,
        };
        queues.iter().map(health).collect()
    }
}

impl Shared {
    fn registers(&self) -> MutexGuard<'_, Registers> {
        self.registers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn queues(&self) -> MutexGuard<'_, Vec<Option<Arc<Control>>>> {
        self.queues.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn raise(&self) {
        if let Err(error) = self.interrupt.raise() {
            // The guest's vCPUs cannot be told in any other way.
            tracing::error!(device = self.name, %error, "an interrupt is lost");
        }
    }

    /// Nothing works any more until the next reset.
    fn fail(&self) {
        let tell = self.registers().fail();
        if tell {
            self.raise();
        }
    }
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.debug_struct("Shared")
            .field("name", &self.name)
            .field("registers", &*self.registers())
            .finish_non_exhaustive()
    }
}

/// Puts the line up again each time KVM has taken it down too early.
fn resampler(shared: &Arc<Shared>) -> io::Result<(Arc<EventFd>, JoinHandle<()>)> {
    let stop = EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC)?;
    let stop = Arc::new(stop);
    let (stopped, shared) = (Arc::clone(&stop), Arc::clone(shared));
    let thread = std::thread::Builder::new()
        .name(format!("{}-interrupt", shared.name))
        .spawn(move || {
            loop {
                match shared.interrupt.wait(&stopped) {
                    Ok(true) => {}
                    Ok(false) => return,
                    Err(error) => {
                        tracing::error!(device = shared.name, %error, "interrupts may get lost");
                        return;
                    }
                }
                let pending = shared.registers().is_pending();
                if pending {
                    shared.raise();
                }
            }
        })?;
    Ok((stop, thread))
}

/// The errand of a queue's thread.
struct Server {
    shared: Arc<Shared>,
    control: Arc<Control>,
    memory: Arc<dyn Memory + Send + Sync>,
    queue: u16,
    features: u64,
    setup: Setup,
}

impl Server {
    /// Serves the queue until it is stopped or breaks. Nothing of its requests is left then.
    fn run(&self) {
        let Err(end) = self.serve();
        let stopped = self.control.note_end(&self.shared.name, self.queue, end);
        if !stopped {
            self.shared.fail();
        }
    }

    fn serve(&self) -> Result<Infallible, End> {
        let mut lane = Arc::clone(&self.shared.device).lane(self.queue, self.features)?;
        let position = Position::start(self.setup.format);
        let mut queue = Queue::new(&*self.memory, &self.setup, position)?;
        self.control.set_health(Health::Running);
        self.control.serve(self, &mut queue, &mut *lane)
    }
}

impl Transport for Server {
    fn memory(&self) -> &dyn Memory {
        &*self.memory
    }

    fn interrupt(&self) -> Result<(), End> {
        self.shared.registers().used();
        self.shared.raise();
        Ok(())
    }
}
