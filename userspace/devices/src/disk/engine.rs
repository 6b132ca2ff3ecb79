//! Work on an image over io_uring: many pieces at a time, finished in whatever order, and without
//! a copy where the driver's memory can be pinned.

use std::io;
use std::os::fd::BorrowedFd;

use nix::errno::Errno;

use super::buffer::Buffer;
use super::ring::{self, Operation, Ring, Target};
use super::{CHUNK, Data, Failure, Finished, Image, Range, Work};
use crate::memory::{Access, Memory, MemoryError, Pin};

/// Bytes of this process's memory for work under way. More work waits.
const MOST_COPIED: usize = 4 << 20;

/// Whether this system has what an engine needs.
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

/// Work under way on one ring. Used by one thread: the one that made it.
pub(crate) struct Engine<D> {
    ring: Ring<Job<D>>,
    /// Bytes of this process's memory that work under way has.
    copied: usize,
}

/// A piece of work under way.
struct Job<D> {
    data: D,
    work: Work,
    /// Bytes read or written, or ranges done.
    done: u32,
    /// Bytes of this process's memory that it has.
    copied: usize,
    settled: bool,
}

impl<D: Data> Engine<D> {
    pub(super) fn new(image: &Image) -> io::Result<Self> {
        Ok(Self {
            ring: Ring::new(image.descriptors())?,
            copied: 0,
        })
    }

    /// Whether there is room for more.
    pub(super) fn wants(&self) -> bool {
        self.ring.has_room() && self.copied < MOST_COPIED
    }

    pub(super) fn submit(
        &mut self,
        image: &Image,
        work: Work,
        data: D,
        memory: &dyn Memory,
    ) -> Option<Finished<D>> {
        let job = Job {
            data,
            work,
            done: 0,
            copied: 0,
            settled: false,
        };
        self.go_on(image, job, memory)
    }

    pub(super) fn flush(&mut self) -> io::Result<()> {
        self.ring.submit()
    }

    pub(super) fn finished(&mut self, image: &Image, memory: &dyn Memory) -> Option<Finished<D>> {
        while let Some((mut job, held, result)) = self.ring.finished() {
            self.copied -= std::mem::take(&mut job.copied);
            let done = match note(image, &mut job, held, result, memory) {
                Ok(()) => self.go_on(image, job, memory),
                Err(failure) => Some((job.data, Err(failure))),
            };
            if done.is_some() {
                return done;
            }
        }
        None
    }

    pub(super) fn event(&self) -> BorrowedFd<'_> {
        self.ring.event()
    }

    /// Goes on with a piece of work, and gives it back where nothing is left to do.
    fn go_on(
        &mut self,
        image: &Image,
        mut job: Job<D>,
        memory: &dyn Memory,
    ) -> Option<Finished<D>> {
        match next(image, &mut job, memory) {
            Ok(Some(operation)) => {
                self.copied += job.copied;
                match self.ring.add(operation, job) {
                    Ok(()) => None,
                    // `wants` has said so.
                    Err(job) => {
                        self.copied -= job.copied;
                        let full = io::Error::from(Errno::EAGAIN);
                        Some((job.data, Err(full.into())))
                    }
                }
            }
            Ok(None) => Some((job.data, Ok(()))),
            Err(failure) => Some((job.data, Err(failure))),
        }
    }
}

/// The next operation of a piece of work.
fn next<D: Data>(
    image: &Image,
    job: &mut Job<D>,
    memory: &dyn Memory,
) -> Result<Option<Operation>, Failure> {
    let (data, done) = (&job.data, job.done);
    match &job.work {
        &Work::Read { at, len } if done < len => {
            let (at, left) = (at + u64::from(done), len - done);
            let pin = || data.pin(memory, done, left, Access::Write);
            let (target, held) = reach(image, at, left, pin)?;
            job.copied = held.copied();
            Ok(Some(Operation::Read(target, at, held.into())))
        }
        &Work::Write { at, len, safe } if done < len => {
            let (at, left) = (at + u64::from(done), len - done);
            let pin = || data.pin(memory, done, left, Access::Read);
            let (target, mut held) = reach(image, at, left, pin)?;
            if let Held::Copied(buffer) = &mut held {
                data.read(memory, done, buffer.bytes())?;
            }
            job.copied = held.copied();
            Ok(Some(Operation::Write {
                target,
                at,
                memory: held.into(),
                safe,
            }))
        }
        Work::Ranges { zero, list, safe } => match list.get(done as usize) {
            Some(range) => {
                let mode = Image::allocation(*zero, range.unmap);
                Ok(Some(Operation::Allocate(mode, range.at, range.len)))
            }
            None if *safe && !job.settled => Ok(Some(Operation::Sync)),
            None => Ok(None),
        },
        Work::Flush if !job.settled => Ok(Some(Operation::Sync)),
        _ => Ok(None),
    }
}

/// Notes what an operation has done.
fn note<D: Data>(
    image: &Image,
    job: &mut Job<D>,
    held: Option<ring::Memory>,
    result: io::Result<u32>,
    memory: &dyn Memory,
) -> Result<(), Failure> {
    let moved = match result {
        Err(error) if matches!(error.raw_os_error(), Some(libc::EINTR | libc::EAGAIN)) => {
            return Ok(());
        }
        Err(error) => match &job.work {
            Work::Ranges { zero, list, .. } if (job.done as usize) < list.len() => {
                cannot(image, *zero, &list[job.done as usize], error)?;
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
                    job.data.write(memory, job.done, bytes)?;
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
fn cannot(image: &Image, zero: bool, range: &Range, error: io::Error) -> io::Result<()> {
    match error.raw_os_error() {
        Some(libc::EOPNOTSUPP | libc::ENOSYS) if zero => image.write_zeroes(range.at, range.len),
        // Advice that cannot be followed.
        Some(libc::EOPNOTSUPP | libc::ENOSYS) => Ok(()),
        _ => Err(error),
    }
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
