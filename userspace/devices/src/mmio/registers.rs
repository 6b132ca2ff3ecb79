//! The registers of virtio-mmio, version 2, as a state machine: virtio 1.2, section 4.2. No I/O.

use std::fmt;
use std::sync::Arc;

use ioregion_dispatch::Size;
use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET,
    VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_mmio::{VIRTIO_MMIO_INT_CONFIG, VIRTIO_MMIO_INT_VRING};

use super::at;
use crate::virtio::{Device, Layout, Offer, Setup, Status, StatusError, Step};

const MAGIC: u32 = u32::from_le_bytes(*b"virt");
const VERSION: u32 = 2;
/// Whose device it is: nobody's in particular.
const VENDOR: u32 = 0;
/// Length and address of shared memory that there is not.
const NO_MEMORY: u32 = u32::MAX;

const NEEDS_RESET: u8 = VIRTIO_CONFIG_S_NEEDS_RESET as u8;
const FEATURES_OK: u8 = VIRTIO_CONFIG_S_FEATURES_OK as u8;
const DRIVER_OK: u8 = VIRTIO_CONFIG_S_DRIVER_OK as u8;

/// What a write asks of whoever serves the queues.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Effect {
    /// Nothing.
    Nothing,
    /// Queues are ready, of a driver that took these features: serve them.
    Start(u64, Vec<(u16, Setup)>),
    /// Serve the queue no longer; then say [`Registers::queue_stopped`].
    Stop(u16),
    /// Serve nothing any more; then say [`Registers::was_reset`].
    Reset,
    /// The driver notifies of requests in a queue that is served.
    Notify(u16),
    /// Interrupt the driver: it has not acknowledged everything.
    Interrupt,
}

/// What a driver did that means nothing; it changes nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Misuse {
    /// Registers have four bytes.
    #[error("a write of {size:?} at {offset:#x}, where registers have four bytes")]
    Size {
        /// Where.
        offset: u64,
        /// What was written.
        size: Size,
    },
    /// No register, or one that cannot be written.
    #[error("nothing can be written at {0:#x}")]
    ReadOnly(u64),
    /// A queue that the device does not have.
    #[error("there is no queue {0}")]
    NoQueue(u32),
    /// A queue with more descriptors than it can have.
    #[error("queue {queue} cannot have {size} descriptors")]
    QueueSize {
        /// Which.
        queue: u32,
        /// What was written.
        size: u32,
    },
    /// A queue that is ready stays as it is.
    #[error("queue {0} is ready and cannot be changed")]
    QueueReady(u32),
    /// Features are settled, or there are none in this half.
    #[error("features cannot be taken now, or not in word {0}")]
    Features(u32),
    /// A notification of a queue that is not served.
    #[error("a notification of queue {0}, which is not in use")]
    NotServed(u32),
    /// Requests of the driver before may still be under way.
    #[error("the device is still being reset")]
    Resetting,
    /// A status that the device does not take.
    #[error(transparent)]
    Status(#[from] StatusError),
}

/// Whether a queue is served.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum Ready {
    #[default]
    No,
    Yes,
    /// The driver wants it stopped, but requests may still be under way.
    Stopping,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct QueueRegisters {
    size: u16,
    descriptors: u64,
    driver: u64,
    device: u64,
    ready: Ready,
}

/// What only lasts until a reset.
#[derive(Debug, Default)]
struct Session {
    device_word: u32,
    driver_word: u32,
    features: u64,
    queue: u32,
    queues: Vec<QueueRegisters>,
    status: Status,
    needs_reset: bool,
    resetting: bool,
    interrupts: u32,
}

impl Session {
    fn new(queues: u16) -> Self {
        Self {
            queues: vec![QueueRegisters::default(); queues.into()],
            ..Self::default()
        }
    }
}

/// The registers of a device.
pub struct Registers {
    device: Arc<dyn Device>,
    offer: Offer,
    max_size: u16,
    config: Vec<u8>,
    generation: u32,
    session: Session,
}

