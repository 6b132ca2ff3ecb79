//! A guest that has found a device behind registers: what Linux's `virtio_mmio` driver does.
#![allow(dead_code, reason = "each test program uses a part")]

use std::fs::File;
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use ioregion_devices::mmio::{Handle, Interrupt, Mmio, Options, at};
use ioregion_devices::virtio::{Device, Format, Layout, Setup, SharedMemory, SharedRegion};
use ioregion_dispatch::{Access, Device as _, Ring, Size};
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::memfd::{MFdFlags, memfd_create};

use crate::support::{BYTES, Driver, Flat, Range, driver, put};

pub const ACKNOWLEDGE: u64 = 1;
pub const DRIVER: u64 = 2;
pub const DRIVER_OK: u64 = 4;
pub const FEATURES_OK: u64 = 8;
pub const NEEDS_RESET: u64 = 0x40;

pub const VERSION_1: u64 = 1 << 32;
pub const PACKED: u64 = 1 << 34;

/// Descriptors of each queue.
pub const SIZE: u16 = 16;
/// Bytes between the queues' parts.
const APART: u64 = 0x800;

pub struct Guest {
    pub mmio: Mmio,
    pub handle: Handle,
    pub memory: SharedMemory,
    irq: EventFd,
    pub queues: Vec<Box<dyn Driver>>,
}

pub fn eventfd() -> (EventFd, OwnedFd) {
    let made = EventFd::from_value_and_flags(0, EfdFlags::EFD_NONBLOCK).unwrap();
    let other = made.as_fd().try_clone_to_owned().unwrap();
    (made, other)
}

/// Waits until an eventfd was written to: how often.
pub fn wait(eventfd: &EventFd) -> u64 {
    let mut fds = [PollFd::new(eventfd.as_fd(), PollFlags::POLLIN)];
    assert_eq!(poll(&mut fds, PollTimeout::from(60_000u16)), Ok(1));
    eventfd.read().unwrap()
}

pub fn memory() -> SharedMemory {
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
    let file = File::from(memfd_create("guest", flags).unwrap());
    file.set_len(BYTES as u64).unwrap();
    fcntl(&file, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_SHRINK)).unwrap();
    let region = SharedRegion {
        base: Flat::BASE,
        len: BYTES as u64,
        file: file.into(),
        offset: 0,
    };
    SharedMemory::map(vec![region]).unwrap()
}

