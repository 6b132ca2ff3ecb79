//! An NVMe controller whose driver does whatever it likes, in any order.

use std::io::Write as _;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, OnceLock};

use arbitrary::{Arbitrary, Unstructured};
use ioregion_devices::memory::{Memory, MemoryError};
use ioregion_devices::nvme::{AdminChannel, CalledBy, Controller, Options, QueueChannel};
use ioregion_dispatch::{Access, Device as _, Ring, Size};

/// The first address that is memory.
const BASE: u64 = 0x10_0000;
/// Bytes of memory: some pages.
const BYTES: usize = 12 * PAGE as usize;
const PAGE: u64 = 4096;
/// Steps of one input.
const STEPS: usize = 200;
/// Bytes of the image.
const IMAGE: usize = 64 * 512;
const QUEUES: u16 = 2;

/// What the driver does next.
#[derive(Debug, Arbitrary)]
enum Step {
    /// A register is written, or read: one that there is, or anything.
    Write(u8, u64),
    WriteAny(u16, u8, u64),
    Read(u16, u8),
    /// Sets the controller up as a good driver does.
    Enable,
    /// A command for a queue, at the place that is next, and its doorbell.
    Admin(Wish),
    Io(u8, Wish),
    /// Queues as a good driver makes them.
    Pair(u8, u8),
    /// A doorbell with any value, or without.
    Doorbell(u8, u8, Option<u32>),
    /// Answers were taken.
    Consume(u8, u8),
    /// Anything is written anywhere.
    Bytes(u16, [u8; 8]),
    /// Channels do what they have to do.
    Serve,
    Refresh,
}

/// A command.
#[derive(Debug, Arbitrary)]
struct Wish {
    opcode: u8,
    flags: u8,
    nsid: u8,
    prp: [u16; 2],
    dwords: [u32; 4],
}

/// Memory that takes any access, and refuses what is outside of it.
struct Bytes(Mutex<Vec<u8>>);

impl Bytes {
    fn with<T>(
        &self,
        addr: u64,
        len: usize,
        act: impl FnOnce(&mut [u8]) -> T,
    ) -> Result<T, MemoryError> {
        let unmapped = MemoryError::Unmapped { addr };
        let mut bytes = self.0.lock().unwrap();
        let start = addr.checked_sub(BASE).ok_or(unmapped)?;
        let start = usize::try_from(start).map_err(|_| unmapped)?;
        let end = start.checked_add(len).ok_or(unmapped)?;
        bytes.get_mut(start..end).map(act).ok_or(unmapped)
    }

    /// A write of the driver's, which goes nowhere where there is no memory.
    fn put(&self, addr: u64, bytes: &[u8]) {
        let _ = self.write(addr, bytes);
    }
}

impl Memory for Bytes {
    fn read(&self, addr: u64, into: &mut [u8]) -> Result<(), MemoryError> {
        self.with(addr, into.len(), |bytes| into.copy_from_slice(bytes))
    }

    fn write(&self, addr: u64, from: &[u8]) -> Result<(), MemoryError> {
        self.with(addr, from.len(), |bytes| bytes.copy_from_slice(from))
    }

    fn load(&self, addr: u64) -> Result<u16, MemoryError> {
        if !addr.is_multiple_of(2) {
            return Err(MemoryError::Misaligned { addr });
        }
        self.with(addr, 2, |bytes| u16::from_le_bytes([bytes[0], bytes[1]]))
    }

    fn store(&self, addr: u64, value: u16) -> Result<(), MemoryError> {
        if !addr.is_multiple_of(2) {
            return Err(MemoryError::Misaligned { addr });
        }
        self.with(addr, 2, |bytes| bytes.copy_from_slice(&value.to_le_bytes()))
    }
}

/// Most addresses are memory, many of them the start of a page.
fn address(wish: u16) -> u64 {
    match wish {
        0xfff0.. => u64::MAX - u64::from(0xffff - wish),
        0x8000.. => BASE + PAGE * u64::from(wish % 14),
        wish => BASE + u64::from(wish) * 2,
    }
}

/// An image, made once.
fn image() -> &'static (OwnedFd, PathBuf) {
    static IMAGE_FILE: OnceLock<(OwnedFd, PathBuf)> = OnceLock::new();
    IMAGE_FILE.get_or_init(|| {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[0x5a; IMAGE]).unwrap();
        let path = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
        (file.into(), path)
    })
}

struct Game {
    memory: Arc<Bytes>,
    controller: Arc<Controller>,
    admin: AdminChannel,
    channels: Vec<QueueChannel>,
    /// Where the driver's queues are, and the next entry: admin, 1, 2.
    tails: [u32; 3],
    sizes: [u32; 3],
}

