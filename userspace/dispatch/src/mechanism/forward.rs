//! `forward`: the vCPU thread sends a command over a channel and waits for the response.

use std::io;
use std::sync::Arc;

use ioregion_abi::wire::{Command, Operation};

use super::{Assignment, Carried, Carrier, Mechanism, Placed};
use crate::channel::state::{New, Outcome};
use crate::channel::{Channel, Progress};
use crate::device::BusAccess;
use crate::error::{RegionError, RegionErrorKind};
use crate::region::Region;
use crate::vm::VmShared;
use crate::waiter::Waiter;

/// Most replayed writes that a channel keeps for a device task that does not read them.
pub(crate) const BACKLOG_LIMIT: usize = 1 << 16;

/// The mechanism `forward`: the traditional path through `KVM_RUN`.
#[derive(Debug, Clone)]
pub struct Forward {
    channel: Arc<Channel>,
}

impl Forward {
    /// Name of the mechanism.
    pub const NAME: &'static str = "forward";

    /// Forwards over `channel`.
    #[must_use]
    pub fn new(channel: &Arc<Channel>) -> Self {
        Self {
            channel: Arc::clone(channel),
        }
    }
}

impl Mechanism for Forward {
    fn name(&self) -> &'static str {
        Self::NAME
    }

    fn assign(&self, vm: &Arc<VmShared>, region: &Arc<Placed>) -> Result<Assignment, RegionError> {
        check_channel(&self.channel, &region.region)?;
        let wire = WirePath::new(vm, &self.channel, region, region.region.posted_writes);
        Ok(Assignment::new(Self::NAME, wire))
    }
}

/// Refuses a channel that carries nothing (more), before anything is assigned.
pub(crate) fn check_channel(channel: &Channel, region: &Region) -> Result<(), RegionError> {
    channel
        .check()
        .map_err(|error| region.error(RegionErrorKind::BadDescriptor(error)))
}

/// The wire-protocol path, which the other mechanisms fall back to.
#[derive(Debug)]
pub(crate) struct WirePath {
    channel: Arc<Channel>,
    placed: Arc<Placed>,
    /// Whether writes need no response. Never where doorbells bypass the wire: they would
    /// overtake a write that is still on its way.
    posted: bool,
}

impl WirePath {
    pub(crate) fn new(
        vm: &Arc<VmShared>,
        channel: &Arc<Channel>,
        placed: &Arc<Placed>,
        posted: bool,
    ) -> Self {
        let events = vm.events();
        let id = placed.id;
        channel.watch(id.0, Box::new(move |cause| events.broken(id, cause)));
        Self {
            channel: Arc::clone(channel),
            placed: Arc::clone(placed),
            posted,
        }
    }

    fn request(&self, access: &BusAccess, response: bool, detached: bool) -> New {
        let region = &self.placed.region;
        let (operation, data) = match access.write {
            Some(data) => (Operation::Write, data),
            None => (Operation::Read, 0),
        };
        let command = Command {
            operation,
            size: access.size,
            response,
            user_data: region.user_data,
            offset: access.addr - region.base,
            data,
        };
        New {
            region: self.placed.id.0,
            message: command.encode(self.channel.layout()),
            write: access.write.is_some(),
            response,
            detached,
        }
    }
}

impl Carrier for WirePath {
    fn carry(&self, access: &BusAccess, waiter: &mut Waiter) -> io::Result<Carried> {
        let response = match access.write {
            None => true,
            Some(data) => {
                !self.posted
                    && self
                        .placed
                        .doorbell(access.addr, access.size, data)
                        .is_none()
            }
        };
        let new = self.request(access, response, false);
        let Some(ticket) = self.channel.request(new, || self.placed.is_live()) else {
            return Ok(Carried::Retry);
        };
        Ok(match self.channel.finish(ticket, waiter)? {
            Progress::Interrupted => Carried::Interrupted,
            Progress::Ended(outcome) => outcome.into(),
        })
    }

    fn replay(&self, access: &BusAccess) -> bool {
        let new = self.request(access, false, true);
        self.channel.request(new, || self.placed.is_live());
        let (backlog, _) = self.channel.advance();
        if backlog > 0 {
            self.channel.call_helper();
        }
        let in_time = backlog < BACKLOG_LIMIT;
        if !in_time {
            self.channel
                .break_with("the device task does not read its posted writes");
        }
        in_time
    }

    fn retire(&self, abandon: bool) {
        self.channel
            .settle(self.placed.id.0, abandon, || self.placed.retire());
    }
}

impl From<Outcome> for Carried {
    fn from(outcome: Outcome) -> Self {
        match outcome {
            Outcome::Done(data) => Self::Done(data),
            Outcome::Lost => Self::Done(u64::MAX),
            Outcome::Retry => Self::Retry,
        }
    }
}
