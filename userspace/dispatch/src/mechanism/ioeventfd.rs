//! `ioeventfd`: KVM signals an eventfd for each doorbell. The value is lost, and whatever is no
//! doorbell is forwarded.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};

use kvm_ioctls::VmFd;
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::forward::{WirePath, check_channel};
use super::{Assignment, Carried, Carrier, Mechanism, Placed};
use crate::channel::Channel;
use crate::device::BusAccess;
use crate::error::{RegionError, RegionErrorKind};
use crate::region::{Doorbell, Region};
use crate::source::{DoorbellSource, EventDoorbell, Eventfds, NUDGE};
use crate::sys::kvm;
use crate::vm::VmShared;
use crate::waiter::Waiter;

/// The mechanism `ioeventfd`.
///
/// Doorbells that KVM cannot match (a partial mask) or must not merge
/// ([`Delivery::Fifo`](crate::Delivery::Fifo)) are forwarded.
#[derive(Debug, Clone)]
pub struct Ioeventfd {
    channel: Arc<Channel>,
}

impl Ioeventfd {
    /// Name of the mechanism.
    pub const NAME: &'static str = "ioeventfd";

    /// Reads and writes that are no doorbells go over `channel`.
    #[must_use]
    pub fn new(channel: &Arc<Channel>) -> Self {
        Self {
            channel: Arc::clone(channel),
        }
    }
}

impl Mechanism for Ioeventfd {
    fn name(&self) -> &'static str {
        Self::NAME
    }

    fn assign(&self, vm: &Arc<VmShared>, placed: &Arc<Placed>) -> Result<Assignment, RegionError> {
        let region = &placed.region;
        check_channel(&self.channel, region)?;
        let mut sinks = EventfdSinks::default();
        let mut doorbells = Vec::new();
        for (index, doorbell) in (0..).zip(&region.doorbells) {
            if !doorbell.is_full_match() || doorbell.delivery == crate::Delivery::Fifo {
                continue;
            }
            // One descriptor for both sides: regions may have thousands of doorbells.
            let added = eventfd().map(Arc::new).and_then(|eventfd| {
                sinks.add(vm.vm(), region, doorbell, Arc::clone(&eventfd))?;
                Ok(eventfd)
            });
            match added {
                Ok(eventfd) => doorbells.push(EventDoorbell {
                    eventfd,
                    index,
                    offset: doorbell.offset,
                    size: doorbell.size,
                    value: doorbell.datamatch.map(|m| m.value),
                }),
                Err(error) => {
                    sinks.remove(vm.vm());
                    return Err(region.error(sink_error("KVM_IOEVENTFD", error)));
                }
            }
        }
        let posted = region.posted_writes && doorbells.is_empty();
        let source = if doorbells.is_empty() {
            None
        } else {
            match Eventfds::new(region.user_data, doorbells) {
                Ok(source) => Some(DoorbellSource::Eventfds(source)),
                Err(error) => {
                    sinks.remove(vm.vm());
                    return Err(region.error(RegionErrorKind::BadDescriptor(error)));
                }
            }
        };
        let carrier = WithEventfds {
            wire: WirePath::new(vm, &self.channel, placed, posted),
            sinks: Mutex::new(sinks),
        };
        let mut assignment = Assignment::new(Self::NAME, carrier);
        assignment.sources.extend(source);
        Ok(assignment)
    }
}

pub(crate) fn eventfd() -> io::Result<OwnedFd> {
    let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
    Ok(EventFd::from_value_and_flags(0, flags)?.into())
}

pub(crate) fn sink_error(what: &'static str, error: io::Error) -> RegionErrorKind {
    match error.raw_os_error() {
        Some(libc::ENOSPC) => RegionErrorKind::TableFull("KVM's I/O bus"),
        _ => RegionErrorKind::Kvm { what, error },
    }
}

/// Wakes the task that an eventfd belongs to in KVM's place.
pub(crate) fn nudge(eventfd: &OwnedFd) {
    // Refused only by a full counter, which wakes as well.
    let _ = nix::unistd::write(eventfd, &NUDGE.to_ne_bytes());
}

/// The ioeventfds of one region.
#[derive(Debug, Default)]
pub(crate) struct EventfdSinks(Vec<(kvm::Ioeventfd, Arc<OwnedFd>)>);

impl EventfdSinks {
    pub(crate) fn add(
        &mut self,
        vm: &VmFd,
        region: &Region,
        doorbell: &Doorbell,
        eventfd: Arc<OwnedFd>,
    ) -> io::Result<()> {
        let what = kvm::Ioeventfd {
            bus: region.bus,
            addr: region.base + doorbell.offset,
            bytes: doorbell.size.bytes(),
            datamatch: doorbell.datamatch.map(|m| m.value),
        };
        kvm::ioeventfd(vm, &what, eventfd.as_fd(), false)?;
        self.0.push((what, eventfd));
        Ok(())
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The eventfd that all doorbells share.
    pub(crate) fn shared(&self) -> Option<Arc<OwnedFd>> {
        self.0.first().map(|(_, eventfd)| Arc::clone(eventfd))
    }

    /// Wakes the task in KVM's place, where all doorbells share one eventfd.
    pub(crate) fn nudge(&self) {
        if let Some((_, eventfd)) = self.0.first() {
            nudge(eventfd);
        }
    }

    pub(crate) fn remove(&mut self, vm: &VmFd) {
        for (what, eventfd) in self.0.drain(..) {
            if let Err(error) = kvm::ioeventfd(vm, &what, eventfd.as_fd(), true) {
                tracing::error!(?what, %error, "cannot remove an ioeventfd");
            }
        }
    }
}

#[derive(Debug)]
struct WithEventfds {
    wire: WirePath,
    sinks: Mutex<EventfdSinks>,
}

impl Carrier for WithEventfds {
    fn carry(&self, access: &BusAccess, waiter: &mut Waiter) -> io::Result<Carried> {
        self.wire.carry(access, waiter)
    }

    fn replay(&self, access: &BusAccess) -> bool {
        self.wire.replay(access)
    }

    fn retire(&self, abandon: bool) {
        self.wire.retire(abandon);
    }

    fn unsink(&self, vm: &VmFd) -> bool {
        let mut sinks = self.sinks.lock().unwrap_or_else(PoisonError::into_inner);
        let any = !sinks.is_empty();
        sinks.remove(vm);
        any
    }
}
