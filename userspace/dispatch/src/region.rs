//! Regions and their doorbells: what a VMM declares before it picks a mechanism.

use std::collections::{HashMap, HashSet};

use ioregion_abi::{Bus, Size};

use crate::error::{RegionError, RegionErrorKind};
use crate::registers::RegisterFile;

/// How the writes to one doorbell reach the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Delivery {
    /// The last value and how many writes it stands for: enough where the register is a state
    /// (NVMe tail pointers, virtio queue notifications). Between different doorbells of a
    /// region the order of the writes is not kept.
    #[default]
    Latest,
    /// Each write, in order.
    Fifo,
}

/// When a doorbell wakes the device task.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Wake {
    /// Never: the task polls.
    Never,
    /// When the task has said that it is about to sleep.
    #[default]
    WhenArmed,
    /// On each write.
    Always,
}

/// What keeps an `ebpf` doorbell from exiting to user space, on kernels where that takes a sink
/// ([`Via::Tracepoints`](crate::Via::Tracepoints)); and who wakes the device task.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Sink {
    /// An ioeventfd; KVM itself signals it, whatever [`Wake`] says.
    #[default]
    Ioeventfd,
    /// A coalesced zone; the eBPF program wakes, where [`Wake`] says so.
    Coalesced,
}

/// The values that ring a doorbell: those equal to `value` under `mask`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct DataMatch {
    /// Bits that count.
    pub mask: u64,
    /// What they must be.
    pub value: u64,
}

/// A posted write that only has to be noticed, with or without its value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Doorbell {
    /// Byte offset in the region.
    pub offset: u64,
    /// Size of the write; writes of other sizes at this offset are ordinary ones.
    pub size: Size,
    /// Which values ring it; `None`: all.
    pub datamatch: Option<DataMatch>,
    /// How writes are delivered.
    pub delivery: Delivery,
    /// When the task is woken.
    pub wake: Wake,
    /// What swallows the write (`ebpf` only).
    pub sink: Sink,
}

impl Doorbell {
    /// A doorbell for all values, delivered as [`Delivery::Latest`] through an ioeventfd.
    #[must_use]
    pub fn new(offset: u64, size: Size) -> Self {
        Self {
            offset,
            size,
            datamatch: None,
            delivery: Delivery::default(),
            wake: Wake::default(),
            sink: Sink::default(),
        }
    }

    /// Rings only for `value`, compared at full width.
    #[must_use]
    pub fn matching(self, value: u64) -> Self {
        self.matching_masked(self.size.mask(), value)
    }

    /// Rings only for values that equal `value` in the bits of `mask`.
    #[must_use]
    pub fn matching_masked(mut self, mask: u64, value: u64) -> Self {
        self.datamatch = Some(DataMatch { mask, value });
        self
    }

    /// Sets the delivery. [`Delivery::Fifo`] implies [`Sink::Coalesced`].
    #[must_use]
    pub fn delivery(mut self, delivery: Delivery) -> Self {
        self.delivery = delivery;
        if delivery == Delivery::Fifo {
            self.sink = Sink::Coalesced;
        }
        self
    }

    /// Sets the sink.
    #[must_use]
    pub fn sink(mut self, sink: Sink) -> Self {
        self.sink = sink;
        self
    }

    /// Sets the wake-up policy.
    #[must_use]
    pub fn wake(mut self, wake: Wake) -> Self {
        self.wake = wake;
        self
    }

    /// Whether a write of `size` bytes of `data` at `offset` rings this doorbell.
    #[must_use]
    pub fn rings(&self, offset: u64, size: Size, data: u64) -> bool {
        self.offset == offset
            && self.size == size
            && self
                .datamatch
                .is_none_or(|m| data & m.mask & size.mask() == m.value)
    }

    /// Whether all bits of the value are compared (or none), so that KVM can match by itself.
    #[must_use]
    pub fn is_full_match(&self) -> bool {
        self.datamatch
            .is_none_or(|m| m.mask & self.size.mask() == self.size.mask())
    }
}

