//! `ioregionfd`: KVM itself sends the command to the device task and waits for the response.
//!
//! Needs a kernel with the ioregionfd series. `KVM_RUN` does not return for such an access, so
//! there is nothing to carry here but what left the guest before KVM had the region.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ioregion_abi::Bus;
use ioregion_abi::kvm::{
    KVM_IOREGION_ABI_VERSION, KVM_IOREGION_DEASSIGN, KVM_IOREGION_PIO, KVM_IOREGION_POSTED_WRITES,
    KvmIoregion,
};
use kvm_ioctls::VmFd;
use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::{Assignment, Carried, Carrier, Mechanism, Placed, RegionId};
use crate::channel::Channel;
use crate::device::BusAccess;
use crate::error::{RegionError, RegionErrorKind};
use crate::region::Region;
use crate::sys::kvm;
use crate::vm::{EventSender, VmShared};
use crate::waiter::Waiter;

/// The mechanism `ioregionfd`, on a kernel that has it.
///
/// Reads wait, and writes wait unless the region is
/// [`posted_writes`](crate::Region::posted_writes); doorbells arrive as writes over the wire.
/// Accesses of a broken channel are counted by KVM (`ioregion_lost` of the vCPU's statistics), not
/// by the channel.
#[derive(Debug, Clone)]
pub struct Ioregionfd {
    channel: Arc<Channel>,
}

impl Ioregionfd {
    /// Name of the mechanism.
    pub const NAME: &'static str = "ioregionfd";

    /// Gives KVM the VMM's end of `channel`: a socket, pipes, or best
    /// [`Channel::purpose_made`].
    #[must_use]
    pub fn new(channel: &Arc<Channel>) -> Self {
        Self {
            channel: Arc::clone(channel),
        }
    }
}

/// Why this host does not offer the mechanism; `None` if it does.
pub(crate) fn missing(vm: &VmFd) -> Option<String> {
    match kvm::ioregion_revision(vm) {
        Ok(Some(KVM_IOREGION_ABI_VERSION)) => None,
        Ok(Some(revision)) => Some(format!(
            "this kernel has revision {revision} of KVM_SET_IOREGION, not \
             {KVM_IOREGION_ABI_VERSION}"
        )),
        Ok(None) => Some("this kernel has no KVM_SET_IOREGION".into()),
        Err(error) => Some(format!("KVM_SET_IOREGION cannot be probed: {error}")),
    }
}

impl Mechanism for Ioregionfd {
    fn name(&self) -> &'static str {
        Self::NAME
    }

    fn assign(&self, vm: &Arc<VmShared>, placed: &Arc<Placed>) -> Result<Assignment, RegionError> {
        let region = &placed.region;
        if let Some(reason) = missing(vm.vm()) {
            return Err(region.error(RegionErrorKind::Unavailable {
                mechanism: Self::NAME,
                reason,
            }));
        }
        let carrier = InKernel::new(vm, placed, &self.channel, region.posted_writes)?;
        Ok(Assignment::new(Self::NAME, carrier))
    }
}

fn request(region: &Region) -> KvmIoregion {
    KvmIoregion {
        guest_paddr: region.base,
        memory_size: region.size,
        user_data: region.user_data,
        read_fd: -1,
        write_fd: -1,
        flags: if region.bus == Bus::Pio {
            KVM_IOREGION_PIO
        } else {
            0
        },
        ..KvmIoregion::default()
    }
}

fn refusal(error: io::Error) -> RegionErrorKind {
    match error.raw_os_error() {
        Some(libc::EBADF) => RegionErrorKind::BadDescriptor(error),
        Some(libc::ENOSPC) => RegionErrorKind::TableFull("KVM's table of regions"),
        _ => RegionErrorKind::Kvm {
            what: "KVM_SET_IOREGION",
            error,
        },
    }
}

/// Which assignment KVM's region at an address is.
#[derive(Debug, Default)]
struct Owners(Mutex<HashMap<(Bus, u64), RegionId>>);

