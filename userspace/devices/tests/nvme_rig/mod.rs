//! A driver of an NVMe controller over plain memory, which does what Linux's does at probe.
#![allow(dead_code, reason = "each test program uses a part")]

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use ioregion_devices::memory::Memory;
use ioregion_devices::nvme::{AdminChannel, CalledBy, Controller, Options, QueueChannel};
use ioregion_dispatch::{Access, Device, Ring, Size};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::support::mapped::Mapped;
use crate::support::{Flat, put, u16_at, u32_at};

pub const PAGE: u64 = 4096;
/// Bytes of memory.
pub const BYTES: usize = 8 << 20;
pub const SECTORS: u64 = 4096;

/// How commands are carried out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// At once, called by anybody.
    Anybody,
    /// At once, by a server.
    AtOnce,
    /// By io_uring, through memory of the device.
    Copied,
    /// By io_uring, straight from and to the driver's memory.
    Pinned,
}

pub const WAYS: [Way; 4] = [Way::Anybody, Way::AtOnce, Way::Copied, Way::Pinned];

/// Registers.
pub const CAP: u64 = 0;
pub const VS: u64 = 8;
pub const INTMS: u64 = 0xc;
pub const INTMC: u64 = 0x10;
pub const CC: u64 = 0x14;
pub const CSTS: u64 = 0x1c;
pub const AQA: u64 = 0x24;
pub const ASQ: u64 = 0x28;
pub const ACQ: u64 = 0x30;

/// `CC` as Linux sets it: entries of 64 and 16 bytes, enabled.
pub const CC_ENABLED: u64 = 4 << 20 | 6 << 16 | 1;

pub const RDY: u64 = 1;
pub const CFS: u64 = 2;
pub const SHUT_DOWN: u64 = 2 << 2;

/// A submission queue entry.
pub type Sqe = [u8; 64];

pub fn sqe(opcode: u8, nsid: u32, prp: [u64; 2], dwords: &[(usize, u32)]) -> Sqe {
    let mut entry = [0; 64];
    entry[0] = opcode;
    entry[4..8].copy_from_slice(&nsid.to_le_bytes());
    entry[24..32].copy_from_slice(&prp[0].to_le_bytes());
    entry[32..40].copy_from_slice(&prp[1].to_le_bytes());
    for (dword, value) in dwords {
        entry[dword * 4..dword * 4 + 4].copy_from_slice(&value.to_le_bytes());
    }
    entry
}

/// A completion queue entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cqe {
    pub result: u32,
    pub sq_head: u16,
    pub sq: u16,
    pub command: u16,
    /// Type and code, without what says whether to try again.
    pub status: u16,
}

/// A submission queue as the driver has it.
#[derive(Debug)]
pub struct Sq {
    pub base: u64,
    pub size: u32,
    pub tail: u32,
    next: u16,
}

/// A completion queue.
#[derive(Debug)]
pub struct Cq {
    pub base: u64,
    pub size: u32,
    pub head: u32,
    phase: u16,
}

/// Doorbells in memory.
#[derive(Debug, Clone, Copy)]
pub struct Shadows {
    pub doorbells: u64,
    pub events: u64,
}

pub struct Rig {
    _dir: tempfile::TempDir,
    pub path: PathBuf,
    pub admin: AdminChannel,
    /// From queue 1 on.
    pub channels: Vec<QueueChannel>,
    pub controller: Arc<Controller>,
    /// Interrupts that were raised.
    pub raised: Arc<Mutex<Vec<u16>>>,
    pub memory: Arc<dyn Memory + Send + Sync>,
    pub sqs: HashMap<u16, Sq>,
    pub cqs: HashMap<u16, Cq>,
    pub shadows: Option<Shadows>,
    /// Writes to doorbell registers.
    pub rung: usize,
    free: u64,
}