/// A register whose reads may be answered from the region's [`RegisterFile`], without the device.
///
/// Only the mechanism [`Ebpf`](crate::mechanism::Ebpf) on a kernel that can do it
/// ([`Via::Hook`](crate::Via::Hook)) does so; elsewhere, and for reads of other sizes or at other
/// offsets, [`Device::read`](crate::Device::read) is asked as ever.
///
/// **An answered read does not observe a doorbell that the device has not handled yet**, nor a
/// posted write that is on its way: unlike other reads it flushes nothing. So declare no register
/// that a driver reads back to learn that its writes have arrived.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Answered {
    /// Byte offset in the region.
    pub offset: u64,
    /// Size of the read; it returns that many low bytes of the register.
    pub size: Size,
    /// Index of the register in the file.
    pub index: u32,
}

impl Answered {
    /// Reads of `size` at `offset` are answered from the register with this index.
    #[must_use]
    pub fn new(offset: u64, size: Size, index: u32) -> Self {
        Self {
            offset,
            size,
            index,
        }
    }
}

/// An address range with a device behind it.
///
/// The fields are those of `struct kvm_ioregion` (ioregionfd design discussion, 2020), plus the
/// doorbells and the registers whose reads may be answered without the device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Region {
    /// The bus.
    pub bus: Bus,
    /// First guest physical address, or first port.
    pub base: u64,
    /// Size in bytes.
    pub size: u64,
    /// Opaque value that comes with each access.
    pub user_data: u64,
    /// Whether writes are posted: the vCPU goes on before the device has seen them.
    pub posted_writes: bool,
    /// Addresses where a write only has to be noticed.
    pub doorbells: Vec<Doorbell>,
    /// Registers whose reads may be answered from `registers`.
    pub answered: Vec<Answered>,
    /// The values of those.
    pub registers: Option<RegisterFile>,
}

impl Region {
    /// A region of memory-mapped registers without doorbells, whose writes wait.
    #[must_use]
    pub fn mmio(base: u64, size: u64) -> Self {
        Self {
            bus: Bus::Mmio,
            base,
            size,
            user_data: 0,
            posted_writes: false,
            doorbells: Vec::new(),
            answered: Vec::new(),
            registers: None,
        }
    }

    /// A region of ports without doorbells, whose writes wait.
    #[must_use]
    pub fn pio(base: u16, size: u16) -> Self {
        Self {
            bus: Bus::Pio,
            ..Self::mmio(base.into(), size.into())
        }
    }

    /// Sets the opaque value.
    #[must_use]
    pub fn user_data(mut self, user_data: u64) -> Self {
        self.user_data = user_data;
        self
    }

    /// Makes writes posted.
    #[must_use]
    pub fn posted_writes(mut self) -> Self {
        self.posted_writes = true;
        self
    }

    /// Adds a doorbell.
    #[must_use]
    pub fn doorbell(mut self, doorbell: Doorbell) -> Self {
        self.doorbells.push(doorbell);
        self
    }

    /// Sets the file that [`answered`](Self::answered) registers have their values from.
    #[must_use]
    pub fn registers(mut self, registers: &RegisterFile) -> Self {
        self.registers = Some(registers.clone());
        self
    }

    /// Adds a register whose reads may be answered without the device.
    #[must_use]
    pub fn answered(mut self, answered: Answered) -> Self {
        self.answered.push(answered);
        self
    }

    /// Last address (inclusive). Valid only for regions that passed [`check`](Self::check).
    #[must_use]
    pub fn last(&self) -> u64 {
        self.base + (self.size - 1)
    }

    /// Whether the whole access lies in the region.
    #[must_use]
    pub fn contains(&self, addr: u64, size: Size) -> bool {
        addr.checked_sub(self.base)
            .and_then(|offset| offset.checked_add(size.bytes().into()))
            .is_some_and(|end| end <= self.size)
    }

