//! The payload of one vCPU, as a list of operations.

use std::ops::Range;

use crate::Bus;

/// What a vCPU does, in order; built once, loaded with [`MicroVm`](crate::MicroVm).
///
/// Building never fails: sizes, addresses and room are checked when the program is loaded, where
/// RAM size and place are known. A `HLT` is appended to every program.
///
/// ```
/// use ioregion_microguest::{Bus, MMIO_BASE, Program};
/// let mut program = Program::new();
/// program.write(Bus::Mmio, MMIO_BASE, 4, 0x1234);
/// program.repeat(1000, |p| {
///     p.timed(|p| { p.write_counter(Bus::Mmio, MMIO_BASE + 8, 4, 1, 1); });
/// });
/// let status = program.read(Bus::Mmio, MMIO_BASE + 16, 4);
/// assert_eq!(status, 0); // the index of its result in the log
/// ```
#[derive(Debug, Clone, Default)]
pub struct Program {
    pub(crate) ops: Vec<Op>,
    /// Log entries written by everything so far, loops included.
    pub(crate) reads: usize,
    /// Timing entries written by everything so far, loops included.
    pub(crate) timings: usize,
}

#[derive(Debug, Clone)]
pub(crate) enum Op {
    Write {
        bus: Bus,
        place: Place,
        size: u8,
        value: Value,
    },
    Read {
        bus: Bus,
        addr: u64,
        size: u8,
    },
    Write16 {
        addr: u64,
        value: u128,
    },
    Read16 {
        addr: u64,
    },
    OutString {
        port: u64,
        size: u8,
        values: Vec<u32>,
    },
    InString {
        port: u64,
        size: u8,
        count: u32,
    },
    RamStore {
        cell: u32,
        value: Value,
    },
    RamWait {
        cell: u32,
        value: Value,
    },
    Cpuid,
    Repeat {
        n: u32,
        body: Vec<Op>,
    },
    Timed(Vec<Op>),
}

/// Where a write goes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Place {
    pub addr: u64,
    /// Plus `(iteration % count) * stride`.
    pub stride: Option<Stride>,
}

#[derive(Debug, Clone, Copy)]
pub(crate) struct Stride {
    pub count: u32,
    pub bytes: u32,
}

/// What a write carries.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Value {
    Const(u64),
    /// `base + iteration * step` in the low 32 bits, `base` above.
    Counter {
        base: u64,
        step: u32,
    },
    /// The guest's TSC just before the access.
    Tsc,
}

impl Program {
    /// An empty program: it halts at once.
    pub fn new() -> Self {
        Self::default()
    }

    /// Writes `value` (its low `size` bytes) in one access of `size` bytes: 1, 2 or 4, on MMIO
    /// also 8.
    pub fn write(&mut self, bus: Bus, addr: u64, size: u8, value: u64) -> &mut Self {
        self.push_write(bus, Place::at(addr), size, Value::Const(value))
    }

    /// Writes 16 bytes to MMIO with one instruction. KVM reports them as two accesses of 8 bytes,
    /// the low half first.
    pub fn write16(&mut self, addr: u64, value: u128) -> &mut Self {
        self.ops.push(Op::Write16 { addr, value });
        self
    }

    /// Writes `base + iteration * step`, where `iteration` counts the innermost
    /// [`repeat`](Self::repeat) from 0. Only the low 32 bits count; with 8 bytes the upper half
    /// always is `base`'s.
    pub fn write_counter(
        &mut self,
        bus: Bus,
        addr: u64,
        size: u8,
        base: u64,
        step: u32,
    ) -> &mut Self {
        self.push_write(bus, Place::at(addr), size, Value::Counter { base, step })
    }

    /// Like [`write_counter`](Self::write_counter) with step 1, to address
    /// `addr + (iteration % count) * stride` (`count` 0 counts as 1). The value still is
    /// `base + iteration`. Executes the same instructions whatever the count.
    pub fn write_counter_strided(
        &mut self,
        bus: Bus,
        addr: u64,
        size: u8,
        base: u64,
        count: u32,
        stride: u32,
    ) -> &mut Self {
        let stride = Some(Stride {
            count: count.max(1),
            bytes: stride,
        });
        let place = Place { addr, stride };
        self.push_write(bus, place, size, Value::Counter { base, step: 1 })
    }

    /// Writes the low `size` bytes of the guest's time stamp counter, read just before the
    /// access; [`host_ticks`](crate::TscClock::host_ticks) turns it into the host's.
    pub fn write_tsc(&mut self, bus: Bus, addr: u64, size: u8) -> &mut Self {
        self.push_write(bus, Place::at(addr), size, Value::Tsc)
    }

    fn push_write(&mut self, bus: Bus, place: Place, size: u8, value: Value) -> &mut Self {
        self.ops.push(Op::Write {
            bus,
            place,
            size,
            value,
        });
        self
    }

