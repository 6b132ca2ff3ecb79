//! Requests to a disk, a number of them at a time.

use std::fs::File;
use std::io::{Seek as _, SeekFrom};
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use io_uring::{IoUring, opcode, types};
use ioregion_bench::vduse::{Burst, Load};

use super::processes::Cpu;

/// A disk past the page cache.
pub struct Disk {
    file: File,
    bytes: u64,
}

/// Memory that O_DIRECT takes.
#[repr(C, align(4096))]
#[derive(Clone, Copy)]
struct Page([u8; 4096]);

impl Disk {
    pub fn open(path: &Path) -> Result<Self> {
        let mut options = File::options();
        options.read(true).write(true).custom_flags(libc::O_DIRECT);
        let mut file = options
            .open(path)
            .with_context(|| format!("opening {}", path.display()))?;
        let bytes = file.seek(SeekFrom::End(0))?;
        Ok(Self { file, bytes })
    }

    /// Keeps the load's number of requests under way until all are done, at random places that
    /// follow from `seed`; `cpu` tells what the service has used.
    pub fn burst(&self, load: &Load, seed: u64, cpu: impl Fn() -> Result<Cpu>) -> Result<Burst> {
        let mut requests = Requests::new(self, load, seed)?;
        let used = cpu()?;
        let started = Instant::now();
        if let Err(error) = requests.run() {
            // Other requests may be under way, so their memory stays for ever.
            std::mem::forget(requests);
            return Err(error);
        }
        let time = started.elapsed();
        let used = cpu()?.since(&used)?;
        let number = f64::from(load.requests);
        Ok(Burst {
            rate: number / time.as_secs_f64(),
            cpu_ns: used.as_nanos() as f64 / number,
        })
    }
}

struct Requests<'a> {
    ring: IoUring,
    load: &'a Load,
    fd: types::Fd,
    /// One buffer for each request under way, one behind the other.
    memory: Vec<Page>,
    places: u64,
    next: u64,
    random: Random,
}

/// Knuth's generator, whose high bits are good enough to go anywhere on a disk.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        let mut random = Self(seed);
        // Seeds next to each other begin with numbers next to each other.
        random.next();
        random
    }

    pub fn next(&mut self) -> u64 {
        self.0 = (self.0)
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        self.0
    }
}

impl<'a> Requests<'a> {
    fn new(disk: &Disk, load: &'a Load, seed: u64) -> Result<Self> {
        let pages = (load.bytes * load.depth) as usize / size_of::<Page>();
        let places = disk.bytes / u64::from(load.bytes);
        ensure!(places > 0, "the disk is too small");
        Ok(Self {
            ring: IoUring::new(load.depth.next_power_of_two()).context("io_uring")?,
            load,
            fd: types::Fd(disk.file.as_raw_fd()),
            memory: vec![Page([0x5a; 4096]); pages],
            places,
            next: 0,
            random: Random::new(seed),
        })
    }

    fn place(&mut self) -> u64 {
        let place = if self.load.sequential {
            self.next
        } else {
            self.random.next() >> 33
        };
        self.next += 1;
        place % self.places * u64::from(self.load.bytes)
    }

    fn add(&mut self, buffer: u64) -> Result<()> {
        let (place, bytes) = (self.place(), self.load.bytes);
        let first = buffer as usize * bytes as usize / size_of::<Page>();
        let start = (&raw mut self.memory[first]).cast::<u8>();
        let entry = match self.load.write {
            false => opcode::Read::new(self.fd, start, bytes)
                .offset(place)
                .build(),
            true => opcode::Write::new(self.fd, start, bytes)
                .offset(place)
                .build(),
        };
        // SAFETY: The buffer lies in `memory`, no other request has it, and `run` returns only
        // when no request is under way, or fails and the memory stays for ever.
        unsafe { self.ring.submission().push(&entry.user_data(buffer)) }.context("a full ring")
    }

    fn run(&mut self) -> Result<()> {
        let mut left = self.load.requests;
        let mut under_way = self.load.depth.min(left);
        for buffer in 0..u64::from(under_way) {
            self.add(buffer)?;
            left -= 1;
        }
        while under_way > 0 {
            self.ring.submit_and_wait(1)?;
            let done: Vec<_> = self.ring.completion().collect();
            for entry in done {
                under_way -= 1;
                let moved = u32::try_from(entry.result()).map_err(|_| {
                    std::io::Error::from_raw_os_error(entry.result().saturating_neg())
                });
                let moved = moved.context("a request failed")?;
                ensure!(moved == self.load.bytes, "a request moved {moved} bytes");
                if left > 0 {
                    left -= 1;
                    under_way += 1;
                    self.add(entry.user_data())?;
                }
            }
        }
        Ok(())
    }
}
