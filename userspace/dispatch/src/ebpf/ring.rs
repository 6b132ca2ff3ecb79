//! KVM's coalesced ring: one per VM, writes that zones have swallowed, in order.

use std::io;
use std::mem::offset_of;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::atomic::Ordering;

use ioregion_abi::Bus;
use ioregion_abi::access::value_from_bytes;
use kvm_bindings::{KVM_COALESCED_MMIO_PAGE_OFFSET, kvm_coalesced_mmio, kvm_coalesced_mmio_ring};
use kvm_ioctls::VcpuFd;

use crate::sys::mmap::Mapping;

const PAGE: usize = 4096;
const HEADER: usize = size_of::<kvm_coalesced_mmio_ring>();
const ENTRY: usize = size_of::<kvm_coalesced_mmio>();
/// `KVM_COALESCED_MMIO_MAX` of `virt/kvm/coalesced_mmio.h`.
const ENTRIES: u32 = ((PAGE - HEADER) / ENTRY) as u32;

/// A write that a zone has swallowed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Swallowed {
    pub(crate) bus: Bus,
    pub(crate) addr: u64,
    /// 1 to 8.
    pub(crate) bytes: u8,
    pub(crate) data: [u8; 8],
}

impl Swallowed {
    pub(crate) fn value(&self) -> u64 {
        value_from_bytes(&self.data[..self.bytes.into()])
    }
}

/// The ring. Whoever holds the only `&mut` is the one consumer that it may have.
#[derive(Debug)]
pub(crate) struct Ring {
    page: Mapping,
}

impl Ring {
    /// Maps the VM's ring through one of its vCPUs.
    pub(crate) fn of(vcpu: &VcpuFd) -> io::Result<Self> {
        // SAFETY: The vCPU owns the descriptor and outlives the borrow.
        let fd = unsafe { BorrowedFd::borrow_raw(vcpu.as_raw_fd()) };
        let offset = KVM_COALESCED_MMIO_PAGE_OFFSET as usize * PAGE;
        Ok(Self {
            page: Mapping::of_kernel(fd, offset, PAGE, true)?,
        })
    }

    /// `first` and `last` stand in one word: the consumer's and KVM's half.
    fn indices(&self, order: Ordering) -> (u32, u32) {
        let word = self.page.word(0).load(order).to_ne_bytes();
        let half =
            |at: usize| u32::from_ne_bytes([word[at], word[at + 1], word[at + 2], word[at + 3]]);
        let (first, last) = (
            half(offset_of!(kvm_coalesced_mmio_ring, first)),
            half(offset_of!(kvm_coalesced_mmio_ring, last)),
        );
        (first % ENTRIES, last % ENTRIES)
    }

    pub(crate) fn is_empty(&self) -> bool {
        let (first, last) = self.indices(Ordering::Acquire);
        first == last
    }

    /// Takes the oldest write.
    pub(crate) fn pop(&mut self) -> Option<Swallowed> {
        let (first, last) = self.indices(Ordering::Acquire);
        if first == last {
            return None;
        }
        let at = HEADER + first as usize * ENTRY;
        let word = |offset: usize| {
            self.page
                .word(at + offset)
                .load(Ordering::Relaxed)
                .to_ne_bytes()
        };
        let len_and_bus = word(offset_of!(kvm_coalesced_mmio, len));
        let [l0, l1, l2, l3, b0, b1, b2, b3] = len_and_bus;
        let len = u32::from_ne_bytes([l0, l1, l2, l3]);
        let swallowed = Swallowed {
            bus: if u32::from_ne_bytes([b0, b1, b2, b3]) == 1 {
                Bus::Pio
            } else {
                Bus::Mmio
            },
            addr: u64::from_ne_bytes(word(offset_of!(kvm_coalesced_mmio, phys_addr))),
            bytes: len.clamp(1, 8) as u8,
            data: word(offset_of!(kvm_coalesced_mmio, data)),
        };
        self.page.store_u32(
            offset_of!(kvm_coalesced_mmio_ring, first),
            (first + 1) % ENTRIES,
        );
        Some(swallowed)
    }
}

const _: () = {
    assert!(HEADER == 8 && ENTRY == 24 && ENTRIES == 170);
    assert!(offset_of!(kvm_coalesced_mmio, len) == 8 && offset_of!(kvm_coalesced_mmio, data) == 16);
};
