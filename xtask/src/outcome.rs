//! How tiers end, and what the output of test runners says about them.

use crate::sh::table;

/// How a tier ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// With a detail, perhaps empty.
    Passed(String),
    /// With the reason.
    Failed(String),
    /// With the reason and what would enable it.
    Skipped(String),
}

/// How many tests a result line of cargo test, of nextest or of the kernel's tests says were run;
/// `None` for other lines.
pub fn tests_in(line: &str) -> Option<u64> {
    let words: Vec<&str> = line.split_whitespace().collect();
    // cargo test: "test result: ok. 3 passed; 0 failed; 1 ignored; …"
    if words.starts_with(&["test", "result:"]) {
        let before = |word| {
            let at = words.iter().position(|&other| other == word)?;
            words[at.checked_sub(1)?].parse::<u64>().ok()
        };
        return Some(before("passed;")? + before("failed;")?);
    }
    // The kernel's tests: "VERDICT PASS: 21 tests, 0 failed"
    if let ["VERDICT", "PASS:" | "FAIL:", tests, "tests,", ..] = words[..] {
        return tests.parse().ok();
    }
    // nextest: "Summary [   0.005s] 3 tests run: 3 passed, 0 skipped"
    if words.first() != Some(&"Summary") {
        return None;
    }
    let at = words
        .windows(2)
        .position(|pair| matches!(pair, ["test" | "tests", "run:"]))?;
    // A run that was cut short says "2/5 tests run".
    let run = words[at.checked_sub(1)?];
    run.split('/').next()?.parse().ok()
}

/// The table of tiers with the sum as its last line, and how many failed.
pub fn summary(results: &[(&str, Outcome, f64)]) -> (String, usize) {
    let mut rows = vec![["tier", "result", "seconds", "detail"].map(String::from)];
    let mut counts = [0; 3];
    for (name, outcome, seconds) in results {
        let (index, result, detail) = match outcome {
            Outcome::Passed(detail) => (0, "passed", detail),
            Outcome::Failed(why) => (1, "FAILED", why),
            Outcome::Skipped(why) => (2, "skipped", why),
        };
        counts[index] += 1;
        rows.push([
            name.to_string(),
            result.into(),
            format!("{seconds:.1}"),
            detail.clone(),
        ]);
    }
    let [passed, failed, skipped] = counts;
    let sum = format!("{passed} passed, {failed} failed, {skipped} skipped\n");
    (table(&rows) + &sum, failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn result_lines_of_both_runners_are_counted() {
        let cases = [
            (
                "test result: ok. 3 passed; 0 failed; 1 ignored; 0 measured",
                Some(3),
            ),
            (
                "test result: FAILED. 2 passed; 1 failed; 0 ignored",
                Some(3),
            ),
            ("test result: ok. 0 passed; 0 failed; 0 ignored", Some(0)),
            (
                "     Summary [   0.005s] 4 tests run: 4 passed, 0 skipped",
                Some(4),
            ),
            (
                "     Summary [   0.005s] 1 test run: 1 passed, 0 skipped",
                Some(1),
            ),
            (
                "     Summary [   0.1s] 2/5 tests run: 1 passed, 1 failed",
                Some(2),
            ),
            ("VERDICT PASS: 21 tests, 0 failed", Some(21)),
            ("VERDICT FAIL: 2 tests, 1 failed", Some(2)),
            ("VERDICT PASS: many tests, 0 failed", None),
            ("running 3 tests", None),
            ("a guest said: 7 tests run: none", None),
        ];
        for (line, count) in cases {
            assert_eq!(tests_in(line), count, "{line}");
        }
    }

    #[test]
    fn summary_ends_with_the_sum_of_the_tiers() {
        let results = [
            ("fmt", Outcome::Passed(String::new()), 1.0),
            ("unit", Outcome::Failed("no test ran".into()), 2.0),
            ("miri", Outcome::Skipped("none".into()), 0.0),
        ];
        let (text, failed) = summary(&results);
        assert_eq!(failed, 1);
        assert_eq!(text.lines().last(), Some("1 passed, 1 failed, 1 skipped"));
        assert_eq!(text.lines().count(), 5);
    }
}