    /// Checks what can be checked without a VM.
    ///
    /// # Errors
    ///
    /// [`RegionError`] naming the region and what is wrong with it.
    pub fn check(&self) -> Result<(), RegionError> {
        use RegionErrorKind as Kind;
        let space: u64 = match self.bus {
            Bus::Mmio => u64::MAX,
            Bus::Pio => u16::MAX.into(),
        };
        let fail = |kind| Err(self.error(kind));
        if self.size == 0 {
            return fail(Kind::Empty);
        }
        if self.base > space || self.size - 1 > space - self.base {
            return fail(Kind::OutsideAddressSpace);
        }
        let mut masks = HashMap::new();
        let mut seen = HashSet::new();
        for doorbell in &self.doorbells {
            let at = doorbell.offset;
            let end = at.checked_add(doorbell.size.bytes().into());
            if end.is_none_or(|end| end > self.size) {
                return fail(Kind::DoorbellOutside(at));
            }
            if self.bus == Bus::Pio && doorbell.size == Size::B8 {
                return fail(Kind::DoorbellSize(at));
            }
            let (mask, value) = doorbell.datamatch.map_or((0, 0), |m| (m.mask, m.value));
            if mask & !doorbell.size.mask() != 0 || value & !mask != 0 {
                return fail(Kind::DoorbellValue(at));
            }
            if *masks.entry((at, doorbell.size)).or_insert(mask) != mask {
                return fail(Kind::DoorbellMasks(at));
            }
            if !seen.insert((at, doorbell.size, value)) {
                return fail(Kind::DoorbellTwice(at));
            }
        }
        // KVM finds a consumer by binary search; ranges may share their start but not straddle.
        let mut ranges: Vec<_> = masks
            .keys()
            .map(|&(at, size)| (at, at + u64::from(size.bytes())))
            .collect();
        ranges.sort_unstable();
        for pair in ranges.windows(2) {
            if pair[0].0 != pair[1].0 && pair[1].0 < pair[0].1 {
                return fail(Kind::DoorbellOverlap(pair[1].0));
            }
        }
        self.check_answered().map_err(|kind| self.error(kind))
    }

    fn check_answered(&self) -> Result<(), RegionErrorKind> {
        use RegionErrorKind as Kind;
        let mut seen = HashSet::new();
        for &Answered {
            offset,
            size,
            index,
        } in &self.answered
        {
            let end = offset.checked_add(size.bytes().into());
            if end.is_none_or(|end| end > self.size) {
                return Err(Kind::AnsweredOutside(offset));
            }
            if self.bus == Bus::Pio && size == Size::B8 {
                return Err(Kind::AnsweredSize(offset));
            }
            if !seen.insert((offset, size)) {
                return Err(Kind::AnsweredTwice(offset));
            }
            let Some(registers) = &self.registers else {
                return Err(Kind::NoRegisterFile(offset));
            };
            if index >= registers.len() {
                let len = registers.len();
                return Err(Kind::AnsweredIndex { offset, index, len });
            }
        }
        Ok(())
    }

    pub(crate) fn error(&self, kind: RegionErrorKind) -> RegionError {
        RegionError {
            bus: self.bus,
            base: self.base,
            size: self.size,
            kind,
        }
    }
}

/// Finds the doorbell that a write rings, in constant time.
///
/// The user-space twin of [`ioregion_abi::matching::find`], over one region.
#[derive(Debug, Clone, Default)]
pub struct DoorbellIndex {
    places: HashMap<(u64, Size), Place>,
}

/// The doorbells of one size at one offset; they share a mask (0: no datamatch).
#[derive(Debug, Clone)]
struct Place {
    mask: u64,
    by_value: HashMap<u64, u32>,
}

impl DoorbellIndex {
    /// An index of the doorbells of a region that has passed [`Region::check`].
    #[must_use]
    pub fn new(doorbells: &[Doorbell]) -> Self {
        let mut places: HashMap<_, Place> = HashMap::new();
        for (index, doorbell) in (0..).zip(doorbells) {
            let (mask, value) = doorbell.datamatch.map_or((0, 0), |m| (m.mask, m.value));
            let place = places
                .entry((doorbell.offset, doorbell.size))
                .or_insert_with(|| Place {
                    mask,
                    by_value: HashMap::new(),
                });
            place.by_value.entry(value).or_insert(index);
        }
        Self { places }
    }

    /// Index of the doorbell that a write of `data` rings.
    #[must_use]
    pub fn find(&self, offset: u64, size: Size, data: u64) -> Option<u32> {
        let place = self.places.get(&(offset, size))?;
        place
            .by_value
            .get(&(data & size.mask() & place.mask))
            .copied()
    }
}

#[cfg(test)]
mod tests;
