//! What an unprivileged VMM asks of a privileged loader, over a Unix socket.
//!
//! One request, one reply; frames as in [`crate::frame`]. Each client has a program instance of
//! its own, so nothing that it asks for can touch another client.

use ioregion_abi::bpf::{MatchEntry, MatchKey, ZoneKey};
use serde::{Deserialize, Serialize};

/// Most bytes of a request or reply.
pub(super) const MAX_FRAME: u32 = 32 << 20;
/// Most descriptors of a reply. A request has none.
pub(super) const MAX_REPLY_FDS: u32 = 3;

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) enum Request {
    /// Replied to with [`Reply::Done`] and the descriptors of the records, of `whoami` and of the
    /// program for KVM.
    Hello {
        version: u32,
    },
    CreatePort {
        slots: u32,
    },
    Insert(Vec<(Key, Entry)>),
    Retire {
        keys: Vec<Key>,
        port: Option<u32>,
    },
    SetZone {
        granule: u64,
        vm: u32,
        bus: u32,
        port: Option<u32>,
    },
    Bind {
        thread: u32,
        record: Option<u32>,
    },
    NewVm,
    NewRecord {
        vm: u32,
    },
    FreeRecord(u32),
    /// Replied to with [`Reply::Done`] and the descriptor of an array map.
    CreateRegisters {
        len: u32,
    },
    /// Attach the program to KVM's tracepoints.
    Attach,
    RecursionMisses,
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Reply {
    Done,
    /// Ports come with three descriptors: slots, control words, ring buffer.
    Number(u64),
    /// An errno.
    Failed(i32),
}

/// Revision of this protocol.
pub(super) const VERSION: u32 = 3;

/// `(addr, value, vm, what)`
pub(super) type Key = (u64, u64, u32, u32);
/// `(mask, port, block, slot, flags)`
pub(super) type Entry = (u64, u32, u32, u32, u32);

pub(super) fn pack_key(key: &MatchKey) -> Key {
    (key.addr, key.value, key.vm, key.what)
}

pub(super) fn unpack_key(&(addr, value, vm, what): &Key) -> MatchKey {
    MatchKey {
        addr,
        value,
        vm,
        what,
    }
}

pub(super) fn pack_entry(entry: &MatchEntry) -> Entry {
    (entry.mask, entry.port, entry.block, entry.slot, entry.flags)
}

pub(super) fn unpack_entry(&(mask, port, block, slot, flags): &Entry) -> MatchEntry {
    MatchEntry {
        mask,
        port,
        block,
        slot,
        flags,
    }
}

pub(super) fn zone(granule: u64, vm: u32, bus: u32) -> ZoneKey {
    ZoneKey { granule, vm, bus }
}
