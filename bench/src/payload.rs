//! What the guest of each row executes, and which values it sends.

use ioregion_dispatch::Bus;
use ioregion_microguest::{MMIO_BASE, Program};

use crate::scenarios::{Operation, Queues, Row};

/// Size of each region in bytes.
pub const REGION_BYTES: u64 = 1 << 20;
/// Bytes from one doorbell to the next: neighbours, so that one coalesced zone covers them all.
pub const STRIDE: u32 = 4;
/// Size of each region where there are several of them in a row, in bytes: a thousand in a page, so
/// that only the number of regions differs.
pub const SMALL_REGION_BYTES: u32 = 4;
/// Offset of the register that takes writes that wait.
const REGISTER: u64 = 0x8_0000;
/// Offset of the register that is read.
pub const STATUS: u64 = 0x8_0004;
/// First port of the port region.
pub const PORT: u16 = 0x500;
/// Ports in the port region.
pub const PORTS: u16 = 16;

/// Cell that the guest stores its time stamp in, just before it rings.
pub const CELL_STAMP: u32 = 0;
/// Cell that the device stores the number of rings in that it has seen.
pub const CELL_SEEN: u32 = 1;
const CELL_SCRATCH: u32 = 2;

/// The bit of a value that says which of two vCPUs sent it.
pub const LANE_BIT: u32 = 31;

/// How a payload measures.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Measure {
    /// Each iteration by itself, in the guest.
    Timed,
    /// Nothing: for throughput and CPU time.
    Plain,
    /// No access: `CPUID`, timed, as a reference for how fast the machine just is.
    Reference,
    /// One ring at a time, each after the device has seen the one before.
    Paced,
}

/// First address of a vCPU's region.
pub fn base(row: &Row, vcpu: u32) -> u64 {
    match row.queues {
        Queues::Shared => MMIO_BASE,
        Queues::PerVcpu => MMIO_BASE + u64::from(vcpu) * REGION_BYTES,
    }
}

/// `n` iterations on `vcpu`; the values are `first` and up.
pub fn program(row: &Row, measure: Measure, vcpu: u32, first: u32, n: u32) -> Program {
    let value = u64::from(first | vcpu << LANE_BIT);
    let base = base(row, vcpu);
    let access = |p: &mut Program| {
        use crate::scenarios::Carrier::RamStore;
        match row.operation {
            _ if row.carrier == RamStore => {
                p.ram_store_counter(CELL_SCRATCH, value as u32, 1);
            }
            Operation::Posted | Operation::Write if row.in_turn => {
                let stride = row.regions.map_or(STRIDE, |_| SMALL_REGION_BYTES);
                p.write_counter_strided(Bus::Mmio, base, 4, value, row.cycle(), stride);
            }
            Operation::Posted | Operation::RoundTrip => {
                p.write_counter(Bus::Mmio, base, 4, value, 1);
            }
            Operation::Write => {
                p.write_counter(Bus::Mmio, base + REGISTER, 4, value, 1);
            }
            Operation::Read => {
                p.read(Bus::Mmio, base + STATUS, 4);
            }
            Operation::Mixed => {
                p.write_counter(Bus::Mmio, base, 4, value, 1);
                p.read(Bus::Mmio, base + STATUS, 4);
            }
            Operation::PioOut => {
                p.write_counter(Bus::Pio, PORT.into(), 4, value, 1);
            }
            Operation::PioIn => {
                p.read(Bus::Pio, PORT.into(), 4);
            }
        }
    };
    let mut program = Program::new();
    program.repeat(n, |p| match measure {
        Measure::Timed => {
            p.timed(access);
        }
        Measure::Plain => access(p),
        Measure::Reference => {
            p.timed(|p| {
                p.cpuid();
            });
        }
        Measure::Paced => {
            p.ram_store_tsc(CELL_STAMP);
            access(p);
            p.ram_wait_counter(CELL_SEEN, first, 1);
        }
    });
    program
}