impl Registers {
    /// Those of a device whose queues have at most `max_size` descriptors, a power of two.
    #[must_use]
    pub fn new(device: Arc<dyn Device>, max_size: u16, packed: bool) -> Self {
        Self {
            offer: Offer::new(&*device, 1 << VIRTIO_F_VERSION_1, packed),
            max_size,
            config: device.config(),
            generation: 0,
            session: Session::new(device.queues()),
            device,
        }
    }

    /// What the driver reads; nothing (zeroes) where there is no register, or by an access of
    /// another size than it has.
    #[must_use]
    pub fn read(&self, offset: u64, size: Size) -> u64 {
        match offset {
            at::CONFIG.. => self.read_config(offset - at::CONFIG, size),
            _ if size == Size::B4 => self.register(offset).into(),
            _ => 0,
        }
    }

    fn read_config(&self, offset: u64, size: Size) -> u64 {
        let mut bytes = [0; 8];
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        let there = self.config.get(start..).unwrap_or_default();
        let wanted = usize::from(size.bytes());
        for (to, from) in bytes.iter_mut().take(wanted).zip(there) {
            *to = *from;
        }
        u64::from_le_bytes(bytes)
    }

    fn register(&self, offset: u64) -> u32 {
        let session = &self.session;
        let queue = self.selected();
        match offset {
            at::MAGIC => MAGIC,
            at::VERSION => VERSION,
            at::DEVICE_ID => self.device.kind(),
            at::VENDOR_ID => VENDOR,
            at::DEVICE_FEATURES => word(self.offer.all(), session.device_word),
            at::QUEUE_SIZE_MAX => queue.map_or(0, |_| self.max_size.into()),
            at::QUEUE_READY => queue.map_or(0, |queue| u32::from(queue.ready != Ready::No)),
            at::INTERRUPT_STATUS => session.interrupts,
            at::STATUS => self.status().into(),
            at::SHM_LEN_LOW | at::SHM_LEN_HIGH | at::SHM_BASE_LOW | at::SHM_BASE_HIGH => NO_MEMORY,
            at::CONFIG_GENERATION => self.generation,
            _ => 0,
        }
    }

    /// Until requests of the driver before have ended the device only says that it needs a reset,
    /// which no driver takes for one that it can use.
    fn status(&self) -> u8 {
        let session = &self.session;
        match session.resetting {
            true => NEEDS_RESET,
            false => session.status.bits() | if session.needs_reset { NEEDS_RESET } else { 0 },
        }
    }

    fn selected(&self) -> Option<&QueueRegisters> {
        let index = usize::try_from(self.session.queue).ok()?;
        self.session.queues.get(index)
    }

    /// Follows a write of the driver's.
    ///
    /// # Errors
    ///
    /// Why it means nothing; then it has changed nothing.
    pub fn write(&mut self, offset: u64, size: Size, value: u64) -> Result<Effect, Misuse> {
        if offset >= at::CONFIG {
            return Err(Misuse::ReadOnly(offset));
        }
        let value = match u32::try_from(value & size.mask()) {
            Ok(value) if size == Size::B4 => value,
            _ => return Err(Misuse::Size { offset, size }),
        };
        if offset == at::STATUS {
            return self.write_status(value);
        }
        if self.session.resetting {
            return Err(Misuse::Resetting);
        }
        let session = &mut self.session;
        match offset {
            at::DEVICE_FEATURES_SEL => session.device_word = value,
            at::DRIVER_FEATURES_SEL => session.driver_word = value,
            at::DRIVER_FEATURES => self.take_features(value)?,
            at::QUEUE_SEL => session.queue = value,
            at::QUEUE_READY => return self.write_ready(value),
            at::QUEUE_NOTIFY => return self.notify(value),
            at::INTERRUPT_ACK => return Ok(self.acknowledge(value)),
            // There is no shared memory to choose from.
            at::SHM_SEL => {}
            _ => self.write_queue(offset, value)?,
        }
        Ok(Effect::Nothing)
    }

    fn take_features(&mut self, value: u32) -> Result<(), Misuse> {
        let session = &mut self.session;
        let shift = match session.driver_word {
            _ if session.status.bits() & FEATURES_OK != 0 => {
                return Err(Misuse::Features(session.driver_word));
            }
            0 => 0,
            1 => 32,
            // Nothing is offered there.
            other if value != 0 => return Err(Misuse::Features(other)),
            _ => return Ok(()),
        };
        let others = session.features & !(u64::from(u32::MAX) << shift);
        session.features = others | u64::from(value) << shift;
        Ok(())
    }

