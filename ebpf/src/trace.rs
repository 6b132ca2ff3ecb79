//! From a traced write to the pieces that KVM's bus will see, and each piece to its doorbell.

use aya_ebpf::{EbpfContext as _, helpers::bpf_probe_read_kernel, programs::RawTracePointContext};
use ioregion_abi::{
    Bus,
    access::CHUNK,
    bpf::{Fate, MAX_STRING, Trace, VcpuRecord, ZONE_GRANULE_SHIFT, ZoneKey},
    matching,
};

use crate::{
    deliver,
    maps::{Doorbells, RECORDS, VCPUS, ZONES},
};

/// Longest access that an x86 instruction can make: 64 bytes (AVX-512), in pieces of eight.
const MAX_CHUNKS: u64 = 8;

/// A write of `len` bytes on one page.
#[inline(always)]
pub fn mmio_write(ctx: &RawTracePointContext, len: u32, addr: u64, data: *const u8) {
    let Some((vm, record)) = vcpu(ctx) else {
        return;
    };
    let mut trace = Trace {
        addr,
        captured: 0,
        announced: 0,
        len,
        what: Bus::Mmio as u32 | (CHUNK as u32) << 8,
    };
    for piece in 0..MAX_CHUNKS {
        let at = piece * CHUNK;
        if at >= len.into() {
            break;
        }
        let left = u64::from(len) - at;
        let bytes = if left > CHUNK { CHUNK } else { left } as u8;
        handle(
            ctx,
            vm,
            Bus::Mmio,
            addr + at,
            bytes,
            data.wrapping_add(at as usize),
            piece,
            &mut trace,
            record,
        );
    }
    finish(trace, record);
}

/// Output of `count` elements of `size` bytes to one port.
#[inline(always)]
pub fn pio_out(ctx: &RawTracePointContext, port: u32, size: u32, count: u32, data: *const u8) {
    let Some((vm, record)) = vcpu(ctx) else {
        return;
    };
    let mut trace = Trace {
        addr: port.into(),
        captured: 0,
        announced: 0,
        len: size.wrapping_mul(count),
        what: Bus::Pio as u32 | size << 8,
    };
    for piece in 0..MAX_STRING {
        if piece >= count {
            break;
        }
        let data = data.wrapping_add((piece * size) as usize);
        handle(
            ctx,
            vm,
            Bus::Pio,
            port.into(),
            size as u8,
            data,
            piece.into(),
            &mut trace,
            record,
        );
    }
    if count > MAX_STRING {
        record.truncated += u64::from(count - MAX_STRING);
    }
    finish(trace, record);
}

/// The calling thread's virtual machine and record, if the loader registered it.
#[inline(always)]
fn vcpu<'a>(ctx: &RawTracePointContext) -> Option<(u32, &'a mut VcpuRecord)> {
    // SAFETY: The entry is copied out at once; only the thread itself changes its entry.
    let entry = unsafe { VCPUS.get(ctx.pid()) }.copied()?;
    if entry.process != 0 && entry.process != ctx.tgid() {
        return None;
    }
    let record = RECORDS.get_ptr_mut(entry.record)?;
    // SAFETY: Elements of an array map live as long as the map. Only the vCPU's thread runs
    // this code for this record, and it cannot be in the program twice.
    Some((entry.vm, unsafe { &mut *record }))
}

#[inline(always)]
fn finish(trace: Trace, record: &mut VcpuRecord) {
    // Two places instead of an index: the verifier follows constant offsets.
    if record.writes & 1 == 0 {
        record.traces[0] = trace;
    } else {
        record.traces[1] = trace;
    }
    record.writes += 1;
}

#[inline(always)]
#[expect(
    clippy::too_many_arguments,
    reason = "one call frame; a struct would be spilled"
)]
fn handle(
    _ctx: &RawTracePointContext,
    vm: u32,
    bus: Bus,
    addr: u64,
    bytes: u8,
    data: *const u8,
    piece: u64,
    trace: &mut Trace,
    record: &mut VcpuRecord,
) {
    let bit = 1 << (piece & 63);
    // No doorbell has another size than these; such a piece can still fall into a zone.
    let data = value(bytes, data);
    let entry = data.and_then(|data| {
        matching::find(&Doorbells, vm, bus, addr, bytes, data).map(|entry| (entry, data))
    });
    let fate = if let Some((entry, data)) = entry {
        record.matched += 1;
        #[cfg(feature = "log")]
        aya_log_ebpf::debug!(_ctx, "doorbell {:x} <- {:x}", addr, data);
        deliver::doorbell(&entry, data, record)
    } else {
        record.unmatched += 1;
        let key = ZoneKey {
            granule: addr >> ZONE_GRANULE_SHIFT,
            vm,
            bus: bus as u32,
        };
        // SAFETY: The port is copied out at once.
        match unsafe { ZONES.get(key) }.copied() {
            Some(port) => deliver::zone_write(port, record),
            None => Fate::Unseen,
        }
    };
    match fate {
        Fate::Captured => trace.captured |= bit,
        Fate::Announced => trace.announced |= bit,
        Fate::Unseen => {}
    }
}

/// Reads a value of 1, 2, 4 or 8 bytes; the helper wants each size as a constant.
#[inline(always)]
fn value(bytes: u8, at: *const u8) -> Option<u64> {
    // SAFETY: The helper checks the address itself and fails where it cannot be read.
    unsafe {
        match bytes {
            1 => bpf_probe_read_kernel(at).map(u64::from),
            2 => bpf_probe_read_kernel(at.cast::<u16>()).map(u64::from),
            4 => bpf_probe_read_kernel(at.cast::<u32>()).map(u64::from),
            8 => bpf_probe_read_kernel(at.cast::<u64>()),
            _ => return None,
        }
    }
    .ok()
}
