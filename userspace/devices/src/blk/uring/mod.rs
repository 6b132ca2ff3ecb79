//! Requests to a disk over io_uring: many at a time, finished in whatever order, and without a
//! copy where the driver's memory can be pinned.

mod ring;

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use nix::errno::Errno;

use super::Blk;
use super::buffer::Buffer;
use super::image::Image;
use super::request::{self, CHUNK, Failure, Range, Request, Work};
use crate::virtio::{Broken, Chain, Done, Lane, Memory, MemoryError, Pin};
use ring::{Operation, Ring, Target};

/// Bytes of this process's memory for requests under way. More requests wait.
const MOST_COPIED: usize = 4 << 20;

/// Whether this system has what the lane needs.
///
/// # Errors
///
/// Why not.
pub(super) fn check(image: &Image) -> io::Result<()> {
    Ring::<()>::new(image.descriptors()).map(drop)
}

/// What an error of [`check`] is likely to come from.
pub(super) fn remedy(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::EPERM | libc::EACCES) => {
            "not allowed: the sysctl kernel.io_uring_disabled, or a seccomp filter"
        }
        Some(libc::ENOSYS) => "not in this kernel, or a seccomp filter",
        Some(libc::ENOMEM) => "no memory to lock: the limit RLIMIT_MEMLOCK",
        _ => "the system's limits",
    }
}

/// Serves a queue.
pub(super) struct UringLane {
    disk: Arc<Blk>,
    /// The driver counts on every write being safe.
    settles: bool,
    ring: Ring<Job>,
    /// Bytes of this process's memory that requests under way have.
    copied: usize,
}

/// A request under way.
struct Job {
    chain: Chain,
    request: Request,
    work: Work,
    /// Bytes read or written, or ranges done.
    done: u32,
    /// Bytes of this process's memory that it has.
    copied: usize,
    settled: bool,
}

impl UringLane {
    pub(super) fn new(disk: Arc<Blk>, features: u64) -> io::Result<Self> {
        Ok(Self {
            ring: Ring::new(disk.image.descriptors())?,
            settles: request::settles(features),
            disk,
            copied: 0,
        })
    }

    /// Goes on with a request, and gives it back where nothing is left to do.
    fn go_on(&mut self, mut job: Job, memory: &dyn Memory) -> Result<Option<Done>, Broken> {
        match self.next(&mut job, memory) {
            Ok(Some(operation)) => {
                self.copied += job.copied;
                match self.ring.add(operation, job) {
                    Ok(()) => Ok(None),
                    // `wants` has said so.
                    Err(job) => {
                        self.copied -= job.copied;
                        let full = io::Error::from(Errno::EAGAIN);
                        finish(job, memory, Err(full.into())).map(Some)
                    }
                }
            }
            Ok(None) => {
                let written = match job.work {
                    Work::Read { len, .. } => len,
                    _ => 0,
                };
                finish(job, memory, Ok(written)).map(Some)
            }
            Err(failure) => finish(job, memory, Err(failure)).map(Some),
        }
    }

    /// The next operation of a request.
    fn next(&self, job: &mut Job, memory: &dyn Memory) -> Result<Option<Operation>, Failure> {
        let image = &self.disk.image;
        match &job.work {
            &Work::Read { place, len } if job.done < len => {
                let (at, left) = (place + u64::from(job.done), len - job.done);
                let (chain, done) = (&job.chain, job.done);
                let pin = || chain.pin_writable(memory, done, left);
                let (target, held) = reach(image, at, left, pin)?;
                job.copied = held.copied();
                Ok(Some(Operation::Read(target, at, held.into())))
            }
            &Work::Write { place, len } if job.done < len => {
                let (at, left) = (place + u64::from(job.done), len - job.done);
                let (chain, offset) = (&job.chain, request::HEADER + job.done);
                let pin = || chain.pin_readable(memory, offset, left);
                let (target, mut held) = reach(image, at, left, pin)?;
                if let Held::Copied(buffer) = &mut held {
                    chain.read(memory, offset, buffer.bytes())?;
                }
                job.copied = held.copied();
                Ok(Some(Operation::Write {
                    target,
                    at,
                    memory: held.into(),
                    safe: self.settles,
                }))
            }
            Work::Ranges { zero, list } => match list.get(job.done as usize) {
                Some(range) => {
                    let mode = Image::allocation(*zero, range.unmap);
                    Ok(Some(Operation::Allocate(mode, range.at, range.len)))
                }
                None if self.settles && !job.settled => Ok(Some(Operation::Sync)),
                None => Ok(None),
            },
            Work::Flush if !job.settled => Ok(Some(Operation::Sync)),
            _ => Ok(None),
        }
    }

