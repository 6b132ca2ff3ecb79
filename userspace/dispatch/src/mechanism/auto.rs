//! `auto`: the best mechanism that the host offers for a region, and why.

use std::sync::Arc;

use super::{Assignment, Ebpf, Forward, Ioeventfd, Ioregionfd, Mechanism, Placed};
use crate::channel::Channel;
use crate::error::RegionError;
use crate::region::Region;
use crate::vm::VmShared;

/// The mechanism `auto`.
#[derive(Debug, Clone)]
pub struct Auto {
    channel: Arc<Channel>,
}

impl Auto {
    /// Name of the mechanism.
    pub const NAME: &'static str = "auto";

    /// Uses `channel` for whatever has to go over the wire.
    #[must_use]
    pub fn new(channel: &Arc<Channel>) -> Self {
        Self {
            channel: Arc::clone(channel),
        }
    }
}

impl Auto {
    fn has_hook(&self, vm: &VmShared, region: &Region) -> bool {
        super::hooked::missing(vm.vm(), &self.channel, region).is_none()
    }
}

impl Mechanism for Auto {
    fn name(&self) -> &'static str {
        Self::NAME
    }

    fn assign(&self, vm: &Arc<VmShared>, placed: &Arc<Placed>) -> Result<Assignment, RegionError> {
        let Region {
            doorbells,
            answered,
            ..
        } = &placed.region;
        let value_is_known = doorbells
            .iter()
            .all(|doorbell| doorbell.datamatch.is_some() && doorbell.is_full_match());
        let native = super::ioregionfd::missing(vm.vm());
        let native = native.or_else(|| self.channel.unfit_for_kernel().map(str::to_owned));
        let (mechanism, reason): (Box<dyn Mechanism>, _) = if vm.program().is_some()
            && !answered.is_empty()
            && self.has_hook(vm, &placed.region)
        {
            (
                Box::new(Ebpf::new(&self.channel)),
                "the eBPF program is loaded and answers reads",
            )
        } else if vm.program().is_some() && !doorbells.is_empty() {
            (
                Box::new(Ebpf::new(&self.channel)),
                "the eBPF program is loaded and carries values",
            )
        } else if !doorbells.is_empty() && value_is_known {
            (
                Box::new(Ioeventfd::new(&self.channel)),
                "no eBPF program; the doorbells match whole values, so no value is lost",
            )
        } else if native.is_none() {
            (
                Box::new(Ioregionfd::new(&self.channel)),
                "KVM speaks to the device task itself",
            )
        } else if doorbells.is_empty() {
            (
                Box::new(Forward::new(&self.channel)),
                "the region has no doorbells",
            )
        } else {
            (
                Box::new(Forward::new(&self.channel)),
                "no eBPF program, and an ioeventfd would lose the doorbells' values",
            )
        };
        let mut assignment = mechanism.assign(vm, placed)?;
        assignment.reason = match native {
            _ if assignment.via.is_some() => format!("{reason}; {}", assignment.reason),
            Some(native) => format!("{reason}; not ioregionfd: {native}"),
            None => reason.to_owned(),
        };
        tracing::debug!(
            region = %placed.id, mechanism = assignment.mechanism, reason = assignment.reason, "chosen"
        );
        Ok(assignment)
    }
}