/// Waits until something is so.
pub fn until(what: &str, mut so: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(60);
    while !so() {
        assert!(Instant::now() < end, "{what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn access(offset: u64, size: Size) -> Access {
    Access {
        user_data: 0,
        offset,
        size,
    }
}

impl Guest {
    pub fn new(device: Arc<dyn Device>) -> Self {
        let (irq, other) = eventfd();
        Self::with(device, irq, Interrupt::edge(other), &Options::default())
    }

    pub fn with(
        device: Arc<dyn Device>,
        irq: EventFd,
        interrupt: Interrupt,
        options: &Options,
    ) -> Self {
        let memory = memory();
        let shared = Arc::new(memory.clone());
        let mmio = Mmio::new("test", device, shared, interrupt, options).unwrap();
        Self {
            handle: mmio.handle(),
            mmio,
            memory,
            irq,
            queues: Vec::new(),
        }
    }

    pub fn read(&mut self, offset: u64) -> u64 {
        self.mmio.read(access(offset, Size::B4))
    }

    pub fn write(&mut self, offset: u64, value: u64) {
        self.mmio.write(access(offset, Size::B4), value);
    }

    pub fn config(&mut self, offset: u64, size: Size) -> u64 {
        self.mmio.read(access(at::CONFIG + offset, size))
    }

    pub fn status(&mut self) -> u64 {
        self.read(at::STATUS)
    }

    fn add_status(&mut self, bit: u64) {
        let now = self.status();
        self.write(at::STATUS, now | bit);
    }

    pub fn offered(&mut self) -> u64 {
        self.write(at::DEVICE_FEATURES_SEL, 1);
        let high = self.read(at::DEVICE_FEATURES);
        self.write(at::DEVICE_FEATURES_SEL, 0);
        high << 32 | self.read(at::DEVICE_FEATURES)
    }

    /// Takes features; whether the device works with them.
    pub fn negotiate(&mut self, features: u64) -> bool {
        self.write(at::STATUS, 0);
        self.add_status(ACKNOWLEDGE);
        self.add_status(DRIVER);
        self.write(at::DRIVER_FEATURES_SEL, 1);
        self.write(at::DRIVER_FEATURES, features >> 32);
        self.write(at::DRIVER_FEATURES_SEL, 0);
        self.write(at::DRIVER_FEATURES, features & 0xffff_ffff);
        self.add_status(FEATURES_OK);
        self.status() & FEATURES_OK != 0
    }

    /// A queue that is not set up yet, in memory that is cleared for it.
    pub fn setup(&self, queue: u16, format: Format) -> Setup {
        let place = Flat::BASE + 3 * APART * u64::from(queue);
        put(&self.memory, place, &[0; 3 * APART as usize]);
        Setup {
            format,
            layout: Layout {
                size: SIZE,
                descriptors: place,
                driver: place + APART,
                device: place + 2 * APART,
            },
            indirect: true,
            event_idx: true,
        }
    }

    pub fn set_up_queue(&mut self, queue: u16, layout: &Layout) {
        self.write(at::QUEUE_SEL, queue.into());
        assert_eq!(self.read(at::QUEUE_READY), 0);
        assert!(self.read(at::QUEUE_SIZE_MAX) >= layout.size.into());
        self.write(at::QUEUE_SIZE, layout.size.into());
        let parts = [
            (at::QUEUE_DESC_LOW, at::QUEUE_DESC_HIGH, layout.descriptors),
            (at::QUEUE_DRIVER_LOW, at::QUEUE_DRIVER_HIGH, layout.driver),
            (at::QUEUE_DEVICE_LOW, at::QUEUE_DEVICE_HIGH, layout.device),
        ];
        for (low, high, addr) in parts {
            self.write(low, addr & 0xffff_ffff);
            self.write(high, addr >> 32);
        }
        self.write(at::QUEUE_READY, 1);
    }

    /// Starts the device with all that it offers, but packed queues only where they are wanted.
    pub fn bring_up(&mut self, format: Format) {
        assert_eq!(self.read(at::MAGIC), 0x7472_6976);
        assert_eq!(self.read(at::VERSION), 2);
        assert_ne!(self.read(at::DEVICE_ID), 0);
        let offered = self.offered();
        assert_eq!(offered & (VERSION_1 | PACKED), VERSION_1 | PACKED);
        let features = match format {
            Format::Split => offered & !PACKED,
            Format::Packed => offered,
        };
        assert!(self.negotiate(features));
        self.queues.clear();
        let queues = u16::try_from(self.handle.health().len()).unwrap();
        for queue in 0..queues {
            let setup = self.setup(queue, format);
            self.set_up_queue(queue, &setup.layout);
            let mut side = driver(&setup);
            side.arm(&self.memory, true);
            self.queues.push(side);
        }
        self.write(at::QUEUE_SEL, queues.into());
        assert_eq!(self.read(at::QUEUE_SIZE_MAX), 0);
        self.add_status(DRIVER_OK);
        let ready = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK;
        assert_eq!(self.status(), ready);
        let _ = self.irq.read();
    }

    /// Makes a request available and notifies of it where the device wants to hear of it, by a
    /// doorbell.
    pub fn request(&mut self, queue: u16, ranges: &[Range]) -> u16 {
        let side = &mut self.queues[usize::from(queue)];
        let id = side.add(&self.memory, ranges, false).unwrap();
        if side.must_kick(&self.memory) {
            self.ring(Some(queue.into()));
        }
        id
    }

    pub fn ring(&mut self, value: Option<u64>) {
        self.mmio.doorbell(Ring {
            user_data: 0,
            index: 0,
            offset: at::QUEUE_NOTIFY,
            size: Size::B4,
            value,
            writes: 1,
        });
    }

    /// What came back of a queue, by interrupts; waits until there is something.
    pub fn collect(&mut self, queue: u16) -> Vec<(u16, u32)> {
        let end = Instant::now() + Duration::from_secs(60);
        loop {
            let side = &mut self.queues[usize::from(queue)];
            let done = side.collect(&self.memory);
            side.arm(&self.memory, true);
            if !done.is_empty() {
                return done;
            }
            assert!(Instant::now() < end, "nothing came back");
            if self.interrupted() & 1 == 0 {
                // Of another queue, or of what was seen before its interrupt came.
                std::thread::sleep(Duration::from_millis(1));
            }
        }
    }

    /// Waits for an interrupt and acknowledges it: what it was for.
    pub fn interrupted(&mut self) -> u64 {
        wait(&self.irq);
        let why = self.read(at::INTERRUPT_STATUS);
        self.write(at::INTERRUPT_ACK, why);
        why
    }

    /// How often the driver was interrupted since it was last asked.
    pub fn interrupts(&self) -> u64 {
        self.irq.read().unwrap_or(0)
    }
}
