//! The controller's registers in the guest's address space.

use ioregion_dispatch::{Delivery, Doorbell, Region, Size};

use super::spec::register::DOORBELLS;

/// Bytes of the doorbells of one queue number: submission queue tail, completion queue head.
const PAIR: u64 = 8;

/// Opaque values of the regions: queue numbers, and these.
pub(super) const REGISTERS: u64 = 1 << 32;
pub(super) const BEYOND: u64 = 1 << 33;

/// The regions of base address register 0.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bar {
    /// The registers: reads, and writes that wait. Served by an
    /// [`AdminChannel`](super::AdminChannel), through the same channel as the admin queues' and
    /// the last region: what one vCPU does stays in order there.
    pub registers: Region,
    /// The doorbells of each queue number, 0 of which are the admin queues: posted writes. Those
    /// from 1 on are each served by a [`QueueChannel`](super::QueueChannel) of their own.
    pub doorbells: Vec<Region>,
    /// What is left of the whole: there is nothing, and writes there are reported.
    pub beyond: Region,
}

/// Bytes of base address register 0 with so many I/O queues: a power of two.
pub(super) fn size(queues: u16) -> u64 {
    // There is always something beyond.
    (DOORBELLS + PAIR * (u64::from(queues) + 2)).next_power_of_two()
}

impl Bar {
    /// The regions, where the register says `base`. `values`: the mechanism tells a doorbell's
    /// value. One that loses it (`ioeventfd`) can only be used with regions that have no doorbells
    /// of their own, so that each write is carried as it is.
    pub(super) fn new(base: u64, queues: u16, values: bool) -> Self {
        let bell = |offset| Doorbell::new(offset, Size::B4).delivery(Delivery::Latest);
        let doorbells = (0..=u64::from(queues)).map(|number| {
            let start = base.saturating_add(DOORBELLS + PAIR * number);
            let region = Region::mmio(start, PAIR).user_data(number).posted_writes();
            match values {
                true => region.doorbell(bell(0)).doorbell(bell(4)),
                false => region,
            }
        });
        let used = DOORBELLS + PAIR * (u64::from(queues) + 1);
        let rest = size(queues) - used;
        Self {
            registers: Region::mmio(base, DOORBELLS).user_data(REGISTERS),
            doorbells: doorbells.collect(),
            beyond: Region::mmio(base.saturating_add(used), rest)
                .user_data(BEYOND)
                .posted_writes(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn regions_cover_the_register_without_overlap() {
        for queues in [1, 2, 3, 511] {
            for values in [false, true] {
                let base = 0xfe00_0000;
                let bar = Bar::new(base, queues, values);
                assert_eq!(bar.doorbells.len(), usize::from(queues) + 1);
                let mut next = base;
                let all = [&bar.registers].into_iter().chain(&bar.doorbells);
                for region in all.chain([&bar.beyond]) {
                    region.check().unwrap();
                    assert_eq!(region.base, next);
                    next += region.size;
                    let bells = region.user_data <= u64::from(queues) && values;
                    assert_eq!(region.doorbells.len(), if bells { 2 } else { 0 });
                }
                assert_eq!(next - base, size(queues));
            }
        }
    }
}
