use std::collections::HashMap;

use proptest::prelude::*;

use super::*;
use crate::memory::MemoryError;

/// Lists of addresses, by where they are.
#[derive(Debug, Default)]
struct Lists(HashMap<u64, u64>);

impl Memory for Lists {
    fn read(&self, addr: u64, into: &mut [u8]) -> Result<(), MemoryError> {
        for (number, entry) in (0..).zip(into.chunks_mut(8)) {
            let at = addr.wrapping_add(number * 8);
            let value = self.0.get(&at).ok_or(MemoryError::Unmapped { addr: at })?;
            entry.copy_from_slice(&value.to_le_bytes());
        }
        Ok(())
    }

    fn write(&self, addr: u64, _: &[u8]) -> Result<(), MemoryError> {
        Err(MemoryError::NotWritable { addr })
    }

    fn load(&self, addr: u64) -> Result<u16, MemoryError> {
        Err(MemoryError::Unmapped { addr })
    }

    fn store(&self, addr: u64, _: u16) -> Result<(), MemoryError> {
        Err(MemoryError::NotWritable { addr })
    }
}

const PAGE: u64 = 4096;

fn of(lists: &Lists, prp: [u64; 2], len: u32) -> Result<Vec<(u64, u32)>, Status> {
    let segments = segments(lists, prp, len, PAGE)?;
    Ok(segments.iter().map(|part| (part.addr, part.len)).collect())
}

#[test]
fn one_or_two_pages_need_no_list() {
    let none = Lists::default();
    assert_eq!(of(&none, [7, 7], 0), Ok(vec![]));
    assert_eq!(of(&none, [0x1000, 7], 4096), Ok(vec![(0x1000, 4096)]));
    assert_eq!(of(&none, [0x1ffc, 7], 4), Ok(vec![(0x1ffc, 4)]));
    let two = Ok(vec![(0x1800, 2048), (0x9000, 4096)]);
    assert_eq!(of(&none, [0x1800, 0x9000], 6144), two);
    // What follows each other is one.
    assert_eq!(of(&none, [0x1800, 0x2000], 6144), Ok(vec![(0x1800, 6144)]));
    // The last page of all.
    let last = !0xfff;
    assert_eq!(of(&none, [last, 0], 4096), Ok(vec![(last, 4096)]));
    assert_eq!(
        of(&none, [last, 0], 8192),
        Ok(vec![(last, 4096), (0, 4096)])
    );
}

#[test]
fn addresses_must_be_aligned_as_their_place_asks() {
    let mut lists = Lists::default();
    lists.0.extend([(0x8000, 0xa000), (0x8008, 0xb004)]);
    for (prp, len) in [
        ([0x1001, 0], 4),
        ([0x1002, 0], 4),
        ([0x1000, 0x9004], 8192),
        ([0x1000, 0x8004], 12288),
        // An entry of a list.
        ([0x1000, 0x8000], 12288),
    ] {
        assert_eq!(of(&lists, prp, len), Err(Status::PRP_OFFSET), "{prp:x?}");
    }
    // A list at the end of a page, and the next one not at the start of one.
    lists.0.insert(0x7ff8, 0x9008);
    assert_eq!(of(&lists, [0x1000, 0x7ff8], 12288), Err(Status::PRP_OFFSET));
}

#[test]
fn list_that_is_no_memory_fails_the_transfer() {
    let mut lists = Lists::default();
    assert_eq!(of(&lists, [0, 0x8000], 12288), Err(Status::DATA_TRANSFER));
    lists.0.insert(0x7ff8, 0x9000);
    assert_eq!(of(&lists, [0, 0x7ff8], 12288), Err(Status::DATA_TRANSFER));
    assert_eq!(
        of(&lists, [0, u64::MAX - 7], 12288),
        Err(Status::DATA_TRANSFER)
    );
}

#[test]
fn list_that_leads_to_itself_ends_with_the_data() {
    let mut lists = Lists::default();
    for entry in 0..512 {
        lists.0.insert(0x8000 + entry * 8, 0x8000);
    }
    let pages = 1025;
    let data = segments(&lists, [0, 0x8000], pages * 4096, PAGE).unwrap();
    assert_eq!(data.iter().map(|part| part.len).sum::<u32>(), pages * 4096);
}

proptest! {
    /// Whatever pages a driver takes, and wherever its lists lie: they are found in order.
    #[test]
    fn pages_are_found_in_order(
        pages in proptest::collection::vec(0u64..1000, 1..1200),
        offset in 0u64..1024,
        first_entry in 0u64..512,
        cut in 0u32..4096,
    ) {
        let offset = offset * 4;
        let pages: Vec<u64> = pages.iter().map(|page| (page + 10) * PAGE).collect();
        let total = pages.len() as u64 * PAGE - offset;
        let len = u32::try_from(total).unwrap() - cut.min(u32::try_from(PAGE - offset).unwrap() - 1);
        let mut lists = Lists::default();
        let mut second = pages.get(1).copied().unwrap_or(3);
        if pages.len() > 2 {
            let base = 1 << 40;
            let mut at = base + first_entry * 8;
            second = at;
            let mut next = base + PAGE * 2;
            for (number, page) in pages.iter().enumerate().skip(1) {
                if at % PAGE == PAGE - 8 && number + 1 < pages.len() {
                    lists.0.insert(at, next);
                    at = next;
                    next += PAGE * 2;
                }
                lists.0.insert(at, *page);
                at += 8;
            }
        }
        let mut expected: Vec<(u64, u64)> = Vec::new();
        let mut left = u64::from(len);
        for (number, page) in pages.iter().enumerate() {
            let skip = if number == 0 { offset } else { 0 };
            let part = left.min(PAGE - skip);
            left -= part;
            match expected.last_mut() {
                Some(last) if last.0 + last.1 == page + skip => last.1 += part,
                _ if part > 0 => expected.push((page + skip, part)),
                _ => {}
            }
        }
        let found = segments(&lists, [pages[0] + offset, second], len, PAGE).unwrap();
        let found: Vec<_> = found.iter().map(|part| (part.addr, u64::from(part.len))).collect();
        prop_assert_eq!(found, expected);
    }
}
