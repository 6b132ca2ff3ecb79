//! Load on a disk that finds out what it loses, mixes up or does twice.
//!
//! Each thread has blocks of its own and writes and reads them past all caches, in requests of
//! mixed sizes. A block says which one it is and how often it was written, in all of its bytes: a
//! read finds exactly what was written last, or fails. A request that is carried out again after it
//! was given back would put something older there.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::{LONG, buffer};

const BLOCK: usize = 4096;
/// Blocks of a request at most.
const MOST: u64 = 16;

/// What was asked for and came back.
#[derive(Debug, Default)]
struct Counts {
    reads: AtomicU64,
    writes: AtomicU64,
    flushes: AtomicU64,
}

/// Threads that write, read and flush until they are stopped.
pub struct Load {
    disk: PathBuf,
    image: PathBuf,
    stop: Arc<AtomicBool>,
    counts: Arc<Counts>,
    threads: Vec<JoinHandle<Vec<u64>>>,
    before: Stat,
}

/// What the kernel counts of a disk: what came back, or was merged with something that did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stat {
    reads: u64,
    writes: u64,
    in_flight: u64,
}

fn stat(disk: &Path) -> Stat {
    let name = disk.file_name().unwrap();
    let text = fs::read_to_string(Path::new("/sys/block").join(name).join("stat")).unwrap();
    let words: Vec<u64> = text
        .split_whitespace()
        .map(|word| word.parse().unwrap())
        .collect();
    Stat {
        reads: words[0] + words[1],
        writes: words[4] + words[5],
        in_flight: words[8],
    }
}

/// What the kernel counts once it has looked for partitions.
fn at_rest(disk: &Path) -> Stat {
    // Opening waits for that.
    drop(open(disk, libc::O_DIRECT));
    let until = Instant::now() + LONG;
    loop {
        let before = stat(disk);
        std::thread::sleep(Duration::from_millis(300));
        if stat(disk) == before && before.in_flight == 0 {
            return before;
        }
        assert!(Instant::now() < until, "the disk is never at rest");
    }
}

impl Load {
    /// Starts `threads` threads, each with `blocks` blocks of 4096 bytes.
    pub fn start(disk: &Path, image: &Path, threads: u64, blocks: u64, seed: u64) -> Self {
        println!("load: seed {seed}");
        let stop = Arc::new(AtomicBool::new(false));
        let counts = Arc::new(Counts::default());
        let before = at_rest(disk);
        let threads = (0..threads).map(|thread| {
            let worker = Worker {
                disk: open(disk, libc::O_DIRECT),
                image: open(image, 0),
                first: thread * blocks,
                versions: vec![0; usize::try_from(blocks).unwrap()],
                random: Random::new(seed ^ (thread + 1) << 32),
                counts: Arc::clone(&counts),
            };
            let stop = Arc::clone(&stop);
            std::thread::spawn(move || worker.run(&stop))
        });
        Self {
            disk: disk.into(),
            image: image.into(),
            threads: threads.collect(),
            stop,
            counts,
            before,
        }
    }

    /// Requests that came back.
    pub fn done(&self) -> u64 {
        let Counts {
            reads,
            writes,
            flushes,
        } = &*self.counts;
        [reads, writes, flushes]
            .map(|count| count.load(Ordering::Relaxed))
            .iter()
            .sum()
    }

