//! Keys and values of the eBPF program's maps.
//!
//! A *port* is where doorbells of one region arrive: a map of [`SlotBlock`]s (the task may only
//! read it), a map of control words (the task writes it) and a ring buffer that wakes the task. Each
//! port has maps of its own, held in arrays of maps, so that no device task ever sees another's.

use crate::Bus;

/// Most doorbells (entries of the match table) of one program instance.
pub const MAX_DOORBELLS: u32 = 1 << 17;
/// Most vCPU threads of one program instance.
pub const MAX_VCPUS: u32 = 1024;
/// Most ports of one program instance.
pub const MAX_PORTS: u32 = 4096;
/// Most granules of eight bytes that hold a part of a coalesced zone.
pub const MAX_ZONE_GRANULES: u32 = 1 << 16;
/// Most registers of one register file.
pub const MAX_REGISTERS: u32 = 1 << 16;
/// Most elements of one string output that the program looks at; more are counted as
/// [`VcpuRecord::truncated`].
pub const MAX_STRING: u32 = 64;

/// Key of the match table.
///
/// A doorbell without datamatch stands under value 0. With datamatch, the entry under value 0
/// says which mask to apply ([`MatchEntry::SELECT`]); the doorbell itself stands under
/// `data & mask`, with [`MatchKey::MASKED`] set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct MatchKey {
    /// Guest physical address or port.
    pub addr: u64,
    /// 0, or the value after masking.
    pub value: u64,
    /// The virtual machine.
    pub vm: u32,
    /// [`Bus`] in bits 7..0, size in bytes in bits 15..8, [`MatchKey::MASKED`],
    /// [`MatchKey::READ`], [`MatchKey::HOOKED`].
    pub what: u32,
}

impl MatchKey {
    /// Bit of `what`: the key of a doorbell behind a mask.
    pub const MASKED: u32 = 1 << 16;
    /// Bit of `what`: the key of a register that is read, not of a doorbell.
    pub const READ: u32 = 1 << 17;
    /// Bit of `what`: KVM itself shows the access to the program, which the tracepoints must
    /// ignore.
    pub const HOOKED: u32 = 1 << 18;

    /// The first key to look up for an access.
    #[must_use]
    #[inline(always)]
    pub const fn first(vm: u32, bus: Bus, addr: u64, bytes: u8) -> Self {
        Self {
            addr,
            value: 0,
            vm,
            what: bus as u32 | (bytes as u32) << 8,
        }
    }

    /// The key of an access that KVM itself shows to the program, for one of the tracepoints.
    #[must_use]
    #[inline(always)]
    pub const fn hooked(self, write: bool) -> Self {
        let read = if write { 0 } else { Self::READ };
        Self {
            what: self.what | Self::HOOKED | read,
            ..self
        }
    }

    /// The key to look up after the first one led to a [`MatchEntry::SELECT`].
    #[must_use]
    #[inline(always)]
    pub const fn masked(self, value: u64) -> Self {
        Self {
            value,
            what: self.what | Self::MASKED,
            ..self
        }
    }
}

/// Value of the match table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(C)]
pub struct MatchEntry {
    /// For [`MatchEntry::SELECT`]: the mask to apply to the value.
    pub mask: u64,
    /// The port where the doorbell arrives, or whose task is to be woken.
    pub port: u32,
    /// The block of the doorbell's slot in its port ([`SlotBlock::place`]).
    pub block: u32,
    /// The slot's place in that block; for [`MatchEntry::ANSWER`], the index of the register.
    pub slot: u32,
    /// Bits below.
    pub flags: u32,
}

