//! One request to a disk.

use std::io;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP,
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN,
    VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};

use super::buffer::Buffer;
use super::config::{MAX_RANGE_SECTORS, MAX_RANGES};
use super::{Blk, SECTOR, SERIAL_BYTES};
use crate::virtio::{Broken, Chain, Memory, MemoryError};

/// Bytes of the header: type, a reserved word, first sector.
pub(super) const HEADER: u32 = 16;
/// Bytes of a range to discard or to zero: first sector, number of sectors, flags.
const RANGE: u32 = 16;
/// Bytes that are copied between the driver's memory and the image at a time.
pub(super) const CHUNK: u32 = 1 << 17;

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
    /// The image failed.
    #[error("{0}")]
    Image(#[from] io::Error),
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

/// What a request is about, checked: places lie on the disk.
#[derive(Debug)]
pub(super) enum Work {
    /// Bytes of the image into the driver's memory.
    Read {
        place: u64,
        len: u32,
    },
    /// And from there.
    Write {
        place: u64,
        len: u32,
    },
    Flush,
    Serial,
    /// Ranges to zero or to discard.
    Ranges {
        zero: bool,
        list: Vec<Range>,
    },
}

/// A range to discard or to zero.
#[derive(Debug)]
pub(super) struct Range {
    /// First byte.
    pub(super) at: u64,
    /// Bytes.
    pub(super) len: u64,
    /// The space may be given back.
    pub(super) unmap: bool,
}

/// A driver that did not take flushes counts on every write being safe.
pub(super) fn settles(features: u64) -> bool {
    features & 1 << VIRTIO_BLK_F_FLUSH == 0
}

/// Carries a request out: how many bytes were written to the driver's memory.
pub(super) fn serve(
    disk: &Blk,
    features: u64,
    chain: &Chain,
    memory: &dyn Memory,
) -> Result<u32, Broken> {
    let request = Request::parse(chain, memory)?;
    let work = request.work(disk, chain, memory);
    let done = work.and_then(|work| match work {
        Work::Read { place, len } => read(disk, place, len, chain, memory),
        Work::Write { place, len } => {
            write(disk, place, len, chain, memory)?;
            settle(disk, features)
        }
        Work::Flush => Ok(disk.image.flush().map(|()| 0)?),
        Work::Serial => request.serial(disk, chain, memory),
        Work::Ranges { zero, list } => {
            for Range { at, len, unmap } in list {
                match zero {
                    true => disk.image.zero(at, len, unmap)?,
                    false => disk.image.discard(at, len)?,
                }
            }
            settle(disk, features)
        }
    });
    request.finish(chain, memory, done)
}

fn read(
    disk: &Blk,
    place: u64,
    len: u32,
    chain: &Chain,
    memory: &dyn Memory,
) -> Result<u32, Failure> {
    let mut buffer = Buffer::new(buffer_size(len), disk.image.memory_align());
    for (offset, piece) in chunks(len) {
        let piece = &mut buffer.bytes()[..piece];
        disk.image.read(place + u64::from(offset), piece)?;
        chain.write(memory, offset, piece)?;
    }
    Ok(len)
}

fn write(
    disk: &Blk,
    place: u64,
    len: u32,
    chain: &Chain,
    memory: &dyn Memory,
) -> Result<(), Failure> {
    let mut buffer = Buffer::new(buffer_size(len), disk.image.memory_align());
    for (offset, piece) in chunks(len) {
        let piece = &mut buffer.bytes()[..piece];
        chain.read(memory, HEADER + offset, piece)?;
        disk.image.write(place + u64::from(offset), piece)?;
    }
    Ok(())
}

fn settle(disk: &Blk, features: u64) -> Result<u32, Failure> {
    if settles(features) {
        disk.image.flush()?;
    }
    Ok(0)
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

    /// What is asked for.
    pub(super) fn work(
        &self,
        disk: &Blk,
        chain: &Chain,
        memory: &dyn Memory,
    ) -> Result<Work, Failure> {
        let writable = || match disk.read_only {
            true => Err(Failure::Invalid("the disk is read-only")),
            false => Ok(()),
        };
        match self.kind {
            VIRTIO_BLK_T_IN => Ok(Work::Read {
                place: place(disk, self.sector, self.room.into())?,
                len: self.room,
            }),
            VIRTIO_BLK_T_OUT => {
                writable()?;
                Ok(Work::Write {
                    place: place(disk, self.sector, self.data.into())?,
                    len: self.data,
                })
            }
            VIRTIO_BLK_T_FLUSH => Ok(Work::Flush),
            VIRTIO_BLK_T_GET_ID => Ok(Work::Serial),
            VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES => {
                writable()?;
                let zero = self.kind == VIRTIO_BLK_T_WRITE_ZEROES;
                let list = self.ranges(zero, disk, chain, memory)?;
                Ok(Work::Ranges { zero, list })
            }
            _ => Err(Failure::Unsupported),
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
                    Failure::Image(error) => tracing::warn!(kind, sector, %error, "image"),
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

fn buffer_size(bytes: u32) -> usize {
    bytes.min(CHUNK) as usize
}

/// Offset and length of each piece of at most [`CHUNK`] bytes.
fn chunks(bytes: u32) -> impl Iterator<Item = (u32, usize)> {
    (0..bytes.div_ceil(CHUNK)).map(move |number| {
        // Below `bytes`, so within 32 bits.
        let offset = number * CHUNK;
        (offset, (bytes - offset).min(CHUNK) as usize)
    })
}
