use super::*;
use crate::report::Format;
use crate::results::Mode;

/// A run in which we do the same as the peer.
fn disks() -> Disks {
    let burst = Burst {
        rate: 1000.0,
        cpu_ns: 5000.0,
    };
    let memory = Memory {
        before: 4 << 10,
        after: 5 << 10,
    };
    Disks {
        schema: SCHEMA,
        host: Host::default(),
        provenance: Provenance::gather(Mode::Full, 1, 8),
        settings: Settings {
            both: vec!["O_DIRECT".into(), "queues: 1".into()],
            ours: "ioregion".into(),
            theirs: "qemu".into(),
        },
        rows: Load::ALL
            .map(|load| Row {
                load,
                ours: vec![burst; 8],
                theirs: vec![burst; 8],
            })
            .into(),
        ours: memory,
        theirs: memory,
        claims: Vec::new(),
    }
}

fn holds(disks: &mut Disks, id: &str) -> Option<bool> {
    disks.complete();
    let claim = disks.claims.iter().find(|claim| claim.id == id);
    claim.unwrap_or_else(|| panic!("no claim {id}")).holds
}

#[test]
fn each_load_has_its_claims() {
    let mut disks = disks();
    for load in ["randread", "randwrite", "seqread", "seqwrite"] {
        for depth in [1, 32] {
            for what in ["iops", "cpu"] {
                let id = format!("vduse-blk-{load}-qd{depth}-{what}");
                assert_eq!(holds(&mut disks, &id), Some(true), "{id}");
            }
        }
    }
    assert_eq!(holds(&mut disks, "vduse-rss"), Some(true));
    assert_eq!(disks.claims.len(), 17);
}

#[test]
fn bars_are_the_least_rate_and_its_interval_the_most_cpu_and_the_most_memory() {
    let (rate, cpu) = ("vduse-blk-randread-qd1-iops", "vduse-blk-randread-qd1-cpu");
    for (factor, kept) in [(0.99, [false, true]), (1.01, [true, false])] {
        let mut disks = disks();
        for burst in &mut disks.rows[0].ours {
            burst.rate *= factor;
            burst.cpu_ns *= factor;
        }
        assert_eq!(holds(&mut disks, rate), Some(kept[0]));
        assert_eq!(holds(&mut disks, cpu), Some(kept[1]));
    }
    // The median reaches the bar, the interval does not.
    let mut disks = disks();
    for (number, burst) in disks.rows[0].ours.iter_mut().enumerate() {
        burst.rate *= if number < 3 { 0.9 } else { 1.01 };
    }
    assert_eq!(holds(&mut disks, rate), Some(false));
    disks.ours.after = (16 << 10) + 1;
    assert_eq!(holds(&mut disks, "vduse-rss"), Some(false));
}

#[test]
fn figures_that_scatter_or_are_few_give_no_verdict() {
    let id = "vduse-blk-seqwrite-qd32-iops";
    let mut noisy = disks();
    for (number, burst) in noisy.rows[7].ours.iter_mut().enumerate() {
        burst.rate *= 1.0 + (number % 2) as f64;
    }
    assert_eq!(holds(&mut noisy, id), None);
    let mut few = disks();
    few.rows[7].ours.truncate(2);
    few.rows[7].theirs.truncate(2);
    assert_eq!(holds(&mut few, id), None);
}

#[test]
fn files_are_read_as_written_and_others_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a/disks.json");
    let mut disks = disks();
    disks.complete();
    disks.save(&path).unwrap();
    let read = Disks::load(&path).unwrap();
    assert_eq!(read.rows, disks.rows);
    assert_eq!(read.render(Format::Text), disks.render(Format::Text));
    let text = std::fs::read_to_string(&path).unwrap();
    for (from, to) in [
        ("\"schema\": 1", "\"schema\": 2"),
        ("\"depth\": 32", "\"depth\": 33"),
        ("\"rate\": 1000.0", "\"rate\": 0.0"),
        ("\"rows\"", "\"other\""),
    ] {
        assert!(text.contains(from), "{from}");
        std::fs::write(&path, text.replacen(from, to, 1)).unwrap();
        let error = Disks::load(&path).unwrap_err().to_string();
        assert!(error.contains("disks.json"), "{error}");
    }
}

#[test]
fn table_says_what_is_the_same_on_both_sides() {
    let mut disks = disks();
    disks.complete();
    for format in [Format::Text, Format::Markdown] {
        let table = disks.render(format);
        for part in [
            "O_DIRECT, queues: 1",
            "seqwrite-qd32, 128 KiB",
            "5.0 MiB",
            "1.000",
        ] {
            assert!(table.contains(part), "{part}: {table}");
        }
    }
}
