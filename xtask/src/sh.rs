//! Running other programs: every command that does something is printed before it runs.

use std::ffi::OsStr;
use std::fmt;
use std::fs::File;
use std::io::{self, BufRead, BufReader, IsTerminal, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, bail};

/// Variables that `cargo run` sets for the program it starts; handed on to another cargo they
/// cause needless rebuilds.
const FROM_CARGO_RUN: &[&str] = &["CARGO_MANIFEST_", "CARGO_PKG_", "CARGO_BIN_", "OUT_DIR"];

/// Variables that choose or flavour a toolchain; another toolchain must not inherit them.
const FROM_TOOLCHAIN: &[&str] = &[
    "CARGO",
    "CARGO_BUILD_RUSTFLAGS",
    "CARGO_BUILD_TARGET",
    "CARGO_ENCODED_RUSTFLAGS",
    "CARGO_TARGET_DIR",
    "RUSTC",
    "RUSTC_BOOTSTRAP",
    "RUSTC_WORKSPACE_WRAPPER",
    "RUSTC_WRAPPER",
    "RUSTDOC",
    "RUSTDOCFLAGS",
    "RUSTFLAGS",
    "RUSTUP_TOOLCHAIN",
];

/// Whether a command inherited by the environment variable `name` would disturb any cargo.
fn is_from_cargo_run(name: &str) -> bool {
    FROM_CARGO_RUN.iter().any(|prefix| name.starts_with(prefix))
}

/// `LD_LIBRARY_PATH` without the entries that `cargo run` and rustup prepend, or `None` where
/// nothing is left.
fn clean_library_path(value: &str) -> Option<String> {
    let theirs = |dir: &&str| {
        !dir.is_empty()
            && !dir.contains("/rustlib/")
            && !dir.contains("/toolchains/")
            && !dir.ends_with("/target/debug")
            && !dir.ends_with("/target/release")
            && !dir.ends_with("/deps")
    };
    let kept: Vec<&str> = value.split(':').filter(theirs).collect();
    (!kept.is_empty()).then(|| kept.join(":"))
}

/// A command to print and run: program, arguments and the variables that differ from ours.
#[derive(Debug, Clone)]
pub struct Cmd {
    program: String,
    args: Vec<String>,
    env: Vec<(String, String)>,
    dir: Option<PathBuf>,
    own_toolchain: bool,
}

impl Cmd {
    /// A command without arguments.
    pub fn new(program: impl AsRef<OsStr>) -> Self {
        Self {
            program: program.as_ref().to_string_lossy().into_owned(),
            args: Vec::new(),
            env: Vec::new(),
            dir: None,
            own_toolchain: false,
        }
    }

    /// A command from one line of words without quoting, for example `cargo fmt --check`.
    pub fn line(words: &str) -> Self {
        let mut words = words.split_whitespace();
        Self::new(words.next().unwrap_or_default()).args(words)
    }

