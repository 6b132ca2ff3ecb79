//! Where things lie in guest RAM.
//!
//! The first MiB holds the cells, shared by all vCPUs; each vCPU has an area of its own behind
//! it: header, code, constants, log, timings.

use crate::{Error, Result};

/// First address that suits devices in every guest of this crate.
pub const MMIO_BASE: u64 = 0xd000_0000;
/// End of the addresses that devices may use; KVM needs a few pages behind it on Intel hosts.
pub const MMIO_END: u64 = 0xfffb_c000;
/// RAM that suits most uses, in bytes: room for three vCPUs.
pub const DEFAULT_RAM: usize = 64 << 20;
/// RAM that each vCPU needs behind the shared first MiB, in bytes. Untouched RAM costs nothing.
pub const AREA_BYTES: u64 = 20 << 20;
/// Number of [cells](crate::MicroVm::cell).
pub const CELLS: u32 = 4096;
/// How deep loops, and timed sections, may be nested.
pub const MAX_NESTING: usize = 64;

const SHARED_BYTES: u64 = 1 << 20;
const CELLS_AT: u32 = 0x1000;
/// One cache line each.
const CELL_BYTES: u32 = 64;

/// Guest physical address of a cell; the caller has checked the number.
pub(crate) fn cell_at(cell: u32) -> u32 {
    CELLS_AT + cell * CELL_BYTES
}

/// One vCPU's part of RAM.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Area {
    base: u32,
}

impl Area {
    pub const HEADER_BYTES: usize = 4096;
    pub const CODE_BYTES: usize = 8 << 20;
    pub const POOL_BYTES: usize = (4 << 20) - Self::HEADER_BYTES;
    pub const LOG_BYTES: usize = 4 << 20;
    pub const TIMINGS_BYTES: usize = 4 << 20;

    /// The area of vCPU `index` in RAM of `ram` bytes.
    pub fn new(index: u64, ram: u64) -> Result<Self> {
        let base = index
            .checked_mul(AREA_BYTES)
            .and_then(|offset| offset.checked_add(SHARED_BYTES))
            .filter(|base| base.checked_add(AREA_BYTES).is_some_and(|end| end <= ram))
            .and_then(|base| u32::try_from(base).ok())
            .ok_or(Error::NoArea { index, ram })?;
        Ok(Self { base })
    }

    /// Two u64: number of log entries, number of timing entries of the loaded program.
    pub fn header(self) -> u32 {
        self.base
    }

    pub fn code(self) -> u32 {
        self.base + Self::HEADER_BYTES as u32
    }

    pub fn pool(self) -> u32 {
        self.code() + Self::CODE_BYTES as u32
    }

    pub fn log(self) -> u32 {
        self.pool() + Self::POOL_BYTES as u32
    }

    pub fn timings(self) -> u32 {
        self.log() + Self::LOG_BYTES as u32
    }
}

const _: () = assert!(
    (Area::HEADER_BYTES
        + Area::CODE_BYTES
        + Area::POOL_BYTES
        + Area::LOG_BYTES
        + Area::TIMINGS_BYTES) as u64
        == AREA_BYTES
);
const _: () = assert!((CELLS_AT + CELLS * CELL_BYTES) as u64 <= SHARED_BYTES);
