//! A virtio device behind registers, brought up by a guest: every mechanism carries its accesses
//! and its notifications, and nothing but speed differs.

mod support;

use std::io;
use std::os::fd::AsFd as _;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result};
use ioregion_conformance::pace::amount;
use ioregion_conformance::{Kind, Rig, kinds};
use ioregion_devices::mmio::{Handle, Interrupt, Mmio, Notify, Options, at, region};
use ioregion_devices::rng::Rng;
use ioregion_devices::virtio::{
    AtOnce, Chain, Device, Health, Lane, Memory, Refusal, SharedMemory,
};
use ioregion_dispatch::Bus;
use ioregion_dispatch::server::WaitPolicy;
use ioregion_microguest::{MMIO_BASE, MicroVm, Program};
use nix::sys::eventfd::{EfdFlags, EventFd};
use support::watchdog;
use vm_memory::{Bytes as _, GuestAddress};

const VERSION_1: u64 = 1 << 32;
const EVENT_IDX: u64 = 1 << 29;

const QUEUES: u16 = 3;
/// Descriptors of a queue, each of one request.
const SIZE: u16 = 4;
/// Bytes of a request.
const LEN: u32 = 8;

/// Where the host has put descriptors and buffers, behind the cells and below the programs.
const TABLES: u64 = 0x8_0000;
const BUFFERS: u64 = 0x9_0000;

/// The cells where the rings of a queue begin: their first word holds flags, which stay 0 with
/// `VIRTIO_F_EVENT_IDX`, and in the upper half the index.
fn rings(queue: u16) -> (u32, u32) {
    let first = 8 * u32::from(queue);
    (first, first + 1)
}

fn buffer(queue: u16, descriptor: u16) -> u64 {
    BUFFERS + u64::from(queue) * 0x100 + u64::from(descriptor) * 16
}

/// Counts the requests of each of its queues.
struct Counter;

impl Device for Counter {
    fn kind(&self) -> u32 {
        42
    }

    fn features(&self) -> u64 {
        0
    }

    fn check_features(&self, _features: u64) -> Result<(), Refusal> {
        Ok(())
    }

    fn config(&self) -> Vec<u8> {
        Vec::new()
    }

    fn queues(&self) -> u16 {
        QUEUES
    }

    fn lane(self: Arc<Self>, _queue: u16, _features: u64) -> io::Result<Box<dyn Lane>> {
        let mut count = 0u64;
        Ok(Box::new(AtOnce(
            move |chain: &Chain, memory: &dyn Memory| {
                count += 1;
                chain.write(memory, 0, &count.to_le_bytes())?;
                Ok(LEN)
            },
        )))
    }
}

/// A program and how many accesses it makes besides notifications.
struct Script {
    program: Program,
    others: u64,
}

impl Script {
    fn read(&mut self, offset: u64) -> usize {
        self.others += 1;
        self.program.read(Bus::Mmio, MMIO_BASE + offset, 4)
    }

    fn write(&mut self, offset: u64, value: u64) {
        self.others += 1;
        self.program
            .write(Bus::Mmio, MMIO_BASE + offset, 4, value & 0xffff_ffff);
    }

