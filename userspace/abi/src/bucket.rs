//! Buckets: what the eBPF program looks at before it looks into a hash map.
//!
//! Most lookups end here, after a few loads without a call. A bucket is either empty, or says all
//! about the one thing in it, or is *crowded*: then the hash map knows. Only the loader writes
//! them, so that each holds for the hash map beside it at any time.

use crate::bpf::{MatchEntry, MatchKey};

/// Buckets of the vCPU threads; a power of two.
pub const THREAD_BUCKETS: u32 = 4096;
/// Buckets of the match table, as a power of two.
pub const DOORBELL_BUCKETS_SHIFT: u32 = 17;

/// What a bucket says about a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Look<T> {
    /// It is there, and this is its value.
    Here(T),
    /// It is not there.
    Absent,
    /// The hash map knows.
    Crowded,
}

/// The vCPU threads whose ids have the same low bits: one word, changed in one step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(transparent)]
pub struct ThreadBucket(pub u64);

impl ThreadBucket {
    /// No vCPU thread's id ends so.
    pub const EMPTY: Self = Self(0);
    /// More than one does.
    pub const CROWDED: Self = Self(u64::MAX);

    /// Index of the bucket of a thread.
    #[must_use]
    #[inline(always)]
    pub const fn of(thread: u32) -> u32 {
        thread % THREAD_BUCKETS
    }

    /// One vCPU thread (not 0), and the index of its vCPU's
    /// [`VcpuRecord`](crate::bpf::VcpuRecord).
    #[must_use]
    pub const fn one(thread: u32, record: u32) -> Self {
        Self((record as u64) << 32 | thread as u64)
    }

    /// The record of a thread.
    #[must_use]
    #[inline(always)]
    pub const fn look(self, thread: u32) -> Look<u32> {
        if self.0 == Self::EMPTY.0 {
            Look::Absent
        } else if self.0 as u32 == thread {
            Look::Here((self.0 >> 32) as u32)
        } else if self.0 == Self::CROWDED.0 {
            Look::Crowded
        } else {
            Look::Absent
        }
    }
}

/// The first keys ([`MatchKey::first`]) of the match table with the same hash.
///
/// The words change one by one: `key` is written last when the bucket is filled, and first when
/// it is emptied; it is filled again only when no run of the program can still be reading it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub struct DoorbellBucket {
    /// [`EMPTY`](Self::EMPTY), [`CROWDED`](Self::CROWDED), or the key's `vm` in bits 31..0 and
    /// its `what` in bits 63..32.
    pub key: u64,
    /// The key's address.
    pub addr: u64,
    /// The entry's `port` in bits 31..0, its `block` in bits 63..32.
    pub place: u64,
    /// The entry's `slot` in bits 31..0, its `flags` in bits 63..32.
    pub rest: u64,
}

impl DoorbellBucket {
    /// `key` of an empty bucket: a key's size is not 0.
    pub const EMPTY: u64 = 0;
    /// `key` of a crowded bucket, or of one that holds a [`MatchEntry::SELECT`].
    pub const CROWDED: u64 = u64::MAX;

    /// Index of the bucket of a first key.
    #[must_use]
    #[inline(always)]
    pub const fn of(key: &MatchKey) -> u32 {
        // 2^64 divided by the golden ratio spreads the neighbours that doorbells are.
        // A register that is read and a doorbell at its address differ in bit 62.
        let read = (key.what & MatchKey::READ != 0) as u64;
        let place = key.addr ^ (key.vm as u64) << 40 ^ read << 62;
        let mixed = place.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        (mixed >> (u64::BITS - DOORBELL_BUCKETS_SHIFT)) as u32
    }

    /// The word [`key`](Self::key) of a first key.
    #[must_use]
    #[inline(always)]
    pub const fn key(key: &MatchKey) -> u64 {
        (key.what as u64) << 32 | key.vm as u64
    }

    /// A doorbell, alone.
    #[must_use]
    pub const fn one(key: &MatchKey, entry: &MatchEntry) -> Self {
        Self {
            key: Self::key(key),
            addr: key.addr,
            place: (entry.block as u64) << 32 | entry.port as u64,
            rest: (entry.flags as u64) << 32 | entry.slot as u64,
        }
    }

