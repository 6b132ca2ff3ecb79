//! What a device model implements. A device never knows which mechanism delivered an access.

use std::os::fd::BorrowedFd;

use ioregion_abi::{Bus, Size};

/// One access of the guest, as the device sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Access {
    /// The region's opaque value, which tells the regions of one device apart.
    pub user_data: u64,
    /// Byte offset in the region.
    pub offset: u64,
    /// Size of the access.
    pub size: Size,
}

/// A doorbell that rang: one or more posted writes to one doorbell address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ring {
    /// The region's opaque value.
    pub user_data: u64,
    /// Index of the doorbell in its region's list.
    pub index: u32,
    /// Byte offset in the region.
    pub offset: u64,
    /// Size of the write.
    pub size: Size,
    /// The value written last; `None` where the mechanism cannot carry it (plain `ioeventfd`).
    pub value: Option<u64>,
    /// How many writes this ring stands for, at least 1. More than one: the earlier values were
    /// overwritten before the device task looked (only where delivery is
    /// [`Latest`](crate::Delivery::Latest)).
    pub writes: u64,
}

/// A device model.
///
/// One device is called by one task at a time: the vCPU thread that made the access
/// (`kvm-run`), or the device task's server. Calls arrive in the order in which one vCPU made
/// its accesses to one region; a read comes after every doorbell that was written before it.
/// Whatever arrives is the guest's input: a device must not panic on it.
pub trait Device: Send {
    /// The guest reads; returns the value (bits beyond the size are ignored).
    fn read(&mut self, access: Access) -> u64;

    /// The guest writes.
    fn write(&mut self, access: Access, data: u64);

    /// The guest rang a doorbell that the region declares.
    ///
    /// The default hands the value on to [`write`](Self::write), as if the address were an
    /// ordinary register, and does nothing where there is no value.
    fn doorbell(&mut self, ring: Ring) {
        if let Some(value) = ring.value {
            let access = Access {
                user_data: ring.user_data,
                offset: ring.offset,
                size: ring.size,
            };
            self.write(access, value);
        }
    }

    /// What the device waits for besides the guest: I/O of its own, say. The same as long as it is
    /// served.
    ///
    /// Servers that sleep wait for it, too, and call [`woken`](Self::woken) when it is readable.
    /// Where a device is called by vCPU threads (`kvm-run`), nobody does.
    fn event(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    /// [`event`](Self::event) was readable, and all that the guest had done before it became so
    /// has been delivered. It is the device's to make it unreadable.
    fn woken(&mut self) {}
}

impl<D: Device + ?Sized> Device for Box<D> {
    fn read(&mut self, access: Access) -> u64 {
        (**self).read(access)
    }

    fn write(&mut self, access: Access, data: u64) {
        (**self).write(access, data);
    }

    fn doorbell(&mut self, ring: Ring) {
        (**self).doorbell(ring);
    }

    fn event(&self) -> Option<BorrowedFd<'_>> {
        (**self).event()
    }

    fn woken(&mut self) {
        (**self).woken();
    }
}

/// An access with its place on the bus, as the vCPU sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BusAccess {
    /// The bus.
    pub bus: Bus,
    /// Guest physical address or port.
    pub addr: u64,
    /// Size of the access.
    pub size: Size,
    /// The value written; `None` for a read.
    pub write: Option<u64>,
}
