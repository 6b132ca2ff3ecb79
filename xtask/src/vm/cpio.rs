//! The file tree of an initramfs and its archive format (cpio, "newc").

use std::collections::BTreeMap;
use std::io::{self, Write};

use anyhow::{Result, bail};

/// Type bits of `st_mode`.
const DIRECTORY: u32 = 0o040_000;
const REGULAR: u32 = 0o100_000;
const CHARACTER_DEVICE: u32 = 0o020_000;

/// One entry of the tree.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Node {
    Directory,
    File { mode: u32, data: Vec<u8> },
    CharacterDevice { major: u32, minor: u32 },
}

/// A file tree by absolute path; the folders above each entry are made with it.
#[derive(Debug, Default)]
pub struct Tree {
    // Sorted, so that a folder comes before what is in it and the archive is repeatable.
    nodes: BTreeMap<String, Node>,
}

impl Tree {
    /// Adds a file with permission bits `mode`; adding the same again changes nothing.
    pub fn file(&mut self, path: &str, mode: u32, data: Vec<u8>) -> Result<()> {
        self.add(path, Node::File { mode, data })
    }

    /// Adds a character device.
    pub fn character_device(&mut self, path: &str, major: u32, minor: u32) -> Result<()> {
        self.add(path, Node::CharacterDevice { major, minor })
    }

    fn add(&mut self, path: &str, node: Node) -> Result<()> {
        let parts = path.strip_prefix('/').map(|path| path.split('/'));
        let plain = |part: &str| !part.is_empty() && part != "." && part != ".." && part.is_ascii();
        let Some(path) = path
            .strip_prefix('/')
            .filter(|_| parts.is_some_and(|mut parts| parts.all(plain)))
        else {
            bail!("{path} is no plain absolute path");
        };
        for (end, _) in path.match_indices('/') {
            let above = self.nodes.entry(path[..end].into());
            if *above.or_insert(Node::Directory) != Node::Directory {
                bail!("/{} is a file, so /{path} cannot be", &path[..end]);
            }
        }
        match self.nodes.get(path) {
            Some(there) if *there != node => bail!("two different files would be /{path}"),
            _ => self.nodes.insert(path.into(), node),
        };
        Ok(())
    }

    /// Writes the archive; equal trees give equal bytes.
    ///
    /// # Errors
    /// Of `out`, and `InvalidInput` for a file of 4 GiB or more, which the format cannot hold.
    pub fn write(&self, out: &mut impl Write) -> io::Result<()> {
        for (index, (path, node)) in self.nodes.iter().enumerate() {
            let (mode, device, data): (u32, (u32, u32), &[u8]) = match node {
                Node::Directory => (DIRECTORY | 0o755, (0, 0), &[]),
                Node::File { mode, data } => (REGULAR | mode, (0, 0), data),
                Node::CharacterDevice { major, minor } => {
                    (CHARACTER_DEVICE | 0o600, (*major, *minor), &[])
                }
            };
            let links = if mode & DIRECTORY == DIRECTORY { 2 } else { 1 };
            write_entry(out, index + 1, path, mode, links, device, data)?;
        }
        write_entry(out, 0, "TRAILER!!!", 0, 1, (0, 0), &[])
    }
}

fn write_entry(
    out: &mut impl Write,
    inode: usize,
    path: &str,
    mode: u32,
    links: u32,
    (major, minor): (u32, u32),
    data: &[u8],
) -> io::Result<()> {
    let number = |value: usize| {
        u32::try_from(value).map_err(|_| {
            let why = format!("{path} is too large for an initramfs");
            io::Error::new(io::ErrorKind::InvalidInput, why)
        })
    };
    let name_size = number(path.len() + 1)?;
    let fields = [
        number(inode)?,
        mode,
        0, // user
        0, // group
        links,
        0, // time of change
        number(data.len())?,
        0, // device that holds the entry
        0,
        major,
        minor,
        name_size,
        0, // checksum, unused in this format
    ];
    out.write_all(b"070701")?;
    for field in fields {
        write!(out, "{field:08x}")?;
    }
    out.write_all(path.as_bytes())?;
    out.write_all(b"\0")?;
    pad(out, 110 + path.len() + 1)?;
    out.write_all(data)?;
    pad(out, data.len())
}

