//! Commands of I/O queues (section 6).

use std::sync::atomic::{AtomicBool, Ordering};

use super::command::Command;
use super::prp;
use super::spec::{ALL_NAMESPACES, MAX_TRANSFER, NSID, Status, io};
use crate::disk::{Data, Failure, Range, SECTOR, Work};
use crate::memory::{Access, Memory, MemoryError, Pin, Segment, segments};

/// The namespace as a command finds it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Namespace {
    /// Blocks of [`SECTOR`] bytes.
    pub(super) blocks: u64,
    pub(super) read_only: bool,
    /// Writes need not be safe before the driver asks for it.
    pub(super) write_cache: bool,
    /// Bytes of a page.
    pub(super) page: u64,
}

/// A command's data in the driver's memory.
#[derive(Debug, Default)]
pub(super) struct Place {
    segments: Vec<Segment>,
    /// They are compared with what would be written there: whether they differ.
    compare: Option<AtomicBool>,
}

impl Place {
    pub(super) fn differs(&self) -> bool {
        let differs = self.compare.as_ref();
        differs.is_some_and(|differs| differs.load(Ordering::Relaxed))
    }
}

impl Data for Place {
    fn read(&self, memory: &dyn Memory, offset: u32, into: &mut [u8]) -> Result<(), MemoryError> {
        segments::read(&self.segments, memory, offset, into)
    }

    fn write(&self, memory: &dyn Memory, offset: u32, from: &[u8]) -> Result<(), MemoryError> {
        let Some(differs) = &self.compare else {
            return segments::write(&self.segments, memory, offset, from);
        };
        let mut theirs = vec![0; from.len()];
        segments::read(&self.segments, memory, offset, &mut theirs)?;
        differs.fetch_or(theirs != from, Ordering::Relaxed);
        Ok(())
    }

    fn pin(
        &self,
        memory: &dyn Memory,
        offset: u32,
        len: u32,
        access: Access,
    ) -> Result<Option<Pin>, MemoryError> {
        match self.compare {
            // The kernel would write where it is to be compared.
            Some(_) => Ok(None),
            None => segments::pin(&self.segments, memory, offset, len, access),
        }
    }
}

/// What a command asks for.
#[derive(Debug)]
pub(super) enum Ask {
    /// Nothing that needs the image.
    Nothing,
    /// Work on the image; what it counts as.
    Work(Work, Place, Kind),
}

/// What a command counts as, and how its failure is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// Reads so many sectors.
    Read(u32),
    /// Writes so many.
    Write(u32),
    Other,
}

impl Kind {
    /// The status for what went wrong.
    pub(super) fn status(self, failure: &Failure) -> Status {
        match failure {
            Failure::Memory(_) => Status::DATA_TRANSFER,
            Failure::Image(error) => match (error.raw_os_error(), self) {
                (Some(libc::ENOSPC | libc::EDQUOT), _) => Status::CAPACITY,
                (_, Self::Read(_)) => Status::READ_ERROR,
                _ => Status::WRITE_FAULT,
            },
        }
    }
}

impl Ask {
    /// What a command asks for, all of it checked.
    ///
    /// # Errors
    ///
    /// The status of the command.
    pub(super) fn new(
        command: &Command,
        namespace: &Namespace,
        memory: &dyn Memory,
    ) -> Result<Self, Status> {
        command.check()?;
        if !io::ALL.iter().any(|(opcode, _)| *opcode == command.opcode) {
            return Err(Status::INVALID_OPCODE);
        }
        match (command.nsid, command.opcode) {
            (NSID, _) | (ALL_NAMESPACES, io::FLUSH) => {}
            _ => return Err(Status::INVALID_NAMESPACE),
        }
        let changes = matches!(command.opcode, io::WRITE | io::WRITE_ZEROES | io::DATASET);
        if changes && namespace.read_only {
            return Err(Status::READ_ONLY);
        }
        // To be done only when it is on the medium: where the command or the driver says so.
        let safe = command.dword(12) >> 30 & 1 != 0 || !namespace.write_cache;
        let place = |len| -> Result<Place, Status> {
            Ok(Place {
                segments: prp::segments(memory, command.prp, len, namespace.page)?,
                compare: None,
            })
        };
        match command.opcode {
            io::FLUSH => Ok(Self::Work(Work::Flush, Place::default(), Kind::Other)),
            io::DATASET => dataset(command, namespace, memory),
            opcode => {
                let count = u32::from(command.low(12)) + 1;
                let at = byte(namespace, command.long(10), count.into())?;
                let bytes = u64::from(count) * SECTOR;
                // Directives are not supported.
                if matches!(opcode, io::WRITE) && command.dword(12) >> 20 & 0xf != 0 {
                    return Err(Status::INVALID_FIELD);
                }
                if opcode == io::WRITE_ZEROES {
                    let range = Range {
                        at,
                        len: bytes,
                        unmap: command.dword(12) >> 25 & 1 != 0,
                    };
                    let work = Work::Ranges {
                        zero: true,
                        list: vec![range],
                        safe,
                    };
                    return Ok(Self::Work(work, Place::default(), Kind::Other));
                }
                let len = u32::try_from(bytes).map_err(|_| Status::INVALID_FIELD)?;
                if len > MAX_TRANSFER {
                    return Err(Status::INVALID_FIELD);
                }
                let mut place = place(len)?;
                if opcode == io::WRITE {
                    return Ok(Self::Work(
                        Work::Write { at, len, safe },
                        place,
                        Kind::Write(count),
                    ));
                }
                if opcode == io::COMPARE {
                    place.compare = Some(AtomicBool::new(false));
                }
                Ok(Self::Work(Work::Read { at, len }, place, Kind::Read(count)))
            }
        }
    }
}

/// Dataset Management: a list of ranges, of which only deallocating them means anything here.
fn dataset(command: &Command, namespace: &Namespace, memory: &dyn Memory) -> Result<Ask, Status> {
    const RANGE: u32 = 16;
    if command.dword(11) >> 2 & 1 == 0 {
        return Ok(Ask::Nothing);
    }
    let len = ((command.dword(10) & 0xff) + 1) * RANGE;
    let place = prp::segments(memory, command.prp, len, namespace.page)?;
    let mut bytes = vec![0; len as usize];
    let read = segments::read(&place, memory, 0, &mut bytes);
    read.map_err(|_| Status::DATA_TRANSFER)?;
    let (ranges, _) = bytes.as_chunks::<{ RANGE as usize }>();
    let mut list = Vec::new();
    for range in ranges {
        let [_, _, _, _, n0, n1, n2, n3, first @ ..] = *range;
        let count = u32::from_le_bytes([n0, n1, n2, n3]);
        // All are checked before one is touched.
        let at = byte(namespace, u64::from_le_bytes(first), count.into())?;
        if count > 0 {
            list.push(Range {
                at,
                len: u64::from(count) * SECTOR,
                unmap: true,
            });
        }
    }
    let work = Work::Ranges {
        zero: false,
        list,
        safe: !namespace.write_cache,
    };
    Ok(Ask::Work(work, Place::default(), Kind::Other))
}

/// The first byte of blocks that must be the namespace's.
fn byte(namespace: &Namespace, first: u64, count: u64) -> Result<u64, Status> {
    let end = first.checked_add(count);
    if end.is_none_or(|end| end > namespace.blocks) {
        return Err(Status::LBA_RANGE);
    }
    Ok(first * SECTOR)
}
