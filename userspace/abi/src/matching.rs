//! The match rule: which doorbell an access rings.
//!
//! One source for the eBPF program, for its twin in user space (which demultiplexes the
//! coalesced ring) and for the tests that compare the two.

use crate::Bus;
use crate::bpf::{MatchEntry, MatchKey};

/// A match table: hash map in the kernel, or in user space.
pub trait Table {
    /// Looks up a key.
    fn get(&self, key: &MatchKey) -> Option<MatchEntry>;
}

/// Finds the doorbell that a write of `bytes` bytes of `data` at `addr` rings.
///
/// Address and size must be exact; the value must equal the doorbell's after masking. `None`:
/// the write is for the device's other registers.
#[inline(always)]
pub fn find(
    table: &impl Table,
    vm: u32,
    bus: Bus,
    addr: u64,
    bytes: u8,
    data: u64,
) -> Option<MatchEntry> {
    find_from(table, &MatchKey::first(vm, bus, addr, bytes), data)
}

/// The same for an access whose first key is known.
#[inline(always)]
pub fn find_from(table: &impl Table, key: &MatchKey, data: u64) -> Option<MatchEntry> {
    let entry = table.get(key)?;
    if entry.flags & MatchEntry::SELECT == 0 {
        return Some(entry);
    }
    table.get(&key.masked(data & entry.mask))
}
