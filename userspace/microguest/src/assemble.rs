//! From operations to 32-bit machine code.
//!
//! Every operation has three parts: *prepare* (value and address into registers), *access*, and
//! *record* (a read's result into the log); a timed section measures the access alone. There is
//! no stack: nothing calls and nothing interrupts.
//!
//! | register | holds |
//! |---|---|
//! | `ebx`, `mm0`, `xmm0` | the value of an access |
//! | `ecx` | offset of a strided access; counts of string operations |
//! | `esi` | innermost loop: iteration minus its number of iterations |
//! | `edi` | next timing entry |
//! | `ebp` | next log entry |
//! | `esp` | TSC at the start of a timed section |
//! | `eax`, `edx` | scratch |

use iced_x86::code_asm::*;

use crate::layout::{Area, cell_at};
use crate::program::{Op, Place, Program, Value};
use crate::{Bus, CELLS, Error, MAX_NESTING, MMIO_END, Result};

/// Machine code and constants of one program.
pub(crate) struct Image {
    pub code: Vec<u8>,
    pub pool: Vec<u8>,
}

/// Assembles `program` for `area` of a guest with `ram_end` bytes of RAM; `fence`: time stamps
/// are fenced with `lfence`.
pub(crate) fn assemble(program: &Program, area: Area, ram_end: u64, fence: bool) -> Result<Image> {
    fits("log", program.reads.saturating_mul(8), Area::LOG_BYTES)?;
    fits(
        "timings",
        program.timings.saturating_mul(4),
        Area::TIMINGS_BYTES,
    )?;
    let mut out = Assembler {
        asm: CodeAssembler::new(32)?,
        pool: vec![0; 2 * LEVELS_BYTES],
        area,
        ram_end,
        fence,
        loops: Vec::new(),
        timed: 0,
    };
    out.run(&program.ops)?;
    out.asm.hlt()?;
    fits("constants", out.pool.len(), Area::POOL_BYTES)?;
    // Before the encoding, so that a program far too large fails early: no instruction is shorter
    // than one byte.
    fits("code", out.asm.instructions().len(), Area::CODE_BYTES)?;
    let code = out.asm.assemble(u64::from(area.code()))?;
    fits("code", code.len(), Area::CODE_BYTES)?;
    Ok(Image {
        code,
        pool: out.pool,
    })
}

/// The constants begin with what loops save, one word per level, and what timed sections save.
const LEVELS_BYTES: usize = 4 * MAX_NESTING;

fn fits(section: &'static str, needed: usize, limit: usize) -> Result<()> {
    if needed > limit {
        return Err(Error::TooLarge {
            section,
            needed,
            limit,
        });
    }
    Ok(())
}

struct Assembler {
    asm: CodeAssembler,
    pool: Vec<u8>,
    area: Area,
    ram_end: u64,
    fence: bool,
    /// Iterations of the loops around the current operation, innermost last.
    loops: Vec<u32>,
    /// Timed sections around the current operation.
    timed: usize,
}

impl Assembler {
    fn run(&mut self, ops: &[Op]) -> Result<()> {
        for op in ops {
            self.prepare(op)?;
            self.access(op)?;
            self.record(op)?;
        }
        Ok(())
    }

    /// Checks the operation and loads what its access needs.
    fn prepare(&mut self, op: &Op) -> Result<()> {
        match op {
            Op::Write {
                bus,
                place,
                size,
                value,
            } => {
                self.check(*bus, *place, *size)?;
                self.prepare_place(*place)?;
                self.prepare_value(*size, *value)
            }
            Op::Read { bus, addr, size } => self.check(*bus, Place::at(*addr), *size),
            Op::Write16 { addr, value } => {
                self.check_halves(*addr)?;
                let slot = self.constant(&value.to_le_bytes());
                Ok(self.asm.movdqu(xmm0, xmmword_ptr(slot))?)
            }
            Op::Read16 { addr } => self.check_halves(*addr),
            Op::OutString { port, size, .. } | Op::InString { port, size, .. } => {
                self.check(Bus::Pio, Place::at(*port), *size)
            }
            Op::RamStore { cell, value } | Op::RamWait { cell, value } => {
                if *cell >= CELLS {
                    return Err(Error::BadCell(*cell));
                }
                self.prepare_value(4, *value)
            }
            Op::Cpuid => Ok(self.asm.xor(eax, eax)?),
            Op::Repeat { .. } | Op::Timed(_) => Ok(()),
        }
    }