    /// Waits until so many more requests came back.
    pub fn progress(&self, requests: u64) {
        let (from, until) = (self.done(), Instant::now() + LONG);
        while self.done() < from + requests {
            assert!(
                !self.threads.iter().any(JoinHandle::is_finished),
                "a thread failed"
            );
            assert!(
                Instant::now() < until,
                "requests hang: {:?}",
                stat(&self.disk)
            );
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Stops, and compares all blocks and all counts.
    pub fn finish(self) {
        self.stop.store(true, Ordering::Relaxed);
        let until = Instant::now() + LONG;
        while !self.threads.iter().all(JoinHandle::is_finished) {
            assert!(
                Instant::now() < until,
                "requests hang: {:?}",
                stat(&self.disk)
            );
            std::thread::sleep(Duration::from_millis(10));
        }
        let threads = self.threads.into_iter();
        let versions: Vec<u64> = threads.flat_map(|thread| thread.join().unwrap()).collect();
        // Everything that was asked for came back, once.
        let after = stat(&self.disk);
        let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let expected = Stat {
            reads: self.before.reads + count(&self.counts.reads),
            // A flush counts as a write of nothing.
            writes: self.before.writes + count(&self.counts.writes) + count(&self.counts.flushes),
            in_flight: 0,
        };
        assert_eq!(after, expected, "{:?}", self.counts);
        let mut data = buffer();
        for file in [open(&self.disk, libc::O_DIRECT), open(&self.image, 0)] {
            for (block, &version) in (0..).zip(&versions) {
                let at = &mut data.0[..BLOCK];
                file.read_exact_at(at, block * BLOCK as u64).unwrap();
                check(at, block, version);
            }
        }
        println!("load: {:?}", self.counts);
    }
}

fn open(path: &Path, flags: i32) -> File {
    let mut options = OpenOptions::new();
    options.read(true).write(true).custom_flags(flags);
    options.open(path).unwrap()
}

struct Worker {
    disk: File,
    image: File,
    /// The first of its blocks.
    first: u64,
    /// How often each was written.
    versions: Vec<u64>,
    random: Random,
    counts: Arc<Counts>,
}

impl Worker {
    fn run(mut self, stop: &AtomicBool) -> Vec<u64> {
        let mut data = buffer();
        while !stop.load(Ordering::Relaxed) {
            let start = self.random.below(self.versions.len() as u64);
            let count = 1 + self
                .random
                .below(MOST.min(self.versions.len() as u64 - start));
            let blocks = start..start + count;
            let bytes = &mut data.0[..usize::try_from(count).unwrap() * BLOCK];
            let at = (self.first + start) * BLOCK as u64;
            match self.random.below(16) {
                0..8 => {
                    for (bytes, block) in bytes.chunks_mut(BLOCK).zip(blocks) {
                        let version = &mut self.versions[usize::try_from(block).unwrap()];
                        *version += 1;
                        fill(bytes, self.first + block, *version);
                    }
                    self.disk.write_all_at(bytes, at).unwrap();
                    self.counts.writes.fetch_add(1, Ordering::Relaxed);
                }
                8..15 => {
                    self.disk.read_exact_at(bytes, at).unwrap();
                    self.check(bytes, start);
                    self.counts.reads.fetch_add(1, Ordering::Relaxed);
                }
                _ => {
                    self.disk.sync_data().unwrap();
                    self.counts.flushes.fetch_add(1, Ordering::Relaxed);
                    // Where it is safe by now.
                    self.image.read_exact_at(bytes, at).unwrap();
                    self.check(bytes, start);
                }
            }
        }
        self.versions
    }

    fn check(&self, bytes: &[u8], start: u64) {
        for (bytes, block) in bytes.chunks(BLOCK).zip(start..) {
            let version = self.versions[usize::try_from(block).unwrap()];
            check(bytes, self.first + block, version);
        }
    }
}

/// The contents of a block that was written so often.
fn words(block: u64, version: u64) -> impl Iterator<Item = u64> {
    let mut random = Random::new(block << 32 ^ version);
    let rest = std::iter::repeat_with(move || random.next());
    [block, version].into_iter().chain(rest)
}

fn fill(bytes: &mut [u8], block: u64, version: u64) {
    for (to, word) in bytes.chunks_mut(8).zip(words(block, version)) {
        to.copy_from_slice(&word.to_le_bytes());
    }
}

fn check(bytes: &[u8], block: u64, version: u64) {
    let mut is = bytes
        .chunks(8)
        .map(|word| u64::from_le_bytes(word.try_into().unwrap()));
    let right = match version {
        0 => is.all(|word| word == 0),
        _ => is.eq(words(block, version).take(BLOCK / 8)),
    };
    let word = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
    assert!(
        right,
        "block {block}, version {version}: it says block {}, version {}",
        word(0),
        word(8)
    );
}

/// Numbers that look random.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    pub fn below(&mut self, limit: u64) -> u64 {
        // The upper half is better mixed.
        (self.next() >> 32) % limit
    }
}
