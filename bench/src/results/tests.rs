use super::*;
use crate::synthetic::{results, scenario};

fn written(text: &[u8]) -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("some.json");
    std::fs::write(&path, text).unwrap();
    (dir, path)
}

#[test]
fn saved_results_load_unchanged() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("new/folder/latest.json");
    let before = results();
    before.save(&path).unwrap();
    let after = Results::load(&path).unwrap();
    let json = |r: &Results| serde_json::to_value(r).unwrap();
    assert_eq!(json(&before), json(&after));
    assert_eq!(json(&before)["host"]["kvm"]["kind"], "pvm");
}

#[test]
fn unusable_files_are_errors_that_name_the_file() {
    let mut newer = serde_json::to_value(results()).unwrap();
    newer["schema"] = 2.into();
    let newer = newer.to_string();
    let mut twice = results();
    twice.scenarios.push(twice.scenarios[0].clone());
    let mut unordered = results();
    unordered.scenarios[0].vcpu_ns.p90 = 1;
    let cases: [(&[u8], &str); 9] = [
        (b"", "EOF"),
        (b"\xff\xfe", "expected value"),
        (b"[1, 2]", "not a results file"),
        (b"{\"schema\": 1}", "missing field"),
        (b"{\"schema\": -1}", "invalid value"),
        (&"[".repeat(100_000).into_bytes(), "not a results file"),
        (newer.as_bytes(), "schema 2 is not supported"),
        (&serde_json::to_vec(&twice).unwrap(), "occurs twice"),
        (
            &serde_json::to_vec(&unordered).unwrap(),
            "percentiles out of order or range",
        ),
    ];
    for (text, expected) in cases {
        let (_dir, path) = written(text);
        let error = Results::load(&path).unwrap_err().to_string();
        assert!(error.contains("some.json"), "{error}");
        assert!(error.contains(expected), "{error}");
    }
    let missing = Results::load(Path::new("/nonexistent.json")).unwrap_err();
    assert!(missing.to_string().contains("/nonexistent.json"));
}

#[test]
fn oversized_file_is_refused_before_it_is_parsed() {
    let (_dir, path) = written(b"");
    File::options()
        .write(true)
        .open(&path)
        .unwrap()
        .set_len(MAX_FILE_BYTES + 1)
        .unwrap();
    assert!(matches!(
        Results::load(&path),
        Err(ResultsError::TooLarge { .. })
    ));
}

#[test]
fn figures_that_json_cannot_carry_are_not_saved() {
    let dir = tempfile::tempdir().unwrap();
    let mut bad = results();
    bad.scenarios[0].exits_per_access = f64::NAN;
    let path = dir.path().join("bad.json");
    assert!(matches!(bad.save(&path), Err(ResultsError::Invalid { .. })));
    assert!(!path.exists());
}

#[test]
fn histogram_summary_and_raw_form_agree() {
    let mut histogram = Histogram::<u64>::new(3).unwrap();
    (1..=1000).for_each(|ns| histogram.record(ns).unwrap());
    let summary = Latency::from(&histogram);
    assert_eq!((summary.p50, summary.p99, summary.max), (500, 990, 1000));
    let raw = sparse(&histogram);
    assert_eq!(raw.iter().map(|(_, count)| count).sum::<u64>(), 1000);
    assert_eq!(raw[0], (1, 1));
}

#[test]
fn wrong_accesses_add_up_without_overflow() {
    let mut s = scenario("x/posted", 1.0);
    (s.lost, s.duplicated) = (u64::MAX, 1);
    assert_eq!(s.wrong(), u64::MAX);
}
