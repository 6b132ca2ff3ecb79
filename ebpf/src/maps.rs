//! The program's maps. Their sizes here are upper bounds; the loader sets those it wants.

use aya_ebpf::{
    bindings::BPF_F_MMAPABLE,
    btf_maps::{Array, ArrayOfMaps, HashMap, RingBuf},
    macros::btf_map,
};
use ioregion_abi::{
    bpf::{
        MAX_DOORBELLS, MAX_PORTS, MAX_VCPUS, MAX_ZONE_GRANULES, MatchEntry, MatchKey, Slot,
        VcpuEntry, VcpuRecord, ZoneKey,
    },
    matching::Table,
};

const MMAPABLE: usize = BPF_F_MMAPABLE as usize;
/// `BPF_F_INNER_MAP`: inner maps of different lengths fit one array of maps.
const MMAPABLE_INNER: usize = MMAPABLE | 1 << 12;

/// Thread id → which vCPU it runs.
#[btf_map]
pub static VCPUS: HashMap<u32, VcpuEntry, { MAX_VCPUS as usize }> = HashMap::new();

/// What the program did, a record for each vCPU.
#[btf_map]
pub static RECORDS: Array<VcpuRecord, { MAX_VCPUS as usize }, MMAPABLE> = Array::new();

/// The match table.
#[btf_map]
pub static DOORBELLS: HashMap<MatchKey, MatchEntry, { MAX_DOORBELLS as usize }> = HashMap::new();

/// Granules with a coalesced zone → port of the task that drains the coalesced ring.
#[btf_map]
pub static ZONES: HashMap<ZoneKey, u32, { MAX_ZONE_GRANULES as usize }> = HashMap::new();

/// Port → its slots, which its task may only read.
#[btf_map]
pub static SLOTS: ArrayOfMaps<Array<Slot, 1, MMAPABLE_INNER>, { MAX_PORTS as usize }> =
    ArrayOfMaps::new();

/// Port → its control words, which its task writes.
#[btf_map]
pub static CONTROLS: ArrayOfMaps<Array<u64, 1, MMAPABLE_INNER>, { MAX_PORTS as usize }> =
    ArrayOfMaps::new();

/// Port → the ring buffer that wakes its task.
#[btf_map]
pub static WAKERS: ArrayOfMaps<RingBuf<u64, 4096>, { MAX_PORTS as usize }> = ArrayOfMaps::new();

/// The match table as [`ioregion_abi::matching`] sees it.
pub struct Doorbells;

impl Table for Doorbells {
    #[inline(always)]
    fn get(&self, key: &MatchKey) -> Option<MatchEntry> {
        // SAFETY: The entry is copied out at once, and the loader adds none between removing one
        // and waiting for all runs of this program, so the memory is not another entry's yet.
        unsafe { DOORBELLS.get(key) }.copied()
    }
}
