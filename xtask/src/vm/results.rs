//! Files that programs in the VM leave behind, as they come over the report line.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use ioregion_init::hex::checksum;

/// A program in the VM must not fill this machine's disk.
const LARGEST: usize = 64 << 20;

/// One file.
#[derive(Debug, Clone, PartialEq, Eq)]
struct ResultFile {
    name: String,
    size: usize,
    checksum: u64,
    bytes: Vec<u8>,
}

impl ResultFile {
    fn is_whole(&self) -> bool {
        self.bytes.len() == self.size && checksum(&self.bytes) == self.checksum
    }
}

/// The files so far.
#[derive(Debug, Default)]
pub struct Results {
    files: Vec<ResultFile>,
    /// What cannot be taken, in words.
    refused: Vec<String>,
}

impl Results {
    /// A file of `size` bytes begins.
    pub fn begin(&mut self, name: &str, size: usize, checksum: u64) {
        let harmless = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        if name.starts_with('.') || name.is_empty() || !name.chars().all(harmless) {
            self.refused.push(format!(
                "result file {name:?} has a name with more than letters, digits and -_."
            ));
        } else if size > LARGEST {
            self.refused
                .push(format!("result file {name} is larger than 64 MiB"));
        }
        self.files.push(ResultFile {
            name: name.into(),
            size,
            checksum,
            bytes: Vec::new(),
        });
    }

    /// The next bytes of the file that began last.
    pub fn data(&mut self, bytes: &[u8]) {
        if let Some(file) = self.files.last_mut()
            && file.bytes.len() + bytes.len() <= file.size.min(LARGEST)
        {
            file.bytes.extend_from_slice(bytes);
        }
    }

    /// What is wrong with them, one reason per item.
    pub fn failures(&self) -> Vec<String> {
        let cut = self.files.iter().filter(|file| !file.is_whole());
        let cut = cut.map(|file| {
            let ResultFile {
                name, size, bytes, ..
            } = file;
            format!(
                "result file {name} came damaged: {} of {size} bytes",
                bytes.len()
            )
        });
        self.refused.iter().cloned().chain(cut).collect()
    }

    /// Writes the files into `dir`, which is made where there are some, and returns their paths.
    /// To be called where [`failures`](Self::failures) has none.
    pub fn write(&self, dir: &Path) -> Result<Vec<PathBuf>> {
        let mut paths = Vec::new();
        for file in &self.files {
            let path = dir.join(&file.name);
            std::fs::create_dir_all(dir)
                .and_then(|()| std::fs::write(&path, &file.bytes))
                .with_context(|| format!("writing {}", path.display()))?;
            paths.push(path);
        }
        Ok(paths)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn results(name: &str, size: usize, pieces: &[&[u8]]) -> Results {
        let mut results = Results::default();
        results.begin(name, size, checksum(b"abcd"));
        pieces.iter().for_each(|piece| results.data(piece));
        results
    }

    #[test]
    fn pieces_become_files() {
        let dir = tempfile::tempdir().unwrap();
        let results = results("run.json", 4, &[b"ab", b"cd"]);
        assert!(results.failures().is_empty());
        let paths = results.write(&dir.path().join("new")).unwrap();
        assert_eq!(paths, [dir.path().join("new/run.json")]);
        assert_eq!(std::fs::read(&paths[0]).unwrap(), b"abcd");
        assert!(Results::default().write(Path::new("/proc/x")).is_ok());
    }

    #[test]
    fn damaged_files_are_named() {
        for pieces in [
            &[&b"abc"[..]][..],
            &[b"abcd", b"e"],
            &[b"abdc"],
            &[b"abcde"],
        ] {
            let failures = results("x", 4, pieces).failures();
            let exact = pieces == [&b"abcd"[..], b"e"];
            // What comes too much is not taken, and does no harm.
            assert_eq!(failures.is_empty(), exact, "{pieces:?}: {failures:?}");
        }
    }

    #[test]
    fn names_that_lead_elsewhere_and_giants_are_refused() {
        for name in ["", "..", ".x", "a/b", "/etc/passwd", "a b", "a\u{e9}"] {
            assert!(
                !results(name, 4, &[b"abcd"]).failures().is_empty(),
                "{name}"
            );
        }
        let giant = results("x", usize::MAX, &[]).failures();
        assert!(giant[0].contains("larger"), "{giant:?}");
    }
}
