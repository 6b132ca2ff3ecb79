//! What the VM is to do: one line per item, fields separated by tabs.

use std::fmt::{self, Write as _};

/// What the first process loads, sets and runs, in this order.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Manifest {
    /// Kernel modules by path, each after those that it needs.
    pub modules: Vec<String>,
    /// Environment of every program.
    pub env: Vec<(String, String)>,
    /// Programs to run one after the other.
    pub jobs: Vec<Job>,
    /// Whether other VMs run a part of the programs: each VM asks for every program that it runs
    /// ([`Report::Next`](crate::Report::Next)).
    pub shared: bool,
}

/// One program to run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Job {
    /// Its name in reports: one word.
    pub name: String,
    /// After how many seconds it is killed.
    pub limit_s: u32,
    /// The program's path and its arguments.
    pub argv: Vec<String>,
}

/// A manifest that cannot be written or read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ManifestError {
    /// A field that would break its line (a tab, a line end) or an empty or spaced name.
    BadField(String),
    /// A line that says nothing known.
    BadLine(String),
}

impl fmt::Display for ManifestError {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::BadField(field) => write!(
                out,
                "{field:?} cannot be handed to the VM: tabs and line ends are not allowed, nor \
                 spaces in names"
            ),
            Self::BadLine(line) => write!(out, "no manifest line: {line:?}"),
        }
    }
}

impl std::error::Error for ManifestError {}

impl Manifest {
    /// The text form.
    ///
    /// # Errors
    /// [`ManifestError::BadField`] for a field that its line cannot hold.
    pub fn encode(&self) -> Result<String, ManifestError> {
        let mut text = String::new();
        let mut line = |fields: &[&str]| {
            for field in fields {
                if field.contains(['\t', '\n', '\0']) {
                    return Err(ManifestError::BadField((*field).into()));
                }
            }
            let _ = writeln!(text, "{}", fields.join("\t"));
            Ok(())
        };
        for module in &self.modules {
            line(&["module", module])?;
        }
        for (name, value) in &self.env {
            line(&["env", name, value])?;
        }
        for Job {
            name,
            limit_s,
            argv,
        } in &self.jobs
        {
            if name.is_empty() || name.contains(char::is_whitespace) || argv.is_empty() {
                return Err(ManifestError::BadField(name.clone()));
            }
            let limit = limit_s.to_string();
            let mut fields = vec!["run", name, &limit];
            fields.extend(argv.iter().map(String::as_str));
            line(&fields)?;
        }
        if self.shared {
            line(&["shared"])?;
        }
        Ok(text)
    }

    /// Reads the text form.
    ///
    /// # Errors
    /// [`ManifestError::BadLine`] for a line that says nothing known.
    pub fn decode(text: &str) -> Result<Self, ManifestError> {
        let mut manifest = Self::default();
        for line in text.lines() {
            let fields: Vec<&str> = line.split('\t').collect();
            let bad = || ManifestError::BadLine(line.into());
            match fields[..] {
                ["module", path] => manifest.modules.push(path.into()),
                ["shared"] => manifest.shared = true,
                ["env", name, value] => manifest.env.push((name.into(), value.into())),
                ["run", name, limit, ref argv @ ..] if !argv.is_empty() => {
                    manifest.jobs.push(Job {
                        name: name.into(),
                        limit_s: limit.parse().map_err(|_| bad())?,
                        argv: argv.iter().map(ToString::to_string).collect(),
                    });
                }
                _ => return Err(bad()),
            }
        }
        Ok(manifest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn manifest() -> Manifest {
        Manifest {
            modules: vec!["/lib/a.ko".into(), "/lib/b.ko".into()],
            env: vec![("EMPTY".into(), String::new()), ("A".into(), "b c".into())],
            jobs: vec![Job {
                name: "one".into(),
                limit_s: 60,
                argv: vec!["/bin/one".into(), String::new(), "a b".into()],
            }],
            shared: true,
        }
    }

    #[test]
    fn what_is_written_is_read_back() {
        let manifest = manifest();
        let text = manifest.encode().unwrap();
        assert_eq!(Manifest::decode(&text), Ok(manifest));
        assert_eq!(Manifest::decode(""), Ok(Manifest::default()));
    }

    #[test]
    fn fields_that_would_break_their_line_are_refused() {
        for field in ["a\tb", "a\nb", "a\0b"] {
            let mut manifest = manifest();
            manifest.jobs[0].argv.push(field.into());
            let refused = Err(ManifestError::BadField(field.into()));
            assert_eq!(manifest.encode(), refused);
        }
        for name in ["", "two words"] {
            let mut manifest = manifest();
            manifest.jobs[0].name = name.into();
            assert!(manifest.encode().is_err(), "{name:?}");
        }
    }

    #[test]
    fn unknown_lines_are_refused() {
        for line in ["", "run\tx\t5", "run\tx\tsoon\t/x", "mount\t/", "env\tA"] {
            let text = format!("{line}\n");
            let refused = Err(ManifestError::BadLine(line.into()));
            assert_eq!(Manifest::decode(&text), refused);
        }
    }
}
