//! The proposed `POST_WRITE` of ioeventfds: KVM stores the value, then signals the eventfd.
//!
//! Not one of the library's mechanisms: it is here only to be compared with them, and so is
//! served by the same server as a plain ioeventfd.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result};
use ioregion_abi::kvm::{KVM_CHECK_EXTENSION, KVM_IOEVENTFD};
use ioregion_dispatch::source::{DoorbellSource, EventDoorbell, Eventfds};
use ioregion_dispatch::{Access, Device, Ring, Size};
use kvm_ioctls::VmFd;
use nix::errno::Errno;
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::meter::Meter;

/// The capability of the optional last patch of the series.
const KVM_CAP_IOEVENTFD_POST_WRITE: u64 = 0xf0f1;
const DEASSIGN: u32 = 1 << 2;
const POST_WRITE: u32 = 1 << 5;

/// `struct kvm_ioeventfd` with the member that the patch adds.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct KvmIoeventfd {
    datamatch: u64,
    addr: u64,
    len: u32,
    fd: i32,
    flags: u32,
    pad0: u32,
    post_addr: u64,
    pad: [u8; 24],
}

const _: () = assert!(size_of::<KvmIoeventfd>() == 64);

/// Whether the kernel has it.
pub fn is_supported(vm: &VmFd) -> bool {
    // SAFETY: The request takes a number.
    let found = unsafe {
        libc::ioctl(
            vm.as_raw_fd(),
            KVM_CHECK_EXTENSION,
            KVM_CAP_IOEVENTFD_POST_WRITE,
        )
    };
    found > 0
}

/// A doorbell of four bytes; KVM forgets it when this is dropped.
#[derive(Debug)]
pub struct PostWrite {
    vm: Arc<VmFd>,
    addr: u64,
    eventfd: Arc<OwnedFd>,
    value: Arc<AtomicU32>,
}

/// The device, as it sees a ring whose value KVM has stored.
#[derive(Debug)]
pub struct WithValue {
    meter: Meter,
    value: Arc<AtomicU32>,
}

impl PostWrite {
    /// Registers the doorbell at `addr`.
    ///
    /// # Errors
    ///
    /// KVM's: `EINVAL` where it does not know the flag.
    pub fn new(vm: &Arc<VmFd>, addr: u64) -> Result<Self> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let doorbell = Self {
            vm: Arc::clone(vm),
            addr,
            eventfd: Arc::new(EventFd::from_value_and_flags(0, flags)?.into()),
            value: Arc::default(),
        };
        doorbell.request(0).context("KVM_IOEVENTFD, POST_WRITE")?;
        Ok(doorbell)
    }

    fn request(&self, flags: u32) -> io::Result<()> {
        let request = KvmIoeventfd {
            datamatch: 0,
            addr: self.addr,
            len: 4,
            fd: self.eventfd.as_raw_fd(),
            flags: flags | POST_WRITE,
            pad0: 0,
            post_addr: self.value.as_ptr() as u64,
            pad: [0; 24],
        };
        // SAFETY: KVM only reads `request`. It stores to `value` until the doorbell is removed:
        // `drop` does that before `value` can go.
        let result = unsafe { libc::ioctl(self.vm.as_raw_fd(), KVM_IOEVENTFD, &raw const request) };
        Errno::result(result)?;
        Ok(())
    }

    /// What a device task needs: where it is woken, and `meter` as a device that knows the value.
    ///
    /// # Errors
    ///
    /// The system's.
    pub fn device(&self, meter: Meter) -> Result<(DoorbellSource, WithValue)> {
        let doorbell = EventDoorbell {
            eventfd: Arc::clone(&self.eventfd),
            index: 0,
            offset: 0,
            size: Size::B4,
            value: None,
        };
        let source = DoorbellSource::Eventfds(Eventfds::new(0, vec![doorbell])?);
        let value = Arc::clone(&self.value);
        Ok((source, WithValue { meter, value }))
    }
}

impl Drop for PostWrite {
    fn drop(&mut self) {
        if let Err(error) = self.request(DEASSIGN) {
            tracing::error!(%error, "cannot remove an ioeventfd");
            // KVM still stores to it.
            std::mem::forget(Arc::clone(&self.value));
        }
    }
}

impl Device for WithValue {
    fn read(&mut self, access: Access) -> u64 {
        self.meter.read(access)
    }

    fn write(&mut self, access: Access, data: u64) {
        self.meter.write(access, data);
    }

    fn doorbell(&mut self, ring: Ring) {
        // The eventfd was signalled after the value had been stored.
        let value = self.value.load(Ordering::Acquire);
        self.meter.doorbell(Ring {
            value: Some(value.into()),
            ..ring
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::run::meter::Check;
    use crate::scenarios::Operation;

    #[test]
    fn ring_has_the_value_that_was_stored() {
        let meter = Meter::new(Check::Latest, Operation::Posted, 1);
        let mut device = WithValue {
            meter: meter.clone(),
            value: Arc::new(AtomicU32::new(7)),
        };
        device.doorbell(Ring {
            user_data: 0,
            index: 0,
            offset: 0,
            size: Size::B4,
            value: None,
            writes: 7,
        });
        let seen = meter.seen([8, 1], &[[7, 0]]);
        assert_eq!(
            (seen.writes, seen.wrong.lost, seen.wrong.reordered),
            (7, 0, 0)
        );
        assert!(meter.seen([8, 1], &[[6, 0]]).wrong.reordered > 0);
    }
}
