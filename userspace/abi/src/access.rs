//! One guest access and the pieces that KVM makes of it.

/// The address space that an access goes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub enum Bus {
    /// Memory-mapped I/O: guest physical addresses.
    Mmio = 0,
    /// Port I/O (x86): 16-bit ports.
    Pio = 1,
}

/// Which way the data goes, seen from the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Direction {
    /// The guest loads from the device.
    Read,
    /// The guest stores to the device.
    Write,
}

/// Size of one access on the bus: 1, 2, 4 or 8 bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub enum Size {
    /// 8 bits.
    B1 = 0,
    /// 16 bits.
    B2 = 1,
    /// 32 bits.
    B4 = 2,
    /// 64 bits.
    B8 = 3,
}

impl Size {
    /// All sizes, smallest first.
    pub const ALL: [Self; 4] = [Self::B1, Self::B2, Self::B4, Self::B8];

    /// The size in bytes.
    #[must_use]
    pub const fn bytes(self) -> u8 {
        1 << self as u8
    }

    /// The size for a number of bytes; `None` unless it is 1, 2, 4 or 8.
    #[must_use]
    pub const fn from_bytes(bytes: u64) -> Option<Self> {
        match bytes {
            1 => Some(Self::B1),
            2 => Some(Self::B2),
            4 => Some(Self::B4),
            8 => Some(Self::B8),
            _ => None,
        }
    }

    /// A mask of the bits that an access of this size carries.
    #[must_use]
    pub const fn mask(self) -> u64 {
        u64::MAX >> (64 - 8 * self.bytes() as u32)
    }
}

/// The largest piece of a memory-mapped access that reaches KVM's I/O bus, in bytes.
///
/// `vcpu_mmio_write()` in `arch/x86/kvm/x86.c` cuts longer accesses at this grid, counted from
/// the first byte of the access (or of its part on one page).
pub const CHUNK: u64 = 8;

/// Makes an integer of up to eight bytes of host-endian data, as KVM stores them in `kvm_run`.
#[must_use]
pub fn value_from_bytes(bytes: &[u8]) -> u64 {
    let mut value = [0; 8];
    let len = bytes.len().min(8);
    if cfg!(target_endian = "big") {
        value[8 - len..].copy_from_slice(&bytes[..len]);
    } else {
        value[..len].copy_from_slice(&bytes[..len]);
    }
    u64::from_ne_bytes(value)
}

/// Stores the low bytes of `value` in `bytes`, host-endian: the inverse of [`value_from_bytes`].
pub fn value_to_bytes(value: u64, bytes: &mut [u8]) {
    let len = bytes.len().min(8);
    let value = value.to_ne_bytes();
    if cfg!(target_endian = "big") {
        bytes[..len].copy_from_slice(&value[8 - len..]);
    } else {
        bytes[..len].copy_from_slice(&value[..len]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn sizes_and_masks_agree() {
        for size in Size::ALL {
            assert_eq!(Size::from_bytes(size.bytes().into()), Some(size));
            assert_eq!(size.mask().count_ones(), u32::from(size.bytes()) * 8);
        }
        assert_eq!(Size::from_bytes(0), None);
        assert_eq!(Size::from_bytes(3), None);
        assert_eq!(Size::from_bytes(16), None);
    }

    proptest! {
        #[test]
        fn bytes_survive_the_way_through_an_integer(
            value: u64, size in prop::sample::select(&Size::ALL[..])
        ) {
            let mut bytes = [0; 8];
            let bytes = &mut bytes[..size.bytes().into()];
            value_to_bytes(value, bytes);
            prop_assert_eq!(value_from_bytes(bytes), value & size.mask());
        }
    }
}