    /// Adds one argument.
    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.args.push(arg.as_ref().to_string_lossy().into_owned());
        self
    }

    /// Adds arguments.
    pub fn args<A: AsRef<OsStr>>(self, args: impl IntoIterator<Item = A>) -> Self {
        args.into_iter().fold(self, Self::arg)
    }

    /// Sets an environment variable.
    pub fn env(mut self, name: &str, value: impl AsRef<OsStr>) -> Self {
        self.env
            .push((name.into(), value.as_ref().to_string_lossy().into_owned()));
        self
    }

    /// Runs in `dir` instead of in our own directory.
    pub fn dir(mut self, dir: impl Into<PathBuf>) -> Self {
        self.dir = Some(dir.into());
        self
    }

    /// Keeps every toolchain variable of our own cargo away from the command.
    pub fn scrubbed(mut self) -> Self {
        self.own_toolchain = true;
        self
    }

    /// Has the command killed when we end, however we do (where the system has `setpriv`).
    pub fn tied_to_us(self) -> Self {
        if which("setpriv").is_none() {
            return self;
        }
        let mut tied = Self::line("setpriv --pdeathsig KILL --").arg(&self.program);
        tied.args.extend(self.args);
        Self {
            program: tied.program,
            args: tied.args,
            ..self
        }
    }

    fn command(&self) -> Command {
        let mut command = Command::new(&self.program);
        command.args(&self.args);
        // Programs look for the object near themselves, where it is not in that case.
        if std::env::var_os("CARGO_TARGET_DIR").is_some()
            && std::env::var_os("IOREGION_BPF_OBJECT").is_none()
        {
            let object = concat!(env!("CARGO_MANIFEST_DIR"), "/../target/bpf/ioregion.bpf.o");
            command.env("IOREGION_BPF_OBJECT", object);
        }
        for (name, value) in std::env::vars_os() {
            let (name, value) = (name.to_string_lossy(), value.to_string_lossy());
            if name == "LD_LIBRARY_PATH" {
                match clean_library_path(&value) {
                    Some(kept) => command.env(&*name, kept),
                    None => command.env_remove(&*name),
                };
            } else if is_from_cargo_run(&name)
                || (self.own_toolchain && FROM_TOOLCHAIN.contains(&&*name))
            {
                command.env_remove(&*name);
            }
        }
        command.envs(self.env.iter().map(|(name, value)| (name, value)));
        if let Some(dir) = &self.dir {
            command.current_dir(dir);
        }
        command
    }

    /// Prints the command and runs it on our own terminal; a failure is an error.
    pub fn run(&self) -> Result<()> {
        println!("+ {self}");
        let status = self
            .command()
            .status()
            .with_context(|| format!("cannot start `{}`", self.program))?;
        if !status.success() {
            bail!("`{self}` failed: {status}");
        }
        Ok(())
    }

    /// Prints the command and runs it; each line of its output is printed as it comes and
    /// handed to `line` without colour codes. Says whether the command succeeded.
    pub fn run_watched(&self, mut line: impl FnMut(&str) + Send) -> Result<bool> {
        println!("+ {self}");
        let mut command = self.command();
        if io::stdout().is_terminal() && std::env::var_os("CARGO_TERM_COLOR").is_none() {
            command.env("CARGO_TERM_COLOR", "always");
        }
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot start `{}`", self.program))?;
        let (lines, watched) = std::sync::mpsc::channel();
        let pipes: [Option<Box<dyn Read + Send>>; 2] = [
            child.stdout.take().map(|pipe| Box::new(pipe) as _),
            child.stderr.take().map(|pipe| Box::new(pipe) as _),
        ];
        std::thread::scope(|scope| {
            for pipe in pipes.into_iter().flatten() {
                let lines = lines.clone();
                scope.spawn(move || {
                    for text in BufReader::new(pipe).split(b'\n').map_while(Result::ok) {
                        let text = String::from_utf8_lossy(&text).into_owned();
                        println!("{text}");
                        if lines.send(text).is_err() {
                            break;
                        }
                    }
                });
            }
            drop(lines);
            watched.iter().for_each(|text| line(&strip_colours(&text)));
        });
        Ok(child.wait()?.success())
    }

    /// Prints the command and runs it with errors on our own terminal; returns what it printed.
    /// A failure is an error.
    pub fn output(&self) -> Result<String> {
        println!("+ {self}");
        let output = self
            .command()
            .stdin(Stdio::null())
            .stderr(Stdio::inherit())
            .output()
            .with_context(|| format!("cannot start `{}`", self.program))?;
        if !output.status.success() {
            bail!("`{self}` failed: {}", output.status);
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Whether a command succeeds, and all that it prints (itself not printed).
    pub fn transcript(&self) -> Result<(bool, String)> {
        let output = self
            .command()
            .stdin(Stdio::null())
            .output()
            .with_context(|| format!("cannot start `{}`", self.program))?;
        let mut text = String::from_utf8_lossy(&output.stdout).into_owned();
        text.push_str(&String::from_utf8_lossy(&output.stderr));
        Ok((output.status.success(), text))
    }

    /// Standard output of a filter as bytes (not printed); a failure is an error.
    pub fn bytes(&self) -> Result<Vec<u8>> {
        let output = self
            .command()
            .stdin(Stdio::null())
            .output()
            .with_context(|| format!("cannot start `{}`", self.program))?;
        if !output.status.success() {
            let errors = String::from_utf8_lossy(&output.stderr);
            bail!("`{self}` failed: {}: {}", output.status, errors.trim());
        }
        Ok(output.stdout)
    }

    /// Prints the command and starts it with what it says going to the file `log`.
    pub fn spawn(&self, log: &Path) -> Result<Child> {
        println!("+ {self}");
        let file = File::create(log).with_context(|| format!("cannot make {}", log.display()))?;
        let errors = file.try_clone().context("cannot share a log")?;
        self.command()
            .stdin(Stdio::null())
            .stdout(file)
            .stderr(errors)
            .spawn()
            .with_context(|| format!("cannot start `{}`", self.program))
    }

    /// Starts the command to talk with; what it says goes to a file, what it complains of to
    /// another.
    pub fn spawn_asked(&self, said: &Path, log: &Path) -> Result<Child> {
        println!("+ {self}");
        let file = |path: &Path| {
            File::create(path).with_context(|| format!("cannot make {}", path.display()))
        };
        self.command()
            .stdin(Stdio::piped())
            .stdout(file(said)?)
            .stderr(file(log)?)
            .spawn()
            .with_context(|| format!("cannot start `{}`", self.program))
    }

    /// Standard output of a command that only looks (not printed); `None` where it cannot be
    /// started or fails.
    pub fn probe(&self) -> Option<String> {
        let output = self
            .command()
            .env("RUSTUP_AUTO_INSTALL", "0")
            .stdin(Stdio::null())
            .output()
            .ok()?;
        let text = String::from_utf8_lossy(&output.stdout).trim().to_owned();
        output.status.success().then_some(text)
    }
}

impl fmt::Display for Cmd {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(dir) = &self.dir {
            write!(out, "cd {} && ", dir.display())?;
        }
        for (name, value) in &self.env {
            write!(out, "{name}={} ", quoted(value))?;
        }
        write!(out, "{}", quoted(&self.program))?;
        self.args
            .iter()
            .try_for_each(|arg| write!(out, " {}", quoted(arg)))
    }
}

