//! Delivery of one matched doorbell: slot, change count, wake-up.

use core::{
    arch::asm,
    ptr::{read_volatile, write_volatile},
};

use aya_ebpf::bindings::BPF_RB_FORCE_WAKEUP;
use ioregion_abi::bpf::{BLOCK_SLOTS, CONTROL_ARM, Fate, MatchEntry, Slot, SlotBlock, VcpuRecord};

use crate::maps::{CONTROLS, SLOTS, WAKERS};

/// Adds to a shared word and returns the old value; a full barrier.
///
/// # Safety
///
/// `word` points to a live, aligned map element.
#[inline(always)]
unsafe fn fetch_add(word: *mut u64, mut value: u64) -> u64 {
    // SAFETY: The caller vouches for the pointer; the verifier checks it again.
    unsafe {
        asm!(
            "{value} = atomic_fetch_add((u64 *)({word} + 0), {value})",
            word = in(reg) word,
            value = inout(reg) value,
        );
    }
    value
}

/// Exchanges a shared word and returns the old value; a full barrier.
///
/// # Safety
///
/// As for [`fetch_add`].
#[inline(always)]
unsafe fn exchange(word: *mut u64, mut value: u64) -> u64 {
    // SAFETY: As for `fetch_add`.
    unsafe {
        asm!(
            "{value} = xchg_64({word} + 0, {value})",
            word = in(reg) word,
            value = inout(reg) value,
        );
    }
    value
}

/// Stores the value of a doorbell, or announces it to the task that drains the coalesced ring,
/// and wakes that task as the entry says. Returns which of the two was done.
#[inline(always)]
pub fn doorbell(entry: &MatchEntry, data: u64, record: &mut VcpuRecord) -> Fate {
    let (done, fate) = if entry.flags & MatchEntry::STORE != 0 {
        (store(entry, data, record), Fate::Captured)
    } else {
        (announce(entry.port, record), Fate::Announced)
    };
    if !done {
        // Its region is being removed: the access exits and is dispatched anew.
        return Fate::Unseen;
    }
    wake(entry.port, entry.flags, record);
    fate
}

/// Tells the task that drains the coalesced ring that one more write is on its way there.
#[inline(always)]
pub fn zone_write(port: u32, record: &mut VcpuRecord) -> Fate {
    if !announce(port, record) {
        return Fate::Unseen;
    }
    wake(port, MatchEntry::WAKE_ARMED, record);
    Fate::Announced
}

#[inline(always)]
fn store(entry: &MatchEntry, data: u64, record: &mut VcpuRecord) -> bool {
    let Some(block) = block(entry.port, entry.block) else {
        record.misdirected += 1;
        return false;
    };
    if entry.slot >= BLOCK_SLOTS {
        record.misdirected += 1;
        return false;
    }
    // SAFETY: `block` is a live element: the maps of a port are never freed while the program can
    // reach them; the slot lies in it. The value is one aligned word, so it is never seen torn;
    // the atomic adds order it before the sequence, and the sequence before the change.
    unsafe {
        let slot = (&raw mut (*block).slots)
            .cast::<Slot>()
            .add(entry.slot as usize);
        write_volatile(&raw mut (*slot).value, data);
        fetch_add(&raw mut (*slot).sequence, 1);
        fetch_add(&raw mut (*block).changes, 1);
    }
    true
}

/// Slot 0 of a draining port counts the writes that are on their way into the coalesced ring.
#[inline(always)]
fn announce(port: u32, record: &mut VcpuRecord) -> bool {
    let Some(block) = block(port, 0) else {
        record.misdirected += 1;
        return false;
    };
    // SAFETY: As in `store`.
    unsafe { fetch_add(&raw mut (*block).slots[0].sequence, 1) };
    true
}

#[inline(always)]
fn block(port: u32, block: u32) -> Option<*mut SlotBlock> {
    SLOTS.get_value_ptr_mut(port, &block)
}

#[inline(always)]
fn wake(port: u32, flags: u32, record: &mut VcpuRecord) {
    if flags & MatchEntry::WAKE_ALWAYS == 0 {
        if flags & MatchEntry::WAKE_ARMED == 0 {
            return;
        }
        let Some(arm) = CONTROLS.get_value_ptr_mut(port, &CONTROL_ARM) else {
            record.misdirected += 1;
            return;
        };
        // SAFETY: `arm` is a live element. The read comes after a full barrier (the atomic
        // operations of `store` and `announce`), which pairs with the fence of the task between
        // arming and looking at its slots once more.
        let armed = unsafe { read_volatile(arm) != 0 && exchange(arm, 0) != 0 };
        if !armed {
            return;
        }
    }
    let sent = WAKERS
        .get(port)
        .is_some_and(|waker| waker.output(&0_u64, BPF_RB_FORCE_WAKEUP.into()).is_ok());
    if sent {
        record.wakeups += 1;
    } else {
        // The ring buffer is full of wake-ups that the task has not consumed, so it is
        // readable and the task cannot be asleep on it.
        record.wakeups_refused += 1;
    }
}
