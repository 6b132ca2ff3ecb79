//! The mechanisms: each is one file that knows how to assign a region, carry an access that
//! exited to user space, and take the region away again.
//!
//! | mechanism | posted write | write that waits, read |
//! |---|---|---|
//! | [`KvmRun`] | the device runs on the vCPU thread | same |
//! | [`Forward`] | a command over a channel | a command and its response |
//! | [`Ioeventfd`] | KVM signals an eventfd; the value is lost | as `forward` |
//! | [`Ebpf`] | value in a slot, no exit | as `forward`, or as `ioregionfd` where KVM has it |
//! | [`Ioregionfd`] | a command that KVM sends, no exit | a command of KVM's and its response |
//! | [`Auto`] | the best of these that the host offers | |

mod auto;
mod ebpf;
mod forward;
mod hooked;
mod ioeventfd;
mod ioregionfd;
mod kvm_run;

use std::fmt;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use ioregion_abi::Size;
use kvm_ioctls::VmFd;

pub use auto::Auto;
#[cfg(test)]
pub(crate) use ebpf::entries as ebpf_entries_for_tests;
pub use ebpf::{Ebpf, Via};
pub use forward::Forward;
#[cfg(test)]
pub(crate) use hooked::entries as hooked_entries_for_tests;
pub use ioeventfd::Ioeventfd;
pub use ioregionfd::Ioregionfd;
pub(crate) use ioregionfd::Native;
pub use kvm_run::KvmRun;

use crate::device::BusAccess;
use crate::error::RegionError;
use crate::region::{Doorbell, DoorbellIndex, Region};
use crate::source::DoorbellSource;
use crate::vm::VmShared;
use crate::waiter::Waiter;

/// Names one assignment of a region; never used twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RegionId(pub(crate) u64);

impl fmt::Display for RegionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "#{}", self.0)
    }
}

/// A way for accesses to travel. Called by [`Vm`](crate::Vm) only.
pub trait Mechanism: Send + Sync + fmt::Debug {
    /// The name used on command lines and in results.
    fn name(&self) -> &'static str;

    /// Assigns a region that has been checked and that overlaps no other.
    ///
    /// # Errors
    ///
    /// [`RegionError`]; then nothing of the assignment is left.
    fn assign(&self, vm: &Arc<VmShared>, region: &Arc<Placed>) -> Result<Assignment, RegionError>;
}

/// What a mechanism made of a region.
#[derive(Debug)]
pub struct Assignment {
    /// Carries the accesses that exit.
    pub(crate) carrier: Box<dyn Carrier>,
    /// Where the device task finds the doorbells that do not exit.
    pub(crate) sources: Vec<DoorbellSource>,
    /// The mechanism that carries the region's doorbells.
    pub(crate) mechanism: &'static str,
    /// How the eBPF program sees the accesses, where one does.
    pub(crate) via: Option<Via>,
    /// Why it was chosen, where there was a choice.
    pub(crate) reason: String,
}

impl Assignment {
    pub(crate) fn new(mechanism: &'static str, carrier: impl Carrier + 'static) -> Self {
        Self {
            carrier: Box::new(carrier),
            sources: Vec::new(),
            mechanism,
            via: None,
            reason: String::new(),
        }
    }
}

/// A region in its place.
#[derive(Debug)]
pub struct Placed {
    pub(crate) id: RegionId,
    pub(crate) region: Region,
    index: DoorbellIndex,
    /// Cleared, under the lock of whatever carries the region, when it goes.
    live: AtomicBool,
}

impl Placed {
    pub(crate) fn new(id: RegionId, region: Region) -> Self {
        let index = DoorbellIndex::new(&region.doorbells);
        Self {
            id,
            region,
            index,
            live: AtomicBool::new(true),
        }
    }

    /// The doorbell that a write to the region rings, with its index.
    pub(crate) fn doorbell(&self, addr: u64, size: Size, data: u64) -> Option<(u32, &Doorbell)> {
        let index = self.index.find(addr - self.region.base, size, data)?;
        self.region
            .doorbells
            .get(index as usize)
            .map(|doorbell| (index, doorbell))
    }

    pub(crate) fn is_live(&self) -> bool {
        self.live.load(Ordering::SeqCst)
    }

    pub(crate) fn retire(&self) {
        self.live.store(false, Ordering::SeqCst);
    }
}

/// How carrying an access went on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Carried {
    /// It is done; for a read, with this value.
    Done(u64),
    /// The vCPU must return to its caller. The access goes on by itself and is finished through
    /// the vCPU's pending request.
    Interrupted,
    /// The region has gone: dispatch the access anew.
    Retry,
    /// It left the guest before KVM had the region, as if there were none.
    Unclaimed,
}

/// Carries one region's accesses that exited to user space.
pub(crate) trait Carrier: Send + Sync + fmt::Debug {
    /// Carries one access. Called on the vCPU's thread.
    ///
    /// # Errors
    ///
    /// The operating system's, if it cannot wait at all.
    fn carry(&self, access: &BusAccess, waiter: &mut Waiter) -> io::Result<Carried>;

    /// A doorbell exited although the program has captured it: no sink has signalled it.
    fn captured(&self, _access: &BusAccess) {}

    /// Queues a write that came out of the coalesced ring, without waiting. Returns false if
    /// the channel has too many of them: the device task is too slow.
    fn replay(&self, access: &BusAccess) -> bool;

    /// Ends the region; accesses under way are settled. With `abandon`, also those that a
    /// device is working on.
    fn retire(&self, abandon: bool);

    /// The region has a new carrier, or none, after [`retire`](Self::retire) without `abandon`.
    fn replaced(&self) {}

    /// Gives up the in-kernel parts (sinks, program entries) so that accesses exit from now on,
    /// or are sent as commands by KVM.
    /// Called before [`retire`](Self::retire), while the region still carries. Returns whether
    /// there were any.
    fn unsink(&self, _vm: &VmFd) -> bool {
        false
    }
}
