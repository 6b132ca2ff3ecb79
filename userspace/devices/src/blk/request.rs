//! One request to a disk.

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP,
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN,
    VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};

use super::config::{MAX_RANGE_SECTORS, MAX_RANGES};
use super::{Blk, SECTOR, SERIAL_BYTES};
use crate::disk::{self, Data, Range};
use crate::memory::{Access, Memory, MemoryError, Pin};
use crate::virtio::{Broken, Chain, Done};

/// Bytes of the header: type, a reserved word, first sector.
const HEADER: u32 = 16;
/// Bytes of a range to discard or to zero: first sector, number of sectors, flags.
const RANGE: u32 = 16;

/// Why a request fails.
#[derive(Debug, thiserror::Error)]
pub(super) enum Failure {
    /// The driver asked for something that the disk does not know.
    #[error("not supported")]
    Unsupported,
    /// The driver asked for something that makes no sense.
    #[error("{0}")]
    Invalid(&'static str),
    /// The driver's memory is not there.
    #[error("{0}")]
    Memory(#[from] MemoryError),
    /// The disk could not do it.
    #[error("{0}")]
    Disk(#[from] disk::Failure),
}

/// A request that can be answered.
#[derive(Debug, Clone, Copy)]
pub(super) struct Request {
    kind: u32,
    sector: u64,
    /// Bytes of data in the readable part.
    data: u32,
    /// Bytes for data in the writable part.
    room: u32,
}

/// What a request is about.
#[derive(Debug)]
pub(super) enum Work {
    Disk(disk::Work),
    Serial,
}

/// A request under way.
pub(super) struct Job {
    pub(super) chain: Chain,
    pub(super) request: Request,
    /// Bytes that it writes to the driver's memory.
    pub(super) writes: u32,
}

impl Data for Job {
    fn read(&self, memory: &dyn Memory, offset: u32, into: &mut [u8]) -> Result<(), MemoryError> {
        self.chain.read(memory, HEADER + offset, into)
    }

    fn write(&self, memory: &dyn Memory, offset: u32, from: &[u8]) -> Result<(), MemoryError> {
        self.chain.write(memory, offset, from)
    }

    fn pin(
        &self,
        memory: &dyn Memory,
        offset: u32,
        len: u32,
        access: Access,
    ) -> Result<Option<Pin>, MemoryError> {
        match access {
            Access::Read => self.chain.pin_readable(memory, HEADER + offset, len),
            Access::Write => self.chain.pin_writable(memory, offset, len),
        }
    }
}

impl Job {
    /// Tells the driver how it went.
    pub(super) fn finish(
        self,
        memory: &dyn Memory,
        done: Result<(), disk::Failure>,
    ) -> Result<Done, Broken> {
        let done = done.map(|()| self.writes).map_err(Failure::from);
        let written = self.request.finish(&self.chain, memory, done)?;
        let chain = self.chain;
        Ok(Done { chain, written })
    }
}

/// A driver that did not take flushes counts on every write being safe.
pub(super) fn settles(features: u64) -> bool {
    features & 1 << VIRTIO_BLK_F_FLUSH == 0
}

impl Request {
    /// Reads the header.
    ///
    /// # Errors
    ///
    /// A request that cannot be answered.
    pub(super) fn parse(chain: &Chain, memory: &dyn Memory) -> Result<Self, Broken> {
        let Some(data) = chain.readable_len().checked_sub(HEADER) else {
            return Err(Broken::Request("a disk request without a header"));
        };
        // The status is the last byte.
        let Some(room) = chain.writable_len().checked_sub(1) else {
            return Err(Broken::Request("a disk request without room for a status"));
        };
        let mut header = [0; HEADER as usize];
        chain.read(memory, 0, &mut header)?;
        let [t0, t1, t2, t3, _, _, _, _, sector @ ..] = header;
        Ok(Self {
            kind: u32::from_le_bytes([t0, t1, t2, t3]),
            sector: u64::from_le_bytes(sector),
            data,
            room,
        })
    }

    /// What is asked for; `safe`: writes are, when they are done.
    pub(super) fn work(
        &self,
        disk: &Blk,
        safe: bool,
        chain: &Chain,
        memory: &dyn Memory,
    ) -> Result<Work, Failure> {
        let writable = || match disk.read_only {
            true => Err(Failure::Invalid("the disk is read-only")),
            false => Ok(()),
        };
        match self.kind {
            VIRTIO_BLK_T_IN => Ok(Work::Disk(disk::Work::Read {
                at: place(disk, self.sector, self.room.into())?,
                len: self.room,
            })),
            VIRTIO_BLK_T_OUT => {
                writable()?;
                Ok(Work::Disk(disk::Work::Write {
                    at: place(disk, self.sector, self.data.into())?,
                    len: self.data,
                    safe,
                }))
            }
            VIRTIO_BLK_T_FLUSH => Ok(Work::Disk(disk::Work::Flush)),
            VIRTIO_BLK_T_GET_ID => Ok(Work::Serial),
            VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES => {
                writable()?;
                let zero = self.kind == VIRTIO_BLK_T_WRITE_ZEROES;
                let list = self.ranges(zero, disk, chain, memory)?;
                Ok(Work::Disk(disk::Work::Ranges { zero, list, safe }))
            }
            _ => Err(Failure::Unsupported),
        }
    }

    /// How many bytes the request's data are that the disk writes to the driver's memory.
    pub(super) fn writes(&self, work: &disk::Work) -> u32 {
        match work {
            disk::Work::Read { len, .. } => *len,
            _ => 0,
        }
    }

    /// Tells the driver how it went: how many bytes of its memory were written.
    pub(super) fn finish(
        &self,
        chain: &Chain,
        memory: &dyn Memory,
        done: Result<u32, Failure>,
    ) -> Result<u32, Broken> {
        let (status, written) = match done {
            Ok(written) => (VIRTIO_BLK_S_OK, written),
            Err(Failure::Unsupported) => (VIRTIO_BLK_S_UNSUPP, 0),
            Err(failure) => {
                let Self { kind, sector, .. } = self;
                // What a driver does wrong is of no concern here, and there can be much of it.
                match &failure {
                    Failure::Disk(disk::Failure::Image(error)) => {
                        tracing::warn!(kind, sector, %error, "image")
                    }
                    failure => tracing::debug!(kind, sector, %failure, "request"),
                }
                (VIRTIO_BLK_S_IOERR, 0)
            }
        };
        let status = u8::try_from(status).unwrap_or(u8::MAX);
        chain.write(memory, self.room, &[status])?;
        // Bytes from the start without a gap: with the status only where all before it was
        // written.
        Ok(match written == self.room {
            true => written + 1,
            false => written,
        })
    }

    /// Tells the serial number.
    pub(super) fn serial(
        &self,
        disk: &Blk,
        chain: &Chain,
        memory: &dyn Memory,
    ) -> Result<u32, Failure> {
        let len = self.room.min(SERIAL_BYTES as u32);
        chain.write(memory, 0, &disk.serial[..len as usize])?;
        Ok(len)
    }

    /// All or nothing: no range is touched where one of them makes no sense.
    fn ranges(
        &self,
        zero: bool,
        disk: &Blk,
        chain: &Chain,
        memory: &dyn Memory,
    ) -> Result<Vec<Range>, Failure> {
        let bytes = self.data;
        if bytes == 0 || !bytes.is_multiple_of(RANGE) || bytes / RANGE > MAX_RANGES {
            return Err(Failure::Invalid("no ranges, half a range, or too many"));
        }
        let mut list = vec![0; bytes as usize];
        chain.read(memory, HEADER, &mut list)?;
        let (list, _) = list.as_chunks::<{ RANGE as usize }>();
        list.iter().map(|bytes| range(disk, bytes, zero)).collect()
    }
}

/// The byte at which a range begins that must lie on the disk.
fn place(disk: &Blk, sector: u64, bytes: u64) -> Result<u64, Failure> {
    if !bytes.is_multiple_of(SECTOR) {
        return Err(Failure::Invalid("no whole number of sectors"));
    }
    let end = sector.checked_add(bytes / SECTOR);
    if end.is_none_or(|end| end > disk.capacity()) {
        return Err(Failure::Invalid("past the end of the disk"));
    }
    Ok(sector * SECTOR)
}

fn range(disk: &Blk, bytes: &[u8; 16], zero: bool) -> Result<Range, Failure> {
    let [s0, s1, s2, s3, s4, s5, s6, s7, n0, n1, n2, n3, flags @ ..] = *bytes;
    let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
    let sectors = u32::from_le_bytes([n0, n1, n2, n3]);
    let flags = u32::from_le_bytes(flags);
    let known = if zero {
        VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP
    } else {
        0
    };
    if flags & !known != 0 {
        return Err(Failure::Unsupported);
    }
    if sectors == 0 || sectors > MAX_RANGE_SECTORS {
        return Err(Failure::Invalid("a range of no sectors, or of too many"));
    }
    let len = u64::from(sectors) * SECTOR;
    Ok(Range {
        at: place(disk, sector, len)?,
        len,
        unmap: flags & known != 0,
    })
}