/// `word` as a shell needs it.
fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./=:,+@%".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}

/// `text` without ANSI colour sequences (`ESC [ … m`).
pub fn strip_colours(text: &str) -> String {
    let mut pieces = text.split("\u{1b}[");
    let mut plain = pieces.next().unwrap_or_default().to_owned();
    for piece in pieces {
        plain.push_str(piece.split_once('m').map_or("", |(_, rest)| rest));
    }
    plain
}

/// The first file called `name` in the directories of `PATH`.
pub fn which(name: &str) -> Option<PathBuf> {
    which_all(name).into_iter().next()
}

/// Every file called `name` in the directories of `PATH`, in order.
pub fn which_all(name: &str) -> Vec<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .map(|dir| dir.join(name))
        .filter(|file| is_executable(file))
        .collect()
}

fn is_executable(file: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt;
    file.metadata()
        .is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
}

/// Rows as lines with columns of equal width; the first row is the heading. A cell wider than
/// 60 characters does not widen its column.
pub fn table<const N: usize>(rows: &[[String; N]]) -> String {
    let width = |column: usize| {
        let lengths = rows.iter().map(|row| row[column].chars().count());
        lengths.filter(|&length| length <= 60).max().unwrap_or(0)
    };
    let widths: [usize; N] = std::array::from_fn(width);
    let mut text = String::new();
    for row in rows {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(widths) {
            line.push_str(&format!("{cell:<width$}  "));
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn command_prints_as_a_shell_would_take_it() {
        let cmd = Cmd::line("cargo test -p x")
            .arg("a b")
            .env("RUSTFLAGS", "--cfg loom");
        assert_eq!(
            cmd.to_string(),
            "RUSTFLAGS='--cfg loom' cargo test -p x 'a b'"
        );
        assert_eq!(quoted("it's"), r"'it'\''s'");
    }

    #[test]
    fn library_path_keeps_only_what_the_user_put_there() {
        let value =
            "/w/target/debug/deps:/w/target/debug:/h/toolchains/s/lib/rustlib/x/lib:/opt/lib";
        assert_eq!(clean_library_path(value).as_deref(), Some("/opt/lib"));
        assert_eq!(clean_library_path("/w/target/debug/deps:"), None);
    }

    #[test]
    fn watched_command_hands_over_both_streams_and_its_failure() {
        let mut seen = Vec::new();
        let cmd = Cmd::new("sh").args(["-c", "echo out; echo err >&2; exit 3"]);
        let success = cmd.run_watched(|line| seen.push(line.to_owned())).unwrap();
        seen.sort();
        assert!(!success);
        assert_eq!(seen, ["err", "out"]);
    }

    #[test]
    fn scrubbed_command_does_not_inherit_the_manifest_directory() {
        let cmd = Cmd::new("sh").args(["-c", "echo ${CARGO_MANIFEST_DIR-none} $EXTRA"]);
        let printed = cmd.scrubbed().env("EXTRA", "given").probe();
        assert_eq!(printed.as_deref(), Some("none given"));
    }

    #[test]
    fn colours_are_stripped() {
        assert_eq!(strip_colours("\u{1b}[32;1mok\u{1b}[0m 3"), "ok 3");
        assert_eq!(strip_colours("plain"), "plain");
    }

    #[test]
    fn table_columns_line_up() {
        let rows = [["a", "b"], ["long", "c"]].map(|row| row.map(String::from));
        assert_eq!(table(&rows), "a     b\nlong  c\n");
    }
}