    /// What Linux's driver does until the device runs.
    fn bring_up(guest: &MicroVm, queues: u16) -> Result<Self> {
        let program = Program::new();
        let mut script = Self { program, others: 0 };
        for offset in [at::MAGIC, at::VERSION, at::DEVICE_ID] {
            script.read(offset);
        }
        script.write(at::STATUS, 0);
        for status in [1, 3] {
            script.write(at::STATUS, status);
        }
        let features = VERSION_1 | EVENT_IDX;
        for word in [1, 0] {
            script.write(at::DRIVER_FEATURES_SEL, word);
            script.write(at::DRIVER_FEATURES, features >> (32 * word));
        }
        script.write(at::STATUS, 0xb);
        script.read(at::STATUS);
        for queue in 0..queues {
            let (avail, used) = rings(queue);
            let parts = [
                (at::QUEUE_DESC_LOW, TABLES + u64::from(queue) * 0x100),
                (at::QUEUE_DRIVER_LOW, guest.cell_address(avail)?),
                (at::QUEUE_DEVICE_LOW, guest.cell_address(used)?),
            ];
            script.write(at::QUEUE_SEL, queue.into());
            script.read(at::QUEUE_READY);
            script.write(at::QUEUE_SIZE, SIZE.into());
            for (low, addr) in parts {
                script.write(low, addr);
                script.write(low + 4, addr >> 32);
            }
            script.write(at::QUEUE_READY, 1);
        }
        script.write(at::STATUS, 0xf);
        script.read(at::STATUS);
        Ok(script)
    }

    /// A request to each queue, all of which are notified before any of them is waited for.
    fn requests(&mut self, queues: u16, rounds: u32) {
        const ONE: u32 = 1 << 16;
        self.program.repeat(rounds, |program| {
            for queue in 0..queues {
                program.ram_store_counter(rings(queue).0, ONE, ONE);
                let notify = MMIO_BASE + at::QUEUE_NOTIFY;
                program.write(Bus::Mmio, notify, 4, queue.into());
            }
            for queue in 0..queues {
                program.ram_wait_counter(rings(queue).1, ONE, ONE);
            }
        });
    }
}

/// What the driver would put into memory.
fn prepare(guest: &MicroVm, queues: u16) -> Result<()> {
    let memory = guest.memory();
    for queue in 0..queues {
        let ring = guest.cell_address(rings(queue).0)? + 4;
        for number in 0..SIZE {
            let mut descriptor = buffer(queue, number).to_le_bytes().to_vec();
            descriptor.extend(LEN.to_le_bytes());
            // To be written.
            descriptor.extend([2, 0, 0, 0]);
            let at = TABLES + u64::from(queue) * 0x100 + u64::from(number) * 16;
            memory.write_slice(&descriptor, GuestAddress(at))?;
            let at = ring + 2 * u64::from(number);
            memory.write_slice(&number.to_le_bytes(), GuestAddress(at))?;
        }
    }
    Ok(())
}

fn read_buffer(guest: &MicroVm, queue: u16, descriptor: u16) -> Result<u64> {
    let mut bytes = [0; LEN as usize];
    let at = GuestAddress(buffer(queue, descriptor));
    guest.memory().read_slice(&mut bytes, at)?;
    Ok(u64::from_le_bytes(bytes))
}

/// A device on a guest's memory, and its interrupt.
fn device(guest: &MicroVm, model: Arc<dyn Device>) -> Result<(Mmio, Handle, EventFd)> {
    let irq = EventFd::from_value_and_flags(0, EfdFlags::EFD_NONBLOCK)?;
    let interrupt = Interrupt::edge(irq.as_fd().try_clone_to_owned()?);
    let memory = Arc::new(SharedMemory::from(guest.memory().clone()));
    let mmio = Mmio::new("test", model, memory, interrupt, &Options::default())?;
    let handle = mmio.handle();
    Ok((mmio, handle, irq))
}

