//! Static builds of the programs that run in the VM.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::sh::Cmd;

/// Static programs need a target of their own on the command line: without it the flag would
/// also hit procedural macros, which are shared objects.
const TARGET: &str = "x86_64-unknown-linux-gnu";
/// Apart from the host's programs, whose flags differ: neither build throws the other away.
const TARGET_DIR: &str = "target/vm-build";
/// Apart from both, so that it can be built from nothing while tests run.
pub const BENCH_DIR: &str = "target/vm-bench";

/// A test program.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TestProgram {
    /// The name of its file under `tests`, or `NAME-unit` for unit tests.
    pub name: String,
    /// The package that it belongs to.
    pub package: String,
    /// The executable.
    pub file: PathBuf,
}

/// What was built for the VM.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Suite {
    /// In alphabetical order.
    pub tests: Vec<TestProgram>,
    /// Programs that the tests start; they know them by the path where they were built.
    pub helpers: Vec<PathBuf>,
}

fn cargo(root: &Path, command: &str) -> Cmd {
    cargo_in(root, TARGET_DIR, command)
}

fn cargo_in(root: &Path, dir: &str, command: &str) -> Cmd {
    Cmd::line(command)
        .args(["--release", "--target", TARGET, "--target-dir", dir])
        .env("RUSTFLAGS", "-C target-feature=+crt-static")
        // Only what runs goes into the VM.
        .env("CARGO_PROFILE_RELEASE_DEBUG", "false")
        .dir(root)
}

/// Builds a program in a folder for builds, which is relative to `root`.
pub fn program(root: &Path, dir: &str, package: &str, name: &str) -> Result<PathBuf> {
    cargo_in(root, dir, "cargo build")
        .args(["--package", package, "--bin", name])
        .run()?;
    Ok(root.join(dir).join(TARGET).join("release").join(name))
}

/// Removes a folder for builds.
pub fn clean(root: &Path, dir: &str) -> Result<()> {
    let dir = root.join(dir);
    match std::fs::remove_dir_all(&dir) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("removing {}", dir.display()))
        }
        _ => Ok(()),
    }
}

/// Builds the VM's first process.
pub fn init(root: &Path) -> Result<PathBuf> {
    program(root, TARGET_DIR, "ioregion-init", "init")
}

/// Builds the program that plants faults.
pub fn plant(root: &Path) -> Result<PathBuf> {
    program(root, TARGET_DIR, "ioregion-init", "plant")
}

/// The name of the kernel's own tests.
pub const SELFTESTS: &str = "kernel-selftests";
/// The program that their Makefile makes.
const SELFTEST_PROGRAM: &str = "ioregion_selftest";

/// Builds the kernel's own tests, in a folder of the build, not among their sources.
pub fn selftests(root: &Path) -> Result<TestProgram> {
    let folder = root.join(TARGET_DIR).join("selftests");
    copy_changed(&root.join("kernel/selftests"), &folder)?;
    Cmd::line("make --no-print-directory -C")
        .arg(&folder)
        .arg(SELFTEST_PROGRAM)
        .run()?;
    Ok(TestProgram {
        name: SELFTESTS.into(),
        package: SELFTESTS.into(),
        file: folder.join(SELFTEST_PROGRAM),
    })
}

/// Makes the files of `to` the sources in `from`; equal ones keep their time of change.
fn copy_changed(from: &Path, to: &Path) -> Result<()> {
    let is_source = |name: &str| name.ends_with(".c") || name.ends_with(".h") || name == "Makefile";
    let copy = || -> std::io::Result<()> {
        std::fs::create_dir_all(to)?;
        for entry in std::fs::read_dir(from)? {
            let name = entry?.file_name().to_string_lossy().into_owned();
            let (source, copy) = (from.join(&name), to.join(&name));
            if is_source(&name)
                && std::fs::read(&source)? != std::fs::read(&copy).unwrap_or_default()
            {
                std::fs::write(&copy, std::fs::read(&source)?)?;
            }
        }
        for entry in std::fs::read_dir(to)? {
            let name = entry?.file_name().to_string_lossy().into_owned();
            if is_source(&name) && !from.join(&name).exists() {
                std::fs::remove_file(to.join(&name))?;
            }
        }
        Ok(())
    };
    copy().with_context(|| format!("copying {} to {}", from.display(), to.display()))
}