/// Fills up to a multiple of four.
fn pad(out: &mut impl Write, written: usize) -> io::Result<()> {
    out.write_all(&[0; 3][..written.wrapping_neg() % 4])
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Name, mode and contents of each entry, by the format's own description.
    fn read(mut archive: &[u8]) -> Vec<(String, u32, Vec<u8>)> {
        let mut entries = Vec::new();
        loop {
            assert_eq!(&archive[..6], b"070701");
            let field = |index: usize| {
                let text = std::str::from_utf8(&archive[6 + index * 8..][..8]).unwrap();
                u32::from_str_radix(text, 16).unwrap()
            };
            let (mode, size, name_size) = (field(1), field(6) as usize, field(11) as usize);
            let name = std::str::from_utf8(&archive[110..][..name_size - 1]).unwrap();
            assert_eq!(archive[110 + name_size - 1], 0);
            let data_at = (110 + name_size).next_multiple_of(4);
            let data = archive[data_at..][..size].to_vec();
            entries.push((name.to_owned(), mode, data));
            archive = &archive[(data_at + size).next_multiple_of(4)..];
            if name == "TRAILER!!!" {
                assert!(archive.is_empty());
                return entries;
            }
        }
    }

    fn written(tree: &Tree) -> Vec<u8> {
        let mut bytes = Vec::new();
        tree.write(&mut bytes).unwrap();
        bytes
    }

    #[test]
    fn archive_holds_the_tree_with_folders_before_their_contents() {
        let mut tree = Tree::default();
        tree.file("/z/y/file", 0o755, b"12345".to_vec()).unwrap();
        tree.file("/init", 0o700, Vec::new()).unwrap();
        tree.character_device("/dev/console", 5, 1).unwrap();
        let entries = read(&written(&tree));
        let named: Vec<(&str, u32)> = entries
            .iter()
            .map(|(name, mode, _)| (name.as_str(), *mode))
            .collect();
        assert_eq!(
            named,
            [
                ("dev", 0o040_755),
                ("dev/console", 0o020_600),
                ("init", 0o100_700),
                ("z", 0o040_755),
                ("z/y", 0o040_755),
                ("z/y/file", 0o100_755),
                ("TRAILER!!!", 0),
            ]
        );
        assert_eq!(entries[5].2, b"12345");
    }

    #[test]
    fn archive_is_what_the_cpio_program_expects() {
        let mut tree = Tree::default();
        tree.file("/a", 0o644, b"hi".to_vec()).unwrap();
        let text = String::from_utf8(written(&tree)).unwrap();
        // ino mode uid gid nlink mtime filesize major minor rmajor rminor namesize check
        let head = "070701\
                    00000001000081a4000000000000000000000001000000000000000200000000\
                    00000000000000000000000000000002\
                    00000000a\0hi\0\x00070701";
        assert!(text.starts_with(head), "{text}");
    }

    #[test]
    fn same_tree_gives_the_same_bytes_in_whatever_order_it_was_made() {
        let make = |names: &[&str]| {
            let mut tree = Tree::default();
            for name in names {
                tree.file(name, 0o644, name.as_bytes().to_vec()).unwrap();
            }
            written(&tree)
        };
        assert_eq!(make(&["/a/b", "/c"]), make(&["/c", "/a/b"]));
    }

    #[test]
    fn conflicts_and_strange_paths_are_refused() {
        let mut tree = Tree::default();
        tree.file("/a", 0o644, Vec::new()).unwrap();
        tree.file("/a", 0o644, Vec::new()).unwrap();
        assert!(tree.file("/a", 0o644, vec![1]).is_err());
        assert!(tree.file("/a/b", 0o644, Vec::new()).is_err());
        for path in ["a", "/", "/a/../b", "//b", "/b/"] {
            assert!(tree.file(path, 0o644, Vec::new()).is_err(), "{path}");
        }
    }
}
