//! The program's maps. Their sizes here are upper bounds; the loader sets those it wants.

use aya_ebpf::{
    bindings::BPF_F_MMAPABLE,
    btf_maps::{Array, ArrayOfMaps, HashMap, RingBuf},
    macros::btf_map,
};
use ioregion_abi::{
    bpf::{
        MAX_DOORBELLS, MAX_PORTS, MAX_VCPUS, MAX_ZONE_GRANULES, MatchEntry, MatchKey, SlotBlock,
        VcpuRecord, ZoneKey,
    },
    bucket::{DOORBELL_BUCKETS_SHIFT, DoorbellBucket, Look, THREAD_BUCKETS, ThreadBucket},
    matching::Table,
};

const MMAPABLE: usize = BPF_F_MMAPABLE as usize;
/// `BPF_F_INNER_MAP`: inner maps of different lengths fit one array of maps.
const MMAPABLE_INNER: usize = MMAPABLE | 1 << 12;

/// A word that the loader sets before the program is loaded.
///
/// The cell keeps it apart from constants: the compiler would merge an immutable word with any
/// constant of its initial value, which would then change with it.
#[repr(transparent)]
pub struct Setting(core::cell::UnsafeCell<u32>);

// SAFETY: Nobody writes it while the program runs.
unsafe impl Sync for Setting {}

/// The process whose threads alone count, 0: all. Set where the threads are another process's,
/// since the id of a thread that has ended may have become yet another's.
#[unsafe(no_mangle)]
static PROCESS: Setting = Setting(core::cell::UnsafeCell::new(0));

/// The value of [`PROCESS`].
#[inline(always)]
pub fn process() -> u32 {
    // SAFETY: A live word. Volatile, because the loader has changed it behind the compiler.
    unsafe { core::ptr::read_volatile(PROCESS.0.get()) }
}

/// Thread id → record of the vCPU that it runs; in buckets, and for the crowded ones of them.
#[btf_map]
pub static THREADS: Array<ThreadBucket, { THREAD_BUCKETS as usize }, MMAPABLE> = Array::new();
#[btf_map]
pub static VCPUS: HashMap<u32, u32, { MAX_VCPUS as usize }> = HashMap::new();

/// The vCPUs, and what the program did for them.
#[btf_map]
pub static RECORDS: Array<VcpuRecord, { MAX_VCPUS as usize }, MMAPABLE> = Array::new();

/// The match table; first keys in buckets, all of them in the hash map.
#[btf_map]
pub static BUCKETS: Array<DoorbellBucket, { 1 << DOORBELL_BUCKETS_SHIFT }, MMAPABLE> = Array::new();
#[btf_map]
pub static DOORBELLS: HashMap<MatchKey, MatchEntry, { MAX_DOORBELLS as usize }> = HashMap::new();

/// Granules with a coalesced zone → port of the task that drains the coalesced ring.
#[btf_map]
pub static ZONES: HashMap<ZoneKey, u32, { MAX_ZONE_GRANULES as usize }> = HashMap::new();

/// Port → its slots, which its task may only read.
#[btf_map]
pub static SLOTS: ArrayOfMaps<Array<SlotBlock, 1, MMAPABLE_INNER>, { MAX_PORTS as usize }> =
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
        if key.what & MatchKey::MASKED == 0 {
            let bucket = BUCKETS.get(DoorbellBucket::of(key))?;
            // SAFETY: A word of a live element. Volatile, because the loader changes it, and so
            // that the loads stay in their order.
            match bucket.look(key, |word| unsafe { core::ptr::read_volatile(word) }) {
                Look::Here(entry) => return Some(entry),
                Look::Absent => return None,
                Look::Crowded => {}
            }
        }
        // SAFETY: The entry is copied out at once, and the loader adds none between removing one
        // and waiting for all runs of this program, so the memory is not another entry's yet.
        unsafe { DOORBELLS.get(key) }.copied()
    }
}
