//! What the controller and its namespace are (section 5.15).

use super::command::Command;
use super::features::WARNING;
use super::logs::ERROR_ENTRIES;
use super::spec::{ALL_NAMESPACES, MAX_EVENT_REQUESTS, MAX_TRANSFER_SHIFT, NSID, Status, VERSION};

/// Bytes of what Identify tells.
pub(super) const BYTES: usize = 4096;

/// What does not change about the controller.
#[derive(Debug, Clone)]
pub(super) struct Identity {
    /// ASCII, at most 20 bytes.
    pub(super) serial: String,
    /// What nobody else's namespace is called.
    pub(super) id: u128,
    pub(super) read_only: bool,
    /// Doorbells can be in memory.
    pub(super) memory_doorbells: bool,
    /// Bytes of a block, and those that are best written at once.
    pub(super) block: u32,
    pub(super) physical: u32,
}

/// PCI's vendor for devices of QEMU and KVM, which the VMM's configuration space has, too.
const VENDOR: u16 = 0x1b36;

impl Identity {
    /// Identify: the page, of a namespace with so many blocks.
    pub(super) fn tell(&self, command: &Command, blocks: u64) -> Result<Vec<u8>, Status> {
        let nsid = command.nsid;
        match command.dword(10) & 0xff {
            0x00 => match nsid {
                NSID => Ok(self.namespace(blocks)),
                // Nor what all have in common: namespaces cannot be made.
                _ => Err(Status::INVALID_NAMESPACE),
            },
            0x01 => Ok(self.controller()),
            0x02 => match nsid {
                // No greater one can follow.
                0xffff_fffe | ALL_NAMESPACES => Err(Status::INVALID_NAMESPACE),
                _ => {
                    let mut page = vec![0; BYTES];
                    if nsid < NSID {
                        put(&mut page, 0, &NSID.to_le_bytes());
                    }
                    Ok(page)
                }
            },
            0x03 => match nsid {
                NSID => Ok(self.descriptors()),
                _ => Err(Status::INVALID_NAMESPACE),
            },
            _ => Err(Status::INVALID_FIELD),
        }
    }

    fn controller(&self) -> Vec<u8> {
        let mut page = vec![0; BYTES];
        put(&mut page, 0, &VENDOR.to_le_bytes());
        put(&mut page, 2, &VENDOR.to_le_bytes());
        text(&mut page[4..24], &self.serial);
        text(&mut page[24..64], "ioregion NVMe");
        text(&mut page[64..72], env!("CARGO_PKG_VERSION"));
        // Arbitration burst: no limit that would help.
        page[72] = 7;
        page[77] = MAX_TRANSFER_SHIFT;
        // Controller 1 of its subsystem.
        put(&mut page, 78, &1u16.to_le_bytes());
        put(&mut page, 80, &VERSION.to_le_bytes());
        // It tells when the namespace has changed.
        put(&mut page, 92, &(1u32 << 8).to_le_bytes());
        // A controller for I/O.
        page[111] = 1;
        let commands = u16::from(self.memory_doorbells) << 8;
        put(&mut page, 256, &commands.to_le_bytes());
        // Aborts at a time, and event requests, each less one.
        page[258] = 3;
        page[259] = MAX_EVENT_REQUESTS as u8 - 1;
        // One firmware slot, read-only.
        page[260] = 0x03;
        // Log pages: commands supported, and any part of a page.
        page[261] = 0x06;
        page[262] = ERROR_ENTRIES as u8 - 1;
        // Temperatures at which it warns, and beyond which it would be damaged.
        put(&mut page, 266, &WARNING.to_le_bytes());
        put(&mut page, 268, &(WARNING + 20).to_le_bytes());
        // Entry sizes, least and most.
        page[512] = 0x66;
        page[513] = 0x44;
        put(&mut page, 516, &NSID.to_le_bytes());
        // Compare, deallocate, write zeroes, and saved values of features can be asked for.
        let optional: u16 = 1 | 1 << 2 | 1 << 3 | 1 << 4;
        put(&mut page, 520, &optional.to_le_bytes());
        // A write cache; flushing all namespaces is flushing this one.
        page[525] = 0x07;
        let [a, b, c, d, e] = uuid(self.id);
        let name = format!("nqn.2014-08.org.nvmexpress:uuid:{a}-{b}-{c}-{d}-{e}");
        put(&mut page, 768, name.as_bytes());
        // One power state, whose power is not said.
        page
    }

    fn namespace(&self, blocks: u64) -> Vec<u8> {
        let mut page = vec![0; BYTES];
        for at in [0, 8, 16] {
            put(&mut page, at, &blocks.to_le_bytes());
        }
        // What is best written and deallocated is said below.
        page[24] = 1 << 4;
        // Write Zeroes may deallocate.
        page[33] = 1 << 3;
        let blocks_at_once = (self.physical / self.block).clamp(1, 1 << 16) - 1;
        for at in [64, 66, 68, 70] {
            put(&mut page, at, &blocks_at_once.to_le_bytes()[..2]);
        }
        page[99] = self.read_only.into();
        put(&mut page, 104, &self.id.to_be_bytes());
        // Format 0: blocks without metadata.
        page[130] = self.block.max(1).ilog2() as u8;
        page
    }

    /// What the namespace is called.
    fn descriptors(&self) -> Vec<u8> {
        let mut page = vec![0; BYTES];
        let id = self.id.to_be_bytes();
        // An identifier that is unique in the world, and the same as a UUID.
        put(&mut page, 0, &[2, 16, 0, 0]);
        put(&mut page, 4, &id);
        put(&mut page, 20, &[3, 16, 0, 0]);
        put(&mut page, 24, &id);
        page
    }
}

/// The parts of a UUID.
fn uuid(id: u128) -> [String; 5] {
    let hex = format!("{id:032x}");
    [0..8, 8..12, 12..16, 16..20, 20..32].map(|part| hex[part].to_owned())
}

fn put(page: &mut [u8], at: usize, bytes: &[u8]) {
    if let Some(place) = page.get_mut(at..at + bytes.len()) {
        place.copy_from_slice(bytes);
    }
}

/// ASCII, filled with blanks.
fn text(place: &mut [u8], text: &str) {
    let bytes = text.bytes().chain(std::iter::repeat(b' '));
    for (place, byte) in place.iter_mut().zip(bytes) {
        *place = byte;
    }
}
