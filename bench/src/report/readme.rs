//! The README's copy of the report.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use thiserror::Error;

use super::{Format, render};
use crate::results::Results;
use crate::vduse::Disks;

const RESULTS: Markers = Markers {
    begin: "<!-- results:begin -->",
    end: "<!-- results:end -->",
};
const DISKS: Markers = Markers {
    begin: "<!-- disks:begin -->",
    end: "<!-- disks:end -->",
};

/// What a section stands between.
#[derive(Debug, Clone, Copy)]
struct Markers {
    begin: &'static str,
    end: &'static str,
}

/// Why the README was left as it was.
#[derive(Debug, Error)]
pub enum ReadmeError {
    /// The file could not be read or written.
    #[error("{}: {source}", .path.display())]
    Io {
        /// The README.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The results have no place to go.
    #[error("{}: needs one `{begin}` line and, after it, one `{end}` line", .path.display())]
    Markers {
        /// The README.
        path: PathBuf,
        /// The first marker.
        begin: &'static str,
        /// The second one.
        end: &'static str,
    },
}

/// Replaces what stands between the markers `<!-- results:begin -->` and
/// `<!-- results:end -->` of a README by the Markdown report.
///
/// # Errors
/// The file cannot be read or written, or does not have each marker once, in order.
pub fn update_readme(path: &Path, runs: &[Results]) -> Result<(), ReadmeError> {
    update(path, RESULTS, &render(runs, Format::Markdown))
}

/// Replaces what stands between the markers `<!-- disks:begin -->` and `<!-- disks:end -->` of a
/// README by the tables of disks.
///
/// # Errors
/// As [`update_readme`].
pub fn update_disks(path: &Path, runs: &[Disks]) -> Result<(), ReadmeError> {
    let tables: Vec<String> = runs
        .iter()
        .map(|disks| disks.render(Format::Markdown))
        .collect();
    update(path, DISKS, &tables.join("\n"))
}

fn update(path: &Path, markers: Markers, report: &str) -> Result<(), ReadmeError> {
    let io = |source| ReadmeError::Io {
        path: path.into(),
        source,
    };
    let before = fs::read_to_string(path).map_err(io)?;
    let after = with_results(&before, markers, report).ok_or_else(|| ReadmeError::Markers {
        path: path.into(),
        begin: markers.begin,
        end: markers.end,
    })?;
    if after != before {
        fs::write(path, after).map_err(io)?;
    }
    Ok(())
}

fn with_results(readme: &str, markers: Markers, report: &str) -> Option<String> {
    let Markers { begin, end } = markers;
    let (head, rest) = readme.split_once(begin)?;
    let (old, tail) = rest.split_once(end)?;
    let again = |text: &str| text.contains(begin) || text.contains(end);
    if again(head) || again(old) || again(tail) {
        return None;
    }
    Some(format!("{head}{begin}\n\n{}\n\n{end}{tail}", report.trim()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::synthetic::results;

    const BEGIN: &str = RESULTS.begin;
    const END: &str = RESULTS.end;

    #[test]
    fn readme_is_updated_between_its_markers_and_only_there() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("README.md");
        fs::write(&path, format!("# Head\n{BEGIN}\nstale\n{END}\nTail\n")).unwrap();
        update_readme(&path, &[results()]).unwrap();
        let once = fs::read_to_string(&path).unwrap();
        assert!(
            once.starts_with(&format!("# Head\n{BEGIN}\n\n2000-01-01")),
            "{once}"
        );
        assert!(once.ends_with(&format!("|\n\n{END}\nTail\n")), "{once}");
        assert!(!once.contains("stale"));
        update_readme(&path, &[results()]).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), once);
    }

    #[test]
    fn readme_without_its_markers_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("README.md");
        for text in [
            "none".into(),
            format!("{END} {BEGIN}"),
            BEGIN.into(),
            format!("{BEGIN}{END}{END}"),
        ] {
            fs::write(&path, &text).unwrap();
            let error = update_readme(&path, &[results()]).unwrap_err().to_string();
            assert!(
                error.contains("README.md") && error.contains(BEGIN) && error.contains(END),
                "{error}"
            );
            assert_eq!(fs::read_to_string(&path).unwrap(), text);
        }
    }

    #[test]
    fn hostile_file_cannot_end_the_results_section() {
        let mut r = results();
        r.scenarios[0].name = format!("x{END}");
        r.host.cpu_model = Some(format!("y{END}{BEGIN}"));
        let readme = with_results(
            &format!("{BEGIN}{END}"),
            RESULTS,
            &render(&[r.clone()], Format::Markdown),
        )
        .unwrap();
        assert!(with_results(&readme, RESULTS, &render(&[r], Format::Markdown)).is_some());
    }
}
