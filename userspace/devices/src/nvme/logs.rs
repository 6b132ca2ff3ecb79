//! Log pages (section 5.14).

use std::collections::VecDeque;
use std::time::Instant;

use super::command::Command;
use super::features::TEMPERATURE;
use super::spec::{ALL_NAMESPACES, MAX_TRANSFER, NSID, Status, admin, io, log};

/// Errors that are kept.
pub(super) const ERROR_ENTRIES: usize = 16;

/// An error, for the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Error {
    /// Queue and command; nothing of a command (`None`) where it is about none.
    pub(super) sq: u16,
    pub(super) command: Option<u16>,
    pub(super) status: Status,
    pub(super) lba: u64,
    pub(super) nsid: u32,
}

/// What the log pages are made of.
#[derive(Debug)]
pub(super) struct Logs {
    errors: VecDeque<(u64, Error)>,
    count: u64,
    media_errors: u64,
    changed: bool,
    since: Instant,
}

/// What was done since the controller was made.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Totals {
    /// Commands that read the namespace: Read and Compare.
    pub reads: u64,
    /// Commands that write it.
    pub writes: u64,
    /// Sectors of 512 bytes that Read and Compare read.
    pub sectors_read: u64,
    /// And that Write wrote.
    pub sectors_written: u64,
}

/// A part of a log page that the driver wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Wish {
    pub(super) page: u8,
    offset: u64,
    pub(super) bytes: u32,
    /// Events that the page tells of stay masked.
    pub(super) retain: bool,
}

impl Wish {
    pub(super) fn new(command: &Command) -> Result<Self, Status> {
        let dwords = u64::from(command.high(10)) | u64::from(command.low(11)) << 16;
        let bytes = (dwords + 1) * 4;
        let bytes = u32::try_from(bytes)
            .ok()
            .filter(|bytes| *bytes <= MAX_TRANSFER);
        let offset = command.long(12);
        let page = (command.dword(10) & 0xff) as u8;
        if !matches!(page, log::ERROR..=log::EFFECTS) {
            return Err(Status::LOG_PAGE);
        }
        // No log page is kept for namespaces apart.
        if !matches!(command.nsid, 0 | NSID | ALL_NAMESPACES) {
            return Err(Status::INVALID_NAMESPACE);
        }
        if page == log::HEALTH && command.nsid == NSID {
            return Err(Status::INVALID_FIELD);
        }
        if !offset.is_multiple_of(4) {
            return Err(Status::INVALID_FIELD);
        }
        Ok(Self {
            page,
            offset,
            bytes: bytes.ok_or(Status::INVALID_FIELD)?,
            retain: command.dword(10) >> 15 & 1 != 0,
        })
    }

    /// The part of a page; what is past its end is zero.
    fn of(&self, page: &[u8]) -> Result<Vec<u8>, Status> {
        let offset = usize::try_from(self.offset).map_err(|_| Status::INVALID_FIELD)?;
        let rest = page.get(offset..).ok_or(Status::INVALID_FIELD)?;
        let mut part: Vec<u8> = rest.iter().take(self.bytes as usize).copied().collect();
        part.resize(self.bytes as usize, 0);
        Ok(part)
    }
}

impl Logs {
    pub(super) fn new() -> Self {
        Self {
            errors: VecDeque::new(),
            count: 0,
            media_errors: 0,
            changed: false,
            since: Instant::now(),
        }
    }

    pub(super) fn note(&mut self, error: Error) {
        self.count += 1;
        self.media_errors += u64::from(error.status.is_media());
        self.errors.push_front((self.count, error));
        self.errors.truncate(ERROR_ENTRIES);
    }

    /// The namespace is of another size.
    pub(super) fn namespace_changed(&mut self) {
        self.changed = true;
    }

    /// The part of a page that the driver wants. `warns`: the temperature is beyond a threshold;
    /// `shadows`: doorbells can be in memory.
    pub(super) fn tell(
        &mut self,
        wish: &Wish,
        totals: Totals,
        warns: bool,
        shadows: bool,
    ) -> Result<Vec<u8>, Status> {
        match wish.page {
            log::ERROR => wish.of(&self.errors()),
            log::HEALTH => wish.of(&self.health(totals, warns)),
            log::FIRMWARE => {
                let mut page = vec![0; 512];
                // Slot 1, now and after a reset.
                page[0] = 1;
                let version = env!("CARGO_PKG_VERSION").bytes();
                let version = version.chain(std::iter::repeat(b' ')).take(8);
                page.splice(8..16, version);
                wish.of(&page)
            }
            log::CHANGED_NAMESPACES => {
                let mut page = vec![0; 4096];
                if self.changed {
                    page[0] = NSID as u8;
                }
                let part = wish.of(&page)?;
                self.changed &= wish.retain;
                Ok(part)
            }
            _ => wish.of(&effects(shadows)),
        }
    }

    fn errors(&self) -> Vec<u8> {
        let mut page = Vec::with_capacity(ERROR_ENTRIES * 64);
        for (count, error) in &self.errors {
            page.extend(count.to_le_bytes());
            page.extend(error.sq.to_le_bytes());
            page.extend(error.command.unwrap_or(0xffff).to_le_bytes());
            page.extend((error.status.0 << 1).to_le_bytes());
            // Nowhere in the command.
            page.extend([0xff; 2]);
            page.extend(error.lba.to_le_bytes());
            page.extend(error.nsid.to_le_bytes());
            page.resize(page.len().next_multiple_of(64), 0);
        }
        page.resize(ERROR_ENTRIES * 64, 0);
        page
    }

    fn health(&self, totals: Totals, warns: bool) -> Vec<u8> {
        let mut page = vec![0; 512];
        page[0] = u8::from(warns) << 1;
        page.splice(1..3, TEMPERATURE.to_le_bytes());
        // Spare space, and what is too little of it, in percent.
        page[3] = 100;
        page[4] = 10;
        let mut put = |at: usize, value: u64| drop(page.splice(at..at + 8, value.to_le_bytes()));
        // In thousands, rounded up.
        put(32, totals.sectors_read.div_ceil(1000));
        put(48, totals.sectors_written.div_ceil(1000));
        put(64, totals.reads);
        put(80, totals.writes);
        // The controller has been switched on once.
        put(112, 1);
        put(128, self.since.elapsed().as_secs() / 3600);
        put(160, self.media_errors);
        put(176, self.count);
        page
    }
}

/// Which commands there are, and what they change.
fn effects(shadows: bool) -> Vec<u8> {
    let mut page = vec![0; 4096];
    for opcode in admin::ALL {
        let known = shadows || opcode != admin::DOORBELL_BUFFERS;
        page[usize::from(opcode) * 4] = known.into();
    }
    for (opcode, changes) in io::ALL {
        page[1024 + usize::from(opcode) * 4] = 1 | u8::from(changes) << 1;
    }
    page
}
