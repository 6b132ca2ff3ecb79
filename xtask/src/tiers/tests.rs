use super::*;

fn host() -> Host<'static> {
    Host {
        root: Path::new("/"),
        tools: Err(Missing::new("no tools", "install them")),
    }
}

#[test]
fn tier_without_tests_fails() {
    let empty = Tier {
        counts: true,
        commands: |_| Ok(vec![Cmd::line("echo test result: ok. 0 passed; 0 failed;")]),
        ..ROW
    };
    assert_eq!(
        run_tier(&empty, &host(), false),
        Outcome::Failed("no test ran".into())
    );
}

#[test]
fn tier_reports_how_many_tests_ran_over_all_its_binaries() {
    let tier = Tier {
        counts: true,
        commands: |_| {
            let line = "echo test result: ok. 2 passed; 0 failed;";
            Ok(vec![Cmd::line(line), Cmd::line(line)])
        },
        ..ROW
    };
    assert_eq!(
        run_tier(&tier, &host(), true),
        Outcome::Passed("tests: 4".into())
    );
}

#[test]
fn tier_with_a_failing_command_fails() {
    let tier = Tier {
        counts: true,
        commands: |_| Ok(vec![Cmd::line("false")]),
        ..ROW
    };
    let outcome = run_tier(&tier, &host(), false);
    assert!(matches!(outcome, Outcome::Failed(_)), "{outcome:?}");
}

#[test]
fn tier_that_cannot_run_is_skipped_but_fails_in_ci_unless_optional() {
    const NEEDY: Tier = Tier {
        needs: |host| host.tools().map(drop),
        ..ROW
    };
    let why = "no tools; enable: install them";
    assert_eq!(
        run_tier(&NEEDY, &host(), false),
        Outcome::Skipped(why.into())
    );
    assert_eq!(
        run_tier(&NEEDY, &host(), true),
        Outcome::Failed(format!("cannot run: {why}"))
    );
    let optional = Tier {
        optional: true,
        ..NEEDY
    };
    assert_eq!(
        run_tier(&optional, &host(), true),
        Outcome::Skipped(why.into())
    );
}

#[test]
fn privileges_are_read_from_the_effective_capabilities() {
    let with = |capabilities: u64| bpf_privileges(&format!("CapEff:\t{capabilities:016x}\n"));
    assert!(with(1 << 21).is_ok());
    assert!(with(1 << 38 | 1 << 39).is_ok());
    assert!(with(1 << 39).is_err());
    assert!(bpf_privileges("").is_err());
}

#[test]
fn every_vduse_test_runs_on_the_newer_kernel() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../userspace/cli/tests");
    let entries = std::fs::read_dir(folder).unwrap();
    let mut names: Vec<String> = entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter_map(|name| Some(name.strip_suffix(".rs")?.to_owned()))
        .filter(|name| name.starts_with("vduse_"))
        .collect();
    names.sort();
    assert_eq!(names, VDUSE_TESTS);
}

#[test]
fn tier_names_are_unique() {
    let mut names: Vec<&str> = TIERS.iter().map(|tier| tier.name).collect();
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), TIERS.len());
}
