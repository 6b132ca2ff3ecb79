//! Tests of regions.

use std::collections::HashMap as Table;

use ioregion_abi::bpf::{MatchEntry, MatchKey};
use ioregion_abi::matching;
use proptest::prelude::*;

use super::*;
use crate::mechanism::ebpf_entries_for_tests as entries;
use crate::mechanism::hooked_entries_for_tests as hooked_entries;

struct Map(Table<MatchKey, MatchEntry>);

impl matching::Table for Map {
    fn get(&self, key: &MatchKey) -> Option<MatchEntry> {
        self.0.get(key).copied()
    }
}

fn doorbell() -> impl Strategy<Value = Doorbell> {
    let size = prop::sample::select(&Size::ALL[..]);
    (0..6_u64, size, prop::option::of((0..4_u64, 0..4_u64))).prop_map(|(at, size, datamatch)| {
        let doorbell = Doorbell::new(at * 8, size).sink(Sink::Coalesced);
        match datamatch {
            Some((mask, value)) => doorbell.matching_masked(mask, value & mask),
            None => doorbell,
        }
    })
}

proptest! {
    /// The program's table, this index and the plain rule agree on every write.
    #[test]
    fn index_table_and_rule_find_the_same_doorbell(
        doorbells in prop::collection::vec(doorbell(), 0..8),
        writes in prop::collection::vec((0..7_u64, prop::sample::select(&Size::ALL[..]), 0..8_u64), 1..40),
    ) {
        let mut region = Region::mmio(0x1000, 0x100);
        for doorbell in doorbells {
            let mut more = region.clone();
            more.doorbells.push(doorbell);
            if more.check().is_ok() {
                region = more;
            }
        }
        let index = DoorbellIndex::new(&region.doorbells);
        let table = Map(entries(&region, 1, 2, 3).into_iter().collect());
        let hooked = Map(hooked_entries(&region, 1, 2).into_iter().collect());
        for (at, size, data) in writes {
            let offset = at * 8;
            let rule = region.doorbells.iter().position(|doorbell| doorbell.rings(offset, size, data));
            prop_assert_eq!(index.find(offset, size, data).map(|at| at as usize), rule);
            let found = matching::find(&table, 1, Bus::Mmio, 0x1000 + offset, size.bytes(), data);
            prop_assert_eq!(found.map(|entry| entry.slot as usize), rule);
            let key = MatchKey::first(1, Bus::Mmio, 0x1000 + offset, size.bytes());
            let found = matching::find_from(&hooked, &key.hooked(true), data);
            prop_assert_eq!(found.map(|entry| entry.slot as usize), rule);
            // What one way of seeing an access knows is nothing to the other, nor to reads.
            prop_assert_eq!(matching::find_from(&table, &key.hooked(true), data), None);
            prop_assert_eq!(matching::find_from(&hooked, &key, data), None);
            prop_assert_eq!(matching::find_from(&hooked, &key.hooked(false), data), None);
        }
    }
}

#[test]
fn answered_registers_must_be_in_the_region_and_in_the_file() {
    use RegionErrorKind as Kind;
    let file = RegisterFile::new(4).unwrap();
    let check = |region: Region, answered: &[(u64, Size, u32)]| {
        let add = |region: Region, &(offset, size, index)| {
            region.answered(Answered::new(offset, size, index))
        };
        let checked = answered.iter().fold(region, add).check();
        checked.map_err(|error| error.kind)
    };
    let mmio = || Region::mmio(0x1000, 0x10).registers(&file);
    let pio = || Region::pio(0x10, 0x10).registers(&file);
    // Different sizes at one place are different registers, and may share their value.
    let fine = [(0, Size::B4, 0), (0, Size::B8, 0), (0xf, Size::B1, 3)];
    assert!(check(mmio(), &fine).is_ok());
    for (region, answered) in [(mmio(), (0xd, Size::B4, 0)), (mmio(), (!0, Size::B1, 0))] {
        let refused = check(region, &[answered]).unwrap_err();
        assert!(matches!(refused, Kind::AnsweredOutside(at) if at == answered.0));
    }
    let refused = check(pio(), &[(0, Size::B8, 0)]).unwrap_err();
    assert!(matches!(refused, Kind::AnsweredSize(0)));
    let refused = check(mmio(), &[(4, Size::B2, 0), (4, Size::B2, 1)]).unwrap_err();
    assert!(matches!(refused, Kind::AnsweredTwice(4)));
    let refused = check(mmio(), &[(8, Size::B1, 4)]).unwrap_err();
    assert!(matches!(
        refused,
        Kind::AnsweredIndex {
            offset: 8,
            index: 4,
            len: 4
        }
    ));
    let refused = check(Region::mmio(0, 0x10), &[(8, Size::B1, 0)]).unwrap_err();
    assert!(matches!(refused, Kind::NoRegisterFile(8)));
}

#[test]
fn straddling_doorbells_are_refused_and_nested_ones_are_not() {
    let region = Region::mmio(0, 0x10).doorbell(Doorbell::new(0, Size::B4));
    assert!(
        region
            .clone()
            .doorbell(Doorbell::new(0, Size::B8))
            .check()
            .is_ok()
    );
    let straddling = region.doorbell(Doorbell::new(2, Size::B2)).check();
    assert!(matches!(
        straddling.unwrap_err().kind,
        RegionErrorKind::DoorbellOverlap(2)
    ));
}
