//! Keeps the program's buckets true to the hash maps behind them.

use std::collections::{HashMap, HashSet};
use std::mem::offset_of;
use std::os::fd::BorrowedFd;
use std::sync::atomic::Ordering;

use ioregion_abi::bpf::{MatchEntry, MatchKey};
use ioregion_abi::bucket::{DOORBELL_BUCKETS_SHIFT, DoorbellBucket, THREAD_BUCKETS, ThreadBucket};

use crate::sys::mmap::Mapping;

/// The vCPU threads.
#[derive(Debug)]
pub(super) struct Threads {
    buckets: Mapping,
    /// Thread → record, of all.
    bound: HashMap<u32, u32>,
}

impl Threads {
    /// Maps the program's `THREADS`, in which nothing was written yet.
    pub(super) fn new(map: BorrowedFd<'_>) -> std::io::Result<Self> {
        let len = THREAD_BUCKETS as usize * size_of::<ThreadBucket>();
        Ok(Self {
            buckets: Mapping::of_kernel(map, 0, len, true)?,
            bound: HashMap::new(),
        })
    }

    /// A thread has a record from now on, or none.
    ///
    /// The hash map must have it before it has one, and until it has none.
    pub(super) fn set(&mut self, thread: u32, record: Option<u32>) {
        match record {
            Some(record) => self.bound.insert(thread, record),
            None => self.bound.remove(&thread),
        };
        let number = ThreadBucket::of(thread);
        let mut here = self
            .bound
            .iter()
            .filter(|(thread, _)| ThreadBucket::of(**thread) == number);
        let bucket = match (here.next(), here.next()) {
            (None, _) => ThreadBucket::EMPTY,
            (Some((thread, record)), None) => ThreadBucket::one(*thread, *record),
            _ => ThreadBucket::CROWDED,
        };
        let at = number as usize * size_of::<ThreadBucket>();
        self.buckets.word(at).store(bucket.0, Ordering::Release);
    }
}

/// The first keys of the match table.
#[derive(Debug)]
pub(super) struct Doorbells {
    buckets: Mapping,
    /// How many keys a bucket stands for, where there are any.
    keys: HashMap<u32, u32>,
    /// Buckets that a run of the program may still take for what they were.
    stale: HashSet<u32>,
}

impl Doorbells {
    /// Maps the program's `BUCKETS`, in which nothing was written yet.
    pub(super) fn new(map: BorrowedFd<'_>) -> std::io::Result<Self> {
        let len = (1 << DOORBELL_BUCKETS_SHIFT) * size_of::<DoorbellBucket>();
        Ok(Self {
            buckets: Mapping::of_kernel(map, 0, len, true)?,
            keys: HashMap::new(),
            stale: HashSet::new(),
        })
    }

    fn store(&self, bucket: u32, field: usize, value: u64) {
        let at = bucket as usize * size_of::<DoorbellBucket>() + field;
        self.buckets.word(at).store(value, Ordering::Release);
    }

    /// Makes a new entry of the hash map known.
    pub(super) fn add(&mut self, key: &MatchKey, entry: &MatchEntry) {
        if key.what & MatchKey::MASKED != 0 {
            return;
        }
        let bucket = DoorbellBucket::of(key);
        let keys = self.keys.entry(bucket).or_insert(0);
        *keys += 1;
        let alone = *keys == 1 && entry.flags & MatchEntry::SELECT == 0;
        if alone && !self.stale.contains(&bucket) {
            let one = DoorbellBucket::one(key, entry);
            self.store(bucket, offset_of!(DoorbellBucket, addr), one.addr);
            self.store(bucket, offset_of!(DoorbellBucket, place), one.place);
            self.store(bucket, offset_of!(DoorbellBucket, rest), one.rest);
            self.store(bucket, offset_of!(DoorbellBucket, key), one.key);
        } else {
            self.stale.insert(bucket);
            let crowded = DoorbellBucket::CROWDED;
            self.store(bucket, offset_of!(DoorbellBucket, key), crowded);
        }
    }

