//! Room on the disk, looked at before an hour of building ends for want of it.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use nix::sys::statvfs::statvfs;

/// Bytes that all default tiers leave in `target/` (16 GiB when this was measured), and some to
/// spare.
const TESTS: u64 = 20 << 30;

/// Whether what a run of all tiers still has to build finds room beside what is built already.
///
/// # Errors
///
/// Names the folder, the room that there is, and what to do.
pub fn check(root: &Path) -> Result<()> {
    let target = root.join("target");
    fs::create_dir_all(&target).with_context(|| format!("cannot make {}", target.display()))?;
    let stat = statvfs(&target).with_context(|| format!("looking at {}", target.display()))?;
    let free = stat.blocks_available() * stat.fragment_size();
    judge(&target, free, used(&target))
}

fn judge(target: &Path, free: u64, used: u64) -> Result<()> {
    let missing = TESTS.saturating_sub(used);
    let gib = |bytes: u64| bytes as f64 / f64::from(1 << 30);
    ensure!(
        free >= missing,
        "{} has {:.1} GiB of free space, and all tiers need {:.1} GiB more: make room, or name \
         one tier with --tier",
        target.display(),
        gib(free),
        gib(missing)
    );
    Ok(())
}

/// Bytes on the disk of everything in a folder; what cannot be looked at counts as nothing.
fn used(folder: &Path) -> u64 {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let bytes = |entry: fs::DirEntry| match entry.metadata() {
        Ok(metadata) if metadata.is_dir() => used(&entry.path()),
        Ok(metadata) => metadata.blocks() * 512,
        Err(_) => 0,
    };
    entries.map(bytes).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_built_already_needs_no_room() {
        let target = Path::new("target");
        assert!(judge(target, TESTS, 0).is_ok());
        assert!(judge(target, 1 << 30, TESTS - (1 << 30)).is_ok());
        assert!(judge(target, 0, 2 * TESTS).is_ok());
        let error = judge(target, 3 << 29, 0).unwrap_err().to_string();
        assert!(error.contains("has 1.5 GiB"), "{error}");
        assert!(error.contains("need 20.0 GiB more"), "{error}");
    }

    #[test]
    fn folder_counts_with_what_is_in_it() {
        let dir = tempfile::tempdir().unwrap();
        let before = used(dir.path());
        fs::create_dir(dir.path().join("deep")).unwrap();
        fs::write(dir.path().join("deep/file"), vec![1; 1 << 20]).unwrap();
        assert!(used(dir.path()) >= before + (1 << 20));
        assert_eq!(used(&dir.path().join("absent")), 0);
    }
}
