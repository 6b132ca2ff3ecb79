//! Counting packets, above all those that are lost.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};

/// How many packets went which way.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Traffic {
    /// Packets of the driver's that went out.
    pub sent: u64,
    /// Packets that reached the driver.
    pub received: u64,
    /// Packets of the driver's that were dropped: they break the rules.
    pub malformed: u64,
    /// Packets of the driver's that were dropped: the link did not take them.
    pub refused: u64,
    /// Packets for the driver that were dropped: they need an offload that it did not take.
    pub unsuited: u64,
    /// Packets for the driver that were dropped: they do not fit into its buffer.
    pub too_large: u64,
}

#[derive(Debug, Default)]
pub(super) struct Counters([AtomicU64; 6]);

/// What happened to a packet.
#[derive(Debug, Clone, Copy)]
pub(super) enum Fate {
    Sent,
    Received,
    Malformed,
    Refused,
    Unsuited,
    TooLarge,
}

impl Counters {
    pub(super) fn count(&self, fate: Fate) -> u64 {
        self.0[fate as usize].fetch_add(1, Ordering::Relaxed) + 1
    }

    /// Counts a packet that is lost, and says so. Of a flood only ever fewer: the first packet,
    /// the second, the fourth, and so on.
    pub(super) fn lost(&self, fate: Fate, why: &dyn fmt::Display) {
        let count = self.count(fate);
        if count.is_power_of_two() {
            tracing::warn!(?fate, count, %why, "a packet was dropped");
        }
    }

    pub(super) fn read(&self) -> Traffic {
        let count = |fate: Fate| self.0[fate as usize].load(Ordering::Relaxed);
        Traffic {
            sent: count(Fate::Sent),
            received: count(Fate::Received),
            malformed: count(Fate::Malformed),
            refused: count(Fate::Refused),
            unsuited: count(Fate::Unsuited),
            too_large: count(Fate::TooLarge),
        }
    }
}
