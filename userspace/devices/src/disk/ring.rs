//! The floor of the disk on io_uring: everything that the kernel uses belongs to the ring until
//! the kernel is done with it.

use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd, RawFd};
use std::time::Duration;

use io_uring::{IoUring, Probe, cqueue, opcode, squeue, types};

use super::buffer::Buffer;
use crate::memory::Pin;

/// Operations that a ring has at a time.
pub(super) const ENTRIES: u32 = 256;

/// How often submitting is tried again where the system is short of memory and nothing is under
/// way, and the pause before each.
const TRIES: u32 = 100;
const PAUSE: Duration = Duration::from_millis(10);

/// Memory that an operation reads or writes.
#[derive(Debug)]
pub(super) enum Memory {
    Pinned(Pin),
    Owned(Buffer),
}

/// Which of the two descriptors that a ring was made with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Target {
    Buffered,
    Direct,
}

/// What the kernel shall do.
#[derive(Debug)]
pub(super) enum Operation {
    /// Reads from a place in the file.
    Read(Target, u64, Memory),
    /// Writes to a place in the file; `safe`: it is done when the data is on the medium.
    Write {
        target: Target,
        at: u64,
        memory: Memory,
        safe: bool,
    },
    /// Waits until everything written is on the medium.
    Sync,
    /// `fallocate`: mode, place and bytes.
    Allocate(i32, u64, u64),
}

#[derive(Debug)]
struct Slot<T> {
    task: T,
    memory: Option<Memory>,
}

/// A ring, with a task for each operation.
pub(super) struct Ring<T> {
    ring: IoUring,
    slots: Vec<Option<Slot<T>>>,
    free: Vec<usize>,
}

impl<T> Ring<T> {
    /// A ring for operations on a file, by a descriptor with page cache and one without. They
    /// may be the same.
    ///
    /// # Errors
    ///
    /// Where the system has no io_uring, does not allow it, or lacks an operation.
    pub(super) fn new(files: [RawFd; 2]) -> io::Result<Self> {
        // There is always room for completions: twice as much as for operations. They are taken
        // after system calls of this thread: nothing need interrupt it.
        let modern = IoUring::builder()
            .setup_coop_taskrun()
            .setup_taskrun_flag()
            .setup_single_issuer()
            .build(ENTRIES);
        let ring = match modern {
            // Before Linux 6.0.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => IoUring::new(ENTRIES),
            made => made,
        }?;
        let mut probe = Probe::new();
        ring.submitter().register_probe(&mut probe)?;
        let needed = [
            opcode::Read::CODE,
            opcode::Readv::CODE,
            opcode::Write::CODE,
            opcode::Writev::CODE,
            opcode::Fsync::CODE,
            opcode::Fallocate::CODE,
        ];
        if !needed.into_iter().all(|code| probe.is_supported(code)) {
            return Err(io::ErrorKind::Unsupported.into());
        }
        ring.submitter().register_files(&files)?;
        let entries = ENTRIES as usize;
        Ok(Self {
            ring,
            slots: (0..entries).map(|_| None).collect(),
            free: (0..entries).rev().collect(),
        })
    }

    /// Whether there is room for an operation.
    pub(super) fn has_room(&self) -> bool {
        !self.free.is_empty()
    }