impl Owners {
    fn lock(&self) -> MutexGuard<'_, HashMap<(Bus, u64), RegionId>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes what KVM has at a region's address out of it, if `which` says so of its owner. When
    /// this returns, no vCPU finds it any more.
    fn remove(&self, vm: &VmFd, region: &Region, which: impl FnOnce(RegionId) -> bool) {
        let mut owners = self.lock();
        let key = (region.bus, region.base);
        let Some(owner) = owners.get(&key).copied().filter(|owner| which(*owner)) else {
            return;
        };
        owners.remove(&key);
        let mut request = request(region);
        request.flags |= KVM_IOREGION_DEASSIGN;
        if let Err(error) = kvm::set_ioregion(vm, &request) {
            tracing::error!(region = %owner, %error, "cannot remove an ioregion");
        }
    }
}

/// A region that KVM carries.
#[derive(Debug)]
pub(super) struct InKernel {
    vm: Arc<VmFd>,
    placed: Arc<Placed>,
    owners: Arc<Owners>,
    watched: Arc<Watched>,
}

impl InKernel {
    /// Gives a region to KVM, with the VMM's end of its channel; or modifies it, where KVM has it
    /// already. If that fails, KVM has not had the channel.
    pub(super) fn new(
        vm: &VmShared,
        placed: &Arc<Placed>,
        channel: &Channel,
        posted: bool,
    ) -> Result<Self, RegionError> {
        let region = &placed.region;
        let files = channel.give_to_kernel();
        let (files, first) =
            files.map_err(|error| region.error(RegionErrorKind::BadDescriptor(error)))?;
        let assign = |[read, write]: &[OwnedFd; 2]| {
            let mut request = request(region);
            request.read_fd = read.as_raw_fd();
            request.write_fd = write.as_raw_fd();
            if posted {
                request.flags |= KVM_IOREGION_POSTED_WRITES;
            }
            kvm::set_ioregion(vm.vm(), &request).map_err(refusal)
        };
        match vm.native().watch(files, placed.id, vm.events(), assign) {
            Ok(watched) => Ok(Self {
                vm: Arc::clone(vm.vm()),
                owners: vm.native().own(placed),
                placed: Arc::clone(placed),
                watched,
            }),
            Err(kind) => {
                if first {
                    channel.take_back();
                }
                Err(region.error(kind))
            }
        }
    }

    /// Takes the region out of KVM, unless it is another assignment's by now.
    fn remove(&self) {
        let is_own = |owner| owner == self.placed.id;
        self.owners.remove(&self.vm, &self.placed.region, is_own);
    }
}

impl Carrier for InKernel {
    fn carry(&self, _: &BusAccess, _: &mut Waiter) -> io::Result<Carried> {
        Ok(if self.placed.is_live() {
            Carried::Unclaimed
        } else {
            Carried::Retry
        })
    }

    fn replay(&self, _: &BusAccess) -> bool {
        // Written before KVM had the region, and nobody can send it now but KVM.
        false
    }

    fn retire(&self, abandon: bool) {
        self.placed.retire();
        // Nobody wants to know about the device task any more.
        self.watched.remove(self.placed.id);
        if abandon {
            self.remove();
        }
    }

    fn replaced(&self) {
        // Where KVM carries the region's new assignment, that was one modification: no access
        // fell between the two.
        self.remove();
    }
}

/// What all of a VM's in-kernel regions share.
#[derive(Debug, Default)]
pub(crate) struct Native {
    owners: Arc<Owners>,
    watcher: Mutex<Option<Watcher>>,
}

impl Native {
    fn own(&self, placed: &Placed) -> Arc<Owners> {
        let key = (placed.region.bus, placed.region.base);
        self.owners.lock().insert(key, placed.id);
        Arc::clone(&self.owners)
    }

    /// Takes what KVM has at a region's address out of it, whose assignment is ending. When this
    /// returns, no vCPU finds it any more.
    pub(super) fn evict(&self, vm: &VmFd, region: &Region) {
        self.owners.remove(vm, region, |_| true);
    }

