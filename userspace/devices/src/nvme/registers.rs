//! The controller's registers (section 3.1).

use super::spec::{MAX_ENTRIES, MAX_PAGE_SHIFT, PAGE, VERSION, register as at};

/// Enabled.
const CC_EN: u32 = 1;
/// Ready; fatal; shutting down; shut down.
const CSTS_RDY: u32 = 1;
const CSTS_CFS: u32 = 1 << 1;
const CSTS_SHST: u32 = 3 << 2;
const CSTS_OCCURRING: u32 = 1 << 2;
const CSTS_COMPLETE: u32 = 2 << 2;

/// Units of 500 ms after which a driver may give up waiting for `CSTS.RDY`: a reset waits for
/// I/O that is under way.
const TIMEOUT: u64 = 60;

/// The registers, and nothing of what they stand for.
#[derive(Debug)]
pub(super) struct Registers {
    masked: u32,
    cc: u32,
    csts: u32,
    aqa: u32,
    asq: u64,
    acq: u64,
}

/// What a write asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Effect {
    /// The controller begins to work.
    Enable(AdminQueues),
    /// It forgets everything; [`Registers::stopped`] ends that.
    Reset,
    /// It makes everything safe; [`Registers::shut_down`] ends that.
    Shutdown,
    /// Other interrupts are masked than before: these.
    Mask(u32),
    /// The driver asks for what this controller does not do: `CSTS.CFS` says so.
    Refused(&'static str),
}

/// Where the admin queues are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct AdminQueues {
    pub(super) sq: u64,
    pub(super) cq: u64,
    /// Entries.
    pub(super) sq_size: u32,
    pub(super) cq_size: u32,
    /// Bytes of a page.
    pub(super) page: u64,
}

impl Registers {
    pub(super) fn new() -> Self {
        Self {
            masked: 0,
            cc: 0,
            csts: 0,
            aqa: 0,
            asq: 0,
            acq: 0,
        }
    }

    fn capabilities() -> u64 {
        let most = u64::from(MAX_ENTRIES - 1);
        // Contiguous queues; the NVM command set.
        most | 1 << 16 | TIMEOUT << 24 | 1 << 37 | u64::from(MAX_PAGE_SHIFT) << 52
    }

    /// Reads bytes; those that are of no register are zero.
    pub(super) fn read(&self, offset: u64, bytes: u8) -> u64 {
        let dword = |at: u64| -> u32 {
            let long = |value: u64| (value >> (at % 8 * 8)) as u32;
            match at {
                at::CAP | 0x04 => long(Self::capabilities()),
                at::VS => VERSION,
                at::INTMS | at::INTMC => self.masked,
                at::CC => self.cc,
                at::CSTS => self.csts,
                at::AQA => self.aqa,
                at::ASQ | 0x2c => long(self.asq),
                at::ACQ | 0x34 => long(self.acq),
                _ => 0,
            }
        };
        (0..u64::from(bytes)).rev().fold(0, |value, byte| {
            let at = offset.wrapping_add(byte);
            let [b0, b1, b2, b3] = dword(at & !3).to_le_bytes();
            value << 8 | u64::from([b0, b1, b2, b3][(at % 4) as usize])
        })
    }

    /// Writes one dword or two. Others, and those of no register, go nowhere.
    pub(super) fn write(&mut self, offset: u64, bytes: u8, value: u64) -> Vec<Effect> {
        let mut effects = Vec::new();
        if offset.is_multiple_of(4) && (bytes == 4 || bytes == 8) {
            self.write_dword(offset, value as u32, &mut effects);
            if bytes == 8 {
                let high = offset.wrapping_add(4);
                self.write_dword(high, (value >> 32) as u32, &mut effects);
            }
        } else {
            tracing::debug!(offset, bytes, "a register is written in part");
        }
        effects
    }