impl Rig {
    pub fn new(way: Way, options: &Options) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        let bytes: Vec<u8> = (0..SECTORS * 512).map(|at| (at % 251) as u8).collect();
        std::fs::write(&path, bytes).unwrap();
        let memory: Arc<dyn Memory + Send + Sync> = match way {
            Way::Pinned => Arc::new(Mapped::new(BYTES)),
            _ => Arc::new(Flat::new(BYTES)),
        };
        let options = Options {
            io_uring: matches!(way, Way::Copied | Way::Pinned),
            ..options.clone()
        };
        let raised = Arc::new(Mutex::new(Vec::new()));
        let sink = Arc::clone(&raised);
        let interrupts = Box::new(move |vector| sink.lock().unwrap().push(vector));
        let controller =
            Controller::open(&path, &options, Arc::clone(&memory), interrupts).unwrap();
        let by = match way {
            Way::Anybody => CalledBy::Anybody,
            _ => CalledBy::Server,
        };
        let channel = |id| QueueChannel::new(&controller, id, by).unwrap();
        Self {
            _dir: dir,
            path,
            admin: AdminChannel::new(&controller),
            channels: (1..=options.queues).map(channel).collect(),
            controller,
            raised,
            memory,
            sqs: HashMap::new(),
            cqs: HashMap::new(),
            shadows: None,
            rung: 0,
            free: Flat::BASE,
        }
    }

    /// A controller that was probed, with all its queues.
    pub fn probed(way: Way, options: &Options) -> Self {
        let mut rig = Self::new(way, options);
        rig.enable(32);
        for id in 1..=options.queues {
            rig.create_pair(id, 64);
        }
        rig
    }

    /// Zeroed pages.
    pub fn pages(&mut self, count: u64) -> u64 {
        let at = self.free;
        self.free += count * PAGE;
        assert!(self.free <= Flat::BASE + BYTES as u64, "out of memory");
        at
    }

    fn register(offset: u64, size: Size) -> Access {
        Access {
            user_data: 1 << 32,
            offset,
            size,
        }
    }

    pub fn read(&mut self, offset: u64) -> u64 {
        self.admin.read(Self::register(offset, Size::B4))
    }

    pub fn write(&mut self, offset: u64, value: u64) {
        self.admin.write(Self::register(offset, Size::B4), value);
    }

    /// As Linux writes 64-bit registers: low half first.
    pub fn write_long(&mut self, offset: u64, value: u64) {
        self.write(offset, value & 0xffff_ffff);
        self.write(offset + 4, value >> 32);
    }

    /// Sets the admin queues up and enables the controller.
    pub fn enable(&mut self, size: u32) {
        assert_eq!(self.read(CSTS) & RDY, 0);
        let (sq, cq) = (self.pages(1), self.pages(1));
        self.write(AQA, u64::from(size - 1) << 16 | u64::from(size - 1));
        self.write_long(ASQ, sq);
        self.write_long(ACQ, cq);
        self.write(CC, CC_ENABLED);
        assert_eq!(self.read(CSTS), RDY);
        self.sqs.clear();
        self.cqs.clear();
        self.shadows = None;
        self.add_sq(0, sq, size);
        self.add_cq(0, cq, size);
    }

    /// Disables it, and waits until it is not ready.
    pub fn disable(&mut self) {
        self.write(CC, CC_ENABLED & !1);
        self.wait_for("not ready", |rig| rig.read(CSTS) & RDY == 0);
    }

    pub fn add_sq(&mut self, id: u16, base: u64, size: u32) {
        let sq = Sq {
            base,
            size,
            tail: 0,
            next: 0,
        };
        self.sqs.insert(id, sq);
    }

    pub fn add_cq(&mut self, id: u16, base: u64, size: u32) {
        put(&*self.memory, base, &vec![0; size as usize * 16]);
        let cq = Cq {
            base,
            size,
            head: 0,
            phase: 1,
        };
        self.cqs.insert(id, cq);
    }

    pub fn create_cq(&mut self, id: u16, size: u32, vector: u16) -> u16 {
        let base = self.pages((u64::from(size) * 16).div_ceil(PAGE));
        self.add_cq(id, base, size);
        let dwords = [
            (10, u32::from(id) | (size - 1) << 16),
            (11, 3 | u32::from(vector) << 16),
        ];
        self.ask(sqe(0x05, 0, [base, 0], &dwords)).status
    }

    pub fn create_sq(&mut self, id: u16, size: u32, cq: u16) -> u16 {
        let base = self.pages((u64::from(size) * 64).div_ceil(PAGE));
        self.add_sq(id, base, size);
        let dwords = [
            (10, u32::from(id) | (size - 1) << 16),
            (11, 1 | u32::from(cq) << 16),
        ];
        self.ask(sqe(0x01, 0, [base, 0], &dwords)).status
    }

    pub fn create_pair(&mut self, id: u16, size: u32) {
        assert_eq!(self.create_cq(id, size, id.min(1)), 0);
        assert_eq!(self.create_sq(id, size, id), 0);
    }

    pub fn delete_sq(&mut self, id: u16) -> u16 {
        self.ask(sqe(0x00, 0, [0; 2], &[(10, id.into())])).status
    }

    pub fn delete_cq(&mut self, id: u16) -> u16 {
        self.ask(sqe(0x04, 0, [0; 2], &[(10, id.into())])).status
    }

    /// Puts an entry into a queue without telling: the command's name.
    pub fn push(&mut self, id: u16, mut entry: Sqe) -> u16 {
        let sq = self.sqs.get_mut(&id).unwrap();
        let command = sq.next;
        sq.next = sq.next.wrapping_add(1);
        entry[2..4].copy_from_slice(&command.to_le_bytes());
        put(&*self.memory, sq.base + u64::from(sq.tail) * 64, &entry);
        sq.tail = (sq.tail + 1) % sq.size;
        command
    }

    fn channel(&mut self, id: u16) -> &mut dyn Device {
        match id {
            0 => &mut self.admin,
            id => &mut self.channels[usize::from(id) - 1],
        }
    }

    /// A doorbell with any value, or none.
    pub fn ring_with(&mut self, id: u16, offset: u64, value: Option<u64>) {
        self.rung += 1;
        let ring = Ring {
            user_data: id.into(),
            index: (offset / 4) as u32,
            offset,
            size: Size::B4,
            value,
            writes: 1,
        };
        self.channel(id).doorbell(ring);
    }

    /// The doorbell, or its shadow in memory and the register where the controller wants that.
    fn ring(&mut self, id: u16, offset: u64, value: u32) {
        if let Some(shadows) = self.shadows.filter(|_| id > 0) {
            let at = 8 * u64::from(id) + offset;
            let old = u32_at(&*self.memory, shadows.doorbells + at) as u16;
            let new = value as u16;
            put(&*self.memory, shadows.doorbells + at, &value.to_le_bytes());
            let event = u16_at(&*self.memory, shadows.events + at);
            if new.wrapping_sub(event).wrapping_sub(1) >= new.wrapping_sub(old) {
                return;
            }
        }
        self.ring_with(id, offset, Some(value.into()));
    }

    /// Tells the controller of what was pushed.
    pub fn kick(&mut self, id: u16) {
        let tail = self.sqs[&id].tail;
        self.ring(id, 0, tail);
    }

    /// Looks at a completion queue, and takes an answer without telling.
    pub fn peek(&mut self, id: u16) -> Option<Cqe> {
        let memory = &*self.memory;
        let cq = self.cqs.get_mut(&id).unwrap();
        let at = cq.base + u64::from(cq.head) * 16;
        let status = u16_at(memory, at + 14);
        if status & 1 != cq.phase {
            return None;
        }
        cq.head = (cq.head + 1) % cq.size;
        cq.phase ^= u16::from(cq.head == 0);
        Some(Cqe {
            result: u32_at(memory, at),
            sq_head: u16_at(memory, at + 8),
            sq: u16_at(memory, at + 10),
            command: u16_at(memory, at + 12),
            status: status >> 1 & 0x7ff,
        })
    }

    /// Tells how far answers were taken.
    pub fn consume(&mut self, id: u16) {
        let head = self.cqs[&id].head;
        self.ring(id, 4, head);
    }

    /// Serves the channels that have something to do.
    pub fn pump(&mut self) {
        for channel in &mut self.channels {
            let Some(event) = channel.event() else {
                continue;
            };
            let mut fds = [PollFd::new(event, PollFlags::POLLIN)];
            if poll(&mut fds, PollTimeout::from(1u8)).unwrap() > 0 {
                channel.woken();
            }
        }
    }

    pub fn wait_for(&mut self, what: &str, mut done: impl FnMut(&mut Self) -> bool) {
        let until = Instant::now() + Duration::from_secs(60);
        while !done(self) {
            assert!(Instant::now() < until, "{what}: not within a minute");
            self.pump();
        }
    }

    /// Waits for an answer.
    pub fn answer(&mut self, id: u16) -> Cqe {
        let mut answer = None;
        self.wait_for("an answer", |rig| {
            answer = rig.peek(id);
            answer.is_some()
        });
        self.consume(id);
        answer.unwrap()
    }

    /// One admin command.
    pub fn ask(&mut self, entry: Sqe) -> Cqe {
        self.ask_on(0, entry)
    }

    /// One command of a queue that has a completion queue of its number.
    pub fn ask_on(&mut self, id: u16, entry: Sqe) -> Cqe {
        let command = self.push(id, entry);
        self.kick(id);
        let answer = self.answer(id);
        assert_eq!((answer.sq, answer.command), (id, command));
        assert_eq!(u32::from(answer.sq_head), self.sqs[&id].tail);
        answer
    }

    pub fn bytes(&self, addr: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.read(addr, &mut bytes).unwrap();
        bytes
    }

    /// Identify: the page, or the status.
    pub fn identify(&mut self, cns: u32, nsid: u32) -> Result<Vec<u8>, u16> {
        let page = self.pages(1);
        match self.ask(sqe(0x06, nsid, [page, 0], &[(10, cns)])).status {
            0 => Ok(self.bytes(page, 4096)),
            status => Err(status),
        }
    }

    /// Get Log Page: so many bytes, or the status.
    pub fn log(&mut self, page: u8, len: u32, offset: u32, retain: bool) -> Result<Vec<u8>, u16> {
        let at = self.pages(u64::from(len).div_ceil(PAGE));
        let dwords = [
            (
                10,
                u32::from(page) | u32::from(retain) << 15 | (len / 4 - 1) << 16,
            ),
            (12, offset),
        ];
        let prp = [at, at + PAGE];
        match self.ask(sqe(0x02, 0xffff_ffff, prp, &dwords)).status {
            0 => Ok(self.bytes(at, len as usize)),
            status => Err(status),
        }
    }

    pub fn get_feature(&mut self, feature: u32, dword11: u32) -> Result<u32, u16> {
        let answer = self.ask(sqe(0x0a, 0, [0; 2], &[(10, feature), (11, dword11)]));
        match answer.status {
            0 => Ok(answer.result),
            status => Err(status),
        }
    }

    pub fn set_feature(&mut self, feature: u32, dword11: u32) -> Result<u32, u16> {
        let answer = self.ask(sqe(0x09, 0, [0; 2], &[(10, feature), (11, dword11)]));
        match answer.status {
            0 => Ok(answer.result),
            status => Err(status),
        }
    }

    /// A command about blocks.
    pub fn blocks(opcode: u8, first: u64, count: u32, prp: [u64; 2], flags: u32) -> Sqe {
        let dwords = [
            (10, first as u32),
            (11, (first >> 32) as u32),
            (12, (count - 1) | flags),
        ];
        sqe(opcode, 1, prp, &dwords)
    }

    pub fn content(&self) -> Vec<u8> {
        std::fs::read(&self.path).unwrap()
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        // They may have memory.
        self.channels.clear();
    }
}
