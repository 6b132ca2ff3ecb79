//! Handing the files that programs leave behind to the machine outside.

use std::io;

use anyhow::{Context as _, Result};
use ioregion_init::hex::checksum;
use ioregion_init::{RESULTS, Report};

/// Bytes in one report: two characters each must fit into a line that the other side takes.
const PIECE: usize = 8 << 10;

/// Reports the files in [`RESULTS`] in the order of their names, and removes them. What is not a
/// plain file, or has a name that a report cannot hold, is left out with a note.
pub fn send(say: impl Fn(&Report)) -> Result<()> {
    let entries = std::fs::read_dir(RESULTS)
        .and_then(Iterator::collect::<io::Result<Vec<_>>>)
        .with_context(|| format!("reading {RESULTS}"))?;
    let mut paths: Vec<_> = entries.into_iter().map(|entry| entry.path()).collect();
    paths.sort();
    for path in paths {
        let name = path.file_name().and_then(|name| name.to_str());
        let plain = name.filter(|name| !name.contains(char::is_whitespace));
        let (Some(name), true) = (plain, path.is_file()) else {
            eprintln!("not handed out: {}", path.display());
            continue;
        };
        let bytes = std::fs::read(&path).with_context(|| format!("reading {}", path.display()))?;
        say(&Report::File {
            name: name.into(),
            size: bytes.len(),
            checksum: checksum(&bytes),
        });
        for piece in bytes.chunks(PIECE) {
            say(&Report::Data(piece.into()));
        }
        std::fs::remove_file(&path).with_context(|| format!("removing {}", path.display()))?;
    }
    Ok(())
}