/// Plays an input.
pub fn nvme(data: &[u8]) {
    // One at a time: the image is locked.
    static TURN: Mutex<()> = Mutex::new(());
    let turn = TURN.lock();
    let mut input = Unstructured::new(data);
    let Ok(served) = bool::arbitrary(&mut input) else {
        return;
    };
    let mut game = Game::new(served);
    for _ in 0..STEPS {
        if input.is_empty() {
            break;
        }
        let Ok(step) = Step::arbitrary(&mut input) else {
            break;
        };
        game.step(&step);
        let status = game.read(0x1c, Size::B4);
        assert_eq!(status & !0xf, 0, "bits of CSTS that there are not");
        assert_ne!(status & 0xc, 0xc, "CSTS.SHST is a reserved value");
    }
    game.recover();
    drop(turn);
}

fn sq(queue: u16) -> u64 {
    BASE + PAGE * u64::from(queue * 2)
}

fn cq(queue: u16) -> u64 {
    sq(queue) + PAGE
}

/// Enabled, with the entry sizes that there are.
const ENABLED: u64 = 4 << 20 | 6 << 16 | 1;

impl Game {
    fn new(served: bool) -> Self {
        let memory = Arc::new(Bytes(Mutex::new(vec![0; BYTES])));
        let options = Options {
            queues: QUEUES,
            vectors: 2,
            io_uring: false,
            memory_doorbells: true,
            ..Options::default()
        };
        let shared = Arc::clone(&memory);
        let interrupts = Box::new(|vector| assert!(vector < 2, "no such vector"));
        let controller = Controller::open(&image().1, &options, shared, interrupts).unwrap();
        let by = match served {
            true => CalledBy::Server,
            false => CalledBy::Anybody,
        };
        let channel = |id| QueueChannel::new(&controller, id, by).unwrap();
        Self {
            admin: AdminChannel::new(&controller),
            channels: (1..=QUEUES).map(channel).collect(),
            memory,
            controller,
            tails: [0; 3],
            sizes: [16; 3],
        }
    }

    fn access(offset: u64, size: Size) -> Access {
        Access {
            user_data: 1 << 32,
            offset,
            size,
        }
    }

    fn read(&mut self, offset: u64, size: Size) -> u64 {
        self.admin.read(Self::access(offset, size))
    }

    fn write(&mut self, offset: u64, size: Size, value: u64) {
        self.admin.write(Self::access(offset, size), value);
    }

    fn step(&mut self, step: &Step) {
        let size = |wish: u8| [Size::B1, Size::B2, Size::B4, Size::B8][usize::from(wish % 4)];
        match step {
            Step::Write(which, value) => {
                let places = [0x0c, 0x10, 0x14, 0x14, 0x14, 0x24, 0x28, 0x30];
                let offset = places[usize::from(*which) % places.len()];
                let value = match (offset, value % 4) {
                    (0x14, 0) => 0,
                    (0x14, 1) => ENABLED,
                    (0x14, 2) => ENABLED | 1 << 14,
                    (0x28 | 0x30, 0) => address((value >> 2) as u16),
                    _ => *value,
                };
                let bytes = if offset >= 0x28 { Size::B8 } else { Size::B4 };
                self.write(offset, bytes, value);
            }
            Step::WriteAny(offset, bytes, value) => {
                self.write(u64::from(*offset) % 0x1010, size(*bytes), *value);
            }
            Step::Read(offset, bytes) => {
                self.read(u64::from(*offset), size(*bytes));
            }
            Step::Enable => self.enable(),
            Step::Admin(wish) => self.submit(0, wish),
            Step::Io(queue, wish) => self.submit(u16::from(queue % 2) + 1, wish),
            Step::Pair(queue, entries) => {
                let queue = u16::from(queue % 2) + 1;
                let size = u32::from(entries % 15) + 2;
                for opcode in [5, 1] {
                    self.create(queue, opcode, size);
                }
            }
            Step::Doorbell(queue, half, value) => {
                let value = value.map(u64::from);
                self.doorbell(u16::from(queue % 4), u64::from(half % 3) * 4, value);
            }
            Step::Consume(queue, head) => {
                let queue = u16::from(queue % 3);
                let head = u32::from(*head) % self.sizes[usize::from(queue)];
                self.doorbell(queue, 4, Some(head.into()));
            }
            Step::Bytes(at, bytes) => self.memory.put(address(*at), bytes),
            Step::Serve => self.serve(),
            Step::Refresh => drop(self.controller.refresh()),
        }
    }

