//! What a kernel was built from, so that an equal one is not built again.

use std::io;
use std::path::Path;

/// Everything that a build depends on.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Key {
    text: String,
}

/// The file beside a built kernel.
const FILE: &str = "built-from.txt";

impl Key {
    /// Adds an ingredient.
    pub fn add(&mut self, name: &str, contents: &str) {
        // With its length, so that no two lists of ingredients read the same.
        let lines = contents.lines().count();
        self.text.push_str(&format!(
            "== {name}, {} bytes, {lines} lines\n{contents}\n",
            contents.len()
        ));
    }

    /// A short name for folders (FNV-1a). Different keys may share it: [`is_in`](Self::is_in)
    /// compares the whole.
    pub fn short(&self) -> String {
        let mut hash: u64 = 0xcbf2_9ce4_8422_2325;
        for byte in self.text.bytes() {
            hash = (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3);
        }
        format!("{hash:016x}")
    }

    /// Writes it beside a built kernel.
    pub fn write(&self, dir: &Path) -> io::Result<()> {
        std::fs::write(dir.join(FILE), &self.text)
    }

    /// Whether the kernel in `dir` was built from exactly this.
    pub fn is_in(&self, dir: &Path) -> bool {
        std::fs::read(dir.join(FILE)).is_ok_and(|text| text == self.text.as_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(parts: &[(&str, &str)]) -> Key {
        let mut key = Key::default();
        for (name, contents) in parts {
            key.add(name, contents);
        }
        key
    }

    #[test]
    fn every_ingredient_changes_the_key() {
        let base = [
            ("version", "6.12.1"),
            ("1.patch", "a\n"),
            ("2.patch", "b\n"),
        ];
        let short = key(&base).short();
        assert_eq!(short, key(&base).short());
        assert_eq!(short.len(), 16);
        for other in [
            &[("version", "6.12.2"), base[1], base[2]][..],
            &[base[0], ("1.patch", "a \n"), base[2]],
            &[base[0], ("3.patch", "a\n"), base[2]],
            &[base[0], base[2], base[1]],
            &base[..2],
        ] {
            assert_ne!(short, key(other).short(), "{other:?}");
        }
    }

    #[test]
    fn contents_cannot_pose_as_another_ingredient() {
        let one = key(&[("a", "x\n== b, 1 bytes, 1 lines\ny")]);
        let two = key(&[("a", "x"), ("b", "y")]);
        assert_ne!(one, two);
    }

    #[test]
    fn kernel_of_another_key_in_the_same_folder_does_not_count() {
        let dir = tempfile::tempdir().unwrap();
        let (one, two) = (key(&[("a", "1")]), key(&[("a", "2")]));
        assert!(!one.is_in(dir.path()));
        one.write(dir.path()).unwrap();
        assert!(one.is_in(dir.path()));
        assert!(!two.is_in(dir.path()));
    }
}