fn run(kind: Kind, notify: Notify, rounds: u32) -> Result<()> {
    let _watchdog = watchdog(format!("{kind:?} {notify:?}"), Duration::from_secs(60));
    let rig = Rig::new()?;
    prepare(&rig.guest, QUEUES)?;
    let (mmio, handle, irq) = device(&rig.guest, Arc::new(Counter))?;
    let region = region(MMIO_BASE, QUEUES, notify);
    let task = rig.serve_waiting(kind, &region, mmio, WaitPolicy::Sleep)?;
    let mut script = Script::bring_up(&rig.guest, QUEUES)?;
    script.requests(QUEUES, rounds);
    let status = script.read(at::INTERRUPT_STATUS);
    script.write(at::INTERRUPT_ACK, 1);
    script.read(at::INTERRUPT_STATUS);
    // There is no such queue.
    script.write(at::QUEUE_NOTIFY, 77);
    script.read(at::STATUS);
    let (log, vcpu) = rig.run(&script.program)?;
    assert_eq!(log[..4], [0x7472_6976, 2, 42, 0xb]);
    assert_eq!(log[4..=4 + usize::from(QUEUES)], [0, 0, 0, 0xf]);
    assert_eq!(log[status..], [1, 0, 0xf]);
    assert_eq!(handle.health(), [Health::Running; QUEUES as usize]);
    for queue in 0..QUEUES {
        for descriptor in 0..SIZE {
            // The last of the requests that had this descriptor.
            let wanted = (1..=rounds).rfind(|n| (n - 1) % u32::from(SIZE) == u32::from(descriptor));
            let wanted = wanted.context("fewer rounds than descriptors")?;
            let written = read_buffer(&rig.guest, queue, descriptor)?;
            assert_eq!(written, u64::from(wanted));
        }
    }
    // Each queue was to interrupt once: with its first request.
    assert_eq!(irq.read(), Ok(u64::from(QUEUES)));
    let exits = vcpu.stats().exits;
    if kind.is_native() {
        assert_eq!(exits, 0);
    } else if kind.has_sinks() && notify == Notify::Matched {
        let most = script.others + u64::from(rounds) / 10;
        assert!(exits <= most, "{exits} exits, {most} were due");
    }
    // A reset is over when the write is.
    let mut program = Program::new();
    program.write(Bus::Mmio, MMIO_BASE + at::STATUS, 4, 0);
    program.read(Bus::Mmio, MMIO_BASE + at::STATUS, 4);
    let mut vcpu = vcpu;
    rig.guest.reload(vcpu.fd(), 0, &program)?;
    ioregion_conformance::run_to_halt(&mut vcpu)?;
    assert_eq!(rig.guest.log(0)?, [0]);
    assert_eq!(handle.health(), [Health::Idle; QUEUES as usize]);
    rig.vm.remove(&region)?;
    if let Some(task) = task {
        assert_eq!(task.finish()?.lost, 0);
    }
    Ok(())
}

#[test]
fn guest_brings_up_a_device_and_no_notification_is_lost() -> Result<()> {
    let rounds = amount("rounds", 200, 8);
    for kind in kinds() {
        for notify in [Notify::Matched, Notify::Carried] {
            println!("{kind:?} {notify:?}");
            run(kind, notify, rounds)?;
        }
    }
    Ok(())
}

#[test]
fn guest_gets_random_bytes_by_every_mechanism() -> Result<()> {
    for kind in kinds() {
        let _watchdog = watchdog(format!("{kind:?}"), Duration::from_secs(60));
        let rig = Rig::new()?;
        prepare(&rig.guest, 1)?;
        let (mmio, _, irq) = device(&rig.guest, Arc::new(Rng))?;
        let region = region(MMIO_BASE, 1, Notify::default());
        let task = rig.serve_waiting(kind, &region, mmio, WaitPolicy::Sleep)?;
        let mut script = Script::bring_up(&rig.guest, 1)?;
        script.requests(1, SIZE.into());
        let (log, _vcpu) = rig.run(&script.program)?;
        assert_eq!(log[..4], [0x7472_6976, 2, 4, 0xb]);
        let mut seen = Vec::new();
        for descriptor in 0..SIZE {
            let bytes = read_buffer(&rig.guest, 0, descriptor)?;
            // Chance: one in 2^61.
            assert!(bytes != 0 && !seen.contains(&bytes), "{kind:?}");
            seen.push(bytes);
        }
        assert_eq!(irq.read(), Ok(1), "{kind:?}");
        rig.vm.remove(&region)?;
        if let Some(task) = task {
            assert_eq!(task.finish()?.lost, 0);
        }
    }
    Ok(())
}