    /// The entry of a first key.
    ///
    /// `load` loads a word of the bucket, in the order of the calls.
    #[must_use]
    #[inline(always)]
    pub fn look(&self, key: &MatchKey, load: impl Fn(&u64) -> u64) -> Look<MatchEntry> {
        let word = load(&self.key);
        if word == Self::CROWDED {
            return Look::Crowded;
        }
        if word != Self::key(key) || load(&self.addr) != key.addr {
            return Look::Absent;
        }
        let (place, rest) = (load(&self.place), load(&self.rest));
        Look::Here(MatchEntry {
            mask: 0,
            port: place as u32,
            block: (place >> 32) as u32,
            slot: rest as u32,
            flags: (rest >> 32) as u32,
        })
    }
}

const _: () = {
    assert!(size_of::<ThreadBucket>() == 8);
    assert!(size_of::<DoorbellBucket>() == 32);
    assert!(THREAD_BUCKETS.is_power_of_two());
};

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Bus;

    #[test]
    fn a_thread_bucket_knows_its_only_thread() {
        let bucket = ThreadBucket::one(7, 3);
        assert_eq!(bucket.look(7), Look::Here(3));
        assert_eq!(bucket.look(7 + THREAD_BUCKETS), Look::Absent);
        assert_eq!(ThreadBucket::EMPTY.look(7), Look::Absent);
        assert_eq!(ThreadBucket::CROWDED.look(7), Look::Crowded);
        assert_ne!(ThreadBucket::one(1, 0), ThreadBucket::EMPTY);
    }

    #[test]
    fn a_doorbell_bucket_gives_its_entry_to_its_own_key_alone() {
        let key = MatchKey::first(3, Bus::Mmio, 0x1000, 4);
        let entry = MatchEntry {
            mask: 0,
            port: 1,
            block: 2,
            slot: 3,
            flags: MatchEntry::STORE,
        };
        let bucket = DoorbellBucket::one(&key, &entry);
        let look = |bucket: &DoorbellBucket, key: &MatchKey| bucket.look(key, |word| *word);
        assert_eq!(look(&bucket, &key), Look::Here(entry));
        for other in [
            MatchKey::first(4, Bus::Mmio, 0x1000, 4),
            MatchKey::first(3, Bus::Pio, 0x1000, 4),
            MatchKey::first(3, Bus::Mmio, 0x1004, 4),
            MatchKey::first(3, Bus::Mmio, 0x1000, 2),
            key.hooked(true),
            key.hooked(false),
        ] {
            assert_eq!(look(&bucket, &other), Look::Absent);
        }
        let marked = |key| DoorbellBucket { key, ..bucket };
        assert_eq!(look(&marked(DoorbellBucket::CROWDED), &key), Look::Crowded);
        assert_eq!(look(&marked(DoorbellBucket::EMPTY), &key), Look::Absent);
    }

    #[test]
    fn a_register_never_shares_the_bucket_of_the_doorbell_at_its_address() {
        for n in 0..1000 {
            let key = MatchKey::first(1, Bus::Mmio, 0xd000_0000 + n * 4, 4);
            let (doorbell, register) = (key.hooked(true), key.hooked(false));
            assert_ne!(DoorbellBucket::of(&doorbell), DoorbellBucket::of(&register));
            assert_eq!(DoorbellBucket::of(&doorbell), DoorbellBucket::of(&key));
        }
    }

    #[test]
    fn neighbours_hardly_ever_share_a_bucket() {
        for stride in [1, 2, 4, 8, 64, 4096] {
            let mut buckets = [0_u8; 1 << DOORBELL_BUCKETS_SHIFT];
            for n in 0..10_000 {
                let key = MatchKey::first(1, Bus::Mmio, 0xd000_0000 + n * stride, 4);
                buckets[DoorbellBucket::of(&key) as usize] += 1;
            }
            let alone = buckets.iter().filter(|count| **count == 1).count();
            assert!(alone > 8_500, "stride {stride}: {alone} of 10,000 alone");
        }
    }
}