    /// Readable when something may be [`finished`](Self::finished).
    pub(super) fn event(&self) -> BorrowedFd<'_> {
        // SAFETY: The ring's descriptor stays open as long as the ring.
        unsafe { BorrowedFd::borrow_raw(self.ring.as_raw_fd()) }
    }

    /// Takes an operation; [`submit`](Self::submit) sets about it. Gives the task back where
    /// there is no room.
    pub(super) fn add(&mut self, operation: Operation, task: T) -> Result<(), T> {
        let Some(index) = self.free.pop() else {
            return Err(task);
        };
        let (entry, memory) = entry(operation);
        let entry = entry.user_data(index as u64);
        // SAFETY: The memory is the slot's until the completion, or for ever: pinned memory
        // stays mapped as long as its pin, and a buffer's bytes stay where they are when it is
        // moved. Nothing touches them before.
        let pushed = unsafe { self.ring.submission().push(&entry) };
        if pushed.is_err() {
            self.free.push(index);
            return Err(task);
        }
        self.slots[index] = Some(Slot { task, memory });
        Ok(())
    }

    /// Hands the kernel what was added, and has it say what is finished.
    ///
    /// # Errors
    ///
    /// The system's, where trying again does not help.
    pub(super) fn submit(&mut self) -> io::Result<()> {
        let mut tries = 0;
        loop {
            let (waiting, news) = {
                let queue = self.ring.submission();
                (queue.len(), queue.taskrun())
            };
            if waiting == 0 && !news {
                return Ok(());
            }
            let Err(error) = self.enter(0, news) else {
                continue;
            };
            match error.raw_os_error() {
                Some(libc::EINTR) => {}
                // Short of memory, or of room for completions. What is under way frees some,
                // and brings the worker back here.
                Some(libc::EAGAIN | libc::EBUSY) => {
                    if self.under_way() > waiting {
                        return Ok(());
                    }
                    tries += 1;
                    if tries == TRIES {
                        return Err(error);
                    }
                    std::thread::sleep(PAUSE);
                }
                _ => return Err(error),
            }
        }
    }

    fn enter(&mut self, wait: usize, news: bool) -> io::Result<usize> {
        const GETEVENTS: u32 = 1;
        let waiting = self.ring.submission().len();
        let waiting = u32::try_from(waiting).unwrap_or(u32::MAX);
        let flags = if wait > 0 || news { GETEVENTS } else { 0 };
        let wait = u32::try_from(wait).unwrap_or(u32::MAX);
        // SAFETY: No argument beyond the numbers, and all entries were pushed by `add`.
        unsafe {
            self.ring
                .submitter()
                .enter::<libc::sigset_t>(waiting, wait, flags, None)
        }
    }

    /// Operations that are not finished.
    fn under_way(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// An operation that is finished: its task, its memory, and how many bytes were moved.
    pub(super) fn finished(&mut self) -> Option<(T, Option<Memory>, io::Result<u32>)> {
        loop {
            let entry: cqueue::Entry = self.ring.completion().next()?;
            // Ours all are; another one would be nobody's.
            let Ok(index) = usize::try_from(entry.user_data()) else {
                continue;
            };
            let Some(slot) = self.slots.get_mut(index).and_then(Option::take) else {
                continue;
            };
            self.free.push(index);
            let moved = u32::try_from(entry.result())
                .map_err(|_| io::Error::from_raw_os_error(entry.result().saturating_neg()));
            return Some((slot.task, slot.memory, moved));
        }
    }
}

impl<T> Drop for Ring<T> {
    /// Cancels what can be cancelled and waits for the rest.
    fn drop(&mut self) {
        while self.under_way() > 0 {
            // What the kernel was not handed yet is handed to it, to be told of as everything
            // else; where it does not take it, waiting fails, too.
            while self.enter(0, true).is_ok() && !self.ring.submission().is_empty() {}
            let any = types::CancelBuilder::any();
            // Nothing to cancel is as good, and so is a kernel that cannot (before 6.0).
            let _ = self.ring.submitter().register_sync_cancel(None, any);
            while self.finished().is_some() {}
            if self.under_way() == 0 {
                return;
            }
            if let Err(error) = self.enter(1, true)
                && !matches!(
                    error.raw_os_error(),
                    Some(libc::EINTR | libc::EAGAIN | libc::EBUSY)
                )
            {
                // Nobody will say when the kernel is done. So the memory stays for ever.
                tracing::error!(%error, "requests under way are abandoned with their memory");
                std::mem::forget(std::mem::take(&mut self.slots));
                return;
            }
            while self.finished().is_some() {}
        }
    }
}

/// The kernel's form of an operation, and the memory that it uses.
fn entry(operation: Operation) -> (squeue::Entry, Option<Memory>) {
    // In the order of `Ring::new`.
    let fixed = |target| match target {
        Target::Buffered => types::Fixed(0),
        Target::Direct => types::Fixed(1),
    };
    match operation {
        Operation::Read(target, at, mut memory) => {
            let file = fixed(target);
            let entry = match place(&mut memory) {
                Place::One(start, len) => opcode::Read::new(file, start, len).offset(at).build(),
                Place::Many(ranges, count) => {
                    opcode::Readv::new(file, ranges, count).offset(at).build()
                }
            };
            (entry, Some(memory))
        }
        Operation::Write {
            target,
            at,
            mut memory,
            safe,
        } => {
            let file = fixed(target);
            let flags = if safe { libc::RWF_DSYNC } else { 0 };
            let entry = match place(&mut memory) {
                Place::One(start, len) => opcode::Write::new(file, start, len)
                    .offset(at)
                    .rw_flags(flags)
                    .build(),
                Place::Many(ranges, count) => opcode::Writev::new(file, ranges, count)
                    .offset(at)
                    .rw_flags(flags)
                    .build(),
            };
            (entry, Some(memory))
        }
        Operation::Sync => {
            let sync = opcode::Fsync::new(fixed(Target::Buffered));
            (sync.flags(types::FsyncFlags::DATASYNC).build(), None)
        }
        Operation::Allocate(mode, at, len) => {
            let allocate = opcode::Fallocate::new(fixed(Target::Buffered), len);
            (allocate.offset(at).mode(mode).build(), None)
        }
    }
}