impl MatchEntry {
    /// Not a doorbell: look up again with the masked value.
    pub const SELECT: u32 = 1 << 0;
    /// Store value and sequence in the slot; the access needs no other delivery.
    pub const STORE: u32 = 1 << 1;
    /// Wake the port's task if it has armed its port.
    pub const WAKE_ARMED: u32 = 1 << 2;
    /// Wake the port's task on each doorbell.
    pub const WAKE_ALWAYS: u32 = 1 << 3;
    /// [`HOOKED`](MatchKey::HOOKED) keys: KVM signals the region's eventfd for each doorbell.
    pub const SIGNAL: u32 = 1 << 4;
    /// [`HOOKED`](MatchKey::HOOKED) keys: KVM answers the read from the register file.
    pub const ANSWER: u32 = 1 << 5;
}

/// Key of the zone table: a granule that holds (part of) a coalesced zone.
///
/// Writes that start in such a granule and are no doorbell end in the coalesced ring too; whoever
/// drains it must be woken for them. Granules are small, so that the writes that another sink
/// swallows nearby are hardly ever announced to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct ZoneKey {
    /// Number of the granule: address or port >> [`ZONE_GRANULE_SHIFT`].
    pub granule: u64,
    /// The virtual machine.
    pub vm: u32,
    /// [`Bus`].
    pub bus: u32,
}

/// Bytes (ports) in a granule, as a power of two.
pub const ZONE_GRANULE_SHIFT: u32 = 3;

/// A doorbell's latest value.
///
/// Written by the program: the value first, then the sequence (atomic). A reader loads the
/// sequence, then the value: the value may be newer than the sequence, never older.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(C)]
pub struct Slot {
    /// The value written last.
    pub value: u64,
    /// How many writes there were.
    pub sequence: u64,
}

/// Slots in a [`SlotBlock`].
pub const BLOCK_SLOTS: u32 = 63;

/// Element of a port's map of slots: slots, and how often any of them was written, so that a
/// reader need not look at all.
///
/// What a doorbell changes lies together: with few doorbells on one cache line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub struct SlotBlock {
    /// Changes (atomically) after each change of a slot's sequence.
    pub changes: u64,
    /// Zero.
    pub reserved: u64,
    /// The slots.
    pub slots: [Slot; BLOCK_SLOTS as usize],
}

impl SlotBlock {
    /// Number of blocks for `slots` slots.
    #[must_use]
    pub const fn count(slots: u32) -> u32 {
        slots.div_ceil(BLOCK_SLOTS)
    }

    /// The block of a slot, and its place there.
    #[must_use]
    #[inline(always)]
    pub const fn place(slot: u32) -> (u32, u32) {
        (slot / BLOCK_SLOTS, slot % BLOCK_SLOTS)
    }
}

/// Index of the control word that a task sets to 1 before it sleeps.
pub const CONTROL_ARM: u32 = 0;
/// Number of control words of a port.
pub const CONTROL_WORDS: u32 = 1;

/// One traced write of a vCPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(C)]
pub struct Trace {
    /// First address, or the port.
    pub addr: u64,
    /// Bit *i*: piece *i* was stored in a slot (piece: 8 bytes of MMIO, one element of PIO).
    pub captured: u64,
    /// Bit *i*: piece *i* was announced to the task that drains the coalesced ring.
    pub announced: u64,
    /// Length in bytes.
    pub len: u32,
    /// [`Bus`] in bits 7..0, size of one piece in bits 15..8.
    pub what: u32,
}

/// A vCPU, and what the program did for it. Only its thread writes it (through the program).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(C)]
pub struct VcpuRecord {
    /// The last two traced writes; `writes & 1` is the place of the next.
    ///
    /// Two, because an access that crosses a page is traced once for each page before the
    /// first of them can exit.
    pub traces: [Trace; 2],
    /// Number of traced writes.
    pub writes: u64,
    /// Pieces that matched a doorbell.
    pub matched: u64,
    /// Pieces that matched none.
    pub unmatched: u64,
    /// Wake-ups sent through the ring buffer.
    pub wakeups: u64,
    /// Wake-ups that the ring buffer refused (it had unread ones).
    pub wakeups_refused: u64,
    /// Elements of string output past [`MAX_STRING`], which the program has not seen.
    pub truncated: u64,
    /// Pieces whose slot or port was missing.
    pub misdirected: u64,
    /// The virtual machine, a number of the loader's, who alone writes it.
    pub vm: u32,
    /// Zero.
    pub reserved: u32,
}