    /// The access itself.
    fn access(&mut self, op: &Op) -> Result<()> {
        match op {
            Op::Write {
                bus: Bus::Mmio,
                place,
                size,
                ..
            } => {
                let at = self.operand(*place);
                let asm = &mut self.asm;
                match size {
                    1 => asm.mov(byte_ptr(at), bl)?,
                    2 => asm.mov(word_ptr(at), bx)?,
                    4 => asm.mov(dword_ptr(at), ebx)?,
                    _ => asm.movq(qword_ptr(at), mm0)?,
                }
            }
            Op::Write {
                bus: Bus::Pio,
                place,
                size,
                ..
            } => {
                let at = self.operand(*place);
                let asm = &mut self.asm;
                asm.lea(edx, at)?;
                asm.mov(eax, ebx)?;
                match size {
                    1 => asm.out(dx, al)?,
                    2 => asm.out(dx, ax)?,
                    _ => asm.out(dx, eax)?,
                }
            }
            Op::Read {
                bus: Bus::Mmio,
                addr,
                size,
            } => {
                let at = self.operand(Place::at(*addr));
                let asm = &mut self.asm;
                match size {
                    1 => asm.mov(bl, byte_ptr(at))?,
                    2 => asm.mov(bx, word_ptr(at))?,
                    4 => asm.mov(ebx, dword_ptr(at))?,
                    _ => asm.movq(mm0, qword_ptr(at))?,
                }
            }
            Op::Read {
                bus: Bus::Pio,
                addr,
                size,
            } => {
                let asm = &mut self.asm;
                asm.mov(edx, *addr as u32)?;
                match size {
                    1 => asm.in_(al, dx)?,
                    2 => asm.in_(ax, dx)?,
                    _ => asm.in_(eax, dx)?,
                }
                asm.mov(ebx, eax)?;
            }
            Op::Write16 { addr, .. } => self.asm.movdqu(xmmword_ptr(*addr as u32), xmm0)?,
            Op::Read16 { addr } => self.asm.movdqu(xmm0, xmmword_ptr(*addr as u32))?,
            Op::OutString { port, size, values } => {
                let bytes: Vec<u8> = values
                    .iter()
                    .flat_map(|v| v.to_le_bytes().into_iter().take((*size).into()))
                    .collect();
                let from = self.constant(&bytes);
                let asm = &mut self.asm;
                asm.mov(ebx, esi)?;
                asm.mov(esi, from)?;
                asm.mov(edx, *port as u32)?;
                asm.mov(ecx, values.len() as u32)?;
                match size {
                    1 => asm.rep().outsb()?,
                    2 => asm.rep().outsw()?,
                    _ => asm.rep().outsd()?,
                }
                asm.mov(esi, ebx)?;
            }
            Op::InString { port, size, count } => self.in_string(*port, *size, *count)?,
            Op::RamStore { cell, .. } => self.asm.mov(dword_ptr(cell_at(*cell)), ebx)?,
            Op::RamWait { cell, .. } => {
                let asm = &mut self.asm;
                let mut spin = asm.create_label();
                asm.set_label(&mut spin)?;
                asm.pause()?;
                asm.cmp(dword_ptr(cell_at(*cell)), ebx)?;
                asm.jne(spin)?;
            }
            // Registers that every operation loads anew.
            Op::Cpuid => self.asm.cpuid()?,
            Op::Repeat { n, body } => self.repeat(*n, body)?,
            Op::Timed(body) => self.timed(body)?,
        }
        Ok(())
    }

