//! Physical region pages: where a command's data are (section 4.3).

use super::spec::Status;
use crate::memory::{Memory, Segment};

/// The ranges of `len` bytes of data, those that follow each other as one.
///
/// # Errors
///
/// The status of the command: [`Status::PRP_OFFSET`] for an address that is not aligned as its
/// place asks, [`Status::DATA_TRANSFER`] for a list that is no memory.
pub(super) fn segments(
    memory: &dyn Memory,
    prp: [u64; 2],
    len: u32,
    page: u64,
) -> Result<Vec<Segment>, Status> {
    let mut data = Data {
        segments: Vec::new(),
        left: len.into(),
        page,
    };
    if len == 0 {
        return Ok(data.segments);
    }
    if !prp[0].is_multiple_of(4) {
        return Err(Status::PRP_OFFSET);
    }
    data.add(prp[0])?;
    if data.left == 0 {
        return Ok(data.segments);
    }
    if data.left <= page {
        data.add_page(prp[1])?;
        return Ok(data.segments);
    }
    // The first list may begin within a page, the others may not.
    let mut list = prp[1];
    if !list.is_multiple_of(8) {
        return Err(Status::PRP_OFFSET);
    }
    loop {
        let room = (page - list % page) / 8;
        let wanted = data.left.div_ceil(page);
        let count = wanted.min(room);
        let mut bytes = vec![0; (count * 8) as usize];
        let read = memory.read(list, &mut bytes);
        read.map_err(|_| Status::DATA_TRANSFER)?;
        let (entries, _) = bytes.as_chunks::<8>();
        let entries = entries.iter().map(|entry| u64::from_le_bytes(*entry));
        // Of a list that is too long the last entry is the next one's address.
        let here = if wanted > room { count - 1 } else { count };
        for (number, entry) in (0..).zip(entries) {
            if number < here {
                data.add_page(entry)?;
            } else {
                if !entry.is_multiple_of(page) {
                    return Err(Status::PRP_OFFSET);
                }
                list = entry;
            }
        }
        if data.left == 0 {
            return Ok(data.segments);
        }
    }
}

struct Data {
    segments: Vec<Segment>,
    left: u64,
    page: u64,
}

impl Data {
    fn add_page(&mut self, addr: u64) -> Result<(), Status> {
        match addr.is_multiple_of(self.page) {
            true => self.add(addr),
            false => Err(Status::PRP_OFFSET),
        }
    }

    /// Takes what is left of the page at an address.
    fn add(&mut self, addr: u64) -> Result<(), Status> {
        // Up to the end of the page, so within the address space.
        let len = self.left.min(self.page - addr % self.page);
        self.left -= len;
        // At most a page.
        let len = u32::try_from(len).map_err(|_| Status::INTERNAL)?;
        if let Some(last) = self.segments.last_mut()
            && last.addr.checked_add(last.len.into()) == Some(addr)
        {
            last.len += len;
            return Ok(());
        }
        self.segments.push(Segment { addr, len });
        Ok(())
    }
}

#[cfg(test)]
mod tests;