    /// Has `assign` give a region's files to KVM, and tells `events` when the other end of one of
    /// them is closed. Whatever else can fail comes before `assign`.
    fn watch(
        &self,
        files: [OwnedFd; 2],
        region: RegionId,
        events: EventSender,
        assign: impl FnOnce(&[OwnedFd; 2]) -> Result<(), RegionErrorKind>,
    ) -> Result<Arc<Watched>, RegionErrorKind> {
        let failed = |error| RegionErrorKind::Kvm {
            what: "watching the device's end",
            error,
        };
        let mut watcher = self.watcher.lock().unwrap_or_else(PoisonError::into_inner);
        let watcher = match &mut *watcher {
            Some(watcher) => watcher,
            none => none.insert(Watcher::start(events).map_err(failed)?),
        };
        let watched = Arc::clone(&watcher.watched);
        // Held all the time: what the thread hears of before KVM has the files comes after.
        let mut held = watched.files();
        watched.add(&files, region).map_err(failed)?;
        if let Err(kind) = assign(&files) {
            watched.forget(&files);
            return Err(kind);
        }
        held.insert(region.0, files);
        drop(held);
        Ok(watched)
    }
}

/// A thread that waits for device tasks to go away: KVM does not return to user space for that.
#[derive(Debug)]
struct Watcher {
    watched: Arc<Watched>,
    thread: Option<std::thread::JoinHandle<()>>,
}

#[derive(Debug)]
struct Watched {
    epoll: Epoll,
    stop: EventFd,
    stopped: AtomicBool,
    files: Mutex<HashMap<u64, [OwnedFd; 2]>>,
}

/// The token of the stop switch; regions are numbered from 1.
const STOP: u64 = 0;

impl Watcher {
    fn start(events: EventSender) -> io::Result<Self> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let watched = Arc::new(Watched {
            epoll: Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?,
            stop: EventFd::from_value_and_flags(0, flags)?,
            stopped: AtomicBool::new(false),
            files: Mutex::default(),
        });
        let stop = EpollEvent::new(EpollFlags::EPOLLIN, STOP);
        watched.epoll.add(watched.stop.as_fd(), stop)?;
        let thread = {
            let watched = Arc::clone(&watched);
            std::thread::Builder::new()
                .name("ioregion-watch".into())
                .spawn(move || watched.run(&events))?
        };
        Ok(Self {
            watched,
            thread: Some(thread),
        })
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        self.watched.stopped.store(true, Ordering::SeqCst);
        // Refused only by a full counter, which wakes as well.
        let _ = self.watched.stop.write(1);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Watched {
    fn files(&self) -> MutexGuard<'_, HashMap<u64, [OwnedFd; 2]>> {
        self.files.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn add(&self, both: &[OwnedFd; 2], region: RegionId) -> io::Result<()> {
        for (i, file) in both.iter().enumerate() {
            // Errors and hang-ups are reported in any case.
            let event = EpollEvent::new(EpollFlags::EPOLLRDHUP, region.0);
            if let Err(error) = self.epoll.add(file, event) {
                self.forget(&both[..i]);
                return Err(error.into());
            }
        }
        Ok(())
    }

    fn forget(&self, files: &[OwnedFd]) {
        for file in files {
            // It was added.
            let _ = self.epoll.delete(file);
        }
    }

    /// Returns whether it was still there.
    fn remove(&self, region: RegionId) -> bool {
        let Some(both) = self.files().remove(&region.0) else {
            return false;
        };
        self.forget(&both);
        true
    }

    fn run(&self, events: &EventSender) {
        let mut ready = [EpollEvent::empty(); 16];
        while !self.stopped.load(Ordering::SeqCst) {
            let n = match self.epoll.wait(&mut ready, EpollTimeout::NONE) {
                Ok(n) => n,
                Err(Errno::EINTR) => 0,
                Err(error) => {
                    tracing::error!(%error, "cannot watch the regions in KVM");
                    return;
                }
            };
            for event in &ready[..n] {
                let region = RegionId(event.data());
                if !self.remove(region) {
                    continue;
                }
                let cause = if event.events().contains(EpollFlags::EPOLLERR) {
                    "the device's end is closed or broke the protocol"
                } else {
                    "the device's end is closed"
                };
                events.broken(region, cause);
            }
        }
    }
}
