//! Folders that one process uses at a time.

use std::fs::{self, OpenOptions};
use std::io::{ErrorKind, Write as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};

/// A folder is in use while this lives.
#[derive(Debug)]
pub struct Lock {
    file: PathBuf,
}

impl Drop for Lock {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.file);
    }
}

impl Lock {
    /// Takes `dir`, which is made where it is not there; `None` while another process has it.
    pub fn try_take(dir: &Path) -> Result<Option<Self>> {
        fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
        let file = dir.join("owner.pid");
        // The second round is for a lock that its owner left behind when it was killed.
        for _ in 0..2 {
            match OpenOptions::new().write(true).create_new(true).open(&file) {
                Ok(mut made) => {
                    write!(made, "{}", std::process::id())
                        .with_context(|| format!("writing {}", file.display()))?;
                    return Ok(Some(Self { file }));
                }
                Err(error) if error.kind() == ErrorKind::AlreadyExists => {
                    let owner = fs::read_to_string(&file).unwrap_or_default();
                    // An empty file is one that its owner is about to write.
                    if owner.is_empty() || Path::new("/proc").join(owner.trim()).exists() {
                        return Ok(None);
                    }
                    let _ = fs::remove_file(&file);
                }
                Err(error) => {
                    return Err(error).with_context(|| format!("cannot make {}", file.display()));
                }
            }
        }
        Ok(None)
    }

    /// Takes `dir`, waiting for another process that has it.
    pub fn take(dir: &Path) -> Result<Self> {
        let mut said = false;
        loop {
            if let Some(lock) = Self::try_take(dir)? {
                return Ok(lock);
            }
            if !said {
                let file = dir.join("owner.pid");
                println!("waiting for the process that {} names", file.display());
                said = true;
            }
            std::thread::sleep(Duration::from_millis(500));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folder_is_taken_once_and_free_again_after_its_owner() {
        let dir = tempfile::tempdir().unwrap();
        let lock = Lock::try_take(dir.path()).unwrap();
        assert!(lock.is_some());
        assert!(Lock::try_take(dir.path()).unwrap().is_none());
        drop(lock);
        assert!(Lock::try_take(dir.path()).unwrap().is_some());
    }

    #[test]
    fn lock_of_a_dead_process_does_not_count() {
        let dir = tempfile::tempdir().unwrap();
        // Larger than any process number.
        fs::write(dir.path().join("owner.pid"), "4194305").unwrap();
        assert!(Lock::try_take(dir.path()).unwrap().is_some());
    }
}
