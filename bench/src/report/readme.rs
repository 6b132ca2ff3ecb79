//! The README's copy of the report.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use thiserror::Error;

use super::{Format, render};
use crate::results::Results;

const BEGIN: &str = "<!-- results:begin -->";
const END: &str = "<!-- results:end -->";

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
    #[error("{}: needs one `{BEGIN}` line and, after it, one `{END}` line", .path.display())]
    Markers {
        /// The README.
        path: PathBuf,
    },
}

/// Replaces what stands between the markers `<!-- results:begin -->` and
/// `<!-- results:end -->` of a README by the Markdown report.
///
/// # Errors
/// The file cannot be read or written, or does not have each marker once, in order.
pub fn update_readme(path: &Path, runs: &[Results]) -> Result<(), ReadmeError> {
    let io = |source| ReadmeError::Io {
        path: path.into(),
        source,
    };
    let before = fs::read_to_string(path).map_err(io)?;
    let after = with_results(&before, &render(runs, Format::Markdown))
        .ok_or_else(|| ReadmeError::Markers { path: path.into() })?;
    if after != before {
        fs::write(path, after).map_err(io)?;
    }
    Ok(())
}

fn with_results(readme: &str, report: &str) -> Option<String> {
    let (head, rest) = readme.split_once(BEGIN)?;
    let (old, tail) = rest.split_once(END)?;
    let again = |text: &str| text.contains(BEGIN) || text.contains(END);
    if again(head) || again(old) || again(tail) {
        return None;
    }
    Some(format!("{head}{BEGIN}\n\n{}\n\n{END}{tail}", report.trim()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::synthetic::results;

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
            &render(&[r.clone()], Format::Markdown),
        )
        .unwrap();
        assert!(with_results(&readme, &render(&[r], Format::Markdown)).is_some());
    }
}