/// What became of a traced piece before it exited to user space.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    /// Its value is in a slot: delivering the exit as well would double it.
    Captured,
    /// The draining task waits for it in the coalesced ring, where it will not come.
    Announced,
    /// The program had nothing to do with it.
    Unseen,
}

impl VcpuRecord {
    /// What the program did with the piece of a write that exits to user space at `addr`.
    ///
    /// `addr` and `bytes` are those of the exit. For ports, `element` is the index of the
    /// element in a string output, else 0.
    #[must_use]
    pub fn fate(&self, bus: Bus, addr: u64, bytes: u8, element: u32) -> Fate {
        // The newest trace that covers the address decides: an older one at the same address
        // belongs to an access that did not exit.
        for age in 1..=2 {
            if self.writes < age {
                return Fate::Unseen;
            }
            let trace = &self.traces[((self.writes - age) & 1) as usize];
            if let Some(piece) = trace.piece(bus, addr, bytes, element) {
                let bit = |mask: u64| piece < u64::BITS.into() && mask >> piece & 1 == 1;
                return match (bit(trace.captured), bit(trace.announced)) {
                    (true, _) => Fate::Captured,
                    (false, true) => Fate::Announced,
                    (false, false) => Fate::Unseen,
                };
            }
        }
        Fate::Unseen
    }
}

impl Trace {
    fn piece(&self, bus: Bus, addr: u64, bytes: u8, element: u32) -> Option<u64> {
        if self.what & 0xff != bus as u32 {
            return None;
        }
        if bus == Bus::Pio {
            let same = self.addr == addr && self.what >> 8 & 0xff == u32::from(bytes);
            return (same && u64::from(element + 1) * u64::from(bytes) <= self.len.into())
                .then_some(element.into());
        }
        let within = addr.checked_sub(self.addr)?;
        (within + u64::from(bytes) <= self.len.into() && within % crate::access::CHUNK == 0)
            .then_some(within / crate::access::CHUNK)
    }
}

/// Command of the `bpf` system call that runs a program, of `include/uapi/linux/bpf.h`.
pub const BPF_PROG_TEST_RUN: core::ffi::c_long = 10;

/// `union bpf_attr` of [`BPF_PROG_TEST_RUN`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(C)]
pub struct TestRun {
    /// The program.
    pub prog_fd: u32,
    /// What it returned.
    pub retval: u32,
    /// Bytes of a packet; none here, nor the other fields of one.
    pub data_size_in: u32,
    /// As above.
    pub data_size_out: u32,
    /// As above.
    pub data_in: u64,
    /// As above.
    pub data_out: u64,
    /// How often to run it; 0: once.
    pub repeat: u32,
    /// Nanoseconds that a run took.
    pub duration: u32,
    /// Bytes of the context: of a raw tracepoint program its arguments.
    pub ctx_size_in: u32,
    /// Bytes that the kernel may write of it.
    pub ctx_size_out: u32,
    /// Where the context is.
    pub ctx_in: u64,
    /// Where the kernel writes it.
    pub ctx_out: u64,
    /// `BPF_F_TEST_*`.
    pub flags: u32,
    /// The CPU to run on, where `flags` says so.
    pub cpu: u32,
    /// For packets.
    pub batch_size: u32,
    /// Zero.
    pub pad: u32,
}

const _: () = {
    assert!(size_of::<TestRun>() == 80);
    assert!(core::mem::offset_of!(TestRun, ctx_in) == 48);
    assert!(size_of::<MatchKey>() == 24);
    assert!(size_of::<MatchEntry>() == 24);
    assert!(size_of::<ZoneKey>() == 16);
    assert!(size_of::<Slot>() == 16);
    assert!(core::mem::offset_of!(Slot, sequence) == 8);
    assert!(size_of::<SlotBlock>() == 1024);
    assert!(core::mem::offset_of!(SlotBlock, slots) == 16);
    assert!(size_of::<Trace>() == 32);
    assert!(size_of::<VcpuRecord>() == 128);
};