    fn write_dword(&mut self, offset: u64, value: u32, effects: &mut Vec<Effect>) {
        let half = |old: u64, shift: u32| {
            old & !(u64::from(u32::MAX) << shift) | u64::from(value) << shift
        };
        match offset {
            at::INTMS => {
                self.masked |= value;
                effects.push(Effect::Mask(self.masked));
            }
            at::INTMC => {
                self.masked &= !value;
                effects.push(Effect::Mask(self.masked));
            }
            at::CC => self.configure(value, effects),
            at::AQA => self.aqa = value & 0x0fff_0fff,
            at::ASQ => self.asq = half(self.asq, 0) & !0xfff,
            0x2c => self.asq = half(self.asq, 32),
            at::ACQ => self.acq = half(self.acq, 0) & !0xfff,
            0x34 => self.acq = half(self.acq, 32),
            _ => tracing::debug!(offset, "a register that is none, or read-only, is written"),
        }
    }

    fn configure(&mut self, value: u32, effects: &mut Vec<Effect>) {
        let old = std::mem::replace(&mut self.cc, value & 0x00ff_fff1);
        match (old & CC_EN, value & CC_EN) {
            (0, CC_EN) => match self.admin_queues() {
                Ok(queues) => {
                    self.csts |= CSTS_RDY;
                    effects.push(Effect::Enable(queues));
                }
                Err(why) => {
                    self.csts |= CSTS_CFS;
                    effects.push(Effect::Refused(why));
                }
            },
            (CC_EN, 0) => {
                self.masked = 0;
                // Ready it stays until nothing is under way.
                self.csts &= CSTS_RDY;
                effects.extend([Effect::Mask(0), Effect::Reset]);
            }
            _ => {}
        }
        if shutdown(old) == 0 && shutdown(value) != 0 {
            self.csts = self.csts & !CSTS_SHST | CSTS_OCCURRING;
            effects.push(Effect::Shutdown);
        }
    }

    fn admin_queues(&self) -> Result<AdminQueues, &'static str> {
        if self.csts & CSTS_RDY != 0 {
            return Err("CC.EN: set before CSTS.RDY was clear");
        }
        if self.cc >> 4 & 7 != 0 {
            return Err("CC.CSS: a command set other than NVM");
        }
        if self.cc >> 11 & 7 != 0 {
            return Err("CC.AMS: an arbitration other than round robin");
        }
        let shift = self.cc >> 7 & 0xf;
        if shift > MAX_PAGE_SHIFT {
            return Err("CC.MPS: a page size that CAP.MPSMAX excludes");
        }
        let page = PAGE << shift;
        let (sq_size, cq_size) = ((self.aqa & 0xfff) + 1, (self.aqa >> 16) + 1);
        if sq_size < 2 || cq_size < 2 {
            return Err("AQA: an admin queue of less than two entries");
        }
        if !self.asq.is_multiple_of(page) || !self.acq.is_multiple_of(page) {
            return Err("ASQ, ACQ: an admin queue that does not begin with a page");
        }
        Ok(AdminQueues {
            sq: self.asq,
            cq: self.acq,
            sq_size,
            cq_size,
            page,
        })
    }

    /// Whether entries of I/O queues are of the sizes that there are.
    pub(super) fn entry_sizes(&self) -> (bool, bool) {
        (self.cc >> 16 & 0xf == 6, self.cc >> 20 & 0xf == 4)
    }

    /// A reset is over.
    pub(super) fn stopped(&mut self) {
        self.csts &= !CSTS_RDY;
    }

    /// A shutdown is over.
    pub(super) fn shut_down(&mut self) {
        if self.csts & CSTS_SHST == CSTS_OCCURRING {
            self.csts = self.csts & !CSTS_SHST | CSTS_COMPLETE;
        }
    }

    /// Nothing but a reset helps.
    pub(super) fn fatal(&mut self) {
        self.csts |= CSTS_CFS;
    }

    pub(super) fn is_enabled(&self) -> bool {
        self.cc & CC_EN != 0 && self.csts & CSTS_CFS == 0
    }
}

/// Why the driver wants it to shut down; 0: it does not.
fn shutdown(cc: u32) -> u32 {
    cc >> 14 & 3
}

#[cfg(test)]
mod tests;