    /// Appends a read's value to the log, which the host has zeroed.
    fn record(&mut self, op: &Op) -> Result<()> {
        let asm = &mut self.asm;
        let bytes = match op {
            Op::Read { size, .. } => {
                match size {
                    1 => asm.mov(byte_ptr(ebp), bl)?,
                    2 => asm.mov(word_ptr(ebp), bx)?,
                    4 => asm.mov(dword_ptr(ebp), ebx)?,
                    _ => asm.movq(qword_ptr(ebp), mm0)?,
                }
                8
            }
            Op::Read16 { .. } => {
                asm.movdqu(xmmword_ptr(ebp), xmm0)?;
                16
            }
            _ => return Ok(()),
        };
        Ok(asm.add(ebp, bytes)?)
    }

    fn in_string(&mut self, port: u64, size: u8, count: u32) -> Result<()> {
        // Before a buffer of that size is made.
        fits(
            "constants",
            (count as usize).saturating_mul(size.into()),
            Area::POOL_BYTES,
        )?;
        let buffer = self.constant(&vec![0; count as usize * usize::from(size)]);
        let asm = &mut self.asm;
        asm.mov(ebx, edi)?;
        asm.mov(edi, buffer)?;
        asm.mov(edx, port as u32)?;
        asm.mov(ecx, count)?;
        match size {
            1 => asm.rep().insb()?,
            2 => asm.rep().insw()?,
            _ => asm.rep().insd()?,
        }
        asm.mov(edi, ebx)?;
        if count == 0 {
            return Ok(());
        }
        // From the packed buffer into the log.
        asm.mov(ebx, esi)?;
        asm.mov(esi, buffer)?;
        asm.mov(ecx, count)?;
        asm.xor(eax, eax)?;
        let mut next = asm.create_label();
        asm.set_label(&mut next)?;
        match size {
            1 => asm.lodsb()?,
            2 => asm.lodsw()?,
            _ => asm.lodsd()?,
        }
        asm.mov(dword_ptr(ebp), eax)?;
        asm.add(ebp, 8)?;
        asm.dec(ecx)?;
        asm.jne(next)?;
        Ok(asm.mov(esi, ebx)?)
    }

    fn repeat(&mut self, n: u32, body: &[Op]) -> Result<()> {
        if n == 0 {
            return Ok(());
        }
        let outer = self.save_slot(self.loops.len(), 0)?;
        let nested = !self.loops.is_empty();
        if nested {
            self.asm.mov(dword_ptr(outer), esi)?;
        }
        self.asm.mov(esi, n.wrapping_neg())?;
        let mut next = self.asm.create_label();
        self.asm.set_label(&mut next)?;
        self.loops.push(n);
        self.run(body)?;
        self.loops.pop();
        self.asm.inc(esi)?;
        self.asm.jne(next)?;
        if nested {
            self.asm.mov(esi, dword_ptr(outer))?;
        }
        Ok(())
    }

    fn timed(&mut self, body: &[Op]) -> Result<()> {
        let outer = self.save_slot(self.timed, LEVELS_BYTES)?;
        let nested = self.timed > 0;
        if nested {
            self.asm.mov(dword_ptr(outer), esp)?;
        }
        self.timed += 1;
        if let Some(first) = body.first() {
            self.prepare(first)?;
        }
        self.stamp()?;
        if self.fence {
            self.asm.lfence()?;
        }
        self.asm.mov(esp, eax)?;
        for (i, op) in body.iter().enumerate() {
            if i > 0 {
                self.record(&body[i - 1])?;
                self.prepare(op)?;
            }
            self.access(op)?;
        }
        self.stamp()?;
        self.asm.sub(eax, esp)?;
        self.asm.stosd()?;
        if let Some(last) = body.last() {
            self.record(last)?;
        }
        self.timed -= 1;
        if nested {
            self.asm.mov(esp, dword_ptr(outer))?;
        }
        Ok(())
    }

    /// The TSC into edx:eax, after everything before it.
    fn stamp(&mut self) -> Result<()> {
        if self.fence {
            self.asm.lfence()?;
        }
        Ok(self.asm.rdtsc()?)
    }