    /// Notes what an operation has done.
    fn note(
        &self,
        job: &mut Job,
        held: Option<ring::Memory>,
        result: io::Result<u32>,
        memory: &dyn Memory,
    ) -> Result<(), Failure> {
        let moved = match result {
            Err(error) if matches!(error.raw_os_error(), Some(libc::EINTR | libc::EAGAIN)) => {
                return Ok(());
            }
            Err(error) => match &job.work {
                Work::Ranges { zero, list } if (job.done as usize) < list.len() => {
                    self.cannot(*zero, &list[job.done as usize], error)?;
                    0
                }
                _ => return Err(error.into()),
            },
            Ok(moved) => moved,
        };
        match &job.work {
            Work::Read { .. } => {
                if moved == 0 {
                    return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
                }
                match held {
                    Some(ring::Memory::Owned(mut buffer)) => {
                        let bytes = buffer.bytes().get(..moved as usize).unwrap_or_default();
                        job.chain.write(memory, job.done, bytes)?;
                    }
                    Some(ring::Memory::Pinned(pin)) => intact(&pin)?,
                    None => {}
                }
                job.done = job.done.saturating_add(moved);
            }
            Work::Write { .. } => {
                if moved == 0 {
                    return Err(io::Error::from(io::ErrorKind::WriteZero).into());
                }
                if let Some(ring::Memory::Pinned(pin)) = held {
                    intact(&pin)?;
                }
                job.done = job.done.saturating_add(moved);
            }
            Work::Ranges { list, .. } if (job.done as usize) < list.len() => job.done += 1,
            _ => job.settled = true,
        }
        Ok(())
    }

    /// What to do about a range where the file system cannot give space back or zero it.
    fn cannot(&self, zero: bool, range: &Range, error: io::Error) -> io::Result<()> {
        match error.raw_os_error() {
            Some(libc::EOPNOTSUPP | libc::ENOSYS) if zero => {
                self.disk.image.write_zeroes(range.at, range.len)
            }
            // Advice that cannot be followed.
            Some(libc::EOPNOTSUPP | libc::ENOSYS) => Ok(()),
            _ => Err(error),
        }
    }
}

impl Lane for UringLane {
    fn wants(&mut self) -> bool {
        self.ring.has_room() && self.copied < MOST_COPIED
    }

    fn submit(&mut self, chain: Chain, memory: &dyn Memory) -> Result<Option<Done>, Broken> {
        let request = Request::parse(&chain, memory)?;
        let work = match request.work(&self.disk, &chain, memory) {
            Ok(Work::Serial) => {
                let told = request.serial(&self.disk, &chain, memory);
                let written = request.finish(&chain, memory, told)?;
                return Ok(Some(Done { chain, written }));
            }
            Ok(work) => work,
            Err(failure) => {
                let written = request.finish(&chain, memory, Err(failure))?;
                return Ok(Some(Done { chain, written }));
            }
        };
        let job = Job {
            chain,
            request,
            work,
            done: 0,
            copied: 0,
            settled: false,
        };
        self.go_on(job, memory)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.ring.submit()
    }

    fn finished(&mut self, memory: &dyn Memory) -> Result<Option<Done>, Broken> {
        while let Some((mut job, held, result)) = self.ring.finished() {
            self.copied -= std::mem::take(&mut job.copied);
            let done = match self.note(&mut job, held, result, memory) {
                Ok(()) => self.go_on(job, memory)?,
                Err(failure) => Some(finish(job, memory, Err(failure))?),
            };
            if done.is_some() {
                return Ok(done);
            }
        }
        Ok(None)
    }

    fn event(&self) -> Option<BorrowedFd<'_>> {
        Some(self.ring.event())
    }
}

fn finish(job: Job, memory: &dyn Memory, result: Result<u32, Failure>) -> Result<Done, Broken> {
    let Job { chain, request, .. } = job;
    let written = request.finish(&chain, memory, result)?;
    Ok(Done { chain, written })
}

fn intact(pin: &Pin) -> Result<(), MemoryError> {
    match pin.intact() {
        true => Ok(()),
        false => Err(MemoryError::Vanished { addr: 0 }),
    }
}

/// Where the bytes of a transfer are.
enum Held {
    Pinned(Pin),
    Copied(Buffer),
}

impl Held {
    fn copied(&self) -> usize {
        match self {
            Self::Pinned(_) => 0,
            Self::Copied(buffer) => buffer.len(),
        }
    }
}

impl From<Held> for ring::Memory {
    fn from(held: Held) -> Self {
        match held {
            Held::Pinned(pin) => Self::Pinned(pin),
            Held::Copied(buffer) => Self::Owned(buffer),
        }
    }
}

/// By which descriptor, and in which memory, bytes at a place in the image are reached: the
/// driver's own where the system takes it, else a copy of the first of them.
fn reach(
    image: &Image,
    at: u64,
    len: u32,
    pin: impl FnOnce() -> Result<Option<Pin>, MemoryError>,
) -> Result<(Target, Held), MemoryError> {
    let direct = image.is_direct(at, len.into());
    let target = if direct {
        Target::Direct
    } else {
        Target::Buffered
    };
    if let Some(pin) = pin()?
        && (!direct || image.takes(pin.ranges()))
    {
        return Ok((target, Held::Pinned(pin)));
    }
    let len = len.min(CHUNK) as usize;
    Ok((target, Held::Copied(Buffer::new(len, image.memory_align()))))
}
