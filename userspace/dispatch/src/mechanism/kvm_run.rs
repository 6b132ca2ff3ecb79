//! `kvm-run`: the device runs on the vCPU thread, right after the exit.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use super::{Assignment, Carried, Carrier, Mechanism, Placed};
use crate::device::{Access, BusAccess, Device, Ring};
use crate::error::RegionError;
use crate::vm::VmShared;
use crate::waiter::Waiter;

/// The mechanism `kvm-run`: the lower bound of an exit to user space.
#[derive(Clone)]
pub struct KvmRun {
    device: Arc<Mutex<dyn Device>>,
}

impl std::fmt::Debug for KvmRun {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("KvmRun").finish_non_exhaustive()
    }
}

impl KvmRun {
    /// Name of the mechanism.
    pub const NAME: &'static str = "kvm-run";

    /// Serves `device` on the vCPU threads; vCPUs wait for each other on its lock.
    #[must_use]
    pub fn new(device: Arc<Mutex<dyn Device>>) -> Self {
        Self { device }
    }
}

impl Mechanism for KvmRun {
    fn name(&self) -> &'static str {
        Self::NAME
    }

    fn assign(&self, _vm: &Arc<VmShared>, region: &Arc<Placed>) -> Result<Assignment, RegionError> {
        let carrier = Inline {
            device: Arc::clone(&self.device),
            placed: Arc::clone(region),
        };
        Ok(Assignment::new(Self::NAME, carrier))
    }
}

struct Inline {
    device: Arc<Mutex<dyn Device>>,
    placed: Arc<Placed>,
}

impl std::fmt::Debug for Inline {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Inline")
            .field("placed", &self.placed)
            .finish_non_exhaustive()
    }
}

impl Inline {
    fn handle(&self, access: &BusAccess) -> Option<u64> {
        // A device that panicked is still the only one that there is.
        let mut device = self.device.lock().unwrap_or_else(PoisonError::into_inner);
        if !self.placed.is_live() {
            return None;
        }
        let region = &self.placed.region;
        let offset = access.addr - region.base;
        let here = Access {
            user_data: region.user_data,
            offset,
            size: access.size,
        };
        let Some(data) = access.write else {
            return Some(device.read(here));
        };
        match self.placed.doorbell(access.addr, access.size, data) {
            Some((index, _)) => device.doorbell(Ring {
                user_data: region.user_data,
                index,
                offset,
                size: access.size,
                value: Some(data),
                writes: 1,
            }),
            None => device.write(here, data),
        }
        Some(0)
    }
}

impl Carrier for Inline {
    fn carry(&self, access: &BusAccess, _waiter: &mut Waiter) -> io::Result<Carried> {
        Ok(self.handle(access).map_or(Carried::Retry, Carried::Done))
    }

    fn replay(&self, access: &BusAccess) -> bool {
        self.handle(access).is_some()
    }

    fn retire(&self, _abandon: bool) {
        // Under the lock: no call into the device begins after this returns.
        let _device = self.device.lock().unwrap_or_else(PoisonError::into_inner);
        self.placed.retire();
    }
}