    fn doorbell(&mut self, queue: u16, offset: u64, value: Option<u64>) {
        let ring = Ring {
            user_data: if queue > QUEUES {
                1 << 33
            } else {
                queue.into()
            },
            index: 0,
            offset,
            size: Size::B4,
            value,
            writes: 1,
        };
        match queue {
            1 | 2 => self.channels[usize::from(queue) - 1].doorbell(ring),
            _ => self.admin.doorbell(ring),
        }
    }

    fn serve(&mut self) {
        for channel in &mut self.channels {
            channel.woken();
        }
    }

    /// Tries to enable it, which works where it is disabled.
    fn enable(&mut self) {
        self.write(0x24, Size::B4, 15 << 16 | 15);
        self.write(0x28, Size::B8, sq(0));
        self.write(0x30, Size::B8, cq(0));
        self.write(0x14, Size::B4, ENABLED);
        self.tails = [0; 3];
        self.sizes = [16; 3];
    }

    fn create(&mut self, queue: u16, opcode: u8, size: u32) {
        let base = if opcode == 5 { cq(queue) } else { sq(queue) };
        let flags = match opcode {
            5 => 3 | 1 << 16,
            _ => 1 | u32::from(queue) << 16,
        };
        let entry = entry(
            opcode,
            0,
            0,
            [base, 0],
            &[u32::from(queue) | (size - 1) << 16, flags],
        );
        self.push(0, &entry);
        self.tails[usize::from(queue)] = 0;
        self.sizes[usize::from(queue)] = size;
        self.serve();
    }

    fn submit(&mut self, queue: u16, wish: &Wish) {
        // Opcodes that there are, most of the time.
        let opcodes: &[u8] = match queue {
            0 => &[0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 0x7c],
            _ => &[0, 1, 2, 5, 8, 9],
        };
        let opcode = match wish.opcode {
            opcode @ 0xe0.. => opcode,
            index => opcodes[usize::from(index) % opcodes.len()],
        };
        let flags = if wish.flags == 0xff { 0x41 } else { 0 };
        let nsid = match wish.nsid {
            0xff => u32::MAX,
            nsid => u32::from(nsid % 3),
        };
        let mut dwords = wish.dwords;
        if queue > 0 && !dwords[3].is_multiple_of(4) {
            // Blocks that there are, or nearly.
            dwords[0] %= 66;
            dwords[1] &= 4;
            dwords[2] &= 0xc000_003f;
        }
        if queue == 0 && !dwords[3].is_multiple_of(4) {
            dwords[0] &= 0x8007_831f;
            dwords[1] &= 0x0003_0003;
        }
        let prp = wish.prp.map(address);
        self.push(queue, &entry(opcode, flags, nsid, prp, &dwords));
    }

    fn push(&mut self, queue: u16, entry: &[u8; 64]) {
        let index = usize::from(queue);
        let at = sq(queue) + 64 * u64::from(self.tails[index]);
        self.memory.put(at, entry);
        self.tails[index] = (self.tails[index] + 1) % self.sizes[index];
        self.doorbell(queue, 0, Some(self.tails[index].into()));
    }

    /// Whatever happened: after a reset it works as ever.
    fn recover(&mut self) {
        self.write(0x14, Size::B4, 0);
        for _ in 0..3 {
            self.serve();
        }
        assert_eq!(self.read(0x1c, Size::B4), 0, "the reset does not end");
        self.memory.put(BASE, &[0; BYTES]);
        self.enable();
        assert_eq!(self.read(0x1c, Size::B4), 1);
        for opcode in [5, 1] {
            self.create(1, opcode, 8);
        }
        // Block 3, to page 10.
        let data = BASE + 10 * PAGE;
        self.push(1, &entry(2, 0, 1, [data, 0], &[3, 0, 0]));
        self.serve();
        let answer = |at: u64| self.memory.load(at + 14).unwrap();
        assert_eq!((answer(cq(0)), answer(cq(0) + 16)), (1, 1));
        assert_eq!(answer(cq(1)), 1, "a block cannot be read after a reset");
    }
}

fn entry(opcode: u8, flags: u8, nsid: u32, prp: [u64; 2], dwords: &[u32]) -> [u8; 64] {
    let mut entry = [0; 64];
    entry[0] = opcode;
    entry[1] = flags;
    entry[4..8].copy_from_slice(&nsid.to_le_bytes());
    entry[24..32].copy_from_slice(&prp[0].to_le_bytes());
    entry[32..40].copy_from_slice(&prp[1].to_le_bytes());
    for (place, dword) in entry[40..].chunks_exact_mut(4).zip(dwords) {
        place.copy_from_slice(&dword.to_le_bytes());
    }
    entry
}
