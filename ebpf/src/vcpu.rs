//! Whose access it is.

use aya_ebpf::helpers::bpf_get_current_pid_tgid;
use ioregion_abi::{
    bpf::VcpuRecord,
    bucket::{Look, ThreadBucket},
};

use crate::maps::{RECORDS, THREADS, VCPUS, process};

/// Index of the record of the vCPU that the calling thread runs, if the loader registered it.
///
/// Most threads of a host run no vCPU of ours: one look tells.
#[inline(always)]
pub fn current() -> Option<u32> {
    let ids = bpf_get_current_pid_tgid();
    let thread = ids as u32;
    let record = match THREADS.get(ThreadBucket::of(thread))?.look(thread) {
        Look::Here(record) => record,
        Look::Absent => return None,
        // SAFETY: Copied out at once; only the thread itself changes its entry.
        Look::Crowded => unsafe { VCPUS.get(thread) }.copied()?,
    };
    if process() != 0 && process() != (ids >> 32) as u32 {
        return None;
    }
    Some(record)
}

/// The record with an index that [`current`] gave.
#[inline(always)]
pub fn record<'a>(index: u32) -> Option<&'a mut VcpuRecord> {
    let record = RECORDS.get_ptr_mut(index)?;
    // SAFETY: Elements of an array map live as long as the map. Only the vCPU's thread runs
    // this code for this record, and it cannot be in the program twice.
    Some(unsafe { &mut *record })
}