    fn write_status(&mut self, value: u32) -> Result<Effect, Misuse> {
        // The device's own bit comes back from drivers that read, change and write.
        let value = value & !u32::from(NEEDS_RESET);
        let session = &mut self.session;
        if session.resetting && value != 0 {
            return Err(Misuse::Resetting);
        }
        // What does not fit has bits that mean nothing.
        let bits = u8::try_from(value).unwrap_or(u8::MAX);
        let (device, offer) = (&*self.device, self.offer);
        let check = |features| offer.check(device, features);
        match session.status.write(bits, session.features, check)? {
            Step::Noted => Ok(Effect::Nothing),
            Step::Reset => {
                session.resetting = true;
                Ok(Effect::Reset)
            }
            Step::Start(_) if session.needs_reset => Ok(Effect::Nothing),
            Step::Start(features) => {
                let ready = (0..).zip(&session.queues);
                let ready = ready.filter(|(_, queue)| queue.ready == Ready::Yes);
                let queues = ready.map(|(index, queue)| (index, queue.setup(features)));
                Ok(Effect::Start(features, queues.collect()))
            }
        }
    }

    fn write_ready(&mut self, value: u32) -> Result<Effect, Misuse> {
        let session = &mut self.session;
        let (queue, number) = selected(session)?;
        let running = session.status.bits() & DRIVER_OK != 0;
        let registers = &mut session.queues[usize::from(queue)];
        match (registers.ready, value) {
            (Ready::No, 1) => {
                registers.ready = Ready::Yes;
                if !running || session.needs_reset {
                    return Ok(Effect::Nothing);
                }
                let features = session.features;
                let setup = registers.setup(features);
                Ok(Effect::Start(features, vec![(queue, setup)]))
            }
            (Ready::Yes | Ready::Stopping, 0) if running => {
                registers.ready = Ready::Stopping;
                Ok(Effect::Stop(queue))
            }
            (Ready::Yes, 0) => {
                registers.ready = Ready::No;
                Ok(Effect::Nothing)
            }
            (Ready::No, 0) | (Ready::Yes, 1) => Ok(Effect::Nothing),
            _ => Err(Misuse::QueueReady(number)),
        }
    }

    fn write_queue(&mut self, offset: u64, value: u32) -> Result<(), Misuse> {
        let max = self.max_size;
        let session = &mut self.session;
        let is_queue = matches!(
            offset,
            at::QUEUE_SIZE
                | at::QUEUE_DESC_LOW
                | at::QUEUE_DESC_HIGH
                | at::QUEUE_DRIVER_LOW
                | at::QUEUE_DRIVER_HIGH
                | at::QUEUE_DEVICE_LOW
                | at::QUEUE_DEVICE_HIGH
        );
        if !is_queue {
            return Err(Misuse::ReadOnly(offset));
        }
        let (queue, number) = selected(session)?;
        let registers = &mut session.queues[usize::from(queue)];
        if registers.ready != Ready::No {
            return Err(Misuse::QueueReady(number));
        }
        let low = |addr: &mut u64| *addr = *addr >> 32 << 32 | u64::from(value);
        let high = |addr: &mut u64| *addr = *addr & u64::from(u32::MAX) | u64::from(value) << 32;
        match offset {
            at::QUEUE_DESC_LOW => low(&mut registers.descriptors),
            at::QUEUE_DESC_HIGH => high(&mut registers.descriptors),
            at::QUEUE_DRIVER_LOW => low(&mut registers.driver),
            at::QUEUE_DRIVER_HIGH => high(&mut registers.driver),
            at::QUEUE_DEVICE_LOW => low(&mut registers.device),
            at::QUEUE_DEVICE_HIGH => high(&mut registers.device),
            _ => match u16::try_from(value) {
                Ok(size) if size <= max => registers.size = size,
                _ => {
                    return Err(Misuse::QueueSize {
                        queue: number,
                        size: value,
                    });
                }
            },
        }
        Ok(())
    }