    /// The access's offset into `ecx`.
    fn prepare_place(&mut self, place: Place) -> Result<()> {
        let (Some(stride), Some(n)) = (place.stride, self.loops.last()) else {
            return Ok(());
        };
        self.asm.lea(eax, esi + *n as i32)?;
        self.asm.xor(edx, edx)?;
        self.asm.mov(ecx, stride.count)?;
        self.asm.div(ecx)?;
        Ok(self.asm.imul_3(ecx, edx, stride.bytes)?)
    }

    /// An operand for the access; 32-bit addresses wrap, so a displacement may look negative.
    fn operand(&self, place: Place) -> AsmMemoryOperand {
        match (place.stride, self.loops.last()) {
            (Some(_), Some(_)) => ecx + place.addr as u32 as i32,
            _ => (place.addr as u32).into(),
        }
    }

    /// The value into `mm0` (8 bytes) or `ebx`.
    fn prepare_value(&mut self, size: u8, value: Value) -> Result<()> {
        let slot = (size == 8).then(|| match value {
            Value::Const(base) | Value::Counter { base, .. } => self.constant(&base.to_le_bytes()),
            Value::Tsc => self.constant(&[0; 8]),
        });
        let asm = &mut self.asm;
        match (value, self.loops.last()) {
            (Value::Const(base), _) | (Value::Counter { base, .. }, None) => {
                if slot.is_none() {
                    asm.mov(ebx, base as u32)?;
                }
            }
            (Value::Counter { base, step }, Some(n)) => {
                let base = (base as u32).wrapping_add(n.wrapping_mul(step));
                if step == 1 {
                    asm.lea(ebx, esi + base as i32)?;
                } else {
                    asm.imul_3(ebx, esi, step)?;
                    asm.add(ebx, base)?;
                }
                if let Some(slot) = slot {
                    asm.mov(dword_ptr(slot), ebx)?;
                }
            }
            (Value::Tsc, _) => {
                asm.rdtsc()?;
                asm.mov(ebx, eax)?;
                if let Some(slot) = slot {
                    asm.mov(dword_ptr(slot), eax)?;
                    asm.mov(dword_ptr(slot + 4), edx)?;
                }
            }
        }
        if let Some(slot) = slot {
            asm.movq(mm0, qword_ptr(slot))?;
        }
        Ok(())
    }

    /// Where level `level` of loops or timed sections saves a register.
    fn save_slot(&self, level: usize, offset: usize) -> Result<u32> {
        if level >= MAX_NESTING {
            return Err(Error::TooDeep);
        }
        Ok(self.area.pool() + (offset + 4 * level) as u32)
    }

    /// Puts bytes among the constants; returns their address in the guest.
    fn constant(&mut self, bytes: &[u8]) -> u32 {
        let at = self.pool.len() as u32;
        self.pool.extend_from_slice(bytes);
        // 8-byte grid: loading a constant of 8 bytes never crosses a page.
        self.pool.resize(self.pool.len().next_multiple_of(8), 0);
        self.area.pool().wrapping_add(at)
    }

    /// Checks a 16-byte access.
    fn check_halves(&self, addr: u64) -> Result<()> {
        self.check(Bus::Mmio, Place::at(addr), 8)?;
        self.check(Bus::Mmio, Place::at(addr + 8), 8)
    }

    /// Checks size and address: the access has to leave the guest.
    fn check(&self, bus: Bus, place: Place, size: u8) -> Result<()> {
        let (sizes, end): (&[u8], u64) = match bus {
            Bus::Mmio => (&[1, 2, 4, 8], MMIO_END),
            Bus::Pio => (&[1, 2, 4], 0x1_0000),
        };
        if !sizes.contains(&size) {
            return Err(Error::BadSize { bus, size });
        }
        let addr = place.addr;
        if bus == Bus::Mmio && addr < self.ram_end {
            return Err(Error::AddressInRam {
                addr,
                ram_end: self.ram_end,
            });
        }
        let span = place
            .stride
            .map_or(0, |s| u64::from(s.count - 1) * u64::from(s.bytes));
        let last = addr
            .saturating_add(span)
            .saturating_add(u64::from(size) - 1);
        if last >= end {
            return Err(Error::AddressOutOfRange { bus, addr: last });
        }
        Ok(())
    }
}
