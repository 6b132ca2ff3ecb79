//! One request to a disk.

use std::io;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP,
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN,
    VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};

use super::config::{MAX_RANGE_SECTORS, MAX_RANGES};
use super::{Blk, SECTOR, SERIAL_BYTES};
use crate::virtio::{Broken, Chain, Memory, MemoryError};

/// Bytes of the header: type, a reserved word, first sector.
const HEADER: u32 = 16;
/// Bytes of a range to discard or to zero: first sector, number of sectors, flags.
const RANGE: u32 = 16;
/// Bytes that are copied between the driver's memory and the image at a time.
const CHUNK: u32 = 1 << 17;

/// Why a request fails.
#[derive(Debug, thiserror::Error)]
enum Failure {
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

/// Carries a request out: how many bytes were written to the driver's memory.
pub(super) fn serve(
    disk: &Blk,
    features: u64,
    chain: &Chain,
    memory: &dyn Memory,
) -> Result<u32, Broken> {
    if chain.readable_len() < HEADER {
        return Err(Broken::Request("a disk request without a header"));
    }
    // The status is the last byte.
    let Some(data) = chain.writable_len().checked_sub(1) else {
        return Err(Broken::Request("a disk request without room for a status"));
    };
    let mut header = [0; HEADER as usize];
    chain.read(memory, 0, &mut header)?;
    let [t0, t1, t2, t3, _, _, _, _, sector @ ..] = header;
    let kind = u32::from_le_bytes([t0, t1, t2, t3]);
    let request = Request {
        disk,
        features,
        chain,
        memory,
        sector: u64::from_le_bytes(sector),
        room: data,
    };
    let (status, written) = match request.carry_out(kind) {
        Ok(written) => (VIRTIO_BLK_S_OK, written),
        Err(Failure::Unsupported) => (VIRTIO_BLK_S_UNSUPP, 0),
        Err(failure) => {
            // What a driver does wrong is of no concern here, and there can be much of it.
            match &failure {
                Failure::Image(error) => tracing::warn!(kind, request.sector, %error, "image"),
                failure => tracing::debug!(kind, request.sector, %failure, "request"),
            }
            (VIRTIO_BLK_S_IOERR, 0)
        }
    };
    let status = u8::try_from(status).unwrap_or(u8::MAX);
    chain.write(memory, data, &[status])?;
    // Bytes from the start without a gap: with the status only where all before it was written.
    Ok(if written == data { data + 1 } else { written })
}

struct Request<'a> {
    disk: &'a Blk,
    features: u64,
    chain: &'a Chain,
    memory: &'a dyn Memory,
    sector: u64,
    /// Bytes for data in the writable part.
    room: u32,
}

impl Request<'_> {
    /// How many bytes of data were written to the driver's memory.
    fn carry_out(&self, kind: u32) -> Result<u32, Failure> {
        match kind {
            VIRTIO_BLK_T_IN => self.read(),
            VIRTIO_BLK_T_OUT => self.write().map(|()| 0),
            VIRTIO_BLK_T_FLUSH => Ok(self.disk.image.flush().map(|()| 0)?),
            VIRTIO_BLK_T_GET_ID => self.serial(),
            VIRTIO_BLK_T_DISCARD => self.ranges(false).map(|()| 0),
            VIRTIO_BLK_T_WRITE_ZEROES => self.ranges(true).map(|()| 0),
            _ => Err(Failure::Unsupported),
        }
    }

    /// The byte at which a range begins that must lie on the disk.
    fn place(&self, sector: u64, bytes: u64) -> Result<u64, Failure> {
        if !bytes.is_multiple_of(SECTOR) {
            return Err(Failure::Invalid("no whole number of sectors"));
        }
        let end = sector.checked_add(bytes / SECTOR);
        if end.is_none_or(|end| end > self.disk.capacity()) {
            return Err(Failure::Invalid("past the end of the disk"));
        }
        Ok(sector * SECTOR)
    }

    fn writable(&self) -> Result<(), Failure> {
        match self.disk.read_only {
            true => Err(Failure::Invalid("the disk is read-only")),
            false => Ok(()),
        }
    }

    fn read(&self) -> Result<u32, Failure> {
        let place = self.place(self.sector, self.room.into())?;
        let mut buffer = vec![0; buffer_size(self.room)];
        for (offset, len) in chunks(self.room) {
            let piece = &mut buffer[..len];
            self.disk.image.read(place + u64::from(offset), piece)?;
            self.chain.write(self.memory, offset, piece)?;
        }
        Ok(self.room)
    }

    fn write(&self) -> Result<(), Failure> {
        self.writable()?;
        let bytes = self.chain.readable_len() - HEADER;
        let place = self.place(self.sector, bytes.into())?;
        let mut buffer = vec![0; buffer_size(bytes)];
        for (offset, len) in chunks(bytes) {
            let piece = &mut buffer[..len];
            self.chain.read(self.memory, HEADER + offset, piece)?;
            self.disk.image.write(place + u64::from(offset), piece)?;
        }
        self.settle()
    }

    /// A driver that did not take flushes counts on every write being safe.
    fn settle(&self) -> Result<(), Failure> {
        if self.features & 1 << VIRTIO_BLK_F_FLUSH == 0 {
            self.disk.image.flush()?;
        }
        Ok(())
    }

    fn serial(&self) -> Result<u32, Failure> {
        let len = self.room.min(SERIAL_BYTES as u32);
        let serial = &self.disk.serial[..len as usize];
        self.chain.write(self.memory, 0, serial)?;
        Ok(len)
    }

    fn ranges(&self, zero: bool) -> Result<(), Failure> {
        self.writable()?;
        let bytes = self.chain.readable_len() - HEADER;
        if bytes == 0 || !bytes.is_multiple_of(RANGE) || bytes / RANGE > MAX_RANGES {
            return Err(Failure::Invalid("no ranges, half a range, or too many"));
        }
        let mut list = vec![0; bytes as usize];
        self.chain.read(self.memory, HEADER, &mut list)?;
        // All or nothing: no range is touched where one of them makes no sense.
        let (list, _) = list.as_chunks::<{ RANGE as usize }>();
        let ranges: Vec<_> = list
            .iter()
            .map(|range| self.range(range, zero))
            .collect::<Result<_, _>>()?;
        for (at, len, unmap) in ranges {
            match zero {
                true => self.disk.image.zero(at, len, unmap)?,
                false => self.disk.image.discard(at, len)?,
            }
        }
        self.settle()
    }

    /// First byte, bytes, and whether the space may be given back.
    fn range(&self, bytes: &[u8; 16], zero: bool) -> Result<(u64, u64, bool), Failure> {
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
        Ok((self.place(sector, len)?, len, flags & known != 0))
    }
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