#[cfg(feature = "aya")]
mod pod {
    // SAFETY: each type is `repr(C)`, made of integers only, without padding, so that each byte
    // string of its size is a value of it.
    unsafe impl aya::Pod for super::MatchKey {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::MatchEntry {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::ZoneKey {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::Slot {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::VcpuRecord {}
}

#[cfg(test)]
mod tests {
    use super::*;

    fn trace(addr: u64, len: u32, captured: u64) -> Trace {
        Trace {
            addr,
            captured,
            announced: 0,
            len,
            what: Bus::Mmio as u32 | 8 << 8,
        }
    }

    #[test]
    fn exit_of_a_stored_write_is_recognised_once() {
        let mut record = VcpuRecord {
            writes: 1,
            ..Default::default()
        };
        record.traces[0] = trace(0x1000, 4, 1);
        assert_eq!(record.fate(Bus::Mmio, 0x1000, 4, 0), Fate::Captured);
        assert_eq!(record.fate(Bus::Mmio, 0x1000, 8, 0), Fate::Unseen);
        assert_eq!(record.fate(Bus::Pio, 0x1000, 4, 0), Fate::Unseen);
        // The next write at the same address matched nothing: it must be delivered.
        record.traces[1] = trace(0x1000, 4, 0);
        record.writes = 2;
        assert_eq!(record.fate(Bus::Mmio, 0x1000, 4, 0), Fate::Unseen);
    }

    #[test]
    fn both_halves_of_a_page_crossing_write_are_found() {
        let mut record = VcpuRecord {
            writes: 6,
            ..Default::default()
        };
        record.traces[0] = trace(0x1ffc, 4, 1);
        record.traces[1] = trace(0x2000, 4, 0);
        assert_eq!(record.fate(Bus::Mmio, 0x1ffc, 4, 0), Fate::Captured);
        assert_eq!(record.fate(Bus::Mmio, 0x2000, 4, 0), Fate::Unseen);
    }

    #[test]
    fn second_half_of_a_long_write_has_its_own_bit() {
        let mut record = VcpuRecord {
            writes: 1,
            ..Default::default()
        };
        record.traces[0] = trace(0x1000, 16, 0b10);
        assert_eq!(record.fate(Bus::Mmio, 0x1000, 8, 0), Fate::Unseen);
        assert_eq!(record.fate(Bus::Mmio, 0x1008, 8, 0), Fate::Captured);
    }

    #[test]
    fn elements_of_string_output_are_told_apart() {
        let mut record = VcpuRecord {
            writes: 1,
            ..Default::default()
        };
        record.traces[0] = Trace {
            addr: 0x3f8,
            captured: 0b10,
            announced: 0,
            len: 2,
            what: 1 | 1 << 8,
        };
        assert_eq!(record.fate(Bus::Pio, 0x3f8, 1, 0), Fate::Unseen);
        assert_eq!(record.fate(Bus::Pio, 0x3f8, 1, 1), Fate::Captured);
        assert_eq!(record.fate(Bus::Pio, 0x3f8, 1, 2), Fate::Unseen);
    }

    #[test]
    fn every_slot_has_a_place_of_its_own() {
        let mut places = (0..500).map(SlotBlock::place);
        assert!(places.all(|(block, slot)| block < SlotBlock::count(500) && slot < BLOCK_SLOTS));
        assert!((0..500).map(SlotBlock::place).is_sorted_by(|a, b| a < b));
    }

    #[test]
    fn an_empty_record_captures_nothing() {
        assert_eq!(VcpuRecord::default().fate(Bus::Mmio, 0, 0, 0), Fate::Unseen);
        assert_eq!(VcpuRecord::default().fate(Bus::Pio, 0, 0, 0), Fate::Unseen);
    }
}