    /// Reads `size` bytes (1, 2 or 4, on MMIO also 8) and appends them to the vCPU's log. Returns
    /// the index in the log; inside a loop, that of the first iteration: the log holds every read
    /// in the order of execution.
    pub fn read(&mut self, bus: Bus, addr: u64, size: u8) -> usize {
        self.ops.push(Op::Read { bus, addr, size });
        self.reads += 1;
        self.reads - 1
    }

    /// Reads 16 bytes from MMIO with one instruction into two log entries, the low half first.
    /// Returns the first entry's index.
    pub fn read16(&mut self, addr: u64) -> usize {
        self.ops.push(Op::Read16 { addr });
        self.reads += 2;
        self.reads - 2
    }

    /// Writes `values` to `port` with one `rep outs` of `size` (1, 2 or 4) bytes each.
    pub fn out_string(&mut self, port: u64, size: u8, values: &[u32]) -> &mut Self {
        self.ops.push(Op::OutString {
            port,
            size,
            values: values.to_vec(),
        });
        self
    }

    /// Reads `count` values from `port` with one `rep ins` of `size` (1, 2 or 4) bytes each, one
    /// log entry per value. Returns the entries' indices.
    pub fn in_string(&mut self, port: u64, size: u8, count: u32) -> Range<usize> {
        self.ops.push(Op::InString { port, size, count });
        let first = self.reads;
        self.reads += count as usize;
        first..self.reads
    }

    /// Runs `body` `n` times. Costs two instructions per iteration.
    pub fn repeat(&mut self, n: u32, body: impl FnOnce(&mut Program)) -> &mut Self {
        let inner = self.inner(body);
        let times = |before: usize, after: usize| {
            before.saturating_add((after - before).saturating_mul(n as usize))
        };
        self.reads = times(self.reads, inner.reads);
        self.timings = times(self.timings, inner.timings);
        self.ops.push(Op::Repeat { n, body: inner.ops });
        self
    }

    /// Times `body` and appends the duration to the vCPU's timings, in ticks of its TSC (low 32
    /// bits; see [`TscClock`](crate::TscClock)). The set-up of the first operation's value and
    /// address and the storing of the last one's result stay outside the measured time. An empty
    /// body measures the cost of measuring. Time stamps are fenced with `lfence` where the CPU
    /// runs the guest's instructions itself.
    pub fn timed(&mut self, body: impl FnOnce(&mut Program)) -> &mut Self {
        let inner = self.inner(body);
        self.reads = inner.reads;
        self.timings = inner.timings + 1;
        self.ops.push(Op::Timed(inner.ops));
        self
    }

    /// A program that goes on counting where this one is.
    fn inner(&self, body: impl FnOnce(&mut Program)) -> Program {
        let mut inner = Program {
            ops: Vec::new(),
            reads: self.reads,
            timings: self.timings,
        };
        body(&mut inner);
        inner
    }

    /// Stores `value` in a [cell](crate::MicroVm::cell): the floor of every comparison, and a
    /// flag for the host or another vCPU.
    pub fn ram_store(&mut self, cell: u32, value: u32) -> &mut Self {
        self.ops.push(Op::RamStore {
            cell,
            value: Value::Const(value.into()),
        });
        self
    }

    /// Stores `base + iteration * step` in a cell: what [`write_counter`](Self::write_counter)
    /// costs without its access.
    pub fn ram_store_counter(&mut self, cell: u32, base: u32, step: u32) -> &mut Self {
        self.ops.push(Op::RamStore {
            cell,
            value: Value::Counter {
                base: base.into(),
                step,
            },
        });
        self
    }

    /// Executes `CPUID`: a way into KVM and back that no device has a part in.
    pub fn cpuid(&mut self) -> &mut Self {
        self.ops.push(Op::Cpuid);
        self
    }

    /// Stores the low 32 bits of the guest's time stamp counter in a cell, for accesses that
    /// carry no value of their own.
    pub fn ram_store_tsc(&mut self, cell: u32) -> &mut Self {
        self.ops.push(Op::RamStore {
            cell,
            value: Value::Tsc,
        });
        self
    }

    /// Spins until a cell holds `value`.
    pub fn ram_wait(&mut self, cell: u32, value: u32) -> &mut Self {
        self.ops.push(Op::RamWait {
            cell,
            value: Value::Const(value.into()),
        });
        self
    }

    /// Spins until a cell holds `base + iteration * step`.
    pub fn ram_wait_counter(&mut self, cell: u32, base: u32, step: u32) -> &mut Self {
        self.ops.push(Op::RamWait {
            cell,
            value: Value::Counter {
                base: base.into(),
                step,
            },
        });
        self
    }
}

impl Place {
    pub fn at(addr: u64) -> Self {
        Self { addr, stride: None }
    }
}