/// Where an operation's memory is.
enum Place {
    One(*mut u8, u32),
    Many(*const libc::iovec, u32),
}

fn place(memory: &mut Memory) -> Place {
    let length = |len: usize| u32::try_from(len).unwrap_or(u32::MAX);
    match memory {
        Memory::Pinned(pin) => match pin.ranges() {
            [range] => Place::One(range.iov_base.cast(), length(range.iov_len)),
            // On the heap: they stay where they are when the pin is moved.
            ranges => Place::Many(ranges.as_ptr(), length(ranges.len())),
        },
        Memory::Owned(buffer) => {
            let bytes = buffer.bytes();
            Place::One(bytes.as_mut_ptr(), length(bytes.len()))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd as _;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};

    use crate::memory::Hold;

    #[derive(Default)]
    struct Released(AtomicBool);

    impl Hold for Released {
        fn intact(&self) -> bool {
            true
        }

        fn release(&self) {
            self.0.store(true, Ordering::SeqCst);
        }
    }

    /// A ring with a read that nothing ends: from a pipe that stays empty.
    fn waiting(submit: bool) -> (Ring<u8>, io::PipeWriter, Arc<Released>) {
        let (reader, writer) = io::pipe().unwrap();
        let fd = reader.as_fd().as_raw_fd();
        // The ring has a reference of its own.
        let mut ring = Ring::new([fd, fd]).unwrap();
        let released = Arc::new(Released::default());
        let place = Box::leak(Box::new([0u8; 16]));
        let mut pin = Pin::new();
        pin.keep(Arc::clone(&released) as _);
        // SAFETY: The bytes stay for ever, and nobody else has them.
        unsafe { pin.add(place.as_mut_ptr(), place.len()) };
        let read = Operation::Read(Target::Buffered, 0, Memory::Pinned(pin));
        ring.add(read, 7).unwrap();
        if submit {
            ring.submit().unwrap();
        }
        assert!(ring.finished().is_none());
        (ring, writer, released)
    }

    #[test]
    fn dropping_a_ring_ends_what_waits_and_releases_its_memory() {
        for submit in [false, true] {
            let (ring, _writer, released) = waiting(submit);
            assert!(!released.0.load(Ordering::SeqCst));
            drop(ring);
            assert!(released.0.load(Ordering::SeqCst));
        }
    }

    #[test]
    fn memory_is_released_with_the_operation() {
        use std::io::Write as _;
        let (mut ring, mut writer, released) = waiting(true);
        writer.write_all(&[1, 2, 3]).unwrap();
        let done = loop {
            ring.submit().unwrap();
            match ring.finished() {
                Some(done) => break done,
                None => std::thread::sleep(Duration::from_millis(1)),
            }
        };
        let (task, memory, moved) = done;
        assert_eq!((task, moved.unwrap()), (7, 3));
        assert!(!released.0.load(Ordering::SeqCst));
        drop(memory);
        assert!(released.0.load(Ordering::SeqCst));
    }

    #[test]
    fn ring_has_room_for_its_entries_and_gives_back_what_does_not_fit() {
        let (reader, _writer) = io::pipe().unwrap();
        let fd = reader.as_fd().as_raw_fd();
        let mut ring = Ring::new([fd, fd]).unwrap();
        for number in 0..ENTRIES {
            assert!(ring.has_room());
            ring.add(Operation::Sync, number).unwrap();
        }
        assert!(!ring.has_room());
        assert_eq!(ring.add(Operation::Sync, ENTRIES), Err(ENTRIES));
        ring.submit().unwrap();
        let mut tasks = Vec::new();
        while tasks.len() < ENTRIES as usize {
            ring.submit().unwrap();
            while let Some((task, _, moved)) = ring.finished() {
                // A pipe is on no medium.
                assert_eq!(moved.unwrap_err().raw_os_error(), Some(libc::EINVAL));
                tasks.push(task);
            }
        }
        tasks.sort_unstable();
        assert!(tasks.into_iter().eq(0..ENTRIES));
        assert!(ring.has_room());
    }
}