    /// Forgets an entry that was [`add`](Self::add)ed; the hash map has it no more.
    pub(super) fn remove(&mut self, key: &MatchKey) {
        if key.what & MatchKey::MASKED != 0 {
            return;
        }
        let bucket = DoorbellBucket::of(key);
        let Some(keys) = self.keys.get_mut(&bucket) else {
            return;
        };
        *keys -= 1;
        // A bucket that was crowded stays so: who is left in it, the hash map knows.
        if *keys == 0 {
            self.keys.remove(&bucket);
            self.stale.insert(bucket);
            let empty = DoorbellBucket::EMPTY;
            self.store(bucket, offset_of!(DoorbellBucket, key), empty);
        }
    }

    /// All runs of the program that began before this call have ended: what was emptied can be
    /// filled again.
    pub(super) fn settle(&mut self) {
        let keys = &self.keys;
        self.stale.retain(|bucket| keys.contains_key(bucket));
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use ioregion_abi::Bus;
    use ioregion_abi::bucket::Look;
    use nix::fcntl::{FcntlArg, SealFlag, fcntl};
    use nix::sys::memfd::{MFdFlags, memfd_create};

    use super::*;

    fn table() -> Doorbells {
        let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
        let fd = memfd_create(c"test", flags).unwrap();
        nix::unistd::ftruncate(&fd, 32 << DOORBELL_BUCKETS_SHIFT).unwrap();
        fcntl(&fd, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_SHRINK)).unwrap();
        Doorbells::new(fd.as_fd()).unwrap()
    }

    fn look(table: &Doorbells, key: &MatchKey) -> Look<MatchEntry> {
        let base = DoorbellBucket::of(key) as usize * 32;
        let word = |n: usize| table.buckets.word(base + n * 8).load(Ordering::Relaxed);
        let bucket = DoorbellBucket {
            key: word(0),
            addr: word(1),
            place: word(2),
            rest: word(3),
        };
        bucket.look(key, |word| *word)
    }

    fn key(n: u64) -> MatchKey {
        MatchKey::first(1, Bus::Mmio, 0xd000_0000 + n * 4, 4)
    }

    /// Two keys of one bucket.
    fn neighbours() -> [MatchKey; 2] {
        let mut seen = HashMap::new();
        for n in 0.. {
            if let Some(other) = seen.insert(DoorbellBucket::of(&key(n)), n) {
                return [key(other), key(n)];
            }
        }
        unreachable!()
    }

    fn entry(port: u32) -> MatchEntry {
        MatchEntry {
            port,
            flags: MatchEntry::STORE,
            ..MatchEntry::default()
        }
    }

    #[test]
    fn one_of_two_in_a_bucket_is_never_taken_for_absent() {
        let mut table = table();
        let [one, other] = neighbours();
        assert_eq!(look(&table, &one), Look::Absent);
        table.add(&one, &entry(1));
        assert_eq!(look(&table, &one), Look::Here(entry(1)));
        assert_eq!(look(&table, &other), Look::Absent);
        table.add(&other, &entry(2));
        assert_eq!(look(&table, &one), Look::Crowded);
        assert_eq!(look(&table, &other), Look::Crowded);
        table.remove(&one);
        assert_eq!(look(&table, &other), Look::Crowded);
        table.remove(&other);
        assert_eq!(look(&table, &other), Look::Absent);
    }

    #[test]
    fn an_emptied_bucket_is_filled_again_only_when_nobody_reads_it() {
        let mut table = table();
        let [one, other] = neighbours();
        table.add(&one, &entry(1));
        table.remove(&one);
        table.add(&other, &entry(2));
        assert_eq!(look(&table, &other), Look::Crowded);
        table.settle();
        table.remove(&other);
        table.settle();
        table.add(&other, &entry(2));
        assert_eq!(look(&table, &other), Look::Here(entry(2)));
    }

    #[test]
    fn what_selects_by_value_is_left_to_the_hash_map() {
        let mut table = table();
        let select = MatchEntry {
            mask: 0xff,
            flags: MatchEntry::SELECT,
            ..MatchEntry::default()
        };
        table.add(&key(0), &select);
        table.add(&key(0).masked(7), &entry(1));
        assert_eq!(look(&table, &key(0)), Look::Crowded);
        table.remove(&key(0).masked(7));
        assert_eq!(look(&table, &key(0)), Look::Crowded);
        table.remove(&key(0));
        assert_eq!(look(&table, &key(0)), Look::Absent);
    }
}
