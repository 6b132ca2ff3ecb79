use super::*;
use ioregion_bench::claims::{CLAIMS, NATIVE_CLAIMS};

#[test]
fn names_are_unique_and_claims_find_theirs() {
    let names: std::collections::HashSet<_> = ROWS.iter().map(|row| row.name).collect();
    assert_eq!(names.len(), ROWS.len());
    for claim in CLAIMS.iter().chain(NATIVE_CLAIMS) {
        let mut wanted = claim.how.scenarios().into_iter().flatten();
        assert!(wanted.all(|name| names.contains(name)), "{}", claim.id);
    }
}

#[test]
fn rows_with_the_program_come_last() {
    assert!(
        ROWS.iter()
            .is_sorted_by_key(|row| (row.needs_program(), row.attaches()))
    );
}

#[test]
fn every_mechanism_is_in_the_shortest_run() {
    for name in ["floor", "kvm-run", "forward", "ioeventfd", "ebpf"] {
        let smoke = |row: &&Row| row.carrier.name() == name && row.is_in(Mode::Smoke, None);
        assert!(ROWS.iter().any(|row| smoke(&row)), "{name}");
    }
}