/// Builds the test programs of `packages`.
pub fn build(root: &Path, packages: &[&str]) -> Result<Suite> {
    let messages = cargo(
        root,
        "cargo test --no-run --message-format=json-render-diagnostics",
    )
    .args(packages.iter().flat_map(|package| ["--package", package]))
    .output()?;
    let suite = from_messages(&messages)?;
    if suite.tests.is_empty() {
        bail!("cargo built no test program of {}", packages.join(", "));
    }
    Ok(suite)
}

/// The package that cargo means by `path+file:///FOLDER#NAME@VERSION`.
fn package(id: &str) -> String {
    let (_, rest) = id.rsplit_once('#').unwrap_or_default();
    rest.split('@').next().unwrap_or_default().into()
}

/// The executables in cargo's messages.
fn from_messages(messages: &str) -> Result<Suite> {
    let mut suite = Suite::default();
    // Other lines are what build scripts and cargo itself print.
    for line in messages.lines().filter(|line| line.starts_with('{')) {
        let message: Value = serde_json::from_str(line).context("reading cargo's messages")?;
        let Some(file) = message["executable"].as_str().map(PathBuf::from) else {
            continue;
        };
        let name = message["target"]["name"].as_str().unwrap_or_default();
        let kind = message["target"]["kind"][0].as_str().unwrap_or_default();
        if message["profile"]["test"] != true {
            suite.helpers.push(file);
            continue;
        }
        let name = match kind {
            "test" => name.into(),
            _ => format!("{name}-unit"),
        };
        let package = package(message["package_id"].as_str().unwrap_or_default());
        suite.tests.push(TestProgram {
            name,
            package,
            file,
        });
    }
    suite.tests.sort_by(|one, other| one.name.cmp(&other.name));
    for pair in suite.tests.windows(2) {
        if pair[0].name == pair[1].name {
            bail!("two test programs are called {}", pair[0].name);
        }
    }
    Ok(suite)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(name: &str, kind: &str, test: bool, executable: &str) -> String {
        format!(
            r#"{{"reason":"compiler-artifact","package_id":"path+file:///w/p#pack@0.1.0","target":{{"name":"{name}","kind":["{kind}"]}},"profile":{{"test":{test}}},"executable":{executable}}}"#
        )
    }

    #[test]
    fn executables_are_sorted_into_tests_and_helpers() {
        let messages = [
            message("order", "test", true, r#""/t/order-1""#),
            message("ioregion_dispatch", "lib", false, "null"),
            "a build script's line".into(),
            message("loader", "bin", true, r#""/t/loader-2""#),
            message("loader", "bin", false, r#""/t/loader""#),
            r#"{"reason":"build-finished","success":true}"#.into(),
            message("errors", "test", true, r#""/t/errors-3""#),
        ];
        let suite = from_messages(&messages.join("\n")).unwrap();
        let names: Vec<&str> = suite.tests.iter().map(|test| test.name.as_str()).collect();
        assert_eq!(names, ["errors", "loader-unit", "order"]);
        assert!(suite.tests.iter().all(|test| test.package == "pack"));
        assert_eq!(suite.helpers, [PathBuf::from("/t/loader")]);
    }

    #[test]
    fn equal_names_and_broken_messages_are_refused() {
        let twice = message("order", "test", true, r#""/t/x""#);
        assert!(from_messages(&format!("{twice}\n{twice}")).is_err());
        assert!(from_messages("{\"reason\":").is_err());
    }

    #[test]
    fn sources_are_copied_and_what_is_gone_goes() {
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (dir.path().join("from"), dir.path().join("to"));
        std::fs::create_dir_all(&from).unwrap();
        for name in ["a.c", "a.h", "Makefile", "README.md"] {
            std::fs::write(from.join(name), name).unwrap();
        }
        std::fs::create_dir_all(&to).unwrap();
        for name in ["old.c", "a.o"] {
            std::fs::write(to.join(name), "").unwrap();
        }
        copy_changed(&from, &to).unwrap();
        let mut names: Vec<_> = std::fs::read_dir(&to)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        assert_eq!(names, ["Makefile", "a.c", "a.h", "a.o"]);
        let time = || {
            std::fs::metadata(to.join("a.c"))
                .unwrap()
                .modified()
                .unwrap()
        };
        let before = time();
        std::thread::sleep(std::time::Duration::from_millis(20));
        copy_changed(&from, &to).unwrap();
        assert_eq!(time(), before);
        std::fs::write(from.join("a.c"), "new").unwrap();
        copy_changed(&from, &to).unwrap();
        assert_eq!(std::fs::read_to_string(to.join("a.c")).unwrap(), "new");
    }
}