    /// A notification: which queue it is for. Without `VIRTIO_F_NOTIFICATION_DATA`, which is not
    /// offered, the whole value is the queue's index.
    fn notify(&self, value: u32) -> Result<Effect, Misuse> {
        let queue = u16::try_from(value).map_err(|_| Misuse::NoQueue(value))?;
        match self.session.queues.get(usize::from(queue)) {
            None => Err(Misuse::NoQueue(value)),
            Some(registers) if registers.ready == Ready::Yes && self.is_running() => {
                Ok(Effect::Notify(queue))
            }
            Some(_) => Err(Misuse::NotServed(value)),
        }
    }

    fn is_running(&self) -> bool {
        !self.session.resetting && self.session.status.bits() & DRIVER_OK != 0
    }

    fn acknowledge(&mut self, value: u32) -> Effect {
        self.session.interrupts &= !value;
        match self.session.interrupts {
            0 => Effect::Nothing,
            _ => Effect::Interrupt,
        }
    }

    /// Nothing is served any more, after [`Effect::Reset`].
    pub fn was_reset(&mut self) {
        if self.session.resetting {
            self.session = Session::new(self.device.queues());
        }
    }

    /// Whether a reset waits for [`was_reset`](Self::was_reset).
    #[must_use]
    pub fn is_resetting(&self) -> bool {
        self.session.resetting
    }

    /// The queue that is selected, where it waits for [`queue_stopped`](Self::queue_stopped).
    #[must_use]
    pub fn stopping(&self) -> Option<u16> {
        let (queue, _) = selected(&self.session).ok()?;
        let waits = self.session.queues[usize::from(queue)].ready == Ready::Stopping;
        waits.then_some(queue)
    }

    /// The queue is no longer served, after [`Effect::Stop`].
    pub fn queue_stopped(&mut self, queue: u16) {
        if let Some(registers) = self.session.queues.get_mut(usize::from(queue))
            && registers.ready == Ready::Stopping
        {
            registers.ready = Ready::No;
        }
    }

    /// Requests were given back: the driver is to be interrupted.
    pub fn used(&mut self) {
        self.session.interrupts |= VIRTIO_MMIO_INT_VRING;
    }

    /// The configuration space may have changed. Whether the driver is to be interrupted.
    #[must_use]
    pub fn config_changed(&mut self) -> bool {
        self.config = self.device.config();
        self.generation = self.generation.wrapping_add(1);
        self.tell()
    }

    /// Nothing works any more until the next reset. Whether the driver is to be interrupted.
    #[must_use]
    pub fn fail(&mut self) -> bool {
        self.session.needs_reset = true;
        self.tell()
    }

    /// Has a driver that is ready look at the configuration space and the status.
    fn tell(&mut self) -> bool {
        if self.is_running() {
            self.session.interrupts |= VIRTIO_MMIO_INT_CONFIG;
        }
        self.is_running()
    }

    /// Whether there are interrupts that the driver has not acknowledged.
    #[must_use]
    pub fn is_pending(&self) -> bool {
        self.session.interrupts != 0
    }
}

impl QueueRegisters {
    fn setup(&self, features: u64) -> Setup {
        let layout = Layout {
            size: self.size,
            descriptors: self.descriptors,
            driver: self.driver,
            device: self.device,
        };
        Setup::new(features, layout)
    }
}

/// The queue that the driver has selected.
fn selected(session: &Session) -> Result<(u16, u32), Misuse> {
    let number = session.queue;
    match u16::try_from(number) {
        Ok(queue) if usize::from(queue) < session.queues.len() => Ok((queue, number)),
        _ => Err(Misuse::NoQueue(number)),
    }
}

/// A word of 32 bits, counted from the lowest.
fn word(bits: u64, index: u32) -> u32 {
    match index {
        // The halves; neither is cut.
        0 => (bits & u64::from(u32::MAX)) as u32,
        1 => (bits >> 32) as u32,
        _ => 0,
    }
}

impl fmt::Debug for Registers {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.debug_struct("Registers")
            .field("kind", &self.device.kind())
            .field("generation", &self.generation)
            .field("session", &self.session)
            .finish_non_exhaustive()
    }
}
