//! From a traced write to the pieces that KVM's bus will see, and each piece to its doorbell.

use core::ffi::{c_long, c_void};

use aya_ebpf::helpers::{bpf_probe_read_kernel, generated::bpf_loop};
use ioregion_abi::{
    Bus,
    access::CHUNK,
    bpf::{Fate, MAX_STRING, Trace, VcpuRecord, ZONE_GRANULE_SHIFT, ZoneKey},
    matching,
};

use crate::{
    deliver,
    maps::{Doorbells, ZONES},
    vcpu,
};

/// A traced write, as KVM will cut it up.
#[repr(C)]
struct Write {
    bus: Bus,
    /// Length of each piece but the last.
    step: u32,
    /// From the address of one piece to that of the next.
    stride: u32,
    /// Length in bytes.
    len: u32,
    addr: u64,
    /// The kernel's address of the value.
    data: u64,
    /// Index of the vCPU's record.
    record: u32,
    /// As in [`Trace`].
    captured: u64,
    announced: u64,
}

/// A write of `len` bytes on one page.
#[inline(always)]
pub fn mmio_write(len: u32, addr: u64, data: u64) {
    let chunk = CHUNK as u32;
    traced(
        Bus::Mmio,
        len.div_ceil(chunk),
        chunk,
        chunk,
        len,
        addr,
        data,
    );
}

/// Output of `count` elements of `size` bytes to one port.
#[inline(always)]
pub fn pio_out(port: u32, size: u32, count: u32, data: u64) {
    let len = size.wrapping_mul(count);
    traced(Bus::Pio, count, size, 0, len, port.into(), data);
}

#[inline(always)]
fn traced(bus: Bus, pieces: u32, step: u32, stride: u32, len: u32, addr: u64, data: u64) {
    let Some(index) = vcpu::current() else { return };
    let Some(record) = vcpu::record(index) else {
        return;
    };
    let mut write = Write {
        bus,
        step,
        stride,
        len,
        addr,
        data,
        record: index,
        captured: 0,
        announced: 0,
    };
    if pieces == 1 {
        piece(0, &mut write, record);
    } else {
        let looked_at = if pieces < MAX_STRING {
            pieces
        } else {
            MAX_STRING
        };
        record.truncated += u64::from(pieces - looked_at);
        // SAFETY: The callback has the signature that the helper calls it with, and `write`
        // outlives the call.
        unsafe {
            let callback = nth_piece as *mut c_void;
            bpf_loop(looked_at, callback, (&raw mut write).cast(), 0);
        }
    }
    finish(&write, record);
}

/// A piece of a write that has several: the body of the loop.
extern "C" fn nth_piece(index: u32, write: *mut c_void) -> c_long {
    // SAFETY: `traced` passes its own `Write`, which nobody else borrows meanwhile.
    let write = unsafe { &mut *write.cast::<Write>() };
    if let Some(record) = vcpu::record(write.record) {
        piece(index, write, record);
    }
    0
}

#[inline(always)]
fn finish(write: &Write, record: &mut VcpuRecord) {
    let trace = Trace {
        addr: write.addr,
        captured: write.captured,
        announced: write.announced,
        len: write.len,
        what: write.bus as u32 | write.step << 8,
    };
    // Two places instead of an index: the verifier follows constant offsets.
    if record.writes & 1 == 0 {
        record.traces[0] = trace;
    } else {
        record.traces[1] = trace;
    }
    record.writes += 1;
}

#[inline(always)]
fn piece(index: u32, write: &mut Write, record: &mut VcpuRecord) {
    let (bit, vm, bus) = (1 << (index & 63), record.vm, write.bus);
    let at = index.wrapping_mul(write.step);
    let left = write.len.wrapping_sub(at);
    let bytes = if left < write.step { left } else { write.step } as u8;
    let addr = write
        .addr
        .wrapping_add(u64::from(index) * u64::from(write.stride));
    // No doorbell has another size than these; such a piece can still fall into a zone.
    let data = value(bytes, write.data.wrapping_add(at.into()) as *const u8);
    let entry = data.and_then(|data| {
        matching::find(&Doorbells, vm, bus, addr, bytes, data).map(|entry| (entry, data))
    });
    let fate = if let Some((entry, data)) = entry {
        record.matched += 1;
        #[cfg(feature = "log")]
        aya_log_ebpf::debug!(&(), "doorbell {:x} <- {:x}", addr, data);
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
        Fate::Captured => write.captured |= bit,
        Fate::Announced => write.announced |= bit,
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
